//! Seals batches with AES-256-GCM, once, and opens them.
//!
//! The key of a sealing session is HKDF-SHA256(data key, salt) (RFC 5869) with the purpose, disk and generation as info;
//! the salt is 32 random bytes drawn when the session starts and stands in every header; the nonce is a counter. A
//! session ends with the process that began it and is never continued, so a (key, nonce) pair cannot repeat.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use aes_gcm::aead::{AeadInOut, KeyInit};
use aes_gcm::{Aes256Gcm, Nonce, Tag};
use bytes::Bytes;
use hkdf::Hkdf;
use lz4_flex::block::{CompressTable, compress_into_with_table, decompress_into, get_maximum_output_size};
use sha2::Sha256;
use thiserror::Error;

use super::keyring::{DataKey, random};
use crate::checksum;
use crate::model::DiskId;
use crate::storage::AlignedBuf;
use crate::storage::log::format::RECORD_HEADER_LEN;
use crate::wire::WireError;
use crate::wire::batch::{BatchHeader, HEADER_LEN, TAG_LEN};

/// What a sealed batch is for; a batch sealed for one purpose does not open for another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// A batch of the change stream.
    Stream,
    /// Old content in the retention journal.
    Retention,
}

impl Purpose {
    fn info(self, disk: DiskId, generation: u64) -> Vec<u8> {
        let mut info = match self {
            Purpose::Stream => b"tidegate stream v1".to_vec(),
            Purpose::Retention => b"tidegate retention v1".to_vec(),
        };
        info.extend_from_slice(disk.0.as_bytes());
        info.extend_from_slice(&generation.to_le_bytes());
        info
    }
}

/// Why a batch does not open.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum OpenError {
    /// The bytes are not a batch.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// The tag does not match: damaged, forged, or sealed with another key.
    #[error("the seal does not match: the batch is damaged or was sealed with another key")]
    Seal,
    /// The compressed body does not unpack to what the header says.
    #[error("the body does not unpack")]
    Body,
}

/// One sealing session.
pub struct SealingSession {
    cipher: Aes256Gcm,
    salt: [u8; 32],
    next: AtomicU64,
}

impl SealingSession {
    /// A fresh session with a fresh salt.
    pub fn start(key: &DataKey, purpose: Purpose, disk: DiskId, generation: u64) -> Self {
        let mut salt = [0; 32];
        random(&mut salt);
        Self { cipher: session_cipher(key, purpose, disk, generation, &salt), salt, next: AtomicU64::new(1) }
    }

    /// Compresses (when it gains) and seals `body` under `header`, whose salt, nonce, lengths and checksum are filled in.
    /// The result has room for a record header in front, so that it can be logged without another copy.
    pub fn seal(&self, header: &mut BatchHeader, body: &[u8], packer: &mut Packer) -> AlignedBuf {
        let packed = packer.pack(body);
        let stored: &[u8] = packed.unwrap_or(body);
        let mut out = AlignedBuf::with_capacity(RECORD_HEADER_LEN + HEADER_LEN + stored.len() + TAG_LEN);
        self.seal_packed(header, body, packed, &mut out);
        out
    }

    /// The same, behind what `out` holds, which has room for it.
    pub fn seal_behind(&self, header: &mut BatchHeader, body: &[u8], packer: &mut Packer, out: &mut AlignedBuf) {
        self.seal_packed(header, body, packer.pack(body), out);
    }

    fn seal_packed(&self, header: &mut BatchHeader, body: &[u8], packed: Option<&[u8]>, out: &mut AlignedBuf) {
        let stored: &[u8] = packed.unwrap_or(body);
        header.compressed = packed.is_some();
        header.stored_len = (stored.len() + TAG_LEN) as u32;
        header.body_crc = checksum::crc32c(body);
        header.salt = self.salt;
        header.nonce = self.next.fetch_add(1, Ordering::Relaxed);
        let aad = header.encode();
        out.pad_to(out.len() + RECORD_HEADER_LEN);
        out.extend(&aad);
        let at = out.len();
        out.extend(stored);
        let tag = self
            .cipher
            .encrypt_inout_detached(&nonce(header.nonce), &aad, (&mut out[at..]).into())
            .expect("a batch is far below the 64 GiB an AES-GCM message may have");
        out.extend(&tag);
    }
}

/// Opens the batches of one disk for one purpose; keeps the keys of the sessions it met last.
pub struct Opener {
    key: DataKey,
    purpose: Purpose,
    disk: DiskId,
    generation: u64,
    sessions: Mutex<HashMap<[u8; 32], Arc<Aes256Gcm>>>,
}

/// Sessions whose keys are kept; deriving one again costs microseconds.
const SESSIONS_KEPT_MAX: usize = 64;

impl Opener {
    /// An opener for a disk's data key.
    pub fn new(key: DataKey, purpose: Purpose, disk: DiskId, generation: u64) -> Self {
        Self { key, purpose, disk, generation, sessions: Mutex::default() }
    }

    /// Verifies and unpacks a sealed batch (header first). The returned body is page-aligned.
    ///
    /// # Errors
    /// [`OpenError`]; nothing of an unverified body is returned.
    pub fn open(&self, sealed: &[u8]) -> Result<(BatchHeader, AlignedBuf), OpenError> {
        let header = self.header(sealed)?;
        let text_end = sealed.len() - TAG_LEN;
        let mut text = AlignedBuf::copy_of(&sealed[HEADER_LEN..text_end]);
        self.decrypt(&header, &sealed[..HEADER_LEN], &mut text, &sealed[text_end..])?;
        let body = if header.compressed { unpack(&text, header.body_len())? } else { text };
        check(&header, &body)?;
        Ok((header, body))
    }

    /// The same of a batch that stands at `place` of a buffer that nobody else needs, without a copy. The returned body may begin
    /// anywhere in memory.
    ///
    /// # Errors
    /// [`OpenError`]; nothing of an unverified body is returned.
    pub fn open_within(&self, mut buffer: AlignedBuf, place: Range<usize>) -> Result<(BatchHeader, Bytes), OpenError> {
        let sealed = buffer.get_mut(place.clone()).ok_or(WireError::Short("sealed batch"))?;
        let header = self.header(sealed)?;
        let (head, rest) = sealed.split_at_mut(HEADER_LEN);
        let (text, tag) = rest.split_at_mut(rest.len() - TAG_LEN);
        self.decrypt(&header, head, text, tag)?;
        let body = if header.compressed {
            unpack(text, header.body_len())?.freeze()
        } else {
            buffer.freeze().slice(place.start + HEADER_LEN..place.end - TAG_LEN)
        };
        check(&header, &body)?;
        Ok((header, body))
    }

    /// The header of a batch of this disk, which is as long as it says.
    fn header(&self, sealed: &[u8]) -> Result<BatchHeader, OpenError> {
        let header = BatchHeader::decode(sealed)?;
        if header.disk != self.disk || header.generation != self.generation {
            return Err(WireError::Illegal("batch of another disk or generation").into());
        }
        if sealed.len() != header.sealed_len() {
            return Err(WireError::Short("sealed batch").into());
        }
        Ok(header)
    }

    fn decrypt(&self, header: &BatchHeader, head: &[u8], text: &mut [u8], tag: &[u8]) -> Result<(), OpenError> {
        let tag = Tag::try_from(tag).map_err(|_| OpenError::Seal)?;
        let opened = self.cipher(&header.salt).decrypt_inout_detached(&nonce(header.nonce), head, text.into(), &tag);
        opened.map_err(|_| OpenError::Seal)
    }

    fn cipher(&self, salt: &[u8; 32]) -> Arc<Aes256Gcm> {
        // What is in it is right even if somebody panicked over it.
        let mut sessions = self.sessions.lock().unwrap_or_else(PoisonError::into_inner);
        if sessions.len() >= SESSIONS_KEPT_MAX && !sessions.contains_key(salt) {
            sessions.clear();
        }
        let derive = || Arc::new(session_cipher(&self.key, self.purpose, self.disk, self.generation, salt));
        sessions.entry(*salt).or_insert_with(derive).clone()
    }
}

fn check(header: &BatchHeader, body: &[u8]) -> Result<(), OpenError> {
    if body.len() != header.body_len() || checksum::crc32c(body) != header.body_crc {
        return Err(OpenError::Body);
    }
    Ok(())
}

/// Reusable state of the compressor; one per thread that seals.
pub struct Packer {
    table: CompressTable,
    out: Vec<u8>,
}

impl Default for Packer {
    fn default() -> Self {
        Self { table: CompressTable::large(), out: Vec::new() }
    }
}

impl Packer {
    /// `body` compressed, or `None` if that would not save at least 1 in 32 bytes.
    fn pack(&mut self, body: &[u8]) -> Option<&[u8]> {
        self.out.resize(get_maximum_output_size(body.len()).max(self.out.len()), 0);
        let len = compress_into_with_table(body, &mut self.out, &mut self.table).ok()?;
        (len + body.len() / 32 < body.len()).then(|| &self.out[..len])
    }
}

fn unpack(packed: &[u8], len: usize) -> Result<AlignedBuf, OpenError> {
    let mut body = AlignedBuf::with_capacity(len);
    body.set_len(len);
    match decompress_into(packed, &mut body) {
        Ok(n) if n == len => Ok(body),
        _ => Err(OpenError::Body),
    }
}

fn session_cipher(key: &DataKey, purpose: Purpose, disk: DiskId, generation: u64, salt: &[u8; 32]) -> Aes256Gcm {
    let mut session_key = zeroize::Zeroizing::new([0; 32]);
    Hkdf::<Sha256>::new(Some(salt), key.bytes())
        .expand(&purpose.info(disk, generation), &mut *session_key)
        .expect("32 bytes is a legal HKDF-SHA256 output length");
    Aes256Gcm::new((&*session_key).into())
}

/// A counter as the nonce of AES-GCM: 4 zero bytes, then 8.
pub(super) fn nonce(counter: u64) -> Nonce<aes_gcm::aead::consts::U12> {
    let mut bytes = [0; 12];
    bytes[4..].copy_from_slice(&counter.to_le_bytes());
    bytes.into()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn disk() -> DiskId {
        DiskId(uuid::Uuid::from_u128(1))
    }

    fn header(data_len: u32) -> BatchHeader {
        BatchHeader { epoch: 1, first: 1, last: 1, data_len, ..BatchHeader::new(disk(), 1) }
    }

    fn sealed(body: &[u8]) -> Vec<u8> {
        let session = SealingSession::start(&DataKey::from_bytes([7; 32]), Purpose::Stream, disk(), 1);
        session.seal(&mut header(body.len() as u32), body, &mut Packer::default())[RECORD_HEADER_LEN..].to_vec()
    }

    fn opener() -> Opener {
        Opener::new(DataKey::from_bytes([7; 32]), Purpose::Stream, disk(), 1)
    }

    proptest! {
        #[test]
        fn what_was_sealed_opens_and_one_changed_bit_does_not(body in proptest::collection::vec(0u8..4, 1..5000), flip in any::<prop::sample::Index>()) {
            let mut bytes = sealed(&body);
            prop_assert_eq!(&opener().open(&bytes).unwrap().1[..], &body[..]);
            // Both ways of opening say the same.
            let within = |bytes: &[u8]| {
                let mut buffer = AlignedBuf::zeroed(bytes.len() + 99);
                buffer[77..77 + bytes.len()].copy_from_slice(bytes);
                opener().open_within(buffer, 77..77 + bytes.len())
            };
            prop_assert_eq!(&within(&bytes).unwrap().1[..], &body[..]);
            let bit = flip.index(bytes.len() * 8);
            bytes[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(opener().open(&bytes).is_err());
            prop_assert!(within(&bytes).is_err());
        }
    }

    #[test]
    fn a_batch_does_not_open_for_another_disk_purpose_or_key() {
        let bytes = sealed(b"content");
        assert!(Opener::new(DataKey::from_bytes([8; 32]), Purpose::Stream, disk(), 1).open(&bytes).is_err());
        assert!(Opener::new(DataKey::from_bytes([7; 32]), Purpose::Retention, disk(), 1).open(&bytes).is_err());
        assert!(Opener::new(DataKey::from_bytes([7; 32]), Purpose::Stream, disk(), 2).open(&bytes).is_err());
        let other = DiskId(uuid::Uuid::from_u128(2));
        assert!(Opener::new(DataKey::from_bytes([7; 32]), Purpose::Stream, other, 1).open(&bytes).is_err());
    }

    #[test]
    fn two_sessions_of_one_key_never_share_a_key_stream() {
        let (a, b) = (sealed(&[0; 64]), sealed(&[0; 64]));
        assert_ne!(a[HEADER_LEN..], b[HEADER_LEN..]);
    }
}
