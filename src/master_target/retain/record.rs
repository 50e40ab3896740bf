//! Records of old content: sealed when they are made, opened when they are read.

use std::cell::RefCell;
use std::io;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;

use super::atlas::Spot;
use super::{RetainError, Subject, seal};
use crate::crypto::seal::{OpenError, Opener, SealingSession};
use crate::model::Extent;
use crate::storage::log::format::{RECORD_HEADER_LEN, peek_record, record_is_whole, record_len};
use crate::storage::{AlignedBuf, File};
use crate::wire::batch::{BATCH_BYTES_MAX, ENTRY_LEN, HEADER_LEN, TAG_LEN, push_entry};

/// Old content as a sealed record, with room for its header in front.
pub(super) async fn sealed(
    subject: &Subject,
    session: &Arc<SealingSession>,
    mut body: Vec<u8>,
    parts: &[(Extent, bool)],
    number: u64,
) -> AlignedBuf {
    let data_len = body.len();
    for (extent, hole) in parts {
        push_entry(&mut body, *extent, *hole);
    }
    seal(subject, session, body, data_len, parts.len(), number).await
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
