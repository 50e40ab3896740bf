//! What a log finds at its start: every whole record, past what is damaged or cannot be read.
//!
//! A place that holds no whole record is passed over, page by page, to the next that does: one bad sector, or one bit, costs
//! the record it stands in, and no other, of this disk or of another one. That may also find records of the last group
//! behind one that power loss cut off. Callers put what is found in the order of each stream, and drop what follows a gap.
//!
//! Sectors that give EIO are read twice before they count as lost, only so many are, and only on a disk that still gives back
//! what it gave a moment ago: one that gives nothing back is not one with bad sectors, and to start without what it holds
//! would be to give that up.

use std::cell::Cell;
use std::io;
use std::path::Path;
use std::rc::Rc;

use super::format::{RECORD_HEADER_LEN, SEGMENT_HEADER_LEN, SegmentHeader, incarnation_of, peek_record, record_is_whole, record_len};
use super::{HEAD_BYTES, Location, Log, LogError, Recovered, Segment};
use crate::storage::aligned::ALIGN;
use crate::storage::{AlignedBuf, File, OpenMode, Storage, is_unreadable};

/// Bytes read at once while the next record is looked for.
const SCAN_BYTES: u64 = 1 << 20;
/// Pages of one log that may give EIO.
const UNREADABLE_PAGES_MAX: u32 = 256;
const PAGE: u64 = ALIGN as u64;

/// How much of a log could not be read so far.
#[derive(Default)]
pub(super) struct Patience {
    pages: Cell<u32>,
    /// The last page of this segment that could.
    good: Cell<Option<u64>>,
}

impl Patience {
    /// Reads, twice if need be. `None` if sectors there give EIO, of which `pages` are counted.
    async fn read<F: File>(&self, file: &F, offset: u64, len: usize, pages: u32) -> io::Result<Option<AlignedBuf>> {
        let mut read = file.read_at(offset, len).await;
        if read.as_ref().is_err_and(is_unreadable) {
            read = file.read_at(offset, len).await;
        }
        match read {
            Err(error) if is_unreadable(&error) => {
                self.pages.set(self.pages.get() + pages);
                if self.pages.get() > UNREADABLE_PAGES_MAX { Err(error) } else { Ok(None) }
            }
            other => {
                self.good.set(Some(offset));
                other.map(Some)
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

impl<S: Storage> Log<S> {
    /// Finds the records of a segment and takes it into the table.
    pub(super) async fn recover_segment(
        &self,
        number: u64,
        path: &Path,
        patience: &Patience,
        recovered: &mut Vec<Recovered>,
    ) -> Result<(), LogError> {
        let io = |source| LogError::Io { path: path.to_owned(), source };
        let file = self.storage.open(path, OpenMode::Write).await.map_err(io)?;
        let len = file.len().map_err(io)?;
        patience.good.set(None);
        let before = patience.pages.get();
        let mut page = None;
        if len >= SEGMENT_HEADER_LEN as u64 {
            page = patience.read(&file, 0, SEGMENT_HEADER_LEN, 1).await.map_err(io)?;
        }
        let incarnation = match page.as_deref().and_then(SegmentHeader::decode) {
            Some(header) if header.log != self.id => {
                return Err(LogError::Foreign { path: path.to_owned(), found: header.log, expected: self.id });
            }
            Some(header) => header.incarnation,
            // Power went while it was made: nothing was ever written to it.
            None if len < SEGMENT_HEADER_LEN as u64 || page.as_ref().is_some_and(|page| page.iter().all(|&b| b == 0)) => {
                drop(file);
                self.storage.remove(path).map_err(io)?;
                return self.storage.sync_dir(&self.dir).map_err(io);
            }
            // Damaged: a header is one sector, which power loss does not tear. The first record says the same.
            None => match self.first_incarnation(&file, len, patience).await.map_err(io)? {
                Some(incarnation) => incarnation,
                None => return self.move_aside(path).map_err(io),
            },
        };
        // One that was made with another configured size is read as it is, and removed instead of recycled when it is released.
        let live = self.scan(number, path, &file, incarnation, len, patience, recovered).await.map_err(io)?;
        if patience.pages.get() > before {
            patience.confirm(&file).await.map_err(io)?;
        }
        let segment = Segment {
            path: path.to_owned(),
            file,
            incarnation: Cell::new(incarnation),
            header_written: Cell::new(true),
            filled: Cell::new(len),
            live: Cell::new(live),
        };
        self.segments.borrow_mut().insert(number, Rc::new(segment));
        Ok(())
    }

    /// The incarnation that the first record says, if it is whole. One of an earlier use is no danger: all its records were
    /// released, and callers know what they released.
    async fn first_incarnation(&self, file: &S::File, len: u64, patience: &Patience) -> io::Result<Option<u64>> {
        let at = SEGMENT_HEADER_LEN as u64;
        if at + PAGE > len {
            return Ok(None);
        }
        let Some(page) = patience.read(file, at, ALIGN, 0).await? else { return Ok(None) };
        let incarnation = incarnation_of(&page);
        Ok(self.whole_record(file, at, incarnation, len, patience).await?.map(|_| incarnation))
    }

    /// A segment of which neither header nor first record is left: nobody knows which of its records are of its last use. What
    /// it held is lost to the log; the file is left to whoever wants to look at it.
    fn move_aside(&self, path: &Path) -> io::Result<()> {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let aside = path.with_file_name(format!("unreadable-{name}"));
        self.storage.rename(path, &aside)?;
        self.storage.sync_dir(&self.dir)?;
        tracing::error!(
            path = %aside.display(),
            "the beginning of a segment is damaged or cannot be read: it is moved aside, and what it held is sent again or compared; look after the disk, then remove the file"
        );
        Ok(())
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
                at = self.next_record(file, at + PAGE, incarnation, len, patience).await?;
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
            self.live_bytes.set(self.live_bytes.get() + location.stored_bytes());
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

    /// The first page from `from` on that may begin a record; the end of the segment if none does.
    async fn next_record(&self, file: &S::File, from: u64, incarnation: u64, len: u64, patience: &Patience) -> io::Result<u64> {
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
            let begins = |page: &[u8]| peek_record(page, incarnation, self.options.body_bytes_max).is_some();
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
