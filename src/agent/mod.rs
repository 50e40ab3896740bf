//! The agent: the write splitter on a source host. Local disk first, then the stream, then the answer.
//!
//! Facts that hold here:
//! - One thread owns all disks of the machine. Sequences are given, and writes are answered, only there; so a marker
//!   put into every stream in one step is a consistent cut.
//! - A region's bit is durable in the dirty map before the first write to it reaches the disk, and is cleared only
//!   when everything captured in it is `safe`. What the map marks covers whatever memory may lose.
//! - A region is *missing* when its content is not in the stream: never sent yet, touched before a crash, or dropped
//!   because the backlog was full. Initial replication and resynchronisation are the same act: send missing regions.
//! - Writes to a missing region do not travel; the region is read as a whole, under a lock, when its turn comes.
//! - Markers are made only when nothing is missing: a point is never a mixture.
//!
//! - A change is held until it is safe: in memory, then in the agent's own log ([`spill`]), then only as a mark in the map.
//!
//! Threads: `capture` (io_uring: NBD, disk, map), `session` (network), `spill` and `backlog` (the log on disk); they share each
//! disk's [`backlog`](mod@backlog).

pub mod backlog;
pub mod capture;
pub mod choice;
pub mod comparison;
pub mod consistency;
pub mod control;
pub mod dirty_map;
mod greeting;
pub mod locks;
pub mod regions;
pub mod rest;
pub mod scrub;
pub mod session;
pub mod shared;
pub mod spill;

use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;

use thiserror::Error;
use tokio::sync::{mpsc, oneshot};

use crate::config::agent::AgentSettings;
use crate::crypto::pki::Role;
use crate::crypto::tls::{ALPN_CONSISTENCY, Credentials, TlsError};

pub use shared::{AgentShared, Command, Made};

/// Why an agent does not start.
#[derive(Debug, Error)]
pub enum AgentError {
    /// Certificates.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The certificate is for another machine.
    #[error(
        "the certificate is for machine {found}, the configuration protects {expected}: issue one with `tidegate pki issue --role agent --name {expected}`"
    )]
    OtherMachine {
        /// In the certificate.
        found: String,
        /// In the configuration.
        expected: String,
    },
    /// A disk or socket.
    #[error("{0}")]
    Io(#[from] io::Error),
}

/// A running agent.
pub struct Agent {
    /// What the other parts of the process may see and ask.
    pub shared: Arc<AgentShared>,
    /// Requests to the capture thread.
    pub commands: mpsc::Sender<Command>,
    threads: Vec<JoinHandle<()>>,
}

impl Agent {
    /// Opens the disks and starts serving them.
    ///
    /// # Errors
    /// [`AgentError`]; nothing is left running.
    pub fn start(settings: AgentSettings) -> Result<Self, AgentError> {
        let credentials = Credentials::load(&settings.tls, Role::Agent)?;
        if credentials.identity.name != settings.machine {
            return Err(AgentError::OtherMachine { found: credentials.identity.name.to_string(), expected: settings.machine.to_string() });
        }
        let (commands, requests) = mpsc::channel(64);
        let coordinator = Arc::new(credentials.client(ALPN_CONSISTENCY)?);
        let (opened_tx, opened_rx) = std::sync::mpsc::sync_channel(1);
        let capture_settings = settings.clone();
        let capture = std::thread::Builder::new().name("capture".to_owned()).spawn(move || {
            let report = opened_tx.clone();
            // The application waits for this thread, nobody waits for the rest of the machine as closely.
            crate::priority::prefer_this_thread();
            if let Err(e) = crate::storage::uring::run(capture::run(capture_settings, coordinator, requests, opened_tx)) {
                let _ = report.send(Err(e));
            }
        })?;
        let shared = opened_rx.recv().map_err(|_| io::Error::other("the capture thread ended while opening the disks"))??;
        let spill = spill::Spill::start(&settings.state, &settings.backlog, shared.clone())?;
        let parts = session::Parts { settings, credentials, shared: shared.clone(), commands: commands.clone(), spill };
        let session = std::thread::Builder::new().name("session".to_owned()).spawn(move || session::run(parts))?;
        Ok(Self { shared, commands, threads: vec![capture, session] })
    }

    /// Stops taking writes, finishes those under way and leaves everything durable.
    pub async fn stop(self) {
        let (done, finished) = oneshot::channel();
        if self.commands.send(Command::Stop(done)).await.is_ok() {
            let _ = finished.await;
        }
        self.shared.stopping.store(true, std::sync::atomic::Ordering::Relaxed);
        self.shared.wake.wake();
        let threads = self.threads;
        let _ = tokio::task::spawn_blocking(move || threads.into_iter().for_each(|t| drop(t.join()))).await;
    }
}
