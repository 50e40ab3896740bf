//! One checkpoint of one replica, see [`super`].

use std::io;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use thiserror::Error;

use super::Apply;
use super::overwrite::overwrite;
use super::plan::{Content, Cut, plan, writes};
use super::replica::Replica;
use crate::clock;
use crate::config::limits::APPLY_DEPTH;
use crate::crypto::pki::Role;
use crate::crypto::seal::OpenError;
use crate::disk::{Disk, DiskError};
use crate::master_target::catalogue::Stand;
use crate::master_target::points::Changes;
use crate::master_target::retain::RetainError;
use crate::master_target::shared::{Item, Newest};
use crate::model::change::GROUP_SUBJECT;
use crate::model::{Extent, Hold, Marker, PointId, Position, Rung, Trailer, position::assert_ladder};
use crate::observe::metrics;
use crate::storage::catalogue::CatalogueError;
use crate::storage::log::LogError;
use crate::storage::uring::is_full;
use crate::wire::WireError;

/// Why a replica cannot go on.
#[derive(Debug, Error)]
pub enum ApplyError {
    /// The image.
    #[error(transparent)]
    Replica(#[from] DiskError),
    /// The retention journal.
    #[error(transparent)]
    Retain(#[from] RetainError),
    /// The journal.
    #[error(transparent)]
    Journal(#[from] LogError),
    /// A batch in the journal.
    #[error("a journaled batch does not open: {0}")]
    Batch(#[from] OpenError),
    /// A batch in the journal.
    #[error("a journaled batch is malformed: {0}")]
    Wire(#[from] WireError),
    /// A batch in the journal.
    #[error("the journaled batch {end} does not continue {at}")]
    Gap {
        /// Where the replica stands.
        at: Position,
        /// The batch's end.
        end: Position,
    },
    /// Metadata.
    #[error(transparent)]
    Catalogue(#[from] CatalogueError),
    /// Something else.
    #[error("{0}")]
    Io(#[from] io::Error),
}

impl ApplyError {
    /// Whether a batch in the journal is not what was written there.
    pub fn is_damaged_batch(&self) -> bool {
        match self {
            ApplyError::Journal(error) => error.is_lost(),
            other => matches!(other, ApplyError::Batch(_) | ApplyError::Wire(_) | ApplyError::Gap { .. }),
        }
    }
}

/// Whether `items` continue a replica's checkpoint without a gap (INV-03): nothing else is ever written to it.
///
/// # Errors
/// [`ApplyError::Gap`].
pub fn check_continues(checkpoint: Position, items: &[Item]) -> Result<(), ApplyError> {
    let mut at = checkpoint;
    for item in items {
        if !at.accepts(item.end.epoch, item.first) {
            return Err(ApplyError::Gap { at, end: item.end });
        }
        at = at.max(item.end);
    }
    Ok(())
}

/// Applies `items`, which continue the replica's checkpoint and were opened.
///
/// # Errors
/// [`ApplyError`]; the replica is left for the next start, which repeats the checkpoint.
pub async fn run(apply: &Apply, replica: &Replica, mut items: Vec<Item>) -> Result<(), ApplyError> {
    let mut bodies = Vec::with_capacity(items.len());
    for item in &mut items {
        let (header, body) = item.body.take().expect("opened before");
        apply.shared.body_bytes.fetch_sub(body.len() as u64, Ordering::Relaxed);
        bodies.push((header, body.freeze()));
    }
    let cuts = plan(bodies.iter().map(|(header, body)| (header, &body[..])))?;
    let mut arrivals: Vec<Arrival> = Vec::new();
    let mut verdicts = Vec::new();
    for cut in &cuts {
        let passed: Vec<_> = arrivals.iter().map(|(position, ..)| *position).collect();
        apply_cut(apply, replica, cut, &bodies, &passed).await?;
        if let Some((position, Trailer::Digest(digest), _)) = &cut.end {
            verdicts.extend(super::compare::answer(apply, replica, *position, digest, &passed).await?);
        }
        if let Some((position, Trailer::Mark(marker), index)) = &cut.end {
            patiently(replica, async || Ok(replica.retention.begin(*position).await?)).await?;
            replica.last_marker.set(Some(*position));
            replica.wounds.marked(*position);
            let mut marker = marker.clone();
            apply.judge_group(&mut marker, &replica.shared.label);
            arrivals.push((*position, marker, items[*index].travel));
        }
    }
    let Some(end) = items.last().map(|item| item.end) else { return Ok(()) };
    replica.shared.condition().applied = end;
    replica.image.barrier().await?;
    let grown = replica.retention.take_grown();
    patiently(replica, async || note(apply, replica, end, &arrivals, &grown).await).await?;
    patiently(replica, async || super::compare::settle(apply, replica).await).await?;
    verdicts.into_iter().for_each(|verdict| replica.shared.tell_verdict(verdict));
    let locations: Vec<_> = items.iter().map(|item| item.location).collect();
    let bytes = locations.iter().map(|l| l.stored_bytes()).sum::<u64>();
    replica.shared.queue_bytes.fetch_sub(bytes, Ordering::Relaxed);
    apply.journal.release(locations).await;
    patiently(replica, async || expire(apply, replica).await).await
}

/// Keeps old content, then writes new content.
async fn apply_cut(
    apply: &Apply,
    replica: &Replica,
    cut: &Cut,
    bodies: &[(crate::wire::batch::BatchHeader, Bytes)],
    arrived: &[Position],
) -> Result<(), ApplyError> {
    let extents: Vec<_> = writes(cut).collect();
    let keep = async |piece: &[(Extent, Content)]| {
        let preserve = async |extents: Vec<Extent>| {
            patiently(replica, async || Ok(replica.retention.preserve(&replica.image, extents.iter().copied()).await?)).await
        };
        let extents: Vec<Extent> = piece.iter().map(|(extent, _)| *extent).collect();
        match preserve(extents.clone()).await {
            // Old content that its disk does not give back is lost to the points that need it, and to nobody else.
            Err(ApplyError::Retain(error)) if error.is_unreadable_replica() => {
                preserve(super::compare::leave_out_unreadable(apply, replica, &extents, arrived).await?).await
            }
            other => other,
        }
    };
    let write = |extent: Extent, content: Content| async move {
        match content.data_at {
            Some(at) => {
                let data = bodies[content.batch].1.slice(at as usize..at as usize + extent.len as usize);
                patiently(replica, async || Ok(replica.image.write(extent.offset, data.clone()).await?)).await
            }
            None => patiently(replica, async || Ok(replica.image.zero(extent).await?)).await,
        }
    };
    overwrite(&extents, APPLY_DEPTH, replica.retention.is_keeping().then_some(keep), write).await?;
    extents.iter().for_each(|(extent, _)| replica.wounds.overwritten(*extent));
    let written = extents.iter().map(|(extent, _)| extent.len).sum();
    metrics::disk_count(metrics::APPLIED_BYTES, &replica.shared.label, written);
    let (memory, image) = replica.retention.take_kept();
    metrics::kept(&replica.shared.label, memory, image);
    Ok(())
}

/// Repeats an operation while the file system is full; the disk says so meanwhile, others go on.
pub(super) async fn patiently(replica: &Replica, mut operation: impl AsyncFnMut() -> Result<(), ApplyError>) -> Result<(), ApplyError> {
    let mut waited = false;
    loop {
        let result = operation().await;
        let full = match &result {
            Err(ApplyError::Replica(DiskError::Io { source, .. })) => is_full(source),
            Err(ApplyError::Retain(e)) => e.io_error().is_some_and(is_full),
            Err(ApplyError::Catalogue(e)) => e.is_full(),
            _ => false,
        };
        if !full {
            if waited {
                replica.shared.condition().error = None;
                tracing::info!(disk = replica.shared.label, "space is available again; the replica goes on");
            }
            return result;
        }
        if let (false, Err(error)) = (waited, &result) {
            let message = format!("the file system is full ({error}): free space or enlarge it, the replica goes on by itself");
            tracing::error!(disk = replica.shared.label, message);
            replica.shared.condition().error = Some(message);
        }
        waited = true;
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}

impl Apply {
    /// A marker is a part of a group's point only if a coordinator has signed that: else it is a point of its machine alone.
    fn judge_group(&self, marker: &mut Marker, disk: &str) {
        let proof = std::mem::take(&mut marker.proof);
        let Some(group) = marker.group.clone() else { return };
        let refused = match marker.group_statement().map(|s| self.verifier.verify(Role::Coordinator, GROUP_SUBJECT, &s, &proof)) {
            Some(Ok(())) if marker.point != PointId::part(group.point, marker.machine) => "it is another point of the machine".to_owned(),
            Some(Ok(())) if !group.members.contains(&marker.machine) => "the machine is not in it".to_owned(),
            Some(Ok(())) => return,
            Some(Err(error)) => error.to_string(),
            None => "it cannot be read".to_owned(),
        };
        metrics::count_reason(metrics::REFUSED, "group-point");
        tracing::warn!(disk, group = %group.group, point = %group.point, reason = refused, "a part of a group's point is not accepted as such; the machine's own point is");
        marker.group = None;
    }
}

type Arrival = (crate::model::Position, Box<Marker>, Option<crate::master_target::shared::Travel>);

/// Makes the checkpoint durable in the catalogue, with what it did to the points.
async fn note(apply: &Apply, replica: &Replica, end: Position, arrivals: &[Arrival], grown: &[(Position, u64)]) -> Result<(), ApplyError> {
    let disk = &replica.shared;
    let configured = apply.shared.disks_of(disk.machine);
    // Points change only here and in `expire`, under this lock, on this thread.
    let _alone = apply.shared.noting.lock().await;
    let clock_now = apply.shared.clock();
    for missing in configured.iter().filter(|id| arrivals.iter().any(|(_, marker, _)| !marker.disks.contains(id))) {
        if let Some(missing) = apply.shared.disk(*missing) {
            missing.condition().refused = Some(format!(
                "the agent of {} does not have disk {}, so points of the machine pause: add it to the agent's configuration, or take it out of the master target's",
                missing.machine_name, missing.name
            ));
        }
    }
    let mut changes: Vec<Changes> = Vec::new();
    if !arrivals.is_empty() {
        let mut trial = apply.shared.book().excerpt(arrivals.iter().map(|(_, marker, _)| marker.point));
        for (position, marker, _) in arrivals {
            let change = trial.arrive(disk.id, *position, marker, &configured, clock_now);
            trial.commit(change.clone());
            changes.push(change);
        }
    }
    let (records, id, last_marker, batch) = (apply.records.clone(), disk.id, replica.last_marker.get(), changes.clone());
    let stand = Stand { checkpoint: end, last_marker, damage: replica.wounds.noted(), grown: grown.to_vec() };
    let noted = tokio::task::spawn_blocking(move || records.checkpoint(id, &stand, &batch, clock_now)).await;
    noted.map_err(|e| io::Error::other(e.to_string()))??;
    replica.noted_marker.set(last_marker);
    let now = clock::now();
    {
        let mut book = apply.shared.book();
        for change in changes.clone() {
            book.commit(change);
        }
    }
    for ((_, marker, travel), change) in arrivals.iter().zip(&changes) {
        if let Some(travel) = travel {
            replica.arrived.borrow_mut().insert(marker.point, *travel);
        }
        if let Some(point) = &change.listed {
            apply.point_listed(point.id, now);
        }
    }
    let mut condition = disk.condition();
    condition.checkpointed = end;
    condition.retained_bytes = replica.retention.bytes();
    let rungs = [
        (Rung::Received, condition.received),
        (Rung::Journaled, condition.journaled),
        (Rung::Applied, condition.applied),
        (Rung::Checkpointed, condition.checkpointed),
    ];
    drop(condition);
    assert_ladder(&rungs);
    Ok(())
}

impl Apply {
    /// Notes for every disk how the marker of a point that was listed travelled.
    fn point_listed(&self, point: crate::model::PointId, now: clock::Mono) {
        for replica in self.replicas.borrow().values() {
            let mut arrived = replica.arrived.borrow_mut();
            if let Some(travel) = arrived.remove(&point) {
                replica.shared.condition().newest = Some(Newest { travel, apply: now.since(travel.received) });
                // Markers that came before belong to points that were listed or given up.
                arrived.retain(|_, other| other.received > travel.received);
            }
        }
    }
}

/// Drops points beyond the policy, then what only they needed.
pub(super) async fn expire(apply: &Apply, replica: &Replica) -> Result<(), ApplyError> {
    // For space they go one at a time: what the next would give back is known when the one before is gone.
    while expire_some(apply, replica).await? {}
    Ok(())
}

/// True if a point went.
async fn expire_some(apply: &Apply, replica: &Replica) -> Result<bool, ApplyError> {
    let _alone = apply.shared.noting.lock().await;
    // A failover may want any of them; it chooses under the same lock.
    if replica.shared.condition().hold != Hold::None {
        return Ok(false);
    }
    let policy = apply.policy.now(replica.shared.machine_name.as_str());
    let machine = replica.shared.machine;
    let no_space = policy.space_max.is_some_and(|most| apply.shared.retained_bytes(machine) > most);
    let span = policy.span.unwrap_or(Duration::MAX).min(policy.ladder.span());
    let stale = apply.shared.book().stale_bad(machine, span, apply.shared.clock(), no_space);
    let released = !stale.is_empty();
    if released {
        let (records, noted) = (apply.records.clone(), stale.clone());
        let noted = tokio::task::spawn_blocking(move || records.mark_bad(&noted, &[])).await;
        noted.map_err(|e| io::Error::other(e.to_string()))??;
        apply.shared.book().replace_bad(stale);
    }
    let (gone, hopeless): (Vec<_>, _) = {
        let used = apply.shared.retained_bytes(machine);
        let (book, clock) = (apply.shared.book(), apply.shared.clock());
        let gone = book.expired(machine, &policy, clock, used).into_iter().map(|(id, _)| id).collect();
        (gone, book.hopeless(machine, policy.points_max, policy.span.unwrap_or(policy.ladder.span()), clock))
    };
    if !gone.is_empty() || !hopeless.is_empty() {
        let (records, points) = (apply.records.clone(), [&gone[..], &hopeless].concat());
        let unlisted = tokio::task::spawn_blocking(move || records.unlist(&points)).await;
        unlisted.map_err(|e| io::Error::other(e.to_string()))??;
        let mut book = apply.shared.book();
        book.unlist(&gone);
        book.forget_pending(&hopeless);
    }
    // Of all disks of the machine: a point that went gives back space on each of them.
    let replicas: Vec<_> = apply.replicas.borrow().values().filter(|r| r.shared.machine == replica.shared.machine).cloned().collect();
    for other in replicas {
        // A checkpoint of it that runs now may have passed markers, and kept what their points need, which the book learns
        // of only when it is noted: what begins at the marker noted last, or later, stays.
        let Some(noted) = other.noted_marker.get() else { continue };
        let needed = apply.shared.book().oldest_needed(other.shared.id);
        let needed = Some(needed.map_or(noted, |needed| needed.min(noted)));
        // Forgotten before they go, so that a file that is noted and not there was lost.
        let unneeded = other.retention.unneeded(needed);
        if !unneeded.is_empty() {
            let (records, id) = (apply.records.clone(), other.shared.id);
            let forgotten = tokio::task::spawn_blocking(move || records.forget_intervals(id, &unneeded)).await;
            forgotten.map_err(|e| io::Error::other(e.to_string()))??;
        }
        if let Err(error) = other.retention.forget_before(needed) {
            tracing::warn!(disk = other.shared.label, %error, "old content that nobody needs could not be removed; it is tried again");
        }
        other.shared.condition().retained_bytes = other.retention.bytes();
    }
    let bytes = replica.retention.bytes();
    replica.shared.condition().retained_bytes = bytes;
    metrics::disk_gauge(metrics::RETAINED_BYTES, &replica.shared.label, metrics::number(bytes));
    Ok(released || !gone.is_empty())
}
