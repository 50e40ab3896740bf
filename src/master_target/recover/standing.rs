//! A disk that failed over as a block device over NBD: the replica itself, not a point of it.

use std::path::PathBuf;
use std::rc::Rc;

use bytes::Bytes;
use tokio::sync::{mpsc, oneshot};

use super::ApplyCommand;
use crate::master_target::apply::failover::Order;
use crate::master_target::apply::standing::{Action, Request, StandingError};
use crate::model::{DiskId, Extent};
use crate::nbd::protocol::NbdError;
use crate::nbd::server::{Allocation, Export, ExportInfo};
use crate::storage::AlignedBuf;

/// Runs of one answer about allocation.
const RUNS_MAX: usize = 256;

/// A disk that failed over.
pub(super) struct Standing {
    pub(super) apply: mpsc::Sender<ApplyCommand>,
    pub(super) disk: DiskId,
    pub(super) name: String,
    pub(super) size: u64,
    pub(super) period: u64,
}

impl Standing {
    async fn ask<T>(&self, make: impl FnOnce(oneshot::Sender<Result<T, String>>) -> Order) -> Result<T, NbdError> {
        let (done, answer) = oneshot::channel();
        let sent = self.apply.send(ApplyCommand::Failover { disk: self.disk, order: make(done) }).await;
        sent.map_err(|_| NbdError::Shutdown)?;
        answer.await.map_err(|_| NbdError::Shutdown)?.map_err(|error| {
            tracing::error!(disk = self.name, error, "a read of a disk that failed over failed");
            NbdError::Io
        })
    }

    async fn change(&self, offset: u64, action: Action, durable: bool) -> Result<(), NbdError> {
        let (done, answer) = oneshot::channel();
        let order = Order::Change(Request { serving: self.period, offset, action, durable, done });
        self.apply.send(ApplyCommand::Failover { disk: self.disk, order }).await.map_err(|_| NbdError::Shutdown)?;
        answer.await.map_err(|_| NbdError::Shutdown)?.map_err(|error| match error {
            StandingError::Full => NbdError::NoSpace,
            StandingError::Over => NbdError::Shutdown,
            StandingError::Failed(_) => NbdError::Io,
        })
    }
}

impl Export for Standing {
    fn info(&self) -> ExportInfo {
        ExportInfo { name: self.name.clone(), size: self.size, read_only: false }
    }

    async fn read(&self, extent: Extent) -> Result<Bytes, NbdError> {
        self.ask(|done| Order::Read { extent, done }).await
    }

    async fn write(&self, offset: u64, data: AlignedBuf, fua: bool) -> Result<(), NbdError> {
        self.change(offset, Action::Write(data.freeze()), fua).await
    }

    async fn zero(&self, extent: Extent, _: bool, fua: bool) -> Result<(), NbdError> {
        self.change(extent.offset, Action::Zero(extent.len), fua).await
    }

    async fn flush(&self) -> Result<(), NbdError> {
        self.change(0, Action::Flush, false).await
    }

    async fn allocation(&self, extent: Extent) -> Result<Vec<Allocation>, NbdError> {
        let mut runs = Vec::new();
        let mut at = extent.offset;
        while at < extent.end() && runs.len() < RUNS_MAX {
            let next = self.ask(|done| Order::NextData { offset: at, done }).await?;
            let data = next.filter(|d| d.offset < extent.end()).unwrap_or(Extent::new(extent.end(), 0));
            if data.offset > at {
                runs.push(Allocation { len: data.offset - at, hole: true });
            }
            let end = data.end().min(extent.end());
            if end > data.offset {
                runs.push(Allocation { len: end - data.offset, hole: false });
            }
            at = end.max(data.offset);
        }
        Ok(runs)
    }
}

/// A disk to serve.
pub struct Serve {
    /// Name of the service, to stop it by.
    pub name: String,
    /// Which disk.
    pub disk: DiskId,
    /// `machine/disk`.
    pub label: String,
    /// Where.
    pub address: crate::model::Address,
    /// Bytes that the machine sees.
    pub size: u64,
    /// The number that its changes carry, see [`crate::master_target::apply::replica::Replica::next_serving`].
    pub period: u64,
}

/// Serves until stopped; answers whether it could begin.
pub(super) async fn serve(
    serve: Serve,
    apply: mpsc::Sender<ApplyCommand>,
    stop: Rc<tokio::sync::Notify>,
    done: oneshot::Sender<Result<(), String>>,
) {
    let listener = match crate::nbd::Listener::bind(&serve.address).await {
        Ok(listener) => listener,
        Err(e) => return drop(done.send(Err(e.to_string()))),
    };
    let _ = done.send(Ok(()));
    let name = serve.label.rsplit('/').next().unwrap_or_default().to_owned();
    let export = Rc::new(Standing { apply, disk: serve.disk, name, size: serve.size, period: serve.period });
    tokio::select! {
        () = super::mount::accept(listener, export) => {}
        () = stop.notified() => {}
    }
    if let crate::model::Address::Unix(path) = &serve.address {
        let _ = std::fs::remove_file(PathBuf::from(path));
    }
}
