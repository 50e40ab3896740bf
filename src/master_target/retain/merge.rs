//! Gives back the space of points that were dropped from the middle: the intervals between two points that are left become
//! one, which keeps for each block only its oldest content, the only one that anybody can still ask for.
//!
//! The merged interval is written beside the others, complete and durable, then renamed over the first of them; then the
//! others are removed. If power goes
//! - before the rename: a file `*.merge` that nobody reads; removed when the journal is opened;
//! - before that, when the others are not noted any more: they are noted again by the next checkpoint after the start;
//! - between rename and removal: the others hold what the merged one hides from them; they are merged again.
//!
//! Nothing waits for a merge: the interval that grows is never part of one, and views keep the files they opened.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::Path;

use futures_util::{StreamExt, TryStreamExt};

use super::index::Source;
use super::interval::{Interval, file_name};
use super::parts::{self, Part};
use super::record::Loose;
use super::{RetainError, Retention};
use crate::crypto::seal::OpenError;
use crate::model::{Extent, OverlayMap, Position};
use crate::storage::uring::is_full;
use crate::storage::{AlignedBuf, Storage};

/// Records read at once.
const READ_DEPTH: usize = 16;
/// Intervals that are merged at once: each is an open file with its index in memory.
const MERGE_MAX: usize = 32;
/// With so many dropped intervals behind a point they are merged however little they hold.
const MANY: usize = 16;

/// Intervals that become one.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Plan {
    /// Their begins, in order. The first is the begin of the merged one.
    starts: Vec<Position>,
}

/// The next merge that is worth its work: the intervals after a dropped point hold at least half of what the one they join
/// does, or are many. So each byte is copied a number of times that grows with the logarithm of what is merged. Pure.
fn plan(
    files: impl Iterator<Item = (Position, u64)>,
    before: Option<Position>,
    needed: &BTreeSet<Position>,
    skip: &BTreeSet<Position>,
) -> Option<Plan> {
    let mut groups: Vec<Vec<(Position, u64)>> = Vec::new();
    for (start, bytes) in files.take_while(|(start, _)| before.is_some_and(|before| *start < before)) {
        match groups.last_mut() {
            // No point that is left lies between the two: what begins here serves the same points.
            Some(group)
                if group.len() < MERGE_MAX
                    && group.last().is_some_and(|(last, _)| {
                        needed.range((std::ops::Bound::Excluded(*last), std::ops::Bound::Included(start))).next().is_none()
                    }) =>
            {
                group.push((start, bytes));
            }
            _ => groups.push(vec![(start, bytes)]),
        }
    }
    let worth = |group: &&Vec<(Position, u64)>| {
        let dropped: u64 = group[1..].iter().map(|(_, bytes)| bytes).sum();
        group.len() > 1 && !skip.contains(&group[0].0) && (dropped * 2 >= group[0].1 || group.len() > MANY)
    };
    groups.iter().find(worth).map(|group| Plan { starts: group.iter().map(|(start, _)| *start).collect() })
}

impl<S: Storage> Retention<S> {
    /// Merges one run of intervals that no longer have a point between them, if that is worth it. `needed` are the positions
    /// of all points that are listed or may be, as far as markers are noted durably, which is through `noted`: what begins
    /// there or later is left alone, because its points are not in `needed` yet. True if there was something to do: call it again then.
    /// `forget` is told which intervals will go, and makes whoever noted them forget them, durably; false if it could not.
    ///
    /// # Errors
    /// [`RetainError`]; the journal is as it was, or holds the merged interval and what it hides.
    pub async fn merge_some(
        &self,
        needed: &BTreeSet<Position>,
        noted: Option<Position>,
        forget: impl AsyncFn(Vec<Position>) -> bool,
    ) -> Result<bool, RetainError> {
        let before = self.current_start.get().zip(noted).map(|(current, noted)| current.min(noted));
        let skip = self.unmergeable.borrow().clone();
        let plan = plan(self.files.borrow().iter().map(|(start, bytes)| (*start, *bytes)), before, needed, &skip);
        let Some(plan) = plan else { return Ok(false) };
        let first = plan.starts[0];
        let beside = self.dir.join(merge_name(first));
        let merged = match self.write_merged(&plan, &beside).await {
            Ok(merged) => merged,
            Err(error) => {
                // Its space may be what the replica waits for.
                let _ = self.storage.remove(&beside);
                if !error.io_error().is_some_and(is_full) {
                    self.unmergeable.borrow_mut().insert(first);
                }
                return Err(error);
            }
        };
        let forgotten = forget(plan.starts[1..].to_vec()).await;
        if !forgotten || plan.starts.iter().any(|start| !self.files.borrow().contains_key(start)) {
            // Some of it went meanwhile: what was merged is stale, the next attempt begins with what is left.
            return self.storage.remove(&beside).map(|()| forgotten).map_err(|source| RetainError::Io { path: beside.clone(), source });
        }
        // From here to the end nothing waits, so nobody sees a state in between.
        self.history.reshape();
        let io = |source| RetainError::Io { path: beside.clone(), source };
        self.storage.rename(&beside, &self.dir.join(file_name(first))).map_err(io)?;
        *self.merged.borrow_mut().entry(first).or_default() += 1;
        self.files.borrow_mut().insert(first, merged.bytes());
        // What is left of the others if this ends early is hidden by the merged one.
        self.history.replace(&plan.starts, merged.entries());
        self.storage.sync_dir(&self.dir).map_err(io)?;
        for start in &plan.starts[1..] {
            self.remove_file(*start)?;
        }
        self.storage.sync_dir(&self.dir).map_err(io)?;
        Ok(true)
    }

    /// Writes the merged interval beside the others, durably.
    async fn write_merged(&self, plan: &Plan, beside: &Path) -> Result<Interval<S::File>, RetainError> {
        let subject = &self.subject;
        let mut sources = Vec::new();
        let mut map: OverlayMap<(usize, Source)> = OverlayMap::default();
        for &start in &plan.starts {
            let interval = Interval::load(&self.storage, &self.dir, start, &self.opener, true).await?;
            for (extent, source) in interval.entries().list {
                map.insert_below(extent, (sources.len(), source));
            }
            sources.push(interval);
        }
        let merged = Interval::create_at(&self.storage, &self.dir, beside, plan.starts[0]).await?;
        // In the order in which they stand in the files, so that each record is opened once, or twice where a run ends.
        let mut pieces: Vec<(Extent, usize, Source)> = map
            .iter()
            .map(|p| {
                let (from, source) = p.source;
                (p.extent, from, Source { data_at: source.data_at.map(|at| at + p.skip as u32), ..source })
            })
            .collect();
        pieces.sort_by_key(|(extent, from, source)| (*from, source.record_at, extent.offset));
        let groups = parts::group(pieces.iter().map(|(extent, _, source)| (*extent, source.data_at.is_none())).collect());
        let mut origins = origins(&groups, &pieces).into_iter();
        for run in parts::runs(&groups) {
            let origins: Vec<(usize, Source)> = origins.by_ref().take(run.iter().map(Vec::len).sum()).collect();
            let wanted: BTreeMap<(usize, u64), Source> =
                origins.iter().filter(|(_, s)| s.data_at.is_some()).map(|(from, s)| ((*from, s.record_at), *s)).collect();
            let reads = wanted.into_iter().map(|(name, source)| {
                let read = sources[name.0].read(source, &self.opener);
                async move { Ok::<_, RetainError>((name, read.await?)) }
            });
            let bodies: HashMap<_, _> = futures_util::stream::iter(reads).buffer_unordered(READ_DEPTH).try_collect().await?;
            let mut origins = origins.into_iter();
            let mut records = Vec::with_capacity(run.len());
            for group in run {
                let mut record = Loose { parts: group.clone(), content: Vec::new() };
                for ((part, _), (from, source)) in group.iter().zip(origins.by_ref()) {
                    let Some(at) = source.data_at.map(|at| at as usize) else { continue };
                    let content = bodies.get(&(from, source.record_at)).and_then(|body| body.get(at..at + part.len as usize));
                    record.content.push(AlignedBuf::copy_of(content.ok_or_else(|| sources[from].damaged(source, OpenError::Body))?));
                }
                records.push(record);
            }
            merged.append(subject, &self.session, records).await?;
        }
        merged.publish();
        merged.close().await?;
        Ok(merged)
    }
}

/// Whose content each part is: of which interval, and where in it. `pieces` follow each other as the parts do; long ones were cut.
fn origins(groups: &[Vec<Part>], pieces: &[(Extent, usize, Source)]) -> Vec<(usize, Source)> {
    let mut todo = pieces.iter();
    let mut piece = todo.next();
    let mut origins = Vec::with_capacity(pieces.len());
    for (part, _) in groups.iter().flatten() {
        let Some((extent, from, source)) = piece else { break };
        let skipped = (part.offset - extent.offset) as u32;
        origins.push((*from, Source { data_at: source.data_at.map(|at| at + skipped), ..*source }));
        if part.end() == extent.end() {
            piece = todo.next();
        }
    }
    origins
}

/// Name of a merged interval while it is written.
fn merge_name(start: Position) -> String {
    format!("{}.merge", file_name(start))
}

/// Whether a file is left of a merge that a crash cut off.
pub(super) fn is_left_over(name: &str) -> bool {
    name.ends_with(".merge")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_cut_goes_on_where_it_was_cut() {
        let (kib, source) = (1 << 10, |at, data_at| Source { record_at: at, body_len: 1, data_at });
        let pieces = [
            (Extent::new(0, 200 * kib), 0, source(1, Some(512))),
            (Extent::new(200 * kib, 16 * kib), 1, source(1, Some(0))),
            (Extent::new(500 * kib, 900 * kib), 1, source(2, None)),
            (Extent::new(9000 * kib, 16 * kib), 1, source(3, Some(4096))),
        ];
        let groups = parts::group(pieces.iter().map(|(extent, _, s)| (*extent, s.data_at.is_none())).collect());
        let parts: Vec<_> = groups.concat();
        let found = origins(&groups, &pieces);
        assert_eq!(found.len(), parts.len());
        for ((part, _), (from, found)) in parts.iter().zip(&found) {
            let (extent, of, expected) = pieces.iter().find(|(e, ..)| e.offset <= part.offset && part.end() <= e.end()).unwrap();
            let data_at = expected.data_at.map(|at| at + (part.offset - extent.offset) as u32);
            assert_eq!((from, *found), (of, Source { data_at, ..*expected }));
        }
    }

    #[test]
    fn only_what_has_no_point_between_is_merged_and_only_when_it_pays() {
        let at = |n| Position::new(1, n);
        let needed: BTreeSet<Position> = [10, 40, 70].map(at).into();
        let planned =
            |files: &[(u64, u64)]| plan(files.iter().map(|&(s, b)| (at(s), b)), Some(at(90)), &needed, &BTreeSet::new()).map(|p| p.starts);
        assert_eq!(planned(&[(10, 100), (40, 100), (70, 100), (90, 100)]), None, "every interval has its point");
        assert_eq!(planned(&[(10, 100), (20, 100), (40, 100)]), Some(vec![at(10), at(20)]));
        assert_eq!(planned(&[(10, 1000), (20, 100), (40, 100)]), None, "not worth it yet");
        assert_eq!(planned(&[(20, 10), (30, 10), (40, 10)]), Some(vec![at(20), at(30)]), "the point's own interval is empty");
        assert_eq!(planned(&[(70, 10), (80, 10), (90, 10)]), Some(vec![at(70), at(80)]), "never the one that grows");
        let many: Vec<(u64, u64)> = (10..40).map(|n| (n, if n == 10 { 1 << 30 } else { 1 })).collect();
        assert_eq!(planned(&many[..10]), None);
        assert_eq!(planned(&many).map(|starts| starts.len()), Some(30), "many, however little they hold");
        let skip = plan(many.iter().map(|&(s, b)| (at(s), b)), Some(at(90)), &needed, &[at(10)].into());
        assert_eq!(skip, None, "what failed is left alone");
    }
}
