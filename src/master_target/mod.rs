//! The master target: journals what arrives, applies it to replicas, keeps recovery points and brings them back.
//!
//! Facts that hold here:
//! - A batch is acknowledged when it is verified and durable in the journal.
//! - A replica is changed only by the apply thread, in checkpoints, old content first.
//! - A point is listed when every disk of its machine has the marker durably in its replica, so it can be read at once.
//!
//! Threads: network (QUIC, AES-GCM, LZ4), `journal` (io_uring), `apply` (io_uring: replicas, retention), `recover`
//! (io_uring: mounts, exports, verifications).

pub mod apply;
pub mod bad;
pub mod catalogue;
pub mod control;
pub mod failover;
pub mod group_views;
pub mod groups;
pub mod journal;
pub mod lookup;
pub mod points;
pub mod policy;
pub mod receive;
pub mod recover;
pub mod retain;
pub mod shared;
mod unusable;
pub mod verify;

use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::thread::JoinHandle;

use thiserror::Error;
use tokio::sync::{Notify, mpsc};

use self::catalogue::Records;
use self::policy::LivePolicy;
use self::receive::Receiver;
use self::recover::Recoveries;
use self::shared::{DiskShared, TargetShared};
use crate::config::master_target::MasterTargetSettings;
use crate::crypto::keyring::{KeyEncryptionKey, KeyError};
use crate::crypto::pki::Role;
use crate::crypto::quic;
use crate::crypto::tls::{Credentials, TlsError};
use crate::model;
use crate::observe::http::Readiness;
use crate::observe::metrics;
use crate::storage::catalogue::CatalogueError;
use crate::storage::log::LogError;
use crate::storage::uring;

/// Bytes of a connection that may be under way.
const RECEIVE_WINDOW: u64 = 32 << 20;
/// Requests that may wait for the apply thread.
const COMMANDS_QUEUED_MAX: usize = 256;

/// Why a master target does not start.
#[derive(Debug, Error)]
pub enum MasterTargetError {
    /// Certificates.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// Key-encryption key.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// Metadata.
    #[error(transparent)]
    Catalogue(#[from] CatalogueError),
    /// Journal.
    #[error(transparent)]
    Journal(#[from] LogError),
    /// A socket or folder.
    #[error("{0}")]
    Io(#[from] io::Error),
}

/// A running master target.
pub struct MasterTarget {
    /// Everything that is shared.
    pub shared: Arc<TargetShared>,
    /// Mounts and exports.
    pub recoveries: Recoveries,
    /// To the recover thread.
    pub recover: mpsc::Sender<recover::Command>,
    /// Verifications.
    pub verify: verify::Handle,
    /// For /readyz.
    pub readiness: Readiness,
    /// Where it listens for process servers.
    pub listen: SocketAddr,
    records: Records,
    policy: Arc<LivePolicy>,
    failovers: failover::Desk,
    name: String,
    stop: Arc<Notify>,
    thread: JoinHandle<()>,
}

impl MasterTarget {
    /// Recovers journal, replicas and points, and starts serving.
    ///
    /// # Errors
    /// [`MasterTargetError`]; nothing is left running. A replica that cannot be used is no reason not to start.
    pub fn start(settings: MasterTargetSettings) -> Result<Self, MasterTargetError> {
        uring::create_dir_durable(&settings.state)?;
        // Old points are many files; the usual soft limit of 1024 is for programs that use select().
        let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
        let _ = rustix::process::setrlimit(rustix::process::Resource::Nofile, rustix::process::Rlimit { current: limit.maximum, ..limit });
        let credentials = Credentials::load(&settings.tls, Role::MasterTarget)?;
        let name = credentials.identity.name.to_string();
        metrics::disk_part(metrics::CERTIFICATE_EXPIRY, "", "role", Role::MasterTarget.as_str(), credentials.expires_in_seconds as f64);
        let (kek_path, may_create) = settings.keys.path(&settings.state);
        let kek = Arc::new(KeyEncryptionKey::load(&kek_path, may_create)?);
        let records = Records::open(&settings.state)?;
        let (journal, completions, recovered) = journal::open(&settings.state, records.journal_id, &settings.journal)?;
        let (found, unneeded) = journal::sort(recovered);
        let disks = settings.machine.iter().flat_map(|m| m.disk.iter().map(|d| Arc::new(DiskShared::new(m, d)))).collect();
        let shared = Arc::new(TargetShared::new(disks, records.book()?, records.clock()?));
        let found_jobs = records.jobs()?;
        for disk in &shared.disks {
            // Before anybody can connect, and before replicas are opened.
            if let Some((job, hold)) = model::job::hold(found_jobs.iter(), disk.machine) {
                disk.set_hold(hold, &failover::reason(job));
            }
            // Nor may an agent that is asked to stop be told to go on by a restart.
            let quiescing = found_jobs.iter().filter(|j| j.machine == disk.machine && j.state == model::JobState::Quiescing);
            if let Some(point) = quiescing.filter_map(|j| j.point.as_ref()).next_back() {
                disk.set_wanted(model::Wanted::Quiesce(point.id));
            } else if model::job::is_undone(found_jobs.iter(), disk.machine) {
                // Its agent may have been away when it was.
                disk.set_wanted(model::Wanted::Release);
            }
        }
        let policy = Arc::new(LivePolicy::new(settings.retain.policy(), policy::of_configuration(&settings.machine), records.policy()?));
        let (to_apply, commands) = mpsc::channel(COMMANDS_QUEUED_MAX);
        let setup = apply::Setup {
            settings: settings.clone(),
            shared: shared.clone(),
            records: records.clone(),
            policy: policy.clone(),
            kek: kek.clone(),
            verifier: credentials.verifier(),
            journal: journal.clone(),
            found,
        };
        let (opened_tx, opened_rx) = std::sync::mpsc::sync_channel(1);
        std::thread::Builder::new().name("apply".to_owned()).spawn(move || {
            if let Err(error) = uring::run(apply::run(setup, commands, opened_tx)) {
                tracing::error!(%error, "the apply thread cannot run");
            }
        })?;
        opened_rx.recv().map_err(|_| io::Error::other("the apply thread ended while opening replicas"))?;
        let recoveries = Recoveries::default();
        let (recover, recover_commands) = mpsc::channel(COMMANDS_QUEUED_MAX);
        let (apply, views) = (to_apply.clone(), recoveries.clone());
        let (verifier, verify, wanted) = verify::make(&settings.retain, shared.clone(), records.clone(), to_apply.clone());
        let scratch = recover::Scratch {
            dir: settings.recover.scratch.clone().unwrap_or_else(|| settings.state.join("scratch")),
            max: settings.recover.scratch_max,
        };
        std::thread::Builder::new().name("recover".to_owned()).spawn(move || {
            let work = async {
                tokio::task::spawn_local(verify::run(verifier, wanted));
                recover::run(recover_commands, apply, views, scratch).await;
            };
            if let Err(error) = uring::run(work) {
                tracing::error!(%error, "the recover thread cannot run");
            }
        })?;
        let (failover_requests, asked) = mpsc::channel(COMMANDS_QUEUED_MAX);
        let failovers = failover::Desk {
            shared: shared.clone(),
            jobs: failover::Jobs::default(),
            requests: failover_requests,
            apply: to_apply.clone(),
        };
        let setup = failover::Setup {
            settings: settings.clone(),
            shared: shared.clone(),
            records: records.clone(),
            kek,
            apply: to_apply.clone(),
            recover: recover.clone(),
            jobs: failovers.jobs.clone(),
        };
        std::thread::Builder::new().name("failover".to_owned()).spawn(move || {
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime on one thread can always be built");
            let work = failover::run(setup, found_jobs, asked);
            if let Err(error) = runtime.block_on(tokio::task::LocalSet::new().run_until(work)) {
                tracing::error!(%error, "failovers cannot be run");
            }
        })?;
        let (readiness, stop) = (Readiness::default(), Arc::new(Notify::new()));
        let parts = (readiness.clone(), stop.clone(), shared.clone());
        let (bound_tx, bound_rx) = std::sync::mpsc::sync_channel(1);
        let for_control = records.clone();
        let thread = std::thread::Builder::new().name("master-target".to_owned()).spawn(move || {
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime on one thread can always be built");
            let receiver = Receiver::new(settings, parts.2.clone(), records, journal, to_apply);
            let work = serve(receiver, &credentials, completions, unneeded, parts, bound_tx);
            runtime.block_on(tokio::task::LocalSet::new().run_until(work));
        })?;
        let listen = bound_rx.recv().map_err(|_| io::Error::other("the master target's thread ended while starting"))??;
        Ok(Self { shared, recoveries, recover, verify, readiness, listen, records: for_control, policy, failovers, name, stop, thread })
    }

    /// Stops receiving and ends; what is journaled is applied by the next start.
    pub async fn stop(self) {
        self.stop.notify_one();
        let thread = self.thread;
        let _ = tokio::task::spawn_blocking(move || drop(thread.join())).await;
    }
}

type Parts = (Readiness, Arc<Notify>, Arc<TargetShared>);

async fn serve(
    receiver: Receiver,
    credentials: &Credentials,
    completions: journal::Completions,
    unneeded: Vec<crate::storage::log::Location>,
    (readiness, stop, shared): Parts,
    bound: std::sync::mpsc::SyncSender<io::Result<SocketAddr>>,
) {
    let settings = &receiver.settings.receive;
    let endpoint = match quic::server(credentials, settings.listen, settings.mtu, RECEIVE_WINDOW) {
        Ok(endpoint) => endpoint,
        Err(e) => return drop(bound.send(Err(e))),
    };
    let listen = match endpoint.local_addr() {
        Ok(address) => address,
        Err(e) => return drop(bound.send(Err(e))),
    };
    let _ = bound.send(Ok(listen));
    receiver.journal.release(unneeded).await;
    readiness.set(true);
    tracing::info!(%listen, disks = shared.disks.len(), "master target is running");
    let journal = receiver.journal.clone();
    let receiver = Rc::new(receiver);
    tokio::select! {
        () = receive::take_completions(receiver.clone(), completions) => tracing::error!("the journal has ended; the master target stops"),
        () = receive::accept(receiver, endpoint.clone()) => {}
        () = control::publish(&shared, &journal) => {}
        () = stop.notified() => tracing::info!("master target stops; what is journaled is applied by the next start"),
    }
    readiness.set(false);
    endpoint.close(0u32.into(), b"the master target stops");
    let _ = tokio::time::timeout(std::time::Duration::from_secs(1), endpoint.wait_idle()).await;
}
