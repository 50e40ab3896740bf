//! Records of old content: sealed when they are made, opened when they are read.
//!
//! Those of a run stand close, each at a sector; a run begins and ends at a page, so that no page is ever written twice. Each record
//! says where the next begins.

use std::cell::RefCell;
use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;

use super::atlas::Spot;
use super::parts::{Part, data_of};
use super::{RetainError, Subject};
use crate::crypto::seal::{OpenError, Opener, Packer, SealingSession};
use crate::model::SECTOR;
use crate::storage::log::format::{RECORD_HEADER_LEN, finish_close_record, peek_record, record_is_whole};
use crate::storage::{ALIGN, AlignedBuf, File};
use crate::wire::batch::{BATCH_BYTES_MAX, BatchHeader, ENTRY_LEN, HEADER_LEN, TAG_LEN, push_entry};

/// A record to be sealed: its parts, which are holes or not, and the content of those that are not, in order.
pub(super) struct Loose {
    pub(super) parts: Vec<Part>,
    pub(super) content: Vec<AlignedBuf>,
}

/// Records one behind the other, as they stand in the file.
pub(super) struct Run {
    pub(super) bytes: AlignedBuf,
    pub(super) records: Vec<Placed>,
}

/// A record of a run.
pub(super) struct Placed {
    pub(super) parts: Vec<Part>,
    /// Where it begins in the run.
    pub(super) at: u64,
    pub(super) body_len: u32,
}

/// Seals records, numbered from `first`, away from the I/O thread.
pub(super) async fn seal(subject: &Subject, session: &Arc<SealingSession>, incarnation: u64, records: Vec<Loose>, first: u64) -> Run {
    let (disk, generation, session) = (subject.disk, subject.generation, session.clone());
    let work = move || {
        thread_local! {
            static PACKER: RefCell<Packer> = RefCell::default();
        }
        let room = records.iter().map(|record| stored_at_most(&record.parts) as usize).sum::<usize>().next_multiple_of(ALIGN);
        let mut run = Run { bytes: AlignedBuf::with_capacity(room), records: Vec::with_capacity(records.len()) };
        let last = records.len().saturating_sub(1);
        for (index, (record, number)) in records.into_iter().zip(first..).enumerate() {
            let data_len = record.content.iter().map(|content| content.len()).sum::<usize>();
            let mut body = Vec::with_capacity(data_len + record.parts.len() * ENTRY_LEN);
            record.content.iter().for_each(|content| body.extend_from_slice(content));
            record.parts.iter().for_each(|(extent, hole)| push_entry(&mut body, *extent, *hole));
            let extents = record.parts.len() as u32;
            let numbered = BatchHeader { first: number, last: number, ..BatchHeader::new(disk, generation) };
            let mut header = BatchHeader { data_len: data_len as u32, extents, ..numbered };
            let at = run.bytes.len();
            PACKER.with(|packer| session.seal_behind(&mut header, &body, &mut packer.borrow_mut(), &mut run.bytes));
            let body_len = (run.bytes.len() - at - RECORD_HEADER_LEN) as u32;
            let step = if index == last { ALIGN } else { SECTOR as usize };
            let next = run.bytes.len().next_multiple_of(step);
            finish_close_record(&mut run.bytes[at..], incarnation, next - at);
            run.bytes.pad_to(next);
            run.records.push(Placed { parts: record.parts, at: at as u64, body_len });
        }
        run
    };
    tokio::task::spawn_blocking(work).await.expect("sealing does not panic and the runtime outlives this task")
}

/// Bytes a record with this body takes in its file.
pub(super) fn stored(body_len: usize) -> u64 {
    (RECORD_HEADER_LEN + body_len).next_multiple_of(SECTOR as usize) as u64
}

/// Most bytes that a record of these parts takes in the file, beside what fills the last page of its run.
pub(super) fn stored_at_most(parts: &[Part]) -> u64 {
    stored(HEADER_LEN + data_of(parts) as usize + parts.len() * ENTRY_LEN + TAG_LEN)
}

/// Most bytes that a run of records of these parts takes.
pub(super) fn run_at_most(records: &[Vec<Part>]) -> u64 {
    records.iter().map(|parts| stored_at_most(parts)).sum::<u64>().next_multiple_of(ALIGN as u64)
}

/// A record as it was read: nothing of it was verified.
pub(super) struct Sealed {
    pages: AlignedBuf,
    /// Where its body stands in them.
    body: Range<usize>,
}

impl Sealed {
    /// Bytes of its body.
    pub(super) fn len(&self) -> usize {
        self.body.len()
    }

    /// Whether the frame around its body is as it was written, too. The body vouches for itself; without the frame the record is not
    /// found again when it is looked for.
    pub(super) fn is_whole(&self) -> bool {
        self.pages.get(self.body.start - RECORD_HEADER_LEN..self.body.end).is_some_and(|record| record_is_whole(record, self.body.len()))
    }

    /// Its body.
    pub(super) fn open(self, opener: &Opener) -> Result<Bytes, OpenError> {
        Ok(opener.open_within(self.pages, self.body)?.1)
    }
}

/// A record of `file`, in one read.
pub(super) async fn read_sealed<F: File>(file: &F, path: &Path, incarnation: u64, spot: Spot) -> Result<Sealed, RetainError> {
    let damaged = || RetainError::Damaged { path: path.to_owned(), offset: spot.record_at, source: OpenError::Body };
    let wanted = pages_of(spot.record_at, u64::from(spot.stored));
    let pages = match file.read_at(wanted.start, (wanted.end - wanted.start) as usize).await {
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Err(damaged()),
        other => other.map_err(|source| RetainError::Io { path: path.to_owned(), source })?,
    };
    let at = (spot.record_at - wanted.start) as usize;
    let body_len = peek_record(&pages[at..], incarnation, BATCH_BYTES_MAX).ok_or_else(damaged)?;
    let begin = at + RECORD_HEADER_LEN;
    Ok(Sealed { pages, body: begin..begin + body_len })
}

/// The pages that `len` bytes at `at` touch.
pub(super) fn pages_of(at: u64, len: u64) -> Range<u64> {
    at / ALIGN as u64 * ALIGN as u64..(at + len).next_multiple_of(ALIGN as u64)
}
