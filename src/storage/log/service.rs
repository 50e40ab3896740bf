//! A thread that owns a [`Log`] and commits what queued while the last sync ran. Drives; decides nothing.

use std::io;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{mpsc, oneshot};
use uuid::Uuid;

use super::{Location, Log, LogError, Options, Recovered};
use crate::clock;
use crate::storage::AlignedBuf;
use crate::storage::uring::{self, Uring};

/// Most records of one group: 64 batches of 256 KiB, or 16 MiB, in one sync.
const GROUP_RECORDS_MAX: usize = 64;
/// Records that may wait; senders block beyond.
const APPENDS_QUEUED_MAX: usize = 256;
/// Other requests that may wait.
const COMMANDS_QUEUED_MAX: usize = 1024;

/// What came of a record.
pub struct Appended<T> {
    /// What the sender gave along.
    pub tag: T,
    /// Where it stands and its bytes (header room included), or why it is not durable.
    pub result: Result<(Location, Bytes), Arc<LogError>>,
}

/// A record on its way.
pub struct Append<T> {
    /// Header room and body.
    pub record: AlignedBuf,
    /// Comes back with the result.
    pub tag: T,
}

enum Command {
    Read(Location, oneshot::Sender<Result<Bytes, LogError>>),
    Release(Vec<Location>),
}

/// Figures of a running log, for status and metrics.
#[derive(Debug, Default)]
pub struct Figures {
    /// Bytes of records not released.
    pub live_bytes: AtomicU64,
    /// Most bytes the log may hold.
    pub capacity_bytes: AtomicU64,
    /// Bytes of the segments that there are.
    pub made_bytes: AtomicU64,
    /// 1 after a storage failure.
    pub failed: AtomicU64,
    /// 1 while appends wait for space.
    pub full: AtomicU64,
}

/// Access to a running log; cheap to clone.
pub struct LogHandle<T> {
    appends: mpsc::Sender<Append<T>>,
    commands: mpsc::Sender<Command>,
    /// Live figures.
    pub figures: Arc<Figures>,
}

impl<T> Clone for LogHandle<T> {
    fn clone(&self) -> Self {
        Self { appends: self.appends.clone(), commands: self.commands.clone(), figures: self.figures.clone() }
    }
}

impl<T> LogHandle<T> {
    /// Room for one record; sending it does not wait.
    pub async fn reserve(&self) -> Result<Slot<T>, Stopped> {
        self.appends.clone().reserve_owned().await.map(Slot).map_err(|_| Stopped)
    }

    /// Queues a record, waiting for room; from a thread without a runtime.
    pub fn append_blocking(&self, append: Append<T>) -> Result<(), Stopped> {
        self.appends.blocking_send(append).map_err(|_| Stopped)
    }

    /// Reads a record back.
    pub async fn read(&self, location: Location) -> Result<Bytes, LogError> {
        let (reply, answer) = oneshot::channel();
        let stopped = || LogError::Closed("the log has stopped".to_owned());
        self.commands.send(Command::Read(location, reply)).await.map_err(|_| stopped())?;
        answer.await.map_err(|_| stopped())?
    }

    /// Gives up records. See [`Log::release`].
    pub async fn release(&self, locations: Vec<Location>) {
        // A stopped log recovers these records at its next start and they are released again then.
        let _ = self.commands.send(Command::Release(locations)).await;
    }
}

/// Room for one record, see [`LogHandle::reserve`].
pub struct Slot<T>(mpsc::OwnedPermit<Append<T>>);

impl<T> Slot<T> {
    /// Queues the record.
    pub fn send(self, append: Append<T>) {
        self.0.send(append);
    }
}

/// The log's thread has ended.
#[derive(Debug, thiserror::Error)]
#[error("the log has stopped")]
pub struct Stopped;

/// How to run a log.
pub struct Setup<T> {
    /// Name of the thread.
    pub name: &'static str,
    /// Its folder.
    pub dir: PathBuf,
    /// Its id.
    pub id: Uuid,
    /// Its bounds.
    pub options: Options,
    /// Results of appends, a group at a time.
    pub completions: mpsc::Sender<Vec<Appended<T>>>,
    /// Told how long each group took to become durable.
    pub observe_commit: fn(Duration),
}

/// A running log, what it found, and its thread, which ends when every handle is dropped.
pub type Spawned<T> = (LogHandle<T>, Vec<Recovered>, thread::JoinHandle<()>);

/// Opens a log on a thread of its own and returns what it found.
///
/// # Errors
/// Those of opening, see [`Log::open`].
pub fn spawn<T: Send + 'static>(setup: Setup<T>) -> Result<Spawned<T>, LogError> {
    let (append_tx, append_rx) = mpsc::channel(APPENDS_QUEUED_MAX);
    let (command_tx, command_rx) = mpsc::channel(COMMANDS_QUEUED_MAX);
    let (opened_tx, opened_rx) = std::sync::mpsc::sync_channel(1);
    let figures = Arc::new(Figures::default());
    let capacity = setup.options.segment_bytes * setup.options.segments_max as u64;
    figures.capacity_bytes.store(capacity, Ordering::Relaxed);
    let dir = setup.dir.clone();
    let io = |source: io::Error| LogError::Io { path: dir.clone(), source };
    let shared = figures.clone();
    let thread = thread::Builder::new()
        .name(setup.name.to_owned())
        .spawn(move || {
            let failed_tx = opened_tx.clone();
            let work = async {
                match Log::open(Uring::direct(), &setup.dir, setup.id, setup.options).await {
                    Ok((log, recovered)) => {
                        shared.live_bytes.store(log.live_bytes(), Ordering::Relaxed);
                        shared.made_bytes.store(log.made_bytes(), Ordering::Relaxed);
                        let _ = opened_tx.send(Ok(recovered));
                        serve(Rc::new(log), append_rx, command_rx, setup.completions, shared, setup.observe_commit).await;
                    }
                    Err(e) => drop(opened_tx.send(Err(e))),
                }
            };
            if let Err(source) = uring::run(work) {
                let _ = failed_tx.send(Err(LogError::Io { path: setup.dir.clone(), source }));
            }
        })
        .map_err(io)?;
    let recovered = opened_rx.recv().map_err(|_| io(io::Error::other("the log's thread ended while opening")))??;
    Ok((LogHandle { appends: append_tx, commands: command_tx, figures }, recovered, thread))
}

async fn serve<T: 'static>(
    log: Rc<Log<Uring>>,
    mut appends: mpsc::Receiver<Append<T>>,
    commands: mpsc::Receiver<Command>,
    completions: mpsc::Sender<Vec<Appended<T>>>,
    figures: Arc<Figures>,
    observe_commit: fn(Duration),
) {
    tokio::task::spawn_local(serve_commands(log.clone(), commands, figures.clone()));
    let mut group = Vec::with_capacity(GROUP_RECORDS_MAX);
    while appends.recv_many(&mut group, GROUP_RECORDS_MAX).await > 0 {
        let (tags, mut records): (Vec<T>, Vec<AlignedBuf>) = group.drain(..).map(|a| (a.tag, a.record)).unzip();
        let started = clock::now();
        let result = loop {
            match log.append(&mut records).await {
                Err(LogError::Full) => {
                    // Back-pressure: whoever sends here waits, up to the application's backlog.
                    figures.full.store(1, Ordering::Relaxed);
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                other => break other,
            }
        };
        figures.full.store(0, Ordering::Relaxed);
        figures.live_bytes.store(log.live_bytes(), Ordering::Relaxed);
        figures.made_bytes.store(log.made_bytes(), Ordering::Relaxed);
        let outcome = match result {
            Ok(placed) => {
                observe_commit(clock::now().since(started));
                tags.into_iter().zip(placed).map(|(tag, at)| Appended { tag, result: Ok(at) }).collect()
            }
            Err(e) => {
                figures.failed.store(1, Ordering::Relaxed);
                tracing::error!(error = %e, "log closed for writing; restart this server after the storage is repaired");
                let e = Arc::new(e);
                tags.into_iter().map(|tag| Appended { tag, result: Err(e.clone()) }).collect()
            }
        };
        if completions.send(outcome).await.is_err() {
            return;
        }
        if log.wants_segment() {
            let log = log.clone();
            tokio::task::spawn_local(async move {
                if let Err(e) = log.prepare().await {
                    tracing::warn!(error = %e, "could not make a segment ahead of need");
                }
            });
        }
    }
}

async fn serve_commands(log: Rc<Log<Uring>>, mut commands: mpsc::Receiver<Command>, figures: Arc<Figures>) {
    while let Some(command) = commands.recv().await {
        match command {
            Command::Read(location, reply) => {
                let log = log.clone();
                tokio::task::spawn_local(async move {
                    let _ = reply.send(log.read(location).await);
                });
            }
            Command::Release(locations) => {
                for location in locations {
                    log.release(location);
                }
                figures.live_bytes.store(log.live_bytes(), Ordering::Relaxed);
            }
        }
    }
}
