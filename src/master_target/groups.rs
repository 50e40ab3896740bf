//! Points of replication groups, as the parts that machines have listed make them. Pure.
//!
//! Facts that hold here:
//! - Nothing is remembered beside the machine points: what is known of a group point follows from its listed parts.
//! - A group point is whole, and only then shown and chosen, when every machine that it names has a listed part and all parts
//!   state the same.
//! - A part that its own statement does not cover (another machine's, or under an id that is not the part's) is none.
//! - Parts that contradict each other never make a group point, as long as one of them is there.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use crate::model::group::GroupOrder;
use crate::model::policy::GroupCandidate;
use crate::model::{GroupPart, MachineId, Name, PointId, PointKind, RecoveryPoint};

/// Sentences that wait to be told; whoever does not take them has enough of them.
const NEWS_MAX: usize = 100;

/// What the listed parts of one group point say.
#[derive(Clone, Debug)]
pub struct Entry {
    /// The statement of the part that came first.
    pub statement: GroupPart,
    parts: BTreeMap<MachineId, Part>,
    conflict: bool,
    was_whole: bool,
    /// When the part that came last was listed.
    clock: u64,
    kind: PointKind,
}

#[derive(Clone, Copy, Debug)]
struct Part {
    id: PointId,
    kind: PointKind,
    order: u64,
}

impl Entry {
    /// Every machine that it names has its part, and they agree.
    pub fn is_whole(&self) -> bool {
        !self.conflict && self.parts.len() == self.statement.members.len()
    }

    /// Parts that contradict each other.
    pub fn is_conflicting(&self) -> bool {
        self.conflict
    }

    /// The listed parts.
    pub fn parts(&self) -> impl Iterator<Item = (MachineId, PointId)> {
        self.parts.iter().map(|(machine, part)| (*machine, part.id))
    }

    /// The part of a machine.
    pub fn part_of(&self, machine: MachineId) -> Option<PointId> {
        self.parts.get(&machine).map(|p| p.id)
    }

    /// Machines without a listed part.
    pub fn lacking(&self) -> impl Iterator<Item = MachineId> {
        self.statement.members.iter().copied().filter(|m| !self.parts.contains_key(m))
    }

    /// Application-consistent if every part is.
    pub fn kind(&self) -> PointKind {
        self.kind
    }

    /// Its place among the group's points. A part that comes late makes an old point whole, not new.
    pub fn order(&self) -> GroupOrder {
        self.statement.order()
    }

    /// After its parts have changed.
    fn sum_up(&mut self) {
        self.kind = if self.parts.values().all(|p| p.kind == PointKind::App) { PointKind::App } else { PointKind::Crash };
        self.was_whole |= self.is_whole();
    }

    /// Whether `later` was made after it, by a machine that has a part of both.
    fn is_before(&self, later: &Entry) -> bool {
        self.parts.iter().any(|(machine, part)| later.parts.get(machine).is_some_and(|p| p.order > part.order))
    }
}

/// All group points of a master target.
#[derive(Clone, Debug, Default)]
pub struct Groups {
    entries: HashMap<PointId, Entry>,
    /// Whole points of each group by their order.
    whole: BTreeMap<Name, BTreeMap<GroupOrder, PointId>>,
    /// Points of each group that are not whole.
    others: BTreeMap<Name, BTreeSet<PointId>>,
    conflicts: u64,
    news: Vec<String>,
}

impl Groups {
    /// A machine point is listed.
    pub fn add(&mut self, point: &RecoveryPoint) {
        let Some(statement) = &point.group else { return };
        if !statement.members.contains(&point.machine) || point.id != PointId::part(statement.point, point.machine) {
            self.conflicts += 1;
            return self.tell(format!(
                "recovery point {} claims to be a part of point {} of group {}, which does not fit what it says: it counts for its machine only",
                point.id, statement.point, statement.group
            ));
        }
        let part = Part { id: point.id, kind: point.kind, order: point.order };
        let entry = self.entries.entry(statement.point).or_insert_with(|| Entry {
            statement: statement.clone(),
            parts: BTreeMap::new(),
            conflict: false,
            was_whole: false,
            clock: 0,
            kind: PointKind::Crash,
        });
        let (before, was_conflicting) = (entry.is_whole().then(|| entry.order()), entry.conflict);
        entry.conflict |= entry.statement != *statement;
        entry.clock = entry.clock.max(point.listed_clock);
        entry.parts.insert(point.machine, part);
        entry.sum_up();
        let conflict = entry.conflict && !was_conflicting;
        self.file(statement.point, before);
        if conflict {
            self.conflicts += 1;
            self.tell(format!(
                "the machines of group {} contradict each other about its point {}: it is not listed, their own points are good",
                statement.group, statement.point
            ));
        }
    }

    /// A machine point is not listed any more.
    pub fn remove(&mut self, point: &RecoveryPoint) {
        let Some(statement) = &point.group else { return };
        let Some(entry) = self.entries.get_mut(&statement.point) else { return };
        if entry.part_of(point.machine) != Some(point.id) {
            return;
        }
        let before = entry.is_whole().then(|| entry.order());
        entry.parts.remove(&point.machine);
        entry.sum_up();
        self.file(statement.point, before);
    }

    /// Files an entry where it belongs; `before` is its order if it was whole.
    fn file(&mut self, id: PointId, before: Option<GroupOrder>) {
        let Some(entry) = self.entries.get(&id) else { return };
        let group = entry.statement.group.clone();
        let (whole, others) = (self.whole.entry(group.clone()).or_default(), self.others.entry(group.clone()).or_default());
        if let Some(order) = before {
            whole.remove(&order);
        }
        others.remove(&id);
        if entry.parts.is_empty() {
            self.entries.remove(&id);
        } else if entry.is_whole() {
            whole.insert(entry.order(), id);
        } else {
            others.insert(id);
        }
        if whole.is_empty() && others.is_empty() {
            self.whole.remove(&group);
            self.others.remove(&group);
        }
    }

    fn tell(&mut self, news: String) {
        if self.news.len() < NEWS_MAX {
            self.news.push(news);
        }
    }

    /// What a person should read in the log, once.
    pub fn take_news(&mut self) -> Vec<String> {
        std::mem::take(&mut self.news)
    }

    /// Statements that contradicted each other or themselves since the start.
    pub fn conflicts(&self) -> u64 {
        self.conflicts
    }

    /// Groups that have a part here, by name.
    pub fn names(&self) -> impl Iterator<Item = &Name> {
        self.whole.keys()
    }

    /// A group point of which a part is listed, whole or not.
    pub fn entry(&self, id: PointId) -> Option<&Entry> {
        self.entries.get(&id)
    }

    /// The whole point that a machine point is a part of.
    pub fn whole_of(&self, point: &RecoveryPoint) -> Option<&Entry> {
        let entry = self.entries.get(&point.group.as_ref()?.point)?;
        (entry.is_whole() && entry.part_of(point.machine) == Some(point.id)).then_some(entry)
    }

    /// Whole points of a group, the oldest first.
    pub fn of(&self, group: &Name) -> impl DoubleEndedIterator<Item = &Entry> {
        self.whole.get(group).into_iter().flat_map(BTreeMap::values).filter_map(|id| self.entries.get(id))
    }

    /// How many they are.
    pub fn count(&self, group: &Name) -> usize {
        self.whole.get(group).map_or(0, BTreeMap::len)
    }

    /// All whole points, by group and the oldest first.
    pub fn all(&self) -> impl Iterator<Item = &Entry> {
        self.whole.values().flat_map(BTreeMap::values).filter_map(|id| self.entries.get(id))
    }

    /// The newest whole point of a group, and the newest that no machine of it is missing in.
    pub fn newest(&self, group: &Name) -> (Option<&Entry>, Option<&Entry>) {
        (self.of(group).next_back(), self.of(group).rev().find(|e| e.statement.is_full()))
    }

    /// Points of a group whose parts contradict each other.
    pub fn conflicting(&self, group: &Name) -> usize {
        self.unfinished(group).filter(|e| e.conflict).count()
    }

    /// Points of a group that may still become whole, the oldest first. A point that lost a part, or for which the machine that
    /// has none will not bring one any more because it has listed a later one, is none of them.
    pub fn waiting(&self, group: &Name) -> Vec<&Entry> {
        let (newest, full) = self.newest(group);
        let later: Vec<&Entry> = newest.into_iter().chain(full).collect();
        let passed = |entry: &Entry, machine: MachineId| {
            // The machine has a later part, or is not in the group any more.
            let gone = |newer: &Entry| {
                newer.statement.epoch > entry.statement.epoch
                    && newer.statement.missing.iter().all(|name| MachineId::from_name(name) != machine)
            };
            later.iter().any(|newer| entry.is_before(newer) && (newer.statement.members.contains(&machine) || gone(newer)))
        };
        let may_come = |e: &&Entry| !e.conflict && !e.was_whole && !e.lacking().any(|machine| passed(e, machine));
        let mut waiting: Vec<_> = self.unfinished(group).filter(may_come).collect();
        waiting.sort_by_key(|e| e.order());
        waiting
    }

    /// Points that are not whole.
    pub fn unfinished_points(&self) -> impl Iterator<Item = &Entry> {
        self.others.values().flatten().filter_map(|id| self.entries.get(id))
    }

    fn unfinished(&self, group: &Name) -> impl Iterator<Item = &Entry> {
        self.others.get(group).into_iter().flatten().filter_map(|id| self.entries.get(id))
    }

    /// What the policy has to know of the groups that `points` are parts of.
    pub fn candidates(&self, points: &[&RecoveryPoint]) -> Vec<GroupCandidate<'_>> {
        let candidate = |e| {
            let Entry { statement, clock, .. }: &Entry = e;
            GroupCandidate {
                id: statement.point,
                group: &statement.group,
                full: statement.is_full(),
                kind: e.kind(),
                listed: *clock,
                order: e.order(),
            }
        };
        self.groups_of(points).into_iter().flat_map(|group| self.of(group)).map(candidate).collect()
    }

    /// The time that all parts of a group point are judged by: the last of their listings; that of the point itself if its
    /// group point never was whole.
    pub fn listed_clock(&self, point: &RecoveryPoint) -> u64 {
        let entry = point.group.as_ref().and_then(|g| self.entries.get(&g.point));
        let entry = entry.filter(|e| e.was_whole && e.part_of(point.machine) == Some(point.id));
        entry.map_or(point.listed_clock, |e| e.clock)
    }

    /// Of the group that the newest of `points` (the oldest first) belong to the newest whole point, and the newest full one: a
    /// failover of the group needs them. Of that group only: whoever makes points under many names gets no more of them kept.
    pub fn newest_of(&self, points: &[&RecoveryPoint]) -> HashSet<PointId> {
        let group = points.iter().rev().find_map(|p| Some(&self.whole_of(p)?.statement.group));
        let newest = |group| <[Option<&Entry>; 2]>::from(self.newest(group));
        group.into_iter().flat_map(newest).flatten().map(|e| e.statement.point).collect()
    }

    fn groups_of(&self, points: &[&RecoveryPoint]) -> BTreeSet<&Name> {
        points.iter().filter_map(|p| Some(&self.whole_of(p)?.statement.group)).collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use uuid::Uuid;

    use super::*;
    use crate::master_target::points::{Book, Changes};
    use crate::model::policy::{Policy, Reason};

    const MACHINES: usize = 3;

    fn name(n: usize) -> Name {
        format!("web{n:02}").parse().unwrap()
    }

    fn machine(n: usize) -> MachineId {
        MachineId::from_name(&name(n))
    }

    /// What every part of group point `n` states, with the machines of `members`.
    fn statement(n: u128, members: &[usize]) -> GroupPart {
        let mut ids: Vec<MachineId> = members.iter().map(|&m| machine(m)).collect();
        ids.sort_unstable();
        let missing = (0..MACHINES).filter(|m| !members.contains(m)).map(name).collect();
        GroupPart {
            point: PointId(Uuid::from_u128(n)),
            group: "shop".parse().unwrap(),
            epoch: 1,
            sequence: n as u64,
            members: ids,
            missing,
        }
    }

    fn part(statement: &GroupPart, of: usize, order: u64, clock: u64) -> RecoveryPoint {
        RecoveryPoint {
            id: PointId::part(statement.point, machine(of)),
            machine: machine(of),
            listed_clock: clock,
            group: Some(statement.clone()),
            ..RecoveryPoint::sample(0, order)
        }
    }

    fn list(book: &mut Book, point: RecoveryPoint) {
        book.commit(Changes { listed: Some(point), ..Changes::default() });
    }

    fn whole(book: &Book) -> Vec<u128> {
        book.groups().all().map(|e| e.statement.point.0.as_u128()).collect()
    }

    #[test]
    fn a_group_point_is_listed_only_while_every_member_has_its_part() {
        let mut book = Book::default();
        let shop = statement(7, &[0, 1, 2]);
        for (n, of) in [2, 0, 1].into_iter().enumerate() {
            assert!(whole(&book).is_empty());
            assert_eq!(book.groups().waiting(&shop.group).len(), usize::from(n > 0));
            list(&mut book, part(&shop, of, n as u64 + 1, n as u64 * 10));
        }
        assert_eq!(whole(&book), [7]);
        let lost = part(&shop, 0, 2, 10);
        assert_eq!((book.groups().listed_clock(&lost), book.groups().entry(shop.point).unwrap().order()), (20, shop.order()));
        let again = Book::load(book.all(), vec![], vec![], vec![]);
        assert_eq!(whole(&again), [7], "a restart finds it again");
        book.unlist(&[lost.id]);
        assert!(whole(&book).is_empty() && book.groups().waiting(&shop.group).is_empty(), "a part that went does not come again");
        assert_eq!(book.groups().listed_clock(&part(&shop, 1, 3, 20)), 20);
        book.unlist(&[1, 2].map(|of| PointId::part(shop.point, machine(of))));
        assert_eq!((book.groups().names().count(), book.groups().entries.len()), (0, 0));
    }

    #[test]
    fn parts_that_contradict_each_other_never_make_a_group_point() {
        let honest = statement(7, &[0, 1]);
        let lies = [
            GroupPart { epoch: 2, ..honest.clone() },
            GroupPart { members: vec![machine(1)], ..honest.clone() },
            GroupPart { missing: vec![], ..honest.clone() },
            GroupPart { group: "other".parse().unwrap(), ..honest.clone() },
        ];
        for lie in lies {
            for lie_first in [false, true] {
                let mut book = Book::default();
                let (good, bad) = (part(&honest, 0, 1, 0), part(&lie, 1, 2, 0));
                let (first, second) = if lie_first { (bad, good) } else { (good, bad) };
                list(&mut book, first);
                list(&mut book, second.clone());
                assert!(whole(&book).is_empty(), "{lie:?}");
                assert_eq!((book.groups().conflicts(), book.take_group_news().len()), (1, 1));
                assert_eq!(book.groups().names().map(|g| book.groups().conflicting(g)).sum::<usize>(), 1);
                book.unlist(&[second.id]);
                assert!(whole(&book).is_empty(), "nor once one of them went");
            }
        }
    }

    #[test]
    fn a_part_that_its_own_statement_does_not_cover_is_none() {
        let mut book = Book::default();
        let shop = statement(7, &[0, 1]);
        list(&mut book, part(&shop, 0, 1, 0));
        // Of a machine that it does not name; under an id of its own; under the id of another machine's part.
        list(&mut book, part(&shop, 2, 2, 0));
        list(&mut book, RecoveryPoint { id: PointId(Uuid::from_u128(99)), ..part(&shop, 1, 3, 0) });
        list(&mut book, RecoveryPoint { machine: machine(1), ..part(&shop, 2, 4, 0) });
        assert!(whole(&book).is_empty());
        assert_eq!(book.groups().conflicts(), 3);
        list(&mut book, part(&shop, 1, 5, 0));
        assert_eq!(whole(&book), [7], "strangers keep nobody from a group point");
        book.unlist(&[PointId(Uuid::from_u128(99))]);
        assert_eq!(whole(&book), [7]);
    }

    #[test]
    fn a_point_waits_only_for_machines_that_may_still_bring_their_part() {
        let mut book = Book::default();
        let points: Vec<GroupPart> = (1..=4).map(|n| statement(n, if n == 3 { &[0, 1] } else { &[0, 1, 2] })).collect();
        let group = points[0].group.clone();
        let mut order = 0;
        let mut add = |book: &mut Book, n: usize, of: usize| {
            order += 1;
            list(book, part(&points[n], of, order, order));
        };
        // Machine 2 is late: its streams are behind, the round after the next goes on without it.
        for n in [0, 1, 2] {
            add(&mut book, n, 0);
            add(&mut book, n, 1);
        }
        let waiting = |book: &Book| book.groups().waiting(&group).iter().map(|e| e.statement.point.0.as_u128()).collect::<Vec<_>>();
        assert_eq!((whole(&book), waiting(&book)), (vec![3], vec![1, 2]));
        // Of the first its marker was lost, the second arrives; then all are there again.
        add(&mut book, 1, 2);
        assert_eq!(
            (whole(&book), waiting(&book)),
            (vec![2, 3], vec![]),
            "the first was passed by the second, which is older than the third"
        );
        (0..3).for_each(|of| add(&mut book, 3, of));
        assert_eq!((whole(&book), waiting(&book)), (vec![2, 3, 4], vec![]));
        let (newest, full) = book.groups().newest(&group);
        assert_eq!([newest, full].map(|e| e.unwrap().statement.point.0.as_u128()), [4, 4]);
    }

    fn thin(book: &mut Book, of: usize, policy: &Policy, now: u64) -> Vec<(PointId, Reason)> {
        let gone = book.expired(machine(of), policy, now, 0);
        book.unlist(&gone.iter().map(|(id, _)| *id).collect::<Vec<_>>());
        gone
    }

    fn policy(ladder: &str) -> Policy {
        Policy { ladder: ladder.parse().unwrap(), points_max: 10_000, points_min: 1, span: None, space_max: None }
    }

    #[test]
    fn the_newest_whole_point_of_a_group_is_not_counted_out_and_goes_with_its_age() {
        let mut book = Book::default();
        let shop = statement(7, &[0, 1]);
        list(&mut book, part(&shop, 0, 1, 0));
        list(&mut book, part(&shop, 1, 2, 5));
        for n in 0..20 {
            list(
                &mut book,
                RecoveryPoint { machine: machine(0), listed_clock: 10 + n, ..RecoveryPoint::sample(100 + u128::from(n), 10 + n) },
            );
        }
        let few = Policy { points_max: 3, ..policy("all for 100s") };
        assert_eq!(thin(&mut book, 0, &few, 30).len(), 18);
        assert_eq!(whole(&book), [7]);
        let scarce = Policy { space_max: Some(1), ..few.clone() };
        assert!(thin(&mut book, 0, &scarce, 30).is_empty());
        let oldest = PointId::part(shop.point, machine(0));
        assert_eq!(book.expired(machine(0), &scarce, 30, 2), [(oldest, Reason::Space)], "but not at the cost of the space of all");
        let gone = thin(&mut book, 0, &few, 105);
        assert_eq!(
            gone,
            [(PointId::part(shop.point, machine(0)), Reason::Age)],
            "nobody keeps the points of a group that is no more for ever"
        );
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(400))]

        #[test]
        fn machines_thinned_by_themselves_keep_the_same_group_points(
            delays in proptest::collection::vec(proptest::collection::vec(0u64..60, MACHINES), 3..60),
            apps in proptest::collection::vec(any::<bool>(), 60),
            plain in proptest::collection::vec((0..MACHINES, any::<bool>()), 60),
            turns in proptest::collection::vec((0..MACHINES, 0u64..10), 1..40),
        ) {
            // A round every 20 s. A machine's parts are listed in the order of the rounds, each some time after its round.
            let (mut listings, mut clocks) = (Vec::new(), Vec::new());
            let mut last = [0; MACHINES];
            for (round, delays) in delays.iter().enumerate() {
                for (of, delay) in delays.iter().enumerate() {
                    last[of] = last[of].max(round as u64 * 20 + delay);
                    let kind = if apps[round] { PointKind::App } else { PointKind::Crash };
                    let statement = statement(round as u128 + 1, &[0, 1, 2]);
                    listings.push((last[of], RecoveryPoint { kind, ..part(&statement, of, 0, last[of]) }));
                }
                clocks.push(*last.iter().max().unwrap());
                let (of, app) = plain[round];
                let kind = if app { PointKind::App } else { PointKind::Crash };
                let own = RecoveryPoint { machine: machine(of), kind, listed_clock: last[of], ..RecoveryPoint::sample(1000 + round as u128, 0) };
                listings.push((last[of], own));
            }
            listings.sort_by_key(|(clock, _)| *clock);
            let mut book = Book::default();
            for (order, (_, point)) in listings.into_iter().enumerate() {
                list(&mut book, RecoveryPoint { order: order as u64 + 1, ..point });
            }
            // Looked at one by one at any times, then all of them until every point is in the last step.
            let ladder = policy("all for 60s, 1/60s to 600s, 1/120s to 2000s");
            let (newest, rounds) = (*clocks.last().unwrap(), clocks.len());
            let mut now = newest;
            for (of, later) in turns {
                now += later;
                thin(&mut book, of, &ladder, now);
            }
            while now < newest + 650 {
                now += 13;
                (0..MACHINES).for_each(|of| drop(thin(&mut book, (of + now as usize) % MACHINES, &ladder, now)));
            }
            let mut best: BTreeMap<u64, usize> = BTreeMap::new();
            for (round, clock) in clocks.iter().enumerate() {
                let held = best.entry(clock / 120).or_insert(round);
                if apps[round] && !apps[*held] {
                    *held = round;
                }
            }
            let kept: BTreeSet<u128> = best.into_values().chain([rounds - 1]).map(|round| round as u128 + 1).collect();
            prop_assert_eq!(whole(&book).into_iter().collect::<BTreeSet<_>>(), kept.clone());
            for round in (1..=rounds as u128).filter(|round| !kept.contains(round)) {
                let statement = statement(round, &[0, 1, 2]);
                prop_assert!((0..MACHINES).all(|of| book.get(PointId::part(statement.point, machine(of))).is_none()), "of {}", round);
            }
        }
    }
}
