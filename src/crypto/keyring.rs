//! Data keys of disks and the key-encryption key that wraps them at rest.

use std::io::{self, Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use aes_gcm::aead::{AeadInOut, KeyInit};
use aes_gcm::{Aes256Gcm, Nonce, Tag};
use thiserror::Error;
use zeroize::Zeroizing;

use crate::model::DiskId;

/// The key of one disk and generation. Wiped from memory when dropped; has no `Debug`.
#[derive(Clone)]
pub struct DataKey(Zeroizing<[u8; 32]>);

impl DataKey {
    /// A random key.
    pub fn generate() -> Self {
        let mut bytes = Zeroizing::new([0; 32]);
        random(&mut *bytes);
        Self(bytes)
    }

    /// A key that came over an authenticated connection.
    pub fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(Zeroizing::new(bytes))
    }

    /// The key itself.
    pub fn bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

/// Why a key cannot be used.
#[derive(Debug, Error)]
pub enum KeyError {
    /// Others may read the file.
    #[error("key file {path} can be read by others (mode {mode:o}): run chmod 600 {path}")]
    Exposed {
        /// The file.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// The file is not 32 bytes.
    #[error("key file {0} must hold exactly 32 random bytes; make one with: head -c 32 /dev/urandom > FILE")]
    Length(PathBuf),
    /// The file cannot be read or made.
    #[error("key file {path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The failure.
        source: io::Error,
    },
    /// A wrapped key that this key-encryption key did not wrap.
    #[error("the data key of disk {0} cannot be unwrapped: the key-encryption key is not the one that wrapped it")]
    Unwrap(DiskId),
}

/// The key-encryption key of one server.
pub struct KeyEncryptionKey(Aes256Gcm);

impl KeyEncryptionKey {
    /// Reads the key from a file that only its owner may read; makes it, durably, if `create` and it does not exist.
    ///
    /// # Errors
    /// [`KeyError`].
    pub fn load(path: &Path, create: bool) -> Result<Self, KeyError> {
        let io = |source| KeyError::Io { path: path.to_owned(), source };
        if create && !path.exists() {
            let mut bytes = Zeroizing::new([0; 32]);
            random(&mut *bytes);
            write_private(path, &*bytes).map_err(io)?;
        }
        let mut file = std::fs::File::open(path).map_err(io)?;
        let mode = file.metadata().map_err(io)?.permissions().mode() & 0o777;
        if mode & 0o077 != 0 {
            return Err(KeyError::Exposed { path: path.to_owned(), mode });
        }
        let mut bytes = Zeroizing::new(Vec::new());
        (&mut file).take(33).read_to_end(&mut bytes).map_err(io)?;
        let key: &[u8; 32] = bytes.as_slice().try_into().map_err(|_| KeyError::Length(path.to_owned()))?;
        Ok(Self(Aes256Gcm::new(key.into())))
    }

    /// Wraps a data key: 12 bytes of random nonce, 32 of key, 16 of tag. Bound to disk and generation.
    pub fn wrap(&self, key: &DataKey, disk: DiskId, generation: u64) -> Vec<u8> {
        let mut nonce = [0; 12];
        random(&mut nonce);
        let mut text = *key.bytes();
        let tag = self
            .0
            .encrypt_inout_detached(&Nonce::from(nonce), &binding(disk, generation), (&mut text[..]).into())
            .expect("32 bytes are a legal AES-GCM message");
        [&nonce[..], &text, &tag].concat()
    }

    /// Unwraps what [`KeyEncryptionKey::wrap`] made.
    ///
    /// # Errors
    /// [`KeyError::Unwrap`].
    pub fn unwrap(&self, wrapped: &[u8], disk: DiskId, generation: u64) -> Result<DataKey, KeyError> {
        let fail = || KeyError::Unwrap(disk);
        let wrapped: &[u8; 60] = wrapped.try_into().map_err(|_| fail())?;
        let nonce: [u8; 12] = wrapped[..12].try_into().map_err(|_| fail())?;
        let mut text: [u8; 32] = wrapped[12..44].try_into().map_err(|_| fail())?;
        let tag = Tag::try_from(&wrapped[44..]).map_err(|_| fail())?;
        self.0.decrypt_inout_detached(&Nonce::from(nonce), &binding(disk, generation), (&mut text[..]).into(), &tag).map_err(|_| fail())?;
        Ok(DataKey::from_bytes(text))
    }
}

fn binding(disk: DiskId, generation: u64) -> [u8; 24] {
    let mut aad = [0; 24];
    aad[..16].copy_from_slice(disk.0.as_bytes());
    aad[16..].copy_from_slice(&generation.to_le_bytes());
    aad
}

/// Fills `out` from the kernel's generator.
pub fn random(out: &mut [u8]) {
    let mut done = 0;
    while done < out.len() {
        done += rustix::rand::getrandom(&mut out[done..], rustix::rand::GetRandomFlags::empty())
            .expect("getrandom of a few bytes does not fail on any supported kernel");
    }
}

/// Writes a file that only its owner may read, durably and without ever showing a partial one.
///
/// # Errors
/// Those of the file system.
pub fn write_private(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let dir = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let partial = path.with_extension("partial");
    let _ = std::fs::remove_file(&partial);
    let mut file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&partial)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    std::fs::rename(&partial, path)?;
    // The folder too: without it a crash can lose the rename.
    std::fs::File::open(dir)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrapped_key_opens_only_for_its_disk_and_generation() {
        let dir = tempfile::tempdir().unwrap();
        let kek = KeyEncryptionKey::load(&dir.path().join("kek"), true).unwrap();
        let disk = DiskId(uuid::Uuid::from_u128(3));
        let key = DataKey::generate();
        let wrapped = kek.wrap(&key, disk, 5);
        assert_eq!(kek.unwrap(&wrapped, disk, 5).ok().unwrap().bytes(), key.bytes());
        assert!(kek.unwrap(&wrapped, disk, 6).is_err());
        assert!(kek.unwrap(&wrapped, DiskId(uuid::Uuid::from_u128(4)), 5).is_err());
        assert!(!wrapped.windows(32).any(|w| w == key.bytes()), "a wrapped key must not show the key");
    }

    #[test]
    fn a_key_file_that_others_can_read_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("kek");
        KeyEncryptionKey::load(&path, true).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
        assert!(matches!(KeyEncryptionKey::load(&path, false), Err(KeyError::Exposed { mode: 0o644, .. })));
    }
}
