//! Records of old content: sealed when they are made, opened when they are read.

use std::cell::RefCell;
use std::io;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;

use super::atlas::Spot;
use super::{RetainError, Subject};
use crate::crypto::seal::{OpenError, Opener, Packer, SealingSession};
use crate::model::Extent;
use crate::storage::log::format::{RECORD_HEADER_LEN, finish_record, peek_record, record_is_whole, record_len};
use crate::storage::{AlignedBuf, File};
use crate::wire::batch::{BATCH_BYTES_MAX, BatchHeader, ENTRY_LEN, HEADER_LEN, TAG_LEN, push_entry};

/// A record to be sealed: its parts, which are holes or not, and the content of those that are not, in order.
pub(super) struct Loose {
    pub(super) parts: Vec<(Extent, bool)>,
    pub(super) content: Vec<AlignedBuf>,
}

/// Records one behind the other, as they stand in the file.
pub(super) struct Run {
    pub(super) bytes: AlignedBuf,
    pub(super) records: Vec<Placed>,
}

/// A record of a run.
pub(super) struct Placed {
    pub(super) parts: Vec<(Extent, bool)>,
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
        let room: u64 = records.iter().map(|record| stored_at_most(&record.parts)).sum();
        let mut run = Run { bytes: AlignedBuf::with_capacity(room as usize), records: Vec::with_capacity(records.len()) };
        for (record, number) in records.into_iter().zip(first..) {
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
            finish_record(&mut run.bytes[at..], incarnation);
            run.bytes.pad_to(at + record_len(body_len as usize));
            run.records.push(Placed { parts: record.parts, at: at as u64, body_len });
        }
        run
    };
    tokio::task::spawn_blocking(work).await.expect("sealing does not panic and the runtime outlives this task")
}

/// Most bytes that a record of these parts takes in the file.
pub(super) fn stored_at_most(parts: &[(Extent, bool)]) -> u64 {
    let data: u64 = parts.iter().filter(|(_, hole)| !hole).map(|(extent, _)| extent.len).sum();
    record_len(HEADER_LEN + data as usize + parts.len() * ENTRY_LEN + TAG_LEN) as u64
}

/// The opened body of a record of `file`, in one read.
pub(super) async fn read_record<F: File>(
    file: &F,
    path: &Path,
    incarnation: u64,
    spot: Spot,
    opener: &RefCell<Opener>,
) -> Result<Rc<AlignedBuf>, RetainError> {
    let damaged = |source| RetainError::Damaged { path: path.to_owned(), offset: spot.record_at, source };
    let record = match file.read_at(spot.record_at, spot.stored as usize).await {
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Err(damaged(OpenError::Body)),
        other => other.map_err(|source| RetainError::Io { path: path.to_owned(), source })?,
    };
    let body_len = peek_record(&record, incarnation, BATCH_BYTES_MAX).filter(|&len| record_is_whole(&record, len));
    let body_len = body_len.ok_or_else(|| damaged(OpenError::Body))?;
    let opened = opener.borrow_mut().open(&record[RECORD_HEADER_LEN..RECORD_HEADER_LEN + body_len]);
    Ok(Rc::new(opened.map_err(damaged)?.1))
}
