//! A disk as it was at a point, while the replica goes on.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;

use super::index::Source;
use super::interval::Interval;
use super::{RetainError, Retention};
use crate::crypto::seal::Opener;
use crate::disk::{Disk, Image};
use crate::model::{Extent, OverlayMap, Position};
use crate::storage::{AlignedBuf, File, Storage};

/// Opened records kept for the next read.
const RECORDS_KEPT: usize = 32;

/// A point of one disk, readable; lives on the apply thread. While it exists the caller keeps the point pinned.
pub struct View<S: Storage> {
    /// Closed intervals, merged when the view was made: (interval, source).
    past: OverlayMap<(usize, Source)>,
    closed: Vec<Interval<S::File>>,
    /// The interval that was current then, and those that came after. Only appended to; read in order of their begin.
    live: RefCell<Vec<Rc<Interval<S::File>>>>,
    opener: RefCell<Opener>,
    kept: RefCell<VecDeque<KeptRecord>>,
}

/// An opened record, by interval and place.
type KeptRecord = ((usize, u64), Rc<AlignedBuf>);

#[derive(Clone, Copy)]
enum Where {
    Closed(usize, Source),
    Live(usize, Source),
    Replica,
}

impl<S: Storage> Retention<S> {
    /// The disk as it was at `position`, which must be the marker of a point that was not dropped.
    ///
    /// # Errors
    /// [`RetainError`].
    pub async fn view(&self, position: Position) -> Result<Rc<View<S>>, RetainError> {
        loop {
            let shape = self.shape.get();
            let view = self.load_view(position).await;
            // A file that went before it was opened was merged into another, which must be read then. The caller makes sure
            // that the point is still listed afterwards: without it, what went was not needed by others.
            if view.is_ok() || self.shape.get() == shape {
                return view;
            }
        }
    }

    async fn load_view(&self, position: Position) -> Result<Rc<View<S>>, RetainError> {
        let current = self.current_start.get();
        let starts: Vec<Position> = self.files.borrow().range(position..).map(|(p, _)| *p).filter(|p| Some(*p) != current).collect();
        let opener =
            Opener::new(self.subject.key.clone(), crate::crypto::seal::Purpose::Retention, self.subject.disk, self.subject.generation);
        let mut view = View {
            past: OverlayMap::default(),
            closed: Vec::new(),
            live: RefCell::default(),
            opener: RefCell::new(opener),
            kept: RefCell::default(),
        };
        for start in starts {
            let interval =
                Interval::load(&self.storage, &self.dir, start, &view.opener, current.is_none_or(|current| start < current)).await?;
            if current.is_some_and(|current| start > current) {
                // Left by an attempt that a crash cut off behind the checkpoint: it comes after the current interval, and
                // the replica may hold what that attempt wrote over it.
                view.add_live(Rc::new(interval));
                continue;
            }
            for (extent, source) in interval.entries() {
                view.past.insert_below(extent, (view.closed.len(), source));
            }
            view.closed.push(interval);
        }
        if self.current_start.get() != current {
            // A marker was passed while the files were read; what was current then is closed now.
            return Box::pin(self.load_view(position)).await;
        }
        if let Some(current) = &*self.current.borrow() {
            view.add_live(current.clone());
        }
        let view = Rc::new(view);
        self.views.borrow_mut().push(Rc::downgrade(&view));
        Ok(view)
    }
}

impl<S: Storage> View<S> {
    pub(super) fn add_live(&self, interval: Rc<Interval<S::File>>) {
        let mut live = self.live.borrow_mut();
        if !live.iter().any(|i| Rc::ptr_eq(i, &interval)) {
            live.push(interval);
        }
    }

    /// Reads `extent` as it was at the point.
    ///
    /// # Errors
    /// [`RetainError`].
    pub async fn read<F: File>(&self, image: &Image<F>, extent: Extent) -> Result<AlignedBuf, RetainError> {
        let mut out = AlignedBuf::zeroed(extent.len as usize);
        let mut todo = vec![extent];
        while let Some(part) = todo.pop() {
            for (piece, place) in self.resolve(part) {
                let at = (piece.offset - extent.offset) as usize;
                let slot = at..at + piece.len as usize;
                match place {
                    Where::Closed(interval, source) => self.fill(&mut out[slot], &self.closed[interval], interval, source).await?,
                    Where::Live(index, source) => {
                        let interval = self.live.borrow()[index].clone();
                        self.fill(&mut out[slot], &interval, usize::MAX - index, source).await?;
                    }
                    Where::Replica => {
                        let now = image.read(piece).await?;
                        // It may have been overwritten while it was read; then its old content is in an interval by now.
                        if self.resolve(piece).iter().all(|(_, place)| matches!(place, Where::Replica)) {
                            out[slot].copy_from_slice(&now);
                        } else {
                            todo.push(piece);
                        }
                    }
                }
            }
        }
        Ok(out)
    }

    /// The next extent at or after `offset` that may hold something else than zeroes.
    ///
    /// # Errors
    /// [`RetainError::Replica`].
    pub fn next_data<F: File>(&self, image: &Image<F>, offset: u64) -> Result<Option<Extent>, RetainError> {
        let size = image.size();
        if offset >= size {
            return Ok(None);
        }
        let replica = image.next_data(offset)?;
        let past = self.past.next_from(offset);
        let live = self.live.borrow().iter().filter_map(|i| i.next_from(offset)).min_by_key(|e| e.offset);
        let first = [replica, past, live].into_iter().flatten().min_by_key(|e| e.offset);
        Ok(first.filter(|e| e.len > 0))
    }

    /// The next extent at or after `offset` of which an interval has the content: what the replica has there may differ.
    pub fn next_kept(&self, offset: u64) -> Option<Extent> {
        let past = self.past.next_from(offset);
        let live = self.live.borrow().iter().filter_map(|i| i.next_from(offset)).min_by_key(|e| e.offset);
        [past, live].into_iter().flatten().min_by_key(|e| e.offset).filter(|e| e.len > 0)
    }

    fn resolve(&self, extent: Extent) -> Vec<(Extent, Where)> {
        let mut map = OverlayMap::default();
        for piece in self.past.overlapping(extent) {
            let (interval, source) = piece.source;
            let source = Source { data_at: source.data_at.map(|at| at + piece.skip as u32), ..source };
            map.insert_below(piece.extent, Where::Closed(interval, source));
        }
        let live = self.live.borrow();
        let mut order: Vec<usize> = (0..live.len()).collect();
        order.sort_by_key(|&index| live[index].start());
        for index in order {
            for (piece, source) in live[index].lookup(extent) {
                map.insert_below(piece, Where::Live(index, source));
            }
        }
        map.insert_below(extent, Where::Replica);
        map.iter()
            .map(|p| {
                let shift = |s: Source| Source { data_at: s.data_at.map(|at| at + p.skip as u32), ..s };
                let place = match p.source {
                    Where::Closed(interval, source) => Where::Closed(interval, shift(source)),
                    Where::Live(index, source) => Where::Live(index, shift(source)),
                    Where::Replica => Where::Replica,
                };
                (p.extent, place)
            })
            .collect()
    }

    async fn fill(&self, out: &mut [u8], interval: &Interval<S::File>, tag: usize, source: Source) -> Result<(), RetainError> {
        let Some(at) = source.data_at else {
            out.fill(0);
            return Ok(());
        };
        let key = (tag, source.record_at);
        let kept = self.kept.borrow().iter().find(|(k, _)| *k == key).map(|(_, body)| body.clone());
        let body = match kept {
            Some(body) => body,
            None => {
                let body = interval.read(source, &self.opener).await?;
                let mut kept = self.kept.borrow_mut();
                kept.push_front((key, body.clone()));
                kept.truncate(RECORDS_KEPT);
                body
            }
        };
        let content = body.get(at as usize..at as usize + out.len()).ok_or_else(|| interval.damaged(source))?;
        out.copy_from_slice(content);
        Ok(())
    }
}
