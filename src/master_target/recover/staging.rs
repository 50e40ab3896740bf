//! The hidden folder in which an export is written, and how far it got: so that the same export, asked for again after a
//! crash or a failure, goes on from there.
//!
//! `.NAME.partial-HASH` beside the output, named after point, disk, format and output. In it: the files of the image, `lock`
//! (held while an export uses the folder) and `progress`, written after a barrier of the image and renamed into place:
//! magic `TGEXP\0\0\1`, bytes of the disk u64, bytes that are done u64, CRC-32C of bytes 0..24.
//!
//! If power goes: what lies behind the progress may be in the image or not; it is written again.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::checksum;
use crate::disk::Format;
use crate::model::{DiskId, PointId};
use crate::storage::uring::sync_dir;

const MAGIC: [u8; 8] = *b"TGEXP\0\0\x01";

/// See the module. Locked as long as it lives.
pub(super) struct Staging {
    dir: PathBuf,
    _lock: File,
}

/// The folder of an export.
pub(super) fn folder(point: PointId, disk: DiskId, format: Format, output: &Path) -> Option<PathBuf> {
    let mut hash = Sha256::new();
    for part in [&point.0.as_bytes()[..], &disk.0.as_bytes()[..], format.as_str().as_bytes(), output.as_os_str().as_encoded_bytes()] {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    let hash: String = hash.finalize().iter().take(8).map(|b| format!("{b:02x}")).collect();
    let mut name = prefix(output.file_name()?);
    name.push(hash);
    Some(beside(output).join(name))
}

fn prefix(name: &OsStr) -> OsString {
    let mut prefix = OsString::from(".");
    prefix.push(name);
    prefix.push(".partial-");
    prefix
}

/// The folder that an output stands in.
pub(super) fn beside(output: &Path) -> &Path {
    output.parent().filter(|d| !d.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

fn lock(dir: &Path) -> io::Result<Option<File>> {
    let file = File::options().create(true).truncate(false).write(true).open(dir.join("lock"))?;
    match rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Some(file)),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
        Err(e) => Err(e.into()),
    }
}

impl Staging {
    /// Makes the folder, or takes it as it was left.
    ///
    /// # Errors
    /// A sentence.
    pub(super) fn take(dir: PathBuf) -> Result<Self, String> {
        let told = |e: io::Error| format!("{}: {e}", dir.display());
        match fs::DirBuilder::new().mode(0o700).create(&dir) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(told(e)),
            _ => {}
        }
        // In a folder that others write, somebody else may have put it there.
        let found = fs::symlink_metadata(&dir).map_err(told)?;
        if !found.is_dir() || found.uid() != rustix::process::geteuid().as_raw() || found.mode() & 0o022 != 0 {
            return Err(format!("{} was not made by this master target: remove it, or choose another --output", dir.display()));
        }
        let lock = lock(&dir).map_err(told)?.ok_or("this point is being exported to that file already: see `tidegate recover list`")?;
        Ok(Self { dir, _lock: lock })
    }

    /// A file in it.
    pub(super) fn path(&self, name: &OsStr) -> PathBuf {
        self.dir.join(name)
    }

    /// Bytes of a disk of `size` that an earlier attempt wrote durably.
    pub(super) fn progress(&self, size: u64) -> Option<u64> {
        let bytes = fs::read(self.dir.join("progress")).ok()?;
        let u64_at = |at: usize| Some(u64::from_le_bytes(*bytes.get(at..)?.first_chunk()?));
        let crc = u32::from_le_bytes(*bytes.get(24..)?.first_chunk()?);
        let sound = bytes.len() == 28 && bytes[..8] == MAGIC && crc == checksum::crc32c(&bytes[..24]) && u64_at(8)? == size;
        u64_at(16).filter(|&done| sound && done > 0 && done <= size)
    }

    /// The image holds everything of the disk before `done`, durably.
    pub(super) fn note(&self, size: u64, done: u64) -> io::Result<()> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend_from_slice(&size.to_le_bytes());
        bytes.extend_from_slice(&done.to_le_bytes());
        bytes.extend_from_slice(&checksum::crc32c(&bytes).to_le_bytes());
        let new = self.dir.join("progress.new");
        let mut file = File::create(&new)?;
        file.write_all(&bytes)?;
        file.sync_all()?;
        fs::rename(&new, self.dir.join("progress"))?;
        sync_dir(&self.dir)
    }

    /// Removes what an earlier attempt left; the progress first.
    pub(super) fn clear(&self) -> io::Result<()> {
        let gone = |e: io::Error| if e.kind() == io::ErrorKind::NotFound { Ok(()) } else { Err(e) };
        fs::remove_file(self.dir.join("progress")).or_else(gone)?;
        sync_dir(&self.dir)?;
        for entry in fs::read_dir(&self.dir)? {
            let entry = entry?;
            if entry.file_name() != "lock" {
                fs::remove_file(entry.path())?;
            }
        }
        Ok(())
    }

    /// Removes it with everything in it.
    pub(super) fn remove(self) {
        let _ = fs::remove_dir_all(&self.dir);
    }
}

/// Removes a folder that nobody uses.
pub(super) fn discard(dir: &Path) {
    if dir.is_dir()
        && let Ok(Some(_lock)) = lock(dir)
    {
        let _ = fs::remove_dir_all(dir);
    }
}

/// Other exports to the same output that were not finished and that nobody uses.
pub(super) fn stale(output: &Path, own: &Path) -> Vec<PathBuf> {
    let Some(name) = output.file_name() else { return Vec::new() };
    let prefix = prefix(name);
    let ours = |path: &PathBuf| {
        path != own && path.file_name().is_some_and(|n| n.as_encoded_bytes().starts_with(prefix.as_encoded_bytes())) && path.is_dir()
    };
    let entries = fs::read_dir(beside(output)).into_iter().flatten().flatten().map(|e| e.path());
    entries.filter(ours).filter(|dir| matches!(lock(dir), Ok(Some(_)))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_is_believed_only_whole_and_for_the_same_size_and_a_folder_has_one_user() {
        let dir = tempfile::tempdir().unwrap();
        let output = dir.path().join("out.raw");
        let id = uuid::Uuid::from_u128;
        let folder = |point| folder(PointId(id(point)), DiskId(id(2)), Format::Raw, &output).unwrap();
        let staging = Staging::take(folder(1)).unwrap();
        assert!(Staging::take(folder(1)).is_err());
        assert_eq!(staging.progress(100), None);
        staging.note(100, 40).unwrap();
        assert_eq!((staging.progress(100), staging.progress(101)), (Some(40), None));
        let path = staging.path(OsStr::new("progress"));
        let mut bytes = fs::read(&path).unwrap();
        bytes[17] ^= 1;
        fs::write(&path, &bytes).unwrap();
        assert_eq!(staging.progress(100), None);
        staging.clear().unwrap();
        assert!(!path.exists());
        assert_eq!(stale(&output, &folder(2)), Vec::<PathBuf>::new(), "it is in use");
        drop(staging);
        assert_eq!(stale(&output, &folder(2)), [folder(1)]);
        discard(&folder(1));
        assert!(stale(&output, &folder(2)).is_empty());
    }
}
