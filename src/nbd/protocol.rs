//! Numbers and fixed layouts of the NBD protocol. Pure.

use thiserror::Error;

/// Server greeting: `NBDMAGIC`.
pub const MAGIC_GREETING: u64 = 0x4e42_444d_4147_4943;
/// Before every option: `IHAVEOPT`.
pub const MAGIC_OPTION: u64 = 0x4948_4156_454f_5054;
/// Before every option reply.
pub const MAGIC_OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;
/// Before every request.
pub const MAGIC_REQUEST: u32 = 0x2560_9513;
/// Before every simple reply.
pub const MAGIC_SIMPLE: u32 = 0x6744_6698;
/// Before every structured reply chunk.
pub const MAGIC_CHUNK: u32 = 0x668e_33ef;

/// Handshake flags: fixed newstyle, no zeroes.
pub const HANDSHAKE_FLAGS: u16 = 0b11;

/// Option numbers.
pub mod option {
    #![allow(missing_docs, reason = "names of the protocol document")]
    pub const EXPORT_NAME: u32 = 1;
    pub const ABORT: u32 = 2;
    pub const LIST: u32 = 3;
    pub const INFO: u32 = 6;
    pub const GO: u32 = 7;
    pub const STRUCTURED_REPLY: u32 = 8;
    pub const LIST_META_CONTEXT: u32 = 9;
    pub const SET_META_CONTEXT: u32 = 10;
}

/// Option reply types.
pub mod reply {
    #![allow(missing_docs, reason = "names of the protocol document")]
    pub const ACK: u32 = 1;
    pub const SERVER: u32 = 2;
    pub const INFO: u32 = 3;
    pub const META_CONTEXT: u32 = 4;
    pub const ERR_UNSUP: u32 = (1 << 31) + 1;
    pub const ERR_INVALID: u32 = (1 << 31) + 3;
    pub const ERR_UNKNOWN: u32 = (1 << 31) + 6;
    pub const ERR_TOO_BIG: u32 = (1 << 31) + 9;
}

/// Transmission flags.
pub mod flag {
    #![allow(missing_docs, reason = "names of the protocol document")]
    pub const HAS_FLAGS: u16 = 1;
    pub const READ_ONLY: u16 = 1 << 1;
    pub const SEND_FLUSH: u16 = 1 << 2;
    pub const SEND_FUA: u16 = 1 << 3;
    pub const SEND_TRIM: u16 = 1 << 5;
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    pub const SEND_DF: u16 = 1 << 7;
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
}

/// Command numbers and flags.
pub mod command {
    #![allow(missing_docs, reason = "names of the protocol document")]
    pub const READ: u16 = 0;
    pub const WRITE: u16 = 1;
    pub const DISC: u16 = 2;
    pub const FLUSH: u16 = 3;
    pub const TRIM: u16 = 4;
    pub const CACHE: u16 = 5;
    pub const WRITE_ZEROES: u16 = 6;
    pub const BLOCK_STATUS: u16 = 7;
    pub const FLAG_FUA: u16 = 1;
    pub const FLAG_NO_HOLE: u16 = 1 << 1;
    pub const FLAG_DF: u16 = 1 << 2;
    pub const FLAG_REQ_ONE: u16 = 1 << 3;
}

/// Structured reply chunk types.
pub mod chunk {
    #![allow(missing_docs, reason = "names of the protocol document")]
    pub const FLAG_DONE: u16 = 1;
    pub const NONE: u16 = 0;
    pub const OFFSET_DATA: u16 = 1;
    pub const BLOCK_STATUS: u16 = 5;
    pub const ERROR: u16 = 0x8001;
}

/// Largest payload of a read or write, in bytes.
pub const PAYLOAD_BYTES_MAX: u32 = 32 << 20;
/// Longest option, in bytes; names are at most 4096.
pub const OPTION_BYTES_MAX: u32 = 16 << 10;
/// The only metadata context.
pub const CONTEXT_NAME: &str = "base:allocation";
/// Its id on every connection.
pub const CONTEXT_ID: u32 = 1;
/// Length of a request, in bytes.
pub const REQUEST_LEN: usize = 28;
/// Most descriptors in one block status reply.
pub const DESCRIPTORS_MAX: usize = 4096;

/// What a client may be told about a failed command, as the protocol numbers it.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum NbdError {
    /// Writing to a read-only export.
    #[error("not permitted: the export is read-only")]
    NotPermitted,
    /// The disk failed.
    #[error("input/output error")]
    Io,
    /// Outside the disk, or flags that make no sense.
    #[error("invalid request")]
    Invalid,
    /// No space left.
    #[error("no space left")]
    NoSpace,
    /// A command that is not served.
    #[error("not supported")]
    Unsupported,
    /// The server is stopping.
    #[error("server is shutting down")]
    Shutdown,
}

impl NbdError {
    /// The number on the wire.
    pub fn code(self) -> u32 {
        match self {
            NbdError::NotPermitted => 1,
            NbdError::Io => 5,
            NbdError::Invalid => 22,
            NbdError::NoSpace => 28,
            NbdError::Unsupported => 95,
            NbdError::Shutdown => 108,
        }
    }
}

/// A command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// See [`command`].
    pub flags: u16,
    /// See [`command`].
    pub kind: u16,
    /// Comes back in the reply.
    pub cookie: u64,
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub len: u32,
}

impl Request {
    /// Parses a request; `None` if the magic is wrong, after which the stream cannot be understood.
    pub fn decode(bytes: &[u8; REQUEST_LEN]) -> Option<Request> {
        let (magic, rest) = bytes.split_first_chunk::<4>()?;
        let (flags, rest) = rest.split_first_chunk::<2>()?;
        let (kind, rest) = rest.split_first_chunk::<2>()?;
        let (cookie, rest) = rest.split_first_chunk::<8>()?;
        let (offset, rest) = rest.split_first_chunk::<8>()?;
        let (len, _) = rest.split_first_chunk::<4>()?;
        (u32::from_be_bytes(*magic) == MAGIC_REQUEST).then(|| Request {
            flags: u16::from_be_bytes(*flags),
            kind: u16::from_be_bytes(*kind),
            cookie: u64::from_be_bytes(*cookie),
            offset: u64::from_be_bytes(*offset),
            len: u32::from_be_bytes(*len),
        })
    }

    /// The request as bytes.
    pub fn encode(&self) -> [u8; REQUEST_LEN] {
        let mut out = [0; REQUEST_LEN];
        out[..4].copy_from_slice(&MAGIC_REQUEST.to_be_bytes());
        out[4..6].copy_from_slice(&self.flags.to_be_bytes());
        out[6..8].copy_from_slice(&self.kind.to_be_bytes());
        out[8..16].copy_from_slice(&self.cookie.to_be_bytes());
        out[16..24].copy_from_slice(&self.offset.to_be_bytes());
        out[24..].copy_from_slice(&self.len.to_be_bytes());
        out
    }
}

/// A simple reply's header.
pub fn simple_reply(cookie: u64, error: u32) -> [u8; 16] {
    let mut out = [0; 16];
    out[..4].copy_from_slice(&MAGIC_SIMPLE.to_be_bytes());
    out[4..8].copy_from_slice(&error.to_be_bytes());
    out[8..].copy_from_slice(&cookie.to_be_bytes());
    out
}

/// A structured reply chunk's header.
pub fn chunk_header(cookie: u64, flags: u16, kind: u16, len: u32) -> [u8; 20] {
    let mut out = [0; 20];
    out[..4].copy_from_slice(&MAGIC_CHUNK.to_be_bytes());
    out[4..6].copy_from_slice(&flags.to_be_bytes());
    out[6..8].copy_from_slice(&kind.to_be_bytes());
    out[8..16].copy_from_slice(&cookie.to_be_bytes());
    out[16..].copy_from_slice(&len.to_be_bytes());
    out
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn requests_round_trip_and_any_bytes_decode_or_not(flags in any::<u16>(), kind in any::<u16>(), cookie in any::<u64>(), offset in any::<u64>(), len in any::<u32>(), junk in any::<[u8; REQUEST_LEN]>()) {
            let request = Request { flags, kind, cookie, offset, len };
            prop_assert_eq!(Request::decode(&request.encode()), Some(request));
            let _ = Request::decode(&junk);
        }
    }
}
