//! The agent in the simulation: the product's backlog, regions and dirty map, driven as its capture thread and session do it.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::disallowed_methods,
    unreachable_pub,
    missing_docs,
    reason = "a part of the tests"
)]

use std::collections::HashMap;
use std::collections::VecDeque;
use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use tidegate::agent::backlog::{Backlog, Held, Room, SegmentName};
use tidegate::agent::dirty_map::DirtyMap;
use tidegate::agent::regions::Regions;
use tidegate::clock::Mono;
use tidegate::model::digest::DIGEST_BLOCK;
use tidegate::model::{
    ChangeKind, Compare, Digest, DiskId, Extent, GroupPart, MachineId, Marker, Name, PointId, PointKind, Position, RegionSet, Reliance,
};
use tidegate::storage::digest::hash_blocks;
use tidegate::storage::log::Location;
use tidegate::wire::ingest::{AgentMessage, Refusal, ServerMessage, change_cost, encode_change};

use super::group::Content;
use super::support::Rng;
use super::support::faulty_storage::{Faulty, FaultyFile};
use super::{DISK_BYTES, REGION, Wire};

/// What stands in for the agent's log on disk: it lives and dies with the agent.
#[derive(Default)]
pub struct Spilled(HashMap<u64, Vec<Held>>, u64);

/// One protected disk.
pub struct Volume {
    pub id: DiskId,
    /// The source: what was answered is on it.
    pub content: Vec<u8>,
    pub map: DirtyMap<FaultyFile>,
    regions: Regions,
    pub backlog: Backlog,
    carrier: Option<Name>,
    spilled: Spilled,
    pub open: bool,
    asked: bool,
    spent: u64,
    credit: u64,
    /// Times that what is not known to be in the stream had to be sent again.
    pub resyncs: u64,
    /// It was told that the master target does not have what it acknowledged.
    pub found_lost: bool,
}

/// A connection to a process server.
pub struct Connection {
    pub gateway: usize,
    pub name: Name,
    pub up: VecDeque<Wire>,
    pub down: VecDeque<ServerMessage>,
}

/// A machine's agent.
pub struct Agent {
    pub storage: Faulty,
    pub machine: MachineId,
    pub volumes: Vec<Volume>,
    pub connection: Option<Connection>,
    pub now: u64,
    /// A map takes no more writes: the agent is to be started again.
    pub map_failed: bool,
}

async fn open_map(storage: &Faulty, n: usize, id: DiskId) -> std::io::Result<DirtyMap<FaultyFile>> {
    DirtyMap::open(storage, Path::new(&format!("/agent/{n}.map")), id, DISK_BYTES, REGION, 1).await
}

fn volume(id: DiskId, content: Vec<u8>, map: DirtyMap<FaultyFile>, room: Room) -> Volume {
    let marked = map.marked();
    Volume {
        id,
        content,
        regions: Regions::new(REGION, DISK_BYTES, marked),
        backlog: Backlog::new(map.header().epoch, room),
        map,
        carrier: None,
        spilled: Spilled::default(),
        open: false,
        asked: false,
        spent: 0,
        credit: 0,
        resyncs: 0,
        found_lost: false,
    }
}

impl Agent {
    pub async fn start(machine: MachineId, ids: &[DiskId], room: Room) -> Self {
        let storage = Faulty::default();
        let mut volumes = Vec::new();
        for (n, id) in ids.iter().enumerate() {
            let map = open_map(&storage, n, *id).await.expect("a fresh storage");
            volumes.push(volume(*id, vec![0; DISK_BYTES as usize], map, room));
        }
        Self { storage, machine, volumes, connection: None, now: 1, map_failed: false }
    }

    /// Power goes and comes back: what was answered is on the disks, the maps say what may not be in the stream.
    pub async fn crash(&mut self, rng: &mut Rng, room: Room) {
        (self.connection, self.map_failed) = (None, false);
        let old: Vec<(DiskId, Vec<u8>)> = self.volumes.drain(..).map(|v| (v.id, v.content)).collect();
        self.storage.crash(rng);
        for (n, (id, content)) in old.into_iter().enumerate() {
            let map = open_map(&self.storage, n, id).await.expect("no faults are left");
            self.volumes.push(volume(id, content, map, room));
        }
    }

    fn tick(&mut self) -> Mono {
        self.now += 1000;
        Mono(self.now)
    }

    /// The application writes. False if the map refused it, which leaves the disk as it was.
    pub async fn write(&mut self, disk: usize, extent: Extent, fill: Option<u8>) -> bool {
        let now = self.tick();
        let volume = &mut self.volumes[disk];
        volume.regions.begin(extent);
        let marked = volume.map.mark(volume.regions.of(extent)).await;
        volume.regions.end(extent);
        if marked.is_err() {
            return false;
        }
        volume.content[extent.offset as usize..extent.end() as usize].fill(fill.unwrap_or(0));
        if volume.regions.all_missing(extent) {
            return true;
        }
        let kind = match fill {
            Some(_) => ChangeKind::Write {
                offset: extent.offset,
                data: Bytes::copy_from_slice(&volume.content[extent.offset as usize..extent.end() as usize]),
            },
            None => ChangeKind::Zero(extent),
        };
        match volume.backlog.push(kind, now) {
            Ok(number) => volume.regions.captured(extent, number, now),
            Err(_) => {
                volume.resyncs += u64::from(volume.regions.lose(extent));
            }
        }
        true
    }

    /// Its disks.
    pub fn disks(&self) -> Vec<DiskId> {
        self.volumes.iter().map(|v| v.id).collect()
    }

    /// What its disks hold.
    pub fn content(&self) -> Content {
        self.volumes.iter().map(|v| (v.id, v.content.clone())).collect()
    }

    /// A point of all disks, if it can be made now: what they hold.
    pub fn mark(&mut self, point: PointId, kind: PointKind, group: Option<GroupPart>) -> Option<Content> {
        let now = self.tick();
        if !self.volumes.iter().all(|v| v.regions.missing_bytes() == 0 && v.backlog.has_room_for_marker()) {
            return None;
        }
        let marker = Marker {
            point,
            machine: self.machine,
            kind,
            disks: self.volumes.iter().map(|v| v.id).collect(),
            sizes: vec![DISK_BYTES; self.volumes.len()],
            label: None,
            wall_ms: 0,
            hold_us: 0,
            group,
            proof: vec![],
            remark: None,
        };
        for volume in &mut self.volumes {
            volume.backlog.push(ChangeKind::Mark(Box::new(marker.clone())), now).expect("markers always fit");
        }
        Some(self.content())
    }

    /// Connects to a process server.
    pub fn connect(&mut self, gateway: usize, name: Name) {
        for volume in &mut self.volumes {
            (volume.open, volume.asked) = (false, false);
        }
        self.connection = Some(Connection { gateway, name, up: VecDeque::new(), down: VecDeque::new() });
    }

    /// Opens what is not open, and sends what it may.
    pub async fn send(&mut self, most: usize) {
        let Some(connection) = &mut self.connection else { return };
        for (slot, volume) in self.volumes.iter_mut().enumerate() {
            if !volume.open && !volume.asked {
                if volume.carry(&connection.name, None).await.is_err() {
                    self.map_failed = true;
                    continue;
                }
                volume.asked = true;
                connection.up.push_back(Wire::Control(AgentMessage::Open {
                    slot: slot as u32,
                    disk: volume.id,
                    size: DISK_BYTES,
                    epoch: volume.backlog.epoch(),
                    takes_over: volume.backlog.is_moving(),
                    relies_on: Reliance { generation: volume.map.header().generation, through: volume.map.header().cleaned },
                }));
            }
            for _ in 0..most {
                if !volume.open {
                    break;
                }
                volume.read_back();
                let Some((change, captured)) = volume.backlog.take_next(volume.credit - volume.spent) else { break };
                volume.spent += change_cost(change.kind.data_len());
                let mut bytes = Vec::new();
                encode_change(slot as u32, change.sequence, &change.kind, self.now - captured.0, &mut bytes).expect("it encodes");
                connection.up.push_back(Wire::Change(bytes));
            }
        }
    }

    /// Sends some missing regions.
    pub fn resynchronise(&mut self, most: usize) {
        let now = self.tick();
        for volume in self.volumes.iter_mut().filter(|v| v.open) {
            for _ in 0..most {
                let Some(region) = volume.regions.next_missing() else { break };
                let extent = volume.regions.extent(region);
                let data = Bytes::copy_from_slice(&volume.content[extent.offset as usize..extent.end() as usize]);
                let Ok(number) = volume.backlog.push(ChangeKind::Write { offset: extent.offset, data }, now) else { break };
                volume.regions.captured(extent, number, now);
                volume.regions.sent(region);
            }
        }
    }

    /// Puts a digest of a block into the stream, to be compared with the replica there.
    pub fn scrub(&mut self, disk: usize, block: u64) {
        let now = self.tick();
        let volume = &mut self.volumes[disk];
        let extent = Extent::new(block * DIGEST_BLOCK, DIGEST_BLOCK);
        if volume.open && volume.regions.missing_bytes() == 0 {
            let hashes = hash_blocks(&volume.content[extent.offset as usize..extent.end() as usize]);
            let _ = volume.backlog.push(ChangeKind::Digest(Box::new(Digest { extent, hashes, scrub: true })), now);
        }
    }

    /// Marks clean what is safe.
    pub async fn clean(&mut self) {
        let now = self.tick();
        for volume in &mut self.volumes {
            let clean = volume.regions.cleanable(&volume.map.marked(), volume.backlog.safe(), now, Duration::ZERO);
            let safe = volume.backlog.safe_position();
            if clean.is_empty()
                || safe > volume.map.header().cleaned && volume.map.update_header(|h| h.cleaned = h.cleaned.max(safe)).await.is_err()
            {
                self.map_failed |= !clean.is_empty();
                continue;
            }
            clean.iter().for_each(|region| volume.regions.cleaned(*region));
            self.map_failed |= volume.map.clear(&clean).await.is_err();
        }
    }

    /// Moves segments to the log and back.
    pub fn spill(&mut self, fails: bool) {
        for volume in &mut self.volumes {
            while let Some((name, changes)) = volume.backlog.spill() {
                volume.spilled.put(&mut volume.backlog, name, changes, fails);
                if fails {
                    break;
                }
            }
            for gone in volume.backlog.take_given_up() {
                volume.spilled.0.remove(&gone.stored_bytes());
            }
        }
    }

    /// Hears one message. An error ends the connection.
    pub async fn hear(&mut self) -> Result<(), String> {
        let Some(message) = self.connection.as_mut().and_then(|c| c.down.pop_front()) else { return Ok(()) };
        let text = |e: std::io::Error| e.to_string();
        match message {
            ServerMessage::Opened { slot, generation, resume_at, safe, credit, stands, compare } => {
                let volume = &mut self.volumes[slot as usize];
                debug_assert!(compare != Compare::Held);
                volume.asked = false;
                volume.opened(generation, resume_at, stands).await.map_err(text)?;
                if volume.open {
                    volume.carrier = self.connection.as_ref().map(|c| c.name.clone());
                    (volume.credit, volume.spent) = (credit, 0);
                    let epoch = volume.backlog.epoch();
                    volume.backlog.acknowledge(epoch, 0, safe);
                }
            }
            ServerMessage::Refused { slot, reason, .. } => {
                let volume = &mut self.volumes[slot as usize];
                (volume.open, volume.asked) = (false, false);
                if let Refusal::StaleEpoch { highest } = reason {
                    let name = self.connection.as_ref().expect("it spoke").name.clone();
                    volume.carry(&name, Some(highest)).await.map_err(text)?;
                }
            }
            ServerMessage::Ack { slot, epoch, cached, safe, credit } => {
                let volume = &mut self.volumes[slot as usize];
                volume.backlog.acknowledge(epoch, cached, safe);
                volume.credit = volume.credit.max(credit);
            }
            ServerMessage::Goodbye { message } => return Err(message),
            _ => {}
        }
        Ok(())
    }

    /// Everything captured is safe.
    pub fn is_safe(&self) -> bool {
        self.volumes.iter().all(|v| v.regions.missing_bytes() == 0 && v.open && v.backlog.rungs()[0].1 == v.backlog.rungs()[3].1)
    }
}

impl Spilled {
    fn put(&mut self, backlog: &mut Backlog, name: SegmentName, changes: Vec<Held>, fails: bool) {
        self.1 += 1;
        let place = place(self.1);
        if !fails {
            self.0.insert(place.stored_bytes(), changes);
        }
        backlog.spilled(name, (!fails).then_some(place));
    }
}

/// A place that is told apart by the bytes it takes.
fn place(n: u64) -> Location {
    Location::of_length(n * 4096)
}

impl Volume {
    fn read_back(&mut self) {
        if let Some((name, location)) = self.backlog.wants() {
            let changes =
                self.spilled.0.get(&location.stored_bytes()).cloned().expect("what is in the log stays there until it is given up");
            assert!(self.backlog.loaded(name, changes));
        }
    }

    async fn carry(&mut self, carrier: &Name, above: Option<u64>) -> std::io::Result<()> {
        let stays = above.is_none() && self.carrier.as_ref().is_none_or(|known| known == carrier);
        if !stays {
            self.map.update_header(|h| h.epoch = h.epoch.max(above.unwrap_or(0)) + 1).await?;
            self.backlog.begin_move(self.map.header().epoch);
            self.carrier = Some(carrier.clone());
        }
        Ok(())
    }

    async fn opened(&mut self, generation: u64, resume_at: u64, stands: Option<Position>) -> std::io::Result<()> {
        if self.map.header().generation != generation {
            return self.restart(true, Some(generation)).await;
        }
        if stands.is_some_and(|stands| stands < self.map.header().cleaned) {
            self.found_lost = true;
            return self.restart(true, None).await;
        }
        let continued = match stands {
            Some(stands) if self.backlog.is_moving() => self.backlog.take_over(stands),
            _ => self.backlog.resume(resume_at, stands),
        };
        match continued {
            Ok(()) => self.open = true,
            Err(_) => self.restart(false, None).await?,
        }
        Ok(())
    }

    async fn restart(&mut self, everything: bool, generation: Option<u64>) -> std::io::Result<()> {
        if everything {
            self.map.mark_all().await?;
        }
        self.map
            .update_header(|h| {
                h.epoch += 1;
                if everything {
                    h.cleaned = Position::default();
                }
                h.generation = generation.unwrap_or(h.generation);
            })
            .await?;
        self.backlog.restart(self.map.header().epoch, everything);
        let marked = self.map.marked();
        let missing = if everything { RegionSet::full(marked.regions()) } else { marked };
        self.resyncs += u64::from(self.regions.restart(&missing));
        Ok(())
    }
}
