//! Compares the disk with its replica while replication goes on: puts digests into the stream, and sends again what differs.

use std::rc::Rc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::resync::{hashes_of, read_changes};
use super::volume::Volume;
use crate::clock::{self, Mono};
use crate::config::limits::RESYNC_WINDOW_BYTES;
use crate::model::{ChangeKind, Digest, Extent, Verdict};
use crate::observe::metrics;

/// While there is nothing to do.
const IDLE: Duration = Duration::from_millis(200);
/// While the stream has no room, or verdicts are waited for.
const NO_ROOM: Duration = Duration::from_millis(5);

/// Scrubs one disk until the agent ends. `rate` is in bytes a second; 0: only when somebody asks.
pub(super) async fn run(volume: Rc<Volume>, rate: u64) {
    let mut due = clock::now();
    loop {
        let now = clock::now();
        if !volume.may_scrub() {
            tokio::time::sleep(IDLE).await;
            continue;
        }
        let told = std::mem::take(&mut *volume.told_damage.borrow_mut());
        if !told.is_empty() {
            tracing::warn!(
                disk = volume.shared.label,
                places = told.len(),
                "the replica has damage that was found before: it is sent again"
            );
            volume.healing.set(volume.healing.get() + 1);
            heal(volume.clone(), told).await;
        }
        if rate > 0 && volume.scrub.borrow().round().is_none() {
            let regions = volume.regions_count();
            volume.scrub.borrow_mut().begin(regions, false, now);
        }
        let urgent = volume.scrub.borrow().is_urgent();
        let busy = volume.shared.backlog().bytes() >= RESYNC_WINDOW_BYTES / if urgent { 2 } else { 16 };
        let early = !urgent && due > now;
        let next = if busy || early { None } else { volume.scrub.borrow_mut().next(now) };
        let Some(region) = next else {
            let idle = volume.scrub.borrow().round().is_none();
            tokio::time::sleep(if idle { IDLE } else { NO_ROOM }).await;
            continue;
        };
        let len = volume.region_extent(region).len;
        if !urgent {
            due = Mono(due.0.max(now.0) + len.saturating_mul(1_000_000) / rate.max(1));
        }
        if let Err(error) = compare(&volume, region).await {
            tracing::error!(disk = volume.shared.label, region, %error, "a part of the disk cannot be read, and is not compared");
            volume.scrub.borrow_mut().unread(len, clock::now());
        }
    }
}

/// Puts a digest of one region into the stream. Writes to it wait for the length of one read.
async fn compare(volume: &Volume, region: u64) -> std::io::Result<()> {
    let extent = volume.region_extent(region);
    let _lock = volume.lock(extent).await;
    if volume.is_missing(region) || !volume.has(extent) {
        volume.scrub.borrow_mut().passed_over(clock::now());
        return Ok(());
    }
    let hashes = hashes_of(volume, extent).await?;
    let now = clock::now();
    if volume.region_extent(region) != extent || volume.is_missing(region) {
        volume.scrub.borrow_mut().put_back(region);
        return Ok(());
    }
    // The machine was handed over meanwhile: nothing may follow its final point.
    if !volume.may_scrub() {
        volume.scrub.borrow_mut().put_back(region);
        return Ok(());
    }
    let digest = Digest { extent, hashes, scrub: true };
    let pushed = volume.shared.backlog().push(ChangeKind::Digest(Box::new(digest)), now);
    match pushed {
        Ok(number) => volume.scrub.borrow_mut().asked(region, number, now),
        Err(_) => volume.scrub.borrow_mut().put_back(region),
    }
    metrics::disk_count(metrics::SCRUBBED_BYTES, &volume.shared.label, extent.len);
    volume.ring();
    Ok(())
}

impl Volume {
    /// Whether source and replica are the same at every place of the stream, so that a difference is damage.
    fn may_scrub(&self) -> bool {
        self.missing_bytes() == 0 && !self.is_short() && !self.gate.is_closed() && self.shared.open.load(Ordering::Relaxed)
    }

    /// Whether no scrub of this disk puts anything more into the stream while the gate is closed.
    pub(super) fn scrub_rests(&self) -> bool {
        !self.scrub.borrow().awaits(clock::now()) && self.healing.get() == 0
    }

    /// Takes a verdict of a scrub. False if it is another one's.
    pub(super) fn judge_scrub(self: &Rc<Self>, verdict: &Verdict, region: u64, number: u64) -> bool {
        let differing = verdict.differs.iter().map(|e| e.len).sum();
        if !self.scrub.borrow_mut().verdict(region, number, differing, clock::now()) {
            return false;
        }
        if !verdict.differs.is_empty() {
            metrics::disk_count(metrics::SCRUB_DIFFERING_BYTES, &self.shared.label, differing);
            let first = verdict.differs[0];
            tracing::error!(
                disk = self.shared.label, at = %verdict.at, offset = first.offset, bytes = differing,
                "source and replica differ: the storage of one of them is damaged. What differs is sent again; points that have it are taken off the list at the master target"
            );
            self.healing.set(self.healing.get() + 1);
            tokio::task::spawn_local(heal(self.clone(), verdict.differs.clone()));
        }
        true
    }
}

/// Sends again what stands here now.
async fn heal(volume: Rc<Volume>, differs: Vec<Extent>) {
    for extent in differs {
        let _lock = volume.lock(extent).await;
        let changes = match read_changes(&volume, extent).await {
            Ok(changes) => changes,
            Err(error) => {
                tracing::error!(disk = volume.shared.label, %error, offset = extent.offset, "the disk cannot be read where it differs from its replica: which of them is right is not known");
                continue;
            }
        };
        for change in changes {
            volume.send_again(extent, change);
        }
    }
    volume.healing.set(volume.healing.get() - 1);
}
