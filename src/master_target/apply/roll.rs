//! Brings a replica to one of its points, so that the image itself is the disk as it was then. Undoable: it is done as every
//! other change of a replica is done, what stands there first goes to the retention journal.
//!
//! A failover begins an interval of its own at the position where the replica stands. Rolling to a point writes, for every
//! block that any interval from the point on has, the content of the first that has it; the interval of the failover keeps what
//! stood there before. So all points stay what they were, another point is one more roll, and cancelling is the roll to the
//! position where the failover began, after which that interval has served its turn and goes.
//!
//! If power goes anywhere: the job says where the replica is to stand, and the same roll is done again. It reads from
//! intervals only, never from the blocks that it writes.
//!
//! Costs: reads and writes what was overwritten since the point, once; nothing of the rest of the disk.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering};

use super::checkpoint::ApplyError;
use super::overwrite::overwrite;
use super::replica::Replica;
use crate::config::limits::APPLY_DEPTH;
use crate::disk::Disk;
use crate::master_target::catalogue::Records;
use crate::master_target::retain::Retention;
use crate::model::{BLOCK, Extent, Position};
use crate::storage::Storage;
use bytes::Bytes;

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
pub async fn roll(
    records: &Records,
    replica: &Replica,
    before: Position,
    target: Position,
    progress: &Progress,
) -> Result<u64, ApplyError> {
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
    if target == before {
        // It is where it was: nobody needs a way back any more, and older points find in the replica what was kept. If power goes
        // in between, the same is done again.
        let (records, id) = (records.clone(), replica.shared.id);
        let forgotten = tokio::task::spawn_blocking(move || records.forget_intervals(id, &[before])).await;
        forgotten.map_err(|e| std::io::Error::other(e.to_string()))??;
        replica.retention.drop_from(before)?;
    }
    replica.shared.condition().retained_bytes = replica.retention.bytes();
    Ok(total)
}

/// Brings an image to `target`, with what stood there kept in the interval that grows. Returns the bytes written.
///
/// # Errors
/// [`ApplyError`]; the same again goes on.
pub async fn bring_back<S: Storage>(
    image: &impl Disk,
    retention: &Retention<S>,
    target: Position,
    progress: &Progress,
) -> Result<u64, ApplyError> {
    rewrite(image, retention, target, progress, None).await
}

/// The same, of a replica whose present content nobody needs: nothing of it is kept. It goes to `noted`, the last point that it
/// passed; without one to where the first was to stand, so that it has nothing of what comes behind that when the first is sent again.
/// Blocks whose old content is damaged stay as they are. Returns the begins of the intervals that have the damage: points that need
/// it are not exact.
///
/// # Errors
/// [`ApplyError`]; the same again goes on.
pub async fn fall_back<S: Storage>(
    image: &impl Disk,
    retention: &Retention<S>,
    noted: Option<Position>,
) -> Result<BTreeSet<Position>, ApplyError> {
    let first = retention.starts_from(Position::default()).first().copied();
    let Some(target) = noted.or(first) else { return Ok(BTreeSet::new()) };
    let damaged = RefCell::default();
    rewrite(image, retention, target, &Progress::default(), Some(&damaged)).await?;
    Ok(damaged.into_inner())
}

async fn rewrite<S: Storage>(
    image: &impl Disk,
    retention: &Retention<S>,
    target: Position,
    progress: &Progress,
    falling_back: Option<&RefCell<BTreeSet<Position>>>,
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
            match (view.read(image, extent).await, falling_back) {
                (Ok(old), _) => write_sparse(image, extent, old).await?,
                (Err(error), Some(damaged)) if error.damaged_interval().is_some() => {
                    // Block by block: what needs nothing of the damage is not left behind.
                    for at in (extent.offset..extent.end()).step_by(BLOCK as usize) {
                        let block = Extent::new(at, BLOCK.min(extent.end() - at));
                        match view.read(image, block).await {
                            Ok(old) => write_sparse(image, block, old).await?,
                            Err(error) => match error.damaged_interval() {
                                Some(start) => drop(damaged.borrow_mut().insert(start)),
                                None => return Err(error.into()),
                            },
                        }
                    }
                }
                (Err(error), _) => return Err(error.into()),
            }
            progress.done.fetch_add(extent.len, Ordering::Relaxed);
            Ok::<_, ApplyError>(())
        }
    };
    overwrite(&places, DEPTH, falling_back.is_none().then_some(keep), write).await?;
    image.barrier().await?;
    Ok(total)
}

/// Writes content, zeroes as zeroes: what was a hole at the point takes no space.
async fn write_sparse(image: &impl Disk, extent: Extent, data: Bytes) -> Result<(), ApplyError> {
    const UNIT: usize = 64 << 10;
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
