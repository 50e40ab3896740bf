//! One interval's file: records of old content, and an index when it is closed.
//!
//! First page: 0 magic `TGUNDO\0\2` (the last byte is the version), 8 incarnation u64, 16 epoch u64, 24 sequence u64,
//! 32 offset of the index u64 (0 while open), 40 CRC-32C of bytes 0..40. Runs of records follow from byte 4096, see
//! [`super::record`]. In files of version 1 each record stands at a page; they are read, and gone on with.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;

use super::index::{self, ENTRIES_MAX, Source};
use super::record::{self, Loose, Run, Sealed, pages_of, read_sealed, stored};
use super::window::{WINDOW_BYTES, Window};
use super::{RetainError, Subject};
use crate::checksum;
use crate::crypto::seal::{OpenError, Opener, SealingSession};
use crate::model::{Extent, OverlayMap, Piece, Position, SECTOR};
use crate::sabotage;
use crate::storage::log::format::{RECORD_HEADER_LEN, finish_record, peek_record, record_is_whole, record_len, span_of};
use crate::storage::log::random_u64;
use crate::storage::{AlignedBuf, File, OpenMode, Storage};
use crate::wire::batch::{BATCH_BYTES_MAX, parse_entries};

const MAGIC: [u8; 8] = *b"TGUNDO\0\x02";
/// What files begin with whose records stand at pages.
const MAGIC_PAGES: [u8; 8] = *b"TGUNDO\0\x01";
const FIRST_RECORD: u64 = 4096;
/// Space is reserved in steps of this.
const RESERVE_BYTES: u64 = 8 << 20;

/// Name of the file of the interval that begins at `start`.
pub(super) fn file_name(start: Position) -> String {
    format!("undo-{:016x}-{:016x}.tgu", start.epoch, start.sequence)
}

/// The begin that a file name says.
pub(super) fn parse_name(name: &str) -> Option<Position> {
    let (epoch, sequence) = name.strip_prefix("undo-")?.strip_suffix(".tgu")?.split_once('-')?;
    let hex = |text: &str| (text.len() == 16).then(|| u64::from_str_radix(text, 16).ok()).flatten();
    Some(Position::new(hex(epoch)?, hex(sequence)?))
}

/// What an interval has, and where in its file.
pub(super) struct Entries {
    /// Names the file's content.
    pub(super) incarnation: u64,
    /// In order of offset, without overlaps.
    pub(super) list: Vec<(Extent, Source)>,
}

/// An interval's file.
pub(super) struct Interval<F> {
    start: Position,
    path: PathBuf,
    file: F,
    incarnation: u64,
    end: Cell<u64>,
    reserved: Cell<u64>,
    records: Cell<u64>,
    index: RefCell<OverlayMap<Source>>,
    pending: RefCell<Vec<(Extent, Source)>>,
    published: RefCell<Vec<Extent>>,
    /// The header is gone.
    headless: Cell<bool>,
    /// The header says an older version.
    outdated: Cell<bool>,
    /// A record whose extents nobody knows any more: where it stood.
    lost: Cell<Option<u64>>,
}

impl<F: File> Interval<F> {
    /// Makes the file, durably.
    pub(super) async fn create<S: Storage<File = F>>(storage: &S, dir: &Path, start: Position) -> Result<Self, RetainError> {
        Self::create_at(storage, dir, &dir.join(file_name(start)), start).await
    }

    /// Makes the file under another name in `dir`, durably.
    pub(super) async fn create_at<S: Storage<File = F>>(
        storage: &S,
        dir: &Path,
        path: &Path,
        start: Position,
    ) -> Result<Self, RetainError> {
        let path = path.to_owned();
        // A file that stands there already is not ours to remove.
        let file = storage.open(&path, OpenMode::Create).await.map_err(|source| RetainError::Io { path: path.clone(), source })?;
        let made = async {
            let interval = Self::new(start, path.clone(), file, random_u64(), FIRST_RECORD);
            interval.file.allocate(0, RESERVE_BYTES).await?;
            interval.reserved.set(RESERVE_BYTES);
            interval.write_header(0).await?;
            interval.file.sync_data().await?;
            storage.sync_dir(dir)?;
            Ok(interval)
        };
        made.await.map_err(|source| {
            // A partly made file would be in the way of the next attempt; it holds nothing.
            let _ = storage.remove(&path);
            RetainError::Io { path: path.clone(), source }
        })
    }

    /// Opens a file to go on with it after a restart: its records are read, an index is cut off. Everything before `durable`
    /// was durable once: what is not whole there was damaged, and what follows it still counts.
    pub(super) async fn reopen<S: Storage<File = F>>(
        storage: &S,
        dir: &Path,
        start: Position,
        opener: &Opener,
        durable: u64,
    ) -> Result<Self, RetainError> {
        let (interval, index_at) = Self::open(storage, dir, start, OpenMode::Write).await?;
        if index_at == 0 || !interval.read_index(index_at).await {
            interval.pending.borrow_mut().clear();
            let len = interval.file.len().map_err(|e| interval.io(e))?;
            interval.scan(opener, durable.max(index_at.min(len))).await?;
            interval.cut_torn_run();
        }
        // Before a record of this version follows those of another, too.
        if index_at != 0 || interval.outdated.get() {
            let opened = async {
                interval.write_header(0).await?;
                interval.file.sync_data().await
            };
            opened.await.map_err(|e| interval.io(e))?;
        }
        interval.publish();
        Ok(interval)
    }

    /// Opens a file to read it: by its index, or by its records if it has none.
    pub(super) async fn load<S: Storage<File = F>>(
        storage: &S,
        dir: &Path,
        start: Position,
        opener: &Opener,
        durable: bool,
    ) -> Result<Self, RetainError> {
        let (interval, index_at) = Self::open(storage, dir, start, OpenMode::Read).await?;
        interval.find_records(index_at, opener, durable).await?;
        interval.publish();
        Ok(interval)
    }

    /// What a closed file has. As [`Interval::load`], but without a map of it.
    pub(super) async fn load_entries<S: Storage<File = F>>(
        storage: &S,
        dir: &Path,
        start: Position,
        opener: &Opener,
    ) -> Result<Entries, RetainError> {
        let (interval, index_at) = Self::open(storage, dir, start, OpenMode::Read).await?;
        if interval.find_records(index_at, opener, true).await? {
            return Ok(Entries { incarnation: interval.incarnation, list: interval.pending.take() });
        }
        interval.publish();
        Ok(interval.entries())
    }

    /// True if the file has an index.
    async fn find_records(&self, index_at: u64, opener: &Opener, durable: bool) -> Result<bool, RetainError> {
        if index_at != 0 && self.read_index(index_at).await {
            return Ok(true);
        }
        self.pending.borrow_mut().clear();
        self.scan(opener, 0).await?;
        if !durable {
            // As whoever goes on with the file does: other records will stand there then.
            self.cut_torn_run();
        }
        // A closed file has a header, and its records reach to its index.
        if (durable && self.headless.get()) || (index_at != 0 && self.end.get() < index_at) {
            return Err(self.damaged_at(self.end.get()));
        }
        if durable {
            self.check_tail().await?;
        }
        Ok(false)
    }

    /// After the last whole record of a closed file its index follows, or nothing: else one in between was damaged.
    async fn check_tail(&self) -> Result<(), RetainError> {
        let len = self.file.len().map_err(|e| self.io(e))? / FIRST_RECORD * FIRST_RECORD;
        let (mut at, mut first) = (self.end.get(), true);
        while at + SECTOR <= len {
            let pages = pages_of(at, (len - at).min(WINDOW_BYTES));
            let bytes = self.file.read_at(pages.start, (pages.end - pages.start) as usize).await.map_err(|e| self.io(e))?;
            for sector in bytes[(at - pages.start) as usize..].chunks(SECTOR as usize) {
                if peek_record(sector, self.incarnation, BATCH_BYTES_MAX).is_some() {
                    let index = first && sector[RECORD_HEADER_LEN..].starts_with(&index::MAGIC);
                    return if index { Ok(()) } else { Err(self.damaged_at(self.end.get())) };
                }
                first = false;
            }
            at = pages.end;
        }
        Ok(())
    }

    /// Length of a file, for accounting.
    pub(super) async fn file_len<S: Storage<File = F>>(storage: &S, path: &Path) -> Result<u64, RetainError> {
        let io = |source| RetainError::Io { path: path.to_owned(), source };
        storage.open(path, OpenMode::Read).await.map_err(io)?.len().map_err(io)
    }

    fn new(start: Position, path: PathBuf, file: F, incarnation: u64, end: u64) -> Self {
        Self {
            start,
            path,
            file,
            incarnation,
            end: Cell::new(end),
            reserved: Cell::new(0),
            records: Cell::new(0),
            index: RefCell::default(),
            pending: RefCell::default(),
            published: RefCell::default(),
            headless: Cell::new(false),
            outdated: Cell::new(false),
            lost: Cell::new(None),
        }
    }

    async fn open<S: Storage<File = F>>(storage: &S, dir: &Path, start: Position, mode: OpenMode) -> Result<(Self, u64), RetainError> {
        let path = dir.join(file_name(start));
        let io = |source| RetainError::Io { path: path.clone(), source };
        let file = storage.open(&path, mode).await.map_err(io)?;
        let len = file.len().map_err(io)?;
        let page = if len >= FIRST_RECORD {
            file.read_at(0, FIRST_RECORD as usize).await.map_err(io)?
        } else {
            AlignedBuf::zeroed(FIRST_RECORD as usize)
        };
        let u64_at = |at: usize| u64::from_le_bytes(*page[at..].first_chunk().expect("the page is longer than the header"));
        let passes = checksum::crc32c(&page[..40]).to_le_bytes() == page[40..44];
        let whole = passes && (page[..8] == MAGIC || page[..8] == MAGIC_PAGES);
        if passes && !whole && page[..7] == MAGIC[..7] {
            return Err(RetainError::Version { path, version: page[7] });
        }
        if !whole && let Some(incarnation) = first_incarnation(&file, len).await.map_err(io)? {
            // The header was damaged; the records say the same.
            let interval = Self::new(start, path, file, incarnation, FIRST_RECORD);
            interval.reserved.set(len);
            if mode == OpenMode::Write {
                interval.write_header(0).await.map_err(|e| interval.io(e))?;
            }
            return Ok((interval, 0));
        }
        if !whole && page.iter().any(|&b| b != 0) && len > FIRST_RECORD && mode == OpenMode::Read {
            return Err(RetainError::Damaged { path, offset: 0, source: OpenError::Body });
        }
        if !whole {
            // Power went before the file was durable, so nothing in it was needed: an empty interval.
            let interval = Self::new(start, path, file, random_u64(), FIRST_RECORD);
            interval.headless.set(true);
            if mode == OpenMode::Write {
                interval.write_header(0).await.map_err(|e| interval.io(e))?;
            }
            return Ok((interval, 0));
        }
        let interval = Self::new(start, path, file, u64_at(8), FIRST_RECORD);
        interval.reserved.set(len);
        interval.outdated.set(page[..8] == MAGIC_PAGES);
        Ok((interval, u64_at(32)))
    }

    /// Reads every record and takes its table; stops at the first that is not whole, or at an index. Before `durable` what
    /// is not whole is passed over and noted: nobody knows any more which extents it had.
    async fn scan(&self, opener: &Opener, durable: u64) -> Result<(), RetainError> {
        let len = self.file.len().map_err(|e| self.io(e))?;
        let (mut at, mut window) = (FIRST_RECORD, Window::new());
        while at + SECTOR <= len.max(durable) {
            let found = self.read_record(at, len, &mut window).await?;
            let entries = match &found {
                Some((body, _)) if body.starts_with(&index::MAGIC) => break,
                Some((body, _)) => self.open_entries(at, body, opener),
                None => Err(self.damaged_at(at)),
            };
            match (entries, found) {
                (Ok(entries), Some((body, span))) => {
                    for (extent, data_at) in entries {
                        let source = Source { record_at: at, body_len: body.len() as u32, data_at };
                        self.pending.borrow_mut().push((extent, source));
                    }
                    self.records.set(self.records.get() + 1);
                    at += span;
                }
                (_, _) if at < durable => {
                    self.lost.set(self.lost.get().or(Some(at)));
                    at += SECTOR;
                    while at < durable && self.read_record(at, len, &mut window).await?.is_none() {
                        at += SECTOR;
                    }
                }
                // Not whole: what a crash cut off. Whole and not ours: damage.
                (Err(error), Some(_)) => return Err(error),
                _ => break,
            }
        }
        self.end.set(at);
        Ok(())
    }

    /// Appends go to a new page. Where a crash cut off a run it was not synced, so nothing of it was overwritten in the replica, and
    /// what is whole of it goes, too. Not covered: a run that was synced, not noted before the power went, and then rots.
    fn cut_torn_run(&self) {
        let mut pending = self.pending.borrow_mut();
        while !self.end.get().is_multiple_of(FIRST_RECORD) {
            let last = pending.last().map_or(FIRST_RECORD, |(_, source)| source.record_at);
            while pending.pop_if(|(_, source)| source.record_at == last).is_some() {}
            self.end.set(last);
        }
    }

    fn open_entries(&self, at: u64, record: &[u8], opener: &Opener) -> Result<Vec<(Extent, Option<u32>)>, RetainError> {
        let damaged = |source| RetainError::Damaged { path: self.path.clone(), offset: at, source };
        let (header, body) = opener.open(record).map_err(damaged)?;
        let entries = parse_entries(&header, &body).map_err(|e| damaged(e.into()))?;
        Ok(entries.into_iter().map(|e| (e.extent, e.data_at)).collect())
    }

    async fn read_index(&self, index_at: u64) -> bool {
        let Ok(len) = self.file.len() else { return false };
        let (mut at, mut read, mut window) = (index_at, 0, Window::new());
        loop {
            let Ok(Some((body, span))) = self.read_record(at, len, &mut window).await else { return false };
            let Some((entries, total)) = index::decode(&body) else { return false };
            let sectors = |e: &Extent| e.offset.is_multiple_of(SECTOR) && e.len.is_multiple_of(SECTOR);
            if !entries.iter().all(|(extent, _)| sectors(extent)) {
                return false;
            }
            read += entries.len() as u64;
            self.pending.borrow_mut().extend(entries);
            if read >= total {
                self.end.set(index_at);
                return read == total;
            }
            at += span;
        }
    }

    /// The body of the record at `at` and the bytes from there to the next; `None` if there is no whole one.
    async fn read_record(&self, at: u64, file_len: u64, window: &mut Window) -> Result<Option<(AlignedBuf, u64)>, RetainError> {
        let Some(first) = window.look(&self.file, at, SECTOR, file_len).await.map_err(|e| self.io(e))? else { return Ok(None) };
        let Some(body_len) = peek_record(first, self.incarnation, BATCH_BYTES_MAX) else { return Ok(None) };
        let Some(record) = window.look(&self.file, at, stored(body_len), file_len).await.map_err(|e| self.io(e))? else { return Ok(None) };
        let body = || AlignedBuf::copy_of(&record[RECORD_HEADER_LEN..RECORD_HEADER_LEN + body_len]);
        Ok(record_is_whole(record, body_len).then(|| (body(), span_of(record, body_len) as u64)))
    }

    /// Appends a run of records. Durable after [`Interval::sync`].
    pub(super) async fn append(&self, subject: &Subject, session: &Arc<SealingSession>, records: Vec<Loose>) -> Result<(), RetainError> {
        let first = self.next_records(records.len() as u64);
        let run = self.seal(subject, session, records, first).await;
        self.place(run).await
    }

    /// The number of the first of the next `count` records.
    pub(super) fn next_records(&self, count: u64) -> u64 {
        self.records.set(self.records.get() + count);
        self.records.get() - count + 1
    }

    /// Seals records for this file, numbered from `first`.
    pub(super) async fn seal(&self, subject: &Subject, session: &Arc<SealingSession>, records: Vec<Loose>, first: u64) -> Run {
        record::seal(subject, session, self.incarnation, records, first).await
    }

    /// Gives sealed records their places behind those before them; the answer writes them there, at once.
    pub(super) fn place(&self, run: Run) -> impl Future<Output = Result<(), RetainError>> {
        let start = self.end.get();
        debug_assert!(start.is_multiple_of(FIRST_RECORD), "a run begins at a page, or what is durable there is written again");
        for record in &run.records {
            let mut data_at = 0;
            for (extent, hole) in &record.parts {
                let source = Source { record_at: start + record.at, body_len: record.body_len, data_at: (!hole).then_some(data_at) };
                if !hole {
                    data_at += extent.len as u32;
                }
                self.pending.borrow_mut().push((*extent, source));
            }
        }
        let end = start + run.bytes.len() as u64;
        self.end.set(end);
        async move {
            let written = async {
                self.reserve_to(end).await?;
                self.file.write_at(start, run.bytes.freeze()).await
            };
            written.await.map_err(|e| self.io(e))
        }
    }

    /// Takes back what was appended and is not published. What was written of it is true, if it is found after a crash.
    pub(super) fn take_back(&self) {
        let first = self.pending.borrow_mut().drain(..).map(|(_, source)| source.record_at).min();
        if let Some(first) = first {
            self.end.set(first);
        }
    }

    /// Lets what others asked of this thread begin.
    pub(super) async fn breathe(&self) {
        self.file.breathe().await;
    }

    /// Makes sure that `bytes` more fit.
    pub(super) async fn reserve(&self, bytes: u64) -> Result<(), RetainError> {
        self.reserve_to(self.end.get() + bytes).await.map_err(|e| self.io(e))
    }

    async fn reserve_to(&self, end: u64) -> io::Result<()> {
        let reserved = self.reserved.get();
        if end > reserved {
            let upto = end.max(reserved + RESERVE_BYTES);
            self.file.allocate(reserved, upto - reserved).await?;
            self.reserved.set(self.reserved.get().max(upto));
        }
        Ok(())
    }

    async fn write_record(&self, at: u64, mut record: AlignedBuf) -> io::Result<()> {
        finish_record(&mut record, self.incarnation);
        record.pad_to(record.len().next_multiple_of(4096));
        self.reserve_to(at + record.len() as u64).await?;
        self.file.write_at(at, record.freeze()).await
    }

    /// Makes what was appended durable.
    pub(super) async fn sync(&self) -> Result<(), RetainError> {
        if sabotage::is("skip-undo-sync") {
            return Ok(());
        }
        self.file.sync_data().await.map_err(|e| self.io(e))
    }

    /// Shows what was appended to readers.
    pub(super) fn publish(&self) {
        let (mut index, mut published) = (self.index.borrow_mut(), self.published.borrow_mut());
        for (extent, source) in self.pending.borrow_mut().drain(..) {
            // The first attempt's content counts.
            index.insert_below(extent, source);
            published.push(extent);
        }
    }

    /// What was shown since the last call.
    pub(super) fn take_published(&self) -> Vec<Extent> {
        std::mem::take(&mut *self.published.borrow_mut())
    }

    /// Writes the index and gives back reserved space. The interval can still be read.
    pub(super) async fn close(&self) -> Result<(), RetainError> {
        let entries = self.entries().list;
        let data_end = self.end.get();
        let closed = async {
            for chunk in entries.chunks(ENTRIES_MAX) {
                let body = index::encode(chunk, entries.len() as u64);
                let mut record = AlignedBuf::with_capacity(RECORD_HEADER_LEN + body.len() + 4096);
                record.pad_to(RECORD_HEADER_LEN);
                record.extend(&body);
                let at = self.end.get();
                self.end.set(at + record_len(body.len()) as u64);
                self.write_record(at, record).await?;
            }
            self.file.set_len(self.end.get())?;
            self.file.sync_data().await?;
            if entries.is_empty() {
                return Ok(());
            }
            self.write_header(data_end).await?;
            self.file.sync_data().await
        };
        let result = closed.await.map_err(|e| self.io(e));
        let bytes = self.end.get();
        self.end.set(data_end);
        self.reserved.set(bytes);
        result
    }

    async fn write_header(&self, index_at: u64) -> io::Result<()> {
        let mut page = AlignedBuf::with_capacity(FIRST_RECORD as usize);
        page.extend(&MAGIC);
        for field in [self.incarnation, self.start.epoch, self.start.sequence, index_at] {
            page.extend(&field.to_le_bytes());
        }
        let crc = checksum::crc32c(&page);
        page.extend(&crc.to_le_bytes());
        page.pad_to(FIRST_RECORD as usize);
        self.file.write_at(0, page.freeze()).await
    }

    /// Begin of the interval.
    pub(super) fn start(&self) -> Position {
        self.start
    }

    /// Bytes of the file.
    pub(super) fn bytes(&self) -> u64 {
        self.end.get().max(self.reserved.get())
    }

    /// Every extent it has.
    pub(super) fn extents(&self) -> Vec<Extent> {
        self.index.borrow().iter().map(|p| p.extent).collect()
    }

    /// Everything it has.
    pub(super) fn entries(&self) -> Entries {
        Entries { incarnation: self.incarnation, list: self.index.borrow().iter().map(|p| (p.extent, skip(p))).collect() }
    }

    /// Every record that holds content, with the extents whose content it is. A record of zeroes only is not read by anybody.
    pub(super) fn records(&self) -> Vec<(Source, Vec<(Extent, u32)>)> {
        let mut records: BTreeMap<u64, (Source, Vec<(Extent, u32)>)> = BTreeMap::new();
        for (extent, source) in self.entries().list {
            if let Some(at) = source.data_at {
                records.entry(source.record_at).or_insert_with(|| (source, Vec::new())).1.push((extent, at));
            }
        }
        records.into_values().collect()
    }

    /// Where a record stood whose extents nobody knows any more.
    pub(super) fn lost(&self) -> Option<RetainError> {
        self.lost.get().map(|at| self.damaged_at(at))
    }

    /// Everything before this byte is durable once [`Interval::sync`] has returned.
    pub(super) fn end(&self) -> u64 {
        self.end.get()
    }

    /// What it has of `extent`.
    pub(super) fn lookup(&self, extent: Extent) -> Vec<(Extent, Source)> {
        self.index.borrow().overlapping(extent).into_iter().map(|p| (p.extent, skip(p))).collect()
    }

    /// The first extent it has at or after `offset`.
    pub(super) fn next_from(&self, offset: u64) -> Option<Extent> {
        self.index.borrow().next_from(offset)
    }

    /// A record does not hold what the index says.
    pub(super) fn damaged(&self, source: Source, error: OpenError) -> RetainError {
        RetainError::Damaged { path: self.path.clone(), offset: source.record_at, source: error }
    }

    fn damaged_at(&self, offset: u64) -> RetainError {
        RetainError::Damaged { path: self.path.clone(), offset, source: OpenError::Body }
    }

    /// Names the file's content.
    pub(super) fn incarnation(&self) -> u64 {
        self.incarnation
    }

    /// A record.
    pub(super) async fn read_sealed(&self, source: Source) -> Result<Sealed, RetainError> {
        read_sealed(&self.file, &self.path, self.incarnation, source.into()).await
    }

    /// The opened body of a record that is whole, frame and all.
    pub(super) async fn read(&self, source: Source, opener: &Opener) -> Result<Bytes, RetainError> {
        let sealed = self.read_sealed(source).await?;
        let body = if sealed.is_whole() { sealed.open(opener) } else { Err(OpenError::Body) };
        body.map_err(|error| self.damaged(source, error))
    }

    fn io(&self, source: io::Error) -> RetainError {
        RetainError::Io { path: self.path.clone(), source }
    }
}

/// The incarnation that the first record says, if it is whole.
async fn first_incarnation<F: File>(file: &F, len: u64) -> io::Result<Option<u64>> {
    if len < 2 * FIRST_RECORD {
        return Ok(None);
    }
    let page = file.read_at(FIRST_RECORD, FIRST_RECORD as usize).await?;
    let incarnation = u64::from_le_bytes(*page[8..].first_chunk().expect("the page is longer than a record's header"));
    let Some(body_len) = peek_record(&page, incarnation, BATCH_BYTES_MAX) else { return Ok(None) };
    let whole = record_len(body_len);
    if FIRST_RECORD + whole as u64 > len {
        return Ok(None);
    }
    let record = file.read_at(FIRST_RECORD, whole).await?;
    Ok(record_is_whole(&record, body_len).then_some(incarnation))
}

/// The source of a piece that begins somewhere inside what was inserted.
fn skip(piece: Piece<Source>) -> Source {
    Source { data_at: piece.source.data_at.map(|at| at + piece.skip as u32), ..piece.source }
}
