//! What becomes of damage in a retention journal that any reader met: exactly the points that need what was lost are taken
//! off the list, see [`crate::master_target::retain::Retention::needing`].
//!
//! The interval that a reader met is read through, so that all its losses are dealt with at once. A replica that cannot be
//! read, and a file system that fails, are no damage of the history: the reader is told, the points stay.

use std::rc::Rc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::Apply;
use super::checkpoint::ApplyError;
use super::replica::Replica;
use crate::master_target::bad;
use crate::master_target::points::Book;
use crate::master_target::retain::{Loss, RetainError};
use crate::master_target::shared::Item;
use crate::model::{DiskId, PointId, Position};
use crate::observe::metrics;

/// Work that is not urgent waits at most this long for each step while batches wait for the replica, so that it ends some
/// day on a disk that is always busy.
const STEP_ASIDE: Duration = Duration::from_secs(1);
const STEP_ASIDE_LOOKS: u32 = 20;

/// Deals with what was seen when the journal was opened: files that are gone, a damaged record in the interval that grows.
pub(super) async fn judge_found_at_start(apply: Rc<Apply>, replica: Rc<Replica>) {
    for start in replica.retention.damaged_at_start() {
        apply.inspect_one(&replica, start, None).await;
    }
}

/// What a person is told who asks for a point that became unusable.
pub(super) fn unusable(cause: &str) -> String {
    format!("this recovery point became unusable: {cause}; choose another one, see `tidegate point list`")
}

/// What a person is told who asks for a point that is not listed.
pub(super) fn why_not_listed(book: &Book, point: PointId) -> String {
    match book.get_bad(point) {
        Some(bad) => unusable(&bad.cause),
        None => format!("there is no recovery point {point}: see `tidegate point list`"),
    }
}

impl Apply {
    /// A checkpoint was cut off half-way, and what it applied is not in the journal any more: it can never be finished. The replica
    /// holds parts of what comes behind its checkpoint, and intervals that count from there. It goes back to the last point that
    /// it passed, which is exact, and from which everything is sent again; as if nothing had come since. Returns where it stands.
    ///
    /// If power goes while it is written: the same is found at the next start, and done again; intervals are only read. After it
    /// was noted, and while they are removed: the same, with what is left of them, which says the same of the replica (see
    /// [`crate::master_target::retain::Retention::drop_from`]).
    pub(super) async fn fall_back(&self, replica: &Replica) -> Result<Position, ApplyError> {
        let disk = &replica.shared;
        let stands = disk.condition().checkpointed;
        let (records, id) = (self.records.clone(), disk.id);
        let noted = replica.noted_marker.get();
        let from = noted.unwrap_or_default();
        // What is damaged of what was kept: the points that need it leave the list before anything of it goes.
        for start in replica.retention.damaged_at_start() {
            self.inspect_one(replica, start, None).await;
        }
        for start in super::roll::fall_back(&replica.image, &replica.retention, noted).await? {
            self.inspect_one(replica, start, None).await;
        }
        let starts: Vec<Position> = replica.retention.starts_from(from).into_iter().collect();
        let forgotten = tokio::task::spawn_blocking(move || match noted {
            Some(point) => records.fall_back(id, point, &starts),
            None => records.forget_intervals(id, &starts),
        });
        forgotten.await.map_err(|e| std::io::Error::other(e.to_string()))??;
        replica.retention.drop_from(from)?;
        replica.last_marker.set(noted);
        let to = noted.unwrap_or(stands);
        disk.condition().checkpointed = to;
        tracing::error!(
            disk = disk.label, from = %stands, to = %to,
            "a checkpoint was cut off half-way and cannot be finished, because a part of the journal is gone: the replica is at its last point again"
        );
        Ok(to)
    }

    /// A batch rotted in the journal before it was in the replica. It is never applied, nor what follows it; both were
    /// acknowledged, so the agent is asked for more than it thinks is missing: the disk is in nobody's hands, and whoever takes it
    /// over learns that the replica stands before what was acknowledged.
    pub(super) async fn lose_journaled(&self, replica: &Replica, items: Vec<Item>, error: &ApplyError) -> Result<(), ApplyError> {
        let disk = &replica.shared;
        metrics::count_reason(metrics::DAMAGED, "journal");
        let (records, id) = (self.records.clone(), disk.id);
        let released = tokio::task::spawn_blocking(move || records.release_disk(id)).await;
        released.map_err(|e| std::io::Error::other(e.to_string()))??;
        let mut stands = disk.condition().checkpointed;
        if replica.retention.is_ahead_of(stands) {
            stands = self.fall_back(replica).await?;
        }
        tracing::error!(disk = disk.label, %error, stands = %stands, "a batch in the journal is damaged: the disk is compared and sent again behind what the replica has. Check the storage of the journal");
        let waiting = {
            // The network thread hands batches over under this lock: what it hands over later belongs to the next life.
            let mut condition = disk.condition();
            disk.lives.fetch_add(1, Ordering::Relaxed);
            // A checkpoint that did not succeed may have come as far.
            replica.blind_until.set(replica.blind_until.get().max(condition.journaled));
            (condition.received, condition.journaled, condition.applied) = (stands, stands, stands);
            disk.clear_queue()
        };
        let gone = self.shared.drop_items(items.into_iter().chain(waiting).collect());
        disk.reopen_streams();
        self.journal.release(gone).await;
        Ok(())
    }

    /// A reader of `point`, or a merge, met `error`. Returns when the points that need what was lost are off the list.
    pub(super) async fn judge(&self, replica: &Replica, error: &RetainError, point: Option<PointId>) {
        let Some(start) = error.damaged_interval() else { return };
        let known = replica.judged.lock().await.contains(&start);
        // Somebody goes on reading a point that is off the list already.
        if known && point.is_none_or(|point| self.shared.book().get(point).is_none()) {
            return;
        }
        self.inspect_one(replica, start, None).await;
    }

    /// The same, with what the reader is to be told.
    pub(super) async fn judge_of(&self, replica: &Replica, error: &RetainError, point: PointId) -> String {
        self.judge(replica, error, Some(point)).await;
        match self.shared.book().get_bad(point) {
            Some(bad) => unusable(&bad.cause),
            None => error.to_string(),
        }
    }

    /// Reads through the next interval after `after`, slowly.
    pub(super) async fn inspect(&self, disk: DiskId, after: Option<Position>, rate: u64) -> Result<Option<Position>, String> {
        let replica = self.replicas.borrow().get(&disk).cloned().ok_or("the replica of this disk is not open")?;
        let Some(start) = replica.retention.next_interval(after) else { return Ok(None) };
        self.inspect_one(&replica, start, Some(rate)).await;
        Ok(Some(start))
    }

    async fn inspect_one(&self, replica: &Replica, start: Position, rate: Option<u64>) {
        let disk = &replica.shared;
        let pace = async |bytes: u64| {
            let Some(rate) = rate else { return };
            tokio::time::sleep(Duration::from_secs(bytes) / u32::try_from(rate.max(1)).unwrap_or(u32::MAX)).await;
            for _ in 0..STEP_ASIDE_LOOKS {
                if disk.waiting() == 0 {
                    break;
                }
                tokio::time::sleep(STEP_ASIDE / STEP_ASIDE_LOOKS).await;
            }
        };
        match replica.retention.inspect(start, pace).await {
            Ok(None) => {}
            Ok(Some(loss)) => {
                if let Err(error) = self.mark_needing(replica, &loss).await {
                    tracing::error!(disk = disk.label, %error, cause = loss.cause, "points that became unusable could not be taken off the list");
                }
                replica.judged.lock().await.insert(start);
            }
            Err(error) => {
                tracing::error!(disk = disk.label, %error, "old content could not be read, it is not known whether it is damaged")
            }
        }
    }

    async fn mark_needing(&self, replica: &Replica, loss: &Loss) -> Result<(), crate::storage::catalogue::CatalogueError> {
        let disk = replica.shared.id;
        let points = self.shared.book().with_disk(disk);
        let places: Vec<(Position, u64)> = points.iter().map(|(_, at, size)| (*at, *size)).collect();
        let needing = replica.retention.needing(loss, &places).await;
        let bad: Vec<PointId> = points.iter().filter(|(_, at, size)| needing.contains(&(*at, *size))).map(|(id, ..)| *id).collect();
        bad::mark(&self.shared, &self.records, disk, &bad, &loss.cause, false).await.map(drop)
    }
}
