//! What a disk's stream here becomes by what the master target says when it is opened there. Pure.
//!
//! The master target is asked with an epoch, and takes nothing of a lower one from then on. So there are three answers: the
//! stream here is the one that it has, and goes on; the agent brought the stream from elsewhere, which goes on behind what the
//! master target has; or neither, and the agent has to begin a new epoch.

use crate::model::Position;

/// What is known here of the disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Known {
    /// The replica's history.
    pub generation: u64,
    /// The highest epoch obeyed.
    pub epoch: u64,
}

/// Where the stream here stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Here {
    /// What was accepted.
    pub accepted: Position,
    /// What the master target is known to have.
    pub acknowledged: Position,
    /// Nothing is missing between what the master target has and the newest change, and it takes all of that: see
    /// [`super::stream::Stream::follows`].
    pub follows: bool,
}

/// What the master target says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct There {
    /// The replica's history.
    pub generation: u64,
    /// The epoch it obeys.
    pub epoch: u64,
    /// What it has durably.
    pub journaled: Position,
}

/// What becomes of the stream here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Adoption {
    /// It goes on.
    GoesOn,
    /// It begins behind what the master target has, in the epoch that was asked for.
    TakenOver,
    /// What is here is worth nothing. The agent begins an epoch above this one; or in this one, if nothing was known here.
    Anew {
        /// See above.
        epoch: u64,
    },
}

/// Decides. `claim` is the epoch in which an agent wants to go on with a stream from elsewhere, if that was asked.
pub fn judge(known: Option<Known>, here: Here, there: There, claim: Option<u64>) -> Adoption {
    if claim == Some(there.epoch) {
        return Adoption::TakenOver;
    }
    let Some(known) = known else { return Adoption::Anew { epoch: there.epoch } };
    let same = known.generation == there.generation && known.epoch >= there.epoch;
    // Ahead of what went through here: the disk was sent by another process server, or this one lost what it had. Behind what
    // it acknowledged: it lost what it had.
    if same && here.follows && there.journaled <= here.accepted && there.journaled >= here.acknowledged {
        return Adoption::GoesOn;
    }
    Adoption::Anew {
        epoch: if known.generation == there.generation { known.epoch.max(there.epoch).saturating_add(1) } else { there.epoch },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const THERE: There = There { generation: 7, epoch: 3, journaled: Position::new(3, 10) };

    fn here(accepted: u64, acknowledged: u64) -> Here {
        Here { accepted: Position::new(3, accepted), acknowledged: Position::new(3, acknowledged), follows: true }
    }

    #[test]
    fn a_stream_goes_on_only_if_the_master_target_stands_within_it() {
        let known = Some(Known { generation: 7, epoch: 3 });
        assert_eq!(judge(known, here(12, 9), THERE, None), Adoption::GoesOn);
        assert_eq!(judge(known, here(9, 9), THERE, None), Adoption::Anew { epoch: 4 }, "it has what did not pass here");
        assert_eq!(judge(known, here(12, 11), THERE, None), Adoption::Anew { epoch: 4 }, "it lost what it acknowledged");
        let gap = Here { follows: false, ..here(12, 9) };
        assert_eq!(judge(known, gap, THERE, None), Adoption::Anew { epoch: 4 }, "what comes behind a gap stands on what is gone");
        assert_eq!(judge(Some(Known { generation: 7, epoch: 2 }), here(12, 9), THERE, None), Adoption::Anew { epoch: 4 });
        assert_eq!(judge(Some(Known { generation: 6, epoch: 9 }), here(12, 9), THERE, None), Adoption::Anew { epoch: 3 });
        assert_eq!(judge(None, Here::default(), THERE, None), Adoption::Anew { epoch: 3 }, "the disk is new here");
    }

    #[test]
    fn a_stream_from_elsewhere_is_taken_over_whatever_was_here() {
        for known in [None, Some(Known { generation: 7, epoch: 2 }), Some(Known { generation: 7, epoch: 3 })] {
            assert_eq!(judge(known, here(50, 2), THERE, Some(3)), Adoption::TakenOver);
        }
        assert_eq!(judge(None, Here::default(), THERE, Some(2)), Adoption::Anew { epoch: 3 }, "somebody has a higher epoch");
    }
}
