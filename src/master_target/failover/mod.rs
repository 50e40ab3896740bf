//! Failover jobs: test, planned, unplanned, change-point, commit, cancel, cleanup; and protecting a machine again.
//!
//! Facts that hold here:
//! - A job's state is durable before anything of that state is done; a restart goes on from there.
//! - What the old source sends is refused from [`crate::model::JobState::Draining`] on: the hold is set at start, before anybody can connect.
//! - Until the commit nothing is lost that was there before the failover: the roll keeps what it overwrites.
//! - One failover at a time for a machine; tests beside it are its own business.
//!
//! Thread: `failover` (tokio): waits, asks the apply thread (rolls, halts) and the recover thread (mounts, serves), runs hooks.

mod answers;
mod choice;
mod decisions;
mod engine;
mod group;
mod group_answers;
mod hooks;
mod log;
mod reprotect;
mod steps;
mod trial;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

pub use self::answers::Desk;
pub use self::choice::{choose, choose_group};
pub use self::engine::{Setup, run};
use self::group_answers::group_target;
pub use self::steps::{progress, reason};
use super::apply::roll::Progress;
use crate::control::api::Decision;
use crate::model::{Choice, Job, JobKind, MachineId, Name};

/// What a person asks for.
pub enum Ask {
    /// A new job.
    Start {
        /// What for.
        kind: JobKind,
        /// Whose.
        machine: MachineId,
        /// Which point.
        choice: Choice,
        /// Name of a hook.
        hook: Option<String>,
        /// Reprotect: disks that may be overwritten.
        overwrite: Vec<String>,
    },
    /// A new job for each machine of a group.
    StartGroup {
        /// What for.
        kind: JobKind,
        /// Which group.
        group: Name,
        /// Which point.
        choice: Choice,
        /// Name of a hook.
        hook: Option<String>,
    },
    /// About the jobs of a group.
    DecideGroup {
        /// Its name, or what names the jobs.
        group: String,
        /// What.
        decision: Decision,
    },
    /// Another point.
    ChangePoint {
        /// Which job.
        job: u64,
        /// Which point.
        choice: Choice,
    },
    /// No way back from here.
    Commit {
        /// Which job.
        job: u64,
        /// Pinned points go too.
        drop_pinned: bool,
    },
    /// Back to replication.
    Cancel {
        /// Which job.
        job: u64,
    },
    /// Nothing of it is left here.
    Cleanup {
        /// Which job.
        job: u64,
    },
}

/// A request to the failover thread.
pub struct Request {
    /// What.
    pub ask: Ask,
    /// Who.
    pub by: String,
    /// The jobs as they are after the request was taken, or why it was not.
    pub done: oneshot::Sender<Result<Vec<Job>, String>>,
}

/// All jobs, for whoever looks.
#[derive(Clone, Default)]
pub struct Jobs(Arc<Mutex<BTreeMap<u64, Entry>>>);

/// A job and how far its roll is.
#[derive(Clone)]
pub struct Entry {
    /// The job.
    pub job: Job,
    /// Something is being done.
    pub busy: bool,
    /// Of the step that runs.
    pub progress: Option<Arc<Progress>>,
}

impl Jobs {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, Entry>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All of them, the oldest first.
    pub fn list(&self) -> Vec<Entry> {
        self.lock().values().cloned().collect()
    }

    /// One of them.
    pub fn get(&self, id: u64) -> Option<Entry> {
        self.lock().get(&id).cloned()
    }
}
