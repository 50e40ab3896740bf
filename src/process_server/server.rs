//! Puts the stages together and runs what is not one connection's business: results of the cache, release, ageing, figures.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::SyncSender;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crossbeam::channel::Sender;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};

use super::cache::{self, CacheHandle, Completions, Tag};
use super::catalogue::Records;
use super::disk::{Disk, NotReady};
use super::optimize::batcher::RawBatch;
use super::optimize::workers::{self, Job};
use super::pressure::{Grant, Level};
use super::reserve::Reserve;
use super::stream::{Queued, Stream};
use super::{DiskView, ProcessServerError, ProcessServerView, forward, ingest, space};
use crate::clock;
use crate::config::limits::{BATCHES_IN_PIPELINE_MAX, DISK_WINDOW_BYTES, DISK_WINDOW_BYTES_MIN};
use crate::config::process_server::ProcessServerSettings;
use crate::crypto::keyring::KeyEncryptionKey;
use crate::crypto::pki::Role;
use crate::crypto::seal::{Purpose, SealingSession};
use crate::crypto::tls::Credentials;
use crate::model::{DiskId, Name, Position};
use crate::observe::http::Readiness;
use crate::observe::metrics;
use crate::storage::log::Recovered;
use crate::wire::batch::BatchHeader;

/// Released batches are noted in the catalogue at least this often.
const RELEASE_EVERY: Duration = Duration::from_millis(100);
const FIGURES_EVERY: Duration = Duration::from_secs(1);

/// The process server's state; lives on the network thread.
pub struct Server {
    /// As configured.
    pub settings: ProcessServerSettings,
    /// Certificates.
    pub credentials: Credentials,
    /// Every registered disk.
    pub disks: HashMap<DiskId, Rc<Disk>>,
    /// Metadata.
    pub records: Records,
    /// Wraps data keys.
    pub kek: Arc<KeyEncryptionKey>,
    /// To the cache.
    pub cache: CacheHandle,
    jobs: Sender<Job>,
    pipeline: Arc<Semaphore>,
    /// Rung when a batch was opened.
    pub batch_opened: Notify,
    /// Sealed bytes in memory that wait for the link.
    pub queue_memory: Cell<u64>,
    /// Figures.
    pub view: Arc<Mutex<ProcessServerView>>,
    /// Agents connected.
    pub agents: Cell<usize>,
    /// Connections of each machine.
    pub connections: RefCell<HashMap<Name, usize>>,
    /// Bytes that have left the cache.
    pub released_bytes: Cell<u64>,
    /// Agents are told to go elsewhere.
    pub draining: Arc<AtomicBool>,
    /// Space for when there is none.
    pub reserve: Reserve,
    /// How full the cache is.
    pub level: Cell<Level>,
    /// It is connected.
    pub link_up: Cell<bool>,
    /// The master target, by its certificate, once it was reached.
    pub target: RefCell<Option<Name>>,
    next_owner: Cell<u64>,
}

pub(super) struct Shared {
    pub view: Arc<Mutex<ProcessServerView>>,
    pub readiness: Readiness,
    pub stop: Arc<Notify>,
    pub draining: Arc<AtomicBool>,
}

/// Runs until told to stop.
pub(super) async fn run(
    settings: ProcessServerSettings,
    shared: Shared,
    opened: SyncSender<Result<(SocketAddr, Records), ProcessServerError>>,
) {
    let (readiness, stop) = (shared.readiness.clone(), shared.stop.clone());
    let (server, completions, listener) = match open(settings, shared).await {
        Ok(parts) => parts,
        Err(e) => return drop(opened.send(Err(e))),
    };
    let address = match listener.local_addr() {
        Ok(address) => address,
        Err(e) => return drop(opened.send(Err(e.into()))),
    };
    let _ = opened.send(Ok((address, server.records.clone())));
    readiness.set(true);
    tracing::info!(listen = %address, disks = server.disks.len(), "process server is running");
    tokio::select! {
        () = take_completions(server.clone(), completions) => tracing::error!("the cache has ended; the process server stops"),
        () = close_aged(server.clone()) => {}
        () = release(server.clone()) => {}
        () = publish(server.clone(), readiness.clone()) => {}
        () = space::watch(server.clone()) => {}
        () = ingest::accept(server.clone(), listener) => {}
        () = forward::run(server.clone()) => {}
        () = stop.notified() => tracing::info!("process server stops; what is cached stays cached"),
    }
    readiness.set(false);
}

async fn open(
    settings: ProcessServerSettings,
    shared: Shared,
) -> Result<(Rc<Server>, Completions, tokio::net::TcpListener), ProcessServerError> {
    crate::storage::uring::create_dir_durable(&settings.state)?;
    let credentials = Credentials::load(&settings.tls, Role::ProcessServer)?;
    metrics::disk_part(metrics::CERTIFICATE_EXPIRY, "", "role", Role::ProcessServer.as_str(), credentials.expires_in_seconds as f64);
    let Shared { view, draining, .. } = shared;
    view.lock().unwrap_or_else(PoisonError::into_inner).name = credentials.identity.name.to_string();
    let listener = ingest::bind(settings.ingest.listen).await?;
    let (kek_path, may_create) = settings.keys.path(&settings.state);
    let kek = Arc::new(KeyEncryptionKey::load(&kek_path, may_create)?);
    let reserve = Reserve::new(&settings.state, settings.cache.reserve);
    let records = match Records::open(&settings.state) {
        // On a full file system the catalogue has no room to be opened: the reserve is for that.
        Err(error) if reserve.give_back() => {
            tracing::warn!(%error, "the reserve is given back");
            Records::open(&settings.state)?
        }
        other => other?,
    };
    draining.store(records.is_draining()?, Ordering::Relaxed);
    if let Err(error) = reserve.keep() {
        tracing::warn!(%error, "there is no space for the reserve");
    }
    let opened = cache::open(&settings.state, records.cache_id, &settings.cache)?;
    let (disks, unneeded) = recover_disks(&settings, &records, &kek, opened.recovered)?;
    opened.handle.release(unneeded).await;
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let count = if settings.optimize.workers == 0 { (cores - 1).max(1) } else { settings.optimize.workers };
    let (jobs, _) = workers::start(count, &opened.handle)?;
    let server = Server {
        credentials,
        disks,
        records,
        kek,
        cache: opened.handle,
        jobs,
        pipeline: Arc::new(Semaphore::new(BATCHES_IN_PIPELINE_MAX)),
        batch_opened: Notify::new(),
        queue_memory: Cell::new(0),
        view,
        agents: Cell::new(0),
        connections: RefCell::default(),
        released_bytes: Cell::new(0),
        draining,
        reserve,
        level: Cell::default(),
        link_up: Cell::new(false),
        target: RefCell::default(),
        next_owner: Cell::new(0),
        settings,
    };
    Ok((Rc::new(server), opened.completions, listener))
}

type Disks = HashMap<DiskId, Rc<Disk>>;

fn recover_disks(
    settings: &ProcessServerSettings,
    records: &Records,
    kek: &KeyEncryptionKey,
    recovered: Vec<Recovered>,
) -> Result<(Disks, Vec<crate::storage::log::Location>), ProcessServerError> {
    let mut found: HashMap<DiskId, Vec<(u64, Queued)>> = HashMap::new();
    let mut unneeded = Vec::new();
    for record in recovered {
        let Ok(header) = BatchHeader::decode(&record.head) else {
            unneeded.push(record.location);
            continue;
        };
        // How long it lay here is only known by the wall clock of this host; it is used for display.
        let lay_ms = (clock::wall_ms() - header.accepted_wall_ms).max(0) as u64;
        let captured = clock::now().minus(Duration::from_micros(header.age_us) + Duration::from_millis(lay_ms));
        let queued = Queued { first: header.first, end: header.end(), location: record.location, sealed: None, captured };
        found.entry(header.disk).or_default().push((header.generation, queued));
    }
    let mut disks = HashMap::new();
    for machine in &settings.machine {
        for (id, name) in machine.disk_ids() {
            let record = records.disk(id)?;
            let (generation, begun, released) =
                record.as_ref().map_or((0, 0, Position::default()), |r| (r.generation, r.begun, r.released));
            let relied = record.as_ref().map(|r| r.relied.clone()).unwrap_or_default();
            let found = found.remove(&id).unwrap_or_default().into_iter();
            let (ours, others): (Vec<_>, Vec<_>) = found.partition(|(g, queued)| *g == generation && queued.end.epoch >= begun);
            unneeded.extend(others.into_iter().map(|(_, q)| q.location));
            let (stream, dropped, cut_off) = Stream::recover(released, &relied, ours.into_iter().map(|(_, q)| q).collect());
            unneeded.extend(dropped);
            let label = format!("{}/{name}", machine.name);
            if cut_off > 0 {
                metrics::count_reason(metrics::DAMAGED, "cache");
                tracing::error!(
                    disk = label,
                    batches = cut_off,
                    "a part of the cache is gone: what lies behind it is given up, its agent sends it again. Check the storage of the cache"
                );
            }
            let quota = settings.cache.size_max / 100 * settings.cache.disk_share_percent;
            let disk = Disk::new(id, machine, &label, stream, record.clone(), quota);
            if let Some(record) = record {
                let session = SealingSession::start(&record.key(kek, id)?, Purpose::Stream, id, record.generation);
                *disk.session.borrow_mut() = Some(Arc::new(session));
                *disk.not_ready.borrow_mut() = None;
            }
            disks.insert(id, Rc::new(disk));
        }
    }
    // Disks that are not in the configuration: what the master target has, or can never take, is given up.
    for (id, batches) in &mut found {
        let record = records.disk(*id)?;
        let needed = |generation: u64, end: Position| {
            record.as_ref().is_some_and(|r| r.generation == generation && end.epoch >= r.begun && end > r.released)
        };
        let (kept, gone): (Vec<_>, Vec<_>) = std::mem::take(batches).into_iter().partition(|(g, q)| needed(*g, q.end));
        unneeded.extend(gone.into_iter().map(|(_, q)| q.location));
        *batches = kept;
    }
    found.retain(|_, batches| !batches.is_empty());
    if !found.is_empty() {
        // Not released: they may belong to a machine that was taken out of the configuration by mistake.
        tracing::warn!(
            disks = found.len(),
            "the cache holds batches of disks that are not in the configuration; they are kept, add the machines again to forward them"
        );
    }
    Ok((disks, unneeded))
}

impl Server {
    /// A number for a new owner of a disk.
    pub fn new_owner(&self) -> u64 {
        self.next_owner.set(self.next_owner.get() + 1);
        self.next_owner.get()
    }

    /// What one disk may have between agent and cache.
    pub fn window(&self) -> u64 {
        let open = self.disks.values().filter(|d| d.acknowledge.borrow().is_some()).count().max(1) as u64;
        (self.settings.ingest.memory_max / open).clamp(DISK_WINDOW_BYTES_MIN, DISK_WINDOW_BYTES)
    }

    /// A place in the pipeline; waits for room. Taken before a batch is closed, so that none is lost while waiting.
    pub async fn pipeline_place(&self) -> Option<OwnedSemaphorePermit> {
        self.pipeline.clone().acquire_owned().await.ok()
    }

    /// Sends a closed batch into the pipeline, sealed for the history the disk has at this moment.
    pub fn dispatch(&self, disk: &Disk, batch: RawBatch, place: OwnedSemaphorePermit) {
        let (session, generation) = (disk.session.borrow().clone(), disk.record.borrow().as_ref().map_or(0, |r| r.generation));
        let Some(session) = session else { return };
        let number = disk.enter_pipeline(&batch);
        let tag = Tag { disk: disk.id, number, captured: batch.captured, permit: place };
        let job = Job { batch, disk: disk.id, label: disk.label.clone(), generation, session, tag };
        // There is room for every batch with a place; the workers end only with the process.
        let _ = self.jobs.try_send(job);
    }
}

async fn take_completions(server: Rc<Server>, mut completions: Completions) {
    while let Some(group) = completions.recv().await {
        for appended in group {
            let Some(disk) = server.disks.get(&appended.tag.disk) else { continue };
            match appended.result {
                Ok((location, bytes)) => {
                    let sealed = bytes.slice(crate::storage::log::format::RECORD_HEADER_LEN..);
                    let Ok(header) = BatchHeader::decode(&sealed) else { continue };
                    let len = sealed.len() as u64;
                    let mut stream = disk.stream.borrow_mut();
                    let Some(joined) = stream.cached(appended.tag.number, header.first, location, sealed, appended.tag.captured) else {
                        // Of a history that was given up while it was on its way.
                        disk.to_release.borrow_mut().push(location);
                        continue;
                    };
                    server.queue_memory.set(server.queue_memory.get() + len);
                    if server.queue_memory.get() > server.settings.cache.memory_max {
                        let forgotten = stream.forget_newest(joined);
                        server.queue_memory.set(server.queue_memory.get().saturating_sub(forgotten));
                    }
                    drop(stream);
                    disk.forward.notify_one();
                    disk.tell_agent();
                }
                Err(error) => {
                    *disk.not_ready.borrow_mut() = Some(NotReady::Cache(error.to_string()));
                    disk.tell_agent();
                }
            }
        }
    }
}

/// Closes batches that are old enough.
async fn close_aged(server: Rc<Server>) {
    let age = server.settings.optimize.batch_age;
    loop {
        server.batch_opened.notified().await;
        while server.disks.values().any(|d| d.batcher.borrow().is_open()) {
            tokio::time::sleep(age / 2).await;
            for disk in server.disks.values().filter(|d| d.batcher.borrow().is_open()) {
                let Some(place) = server.pipeline_place().await else { return };
                let closed = disk.batcher.borrow_mut().close_older(clock::now(), age);
                if let Some(batch) = closed {
                    server.dispatch(disk, batch, place);
                }
            }
        }
    }
}

/// Notes acknowledged positions durably, then gives up what they cover.
async fn release(server: Rc<Server>) {
    loop {
        tokio::time::sleep(RELEASE_EVERY).await;
        let mut records = Vec::new();
        let mut locations = Vec::new();
        let mut kept = Vec::new();
        for disk in server.disks.values() {
            let gone = std::mem::take(&mut *disk.to_release.borrow_mut());
            let acknowledged = disk.stream.borrow().acknowledged();
            if let Some(record) = disk.record.borrow_mut().as_mut().filter(|_| !gone.is_empty()) {
                record.released = record.released.max(acknowledged);
                records.push((disk.id, record.clone()));
            }
            kept.push((disk.id, gone.clone()));
            locations.extend(gone);
        }
        if locations.is_empty() {
            continue;
        }
        let (store, batch) = (server.records.clone(), records.clone());
        match tokio::task::spawn_blocking(move || store.merge(&batch)).await {
            Ok(Ok(())) => {
                for (id, record) in records {
                    if let Some(disk) =
                        server.disks.get(&id).filter(|d| d.record.borrow().as_ref().is_some_and(|r| r.generation == record.generation))
                    {
                        // It may have been reset meanwhile, to where a master target stands that was put back.
                        let mut stream = disk.stream.borrow_mut();
                        let through = record.released.min(stream.acknowledged());
                        stream.released_through(through);
                    }
                }
                let bytes: u64 = locations.iter().map(|l| l.stored_bytes()).sum();
                server.released_bytes.set(server.released_bytes.get() + bytes);
                server.cache.release(locations).await;
            }
            Ok(Err(error)) => {
                tracing::error!(%error, "cannot note released positions; the cache keeps what it has");
                if server.reserve.give_back() {
                    tracing::warn!(
                        "the file system is full: the reserve is given back, so that what is at the master target can leave the cache"
                    );
                }
                // They are noted, and leave, with the next.
                for (id, gone) in kept {
                    if let Some(disk) = server.disks.get(&id) {
                        disk.to_release.borrow_mut().extend(gone);
                    }
                }
            }
            Err(_) => return,
        }
    }
}

async fn publish(server: Rc<Server>, readiness: Readiness) {
    loop {
        let used = server.cache.figures.live_bytes.load(Ordering::Relaxed);
        let mut memory = 0;
        let mut disks = Vec::new();
        for disk in server.disks.values() {
            let stream = disk.stream.borrow();
            memory += stream.memory_bytes();
            for (rung, position) in stream.rungs() {
                metrics::position(&disk.label, rung, position);
            }
            metrics::disk_gauge(metrics::CACHE_BYTES, &disk.label, metrics::number(stream.queue_bytes()));
            disks.push(DiskView {
                disk: disk.label.to_string(),
                id: disk.id.to_string(),
                connected: disk.acknowledge.borrow().is_some(),
                not_ready: disk.not_ready.borrow().as_ref().map(NotReady::message),
                positions: stream.rungs().iter().map(|(r, p)| (r.as_str().to_owned(), p.to_string())).collect(),
                standby: disk.acknowledge.borrow().is_none()
                    && stream.queue_bytes() == 0
                    && matches!(*disk.not_ready.borrow(), None | Some(NotReady::NoKey))
                    && (disk.foreign.get() > 0 || disk.agent_epoch.get() == 0),
                cache_bytes: stream.queue_bytes(),
                held_back: match disk.grant.get() {
                    Grant::Full => None,
                    Grant::Quarter => Some("it gets a quarter of its window, because it has more than its share of the cache"),
                    Grant::Nothing if stream.queue_bytes() >= disk.quota => Some("it has filled its quota of the cache"),
                    Grant::Nothing => Some("it gets nothing more until the cache has room"),
                },
            });
        }
        disks.sort_by(|a, b| a.disk.cmp(&b.disk));
        server.queue_memory.set(memory);
        {
            let mut view = server.view.lock().unwrap_or_else(PoisonError::into_inner);
            (view.cache_used_bytes, view.agents, view.disks) = (used, server.agents.get(), disks);
            view.draining = server.draining.load(Ordering::Relaxed);
            // Whoever balances agents over process servers sends no more here.
            readiness.set(!view.draining);
        }
        tokio::time::sleep(FIGURES_EVERY).await;
    }
}
