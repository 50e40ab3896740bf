//! One write, zero or marker of a disk, at a sequence number.

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::{Digest, DiskId, Extent, GroupPart, MachineId, PointId, PointKind};

/// Largest data of one change, in bytes. Longer writes are cut by the agent.
pub const CHANGE_BYTES_MAX: usize = 256 * 1024;
/// Largest zero range of one change, in bytes.
pub const ZERO_BYTES_MAX: u64 = 1 << 30;

/// A change of one disk, as the source acknowledged it.
#[derive(Clone, Debug)]
pub struct Change {
    /// Number in the disk's stream, from 1, without gaps within an epoch.
    pub sequence: u64,
    /// What happened.
    pub kind: ChangeKind,
}

/// What a change does.
#[derive(Clone, Debug)]
pub enum ChangeKind {
    /// Bytes written at an offset; a multiple of 512 at a multiple of 512.
    Write {
        /// First byte.
        offset: u64,
        /// The content.
        data: Bytes,
    },
    /// A range that reads as zeroes afterwards (also what a discard becomes).
    Zero(Extent),
    /// A point in the stream that becomes a recovery point.
    Mark(Box<Marker>),
    /// What the source has there at this place in the stream, to be compared with the replica.
    Digest(Box<Digest>),
}

impl ChangeKind {
    /// The bytes of the disk it changes; none for a marker or a digest.
    pub fn extent(&self) -> Option<Extent> {
        match self {
            ChangeKind::Write { offset, data } => Some(Extent::new(*offset, data.len() as u64)),
            ChangeKind::Zero(extent) => Some(*extent),
            ChangeKind::Mark(_) | ChangeKind::Digest(_) => None,
        }
    }

    /// Bytes of content it carries.
    pub fn data_len(&self) -> usize {
        match self {
            ChangeKind::Write { data, .. } => data.len(),
            ChangeKind::Zero(_) | ChangeKind::Mark(_) | ChangeKind::Digest(_) => 0,
        }
    }
}

/// The part of a recovery point that stands in one disk's stream. Equal in every disk of the machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Marker {
    /// The point it makes.
    pub point: PointId,
    /// The machine it belongs to.
    pub machine: MachineId,
    /// Crash- or application-consistent.
    pub kind: PointKind,
    /// Every disk that must have the marker before the point exists.
    pub disks: Vec<DiskId>,
    /// Bytes of each of them at this moment, in the same order: a disk may grow while it is replicated.
    pub sizes: Vec<u64>,
    /// What a person called it; at most [`LABEL_BYTES_MAX`] bytes.
    pub label: Option<String>,
    /// Wall clock of the source, milliseconds since 1970. A label, never a basis for a decision.
    pub wall_ms: i64,
    /// How long new writes were held for it, in microseconds.
    pub hold_us: u64,
    /// The group's point that it is a part of.
    pub group: Option<GroupPart>,
    /// The coordinator's signature under what all parts have in common, see [`Marker::group_statement`]; empty without a group.
    pub proof: Vec<u8>,
    /// Why it is not what was asked for, for example crash- instead of application-consistent; bounded like the label.
    pub remark: Option<String>,
}

/// Longest label of a point, in bytes.
pub const LABEL_BYTES_MAX: usize = 256;
/// Most disks of one machine.
pub const DISKS_PER_MACHINE_MAX: usize = 64;

/// What signed statements about points of groups are about.
pub const GROUP_SUBJECT: &str = "group point";
/// Longest proof of a group's point, in bytes: a few certificates and a signature.
pub const PROOF_BYTES_MAX: usize = 8192;

/// The bytes under a group's point that are signed, see [`Marker::group_statement`].
pub fn group_statement(part: &GroupPart, kind: PointKind, label: Option<&str>, remark: Option<&str>) -> Option<Vec<u8>> {
    postcard::to_stdvec(&(part, kind, label, remark)).ok()
}

/// What is said of a label that may not be given.
pub const LABEL_RULE: &str =
    "a label has 1 to 256 bytes and no control characters, and is not latest, latest-processed, latest-app or latest-multi-vm";

/// Whether a person may call a point so: it can be named afterwards.
pub fn may_be_given(label: &str) -> bool {
    is_label(label) && matches!(label.parse(), Ok(super::Choice::Point(_)))
}

/// Whether a text may be a label of a point, as those of others are taken.
pub fn is_label(text: &str) -> bool {
    text.len() <= LABEL_BYTES_MAX && !text.chars().any(char::is_control)
}

impl Marker {
    /// Whether the marker respects the bounds above. Receivers refuse others.
    pub fn is_sane(&self) -> bool {
        (1..=DISKS_PER_MACHINE_MAX).contains(&self.disks.len())
            && self.sizes.len() == self.disks.len()
            && self.sizes.iter().all(|&size| size > 0 && size.is_multiple_of(super::SECTOR) && size <= i64::MAX as u64)
            && [&self.label, &self.remark].into_iter().flatten().all(|text| is_label(text))
            && self.group.as_ref().is_none_or(GroupPart::is_sane)
            && self.proof.len() <= PROOF_BYTES_MAX
    }

    /// What a coordinator signs: the agents that carry it cannot make points of their own in the name of a group. `None` without
    /// a group.
    pub fn group_statement(&self) -> Option<Vec<u8>> {
        group_statement(self.group.as_ref()?, self.kind, self.label.as_deref(), self.remark.as_deref())
    }

    /// A marker for tests.
    #[cfg(test)]
    pub(crate) fn sample(point: u128, disks: &[DiskId]) -> Self {
        let id = uuid::Uuid::from_u128;
        Self {
            point: PointId(id(point)),
            machine: MachineId(id(1)),
            kind: PointKind::Crash,
            disks: disks.to_vec(),
            sizes: vec![1 << 20; disks.len()],
            label: None,
            wall_ms: 0,
            hold_us: 0,
            group: None,
            proof: vec![],
            remark: None,
        }
    }
}
