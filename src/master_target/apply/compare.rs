//! Compares the replica with a digest of the source, at the digest's place in the stream: everything before it is written,
//! nothing after it. What is found goes to the agent, which sends what differs; nothing is changed here.
//!
//! In a scrub a difference is damage. Then the points that have it are those for which the replica has the content there: they
//! become unusable, and so does every point that is made before what differs was sent again.

use std::cell::RefCell;

use super::Apply;
use super::checkpoint::{ApplyError, patiently};
use super::plan::can_judge;
use super::replica::Replica;
use crate::disk::Disk;
use crate::master_target::bad;
use crate::master_target::catalogue::Damage;
use crate::model::digest::{DIGEST_BLOCK, TOLD_BYTES_MAX};
use crate::model::{BLOCK, Digest, Extent, OverlayMap, PointId, Position, Verdict};
use crate::observe::metrics;
use crate::storage::AlignedBuf;
use crate::storage::digest::{hash_blocks, hash_zeroes};

/// Pieces of damage that the agent is told of when a stream is opened; the rest with the next.
const TOLD_MAX: usize = 4096;
/// Places of damage that are kept apart; more become one that spans them.
const WOUNDS_MAX: usize = 1024;

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

    /// What is not overwritten yet, in pieces of [`TOLD_BYTES_MAX`].
    pub fn open(&self) -> Vec<Extent> {
        let damage = self.0.borrow();
        let pieces = damage.open.iter().flat_map(|wound| {
            let starts = (wound.offset..wound.end()).step_by(TOLD_BYTES_MAX as usize);
            starts.map(|at| Extent::new(at, TOLD_BYTES_MAX.min(wound.end() - at)))
        });
        pieces.take(TOLD_MAX).collect()
    }

    fn add(&self, differs: &[Extent], touched: &[Position]) {
        let mut damage = self.0.borrow_mut();
        damage.touched.extend(touched);
        damage.touched.sort_unstable();
        damage.touched.dedup();
        let mut all = OverlayMap::default();
        damage.open.iter().chain(differs).for_each(|extent| all.insert(*extent, ()));
        damage.open = all.iter().map(|piece| piece.extent).collect();
        if damage.open.len() > WOUNDS_MAX {
            let (first, last) = (damage.open[0].offset, damage.open.last().map_or(0, Extent::end));
            damage.open = vec![Extent::new(first, last - first)];
        }
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
    if !can_judge(digest, at, replica.blind_until.get()) {
        return Ok(None);
    }
    let extent = digest.extent;
    // Checked when it was received; a replica never shrinks.
    let data = replica.image.next_data(extent.offset)?.filter(|d| d.offset < extent.end());
    let ours = match data {
        None => hash_zeroes(extent.len),
        Some(_) => match replica.image.read(extent).await {
            Ok(content) => hashed(content).await?,
            // What cannot be read differs: it is sent again, and nothing waits for a disk to be whole.
            Err(error) if error.is_unreadable() => {
                tracing::error!(disk = replica.shared.label, %error, offset = extent.offset, "a part of the replica cannot be read: it is sent again. Check its storage");
                let mut ours = Vec::new();
                for (index, block) in blocks(extent).enumerate() {
                    match replica.image.read(block).await {
                        Ok(content) => ours.extend(hashed(content).await?),
                        Err(_) => ours.push(digest.hashes.get(index).copied().unwrap_or_default().map(|byte| !byte)),
                    }
                }
                ours
            }
            Err(error) => return Err(error.into()),
        },
    };
    let verdict = Verdict { at, extent, differs: digest.differs(&ours) };
    if digest.scrub {
        wound(apply, replica, &verdict.differs, arrived).await?;
        return Ok(Some(verdict));
    }
    replica.shared.add_verdict(verdict);
    Ok(None)
}

/// The parts of `extents` whose old content can be read; the rest is damage like any other.
///
/// # Errors
/// [`ApplyError`]; the damage could not be noted.
pub async fn leave_out_unreadable(
    apply: &Apply,
    replica: &Replica,
    extents: &[Extent],
    arrived: &[Position],
) -> Result<Vec<Extent>, ApplyError> {
    let (mut good, mut lost) = (Vec::new(), Vec::new());
    // Whole blocks, as they are kept: one that was kept for its other part would be read again.
    let size = replica.image.size();
    for block in extents.iter().flat_map(|extent| blocks(extent.aligned_out(BLOCK, size))) {
        match replica.image.read(block).await {
            Ok(_) => good.push(block),
            Err(error) if error.is_unreadable() => lost.push(block),
            Err(error) => return Err(error.into()),
        }
    }
    tracing::error!(
        disk = replica.shared.label,
        places = lost.len(),
        "old content of the replica cannot be read: the points that need it are taken off the list. Check its storage"
    );
    wound(apply, replica, &lost, arrived).await?;
    Ok(good)
}

/// The parts of an extent between multiples of [`DIGEST_BLOCK`].
fn blocks(extent: Extent) -> impl Iterator<Item = Extent> {
    let starts = (extent.offset / DIGEST_BLOCK..extent.end().div_ceil(DIGEST_BLOCK)).map(|block| block * DIGEST_BLOCK);
    starts.map(move |start| {
        let from = start.max(extent.offset);
        Extent::new(from, (start + DIGEST_BLOCK).min(extent.end()) - from)
    })
}

/// Off the thread that does I/O.
async fn hashed(content: AlignedBuf) -> Result<Vec<[u8; 32]>, std::io::Error> {
    tokio::task::spawn_blocking(move || hash_blocks(&content)).await.map_err(|e| std::io::Error::other(e.to_string()))
}

/// Notes damage, and finds the points that have it: content of a point is in the replica where no interval from it on has it, so
/// if a point has the damage, all later ones have.
async fn wound(apply: &Apply, replica: &Replica, differs: &[Extent], arrived: &[Position]) -> Result<(), ApplyError> {
    if differs.is_empty() {
        return Ok(());
    }
    let bytes: u64 = differs.iter().map(|e| e.len).sum();
    metrics::disk_count(metrics::SCRUB_DIFFERING_BYTES, &replica.shared.label, bytes);
    let mut places: Vec<Position> = apply.shared.book().with_disk(replica.shared.id).into_iter().map(|(_, at, _)| at).collect();
    places.extend(arrived);
    places.sort_unstable();
    places.dedup();
    let (mut low, mut high) = (0, places.len());
    while low < high {
        let middle = low + (high - low) / 2;
        let has = match replica.retention.view(places[middle]).await {
            Ok(view) => differs.iter().any(|extent| view.needs_replica(*extent)),
            // It cannot be told: rather off the list than wrong.
            Err(_) => true,
        };
        if has { high = middle } else { low = middle + 1 }
    }
    tracing::error!(
        disk = replica.shared.label,
        offset = differs[0].offset,
        bytes,
        points = places.len() - low,
        "the replica is not what its source has: the storage of one of them is damaged. It is sent again; the points that have it are taken off the list"
    );
    replica.wounds.add(differs, &places[low..]);
    // Durable before the next batch overwrites it: after a crash nobody would find it again, and older points would keep it.
    patiently(replica, async || {
        let (records, id, damage) = (apply.records.clone(), replica.shared.id, replica.wounds.noted());
        let noted = tokio::task::spawn_blocking(move || records.put_damage(id, &damage)).await;
        Ok(noted.map_err(|e| std::io::Error::other(e.to_string()))??)
    })
    .await
}

/// Takes the points off the list that have damage, once their markers are noted.
///
/// # Errors
/// Those of the catalogue.
pub async fn settle(apply: &Apply, replica: &Replica) -> Result<(), ApplyError> {
    // They stay in the note until the next checkpoint: taking them off twice changes nothing. Those whose markers are not noted
    // yet stay here, too.
    let noted = replica.shared.condition().checkpointed;
    let touched: Vec<Position> = replica.wounds.0.borrow_mut().touched.extract_if(.., |at| *at <= noted).collect();
    if touched.is_empty() {
        return Ok(());
    }
    let points = apply.shared.book().with_disk(replica.shared.id);
    let bad: Vec<PointId> = points.into_iter().filter(|(_, at, _)| touched.contains(at)).map(|(id, ..)| id).collect();
    let cause = "source and replica differed: one of the two was damaged; the replica now holds what the source has";
    // Their content is kept: if it was the source that rotted, they are the only good copies.
    let marked = bad::mark(&apply.shared, &apply.records, replica.shared.id, &bad, cause, true).await;
    if let Err(error) = marked {
        replica.wounds.0.borrow_mut().touched.extend(touched);
        return Err(error.into());
    }
    Ok(())
}
