//! Stands in for the agent of a machine: speaks the ingest protocol to a real process server, sends what a test says, and keeps
//! what each disk holds. Where an agent is honest it need not be.
#![allow(clippy::disallowed_methods, unreachable_pub, missing_docs, reason = "a part of the tests")]

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use tidegate::checksum;
use tidegate::crypto::pki::Role;
use tidegate::crypto::statement::Signer;
use tidegate::crypto::tls::{ALPN_INGEST, Credentials, TlsFiles, server_name};
use tidegate::model::change::{GROUP_SUBJECT, group_statement};
use tidegate::model::{
    DiskId, DiskReport, Extent, GroupPart, MachineId, Marker, Name, PointId, PointKind, Position, Reliance, ReplicationState, Wanted,
};
use tidegate::wire::decode_control;
use tidegate::wire::ingest::{AgentMessage, FRAME_LEN, Frame, FrameType, Refusal, ServerMessage, control_frame};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::mpsc;

/// Bytes of each disk.
pub const DISK_BYTES: usize = 1 << 20;

enum Order {
    Write { disk: usize, offset: usize, data: Vec<u8> },
    Mark { marker: Box<Marker>, disks: Vec<usize> },
}

/// A machine and its stand-in.
pub struct Feeder {
    /// Its name.
    pub name: Name,
    /// Ids of its disks.
    pub disks: Vec<DiskId>,
    orders: mpsc::UnboundedSender<Order>,
    images: Vec<Vec<u8>>,
    coordinator: Signer,
    thread: Option<JoinHandle<()>>,
}

impl Feeder {
    /// Connects; `tls` holds the machine's certificate, `coordinator` that of the coordinator whose rounds it is in.
    pub fn start(name: &str, disks: usize, tls: &Path, coordinator: &Path, port: u16) -> Self {
        let name: Name = name.parse().expect("a name");
        let ids: Vec<DiskId> = (0..disks).map(|n| DiskId::from_names(&name, &format!("d{n}").parse().expect("a name"))).collect();
        let credentials = Credentials::load(&TlsFiles::in_dir(tls), Role::Agent).expect("a certificate");
        let coordinator = Credentials::load(&TlsFiles::in_dir(coordinator), Role::Coordinator).expect("a certificate").signer();
        let coordinator = coordinator.expect("a key that signs");
        let (orders, wanted) = mpsc::unbounded_channel();
        let (machine, slots) = (MachineId::from_name(&name), ids.clone());
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            // An agent that lies may be shown the door.
            if let Err(told) = runtime.block_on(session(machine, slots, credentials, port, wanted)) {
                eprintln!("the process server ended the connection of {machine}: {told}");
            }
        });
        Self { images: vec![vec![0; DISK_BYTES]; disks], name, disks: ids, orders, coordinator, thread: Some(thread) }
    }

    /// The machine's id.
    pub fn id(&self) -> MachineId {
        MachineId::from_name(&self.name)
    }

    /// Writes `len` bytes of a pattern.
    pub fn write(&mut self, disk: usize, offset: usize, pattern: u8, len: usize) {
        let data = vec![pattern; len];
        self.images[disk][offset..offset + len].copy_from_slice(&data);
        let _ = self.orders.send(Order::Write { disk, offset, data });
    }

    /// What the disks hold now.
    pub fn images(&self) -> Vec<Vec<u8>> {
        self.images.clone()
    }

    /// The marker of an honest agent for its part of a group point.
    pub fn part(&self, group: &GroupPart, kind: PointKind, label: Option<&str>) -> Marker {
        let statement = group_statement(group, kind, label, None).expect("it encodes");
        Marker {
            proof: self.coordinator.sign(GROUP_SUBJECT, &statement).expect("it signs"),
            point: PointId::part(group.point, self.id()),
            machine: self.id(),
            kind,
            disks: self.disks.clone(),
            sizes: vec![DISK_BYTES as u64; self.disks.len()],
            label: label.map(str::to_owned),
            wall_ms: tidegate::clock::wall_ms(),
            hold_us: 1500,
            group: Some(group.clone()),
            remark: None,
        }
    }

    /// Puts a marker into every disk's stream.
    pub fn mark(&self, marker: Marker) {
        self.mark_on(marker, (0..self.disks.len()).collect());
    }

    /// Puts a marker into the streams of some disks.
    pub fn mark_on(&self, marker: Marker, disks: Vec<usize>) {
        let _ = self.orders.send(Order::Mark { marker: Box::new(marker), disks });
    }

    /// The machine is gone.
    pub fn stop(&mut self) {
        // The session ends when nobody can give it orders any more.
        self.orders = mpsc::unbounded_channel().0;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Drop for Feeder {
    fn drop(&mut self) {
        self.stop();
    }
}

/// One disk's stream: everything that was ever sent, so that it can be sent again.
struct Slot {
    disk: DiskId,
    epoch: u64,
    generation: u64,
    sent: Vec<(FrameType, Extent, Vec<u8>)>,
    open: bool,
    state: ReplicationState,
}

impl Slot {
    fn frame(&self, slot: u32, index: usize) -> Vec<u8> {
        let (kind, extent, payload) = &self.sent[index];
        let frame = Frame {
            kind: *kind,
            slot,
            payload_len: payload.len() as u32,
            sequence: index as u64 + 1,
            extent: *extent,
            age_us: 0,
            payload_crc: checksum::crc32c(payload),
        };
        [&frame.encode()[..], payload].concat()
    }

    fn open(&self, slot: u32) -> Vec<u8> {
        control(&AgentMessage::Open {
            slot,
            disk: self.disk,
            size: DISK_BYTES as u64,
            epoch: self.epoch,
            takes_over: false,
            relies_on: Reliance::default(),
        })
    }

    fn report(&self, slot: u32) -> Vec<u8> {
        let captured = Position { epoch: self.epoch, sequence: self.sent.len() as u64 };
        let report = DiskReport { state: self.state, captured, generation: self.generation, ..DiskReport::default() };
        control(&AgentMessage::Report { slot, report })
    }
}

fn control(message: &AgentMessage) -> Vec<u8> {
    control_frame(message).expect("a message")
}

async fn session(
    machine: MachineId,
    disks: Vec<DiskId>,
    credentials: Credentials,
    port: u16,
    mut orders: mpsc::UnboundedReceiver<Order>,
) -> Result<(), String> {
    let text = |e: std::io::Error| e.to_string();
    let tcp = tokio::net::TcpStream::connect(("127.0.0.1", port)).await.map_err(text)?;
    let connector = tokio_rustls::TlsConnector::from(Arc::new(credentials.client(ALPN_INGEST).expect("a client")));
    let tls = connector.connect(server_name(Role::ProcessServer), tcp).await.map_err(text)?;
    let (mut read, mut write) = tokio::io::split(tls);
    let (told, mut messages) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        loop {
            let message = receive(&mut read).await;
            let ended = message.is_err();
            if told.send(message).is_err() || ended {
                return;
            }
        }
    });
    let new = |disk| Slot { disk, epoch: 1, generation: 0, sent: Vec::new(), open: false, state: ReplicationState::Delta };
    let mut slots: Vec<Slot> = disks.iter().map(|disk| new(*disk)).collect();
    let mut quiesced = HashMap::new();
    write.write_all(&control(&AgentMessage::Hello { machine })).await.map_err(text)?;
    let mut tick = tokio::time::interval(Duration::from_millis(200));
    loop {
        let mut out = Vec::new();
        tokio::select! {
            order = orders.recv() => match order {
                None => return Ok(()),
                Some(order) => obey(&mut slots, order, &mut out),
            },
            message = messages.recv() => {
                let message = message.ok_or("the connection is gone")??;
                hear(&mut slots, message, machine, &mut quiesced, &mut out)?;
            }
            _ = tick.tick() => {
                for (n, slot) in slots.iter().enumerate() {
                    out.extend(if slot.open { slot.report(n as u32) } else { slot.open(n as u32) });
                }
            }
        }
        write.write_all(&out).await.map_err(text)?;
        write.flush().await.map_err(text)?;
    }
}

async fn receive<R: tokio::io::AsyncRead + Unpin>(read: &mut R) -> Result<ServerMessage, String> {
    let mut header = [0; FRAME_LEN];
    read.read_exact(&mut header).await.map_err(|e| e.to_string())?;
    let frame = Frame::decode(&header).map_err(|e| e.to_string())?;
    let mut payload = vec![0; frame.payload_len as usize];
    read.read_exact(&mut payload).await.map_err(|e| e.to_string())?;
    decode_control(&payload).map_err(|e| e.to_string())
}

fn push(slots: &mut [Slot], n: usize, change: (FrameType, Extent, Vec<u8>), out: &mut Vec<u8>) {
    let slot = &mut slots[n];
    slot.sent.push(change);
    if slot.open {
        out.extend(slot.frame(n as u32, slot.sent.len() - 1));
    }
}

fn obey(slots: &mut [Slot], order: Order, out: &mut Vec<u8>) {
    match order {
        Order::Write { disk, offset, data } => {
            push(slots, disk, (FrameType::Write, Extent::new(offset as u64, data.len() as u64), data), out);
        }
        Order::Mark { marker, disks } => {
            let payload = postcard::to_stdvec(&*marker).expect("a marker");
            disks.into_iter().for_each(|n| push(slots, n, (FrameType::Mark, Extent::new(0, 0), payload.clone()), out));
        }
    }
}

fn hear(
    slots: &mut [Slot],
    message: ServerMessage,
    machine: MachineId,
    quiesced: &mut HashMap<PointId, ()>,
    out: &mut Vec<u8>,
) -> Result<(), String> {
    match message {
        ServerMessage::Opened { slot, generation, resume_at, .. } => {
            let n = slot as usize;
            (slots[n].open, slots[n].generation) = (true, generation);
            let from = resume_at.saturating_sub(1) as usize;
            (from..slots[n].sent.len()).for_each(|index| out.extend(slots[n].frame(slot, index)));
            out.extend(slots[n].report(slot));
        }
        ServerMessage::Refused { slot, reason, .. } => {
            slots[slot as usize].open = false;
            if let Refusal::StaleEpoch { highest } = reason {
                slots[slot as usize].epoch = highest + 1;
            }
        }
        ServerMessage::Wanted { wanted: Wanted::Run | Wanted::Release, .. } => {
            slots.iter_mut().for_each(|s| s.state = ReplicationState::Delta)
        }
        ServerMessage::Wanted { wanted: Wanted::Quiesce(point), .. } => {
            if quiesced.insert(point, ()).is_none() {
                let marker = Marker {
                    point,
                    machine,
                    kind: PointKind::Crash,
                    disks: slots.iter().map(|s| s.disk).collect(),
                    sizes: vec![DISK_BYTES as u64; slots.len()],
                    label: None,
                    wall_ms: tidegate::clock::wall_ms(),
                    hold_us: 0,
                    group: None,
                    proof: vec![],
                    remark: None,
                };
                obey(slots, Order::Mark { marker: Box::new(marker), disks: (0..slots.len()).collect() }, out);
            }
            slots.iter_mut().for_each(|s| s.state = ReplicationState::FailedOver);
        }
        ServerMessage::Goodbye { message } => return Err(message),
        ServerMessage::Welcome
        | ServerMessage::Ack { .. }
        | ServerMessage::Alive
        | ServerMessage::Draining
        | ServerMessage::Target(_)
        | ServerMessage::Link { .. }
        | ServerMessage::Verdict { .. } => {}
    }
    Ok(())
}
