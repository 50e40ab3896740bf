//! Replication states and health, in the field's words.

use serde::{Deserialize, Serialize};

/// What a disk's replication is doing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ReplicationState {
    /// The first full copy is on its way.
    #[default]
    InitialReplication,
    /// The normal state: every write travels.
    Delta,
    /// Regions that were not tracked one by one are being sent again.
    Resynchronising,
    /// Replication stopped and needs somebody; the reason says what.
    Error,
    /// The agent takes no writes: the machine was failed over.
    FailedOver,
}

impl ReplicationState {
    /// As people read it.
    pub fn as_str(self) -> &'static str {
        match self {
            ReplicationState::InitialReplication => "initial-replication",
            ReplicationState::Delta => "delta",
            ReplicationState::Resynchronising => "resynchronising",
            ReplicationState::Error => "error",
            ReplicationState::FailedOver => "failed-over",
        }
    }
}

/// What the agent tells downstream about a disk, once a second.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskReport {
    /// What replication is doing.
    pub state: ReplicationState,
    /// Bytes that still have to be sent to leave initial replication or resynchronisation.
    pub missing_bytes: u64,
    /// Bytes held in the agent's memory backlog.
    pub backlog_bytes: u64,
    /// The newest change the agent captured.
    pub captured: super::Position,
    /// Age of the oldest change that is not yet safe, in microseconds; 0 when all is safe.
    pub lag_us: u64,
    /// The history of the replica that the agent speaks of.
    pub generation: u64,
    /// Bytes of the missing ones that still have to be compared with the replica; absent before it is known what has to be.
    pub unverified_bytes: Option<u64>,
}

/// What the master target wants of a machine's agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Wanted {
    /// Protect the disks, as always.
    Run,
    /// Take no more writes, and make this final point: a planned failover.
    Quiesce(super::PointId),
    /// The same as `Run`, and a machine that was stopped goes on: its failover was undone. `Run` alone never wakes a machine, because
    /// it may run elsewhere by then.
    Release,
}

/// Health in the field's three levels, with the order used for exit codes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Health {
    /// Working.
    #[default]
    Healthy,
    /// Needs attention soon.
    Warning,
    /// Does not protect now.
    Critical,
}

impl Health {
    /// As people read it.
    pub fn as_str(self) -> &'static str {
        match self {
            Health::Healthy => "healthy",
            Health::Warning => "warning",
            Health::Critical => "critical",
        }
    }
}
