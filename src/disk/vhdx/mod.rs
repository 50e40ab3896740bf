//! A VHDX that opens and checks clean after a crash at any instant, without a repair. Dynamic and fixed ones are written;
//! differencing ones, and those whose log is not empty, are read.
//!
//! Direct mode: the log stays empty. A barrier is: payload durable (sync A), then the changed 4 KiB pages of the block
//! allocation table in place, durable (sync B). If power goes
//! - before A: blocks that are in no table page on disk; a leak, reclaimed by the next open;
//! - between A and B: some of the table's 8-byte entries are new, each refers to payload made durable by A;
//! - while the file grows: the file is longer than what the table refers to; cut at the next open.
//!
//! Strictly the specification wants table changes logged; no reader can see the difference because each entry stands
//! for itself. A log that somebody else left is replayed when the image is opened for writing.

pub mod bat;
pub mod format;
pub mod log;
pub(super) mod open;

use std::cell::{Cell, RefCell, RefMut};
use std::io;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use futures_util::future::try_join_all;
use tokio::sync::Mutex;
use uuid::Uuid;

use self::bat::{Bat, Geometry, state};
use self::format::{HEADER_AT, Header, MIB, Metadata, REGION_AT, Regions, SIZE_MAX};
use self::open::{Overlay, Session};
use super::{Disk, DiskError, Image};
use crate::model::Extent;
use crate::storage::{AlignedBuf, File};

/// Payload block of new images: small enough for scattered writes, large enough that the table stays small.
const BLOCK_BYTES: u64 = 2 * MIB;
/// The same for images larger than [`LARGE_DISK`].
const LARGE_BLOCK_BYTES: u64 = 32 * MIB;
const LARGE_DISK: u64 = 16 << 40;
/// The file grows by this much at once, so that one sync serves many blocks.
const GROW_BYTES: u64 = 128 * MIB;
const LOG_AT: u64 = MIB;
const LOG_LEN: u64 = MIB;
const BAT_AT: u64 = 2 * MIB;

/// An open VHDX.
pub struct Vhdx<F: File> {
    path: PathBuf,
    file: F,
    metadata: Metadata,
    regions: RefCell<Regions>,
    data_write: Uuid,
    bat: RefCell<Bat>,
    /// Bytes of the file that are allocated, durably, and read as zeroes where no block was placed.
    grown_to: Cell<u64>,
    /// Held while a block is placed, so that two writes to a new block find one place.
    placing: Mutex<()>,
    /// What a log that is not empty changes, for an image that is only read.
    overlay: Option<Overlay>,
    /// Of a differencing disk.
    parent: Option<Box<Image<F>>>,
}

impl<F: File> Vhdx<F> {
    /// Writes an empty image into an empty file. The file identifier goes last: before that the file is no VHDX.
    ///
    /// # Errors
    /// [`DiskError::Size`], [`DiskError::Io`].
    pub async fn create(path: &Path, file: F, size: u64, fixed: bool) -> Result<Self, DiskError> {
        check_size(size)?;
        let block = if size > LARGE_DISK { LARGE_BLOCK_BYTES } else { BLOCK_BYTES };
        let metadata = Metadata {
            block_size: block as u32,
            fixed,
            size,
            size_at: format::METADATA_TABLE_LEN as u64 + 8,
            disk_id: Uuid::new_v4(),
            logical_sector: 512,
            physical_sector: 4096,
            parent: None,
        };
        let bat_len = (Geometry::of(&metadata).entries() * 8).next_multiple_of(MIB);
        let regions = Regions { bat_at: BAT_AT, bat_len, metadata_at: BAT_AT + bat_len, metadata_len: MIB, others: Vec::new() };
        let data_at = regions.metadata_at + MIB;
        let header = Header {
            sequence: 1,
            file_write: Uuid::new_v4(),
            data_write: Uuid::new_v4(),
            log: Uuid::nil(),
            log_len: LOG_LEN as u32,
            log_at: LOG_AT,
        };
        let second = Header { sequence: 2, ..header };
        let vhdx = Self {
            path: path.to_owned(),
            file,
            bat: RefCell::new(Bat::new(Geometry::of(&metadata), data_at)),
            metadata,
            regions: RefCell::new(regions.clone()),
            data_write: header.data_write,
            grown_to: Cell::new(data_at),
            placing: Mutex::new(()),
            overlay: None,
            parent: None,
        };
        let file = &vhdx.file;
        let written = async {
            file.allocate(0, data_at).await?;
            write(file, HEADER_AT[0], &header.encode()).await?;
            write(file, HEADER_AT[1], &second.encode()).await?;
            for at in REGION_AT {
                write(file, at, &regions.encode()).await?;
            }
            write(file, regions.metadata_at, &vhdx.metadata.encode()).await?;
            file.sync_data().await?;
            vhdx.fill_fixed().await?;
            write(file, 0, &format::file_identifier()).await?;
            file.sync_data().await
        };
        written.await.map_err(|source| vhdx.io(source))?;
        Ok(vhdx)
    }

    /// Checks the whole structure, begins a writing session (new write ids in both headers), replays a log that somebody left
    /// and drops what a crash left over.
    ///
    /// # Errors
    /// [`DiskError`]; [`DiskError::Unsupported`] for a differencing disk.
    pub async fn open(path: &Path, file: F) -> Result<Self, DiskError> {
        let (vhdx, session) = Self::load(path, file).await?;
        if vhdx.metadata.parent.is_some() {
            let what = "a differencing disk is read, not written: merge it into its parent first";
            return Err(DiskError::Unsupported { path: path.to_owned(), what });
        }
        let begun = async {
            vhdx.begin_session(session).await?;
            vhdx.fill_fixed().await
        };
        begun.await.map_err(|e| vhdx.io(e))?;
        Ok(Self { overlay: None, ..vhdx })
    }

    /// New write ids in the other header, then in this one: whichever write is torn, the other header is whole. The log is
    /// replayed before it is declared empty, so that a crash in between replays it again. Then the tail that no block uses is
    /// cut, because a crashed session may have left content there.
    async fn begin_session(&self, session: Session) -> io::Result<()> {
        let ids = Header { file_write: Uuid::new_v4(), data_write: Uuid::new_v4(), ..session.header };
        let mut current = session.current;
        let mut sequence = session.header.sequence;
        let mut put = async |header: Header| {
            for _ in 0..2 {
                sequence += 1;
                current = 1 - current;
                write(&self.file, HEADER_AT[current], &Header { sequence, ..header }.encode()).await?;
                self.file.sync_data().await?;
            }
            io::Result::Ok(())
        };
        put(ids).await?;
        if let Some(overlay) = &self.overlay {
            overlay.apply(&self.file).await?;
            self.file.sync_data().await?;
        }
        if !ids.log.is_nil() {
            put(Header { log: Uuid::nil(), ..ids }).await?;
        }
        if let Some((at, bytes)) = session.repair_regions {
            // Over the one that does not count, before the tail that it may refer to is cut.
            write(&self.file, at, &bytes).await?;
            self.file.sync_data().await?;
        }
        self.cut().await
    }

    /// Gives every block of a fixed image its place, durably.
    async fn fill_fixed(&self) -> io::Result<()> {
        let geometry = self.bat.borrow().geometry();
        if !self.metadata.fixed || self.overlay.is_some() {
            return Ok(());
        }
        let missing = |bat: &Bat| (0..geometry.blocks()).filter(|&n| bat.place_of(n).is_none()).count() as u64;
        let count = missing(&self.bat.borrow());
        if count == 0 {
            return Ok(());
        }
        let from = self.bat.borrow().end();
        let to = from + count * geometry.block;
        self.file.allocate(from, to - from).await?;
        self.file.sync_data().await?;
        self.grown_to.set(to.max(self.grown_to.get()));
        for number in 0..geometry.blocks() {
            if self.place_of(number).is_none() {
                let at = self.ready_place().await?;
                self.bat.borrow_mut().assign(number, at);
            }
        }
        self.file.sync_data().await?;
        self.write_table().await
    }

    async fn cut(&self) -> io::Result<()> {
        let used = self.bat.borrow().end().next_multiple_of(MIB);
        self.file.set_len(used)?;
        self.grown_to.set(used);
        self.file.sync_data().await
    }

    pub(super) async fn cut_tail(&self) -> Result<(), DiskError> {
        self.cut().await.map_err(|e| self.io(e))
    }

    /// Makes the disk larger. Every step is one sector that is old or new after a crash; runs alone.
    pub(super) async fn grow_disk(&self, size: u64) -> Result<(), DiskError> {
        check_size(size)?;
        if size < self.size() {
            return Err(DiskError::Size { size, format: "vhdx", why: "a disk cannot shrink: what stood behind its new end would be lost" });
        }
        if self.metadata.size_at / 512 != (self.metadata.size_at + 7) / 512 {
            let what = "the disk's size stands across two sectors, it cannot be changed safely";
            return Err(DiskError::Unsupported { path: self.path.clone(), what });
        }
        self.barrier().await?;
        let larger = Geometry { size, ..self.bat.borrow().geometry() };
        let needed = (larger.entries() * 8).next_multiple_of(MIB);
        if needed > self.regions.borrow().bat_len {
            // Space first: without it nothing has changed, and growing can be tried again.
            self.cut().await.map_err(|e| self.io(e))?;
            self.file.allocate(self.grown_to.get(), needed).await.map_err(|e| self.io(e))?;
            self.move_table(needed).await.map_err(|e| self.poisoned(e))?;
        }
        self.reserve_fixed(larger).await.map_err(|e| self.io(e))?;
        self.set_size(size).await.map_err(|e| self.poisoned(e))
    }

    /// Makes room for the blocks that a fixed image gets when it grows, so that nothing fails for want of space later.
    async fn reserve_fixed(&self, larger: Geometry) -> io::Result<()> {
        let more = larger.blocks() - self.bat.borrow().geometry().blocks();
        if !self.metadata.fixed || more == 0 {
            return Ok(());
        }
        let from = self.bat.borrow().end();
        self.file.allocate(from, more * larger.block).await?;
        self.file.sync_data().await?;
        self.grown_to.set(self.grown_to.get().max(from + more * larger.block));
        Ok(())
    }

    async fn set_size(&self, size: u64) -> io::Result<()> {
        let sector = self.metadata.size_at / 512 * 512;
        let at = self.regions.borrow().metadata_at + sector;
        let mut bytes = self.file.read_at(at, 512).await?;
        bytes[(self.metadata.size_at - sector) as usize..][..8].copy_from_slice(&size.to_le_bytes());
        self.file.write_at(at, bytes.freeze()).await?;
        self.file.sync_data().await?;
        self.bat.borrow_mut().grow(size);
        self.fill_fixed().await
    }

    /// Moves the block table to a longer region at the end of the file, where there is room. The old one is a leak.
    async fn move_table(&self, len: u64) -> io::Result<()> {
        let old = self.regions.borrow().clone();
        let at = self.grown_to.get();
        let mut copied = 0;
        while copied < old.bat_len {
            let piece = self.file.read_at(old.bat_at + copied, MIB as usize).await?;
            self.file.write_at(at + copied, piece.freeze()).await?;
            copied += MIB;
        }
        self.file.sync_data().await?;
        let moved = Regions { bat_at: at, bat_len: len, ..old.clone() };
        let table = self.file.read_at(REGION_AT[0], format::REGION_LEN).await?;
        let table = old.moved(&table, at, len).ok_or_else(|| io::Error::other("the BAT's region cannot be changed within one sector"))?;
        // What changes stands in the first sector. The copy goes first: readers look at it only if the first is damaged.
        for place in REGION_AT.into_iter().rev() {
            write(&self.file, place, &table[..512]).await?;
            self.file.sync_data().await?;
        }
        self.bat.borrow_mut().places().skip_to(at + len);
        self.grown_to.set(at + len);
        *self.regions.borrow_mut() = moved;
        Ok(())
    }

    pub(super) fn size(&self) -> u64 {
        self.bat.borrow().geometry().size
    }

    pub(super) fn sector_sizes(&self) -> (u32, u32) {
        (self.metadata.logical_sector, self.metadata.physical_sector)
    }

    /// The id that children of this image remember.
    pub(super) fn data_write(&self) -> Uuid {
        self.data_write
    }

    /// How to find the parent, if there must be one.
    pub(super) fn locator(&self) -> Option<&format::ParentLocator> {
        self.metadata.parent.as_ref()
    }

    pub(super) fn set_parent(&mut self, parent: Image<F>) {
        self.parent = Some(Box::new(parent));
    }

    pub(super) async fn read(&self, extent: Extent) -> Result<AlignedBuf, DiskError> {
        let parts = self.split(extent);
        if let [(number, within)] = parts[..]
            && self.overlay.is_none()
            && self.parent.is_none()
            && let Some(at) = self.place_of(number)
        {
            return self.file.read_at(at + within.offset, within.len as usize).await.map_err(|e| self.io(e));
        }
        let mut out = AlignedBuf::zeroed(extent.len as usize);
        let mut filled = 0;
        for (number, within) in parts {
            let target = &mut out[filled..filled + within.len as usize];
            let on_disk = Extent::new(extent.offset + filled as u64, within.len);
            filled += within.len as usize;
            let entry = self.bat.borrow().entry(number);
            match entry {
                (state::PRESENT, at) => self.read_here(at + within.offset, target).await?,
                (state::PARTIAL, at) => self.read_partial(number, at, within, target).await?,
                (state::NOT_PRESENT, _) => super::read_parent(self.parent.as_deref(), on_disk, target).await?,
                _ => {}
            }
        }
        Ok(out)
    }

    async fn read_here(&self, at: u64, target: &mut [u8]) -> Result<(), DiskError> {
        let bytes = open::read_through(&self.file, self.overlay.as_ref(), at, target.len()).await.map_err(|e| self.io(e))?;
        target.copy_from_slice(&bytes);
        Ok(())
    }

    /// A block some of whose sectors are in the parent: the bitmap of its chunk has a bit for each, lowest bit first.
    async fn read_partial(&self, number: u64, at: u64, within: Extent, target: &mut [u8]) -> Result<(), DiskError> {
        let geometry = self.bat.borrow().geometry();
        let sector = geometry.sector;
        let first = (number % geometry.ratio() * geometry.block + within.offset) / sector;
        let last = (number % geometry.ratio() * geometry.block + within.end() - 1) / sector;
        // Whole sectors of the bitmap, for direct I/O.
        let (from, to) = (first / 8 / 512 * 512, (last / 8 + 1).next_multiple_of(512));
        let bitmap_at = self.bat.borrow().bitmap_of(number) + from;
        let bitmap = open::read_through(&self.file, self.overlay.as_ref(), bitmap_at, (to - from) as usize).await;
        let bitmap = bitmap.map_err(|e| self.io(e))?;
        let here = |s: u64| bitmap[(s / 8 - from) as usize] & 1 << (s % 8) != 0;
        let mut done = 0u64;
        while done < within.len {
            let bit = first + (within.offset % sector + done) / sector;
            let run = (bit..=last).take_while(|&s| here(s) == here(bit)).count() as u64;
            let len = (run * sector - (within.offset + done) % sector).min(within.len - done);
            let piece = &mut target[done as usize..(done + len) as usize];
            if here(bit) {
                self.read_here(at + within.offset + done, piece).await?;
            } else {
                super::read_parent(self.parent.as_deref(), Extent::new(number * geometry.block + within.offset + done, len), piece).await?;
            }
            done += len;
        }
        Ok(())
    }

    pub(super) async fn write(&self, offset: u64, data: Bytes) -> Result<(), DiskError> {
        let mut writes = Vec::new();
        let mut from = 0;
        for (number, within) in self.split(Extent::new(offset, data.len() as u64)) {
            let at = self.place(number).await.map_err(|e| self.io(e))?;
            let piece = data.slice(from..from + within.len as usize);
            from += within.len as usize;
            writes.push(self.file.write_at(at + within.offset, piece));
        }
        try_join_all(writes).await.map_err(|e| self.io(e))?;
        Ok(())
    }

    pub(super) async fn zero(&self, extent: Extent) -> Result<(), DiskError> {
        let (block, size) = (u64::from(self.metadata.block_size), self.size());
        for (number, within) in self.split(extent) {
            let last = (number + 1) * block >= size;
            let whole = within.offset == 0 && (within.len == block || last && number * block + within.len == size);
            if whole && !self.metadata.fixed {
                self.bat.borrow_mut().clear(number);
            } else if let Some(at) = self.place_of(number) {
                self.file.punch(at + within.offset, within.len).await.map_err(|e| self.io(e))?;
                if self.metadata.fixed {
                    self.file.allocate(at + within.offset, within.len).await.map_err(|e| self.io(e))?;
                }
            }
        }
        Ok(())
    }

    pub(super) async fn barrier(&self) -> Result<(), DiskError> {
        let done = async {
            self.file.sync_data().await?;
            self.write_table().await
        };
        done.await.map_err(|e| self.poisoned(e))
    }

    /// After a write of structures failed, what is on disk is not known: the image takes no more writes.
    fn poisoned(&self, source: io::Error) -> DiskError {
        self.file.close_for_writing();
        self.io(source)
    }

    /// Makes the changed pages of the block table durable. What they refer to is durable already.
    async fn write_table(&self) -> io::Result<()> {
        let pages = self.bat.borrow_mut().take_dirty();
        if !pages.is_empty() {
            let bat_at = self.regions.borrow().bat_at;
            try_join_all(pages.iter().map(|(at, page)| write(&self.file, bat_at + at, page))).await?;
            self.file.sync_data().await?;
        }
        self.bat.borrow_mut().barrier_done();
        Ok(())
    }

    pub(super) fn next_data(&self, offset: u64) -> Result<Option<Extent>, DiskError> {
        let own = self.next_own_data(offset).map_err(|e| self.io(e))?;
        let inherited = match &self.parent {
            Some(parent) if offset < parent.size() => parent.next_data(offset)?,
            _ => None,
        };
        let earliest = [own, inherited].into_iter().flatten().min_by_key(|e| e.offset);
        Ok(earliest.map(|e| Extent::new(e.offset, e.end().min(self.size()) - e.offset)).filter(|e| e.len > 0))
    }

    fn next_own_data(&self, offset: u64) -> io::Result<Option<Extent>> {
        let bat = self.bat.borrow();
        let (block, size) = (u64::from(self.metadata.block_size), bat.geometry().size);
        let mut from = offset;
        while let Some(number) = bat.next_placed(from / block).filter(|n| n * block < size) {
            let start = from.max(number * block);
            let (_, at) = bat.entry(number);
            let data = match self.overlay {
                Some(_) => Some((at + start % block, at + block)),
                None => self.file.next_data(at + start % block)?,
            };
            let Some((first, end)) = data.filter(|&(first, _)| first < at + block) else {
                from = (number + 1) * block;
                continue;
            };
            // Blocks that follow each other in the file too are one piece for whoever copies.
            let mut after = number + 1;
            while end >= at + (after - number) * block && bat.place_of(after) == Some(at + (after - number) * block) {
                after += 1;
            }
            let start = number * block + (first - at);
            let stop = (number * block + (end - at)).min(after * block).min(size);
            return Ok((stop > start).then(|| Extent::new(start, stop - start)));
        }
        Ok(None)
    }

    fn place_of(&self, number: u64) -> Option<u64> {
        self.bat.borrow().place_of(number)
    }

    /// The place of a block's payload, made ready if it had none: allocated, zero, within the durable file length.
    async fn place(&self, number: u64) -> io::Result<u64> {
        if let Some(at) = self.place_of(number) {
            return Ok(at);
        }
        let _alone = self.placing.lock().await;
        if let Some(at) = self.place_of(number) {
            return Ok(at);
        }
        let at = self.ready_place().await?;
        // Only now: a write beside this one must not be cleared with it, a read must not see what stood here before.
        self.bat.borrow_mut().assign(number, at);
        Ok(at)
    }

    async fn ready_place(&self) -> io::Result<u64> {
        let block = u64::from(self.metadata.block_size);
        let step = GROW_BYTES.min(self.size().next_multiple_of(block));
        super::ready_place(&self.file, &self.grown_to, block, step, || RefMut::map(self.bat.borrow_mut(), Bat::places)).await
    }

    /// Cuts an extent at block boundaries: (block, extent within the block).
    fn split(&self, extent: Extent) -> Vec<(u64, Extent)> {
        let block = u64::from(self.metadata.block_size);
        let mut parts = Vec::new();
        let mut at = extent.offset;
        while at < extent.end() {
            let within = at % block;
            let len = (block - within).min(extent.end() - at);
            parts.push((at / block, Extent::new(within, len)));
            at += len;
        }
        parts
    }

    fn io(&self, source: io::Error) -> DiskError {
        DiskError::Io { path: self.path.clone(), source }
    }
}

async fn write<F: File>(file: &F, at: u64, bytes: &[u8]) -> io::Result<()> {
    file.write_at(at, AlignedBuf::copy_of(bytes).freeze()).await
}

fn check_size(size: u64) -> Result<(), DiskError> {
    if size == 0 || size > SIZE_MAX || !size.is_multiple_of(512) {
        return Err(DiskError::Size { size, format: "vhdx", why: "the size must be a positive multiple of 512 up to 64 TiB" });
    }
    Ok(())
}
