//! The retention journal of one disk: what is needed to go back from the replica to older points.
//!
//! An *interval* begins at a point's marker and ends at the next. It keeps, for each block overwritten within it for the
//! first time, the content the block had at its beginning. Content at point P of a block = the first interval from P on
//! that has it, else the replica. Dropping the oldest point drops the oldest interval: nothing is merged.
//! Views look into closed intervals through one *atlas* of the disk ([`atlas`]), so that a point opens at once however many came after it.
//!
//! Constraints first:
//! - Old content is durable here before the replica's block is overwritten.
//! - It is kept from the first attempt only: after a crash the replica may already hold new content, and a block that is
//!   found here is not read again. Intervals are named by the marker's position, so a repeated attempt finds them.
//! - One file an interval, made when the first block is kept: `undo-EPOCH-SEQUENCE.tgu`, positions in hexadecimal.
//!
//! Damage: see [`inspect`]. Which intervals have a file, and how much of the growing one is durable, is noted with the
//! checkpoint, so that a file that is gone and a record that rotted are told from what a crash cut off.
//!
//! If power goes while records are appended: those found whole are right, because the replica was not touched before all
//! were durable. While an interval is closed: its index is missing and is made again from its records. While files are
//! removed: the points were unlisted before.

pub mod atlas;
mod history;
pub mod index;
mod inspect;
mod interval;
pub mod loss;
mod merge;
mod parts;
mod portion;
mod record;
mod view;
mod window;

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::rc::{Rc, Weak};
use std::sync::Arc;

use futures_util::StreamExt;
use thiserror::Error;

use self::history::History;
pub use self::inspect::Loss;
use self::interval::{Interval, file_name, parse_name};
use self::parts::Part;
pub use self::portion::{Gathered, Portion};
use self::record::Loose;
pub use self::view::{EARLY_MAX, Early, View};
use crate::crypto::keyring::DataKey;
use crate::crypto::seal::{OpenError, Opener, Purpose, SealingSession};
use crate::disk::{Disk, DiskError};
use crate::model::{BLOCK, BlockSet, DiskId, Extent, Position};
use crate::storage::Storage;

/// Runs of records that are read, sealed or written at once.
const KEEP_RUNS: usize = 4;
/// Reads of the replica for them that are under way.
const READ_DEPTH: usize = 96;

/// Why the retention journal cannot do what was asked.
#[derive(Debug, Error)]
pub enum RetainError {
    /// The file system failed.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The failure.
        source: io::Error,
    },
    /// A record is damaged.
    #[error("{path} at byte {offset}: {source}; the points that need this record cannot be brought back exactly")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Where.
        offset: u64,
        /// How it was noticed.
        source: OpenError,
    },
    /// A file was made by a newer version: nothing is done with it.
    #[error("{path} has version {version} of the retention journal, which this version of Tidegate does not know: update Tidegate")]
    Version {
        /// The file.
        path: PathBuf,
        /// What it says.
        version: u8,
    },
    /// The replica cannot be read.
    #[error(transparent)]
    Replica(#[from] DiskError),
}

impl RetainError {
    /// Begin of the interval that does not hold what it should, if that is the matter: damaged, or not there. A file system
    /// that fails to read is none: it may work again.
    pub fn damaged_interval(&self) -> Option<Position> {
        let path = match self {
            RetainError::Damaged { path, .. } => path,
            RetainError::Io { path, source } if source.kind() == io::ErrorKind::NotFound => path,
            _ => return None,
        };
        parse_name(path.file_name()?.to_str()?)
    }

    /// The replica's disk does not give back what was written.
    pub fn is_unreadable_replica(&self) -> bool {
        matches!(self, RetainError::Replica(error) if error.is_unreadable())
    }

    /// The failure of the file system, if it was one.
    pub fn io_error(&self) -> Option<&io::Error> {
        match self {
            RetainError::Io { source, .. } | RetainError::Replica(DiskError::Io { source, .. }) => Some(source),
            _ => None,
        }
    }
}

/// What is known of the disk whose history is kept.
#[derive(Clone)]
pub struct Subject {
    /// The disk.
    pub disk: DiskId,
    /// Its replica's history.
    pub generation: u64,
    /// Its data key.
    pub key: DataKey,
}

/// The retention journal of one disk; lives on the apply thread.
pub struct Retention<S: Storage> {
    storage: S,
    dir: PathBuf,
    subject: Subject,
    session: Arc<SealingSession>,
    opener: Arc<Opener>,
    /// Begin of every interval that has a file, and its bytes.
    files: RefCell<BTreeMap<Position, u64>>,
    current: RefCell<Option<Rc<Interval<S::File>>>>,
    current_start: Cell<Option<Position>>,
    touched: RefCell<BlockSet>,
    views: RefCell<Vec<Weak<View<S>>>>,
    /// What was closed, for views.
    history: Rc<History<S>>,
    /// Held while the indexes of all closed intervals are read.
    learning: tokio::sync::Mutex<()>,
    /// How often the file of an interval was replaced by a merge.
    merged: RefCell<BTreeMap<Position, u64>>,
    /// Begins of runs that could not be merged; left alone until the next start.
    unmergeable: RefCell<BTreeSet<Position>>,
    /// Begins of intervals that had a file, which is gone.
    missing: RefCell<BTreeSet<Position>>,
    /// Intervals made or grown that are not noted durably, with how far.
    grown: RefCell<BTreeMap<Position, u64>>,
    /// Bytes of old content that were in memory, and that were read from the replica.
    kept: Cell<(u64, u64)>,
}

impl<S: Storage> Retention<S> {
    /// Opens the journal in `dir`. `last_marker` is the newest marker within the replica's checkpoint; a file that begins
    /// there, or later, is scanned so that what was kept before a crash is kept from that attempt.
    ///
    /// # Errors
    /// [`RetainError`].
    pub async fn open(storage: S, dir: &Path, subject: Subject, last_marker: Option<Position>) -> Result<Self, RetainError> {
        Self::open_noted(storage, dir, subject, last_marker, &BTreeMap::new()).await
    }

    /// The same, with what [`Retention::take_grown`] said and was noted durably since: what is not there any more is known to
    /// be gone, and damage in the interval that grows is told from what a crash cut off.
    ///
    /// # Errors
    /// [`RetainError`].
    pub async fn open_noted(
        storage: S,
        dir: &Path,
        subject: Subject,
        last_marker: Option<Position>,
        noted: &BTreeMap<Position, u64>,
    ) -> Result<Self, RetainError> {
        let io = |source| RetainError::Io { path: dir.to_owned(), source };
        storage.create_dir(dir).map_err(io)?;
        let session = Arc::new(SealingSession::start(&subject.key, Purpose::Retention, subject.disk, subject.generation));
        let opener = Arc::new(Opener::new(subject.key.clone(), Purpose::Retention, subject.disk, subject.generation));
        let retention = Self {
            dir: dir.to_owned(),
            session,
            opener,
            files: RefCell::default(),
            current: RefCell::default(),
            current_start: Cell::new(None),
            touched: RefCell::default(),
            views: RefCell::default(),
            history: Rc::new(History::new(storage.clone(), dir)),
            learning: tokio::sync::Mutex::new(()),
            merged: RefCell::default(),
            unmergeable: RefCell::default(),
            missing: RefCell::default(),
            grown: RefCell::default(),
            kept: Cell::default(),
            storage,
            subject,
        };
        for name in retention.storage.list(dir).map_err(io)? {
            if let Some(start) = parse_name(&name) {
                let bytes = Interval::<S::File>::file_len(&retention.storage, &dir.join(&name)).await?;
                retention.files.borrow_mut().insert(start, bytes);
            } else if merge::is_left_over(&name) {
                let path = dir.join(&name);
                retention.storage.remove(&path).map_err(|source| RetainError::Io { path, source })?;
            }
        }
        {
            let (files, mut missing) = (retention.files.borrow(), retention.missing.borrow_mut());
            missing.extend(noted.keys().filter(|start| !files.contains_key(start)));
            retention.grown.borrow_mut().extend(files.keys().filter(|start| !noted.contains_key(start)).map(|start| (*start, 0)));
        }
        if let Some(start) = last_marker {
            retention.begin_at(start, noted.get(&start).copied().unwrap_or(0)).await?;
        }
        Ok(retention)
    }

    /// Whether old content has to be kept: there is a point to go back to.
    pub fn is_keeping(&self) -> bool {
        self.current_start.get().is_some()
    }

    /// A marker was passed: from here on old content belongs to the interval that begins there. Repeating is harmless.
    ///
    /// # Errors
    /// [`RetainError::Io`].
    pub async fn begin(&self, start: Position) -> Result<(), RetainError> {
        self.begin_at(start, 0).await
    }

    async fn begin_at(&self, start: Position, durable: u64) -> Result<(), RetainError> {
        if self.current_start.get() == Some(start) {
            return Ok(());
        }
        // What was current stays so until nothing is left to wait for: a view that is made meanwhile reads it as such.
        let closing = self.current.borrow().clone();
        if let Some(interval) = &closing {
            interval.close().await?;
        }
        let known = self.files.borrow().contains_key(&start);
        let reopened = if known { Some(Interval::reopen(&self.storage, &self.dir, start, &self.opener, durable).await?) } else { None };
        // Left behind the checkpoint by an attempt that passed other markers: closed from now on.
        let mut passed = Vec::new();
        let between: Vec<Position> = match self.current_start.get().filter(|current| *current < start) {
            Some(current) if self.history.is_known() => {
                self.files.borrow().range(current..start).map(|(p, _)| *p).filter(|p| *p != current).collect()
            }
            _ => Vec::new(),
        };
        for start in between {
            passed.push((start, Interval::load_entries(&self.storage, &self.dir, start, &self.opener).await?));
        }
        // From here on nothing waits.
        let closed = self.current.borrow_mut().take();
        if let Some(interval) = closed {
            self.grown.borrow_mut().insert(interval.start(), interval.end());
            self.files.borrow_mut().insert(interval.start(), interval.bytes());
            self.history.add(interval.start(), interval.entries());
            self.views.borrow().iter().filter_map(Weak::upgrade).for_each(|view| view.retire(interval.start()));
        }
        for (start, entries) in passed {
            self.history.add(start, entries);
            self.views.borrow().iter().filter_map(Weak::upgrade).for_each(|view| view.retire(start));
        }
        self.rest_if_unseen();
        self.touched.borrow_mut().clear();
        self.current_start.set(Some(start));
        if let Some(interval) = reopened.map(Rc::new) {
            for extent in interval.extents() {
                self.touch(extent);
            }
            self.use_interval(interval);
        }
        Ok(())
    }

    /// Whether an interval has a file that begins behind `position`.
    pub fn is_ahead_of(&self, position: Position) -> bool {
        self.files.borrow().last_key_value().is_some_and(|(start, _)| *start > position)
    }

    /// Keeps the content that `extents` have in `image` now, as far as this interval does not have it. Durable when this
    /// returns; only then may they be overwritten.
    ///
    /// # Errors
    /// [`RetainError`]; the replica must not be overwritten then.
    pub async fn preserve<D: Disk>(&self, image: &D, extents: impl Iterator<Item = Extent>) -> Result<(), RetainError> {
        let Some(start) = self.current_start.get() else { return Ok(()) };
        let fresh = self.untouched(extents, image.size());
        if fresh.is_empty() {
            return Ok(());
        }
        let current = self.current.borrow().clone();
        let interval = match current {
            Some(interval) => interval,
            None => {
                let made = Rc::new(Interval::create(&self.storage, &self.dir, start).await?);
                self.files.borrow_mut().insert(start, 0);
                self.use_interval(made.clone());
                made
            }
        };
        let groups = parts::group(parts::split_holes(image, fresh)?);
        let result = self.keep(image, &interval, groups).await;
        if result.is_err() {
            interval.take_back();
        }
        result?;
        interval.sync().await?;
        // Before any overwriting begins: readers of older points look here again after they read the replica.
        interval.publish();
        for extent in interval.take_published() {
            self.touch(extent);
        }
        self.files.borrow_mut().insert(start, interval.bytes());
        Ok(())
    }

    /// Bytes of old content kept since the last call: that were in memory, and that were read from the replica.
    pub fn take_kept(&self) -> (u64, u64) {
        self.kept.take()
    }

    /// Intervals made or grown since the last call, and through which byte of their files they are durable: to be noted with
    /// the checkpoint.
    pub fn take_grown(&self) -> Vec<(Position, u64)> {
        let mut grown = std::mem::take(&mut *self.grown.borrow_mut());
        if let Some(current) = &*self.current.borrow() {
            grown.insert(current.start(), current.end());
        }
        grown.into_iter().collect()
    }

    /// The intervals that [`Retention::forget_before`] would remove; whoever noted them forgets them first.
    pub fn unneeded(&self, oldest_needed: Option<Position>) -> Vec<Position> {
        let Some(keep_from) = oldest_needed.or(self.current_start.get()) else { return Vec::new() };
        let (files, missing) = (self.files.borrow(), self.missing.borrow());
        let gone = files.range(..keep_from).map(|(p, _)| *p).chain(missing.range(..keep_from).copied());
        gone.filter(|p| Some(*p) != self.current_start.get()).collect()
    }

    /// Reads, seals and appends old content, all three at once for different records. They stand in the file in their order.
    async fn keep<D: Disk>(&self, image: &D, interval: &Interval<S::File>, groups: Vec<Vec<Part>>) -> Result<(), RetainError> {
        // Space first: a file system that is full is noticed before anything was written.
        let runs = parts::runs(&groups);
        interval.reserve(runs.iter().map(|run| record::run_at_most(run)).sum()).await?;
        let (reading, failed) = (tokio::sync::Semaphore::new(READ_DEPTH), Cell::new(false));
        // In long runs: a file system takes its time for each write that makes a file longer, and a hop to another thread, which
        // seals, costs as much as sealing a record.
        let sealed = runs.into_iter().map(|groups| {
            let (reading, failed) = (&reading, &failed);
            let first = interval.next_records(groups.len() as u64);
            async move {
                if failed.get() {
                    return Ok(None);
                }
                // To fetch a run from memory takes a while, in which nothing else would reach the disk.
                interval.breathe().await;
                let content = groups.iter().flatten().filter(|(_, hole)| !hole);
                let reads = content.map(|(extent, _)| async move {
                    let (memory, read) = self.kept.get();
                    if let Some(content) = image.recent(*extent) {
                        self.kept.set((memory + extent.len, read));
                        return Ok(content);
                    }
                    self.kept.set((memory, read + extent.len));
                    let _one = reading.acquire().await;
                    image.read(*extent).await
                });
                let mut reads = futures_util::stream::iter(reads).buffered(READ_DEPTH);
                let mut old = Vec::new();
                while let Some(read) = reads.next().await {
                    old.push(read?);
                }
                let mut old = old.into_iter();
                let records = groups.iter().map(|parts| {
                    let count = parts.iter().filter(|(_, hole)| !hole).count();
                    Loose { parts: parts.clone(), content: old.by_ref().take(count).collect() }
                });
                let records = records.collect();
                Ok::<_, RetainError>(Some(interval.seal(&self.subject, &self.session, records, first).await))
            }
        });
        let written = futures_util::stream::iter(sealed).buffered(KEEP_RUNS).map(|sealed| {
            let placed = sealed.map(|run| run.map(|run| interval.place(run)));
            async move {
                match placed? {
                    Some(writing) => writing.await,
                    None => Ok(()),
                }
            }
        });
        let mut written = std::pin::pin!(written.buffer_unordered(KEEP_RUNS));
        let mut result = Ok(());
        while let Some(done) = written.next().await {
            // What is under way is waited for in any case: it must not be written behind the back of the next attempt.
            failed.set(failed.get() || done.is_err());
            result = result.and(done);
        }
        result
    }

    /// Removes every interval that begins before `oldest_needed`; all but the current one if there is none.
    ///
    /// # Errors
    /// [`RetainError::Io`]; what was not removed is removed the next time.
    pub fn forget_before(&self, oldest_needed: Option<Position>) -> Result<(), RetainError> {
        let keep_from = oldest_needed.or(self.current_start.get());
        let Some(keep_from) = keep_from else { return Ok(()) };
        self.missing.borrow_mut().retain(|start| *start >= keep_from);
        let gone: Vec<Position> =
            self.files.borrow().range(..keep_from).map(|(p, _)| *p).filter(|p| Some(*p) != self.current_start.get()).collect();
        if !gone.is_empty() {
            self.history.reshape();
            self.history.forget_before(keep_from);
        }
        for start in &gone {
            self.remove_file(*start)?;
        }
        if gone.is_empty() {
            return Ok(());
        }
        self.storage.sync_dir(&self.dir).map_err(|source| RetainError::Io { path: self.dir.clone(), source })
    }

    /// Nothing is kept any more, and what was kept is removed: no point is left that needs it. Files that cannot be removed now
    /// are only space.
    ///
    /// # Errors
    /// [`RetainError::Io`] of the first file that stays.
    pub fn end(&self) -> Result<(), RetainError> {
        self.current_start.set(None);
        self.current.borrow_mut().take();
        self.touched.borrow_mut().clear();
        self.missing.borrow_mut().clear();
        self.grown.borrow_mut().clear();
        self.history.reshape();
        self.history.forget_before(Position::new(u64::MAX, u64::MAX));
        let starts: Vec<Position> = self.files.borrow().keys().copied().collect();
        starts.into_iter().try_for_each(|start| self.remove_file(start))?;
        self.storage.sync_dir(&self.dir).map_err(|source| RetainError::Io { path: self.dir.clone(), source })
    }

    /// Removes an interval's file. One that is gone already is removed.
    fn remove_file(&self, start: Position) -> Result<(), RetainError> {
        let path = self.dir.join(file_name(start));
        match self.storage.remove(&path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => return Err(RetainError::Io { path, source }),
            _ => {}
        }
        self.files.borrow_mut().remove(&start);
        self.grown.borrow_mut().remove(&start);
        Ok(())
    }

    /// Begins of the intervals from `position` on that have a file, or should have one.
    pub fn starts_from(&self, position: Position) -> BTreeSet<Position> {
        let (files, missing) = (self.files.borrow(), self.missing.borrow());
        files.range(position..).map(|(start, _)| *start).chain(missing.range(position..).copied()).collect()
    }

    /// Nothing is kept from `position` on any more, which is where the replica stands again; the interval that begins there begins
    /// anew. Whoever noted those intervals has forgotten them.
    ///
    /// # Errors
    /// [`RetainError::Io`]; the same again goes on.
    pub fn drop_from(&self, position: Position) -> Result<(), RetainError> {
        let starts = self.starts_from(position);
        self.history.reshape();
        self.current.borrow_mut().take();
        self.touched.borrow_mut().clear();
        self.missing.borrow_mut().retain(|start| *start < position);
        // What a view has of them is what the replica has; of what comes they have nothing.
        let views: Vec<Rc<View<S>>> = self.views.borrow().iter().filter_map(Weak::upgrade).collect();
        views.iter().for_each(|view| view.drop_live_from(position));
        // The newest first, each for good before the next: what is left then still says what the replica has been given. The oldest
        // alone does; one behind it that was left without it would say something else.
        for start in starts.into_iter().rev() {
            self.remove_file(start)?;
            self.storage.sync_dir(&self.dir).map_err(|source| RetainError::Io { path: self.dir.clone(), source })?;
        }
        Ok(())
    }

    /// Without a view, open files and a large atlas are given up.
    fn rest_if_unseen(&self) {
        if self.views.borrow().iter().all(|view| view.strong_count() == 0) {
            self.history.rest();
        }
    }

    /// Bytes of memory for the index of closed intervals.
    pub fn index_bytes(&self) -> usize {
        self.history.bytes()
    }

    /// Bytes of all intervals.
    pub fn bytes(&self) -> u64 {
        self.files.borrow().values().sum()
    }

    fn use_interval(&self, interval: Rc<Interval<S::File>>) {
        self.views.borrow_mut().retain(|view| match view.upgrade() {
            Some(view) => {
                view.add_live(interval.clone());
                true
            }
            None => false,
        });
        *self.current.borrow_mut() = Some(interval);
    }

    fn touch(&self, extent: Extent) {
        let mut touched = self.touched.borrow_mut();
        for block in extent.offset / BLOCK..extent.end().div_ceil(BLOCK) {
            touched.insert(block);
        }
    }

    /// Whole blocks of `extents` that this interval does not have, in order, clipped to the disk.
    fn untouched(&self, extents: impl Iterator<Item = Extent>, size: u64) -> Vec<Extent> {
        let touched = self.touched.borrow();
        let mut asked = BlockSet::default();
        let mut fresh: Vec<Extent> = Vec::new();
        for extent in extents {
            let (first, last) = (extent.offset / BLOCK, (extent.end() - 1) / BLOCK);
            for (start, count) in touched.missing_runs(first, last) {
                // Two extents may share a block.
                for (start, count) in asked.missing_runs(start, start + count - 1) {
                    for block in start..start + count {
                        asked.insert(block);
                    }
                    let offset = start * BLOCK;
                    fresh.push(Extent::new(offset, (count * BLOCK).min(size - offset)));
                }
            }
        }
        fresh
    }
}
