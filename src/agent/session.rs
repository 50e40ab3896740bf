//! The connection to the process server: sends what the backlogs hold, takes acknowledgements, reconnects with backoff.

use std::cell::{Cell, RefCell};
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::io::{AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::net::TcpStream;
use tokio::sync::{Notify, mpsc, oneshot};
use tokio_rustls::client::TlsStream;

use super::choice::Choice;
use super::greeting::{self, SessionError, read_message};
use super::shared::{AgentShared, Command, VolumeShared};
use super::spill::Spill;
use crate::clock::{self, Mono, micros};
use crate::config::agent::AgentSettings;
use crate::config::limits::{HANDSHAKE_SECONDS, SILENCE_SECONDS};
use crate::crypto::tls::Credentials;
use crate::model::{Compare, Name, Position, Reliance};
use crate::observe::metrics;
use crate::wire::WireError;
use crate::wire::ingest::{AgentMessage, Refusal, ServerMessage, change_cost, control_frame, encode_change};

/// Bytes given to TLS at once.
const STAGING_BYTES: usize = 512 << 10;
/// A busy stream is polled this often before the thread sleeps until it is woken.
const POLL: Duration = Duration::from_millis(1);
const POLLS_BEFORE_SLEEP: u32 = 50;
const REPORT_EVERY: Duration = Duration::from_secs(1);
/// A process server that is there says something within this.
const SPEAKS: Duration = Duration::from_secs(3);
/// What was sent and is not durable there after this never will be: its disk hangs, although it speaks.
const STUCK: Duration = Duration::from_secs(60);
/// Others are asked at least this often whether they reach the master target.
const SEEK_MAX: Duration = Duration::from_secs(60);
/// A master target that comes back is found by one process server this much sooner than by another.
const RECONNECTS: Duration = Duration::from_secs(15);
const CUT_OFF_HERE: &str = "the process server does not reach the master target: changes are safe in its cache, and wait there";
const GOING: &str = "the process server is to be taken out of service, and no other one takes this machine: it stays there";
const CUT_OFF: &str = "no process server reaches the master target: changes are safe in the cache of the one that serves, and wait there";

/// What the session needs of the agent.
pub struct Parts {
    /// As configured.
    pub settings: AgentSettings,
    /// Certificates.
    pub credentials: Credentials,
    /// Shared with the capture thread.
    pub shared: Arc<AgentShared>,
    /// To the capture thread.
    pub commands: mpsc::Sender<Command>,
    /// The log on disk, if there is one.
    pub spill: Option<Arc<Spill>>,
}

/// Runs until the agent stops.
pub fn run(parts: Parts) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime on one thread can always be built");
    runtime.block_on(tokio::task::LocalSet::new().run_until(reconnect(Rc::new(parts))));
}

async fn reconnect(parts: Rc<Parts>) {
    let shared = &parts.shared;
    let addresses: Vec<String> = parts.settings.process_server.addresses().cloned().collect();
    let mut choice = Choice::new(addresses.len(), parts.settings.process_server.switch_after);
    let mut told = String::new();
    while !shared.stopping.load(Ordering::Relaxed) {
        let started = clock::now();
        let served = Cell::new(None);
        let others = choice.others().map(|(other, unfit)| (other, addresses[other].as_str(), unfit)).collect();
        let attempt = Attempt { address: &addresses[choice.current()], others, served: &served };
        let result = connect_and_run(&parts, &attempt).await;
        shared.connected.store(false, Ordering::Relaxed);
        for volume in &shared.volumes {
            volume.open.store(false, Ordering::Relaxed);
        }
        let Err(error) = result else { return };
        if matches!(error, SessionError::Stopped) {
            return;
        }
        let now = clock::now();
        choice.served_until(served.get());
        let message = error.to_string();
        // The same failure again and again is one line in the log; `status` shows it all the time.
        if message != told {
            tracing::warn!(error = message, "not connected to the process server; writes go on, changes are kept");
            told.clone_from(&message);
        }
        *shared.last_error.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(message);
        if now.since(started) > Duration::from_secs(30) {
            told.clear();
        }
        let wait = match error {
            SessionError::CutOff(better) | SessionError::Leaves(better) => choice.go_to(better),
            SessionError::NotServed(_) => choice.took_nothing(now),
            _ => choice.failed(now),
        };
        let jitter = Duration::from_micros(crate::storage::log::random_u64() % micros(wait).max(1) / 2);
        tokio::time::sleep(wait / 2 + jitter).await;
    }
}

/// What the two halves of a connection share.
struct Link {
    shared: Arc<AgentShared>,
    commands: mpsc::Sender<Command>,
    spill: Option<Arc<Spill>>,
    /// The process server, by its certificate.
    carrier: Name,
    /// There are others.
    may_leave: bool,
    /// It is to be taken out of service.
    draining: Cell<bool>,
    slots: Vec<Slot>,
    work: Notify,
    reopen: RefCell<Vec<(usize, Duration)>>,
    /// A disk was opened: the other side wants to know how it does.
    report_now: Cell<bool>,
    /// When the process server said something last.
    heard: Cell<Mono>,
    /// Since when it does not reach the master target, if so.
    cut_off: Cell<Option<Mono>>,
}

#[derive(Default)]
struct Slot {
    open: Cell<bool>,
    credit: Cell<u64>,
    spent: Cell<u64>,
    /// Size it was opened with.
    size: Cell<u64>,
    /// Epoch in which it was opened: what belongs to another one is not sent here.
    epoch: Cell<u64>,
    /// A segment of its backlog is being read from the log.
    reading: Cell<bool>,
    /// What the last refusal said, so that it is told once.
    told: RefCell<String>,
}

/// One attempt at one process server.
struct Attempt<'a> {
    address: &'a str,
    others: Vec<(usize, &'a str, Option<Mono>)>,
    /// When it served a disk last.
    served: &'a Cell<Option<Mono>>,
}

async fn connect_and_run(parts: &Parts, attempt: &Attempt<'_>) -> Result<(), SessionError> {
    let (shared, address) = (&parts.shared, attempt.address);
    let whole = Duration::from_secs(HANDSHAKE_SECONDS);
    let limit = if parts.settings.process_server.standby.is_empty() {
        whole
    } else {
        parts.settings.process_server.switch_after.clamp(SPEAKS, whole)
    };
    let (tls, carrier) = greeting::greet(&parts.credentials, shared.machine_id, address, limit).await?;
    tracing::info!(address, process_server = %carrier, "connected to the process server");
    shared.connected.store(true, Ordering::Relaxed);
    *shared.last_error.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = None;
    *shared.gateway.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some((address.to_owned(), carrier.clone()));
    let (read, write) = tokio::io::split(tls);
    let link = Rc::new(Link {
        shared: shared.clone(),
        commands: parts.commands.clone(),
        spill: parts.spill.clone(),
        carrier,
        may_leave: !parts.settings.process_server.standby.is_empty(),
        draining: Cell::new(false),
        slots: shared.volumes.iter().map(|_| Slot::default()).collect(),
        work: Notify::new(),
        report_now: Cell::new(false),
        heard: Cell::new(clock::now()),
        cut_off: Cell::new(None),
        reopen: RefCell::new((0..shared.volumes.len()).map(|i| (i, Duration::ZERO)).collect()),
    });
    tokio::select! {
        result = receive(link.clone(), read) => result,
        result = send(link.clone(), write) => result,
        error = link.watch(attempt.served, parts.settings.process_server.switch_after) => Err(match error {
            true => SessionError::NotServed(address.to_owned()),
            false => SessionError::Stopped,
        }),
        better = link.seek(parts, &attempt.others) => Err(if link.draining.get() { SessionError::Leaves(better) } else { SessionError::CutOff(better) }),
    }
}

async fn receive(link: Rc<Link>, mut read: ReadHalf<TlsStream<TcpStream>>) -> Result<(), SessionError> {
    let mut buffer = Vec::new();
    loop {
        let message = tokio::time::timeout(Duration::from_secs(SILENCE_SECONDS), read_message(&mut read, &mut buffer)).await;
        let message = message.map_err(|_| SessionError::Silent)??;
        link.heard.set(clock::now());
        match message {
            ServerMessage::Opened { slot, generation, resume_at, safe, credit, compare, stands } => {
                let (index, volume) = link.volume(slot)?;
                if link.opened(index, &volume, &Opened { generation, resume_at, credit, compare, stands }).await? {
                    let epoch = volume.backlog().epoch();
                    volume.backlog().acknowledge(epoch, 0, safe);
                }
            }
            ServerMessage::Refused { slot, reason, message } => {
                let (index, volume) = link.volume(slot)?;
                link.refused(index, &volume, reason, message).await?;
            }
            ServerMessage::Ack { slot, epoch, cached, safe, credit } => {
                let (index, volume) = link.volume(slot)?;
                volume.backlog().acknowledge(epoch, cached, safe);
                link.slots[index].credit.set(credit);
            }
            ServerMessage::Wanted { slot, generation, wanted } => {
                let (volume, _) = link.volume(slot)?;
                link.command(Command::Wanted { volume, generation, wanted }).await?;
            }
            ServerMessage::Verdict { slot, verdict } => {
                let (index, volume) = link.volume(slot)?;
                if verdict.at.epoch == volume.backlog().epoch() {
                    link.command(Command::Verdict { volume: index, verdict }).await?;
                }
            }
            ServerMessage::Target(name) => {
                *link.shared.target.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(name);
            }
            ServerMessage::Link { up } => link.reaches(up),
            ServerMessage::Draining => link.draining.set(true),
            ServerMessage::Alive => {}
            ServerMessage::Goodbye { message } => return Err(SessionError::Goodbye(message)),
            ServerMessage::Welcome => return Err(WireError::Illegal("second welcome").into()),
        }
        link.work.notify_one();
        link.shared.wake.ring();
    }
}

impl Link {
    fn volume(&self, slot: u32) -> Result<(usize, Arc<VolumeShared>), SessionError> {
        let index = slot as usize;
        let volume = self.shared.volumes.get(index).cloned().ok_or(WireError::Illegal("slot"))?;
        Ok((index, volume))
    }

    /// True if the disk is sent from now on.
    async fn opened(&self, index: usize, volume: &VolumeShared, told: &Opened) -> Result<bool, SessionError> {
        let (done, answer) = oneshot::channel();
        self.command(Command::CheckGeneration { volume: index, generation: told.generation, done }).await?;
        if !answer.await.map_err(|_| SessionError::Stopped)? {
            let (done, answer) = oneshot::channel();
            self.command(Command::NewGeneration { volume: index, generation: told.generation, done }).await?;
            self.answered(index, answer).await?;
        } else if self.has_what_it_acknowledged(index, told.stands).await? && self.goes_on(index, volume, told).await? {
            return Ok(true);
        }
        self.reopen.borrow_mut().push((index, Duration::ZERO));
        Ok(false)
    }

    async fn has_what_it_acknowledged(&self, index: usize, stands: Option<Position>) -> Result<bool, SessionError> {
        let Some(stands) = stands else { return Ok(true) };
        let (done, answer) = oneshot::channel();
        self.command(Command::CheckStands { volume: index, stands, done }).await?;
        self.answered(index, answer).await
    }

    async fn goes_on(&self, index: usize, volume: &VolumeShared, told: &Opened) -> Result<bool, SessionError> {
        let continued = {
            let mut backlog = volume.backlog();
            match told.stands {
                Some(stands) if backlog.is_moving() => backlog.take_over(stands),
                stands => backlog.resume(told.resume_at, stands),
            }
        };
        if continued.is_err() {
            self.new_epoch(index, "what the other side does not have is not held any more").await?;
            return Ok(false);
        }
        // Before anything is sent: what the replica may have already is asked first.
        let (done, decided) = oneshot::channel();
        self.command(Command::Opened { volume: index, carrier: self.carrier.clone(), compare: told.compare, done }).await?;
        decided.await.map_err(|_| SessionError::Stopped)?;
        self.slots[index].credit.set(told.credit);
        self.slots[index].spent.set(0);
        self.slots[index].epoch.set(volume.backlog().epoch());
        self.slots[index].open.set(true);
        volume.open.store(true, Ordering::Relaxed);
        self.report_now.set(true);
        let mut last = self.shared.last_error.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if last.as_ref().is_some_and(|text| text.starts_with(&format!("disk {}:", volume.label))) {
            *last = None;
        }
        tracing::info!(disk = volume.label, resume_at = told.resume_at, "the process server takes changes of this disk");
        Ok(true)
    }

    /// Ends when no disk was taken, or nothing was heard, for so long that another process server is to be tried.
    async fn watch(&self, served: &Cell<Option<Mono>>, switch_after: Duration) -> bool {
        let mut last = clock::now();
        let mut cached: Vec<(Position, Mono)> = vec![(Position::default(), last); self.slots.len()];
        loop {
            tokio::time::sleep(Duration::from_millis(100)).await;
            let now = clock::now();
            let mut stuck = false;
            for ((volume, slot), seen) in self.shared.volumes.iter().zip(&self.slots).zip(&mut cached) {
                let [_, (_, sent), (_, held), _] = volume.backlog().rungs();
                if held != seen.0 || sent == held || !slot.open.get() {
                    *seen = (held, now);
                }
                stuck |= now.since(seen.1) >= STUCK;
            }
            if !stuck && self.slots.iter().any(|slot| slot.open.get()) {
                // It speaks every second, if it is there.
                last = if now.since(self.heard.get()) < SPEAKS { now } else { self.heard.get() };
                served.set(Some(last));
            }
            if self.may_leave && now.since(last) > switch_after.max(SPEAKS) {
                return true;
            }
        }
    }

    fn reaches(&self, up: bool) {
        if up {
            self.cut_off.set(None);
            let mut last = self.shared.last_error.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            if [Some(CUT_OFF), Some(CUT_OFF_HERE)].contains(&last.as_deref()) {
                *last = None;
            }
        } else if self.cut_off.get().is_none() {
            self.cut_off.set(Some(clock::now()));
        }
    }

    /// Ends with another process server that takes agents and reaches the master target, when this one has not reached it for
    /// `switch_after`, or is to be taken out of service. When none does the master target is gone, and nothing is gained by moving: here at
    /// least everything is durable.
    async fn seek(&self, parts: &Parts, others: &[(usize, &str, Option<Mono>)]) -> usize {
        let settings = &parts.settings.process_server;
        let mut pause = settings.switch_after;
        loop {
            tokio::time::sleep(Duration::from_millis(100)).await;
            if self.cut_off.get().is_some_and(|since| clock::now().since(since) >= SPEAKS) {
                let mut last = self.shared.last_error.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                last.get_or_insert_with(|| CUT_OFF_HERE.to_owned());
            }
            let cut_off = self.cut_off.get().is_some_and(|since| clock::now().since(since) >= settings.switch_after);
            if !cut_off && !self.draining.get() {
                pause = settings.switch_after;
                continue;
            }
            // What this one alone still has would have to be read from the disk again, without its points: rather wait.
            let can_move = self.shared.volumes.iter().all(|volume| volume.backlog().can_move());
            let fit = |unfit: &Option<Mono>| unfit.is_none_or(|until| clock::now() >= until);
            for (other, address, _) in others.iter().filter(|(_, _, unfit)| can_move && fit(unfit)) {
                if greeting::is_better(&parts.credentials, self.shared.machine_id, address, SPEAKS).await {
                    if self.draining.get() {
                        return *other;
                    }
                    tokio::time::sleep(RECONNECTS).await;
                    if self.cut_off.get().is_some() {
                        return *other;
                    }
                }
            }
            if self.draining.get() {
                let mut last = self.shared.last_error.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                last.get_or_insert_with(|| GOING.to_owned());
            }
            if self.cut_off.get().is_some() {
                let mut last = self.shared.last_error.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                if last.as_deref().is_none_or(|told| told == CUT_OFF_HERE) {
                    *last = Some(CUT_OFF.to_owned());
                }
            }
            tokio::time::sleep(pause).await;
            pause = if self.draining.get() { settings.switch_after } else { (pause * 2).min(SEEK_MAX) };
        }
    }

    async fn refused(&self, index: usize, volume: &VolumeShared, reason: Refusal, message: String) -> Result<(), SessionError> {
        self.slots[index].open.set(false);
        volume.open.store(false, Ordering::Relaxed);
        let wait = match reason {
            Refusal::StaleEpoch { highest } => {
                self.carry(index, Some(highest)).await?;
                Duration::ZERO
            }
            Refusal::NotReady => Duration::from_millis(100),
            Refusal::NotAllowed => Duration::from_secs(10),
        };
        if !wait.is_zero() {
            let mut last = self.shared.last_error.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            let text = format!("disk {}: {message}", volume.label);
            if *self.slots[index].told.borrow() != text {
                // Not ready is usual while the servers find each other; not allowed needs somebody.
                if reason == Refusal::NotAllowed {
                    tracing::warn!(disk = volume.label, reason = message, "the process server refuses this disk");
                } else {
                    tracing::info!(disk = volume.label, reason = message, "the process server does not take this disk yet");
                }
                self.slots[index].told.replace(text.clone());
            }
            *last = Some(text);
        }
        self.reopen.borrow_mut().push((index, wait));
        Ok(())
    }

    async fn new_epoch(&self, index: usize, reason: &'static str) -> Result<(), SessionError> {
        let (done, answer) = oneshot::channel();
        self.command(Command::NewEpoch { volume: index, reason, done }).await?;
        self.answered(index, answer).await.map(drop)
    }

    async fn carry(&self, index: usize, above: Option<u64>) -> Result<Reliance, SessionError> {
        let (done, answer) = oneshot::channel();
        self.command(Command::Carry { volume: index, carrier: self.carrier.clone(), above, done }).await?;
        self.answered(index, answer).await
    }

    async fn answered<T>(&self, index: usize, answer: oneshot::Receiver<Result<T, String>>) -> Result<T, SessionError> {
        answer.await.map_err(|_| SessionError::Stopped)?.map_err(|error| {
            tracing::error!(disk = self.shared.volumes[index].label, error, "could not start a new epoch");
            SessionError::Io(io::Error::other(error))
        })
    }

    async fn command(&self, command: Command) -> Result<(), SessionError> {
        self.commands.send(command).await.map_err(|_| SessionError::Stopped)
    }
}

async fn send(link: Rc<Link>, mut write: WriteHalf<TlsStream<TcpStream>>) -> Result<(), SessionError> {
    let mut staging = Vec::with_capacity(STAGING_BYTES + (64 << 10));
    let mut idle_polls = 0;
    let mut reported = None;
    loop {
        if link.shared.stopping.load(Ordering::Relaxed) {
            return Ok(());
        }
        staging.clear();
        link.reopen_changed();
        open_slots(&link, &mut staging).await?;
        link.read_spilled();
        let now = clock::now();
        if link.report_now.replace(false) || reported.is_none_or(|at| now.since(at) >= REPORT_EVERY) {
            reported = Some(now);
            add_reports(&link, &mut staging)?;
        }
        for (index, volume) in link.shared.volumes.iter().enumerate() {
            add_changes(&link.slots[index], index, volume, &mut staging)?;
        }
        if !staging.is_empty() {
            idle_polls = 0;
            write.write_all(&staging).await?;
            write.flush().await?;
            continue;
        }
        if idle_polls < POLLS_BEFORE_SLEEP {
            idle_polls += 1;
            tokio::select! {
                () = link.work.notified() => {}
                () = tokio::time::sleep(POLL) => {}
            }
            continue;
        }
        link.shared.wake.prepare();
        if link.has_work() {
            continue;
        }
        tokio::select! {
            () = link.work.notified() => {}
            () = link.shared.wake.sleep() => {}
            () = tokio::time::sleep(REPORT_EVERY / 2) => {}
        }
        idle_polls = POLLS_BEFORE_SLEEP - 2;
    }
}

/// What a process server says when it takes a disk.
struct Opened {
    generation: u64,
    resume_at: u64,
    credit: u64,
    compare: Compare,
    stands: Option<Position>,
}

impl Link {
    /// Reads what has to be sent next and is in the log.
    fn read_spilled(self: &Rc<Self>) {
        let Some(spill) = &self.spill else { return };
        for (index, volume) in self.shared.volumes.iter().enumerate() {
            let slot = &self.slots[index];
            let wanted = if slot.open.get() && !slot.reading.get() { volume.backlog().wants() } else { None };
            let Some((name, location)) = wanted else { continue };
            slot.reading.set(true);
            let (link, spill, volume) = (self.clone(), spill.clone(), volume.clone());
            tokio::task::spawn_local(async move {
                let whole = match spill.read(index, name, location).await {
                    Ok(changes) => volume.backlog().loaded(name, changes),
                    // Of a connection that is over: another one has read it meanwhile, or it is not needed any more.
                    Err(_) if volume.backlog().wants().is_none_or(|(wanted, _)| wanted != name) => true,
                    Err(error) => {
                        tracing::error!(disk = volume.label, %error, "what waited in the agent's log is lost; the dirty map has it");
                        false
                    }
                };
                link.slots[index].reading.set(false);
                if !whole && link.new_epoch(index, "the agent's log is damaged").await.is_ok() {
                    link.slots[index].open.set(false);
                    link.reopen.borrow_mut().push((index, Duration::ZERO));
                }
                link.work.notify_one();
            });
        }
    }

    /// Disks that grew, or whose stream began anew, are opened again, so that the other side knows before it is sent anything of that.
    fn reopen_changed(&self) {
        for (index, (slot, volume)) in self.slots.iter().zip(&self.shared.volumes).enumerate() {
            let epoch = volume.backlog().epoch();
            if slot.open.get() && (slot.size.get() != volume.size() || slot.epoch.get() != epoch) {
                slot.open.set(false);
                volume.open.store(false, Ordering::Relaxed);
                self.reopen.borrow_mut().push((index, Duration::ZERO));
            }
        }
    }

    fn has_work(&self) -> bool {
        let sendable = |(slot, volume): (&Slot, &Arc<VolumeShared>)| {
            let backlog = volume.backlog();
            let waits = !slot.reading.get() && backlog.wants().is_some();
            slot.open.get() && (waits || backlog.next_cost().is_some_and(|cost| slot.spent.get() + cost <= slot.credit.get()))
        };
        self.slots.iter().zip(&self.shared.volumes).any(sendable)
    }
}

async fn open_slots(link: &Rc<Link>, staging: &mut Vec<u8>) -> Result<(), SessionError> {
    let due = std::mem::take(&mut *link.reopen.borrow_mut());
    for (index, wait) in due {
        if !wait.is_zero() {
            let link = link.clone();
            tokio::task::spawn_local(async move {
                tokio::time::sleep(wait).await;
                link.reopen.borrow_mut().push((index, Duration::ZERO));
                link.work.notify_one();
            });
            continue;
        }
        let volume = &link.shared.volumes[index];
        link.slots[index].open.set(false);
        let relies_on = link.carry(index, None).await?;
        let (epoch, takes_over) = {
            let backlog = volume.backlog();
            (backlog.epoch(), backlog.is_moving())
        };
        let size = volume.size();
        link.slots[index].size.set(size);
        let open = AgentMessage::Open { slot: index as u32, disk: volume.id, size, epoch, takes_over, relies_on };
        staging.extend_from_slice(&control_frame(&open)?);
    }
    Ok(())
}

fn add_reports(link: &Link, staging: &mut Vec<u8>) -> Result<(), SessionError> {
    for (index, volume) in link.shared.volumes.iter().enumerate() {
        let report = AgentMessage::Report { slot: index as u32, report: volume.report() };
        staging.extend_from_slice(&control_frame(&report)?);
        let lag = volume.backlog().lag(clock::now());
        metrics::disk_gauge(metrics::LAG, &volume.label, lag.as_secs_f64());
    }
    Ok(())
}

/// Adds changes of one disk while it has credit and there is room. Fair: each disk gets at most a quarter of a staging
/// buffer beyond its first change before the next one is asked.
fn add_changes(slot: &Slot, index: usize, volume: &VolumeShared, staging: &mut Vec<u8>) -> Result<(), SessionError> {
    if !slot.open.get() {
        return Ok(());
    }
    let stop_at = (staging.len() + STAGING_BYTES / 2).min(STAGING_BYTES);
    while staging.len() < stop_at {
        let next = {
            let mut backlog = volume.backlog();
            if slot.size.get() != volume.size() || slot.epoch.get() != backlog.epoch() {
                // It grew since, and what is in the backlog may lie behind the end that the other side knows; or it began anew.
                return Ok(());
            }
            backlog.take_next(slot.credit.get().saturating_sub(slot.spent.get()))
        };
        let Some((change, captured)) = next else { return Ok(()) };
        slot.spent.set(slot.spent.get() + change_cost(change.kind.data_len()));
        encode_change(index as u32, change.sequence, &change.kind, micros(clock::now().since(captured)), staging)?;
    }
    Ok(())
}
