//! Brings a replica to one of its points, so that the image itself is the disk as it was then. Undoable: it is done as every
//! other change of a replica is done, what stands there first goes to the retention journal.
//!
//! A failover begins an interval of its own at the position where the replica stands. Rolling to a point writes, for every
//! block that any interval from the point on has, the content of the first that has it; the interval of the failover keeps what
//! stood there before. So all points stay what they were, another point is one more roll, and cancelling is the roll to the
//! position where the failover began.
//!
//! If power goes anywhere: the job says where the replica is to stand, and the same roll is done again. It reads from
//! intervals only, never from the blocks that it writes.
//!
//! Costs: reads and writes what was overwritten since the point, once; nothing of the rest of the disk.

use std::sync::atomic::{AtomicU64, Ordering};

use super::checkpoint::ApplyError;
use super::overwrite::overwrite;
use super::replica::Replica;
use crate::config::limits::APPLY_DEPTH;
use crate::disk::{Disk, Image};
use crate::master_target::retain::Retention;
use crate::model::{Extent, Position};
use crate::storage::{File, Storage};

/// Bytes read at once.
const STEP: u64 = 1 << 20;
/// Blocks read and written at once.
const DEPTH: usize = APPLY_DEPTH / 4;

/// How far a roll is, for whoever watches.
#[derive(Debug, Default)]
pub struct Progress {
    /// Bytes that are done.
    pub done: AtomicU64,
    /// Bytes in all; 0 while unknown.
    pub total: AtomicU64,
}

/// Rolls to `target`. `before` is where the replica stood when the failover began. Returns the bytes written.
///
/// # Errors
/// [`ApplyError`]; rolling again goes on.
pub async fn roll(replica: &Replica, before: Position, target: Position, progress: &Progress) -> Result<u64, ApplyError> {
    let _alone = replica.changing.lock().await;
    // What the machine wrote before and was not written yet is dropped: nothing of it may come after the roll.
    replica.next_serving();
    if replica.retention.is_ahead_of(before) {
        return Err(std::io::Error::other("old content was kept behind the place where the failover began").into());
    }
    replica.retention.begin(before).await?;
    replica.last_marker.set(Some(before));
    replica.noted_marker.set(Some(before));
    let total = bring_back(&replica.image, &replica.retention, target, progress).await?;
    replica.shared.condition().retained_bytes = replica.retention.bytes();
    Ok(total)
}

/// Brings an image to `target`, with what stood there kept in the interval that grows. Returns the bytes written.
///
/// # Errors
/// [`ApplyError`]; the same again goes on.
pub async fn bring_back<S: Storage>(
    image: &Image<S::File>,
    retention: &Retention<S>,
    target: Position,
    progress: &Progress,
) -> Result<u64, ApplyError> {
    rewrite(image, retention, target, progress, true).await
}

/// The same, of a replica whose present content nobody needs: nothing of it is kept.
///
/// # Errors
/// [`ApplyError`]; the same again goes on.
pub async fn fall_back<S: Storage>(image: &Image<S::File>, retention: &Retention<S>, target: Position) -> Result<u64, ApplyError> {
    rewrite(image, retention, target, &Progress::default(), false).await
}

async fn rewrite<S: Storage>(
    image: &Image<S::File>,
    retention: &Retention<S>,
    target: Position,
    progress: &Progress,
    keeping: bool,
) -> Result<u64, ApplyError> {
    let view = retention.view(target).await?;
    let size = image.size();
    let mut extents = Vec::new();
    let mut at = 0;
    while let Some(found) = view.next_kept(at).filter(|e| e.offset < size) {
        let end = found.end().min(size);
        while at.max(found.offset) < end {
            let from = at.max(found.offset);
            at = end.min(from + STEP);
            extents.push(Extent::new(from, at - from));
        }
    }
    let total: u64 = extents.iter().map(|e| e.len).sum();
    progress.total.store(total, Ordering::Relaxed);
    progress.done.store(0, Ordering::Relaxed);
    let places: Vec<(Extent, ())> = extents.into_iter().map(|extent| (extent, ())).collect();
    let keep = async |piece: &[(Extent, ())]| Ok(retention.preserve(image, piece.iter().map(|(extent, ())| *extent)).await?);
    let write = |extent: Extent, ()| {
        let view = &view;
        async move {
            let old = view.read(image, extent).await?;
            write_sparse(image, extent, old).await?;
            progress.done.fetch_add(extent.len, Ordering::Relaxed);
            Ok::<_, ApplyError>(())
        }
    };
    overwrite(&places, DEPTH, keeping.then_some(keep), write).await?;
    image.barrier().await?;
    Ok(total)
}

/// Writes content, zeroes as zeroes: what was a hole at the point takes no space.
async fn write_sparse<F: File>(image: &Image<F>, extent: Extent, data: crate::storage::AlignedBuf) -> Result<(), ApplyError> {
    const UNIT: usize = 64 << 10;
    let data = data.freeze();
    let is_zero = |bytes: &[u8]| bytes.iter().all(|&b| b == 0);
    let mut at = 0;
    while at < data.len() {
        let zero = is_zero(&data[at..data.len().min(at + UNIT)]);
        let mut end = data.len().min(at + UNIT);
        while end < data.len() && is_zero(&data[end..data.len().min(end + UNIT)]) == zero {
            end = data.len().min(end + UNIT);
        }
        let offset = extent.offset + at as u64;
        if zero {
            image.zero(Extent::new(offset, (end - at) as u64)).await?;
        } else {
            image.write(offset, data.slice(at..end)).await?;
        }
        at = end;
    }
    Ok(())
}
