//! The changes of one disk that the master target does not have yet, in order: in memory, and beyond that in the agent's log. Pure.
//!
//! ```text
//! captured (next - 1) >= sent >= cached >= safe >= kept
//! ```
//! Everything above `kept` is held here. What is cached is kept until it is safe, as far as there is room: if the process server
//! that has it dies, another one is sent it again, and the stream goes on without a gap. What gives way first is what is
//! cached; what is not even cached gives way never: without room for it a change is refused, and the dirty map covers it.
//!
//! Changes are numbered for as long as the process lives. In the stream of an epoch, change `n` travels as sequence
//! `n - base`: when the stream is taken to another process server ([`Backlog::begin_move`], [`Backlog::take_over`]) the new
//! epoch counts from where the master target stands, and nothing here is renumbered.
//!
//! They stand in *segments* of about 256 KiB, which are written to the log, and read back, as a whole.

use std::collections::{BTreeSet, VecDeque};
use std::time::Duration;

use thiserror::Error;

use crate::clock::Mono;
use crate::model::position::assert_ladder;
use crate::model::{Change, ChangeKind, Position, Rung};
use crate::storage::log::Location;
use crate::wire::ingest::change_cost;

/// Between two time samples that are kept to tell the age of a position.
const SAMPLE_EVERY: Duration = Duration::from_millis(5);
/// Samples kept; at 5 ms each this is more than five minutes, older lag is reported as of the oldest sample.
const SAMPLES_MAX: usize = 65536;
/// A segment is closed when it holds this much.
const SEGMENT_COST: u64 = 256 << 10;
/// Most changes of a segment.
const SEGMENT_CHANGES: usize = 1024;
/// What was not sent stays in memory up to this, as a quarter of the room at most: it keeps a stream busy while the log is read.
const AHEAD_COST: u64 = 16 << 20;

/// Times that the stream began anew of which is known what they lost.
const FORGOTTEN_KEPT: usize = 64;

/// No room: the change must be covered by the dirty map instead.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("the backlog is full")]
pub struct Full;

/// The other side wants changes that are no longer held.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("the stream cannot be continued from where the other side stands")]
pub struct CannotResume;

/// What became of a change that was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It is on its way.
    Waits,
    /// It is durable at the master target.
    Safe,
    /// The stream began anew before that.
    Lost,
}

/// A change and when it was captured.
#[derive(Clone, Debug)]
pub struct Held {
    /// The change.
    pub kind: ChangeKind,
    /// When.
    pub captured: Mono,
}

/// How much may be held.
#[derive(Clone, Copy, Debug)]
pub struct Room {
    /// Cost in memory.
    pub memory: u64,
    /// Bytes in the log; 0: there is none.
    pub log: u64,
}

/// A segment on its way to the log, or back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SegmentName {
    /// Its first change.
    pub first: u64,
    /// Of which life of the stream: see [`Backlog::restart`].
    pub life: u64,
}

#[derive(Debug)]
enum Body {
    Memory(Vec<Held>),
    Log(Location),
}

#[derive(Debug)]
struct Segment {
    first: u64,
    costs: Vec<u32>,
    cost: u64,
    body: Body,
}

impl Segment {
    fn last(&self) -> u64 {
        self.first + self.costs.len() as u64 - 1
    }

    fn is_full(&self) -> bool {
        self.cost >= SEGMENT_COST || self.costs.len() >= SEGMENT_CHANGES
    }
}

/// One disk's backlog.
#[derive(Debug)]
pub struct Backlog {
    epoch: u64,
    /// The epoch in which the stream goes on, once it is known where.
    moving: Option<u64>,
    life: u64,
    base: u64,
    next: u64,
    sent: u64,
    cached: u64,
    safe: u64,
    /// Where the master target stood when the epoch began, if it was asked.
    stood: Position,
    segments: VecDeque<Segment>,
    /// The segment of the next change to send.
    cursor: usize,
    /// That segment's changes, if it is in the log and was read.
    loaded: Option<(u64, Vec<Held>)>,
    /// First changes of the segments in memory.
    in_memory: BTreeSet<u64>,
    /// On their way to the log.
    leaving: BTreeSet<u64>,
    memory: u64,
    log: u64,
    /// Cost of what is not cached.
    bytes: u64,
    room: Room,
    /// Places in the log that are not needed any more.
    given_up: Vec<Location>,
    samples: VecDeque<(u64, Mono)>,
    /// First and last number of what was forgotten, the latest times.
    forgotten: VecDeque<(u64, u64)>,
}

impl Backlog {
    /// An empty backlog for a fresh epoch.
    pub fn new(epoch: u64, room: Room) -> Self {
        Self {
            epoch,
            moving: None,
            life: 1,
            base: 0,
            next: 1,
            sent: 0,
            cached: 0,
            safe: 0,
            stood: Position::default(),
            segments: VecDeque::new(),
            cursor: 0,
            loaded: None,
            in_memory: BTreeSet::new(),
            leaving: BTreeSet::new(),
            memory: 0,
            log: 0,
            bytes: 0,
            room,
            given_up: Vec::new(),
            samples: VecDeque::new(),
            forgotten: VecDeque::new(),
        }
    }

    /// Adds a change and gives it the next number.
    ///
    /// # Errors
    /// [`Full`]; markers always fit, they are few and small.
    pub fn push(&mut self, kind: ChangeKind, now: Mono) -> Result<u64, Full> {
        let cost = held_cost(&kind);
        let must = matches!(kind, ChangeKind::Mark(_));
        while self.memory + cost > self.room.memory && self.shed_memory() {}
        if self.memory + cost > self.room.memory && !must {
            return Err(Full);
        }
        let number = self.next;
        self.next += 1;
        self.bytes += cost;
        self.memory += cost;
        if self.samples.back().is_none_or(|&(_, at)| now.since(at) >= SAMPLE_EVERY) && self.samples.len() < SAMPLES_MAX {
            self.samples.push_back((number, now));
        }
        if self.segments.back().is_none_or(|s| s.is_full() || matches!(s.body, Body::Log(_)) || self.leaving.contains(&s.first)) {
            self.in_memory.insert(number);
            self.segments.push_back(Segment { first: number, costs: Vec::new(), cost: 0, body: Body::Memory(Vec::new()) });
        } else {
            // All of it may have been sent before it got this change.
            self.cursor = self.cursor.min(self.segments.len() - 1);
        }
        let segment = self.segments.back_mut().expect("there is one now");
        segment.costs.push(cost as u32);
        segment.cost += cost;
        if let Body::Memory(changes) = &mut segment.body {
            changes.push(Held { kind, captured: now });
        }
        self.check();
        Ok(number)
    }

    /// The next change to send and its capture time, if its cost fits `credit`. Cheap: content is shared, not copied. Nothing
    /// while the stream moves, or while the next one has to be read from the log.
    pub fn take_next(&mut self, credit: u64) -> Option<(Change, Mono)> {
        let held = self.upcoming()?;
        if change_cost(held.kind.data_len()) > credit {
            return None;
        }
        let (kind, captured) = (held.kind.clone(), held.captured);
        self.sent += 1;
        if self.segments[self.cursor].last() == self.sent {
            self.cursor += 1;
            self.loaded = None;
        }
        self.check();
        Some((Change { sequence: self.sent - self.base, kind }, captured))
    }

    /// Cost of the next change to send, if it can be sent now.
    pub fn next_cost(&self) -> Option<u64> {
        self.upcoming().map(|held| change_cost(held.kind.data_len()))
    }

    /// The segment that has to be read from the log before anything can be sent, and its place.
    pub fn wants(&self) -> Option<(SegmentName, Location)> {
        let segment = self.segments.get(self.cursor).filter(|_| self.moving.is_none())?;
        match segment.body {
            Body::Log(location) if self.loaded.is_none() => Some((SegmentName { first: segment.first, life: self.life }, location)),
            _ => None,
        }
    }

    /// That segment was read. False if it is not what was written, which the caller must not go on from.
    pub fn loaded(&mut self, name: SegmentName, changes: Vec<Held>) -> bool {
        match self.segments.get(self.cursor) {
            Some(segment) if name.life == self.life && segment.first == name.first => {
                let whole = changes.len() == segment.costs.len();
                self.loaded = whole.then_some((name.first, changes));
                whole
            }
            // The stream went elsewhere meanwhile.
            _ => true,
        }
    }

    /// A segment that belongs into the log now, if there is one: memory is half full, and it is not about to be sent.
    pub fn spill(&mut self) -> Option<(SegmentName, Vec<Held>)> {
        if self.memory <= self.room.memory / 2 || self.room.log == 0 {
            return None;
        }
        let ahead = (self.room.memory / 4).min(AHEAD_COST) / SEGMENT_COST;
        let soon = self.segments.get(self.cursor + ahead as usize).map_or(u64::MAX, |s| s.first);
        let cached = self.cached;
        let open = self.segments.back().filter(|s| !s.is_full()).map(|s| s.first);
        let leaves = |s: &Segment| s.last() <= cached || s.first >= soon;
        let candidates = self.in_memory.iter().filter(|first| !self.leaving.contains(first) && Some(**first) != open);
        let first = candidates.copied().find(|&first| self.position_of(first).is_some_and(|i| leaves(&self.segments[i])))?;
        let index = self.position_of(first)?;
        let cost = self.segments[index].cost;
        while self.log + cost > self.room.log && self.shed_log() {}
        if self.log + cost > self.room.log {
            return None;
        }
        // What is only kept for another process server may have just gone to make room.
        let segment = &self.segments[self.position_of(first)?];
        let Body::Memory(changes) = &segment.body else { return None };
        let changes = changes.clone();
        self.leaving.insert(first);
        self.log += cost;
        Some((SegmentName { first, life: self.life }, changes))
    }

    /// A segment is in the log now, or could not be written.
    pub fn spilled(&mut self, name: SegmentName, place: Option<Location>) {
        if name.life != self.life || !self.leaving.remove(&name.first) {
            return self.given_up.extend(place);
        }
        let Some(index) = self.position_of(name.first) else { return self.given_up.extend(place) };
        let segment = &mut self.segments[index];
        let Some(location) = place else {
            self.log -= segment.cost;
            return;
        };
        if index == self.cursor
            && let Body::Memory(changes) = &mut segment.body
        {
            self.loaded = Some((segment.first, std::mem::take(changes)));
        }
        segment.body = Body::Log(location);
        self.memory -= segment.cost;
        self.in_memory.remove(&name.first);
    }

    /// Places in the log that are not needed any more.
    pub fn take_given_up(&mut self) -> Vec<Location> {
        std::mem::take(&mut self.given_up)
    }

    /// A new connection to the process server that has this epoch wants to go on at `resume_at`; the master target stands at
    /// `stands`, if it was asked.
    ///
    /// # Errors
    /// [`CannotResume`] if that change is not held any more, or was never sent; or if the master target does not have any more what
    /// the epoch began behind.
    pub fn resume(&mut self, resume_at: u64, stands: Option<Position>) -> Result<(), CannotResume> {
        let number = resume_at.checked_sub(1).map(|n| n + self.base).ok_or(CannotResume)?;
        let lost = stands.is_some_and(|stands| stands < self.stood);
        if lost || self.moving.is_some() || number < self.kept() || number < self.safe || number > self.sent {
            return Err(CannotResume);
        }
        // What lies between was received, but is not durable there: it stays here until it is.
        self.rewind(number);
        Ok(())
    }

    /// The stream goes to another process server and goes on as `epoch`, which is higher than any before. Nothing is sent until
    /// [`Backlog::take_over`]; changes are taken all the while.
    pub fn begin_move(&mut self, epoch: u64) {
        debug_assert!(epoch > self.epoch(), "epochs only grow");
        self.moving = Some(epoch);
        self.loaded = None;
    }

    /// The master target obeys the new epoch and stands at `stands`, of an epoch before it. The stream goes on behind that.
    ///
    /// # Errors
    /// [`CannotResume`] if a change behind that is not held any more, or somebody else's stream was there in between.
    pub fn take_over(&mut self, stands: Position) -> Result<(), CannotResume> {
        let Some(epoch) = self.moving else { return Err(CannotResume) };
        let number = match stands.epoch.cmp(&self.epoch) {
            std::cmp::Ordering::Equal => self.base + stands.sequence,
            // Nothing of this epoch arrived there. Where it began stands on what was there then: less than that was lost since.
            std::cmp::Ordering::Less if self.stood == Position::default() || stands == self.stood => self.base,
            std::cmp::Ordering::Less => return Err(CannotResume),
            std::cmp::Ordering::Greater => return Err(CannotResume),
        };
        if number < self.kept() || number < self.safe || number > self.sent {
            return Err(CannotResume);
        }
        self.rewind(number);
        self.set_cached(number);
        self.safe = number;
        self.forget_safe();
        (self.epoch, self.moving, self.base, self.stood) = (epoch, None, number, stands);
        self.check();
        Ok(())
    }

    /// Whether another process server could go on behind what is safe without anything being read from the disk again.
    pub fn can_move(&self) -> bool {
        self.kept() <= self.safe
    }

    /// Whether the stream waits for [`Backlog::take_over`].
    pub fn is_moving(&self) -> bool {
        self.moving.is_some()
    }

    /// The other side has changes durably. Positions of another epoch, or beyond what was sent, are ignored.
    pub fn acknowledge(&mut self, epoch: u64, cached: u64, safe: u64) {
        let (cached, safe) = (cached.saturating_add(self.base), safe.saturating_add(self.base));
        if epoch != self.epoch || self.moving.is_some() || cached > self.sent {
            return;
        }
        if cached > self.cached {
            self.set_cached(cached);
        }
        self.safe = self.safe.max(safe.min(self.cached));
        self.forget_safe();
        self.check();
    }

    /// Forgets everything and starts `epoch`. The caller has made sure that the dirty map covers what is forgotten. `all_lost`:
    /// the master target may have lost what was safe, too.
    pub fn restart(&mut self, epoch: u64, all_lost: bool) {
        let (here, kept) = (self.next - 1, if all_lost { 0 } else { self.safe });
        self.given_up.extend(self.segments.drain(..).filter_map(|s| match s.body {
            Body::Log(location) => Some(location),
            Body::Memory(_) => None,
        }));
        let (given_up, mut forgotten) = (std::mem::take(&mut self.given_up), std::mem::take(&mut self.forgotten));
        if kept < here {
            if forgotten.len() == FORGOTTEN_KEPT {
                forgotten.pop_front();
            }
            forgotten.push_back((kept + 1, here));
        }
        *self = Self {
            life: self.life + 1,
            base: here,
            next: self.next,
            sent: here,
            cached: here,
            safe: here,
            given_up,
            forgotten,
            ..Self::new(epoch, self.room)
        };
    }

    /// The stream's epoch, or the one in which it will go on.
    pub fn epoch(&self) -> u64 {
        self.moving.unwrap_or(self.epoch)
    }

    /// The number of the change that travelled as this sequence of the present epoch.
    pub fn number(&self, sequence: u64) -> u64 {
        self.base.saturating_add(sequence)
    }

    /// Whether a marker may be added: they pass the bound that holds for changes, but not without end.
    pub fn has_room_for_marker(&self) -> bool {
        self.memory <= self.room.memory
    }

    /// Cost of what the process server does not have durably.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Cost of what is in memory.
    pub fn memory_bytes(&self) -> u64 {
        self.memory
    }

    /// Cost of what is in the log.
    pub fn log_bytes(&self) -> u64 {
        self.log
    }

    /// What became of the change with this number.
    pub fn fate(&self, number: u64) -> Fate {
        if self.forgotten.iter().any(|(first, last)| (*first..=*last).contains(&number)) {
            Fate::Lost
        } else if number <= self.safe {
            Fate::Safe
        } else {
            Fate::Waits
        }
    }

    /// The number of the last change that is journaled at the master target.
    pub fn safe(&self) -> u64 {
        self.safe
    }

    /// Where the master target stands for sure; nowhere before anything of the epoch arrived, unless it was asked.
    pub fn safe_position(&self) -> Position {
        if self.safe > self.base { Position::new(self.epoch, self.safe - self.base) } else { self.stood }
    }

    /// Age of the oldest change that is not safe.
    pub fn lag(&self, now: Mono) -> Duration {
        if self.safe + 1 >= self.next { Duration::ZERO } else { self.samples.front().map_or(Duration::ZERO, |&(_, at)| now.since(at)) }
    }

    /// All rungs, from the highest.
    pub fn rungs(&self) -> [(Rung, Position); 4] {
        let at = |number: u64| Position::new(self.epoch, number - self.base);
        [(Rung::Captured, at(self.next - 1)), (Rung::Sent, at(self.sent)), (Rung::Cached, at(self.cached)), (Rung::Safe, at(self.safe))]
    }

    /// Everything above is held.
    fn kept(&self) -> u64 {
        self.segments.front().map_or(self.next, |s| s.first) - 1
    }

    fn upcoming(&self) -> Option<&Held> {
        if self.moving.is_some() {
            return None;
        }
        let segment = self.segments.get(self.cursor)?;
        let index = usize::try_from(self.sent + 1 - segment.first).ok()?;
        match (&segment.body, &self.loaded) {
            (Body::Memory(changes), _) => changes.get(index),
            (Body::Log(_), Some((first, changes))) if *first == segment.first => changes.get(index),
            (Body::Log(_), _) => None,
        }
    }

    fn position_of(&self, first: u64) -> Option<usize> {
        self.segments.binary_search_by_key(&first, |s| s.first).ok()
    }

    /// Everything through `number` counts as sent, nothing above.
    fn rewind(&mut self, number: u64) {
        if number < self.cached {
            self.bytes += self.cost_between(number, self.cached);
            self.cached = number;
        }
        self.sent = number;
        self.cursor = self.segments.partition_point(|s| s.last() <= number);
        self.loaded = None;
        self.check();
    }

    fn set_cached(&mut self, number: u64) {
        if number > self.cached {
            self.bytes -= self.cost_between(self.cached, number);
            self.cached = number;
        }
    }

    /// Cost of the changes above `from`, through `to`.
    fn cost_between(&self, from: u64, to: u64) -> u64 {
        let start = self.segments.partition_point(|s| s.last() <= from);
        let mut sum = 0;
        for segment in self.segments.range(start..).take_while(|s| s.first <= to) {
            let (low, high) = ((from + 1).max(segment.first), to.min(segment.last()));
            let range = (low - segment.first) as usize..=(high - segment.first) as usize;
            sum += segment.costs[range].iter().map(|c| u64::from(*c)).sum::<u64>();
        }
        sum
    }

    fn forget_safe(&mut self) {
        while self.segments.front().is_some_and(|s| s.last() <= self.safe) {
            self.drop_front();
        }
        while self.samples.front().is_some_and(|&(number, _)| number <= self.safe) {
            self.samples.pop_front();
        }
    }

    fn drop_front(&mut self) {
        let Some(segment) = self.segments.pop_front() else { return };
        self.cursor = self.cursor.saturating_sub(1);
        if self.leaving.remove(&segment.first) {
            // Its way to the log ends there: `spilled` gives its place up.
            self.log -= segment.cost;
        }
        match segment.body {
            Body::Memory(_) => {
                self.memory -= segment.cost;
                self.in_memory.remove(&segment.first);
            }
            Body::Log(location) => {
                self.log -= segment.cost;
                self.given_up.push(location);
            }
        }
    }

    /// Gives up the oldest segment that is kept for another process server only, if that frees memory.
    fn shed_memory(&mut self) -> bool {
        // What is older stands in the log, and would be worth nothing without this one.
        let helps =
            self.in_memory.first().and_then(|first| self.position_of(*first)).is_some_and(|i| self.segments[i].last() <= self.cached);
        helps && self.shed_log()
    }

    /// Gives up the oldest segment, if it is kept for another process server only.
    fn shed_log(&mut self) -> bool {
        let may = self.segments.front().is_some_and(|s| s.last() <= self.cached);
        if may {
            self.drop_front();
        }
        may
    }

    fn check(&self) {
        assert_ladder(&self.rungs());
    }
}

/// What a held change counts against the bound of the backlog.
fn held_cost(kind: &ChangeKind) -> u64 {
    match kind {
        ChangeKind::Mark(_) => MARKER_COST,
        // Content is kept in pages, however little of one it fills.
        other => change_cost(other.data_len().next_multiple_of(4096)),
    }
}

/// A marker with its list of disks and label.
const MARKER_COST: u64 = 4096;

#[cfg(test)]
#[path = "backlog_tests.rs"]
mod tests;
