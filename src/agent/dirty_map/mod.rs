//! The persistent write-intent map of one disk: a bit is durable before the first write to its region.
//!
//! If power goes
//! - before the sync of a new bit: the write it announces has not reached the disk;
//! - after it: the region is sent again, at most;
//! - while bits are cleared: some stand longer than needed;
//! - while a header is written: the other one is whole.
//!
//! Marks that wait while a sync runs share the next one.

pub mod format;

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};

use futures_util::future::try_join_all;
use tokio::sync::Mutex;

use self::format::{BITS_AT, HEADER_AT, Header, SECTOR_LEN, decode_sector, encode_sector, sectors};
use crate::config::limits::REGIONS_MAX;
use crate::model::{DiskId, Position, RegionSet};
use crate::storage::{AlignedBuf, File, OpenMode, Storage};

/// An open map; lives on one thread.
pub struct DirtyMap<F> {
    path: PathBuf,
    file: F,
    header: Cell<Header>,
    /// What the map should say.
    bits: RefCell<RegionSet>,
    /// What is known to stand on disk. A bit that is being cleared is not in it.
    on_disk: RefCell<RegionSet>,
    stale_sectors: RefCell<BTreeSet<u64>>,
    writer: Mutex<()>,
    requested: Cell<u64>,
    completed: Cell<u64>,
}

impl<F: File> DirtyMap<F> {
    /// Opens the map at `path`, or makes one that marks everything. Anything that does not fit the disk or cannot be
    /// read also becomes a map that marks everything: the safe answer is to send again. So does the map of a disk that is another
    /// file or device than the one it was kept for, which `origin` tells. Starts a new epoch, durably.
    ///
    /// # Errors
    /// Those of the file system.
    pub async fn open<S: Storage<File = F>>(
        storage: &S,
        path: &Path,
        disk: DiskId,
        size: u64,
        region: u64,
        origin: u64,
    ) -> io::Result<Self> {
        let existing = match storage.open(path, OpenMode::Write).await {
            Ok(file) => Some(file),
            Err(e) if e.kind() == io::ErrorKind::NotFound => None,
            Err(e) => return Err(e),
        };
        let loaded = match &existing {
            Some(file) => read_map(file, disk, size).await?,
            None => None,
        };
        let (file, header, bits) = match (existing, loaded) {
            (Some(file), Some((header, bits))) if header.origin == origin => (file, header, bits),
            (Some(file), Some((header, bits))) => {
                tracing::warn!(path = %path.display(), "the disk is another file or device than at the last start: all of it is sent again");
                (file, Header { origin, ..header }, RegionSet::full(bits.regions()))
            }
            (existing, _) => {
                if existing.is_some() {
                    tracing::warn!(path = %path.display(), "the dirty map does not belong to this disk or is damaged: everything will be compared as never sent");
                }
                let file = match existing {
                    Some(file) => file,
                    None => storage.open(path, OpenMode::Create).await?,
                };
                let region = region_for(size, region);
                let header = Header {
                    sequence: 0,
                    disk,
                    size,
                    region,
                    epoch: 0,
                    generation: 0,
                    initial: true,
                    origin,
                    cleaned: Position::default(),
                };
                (file, header, RegionSet::full(size.div_ceil(region)))
            }
        };
        let regions = bits.regions();
        let known = header.size;
        let map = Self {
            path: path.to_owned(),
            file,
            header: Cell::new(header),
            on_disk: RefCell::new(bits.clone()),
            bits: RefCell::new(bits),
            stale_sectors: RefCell::new((0..sectors(regions)).collect()),
            writer: Mutex::new(()),
            requested: Cell::new(0),
            completed: Cell::new(0),
        };
        map.file.allocate(0, (BITS_AT + sectors(regions) * SECTOR_LEN as u64).next_multiple_of(4096)).await?;
        map.flush().await?;
        map.update_header(|h| h.epoch += 1).await?;
        if known < size {
            tracing::info!(path = %path.display(), from = known, to = size, "the disk has grown since the last stop; what is new is sent");
            map.grow(size).await?;
        }
        if let Some(dir) = path.parent() {
            storage.sync_dir(dir)?;
        }
        Ok(map)
    }

    /// Makes sure that the bits of these regions are durable. Returns at once if they are.
    ///
    /// # Errors
    /// Those of the file system; the write that asked must not go to the disk.
    pub async fn mark(&self, regions: std::ops::RangeInclusive<u64>) -> io::Result<()> {
        let durable = {
            let (mut bits, on_disk) = (self.bits.borrow_mut(), self.on_disk.borrow());
            let mut durable = true;
            for region in regions {
                if bits.insert(region) {
                    self.stale_sectors.borrow_mut().insert(region / format::REGIONS_PER_SECTOR);
                }
                durable &= on_disk.contains(region);
            }
            durable
        };
        if durable { Ok(()) } else { self.flush().await }
    }

    /// Whether the bits of these regions are durable: [`DirtyMap::mark`] would have nothing to do.
    pub fn is_marked(&self, mut regions: std::ops::RangeInclusive<u64>) -> bool {
        let (bits, on_disk) = (self.bits.borrow(), self.on_disk.borrow());
        regions.all(|region| bits.contains(region) && on_disk.contains(region))
    }

    /// Clears bits. The caller knows that these regions are safe and at rest.
    ///
    /// # Errors
    /// Those of the file system; bits then stand longer than needed.
    pub async fn clear(&self, regions: &[u64]) -> io::Result<()> {
        for &region in regions {
            self.bits.borrow_mut().remove(region);
            self.on_disk.borrow_mut().remove(region);
            self.stale_sectors.borrow_mut().insert(region / format::REGIONS_PER_SECTOR);
        }
        self.flush().await
    }

    /// Marks everything.
    ///
    /// # Errors
    /// Those of the file system.
    pub async fn mark_all(&self) -> io::Result<()> {
        let regions = self.bits.borrow().regions();
        self.mark(0..=regions - 1).await
    }

    /// The disk has `size` bytes from now on: what is new is marked, and the region that was the last. The new bits are durable
    /// before the header says the new size; if power goes in between, the map is still that of the smaller disk.
    ///
    /// # Errors
    /// Those of the file system; the disk must not be served at its new size then.
    pub async fn grow(&self, size: u64) -> io::Result<()> {
        let header = self.header.get();
        let (old, regions) = (self.bits.borrow().regions(), size.div_ceil(header.region));
        self.file.allocate(0, (BITS_AT + sectors(regions) * SECTOR_LEN as u64).next_multiple_of(4096)).await?;
        self.bits.borrow_mut().grow(regions);
        self.on_disk.borrow_mut().grow(regions);
        self.mark(old.saturating_sub(1)..=regions - 1).await?;
        self.update_header(|h| h.size = size).await
    }

    /// Whether it can cover a disk of `size` bytes as it is. A larger one needs larger regions, which begin with a restart of
    /// the agent, and everything sent again.
    pub fn can_cover(&self, size: u64) -> bool {
        size.div_ceil(self.header.get().region) <= REGIONS_MAX
    }

    /// The header as it stands.
    pub fn header(&self) -> Header {
        self.header.get()
    }

    /// What is marked.
    pub fn marked(&self) -> RegionSet {
        self.bits.borrow().clone()
    }

    /// Changes the header, durably, in the slot that is not current.
    ///
    /// # Errors
    /// Those of the file system.
    pub async fn update_header(&self, change: impl FnOnce(&mut Header)) -> io::Result<()> {
        let _alone = self.writer.lock().await;
        let mut header = self.header.get();
        change(&mut header);
        header.sequence += 1;
        let slot = HEADER_AT[(header.sequence % 2) as usize];
        self.file.write_at(slot, AlignedBuf::copy_of(&header.encode()).freeze()).await?;
        self.file.sync_data().await?;
        self.header.set(header);
        Ok(())
    }

    /// Writes what changed before the call and syncs. Whoever waits while a flush runs is served by the next.
    async fn flush(&self) -> io::Result<()> {
        let ticket = self.requested.get() + 1;
        self.requested.set(ticket);
        let _alone = self.writer.lock().await;
        if self.completed.get() >= ticket {
            return Ok(());
        }
        let covers = self.requested.get();
        let stale = std::mem::take(&mut *self.stale_sectors.borrow_mut());
        let snapshot = self.bits.borrow().clone();
        let written = async {
            try_join_all(stale.iter().map(|&sector| {
                let bytes = AlignedBuf::copy_of(&encode_sector(&snapshot, sector)).freeze();
                self.file.write_at(BITS_AT + sector * SECTOR_LEN as u64, bytes)
            }))
            .await?;
            self.file.sync_data().await
        };
        if let Err(e) = written.await {
            self.stale_sectors.borrow_mut().extend(stale);
            return Err(io::Error::new(e.kind(), format!("{}: {e}", self.path.display())));
        }
        let (bits, mut on_disk) = (self.bits.borrow(), self.on_disk.borrow_mut());
        for sector in stale {
            let first = sector * format::REGIONS_PER_SECTOR;
            for region in first..(first + format::REGIONS_PER_SECTOR).min(bits.regions()) {
                // What was cleared meanwhile is about to leave the disk and must not count as durable.
                if snapshot.contains(region) && bits.contains(region) {
                    on_disk.insert(region);
                }
            }
        }
        self.completed.set(covers);
        Ok(())
    }
}

/// The configured region, enlarged until the disk has no more than [`REGIONS_MAX`].
fn region_for(size: u64, configured: u64) -> u64 {
    let mut region = configured;
    while size.div_ceil(region) > REGIONS_MAX {
        region *= 2;
    }
    region
}

async fn read_map<F: File>(file: &F, disk: DiskId, size: u64) -> io::Result<Option<(Header, RegionSet)>> {
    let len = file.len()?;
    if len < BITS_AT {
        return Ok(None);
    }
    let mut best: Option<Header> = None;
    for at in HEADER_AT {
        let found = Header::decode(&file.read_at(at, SECTOR_LEN).await?);
        best = [best, found].into_iter().flatten().max_by_key(|h| h.sequence);
    }
    // A disk that grew while the agent was stopped is the same disk; one that is smaller now is not.
    let known = |h: &Header| h.disk == disk && h.size > 0 && h.size <= size && h.region > 0 && size.div_ceil(h.region) <= REGIONS_MAX;
    let Some(header) = best.filter(known) else { return Ok(None) };
    let regions = header.size.div_ceil(header.region);
    if len < BITS_AT + sectors(regions) * SECTOR_LEN as u64 {
        return Ok(None);
    }
    let mut bits = RegionSet::empty(regions);
    for sector in 0..sectors(regions) {
        let bytes = file.read_at(BITS_AT + sector * SECTOR_LEN as u64, SECTOR_LEN).await?;
        if !decode_sector(&bytes, sector, &mut bits) {
            tracing::warn!(sector, "a sector of the dirty map is damaged: its regions will be sent again");
        }
    }
    Ok(Some((header, bits)))
}
