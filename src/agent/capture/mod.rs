//! The capture thread: owns the disks of the machine, serves them over NBD, feeds their streams and makes markers.

mod gate;
pub(super) mod group;
mod handover;
mod local;
mod markers;
mod resync;
mod scrub;
mod volume;

use std::cell::Cell;
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::SyncSender;
use std::time::Duration;

use rustls::ClientConfig;
use tokio::sync::mpsc;

use self::gate::Gate;
use self::markers::Skip;
use self::volume::{Restart, Volume};
use super::rest::{self, Freezer};
use super::shared::{AgentShared, Command};
use crate::clock;
use crate::config::agent::AgentSettings;
use crate::model::{Address, PointId, Wanted};
use crate::nbd::{self, Listener};
use crate::observe::metrics;

/// Connections of one disk's export.
const CONNECTIONS_MAX: usize = 64;

/// Everything on this thread.
pub struct Capture {
    shared: Arc<AgentShared>,
    volumes: Vec<Rc<Volume>>,
    gate: Rc<Gate>,
    /// Whoever makes a marker holds it.
    marking: Arc<tokio::sync::Mutex<()>>,
    /// When writes passed again after the last hold for the group.
    last_group_hold: Cell<Option<clock::Mono>>,
    /// When applications were woken after they were at rest for the group.
    last_group_rest: Cell<Option<clock::Mono>>,
    /// The point that ends a planned failover, once it was asked for in this process.
    final_point: Cell<Option<PointId>>,
    /// What the master target wanted last.
    word: Cell<Option<Wanted>>,
    settings: AgentSettings,
}

/// Opens the disks, reports through `opened`, and serves until told to stop.
pub async fn run(
    settings: AgentSettings,
    coordinator: Arc<ClientConfig>,
    requests: mpsc::Receiver<Command>,
    opened: SyncSender<io::Result<Arc<AgentShared>>>,
) {
    let (capture, listeners) = match open(settings).await {
        Ok(opened) => opened,
        Err(e) => return drop(opened.send(Err(e))),
    };
    let _ = opened.send(Ok(capture.shared.clone()));
    for (volume, listener) in capture.volumes.iter().zip(listeners) {
        tokio::task::spawn_local(accept(listener, volume.clone()));
        tokio::task::spawn_local(resync::run(volume.clone()));
        tokio::task::spawn_local(scrub::run(volume.clone(), capture.settings.scrub.rate));
    }
    tokio::task::spawn_local(markers::timer(capture.clone()));
    tokio::task::spawn_local(markers::app_timer(capture.clone()));
    tokio::task::spawn_local(housekeeping(capture.clone()));
    tokio::task::spawn_local(group::run(capture.clone(), capture.settings.consistency.clone(), coordinator));
    capture.serve(requests).await;
}

async fn open(settings: AgentSettings) -> io::Result<(Rc<Capture>, Vec<Listener>)> {
    crate::storage::uring::create_dir_durable(&settings.state)?;
    let rest = Freezer::new(&settings);
    rest.undo_left_behind();
    rest::check_places(&settings).map_err(io::Error::other)?;
    let gate = Rc::new(Gate::default());
    let mut files = Vec::new();
    for disk in &settings.disk {
        files.push(volume::open_parts(&settings, disk).await?);
    }
    let shared = Arc::new(AgentShared {
        machine: settings.machine.clone(),
        machine_id: settings.machine_id(),
        volumes: files.iter().map(|f| f.shared.clone()).collect(),
        wake: Default::default(),
        stopping: Default::default(),
        connected: Default::default(),
        last_error: Default::default(),
        gateway: Default::default(),
        rest,
        points: Default::default(),
        handed_over: Default::default(),
        target: Default::default(),
        group: Default::default(),
    });
    let one_file_system = files.windows(2).all(|pair| pair[0].device == pair[1].device);
    let volume = |parts| Rc::new(Volume::new(parts, gate.clone(), shared.clone(), one_file_system));
    let volumes = files.into_iter().map(volume).collect();
    let mut listeners = Vec::new();
    for disk in &settings.disk {
        listeners.push(Listener::bind(&disk.nbd).await?);
    }
    if handover::is_noted(&settings.state) {
        tracing::warn!(
            machine = %settings.machine,
            "the machine was handed over in a planned failover: its disks take no writes until the failover is cancelled, or `tidegate machine resume` says that it runs here again"
        );
        gate.close();
        shared.handed_over.store(true, Ordering::Relaxed);
    }
    let capture = Capture {
        shared,
        volumes,
        gate,
        marking: Arc::default(),
        last_group_hold: Cell::new(None),
        last_group_rest: Cell::new(None),
        final_point: Cell::new(None),
        word: Cell::new(None),
        settings,
    };
    Ok((Rc::new(capture), listeners))
}

async fn accept(listener: Listener, volume: Rc<Volume>) {
    let room = Rc::new(tokio::sync::Semaphore::new(CONNECTIONS_MAX));
    loop {
        let Ok(permit) = room.clone().acquire_owned_local().await else { return };
        match listener.accept().await {
            Ok(stream) => {
                let volume = volume.clone();
                tokio::task::spawn_local(async move {
                    let label = volume.shared.label.clone();
                    if let Err(error) = nbd::server::serve(stream, volume).await {
                        tracing::info!(disk = label, %error, "an NBD client left");
                    }
                    drop(permit);
                });
            }
            Err(error) => {
                tracing::warn!(disk = volume.shared.label, %error, "could not accept an NBD client");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

/// Owned permits of a semaphore that lives on one thread.
trait LocalSemaphore {
    async fn acquire_owned_local(self) -> Result<LocalPermit, tokio::sync::AcquireError>;
}

struct LocalPermit(Rc<tokio::sync::Semaphore>);

impl Drop for LocalPermit {
    fn drop(&mut self) {
        self.0.add_permits(1);
    }
}

impl LocalSemaphore for Rc<tokio::sync::Semaphore> {
    async fn acquire_owned_local(self) -> Result<LocalPermit, tokio::sync::AcquireError> {
        self.acquire().await?.forget();
        Ok(LocalPermit(self))
    }
}

/// Once a second: mark safe regions clean, publish figures.
async fn housekeeping(capture: Rc<Capture>) {
    let idle = capture.settings.dirty_map.clean_after;
    loop {
        tokio::time::sleep(Duration::from_secs(1)).await;
        for volume in &capture.volumes {
            volume.look_at_size().await;
            if let Err(error) = volume.clean(idle).await {
                tracing::error!(disk = volume.shared.label, %error, "the dirty map cannot be written; regions stay marked");
            }
            volume.publish();
        }
    }
}

impl Capture {
    async fn serve(self: Rc<Self>, mut requests: mpsc::Receiver<Command>) {
        while let Some(request) = requests.recv().await {
            match request {
                Command::NewEpoch { volume, reason, done } => {
                    let _ = done.send(self.volumes[volume].restart_stream(Restart::Marked, reason).await.map_err(|e| e.to_string()));
                }
                Command::Carry { volume, carrier, above, done } => {
                    let _ = done.send(self.volumes[volume].carry(carrier, above).await.map_err(|e| e.to_string()));
                }
                Command::CheckStands { volume, stands, done } => {
                    let _ = done.send(self.volumes[volume].check_stands(stands).await.map_err(|e| e.to_string()));
                }
                Command::CheckGeneration { volume, generation, done } => {
                    let _ = done.send(self.volumes[volume].generation() == generation);
                }
                Command::NewGeneration { volume, generation, done } => {
                    let restart = Restart::History(generation);
                    let _ = done.send(self.volumes[volume].restart_stream(restart, "new replica").await.map_err(|e| e.to_string()));
                }
                Command::Wanted { generation, volume, wanted } => {
                    if self.volumes[volume].generation() == generation {
                        tokio::task::spawn_local(self.clone().heed(wanted));
                    }
                }
                Command::Resume(done) => {
                    // A word that is still tried does not stop it again.
                    self.word.set(None);
                    let _ = done.send(self.go_on());
                }
                Command::Opened { volume, carrier, compare, done } => {
                    self.volumes[volume].opened_at(carrier);
                    self.volumes[volume].set_compare(compare);
                    let _ = done.send(());
                }
                Command::VerifyDisk { volume, done } => {
                    let volume = &self.volumes[volume];
                    volume.scrub.borrow_mut().begin(volume.regions_count(), true, clock::now());
                    volume.publish();
                    let _ = done.send(());
                }
                Command::Verdict { volume, verdict } => self.volumes[volume].judge(&verdict),
                Command::Mark { label, kind, done } => {
                    let capture = self.clone();
                    tokio::task::spawn_local(async move {
                        let _ = done.send(capture.mark(label, kind).await.map_err(|skip| skip.to_string()));
                    });
                }
                Command::Stop(done) => {
                    self.shared.stopping.store(true, Ordering::Relaxed);
                    // Before the gate is held: thawing a file system writes to its disk.
                    self.shared.rest.stop().await;
                    // New writes wait for the process to end; what was answered before is made durable.
                    self.gate.stop();
                    let _ = tokio::time::timeout(Duration::from_secs(5), self.gate.drained()).await;
                    for volume in &self.volumes {
                        if let Err(error) = volume.close().await {
                            tracing::error!(disk = volume.shared.label, %error, "could not flush the disk at stop");
                        }
                    }
                    for disk in &self.settings.disk {
                        if let Address::Unix(path) = &disk.nbd {
                            let _ = std::fs::remove_file(path);
                        }
                    }
                    tracing::info!(machine = %self.shared.machine, "the agent stops; what was written is durable");
                    let _ = done.send(());
                    return;
                }
            }
        }
    }

    fn is_consistent(&self) -> bool {
        self.volumes.iter().all(|v| v.missing_bytes() == 0)
    }
}

impl Volume {
    /// Publishes figures and the report that goes downstream.
    fn publish(&self) {
        let now = clock::now();
        let report = self.report(now);
        let label = &self.shared.label;
        let rungs = self.shared.backlog().rungs();
        for (rung, position) in rungs {
            metrics::position(label, rung, position);
        }
        let (memory, log) = {
            let backlog = self.shared.backlog();
            (backlog.memory_bytes(), backlog.log_bytes())
        };
        metrics::disk_part(metrics::BACKLOG, label, "kind", "memory", metrics::number(memory));
        metrics::disk_part(metrics::BACKLOG, label, "kind", "log", metrics::number(log));
        metrics::disk_part(metrics::BACKLOG, label, "kind", "map", metrics::number(report.missing_bytes));
        metrics::disk_gauge(metrics::LAG, label, metrics::number(report.lag_us) / 1e6);
        metrics::disk_count(metrics::CAPTURED_BYTES, label, self.take_captured_bytes());
        self.shared.set_scrub(self.scrub.borrow().rounds().clone());
        self.shared.set_report(report, self.trouble());
    }
}
