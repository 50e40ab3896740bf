//! The book of recovery points: which markers have arrived, which points are complete, which go. Pure.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::bad::BadPoint;
use super::groups::Groups;
use super::verify::Verification;
use crate::model::policy::{self, Candidate, Policy, Reason};
use crate::model::{DiskId, MachineId, Marker, PointId, Position, RecoveryPoint};

/// A point of which not every disk has the marker.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pending {
    /// What the markers say.
    pub marker: Marker,
    /// When the first disk had it, in seconds the master target has run.
    pub since: u64,
    /// Disks that have it, durably in the replica.
    pub arrived: BTreeMap<DiskId, Position>,
}

/// What an arrival changed, to be made durable together with the checkpoint that brought it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// A point that is complete now.
    pub listed: Option<RecoveryPoint>,
    /// A point that still waits for disks.
    pub pending: Option<(PointId, Pending)>,
    /// Points that will not be completed any more, or were.
    pub forget: Vec<PointId>,
}

/// All points of a master target.
#[derive(Clone, Debug, Default)]
pub struct Book {
    listed: BTreeMap<PointId, RecoveryPoint>,
    /// Listed points of each machine, the oldest first.
    in_order: BTreeMap<(MachineId, u64), PointId>,
    pending: HashMap<PointId, Pending>,
    in_use: HashMap<PointId, u32>,
    bad: BTreeMap<PointId, BadPoint>,
    verified: HashMap<PointId, Verification>,
    groups: Groups,
    next_order: u64,
    incomplete: u64,
}

impl Book {
    /// The book as the catalogue has it.
    pub fn load(
        listed: Vec<RecoveryPoint>,
        pending: Vec<(PointId, Pending)>,
        bad: Vec<BadPoint>,
        verified: Vec<(PointId, Verification)>,
    ) -> Self {
        let mut groups = Groups::default();
        listed.iter().for_each(|point| groups.add(point));
        let next_order = listed.iter().chain(bad.iter().map(|b| &b.point)).map(|p| p.order + 1).max().unwrap_or(1);
        Self {
            in_order: listed.iter().map(|p| ((p.machine, p.order), p.id)).collect(),
            listed: listed.into_iter().map(|p| (p.id, p)).collect(),
            pending: pending.into_iter().collect(),
            bad: bad.into_iter().map(|b| (b.point.id, b)).collect(),
            verified: verified.into_iter().collect(),
            groups,
            next_order,
            ..Self::default()
        }
    }

    /// Points of groups.
    pub fn groups(&self) -> &Groups {
        &self.groups
    }

    /// What is to be logged about points of groups, once.
    pub fn take_group_news(&mut self) -> Vec<String> {
        self.groups.take_news()
    }

    /// As much of the book as the arrivals of some points look at and change: what waits, and those points.
    pub fn excerpt(&self, points: impl Iterator<Item = PointId>) -> Book {
        let listed = points.filter_map(|id| self.listed.get(&id)).map(|point| (point.id, point.clone()));
        Book { listed: listed.collect(), pending: self.pending.clone(), next_order: self.next_order, ..Book::default() }
    }

    /// What becomes of a marker that is durable in the replica of `disk`. Changes nothing: see [`Book::commit`].
    /// `configured` are the machine's disks here.
    pub fn arrive(&self, disk: DiskId, position: Position, marker: &Marker, configured: &[DiskId], clock: u64) -> Changes {
        let mut changes = Changes::default();
        // A point that is there, or an id that another machine uses already, changes nothing.
        let foreign = self.pending.get(&marker.point).is_some_and(|p| p.marker.machine != marker.machine);
        if self.listed.contains_key(&marker.point) || self.bad.contains_key(&marker.point) || foreign {
            return changes;
        }
        let mut pending = self.pending.get(&marker.point).cloned().unwrap_or_else(|| Pending {
            marker: marker.clone(),
            since: clock,
            arrived: BTreeMap::new(),
        });
        if pending.arrived.get(&disk).is_some_and(|known| *known != position) {
            // Made twice under one id, by an agent that went down in between: nobody knows which of them the others have.
            changes.forget.push(marker.point);
            return changes;
        }
        pending.arrived.insert(disk, position);
        // Every disk of the machine, by the agent's list and by ours: a point without one of them is no point.
        let complete = marker.disks.iter().chain(configured).all(|d| pending.arrived.contains_key(d));
        if !complete {
            changes.pending = Some((marker.point, pending));
            return changes;
        }
        changes.forget.push(marker.point);
        let overtaken = |other: &Pending| {
            other.marker.machine == marker.machine
                && other.arrived.iter().all(|(d, at)| pending.arrived.get(d).is_some_and(|newer| newer > at))
        };
        changes.forget.extend(self.pending.iter().filter(|(id, p)| **id != marker.point && overtaken(p)).map(|(id, _)| *id));
        changes.listed = Some(RecoveryPoint {
            id: marker.point,
            machine: marker.machine,
            kind: marker.kind,
            label: marker.label.clone(),
            wall_ms: marker.wall_ms,
            hold_us: marker.hold_us,
            order: self.next_order,
            listed_clock: clock,
            pinned: false,
            sizes: marker.disks.iter().copied().zip(marker.sizes.iter().copied()).collect(),
            group: marker.group.clone(),
            remark: marker.remark.clone(),
            disks: pending.arrived,
        });
        changes
    }

    /// The changes are durable.
    pub fn commit(&mut self, changes: Changes) {
        for id in changes.forget {
            if self.pending.remove(&id).is_some() && changes.listed.as_ref().is_none_or(|p| p.id != id) {
                self.incomplete += 1;
            }
        }
        self.pending.extend(changes.pending);
        if let Some(point) = changes.listed {
            self.next_order = self.next_order.max(point.order + 1);
            self.in_order.insert((point.machine, point.order), point.id);
            self.groups.add(&point);
            self.listed.insert(point.id, point);
        }
    }

    /// What the policy drops of a machine's points, with the reason. `used` are the bytes of its old content.
    pub fn expired(&self, machine: MachineId, policy: &Policy, clock: u64, used: u64) -> Vec<(PointId, Reason)> {
        let points = self.of(machine);
        let newest = self.groups.newest_of(&points);
        // Not beyond an age that was asked for: a group that is no more must not keep old content without end.
        let age_max = policy.span.unwrap_or(Duration::MAX).min(policy.ladder.span()).as_secs();
        let candidate = |p: &&RecoveryPoint| {
            let listed = self.groups.listed_clock(p);
            let group_point = self.groups.whole_of(p).map(|e| e.statement.point);
            let needed = group_point.is_some_and(|id| newest.contains(&id)) && clock.saturating_sub(listed) < age_max;
            Candidate { id: p.id, kind: p.kind, listed, held: p.pinned || self.in_use.contains_key(&p.id), group_point, needed }
        };
        let candidates: Vec<Candidate> = points.iter().map(candidate).collect();
        policy::judge(&candidates, &self.groups.candidates(&points), policy, clock, used)
    }

    /// Points of a machine that wait for a disk beyond the policy, the oldest first: a disk that never sends its markers
    /// must not make the others keep their history without end.
    pub fn hopeless(&self, machine: MachineId, points_max: usize, span: Duration, clock: u64) -> Vec<PointId> {
        let mut waiting: Vec<_> = self.pending.iter().filter(|(_, p)| p.marker.machine == machine).collect();
        waiting.sort_by_key(|(_, p)| (p.since, p.arrived.values().min().copied()));
        let beyond = waiting.len().saturating_sub(points_max);
        let gone = waiting.iter().enumerate().filter(|(index, (_, p))| *index < beyond || clock.saturating_sub(p.since) > span.as_secs());
        gone.map(|(_, (id, _))| **id).collect()
    }

    /// Takes points off the list; their data may be removed once this is durable.
    pub fn unlist(&mut self, points: &[PointId]) {
        for id in points {
            if let Some(point) = self.listed.remove(id) {
                self.in_order.remove(&(point.machine, point.order));
                self.groups.remove(&point);
            }
            self.verified.remove(id);
        }
    }

    /// Takes points off the list that became unusable, which is durable.
    pub fn mark_bad(&mut self, points: Vec<BadPoint>) {
        for bad in points {
            self.unlist(&[bad.point.id]);
            self.bad.insert(bad.point.id, bad);
        }
    }

    /// Points that became unusable and were not cleared, the oldest first.
    pub fn bad(&self) -> Vec<&BadPoint> {
        let mut all: Vec<_> = self.bad.values().collect();
        all.sort_by_key(|b| b.point.order);
        all
    }

    /// A point that became unusable.
    pub fn get_bad(&self, id: PointId) -> Option<&BadPoint> {
        self.bad.get(&id)
    }

    /// Clears unusable points, which is durable.
    pub fn clear_bad(&mut self, points: &[PointId]) {
        for id in points {
            self.bad.remove(id);
        }
    }

    /// The last verification of a listed point.
    pub fn verification(&self, id: PointId) -> Option<&Verification> {
        self.verified.get(&id)
    }

    /// Notes a verification, which is durable.
    pub fn note_verified(&mut self, id: PointId, verification: Verification) {
        if self.listed.contains_key(&id) {
            self.verified.insert(id, verification);
        }
    }

    /// Points that are listed or wait, as far as they have a disk: id, position, bytes of the disk there.
    pub fn with_disk(&self, disk: DiskId) -> Vec<(PointId, Position, u64)> {
        let listed = self.listed.values().filter_map(|p| {
            let size = p.sizes.get(&disk).copied().unwrap_or(u64::MAX);
            p.disks.get(&disk).map(|at| (p.id, *at, size))
        });
        let waiting = self.pending.iter().filter_map(|(id, p)| p.arrived.get(&disk).map(|at| (*id, *at, u64::MAX)));
        listed.chain(waiting).collect()
    }

    /// A listed point.
    pub fn get(&self, id: PointId) -> Option<&RecoveryPoint> {
        self.listed.get(&id)
    }

    /// Listed points of a machine, the oldest first.
    pub fn of(&self, machine: MachineId) -> Vec<&RecoveryPoint> {
        self.in_order.range((machine, 0)..=(machine, u64::MAX)).filter_map(|(_, id)| self.listed.get(id)).collect()
    }

    /// Listed points in no order.
    pub fn listed(&self) -> impl Iterator<Item = &RecoveryPoint> {
        self.listed.values()
    }

    /// All listed points, the oldest first.
    pub fn all(&self) -> Vec<RecoveryPoint> {
        let mut points: Vec<_> = self.listed.values().cloned().collect();
        points.sort_by_key(|p| p.order);
        points
    }

    /// The oldest position of a disk that a listed or pending point needs; nothing older is needed.
    pub fn oldest_needed(&self, disk: DiskId) -> Option<Position> {
        self.needed(disk).first().copied()
    }

    /// Points that were given up because a disk's marker never came.
    pub fn incomplete(&self) -> u64 {
        self.incomplete
    }

    /// Positions of a disk that a listed or pending point needs, or one that was taken off the list and is kept.
    pub fn needed(&self, disk: DiskId) -> BTreeSet<Position> {
        let listed = self.listed.values().filter_map(|p| p.disks.get(&disk));
        let pending = self.pending.values().filter_map(|p| p.arrived.get(&disk));
        let kept = self.bad.values().filter(|b| b.kept).filter_map(|b| b.point.disks.get(&disk));
        listed.chain(pending).chain(kept).copied().collect()
    }

    /// Kept points of a machine that are off the list and older than `span`, or all of them for want of space.
    pub fn stale_bad(&self, machine: MachineId, span: Duration, clock: u64, no_space: bool) -> Vec<BadPoint> {
        let old = |b: &&BadPoint| no_space || clock.saturating_sub(b.point.listed_clock) > span.as_secs();
        let kept = self.bad.values().filter(|b| b.kept && b.point.machine == machine).filter(old);
        kept.map(|b| BadPoint { kept: false, ..b.clone() }).collect()
    }

    /// Kept points that are off the list and have one of these disks.
    pub fn kept_bad_with(&self, disks: &[DiskId]) -> Vec<BadPoint> {
        let kept = self.bad.values().filter(|b| b.kept && disks.iter().any(|disk| b.point.disks.contains_key(disk)));
        kept.map(|b| BadPoint { kept: false, ..b.clone() }).collect()
    }

    /// What is known of unusable points has changed, durably.
    pub fn replace_bad(&mut self, points: Vec<BadPoint>) {
        self.bad.extend(points.into_iter().map(|bad| (bad.point.id, bad)));
    }

    /// A point that was taken off the list is on it again, durably.
    pub fn readmit(&mut self, id: PointId) {
        if let Some(BadPoint { point, .. }) = self.bad.remove(&id) {
            self.in_order.insert((point.machine, point.order), id);
            self.groups.add(&point);
            self.listed.insert(id, point);
        }
    }

    /// Replaces a listed point, whose record has changed durably.
    pub fn replace(&mut self, point: RecoveryPoint) {
        if let Some(known) = self.listed.get_mut(&point.id) {
            *known = point;
        }
    }

    /// Keeps a point from expiring while it is in use. False if it is not listed.
    pub fn pin(&mut self, id: PointId) -> bool {
        let listed = self.listed.contains_key(&id);
        if listed {
            *self.in_use.entry(id).or_default() += 1;
        }
        listed
    }

    /// Whether somebody reads it.
    pub fn is_in_use(&self, id: PointId) -> bool {
        self.in_use.contains_key(&id)
    }

    /// Undoes one [`Book::pin`].
    pub fn unpin(&mut self, id: PointId) {
        if let Some(count) = self.in_use.get_mut(&id) {
            *count -= 1;
            if *count == 0 {
                self.in_use.remove(&id);
            }
        }
    }

    /// Points that needed a replica that is gone, or that wait for it.
    pub fn needing(&self, disk: DiskId) -> Vec<PointId> {
        let listed = self.listed.values().filter(|p| p.disks.contains_key(&disk)).map(|p| p.id);
        let pending = self.pending.iter().filter(|(_, p)| p.marker.disks.contains(&disk)).map(|(id, _)| *id);
        listed.chain(pending).collect()
    }

    /// Forgets points that are pending.
    pub fn forget_pending(&mut self, points: &[PointId]) {
        for id in points {
            self.incomplete += u64::from(self.pending.remove(id).is_some());
        }
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    fn disk(n: u128) -> DiskId {
        DiskId(Uuid::from_u128(n))
    }

    fn marker(n: u128, disks: &[DiskId]) -> Marker {
        Marker::sample(n, disks)
    }

    fn arrive(book: &mut Book, disk: DiskId, sequence: u64, marker: &Marker, clock: u64) -> bool {
        let changes = book.arrive(disk, Position::new(1, sequence), marker, &marker.disks, clock);
        let listed = changes.listed.is_some();
        book.commit(changes);
        listed
    }

    #[test]
    fn a_point_is_listed_only_when_every_disk_has_its_marker() {
        let mut book = Book::default();
        let disks = [disk(1), disk(2)];
        assert!(!arrive(&mut book, disks[0], 5, &marker(10, &disks), 0));
        assert!(book.all().is_empty());
        assert!(arrive(&mut book, disks[1], 7, &marker(10, &disks), 0));
        assert_eq!(book.all()[0].disks[&disks[1]], Position::new(1, 7));
        assert!(!arrive(&mut book, disks[1], 7, &marker(10, &disks), 0), "again, after a crash: nothing new");
    }

    #[test]
    fn a_disk_configured_here_that_the_agent_does_not_mark_keeps_the_point_off_the_list() {
        let book = Book::default();
        let changes = book.arrive(disk(1), Position::new(1, 1), &marker(10, &[disk(1)]), &[disk(1), disk(2)], 0);
        assert!(changes.listed.is_none());
    }

    #[test]
    fn a_point_that_was_made_twice_under_one_id_is_given_up_and_never_mixed() {
        let mut book = Book::default();
        let disks = [disk(1), disk(2)];
        arrive(&mut book, disks[0], 5, &marker(10, &disks), 0);
        assert!(!arrive(&mut book, disks[0], 9, &marker(10, &disks), 0));
        assert!(!arrive(&mut book, disks[1], 9, &marker(10, &disks), 0));
        assert!(book.all().is_empty());
        assert_eq!(book.incomplete(), 1);
    }

    #[test]
    fn a_point_whose_marker_was_lost_is_given_up_when_a_later_one_is_complete() {
        let mut book = Book::default();
        let disks = [disk(1), disk(2)];
        arrive(&mut book, disks[0], 5, &marker(10, &disks), 0);
        arrive(&mut book, disks[0], 9, &marker(11, &disks), 0);
        assert!(arrive(&mut book, disks[1], 9, &marker(11, &disks), 0));
        assert_eq!(book.incomplete(), 1);
        assert_eq!(book.oldest_needed(disks[0]), Some(Position::new(1, 9)));
    }

    #[test]
    fn points_that_wait_for_a_disk_that_never_comes_are_given_up_by_policy() {
        let mut book = Book::default();
        let disks = [disk(1), disk(2)];
        for n in 1..=10 {
            arrive(&mut book, disks[0], n, &marker(u128::from(n), &disks), n);
        }
        let gone = book.hopeless(MachineId(Uuid::from_u128(1)), 4, Duration::from_secs(86400), 10);
        assert_eq!(gone.len(), 6);
        book.forget_pending(&gone);
        assert_eq!(book.oldest_needed(disks[0]), Some(Position::new(1, 7)));
        assert_eq!(book.hopeless(MachineId(Uuid::from_u128(1)), 100, Duration::from_secs(5), 100).len(), 4);
    }

    #[test]
    fn points_in_use_and_pinned_points_do_not_expire() {
        let mut book = Book::default();
        let disks = [disk(1)];
        for n in 1..=5 {
            arrive(&mut book, disks[0], n, &marker(u128::from(n), &disks), n * 100);
        }
        let machine = MachineId(Uuid::from_u128(1));
        let policy = Policy { ladder: "all for 1d".parse().unwrap(), points_max: 1, points_min: 1, span: None, space_max: None };
        assert_eq!(book.expired(machine, &policy, 500, 0).len(), 4);
        let (first, second) = (book.of(machine)[0].clone(), book.of(machine)[1].id);
        assert!(book.pin(second));
        book.replace(RecoveryPoint { pinned: true, ..first.clone() });
        assert_eq!(book.expired(machine, &policy, 500, 0).len(), 2);
        book.unpin(second);
        book.replace(first);
        assert_eq!(book.expired(machine, &policy, 500, 0).len(), 4);
        assert_eq!(book.needed(disks[0]).len(), 5);
    }
}
