//! What the agent's threads share: each disk's backlog, a doorbell, and requests to the capture thread.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{Notify, oneshot};

use super::backlog::Backlog;
use super::consistency::GroupStatus;
use super::rest::Freezer;
use super::scrub::Rounds;
use crate::model::{Compare, DiskId, DiskReport, MachineId, Name, PointId, PointKind, Position, Reliance, Verdict, Wanted};

/// Everything another thread may see of the agent.
pub struct AgentShared {
    /// Name of the machine.
    pub machine: Name,
    /// Its id.
    pub machine_id: MachineId,
    /// Its disks.
    pub volumes: Vec<Arc<VolumeShared>>,
    /// Rung when there is something to send.
    pub wake: Doorbell,
    /// Set when the process ends.
    pub stopping: AtomicBool,
    /// Connected to the process server.
    pub connected: AtomicBool,
    /// The disks take no writes: the machine was handed over in a planned failover.
    pub handed_over: AtomicBool,
    /// What the last failed attempt said.
    pub last_error: Mutex<Option<String>>,
    /// The address and name of the process server that has the disks now, or had them last.
    pub gateway: Mutex<Option<(String, Name)>>,
    /// Brings the machine to rest for application-consistent points.
    pub rest: Freezer,
    /// Points made, and points that were due and not made.
    pub points: [AtomicU64; 2],
    /// The master target it replicates to, as the process server says.
    pub target: Mutex<Option<Name>>,
    /// The replication group.
    pub group: Mutex<GroupStatus>,
}

/// What is shared of one disk.
pub struct VolumeShared {
    /// Its id.
    pub id: DiskId,
    /// `machine/disk`, the metric label.
    pub label: String,
    /// Its name.
    pub name: Name,
    size: AtomicU64,
    backlog: Mutex<Backlog>,
    report: Mutex<(DiskReport, Option<String>)>,
    scrub: Mutex<Rounds>,
    /// The process server takes changes of this disk now.
    pub open: AtomicBool,
}

impl VolumeShared {
    /// The state shared of a disk.
    pub fn new(id: DiskId, machine: &Name, name: &Name, size: u64, backlog: Backlog) -> Self {
        Self {
            id,
            label: format!("{machine}/{name}"),
            name: name.clone(),
            size: AtomicU64::new(size),
            backlog: Mutex::new(backlog),
            report: Mutex::default(),
            scrub: Mutex::default(),
            open: AtomicBool::new(false),
        }
    }

    /// Bytes.
    pub fn size(&self) -> u64 {
        self.size.load(Ordering::Relaxed)
    }

    /// The disk grew; its map covers what is new.
    pub fn set_size(&self, size: u64) {
        self.size.store(size, Ordering::Relaxed);
    }

    /// The backlog. Held for moments only, never across an await.
    pub fn backlog(&self) -> MutexGuard<'_, Backlog> {
        // A panic while it was held has broken a rung assertion: going on could release what is not kept.
        self.backlog.lock().expect("the backlog's ladder was broken, see the first panic")
    }

    /// The last report.
    pub fn report(&self) -> DiskReport {
        self.report.lock().unwrap_or_else(PoisonError::into_inner).0.clone()
    }

    /// What keeps the disk from being protected, for a person.
    pub fn trouble(&self) -> Option<String> {
        self.report.lock().unwrap_or_else(PoisonError::into_inner).1.clone()
    }

    /// The comparison with the replica: the round under way, and the last one.
    pub fn scrub(&self) -> Rounds {
        self.scrub.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Replaces that.
    pub fn set_scrub(&self, rounds: Rounds) {
        *self.scrub.lock().unwrap_or_else(PoisonError::into_inner) = rounds;
    }

    /// Replaces the report.
    pub fn set_report(&self, report: DiskReport, trouble: Option<String>) {
        *self.report.lock().unwrap_or_else(PoisonError::into_inner) = (report, trouble);
    }
}

/// Wakes the session only when it sleeps: waking a sleeping thread costs more than a small write.
#[derive(Default)]
pub struct Doorbell {
    sleeping: AtomicBool,
    notify: Notify,
}

impl Doorbell {
    /// There is something to do.
    pub fn ring(&self) {
        if self.sleeping.load(Ordering::Relaxed) && self.sleeping.swap(false, Ordering::AcqRel) {
            self.notify.notify_one();
        }
    }

    /// Wakes the sleeper whatever it does.
    pub fn wake(&self) {
        self.notify.notify_one();
    }

    /// Says that the caller is about to sleep: it must look once more, then call [`Doorbell::sleep`].
    pub fn prepare(&self) {
        self.sleeping.store(true, Ordering::SeqCst);
    }

    /// Sleeps until rung.
    pub async fn sleep(&self) {
        self.notify.notified().await;
        self.sleeping.store(false, Ordering::Relaxed);
    }
}

/// A point whose markers are in the streams.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Made {
    /// Its id.
    pub point: PointId,
    /// The number of its marker in the backlog of each disk.
    pub numbers: Vec<u64>,
    /// Why it is not what was asked for.
    pub remark: Option<String>,
}

/// A request to the capture thread, which alone changes epochs, maps and streams.
pub enum Command {
    /// The stream cannot go on: start an epoch above the current one. Answers the new epoch.
    NewEpoch {
        /// Index of the disk.
        volume: usize,
        /// Why, for the log and the metric.
        reason: &'static str,
        /// The new epoch, or why there is none.
        done: oneshot::Sender<Result<u64, String>>,
    },
    /// The disk is about to be opened at a process server. If it was open at another one, or `above` is known there, its stream
    /// moves: it will go on in a new epoch, above both.
    Carry {
        /// Index of the disk.
        volume: usize,
        /// The process server.
        carrier: Name,
        /// The highest epoch known there, if it refused the disk for that.
        above: Option<u64>,
        /// What the replica is relied on to have, or why it cannot be opened.
        done: oneshot::Sender<Result<Reliance, String>>,
    },
    /// Whether the replica has everything because of which regions were marked clean. If not, all of the disk is compared with
    /// it, in a new epoch.
    CheckStands {
        /// Index of the disk.
        volume: usize,
        /// Where the replica stands.
        stands: Position,
        /// Whether it has.
        done: oneshot::Sender<Result<bool, String>>,
    },
    /// Whether the map belongs to the replica's history.
    CheckGeneration {
        /// Index of the disk.
        volume: usize,
        /// The replica's history.
        generation: u64,
        /// The answer.
        done: oneshot::Sender<bool>,
    },
    /// The replica belongs to another history than the map: everything is missing.
    NewGeneration {
        /// Index of the disk.
        volume: usize,
        /// The replica's history.
        generation: u64,
        /// The new epoch, or why there is none.
        done: oneshot::Sender<Result<u64, String>>,
    },
    /// A process server takes the disk.
    Opened {
        /// Index of the disk.
        volume: usize,
        /// The process server.
        carrier: Name,
        /// Whether missing regions are compared with the replica before they are sent.
        compare: Compare,
        /// Done.
        done: oneshot::Sender<()>,
    },
    /// Compare all of a disk with its replica now.
    VerifyDisk {
        /// Index of the disk.
        volume: usize,
        /// It has begun.
        done: oneshot::Sender<()>,
    },
    /// What the replica says to a digest.
    Verdict {
        /// Index of the disk.
        volume: usize,
        /// What.
        verdict: Verdict,
    },
    /// What the master target wants, if it speaks of the replica's history that this disk belongs to.
    Wanted {
        /// Index of the disk.
        volume: usize,
        /// The history.
        generation: u64,
        /// What.
        wanted: Wanted,
    },
    /// The machine runs here again after a planned failover.
    Resume(oneshot::Sender<Result<(), String>>),
    /// Make a recovery point now.
    Mark {
        /// What a person calls it.
        label: Option<String>,
        /// Its kind.
        kind: PointKind,
        /// What was made, or why nothing was.
        done: oneshot::Sender<Result<Made, String>>,
    },
    /// Stop serving the disks, leaving everything durable.
    Stop(oneshot::Sender<()>),
}
