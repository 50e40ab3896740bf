//! What is found for a read of a point, on its way from the apply thread to the thread that asked for it: content, and sealed
//! records that the other thread opens, so that both open at once.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;

use super::record::Sealed;
use crate::crypto::seal::{OpenError, Opener};
use crate::model::Extent;
use crate::storage::AlignedBuf;

/// Opened records kept for the next read, in bytes: so few that the processor's cache has them.
const KEPT_BYTES: usize = 512 << 10;
/// Pieces of one read that are fetched at once. As many records are kept in any case: those of one read.
pub(super) const FETCH_DEPTH: usize = 16;

/// A record: its file's incarnation, and its place.
pub(super) type RecordName = (u64, u64);

/// A piece of the disk, and its content; `None`: zeroes.
pub(super) type Piece = (Extent, Option<Bytes>);

/// The records of a view that were opened last.
#[derive(Default)]
pub(super) struct Kept(Mutex<VecDeque<(RecordName, Bytes)>>);

impl Kept {
    pub(super) fn get(&self, name: RecordName) -> Option<Bytes> {
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        kept.iter().find(|(n, _)| *n == name).map(|(_, body)| body.clone())
    }

    pub(super) fn put(&self, name: RecordName, body: Bytes) {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.iter().any(|(n, _)| *n == name) {
            return;
        }
        kept.push_front((name, body));
        while kept.len() > FETCH_DEPTH && kept.iter().map(|(_, body)| body.len()).sum::<usize>() > KEPT_BYTES {
            kept.pop_back();
        }
    }
}

/// A part of what a read asked for.
pub struct Portion(Form);

enum Form {
    Open(Piece),
    Sealed(Record),
}

/// A record that was read, and what of it is wanted.
pub(super) struct Record {
    pub(super) name: RecordName,
    pub(super) sealed: Sealed,
    /// Pieces, and where in the record's body each begins.
    pub(super) wanted: Vec<(Extent, usize)>,
    pub(super) opener: Arc<Opener>,
    pub(super) kept: Arc<Kept>,
}

impl Record {
    fn open(self) -> Result<Vec<Piece>, OpenError> {
        let body = self.sealed.open(&self.opener)?;
        self.kept.put(self.name, body.clone());
        self.wanted.into_iter().map(|(piece, at)| Ok((piece, Some(part_of(&body, at, piece)?)))).collect()
    }
}

impl Portion {
    pub(super) fn open(piece: Piece) -> Self {
        Self(Form::Open(piece))
    }

    pub(super) fn sealed(record: Record) -> Self {
        Self(Form::Sealed(record))
    }
}

/// The content of `piece`, which begins at `at` in the body of its record.
pub(super) fn part_of(body: &Bytes, at: usize, piece: Extent) -> Result<Bytes, OpenError> {
    let end = at + piece.len as usize;
    if end > body.len() {
        return Err(OpenError::Body);
    }
    Ok(body.slice(at..end))
}

/// Puts the portions of one read together.
pub struct Gathered {
    extent: Extent,
    found: Vec<Piece>,
}

impl Gathered {
    /// Of a read of `extent`.
    pub fn of(extent: Extent) -> Self {
        Self { extent, found: Vec::new() }
    }

    /// Adds a portion; opens it, if it is sealed.
    ///
    /// # Errors
    /// [`OpenError`] if it does not open. What that means for the point is known where the view is: [`super::View::read`] says it.
    pub fn add(&mut self, portion: Portion) -> Result<(), OpenError> {
        match portion.0 {
            Form::Open(piece) => self.found.push(piece),
            Form::Sealed(record) => self.found.extend(record.open()?),
        }
        Ok(())
    }

    /// The content, when all portions were added; `None` if some of it is missing, or came twice.
    pub fn finish(self) -> Option<Bytes> {
        joined(self.extent, self.found)
    }
}

/// One content of what was found of `extent`, zeroes where there is no content; `None` unless each byte was found once.
pub(super) fn joined(extent: Extent, mut found: Vec<Piece>) -> Option<Bytes> {
    let is_whole = |(piece, content): &Piece| content.as_ref().is_none_or(|content| content.len() as u64 == piece.len);
    found.sort_unstable_by_key(|(piece, _)| piece.offset);
    let mut end = extent.offset;
    let mut is_next = |piece: Extent| std::mem::replace(&mut end, piece.end()) == piece.offset;
    if !found.iter().all(|found| is_whole(found) && is_next(found.0)) || end != extent.end() {
        return None;
    }
    if let [(_, Some(whole))] = &mut found[..] {
        return Some(std::mem::take(whole));
    }
    let mut out = AlignedBuf::with_capacity(extent.len as usize);
    for (piece, content) in found {
        match content {
            Some(content) => out.extend(&content),
            None => out.pad_to(out.len() + piece.len as usize),
        }
    }
    Some(out.freeze())
}
