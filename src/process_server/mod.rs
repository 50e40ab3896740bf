//! The process server: takes change streams on 9443, caches them durably, forwards them over QUIC.
//!
//! Facts that hold here:
//! - The network thread owns every disk's state; other threads are reached by bounded channels.
//! - A batch is acknowledged to the agent as `cached` when it is durable, as `safe` when the master target journaled it.
//! - A batch leaves the cache only after its position is durable in the catalogue as acknowledged.
//! - Memory: `ingest.memory_max` bounds what is not cached (by credit), `cache.memory_max` what waits for the link.
//!
//! Threads: network (TLS, QUIC, decisions), `seal-N` (fold, LZ4, AES-GCM), `cache` (io_uring).

pub mod adoption;
pub mod cache;
pub mod catalogue;
pub mod control;
pub mod disk;
pub mod forward;
pub mod ingest;
pub mod optimize;
pub mod pressure;
pub mod reserve;
mod server;
mod space;
pub mod stream;

use std::io;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use serde::Serialize;
use thiserror::Error;
use tokio::sync::Notify;

use crate::config::process_server::ProcessServerSettings;
use crate::crypto::keyring::KeyError;
use crate::crypto::tls::TlsError;
use crate::observe::http::Readiness;
use crate::storage::catalogue::CatalogueError;
use crate::storage::log::LogError;

/// Why a process server does not start.
#[derive(Debug, Error)]
pub enum ProcessServerError {
    /// Certificates.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// Key-encryption key or a data key.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// Metadata.
    #[error(transparent)]
    Catalogue(#[from] CatalogueError),
    /// Cache.
    #[error(transparent)]
    Cache(#[from] LogError),
    /// A socket or folder.
    #[error("{0}")]
    Io(#[from] io::Error),
}

/// What the process server shows of a disk.
#[derive(Clone, Debug, Serialize)]
pub struct DiskView {
    /// `machine/disk`.
    pub disk: String,
    /// Id.
    pub id: String,
    /// The agent sends it now.
    pub connected: bool,
    /// Another process server has it, or no agent came with it since the start; nothing of it is here.
    pub standby: bool,
    /// Why it takes no changes, if so.
    pub not_ready: Option<String>,
    /// Positions as `epoch:sequence`, by rung.
    pub positions: Vec<(String, String)>,
    /// In the cache, not at the master target.
    pub cache_bytes: u64,
    /// Why it gets less than the others, if so.
    pub held_back: Option<&'static str>,
}

/// What the process server shows of itself.
#[derive(Clone, Debug, Default, Serialize)]
pub struct ProcessServerView {
    /// Its name, as in its certificate.
    pub name: String,
    /// The last agent that was refused, and why.
    pub last_refused: Option<String>,
    /// Connected to the master target.
    pub link_up: bool,
    /// What the last failed attempt said.
    pub link_error: Option<String>,
    /// Of the cache.
    pub cache_used_bytes: u64,
    /// Of the cache.
    pub cache_capacity_bytes: u64,
    /// Bytes that it can still take.
    pub cache_free_bytes: u64,
    /// How long what is in it takes to send; absent while nothing is sent.
    pub drain_seconds: Option<f64>,
    /// How full it is.
    #[serde(skip)]
    pub level: pressure::Level,
    /// It is to be taken out of service.
    pub draining: bool,
    /// Agents connected.
    pub agents: usize,
    /// Its disks.
    pub disks: Vec<DiskView>,
}

/// A running process server.
pub struct ProcessServer {
    /// Figures for status.
    pub view: Arc<Mutex<ProcessServerView>>,
    /// For /readyz.
    pub readiness: Readiness,
    /// Where it listens for agents.
    pub listen: std::net::SocketAddr,
    stop: Arc<Notify>,
    draining: Arc<AtomicBool>,
    records: catalogue::Records,
    thread: JoinHandle<()>,
}

impl ProcessServer {
    /// Recovers the cache and starts serving.
    ///
    /// # Errors
    /// [`ProcessServerError`]; nothing is left running.
    pub fn start(settings: ProcessServerSettings) -> Result<Self, ProcessServerError> {
        let view = Arc::new(Mutex::new(ProcessServerView::default()));
        let (readiness, stop) = (Readiness::default(), Arc::new(Notify::new()));
        let (opened_tx, opened_rx) = std::sync::mpsc::sync_channel(1);
        let draining = Arc::new(AtomicBool::new(false));
        let shared = server::Shared { view: view.clone(), readiness: readiness.clone(), stop: stop.clone(), draining: draining.clone() };
        let thread = std::thread::Builder::new().name("process-server".to_owned()).spawn(move || {
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime on one thread can always be built");
            let local = tokio::task::LocalSet::new();
            runtime.block_on(local.run_until(server::run(settings, shared, opened_tx)));
        })?;
        let (listen, records) = opened_rx.recv().map_err(|_| io::Error::other("the process server's thread ended while starting"))??;
        Ok(Self { view, readiness, listen, stop, draining, records, thread })
    }

    /// Stops taking changes and ends; what is cached stays cached.
    pub async fn stop(self) {
        self.stop.notify_one();
        let _ = tokio::task::spawn_blocking(move || drop(self.thread.join())).await;
    }
}
