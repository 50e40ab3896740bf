//! The state of one disk at the process server: what was accepted, cached, forwarded, acknowledged, released. Pure.
//!
//! ```text
//! accepted >= cached >= forwarded >= acknowledged >= released
//! ```
//! A batch is forwarded only when it is cached, so that the master target never has what this server could forget.

use std::collections::{BTreeMap, VecDeque};

use bytes::Bytes;
use thiserror::Error;

use crate::clock::Mono;
use crate::model::position::assert_ladder;
use crate::model::{Position, Rung};
use crate::storage::log::Location;

/// Markers are small, few, and travel without credit.
const MARKERS_ALLOWANCE: u64 = 64 << 10;

/// A change that does not continue the stream.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("change {found} arrived where {expected} was expected")]
pub struct Gap {
    /// The next sequence.
    pub expected: u64,
    /// What came.
    pub found: u64,
}

/// A batch between acceptance and cache.
#[derive(Debug)]
struct InPipeline {
    number: u64,
    end: Position,
    cost: u64,
    cached: Option<Queued>,
}

/// A cached batch that the master target has not acknowledged.
#[derive(Clone, Debug)]
pub struct Queued {
    /// First sequence.
    pub first: u64,
    /// Where the stream stands after it.
    pub end: Position,
    /// Where it is in the cache.
    pub location: Location,
    /// Its sealed bytes, unless they have to be read back.
    pub sealed: Option<Bytes>,
    /// When its last change was captured, on this process's clock.
    pub captured: Mono,
}

/// One disk's stream.
#[derive(Debug, Default)]
pub struct Stream {
    accepted: Position,
    cached: Position,
    forwarded: Position,
    acknowledged: Position,
    released: Position,
    pipeline: VecDeque<InPipeline>,
    next_number: u64,
    queue: VecDeque<Queued>,
    sent: usize,
    highest_sent: Position,
    queue_bytes: u64,
    /// Batches that the master target does not have were given up: what is accepted behind them stands on what is gone.
    gap: bool,
    /// Cost accepted and not cached.
    outstanding: u64,
    /// Cost accepted since the agent opened the disk.
    received: u64,
    credit: u64,
}

impl Stream {
    /// The stream as a restart finds it: everything through `released` is at the master target, `found` is in the cache. An epoch
    /// follows what its agent `relied` on, by epoch: less than that means that something is missing in between.
    /// Returns the stream, the locations of batches that are not needed, and how many of these follow a gap.
    pub fn recover(released: Position, relied: &BTreeMap<u64, Position>, mut found: Vec<Queued>) -> (Self, Vec<Location>, usize) {
        found.sort_by_key(|q| (q.end.epoch, q.first, q.end.sequence));
        let mut stream = Self { released, ..Self::default() };
        let mut at = released;
        let (mut unneeded, mut cut_off) = (Vec::new(), 0);
        for batch in found {
            let begins = batch.end.epoch > at.epoch;
            let follows = !begins || relied.get(&batch.end.epoch).is_none_or(|relied| at >= *relied);
            if batch.end > at && follows && at.accepts(batch.end.epoch, batch.first) {
                at = batch.end;
                stream.queue_bytes += batch.location.stored_bytes();
                stream.queue.push_back(batch);
            } else {
                cut_off += usize::from(batch.end > at);
                unneeded.push(batch.location);
            }
        }
        stream.accepted = at;
        stream.cached = at;
        stream.forwarded = released;
        stream.acknowledged = released;
        stream.check();
        (stream, unneeded, cut_off)
    }

    /// The agent opens the disk with `epoch`, which is not lower than the highest known. Returns the sequence to go on at.
    pub fn open(&mut self, epoch: u64) -> u64 {
        if epoch > self.accepted.epoch {
            self.accepted = Position::new(epoch, 0);
        }
        self.received = 0;
        self.credit = 0;
        self.accepted.sequence + 1
    }

    /// A change arrived. False for one that was accepted before.
    ///
    /// # Errors
    /// [`Gap`]; the connection cannot go on.
    pub fn accept(&mut self, sequence: u64, cost: u64) -> Result<bool, Gap> {
        let expected = self.accepted.sequence + 1;
        if sequence > expected {
            return Err(Gap { expected, found: sequence });
        }
        self.received += cost;
        if sequence < expected {
            return Ok(false);
        }
        self.accepted.sequence = sequence;
        self.outstanding += cost;
        self.check();
        Ok(true)
    }

    /// Whether a change of this cost exceeds what was granted.
    pub fn over_credit(&self, cost: u64) -> bool {
        self.received + cost > self.credit + MARKERS_ALLOWANCE
    }

    /// A batch was closed and enters the pipeline. Returns its number.
    pub fn closed(&mut self, end: Position, cost: u64) -> u64 {
        self.next_number += 1;
        self.pipeline.push_back(InPipeline { number: self.next_number, end, cost, cached: None });
        self.next_number
    }

    /// A batch is durable in the cache. Batches may complete out of order; only a run without gaps counts. Returns how
    /// many joined the queue; `None` for a batch that entered before a [`Stream::reset`].
    pub fn cached(&mut self, number: u64, first: u64, location: Location, sealed: Bytes, captured: Mono) -> Option<usize> {
        let batch = self.pipeline.iter_mut().find(|b| b.number == number)?;
        batch.cached = Some(Queued { first, end: batch.end, location, sealed: Some(sealed), captured });
        let mut joined = 0;
        while let Some(done) = self.pipeline.front_mut().and_then(|b| b.cached.take().map(|q| (q, b.cost))) {
            let (queued, cost) = done;
            self.pipeline.pop_front();
            self.outstanding -= cost;
            self.cached = queued.end;
            self.queue_bytes += queued.location.stored_bytes();
            self.queue.push_back(queued);
            joined += 1;
        }
        self.check();
        Some(joined)
    }

    /// The bytes of the batches that joined last are not kept in memory.
    pub fn forget_newest(&mut self, count: usize) -> u64 {
        let from = self.queue.len().saturating_sub(count).max(self.sent);
        self.queue.range_mut(from..).filter_map(|q| q.sealed.take()).map(|b| b.len() as u64).sum()
    }

    /// The next batch to forward. The caller says [`Stream::forwarded`] when it was given to the link.
    pub fn next_to_forward(&self) -> Option<&Queued> {
        self.queue.get(self.sent)
    }

    /// The batch was given to the link. True if it had been before, on an earlier connection.
    pub fn forwarded(&mut self, end: Position) -> bool {
        // Acknowledgements may have shortened the queue while the batch was being written.
        if self.queue.get(self.sent).is_some_and(|q| q.end == end) {
            self.sent += 1;
        }
        let again = end <= self.highest_sent;
        self.highest_sent = self.highest_sent.max(end);
        self.forwarded = self.forwarded.max(end.min(self.cached));
        self.check();
        again
    }

    /// A new connection to the master target stands at `journaled`; everything after it is sent again.
    pub fn link_opened(&mut self, journaled: Position) -> Vec<Queued> {
        let gone = self.acknowledged_through(journaled);
        self.sent = 0;
        gone
    }

    /// The master target has journaled through `journaled`. Returns the batches that are not needed any more.
    pub fn acknowledged_through(&mut self, journaled: Position) -> Vec<Queued> {
        let through = journaled.min(self.cached);
        let mut gone = Vec::new();
        while self.queue.front().is_some_and(|q| q.end <= through) {
            gone.extend(self.queue.pop_front());
            self.sent = self.sent.saturating_sub(1);
        }
        self.queue_bytes -= gone.iter().map(|q| q.location.stored_bytes()).sum::<u64>();
        self.forwarded = self.forwarded.max(through);
        self.acknowledged = self.acknowledged.max(through);
        self.check();
        gone
    }

    /// Everything through `position` was given up in the cache, durably.
    pub fn released_through(&mut self, position: Position) {
        self.released = self.released.max(position);
        self.check();
    }

    /// Gives up batches of epochs before `epoch`: the master target obeys a newer one and would refuse them. What they
    /// held is sent again by the newer epoch, whose agent marked everything that was not safe.
    pub fn drop_epochs_before(&mut self, epoch: u64) -> Vec<Queued> {
        let mut gone = Vec::new();
        while self.queue.front().is_some_and(|q| q.end.epoch < epoch) {
            gone.extend(self.queue.pop_front());
            self.sent = self.sent.saturating_sub(1);
        }
        self.queue_bytes -= gone.iter().map(|q| q.location.stored_bytes()).sum::<u64>();
        self.gap |= !gone.is_empty();
        gone
    }

    /// The epoch of the oldest change that is not acknowledged, if there is one.
    pub fn waiting_epoch(&self) -> Option<u64> {
        self.queue.front().map(|q| q.end.epoch).or(self.pipeline.front().map(|b| b.end.epoch))
    }

    /// Whether a master target that obeys `epoch` and stands at `position` can be sent everything behind that, without a gap.
    pub fn follows(&self, position: Position, epoch: u64) -> bool {
        let mut waiting = self.queue.iter().map(|q| q.end).chain(self.pipeline.iter().map(|b| b.end));
        !self.gap && waiting.find(|end| *end > position).is_none_or(|end| end.epoch >= epoch)
    }

    /// Whether everything through `position` is at the master target or here, as far as is known here.
    pub fn has_through(&self, position: Position) -> bool {
        !self.gap && position <= self.accepted
    }

    /// What was accepted.
    pub fn accepted(&self) -> Position {
        self.accepted
    }

    /// Forgets everything, because the replica has another history. Returns the cached batches to give up.
    pub fn reset(&mut self, at: Position) -> Vec<Queued> {
        let gone = self.queue.drain(..).collect();
        let next_number = self.next_number;
        *self = Self { accepted: at, cached: at, forwarded: at, acknowledged: at, released: at, next_number, ..Self::default() };
        gone
    }

    /// Credit of the agent: cumulative cost it may have sent since it opened the disk. Never shrinks while the disk is
    /// open; does not grow without a window.
    pub fn credit(&mut self, window: Option<u64>) -> u64 {
        if let Some(window) = window {
            self.credit = self.credit.max(self.received + window.saturating_sub(self.outstanding));
        }
        self.credit
    }

    /// Sequence durable here, in the agent's epoch.
    pub fn cached_in_epoch(&self) -> u64 {
        self.in_epoch(self.cached)
    }

    /// Sequence journaled at the master target, in the agent's epoch.
    pub fn safe_in_epoch(&self) -> u64 {
        self.in_epoch(self.acknowledged)
    }

    fn in_epoch(&self, position: Position) -> u64 {
        if position.epoch == self.accepted.epoch { position.sequence } else { 0 }
    }

    /// The stream's epoch.
    pub fn epoch(&self) -> u64 {
        self.accepted.epoch
    }

    /// Where acknowledged batches end.
    pub fn acknowledged(&self) -> Position {
        self.acknowledged
    }

    /// Bytes in the cache that the master target does not have.
    pub fn queue_bytes(&self) -> u64 {
        self.queue_bytes
    }

    /// Bytes of sealed batches held in memory.
    pub fn memory_bytes(&self) -> u64 {
        self.queue.iter().filter_map(|q| q.sealed.as_ref()).map(|b| b.len() as u64).sum()
    }

    /// All rungs, from the highest.
    pub fn rungs(&self) -> [(Rung, Position); 5] {
        [
            (Rung::Accepted, self.accepted),
            (Rung::Cached, self.cached),
            (Rung::Forwarded, self.forwarded),
            (Rung::Acknowledged, self.acknowledged),
            (Rung::Released, self.released),
        ]
    }

    fn check(&self) {
        assert_ladder(&self.rungs());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn queued(epoch: u64, first: u64, last: u64) -> Queued {
        let location = Location::of_length(4096);
        Queued { first, end: Position::new(epoch, last), location, sealed: None, captured: Mono(0) }
    }

    #[test]
    fn an_epoch_that_stands_on_what_is_gone_is_given_up_at_a_start() {
        let found = || vec![queued(3, 5, 6), queued(3, 7, 10), queued(4, 1, 5)];
        let relied = BTreeMap::from([(4, Position::new(3, 10))]);
        let (stream, gone, cut_off) = Stream::recover(Position::new(3, 4), &relied, found());
        assert_eq!((stream.accepted(), gone.len(), cut_off), (Position::new(4, 5), 0, 0));
        let mut rotted = found();
        rotted.remove(1);
        let (stream, gone, cut_off) = Stream::recover(Position::new(3, 4), &relied, rotted);
        assert_eq!((stream.accepted(), gone.len(), cut_off), (Position::new(3, 6), 1, 1));
        assert!(stream.has_through(Position::new(3, 6)) && !stream.has_through(Position::new(3, 10)));
    }

    #[test]
    fn what_comes_behind_batches_that_were_given_up_does_not_follow() {
        let found = vec![queued(3, 5, 6), queued(4, 1, 5)];
        let (mut stream, ..) = Stream::recover(Position::new(3, 4), &BTreeMap::new(), found);
        let there = Position::new(3, 4);
        assert!(stream.follows(there, 3));
        assert!(!stream.follows(there, 4), "3:5 is not taken any more, and 4:1 stands on it");
        assert!(stream.follows(Position::new(3, 6), 4), "the master target has that already");
        assert_eq!(stream.drop_epochs_before(4).len(), 1);
        assert!(!stream.follows(there, 4) && !stream.has_through(there));
        stream.reset(there);
        assert!(stream.follows(there, 4) && stream.has_through(there));
    }
}
