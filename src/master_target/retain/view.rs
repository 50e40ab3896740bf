//! A disk as it was at a point, while the replica goes on.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::rc::Rc;
use std::sync::{Arc, LazyLock};

use bytes::Bytes;
use futures_util::StreamExt;
use tokio::sync::Semaphore;

use super::atlas::Spot;
use super::history::{Closed, History};
use super::index::Source;
use super::interval::Interval;
use super::portion::{FETCH_DEPTH, Kept, Piece, Portion, Record, RecordName, joined, part_of};
use super::record::Sealed;
use super::{RetainError, Retention};
use crate::crypto::seal::{OpenError, Opener};
use crate::disk::Disk;
use crate::model::{Extent, OverlayMap, Position};
use crate::storage::{File, Storage};

/// Bytes of records that take longer to open than to hand over to another thread.
const ELSEWHERE_BYTES: usize = 24 << 10;
/// Threads that open records, of all disks.
static OPENING: LazyLock<Semaphore> =
    LazyLock::new(|| Semaphore::new(std::thread::available_parallelism().map_or(1, std::num::NonZero::get)));
/// Files read at once while the atlas is made.
const LEARN_DEPTH: usize = 16;

/// A point of one disk, readable; lives on the apply thread. While it exists the caller keeps the point pinned.
pub struct View<S: Storage> {
    history: Rc<History<S>>,
    /// The closed intervals from the point on, by number. Grows when one is closed.
    numbers: RefCell<Range<u32>>,
    /// The interval that is current, and what an attempt left behind it that a crash cut off. Read in order of their begin.
    live: RefCell<Vec<Rc<Interval<S::File>>>>,
    opener: Arc<Opener>,
    /// Reads that are under way.
    reading: Cell<usize>,
    kept: Arc<Kept>,
    /// Where nothing of the closed intervals is data; the second: not even zeroes.
    quiet: [Cell<Option<Quiet>>; 2],
}

/// From where up to which extent there is nothing.
type Quiet = (u64, Option<Extent>);

/// Times that a read hands portions over before the rest is found, at most.
pub const EARLY_MAX: usize = 8;

/// Takes portions before the rest is found; is called [`EARLY_MAX`] times in a read, at most.
pub type Early<'a> = &'a dyn Fn(Vec<Portion>);

/// Pieces of one record.
type OfRecord<'a, F> = Vec<(Extent, &'a Where<F>)>;

/// A record of a read: opened here, or on its way to another thread.
enum Fetched {
    Here(Bytes),
    Elsewhere,
}

/// Counts a read while it is under way.
struct Reading<'a>(&'a Cell<usize>);

impl<'a> Reading<'a> {
    fn begin(count: &'a Cell<usize>) -> Self {
        count.set(count.get() + 1);
        Self(count)
    }
}

impl Drop for Reading<'_> {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}

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

    /// Where in the record the content begins.
    fn data_at(&self) -> usize {
        let at = match self {
            Where::Closed(_, spot) => spot.data_at,
            Where::Live(_, source) => source.data_at,
            Where::Replica => None,
        };
        at.unwrap_or_default() as usize
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
        let opener = &self.opener;
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

    /// `None` if something changed while files were read.
    async fn load_view(&self, position: Position) -> Result<Option<Rc<View<S>>>, RetainError> {
        self.learn().await;
        let (current, shape) = (self.current_start.get(), self.history.shape());
        let opener = &self.opener;
        for start in self.history.from(position).1 {
            let entries = Interval::load_entries(&self.storage, &self.dir, start, opener).await?;
            self.history.add_late(start, entries);
        }
        // Left by an attempt that a crash cut off behind the checkpoint: it comes after the current interval, and the replica
        // may hold what that attempt wrote over it. Its records may be cut off, too. Before the first point it is all there is.
        let behind: Vec<Position> =
            self.files.borrow().range(position..).map(|(p, _)| *p).filter(|p| current.is_none_or(|current| *p > current)).collect();
        let mut live = Vec::new();
        for start in behind {
            live.push(Rc::new(Interval::load(&self.storage, &self.dir, start, opener, false).await?));
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
            opener: self.opener.clone(),
            reading: Cell::new(0),
            kept: Arc::default(),
            quiet: Default::default(),
        });
        self.views.borrow_mut().push(Rc::downgrade(&view));
        Ok(Some(view))
    }
}

impl<S: Storage> View<S> {
    /// In place of what it was before its file was gone on with.
    pub(super) fn add_live(&self, interval: Rc<Interval<S::File>>) {
        let mut live = self.live.borrow_mut();
        live.retain(|other| other.start() != interval.start());
        live.push(interval);
    }

    /// Nothing is kept from `position` on any more.
    pub(super) fn drop_live_from(&self, position: Position) {
        self.live.borrow_mut().retain(|interval| interval.start() < position);
        self.quiet.iter().for_each(|quiet| quiet.set(None));
    }

    /// The interval that begins at `start` was closed, and is found in the history now.
    pub(super) fn retire(&self, start: Position) {
        self.live.borrow_mut().retain(|interval| interval.start() != start);
        self.numbers.borrow_mut().end = self.history.from(start).0.end;
        self.quiet.iter().for_each(|quiet| quiet.set(None));
    }

    /// Reads `extent` as it was at the point.
    ///
    /// # Errors
    /// [`RetainError`].
    pub async fn read<D: Disk>(&self, image: &D, extent: Extent) -> Result<Bytes, RetainError> {
        Ok(joined(extent, self.find(image, extent, None).await?).expect("nothing was handed over, so each byte is here once"))
    }

    /// The same for another thread, which puts the portions together ([`super::Gathered`]): some come early, so that it wakes and
    /// opens what is in them while the rest is read and opened here; the last are returned.
    ///
    /// # Errors
    /// [`RetainError`]; portions may have come.
    pub async fn read_for<D: Disk>(&self, image: &D, extent: Extent, early: Option<Early<'_>>) -> Result<Vec<Portion>, RetainError> {
        Ok(self.find(image, extent, early).await?.into_iter().map(Portion::open).collect())
    }

    /// What was not handed over early.
    async fn find<D: Disk>(&self, image: &D, extent: Extent, early: Option<Early<'_>>) -> Result<Vec<Piece>, RetainError> {
        let _reading = Reading::begin(&self.reading);
        let mut early = early.map(|early| (early, EARLY_MAX));
        let mut found = Vec::new();
        let mut todo = vec![extent];
        while let Some(part) = todo.pop() {
            let shape = self.history.shape();
            let pieces = self.resolve(part);
            let records = self.fetch(&pieces, &mut early).await;
            let now = pieces.iter().filter(|(_, place)| matches!(place, Where::Replica));
            let now = now.map(|(piece, _)| async { (*piece, image.read(*piece).await) });
            let mut now = futures_util::stream::iter(now).buffer_unordered(FETCH_DEPTH);
            while let Some((piece, content)) = now.next().await {
                let content = content?;
                // It may have been overwritten while it was read; then its old content is in an interval by now, or was, if the
                // replica was brought back since.
                let is_old = self.resolve(piece).iter().all(|(_, place)| matches!(place, Where::Replica));
                if is_old && self.history.shape() == shape {
                    found.push((piece, Some(content.freeze())));
                } else {
                    todo.push(piece);
                }
            }
            drop(now);
            for (piece, place) in &pieces {
                match place.record().map(|name| records.get(&name)) {
                    None if matches!(place, Where::Replica) => {}
                    None => found.push((*piece, None)),
                    Some(Some(Ok(Fetched::Here(body)))) => found.push((*piece, Some(place.part(body, *piece)?))),
                    Some(Some(Ok(Fetched::Elsewhere))) => {}
                    // Its file was merged into another one, where it is found now.
                    _ if self.history.shape() != shape => todo.push(*piece),
                    // Once more by itself, for its error.
                    _ => {
                        let body = self.sealed(place).await?.open(&self.opener).map_err(|error| place.damaged(error))?;
                        found.push((*piece, Some(place.part(&body, *piece)?)));
                    }
                }
            }
        }
        Ok(found)
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
        let first = [replica, self.next_past(offset, false), live].into_iter().flatten().min_by_key(|e| e.offset);
        Ok(first.filter(|e| e.len > 0))
    }

    /// The next extent at or after `offset` of which an interval has the content: what the replica has there may differ.
    pub fn next_kept(&self, offset: u64) -> Option<Extent> {
        let past = self.next_past(offset, true);
        let live = self.live.borrow().iter().filter_map(|i| i.next_from(offset)).min_by_key(|e| e.offset);
        [past, live].into_iter().flatten().min_by_key(|e| e.offset).filter(|e| e.len > 0)
    }

    /// Whether some of an extent's content is in the replica, and in no interval.
    pub fn needs_replica(&self, extent: Extent) -> bool {
        self.resolve(extent).iter().any(|(_, place)| matches!(place, Where::Replica))
    }

    /// The next data of the closed intervals, or the next that they have. Those who go through a disk ask from place to place up to the same answer.
    fn next_past(&self, offset: u64, zeroes: bool) -> Option<Extent> {
        let quiet = &self.quiet[usize::from(zeroes)];
        match quiet.get() {
            Some((from, None)) if offset >= from => return None,
            Some((from, Some(next))) if offset >= from && offset <= next.offset => return Some(next),
            _ => {}
        }
        let next = self.history.next_data(offset, self.numbers.borrow().clone(), zeroes);
        quiet.set(Some((offset, next)));
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

    /// Every record that `pieces` need, each once. The first half of those that a lone read needs is handed over as it was read.
    async fn fetch(
        &self,
        pieces: &[(Extent, Where<S::File>)],
        early: &mut Option<(Early<'_>, usize)>,
    ) -> HashMap<RecordName, Result<Fetched, RetainError>> {
        let mut records = HashMap::new();
        let mut wanted: HashMap<RecordName, OfRecord<'_, S::File>> = HashMap::new();
        for (piece, place) in pieces {
            let Some(name) = place.record() else { continue };
            wanted.entry(name).or_default().push((*piece, place));
        }
        // Asked once for each record: another thread keeps and drops some meanwhile, and all pieces of one have to go one way.
        wanted.retain(|name, _| match self.kept.get(*name) {
            Some(body) => records.insert(*name, Ok(Fetched::Here(body))).is_some(),
            None => true,
        });
        let mut share = if early.is_some() && self.reading.get() == 1 { wanted.len() / 2 } else { 0 };
        let reads = wanted.into_iter().map(|(name, wanted)| async move {
            let sealed = self.sealed(wanted[0].1).await;
            (name, wanted, sealed)
        });
        let mut reads = std::pin::pin!(futures_util::stream::iter(reads).buffer_unordered(FETCH_DEPTH).ready_chunks(FETCH_DEPTH));
        while let Some(read) = reads.next().await {
            let (mut portions, mut places, mut sealed) = (Vec::new(), Vec::new(), Vec::new());
            for (name, wanted, read) in read {
                match (self.kept.get(name), read) {
                    // Another read wanted it, too, and was first.
                    (Some(body), _) => drop(records.insert(name, Ok(Fetched::Here(body)))),
                    (None, Ok(sealed)) if share > 0 && early.is_some_and(|(_, times)| times > 0) => {
                        share -= 1;
                        let wanted = wanted.into_iter().map(|(piece, place)| (piece, place.data_at())).collect();
                        let (opener, kept) = (self.opener.clone(), self.kept.clone());
                        portions.push(Portion::sealed(Record { name, sealed, wanted, opener, kept }));
                        records.insert(name, Ok(Fetched::Elsewhere));
                    }
                    (None, Ok(record)) => {
                        places.push((name, wanted[0].1));
                        sealed.push(record);
                    }
                    (None, Err(error)) => drop(records.insert(name, Err(error))),
                }
            }
            if let (Some((early, times)), false) = (&mut *early, portions.is_empty()) {
                *times -= 1;
                early(portions);
            }
            let opened = self.open(sealed).await;
            for ((name, place), body) in places.into_iter().zip(opened) {
                if let Ok(body) = &body {
                    self.kept.put(name, body.clone());
                }
                records.insert(name, body.map(Fetched::Here).map_err(|error| place.damaged(error)));
            }
        }
        records
    }

    /// Opens records. This thread serves others, too, and brings replicas up to date: while others read, what takes long is left to
    /// another thread, if one has time. A single read would only wait for it to wake.
    async fn open(&self, sealed: Vec<Sealed>) -> Vec<Result<Bytes, OpenError>> {
        let bytes: usize = sealed.iter().map(Sealed::len).sum();
        let opener = self.opener.clone();
        let open = move || sealed.into_iter().map(|record| record.open(&opener)).collect();
        if bytes < ELSEWHERE_BYTES || self.reading.get() == 1 {
            return open();
        }
        // More threads than cores would open nothing sooner, and take the cores from everybody else.
        let Ok(thread) = OPENING.try_acquire() else { return open() };
        let work = move || (open(), drop(thread)).0;
        tokio::task::spawn_blocking(work).await.expect("opening does not panic and the runtime outlives this task")
    }

    async fn sealed(&self, place: &Where<S::File>) -> Result<Sealed, RetainError> {
        match place {
            Where::Closed(closed, spot) => self.history.read_sealed(closed, *spot).await,
            Where::Live(interval, source) => interval.read_sealed(*source).await,
            Where::Replica => unreachable!("the replica has no records"),
        }
    }
}

impl<F: File> Where<F> {
    /// The content of `piece`, of the record that has it.
    fn part(&self, body: &Bytes, piece: Extent) -> Result<Bytes, RetainError> {
        part_of(body, self.data_at(), piece).map_err(|error| self.damaged(error))
    }

    fn damaged(&self, error: OpenError) -> RetainError {
        match self {
            Where::Closed(closed, spot) => closed.damaged(*spot, error),
            Where::Live(interval, source) => interval.damaged(*source, error),
            Where::Replica => unreachable!("the replica has no records"),
        }
    }
}
