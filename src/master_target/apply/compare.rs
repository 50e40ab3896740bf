//! Compares the replica with a digest of the source, at the digest's place in the stream: everything before it is written,
//! nothing after it. What is found goes to the agent, which sends what differs; nothing is changed here.
//!
//! In a scrub a difference is damage. Then the points that have it are those for which the replica has the content there: they
//! become unusable, and so does every point that is made before what differs was sent again.

use std::cell::RefCell;

use super::Apply;
use super::checkpoint::ApplyError;
use super::replica::Replica;
use crate::disk::Disk;
use crate::master_target::bad;
use crate::master_target::catalogue::Damage;
use crate::model::{Digest, Extent, OverlayMap, PointId, Position, Verdict};
use crate::observe::metrics;
use crate::storage::digest::{hash_blocks, hash_zeroes};

/// Damage that was found in a replica and not overwritten since.
pub struct Wounds(RefCell<Damage>);

impl Wounds {
    /// As it was noted with the last checkpoint.
    pub fn new(damage: Damage) -> Self {
        Self(RefCell::new(damage))
    }

    /// To be noted with a checkpoint.
    pub fn noted(&self) -> Damage {
        self.0.borrow().clone()
    }

    /// An extent is overwritten.
    pub fn overwritten(&self, extent: Extent) {
        let mut damage = self.0.borrow_mut();
        if damage.open.is_empty() {
            return;
        }
        let mut left = Vec::new();
        for wound in damage.open.drain(..) {
            let mut map = OverlayMap::default();
            map.insert(wound, false);
            map.insert(extent, true);
            left.extend(map.overlapping(wound).into_iter().filter(|p| !p.source).map(|p| p.extent));
        }
        damage.open = left;
    }

    /// A marker stands here.
    pub fn marked(&self, at: Position) {
        let mut damage = self.0.borrow_mut();
        if !damage.open.is_empty() {
            damage.touched.push(at);
        }
    }
}

/// Compares. `arrived` are markers that came since the last checkpoint was noted. The verdict of a scrub is returned, for the agent
/// once what it means is durable: the agent sends what differs only once. None if the replica cannot be judged here; the
/// agent asks again.
///
/// # Errors
/// [`ApplyError::Replica`]; the replica cannot be read.
pub async fn answer(
    apply: &Apply,
    replica: &Replica,
    at: Position,
    digest: &Digest,
    arrived: &[Position],
) -> Result<Option<Verdict>, ApplyError> {
    if digest.scrub && at <= replica.blind_until.get() {
        return Ok(None);
    }
    let extent = digest.extent;
    // Checked when it was received; a replica never shrinks.
    let data = replica.image.next_data(extent.offset)?.filter(|d| d.offset < extent.end());
    let ours = match data {
        None => hash_zeroes(extent.len),
        Some(_) => {
            let content = replica.image.read(extent).await?;
            // Off the thread that does I/O.
            let hashed = tokio::task::spawn_blocking(move || hash_blocks(&content)).await;
            hashed.map_err(|e| std::io::Error::other(e.to_string()))?
        }
    };
    let verdict = Verdict { at, extent, differs: digest.differs(&ours) };
    if digest.scrub {
        wound(apply, replica, &verdict, arrived).await;
        return Ok(Some(verdict));
    }
    replica.shared.add_verdict(verdict);
    Ok(None)
}

/// Notes damage, and finds the points that have it: content of a point is in the replica where no interval from it on has it, so
/// if a point has the damage, all later ones have.
async fn wound(apply: &Apply, replica: &Replica, verdict: &Verdict, arrived: &[Position]) {
    if verdict.differs.is_empty() {
        return;
    }
    let bytes: u64 = verdict.differs.iter().map(|e| e.len).sum();
    metrics::disk_count(metrics::SCRUB_DIFFERING_BYTES, &replica.shared.label, bytes);
    let mut places: Vec<Position> = apply.shared.book().with_disk(replica.shared.id).into_iter().map(|(_, at, _)| at).collect();
    places.extend(arrived);
    places.sort_unstable();
    places.dedup();
    let (mut low, mut high) = (0, places.len());
    while low < high {
        let middle = low + (high - low) / 2;
        let has = match replica.retention.view(places[middle]).await {
            Ok(view) => verdict.differs.iter().any(|extent| view.needs_replica(*extent)),
            // Old content that cannot be read is another matter.
            Err(_) => false,
        };
        if has { high = middle } else { low = middle + 1 }
    }
    tracing::error!(
        disk = replica.shared.label, at = %verdict.at, offset = verdict.differs[0].offset, bytes, points = places.len() - low,
        "the replica is not what its source has: the storage of one of them is damaged. It is sent again; the points that have it are taken off the list"
    );
    let mut damage = replica.wounds.0.borrow_mut();
    damage.touched.extend(&places[low..]);
    damage.open.extend(&verdict.differs);
}

/// Takes the points off the list that have damage, once their markers are noted.
///
/// # Errors
/// Those of the catalogue.
pub async fn settle(apply: &Apply, replica: &Replica) -> Result<(), ApplyError> {
    // They stay in the note until the next checkpoint: taking them off twice changes nothing.
    let touched = std::mem::take(&mut replica.wounds.0.borrow_mut().touched);
    if touched.is_empty() {
        return Ok(());
    }
    let points = apply.shared.book().with_disk(replica.shared.id);
    let bad: Vec<PointId> = points.into_iter().filter(|(_, at, _)| touched.contains(at)).map(|(id, ..)| id).collect();
    let cause = "a comparison with the source found damage in the replica, which was healed since";
    bad::mark(&apply.shared, &apply.records, replica.shared.id, &bad, cause).await?;
    Ok(())
}
