//! Messages between a coordinator and the agents of its groups on 20004, inside TLS: control messages with a length prefix.
//!
//! A round, as one member sees it (`[]` only for application-consistent points):
//!
//! ```text
//! coordinator  [Freeze]  ->          <- [Frozen]     Prepare ->          <- Held       Commit ->          <- Marked
//! member                  hooks run                           new writes wait                   marker, then writes go on
//! ```
//!
//! `Release` ends a round that comes to nothing. Rounds are numbered from 1 upwards for each connection: whatever belongs to
//! an earlier one is refused.

use serde::{Deserialize, Serialize};

use crate::model::{GroupPart, MachineId, Name, PointKind, Position};

/// Longest explanation that is kept of what a peer says, in bytes.
pub const REASON_BYTES_MAX: usize = 256;

/// What a member says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum MemberMessage {
    /// First message of a connection.
    Hello {
        /// See [`super::PROTOCOL`].
        protocol: u16,
        /// The machine that speaks; must be the one the certificate names.
        machine: MachineId,
    },
    /// How it does: when that changes, and once a second.
    State {
        /// The master target it replicates to, as its process server says; none before it is connected.
        target: Option<Name>,
        /// Why no point of it can be made now.
        trouble: Option<String>,
    },
    /// Its applications are at rest, or why not.
    Frozen {
        /// Which round.
        round: u64,
        /// Why not.
        trouble: Option<String>,
    },
    /// New writes of all its disks wait, those before are done.
    Held {
        /// Which round.
        round: u64,
        /// Its applications are at rest.
        frozen: bool,
        /// The newest change of each disk.
        positions: Vec<Position>,
    },
    /// The marker is in every stream; writes go on.
    Marked {
        /// Which round.
        round: u64,
        /// How long new writes waited, microseconds.
        held_us: u64,
    },
    /// It takes no part, and holds nothing.
    Failed {
        /// Which round.
        round: u64,
        /// Why, for a person.
        why: String,
    },
}

/// What a coordinator says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum CoordinatorMessage {
    /// The connection is accepted.
    Welcome,
    /// The group it belongs to from now on.
    Assigned {
        /// Name and epoch.
        group: Option<(Name, u64)>,
    },
    /// Bring the applications to rest.
    Freeze {
        /// Which round.
        round: u64,
    },
    /// Hold new writes of all disks.
    Prepare {
        /// Which round.
        round: u64,
        /// At most so long, and at most as long as the member's own limit; microseconds.
        limit_us: u64,
    },
    /// Put the marker into every stream and let the writes go on.
    Commit {
        /// Which round.
        round: u64,
        /// The marker's part that is equal for all members.
        common: Common,
    },
    /// Let the writes go on, end the rest.
    Release {
        /// Which round.
        round: u64,
    },
    /// Said once a second.
    Alive,
    /// The connection ends.
    Goodbye {
        /// For a person.
        message: String,
    },
}

/// What every member's marker of a round says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Common {
    /// The group's point.
    pub part: GroupPart,
    /// Application-consistent if all members are at rest.
    pub kind: PointKind,
    /// What a person calls it.
    pub label: Option<String>,
    /// Why it is not what was asked for.
    pub remark: Option<String>,
    /// The coordinator's signature under all of that, see [`crate::model::Marker::group_statement`].
    pub proof: Vec<u8>,
}

/// A text of a peer, as long as is kept of it, without what would break a line.
pub fn bounded(text: &str) -> String {
    let mut out = String::new();
    for c in text.chars().map(|c| if c.is_control() { ' ' } else { c }) {
        if out.len() + c.len_utf8() > REASON_BYTES_MAX {
            break;
        }
        out.push(c);
    }
    out
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn any_bytes_decode_or_fail_without_panic(body in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = crate::wire::decode_control::<MemberMessage>(&body);
            let _ = crate::wire::decode_control::<CoordinatorMessage>(&body);
        }

        #[test]
        fn reasons_are_bounded_and_printable(text in "\\PC{0,400}\n?") {
            let kept = bounded(&text);
            prop_assert!(crate::model::change::is_label(&kept));
        }
    }
}
