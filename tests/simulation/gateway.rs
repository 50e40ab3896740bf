//! A process server in the simulation: the product's stream, batcher, folding, seal, log and decisions, driven as its network
//! thread does it. Its catalogue is what transactions left behind.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::disallowed_methods,
    unreachable_pub,
    missing_docs,
    reason = "a part of the tests"
)]

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use tidegate::clock::Mono;
use tidegate::crypto::keyring::DataKey;
use tidegate::crypto::seal::{Packer, Purpose, SealingSession};
use tidegate::model::{Compare, DiskId, Name, Position, Reliance, Trailer};
use tidegate::process_server::adoption::{Adoption, Here, Known, There, judge};
use tidegate::process_server::optimize::batcher::{Batcher, Collected, Input, RawBatch};
use tidegate::process_server::optimize::fold::{Folded, fold};
use tidegate::process_server::stream::{Queued, Stream};
use tidegate::storage::AlignedBuf;
use tidegate::storage::log::format::RECORD_HEADER_LEN;
use tidegate::storage::log::{Location, Log, Options};
use tidegate::wire::batch::{BATCH_BYTES_MAX, BatchHeader};
use tidegate::wire::ingest::{AgentMessage, FRAME_LEN, Frame, FrameType, Refusal, ServerMessage, change_cost, decode_change};
use uuid::Uuid;

use super::Wire;
use super::support::Rng;
use super::support::faulty_storage::Faulty;

const CACHE: &str = "/cache";
const OPTIONS: Options = Options { segment_bytes: 2 << 20, segments_max: 8, body_bytes_max: BATCH_BYTES_MAX };
const WINDOW: u64 = 256 << 10;

/// What its catalogue has of a disk.
#[derive(Clone)]
struct Record {
    known: Known,
    begun: u64,
    relied: BTreeMap<u64, Position>,
    released: Position,
    key: DataKey,
}

/// One disk while it runs.
struct Disk {
    stream: Stream,
    batcher: Batcher,
    session: Option<Arc<SealingSession>>,
    agent_epoch: u64,
    claim: Option<u64>,
    claimed: Option<(u64, Position)>,
    foreign: u64,
    to_release: Vec<Location>,
    owned: bool,
    slot: u32,
}

/// What it says to the master target on one disk's stream.
pub enum Up {
    Open { epoch: u64 },
    Batch(Bytes),
}

/// What it hears there.
pub enum Down {
    Opened { there: There, key: DataKey, asked: u64 },
    Fenced(u64),
    Journaled(Position),
}

/// A disk's stream to the master target.
#[derive(Default)]
pub struct Link {
    pub up: VecDeque<Up>,
    pub down: VecDeque<Down>,
    /// It was opened at both ends.
    pub open: bool,
    pub asked: bool,
    claim: Option<u64>,
}

struct Running {
    log: Log<Faulty>,
    disks: HashMap<DiskId, Disk>,
    pipeline: Vec<(DiskId, u64, AlignedBuf)>,
}

/// A process server.
pub struct Gateway {
    pub name: Name,
    pub storage: Faulty,
    ids: Vec<DiskId>,
    records: HashMap<DiskId, Record>,
    running: Option<Running>,
    pub links: HashMap<DiskId, Link>,
    pub now: u64,
    log_id: u128,
}

impl Gateway {
    pub fn new(name: &str, ids: &[DiskId], log_id: u128) -> Self {
        Self {
            name: name.parse().expect("a name"),
            storage: Faulty::default(),
            ids: ids.to_vec(),
            records: HashMap::new(),
            running: None,
            links: HashMap::new(),
            now: 1,
            log_id,
        }
    }

    pub fn is_up(&self) -> bool {
        self.running.is_some()
    }

    /// Starts on what is there.
    pub async fn start(&mut self) {
        let Ok((log, found)) = Log::open(self.storage.clone(), Path::new(CACHE), Uuid::from_u128(self.log_id), OPTIONS).await else {
            return;
        };
        let mut by_disk: HashMap<DiskId, Vec<(u64, Queued)>> = HashMap::new();
        for record in found {
            match BatchHeader::decode(&record.head) {
                Ok(header) => {
                    let queued =
                        Queued { first: header.first, end: header.end(), location: record.location, sealed: None, captured: Mono(0) };
                    by_disk.entry(header.disk).or_default().push((header.generation, queued));
                }
                Err(_) => log.release(record.location),
            }
        }
        let mut disks = HashMap::new();
        for id in &self.ids {
            let record = self.records.get(id);
            let (generation, begun, released) = record.map_or((0, 0, Position::default()), |r| (r.known.generation, r.begun, r.released));
            let relied = record.map(|r| r.relied.clone()).unwrap_or_default();
            let found = by_disk.remove(id).unwrap_or_default().into_iter();
            let (ours, others): (Vec<_>, Vec<_>) = found.partition(|(g, queued)| *g == generation && queued.end.epoch >= begun);
            others.into_iter().for_each(|(_, q)| log.release(q.location));
            let (stream, dropped, _) = Stream::recover(released, &relied, ours.into_iter().map(|(_, q)| q).collect());
            dropped.into_iter().for_each(|at| log.release(at));
            let session = record.map(|r| Arc::new(SealingSession::start(&r.key, Purpose::Stream, *id, generation)));
            let disk = Disk {
                stream,
                batcher: Batcher::default(),
                session,
                agent_epoch: 0,
                claim: None,
                claimed: None,
                foreign: 0,
                to_release: vec![],
                owned: false,
                slot: 0,
            };
            disks.insert(*id, disk);
        }
        self.links.clear();
        self.running = Some(Running { log, disks, pipeline: Vec::new() });
    }

    /// Power goes.
    pub fn crash(&mut self, rng: &mut Rng) {
        self.running = None;
        self.links.clear();
        self.storage.crash(rng);
    }

    /// A bit turns in a batch that waits in its cache. False if there is none.
    pub async fn rot(&self, rng: &mut Rng) -> bool {
        let Some(running) = &self.running else { return false };
        let waiting = self.ids.iter().filter_map(|id| running.disks[id].stream.next_to_forward()).map(|queued| queued.location);
        let waiting: Vec<Location> = waiting.collect();
        let Some(location) = waiting.get(rng.below(waiting.len().max(1) as u64) as usize) else { return false };
        let Ok(record) = running.log.read(*location).await else { return false };
        self.storage.rot_in(Path::new(CACHE), &record, rng)
    }

    /// All of it is gone, disk and catalogue.
    pub fn burn(&mut self) {
        (self.running, self.storage) = (None, Faulty::default());
        self.records.clear();
        self.links.clear();
    }

    /// An agent has gone.
    pub fn agent_left(&mut self, disks: &[DiskId]) {
        if let Some(running) = &mut self.running {
            running.disks.iter_mut().filter(|(id, _)| disks.contains(id)).for_each(|(_, d)| d.owned = false);
        }
    }

    /// Hears the agent of these disks once; what it answers at once.
    pub fn hear(&mut self, disks: &[DiskId], message: Wire) -> Result<Vec<ServerMessage>, String> {
        match message {
            Wire::Control(AgentMessage::Open { slot, disk, epoch, takes_over, relies_on, .. }) => {
                Ok(vec![self.open(slot, disk, epoch, takes_over, relies_on)])
            }
            Wire::Control(_) => Ok(vec![]),
            Wire::Change(bytes) => self.change(disks, &bytes).map(|()| vec![]),
        }
    }

    fn open(&mut self, slot: u32, id: DiskId, epoch: u64, takes_over: bool, relies_on: Reliance) -> ServerMessage {
        let refused = |reason| ServerMessage::Refused { slot, reason, message: String::new() };
        let Some(running) = &mut self.running else { return refused(Refusal::NotReady) };
        let disk = running.disks.get_mut(&id).expect("registered");
        disk.agent_epoch = disk.agent_epoch.max(epoch);
        if epoch <= disk.foreign {
            return refused(Refusal::StaleEpoch { highest: disk.foreign });
        }
        if takes_over && disk.claimed.is_none_or(|(claimed, _)| claimed != epoch) {
            disk.claim = Some(epoch);
            // The stream is opened again with it.
            self.links.remove(&id);
        }
        let Some(record) = self.records.get_mut(&id) else { return refused(Refusal::NotReady) };
        let told = self.links.get(&id).is_some_and(|link| link.open);
        let of_another = record.known.generation != relies_on.generation;
        let vouches = told || of_another || disk.stream.has_through(relies_on.through);
        if disk.claim.is_some() || disk.session.is_none() || !vouches {
            return refused(Refusal::NotReady);
        }
        let highest = record.known.epoch.max(disk.stream.epoch());
        if epoch < highest {
            return refused(Refusal::StaleEpoch { highest });
        }
        if epoch > record.known.epoch {
            record.known.epoch = epoch;
            record.relied.insert(epoch, relies_on.through);
        }
        let generation = record.known.generation;
        if let Some(batch) = disk.batcher.close() {
            seal(running, id, generation, batch);
        }
        let disk = running.disks.get_mut(&id).expect("registered");
        (disk.owned, disk.slot) = (true, slot);
        let resume_at = disk.stream.open(epoch);
        let acknowledged = disk.stream.acknowledged();
        let taken = disk.claimed.filter(|(claimed, stands)| *claimed == epoch && acknowledged <= *stands).map(|(_, stands)| stands);
        let stands = taken.or(told.then_some(acknowledged));
        let (safe, credit) = (disk.stream.safe_in_epoch(), disk.stream.credit(Some(WINDOW)));
        ServerMessage::Opened { slot, generation, resume_at, safe, credit, compare: Compare::No, stands }
    }

    fn change(&mut self, disks: &[DiskId], bytes: &[u8]) -> Result<(), String> {
        let Some(running) = &mut self.running else { return Ok(()) };
        let frame = Frame::decode(bytes.first_chunk::<FRAME_LEN>().expect("a frame")).map_err(|e| e.to_string())?;
        let payload = Bytes::copy_from_slice(&bytes[FRAME_LEN..]);
        let Some((id, disk)) = running.disks.iter_mut().find(|(id, d)| disks.contains(id) && d.owned && d.slot == frame.slot) else {
            return Ok(());
        };
        let id = *id;
        let kind = decode_change(&frame, payload.clone()).map_err(|e| e.to_string())?;
        let input = match kind {
            tidegate::model::ChangeKind::Write { .. } => {
                Input::Change(Collected { extent: frame.extent, data: Some(AlignedBuf::copy_of(&payload)) })
            }
            tidegate::model::ChangeKind::Zero(extent) => Input::Change(Collected { extent, data: None }),
            tidegate::model::ChangeKind::Mark(marker) => Input::End(Trailer::Mark(marker)),
            tidegate::model::ChangeKind::Digest(digest) => Input::End(Trailer::Digest(*digest)),
        };
        let cost = change_cost(if matches!(frame.kind, FrameType::Mark | FrameType::Digest) { 0 } else { payload.len() });
        if !disk.stream.accept(frame.sequence, cost).map_err(|gap| gap.to_string())? {
            return Ok(());
        }
        let epoch = disk.stream.epoch();
        let closed = disk.batcher.add(Mono(self.now), epoch, frame.sequence, cost, Mono(self.now), input);
        if let Some(batch) = closed {
            let generation = self.records[&id].known.generation;
            seal(running, id, generation, batch);
        }
        Ok(())
    }

    /// Closes open batches.
    pub fn close_batches(&mut self) {
        let Some(running) = &mut self.running else { return };
        for id in &self.ids {
            let closed = running.disks.get_mut(id).and_then(|d| d.batcher.close());
            if let (Some(batch), Some(record)) = (closed, self.records.get(id)) {
                seal(running, *id, record.known.generation, batch);
            }
        }
    }

    /// Makes what is sealed durable. False if its storage failed: only a restart recovers.
    pub async fn commit(&mut self) -> bool {
        let Some(running) = &mut self.running else { return true };
        let (tags, mut records): (Vec<_>, Vec<_>) = running.pipeline.drain(..).map(|(id, number, record)| ((id, number), record)).unzip();
        if records.is_empty() {
            return true;
        }
        let Ok(placed) = running.log.append(&mut records).await else { return false };
        for ((id, number), (location, bytes)) in tags.into_iter().zip(placed) {
            let sealed = bytes.slice(RECORD_HEADER_LEN..);
            let header = BatchHeader::decode(&sealed).expect("our own");
            let disk = running.disks.get_mut(&id).expect("registered");
            // Read back later, as if memory had no room.
            match disk.stream.cached(number, header.first, location, sealed, Mono(self.now)) {
                Some(joined) => drop(disk.stream.forget_newest(joined)),
                None => disk.to_release.push(location),
            }
        }
        true
    }

    /// What the agent of these disks is told of its positions.
    pub fn acknowledgements(&mut self, disks: &[DiskId]) -> Vec<ServerMessage> {
        let Some(running) = &mut self.running else { return vec![] };
        let owned = running.disks.iter_mut().filter(|(id, d)| disks.contains(id) && d.owned).map(|(_, d)| d);
        owned
            .map(|d| ServerMessage::Ack {
                slot: d.slot,
                epoch: d.stream.epoch(),
                cached: d.stream.cached_in_epoch(),
                safe: d.stream.safe_in_epoch(),
                credit: d.stream.credit(Some(WINDOW)),
            })
            .collect()
    }

    /// Goes on with its streams to the master target. The disks that their agents have to open again, with their slots: a batch in
    /// the cache rotted.
    pub async fn forward(&mut self, most: usize) -> Vec<(DiskId, u32)> {
        let Some(running) = &mut self.running else { return vec![] };
        let mut lost = Vec::new();
        for id in &self.ids {
            let disk = running.disks.get_mut(id).expect("registered");
            let link = self.links.entry(*id).or_default();
            if link.open && disk.claim.is_some() {
                *link = Link::default();
            }
            if !link.open && !link.asked {
                let gone = disk.stream.drop_epochs_before(disk.foreign + 1);
                disk.to_release.extend(gone.iter().map(|q| q.location));
                let epoch = disk.claim.or(disk.stream.waiting_epoch()).unwrap_or_else(|| disk.stream.epoch().max(disk.agent_epoch));
                if epoch > disk.foreign && epoch > 0 {
                    (link.asked, link.claim) = (true, disk.claim);
                    link.up.push_back(Up::Open { epoch });
                }
            }
            for _ in 0..most {
                let Some(next) = disk.stream.next_to_forward().filter(|_| link.open).cloned() else { break };
                let bytes = match running.log.read(next.location).await {
                    Ok(bytes) => bytes,
                    Err(error) => {
                        if error.is_lost() {
                            disk.batcher.close();
                            let gone = disk.stream.reset(disk.stream.acknowledged());
                            disk.to_release.extend(gone.iter().map(|q| q.location));
                            lost.extend(std::mem::take(&mut disk.owned).then_some((*id, disk.slot)));
                            *link = Link::default();
                        }
                        break;
                    }
                };
                disk.stream.forwarded(next.end);
                link.up.push_back(Up::Batch(bytes.slice(RECORD_HEADER_LEN..)));
            }
        }
        lost
    }

    /// Hears the master target once, on one disk's stream. True if the agent has to open the disk again.
    pub fn hear_target(&mut self, id: DiskId) -> Option<u32> {
        let running = self.running.as_mut()?;
        let link = self.links.get_mut(&id)?;
        let disk = running.disks.get_mut(&id).expect("registered");
        match link.down.pop_front()? {
            Down::Journaled(position) => {
                let gone = disk.stream.acknowledged_through(position);
                disk.to_release.extend(gone.iter().map(|q| q.location));
                None
            }
            Down::Fenced(obeyed) => {
                disk.foreign = disk.foreign.max(obeyed);
                disk.claim = disk.claim.filter(|claim| *claim > obeyed);
                *link = Link::default();
                std::mem::take(&mut disk.owned).then_some(disk.slot)
            }
            Down::Opened { there, key, asked } => {
                let known = self.records.get(&id).map(|r| r.known);
                let follows = disk.stream.follows(there.journaled, there.epoch);
                let here = Here { accepted: disk.stream.accepted(), acknowledged: disk.stream.acknowledged(), follows };
                let claim = link.claim.filter(|claim| *claim == asked);
                (link.open, link.asked) = (true, false);
                let begin = match judge(known, here, there, claim) {
                    Adoption::GoesOn => None,
                    Adoption::TakenOver => {
                        disk.claimed = Some((there.epoch, there.journaled));
                        disk.claim = disk.claim.filter(|wanted| Some(*wanted) != claim);
                        Some(there.epoch)
                    }
                    Adoption::Anew { epoch } => Some(epoch),
                };
                let gone = match begin {
                    None => disk.stream.link_opened(there.journaled),
                    Some(epoch) => {
                        let known = Known { generation: there.generation, epoch };
                        let record = Record { known, begun: epoch, relied: BTreeMap::new(), released: there.journaled, key: key.clone() };
                        self.records.insert(id, record);
                        disk.session = Some(Arc::new(SealingSession::start(&key, Purpose::Stream, id, there.generation)));
                        disk.batcher.close();
                        disk.stream.reset(there.journaled)
                    }
                };
                disk.to_release.extend(gone.iter().map(|q| q.location));
                (begin.is_some() && std::mem::take(&mut disk.owned)).then_some(disk.slot)
            }
        }
    }

    /// Notes what may leave the cache, then lets it go.
    pub fn release(&mut self) {
        let Some(running) = &mut self.running else { return };
        for (id, disk) in &mut running.disks {
            let Some(record) = self.records.get_mut(id) else { continue };
            record.released = record.released.max(disk.stream.acknowledged());
            disk.stream.released_through(record.released);
            disk.to_release.drain(..).for_each(|at| running.log.release(at));
        }
    }
}

fn seal(running: &mut Running, id: DiskId, generation: u64, batch: RawBatch) {
    let disk = running.disks.get_mut(&id).expect("registered");
    let Some(session) = disk.session.clone() else { return };
    let number = disk.stream.closed(Position::new(batch.epoch, batch.last), batch.cost);
    let mut folded = Folded::default();
    fold(&batch, &mut folded);
    let mut header = BatchHeader {
        epoch: batch.epoch,
        first: batch.first,
        last: batch.last,
        data_len: folded.data_len as u32,
        extents: folded.extents as u32,
        marker_len: folded.marker_len as u32,
        digest: matches!(batch.trailer, Some(Trailer::Digest(_))),
        ..BatchHeader::new(id, generation)
    };
    let record = session.seal(&mut header, &folded.body, &mut Packer::default());
    running.pipeline.push((id, number, record));
}
