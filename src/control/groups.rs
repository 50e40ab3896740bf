//! What can be asked about replication groups at a master target, and what comes back.

use serde::{Deserialize, Serialize};

use super::api::{Decision, PlanView};
use crate::model::{Choice, JobKind};

/// A point of a group: a moment that all its machines can be brought back to.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct GroupPointView {
    /// Its id.
    pub id: String,
    /// Name of the group.
    pub group: String,
    /// Counts changes of the group's machines.
    pub epoch: u64,
    /// Application-consistent if every part is.
    pub kind: String,
    /// What a person called it.
    pub label: Option<String>,
    /// Why parts are not what was asked for.
    pub remark: Option<String>,
    /// RFC 3339, the earliest of the sources' clocks.
    pub time: String,
    /// How long writes were held, seconds; the longest of its parts.
    pub hold_seconds: f64,
    /// Every part is pinned.
    pub pinned: bool,
    /// Machines of the group in all.
    pub machines: usize,
    /// Machines of the group that have no part.
    pub missing: Vec<String>,
    /// Its parts, by machine.
    pub parts: Vec<GroupPartView>,
}

/// A machine's part of a group point.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct GroupPartView {
    /// Name of the machine.
    pub machine: String,
    /// The machine's own point.
    pub point: String,
    /// Its consistency.
    pub kind: String,
    /// RFC 3339, the source's clock.
    pub time: String,
    /// How long writes were held, seconds.
    pub hold_seconds: f64,
    /// Somebody wants it kept.
    pub pinned: bool,
    /// Seconds since it was verified last.
    pub verified_age_seconds: Option<f64>,
}

/// What a text names: a machine's point or a group's.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ResolvedPoint {
    /// Id of the machine's point.
    pub point: Option<String>,
    /// The group's point.
    pub group_point: Option<GroupPointView>,
}

/// What a name names.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Named {
    /// A machine that is configured.
    pub machine: bool,
    /// A group that has points or failovers.
    pub group: bool,
}

/// A moment of a group, in short.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct GroupMoment {
    /// Id of the point.
    pub point: String,
    /// RFC 3339, the earliest of the sources' clocks.
    pub time: String,
    /// Seconds since then, by that clock.
    pub age_seconds: f64,
    /// Its consistency.
    pub kind: String,
    /// Machines that have a part.
    pub members: usize,
    /// Machines of the group in all.
    pub machines: usize,
    /// Machines that have none.
    pub missing: Vec<String>,
}

/// How a group does.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct GroupStatus {
    /// Its name.
    pub name: String,
    /// Its listed points.
    pub points: usize,
    /// The newest.
    pub newest: Option<GroupMoment>,
    /// The newest that no machine is missing in.
    pub newest_full: Option<GroupMoment>,
    /// Points that wait for parts.
    pub waiting: usize,
    /// For how long the oldest of them has, seconds.
    pub waiting_seconds: Option<f64>,
    /// For which machines.
    pub waiting_for: Vec<String>,
    /// Which of those are not configured at this master target, so that the points never will be listed.
    pub not_here: Vec<String>,
    /// Points whose machines contradict each other.
    pub conflicting: usize,
    /// What a failover of the group does now, if anything.
    pub failover: Option<String>,
}

/// What is asked of a group's failover.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum GroupAsk {
    /// What it would take and lose: [`GroupPlanView`].
    Plan {
        /// What for.
        kind: JobKind,
        /// Which point.
        point: Choice,
    },
    /// A job for each machine, or none: [`super::api::JobView`], by machine.
    Start {
        /// What for.
        kind: JobKind,
        /// Which point.
        point: Choice,
        /// Name of a hook, for every machine.
        hook: Option<String>,
    },
    /// Decide about the jobs of the group's newest failover: those that it concerns, by machine.
    Decide(Decision),
}

/// What a failover of a group would take and lose.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct GroupPlanView {
    /// Name of the group.
    pub group: String,
    /// The point; a planned failover makes a final one of each machine.
    pub point: Option<GroupMoment>,
    /// What each machine loses; empty for a planned failover, which loses nothing.
    pub plans: Vec<PlanView>,
    /// Names of the machines.
    pub machines: Vec<String>,
    /// Machines of the group that do not come along.
    pub missing: Vec<String>,
    /// What else a person should know.
    pub notes: Vec<String>,
}
