//! What is said of failovers over the control interface.

use serde::{Deserialize, Serialize};

use crate::model::Choice;

/// What a person decides about a job.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Decision {
    /// Another point.
    ChangePoint(Choice),
    /// No way back from here.
    Commit {
        /// Pinned points go too.
        drop_pinned: bool,
    },
    /// Back to replication.
    Cancel,
    /// Nothing of it is left.
    Cleanup,
}

/// What a failover would take and lose.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PlanView {
    /// Name of the machine.
    pub machine: String,
    /// The point; a planned failover makes its own.
    pub point: String,
    /// RFC 3339, the source's clock.
    pub point_time: String,
    /// Its consistency.
    pub kind: String,
    /// What a person called it.
    pub label: Option<String>,
    /// What else a person should know of it.
    #[serde(default)]
    pub note: Option<String>,
    /// Seconds of work at the source that the point does not have, as far as is known.
    pub lost_seconds: f64,
    /// By the time since the newest point's capture (true), or by the source's wall clock (false).
    pub lost_seconds_monotonic: bool,
    /// Bytes of the disks overwritten here since the point: they are rolled back. `None`: it cannot be counted.
    pub newer_bytes: Option<u64>,
    /// Bytes that arrived and are not applied.
    pub waiting_bytes: u64,
    /// Bytes that the agent had and not sent when it was heard last.
    pub unsent_bytes: u64,
    /// Seconds since the agent was heard; absent if it never was.
    pub heard_seconds: Option<f64>,
}

/// A job.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct JobView {
    /// Its number.
    pub id: u64,
    /// `test`, `planned`, `unplanned` or `reprotect`.
    pub kind: String,
    /// Name of the machine.
    pub machine: String,
    /// The group that fails over with it.
    #[serde(default)]
    pub group: Option<String>,
    /// What names all jobs that were started with it.
    #[serde(default)]
    pub group_job: Option<String>,
    /// The group's point.
    #[serde(default)]
    pub group_point: Option<String>,
    /// Machines of the group that did not come along.
    #[serde(default)]
    pub group_missing: Vec<String>,
    /// Where it stands.
    pub state: String,
    /// Something is being done now.
    pub busy: bool,
    /// Nothing is left to do or decide.
    pub over: bool,
    /// What was asked for.
    pub choice: String,
    /// The point.
    pub point: Option<String>,
    /// RFC 3339, the source's clock.
    pub point_time: Option<String>,
    /// What a person called it.
    pub label: Option<String>,
    /// Name of its hook.
    pub hook: Option<String>,
    /// Test: whether start and check succeeded; absent without a hook.
    pub passed: Option<bool>,
    /// Its disks.
    pub disks: Vec<JobDiskView>,
    /// What was done.
    pub steps: Vec<StepView>,
    /// Bytes done and in all of the step that runs.
    pub progress: Option<(u64, u64)>,
    /// Who asked.
    pub by: String,
    /// RFC 3339.
    pub started: String,
    /// RFC 3339.
    pub ended: Option<String>,
    /// Why it does not go on.
    pub error: Option<String>,
    /// What to do.
    pub remedy: Option<String>,
}

/// A disk of a job.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct JobDiskView {
    /// Its name.
    pub name: String,
    /// URI of the NBD export, while it is served.
    pub nbd: Option<String>,
    /// Bytes of the disk.
    pub size_bytes: u64,
}

/// A step of a job.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct StepView {
    /// What.
    pub name: String,
    /// RFC 3339.
    pub started: String,
    /// Absent while it runs.
    pub seconds: Option<f64>,
    /// What came of it.
    pub detail: Option<String>,
    /// Why it failed.
    pub error: Option<String>,
}
