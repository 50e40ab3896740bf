//! Recovery points as the catalogue keeps them.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{DiskId, GroupPart, MachineId, PointId, Position};

/// What was at rest when a point was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PointKind {
    /// As if the power had been cut.
    Crash,
    /// Applications were flushed and file systems frozen.
    App,
}

impl PointKind {
    /// As people read it.
    pub fn as_str(self) -> &'static str {
        match self {
            PointKind::Crash => "crash-consistent",
            PointKind::App => "app-consistent",
        }
    }
}

/// A moment a machine can be brought back to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecoveryPoint {
    /// Its id.
    pub id: PointId,
    /// Whose.
    pub machine: MachineId,
    /// Its consistency.
    pub kind: PointKind,
    /// What a person called it.
    pub label: Option<String>,
    /// Wall clock of the source when it was taken, milliseconds since 1970.
    pub wall_ms: i64,
    /// How long writes were held, microseconds.
    pub hold_us: u64,
    /// Order of listing at this master target; later points have larger numbers, whatever the clocks say.
    pub order: u64,
    /// When it was listed, in seconds that master target has run in all; ages by it survive jumps of the wall clock.
    pub listed_clock: u64,
    /// The marker's place in each disk's stream.
    pub disks: BTreeMap<DiskId, Position>,
    /// Somebody wants it kept, whatever the policy says.
    pub pinned: bool,
    /// Bytes of each disk at the point.
    pub sizes: BTreeMap<DiskId, u64>,
    /// The group's point that it is a part of.
    pub group: Option<GroupPart>,
    /// Why it is not what was asked for.
    pub remark: Option<String>,
}

#[cfg(test)]
impl RecoveryPoint {
    /// A point for tests, of machine 1 and without disks.
    pub(crate) fn sample(id: u128, order: u64) -> Self {
        let uuid = uuid::Uuid::from_u128;
        Self {
            id: PointId(uuid(id)),
            machine: MachineId(uuid(1)),
            kind: PointKind::Crash,
            label: None,
            wall_ms: 0,
            hold_us: 0,
            order,
            listed_clock: 0,
            disks: BTreeMap::new(),
            pinned: false,
            sizes: BTreeMap::new(),
            group: None,
            remark: None,
        }
    }
}
