//! Serves a replica as the disk of a machine that failed over: reads it, and writes it with its old content kept, so that the
//! point can still be changed. After the commit there is nothing to keep, and writes go straight to the image.
//!
//! Writes that wait while a group is written make the next group: they share the sync of what they overwrite. A write is
//! answered when it is in the image, durable after a flush, as with any disk.

use std::rc::Rc;

use bytes::Bytes;
use futures_util::StreamExt;
use tokio::sync::{mpsc, oneshot};

use super::checkpoint::ApplyError;
use super::replica::Replica;
use crate::config::limits::APPLY_DEPTH;
use crate::disk::{Disk, DiskError};
use crate::model::{Extent, OverlayMap, SECTOR};
use crate::storage::AlignedBuf;
use crate::storage::uring::is_full;

/// Requests of one group.
const GROUP_MAX: usize = 128;
/// Content of one group, bytes.
const GROUP_BYTES: usize = 8 << 20;
/// Requests that may wait for a group.
const WAITING_MAX: usize = 512;

/// Why a request of the machine fails.
#[derive(Clone, Debug)]
pub enum StandingError {
    /// No space for the image, or for what it overwrites.
    Full,
    /// The disk is not served any more.
    Over,
    /// Anything else.
    Failed(String),
}

/// A change that the machine makes.
pub enum Action {
    /// Content.
    Write(Bytes),
    /// Zeroes.
    Zero(u64),
    /// Everything that was answered becomes durable.
    Flush,
}

/// A change under way.
pub struct Request {
    /// Which serving of the disk it comes from, see [`Replica::next_serving`].
    pub serving: u64,
    /// First byte.
    pub offset: u64,
    /// What.
    pub action: Action,
    /// Durable before the answer.
    pub durable: bool,
    /// The answer.
    pub done: oneshot::Sender<Result<(), StandingError>>,
}

/// The way to the task that writes.
pub type Writer = mpsc::Sender<Request>;

/// Starts the task that writes one replica; it ends when every sender is gone.
pub fn start(replica: Rc<Replica>) -> Writer {
    let (sender, mut requests) = mpsc::channel::<Request>(WAITING_MAX);
    tokio::task::spawn_local(async move {
        let mut next = None;
        loop {
            let Some(first) = (match next.take() {
                Some(first) => Some(first),
                None => requests.recv().await,
            }) else {
                return;
            };
            let mut group = vec![first];
            let mut bytes = group[0].data_len();
            while group.len() < GROUP_MAX && bytes < GROUP_BYTES && group.iter().all(Request::is_whole) {
                let Ok(more) = requests.try_recv() else { break };
                if !more.is_whole() {
                    next = Some(more);
                    break;
                }
                bytes += more.data_len();
                group.push(more);
            }
            let (alone, serving) = (replica.changing.lock().await, replica.serving.get());
            let (group, late): (Vec<Request>, Vec<Request>) = group.into_iter().partition(|r| r.serving == serving);
            let result = write_group(&replica, &group).await.map_err(|e| told(&replica, &e));
            drop(alone);
            late.into_iter().for_each(|request| drop(request.done.send(Err(StandingError::Over))));
            for request in group {
                let _ = request.done.send(result.clone());
            }
        }
    });
    sender
}

impl Request {
    fn data_len(&self) -> usize {
        if let Action::Write(data) = &self.action { data.len() } else { 0 }
    }

    fn extent(&self) -> Extent {
        match &self.action {
            Action::Write(data) => Extent::new(self.offset, data.len() as u64),
            Action::Zero(len) => Extent::new(self.offset, *len),
            Action::Flush => Extent::new(0, 0),
        }
    }

    /// Whole sectors; others are written alone, with the rest of their sectors.
    fn is_whole(&self) -> bool {
        let extent = self.extent();
        extent.offset.is_multiple_of(SECTOR) && extent.len.is_multiple_of(SECTOR)
    }
}

fn told(replica: &Replica, error: &ApplyError) -> StandingError {
    let full = match error {
        ApplyError::Replica(DiskError::Io { source, .. }) => is_full(source),
        ApplyError::Retain(e) => e.io_error().is_some_and(is_full),
        _ => false,
    };
    tracing::error!(disk = replica.shared.label, %error, "a write to a disk that failed over failed");
    if full { StandingError::Full } else { StandingError::Failed(error.to_string()) }
}

/// Writes a group; the caller holds the replica.
async fn write_group(replica: &Replica, group: &[Request]) -> Result<(), ApplyError> {
    let mut pieces: OverlayMap<Option<usize>> = OverlayMap::default();
    let mut patched = Vec::new();
    for (index, request) in group.iter().enumerate() {
        let extent = request.extent();
        match &request.action {
            Action::Flush => {}
            _ if extent.len == 0 => {}
            // Alone in its group: nothing before it is still to be written.
            _ if !request.is_whole() => {
                let around = extent.aligned_out(SECTOR, replica.image.size());
                let mut whole = replica.image.read(around).await?;
                let at = (extent.offset - around.offset) as usize;
                match &request.action {
                    Action::Write(data) => whole[at..at + data.len()].copy_from_slice(data),
                    _ => whole[at..at + extent.len as usize].fill(0),
                }
                patched.push((around.offset, whole.freeze()));
                replica.retention.preserve(&replica.image, std::iter::once(around)).await?;
            }
            Action::Write(_) => pieces.insert(extent, Some(index)),
            Action::Zero(_) => pieces.insert(extent, None),
        }
    }
    if !pieces.is_empty() {
        replica.retention.preserve(&replica.image, pieces.iter().map(|p| p.extent)).await?;
    }
    for (offset, data) in patched {
        replica.image.write(offset, data).await?;
    }
    let operations = pieces.iter().map(|p| {
        let data = p.source.and_then(|index| match &group[index].action {
            Action::Write(data) => Some(data.slice(p.skip as usize..(p.skip + p.extent.len) as usize)),
            _ => None,
        });
        async move {
            match data {
                Some(data) => replica.image.write(p.extent.offset, data).await,
                None => replica.image.zero(p.extent).await,
            }
        }
    });
    let mut running = futures_util::stream::iter(operations).buffer_unordered(APPLY_DEPTH);
    while let Some(result) = running.next().await {
        result?;
    }
    drop(running);
    if group.iter().any(|r| r.durable || matches!(r.action, Action::Flush)) {
        replica.image.barrier().await?;
    }
    Ok(())
}

/// Reads the image.
///
/// # Errors
/// A sentence.
pub async fn read(replica: &Replica, extent: Extent) -> Result<Bytes, String> {
    let aligned = extent.aligned_out(SECTOR, replica.image.size());
    let data = replica.image.read(aligned).await.map(AlignedBuf::freeze).map_err(|e| e.to_string())?;
    let at = (extent.offset - aligned.offset) as usize;
    Ok(data.slice(at..at + extent.len as usize))
}
