//! One protected disk: the path of a write through gate, lock, dirty map, disk and stream.

mod compare;
mod size;
mod streams;

pub(super) use self::streams::Restart;

use std::cell::{Cell, RefCell};
use std::collections::HashSet;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

use super::gate::Gate;
use super::local::Local;
use crate::agent::backlog::{Backlog, Room};
use crate::agent::comparison::Comparison;
use crate::agent::dirty_map::DirtyMap;
use crate::agent::locks::{RangeGuard, RangeLocks};
use crate::agent::regions::Regions;
use crate::agent::scrub::Scrub;
use crate::agent::shared::{AgentShared, VolumeShared};
use crate::checksum;
use crate::clock::{self, Mono, micros};
use crate::config::agent::{AgentSettings, Disk};
use crate::config::units::show_size;
use crate::model::change::{CHANGE_BYTES_MAX, ZERO_BYTES_MAX};
use crate::model::{BLOCK, ChangeKind, DiskReport, Extent, Name, ReplicationState, SECTOR};
use crate::nbd::protocol::NbdError;
use crate::nbd::server::{Allocation, Export, ExportInfo};
use crate::observe::metrics;
use crate::storage::AlignedBuf;
use crate::storage::uring::{Uring, UringFile, breathe, is_full, is_idle};

/// A disk opened, before the machine is put together.
pub(super) struct Parts {
    /// Shared state.
    pub shared: Arc<VolumeShared>,
    /// The file system that the disk lives on.
    pub device: u64,
    file: Local,
    lock: Vec<std::fs::File>,
    read_only: bool,
    map: DirtyMap<UringFile>,
}

/// Opens a disk and its dirty map.
///
/// # Errors
/// Names the disk and what to do.
pub(super) async fn open_parts(settings: &AgentSettings, disk: &Disk) -> io::Result<Parts> {
    let named = |e: io::Error| io::Error::new(e.kind(), format!("disk {} ({}): {e}", disk.name, disk.path.display()));
    let metadata = std::fs::metadata(&disk.path).map_err(named)?;
    let kind = metadata.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(named(io::Error::other("is neither a file nor a block device")));
    }
    let (file, lock) = Local::open(disk).await.map_err(named)?;
    let size = file.size().map_err(named)?;
    let id = settings.disk_id(disk);
    let map_path = settings.state.join(format!("{}.dirty-map", disk.name));
    let map =
        DirtyMap::open(&Uring::direct(), &map_path, id, size, settings.dirty_map.region, origin(disk, &metadata)).await.map_err(named)?;
    let share = settings.backlog.log_max / settings.disk.len() as u64;
    let backlog = Backlog::new(map.header().epoch, Room { memory: settings.backlog.memory_max, log: share });
    let shared = Arc::new(VolumeShared::new(id, &settings.machine, &disk.name, size, backlog));
    Ok(Parts { lock, shared, device: metadata.dev(), file, read_only: disk.read_only, map })
}

/// Tells whether a disk is the one of the last start: a file by its inode, which a copy put in its place does not have, a
/// device by its path; and by the format it is read as.
fn origin(disk: &Disk, metadata: &std::fs::Metadata) -> u64 {
    let inode = |path: PathBuf| std::fs::metadata(path).map_or(0, |m| m.ino()).to_le_bytes();
    let place = match metadata.is_file() {
        true => disk.kind().files(&disk.path).into_iter().flat_map(inode).collect(),
        false => disk.path.as_os_str().as_encoded_bytes().to_vec(),
    };
    u64::from(checksum::crc32c(disk.kind().as_str().as_bytes())) << 32 | u64::from(checksum::crc32c(&place))
}

/// One protected disk.
pub(super) struct Volume {
    /// Shared with the session.
    pub shared: Arc<VolumeShared>,
    agent: Arc<AgentShared>,
    file: Local,
    /// Held until the agent ends.
    _lock: Vec<std::fs::File>,
    read_only: bool,
    map: DirtyMap<UringFile>,
    regions: RefCell<Regions>,
    comparison: RefCell<Comparison>,
    /// The comparison that never ends.
    pub scrub: RefCell<Scrub>,
    /// Damage that the master target knew when the stream was opened; to be sent again.
    pub told_damage: RefCell<Vec<Extent>>,
    /// Differences that a scrub found and that are not sent again yet.
    pub healing: Cell<usize>,
    /// The epoch for which it was decided what is compared.
    compared_epoch: Cell<u64>,
    sending: RefCell<HashSet<u64>>,
    locks: Rc<RangeLocks>,
    pub(super) gate: Rc<Gate>,
    captured_bytes: Cell<u64>,
    /// Writes may be copied into the page cache on this thread: see [`Volume::new`].
    on_the_spot: bool,
    /// The stream is being started anew, or the disk grows: nothing may be marked clean meanwhile.
    restarting: Cell<bool>,
    /// Held by either.
    changing: tokio::sync::Mutex<()>,
    /// The size that was seen last since the disk lost a part of itself, until it has it back.
    shrunk_to: Cell<Option<u64>>,
    /// A size that the map cannot cover, told once.
    too_large: Cell<u64>,
    broken: RefCell<Option<String>>,
    /// The process server at which this epoch was opened.
    carrier: RefCell<Option<Name>>,
}

impl Volume {
    /// Puts a disk under the machine's gate. Everything its map marks is missing.
    ///
    /// `on_the_spot` allows writes that are copied into the page cache by this thread. Such a copy waits while its file system
    /// is frozen or hangs, so it is right only when no other disk lives on another file system.
    pub(super) fn new(parts: Parts, gate: Rc<Gate>, agent: Arc<AgentShared>, on_the_spot: bool) -> Self {
        let marked = parts.map.marked();
        let header = parts.map.header();
        if marked.count() > 0 && !header.initial {
            metrics::disk_count(metrics::RESYNCS, &parts.shared.label, 1);
            tracing::info!(
                disk = parts.shared.label,
                regions = marked.count(),
                "regions written shortly before the last stop will be sent again"
            );
        }
        Self {
            regions: RefCell::new(Regions::new(header.region, parts.shared.size(), marked)),
            comparison: RefCell::default(),
            scrub: RefCell::default(),
            told_damage: RefCell::default(),
            healing: Cell::default(),
            compared_epoch: Cell::new(0),
            sending: RefCell::default(),
            shared: parts.shared,
            agent,
            file: parts.file,
            _lock: parts.lock,
            read_only: parts.read_only,
            map: parts.map,
            locks: Rc::new(RangeLocks::default()),
            gate,
            captured_bytes: Cell::new(0),
            on_the_spot,
            restarting: Cell::new(false),
            changing: tokio::sync::Mutex::new(()),
            shrunk_to: Cell::new(None),
            too_large: Cell::new(0),
            broken: RefCell::default(),
            carrier: RefCell::default(),
        }
    }

    /// Bytes whose content is not in the stream.
    pub(super) fn missing_bytes(&self) -> u64 {
        self.regions.borrow().missing_bytes()
    }

    /// Whether the local disk has all of `extent` now.
    pub(super) fn has(&self, extent: Extent) -> bool {
        self.file.size().is_ok_and(|size| extent.end() <= size)
    }

    /// Whether a part of the disk is gone.
    pub(super) fn is_short(&self) -> bool {
        self.shrunk_to.get().is_some()
    }

    /// What keeps the disk from being protected, for a person.
    pub(super) fn trouble(&self) -> Option<String> {
        if let Some(found) = self.shrunk_to.get() {
            let (size, found) = (show_size(self.shared.size()), show_size(found));
            return Some(format!(
                "the disk became smaller, {found} instead of {size}: give it its size back, or protect it under another name"
            ));
        }
        self.broken
            .borrow()
            .as_ref()
            .map(|error| format!("the local disk or its dirty map failed ({error}): repair it and restart the agent"))
    }

    /// The history of the replica this map belongs to.
    pub(super) fn generation(&self) -> u64 {
        self.map.header().generation
    }

    /// Initial replication or resynchronisation has put everything into the stream.
    pub(super) async fn became_consistent(&self) {
        let initial = self.map.header().initial;
        tracing::info!(disk = self.shared.label, initial, "everything is in the stream; recovery points continue");
        if initial && let Err(error) = self.map.update_header(|h| h.initial = false).await {
            tracing::error!(disk = self.shared.label, %error, "could not note the end of initial replication");
        }
    }

    /// Marks regions clean that are safe and at rest.
    ///
    /// # Errors
    /// Those of the map's file.
    pub(super) async fn clean(&self, idle: Duration) -> io::Result<()> {
        if self.broken.borrow().is_some() || self.is_short() {
            return Ok(());
        }
        // One moment for both looks: what is written while the sync runs is not covered by it, and must not count as at rest
        // because the sync took long.
        let now = clock::now();
        let candidates = || {
            let safe = self.shared.backlog().safe();
            self.regions.borrow().cleanable(&self.map.marked(), safe, now, idle)
        };
        let before = candidates();
        if before.is_empty() || self.restarting.get() {
            return Ok(());
        }
        if self.read_only {
            // Nobody writes it; what is safe is clean.
            self.note_cleaned().await?;
            for &region in &before {
                self.regions.borrow_mut().cleaned(region);
            }
            return self.map.clear(&before).await;
        }
        // What was answered without a flush may still be lost here by a power cut, while the replica has it: only what
        // is durable on the local disk too may be forgotten.
        if let Err(error) = self.file.sync_data().await {
            self.failed(&error);
            return Err(error);
        }
        self.note_cleaned().await?;
        let mut clean = candidates();
        clean.retain(|region| before.binary_search(region).is_ok());
        if clean.is_empty() || self.restarting.get() {
            return Ok(());
        }
        for &region in &clean {
            self.regions.borrow_mut().cleaned(region);
        }
        self.map.clear(&clean).await
    }

    /// Makes everything answered durable on the local disk.
    ///
    /// # Errors
    /// Those of the disk.
    pub(super) async fn make_durable(&self) -> io::Result<()> {
        if self.read_only { Ok(()) } else { self.file.sync_data().await }
    }

    /// Makes everything answered durable on the local disk, at the end.
    ///
    /// # Errors
    /// Those of the disk.
    pub(super) async fn close(&self) -> io::Result<()> {
        if self.read_only { Ok(()) } else { self.file.close().await }
    }

    /// How the disk does.
    pub(super) fn report(&self, now: Mono) -> DiskReport {
        let backlog = self.shared.backlog();
        let missing_bytes = self.missing_bytes();
        let state = match (missing_bytes, self.map.header().initial) {
            _ if self.broken.borrow().is_some() || self.is_short() => ReplicationState::Error,
            (0, _) if self.gate.is_closed() => ReplicationState::FailedOver,
            (0, _) => ReplicationState::Delta,
            (_, true) => ReplicationState::InitialReplication,
            (_, false) => ReplicationState::Resynchronising,
        };
        DiskReport {
            state,
            missing_bytes,
            backlog_bytes: backlog.bytes(),
            captured: backlog.rungs()[0].1,
            lag_us: micros(backlog.lag(now)),
            generation: self.map.header().generation,
            unverified_bytes: self.unverified_bytes(),
        }
    }

    /// Bytes captured since the last call.
    pub(super) fn take_captured_bytes(&self) -> u64 {
        self.captured_bytes.replace(0)
    }

    /// The attempt to send a region ended.
    pub(super) fn end_send(&self, region: u64) {
        self.sending.borrow_mut().remove(&region);
    }

    /// Whether a region is missing.
    pub(super) fn is_missing(&self, region: u64) -> bool {
        self.regions.borrow().is_missing(region)
    }

    /// Regions of the disk.
    pub(super) fn regions_count(&self) -> u64 {
        self.regions.borrow().missing().regions()
    }

    /// There is something to send.
    pub(super) fn ring(&self) {
        self.agent.wake.ring();
    }

    /// Puts what stands here into the stream once more. The caller holds the range.
    pub(super) fn send_again(&self, extent: Extent, change: ChangeKind) {
        let now = clock::now();
        let pushed = self.shared.backlog().push(change, now);
        match pushed {
            Ok(number) => self.regions.borrow_mut().captured(extent, number, now),
            Err(_) => self.lose(extent, "backlog full"),
        }
        self.ring();
    }

    /// Bytes of a region.
    pub(super) fn region_extent(&self, region: u64) -> Extent {
        self.regions.borrow().extent(region)
    }

    /// A region is in the stream, up to `sequence`.
    pub(super) fn region_sent(&self, region: u64, extent: Extent, sequence: u64, now: Mono) {
        let mut regions = self.regions.borrow_mut();
        regions.captured(extent, sequence, now);
        regions.sent(region);
        drop(regions);
        self.comparison.borrow_mut().sent(region);
        self.agent.wake.ring();
    }

    /// Locks a range.
    pub(super) async fn lock(&self, extent: Extent) -> RangeGuard {
        self.locks.lock(extent).await
    }

    /// Reads from the local disk.
    ///
    /// # Errors
    /// Those of the disk.
    pub(super) async fn read_raw(&self, offset: u64, len: usize) -> io::Result<AlignedBuf> {
        self.file.read_at(offset, len).await
    }

    /// The next range of the local disk that may hold data.
    ///
    /// # Errors
    /// Those of the disk.
    pub(super) fn next_data(&self, offset: u64) -> io::Result<Option<(u64, u64)>> {
        self.file.next_data(offset)
    }

    /// The whole path of a change: gate, lock, map, disk, stream. `extent` is sector-aligned.
    async fn change(&self, extent: Extent, action: Action, durable: bool) -> Result<(), NbdError> {
        if self.broken.borrow().is_some() {
            return Err(NbdError::Io);
        }
        let Some(_passage) = self.gate.pass().await else { return Err(NbdError::Shutdown) };
        let _lock = self.locks.lock(extent).await;
        self.regions.borrow_mut().begin(extent);
        let result = self.change_locked(extent, action).await;
        self.regions.borrow_mut().end(extent);
        let result = match result {
            Ok(()) if durable => self.file.sync_data().await,
            other => other,
        };
        result.map_err(|e| self.failed(&e))
    }

    async fn change_locked(&self, extent: Extent, action: Action) -> io::Result<()> {
        let touched = self.regions.borrow().of(extent);
        self.map.mark(touched).await?;
        let (content, written) = match action {
            Action::Write(data) => {
                let result = self.file.write_at(extent.offset, data.clone()).await;
                (Some((data, extent.offset)), result)
            }
            Action::Patch { data, offset } => match self.patch(extent, offset, &data).await {
                Ok(whole) => {
                    let result = self.file.write_at(extent.offset, whole.clone()).await;
                    (Some((whole, extent.offset)), result)
                }
                Err(e) => return Err(e),
            },
            Action::Zero => (None, self.file.punch(extent.offset, extent.len).await),
        };
        if let Err(e) = written {
            // Part of it may be on the disk: whatever stands there now is read and sent later.
            self.lose(extent, "local write failed");
            return Err(e);
        }
        self.capture(extent, content);
        Ok(())
    }

    /// As [`Volume::change`] for a write that nothing makes wait: the gate is open, nobody holds the range, its regions are
    /// marked, and the disk takes it at once. As no other task runs in between, neither passage nor lock is needed.
    fn change_now(&self, extent: Extent, data: AlignedBuf) -> Result<Result<(), NbdError>, AlignedBuf> {
        let at_once = self.on_the_spot
            && self.gate.is_open()
            && self.broken.borrow().is_none()
            && self.locks.is_free(extent)
            && self.map.is_marked(self.regions.borrow().of(extent));
        if !at_once {
            return Err(data);
        }
        match self.file.write_now(extent.offset, &data) {
            Ok(false) => Err(data),
            Ok(true) => {
                self.capture(extent, Some((data.freeze(), extent.offset)));
                Ok(Ok(()))
            }
            Err(e) => {
                self.lose(extent, "local write failed");
                Ok(Err(self.failed(&e)))
            }
        }
    }

    async fn patch(&self, extent: Extent, offset: u64, data: &[u8]) -> io::Result<Bytes> {
        let mut whole = self.file.read_at(extent.offset, extent.len as usize).await?;
        let at = (offset - extent.offset) as usize;
        whole[at..at + data.len()].copy_from_slice(data);
        Ok(whole.freeze())
    }

    /// Puts a change that is on the local disk into the stream, or marks its regions missing. Never waits.
    fn capture(&self, extent: Extent, content: Option<(Bytes, u64)>) {
        self.captured_bytes.set(self.captured_bytes.get() + extent.len);
        self.comparison.borrow_mut().touched(self.regions.borrow().of(extent));
        if self.regions.borrow().all_missing(extent) {
            return;
        }
        let now = clock::now();
        let mut last = Ok(0);
        {
            let mut backlog = self.shared.backlog();
            let step = if content.is_some() { CHANGE_BYTES_MAX as u64 } else { ZERO_BYTES_MAX };
            let mut at = extent.offset;
            while at < extent.end() && last.is_ok() {
                let len = step.min(extent.end() - at);
                let kind = match &content {
                    Some((data, start)) => {
                        ChangeKind::Write { offset: at, data: data.slice((at - start) as usize..(at - start + len) as usize) }
                    }
                    None => ChangeKind::Zero(Extent::new(at, len)),
                };
                last = backlog.push(kind, now);
                at += len;
            }
        }
        match last {
            Ok(sequence) => self.regions.borrow_mut().captured(extent, sequence, now),
            Err(_) => self.lose(extent, "backlog full"),
        }
        self.agent.wake.ring();
    }

    fn lose(&self, extent: Extent, reason: &'static str) {
        self.comparison.borrow_mut().lost(self.regions.borrow().of(extent));
        if self.regions.borrow_mut().lose(extent) {
            metrics::disk_count(metrics::RESYNCS, &self.shared.label, 1);
            tracing::warn!(
                disk = self.shared.label,
                reason,
                "changes are tracked by region from now on; they will be sent when the stream keeps up, recovery points pause until then"
            );
        }
    }

    fn failed(&self, error: &io::Error) -> NbdError {
        if is_full(error) {
            return NbdError::NoSpace;
        }
        let mut broken = self.broken.borrow_mut();
        if broken.is_none() {
            tracing::error!(disk = self.shared.label, %error, "the local disk or its dirty map failed: the export answers errors until the agent is restarted");
            *broken = Some(error.to_string());
        }
        NbdError::Io
    }
}

/// What is done to the disk.
enum Action {
    /// Write these sectors.
    Write(Bytes),
    /// Write bytes that are not whole sectors: read the sectors, change them, write them.
    Patch {
        /// The bytes.
        data: AlignedBuf,
        /// Where they begin.
        offset: u64,
    },
    /// Make it read as zeroes.
    Zero,
}

impl Export for Volume {
    fn info(&self) -> ExportInfo {
        ExportInfo { name: self.shared.name.to_string(), size: self.shared.size(), read_only: self.read_only }
    }

    async fn read(&self, extent: Extent) -> Result<Bytes, NbdError> {
        let aligned = extent.aligned_out(SECTOR, self.shared.size());
        let data = self.file.read_at(aligned.offset, aligned.len as usize).await.map_err(|error| {
            tracing::error!(disk = self.shared.label, %error, offset = extent.offset, "a read of the local disk failed");
            NbdError::Io
        })?;
        let from = (extent.offset - aligned.offset) as usize;
        Ok(data.freeze().slice(from..from + extent.len as usize))
    }

    fn read_now(&self, extent: Extent) -> Option<Bytes> {
        Some(self.file.read_now(extent.offset, extent.len as usize)?.freeze())
    }

    fn write_now(&self, offset: u64, data: AlignedBuf) -> Result<Result<(), NbdError>, AlignedBuf> {
        let extent = Extent::new(offset, data.len() as u64);
        if extent.len > 0 && extent == extent.aligned_out(SECTOR, self.shared.size()) { self.change_now(extent, data) } else { Err(data) }
    }

    fn may_poll(&self) -> bool {
        is_idle()
    }

    async fn breathe(&self) {
        breathe().await;
    }

    async fn write(&self, offset: u64, data: AlignedBuf, fua: bool) -> Result<(), NbdError> {
        let extent = Extent::new(offset, data.len() as u64);
        let aligned = extent.aligned_out(SECTOR, self.shared.size());
        let action = if aligned == extent { Action::Write(data.freeze()) } else { Action::Patch { data, offset } };
        self.change(aligned, action, fua).await
    }

    async fn zero(&self, extent: Extent, keep: bool, fua: bool) -> Result<(), NbdError> {
        // Punching keeps neither space nor speed promises; zeroes are what both commands must read as.
        let _ = keep;
        let inner_start = extent.offset.next_multiple_of(BLOCK).min(extent.end());
        let inner_end = (extent.end() / BLOCK * BLOCK).max(inner_start);
        let edges = [Extent::new(extent.offset, inner_start - extent.offset), Extent::new(inner_end, extent.end() - inner_end)];
        for edge in edges.into_iter().filter(|e| e.len > 0) {
            self.write(edge.offset, AlignedBuf::zeroed(edge.len as usize), fua).await?;
        }
        if inner_end > inner_start {
            self.change(Extent::new(inner_start, inner_end - inner_start), Action::Zero, fua).await?;
        }
        Ok(())
    }

    async fn flush(&self) -> Result<(), NbdError> {
        if self.read_only {
            return Ok(());
        }
        self.file.sync_data().await.map_err(|e| self.failed(&e))
    }

    async fn allocation(&self, extent: Extent) -> Result<Vec<Allocation>, NbdError> {
        let mut runs = Vec::new();
        let mut at = extent.offset;
        while at < extent.end() && runs.len() < 1024 {
            let (start, end) = match self.file.next_data(at).map_err(|_| NbdError::Io)? {
                Some((start, end)) => (start.min(extent.end()), end.min(extent.end())),
                None => (extent.end(), extent.end()),
            };
            if start > at {
                runs.push(Allocation { len: start - at, hole: true });
            }
            if end > start {
                runs.push(Allocation { len: end - start, hole: false });
            }
            at = end.max(start);
        }
        Ok(runs)
    }
}
