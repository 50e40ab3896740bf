//! What a log finds at its start: every whole record, past what is damaged or cannot be read.
//!
//! A place that holds no whole record is passed over, page by page, to the next that does: one bad sector, or one bit, costs
//! the record it stands in, and no other, of this disk or of another one. That may also find records of the last group
//! behind one that power loss cut off. Callers put what is found in the order of each stream, and drop what follows a gap.
//!
//! To start without a record is to give it up. So a segment that could not be read is read once more, some time later; so
//! many pages, and so much time, and no more; and only on a disk that still gives back what it gave before. A disk that
//! gives nothing back is not one with bad sectors: the log is not opened then.

use std::cell::Cell;
use std::io;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use super::format::{RECORD_HEADER_LEN, SEGMENT_HEADER_LEN, SegmentHeader, incarnation_of, peek_record, record_is_whole, record_len};
use super::{HEAD_BYTES, Location, Log, LogError, Recovered, Segment};
use crate::clock;
use crate::storage::aligned::ALIGN;
use crate::storage::{AlignedBuf, File, OpenMode, Storage, is_unreadable};

/// Bytes read at once while the next record is looked for.
const SCAN_BYTES: u64 = 1 << 20;
/// Pages of one log that may be given up as unreadable.
const UNREADABLE_PAGES_MAX: u32 = 64;
/// Time that reads of one log may fail for: a drive takes seconds for each.
const UNREADABLE_TIME_MAX: Duration = Duration::from_secs(60);
/// Before what could not be read is read again: a path or a controller may have been away for a moment.
const READ_AGAIN: Duration = Duration::from_millis(200);
const PAGE: u64 = ALIGN as u64;

/// How much of a log could not be read so far.
#[derive(Default)]
pub(super) struct Patience {
    pages: Cell<u32>,
    /// Reads that failed, of one page or of more.
    failed: Cell<u32>,
    time: Cell<Duration>,
    /// The last place that could be read of this segment.
    good: Cell<Option<u64>>,
}

impl Patience {
    /// Reads. `None` if sectors there cannot be read, of which `pages` are counted.
    async fn read<F: File>(&self, file: &F, offset: u64, len: usize, pages: u32) -> io::Result<Option<AlignedBuf>> {
        let began = clock::now();
        match file.read_at(offset, len).await {
            Err(error) if is_unreadable(&error) => {
                self.failed.set(self.failed.get() + 1);
                self.pages.set(self.pages.get() + pages);
                self.time.set(self.time.get() + clock::now().since(began));
                let too_much = self.pages.get() > UNREADABLE_PAGES_MAX || self.time.get() > UNREADABLE_TIME_MAX;
                if too_much { Err(error) } else { Ok(None) }
            }
            Err(error) => Err(error),
            Ok(bytes) => {
                self.good.set(Some(offset));
                Ok(Some(bytes))
            }
        }
    }

    /// Whether the disk lives: it gives back what it gave before.
    async fn confirm<F: File>(&self, file: &F) -> io::Result<()> {
        match self.good.get() {
            Some(offset) => file.read_at(offset, ALIGN).await.map(drop),
            None => Ok(()),
        }
    }
}

/// What a segment file is.
enum Kind {
    /// In use, with this many records.
    Used { incarnation: u64, live: u64 },
    /// Never used: power went while it was made.
    Unused,
    /// Neither its header nor any record is left.
    Beginless,
}

impl<S: Storage> Log<S> {
    /// Finds the records of a segment and takes it into the table. False if nothing of it is left: see [`Log::move_aside`].
    pub(super) async fn recover_segment(
        &self,
        number: u64,
        path: &Path,
        patience: &Patience,
        recovered: &mut Vec<Recovered>,
    ) -> Result<bool, LogError> {
        let io = |source| LogError::Io { path: path.to_owned(), source };
        let file = self.storage.open(path, OpenMode::Write).await.map_err(io)?;
        let len = file.len().map_err(io)?;
        let (found, pages, failed, time) = (recovered.len(), patience.pages.get(), patience.failed.get(), patience.time.get());
        let mut kind = self.read_segment(number, path, &file, len, patience, recovered).await;
        let unreadable = match &kind {
            Ok(_) => patience.failed.get() > failed,
            Err(error) => matches!(error, LogError::Io { source, .. } if is_unreadable(source)),
        };
        if unreadable {
            tracing::warn!(path = %path.display(), "some of a segment cannot be read; it is read once more");
            recovered.truncate(found);
            patience.pages.set(pages);
            patience.failed.set(failed);
            patience.time.set(time);
            tokio::time::sleep(READ_AGAIN).await;
            kind = self.read_segment(number, path, &file, len, patience, recovered).await;
        }
        let kind = kind?;
        if patience.failed.get() > failed {
            patience.confirm(&file).await.map_err(io)?;
            let pages = patience.pages.get() - pages;
            tracing::error!(path = %path.display(), pages, "some of a segment cannot be read: the records there are given up. Look after the disk");
        }
        let (incarnation, live) = match kind {
            Kind::Used { incarnation, live } => (incarnation, live),
            Kind::Beginless => return Ok(false),
            Kind::Unused => {
                drop(file);
                self.storage.remove(path).map_err(io)?;
                return self.storage.sync_dir(&self.dir).map(|()| true).map_err(io);
            }
        };
        let bytes: u64 = recovered[found..].iter().map(|record| record.location.stored_bytes()).sum();
        self.live_bytes.set(self.live_bytes.get() + bytes);
        // One that was made with another configured size is read as it is, and removed instead of recycled when it is released.
        let segment = Segment {
            path: path.to_owned(),
            file,
            incarnation: Cell::new(incarnation),
            header_written: Cell::new(true),
            filled: Cell::new(len),
            live: Cell::new(live),
        };
        self.segments.borrow_mut().insert(number, Rc::new(segment));
        Ok(true)
    }

    /// Segments of which neither the header nor any record is left. What they held is lost to the log; the files are left to whoever
    /// wants to look at them, under names that are not in the way.
    ///
    /// # Errors
    /// [`LogError::Io`] if no other segment could be read: that is not damage but a disk that is away.
    pub(super) fn move_aside(&self, paths: Vec<PathBuf>) -> Result<(), LogError> {
        for path in paths {
            let io = |source| LogError::Io { path: path.clone(), source };
            if self.segments.borrow().is_empty() {
                let why = "no segment of this log can be read: check the disk; to start without what the log held, move its folder away";
                return Err(io(io::Error::other(why)));
            }
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            let aside = path.with_file_name(format!("unreadable-{name}"));
            self.storage.rename(&path, &aside).map_err(io)?;
            self.storage.sync_dir(&self.dir).map_err(io)?;
            tracing::error!(
                path = %aside.display(),
                "a segment is damaged or cannot be read: it is moved aside, and what it held is sent again or compared; look after the disk, then remove the file"
            );
        }
        Ok(())
    }

    async fn read_segment(
        &self,
        number: u64,
        path: &Path,
        file: &S::File,
        len: u64,
        patience: &Patience,
        recovered: &mut Vec<Recovered>,
    ) -> Result<Kind, LogError> {
        let io = |source| LogError::Io { path: path.to_owned(), source };
        patience.good.set(None);
        if len < SEGMENT_HEADER_LEN as u64 {
            return Ok(Kind::Unused);
        }
        let page = patience.read(file, 0, SEGMENT_HEADER_LEN, 1).await.map_err(io)?;
        let incarnation = match page.as_deref().and_then(SegmentHeader::decode) {
            Some(header) if header.log != self.id => {
                return Err(LogError::Foreign { path: path.to_owned(), found: header.log, expected: self.id });
            }
            Some(header) => header.incarnation,
            // Damaged, or cleared by who repaired the sector; or never written, although a record behind it was, when power went. The
            // first whole record says the same. One of an earlier use is no danger: all its records were released, and callers
            // know what they released.
            None => {
                let before = patience.pages.get();
                match self.first_incarnation(file, len, patience).await.map_err(io)? {
                    Some(incarnation) => incarnation,
                    None if patience.pages.get() == before && page.is_some_and(|page| page.iter().all(|&b| b == 0)) => {
                        return Ok(Kind::Unused);
                    }
                    None => return Ok(Kind::Beginless),
                }
            }
        };
        let live = self.scan(number, path, file, incarnation, len, patience, recovered).await.map_err(io)?;
        Ok(Kind::Used { incarnation, live })
    }

    /// The incarnation of the first whole record.
    async fn first_incarnation(&self, file: &S::File, len: u64, patience: &Patience) -> io::Result<Option<u64>> {
        let mut at = SEGMENT_HEADER_LEN as u64;
        loop {
            at = self.next_record(file, at, None, len, patience).await?;
            if at + PAGE > len {
                return Ok(None);
            }
            let incarnation = patience.read(file, at, ALIGN, 1).await?.map_or(0, |page| incarnation_of(&page));
            if self.whole_record(file, at, incarnation, len, patience).await?.is_some() {
                return Ok(Some(incarnation));
            }
            at += PAGE;
        }
    }

    /// Reads a segment through and returns how many records it has.
    #[allow(clippy::too_many_arguments, reason = "what is known of one segment, and the two that are filled in")]
    async fn scan(
        &self,
        number: u64,
        path: &Path,
        file: &S::File,
        incarnation: u64,
        len: u64,
        patience: &Patience,
        recovered: &mut Vec<Recovered>,
    ) -> io::Result<u64> {
        let (mut at, mut live) = (SEGMENT_HEADER_LEN as u64, 0);
        let mut gap = None;
        while at + PAGE <= len {
            let Some(record) = self.whole_record(file, at, incarnation, len, patience).await? else {
                gap = gap.or(Some(at));
                at = self.next_record(file, at + PAGE, Some(incarnation), len, patience).await?;
                continue;
            };
            if let Some(from) = gap.take() {
                tracing::warn!(
                    path = %path.display(), from, to = at,
                    "no whole record stands here, and whole ones follow: damage, or a group that power loss cut off"
                );
            }
            let body_len = record.body_len;
            let location = Location { segment: number, offset: at, body_len: body_len as u32 };
            let head = record.bytes[RECORD_HEADER_LEN..RECORD_HEADER_LEN + body_len.min(HEAD_BYTES)].to_vec();
            recovered.push(Recovered { location, head });
            live += 1;
            at += location.stored_bytes();
        }
        Ok(live)
    }

    /// The record at `at`; `None` if there is no whole one.
    async fn whole_record(&self, file: &S::File, at: u64, incarnation: u64, len: u64, patience: &Patience) -> io::Result<Option<Found>> {
        let Some(first) = patience.read(file, at, ALIGN, 1).await? else { return Ok(None) };
        let Some(body_len) = peek_record(&first, incarnation, self.options.body_bytes_max) else { return Ok(None) };
        let whole = record_len(body_len);
        if at + whole as u64 > len {
            return Ok(None);
        }
        // Its pages are counted when the next record is looked for.
        let Some(bytes) = patience.read(file, at, whole, 0).await? else { return Ok(None) };
        Ok(record_is_whole(&bytes, body_len).then_some(Found { bytes, body_len }))
    }

    /// The first page from `from` on that may begin a record, of this incarnation or of any; the end of the segment if none does.
    async fn next_record(&self, file: &S::File, from: u64, incarnation: Option<u64>, len: u64, patience: &Patience) -> io::Result<u64> {
        let (mut at, mut one_by_one_until) = (from, from);
        while at + PAGE <= len {
            let step = if at < one_by_one_until { PAGE } else { SCAN_BYTES.min(len - at) / PAGE * PAGE };
            let alone = step == PAGE;
            let Some(pages) = patience.read(file, at, step as usize, u32::from(alone)).await? else {
                if alone {
                    at += PAGE;
                } else {
                    one_by_one_until = at + step;
                }
                continue;
            };
            let of = |page: &[u8]| incarnation.unwrap_or_else(|| incarnation_of(page));
            let begins = |page: &[u8]| peek_record(page, of(page), self.options.body_bytes_max).is_some();
            if let Some(index) = pages.chunks(ALIGN).position(begins) {
                return Ok(at + index as u64 * PAGE);
            }
            at += step;
        }
        Ok(len)
    }
}

/// A record that was read.
struct Found {
    bytes: AlignedBuf,
    body_len: usize,
}
