//! What a master target remembers: replicas, points, and how long it has run.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::bad::BadPoint;
use super::points::{Book, Changes, Pending};
use super::policy::SetValues;
use super::verify::{ScrubState, Verification};
use crate::crypto::keyring::{DataKey, KeyEncryptionKey};
use crate::disk::Format;
use crate::model::{DiskId, Extent, Job, MachineId, Name, PointId, Position, RecoveryPoint};
use crate::storage::catalogue::{Catalogue, CatalogueError, Table};
use crate::storage::log::random_u64;

const DISKS: Table = Table::new("disks");
const POINTS: Table = Table::new("points");
const PENDING: Table = Table::new("pending-points");
const JOBS: Table = Table::new("jobs");
const SERVER: Table = Table::new("server");
/// Points that became unusable.
const BAD: Table = Table::new("bad-points");
/// The last verification of each listed point.
const VERIFIED: Table = Table::new("verified-points");
/// Intervals of the retention journals: key disk and begin, value begin and durable length.
const INTERVALS: Table = Table::new("intervals");
/// How far each machine's scrub has come.
const SCRUBS: Table = Table::new("scrubs");

/// Changes with the types stored here.
const FORMAT: u32 = 8;

/// A replica's record.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReplicaRecord {
    /// The history of its data.
    pub generation: u64,
    /// The disk's data key, wrapped.
    pub wrapped_key: Vec<u8>,
    /// Bytes of the disk.
    pub size: u64,
    /// Format of the image.
    pub format: Format,
    /// The highest epoch obeyed.
    pub epoch: u64,
    /// The process server that has the disk in that epoch.
    pub carrier: Option<Name>,
    /// Everything through here is durable in the replica.
    pub checkpoint: Position,
    /// The newest marker within the checkpoint, or where a failover began: old content is kept from there on.
    pub last_marker: Option<Position>,
    /// The image, if it is not where new replicas are made: a disk that was adopted.
    pub path: Option<PathBuf>,
    /// What is known of its content.
    pub content: Content,
    /// Damage that a comparison with the source found, and that was not overwritten by the checkpoint.
    pub damage: Damage,
    /// Behind which position each epoch of the journal begins: a batch that is gone from the end of the one before is missed then.
    pub begins: BTreeMap<u64, Position>,
}

/// Where a replica stands after a checkpoint.
#[derive(Clone, Debug)]
pub struct Stand {
    /// Everything through here is durable in it.
    pub checkpoint: Position,
    /// The newest marker within.
    pub last_marker: Option<Position>,
    /// Damage that is left.
    pub damage: Damage,
    /// Intervals of old content that grew: begin and durable length.
    pub grown: Vec<(Position, u64)>,
}

/// Damage of a replica.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Damage {
    /// Where, one unit each: points that are made while it is there have it.
    pub open: Vec<Extent>,
    /// Places of markers whose points have it, to be taken off the list.
    pub touched: Vec<Position>,
}

impl ReplicaRecord {
    /// The same image with a new history: its content is what it is, and nobody has allowed it to be overwritten.
    pub fn anew(&self, kek: &KeyEncryptionKey, disk: DiskId) -> Self {
        // Never zero: zero is what an agent has that knows no replica.
        let generation = random_u64() >> 1 | 1;
        Self {
            generation,
            wrapped_key: kek.wrap(&DataKey::generate(), disk, generation),
            epoch: 0,
            carrier: None,
            checkpoint: Position::default(),
            last_marker: None,
            content: Content::Unconfirmed,
            damage: Damage::default(),
            begins: BTreeMap::new(),
            ..self.clone()
        }
    }
}

/// What is known of a replica's content.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Content {
    /// It was made empty.
    Made,
    /// It held something when it became a replica: what is sent is compared first. Nobody has said yet that it may be overwritten.
    Unconfirmed,
    /// The same, and it may be overwritten.
    Confirmed,
}

/// What becomes true together with a job's state.
#[derive(Clone, Debug, Default)]
pub struct Effects {
    /// Replicas whose old content is kept from another position on.
    pub stand: Vec<(DiskId, Option<Position>)>,
    /// Replicas with a new record.
    pub replicas: Vec<(DiskId, ReplicaRecord)>,
    /// Replicas that may be overwritten.
    pub confirmed: Vec<DiskId>,
    /// Replicas whose history is another one from here on.
    pub ended: Vec<DiskId>,
    /// Points that go.
    pub dropped: Vec<PointId>,
    /// Points off the list whose content is not kept any more.
    pub released: Vec<BadPoint>,
    /// Old jobs that go.
    pub forgotten: Vec<u64>,
}

/// A process server that is none: certificates are issued to machines and servers under other names.
fn nobody() -> Name {
    "nobody.invalid".parse().expect("a legal name")
}

/// Digits, so that the table's order is that of the numbers.
fn job_key(id: u64) -> Vec<u8> {
    format!("{id:020}").into_bytes()
}

/// The master target's catalogue.
#[derive(Clone)]
pub struct Records {
    catalogue: Catalogue,
    /// Id of the journal.
    pub journal_id: Uuid,
}

impl Records {
    /// Opens or makes the catalogue in `state`.
    ///
    /// # Errors
    /// See [`Catalogue::open`].
    pub fn open(state: &Path) -> Result<Self, CatalogueError> {
        let tables = [DISKS, POINTS, PENDING, JOBS, SERVER, BAD, VERIFIED, INTERVALS, SCRUBS];
        let catalogue = Catalogue::open(&state.join("master-target.redb"), &tables)?;
        let journal_id = catalogue.identity(SERVER, b"journal-id", FORMAT)?;
        Ok(Self { catalogue, journal_id })
    }

    /// A replica's record.
    ///
    /// # Errors
    /// Those of the catalogue.
    pub fn replica(&self, disk: DiskId) -> Result<Option<ReplicaRecord>, CatalogueError> {
        self.catalogue.get(DISKS, disk.0.as_bytes())
    }

    /// Sets a replica's record.
    ///
    /// # Errors
    /// Those of the catalogue.
    pub fn put_replica(&self, disk: DiskId, record: &ReplicaRecord) -> Result<(), CatalogueError> {
        self.catalogue.write(|batch| batch.put(DISKS, disk.0.as_bytes(), record))
    }

    /// The replica of a disk has grown to `size` bytes, durably.
    ///
    /// # Errors
    /// Those of the catalogue.
    pub fn grow_replica(&self, disk: DiskId, size: u64) -> Result<(), CatalogueError> {
        self.catalogue.write(|batch| {
            let Some(mut record) = batch.get::<ReplicaRecord>(DISKS, disk.0.as_bytes())? else { return Ok(()) };
            record.size = record.size.max(size);
            batch.put(DISKS, disk.0.as_bytes(), &record)
        })
    }

    /// A process server has a disk from now on, in a new epoch, durably.
    ///
    /// # Errors
    /// Those of the catalogue; nothing was changed then.
    pub fn take_over(&self, disk: DiskId, epoch: u64, carrier: &Name) -> Result<(), CatalogueError> {
        self.catalogue.write(|batch| {
            let Some(mut record) = batch.get::<ReplicaRecord>(DISKS, disk.0.as_bytes())? else { return Ok(()) };
            (record.epoch, record.carrier) = (record.epoch.max(epoch), Some(carrier.clone()));
            batch.put(DISKS, disk.0.as_bytes(), &record)
        })
    }

    /// No process server has a disk from now on: it takes a new epoch to send it, durably.
    ///
    /// # Errors
    /// Those of the catalogue; nothing was changed then.
    pub fn release_disk(&self, disk: DiskId) -> Result<(), CatalogueError> {
        self.catalogue.write(|batch| {
            let Some(mut record) = batch.get::<ReplicaRecord>(DISKS, disk.0.as_bytes())? else { return Ok(()) };
            // Above every epoch that may have been in the journal.
            (record.epoch, record.carrier) = (record.epoch.max(record.checkpoint.epoch).saturating_add(1), Some(nobody()));
            batch.put(DISKS, disk.0.as_bytes(), &record)
        })
    }

    /// An epoch of a disk begins behind `behind`, durably: before the first batch of it is journaled.
    ///
    /// # Errors
    /// Those of the catalogue.
    pub fn begin_epoch(&self, disk: DiskId, epoch: u64, behind: Position) -> Result<(), CatalogueError> {
        self.catalogue.write(|batch| {
            let Some(mut record) = batch.get::<ReplicaRecord>(DISKS, disk.0.as_bytes())? else { return Ok(()) };
            record.epoch = record.epoch.max(epoch);
            record.begins.insert(epoch, behind);
            batch.put(DISKS, disk.0.as_bytes(), &record)
        })
    }

    /// A replica stands at its point `to` again, durably, and keeps nothing behind it: the intervals `starts` are forgotten. What the
    /// journal holds of epochs up to now and behind `to` belongs to nobody from here on.
    ///
    /// # Errors
    /// Those of the catalogue; nothing was changed then.
    pub fn fall_back(&self, disk: DiskId, to: Position, starts: &[Position]) -> Result<(), CatalogueError> {
        self.catalogue.write(|batch| {
            let Some(mut record) = batch.get::<ReplicaRecord>(DISKS, disk.0.as_bytes())? else { return Ok(()) };
            // As when a disk is released: nothing that continues the stream from before is taken any more.
            (record.epoch, record.carrier) = (record.epoch.max(record.checkpoint.epoch).saturating_add(1), Some(nobody()));
            (record.checkpoint, record.last_marker) = (to, Some(to));
            record.begins.insert(record.epoch, to);
            batch.put(DISKS, disk.0.as_bytes(), &record)?;
            starts.iter().try_for_each(|start| batch.remove(INTERVALS, &interval_key(disk, *start)))
        })
    }

    /// Damage was found in a replica, durably: before anything is written over it.
    ///
    /// # Errors
    /// Those of the catalogue.
    pub fn put_damage(&self, disk: DiskId, damage: &Damage) -> Result<(), CatalogueError> {
        self.catalogue.write(|batch| {
            let Some(mut record) = batch.get::<ReplicaRecord>(DISKS, disk.0.as_bytes())? else { return Ok(()) };
            record.damage.clone_from(damage);
            batch.put(DISKS, disk.0.as_bytes(), &record)
        })
    }

    /// The book of points.
    ///
    /// # Errors
    /// Those of the catalogue.
    pub fn book(&self) -> Result<Book, CatalogueError> {
        let listed = self.catalogue.all::<RecoveryPoint>(POINTS)?.into_iter().map(|(_, point)| point).collect();
        let pending = self.catalogue.all::<Pending>(PENDING)?.into_iter().map(|(_, p)| (p.marker.point, p)).collect();
        let bad = self.catalogue.all::<BadPoint>(BAD)?.into_iter().map(|(_, bad)| bad).collect();
        let verified = self.catalogue.all::<(PointId, Verification)>(VERIFIED)?.into_iter().map(|(_, v)| v).collect();
        Ok(Book::load(listed, pending, bad, verified))
    }

    /// The intervals that every disk's retention journal had at its last checkpoint, and how much of each file was durable.
    ///
    /// # Errors
    /// Those of the catalogue.
    pub fn intervals(&self) -> Result<HashMap<DiskId, BTreeMap<Position, u64>>, CatalogueError> {
        let mut all: HashMap<DiskId, BTreeMap<Position, u64>> = HashMap::new();
        for (_, (disk, start, end)) in self.catalogue.all::<(DiskId, Position, u64)>(INTERVALS)? {
            all.entry(disk).or_default().insert(start, end);
        }
        Ok(all)
    }

    /// Intervals of a disk will go.
    ///
    /// # Errors
    /// Those of the catalogue.
    pub fn forget_intervals(&self, disk: DiskId, starts: &[Position]) -> Result<(), CatalogueError> {
        self.catalogue.write(|batch| starts.iter().try_for_each(|start| batch.remove(INTERVALS, &interval_key(disk, *start))))
    }

    /// Takes points off the list that became unusable, and gives up others that wait, durably.
    ///
    /// # Errors
    /// Those of the catalogue; nothing was changed then.
    pub fn mark_bad(&self, bad: &[BadPoint], waiting: &[PointId]) -> Result<(), CatalogueError> {
        self.catalogue.write(|batch| {
            for bad in bad {
                let id = bad.point.id.0;
                batch.remove(POINTS, id.as_bytes())?;
                batch.remove(VERIFIED, id.as_bytes())?;
                batch.put(BAD, id.as_bytes(), bad)?;
            }
            waiting.iter().try_for_each(|id| batch.remove(PENDING, id.0.as_bytes()))
        })
    }

    /// A point that was taken off the list is on it again, durably.
    ///
    /// # Errors
    /// Those of the catalogue.
    pub fn readmit(&self, point: &RecoveryPoint) -> Result<(), CatalogueError> {
        self.catalogue.write(|batch| {
            batch.remove(BAD, point.id.0.as_bytes())?;
            batch.put(POINTS, point.id.0.as_bytes(), point)
        })
    }

    /// Clears unusable points, durably.
    ///
    /// # Errors
    /// Those of the catalogue.
    pub fn clear_bad(&self, points: &[PointId]) -> Result<(), CatalogueError> {
        self.catalogue.write(|batch| points.iter().try_for_each(|id| batch.remove(BAD, id.0.as_bytes())))
    }

    /// Notes a verification of a point, if it is still listed, durably.
    ///
    /// # Errors
    /// Those of the catalogue.
    pub fn put_verified(&self, id: PointId, verification: &Verification) -> Result<(), CatalogueError> {
        self.catalogue.write(|batch| match batch.get::<RecoveryPoint>(POINTS, id.0.as_bytes())? {
            Some(_) => batch.put(VERIFIED, id.0.as_bytes(), &(id, verification)),
            None => Ok(()),
        })
    }

    /// How far the scrub of a machine has come.
    ///
    /// # Errors
    /// Those of the catalogue.
    pub fn scrub(&self, machine: MachineId) -> Result<ScrubState, CatalogueError> {
        Ok(self.catalogue.get(SCRUBS, machine.0.as_bytes())?.unwrap_or_default())
    }

    /// Notes how far the scrub of a machine has come.
    ///
    /// # Errors
    /// Those of the catalogue.
    pub fn put_scrub(&self, machine: MachineId, state: &ScrubState) -> Result<(), CatalogueError> {
        self.catalogue.write(|batch| batch.put(SCRUBS, machine.0.as_bytes(), state))
    }

    /// An error that names the catalogue.
    pub fn failed(&self, error: impl std::fmt::Display) -> CatalogueError {
        self.catalogue.failed(error)
    }

    /// Seconds this master target has run before.
    ///
    /// # Errors
    /// Those of the catalogue.
    pub fn clock(&self) -> Result<u64, CatalogueError> {
        Ok(self.catalogue.get(SERVER, b"clock")?.unwrap_or(0))
    }

    /// The policy's values that a person set.
    ///
    /// # Errors
    /// Those of the catalogue.
    pub fn policy(&self) -> Result<SetValues, CatalogueError> {
        Ok(self.catalogue.get(SERVER, b"policy")?.unwrap_or_default())
    }

    /// Sets them, durably.
    ///
    /// # Errors
    /// Those of the catalogue.
    pub fn put_policy(&self, values: &SetValues) -> Result<(), CatalogueError> {
        self.catalogue.write(|batch| batch.put(SERVER, b"policy", values))
    }

    /// A checkpoint and what it did to the points, in one transaction.
    ///
    /// # Errors
    /// Those of the catalogue; nothing was changed then.
    pub fn checkpoint(&self, disk: DiskId, stand: &Stand, changes: &[Changes], clock: u64) -> Result<(), CatalogueError> {
        self.catalogue.write(|batch| {
            let Some(mut record) = batch.get::<ReplicaRecord>(DISKS, disk.0.as_bytes())? else { return Ok(()) };
            record.checkpoint = stand.checkpoint;
            record.last_marker = stand.last_marker;
            record.damage = stand.damage.clone();
            record.epoch = record.epoch.max(stand.checkpoint.epoch);
            record.begins.retain(|epoch, _| *epoch > stand.checkpoint.epoch);
            batch.put(DISKS, disk.0.as_bytes(), &record)?;
            batch.put(SERVER, b"clock", &clock)?;
            stand.grown.iter().try_for_each(|(start, end)| batch.put(INTERVALS, &interval_key(disk, *start), &(disk, *start, *end)))?;
            for change in changes {
                if let Some((id, pending)) = &change.pending {
                    batch.put(PENDING, id.0.as_bytes(), pending)?;
                }
                change.forget.iter().try_for_each(|id| batch.remove(PENDING, id.0.as_bytes()))?;
                if let Some(point) = &change.listed {
                    batch.put(POINTS, point.id.0.as_bytes(), point)?;
                }
            }
            Ok(())
        })
    }

    /// All jobs, the oldest first.
    ///
    /// # Errors
    /// Those of the catalogue.
    pub fn jobs(&self) -> Result<Vec<Job>, CatalogueError> {
        Ok(self.catalogue.all::<Job>(JOBS)?.into_iter().map(|(_, job)| job).collect())
    }

    /// Notes new jobs, durably: all of them or none.
    ///
    /// # Errors
    /// Those of the catalogue.
    pub fn put_new_jobs(&self, jobs: &[Job]) -> Result<(), CatalogueError> {
        self.catalogue.write(|batch| jobs.iter().try_for_each(|job| batch.put(JOBS, &job_key(job.id), job)))
    }

    /// Sets a job, durably, with what becomes true in the same moment: where replicas stand from then on (`stand`), points
    /// that are dropped, replicas that begin a new history.
    ///
    /// # Errors
    /// Those of the catalogue; nothing was changed then.
    pub fn put_job(&self, job: &Job, effects: &Effects) -> Result<(), CatalogueError> {
        // A history that ends takes its intervals along.
        let ending = effects.stand.iter().filter(|(_, at)| at.is_none()).map(|(disk, _)| *disk);
        let ending: Vec<DiskId> = ending.chain(effects.ended.iter().copied()).collect();
        let mut intervals = if ending.is_empty() { HashMap::new() } else { self.intervals()? };
        self.catalogue.write(|batch| {
            batch.put(JOBS, &job_key(job.id), job)?;
            for (disk, last_marker) in &effects.stand {
                let key = disk.0.as_bytes();
                if let Some(mut record) = batch.get::<ReplicaRecord>(DISKS, key)? {
                    record.last_marker = *last_marker;
                    batch.put(DISKS, key, &record)?;
                }
            }
            for (disk, record) in &effects.replicas {
                batch.put(DISKS, disk.0.as_bytes(), record)?;
            }
            for disk in &effects.confirmed {
                let key = disk.0.as_bytes();
                if let Some(mut record) = batch.get::<ReplicaRecord>(DISKS, key)? {
                    record.content = Content::Confirmed;
                    batch.put(DISKS, key, &record)?;
                }
            }
            for disk in &ending {
                for start in intervals.remove(disk).unwrap_or_default().into_keys() {
                    batch.remove(INTERVALS, &interval_key(*disk, start))?;
                }
            }
            for id in &effects.dropped {
                batch.remove(POINTS, id.0.as_bytes())?;
                batch.remove(VERIFIED, id.0.as_bytes())?;
                batch.remove(PENDING, id.0.as_bytes())?;
            }
            effects.released.iter().try_for_each(|bad| batch.put(BAD, bad.point.id.0.as_bytes(), bad))?;
            effects.forgotten.iter().try_for_each(|id| batch.remove(JOBS, &job_key(*id)))
        })
    }

    /// Removes a replica's record and the points that needed it, durably.
    ///
    /// # Errors
    /// Those of the catalogue; nothing was changed then.
    pub fn forget_replica(&self, disk: DiskId, points: &[PointId]) -> Result<(), CatalogueError> {
        let intervals: Vec<Position> = self.intervals()?.remove(&disk).unwrap_or_default().into_keys().collect();
        self.catalogue.write(|batch| {
            batch.remove(DISKS, disk.0.as_bytes())?;
            intervals.iter().try_for_each(|start| batch.remove(INTERVALS, &interval_key(disk, *start)))?;
            points.iter().try_for_each(|id| {
                batch.remove(POINTS, id.0.as_bytes())?;
                batch.remove(VERIFIED, id.0.as_bytes())?;
                batch.remove(PENDING, id.0.as_bytes())
            })
        })
    }

    /// Changes listed points, durably: all of them or none.
    ///
    /// # Errors
    /// Those of the catalogue.
    pub fn put_points(&self, points: &[RecoveryPoint]) -> Result<(), CatalogueError> {
        self.catalogue.write(|batch| {
            points.iter().try_for_each(|point| match batch.get::<RecoveryPoint>(POINTS, point.id.0.as_bytes())? {
                Some(_) => batch.put(POINTS, point.id.0.as_bytes(), point),
                None => Err(self.catalogue.failed("the point is not listed any more")),
            })
        })
    }

    /// Takes points off the list, durably.
    ///
    /// # Errors
    /// Those of the catalogue.
    pub fn unlist(&self, points: &[PointId]) -> Result<(), CatalogueError> {
        self.catalogue.write(|batch| {
            points.iter().try_for_each(|id| {
                batch.remove(POINTS, id.0.as_bytes())?;
                batch.remove(VERIFIED, id.0.as_bytes())?;
                batch.remove(PENDING, id.0.as_bytes())
            })
        })
    }
}

fn interval_key(disk: DiskId, start: Position) -> Vec<u8> {
    [&disk.0.as_bytes()[..], &start.epoch.to_le_bytes(), &start.sequence.to_le_bytes()].concat()
}
