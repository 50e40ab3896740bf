//! The closed intervals of one disk for those who read them: the atlas, and files that are opened when they are needed.
//!
//! The atlas is made when the first point is opened (or earlier, see [`History::is_known`]) and kept up to date from then on.
//! While a view exists it stays; without one it is dropped when it is large, and made again.
//! At most [`FILES_OPEN_MAX`] files of a disk are open for it.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use super::RetainError;
use super::atlas::{Atlas, NUMBERS_MAX, Spot};
use super::interval::{Entries, file_name};
use super::record::{Sealed, read_sealed};
use crate::crypto::seal::OpenError;
use crate::model::{Extent, Position};
use crate::storage::{OpenMode, Storage};

/// Files of closed intervals that one disk keeps open, as far as the process may: to open one costs as much as to read it.
const FILES_OPEN_MAX: usize = 1024;
/// An atlas up to this size stays in memory without a view: 8 million extents.
const KEPT_BYTES: usize = 128 << 20;

/// A closed interval's file.
pub(super) struct Closed<F> {
    start: Position,
    path: PathBuf,
    /// Names this file's content: another one under its name has another.
    pub(super) incarnation: u64,
    file: RefCell<Option<Rc<F>>>,
}

/// Content of a closed interval.
type InClosed<F> = (Rc<Closed<F>>, Spot);

struct Known<F> {
    atlas: Atlas,
    /// By number; in order of begin.
    closed: BTreeMap<u32, Rc<Closed<F>>>,
    /// Begins of those that could not be read, with the number that is kept free for each.
    unreadable: BTreeMap<Position, u32>,
    next: u32,
}

/// See the module.
pub(super) struct History<S: Storage> {
    storage: S,
    dir: PathBuf,
    known: RefCell<Option<Known<S::File>>>,
    open: RefCell<VecDeque<Rc<Closed<S::File>>>>,
    /// Changes whenever files go, so that whoever opens several of them with pauses in between knows why one is not there.
    shape: Cell<u64>,
}

impl<S: Storage> History<S> {
    pub(super) fn new(storage: S, dir: &Path) -> Self {
        Self { storage, dir: dir.to_owned(), known: RefCell::default(), open: RefCell::default(), shape: Cell::new(0) }
    }

    pub(super) fn shape(&self) -> u64 {
        self.shape.get()
    }

    /// Files are about to go.
    pub(super) fn reshape(&self) {
        self.shape.set(self.shape.get() + 1);
    }

    /// Whether there is an atlas.
    pub(super) fn is_known(&self) -> bool {
        self.known.borrow().is_some()
    }

    /// Bytes of memory the atlas takes.
    pub(super) fn bytes(&self) -> usize {
        self.known.borrow().as_ref().map_or(0, |k| k.atlas.bytes())
    }

    /// Makes the atlas of what was read of every interval that is closed now.
    pub(super) fn learn(&self, read: BTreeMap<Position, Option<Entries>>) {
        let mut known = Known { atlas: Atlas::default(), closed: BTreeMap::new(), unreadable: BTreeMap::new(), next: 0 };
        for (start, entries) in read {
            match entries {
                Some(entries) => known.push(self.closed(start, entries.incarnation), entries.list),
                None => {
                    known.unreadable.insert(start, known.next);
                    known.next += 1;
                }
            }
        }
        known.atlas.settle();
        *self.known.borrow_mut() = Some(known);
    }

    /// An interval was closed; it begins after every other.
    pub(super) fn add(&self, start: Position, entries: Entries) {
        let closed = self.closed(start, entries.incarnation);
        if let Some(known) = &mut *self.known.borrow_mut() {
            known.push(closed, entries.list);
        }
    }

    /// An interval that could not be read before was read.
    pub(super) fn add_late(&self, start: Position, entries: Entries) {
        let closed = self.closed(start, entries.incarnation);
        if let Some(known) = &mut *self.known.borrow_mut()
            && let Some(number) = known.unreadable.remove(&start)
        {
            known.atlas.add(number, spots(entries.list));
            known.closed.insert(number, closed);
        }
    }

    /// `merged` stands in the place of all of `starts` now.
    pub(super) fn replace(&self, starts: &[Position], merged: Entries) {
        let closed = self.closed(starts[0], merged.incarnation);
        let Some(known) = &mut *self.known.borrow_mut() else { return };
        let starts: BTreeSet<Position> = starts.iter().copied().collect();
        let mut numbers: BTreeSet<u32> = known.closed.iter().filter(|(_, c)| starts.contains(&c.start)).map(|(n, _)| *n).collect();
        numbers.extend(known.unreadable.iter().filter(|(start, _)| starts.contains(start)).map(|(_, n)| *n));
        known.unreadable.retain(|start, _| !starts.contains(start));
        known.closed.retain(|number, _| !numbers.contains(number));
        known.atlas.remove(|number| numbers.contains(&number));
        // A file that is held open takes its space though it has no name any more.
        self.open.borrow_mut().retain(|closed| !starts.contains(&closed.start) || drop_file(closed));
        // The first of them: it was there when the atlas was made.
        if let Some(&number) = numbers.first() {
            known.atlas.add(number, spots(merged.list));
            known.closed.insert(number, closed);
        }
    }

    /// Intervals that begin before `start` went.
    pub(super) fn forget_before(&self, start: Position) {
        let Some(known) = &mut *self.known.borrow_mut() else { return };
        known.closed.retain(|_, closed| closed.start >= start);
        known.unreadable.retain(|s, _| *s >= start);
        let first = known.closed.keys().chain(known.unreadable.values()).min().copied().unwrap_or(known.next);
        known.atlas.forget_before(first);
        self.open.borrow_mut().retain(|closed| closed.start >= start || drop_file(closed));
    }

    /// Nobody looks: a large atlas is not kept, nor one whose numbers run out.
    pub(super) fn rest(&self) {
        let mut known = self.known.borrow_mut();
        if known.as_ref().is_some_and(|k| k.atlas.bytes() > KEPT_BYTES || k.next > NUMBERS_MAX / 2) {
            *known = None;
        }
        drop(known);
        self.open.borrow_mut().drain(..).for_each(|closed| drop(closed.file.take()));
    }

    /// The numbers of all intervals that begin at `start` or later, and the begins of those that could not be read.
    pub(super) fn from(&self, start: Position) -> (Range<u32>, Vec<Position>) {
        let known = self.known.borrow();
        let Some(known) = &*known else { return (0..0, Vec::new()) };
        let unreadable: Vec<(Position, u32)> = known.unreadable.range(start..).map(|(s, n)| (*s, *n)).collect();
        let first = known.closed.iter().find(|(_, closed)| closed.start >= start).map(|(n, _)| *n);
        let first = first.into_iter().chain(unreadable.iter().map(|(_, n)| *n)).min().unwrap_or(known.next);
        (first..known.next, unreadable.into_iter().map(|(s, _)| s).collect())
    }

    /// What each part of `extent` is by the first of `numbers` that has it.
    pub(super) fn resolve(&self, extent: Extent, numbers: Range<u32>) -> Vec<(Extent, Option<InClosed<S::File>>)> {
        let known = self.known.borrow();
        let Some(known) = &*known else { return vec![(extent, None)] };
        let named = |(part, found): (Extent, Option<(u32, Spot)>)| {
            (part, found.and_then(|(number, spot)| Some((known.closed.get(&number)?.clone(), spot))))
        };
        known.atlas.resolve(extent, numbers).into_iter().map(named).collect()
    }

    /// See [`Atlas::next_data`].
    pub(super) fn next_data(&self, offset: u64, numbers: Range<u32>, zeroes: bool) -> Option<Extent> {
        self.known.borrow().as_ref().and_then(|k| k.atlas.next_data(offset, numbers, zeroes))
    }

    /// A record.
    pub(super) async fn read_sealed(&self, closed: &Rc<Closed<S::File>>, spot: Spot) -> Result<Sealed, RetainError> {
        let file = self.file(closed).await?;
        read_sealed(&*file, &closed.path, closed.incarnation, spot).await
    }

    async fn file(&self, closed: &Rc<Closed<S::File>>) -> Result<Rc<S::File>, RetainError> {
        let here = closed.file.borrow().clone();
        if let Some(file) = here {
            return Ok(file);
        }
        let opened = loop {
            match self.storage.open(&closed.path, OpenMode::Read).await {
                // Others need descriptors too: fewer are kept.
                Err(e) if e.raw_os_error() == Some(rustix::io::Errno::MFILE.raw_os_error()) && self.close_oldest() => {}
                other => break other,
            }
        };
        let file = Rc::new(opened.map_err(|source| RetainError::Io { path: closed.path.clone(), source })?);
        if closed.file.replace(Some(file.clone())).is_none() {
            self.open.borrow_mut().push_back(closed.clone());
            if self.open.borrow().len() > FILES_OPEN_MAX {
                self.close_oldest();
            }
        }
        Ok(file)
    }

    /// False if none is open. Reads of it that are under way keep it until they are done.
    fn close_oldest(&self) -> bool {
        loop {
            let Some(oldest) = self.open.borrow_mut().pop_front() else { return false };
            if oldest.file.take().is_some() {
                return true;
            }
        }
    }

    fn closed(&self, start: Position, incarnation: u64) -> Rc<Closed<S::File>> {
        Rc::new(Closed { start, path: self.dir.join(file_name(start)), incarnation, file: RefCell::default() })
    }
}

impl<F> Closed<F> {
    /// A record does not hold what the atlas says.
    pub(super) fn damaged(&self, spot: Spot, source: OpenError) -> RetainError {
        RetainError::Damaged { path: self.path.clone(), offset: spot.record_at, source }
    }
}

impl<F> Known<F> {
    fn push(&mut self, closed: Rc<Closed<F>>, list: Vec<(Extent, super::index::Source)>) {
        self.atlas.add(self.next, spots(list));
        self.closed.insert(self.next, closed);
        self.next += 1;
    }
}

fn spots(list: Vec<(Extent, super::index::Source)>) -> impl Iterator<Item = (Extent, Spot)> {
    list.into_iter().map(|(extent, source)| (extent, Spot::from(source)))
}

/// False, for `retain`.
fn drop_file<F>(closed: &Closed<F>) -> bool {
    closed.file.take();
    false
}
