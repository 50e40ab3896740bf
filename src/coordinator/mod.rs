//! The coordinator: makes the machines of a group come back from one moment, by rounds over 20004/tcp.
//!
//! Facts that hold here:
//! - One task owns the groups, the connections and the rounds; everything else asks it over a channel.
//! - What a round does is decided in [`rounds`], who is in it in [`groups`]; both are pure.
//! - A change of members is durable before it is obeyed, and ends the round under way.
//! - A member that did not answer a round is left out of the next ones until it is heard again: it costs the others no hold.
//! - Nobody depends on the coordinator to go on: members open by their own clocks, points of single machines go on without it.

mod admin;
pub mod groups;
mod history;
mod hub;
pub mod rounds;
mod server;

use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use thiserror::Error;
use tokio::sync::{Notify, mpsc, oneshot};

use crate::config::coordinator::CoordinatorSettings;
use crate::control::api::{ApiError, Request, RoleStatus};
use crate::control::server::{Answer, Role};
use crate::crypto::tls::TlsError;
use crate::observe::http::Readiness;
use crate::storage::catalogue::CatalogueError;

/// Why a coordinator does not start.
#[derive(Debug, Error)]
pub enum CoordinatorError {
    /// Certificates.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// Groups.
    #[error(transparent)]
    Catalogue(#[from] CatalogueError),
    /// A socket or folder.
    #[error("{0}")]
    Io(#[from] io::Error),
}

/// A running coordinator.
pub struct Coordinator {
    /// For /readyz.
    pub readiness: Readiness,
    /// Where it listens for agents.
    pub listen: SocketAddr,
    view: Arc<Mutex<RoleStatus>>,
    asks: mpsc::Sender<hub::Event>,
    stop: Arc<Notify>,
    thread: JoinHandle<()>,
}

impl Coordinator {
    /// Reads the groups and starts serving.
    ///
    /// # Errors
    /// [`CoordinatorError`]; nothing is left running.
    pub fn start(settings: CoordinatorSettings) -> Result<Self, CoordinatorError> {
        let (readiness, stop) = (Readiness::default(), Arc::new(Notify::new()));
        let view = Arc::new(Mutex::new(RoleStatus::default()));
        let (asks, events) = mpsc::channel(hub::EVENTS_MAX);
        let (opened_tx, opened_rx) = std::sync::mpsc::sync_channel(1);
        let parts = server::Parts { view: view.clone(), readiness: readiness.clone(), stop: stop.clone(), asks: asks.clone(), events };
        let thread = std::thread::Builder::new().name("coordinator".to_owned()).spawn(move || {
            // Members hold writes while they wait for what it decides.
            crate::priority::prefer_this_thread();
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime on one thread can always be built");
            let local = tokio::task::LocalSet::new();
            runtime.block_on(local.run_until(server::run(settings, parts, opened_tx)));
        })?;
        let listen = opened_rx.recv().map_err(|_| io::Error::other("the coordinator's thread ended while starting"))??;
        Ok(Self { readiness, listen, view, asks, stop, thread })
    }

    /// Its side of the control interface.
    pub fn control(&self) -> Arc<dyn Role> {
        Arc::new(Control { view: self.view.clone(), asks: self.asks.clone() })
    }

    /// Ends; members let go of what they hold.
    pub async fn stop(self) {
        self.stop.notify_one();
        let _ = tokio::task::spawn_blocking(move || drop(self.thread.join())).await;
    }
}

struct Control {
    view: Arc<Mutex<RoleStatus>>,
    asks: mpsc::Sender<hub::Event>,
}

impl Role for Control {
    fn status(&self) -> RoleStatus {
        self.view.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn call<'a>(&'a self, request: &'a Request, _: &'a str) -> Answer<'a> {
        Box::pin(async move {
            let ours = matches!(
                request,
                Request::Groups
                    | Request::GroupCreate { .. }
                    | Request::GroupChange { .. }
                    | Request::GroupSet { .. }
                    | Request::GroupDelete { .. }
                    | Request::GroupMark { .. }
            );
            if !ours {
                return None;
            }
            let gone = || ApiError { message: "the coordinator is stopping".to_owned() };
            let (done, answer) = oneshot::channel();
            if self.asks.send(hub::Event::Ask(Box::new(request.clone()), done)).await.is_err() {
                return Some(Err(gone()));
            }
            Some(answer.await.map_err(|_| gone()).and_then(|r| r.map_err(|message| ApiError { message })))
        })
    }
}
