//! Positions in a disk's stream and the ladder they climb.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Epochs grow by one at a time. A larger step than this is no honest one, and would leave no room for others.
pub const EPOCH_STEP_MAX: u64 = 1 << 32;

/// A place in a disk's stream. Ordered by epoch, then sequence: a new epoch begins at sequence 1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Position {
    /// Who may write: grows whenever a stream starts without continuing the old one.
    pub epoch: u64,
    /// The last change included; 0 means none of this epoch.
    pub sequence: u64,
}

impl Position {
    /// The position `sequence` of `epoch`.
    pub const fn new(epoch: u64, sequence: u64) -> Self {
        Self { epoch, sequence }
    }

    /// Whether a batch `[first, last]` of `epoch` may follow this position without a gap (it may overlap).
    pub fn accepts(&self, epoch: u64, first: u64) -> bool {
        if epoch == self.epoch { first <= self.sequence + 1 } else { epoch > self.epoch && first == 1 }
    }
}

/// What an agent keeps no trace of any more, because it was safe: the master target must have it, or a process server.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reliance {
    /// The history of the replica that had it. For another one everything is compared anyway.
    pub generation: u64,
    /// Everything through here.
    pub through: Position,
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.epoch, self.sequence)
    }
}

/// A rung of the ladder; the names are the metric's label values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rung {
    /// Agent: in the stream.
    Captured,
    /// Agent: given to the connection.
    Sent,
    /// Durable at the process server (agent's and process server's view).
    Cached,
    /// Journaled at the master target, as the agent knows it.
    Safe,
    /// Process server: received.
    Accepted,
    /// Process server: given to the link.
    Forwarded,
    /// Process server: known to be journaled.
    Acknowledged,
    /// Process server: no longer in the cache.
    Released,
    /// Master target: received.
    Received,
    /// Master target: durable in the journal.
    Journaled,
    /// Master target: written to the replica.
    Applied,
    /// Master target: durable in the replica.
    Checkpointed,
}

impl Rung {
    /// Label value of `tidegate_position`.
    pub fn as_str(self) -> &'static str {
        match self {
            Rung::Captured => "captured",
            Rung::Sent => "sent",
            Rung::Cached => "cached",
            Rung::Safe => "safe",
            Rung::Accepted => "accepted",
            Rung::Forwarded => "forwarded",
            Rung::Acknowledged => "acknowledged",
            Rung::Released => "released",
            Rung::Received => "received",
            Rung::Journaled => "journaled",
            Rung::Applied => "applied",
            Rung::Checkpointed => "checkpointed",
        }
    }
}

/// Stops the process if a ladder is out of order: going on would release something that is not kept elsewhere.
///
/// `rungs` are from the highest (earliest) to the lowest.
#[track_caller]
pub fn assert_ladder(rungs: &[(Rung, Position)]) {
    for pair in rungs.windows(2) {
        let [(above, high), (below, low)] = pair else { continue };
        assert!(high >= low, "position ladder broken: {} {low} is above {} {high}", below.as_str(), above.as_str());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gap_is_not_accepted_and_a_repeat_is() {
        let at = Position::new(3, 10);
        assert!(at.accepts(3, 11));
        assert!(at.accepts(3, 4), "a repeat is idempotent");
        assert!(!at.accepts(3, 12), "a gap");
        assert!(at.accepts(4, 1), "a new epoch begins at 1");
        assert!(!at.accepts(4, 2), "a new epoch with a gap");
        assert!(!at.accepts(2, 11), "an old epoch");
    }

    #[test]
    #[should_panic(expected = "position ladder broken")]
    fn a_broken_ladder_stops_the_process() {
        assert_ladder(&[(Rung::Acknowledged, Position::new(1, 4)), (Rung::Released, Position::new(1, 5))]);
    }
}
