//! An append-only log of records in recycled segments: the process server's cache and the master target's journal.
//!
//! Constraints first:
//! - A record never spans two segments and begins at a multiple of 4096.
//! - A group of records is durable as a whole before the next group is written: after a crash only records of the
//!   last group can be missing, and none of those was reported as durable.
//! - A segment is used again only when every record in it was released, and callers release a record only after
//!   they made durable, elsewhere, that they do not need it. Records of the earlier use carry another incarnation.
//! - After a restart recovered segments are never appended to.
//! - A record that was damaged, or whose sectors give EIO, takes no other with it: see [`scan`].
//! - Segments are filled with zeroes when they are made: overwriting is 1.5 to 10 times cheaper than extending
//!   or than writing into merely allocated space (measured).
//!
//! Power may go at any write here. While a segment is made: its header is written last, so the file is found without
//! one and is made again. While a group is written: some of its records are found, in any combination; callers drop what
//! follows a gap, each in the order of its own stream. While a segment is reused: either the old header stands,
//! whose remaining records are all released, or the new one.

pub mod format;
mod scan;
pub mod service;

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use bytes::Bytes;
use futures_util::future::try_join_all;
use thiserror::Error;
use uuid::Uuid;

use self::format::{RECORD_HEADER_LEN, SEGMENT_HEADER_LEN, SegmentHeader, finish_record, peek_record, record_is_whole, record_len};
use super::uring::is_full;
use super::{AlignedBuf, File, OpenMode, Storage, is_unreadable};
use crate::sabotage;

/// Bytes written at once while zeroing.
const ZERO_BYTES: usize = 1 << 20;
/// Bytes of each recovered body that are shown to the caller.
pub const HEAD_BYTES: usize = 256;

/// Bounds of a log.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Size of a segment; a multiple of 4096.
    pub segment_bytes: u64,
    /// Most segments that may exist.
    pub segments_max: usize,
    /// Longest body of a record.
    pub body_bytes_max: usize,
}

/// Where a record stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Location {
    segment: u64,
    offset: u64,
    body_len: u32,
}

impl Location {
    /// No place yet; segments are numbered from 1.
    pub const fn nowhere() -> Self {
        Self { segment: 0, offset: 0, body_len: 0 }
    }

    /// A place in no log, of a record with a body of `bytes`: for who keeps places and never reads them.
    pub const fn of_length(bytes: u64) -> Self {
        Self { segment: 0, offset: 0, body_len: bytes as u32 }
    }

    /// Bytes of the segment the record takes.
    pub fn stored_bytes(&self) -> u64 {
        record_len(self.body_len as usize) as u64
    }
}

/// A record found at start.
#[derive(Debug)]
pub struct Recovered {
    /// Where it is.
    pub location: Location,
    /// The first [`HEAD_BYTES`] of its body.
    pub head: Vec<u8>,
}

/// Why the log cannot do what was asked.
#[derive(Debug, Error)]
pub enum LogError {
    /// The folder holds another server's log.
    #[error(
        "{path} belongs to another server (log {found}, expected {expected}): it was copied or the state folder was replaced; move it away to start with an empty log"
    )]
    Foreign {
        /// The file.
        path: PathBuf,
        /// Its log id.
        found: Uuid,
        /// Ours.
        expected: Uuid,
    },
    /// A record does not match its checksum or its place was reused.
    #[error("record at byte {offset} of {path} is damaged")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Where.
        offset: u64,
    },
    /// No free segment, and no more may be made.
    #[error("the log has no free segment")]
    Full,
    /// A write or sync failed earlier; only a restart recovers.
    #[error("the log is closed for writing after a storage failure: {0}")]
    Closed(String),
    /// The file system failed.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The failure.
        source: io::Error,
    },
}

impl LogError {
    /// A record is not what was written, or its disk does not give it back (EIO).
    pub fn is_lost(&self) -> bool {
        match self {
            LogError::Damaged { .. } => true,
            LogError::Io { source, .. } => is_unreadable(source),
            _ => false,
        }
    }
}

struct Segment<F> {
    path: PathBuf,
    file: F,
    incarnation: Cell<u64>,
    header_written: Cell<bool>,
    filled: Cell<u64>,
    live: Cell<u64>,
}

/// An open log; lives on one thread.
pub struct Log<S: Storage> {
    storage: S,
    dir: PathBuf,
    id: Uuid,
    options: Options,
    segments: RefCell<BTreeMap<u64, Rc<Segment<S::File>>>>,
    current: Cell<Option<u64>>,
    creating: Cell<bool>,
    closed: RefCell<Option<String>>,
    live_bytes: Cell<u64>,
}

impl<S: Storage> Log<S> {
    /// Opens the log in `dir`, making it if needed, and returns every whole record found, in order within each segment.
    ///
    /// # Errors
    /// [`LogError::Foreign`] if a segment carries another id than `id`; [`LogError::Io`].
    pub async fn open(storage: S, dir: &Path, id: Uuid, options: Options) -> Result<(Self, Vec<Recovered>), LogError> {
        let io = |source| LogError::Io { path: dir.to_owned(), source };
        storage.create_dir(dir).map_err(io)?;
        let log = Self {
            dir: dir.to_owned(),
            id,
            options,
            segments: RefCell::default(),
            current: Cell::new(None),
            creating: Cell::new(false),
            closed: RefCell::default(),
            live_bytes: Cell::new(0),
            storage,
        };
        let mut recovered = Vec::new();
        let mut names: Vec<(u64, String)> =
            log.storage.list(dir).map_err(io)?.into_iter().filter_map(|name| Some((segment_number(&name)?, name))).collect();
        names.sort_unstable();
        let patience = scan::Patience::default();
        let mut beginless = Vec::new();
        for (number, name) in names {
            let path = dir.join(name);
            if !log.recover_segment(number, &path, &patience, &mut recovered).await? {
                beginless.push(path);
            }
        }
        log.move_aside(beginless)?;
        Ok((log, recovered))
    }

    /// Appends a group and makes it durable with one sync. Each buffer is [`RECORD_HEADER_LEN`] bytes of room and then
    /// the body. Returns the place and the shared bytes (room included) of each, in order.
    ///
    /// # Errors
    /// [`LogError::Full`] before anything was written; [`LogError::Closed`] from the first storage failure on.
    pub async fn append(&self, group: &mut Vec<AlignedBuf>) -> Result<Vec<(Location, Bytes)>, LogError> {
        self.check_open()?;
        let needed: Vec<u64> = group.iter().map(|record| record_len(record.len() - RECORD_HEADER_LEN) as u64).collect();
        let places = self.place(&needed).await?;
        let mut placed = Vec::with_capacity(group.len());
        let mut writes = Vec::with_capacity(group.len());
        let mut touched: Vec<Rc<Segment<S::File>>> = Vec::new();
        for (mut record, (number, offset)) in group.drain(..).zip(places) {
            let segment = self.segment(number).expect("placed in a segment that exists");
            let body_len = (record.len() - RECORD_HEADER_LEN) as u32;
            finish_record(&mut record, segment.incarnation.get());
            record.pad_to(record.len().next_multiple_of(4096));
            let bytes = record.freeze();
            if !touched.iter().any(|t| Rc::ptr_eq(t, &segment)) {
                touched.push(segment.clone());
            }
            placed.push((Location { segment: number, offset, body_len }, bytes.clone()));
            writes.push(async move { segment.file.write_at(offset, bytes).await });
        }
        let written = async {
            for segment in &touched {
                self.write_header(segment).await?;
            }
            try_join_all(writes).await?;
            for segment in touched.iter().filter(|_| !sabotage::is("skip-sync")) {
                segment.file.sync_data().await?;
            }
            Ok::<_, io::Error>(())
        };
        if let Err(e) = written.await {
            // Nothing of the group was reported; what reached the disk is found or not found by the next start.
            return Err(self.close(&e));
        }
        for (location, bytes) in &mut placed {
            self.live_bytes.set(self.live_bytes.get() + location.stored_bytes());
            bytes.truncate(RECORD_HEADER_LEN + location.body_len as usize);
        }
        Ok(placed)
    }

    /// Reads a record's bytes, header room included.
    ///
    /// # Errors
    /// [`LogError::Damaged`] if it does not match its checksum.
    pub async fn read(&self, location: Location) -> Result<Bytes, LogError> {
        let damaged = |path: &Path| LogError::Damaged { path: path.to_owned(), offset: location.offset };
        let segment = self.segment(location.segment).ok_or_else(|| damaged(&self.dir))?;
        let body_len = location.body_len as usize;
        let record = segment
            .file
            .read_at(location.offset, record_len(body_len))
            .await
            .map_err(|source| LogError::Io { path: segment.path.clone(), source })?;
        if peek_record(&record, segment.incarnation.get(), self.options.body_bytes_max) != Some(body_len)
            || !record_is_whole(&record, body_len)
        {
            return Err(damaged(&segment.path));
        }
        let mut bytes = record.freeze();
        bytes.truncate(RECORD_HEADER_LEN + body_len);
        Ok(bytes)
    }

    /// Gives up a record. The caller has made durable that it is not needed.
    pub fn release(&self, location: Location) {
        let Some(segment) = self.segment(location.segment) else { return };
        segment.live.set(segment.live.get().checked_sub(1).expect("a record is released once"));
        self.live_bytes.set(self.live_bytes.get().saturating_sub(location.stored_bytes()));
        let len = segment.file.len().unwrap_or(self.options.segment_bytes);
        let odd = len != self.options.segment_bytes || self.segments.borrow().len() > self.options.segments_max;
        if segment.live.get() == 0 && odd && self.current.get() != Some(location.segment) {
            self.segments.borrow_mut().remove(&location.segment);
            if let Err(e) = self.storage.remove(&segment.path) {
                tracing::warn!(path = %segment.path.display(), error = %e, "could not remove a segment of another size");
            }
        }
    }

    /// Bytes of records that were not released.
    pub fn live_bytes(&self) -> u64 {
        self.live_bytes.get()
    }

    /// Bytes of the segments that there are.
    pub fn made_bytes(&self) -> u64 {
        self.segments.borrow().len() as u64 * self.options.segment_bytes
    }

    /// Whether it would pay to call [`Log::prepare`] now.
    pub fn wants_segment(&self) -> bool {
        let Some(current) = self.current.get().and_then(|n| self.segment(n)) else { return false };
        current.filled.get() > self.options.segment_bytes / 2 && self.free_segment().is_none() && self.may_create()
    }

    /// Makes a segment ahead of need, if one may be made and none is being made.
    ///
    /// # Errors
    /// [`LogError::Io`]; a partly made file is removed.
    pub async fn prepare(&self) -> Result<(), LogError> {
        if !self.may_create() || self.closed.borrow().is_some() {
            return Ok(());
        }
        self.creating.set(true);
        let made = self.create_segment().await;
        self.creating.set(false);
        made
    }

    fn may_create(&self) -> bool {
        !self.creating.get() && self.segments.borrow().len() < self.options.segments_max
    }

    /// Chooses a place for each record, opening segments as needed. Changes nothing if it fails.
    async fn place(&self, needed: &[u64]) -> Result<Vec<(u64, u64)>, LogError> {
        let mut places = Vec::with_capacity(needed.len());
        let mut taken: Vec<u64> = Vec::new();
        let mut at = self.current.get().and_then(|n| self.segment(n).map(|s| (n, s.filled.get())));
        for &bytes in needed {
            let (number, offset) = match at {
                Some((number, filled)) if filled + bytes <= self.options.segment_bytes => (number, filled),
                _ => {
                    // Not one that this group already uses: reusing it would orphan what was placed there.
                    let used: Vec<u64> = places.iter().map(|&(number, _)| number).collect();
                    let number = self.take_free(&used).await?;
                    taken.push(number);
                    (number, SEGMENT_HEADER_LEN as u64)
                }
            };
            places.push((number, offset));
            at = Some((number, offset + bytes));
        }
        for number in taken {
            let segment = self.segment(number).expect("taken from the table");
            segment.incarnation.set(random_u64());
            segment.header_written.set(false);
        }
        for (&(number, offset), &bytes) in places.iter().zip(needed) {
            let segment = self.segment(number).expect("taken from the table");
            segment.filled.set(offset + bytes);
            segment.live.set(segment.live.get() + 1);
            self.current.set(Some(number));
        }
        Ok(places)
    }

    async fn take_free(&self, taken: &[u64]) -> Result<u64, LogError> {
        loop {
            let current = self.current.get();
            let free = self
                .segments
                .borrow()
                .iter()
                .find(|(n, s)| s.live.get() == 0 && current != Some(**n) && !taken.contains(n))
                .map(|(n, _)| *n);
            if let Some(number) = free {
                return Ok(number);
            }
            if self.creating.get() {
                tokio::time::sleep(std::time::Duration::from_millis(1)).await;
                continue;
            }
            // The current segment is recycled too when everything in it was released.
            if let Some(number) = current.filter(|n| !taken.contains(n) && self.segment(*n).is_some_and(|s| s.live.get() == 0)) {
                return Ok(number);
            }
            if !self.may_create() {
                return Err(LogError::Full);
            }
            match self.prepare().await {
                Err(LogError::Io { source, .. }) if is_full(&source) => return Err(LogError::Full),
                other => other?,
            }
        }
    }

    async fn create_segment(&self) -> Result<(), LogError> {
        let number = self.segments.borrow().keys().next_back().map_or(1, |n| n + 1);
        let path = self.dir.join(format!("segment-{number:010}.tgl"));
        let io = |source| LogError::Io { path: path.clone(), source };
        let file = self.storage.open(&path, OpenMode::Create).await.map_err(io)?;
        let made = async {
            file.allocate(0, self.options.segment_bytes).await?;
            let zeroes = AlignedBuf::zeroed(ZERO_BYTES).freeze();
            let mut at = 0;
            while at < self.options.segment_bytes {
                let step = (self.options.segment_bytes - at).min(ZERO_BYTES as u64);
                file.write_at(at, zeroes.slice(..step as usize)).await?;
                at += step;
            }
            file.sync_data().await?;
            if sabotage::is("forget-folder-sync") { Ok(()) } else { self.storage.sync_dir(&self.dir) }
        };
        if let Err(source) = made.await {
            drop(file);
            let _ = self.storage.remove(&path);
            return Err(io(source));
        }
        let segment = Segment {
            path: path.clone(),
            file,
            incarnation: Cell::new(0),
            header_written: Cell::new(false),
            filled: Cell::new(SEGMENT_HEADER_LEN as u64),
            live: Cell::new(0),
        };
        self.segments.borrow_mut().insert(number, Rc::new(segment));
        Ok(())
    }

    async fn write_header(&self, segment: &Segment<S::File>) -> io::Result<()> {
        if segment.header_written.get() {
            return Ok(());
        }
        let mut page = AlignedBuf::copy_of(&SegmentHeader { log: self.id, incarnation: segment.incarnation.get() }.encode());
        page.pad_to(SEGMENT_HEADER_LEN);
        segment.file.write_at(0, page.freeze()).await?;
        segment.header_written.set(true);
        Ok(())
    }

    fn free_segment(&self) -> Option<u64> {
        let current = self.current.get();
        self.segments.borrow().iter().find(|(n, s)| s.live.get() == 0 && current != Some(**n)).map(|(n, _)| *n)
    }

    fn segment(&self, number: u64) -> Option<Rc<Segment<S::File>>> {
        self.segments.borrow().get(&number).cloned()
    }

    fn check_open(&self) -> Result<(), LogError> {
        match &*self.closed.borrow() {
            Some(reason) => Err(LogError::Closed(reason.clone())),
            None => Ok(()),
        }
    }

    fn close(&self, error: &io::Error) -> LogError {
        let reason = format!("{}: {error}", self.dir.display());
        *self.closed.borrow_mut() = Some(reason.clone());
        LogError::Closed(reason)
    }
}

fn segment_number(name: &str) -> Option<u64> {
    name.strip_prefix("segment-")?.strip_suffix(".tgl")?.parse().ok()
}

/// A random number from the kernel.
pub fn random_u64() -> u64 {
    Uuid::new_v4().as_u64_pair().1
}
