//! Collects consecutive changes of one disk until a batch is full, old enough, or ends with a marker. Pure.

use std::time::Duration;

use crate::clock::Mono;
use crate::model::{Extent, Trailer};
use crate::storage::AlignedBuf;
use crate::wire::batch::{BATCH_DATA_TARGET, BATCH_EXTENTS_MAX};

/// One collected change.
pub struct Collected {
    /// Bytes of the disk.
    pub extent: Extent,
    /// Content; `None` for zeroes.
    pub data: Option<AlignedBuf>,
}

/// Consecutive changes, closed.
pub struct RawBatch {
    /// Stream they belong to.
    pub epoch: u64,
    /// First sequence.
    pub first: u64,
    /// Last sequence.
    pub last: u64,
    /// The changes that touch bytes, in order.
    pub changes: Vec<Collected>,
    /// What it ends with.
    pub trailer: Option<Trailer>,
    /// When the last change was captured, on this process's clock.
    pub captured: Mono,
    /// What it counts against the agent's credit.
    pub cost: u64,
}

/// The open batch of a disk.
#[derive(Default)]
pub struct Batcher {
    open: Option<(RawBatch, Mono, usize)>,
}

/// What a change is for the batcher.
pub enum Input {
    /// Bytes or zeroes.
    Change(Collected),
    /// What ends a batch.
    End(Trailer),
}

impl Batcher {
    /// Adds the next change. Returns a batch when this one completes it.
    pub fn add(&mut self, now: Mono, epoch: u64, sequence: u64, cost: u64, captured: Mono, input: Input) -> Option<RawBatch> {
        let (batch, _, data_len) = self.open.get_or_insert_with(|| {
            (RawBatch { epoch, first: sequence, last: sequence, changes: Vec::new(), trailer: None, captured, cost: 0 }, now, 0)
        });
        debug_assert_eq!(batch.epoch, epoch, "a batch is closed before its epoch ends");
        batch.last = sequence;
        batch.cost += cost;
        batch.captured = captured;
        match input {
            Input::End(trailer) => batch.trailer = Some(trailer),
            Input::Change(change) => {
                *data_len += change.data.as_ref().map_or(0, |d| d.len());
                batch.changes.push(change);
            }
        }
        // Folding may cut an extent in two for each change, and zeroes inside data in more.
        let full = *data_len >= BATCH_DATA_TARGET || batch.changes.len() >= BATCH_EXTENTS_MAX / 4;
        if full || batch.trailer.is_some() { self.close() } else { None }
    }

    /// Closes the open batch if it is older than `age`.
    pub fn close_older(&mut self, now: Mono, age: Duration) -> Option<RawBatch> {
        let (_, opened, _) = self.open.as_ref()?;
        if now.since(*opened) >= age { self.close() } else { None }
    }

    /// Closes the open batch, if there is one.
    pub fn close(&mut self) -> Option<RawBatch> {
        self.open.take().map(|(batch, _, _)| batch)
    }

    /// Whether a batch is open.
    pub fn is_open(&self) -> bool {
        self.open.is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Marker;

    fn write(len: usize) -> Input {
        Input::Change(Collected { extent: Extent::new(0, len as u64), data: Some(AlignedBuf::zeroed(len)) })
    }

    #[test]
    fn a_batch_closes_when_full_when_old_and_at_a_marker() {
        let mut batcher = Batcher::default();
        assert!(batcher.add(Mono(0), 1, 1, 1, Mono(0), write(200 << 10)).is_none());
        let full = batcher.add(Mono(0), 1, 2, 1, Mono(0), write(100 << 10)).expect("the target is reached");
        assert_eq!((full.first, full.last, full.cost), (1, 2, 2));
        assert!(batcher.add(Mono(0), 1, 3, 1, Mono(0), write(512)).is_none());
        assert!(batcher.close_older(Mono(999), Duration::from_millis(1)).is_none());
        assert!(batcher.close_older(Mono(1000), Duration::from_millis(1)).is_some());
        let marker = Marker::sample(1, &[]);
        let marked = batcher.add(Mono(0), 1, 4, 1, Mono(0), Input::End(Trailer::Mark(Box::new(marker)))).expect("a marker ends a batch");
        assert!(marked.trailer.is_some() && !batcher.is_open());
    }
}
