//! The changes of one disk that the process server does not have durably yet, in order. Pure.
//!
//! ```text
//! captured (next - 1) >= sent >= cached >= safe
//! ```
//! Changes above `cached` are held here; what lies between `cached` and `safe` is covered by the dirty map.

use std::collections::VecDeque;
use std::time::Duration;

use thiserror::Error;

use crate::clock::Mono;
use crate::model::position::assert_ladder;
use crate::model::{Change, ChangeKind, Position, Rung};
use crate::wire::ingest::change_cost;

/// Between two time samples that are kept to tell the age of a position.
const SAMPLE_EVERY: Duration = Duration::from_millis(5);
/// Samples kept; at 5 ms each this is more than five minutes, older lag is reported as of the oldest sample.
const SAMPLES_MAX: usize = 65536;

/// No room: the change must be covered by the dirty map instead.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("the backlog is full")]
pub struct Full;

/// The other side wants changes that are no longer held.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("the stream cannot be continued from where the other side stands")]
pub struct CannotResume;

#[derive(Debug)]
struct Held {
    change: Change,
    captured: Mono,
}

/// One disk's backlog.
#[derive(Debug)]
pub struct Backlog {
    epoch: u64,
    next: u64,
    held: VecDeque<Held>,
    sent: u64,
    cached: u64,
    safe: u64,
    bytes: u64,
    bytes_max: u64,
    samples: VecDeque<(u64, Mono)>,
}

impl Backlog {
    /// An empty backlog for a fresh epoch, holding at most `bytes_max`.
    pub fn new(epoch: u64, bytes_max: u64) -> Self {
        Self { epoch, next: 1, held: VecDeque::new(), sent: 0, cached: 0, safe: 0, bytes: 0, bytes_max, samples: VecDeque::new() }
    }

    /// Adds a change and gives it the next sequence.
    ///
    /// # Errors
    /// [`Full`]; markers always fit, they are few and small.
    pub fn push(&mut self, kind: ChangeKind, now: Mono) -> Result<u64, Full> {
        let cost = held_cost(&kind);
        if self.bytes + cost > self.bytes_max && !matches!(kind, ChangeKind::Mark(_)) {
            return Err(Full);
        }
        let sequence = self.next;
        self.next += 1;
        self.bytes += cost;
        if self.samples.back().is_none_or(|&(_, at)| now.since(at) >= SAMPLE_EVERY) && self.samples.len() < SAMPLES_MAX {
            self.samples.push_back((sequence, now));
        }
        self.held.push_back(Held { change: Change { sequence, kind }, captured: now });
        self.assert_ladder();
        Ok(sequence)
    }

    /// The next change to send and its capture time, if its cost fits `credit`. Cheap: content is shared, not copied.
    pub fn take_next(&mut self, credit: u64) -> Option<(Change, Mono)> {
        let index = usize::try_from(self.sent.checked_sub(self.cached)?).ok()?;
        let held = self.held.get(index)?;
        if change_cost(held.change.kind.data_len()) > credit {
            return None;
        }
        self.sent += 1;
        self.assert_ladder();
        Some((held.change.clone(), held.captured))
    }

    /// Cost of the next change to send.
    pub fn next_cost(&self) -> Option<u64> {
        let index = usize::try_from(self.sent.checked_sub(self.cached)?).ok()?;
        self.held.get(index).map(|held| change_cost(held.change.kind.data_len()))
    }

    /// A new connection wants to go on at `resume_at`.
    ///
    /// # Errors
    /// [`CannotResume`] if that change is not held any more, or was never made.
    pub fn resume(&mut self, resume_at: u64) -> Result<(), CannotResume> {
        if resume_at <= self.cached || resume_at > self.next {
            return Err(CannotResume);
        }
        // What lies between was received, but is not durable there: it stays here until it is.
        self.sent = resume_at - 1;
        self.assert_ladder();
        Ok(())
    }

    /// The other side has changes durably. Positions of another epoch, or beyond what was sent, are ignored.
    pub fn acknowledge(&mut self, epoch: u64, cached: u64, safe: u64) {
        if epoch != self.epoch || cached > self.sent {
            return;
        }
        if cached > self.cached {
            self.drop_through(cached);
        }
        self.safe = self.safe.max(safe.min(self.cached));
        while self.samples.front().is_some_and(|&(sequence, _)| sequence <= self.safe) {
            self.samples.pop_front();
        }
        self.assert_ladder();
    }

    /// Forgets everything and starts `epoch`. The caller has made sure that the dirty map covers what is forgotten.
    pub fn restart(&mut self, epoch: u64) {
        *self = Self::new(epoch, self.bytes_max);
    }

    /// The stream's epoch.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Whether a marker may be added: they pass the bound that holds for changes, but not without end.
    pub fn has_room_for_marker(&self) -> bool {
        self.bytes <= self.bytes_max
    }

    /// Cost of what is held.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The last sequence that is journaled at the master target.
    pub fn safe(&self) -> u64 {
        self.safe
    }

    /// Age of the oldest change that is not safe.
    pub fn lag(&self, now: Mono) -> Duration {
        if self.safe + 1 >= self.next { Duration::ZERO } else { self.samples.front().map_or(Duration::ZERO, |&(_, at)| now.since(at)) }
    }

    /// All rungs, from the highest.
    pub fn rungs(&self) -> [(Rung, Position); 4] {
        let at = |sequence| Position::new(self.epoch, sequence);
        [(Rung::Captured, at(self.next - 1)), (Rung::Sent, at(self.sent)), (Rung::Cached, at(self.cached)), (Rung::Safe, at(self.safe))]
    }

    fn drop_through(&mut self, sequence: u64) {
        while self.held.front().is_some_and(|h| h.change.sequence <= sequence) {
            if let Some(held) = self.held.pop_front() {
                self.bytes -= held_cost(&held.change.kind);
            }
        }
        self.cached = sequence;
        self.sent = self.sent.max(sequence);
    }

    fn assert_ladder(&self) {
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
mod tests {
    use bytes::Bytes;
    use proptest::prelude::*;

    use super::*;

    fn write(len: usize) -> ChangeKind {
        ChangeKind::Write { offset: 0, data: Bytes::from(vec![0; len]) }
    }

    #[test]
    fn a_full_backlog_refuses_writes_and_takes_markers() {
        let mut backlog = Backlog::new(1, 10_000);
        assert_eq!(backlog.push(write(8000), Mono(0)), Ok(1));
        assert_eq!(backlog.push(write(8000), Mono(0)), Err(Full));
        let marker = crate::model::Marker::sample(1, &[]);
        assert_eq!(backlog.push(ChangeKind::Mark(Box::new(marker)), Mono(0)), Ok(2));
    }

    #[test]
    fn lag_is_the_age_of_the_oldest_unsafe_change() {
        let mut backlog = Backlog::new(1, 1 << 20);
        backlog.push(write(512), Mono(1_000_000)).unwrap();
        backlog.push(write(512), Mono(2_000_000)).unwrap();
        assert_eq!(backlog.lag(Mono(3_000_000)), Duration::from_secs(2));
        backlog.take_next(u64::MAX);
        backlog.take_next(u64::MAX);
        backlog.acknowledge(1, 1, 1);
        assert_eq!(backlog.lag(Mono(3_000_000)), Duration::from_secs(1));
        backlog.acknowledge(1, 2, 2);
        assert_eq!(backlog.lag(Mono(3_000_000)), Duration::ZERO);
    }

    proptest! {
        /// Whatever is pushed, sent, acknowledged and resumed, the receiver sees every sequence once and in order.
        #[test]
        fn the_receiver_never_sees_a_gap(ops in proptest::collection::vec((0u8..5, 1usize..3000), 1..200)) {
            let mut backlog = Backlog::new(1, 50_000);
            let (mut received, mut durable) = (0u64, 0u64);
            for (op, len) in ops {
                match op {
                    0 | 1 => drop(backlog.push(write(len), Mono(0))),
                    2 => while let Some((change, _)) = backlog.take_next(u64::MAX) {
                        prop_assert!(change.sequence <= received + 1, "a gap");
                        received = received.max(change.sequence);
                    },
                    3 => {
                        durable = received;
                        backlog.acknowledge(1, durable, durable / 2);
                    }
                    // The receiver loses what was not durable and comes back.
                    _ => {
                        received = durable;
                        prop_assert_eq!(backlog.resume(durable + 1), Ok(()));
                    }
                }
                prop_assert!(backlog.bytes() <= 50_000);
            }
        }
    }

    #[test]
    fn a_receiver_that_lost_durable_data_cannot_resume() {
        let mut backlog = Backlog::new(1, 1 << 20);
        for _ in 0..3 {
            backlog.push(write(512), Mono(0)).unwrap();
            backlog.take_next(u64::MAX);
        }
        backlog.acknowledge(1, 3, 0);
        assert_eq!(backlog.resume(2), Err(CannotResume));
        assert_eq!(backlog.resume(5), Err(CannotResume));
        assert_eq!(backlog.resume(4), Ok(()));
    }
}
