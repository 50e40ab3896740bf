//! A point as a read-only block device over NBD.

use std::rc::Rc;

use bytes::{Bytes, BytesMut};
use tokio::task::JoinSet;

use super::{ApplyCommand, OpenPoint};
use crate::model::Extent;
use crate::nbd::protocol::NbdError;
use crate::nbd::server::{Allocation, Export, ExportInfo};
use crate::nbd::{self, Listener};
use crate::storage::AlignedBuf;

/// Bytes asked of the apply thread at once.
const STEP: u64 = 1 << 20;
/// Clients of one mount.
const CLIENTS_MAX: usize = 64;

struct Mounted {
    point: Rc<OpenPoint>,
    name: String,
}

/// Serves clients until the task is dropped, which ends them too.
pub(super) async fn serve(listener: Listener, point: Rc<OpenPoint>, label: &str) {
    let name = label.rsplit('/').next().unwrap_or_default().to_owned();
    let export = Rc::new(Mounted { point, name });
    let mut clients = JoinSet::new();
    loop {
        while clients.len() >= CLIENTS_MAX || clients.try_join_next().is_some() {
            if clients.len() >= CLIENTS_MAX {
                clients.join_next().await;
            }
        }
        match listener.accept().await {
            Ok(stream) => {
                clients.spawn_local(nbd::server::serve(stream, export.clone()));
            }
            Err(error) => {
                tracing::warn!(%error, "could not accept a client of a mounted point");
                tokio::time::sleep(std::time::Duration::from_millis(100)).await;
            }
        }
    }
}

impl Export for Mounted {
    fn info(&self) -> ExportInfo {
        ExportInfo { name: self.name.clone(), size: self.point.size, read_only: true }
    }

    async fn read(&self, extent: Extent) -> Result<Bytes, NbdError> {
        let mut out = BytesMut::new();
        let mut at = extent.offset;
        while at < extent.end() {
            let part = Extent::new(at, STEP.min(extent.end() - at));
            let aligned = part.aligned_out(512, self.point.size);
            let data = self.point.ask(|done| ApplyCommand::Read { view: self.point.view, extent: aligned, done }).await;
            let data = data.map_err(|error| {
                tracing::error!(error, offset = part.offset, "a read of a mounted point failed");
                NbdError::Io
            })?;
            let from = (part.offset - aligned.offset) as usize;
            let data = data.slice(from..from + part.len as usize);
            if part == extent {
                return Ok(data);
            }
            out.extend_from_slice(&data);
            at = part.end();
        }
        Ok(out.freeze())
    }

    async fn write(&self, _: u64, _: AlignedBuf, _: bool) -> Result<(), NbdError> {
        Err(NbdError::NotPermitted)
    }

    async fn zero(&self, _: Extent, _: bool, _: bool) -> Result<(), NbdError> {
        Err(NbdError::NotPermitted)
    }

    async fn flush(&self) -> Result<(), NbdError> {
        Ok(())
    }

    async fn allocation(&self, extent: Extent) -> Result<Vec<Allocation>, NbdError> {
        let mut runs = Vec::new();
        let mut at = extent.offset;
        while at < extent.end() && runs.len() < 256 {
            let next = self
                .point
                .ask(|done| ApplyCommand::NextData { view: self.point.view, offset: at, done })
                .await
                .map_err(|_| NbdError::Io)?;
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
