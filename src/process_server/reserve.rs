//! Space kept back in the state folder, for the moment in which the file system is full: noting what may leave the cache takes
//! some, and without it nothing would ever leave.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{FallocateFlags, fallocate, statvfs};

/// The file.
pub struct Reserve {
    path: PathBuf,
    bytes: u64,
}

impl Reserve {
    /// The reserve of a state folder; made by [`Reserve::keep`].
    pub fn new(state: &Path, bytes: u64) -> Self {
        Self { path: state.join("reserve"), bytes }
    }

    /// Makes it, if it is not there and the file system has room for twice as much.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn keep(&self) -> io::Result<()> {
        if self.bytes == 0 || self.path.exists() || self.available()? < 2 * self.bytes {
            return Ok(());
        }
        let made = File::create(&self.path).and_then(|file| {
            fallocate(&file, FallocateFlags::empty(), 0, self.bytes)?;
            file.sync_all()
        });
        if made.is_err() {
            let _ = std::fs::remove_file(&self.path);
        }
        made
    }

    /// Gives it back. True if there was one.
    pub fn give_back(&self) -> bool {
        std::fs::remove_file(&self.path).is_ok()
    }

    /// Bytes that the file system has for us.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn available(&self) -> io::Result<u64> {
        let state = self.path.parent().unwrap_or(Path::new("."));
        let stat = statvfs(state)?;
        Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_takes_space_and_gives_it_back() {
        let dir = tempfile::tempdir().unwrap();
        let reserve = Reserve::new(dir.path(), 1 << 20);
        reserve.keep().unwrap();
        assert_eq!(std::fs::metadata(dir.path().join("reserve")).unwrap().len(), 1 << 20);
        assert!(reserve.give_back());
        assert!(!reserve.give_back());
        Reserve::new(dir.path(), u64::MAX / 4).keep().unwrap();
        assert!(!dir.path().join("reserve").exists(), "there is no room for it");
    }
}
