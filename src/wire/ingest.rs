//! Messages between agent and process server on 9443, inside TLS.
//!
//! Every message is a frame of 64 bytes and a payload:
//!
//! | offset | size | field |
//! |---|---|---|
//! | 0 | 4 | magic `TGI1` |
//! | 4 | 2 | version |
//! | 6 | 1 | type: 1 control, 2 write, 3 zero, 4 marker, 5 digest |
//! | 7 | 1 | 0 |
//! | 8 | 4 | slot: which opened disk |
//! | 12 | 4 | payload length |
//! | 16 | 8 | sequence |
//! | 24 | 8 | offset on the disk |
//! | 32 | 8 | length on the disk |
//! | 40 | 8 | age of the change when it was sent, microseconds of the agent's monotonic clock |
//! | 48 | 4 | CRC-32C of the payload |
//! | 52 | 8 | 0 |
//! | 60 | 4 | CRC-32C of bytes 0..60 |

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::{CONTROL_BYTES_MAX, Fields, PROTOCOL, WireError, check_len, decode_control};
use crate::checksum;
use crate::model::change::{CHANGE_BYTES_MAX, ZERO_BYTES_MAX};
use crate::model::{ChangeKind, Compare, DiskId, DiskReport, Extent, MachineId, Name, Position, Reliance, SECTOR, Verdict, Wanted};

/// Length of a frame header, in bytes.
pub const FRAME_LEN: usize = 64;
const MAGIC: [u8; 4] = *b"TGI1";

/// What a frame carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FrameType {
    /// An [`AgentMessage`] or [`ServerMessage`].
    Control,
    /// A write; the payload is its content.
    Write,
    /// A zero range; no payload.
    Zero,
    /// A marker; the payload is a [`crate::model::Marker`].
    Mark,
    /// A comparison; the payload is a [`crate::model::Digest`].
    Digest,
}

/// The header before every payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame {
    /// What follows.
    pub kind: FrameType,
    /// Which opened disk; 0 for control.
    pub slot: u32,
    /// Bytes that follow.
    pub payload_len: u32,
    /// The change's number; 0 for control.
    pub sequence: u64,
    /// The bytes of the disk it covers.
    pub extent: Extent,
    /// Age when sent, in microseconds.
    pub age_us: u64,
    /// CRC-32C of the payload.
    pub payload_crc: u32,
}

impl Frame {
    /// The frame as bytes.
    pub fn encode(&self) -> [u8; FRAME_LEN] {
        let mut out = Vec::with_capacity(FRAME_LEN);
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(&PROTOCOL.to_le_bytes());
        out.push(match self.kind {
            FrameType::Control => 1,
            FrameType::Write => 2,
            FrameType::Zero => 3,
            FrameType::Mark => 4,
            FrameType::Digest => 5,
        });
        out.push(0);
        out.extend_from_slice(&self.slot.to_le_bytes());
        out.extend_from_slice(&self.payload_len.to_le_bytes());
        for field in [self.sequence, self.extent.offset, self.extent.len, self.age_us] {
            out.extend_from_slice(&field.to_le_bytes());
        }
        out.extend_from_slice(&self.payload_crc.to_le_bytes());
        out.extend_from_slice(&[0; 8]);
        let crc = checksum::crc32c(&out);
        out.extend_from_slice(&crc.to_le_bytes());
        out.try_into().expect("the fields above add up to the frame")
    }

    /// Parses and checks a frame; nothing of the payload is looked at.
    ///
    /// # Errors
    /// Any [`WireError`]; the connection cannot go on after one.
    pub fn decode(bytes: &[u8; FRAME_LEN]) -> Result<Frame, WireError> {
        let mut fields = Fields(bytes);
        if fields.take::<4>() != MAGIC {
            return Err(WireError::Magic("Tidegate ingest"));
        }
        let version = fields.u16();
        if version != PROTOCOL {
            return Err(WireError::Version { what: "ingest protocol", found: version });
        }
        let crc = u32::from_le_bytes([bytes[60], bytes[61], bytes[62], bytes[63]]);
        if checksum::crc32c(&bytes[..60]) != crc {
            return Err(WireError::Checksum("frame"));
        }
        let kind = match fields.take::<2>() {
            [1, 0] => FrameType::Control,
            [2, 0] => FrameType::Write,
            [3, 0] => FrameType::Zero,
            [4, 0] => FrameType::Mark,
            [5, 0] => FrameType::Digest,
            _ => return Err(WireError::Illegal("frame type")),
        };
        let slot = fields.u32();
        let payload_len = fields.u32();
        let sequence = fields.u64();
        let extent = Extent::new(fields.u64(), fields.u64());
        let age_us = fields.u64();
        let payload_crc = fields.u32();
        let frame = Frame { kind, slot, payload_len, sequence, extent, age_us, payload_crc };
        frame.check()?;
        Ok(frame)
    }

    fn check(&self) -> Result<(), WireError> {
        let payload = self.payload_len as usize;
        let aligned = self.extent.offset.is_multiple_of(SECTOR) && self.extent.len.is_multiple_of(SECTOR);
        match self.kind {
            FrameType::Control | FrameType::Mark | FrameType::Digest => check_len("control message", payload, CONTROL_BYTES_MAX)?,
            FrameType::Write => {
                check_len("change", payload, CHANGE_BYTES_MAX)?;
                if payload == 0 || self.extent.len != u64::from(self.payload_len) || !aligned {
                    return Err(WireError::Illegal("extent of a write"));
                }
            }
            FrameType::Zero => {
                if payload != 0 || self.extent.len == 0 || self.extent.len > ZERO_BYTES_MAX || !aligned {
                    return Err(WireError::Illegal("extent of a zero"));
                }
            }
        }
        if self.extent.offset.checked_add(self.extent.len).is_none() {
            return Err(WireError::Illegal("extent"));
        }
        Ok(())
    }
}

/// Appends a change as a frame with its payload.
///
/// # Errors
/// [`WireError`] if a marker or digest does not encode within [`CONTROL_BYTES_MAX`].
pub fn encode_change(slot: u32, sequence: u64, change: &ChangeKind, age_us: u64, out: &mut Vec<u8>) -> Result<(), WireError> {
    let encoded;
    let (kind, payload): (FrameType, &[u8]) = match change {
        ChangeKind::Write { data, .. } => (FrameType::Write, data),
        ChangeKind::Zero(_) => (FrameType::Zero, &[]),
        ChangeKind::Mark(mark) => {
            encoded = postcard::to_stdvec(mark).map_err(|_| WireError::Illegal("marker"))?;
            (FrameType::Mark, &encoded)
        }
        ChangeKind::Digest(digest) => {
            encoded = postcard::to_stdvec(digest).map_err(|_| WireError::Illegal("digest"))?;
            (FrameType::Digest, &encoded)
        }
    };
    check_len("change", payload.len(), CHANGE_BYTES_MAX)?;
    let frame = Frame {
        kind,
        slot,
        payload_len: payload.len() as u32,
        sequence,
        extent: change.extent().unwrap_or(Extent::new(0, 0)),
        age_us,
        payload_crc: checksum::crc32c(payload),
    };
    out.extend_from_slice(&frame.encode());
    out.extend_from_slice(payload);
    Ok(())
}

/// The change of a frame and its payload, whose checksum is checked.
///
/// # Errors
/// [`WireError`] for anything that is not a change within its bounds.
pub fn decode_change(frame: &Frame, payload: Bytes) -> Result<ChangeKind, WireError> {
    if checksum::crc32c(&payload) != frame.payload_crc {
        return Err(WireError::Checksum("payload"));
    }
    Ok(match frame.kind {
        FrameType::Control => return Err(WireError::Illegal("frame type")),
        FrameType::Write => ChangeKind::Write { offset: frame.extent.offset, data: payload },
        FrameType::Zero => ChangeKind::Zero(frame.extent),
        FrameType::Mark => ChangeKind::Mark(decode_control(&payload)?),
        FrameType::Digest => ChangeKind::Digest(decode_control(&payload)?),
    })
}

/// A control message as a frame with its payload.
///
/// # Errors
/// [`WireError`] if it does not encode within [`CONTROL_BYTES_MAX`].
pub fn control_frame<T: Serialize>(message: &T) -> Result<Vec<u8>, WireError> {
    let payload = postcard::to_stdvec(message).map_err(|_| WireError::Illegal("control message"))?;
    check_len("control message", payload.len(), CONTROL_BYTES_MAX)?;
    let frame = Frame {
        kind: FrameType::Control,
        slot: 0,
        payload_len: payload.len() as u32,
        sequence: 0,
        extent: Extent::new(0, 0),
        age_us: 0,
        payload_crc: checksum::crc32c(&payload),
    };
    Ok([&frame.encode()[..], &payload].concat())
}

/// What an agent says outside the stream of changes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum AgentMessage {
    /// First message of a connection.
    Hello {
        /// The machine that speaks; must be the one the certificate names.
        machine: MachineId,
    },
    /// Wants to send changes of a disk.
    Open {
        /// Slot number it will use in frames.
        slot: u32,
        /// The disk.
        disk: DiskId,
        /// Size in bytes.
        size: u64,
        /// The stream's epoch.
        epoch: u64,
        /// The stream comes from another process server and goes on where the master target stands: it must be asked.
        takes_over: bool,
        /// What the agent keeps no trace of any more.
        relies_on: Reliance,
    },
    /// How a disk does; once a second.
    Report {
        /// Which disk.
        slot: u32,
        /// Its state.
        report: DiskReport,
    },
}

/// What a process server says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ServerMessage {
    /// The connection is accepted.
    Welcome,
    /// A disk may send.
    Opened {
        /// Which disk.
        slot: u32,
        /// The history the replica belongs to; another one than before means the replica holds nothing of this disk.
        generation: u64,
        /// The first sequence the server wants.
        resume_at: u64,
        /// Journaled at the master target, in this epoch.
        safe: u64,
        /// Cumulative cost of changes the agent may have sent on this connection, see [`change_cost`].
        credit: u64,
        /// Whether the disk is compared with the replica before it is sent.
        compare: Compare,
        /// Where the master target stands, while the process server is connected to it; in an epoch before this one when the
        /// stream is new.
        stands: Option<Position>,
    },
    /// What the master target wants of the agent. Obeyed only for the history that it speaks of.
    Wanted {
        /// Which disk's master target.
        slot: u32,
        /// The history of its replica.
        generation: u64,
        /// What.
        wanted: Wanted,
    },
    /// What the replica says to a digest.
    Verdict {
        /// Which disk.
        slot: u32,
        /// What.
        verdict: Verdict,
    },
    /// The master target that the changes go to, by its certificate; when it is known, and when it changes.
    Target(Name),
    /// Whether the process server reaches the master target; after the welcome, and when it changes.
    Link {
        /// It does.
        up: bool,
    },
    /// A disk may not send.
    Refused {
        /// Which disk.
        slot: u32,
        /// Why.
        reason: Refusal,
        /// For a person: what is wrong and what to do.
        message: String,
    },
    /// Positions grew.
    Ack {
        /// Which disk.
        slot: u32,
        /// Epoch both positions belong to.
        epoch: u64,
        /// Durable at the process server.
        cached: u64,
        /// Journaled at the master target.
        safe: u64,
        /// As in `Opened`.
        credit: u64,
    },
    /// This process server is to be taken out of service: the agent goes to another one, if it knows one.
    Draining,
    /// Nothing new; the server is there.
    Alive,
    /// The connection ends, and why.
    Goodbye {
        /// For a person.
        message: String,
    },
}

/// Why a disk may not send.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Refusal {
    /// A newer epoch exists; the agent must start one above it.
    StaleEpoch {
        /// The highest epoch known.
        highest: u64,
    },
    /// Not registered to this machine, or refused by the master target. Trying again will not help before somebody acts.
    NotAllowed,
    /// Not now; try again.
    NotReady,
}

/// What a change counts against the credit: its payload and the frame.
pub const fn change_cost(payload_len: usize) -> u64 {
    (payload_len + FRAME_LEN) as u64
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn frame() -> Frame {
        Frame {
            kind: FrameType::Write,
            slot: 3,
            payload_len: 4096,
            sequence: 77,
            extent: Extent::new(8192, 4096),
            age_us: 12,
            payload_crc: 0xdead_beef,
        }
    }

    #[test]
    fn frame_round_trips() {
        assert_eq!(Frame::decode(&frame().encode()), Ok(frame()));
    }

    #[test]
    fn an_unknown_version_is_named() {
        let mut bytes = frame().encode();
        bytes[4] = 9;
        assert_eq!(Frame::decode(&bytes), Err(WireError::Version { what: "ingest protocol", found: 9 }));
    }

    #[test]
    fn lies_about_lengths_are_refused_before_allocation() {
        let huge = Frame { payload_len: u32::MAX, extent: Extent::new(0, u64::from(u32::MAX)), ..frame() };
        assert!(matches!(Frame::decode(&huge.encode()), Err(WireError::TooLarge { .. })));
        let wrap = Frame { extent: Extent::new(u64::MAX - 511, 4096), ..frame() };
        assert!(Frame::decode(&wrap.encode()).is_err());
        let empty = Frame { kind: FrameType::Zero, payload_len: 0, extent: Extent::new(0, 0), ..frame() };
        assert!(Frame::decode(&empty.encode()).is_err());
    }

    proptest! {
        #[test]
        fn any_bytes_decode_or_fail_without_panic(bytes in any::<[u8; FRAME_LEN]>(), body in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = Frame::decode(&bytes);
            let _ = crate::wire::decode_control::<AgentMessage>(&body);
            let _ = crate::wire::decode_control::<ServerMessage>(&body);
        }

        #[test]
        fn one_flipped_bit_is_noticed(bit in 0usize..FRAME_LEN * 8) {
            let mut bytes = frame().encode();
            bytes[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(Frame::decode(&bytes).is_err());
        }
    }
}
