//! Seals what only this process will read again: the key is random, is kept nowhere, and dies with the process.

use std::sync::atomic::{AtomicU64, Ordering};

use aes_gcm::aead::{AeadInOut, KeyInit};
use aes_gcm::{Aes256Gcm, Tag};

use super::keyring::DataKey;
use super::seal::nonce;
use crate::storage::AlignedBuf;

/// Bytes that a seal adds: the nonce's counter in front, the tag behind.
pub const SEAL_BYTES: usize = COUNTER_BYTES + TAG_BYTES;
const COUNTER_BYTES: usize = 8;
const TAG_BYTES: usize = 16;

/// AES-256-GCM under a key of its own; nonces are a counter, which never starts again under the same key.
pub struct Scratch {
    cipher: Aes256Gcm,
    next: AtomicU64,
}

impl Default for Scratch {
    fn default() -> Self {
        Self { cipher: Aes256Gcm::new(DataKey::generate().bytes().into()), next: AtomicU64::new(1) }
    }
}

impl Scratch {
    /// Appends `plain`, sealed, to `out`. It opens only under the same `name`.
    pub fn seal(&self, name: &[u8], plain: &[u8], out: &mut AlignedBuf) {
        let counter = self.next.fetch_add(1, Ordering::Relaxed);
        out.extend(&counter.to_le_bytes());
        let at = out.len();
        out.extend(plain);
        let tag = self
            .cipher
            .encrypt_inout_detached(&nonce(counter), name, (&mut out[at..]).into())
            .expect("it is far below the 64 GiB an AES-GCM message may have");
        out.extend(&tag);
    }

    /// What was sealed; `None` if it is damaged, or was sealed under another name or by another process.
    pub fn open(&self, name: &[u8], sealed: &[u8]) -> Option<Vec<u8>> {
        let (counter, rest) = sealed.split_first_chunk::<COUNTER_BYTES>()?;
        let (text, tag) = rest.split_last_chunk::<TAG_BYTES>()?;
        let mut plain = text.to_vec();
        let nonce = nonce(u64::from_le_bytes(*counter));
        self.cipher.decrypt_inout_detached(&nonce, name, plain.as_mut_slice().into(), &Tag::from(*tag)).ok()?;
        Some(plain)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_opens_under_its_name_in_its_process_undamaged_and_not_else() {
        let scratch = Scratch::default();
        let mut out = AlignedBuf::with_capacity(100);
        scratch.seal(b"a", b"content", &mut out);
        assert_eq!(out.len(), 7 + SEAL_BYTES);
        assert_eq!(scratch.open(b"a", &out).as_deref(), Some(&b"content"[..]));
        assert_eq!(scratch.open(b"b", &out), None);
        assert_eq!(Scratch::default().open(b"a", &out), None);
        for at in 0..out.len() {
            out[at] ^= 1;
            assert_eq!(scratch.open(b"a", &out), None);
            out[at] ^= 1;
        }
        assert_eq!(scratch.open(b"a", &out[..20]), None);
    }
}
