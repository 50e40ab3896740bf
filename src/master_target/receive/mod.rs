//! Receives sealed batches over QUIC, verifies each, journals it, then acknowledges.

pub mod claim;
pub mod order;
mod stream;

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use quinn::{Endpoint, Incoming};
use tokio::sync::{Notify, Semaphore, mpsc};

use self::order::Order;
use super::apply::Command;
use super::catalogue::Records;
use super::journal::{Completions, JournalHandle};
use super::shared::TargetShared;
use crate::config::limits::{BATCHES_IN_PIPELINE_MAX, HANDSHAKE_SECONDS};
use crate::config::master_target::MasterTargetSettings;
use crate::crypto::pki::Role;
use crate::crypto::tls;
use crate::model::{DiskId, Name};
use crate::observe::metrics;

/// Process servers connected at once.
const CONNECTIONS_MAX: usize = 256;

/// The receiving side; lives on the network thread.
pub struct Receiver {
    /// As configured.
    pub settings: MasterTargetSettings,
    /// Shared with the apply thread.
    pub shared: Arc<TargetShared>,
    /// Metadata.
    pub records: Records,
    /// To the journal.
    pub journal: JournalHandle,
    /// To the apply thread.
    pub apply: mpsc::Sender<Command>,
    /// Every configured disk.
    pub disks: HashMap<DiskId, Rc<IncomingDisk>>,
    /// Bounds batches between link and journal.
    pub pipeline: Arc<Semaphore>,
    next_owner: Cell<u64>,
}

/// One disk on the network thread.
pub struct IncomingDisk {
    /// Order of its batches; there once the replica is.
    pub order: RefCell<Option<Order>>,
    /// The history of the replica that it belongs to.
    pub generation: Cell<u64>,
    /// Which life of its journal, see [`crate::master_target::shared::DiskShared::lives`].
    pub life: Cell<u64>,
    /// The highest epoch stored.
    pub epoch: Cell<u64>,
    /// The process server that has it in this epoch.
    pub carrier: RefCell<Option<Name>>,
    /// Held while it is decided who has it.
    pub claiming: tokio::sync::Mutex<()>,
    /// Which stream may send; older ones end.
    pub owner: Cell<u64>,
    /// Rung when the journaled position grew.
    pub journaled: Notify,
    /// Why the journal takes nothing more.
    pub failed: RefCell<Option<String>>,
}

impl Receiver {
    /// The receiver at start.
    pub fn new(
        settings: MasterTargetSettings,
        shared: Arc<TargetShared>,
        records: Records,
        journal: JournalHandle,
        apply: mpsc::Sender<Command>,
    ) -> Self {
        let disk = || {
            Rc::new(IncomingDisk {
                order: RefCell::default(),
                generation: Cell::new(0),
                life: Cell::new(0),
                epoch: Cell::new(0),
                carrier: RefCell::default(),
                claiming: tokio::sync::Mutex::new(()),
                owner: Cell::new(0),
                journaled: Notify::new(),
                failed: RefCell::default(),
            })
        };
        let disks = shared.disks.iter().map(|d| (d.id, disk())).collect();
        Self {
            settings,
            shared,
            records,
            journal,
            apply,
            disks,
            pipeline: Arc::new(Semaphore::new(BATCHES_IN_PIPELINE_MAX)),
            next_owner: Cell::new(0),
        }
    }

    fn new_owner(&self) -> u64 {
        self.next_owner.set(self.next_owner.get() + 1);
        self.next_owner.get()
    }
}

/// Takes results of the journal: hands batches to the apply thread and rings for acknowledgements.
pub async fn take_completions(receiver: Rc<Receiver>, mut completions: Completions) {
    while let Some(group) = completions.recv().await {
        let mut unneeded = Vec::new();
        for appended in group {
            let id = appended.tag.disk;
            let (Some(disk), Some(shared)) = (receiver.disks.get(&id), receiver.shared.disk(id)) else { continue };
            match appended.result {
                Ok((location, _)) => {
                    let mut order = disk.order.borrow_mut();
                    let Some(order) = order.as_mut() else { continue };
                    // Under this lock a life ends: what is handed over here belongs to the one that goes on.
                    let mut condition = shared.condition();
                    let lost = disk.life.get() != shared.lives.load(Ordering::Relaxed);
                    if lost || !order.awaits(appended.tag.number) {
                        // Behind something that was lost, or of a history that is over: nobody may apply it.
                        unneeded.push(location);
                        continue;
                    }
                    let ready = order.journaled(appended.tag.number, location);
                    // Before the batches are handed over: applied must never be seen above journaled.
                    (condition.received, condition.journaled) = order.positions();
                    for item in ready {
                        shared.push(item);
                    }
                }
                Err(error) => *disk.failed.borrow_mut() = Some(error.to_string()),
            }
            disk.journaled.notify_one();
        }
        if !unneeded.is_empty() {
            receiver.journal.release(unneeded).await;
        }
    }
}

/// Accepts process servers until the process ends.
pub async fn accept(receiver: Rc<Receiver>, endpoint: Endpoint) {
    let room = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    while let Some(incoming) = endpoint.accept().await {
        let Ok(permit) = room.clone().try_acquire_owned() else {
            metrics::count_reason(metrics::REFUSED, "too-many-connections");
            incoming.refuse();
            continue;
        };
        let receiver = receiver.clone();
        tokio::task::spawn_local(async move {
            serve(receiver, incoming).await;
            drop(permit);
        });
    }
}

async fn serve(receiver: Rc<Receiver>, incoming: Incoming) {
    let peer = incoming.remote_address();
    let connection = match tokio::time::timeout(Duration::from_secs(HANDSHAKE_SECONDS), incoming).await {
        Ok(Ok(connection)) => connection,
        Ok(Err(error)) => {
            metrics::count_reason(metrics::REFUSED, "handshake");
            return tracing::info!(%peer, %error, "refused a connection on the process servers' port");
        }
        Err(_) => return metrics::count_reason(metrics::REFUSED, "handshake-timeout"),
    };
    let certificates = connection.peer_identity().and_then(|c| c.downcast::<Vec<rustls_pki_types::CertificateDer<'static>>>().ok());
    let identity = match tls::peer_identity(certificates.as_deref().map(Vec::as_slice), Role::ProcessServer) {
        Ok(identity) => identity,
        Err(error) => {
            metrics::count_reason(metrics::REFUSED, "identity");
            tracing::warn!(%peer, %error, "refused a connection on the process servers' port");
            return connection.close(1u32.into(), error.to_string().as_bytes());
        }
    };
    tracing::info!(%peer, process_server = %identity.name, "process server connected");
    let reason = loop {
        match connection.accept_bi().await {
            Ok((send, receive)) => {
                let (receiver, connection, who) = (receiver.clone(), connection.clone(), identity.name.clone());
                tokio::task::spawn_local(async move { stream::serve(&receiver, &connection, &who, send, receive).await });
            }
            Err(error) => break error,
        }
    };
    tracing::info!(%peer, process_server = %identity.name, %reason, "process server left");
}
