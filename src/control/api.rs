//! What can be asked over the control interface and what comes back. `POST /v1/call` with a [`Request`].

use serde::{Deserialize, Serialize};

pub use super::coordinator::{GroupLast, GroupMarked, GroupMemberView, GroupMissing, GroupValues, GroupView};
pub use super::failovers::{Decision, JobDiskView, JobView, PlanView, StepView};
use super::groups::{GroupAsk, GroupStatus};
pub use super::scrub::{ScrubView, Verifying};
use crate::model::{Address, Choice, Health, JobKind};

/// A request.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "call", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// What every role in the process says of itself: [`RoleStatus`].
    Status,
    /// Recovery points: [`PointView`], the oldest first.
    Points {
        /// Of one machine only.
        machine: Option<String>,
    },
    /// Points of groups: [`super::groups::GroupPointView`], the oldest first.
    GroupPoints {
        /// Of one group only.
        group: Option<String>,
    },
    /// What a text names as a point: [`super::groups::ResolvedPoint`].
    ResolvePoint {
        /// Id, the beginning of one, label, or `latest`.
        point: String,
        /// Of one machine only; then a group's point stands for its part.
        machine: Option<String>,
    },
    /// Pin or unpin every part of a group's point: [`super::groups::GroupPointView`].
    PinGroupPoint {
        /// As in `ResolvePoint`.
        point: String,
        /// Keep it.
        pinned: bool,
    },
    /// What a name names: [`super::groups::Named`].
    Named {
        /// The name.
        name: String,
    },
    /// Failover of a whole group, see [`GroupAsk`].
    GroupFailover {
        /// Its name.
        group: String,
        /// What.
        ask: GroupAsk,
    },
    /// Make a point now: [`Marked`].
    Mark {
        /// Of which machine.
        machine: String,
        /// What to call it.
        label: Option<String>,
        /// Application-consistent.
        app: bool,
        /// Answer when it is durable at the master target, or after so long.
        wait_seconds: Option<u32>,
    },
    /// The groups of a coordinator: [`GroupView`].
    Groups,
    /// A new group: [`GroupView`].
    GroupCreate {
        /// Its name.
        name: String,
        /// Its machines.
        machines: Vec<String>,
        /// How its points are made.
        values: GroupValues,
    },
    /// Add machines to a group, or remove them: [`GroupView`].
    GroupChange {
        /// Which.
        group: String,
        /// To add.
        add: Vec<String>,
        /// To remove.
        remove: Vec<String>,
    },
    /// Change how a group's points are made: [`GroupView`].
    GroupSet {
        /// Which.
        group: String,
        /// What to change.
        values: GroupValues,
    },
    /// Its machines belong to no group then; points that were made stay.
    GroupDelete {
        /// Which.
        group: String,
    },
    /// Make a point of a group now: [`GroupMarked`].
    GroupMark {
        /// Which.
        group: String,
        /// Application-consistent.
        app: bool,
        /// What to call it.
        label: Option<String>,
    },
    /// Serve a disk of a point over NBD: [`RecoveryView`].
    Mount {
        /// Id of the point, or the beginning of it, or `latest`.
        point: String,
        /// Name of the disk; may be left out when the machine has one.
        disk: Option<String>,
        /// Where.
        nbd: Address,
        /// Refuse writes; otherwise they go to scratch space that lasts as long as the mount.
        read_only: bool,
    },
    /// Write a disk of a point to an image file: [`RecoveryView`].
    Export {
        /// As in `Mount`.
        point: String,
        /// As in `Mount`.
        disk: Option<String>,
        /// `raw` or `vhdx`.
        format: String,
        /// Absolute path on the master target's host.
        output: String,
    },
    /// Keep a point whatever the policy says, or leave it to the policy again: [`PointView`].
    Pin {
        /// As in `Mount`.
        point: String,
        /// Keep it.
        pinned: bool,
    },
    /// The policy, and what would go now: [`PolicyView`].
    Policy {
        /// Of one machine only.
        machine: Option<String>,
        /// With these values set, as `SetPolicy` would set them.
        #[serde(default)]
        values: PolicyValues,
    },
    /// What a failover would take and lose: [`PlanView`].
    FailoverPlan {
        /// Which machine.
        machine: String,
        /// Which point.
        point: Choice,
    },
    /// A new job: [`JobView`].
    FailoverStart {
        /// What for.
        kind: JobKind,
        /// Which machine.
        machine: String,
        /// Which point.
        point: Choice,
        /// Name of a hook.
        hook: Option<String>,
        /// Reprotect: names of disks that may be overwritten.
        overwrite: Vec<String>,
    },
    /// Decide about a job: [`JobView`].
    FailoverDecide {
        /// Its number, or the name of its machine.
        job: String,
        /// What.
        decision: Decision,
    },
    /// All jobs, the oldest first: [`JobView`].
    Failovers,
    /// A machine that was stopped for a planned failover goes on; ask its agent.
    Resume {
        /// Which.
        machine: String,
    },
    /// Compare a disk with its replica now, or only ask how far that is; ask its agent: [`ScrubView`].
    VerifyDisk {
        /// Its name, or MACHINE/NAME.
        disk: String,
        /// Begin, or only look.
        what: Verifying,
    },
    /// Whether a process server is taken out of service, and how far it is: [`DrainView`].
    Drain {
        /// Begin, or end; only ask if left out.
        on: Option<bool>,
    },
    /// Change the policy until it is reset: [`PolicySet`]. Not done when points would go and nobody agreed.
    SetPolicy {
        /// For one machine only.
        machine: Option<String>,
        /// What to change.
        values: PolicyValues,
        /// Give up what was set before, for the machine or for all.
        reset: bool,
        /// Points may go.
        agreed: bool,
    },
    /// Mounts and exports: [`RecoveryView`].
    Recoveries,
    /// Points that became unusable: [`BadPointView`], the oldest first.
    BadPoints {
        /// Of one machine only.
        machine: Option<String>,
    },
    /// Clear points that became unusable: how many were.
    ForgetBad {
        /// Its id, or the beginning of it; all of them if left out.
        point: Option<String>,
        /// Of one machine only.
        machine: Option<String>,
        /// Also those that could be put back.
        kept: bool,
    },
    /// Put a point back on the list that a comparison with the source took off it: [`PointView`].
    RestoreBad {
        /// Its id, or the beginning of it.
        point: String,
    },
    /// Recompute a point: [`VerifyView`].
    Verify {
        /// As in `Mount`.
        point: String,
    },
    /// Verifications that run or ended lately: [`VerifyView`].
    Verifications,
    /// End a mount, or forget a finished export.
    Unmount {
        /// Its name.
        name: String,
    },
}

/// Why a request was not done.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ApiError {
    /// What is wrong and what to do.
    pub message: String,
}

/// How far a process server is that is taken out of service.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct DrainView {
    /// It is.
    pub draining: bool,
    /// Agents that are connected still.
    pub agents: usize,
    /// Bytes that are not at the master target.
    pub waiting_bytes: u64,
}

/// A role's status.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct RoleStatus {
    /// `agent`, `process-server`, `master-target` or `coordinator`.
    pub role: String,
    /// Its name.
    pub name: String,
    /// Its health.
    pub health: Health,
    /// Why it is not healthy.
    pub reason: Option<String>,
    /// What to do.
    pub remedy: Option<String>,
    /// What it knows of machines.
    pub machines: Vec<MachineView>,
    /// Cache used and in all, bytes; process server only.
    pub cache_bytes: Option<(u64, u64)>,
    /// Connected to the next role.
    pub connected: Option<bool>,
    /// The process server that has the machine's disks now, or had them last; agent only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateway: Option<String>,
    /// Groups of a coordinator.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub coordinated: Vec<GroupView>,
    /// How groups do; master target only.
    #[serde(default)]
    pub groups: Vec<GroupStatus>,
}

/// A machine.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MachineView {
    /// Its name.
    pub name: String,
    /// Its id.
    pub id: String,
    /// The worst of its disks.
    pub health: Health,
    /// Age of its newest point, seconds; absent while unknown.
    pub rpo_seconds: Option<f64>,
    /// Its replication group; only the agent knows, from its coordinator.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<String>,
    /// Number of recovery points; only the master target knows.
    pub points: Option<usize>,
    /// RFC 3339.
    pub oldest_point: Option<String>,
    /// RFC 3339.
    pub newest_point: Option<String>,
    /// What a failover does with it now, if anything.
    pub failover: Option<String>,
    /// When it was tested last and what came of it.
    pub last_test: Option<String>,
    /// Its disks.
    pub disks: Vec<DiskView>,
}

/// A disk.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct DiskView {
    /// Its name.
    pub name: String,
    /// Its id.
    pub id: String,
    /// What replication does.
    pub state: String,
    /// Its health.
    pub health: Health,
    /// Why it is not healthy.
    pub reason: Option<String>,
    /// What to do.
    pub remedy: Option<String>,
    /// Bytes; absent while this server does not know.
    pub size_bytes: Option<u64>,
    /// Bytes still to send before points are possible.
    pub missing_bytes: u64,
    /// Bytes in the agent's backlog.
    pub backlog_bytes: u64,
    /// Bytes in the cache (process server) or journal (master target).
    pub waiting_bytes: u64,
    /// Bytes of old content kept.
    pub retained_bytes: u64,
    /// Format of the replica image; only the master target knows.
    pub replica_format: Option<String>,
    /// Where it is.
    pub replica_path: Option<String>,
    /// Age of the newest point.
    pub rpo_seconds: Option<f64>,
    /// Where the newest point spent its time: source, gateway, link, apply; seconds.
    pub rpo_parts: Option<[f64; 4]>,
    /// `epoch:sequence` by rung.
    pub positions: Vec<(String, String)>,
}

/// A recovery point.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PointView {
    /// Its id.
    pub id: String,
    /// Name of the machine.
    pub machine: String,
    /// Its consistency.
    pub kind: String,
    /// What a person called it.
    pub label: Option<String>,
    /// RFC 3339, the source's clock.
    pub time: String,
    /// How long writes were held, seconds.
    pub hold_seconds: f64,
    /// Why it is not what was asked for.
    #[serde(default)]
    pub remark: Option<String>,
    /// Somebody wants it kept.
    pub pinned: bool,
    /// Group of the whole group point that it is a part of.
    #[serde(default)]
    pub group: Option<String>,
    /// That group point.
    #[serde(default)]
    pub group_point: Option<String>,
    /// Machines that have a part of it, and machines of the group.
    #[serde(default)]
    pub group_members: Option<(usize, usize)>,
    /// When its last verification ended, RFC 3339.
    pub verified: Option<String>,
    /// How long ago that was, seconds.
    pub verified_age_seconds: Option<f64>,
    /// Its disks.
    pub disks: Vec<PointDisk>,
}

/// A point that became unusable.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct BadPointView {
    /// As it was listed.
    #[serde(flatten)]
    pub point: PointView,
    /// The disk that is not what it was.
    pub disk: String,
    /// Why.
    pub cause: String,
    /// When that was noticed, RFC 3339.
    pub noticed: String,
    /// Its content is kept: `point restore` puts it back.
    #[serde(default)]
    pub kept: bool,
}

/// A verification.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct VerifyView {
    /// Its name.
    pub name: String,
    /// The point.
    pub point: String,
    /// `running`, `good`, `bad` (the point is off the list) or `failed` (it could not be read to the end).
    pub state: String,
    /// Bytes of the disks gone through.
    pub done_bytes: u64,
    /// Bytes of the disks.
    pub total_bytes: u64,
    /// Bytes that were read; the rest is known to be zeroes.
    pub read_bytes: u64,
    /// How long it took.
    pub seconds: f64,
    /// There was none before it to compare with.
    pub first: bool,
    /// Why it is bad, or failed.
    pub error: Option<String>,
    /// What was found.
    pub disks: Vec<VerifiedDisk>,
}

/// A disk that was verified.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VerifiedDisk {
    /// Its name.
    pub name: String,
    /// BLAKE3 of its content, hexadecimal.
    pub digest: String,
}

/// Values of a policy that a person set; a bound of 0 is none.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PolicyValues {
    /// Fewer points the older they get.
    pub ladder: Option<String>,
    /// Most points of a machine.
    pub points_max: Option<usize>,
    /// So many of the newest stay.
    pub points_min: Option<usize>,
    /// Points older than this go.
    pub span_seconds: Option<u64>,
    /// Most bytes of old content of a machine.
    pub space_max_bytes: Option<u64>,
}

/// Answer to `SetPolicy`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PolicySet {
    /// It is durable and in use.
    pub done: bool,
    /// The policy asked for, and what goes with it.
    pub policy: PolicyView,
}

/// Which points stay.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PolicyView {
    /// What of it `policy set` says; the rest is the configuration's.
    #[serde(default)]
    pub set: PolicyValues,
    /// Fewer points the older they get.
    pub ladder: String,
    /// So many of the newest stay.
    pub points_min: usize,
    /// Most points of a machine.
    pub points_max: usize,
    /// Points older than this go.
    pub span_seconds: Option<u64>,
    /// Most bytes of old content of a machine.
    pub space_max_bytes: Option<u64>,
    /// What it means for each machine now.
    pub machines: Vec<PolicyMachine>,
}

/// What the policy means for a machine.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PolicyMachine {
    /// Its name.
    pub machine: String,
    /// What is different for it.
    pub own: PolicyValues,
    /// Its listed points.
    pub points: usize,
    /// How many of them are pinned.
    pub pinned: usize,
    /// A failover stands: no point goes before it is over.
    #[serde(default)]
    pub held: bool,
    /// Bytes of old content.
    pub retained_bytes: u64,
    /// Points that would go, the oldest first for each reason.
    pub gone: Vec<PolicyGone>,
    /// About what that gives back.
    pub frees_bytes_about: u64,
}

/// A point that would go.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PolicyGone {
    /// Its id.
    pub point: String,
    /// RFC 3339, the source's clock.
    pub time: String,
    /// What a person called it.
    pub label: Option<String>,
    /// Why.
    pub reason: String,
}

/// A disk at a point.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PointDisk {
    /// Its name.
    pub name: String,
    /// Its id.
    pub id: String,
    /// The marker's place in its stream.
    pub position: String,
    /// Bytes it had.
    pub size_bytes: Option<u64>,
    /// Digest of its content by the last verification.
    pub digest: Option<String>,
}

/// Answer to `Mark`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Marked {
    /// Id the point will have once it is listed.
    pub point: String,
    /// Its consistency.
    pub kind: String,
    /// Why it is not what was asked for.
    #[serde(default)]
    pub remark: Option<String>,
}

/// A mount or an export.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RecoveryView {
    /// Its name.
    pub name: String,
    /// `mount` or `export`.
    pub kind: String,
    /// The point.
    pub point: String,
    /// `machine/disk`.
    pub disk: String,
    /// NBD address or file.
    pub target: String,
    /// Writes are taken.
    pub writable: bool,
    /// `running`, `done` or `failed`.
    pub state: String,
    /// Bytes of the disk gone through.
    pub done_bytes: u64,
    /// Bytes that an earlier attempt of the same export had done.
    #[serde(default)]
    pub resumed_bytes: u64,
    /// Bytes of the disk.
    pub total_bytes: u64,
    /// Why it failed.
    pub error: Option<String>,
}
