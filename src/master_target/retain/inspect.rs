//! Looks for damage in an interval, and for the points that need what it lost.
//!
//! Every record that holds content is read and its seal checked. Where the index of the interval is whole, exactly the
//! extents of the damaged records are lost. Without it (the index and a record are damaged, a record of the interval that
//! was growing at the last stop, the file is gone) nobody knows which extents were lost, so every point that reads the
//! interval at all is taken to need them. An index or a header alone costs nothing: the records say the same.
//!
//! An interval is never removed because of damage: points that do not need the damaged part go on reading the rest.

use std::ops::Bound;

use super::interval::{Interval, file_name};
use super::loss::Hunt;
use super::{RetainError, Retention};
use crate::crypto::seal::OpenError;
use crate::model::{Extent, Position};
use crate::storage::Storage;

/// What an interval lost.
#[derive(Clone, Debug)]
pub struct Loss {
    /// Begin of the interval.
    pub start: Position,
    /// What is damaged, for a person.
    pub cause: String,
    extents: Vec<Extent>,
    all: bool,
}

impl<S: Storage> Retention<S> {
    /// The first interval after `after`, or of all.
    pub fn next_interval(&self, after: Option<Position>) -> Option<Position> {
        let from = after.map_or(Bound::Unbounded, Bound::Excluded);
        let file = self.files.borrow().range((from, Bound::Unbounded)).next().map(|(p, _)| *p);
        let missing = self.missing.borrow().range((from, Bound::Unbounded)).next().copied();
        file.into_iter().chain(missing).min()
    }

    /// Begins of intervals of which damage was seen when the journal was opened.
    pub fn damaged_at_start(&self) -> Vec<Position> {
        let current = self.current.borrow().as_ref().filter(|i| i.lost().is_some()).map(|i| i.start());
        self.missing.borrow().iter().copied().chain(current).collect()
    }

    /// Reads every record of the interval that begins at `start` and says what it lost; `None` if it is whole or went
    /// meanwhile. `pace` is told the bytes read and may wait.
    ///
    /// # Errors
    /// [`RetainError::Io`]: then nothing is known.
    pub async fn inspect(&self, start: Position, pace: impl AsyncFn(u64)) -> Result<Option<Loss>, RetainError> {
        loop {
            let shape = self.history.shape();
            let found = self.inspect_once(start, &pace).await;
            if self.history.shape() == shape || matches!(found, Ok(None)) {
                return found;
            }
            // Files went or were merged meanwhile: it may be another file now, or none.
        }
    }

    async fn inspect_once(&self, start: Position, pace: &impl AsyncFn(u64)) -> Result<Option<Loss>, RetainError> {
        let unknown = |cause: String| Ok(Some(Loss { start, cause, extents: Vec::new(), all: true }));
        let gone = || unknown(format!("the retention file {} is gone", self.dir.join(file_name(start)).display()));
        if self.missing.borrow().contains(&start) {
            return gone();
        }
        if !self.files.borrow().contains_key(&start) {
            return Ok(None);
        }
        let opener = &self.opener;
        let growing = self.current.borrow().clone().filter(|i| i.start() == start);
        let interval = match growing {
            Some(interval) => interval,
            None => {
                match Interval::load(&self.storage, &self.dir, start, opener, self.current_start.get().is_some_and(|c| start < c)).await {
                    Ok(interval) => interval.into(),
                    Err(e @ RetainError::Damaged { .. }) => return unknown(told(&e)),
                    Err(RetainError::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => return gone(),
                    Err(e) => return Err(e),
                }
            }
        };
        if let Some(error) = interval.lost() {
            return unknown(told(&error));
        }
        let (mut extents, mut causes) = (Vec::new(), Vec::new());
        for (source, parts) in interval.records() {
            let fits = |body: &[u8], (extent, at): &(Extent, u32)| u64::from(*at) + extent.len <= body.len() as u64;
            let error = match interval.read(source, opener).await {
                Ok(body) if parts.iter().all(|part| fits(&body, part)) => None,
                Ok(_) => Some(interval.damaged(source, OpenError::Body)),
                Err(e @ RetainError::Damaged { .. }) => Some(e),
                Err(e) => return Err(e),
            };
            if let Some(error) = error {
                causes.push(told(&error));
                extents.extend(parts.into_iter().map(|(extent, _)| extent));
            }
            pace(u64::from(source.body_len)).await;
        }
        let Some(cause) = causes.first().cloned() else { return Ok(None) };
        let cause = if causes.len() > 1 { format!("{cause}, and {} more records of it", causes.len() - 1) } else { cause };
        extents.sort();
        Ok(Some(Loss { start, cause, extents, all: false }))
    }

    /// Which of `points`, each a position and the bytes the disk had there, need what was lost: their views resolve some byte
    /// to it. Those of them; everything newer than the interval never does.
    pub async fn needing(&self, loss: &Loss, points: &[(Position, u64)]) -> Vec<(Position, u64)> {
        loop {
            let shape = self.history.shape();
            let found = self.needing_once(loss, points).await;
            if self.history.shape() == shape {
                return found;
            }
        }
    }

    async fn needing_once(&self, loss: &Loss, points: &[(Position, u64)]) -> Vec<(Position, u64)> {
        let known = self.files.borrow().contains_key(&loss.start) || self.missing.borrow().contains(&loss.start);
        let mut older: Vec<Position> = self.files.borrow().range(..loss.start).map(|(p, _)| *p).collect();
        let mut hunt = Hunt::new(loss.extents.clone(), loss.all);
        let (mut needing, mut upper) = (Vec::new(), loss.start);
        let opener = &self.opener;
        while known && !hunt.is_over() {
            let lower = older.pop();
            let here = points.iter().filter(|(at, _)| *at <= upper && lower.is_none_or(|lower| *at > lower));
            needing.extend(here.filter(|(_, size)| hunt.needs(*size)));
            let Some(lower) = lower else { break };
            // One that cannot be read hides nothing: no point before it can be read either.
            if let Ok(interval) = Interval::load(&self.storage, &self.dir, lower, opener, true).await {
                hunt.pass(&interval.extents());
            }
            upper = lower;
        }
        needing
    }
}

/// Damage, without what it means.
fn told(error: &RetainError) -> String {
    match error {
        RetainError::Damaged { path, offset, source } => {
            format!("retention record damaged: {} at byte {offset}: {source}", path.display())
        }
        other => other.to_string(),
    }
}
