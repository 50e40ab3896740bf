//! A point as a block device over NBD. Writes go to an overlay, if there is one.

use std::cell::Cell;
use std::rc::Rc;

use bytes::{Bytes, BytesMut};
use tokio::task::JoinSet;

use super::overlay::{Overlay, Refused};
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
    overlay: Option<Overlay>,
    /// The quota was told to be full.
    told_full: Cell<bool>,
}

/// Serves clients until the task is dropped, which ends them too.
pub(super) async fn serve(listener: Listener, point: Rc<OpenPoint>, label: &str, overlay: Option<Overlay>) {
    let name = label.rsplit('/').next().unwrap_or_default().to_owned();
    accept(listener, Rc::new(Mounted { point, name, overlay, told_full: Cell::new(false) })).await;
}

/// Serves an export to every client that comes, until the task is dropped, which ends them too.
pub(super) async fn accept<E: Export>(listener: Listener, export: Rc<E>) {
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

impl Mounted {
    async fn read_point(&self, extent: Extent) -> Result<Bytes, String> {
        let mut out = BytesMut::new();
        let mut at = extent.offset;
        while at < extent.end() {
            let part = Extent::new(at, STEP.min(extent.end() - at));
            let aligned = part.aligned_out(512, self.point.size);
            let data = self.point.read(aligned).await?;
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

    async fn read_through(&self, extent: Extent) -> Result<Bytes, String> {
        let Some(overlay) = &self.overlay else { return self.read_point(extent).await };
        let runs = overlay.runs(extent);
        if let [(_, false)] = runs[..] {
            return self.read_point(extent).await;
        }
        let mut out = AlignedBuf::with_capacity(extent.len as usize);
        for (run, here) in runs {
            if here {
                out.extend(&overlay.read(run).await.map_err(|e| e.to_string())?);
            } else {
                out.extend(&self.read_point(run).await?);
            }
        }
        Ok(out.freeze())
    }

    fn refused(&self, refused: Refused) -> NbdError {
        match refused {
            Refused::Full => {
                if !self.told_full.replace(true) {
                    tracing::warn!(
                        name = self.name,
                        "the scratch space of a mounted point is full: writes to new places get ENOSPC. Raise recover.scratch_max or free space"
                    );
                }
                NbdError::NoSpace
            }
            Refused::Failed(error) => {
                tracing::error!(error, "a write to a mounted point failed");
                NbdError::Io
            }
        }
    }
}

impl Export for Mounted {
    fn info(&self) -> ExportInfo {
        ExportInfo { name: self.name.clone(), size: self.point.size, read_only: self.overlay.is_none() }
    }

    async fn read(&self, extent: Extent) -> Result<Bytes, NbdError> {
        self.read_through(extent).await.map_err(|error| {
            tracing::error!(error, offset = extent.offset, "a read of a mounted point failed");
            NbdError::Io
        })
    }

    async fn write(&self, offset: u64, data: AlignedBuf, _: bool) -> Result<(), NbdError> {
        let overlay = self.overlay.as_ref().ok_or(NbdError::NotPermitted)?;
        let read = async |extent| Ok(AlignedBuf::copy_of(&self.read_through(extent).await?));
        overlay.write(offset, data, read).await.map_err(|e| self.refused(e))
    }

    async fn zero(&self, extent: Extent, _: bool, _: bool) -> Result<(), NbdError> {
        let overlay = self.overlay.as_ref().ok_or(NbdError::NotPermitted)?;
        let read = async |extent| Ok(AlignedBuf::copy_of(&self.read_through(extent).await?));
        overlay.zero(extent, read).await.map_err(|e| self.refused(e))
    }

    async fn flush(&self) -> Result<(), NbdError> {
        Ok(())
    }

    async fn allocation(&self, extent: Extent) -> Result<Vec<Allocation>, NbdError> {
        let Some(overlay) = &self.overlay else { return self.allocation_of_point(extent).await };
        let mut runs = Vec::new();
        for (run, here) in overlay.runs(extent).into_iter().take(64) {
            if here {
                runs.push(Allocation { len: run.len, hole: false });
                continue;
            }
            let within = self.allocation_of_point(run).await?;
            let told: u64 = within.iter().map(|a| a.len).sum();
            runs.extend(within);
            if told < run.len {
                break;
            }
        }
        Ok(runs)
    }
}

impl Mounted {
    async fn allocation_of_point(&self, extent: Extent) -> Result<Vec<Allocation>, NbdError> {
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
