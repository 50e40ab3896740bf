//! Messages between process server and master target on 9444, one QUIC stream for each disk.
//!
//! The process server opens the stream with a control message [`Open`]; the master target answers with a
//! [`Reply`]. Then the process server sends items, each a prefix of 16 bytes and a body:
//!
//! | offset | size | field |
//! |---|---|---|
//! | 0 | 1 | type: 1 batch, 2 report |
//! | 1 | 3 | 0 |
//! | 4 | 4 | body length |
//! | 8 | 8 | age in microseconds: how long ago the last change of the batch was captured |
//!
//! and the master target sends further replies as control messages.

use serde::{Deserialize, Serialize};

use super::batch::BATCH_BYTES_MAX;
use super::{CONTROL_BYTES_MAX, Fields, WireError, check_len};
use crate::model::{Compare, DiskId, Position, Verdict, Wanted};

/// Length of an item's prefix, in bytes.
pub const PREFIX_LEN: usize = 16;

/// What an item is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ItemType {
    /// A sealed batch, see [`super::batch`].
    Batch,
    /// A [`crate::model::DiskReport`] for `status`.
    Report,
}

/// The prefix of an item.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Prefix {
    /// What follows.
    pub kind: ItemType,
    /// Bytes that follow.
    pub len: u32,
    /// Age of the content, in microseconds.
    pub age_us: u64,
}

impl Prefix {
    /// The prefix as bytes.
    pub fn encode(&self) -> [u8; PREFIX_LEN] {
        let mut out = [0; PREFIX_LEN];
        out[0] = match self.kind {
            ItemType::Batch => 1,
            ItemType::Report => 2,
        };
        out[4..8].copy_from_slice(&self.len.to_le_bytes());
        out[8..].copy_from_slice(&self.age_us.to_le_bytes());
        out
    }

    /// Parses and bounds a prefix.
    ///
    /// # Errors
    /// [`WireError`]; the stream cannot go on after one.
    pub fn decode(bytes: &[u8; PREFIX_LEN]) -> Result<Prefix, WireError> {
        let mut fields = Fields(bytes);
        let kind = match fields.take::<4>() {
            [1, 0, 0, 0] => ItemType::Batch,
            [2, 0, 0, 0] => ItemType::Report,
            _ => return Err(WireError::Illegal("item type")),
        };
        let len = fields.u32();
        let limit = match kind {
            ItemType::Batch => BATCH_BYTES_MAX,
            ItemType::Report => CONTROL_BYTES_MAX,
        };
        check_len("item", len as usize, limit)?;
        Ok(Prefix { kind, len, age_us: fields.u64() })
    }
}

/// First message of a disk's stream.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Open {
    /// See [`super::PROTOCOL`].
    pub protocol: u16,
    /// The disk.
    pub disk: DiskId,
    /// Size of the source disk in bytes, 0 if the process server has not heard from the agent since it started.
    pub size: u64,
    /// The epoch of what will be sent. A higher one than is obeyed takes the disk over: from then on nothing of a lower one is
    /// taken. An equal one goes on, for the process server that has it.
    pub epoch: u64,
}

/// What the master target says on a disk's stream.
#[derive(Clone, Serialize, Deserialize)]
pub enum Reply {
    /// Batches may follow.
    Opened {
        /// The replica's history.
        generation: u64,
        /// The highest epoch obeyed; batches of lower ones are refused.
        epoch: u64,
        /// Everything up to here is durable.
        journaled: Position,
        /// The disk's data key. Travels inside TLS 1.3, to a certificate of role process-server only.
        data_key: [u8; 32],
        /// Whether the disk is compared with the replica before it is sent.
        compare: Compare,
        /// What the machine's agent is to do.
        wanted: Wanted,
    },
    /// The stream is refused.
    Refused {
        /// Whether trying again can help without anybody acting.
        retry: bool,
        /// For a person.
        message: String,
    },
    /// The disk is in other hands: an epoch is obeyed that this process server does not have. Nothing lower is taken any more.
    Fenced {
        /// The epoch.
        obeyed: u64,
    },
    /// Everything up to here is durable in the journal.
    Journaled(Position),
    /// For the agent: what it is to do from now on.
    Wanted(Wanted),
    /// For the agent: what the replica says to a digest.
    Verdict(Verdict),
}

impl std::fmt::Debug for Reply {
    // Written by hand: the data key must not reach a log.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Reply::Opened { generation, journaled, .. } => write!(f, "Opened {{ generation: {generation}, journaled: {journaled} }}"),
            Reply::Refused { retry, message } => write!(f, "Refused {{ retry: {retry}, message: {message:?} }}"),
            Reply::Fenced { obeyed } => write!(f, "Fenced {{ obeyed: {obeyed} }}"),
            Reply::Journaled(position) => write!(f, "Journaled({position})"),
            Reply::Wanted(wanted) => write!(f, "{wanted:?}"),
            Reply::Verdict(verdict) => write!(f, "{verdict:?}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn any_bytes_decode_or_fail_without_panic(bytes in any::<[u8; PREFIX_LEN]>(), body in proptest::collection::vec(any::<u8>(), 0..100)) {
            if let Ok(prefix) = Prefix::decode(&bytes) {
                prop_assert_eq!(prefix.encode(), bytes);
            }
            let _ = crate::wire::decode_control::<Open>(&body);
            let _ = crate::wire::decode_control::<Reply>(&body);
        }
    }

    #[test]
    fn the_data_key_is_not_printed() {
        let reply = Reply::Opened {
            generation: 1,
            epoch: 1,
            journaled: Position::default(),
            data_key: [0xa5; 32],
            compare: Compare::No,
            wanted: Wanted::Run,
        };
        assert!(!format!("{reply:?}").contains("165"));
    }
}
