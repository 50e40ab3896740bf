//! One agent's connection: takes changes of its disks within their credit, answers with positions.

use std::cell::{Cell, RefCell};
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use thiserror::Error;
use tokio::io::{AsyncReadExt, AsyncWriteExt, BufReader, ReadHalf, WriteHalf};
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio_rustls::server::TlsStream;

use crate::checksum;
use crate::clock;
use crate::config::limits::{DISKS_PER_CONNECTION_MAX, SILENCE_SECONDS};
use crate::model::position::EPOCH_STEP_MAX;
use crate::model::{Compare, Digest, Marker, Name, Reliance, Trailer, Wanted};
use crate::observe::metrics;
use crate::process_server::disk::{Disk, NotReady};
use crate::process_server::optimize::batcher::{Collected, Input};
use crate::process_server::server::Server;
use crate::process_server::stream::Gap;
use crate::storage::AlignedBuf;
use crate::storage::catalogue::CatalogueError;
use crate::wire::ingest::{AgentMessage, FRAME_LEN, Frame, FrameType, Refusal, ServerMessage, change_cost, control_frame};
use crate::wire::{WireError, decode_control};

/// Read buffer; longer payloads go past it.
const READ_BUFFER: usize = 64 << 10;
/// The agent hears something at least this often.
const ALIVE_EVERY: Duration = Duration::from_secs(1);

#[derive(Debug, Error)]
enum ConnectionError {
    #[error("{0}")]
    Io(#[from] std::io::Error),
    #[error(transparent)]
    Wire(#[from] WireError),
    #[error("the agent said nothing for {SILENCE_SECONDS} s")]
    Silent,
    #[error("the agent does not read its answers")]
    Deaf,
    #[error("machine {0} is not registered here: add a [[machine]] table for it to the process server's configuration")]
    UnknownMachine(Name),
    #[error("the certificate names machine {0}, the agent says it is another one")]
    OtherMachine(Name),
    #[error("disk {0}: {1}")]
    Gap(String, Gap),
    #[error("disk {0}: a change of {1} bytes at {2} lies outside the disk")]
    Outside(String, u64, u64),
    #[error("disk {0}: more was sent than the credit allows")]
    Credit(String),
    #[error(transparent)]
    Catalogue(#[from] CatalogueError),
}

/// How an agent wants to open a disk.
struct Asked {
    size: u64,
    epoch: u64,
    takes_over: bool,
    relies_on: Reliance,
}

struct Slot {
    disk: Rc<Disk>,
    owner: u64,
    told: Cell<(u64, u64, u64)>,
    wanted: Cell<Option<Wanted>>,
}

/// Answers that may wait for an agent that does not read.
const REPLIES_MAX: usize = 4 * DISKS_PER_CONNECTION_MAX as usize;

struct Connection {
    deaf: Cell<bool>,
    /// The agent was welcomed; before that it is told nothing else.
    greeted: Cell<bool>,
    server: Rc<Server>,
    slots: RefCell<Vec<Option<Slot>>>,
    replies: RefCell<Vec<ServerMessage>>,
    bell: Rc<Notify>,
}

/// Serves an agent until it leaves.
pub(super) async fn serve(server: Rc<Server>, tls: TlsStream<TcpStream>, machine: &Name, peer: SocketAddr) {
    let connection = Rc::new(Connection {
        deaf: Cell::new(false),
        greeted: Cell::new(false),
        server,
        slots: RefCell::default(),
        replies: RefCell::default(),
        bell: Rc::new(Notify::new()),
    });
    let (read, mut write) = tokio::io::split(tls);
    let mut read = BufReader::with_capacity(READ_BUFFER, read);
    let result = tokio::select! {
        result = connection.receive(&mut read, machine) => result,
        result = connection.answer(&mut write) => result,
    };
    connection.close();
    match result {
        Ok(()) => tracing::info!(%machine, %peer, "agent left"),
        Err(error) => {
            if !matches!(error, ConnectionError::Io(_) | ConnectionError::Silent) {
                metrics::count_reason(metrics::REFUSED, "ingest");
            }
            if matches!(error, ConnectionError::UnknownMachine(_) | ConnectionError::OtherMachine(_)) {
                let mut view = connection.server.view.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                view.last_refused = Some(error.to_string());
            }
            tracing::warn!(%machine, %peer, %error, "connection of an agent ended");
            let goodbye = encode(&ServerMessage::Goodbye { message: error.to_string() });
            let _ = tokio::time::timeout(Duration::from_secs(1), async {
                write.write_all(&goodbye).await?;
                write.shutdown().await
            })
            .await;
        }
    }
}

impl Connection {
    async fn receive(&self, read: &mut BufReader<ReadHalf<TlsStream<TcpStream>>>, machine: &Name) -> Result<(), ConnectionError> {
        let mut header = [0; FRAME_LEN];
        loop {
            match timed(read.read_exact(&mut header)).await {
                Err(ConnectionError::Io(e)) if e.kind() == std::io::ErrorKind::UnexpectedEof => return Ok(()),
                other => other?,
            };
            if self.deaf.get() {
                return Err(ConnectionError::Deaf);
            }
            let frame = Frame::decode(&header)?;
            let mut payload = AlignedBuf::with_capacity(frame.payload_len as usize);
            payload.set_len(frame.payload_len as usize);
            timed(read.read_exact(&mut payload)).await?;
            if checksum::crc32c(&payload) != frame.payload_crc {
                return Err(WireError::Checksum("payload").into());
            }
            match frame.kind {
                FrameType::Control => {
                    self.control(decode_control(&payload)?, machine).await?;
                }
                _ if !self.greeted.get() => return Err(WireError::Illegal("first message of the agent").into()),
                FrameType::Write => self.change(&frame, Input::Change(Collected { extent: frame.extent, data: Some(payload) })).await?,
                FrameType::Zero => self.change(&frame, Input::Change(Collected { extent: frame.extent, data: None })).await?,
                FrameType::Mark => {
                    let marker: Marker = decode_control(&payload)?;
                    if !marker.is_sane() {
                        return Err(WireError::Illegal("marker").into());
                    }
                    self.change(&frame, Input::End(Trailer::Mark(Box::new(marker)))).await?;
                }
                FrameType::Digest => {
                    let digest: Digest = decode_control(&payload)?;
                    if !digest.is_sane() {
                        return Err(WireError::Illegal("digest").into());
                    }
                    self.change(&frame, Input::End(Trailer::Digest(digest))).await?;
                }
            }
        }
    }

    async fn control(&self, message: AgentMessage, machine: &Name) -> Result<(), ConnectionError> {
        match message {
            AgentMessage::Hello { machine: id } => {
                let registered = self.server.settings.machine.iter().find(|m| m.name == *machine);
                let registered = registered.ok_or_else(|| ConnectionError::UnknownMachine(machine.clone()))?;
                if registered.id() != id {
                    return Err(ConnectionError::OtherMachine(machine.clone()));
                }
                self.greeted.set(true);
                tracing::info!(%machine, "agent connected");
                self.reply(ServerMessage::Welcome);
            }
            _ if !self.greeted.get() => return Err(WireError::Illegal("first message of the agent").into()),
            AgentMessage::Open { slot, disk, size, epoch, takes_over, relies_on } => {
                if slot >= DISKS_PER_CONNECTION_MAX {
                    return Err(
                        WireError::TooLarge { what: "slot", found: u64::from(slot), limit: u64::from(DISKS_PER_CONNECTION_MAX) }.into()
                    );
                }
                // The machine's own disks only: the id alone opens nothing.
                let owned = self
                    .server
                    .disks
                    .get(&disk)
                    .filter(|d| self.server.settings.machine.iter().any(|m| m.name == *machine && m.id() == d.machine));
                let Some(disk) = owned.cloned() else {
                    metrics::count_reason(metrics::REFUSED, "unknown-disk");
                    let message = format!(
                        "disk {disk} is not registered to machine {machine}: add it to the machine's `disks` in the process server's configuration"
                    );
                    self.reply(ServerMessage::Refused { slot, reason: Refusal::NotAllowed, message });
                    return Ok(());
                };
                self.open(slot, disk, Asked { size, epoch, takes_over, relies_on }).await?;
            }
            AgentMessage::Report { slot, report } => {
                if let Some(Some(slot)) = self.slots.borrow().get(slot as usize) {
                    *slot.disk.report.borrow_mut() = report;
                    slot.disk.report_fresh.set(true);
                    slot.disk.forward.notify_one();
                }
            }
        }
        Ok(())
    }

    /// Tells the agent why a disk cannot be opened now, if so.
    fn refuses(&self, slot: u32, disk: &Disk, asked: &Asked) -> bool {
        let Some((reason, message)) = self.refusal(disk, asked) else { return false };
        if matches!(reason, Refusal::StaleEpoch { .. }) {
            metrics::count_reason(metrics::REFUSED, "stale-epoch");
        }
        self.reply(ServerMessage::Refused { slot, reason, message });
        true
    }

    /// Why a disk cannot be opened now, if so.
    fn refusal(&self, disk: &Disk, asked: &Asked) -> Option<(Refusal, String)> {
        let stale = |highest| (Refusal::StaleEpoch { highest }, format!("epoch {} is older than {highest}", asked.epoch));
        if asked.epoch <= disk.foreign.get() {
            return Some(stale(disk.foreign.get()));
        }
        if asked.takes_over && disk.claimed.get().is_none_or(|(epoch, _)| epoch != asked.epoch) {
            // Only the master target knows where the stream goes on, and it must not take anything of the old one any more.
            disk.claim.set(Some(asked.epoch));
            disk.forward.notify_one();
        }
        if let Some(reason) = &*disk.not_ready.borrow() {
            let refusal = if matches!(reason, NotReady::Refused(_)) { Refusal::NotAllowed } else { Refusal::NotReady };
            return Some((refusal, reason.message()));
        }
        if disk.claim.get().is_some() || !disk.vouches_for(asked.relies_on) {
            return Some((Refusal::NotReady, "the master target is asked where it stands".to_owned()));
        }
        let record = disk.record.borrow();
        let Some(record) = &*record else { return Some((Refusal::NotReady, NotReady::NoKey.message())) };
        if asked.size > record.size {
            return Some((Refusal::NotReady, "the master target has not made room for the disk's new size yet".to_owned()));
        }
        let highest = record.epoch.max(disk.stream.borrow().epoch());
        (asked.epoch < highest).then(|| stale(highest))
    }

    async fn open(&self, slot: u32, disk: Rc<Disk>, asked: Asked) -> Result<(), ConnectionError> {
        let Asked { size, epoch, relies_on, .. } = asked;
        let known = disk.foreign.get().max(disk.record.borrow().as_ref().map_or(0, |r| r.epoch));
        if epoch > known.saturating_add(EPOCH_STEP_MAX) {
            // Nothing of it is kept: it would be asked for as long as this server runs.
            let message = format!("epoch {epoch} is none that an agent can have come to from {known}");
            self.reply(ServerMessage::Refused { slot, reason: Refusal::NotAllowed, message });
            return Ok(());
        }
        if disk.size.replace(size) != size || disk.agent_epoch.get() < epoch {
            disk.agent_epoch.set(disk.agent_epoch.get().max(epoch));
            // The master target checks the size against the replica, and obeys another epoch; its answer comes with the next opening.
            disk.forward.notify_one();
        }
        if self.refuses(slot, &disk, &asked) {
            return Ok(());
        }
        let Some(mut record) = disk.record.borrow().clone() else { return Ok(()) };
        if epoch > record.epoch {
            // Stored before it is obeyed: an agent of the older epoch is refused even after a crash.
            record.epoch = epoch;
            record.relied.insert(epoch, relies_on.through);
            let (records, id) = (self.server.records.clone(), disk.id);
            let stored = tokio::task::spawn_blocking(move || records.merge(&[(id, record)])).await;
            stored.map_err(|e| std::io::Error::other(e.to_string()))??;
            if let Some(current) = disk.record.borrow_mut().as_mut() {
                current.epoch = current.epoch.max(epoch);
            }
        }
        let Some(place) = self.server.pipeline_place().await else { return Ok(()) };
        // The master target may have said something else meanwhile.
        if self.refuses(slot, &disk, &asked) {
            return Ok(());
        }
        let rival = disk.acknowledge.borrow().as_ref().is_some_and(|bell| !Rc::ptr_eq(bell, &self.bell));
        if rival {
            tracing::warn!(
                disk = %disk.label,
                "the disk was opened by a second connection while the first is there: if its agent did not just reconnect, two agents protect one machine, which must not be"
            );
            metrics::count_reason(metrics::REFUSED, "second-agent");
        }
        let owner = self.server.new_owner();
        disk.owner.set(owner);
        // Changes of the older epoch that are still together leave before the new ones come.
        let closed = disk.batcher.borrow_mut().close();
        if let Some(batch) = closed {
            self.server.dispatch(&disk, batch, place);
        }
        *disk.acknowledge.borrow_mut() = Some(self.bell.clone());
        let window = disk.grant.get().of(self.server.window());
        let (resume_at, safe, credit) = {
            let mut stream = disk.stream.borrow_mut();
            let resume_at = stream.open(epoch);
            (resume_at, stream.safe_in_epoch(), stream.credit(window))
        };
        let (generation, compare) = disk.record.borrow().as_ref().map_or((0, Compare::No), |r| (r.generation, r.compare));
        tracing::info!(disk = %disk.label, epoch, resume_at, "agent sends this disk");
        let stands = disk.stands();
        self.reply(ServerMessage::Opened { slot, generation, resume_at, safe, credit, compare, stands });
        let mut slots = self.slots.borrow_mut();
        if slots.len() <= slot as usize {
            slots.resize_with(slot as usize + 1, || None);
        }
        slots[slot as usize] = Some(Slot { disk, owner, told: Cell::default(), wanted: Cell::new(None) });
        Ok(())
    }

    async fn change(&self, frame: &Frame, input: Input) -> Result<(), ConnectionError> {
        let slot = self.slots.borrow().get(frame.slot as usize).and_then(|s| s.as_ref().map(|s| (s.disk.clone(), s.owner)));
        let Some((disk, owner)) = slot else { return Err(WireError::Illegal("slot").into()) };
        if disk.owner.get() != owner || disk.not_ready.borrow().is_some() {
            // Another connection of the machine took over, or the disk was closed under us: the agent is told by the answers.
            return Ok(());
        }
        let room = disk.record.borrow().as_ref().map_or(0, |r| r.size);
        if frame.extent.len > 0 && !frame.extent.fits(disk.size.get().min(room)) {
            return Err(ConnectionError::Outside(disk.label.to_string(), frame.extent.len, frame.extent.offset));
        }
        // Before anything is accepted: this wait may be cut off with the connection, what follows may not.
        let Some(place) = self.server.pipeline_place().await else { return Ok(()) };
        if disk.owner.get() != owner {
            return Ok(());
        }
        let now = clock::now();
        // Markers and digests are not counted by the agent: they are few, and always may travel.
        let payload = if matches!(frame.kind, FrameType::Mark | FrameType::Digest) { 0 } else { frame.payload_len as usize };
        let cost = change_cost(payload);
        let epoch;
        {
            let mut stream = disk.stream.borrow_mut();
            let label = || disk.label.to_string();
            if stream.over_credit(cost) {
                return Err(ConnectionError::Credit(label()));
            }
            if !stream.accept(frame.sequence, cost).map_err(|gap| ConnectionError::Gap(label(), gap))? {
                return Ok(());
            }
            epoch = stream.epoch();
        }
        metrics::disk_count(metrics::INGEST_BYTES, &disk.label, u64::from(frame.payload_len));
        let captured = now.minus(Duration::from_micros(frame.age_us));
        let was_open = disk.batcher.borrow().is_open();
        let closed = disk.batcher.borrow_mut().add(now, epoch, frame.sequence, cost, captured, input);
        match closed {
            Some(batch) => self.server.dispatch(&disk, batch, place),
            None if !was_open => self.server.batch_opened.notify_one(),
            None => {}
        }
        Ok(())
    }

    fn reply(&self, message: ServerMessage) {
        let mut replies = self.replies.borrow_mut();
        if replies.len() >= REPLIES_MAX {
            // The agent asks and does not listen; `receive` ends the connection.
            self.deaf.set(true);
            return;
        }
        replies.push(message);
        drop(replies);
        self.bell.notify_one();
    }

    /// Sends replies and the newest positions; each position once, however often it changed.
    async fn answer(&self, write: &mut WriteHalf<TlsStream<TcpStream>>) -> Result<(), ConnectionError> {
        let (mut told_target, mut told_draining, mut told_link): (Option<Name>, bool, Option<bool>) = (None, false, None);
        loop {
            let mut out: Vec<u8> = std::mem::take(&mut *self.replies.borrow_mut()).iter().flat_map(encode).collect();
            let target = self.server.target.borrow().clone().filter(|_| self.greeted.get());
            if let Some(name) = target.filter(|name| told_target.as_ref() != Some(name)) {
                out.extend(encode(&ServerMessage::Target(name.clone())));
                told_target = Some(name);
            }
            let draining = self.server.draining.load(Ordering::Relaxed) && self.greeted.get();
            if draining && !told_draining {
                out.extend(encode(&ServerMessage::Draining));
            }
            told_draining = draining;
            let link = self.server.link_up.get();
            if self.greeted.get() && told_link.replace(link) != Some(link) {
                out.extend(encode(&ServerMessage::Link { up: link }));
            }
            self.add_acknowledgements(&mut out);
            if out.is_empty() {
                let waited = tokio::time::timeout(ALIVE_EVERY, self.bell.notified()).await;
                if waited.is_err() {
                    self.reply(ServerMessage::Alive);
                }
                continue;
            }
            timed(write.write_all(&out)).await?;
            timed(write.flush()).await?;
        }
    }

    fn add_acknowledgements(&self, out: &mut Vec<u8>) {
        let mut slots = self.slots.borrow_mut();
        for (index, entry) in slots.iter_mut().enumerate() {
            let Some(slot) = entry else { continue };
            if slot.disk.owner.get() != slot.owner {
                let message = "the disk was opened by another connection, or its replica was replaced: open it again".to_owned();
                out.extend(encode(&ServerMessage::Refused { slot: index as u32, reason: Refusal::NotReady, message }));
                *entry = None;
                continue;
            }
            let not_ready = slot.disk.not_ready.borrow().clone();
            if let Some(reason) = not_ready {
                let message = ServerMessage::Refused { slot: index as u32, reason: Refusal::NotReady, message: reason.message() };
                out.extend(encode(&message));
                *slot.disk.acknowledge.borrow_mut() = None;
                *entry = None;
                continue;
            }
            let wanted = slot.disk.wanted.get();
            if let Some(wanted) = wanted.filter(|&wanted| slot.wanted.replace(Some(wanted)) != Some(wanted)) {
                let generation = slot.disk.record.borrow().as_ref().map_or(0, |r| r.generation);
                out.extend(encode(&ServerMessage::Wanted { slot: index as u32, generation, wanted }));
            }
            for verdict in slot.disk.verdicts.borrow_mut().drain(..) {
                out.extend(encode(&ServerMessage::Verdict { slot: index as u32, verdict }));
            }
            let window = slot.disk.grant.get().of(self.server.window());
            let mut stream = slot.disk.stream.borrow_mut();
            let (cached, safe) = (stream.cached_in_epoch(), stream.safe_in_epoch());
            let credit = stream.credit(window);
            if slot.told.replace((cached, safe, credit)) != (cached, safe, credit) {
                let message = ServerMessage::Ack { slot: index as u32, epoch: stream.epoch(), cached, safe, credit };
                out.extend(encode(&message));
            }
        }
    }

    fn close(&self) {
        for slot in self.slots.borrow_mut().drain(..).flatten() {
            if slot.disk.owner.get() == slot.owner {
                *slot.disk.acknowledge.borrow_mut() = None;
            }
        }
    }
}

async fn timed<T>(io: impl Future<Output = std::io::Result<T>>) -> Result<T, ConnectionError> {
    match tokio::time::timeout(Duration::from_secs(SILENCE_SECONDS), io).await {
        Ok(result) => Ok(result?),
        Err(_) => Err(ConnectionError::Silent),
    }
}

fn encode(message: &ServerMessage) -> Vec<u8> {
    control_frame(message).expect("our own messages are short")
}
