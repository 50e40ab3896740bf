//! The master target in the simulation: the product's claims, order, journal, plan, image, retention journal and book of points,
//! driven as its network and apply threads do it. Its catalogue is what transactions left behind.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::disallowed_methods,
    unreachable_pub,
    missing_docs,
    reason = "a part of the tests"
)]

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use tidegate::crypto::keyring::DataKey;
use tidegate::crypto::seal::{Opener, Purpose};
use tidegate::disk::recent::{Memory, Recent};
use tidegate::disk::{Disk as _, Format, Image};
use tidegate::master_target::apply::plan::{can_judge, plan, writes};
use tidegate::master_target::apply::roll;
use tidegate::master_target::journal::{Replayed, replay};
use tidegate::master_target::points::{Book, Pending};
use tidegate::master_target::receive::claim::{self, Claim};
use tidegate::master_target::receive::order::{Order, Verdict};
use tidegate::master_target::retain::{Retention, Subject};
use tidegate::master_target::shared::Item;
use tidegate::model::{DiskId, Extent, MachineId, Name, PointId, Position, RecoveryPoint, Trailer};
use tidegate::process_server::adoption::There;
use tidegate::storage::AlignedBuf;
use tidegate::storage::digest::hash_blocks;
use tidegate::storage::log::format::RECORD_HEADER_LEN;
use tidegate::storage::log::{Location, Log, Options};
use tidegate::wire::batch::{BATCH_BYTES_MAX, BatchHeader, parse_entries};
use uuid::Uuid;

use super::DISK_BYTES;
use super::gateway::{Down, Up};
use super::support::Rng;
use super::support::faulty_storage::{Faulty, FaultyFile};

const JOURNAL: &str = "/journal";
const OPTIONS: Options = Options { segment_bytes: 2 << 20, segments_max: 16, body_bytes_max: BATCH_BYTES_MAX };

#[derive(Clone)]
struct Record {
    generation: u64,
    key: DataKey,
    epoch: u64,
    carrier: Option<Name>,
    checkpoint: Position,
    last_marker: Option<Position>,
    intervals: BTreeMap<Position, u64>,
    begins: BTreeMap<u64, Position>,
}

/// What its catalogue has.
#[derive(Clone, Default)]
struct Catalogue {
    disks: HashMap<DiskId, Record>,
    listed: BTreeMap<PointId, RecoveryPoint>,
    pending: BTreeMap<PointId, Pending>,
}

struct Disk {
    order: Order,
    queue: VecDeque<Item>,
    image: Recent<Image<FaultyFile>>,
    retention: Retention<Faulty>,
    opener: Opener,
    last_marker: Option<Position>,
    blind_until: Position,
    /// Which process server's stream may send.
    owner: Option<usize>,
}

struct Running {
    log: Log<Faulty>,
    disks: HashMap<DiskId, Disk>,
    writes: Vec<(DiskId, u64, AlignedBuf)>,
    /// What the checkpoint that is under way is made of.
    applying: Vec<Location>,
}

/// The master target.
pub struct Target {
    pub storage: Faulty,
    ids: Vec<DiskId>,
    machines: HashMap<MachineId, Vec<DiskId>>,
    catalogue: Catalogue,
    running: Option<Running>,
    pub fenced: u64,
    /// Digests that were compared.
    pub compared: u64,
    /// The highest position of each disk that was ever journaled.
    journaled: HashMap<DiskId, Position>,
    /// The same, when its journal may have lost something of it.
    lost: HashMap<DiskId, Position>,
    /// A bit of its journal was turned since it was started.
    rotted: bool,
    /// The same, ever.
    pub ever_rotted: bool,
    /// Replicas that went back to their last point.
    pub fell_back: u64,
}

fn image_path(n: usize) -> PathBuf {
    PathBuf::from(format!("/replica/{n}"))
}

fn retain_path(n: usize) -> PathBuf {
    PathBuf::from(format!("/retain{n}"))
}

impl Target {
    pub async fn new(machines: &[(MachineId, Vec<DiskId>)]) -> Self {
        let ids: Vec<DiskId> = machines.iter().flat_map(|(_, ids)| ids.clone()).collect();
        let storage = Faulty::default();
        let mut catalogue = Catalogue::default();
        for (n, id) in ids.iter().enumerate() {
            Image::create(&storage, &image_path(n), Format::Raw, DISK_BYTES).await.expect("a fresh storage");
            let record = Record {
                generation: 77,
                key: DataKey::from_bytes([n as u8; 32]),
                epoch: 0,
                carrier: None,
                checkpoint: Position::default(),
                last_marker: None,
                intervals: BTreeMap::new(),
                begins: BTreeMap::new(),
            };
            catalogue.disks.insert(*id, record);
        }
        let machines = machines.iter().cloned().collect();
        Self {
            storage,
            ids,
            machines,
            catalogue,
            running: None,
            fenced: 0,
            compared: 0,
            journaled: HashMap::new(),
            lost: HashMap::new(),
            rotted: false,
            ever_rotted: false,
            fell_back: 0,
        }
    }

    pub fn is_up(&self) -> bool {
        self.running.is_some()
    }

    /// Starts on what is there. Stays down if its storage fails.
    pub async fn start(&mut self) {
        let Ok((log, found)) = Log::open(self.storage.clone(), Path::new(JOURNAL), Uuid::from_u128(99), OPTIONS).await else {
            return;
        };
        let mut by_disk: HashMap<DiskId, Vec<Item>> = HashMap::new();
        for record in found {
            match BatchHeader::decode(&record.head) {
                Ok(header) => by_disk.entry(header.disk).or_default().push(Item::recovered(&header, record.location)),
                Err(_) => log.release(record.location),
            }
        }
        // So little that blocks are pushed out.
        let memory = Memory::new(DISK_BYTES / 2);
        let mut disks = HashMap::new();
        for (n, id) in self.ids.iter().enumerate() {
            let record = self.catalogue.disks[id].clone();
            let Replayed { queue, unneeded, reached, .. } =
                replay(record.checkpoint, &record.begins, by_disk.remove(id).unwrap_or_default());
            unneeded.into_iter().for_each(|at| log.release(at));
            let subject = Subject { disk: *id, generation: record.generation, key: record.key.clone() };
            let Ok(image) = Image::open(&self.storage, &image_path(n), Format::Raw).await else { return };
            let opened = Retention::open_noted(self.storage.clone(), &retain_path(n), subject, record.last_marker, &record.intervals).await;
            let Ok(retention) = opened else { return };
            let mut queue: VecDeque<Item> = queue.into();
            let mut journaled = queue.back().map_or(record.checkpoint, |item| item.end);
            if retention.is_ahead_of(journaled) {
                let Some(to) = fall_back(self.catalogue.disks.get_mut(id).expect("registered"), &image, &retention).await else { return };
                self.fell_back += 1;
                queue.drain(..).for_each(|item| log.release(item.location));
                journaled = to;
            }
            let disk = Disk {
                order: Order::new(journaled),
                queue,
                image: Recent::new(image, &memory),
                retention,
                opener: Opener::new(record.key.clone(), Purpose::Stream, *id, record.generation),
                last_marker: record.last_marker,
                blind_until: reached,
                owner: None,
            };
            disks.insert(*id, disk);
        }
        if std::mem::take(&mut self.rotted) {
            self.lost = self.journaled.clone();
        }
        for (id, disk) in &disks {
            let highest = self.journaled.entry(*id).or_default();
            *highest = (*highest).max(disk.order.acknowledged());
        }
        self.running = Some(Running { log, disks, writes: Vec::new(), applying: Vec::new() });
    }

    /// A bit turns in a batch that its journal holds and no replica has. False if there is none.
    pub async fn rot(&mut self, rng: &mut Rng) -> bool {
        let Some(running) = &self.running else { return false };
        let queued = self.ids.iter().flat_map(|id| running.disks[id].queue.iter().map(|item| item.location));
        // Of a checkpoint that was cut off: what it would be finished with.
        let waiting = if running.applying.is_empty() { queued.collect() } else { running.applying.clone() };
        let Some(location) = waiting.get(rng.below(waiting.len().max(1) as u64) as usize) else { return false };
        // Its storage may fail just now.
        let Ok(record) = running.log.read(*location).await else { return false };
        self.rotted |= self.storage.rot_in(Path::new(JOURNAL), &record, rng);
        self.ever_rotted |= self.rotted;
        self.rotted
    }

    /// Power goes.
    pub fn crash(&mut self, rng: &mut Rng) {
        self.running = None;
        self.storage.crash(rng);
    }

    /// Hears a process server once, on one disk's stream.
    pub fn hear(&mut self, gateway: usize, name: &Name, id: DiskId, message: Up) -> Result<Option<Down>, String> {
        let Some(running) = &mut self.running else { return Ok(None) };
        let disk = running.disks.get_mut(&id).expect("registered");
        let record = self.catalogue.disks.get_mut(&id).expect("registered");
        match message {
            Up::Open { epoch } => match claim::judge(record.epoch, record.carrier.as_ref(), epoch, name) {
                Err(fenced) => {
                    self.fenced += 1;
                    Ok(Some(Down::Fenced(fenced.obeyed)))
                }
                Ok(claimed) => {
                    if claimed == Claim::TakesOver {
                        (record.epoch, record.carrier) = (epoch, Some(name.clone()));
                    }
                    disk.owner = Some(gateway);
                    // Answered when what was received is journaled, see `settle`.
                    let (received, journaled) = disk.order.positions();
                    if received != journaled {
                        return Err("not settled".to_owned());
                    }
                    let there = There { generation: record.generation, epoch: record.epoch, journaled };
                    Ok(Some(Down::Opened { there, key: record.key.clone(), asked: epoch }))
                }
            },
            Up::Batch(sealed) => {
                if disk.owner != Some(gateway) {
                    return Ok(Some(Down::Fenced(record.epoch)).filter(|_| record.carrier.as_ref() != Some(name)));
                }
                let header = BatchHeader::decode(&sealed).map_err(|e| e.to_string())?;
                if header.epoch < record.epoch {
                    self.fenced += 1;
                    return Ok(Some(Down::Fenced(record.epoch)));
                }
                match disk.order.judge(header.epoch, header.first, header.last) {
                    Err(gap) => return Err(gap.to_string()),
                    Ok(Verdict::Known) => return Ok(Some(Down::Journaled(disk.order.acknowledged()))),
                    Ok(Verdict::Next) => {}
                }
                let (header, body) = disk.opener.open(&sealed).map_err(|e| e.to_string())?;
                for entry in parse_entries(&header, &body).map_err(|e| e.to_string())? {
                    assert!(entry.extent.fits(DISK_BYTES));
                }
                let behind = disk.order.positions().0;
                if header.epoch > behind.epoch {
                    record.epoch = record.epoch.max(header.epoch);
                    record.begins.insert(header.epoch, behind);
                }
                let number = disk.order.received(header.end(), || Item::recovered(&header, Location::nowhere()));
                let mut bytes = AlignedBuf::with_capacity(RECORD_HEADER_LEN + sealed.len());
                bytes.pad_to(RECORD_HEADER_LEN);
                bytes.extend(&sealed);
                running.writes.push((id, number, bytes));
                Ok(None)
            }
        }
    }

    /// Whether what was received of a disk is journaled.
    pub fn is_settled(&self, id: DiskId) -> bool {
        self.running.as_ref().is_none_or(|r| r.disks[&id].order.positions().0 == r.disks[&id].order.positions().1)
    }

    /// Makes some of what was received durable; who is told. `None` if its storage failed.
    pub async fn commit(&mut self, rng: &mut Rng) -> Option<Vec<(DiskId, usize, Position)>> {
        let Some(running) = &mut self.running else { return Some(vec![]) };
        let some = rng.below(running.writes.len() as u64 + 1) as usize;
        let (tags, mut records): (Vec<_>, Vec<_>) = running.writes.drain(..some).map(|(id, number, record)| ((id, number), record)).unzip();
        if records.is_empty() {
            return Some(vec![]);
        }
        let placed = running.log.append(&mut records).await.ok()?;
        let mut told = Vec::new();
        for ((id, number), (location, _)) in tags.into_iter().zip(placed) {
            let disk = running.disks.get_mut(&id).expect("registered");
            disk.queue.extend(disk.order.journaled(number, location));
            let highest = self.journaled.entry(id).or_default();
            *highest = (*highest).max(disk.order.acknowledged());
            told.extend(disk.owner.map(|gateway| (id, gateway, disk.order.acknowledged())));
        }
        Some(told)
    }

    /// Applies up to `most` batches of each disk. False if its storage failed.
    pub async fn checkpoint(&mut self, most: usize) -> bool {
        for n in 0..self.ids.len() {
            if let Err(error) = self.checkpoint_disk(n, most).await {
                if std::env::var("TIDEGATE_SEED").is_ok() {
                    eprintln!("  the master target: {error}");
                }
                return false;
            }
        }
        true
    }

    async fn checkpoint_disk(&mut self, n: usize, most: usize) -> Result<(), String> {
        let id = self.ids[n];
        let Some(running) = &mut self.running else { return Ok(()) };
        let disk = running.disks.get_mut(&id).expect("registered");
        let items: Vec<Item> = disk.queue.drain(..most.min(disk.queue.len())).collect();
        let Some(end) = items.last().map(|item| item.end) else { return Ok(()) };
        running.applying = items.iter().map(|item| item.location).collect();
        let mut bodies: Vec<(BatchHeader, Bytes)> = Vec::new();
        for item in &items {
            let record = running.log.read(item.location).await.map_err(|e| e.to_string())?;
            let (header, body) = disk.opener.open(&record[RECORD_HEADER_LEN..]).map_err(|e| e.to_string())?;
            bodies.push((header, body.freeze()));
        }
        let cuts = plan(bodies.iter().map(|(header, body)| (header, &body[..]))).map_err(|e| e.to_string())?;
        let mut arrivals = Vec::new();
        for cut in &cuts {
            let extents: Vec<_> = writes(cut).collect();
            disk.retention.preserve(&disk.image, extents.iter().map(|(extent, _)| *extent)).await.map_err(|e| e.to_string())?;
            for (extent, content) in extents {
                let written = match content.data_at {
                    Some(at) => {
                        disk.image.write(extent.offset, bodies[content.batch].1.slice(at as usize..at as usize + extent.len as usize)).await
                    }
                    None => disk.image.zero(extent).await,
                };
                written.map_err(|e| e.to_string())?;
            }
            if let Some((position, Trailer::Digest(digest), _)) = &cut.end
                && can_judge(digest, *position, disk.blind_until)
            {
                let ours = hash_blocks(&disk.image.read(digest.extent).await.map_err(|e| e.to_string())?);
                assert!(digest.differs(&ours).is_empty(), "a scrub takes a good replica for a damaged one");
                self.compared += 1;
            }
            if let Some((position, Trailer::Mark(marker), _)) = &cut.end {
                disk.retention.begin(*position).await.map_err(|e| e.to_string())?;
                disk.last_marker = Some(*position);
                arrivals.push((*position, marker.clone()));
            }
        }
        disk.image.barrier().await.map_err(|e| e.to_string())?;
        // One transaction.
        let record = self.catalogue.disks.get_mut(&id).expect("registered");
        (record.checkpoint, record.last_marker) = (end, disk.last_marker);
        record.intervals.extend(disk.retention.take_grown());
        let mut book = Book::load(
            self.catalogue.listed.values().cloned().collect(),
            self.catalogue.pending.clone().into_iter().collect(),
            vec![],
            vec![],
        );
        for (position, marker) in arrivals {
            let changes = book.arrive(id, position, &marker, &self.machines[&marker.machine], 0);
            book.commit(changes.clone());
            changes.forget.iter().for_each(|id| drop(self.catalogue.pending.remove(id)));
            self.catalogue.pending.extend(changes.pending);
            self.catalogue.listed.extend(changes.listed.map(|point| (point.id, point)));
        }
        running.applying.drain(..).for_each(|at| running.log.release(at));
        Ok(())
    }

    /// Drops a listed point, as the policy does. False if its storage failed.
    pub async fn thin(&mut self, rng: &mut Rng) -> bool {
        let Some(running) = &mut self.running else { return true };
        if self.catalogue.listed.len() < 6 {
            return true;
        }
        let which = *self.catalogue.listed.keys().nth(rng.below(self.catalogue.listed.len() as u64) as usize).expect("one of them");
        self.catalogue.listed.remove(&which);
        for id in &self.ids {
            let disk = running.disks.get_mut(id).expect("registered");
            let record = self.catalogue.disks.get_mut(id).expect("registered");
            let listed = self.catalogue.listed.values().filter_map(|p| p.disks.get(id).copied());
            let waiting = self.catalogue.pending.values().filter_map(|p| p.arrived.get(id).copied());
            let needed: std::collections::BTreeSet<Position> = listed.chain(waiting).collect();
            let Some(noted) = record.last_marker else { continue };
            let oldest = Some(needed.first().map_or(noted, |first| noted.min(*first)));
            for gone in disk.retention.unneeded(oldest) {
                record.intervals.remove(&gone);
            }
            if disk.retention.forget_before(oldest).is_err() {
                return false;
            }
            loop {
                let forgotten = std::cell::RefCell::new(Vec::new());
                let merged = disk
                    .retention
                    .merge_some(&needed, Some(noted), async |starts: Vec<Position>| {
                        forgotten.borrow_mut().extend(starts);
                        true
                    })
                    .await;
                for start in forgotten.take() {
                    record.intervals.remove(&start);
                }
                match merged {
                    Ok(true) => {}
                    Ok(false) => break,
                    Err(_) => return false,
                }
            }
        }
        true
    }

    /// Listed points.
    pub fn points(&self) -> Vec<RecoveryPoint> {
        self.catalogue.listed.values().cloned().collect()
    }

    /// What a disk held at a point. `None` while it is down.
    pub async fn materialise(&self, point: &RecoveryPoint, id: DiskId) -> Option<Result<Vec<u8>, String>> {
        let disk = &self.running.as_ref()?.disks[&id];
        let content = async {
            let view = disk.retention.view(point.disks[&id]).await.map_err(|e| e.to_string())?;
            view.read(&disk.image, Extent::new(0, DISK_BYTES)).await.map(|c| c.to_vec()).map_err(|e| e.to_string())
        };
        Some(content.await)
    }

    /// What the replica holds now.
    pub async fn replica(&self, id: DiskId) -> Vec<u8> {
        let disk = &self.running.as_ref().expect("it is up").disks[&id];
        disk.image.read(Extent::new(0, DISK_BYTES)).await.expect("no faults are left").to_vec()
    }

    /// Everything received is in the replicas.
    pub fn is_applied(&self) -> bool {
        self.running.as_ref().is_some_and(|r| r.writes.is_empty() && r.disks.values().all(|d| d.queue.is_empty()))
    }

    /// Everything through here is durable, or was until a bit turned.
    pub fn journaled(&self, id: DiskId) -> Option<Position> {
        let lost = self.lost.get(&id).copied().unwrap_or_default();
        self.running.as_ref().map(|r| lost.max(r.disks[&id].order.positions().1))
    }
}

/// A checkpoint that was cut off half-way cannot be finished: the replica goes back to its last point, as
/// `Apply::fall_back` does it. Where it stands then; `None` if its storage fails.
async fn fall_back(record: &mut Record, image: &Image<FaultyFile>, retention: &Retention<Faulty>) -> Option<Position> {
    let from = record.last_marker.unwrap_or_default();
    let damaged = roll::fall_back(image, retention, record.last_marker).await.ok()?;
    assert!(damaged.is_empty(), "old content does not rot here");
    // One transaction.
    if let Some(point) = record.last_marker {
        (record.epoch, record.carrier) = (record.epoch.max(record.checkpoint.epoch) + 1, Some("nobody".parse().expect("a name")));
        record.checkpoint = point;
        record.begins.insert(record.epoch, point);
    }
    record.intervals.retain(|start, _| *start < from);
    retention.drop_from(from).ok()?;
    Some(record.checkpoint)
}
