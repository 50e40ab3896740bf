//! One sparse extent: a monolithicSparse disk that is written, and every kind of sparse extent that is read.
//!
//! A barrier is: grains durable (sync A), then the changed grain tables, both copies, durable (sync B). If power goes
//! - before A: grains that no table refers to; a leak, cut at the next open;
//! - between A and B: some 4-byte entries are new in one copy or both, each refers to a grain made durable by A. The next
//!   open copies the first over the second.

use std::cell::{Cell, RefCell, RefMut};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use futures_util::future::try_join_all;
use tokio::sync::Mutex;

use super::descriptor::{self, Descriptor, ExtentKind, ExtentLine, Kind, NO_PARENT};
use super::format::{DESCRIPTOR_AT, DESCRIPTOR_SECTORS, FLAG_NEWLINE, FLAG_REDUNDANT, GRAIN_SECTORS, Header, SECTOR, decode_grain_marker};
use super::grains::{Grains, layout, layout_at};
use super::survey::{read_up_to, survey_tables};
use crate::disk::{DiskError, ready_place};
use crate::model::Extent;
use crate::storage::{AlignedBuf, File};

/// The file grows by this much at once, so that one sync serves many grains.
const GROW_BYTES: u64 = 128 << 20;
/// Grain tables hold 32-bit numbers of sectors.
const FILE_MAX: u64 = u32::MAX as u64 * SECTOR;
/// So near to [`FILE_MAX`] grains that become zero keep their places: given away, they rest until a barrier, and more places
/// could be needed than there are.
const CROWDED: u64 = 64 << 30;
/// Grains that are looked at as one run by those who look for data.
const RUN_GRAINS: u64 = 1024;

/// An open sparse extent.
pub struct Sparse<F> {
    path: PathBuf,
    file: F,
    header: Cell<Header>,
    grains: RefCell<Grains>,
    grown_to: Cell<u64>,
    /// Held while a grain is placed, so that two writes to a new grain find one place.
    placing: Mutex<()>,
}

/// What [`Sparse::load`] finds besides the extent.
pub struct Loaded<F> {
    /// The extent.
    pub sparse: Sparse<F>,
    /// Its own descriptor, if it has one.
    pub descriptor: Option<Vec<u8>>,
    /// The second copies of grain tables that differ from the first, by number.
    pub stale_copies: Vec<u64>,
    /// Tables or the descriptor stand among the grains.
    scattered: bool,
}

impl<F: File> Sparse<F> {
    /// Writes an empty monolithicSparse disk into an empty file. The header goes last: before that the file is no VMDK.
    ///
    /// # Errors
    /// [`DiskError::Size`], [`DiskError::Io`].
    pub async fn create(path: &Path, file: F, size: u64) -> Result<Self, DiskError> {
        let mut header = Header {
            version: 1,
            flags: FLAG_NEWLINE | FLAG_REDUNDANT,
            capacity: size / SECTOR,
            grain: GRAIN_SECTORS,
            descriptor_at: DESCRIPTOR_AT,
            descriptor_len: DESCRIPTOR_SECTORS,
            rgd_at: 0,
            gd_at: 0,
            overhead: 0,
            unclean: true,
        };
        let (directory, redundant) = layout(&mut header);
        let longest = header.overhead + header.grains() * header.grain;
        if size == 0 || !size.is_multiple_of(SECTOR) || longest > u64::from(u32::MAX) {
            let why = "the size must be a positive multiple of 512 up to about 2 TiB; use vmdk-flat for larger disks";
            return Err(DiskError::Size { size, format: "vmdk", why });
        }
        let text = own_descriptor(path, header.capacity, Kind::MonolithicSparse).encode();
        let mut embedded = text.into_bytes();
        embedded.resize((DESCRIPTOR_SECTORS * SECTOR) as usize, 0);
        let data_at = header.overhead * SECTOR;
        let grains = RefCell::new(Grains::new(header, directory.clone(), redundant.clone()));
        let (grown_to, placing) = (Cell::new(data_at), Mutex::new(()));
        let sparse = Self { path: path.to_owned(), file, header: Cell::new(header), grains, grown_to, placing };
        let file = &sparse.file;
        let written = async {
            file.allocate(0, data_at).await?;
            put(file, DESCRIPTOR_AT * SECTOR, &embedded).await?;
            for (at, tables) in [(header.rgd_at, &redundant), (header.gd_at, &directory)] {
                let mut bytes: Vec<u8> = tables.iter().flat_map(|&t| (t as u32).to_le_bytes()).collect();
                bytes.resize(bytes.len().next_multiple_of(SECTOR as usize), 0);
                put(file, at * SECTOR, &bytes).await?;
            }
            file.sync_data().await?;
            put(file, 0, &header.encode()).await?;
            file.sync_data().await
        };
        written.await.map_err(|e| sparse.io(e))?;
        Ok(sparse)
    }

    /// Checks the whole structure and changes nothing. `both` also reads the second copy of the tables.
    ///
    /// # Errors
    /// [`DiskError`].
    pub async fn load(path: &Path, file: F, both: bool) -> Result<Loaded<F>, DiskError> {
        let found = survey_tables(path, &file, both).await?;
        let file_len = file.len().map_err(|source| DiskError::Io { path: path.to_owned(), source })?;
        let entry_at = |grain| found.entry_at(grain);
        let grains =
            Grains::load(found.header, found.table.clone(), found.directory.clone(), found.redundant.clone(), file_len, found.moved);
        let grains = grains.map_err(|bad| DiskError::Corrupt { path: path.to_owned(), offset: entry_at(bad.grain), what: bad.what })?;
        let grown_to = Cell::new(grains.end());
        let (header, placing) = (Cell::new(found.header), Mutex::new(()));
        let sparse = Self { path: path.to_owned(), file, header, grains: RefCell::new(grains), grown_to, placing };
        let scattered = found.structures_end > found.header.overhead && found.moved.is_none();
        Ok(Loaded { sparse, descriptor: found.descriptor, stale_copies: found.stale_copies, scattered })
    }

    /// Begins a writing session: marks the extent open, gives it a new content id, makes both copies of the tables agree and
    /// cuts the tail that no grain uses.
    ///
    /// # Errors
    /// [`DiskError::Unsupported`] for an extent that others wrote in a way that cannot be written safely.
    pub async fn open(loaded: Loaded<F>) -> Result<Self, DiskError> {
        let sparse = loaded.sparse;
        let unsupported = |what| DiskError::Unsupported { path: sparse.path.clone(), what };
        let header = sparse.header.get();
        if header.compressed() || header.version == 3 {
            return Err(unsupported("stream-optimised and version 3 images are read, not written: convert it to another format"));
        }
        if loaded.scattered {
            return Err(unsupported("tables or the descriptor stand among the grains: convert it with qemu-img first"));
        }
        if !header.redundant() || sparse.grains.borrow().has_gaps() || header.descriptor_at == 0 {
            return Err(unsupported("the image lacks grain tables, their second copy or its descriptor: convert it with qemu-img first"));
        }
        let sector = &loaded.descriptor.as_deref().unwrap_or_default()[..512];
        let changed =
            descriptor::with_cid(sector, new_cid()).ok_or_else(|| unsupported("the descriptor has no CID in its first sector"))?;
        let begun = async {
            put(&sparse.file, 0, &Header { unclean: true, ..header }.encode()).await?;
            sparse.file.sync_data().await?;
            put(&sparse.file, header.descriptor_at * SECTOR, &changed).await?;
            let repairs = sparse.grains.borrow().copies_of(&loaded.stale_copies);
            for (at, bytes) in repairs {
                put(&sparse.file, at, &bytes).await?;
            }
            sparse.cut().await
        };
        begun.await.map_err(|e| sparse.io(e))?;
        Ok(sparse)
    }

    /// Marks the extent closed and gives back space that was reserved ahead.
    pub(super) async fn finish(&self) -> Result<(), DiskError> {
        let done = async {
            self.cut().await?;
            put(&self.file, 0, &Header { unclean: false, ..self.header.get() }.encode()).await?;
            self.file.sync_data().await
        };
        done.await.map_err(|e| self.io(e))
    }

    async fn cut(&self) -> io::Result<()> {
        let end = self.grains.borrow().end();
        self.file.set_len(end)?;
        self.grown_to.set(end);
        self.file.sync_data().await
    }

    /// Makes the disk larger. Tables that do not fit where they are move, with those that they were, behind the last grain; their
    /// old place is used for grains after the next opening. If power goes
    /// - before the header is written: what was written behind the last grain is a leak;
    /// - after it, before the descriptor is: the header counts, the next opening corrects the descriptor.
    pub(super) async fn grow(&self, size: u64) -> Result<(), DiskError> {
        let header = self.header.get();
        let refuse = |why| DiskError::Size { size, format: "vmdk", why };
        if size < self.size() || !size.is_multiple_of(SECTOR) {
            return Err(refuse("a disk cannot shrink, and grows by multiples of 512"));
        }
        let mut larger = Header { capacity: size / SECTOR, unclean: true, ..header };
        self.barrier().await?;
        let area = self.grains.borrow().end() / SECTOR;
        let area = header.overhead + (area - header.overhead).next_multiple_of(header.grain);
        let moves = larger.tables() > header.tables();
        let (directory, redundant, end) =
            if moves { layout_at(&mut larger, area) } else { (self.grains.borrow().directory().to_vec(), Vec::new(), area) };
        if end + larger.grains() * larger.grain > u64::from(u32::MAX) {
            return Err(refuse("a file of this kind holds up to about 2 TiB; use vmdk-flat for larger disks"));
        }
        let said = self.descriptor_of(&larger).await.map_err(|e| self.io(e))?;
        let said = said.ok_or_else(|| refuse("its descriptor has no room for a longer number of sectors"))?;
        let prepared = async {
            self.cut().await?;
            let short = header.capacity % header.grain * SECTOR;
            let last = self.grains.borrow().place_of(header.grains() - 1).filter(|_| short > 0);
            if let Some(last) = last {
                // What lies behind the old end was nobody's and must read as zeroes now.
                self.file.allocate(last, self.grain_bytes()).await?;
                self.file.punch(last + short, self.grain_bytes() - short).await?;
                self.file.allocate(last, self.grain_bytes()).await?;
            }
            if moves {
                self.file.allocate(area * SECTOR, (end - area) * SECTOR).await?;
                for (at, tables) in [(larger.rgd_at, &redundant), (larger.gd_at, &directory)] {
                    let mut bytes: Vec<u8> = tables.iter().flat_map(|&t| (t as u32).to_le_bytes()).collect();
                    bytes.resize(bytes.len().next_multiple_of(SECTOR as usize), 0);
                    put(&self.file, at * SECTOR, &bytes).await?;
                    for number in 0..header.tables() {
                        let page = self.grains.borrow().page(number);
                        if let Some(page) = page {
                            put(&self.file, tables[number as usize] * SECTOR, &page).await?;
                        }
                    }
                }
            }
            self.file.sync_data().await
        };
        // Until here nothing has changed that counts, and growing can be tried again.
        prepared.await.map_err(|e| self.io(e))?;
        let switched = async {
            put(&self.file, 0, &larger.encode()).await?;
            self.file.sync_data().await?;
            put(&self.file, header.descriptor_at * SECTOR, &said).await?;
            self.file.sync_data().await
        };
        switched.await.map_err(|e| self.poisoned(e))?;
        self.header.set(larger);
        let mut grains = self.grains.borrow_mut();
        if moves {
            grains.places().skip_to(end * SECTOR);
            grains.grow(larger, directory, redundant);
            self.grown_to.set(end * SECTOR);
        } else {
            grains.resize(larger);
        }
        Ok(())
    }

    /// The descriptor's first sector, saying the size that `header` says; `None` if there is no room for the number.
    async fn descriptor_of(&self, header: &Header) -> io::Result<Option<Vec<u8>>> {
        let sector = self.file.read_at(header.descriptor_at * SECTOR, SECTOR as usize).await?;
        Ok(descriptor::with_sectors(&sector, header.capacity))
    }

    /// Corrects a descriptor that a crash while the disk grew left behind.
    pub(super) async fn finish_growth(&self) -> Result<(), DiskError> {
        let header = self.header.get();
        let done = async {
            if let Some(said) = self.descriptor_of(&header).await? {
                put(&self.file, header.descriptor_at * SECTOR, &said).await?;
            }
            self.file.sync_data().await
        };
        done.await.map_err(|e| self.poisoned(e))
    }

    /// After a write of structures failed, what is on disk is not known: the extent takes no more writes.
    fn poisoned(&self, source: io::Error) -> DiskError {
        self.file.close_for_writing();
        self.io(source)
    }

    pub(super) fn is_unclean(&self) -> bool {
        self.header.get().unclean
    }

    pub(super) fn size(&self) -> u64 {
        self.header.get().capacity * SECTOR
    }

    /// Reads an extent; what is not here stays as it is in `target`, and is told as extents.
    pub(in crate::disk) async fn read(&self, extent: Extent, target: &mut [u8]) -> Result<Vec<Extent>, DiskError> {
        let mut absent = Vec::new();
        for (run, at) in self.runs(extent, |grain| self.grains.borrow().place_of(grain)) {
            let piece = &mut target[(run.offset - extent.offset) as usize..][..run.len as usize];
            match at {
                Some(at) if self.header.get().compressed() => self.inflate(at, run, piece).await?,
                Some(at) => piece.copy_from_slice(&self.file.read_at(at, run.len as usize).await.map_err(|e| self.io(e))?),
                None if self.grains.borrow().is_zero(run.offset / self.grain_bytes()) => piece.fill(0),
                None => absent.push(run),
            }
        }
        Ok(absent)
    }

    /// A compressed grain: marker, then a zlib stream that unpacks to no more than a grain.
    async fn inflate(&self, at: u64, run: Extent, piece: &mut [u8]) -> Result<(), DiskError> {
        let corrupt = |what| DiskError::Corrupt { path: self.path.clone(), offset: at, what };
        let file_len = self.file.len().map_err(|e| self.io(e))?;
        let grain = run.offset / self.grain_bytes();
        let head = read_up_to(&self.file, at, 512, file_len).await.map_err(|e| self.io(e))?;
        let (sector, len) = decode_grain_marker(&head).ok_or_else(|| corrupt("a grain marker is cut off"))?;
        if sector != grain * self.header.get().grain {
            return Err(corrupt("a grain marker names another grain"));
        }
        if u64::from(len) > 2 * self.grain_bytes() || at + 12 + u64::from(len) > file_len {
            return Err(corrupt("a compressed grain is longer than possible"));
        }
        let packed = read_up_to(&self.file, at, 12 + u64::from(len), file_len).await.map_err(|e| self.io(e))?;
        let mut whole = Vec::new();
        let limit = self.grain_bytes();
        let unpacked = flate2::read::ZlibDecoder::new(&packed[12..12 + len as usize]).take(limit + 1).read_to_end(&mut whole);
        if unpacked.is_err() || whole.len() as u64 > limit {
            return Err(corrupt("a compressed grain does not unpack"));
        }
        whole.resize(limit as usize, 0);
        piece.copy_from_slice(&whole[(run.offset % limit) as usize..][..run.len as usize]);
        Ok(())
    }

    pub(super) async fn write(&self, offset: u64, data: Bytes) -> Result<(), DiskError> {
        let extent = Extent::new(offset, data.len() as u64);
        for grain in extent.offset / self.grain_bytes()..=(extent.end() - 1) / self.grain_bytes() {
            self.place(grain).await.map_err(|e| self.io(e))?;
        }
        let runs = self.runs(extent, |grain| self.grains.borrow().place_of(grain));
        let writes = runs.into_iter().filter_map(|(run, at)| {
            let from = (run.offset - extent.offset) as usize;
            Some(self.file.write_at(at?, data.slice(from..from + run.len as usize)))
        });
        try_join_all(writes).await.map_err(|e| self.io(e))?;
        Ok(())
    }

    pub(super) async fn zero(&self, extent: Extent) -> Result<(), DiskError> {
        let grain_bytes = self.grain_bytes();
        let mut at = extent.offset;
        while at < extent.end() {
            let grain = at / grain_bytes;
            let end = ((grain + 1) * grain_bytes).min(self.size());
            let stop = end.min(extent.end());
            if at == grain * grain_bytes && stop == end && self.grains.borrow().end() + CROWDED < FILE_MAX {
                self.grains.borrow_mut().clear(grain);
            } else {
                let place = self.grains.borrow().place_of(grain);
                if let Some(place) = place {
                    self.file.punch(place + at % grain_bytes, stop - at).await.map_err(|e| self.io(e))?;
                }
            }
            at = stop;
        }
        Ok(())
    }

    pub(super) async fn barrier(&self) -> Result<(), DiskError> {
        let done = async {
            self.file.sync_data().await?;
            let writes = self.grains.borrow_mut().take_dirty();
            if !writes.is_empty() {
                try_join_all(writes.iter().map(|(at, bytes)| put(&self.file, *at, bytes))).await?;
                self.file.sync_data().await?;
            }
            io::Result::Ok(())
        };
        done.await.map_err(|e| self.poisoned(e))?;
        self.grains.borrow_mut().barrier_done();
        Ok(())
    }

    pub(in crate::disk) fn next_data(&self, offset: u64) -> Result<Option<Extent>, DiskError> {
        let grains = self.grains.borrow();
        let grain_bytes = self.grain_bytes();
        let mut from = offset;
        // The last grain may be short: what lies behind the disk's end is in it too.
        while from < self.size()
            && let Some(first) = grains.next_placed(from / grain_bytes)
        {
            let Some(at) = grains.place_of(first) else { return Ok(None) };
            let mut after = first + 1;
            if !self.header.get().compressed() {
                while after - first < RUN_GRAINS && grains.place_of(after) == Some(at + (after - first) * grain_bytes) {
                    after += 1;
                }
            }
            let start = from.max(first * grain_bytes);
            let end = (after * grain_bytes).min(self.size());
            if self.header.get().compressed() {
                return Ok(Some(Extent::new(start, end - start)));
            }
            let place = at + (start - first * grain_bytes);
            match self.file.next_data(place).map_err(|e| self.io(e))? {
                Some((data, stop)) if data < place + (end - start) => {
                    let (start, end) = (start + (data - place), (start + (stop - place)).min(end));
                    return Ok(Some(Extent::new(start, end - start)));
                }
                _ => from = after * grain_bytes,
            }
        }
        Ok(None)
    }

    fn grain_bytes(&self) -> u64 {
        self.header.get().grain * SECTOR
    }

    /// Cuts an extent where what follows on the disk does not follow in the file.
    fn runs(&self, extent: Extent, place: impl Fn(u64) -> Option<u64>) -> Vec<(Extent, Option<u64>)> {
        let grain_bytes = self.grain_bytes();
        let mut runs: Vec<(Extent, Option<u64>)> = Vec::new();
        let mut at = extent.offset;
        while at < extent.end() {
            let len = (grain_bytes - at % grain_bytes).min(extent.end() - at);
            let here = place(at / grain_bytes);
            let here = if self.header.get().compressed() { here } else { here.map(|p| p + at % grain_bytes) };
            match runs.last_mut() {
                Some((run, Some(first))) if !self.header.get().compressed() && here == Some(*first + run.len) => run.len += len,
                _ => runs.push((Extent::new(at, len), here)),
            }
            at += len;
        }
        runs
    }

    /// Gives a grain its place if it has none: allocated, zero, within the durable file length.
    async fn place(&self, grain: u64) -> io::Result<()> {
        if self.grains.borrow().place_of(grain).is_some() {
            return Ok(());
        }
        let _alone = self.placing.lock().await;
        if self.grains.borrow().place_of(grain).is_some() {
            return Ok(());
        }
        if self.grains.borrow().end() + self.grain_bytes() > FILE_MAX {
            return Err(io::Error::other("the file would become longer than a VMDK can be: keep this disk as vmdk-flat or vhdx"));
        }
        let places = || RefMut::map(self.grains.borrow_mut(), Grains::places);
        let at = ready_place(&self.file, &self.grown_to, self.grain_bytes(), GROW_BYTES.min(self.size()), places).await?;
        self.grains.borrow_mut().assign(grain, at);
        Ok(())
    }

    fn io(&self, source: io::Error) -> DiskError {
        DiskError::Io { path: self.path.clone(), source }
    }
}

/// The descriptor of a disk with one extent: the file of the descriptor itself, or its flat neighbour.
pub(super) fn own_descriptor(path: &Path, sectors: u64, kind: Kind) -> Descriptor {
    let (line, file) = match kind {
        Kind::MonolithicFlat | Kind::Vmfs => (ExtentKind::Flat, super::flat_path(path)),
        _ => (ExtentKind::Sparse, path.to_owned()),
    };
    let file = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let extents = vec![ExtentLine { sectors, kind: line, file, offset: 0 }];
    Descriptor { cid: new_cid(), parent_cid: NO_PARENT, kind, parent_hint: None, extents }
}

/// A content id; the two values with a meaning of their own are left out.
pub(super) fn new_cid() -> u32 {
    (crate::storage::log::random_u64() as u32).min(0xffff_fffd)
}

pub(super) async fn put<F: File>(file: &F, at: u64, bytes: &[u8]) -> io::Result<()> {
    file.write_at(at, AlignedBuf::copy_of(bytes).freeze()).await
}
