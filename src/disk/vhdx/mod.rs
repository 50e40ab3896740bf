//! A dynamic VHDX that opens and checks clean after a crash at any instant, without a repair.
//!
//! Direct mode: the log stays empty. A barrier is: payload durable (sync A), then the changed 4 KiB pages of the block
//! allocation table in place, durable (sync B). If power goes
//! - before A: blocks that are in no table page on disk; a leak, reclaimed by the next open;
//! - between A and B: some of the table's 8-byte entries are new, each refers to payload made durable by A;
//! - while the file grows: the file is longer than what the table refers to; cut at the next open.
//!
//! Strictly the specification wants table changes logged; no reader can see the difference because each entry stands
//! for itself. Images whose log is not empty were written by somebody else and are refused.

pub mod bat;
pub mod format;

use std::cell::{Cell, RefCell};
use std::io;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use futures_util::future::try_join_all;
use tokio::sync::Mutex;
use uuid::Uuid;

use self::bat::Bat;
use self::format::{HEADER_AT, HEADER_LEN, Header, MIB, Metadata, REGION_AT, REGION_LEN, Regions, SIZE_MAX};
use super::DiskError;
use crate::model::{Extent, SECTOR};
use crate::storage::{AlignedBuf, File};

/// Payload block of new images: small enough for scattered writes, large enough that the table stays small.
const BLOCK_BYTES: u64 = 2 * MIB;
/// The file grows by this much at once, so that one sync serves many blocks.
const GROW_BYTES: u64 = 128 * MIB;
const LOG_AT: u64 = MIB;
const LOG_LEN: u64 = MIB;
const BAT_AT: u64 = 2 * MIB;

/// An open dynamic VHDX.
pub struct Vhdx<F> {
    path: PathBuf,
    file: F,
    metadata: Metadata,
    regions: Regions,
    bat: RefCell<Bat>,
    /// Bytes of the file that are allocated, durably, and read as zeroes where no block was placed.
    grown_to: Cell<u64>,
    /// Held while a block is placed, so that two writes to a new block find one place.
    placing: Mutex<()>,
}

impl<F: File> Vhdx<F> {
    /// Writes an empty image into an empty file. The file identifier goes last: before that the file is no VHDX.
    ///
    /// # Errors
    /// [`DiskError::Size`], [`DiskError::Io`].
    pub async fn create(path: &Path, file: F, size: u64) -> Result<Self, DiskError> {
        if size == 0 || size > SIZE_MAX || !size.is_multiple_of(SECTOR) {
            return Err(DiskError::Size { size, format: "vhdx", why: "the size must be a positive multiple of 512 up to 64 TiB" });
        }
        let metadata = Metadata { block_size: BLOCK_BYTES as u32, size, disk_id: Uuid::new_v4(), logical_sector: 512 };
        let (entries, _) = bat::entries_needed(size, BLOCK_BYTES, SECTOR);
        let bat_len = (entries * 8).next_multiple_of(MIB);
        let regions = Regions { bat_at: BAT_AT, bat_len, metadata_at: BAT_AT + bat_len, metadata_len: MIB };
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
        let written = async {
            file.allocate(0, data_at).await?;
            write(&file, HEADER_AT[0], &header.encode()).await?;
            write(&file, HEADER_AT[1], &second.encode()).await?;
            for at in REGION_AT {
                write(&file, at, &regions.encode()).await?;
            }
            write(&file, regions.metadata_at, &metadata.encode()).await?;
            file.sync_data().await?;
            write(&file, 0, &format::file_identifier()).await?;
            file.sync_data().await
        };
        written.await.map_err(|source| DiskError::Io { path: path.to_owned(), source })?;
        Ok(Self {
            path: path.to_owned(),
            file,
            metadata,
            regions,
            bat: RefCell::new(Bat::new(size, BLOCK_BYTES, SECTOR, data_at)),
            grown_to: Cell::new(data_at),
            placing: Mutex::new(()),
        })
    }

    /// Checks the whole structure, begins a writing session (new write ids in both headers) and drops what a crash left over.
    ///
    /// # Errors
    /// [`DiskError`].
    pub async fn open(path: &Path, file: F) -> Result<Self, DiskError> {
        let (vhdx, header) = Self::load(path, file).await?;
        vhdx.begin_session(header).await.map_err(|e| vhdx.io(e))?;
        Ok(vhdx)
    }

    /// Checks the whole structure and changes nothing. Returns the current header and which of the two it is.
    ///
    /// # Errors
    /// [`DiskError`].
    pub async fn load(path: &Path, file: F) -> Result<(Self, (Header, usize)), DiskError> {
        let io = |source| DiskError::Io { path: path.to_owned(), source };
        let corrupt = |offset, what| DiskError::Corrupt { path: path.to_owned(), offset, what };
        let file_len = file.len().map_err(io)?;
        if file_len < 2 * MIB {
            return Err(corrupt(0, "the file is too short for a VHDX"));
        }
        if file.read_at(0, 512).await.map_err(io)?[..8] != *b"vhdxfile" {
            return Err(corrupt(0, "the file does not begin with a VHDX identifier"));
        }
        let header = read_headers(&file).await.map_err(io)?.ok_or_else(|| corrupt(HEADER_AT[0], "neither header is valid"))?;
        if !header.0.log.is_nil() {
            let what = "the log is not empty: open the image once with its own hypervisor or run `qemu-img check -r all` on it";
            return Err(DiskError::Unsupported { path: path.to_owned(), what });
        }
        let regions = read_regions(&file, file_len).await.map_err(io)?.map_err(|what| corrupt(REGION_AT[0], what))?;
        if regions.metadata_len > 64 * MIB {
            return Err(corrupt(regions.metadata_at, "the metadata region is larger than 64 MiB"));
        }
        let region = file.read_at(regions.metadata_at, regions.metadata_len as usize).await.map_err(io)?;
        let metadata = Metadata::decode(&region).map_err(|what| corrupt(regions.metadata_at, what))?;
        if metadata.logical_sector != 512 {
            let what = "logical sectors of 4096 bytes are not written by this version";
            return Err(DiskError::Unsupported { path: path.to_owned(), what });
        }
        let geometry = (metadata.size, u64::from(metadata.block_size), u64::from(metadata.logical_sector));
        let (entries, _) = bat::entries_needed(geometry.0, geometry.1, geometry.2);
        if entries * 8 > regions.bat_len {
            return Err(corrupt(regions.bat_at, "the BAT is too short for the disk"));
        }
        let table = file.read_at(regions.bat_at, (entries as usize * 8).next_multiple_of(4096)).await.map_err(io)?;
        let log = (header.0.log_at, u64::from(header.0.log_len));
        let reserved = [(0, MIB), log, (regions.bat_at, regions.bat_len), (regions.metadata_at, regions.metadata_len)];
        let bat = Bat::load(&table, geometry, file_len, &reserved).map_err(|(what, index)| corrupt(regions.bat_at + index * 8, what))?;
        let vhdx = Self {
            path: path.to_owned(),
            file,
            metadata,
            regions,
            grown_to: Cell::new(bat.end()),
            bat: RefCell::new(bat),
            placing: Mutex::new(()),
        };
        Ok((vhdx, header))
    }

    /// New write ids in the other header, then in this one: whichever write is torn, the other header is whole. Then the
    /// tail that no block uses is cut, because a crashed session may have left content there.
    async fn begin_session(&self, (header, current): (Header, usize)) -> io::Result<()> {
        let next = Header { sequence: header.sequence + 1, file_write: Uuid::new_v4(), data_write: Uuid::new_v4(), ..header };
        write(&self.file, HEADER_AT[1 - current], &next.encode()).await?;
        self.file.sync_data().await?;
        let again = Header { sequence: next.sequence + 1, ..next };
        write(&self.file, HEADER_AT[current], &again.encode()).await?;
        self.file.sync_data().await?;
        self.cut().await
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

    pub(super) fn size(&self) -> u64 {
        self.metadata.size
    }

    pub(super) async fn read(&self, extent: Extent) -> Result<AlignedBuf, DiskError> {
        let parts = self.split(extent);
        if let [(number, within)] = parts[..]
            && let Some(at) = self.place_of(number)
        {
            return self.file.read_at(at + within.offset, within.len as usize).await.map_err(|e| self.io(e));
        }
        let mut out = AlignedBuf::zeroed(extent.len as usize);
        let mut filled = 0;
        for (number, within) in parts {
            let len = within.len as usize;
            if let Some(at) = self.place_of(number) {
                let piece = self.file.read_at(at + within.offset, len).await.map_err(|e| self.io(e))?;
                out[filled..filled + len].copy_from_slice(&piece);
            }
            filled += len;
        }
        Ok(out)
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
        let block = u64::from(self.metadata.block_size);
        for (number, within) in self.split(extent) {
            let last = (number + 1) * block >= self.metadata.size;
            let whole = within.offset == 0 && (within.len == block || last && number * block + within.len == self.metadata.size);
            if whole {
                self.bat.borrow_mut().clear(number);
            } else if let Some(at) = self.place_of(number) {
                self.file.punch(at + within.offset, within.len).await.map_err(|e| self.io(e))?;
            }
        }
        Ok(())
    }

    pub(super) async fn barrier(&self) -> Result<(), DiskError> {
        let done = async {
            self.file.sync_data().await?;
            let pages = self.bat.borrow_mut().take_dirty();
            if pages.is_empty() {
                return Ok(());
            }
            try_join_all(pages.iter().map(|(at, page)| write(&self.file, self.regions.bat_at + at, page))).await?;
            self.file.sync_data().await
        };
        done.await.map_err(|e| self.io(e))?;
        self.bat.borrow_mut().barrier_done();
        Ok(())
    }

    pub(super) fn next_data(&self, offset: u64) -> Option<Extent> {
        let block = u64::from(self.metadata.block_size);
        let bat = self.bat.borrow();
        let first = (offset / block..bat.blocks()).find(|&n| bat.place_of(n).is_some())?;
        let last = (first..bat.blocks()).take_while(|&n| bat.place_of(n).is_some()).last()?;
        let start = offset.max(first * block);
        Some(Extent::new(start, ((last + 1) * block).min(self.metadata.size) - start))
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
        let block = u64::from(self.metadata.block_size);
        let end = self.bat.borrow().end();
        if self.bat.borrow().end() + block > self.grown_to.get() {
            self.grow(end + block).await?;
        }
        let placed = self.bat.borrow_mut().reserve();
        if placed.reused {
            let cleared = async {
                self.file.punch(placed.at, block).await?;
                self.file.allocate(placed.at, block).await
            };
            if let Err(e) = cleared.await {
                self.bat.borrow_mut().give_back(placed.at);
                return Err(e);
            }
        }
        // Only now: a write beside this one must not be cleared with it, a read must not see what stood here before.
        self.bat.borrow_mut().assign(number, placed.at);
        Ok(placed.at)
    }

    /// Grows the file durably before any block beyond the old end is referred to. Falls back to the least growth when
    /// space is short.
    async fn grow(&self, at_least: u64) -> io::Result<()> {
        let from = self.grown_to.get();
        let disk_left = self.metadata.size.next_multiple_of(u64::from(self.metadata.block_size));
        let wanted = (from + GROW_BYTES.min(disk_left)).max(at_least);
        let to = match self.file.allocate(from, wanted - from).await {
            Ok(()) => wanted,
            Err(e) if crate::storage::uring::is_full(&e) && wanted > at_least => {
                self.file.allocate(from, at_least - from).await?;
                at_least
            }
            Err(e) => return Err(e),
        };
        self.file.sync_data().await?;
        self.grown_to.set(to);
        Ok(())
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

/// The valid header with the larger sequence, and which of the two it is.
async fn read_headers<F: File>(file: &F) -> io::Result<Option<(Header, usize)>> {
    let mut found: Option<(Header, usize)> = None;
    for (index, at) in HEADER_AT.into_iter().enumerate() {
        if let Some(header) = Header::decode(&file.read_at(at, HEADER_LEN).await?)
            && found.is_none_or(|(best, _)| header.sequence > best.sequence)
        {
            found = Some((header, index));
        }
    }
    Ok(found)
}

async fn read_regions<F: File>(file: &F, file_len: u64) -> io::Result<Result<Regions, &'static str>> {
    let first = Regions::decode(&file.read_at(REGION_AT[0], REGION_LEN).await?, file_len);
    if first.is_ok() {
        return Ok(first);
    }
    Ok(Regions::decode(&file.read_at(REGION_AT[1], REGION_LEN).await?, file_len))
}
