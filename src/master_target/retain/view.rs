//! A disk as it was at a point, while the replica goes on.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::ops::Range;
use std::rc::Rc;

use futures_util::StreamExt;

use super::atlas::Spot;
use super::history::{Closed, History};
use super::index::Source;
use super::interval::Interval;
use super::{RetainError, Retention};
use crate::crypto::seal::{Opener, Purpose};
use crate::disk::Disk;
use crate::model::{Extent, OverlayMap, Position};
use crate::storage::{AlignedBuf, File, Storage};

/// Opened records kept for the next read.
const RECORDS_KEPT: usize = 128;
/// Pieces of one read that are fetched at once.
const FETCH_DEPTH: usize = 16;
/// Files read at once while the atlas is made.
const LEARN_DEPTH: usize = 16;

/// A point of one disk, readable; lives on the apply thread. While it exists the caller keeps the point pinned.
pub struct View<S: Storage> {
    history: Rc<History<S>>,
    /// The closed intervals from the point on, by number. Grows when one is closed.
    numbers: RefCell<Range<u32>>,
    /// The interval that is current, and what an attempt left behind it that a crash cut off. Read in order of their begin.
    live: RefCell<Vec<Rc<Interval<S::File>>>>,
    opener: RefCell<Opener>,
    kept: RefCell<VecDeque<(RecordName, Rc<AlignedBuf>)>>,
    /// Nothing of the closed intervals is data from `.0` up to the extent.
    quiet: Cell<Option<(u64, Option<Extent>)>>,
}

/// A record: its file's incarnation, and its place.
type RecordName = (u64, u64);

enum Where<F> {
    Closed(Rc<Closed<F>>, Spot),
    Live(Rc<Interval<F>>, Source),
    Replica,
}

impl<F: File> Where<F> {
    /// The record that has the content, if it is in one.
    fn record(&self) -> Option<RecordName> {
        match self {
            Where::Closed(closed, spot) => spot.data_at.map(|_| (closed.incarnation, spot.record_at)),
            Where::Live(interval, source) => source.data_at.map(|_| (interval.incarnation(), source.record_at)),
            Where::Replica => None,
        }
    }
}

impl<S: Storage> Retention<S> {
    /// The disk as it was at `position`, which must be the marker of a point that was not dropped.
    ///
    /// # Errors
    /// [`RetainError`].
    pub async fn view(&self, position: Position) -> Result<Rc<View<S>>, RetainError> {
        loop {
            let shape = self.history.shape();
            match self.load_view(position).await {
                Ok(Some(view)) => return Ok(view),
                // A file that went before it was opened was merged into another, which must be read then. The caller makes sure
                // that the point is still listed afterwards: without it, what went was not needed by others.
                Err(error) if self.history.shape() == shape => return Err(error),
                Ok(None) | Err(_) => {}
            }
        }
    }

    /// Reads the indexes of all closed intervals, so that points open at once afterwards. A file that cannot be read stands in
    /// the way of the points that need it, and of no other.
    pub async fn learn(&self) {
        let _alone = self.learning.lock().await;
        let opener = self.new_opener();
        let mut read: BTreeMap<Position, (u64, Option<super::interval::Entries>)> = BTreeMap::new();
        while !self.history.is_known() {
            // Files come, go and are replaced meanwhile: until everything that stands there now was read as it stands.
            let wanted: BTreeMap<Position, u64> = {
                let (files, current) = (self.files.borrow(), self.current_start.get());
                let closed = files.keys().filter(|start| current.is_some_and(|current| **start < current));
                closed.map(|start| (*start, self.merged.borrow().get(start).copied().unwrap_or(0))).collect()
            };
            read.retain(|start, (version, _)| wanted.get(start) == Some(version));
            let missing: Vec<(Position, u64)> = wanted.into_iter().filter(|(start, _)| !read.contains_key(start)).collect();
            if missing.is_empty() {
                self.history.learn(std::mem::take(&mut read).into_iter().map(|(start, (_, entries))| (start, entries)).collect());
                break;
            }
            let opener = &opener;
            let loads = missing.into_iter().map(|(start, version)| async move {
                (start, version, Interval::load_entries(&self.storage, &self.dir, start, opener).await.ok())
            });
            read.extend(
                futures_util::stream::iter(loads)
                    .buffer_unordered(LEARN_DEPTH)
                    .map(|(start, version, entries)| (start, (version, entries)))
                    .collect::<Vec<_>>()
                    .await,
            );
        }
    }

    pub(super) fn new_opener(&self) -> RefCell<Opener> {
        RefCell::new(Opener::new(self.subject.key.clone(), Purpose::Retention, self.subject.disk, self.subject.generation))
    }

    /// `None` if something changed while files were read.
    async fn load_view(&self, position: Position) -> Result<Option<Rc<View<S>>>, RetainError> {
        self.learn().await;
        let (current, shape) = (self.current_start.get(), self.history.shape());
        let opener = self.new_opener();
        for start in self.history.from(position).1 {
            let entries = Interval::load_entries(&self.storage, &self.dir, start, &opener).await?;
            self.history.add_late(start, entries);
        }
        // Left by an attempt that a crash cut off behind the checkpoint: it comes after the current interval, and the replica
        // may hold what that attempt wrote over it. Its records may be cut off, too. Before the first point it is all there is.
        let behind: Vec<Position> =
            self.files.borrow().range(position..).map(|(p, _)| *p).filter(|p| current.is_none_or(|current| *p > current)).collect();
        let mut live = Vec::new();
        for start in behind {
            live.push(Rc::new(Interval::load(&self.storage, &self.dir, start, &opener, false).await?));
        }
        if self.current_start.get() != current || self.history.shape() != shape || !self.history.is_known() {
            return Ok(None);
        }
        // From here on nothing waits.
        live.extend(self.current.borrow().clone());
        let view = Rc::new(View {
            numbers: RefCell::new(self.history.from(position).0),
            history: self.history.clone(),
            live: RefCell::new(live),
            opener,
            kept: RefCell::default(),
            quiet: Cell::default(),
        });
        self.views.borrow_mut().push(Rc::downgrade(&view));
        Ok(Some(view))
    }
}

impl<S: Storage> View<S> {
    pub(super) fn add_live(&self, interval: Rc<Interval<S::File>>) {
        let mut live = self.live.borrow_mut();
        if !live.iter().any(|i| Rc::ptr_eq(i, &interval)) {
            live.push(interval);
        }
    }

    /// Nothing is kept from `position` on any more.
    pub(super) fn drop_live_from(&self, position: Position) {
        self.live.borrow_mut().retain(|interval| interval.start() < position);
        self.quiet.set(None);
    }

    /// The interval that begins at `start` was closed, and is found in the history now.
    pub(super) fn retire(&self, start: Position) {
        self.live.borrow_mut().retain(|interval| interval.start() != start);
        self.numbers.borrow_mut().end = self.history.from(start).0.end;
        self.quiet.set(None);
    }

    /// Reads `extent` as it was at the point.
    ///
    /// # Errors
    /// [`RetainError`].
    pub async fn read<D: Disk>(&self, image: &D, extent: Extent) -> Result<AlignedBuf, RetainError> {
        let mut out = AlignedBuf::zeroed(extent.len as usize);
        let mut todo = vec![extent];
        while let Some(part) = todo.pop() {
            let shape = self.history.shape();
            let pieces = self.resolve(part);
            let records = self.fetch(&pieces).await;
            let now = pieces.iter().filter(|(_, place)| matches!(place, Where::Replica));
            let now = now.map(|(piece, _)| async { (*piece, image.read(*piece).await) });
            let mut now = futures_util::stream::iter(now).buffer_unordered(FETCH_DEPTH);
            while let Some((piece, content)) = now.next().await {
                let content = content?;
                // It may have been overwritten while it was read; then its old content is in an interval by now.
                if self.resolve(piece).iter().all(|(_, place)| matches!(place, Where::Replica)) {
                    out[slot(extent, piece)].copy_from_slice(&content);
                } else {
                    todo.push(piece);
                }
            }
            drop(now);
            for (piece, place) in &pieces {
                let Some(name) = place.record() else { continue };
                match records.get(&name) {
                    Some(Ok(body)) => place.copy(body, &mut out[slot(extent, *piece)])?,
                    // Its file was merged into another one, where it is found now.
                    _ if self.history.shape() != shape => todo.push(*piece),
                    // Once more by itself, for its error.
                    _ => place.copy(&self.record(place).await?, &mut out[slot(extent, *piece)])?,
                }
            }
        }
        Ok(out)
    }

    /// The next extent at or after `offset` that may hold something else than zeroes.
    ///
    /// # Errors
    /// [`RetainError::Replica`].
    pub fn next_data<D: Disk>(&self, image: &D, offset: u64) -> Result<Option<Extent>, RetainError> {
        let size = image.size();
        if offset >= size {
            return Ok(None);
        }
        let replica = image.next_data(offset)?;
        let live = self.live.borrow().iter().filter_map(|i| i.next_from(offset)).min_by_key(|e| e.offset);
        let first = [replica, self.next_past(offset), live].into_iter().flatten().min_by_key(|e| e.offset);
        Ok(first.filter(|e| e.len > 0))
    }

    /// The next extent at or after `offset` of which an interval has the content: what the replica has there may differ.
    pub fn next_kept(&self, offset: u64) -> Option<Extent> {
        let past = self.history.next_data(offset, self.numbers.borrow().clone(), true);
        let live = self.live.borrow().iter().filter_map(|i| i.next_from(offset)).min_by_key(|e| e.offset);
        [past, live].into_iter().flatten().min_by_key(|e| e.offset).filter(|e| e.len > 0)
    }

    /// Whether some of an extent's content is in the replica, and in no interval.
    pub fn needs_replica(&self, extent: Extent) -> bool {
        self.resolve(extent).iter().any(|(_, place)| matches!(place, Where::Replica))
    }

    /// The next data of the closed intervals. Those who go through a disk ask from place to place up to the same answer.
    fn next_past(&self, offset: u64) -> Option<Extent> {
        match self.quiet.get() {
            Some((from, None)) if offset >= from => return None,
            Some((from, Some(next))) if offset >= from && offset <= next.offset => return Some(next),
            _ => {}
        }
        let next = self.history.next_data(offset, self.numbers.borrow().clone(), false);
        self.quiet.set(Some((offset, next)));
        next
    }

    fn resolve(&self, extent: Extent) -> Vec<(Extent, Where<S::File>)> {
        let mut out = Vec::new();
        let live = self.live.borrow();
        let mut order: Vec<&Rc<Interval<S::File>>> = live.iter().collect();
        order.sort_by_key(|interval| interval.start());
        for (part, found) in self.history.resolve(extent, self.numbers.borrow().clone()) {
            if let Some((closed, spot)) = found {
                out.push((part, Where::Closed(closed, spot)));
                continue;
            }
            let mut map = OverlayMap::default();
            for (index, interval) in order.iter().enumerate() {
                interval.lookup(part).into_iter().for_each(|(piece, source)| map.insert_below(piece, Some((index, source))));
            }
            map.insert_below(part, None);
            out.extend(map.iter().map(|p| match p.source {
                Some((index, source)) => {
                    let source = Source { data_at: source.data_at.map(|at| at + p.skip as u32), ..source };
                    (p.extent, Where::Live(order[index].clone(), source))
                }
                None => (p.extent, Where::Replica),
            }));
        }
        out
    }

    /// Every record that `pieces` need, each once.
    async fn fetch(&self, pieces: &[(Extent, Where<S::File>)]) -> HashMap<RecordName, Result<Rc<AlignedBuf>, RetainError>> {
        let mut wanted: HashMap<RecordName, &Where<S::File>> = HashMap::new();
        for (_, place) in pieces {
            if let Some(name) = place.record() {
                wanted.entry(name).or_insert(place);
            }
        }
        let reads = wanted.into_iter().map(|(name, place)| async move { (name, self.record(place).await) });
        futures_util::stream::iter(reads).buffer_unordered(FETCH_DEPTH).collect().await
    }

    /// The opened record that has a piece's content.
    async fn record(&self, place: &Where<S::File>) -> Result<Rc<AlignedBuf>, RetainError> {
        let name = place.record().unwrap_or_default();
        let kept = self.kept.borrow().iter().find(|(n, _)| *n == name).map(|(_, body)| body.clone());
        if let Some(body) = kept {
            return Ok(body);
        }
        let body = match place {
            Where::Closed(closed, spot) => self.history.read(closed, *spot, &self.opener).await?,
            Where::Live(interval, source) => interval.read(*source, &self.opener).await?,
            Where::Replica => return Ok(Rc::new(AlignedBuf::zeroed(0))),
        };
        let mut kept = self.kept.borrow_mut();
        kept.push_front((name, body.clone()));
        kept.truncate(RECORDS_KEPT);
        Ok(body)
    }
}

impl<F: File> Where<F> {
    fn copy(&self, body: &[u8], out: &mut [u8]) -> Result<(), RetainError> {
        let (at, damaged) = match self {
            Where::Closed(closed, spot) => (spot.data_at, closed.damaged(*spot)),
            Where::Live(interval, source) => (source.data_at, interval.damaged(*source)),
            Where::Replica => return Ok(()),
        };
        let at = at.unwrap_or_default() as usize;
        out.copy_from_slice(body.get(at..at + out.len()).ok_or(damaged)?);
        Ok(())
    }
}

/// Where a piece of `extent` stands in a buffer of it.
fn slot(extent: Extent, piece: Extent) -> Range<usize> {
    let at = (piece.offset - extent.offset) as usize;
    at..at + piece.len as usize
}
