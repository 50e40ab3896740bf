//! Replication groups: machines that recover together, at one moment.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{MachineId, Name, PointId};

/// Most machines of one group.
pub const GROUP_MEMBERS_MAX: usize = 128;

/// When a group's point was made, compared with others of the group: epoch, sequence, and its id.
pub type GroupOrder = (u64, u64, PointId);

/// What a marker says when its machine's point is a part of a group's point. Equal in every part.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupPart {
    /// The group's point.
    pub point: PointId,
    /// The group.
    pub group: Name,
    /// Grows with every change of the group's members.
    pub epoch: u64,
    /// Grows with every point of the group within an epoch.
    pub sequence: u64,
    /// The machines that have a part, in ascending order.
    pub members: Vec<MachineId>,
    /// Members of the group without a part, in ascending order.
    pub missing: Vec<Name>,
}

impl GroupPart {
    /// Whether it respects its bounds. Receivers refuse others.
    pub fn is_sane(&self) -> bool {
        !self.members.is_empty()
            && self.members.len() + self.missing.len() <= GROUP_MEMBERS_MAX
            && self.members.is_sorted_by(|a, b| a < b)
            && self.missing.is_sorted_by(|a, b| a < b)
    }

    /// Its place among the group's points, whenever and in whatever order their parts arrive.
    pub fn order(&self) -> GroupOrder {
        (self.epoch, self.sequence, self.point)
    }

    /// Whether every machine of the group is in it.
    pub fn is_full(&self) -> bool {
        self.missing.is_empty()
    }
}

impl PointId {
    /// The id of one machine's part of a group's point: whoever is told twice to make it makes the same one.
    pub fn part(group: PointId, machine: MachineId) -> Self {
        Self(Uuid::new_v5(&group.0, machine.0.as_bytes()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_that_name_a_machine_twice_or_too_many_are_refused() {
        let machine = |n: u128| MachineId(Uuid::from_u128(n));
        let part = GroupPart {
            point: PointId(Uuid::nil()),
            group: "shop".parse().unwrap(),
            epoch: 1,
            sequence: 1,
            members: vec![machine(1), machine(2)],
            missing: vec![],
        };
        assert!(part.is_sane() && part.is_full());
        assert!(!GroupPart { members: vec![machine(1), machine(1)], ..part.clone() }.is_sane());
        assert!(!GroupPart { members: vec![], ..part.clone() }.is_sane());
        assert!(!GroupPart { members: (0..=GROUP_MEMBERS_MAX as u128).map(machine).collect(), ..part }.is_sane());
        assert_ne!(PointId::part(PointId(Uuid::nil()), machine(1)), PointId::part(PointId(Uuid::nil()), machine(2)));
    }
}
