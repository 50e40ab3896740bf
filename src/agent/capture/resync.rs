//! Sends missing regions through the stream: initial replication and resynchronisation alike. Where the replica may have them
//! already, a digest goes first.

use std::rc::Rc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::sync::Semaphore;

use super::volume::Volume;
use crate::agent::comparison::Task;
use crate::clock;
use crate::config::limits::RESYNC_WINDOW_BYTES;
use crate::model::change::CHANGE_BYTES_MAX;
use crate::model::{ChangeKind, Digest, Extent};
use crate::storage::digest::{hash_blocks, hash_zeroes};

/// Regions being read at once.
const DEPTH: usize = 6;
/// While there is nothing to do, and while the stream has no room.
const IDLE: Duration = Duration::from_millis(50);
const NO_ROOM: Duration = Duration::from_millis(2);
/// While every missing region is under way, or waits for its verdict.
const NOTHING_NOW: Duration = Duration::from_millis(10);

/// Sends missing regions of one disk whenever there are some and the process server takes changes.
pub(super) async fn run(volume: Rc<Volume>) {
    let depth = Rc::new(Semaphore::new(DEPTH));
    let mut sending = false;
    loop {
        if volume.missing_bytes() == 0 || volume.is_short() || !volume.shared.open.load(Ordering::Relaxed) {
            if sending && volume.missing_bytes() == 0 {
                sending = false;
                volume.became_consistent().await;
                volume.publish();
            }
            tokio::time::sleep(IDLE).await;
            continue;
        }
        if !sending {
            sending = true;
            tracing::info!(
                disk = volume.shared.label,
                missing_bytes = volume.missing_bytes(),
                "sending regions that are not in the stream"
            );
        }
        if volume.shared.backlog().bytes() >= RESYNC_WINDOW_BYTES {
            tokio::time::sleep(NO_ROOM).await;
            continue;
        }
        let Ok(permit) = depth.acquire().await else { return };
        permit.forget();
        let Some((region, task)) = volume.next_task() else {
            depth.add_permits(1);
            tokio::time::sleep(NOTHING_NOW).await;
            continue;
        };
        let (volume, depth) = (volume.clone(), depth.clone());
        tokio::task::spawn_local(async move {
            let done = match task {
                Task::Compare => compare_region(&volume, region).await,
                _ => send_region(&volume, region).await,
            };
            if let Err(error) = done {
                tracing::error!(disk = volume.shared.label, region, %error, "the disk cannot be read; replication of this region waits");
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
            volume.end_send(region);
            depth.add_permits(1);
        });
    }
}

/// Reads one region under its lock and puts it into the stream. Writes to it wait for the length of one read.
async fn send_region(volume: &Volume, region: u64) -> std::io::Result<()> {
    let extent = volume.region_extent(region);
    let _lock = volume.lock(extent).await;
    if !volume.is_missing(region) {
        return Ok(());
    }
    // Under the lock: what was known to differ may have been written since.
    let parts = match volume.task_now(region) {
        Task::Send(parts) => parts.unwrap_or_else(|| vec![extent]),
        _ => return Ok(()),
    };
    let mut changes = Vec::new();
    for part in parts {
        changes.extend(read_changes(volume, part).await?);
    }
    if volume.region_extent(region) != extent || !volume.has(extent) {
        // The disk grew meanwhile, and this was its last region: its new part was not read. Or it shrank, and what is gone
        // looked like a hole.
        return Ok(());
    }
    let now = clock::now();
    let mut last = 0;
    {
        let mut backlog = volume.shared.backlog();
        for change in changes {
            match backlog.push(change, now) {
                Ok(sequence) => last = sequence,
                // No room after all: the region stays missing and is read again later.
                Err(_) => return Ok(()),
            }
        }
    }
    volume.region_sent(region, extent, last, now);
    Ok(())
}

/// Puts a digest of one region into the stream. Writes to it wait for the length of one read.
async fn compare_region(volume: &Volume, region: u64) -> std::io::Result<()> {
    let extent = volume.region_extent(region);
    let _lock = volume.lock(extent).await;
    if !volume.is_missing(region) || volume.task_now(region) != Task::Compare {
        return Ok(());
    }
    let hashes = hashes_of(volume, extent).await?;
    if volume.region_extent(region) != extent || !volume.has(extent) {
        return Ok(());
    }
    let now = clock::now();
    let pushed = volume.shared.backlog().push(ChangeKind::Digest(Box::new(Digest { extent, hashes, scrub: false })), now);
    // No room: it is tried again.
    if let Ok(sequence) = pushed {
        volume.asked(region, sequence, now);
    }
    Ok(())
}

/// The digest of an extent that nobody writes meanwhile.
pub(super) async fn hashes_of(volume: &Volume, extent: Extent) -> std::io::Result<Vec<[u8; 32]>> {
    if volume.next_data(extent.offset)?.is_none_or(|(start, _)| start >= extent.end()) {
        return Ok(hash_zeroes(extent.len));
    }
    let content = volume.read_raw(extent.offset, extent.len as usize).await?;
    // Off the thread for which the application waits.
    tokio::task::spawn_blocking(move || hash_blocks(&content)).await.map_err(std::io::Error::other)
}

/// What stands in an extent, as changes.
pub(super) async fn read_changes(volume: &Volume, extent: Extent) -> std::io::Result<Vec<ChangeKind>> {
    let mut reads = Vec::new();
    let mut changes = Vec::new();
    let mut at = extent.offset;
    while at < extent.end() {
        let data = volume.next_data(at)?.filter(|&(start, _)| start < extent.end());
        let Some((start, end)) = data else {
            changes.push((at, ChangeKind::Zero(Extent::new(at, extent.end() - at))));
            break;
        };
        // Whole sectors: a hole may begin anywhere on some file systems.
        let (start, end) = ((start / 4096 * 4096).max(at), end.div_ceil(4096).saturating_mul(4096).min(extent.end()));
        if start > at {
            changes.push((at, ChangeKind::Zero(Extent::new(at, start - at))));
        }
        at = start;
        while at < end {
            let len = (end - at).min(CHANGE_BYTES_MAX as u64);
            reads.push((at, len));
            at += len;
        }
    }
    let read = futures_util::future::try_join_all(reads.iter().map(|&(offset, len)| volume.read_raw(offset, len as usize))).await?;
    for (&(offset, len), data) in reads.iter().zip(read) {
        let change =
            if is_zero(&data) { ChangeKind::Zero(Extent::new(offset, len)) } else { ChangeKind::Write { offset, data: data.freeze() } };
        changes.push((offset, change));
    }
    Ok(changes.into_iter().map(|(_, change)| change).collect())
}

fn is_zero(bytes: &[u8]) -> bool {
    let (words, tail) = bytes.as_chunks::<8>();
    words.iter().fold(0, |any, w| any | u64::from_le_bytes(*w)) == 0 && tail.iter().all(|&b| b == 0)
}
