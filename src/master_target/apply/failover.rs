//! What a failover does with a replica: halts it, rolls it, serves it, ends its history, gives it out of hand.

use std::collections::HashMap;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::oneshot;

use super::Apply;
use super::replica::Replica;
use super::roll::{self, Progress};
use super::standing;
use crate::disk::Disk;
use crate::model::{DiskId, Extent, Hold, Position};

/// How often it is looked whether a replica that is given out of hand is closed, and how long apart.
const RETIRE_LOOKS: u32 = 200;
const RETIRE_LOOK: Duration = Duration::from_millis(50);
/// A checkpoint under way ends by then.
const HALT_LIMIT: Duration = Duration::from_secs(30);

/// Extents that are counted before others have their turn.
const OVERWRITTEN_AT_ONCE: u64 = 1000;

type Answer<T> = oneshot::Sender<Result<T, String>>;

/// An order of a failover.
pub enum Order {
    /// Waits until nothing is applied any more, and tells where the replica stands. The hold was set before.
    Halt {
        /// The checkpoint, and the size of the disk.
        done: Answer<(Position, u64)>,
    },
    /// Whether nothing was kept behind the checkpoint: no attempt was cut off there.
    IsSettled {
        /// The answer.
        done: Answer<bool>,
    },
    /// The machine's disk is served from now on: the number that its changes carry.
    BeginServing {
        /// The number.
        done: Answer<u64>,
    },
    /// How many bytes of the disk were overwritten since a point.
    Since {
        /// The point's position.
        position: Position,
        /// Bytes.
        done: Answer<u64>,
    },
    /// See [`roll::roll`].
    Roll {
        /// Where the failover began.
        before: Position,
        /// Where the replica is to stand.
        target: Position,
        /// How far it is.
        progress: Arc<Progress>,
        /// Bytes written.
        done: Answer<u64>,
    },
    /// Reads the image.
    Read {
        /// What.
        extent: Extent,
        /// The content.
        done: Answer<Bytes>,
    },
    /// Where the image has data.
    NextData {
        /// From where.
        offset: u64,
        /// The extent.
        done: Answer<Option<Extent>>,
    },
    /// Changes the image, see [`standing`].
    Change(standing::Request),
    /// The point was committed: nothing is kept any more, nothing of the old stream is applied.
    EndHistory {
        /// Done.
        done: Answer<()>,
    },
    /// Opens the image again under the record that the catalogue has now; what held it is over.
    Adopt {
        /// Done.
        done: Answer<()>,
    },
    /// Closes the image and tells its files.
    Retire {
        /// The files.
        done: Answer<Vec<PathBuf>>,
    },
}

/// Bytes of the disk of which something since `position` has the old content.
async fn overwritten_since(replica: &Replica, position: Position) -> Result<u64, String> {
    let view = replica.retention.view(position).await.map_err(|e| e.to_string())?;
    let (mut at, mut bytes) = (0, 0);
    for count in 1.. {
        let Some(found) = view.next_kept(at) else { break };
        bytes += found.end() - found.offset.max(at);
        at = found.end();
        // There can be millions, and others wait for this thread.
        if count % OVERWRITTEN_AT_ONCE == 0 {
            crate::storage::uring::breathe().await;
        }
    }
    Ok(bytes)
}

impl Apply {
    /// Does what a failover wants.
    pub(super) async fn order(self: &Rc<Self>, disk: DiskId, order: Order) {
        if let Order::Adopt { done } = order {
            return drop(done.send(self.adopt_again(disk).await));
        }
        let replica = self.replicas.borrow().get(&disk).cloned();
        let Some(replica) = replica else {
            let none = || {
                self.shared.disk(disk).map_or_else(
                    || "the disk is not configured".to_owned(),
                    |d| d.condition().error.clone().unwrap_or_else(|| format!("there is no replica of {}", d.label)),
                )
            };
            match order {
                Order::Halt { done } => drop(done.send(Err(none()))),
                Order::Since { done, .. } => drop(done.send(Err(none()))),
                Order::IsSettled { done } => drop(done.send(Err(none()))),
                Order::BeginServing { done } => drop(done.send(Err(none()))),
                Order::Roll { done, .. } => drop(done.send(Err(none()))),
                Order::Read { done, .. } => drop(done.send(Err(none()))),
                Order::NextData { done, .. } => drop(done.send(Err(none()))),
                Order::Change(request) => drop(request.done.send(Err(standing::StandingError::Failed(none())))),
                Order::EndHistory { done } => drop(done.send(Err(none()))),
                Order::Adopt { .. } => {}
                // Given out of hand before a restart.
                Order::Retire { done } => drop(
                    done.send(Ok(self
                        .shared
                        .disk(disk)
                        .and_then(|d| d.condition().image.clone())
                        .map_or_else(Vec::new, |(format, path)| format.files(&path)))),
                ),
            }
            return;
        };
        match order {
            Order::Halt { done } => {
                // A checkpoint that waits for space would hold it up without end.
                let Ok(_alone) = tokio::time::timeout(HALT_LIMIT, replica.changing.lock()).await else {
                    let error = replica.shared.condition().error.clone().unwrap_or_else(|| "a checkpoint does not end".to_owned());
                    let _ = done.send(Err(format!("{} cannot be halted: {error}", replica.shared.label)));
                    return;
                };
                let condition = replica.shared.condition().clone();
                let halted = match condition.error {
                    Some(error) => Err(error),
                    None if condition.hold < Hold::Standing => Err("the replica is not held".to_owned()),
                    None if replica.retention.is_ahead_of(condition.checkpointed) => {
                        Err(format!("{} was cut off in the middle of a checkpoint, which has to be finished first", replica.shared.label))
                    }
                    None => Ok((condition.checkpointed, replica.image.size())),
                };
                let _ = done.send(halted);
            }
            Order::IsSettled { done } => {
                let checkpointed = replica.shared.condition().checkpointed;
                let _ = done.send(Ok(!replica.retention.is_ahead_of(checkpointed)));
            }
            Order::BeginServing { done } => drop(done.send(Ok(replica.next_serving()))),
            Order::Since { position, done } => drop(done.send(overwritten_since(&replica, position).await)),
            Order::Roll { before, target, progress, done } => {
                let _ = done.send(roll::roll(&self.records, &replica, before, target, &progress).await.map_err(|e| e.to_string()));
            }
            Order::Read { extent, done } => drop(done.send(standing::read(&replica, extent).await)),
            Order::NextData { offset, done } => drop(done.send(replica.image.next_data(offset).map_err(|e| e.to_string()))),
            Order::Change(request) => {
                let writer = self.writers.borrow_mut().entry(disk).or_insert_with(|| standing::start(replica)).clone();
                // Full: the machine waits, as for any busy disk.
                let _ = writer.send(request).await;
            }
            Order::EndHistory { done } => {
                let _alone = replica.changing.lock().await;
                // What somebody still reads of a point that is dropped ends in an error, never in other content.
                self.views.borrow_mut().retain(|_, open| open.replica.shared.id != disk);
                let ended = replica.retention.end().map_err(|e| e.to_string());
                replica.last_marker.set(None);
                replica.noted_marker.set(None);
                replica.shared.condition().retained_bytes = replica.retention.bytes();
                self.journal.release(self.shared.drop_items(replica.shared.clear_queue())).await;
                let _ = done.send(ended);
            }
            Order::Retire { done } => drop(done.send(self.retire(&replica).await)),
            Order::Adopt { .. } => {}
        }
    }

    async fn adopt_again(self: &Rc<Self>, id: DiskId) -> Result<(), String> {
        let _one_at_a_time = self.preparing.lock().await;
        let disk = self.shared.disk(id).cloned().ok_or("the disk is not configured")?;
        let known = self.records.replica(id).map_err(|e| e.to_string())?.is_some();
        if self.replicas.borrow().contains_key(&id) || !known {
            // Adopted when its agent connects.
            disk.set_hold(Hold::None, "");
            return Ok(());
        }
        disk.set_hold(Hold::None, "");
        disk.condition().error = None;
        disk.begin_history();
        self.open_existing(&disk, &mut HashMap::new()).await.map_err(|refusal| {
            disk.condition().error = Some(refusal.message.clone());
            refusal.message
        })
    }

    /// Leaves the image to others. Its tasks end, and it is closed with the last of them.
    async fn retire(&self, replica: &Rc<Replica>) -> Result<Vec<PathBuf>, String> {
        let id = replica.shared.id;
        {
            let _alone = replica.changing.lock().await;
            replica.next_serving();
            replica.image.barrier().await.map_err(|e| e.to_string())?;
        }
        replica.retired.set(true);
        self.writers.borrow_mut().remove(&id);
        self.replicas.borrow_mut().remove(&id);
        replica.shared.queued.notify_one();
        replica.gone.notify_waiters();
        // Closed with its locks when this is answered: whoever is told opens it.
        let files = replica.format.files(&replica.path);
        for _ in 0..RETIRE_LOOKS {
            if Rc::strong_count(replica) == 1 {
                return Ok(files);
            }
            tokio::time::sleep(RETIRE_LOOK).await;
        }
        Err(format!("{} is still read by somebody: end mounts, exports and verifications, then ask again", replica.shared.label))
    }
}
