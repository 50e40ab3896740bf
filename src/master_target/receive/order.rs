//! Restores order between receiving and journaling: batches are journaled side by side, but count only without a gap. Pure.

use std::collections::VecDeque;

use thiserror::Error;

use crate::master_target::shared::Item;
use crate::model::Position;
use crate::sabotage;
use crate::storage::log::Location;

/// What a batch is to a disk's stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It continues the stream.
    Next,
    /// It was received before: acknowledged again, changes nothing. Older epochs than the one obeyed are refused before this.
    Known,
}

/// A batch does not continue the stream.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("batch {epoch}:{first} does not continue {received}: a batch is missing in between")]
pub struct Gap {
    /// Of the batch.
    pub epoch: u64,
    /// Of the batch.
    pub first: u64,
    /// Where the stream stands.
    pub received: Position,
}

struct Waiting {
    number: u64,
    end: Position,
    item: Option<Item>,
    done: bool,
}

/// One disk's stream at the master target.
#[derive(Default)]
pub struct Order {
    received: Position,
    journaled: Position,
    waiting: VecDeque<Waiting>,
    next_number: u64,
}

impl Order {
    /// A stream of which everything through `journaled` is durable.
    pub fn new(journaled: Position) -> Self {
        Self { received: journaled, journaled, ..Self::default() }
    }

    /// Another stream in the place of this one. What is under way of this one is nobody's from then on: numbers are not used twice.
    pub fn replaced(&self, journaled: Position) -> Self {
        Self { next_number: self.next_number, ..Self::new(journaled) }
    }

    /// Bytes of opened bodies that wait here.
    pub fn body_bytes(&self) -> u64 {
        let bodies = self.waiting.iter().filter_map(|w| w.item.as_ref()?.body.as_ref());
        bodies.map(|(_, body)| body.len() as u64).sum()
    }

    /// Judges a batch.
    ///
    /// # Errors
    /// [`Gap`]; the stream stays where it is.
    pub fn judge(&self, epoch: u64, first: u64, last: u64) -> Result<Verdict, Gap> {
        if Position::new(epoch, last) <= self.received {
            return Ok(Verdict::Known);
        }
        if self.received.accepts(epoch, first) { Ok(Verdict::Next) } else { Err(Gap { epoch, first, received: self.received }) }
    }

    /// A batch judged [`Verdict::Next`] goes to the journal. Returns its number.
    pub fn received(&mut self, end: Position, make: impl FnOnce() -> Item) -> u64 {
        debug_assert!(end > self.received, "judged before");
        self.received = end;
        self.next_number += 1;
        self.waiting.push_back(Waiting { number: self.next_number, end, item: Some(make()), done: false });
        self.next_number
    }

    /// What the process server is told: everything through here is durable, and nothing behind it.
    pub fn acknowledged(&self) -> Position {
        if sabotage::is("acknowledge-early") { self.received } else { self.journaled }
    }

    /// A batch is durable. Returns what may be applied now, in order.
    pub fn journaled(&mut self, number: u64, location: Location) -> Vec<Item> {
        if let Some(waiting) = self.waiting.iter_mut().find(|w| w.number == number) {
            waiting.done = true;
            if let Some(item) = &mut waiting.item {
                item.location = location;
            }
        }
        let mut ready = Vec::new();
        while self.waiting.front().is_some_and(|w| w.done) {
            if let Some(waiting) = self.waiting.pop_front() {
                self.journaled = waiting.end;
                ready.extend(waiting.item);
            }
        }
        ready
    }

    /// Whether a batch with this number is on its way to the journal.
    pub fn awaits(&self, number: u64) -> bool {
        self.waiting.iter().any(|w| w.number == number)
    }

    /// Received and durable.
    pub fn positions(&self) -> (Position, Position) {
        (self.received, self.journaled)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_are_refused_repeats_are_known_and_a_new_epoch_begins_at_one() {
        let order = Order::new(Position::new(2, 10));
        assert_eq!(order.judge(2, 11, 15), Ok(Verdict::Next));
        assert_eq!(order.judge(2, 8, 12), Ok(Verdict::Next), "an overlap: replayed changes end in the same state");
        assert_eq!(order.judge(2, 3, 10), Ok(Verdict::Known));
        assert_eq!(order.judge(1, 11, 99), Ok(Verdict::Known), "an epoch that is over");
        assert!(order.judge(2, 12, 15).is_err());
        assert_eq!(order.judge(3, 1, 5), Ok(Verdict::Next));
        assert!(order.judge(3, 2, 5).is_err());
    }

    #[test]
    fn what_was_under_way_of_a_stream_that_was_replaced_is_nobodys() {
        let item = || Item {
            first: 1,
            end: Position::new(1, 5),
            location: Location::nowhere(),
            marked: false,
            body_len: 0,
            body: None,
            travel: None,
        };
        let mut order = Order::new(Position::default());
        let old = order.received(Position::new(1, 5), item);
        let mut order = order.replaced(Position::default());
        let new = order.received(Position::new(2, 5), item);
        assert!(!order.awaits(old) && order.awaits(new));
        assert!(order.journaled(old, Location::nowhere()).is_empty());
        assert_eq!(order.journaled(new, Location::nowhere()).len(), 1);
    }
}
