//! Bytes <-> messages between processes. Pure: no sockets, no files, no clocks.
//!
//! `ingest` is spoken between agent and process server (9443), `forward` between process server and master
//! target (9444); `batch` is the sealed unit that both the cache and the journal keep as it travels.
//! All integers are little-endian. Every length is checked against [`limits`](self) before anything is allocated.

pub mod batch;
pub mod consistency;
pub mod forward;
pub mod ingest;

use serde::{Serialize, de::DeserializeOwned};
use thiserror::Error;

/// Largest control message, in bytes.
pub const CONTROL_BYTES_MAX: usize = 64 * 1024;

/// Protocol version this program speaks on 9443 and 9444.
pub const PROTOCOL: u16 = 8;

/// Bytes that are not a message.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum WireError {
    /// The first bytes are not ours.
    #[error("not a {0} message (wrong magic): is another program talking to this port?")]
    Magic(&'static str),
    /// A version this program does not know.
    #[error("{what} version {found} is not known here (this is version {PROTOCOL}): upgrade the older side")]
    Version {
        /// Which format.
        what: &'static str,
        /// What the bytes say.
        found: u16,
    },
    /// A length or count beyond its bound.
    #[error("{what} is {found}, the limit is {limit}")]
    TooLarge {
        /// Which field.
        what: &'static str,
        /// Its value.
        found: u64,
        /// Its bound.
        limit: u64,
    },
    /// A checksum that does not match its bytes.
    #[error("checksum of {0} does not match: the bytes were damaged on the way")]
    Checksum(&'static str),
    /// A field with a value that has no meaning.
    #[error("{0} has an illegal value")]
    Illegal(&'static str),
    /// Fewer bytes than the message says.
    #[error("{0} is cut short")]
    Short(&'static str),
}

/// A control message as length (u32) and postcard bytes.
///
/// # Errors
/// [`WireError::TooLarge`] if it exceeds [`CONTROL_BYTES_MAX`].
pub fn encode_control<T: Serialize>(message: &T) -> Result<Vec<u8>, WireError> {
    let body = postcard::to_stdvec(message).map_err(|_| WireError::Illegal("control message"))?;
    check_len("control message", body.len(), CONTROL_BYTES_MAX)?;
    let mut bytes = Vec::with_capacity(4 + body.len());
    bytes.extend_from_slice(&(body.len() as u32).to_le_bytes());
    bytes.extend_from_slice(&body);
    Ok(bytes)
}

/// The body length announced by the first four bytes of a control message.
///
/// # Errors
/// [`WireError::TooLarge`] before anything of that length is allocated.
pub fn control_len(prefix: [u8; 4]) -> Result<usize, WireError> {
    let len = u32::from_le_bytes(prefix) as usize;
    check_len("control message", len, CONTROL_BYTES_MAX)?;
    Ok(len)
}

/// Decodes the body of a control message.
///
/// # Errors
/// [`WireError::Illegal`] for anything that is not exactly one message.
pub fn decode_control<T: DeserializeOwned>(body: &[u8]) -> Result<T, WireError> {
    match postcard::take_from_bytes(body) {
        Ok((message, [])) => Ok(message),
        _ => Err(WireError::Illegal("control message")),
    }
}

fn check_len(what: &'static str, found: usize, limit: usize) -> Result<(), WireError> {
    if found > limit { Err(WireError::TooLarge { what, found: found as u64, limit: limit as u64 }) } else { Ok(()) }
}

/// Reads little-endian fields in order. Callers give a slice that is long enough for the layout.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let (head, rest) = self.0.split_first_chunk::<N>().expect("the caller sliced a whole layout");
        self.0 = rest;
        *head
    }
    fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.take())
    }
    fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.take())
    }
    fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.take())
    }
}
