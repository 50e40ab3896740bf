//! What a scrub does next. Pure.

use serde::{Deserialize, Serialize};

use super::Verification;
use crate::model::{DiskId, PointId, Position, RecoveryPoint};

/// How far the scrub of a machine has come; durable.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScrubState {
    /// When the last round ended, in seconds the master target has run.
    pub finished: Option<u64>,
    /// The interval that was read last in the round that runs.
    pub at: Option<(DiskId, Position)>,
}

impl ScrubState {
    /// Whether there is something to do at `clock`.
    pub fn is_due(&self, clock: u64, every: u64) -> bool {
        self.at.is_some() || self.finished.is_none_or(|finished| clock.saturating_sub(finished) >= every)
    }

    /// The disks of a machine that are left in this round, each with the interval after which to go on.
    pub fn disks_left(&self, disks: &[DiskId]) -> Vec<(DiskId, Option<Position>)> {
        let mut disks = disks.to_vec();
        disks.sort();
        let left = disks.into_iter().filter(|disk| self.at.is_none_or(|(at, _)| *disk >= at));
        left.map(|disk| (disk, self.at.filter(|(at, _)| *at == disk).map(|(_, position)| position))).collect()
    }
}

/// The points of a machine that a round recomputes, of those `listed`, the oldest first: the newest that was never verified,
/// so that every stretch of history gets a digest, and the one whose verification is oldest, which is where a silent change of
/// the replica shows.
pub fn choose<'a>(listed: &[&RecoveryPoint], verification: impl Fn(PointId) -> Option<&'a Verification>) -> Vec<PointId> {
    let never = listed.iter().rev().find(|p| verification(p.id).is_none()).map(|p| p.id);
    let verified = listed.iter().filter_map(|p| Some((verification(p.id)?.clock, p.id)));
    never.into_iter().chain(verified.min_by_key(|(clock, _)| *clock).map(|(_, id)| id)).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use uuid::Uuid;

    use super::*;

    #[test]
    fn a_round_goes_on_where_it_was_and_is_due_again_when_its_time_has_passed() {
        let disks = [3, 1, 2].map(|n| DiskId(Uuid::from_u128(n)));
        let mut state = ScrubState::default();
        assert!(state.is_due(0, 100));
        assert_eq!(state.disks_left(&disks).len(), 3);
        state.at = Some((disks[2], Position::new(1, 5)));
        assert_eq!(state.disks_left(&disks), [(disks[2], Some(Position::new(1, 5))), (disks[0], None)]);
        assert!(state.is_due(0, 100));
        state = ScrubState { finished: Some(50), at: None };
        assert!(!state.is_due(149, 100) && state.is_due(150, 100));
    }

    #[test]
    fn the_newest_never_verified_and_the_longest_ago_verified_are_recomputed() {
        let id = |n: u128| PointId(Uuid::from_u128(n));
        let point = |n: u128| RecoveryPoint::sample(n, n as u64);
        let points = [1, 2, 3, 4].map(point);
        let listed: Vec<_> = points.iter().collect();
        let mut verified = HashMap::new();
        assert_eq!(choose(&listed, |id| verified.get(&id)), [id(4)]);
        for (n, clock) in [(4, 30), (1, 20)] {
            verified.insert(id(n), Verification { clock, ..Verification::default() });
        }
        assert_eq!(choose(&listed, |id| verified.get(&id)), [id(3), id(1)]);
        assert_eq!(choose(&[], |id| verified.get(&id)), []);
    }
}
