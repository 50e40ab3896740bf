//! Locks of disks and images: two programs that write one disk would each undo what the other did.

use std::fs::{File, TryLockError};
use std::io;
use std::path::PathBuf;
use std::time::Duration;

/// Between two attempts.
const WAIT: Duration = Duration::from_millis(100);

/// Locks every file of `paths` that is there, until what is returned is dropped. `alone` is for who writes. A lock
/// that somebody holds is asked for `attempts` times, 100 ms apart.
///
/// # Errors
/// Those of the file system; one that another agent or master target has.
pub fn lock_files(paths: &[PathBuf], alone: bool, attempts: u32) -> io::Result<Vec<File>> {
    let mut held = Vec::new();
    for path in paths.iter().filter(|path| path.exists()) {
        let file = File::options().read(true).write(alone).open(path)?;
        for attempt in 1.. {
            match if alone { file.try_lock() } else { file.try_lock_shared() } {
                Ok(()) => break,
                // Who looks for file systems on devices locks each for a moment.
                Err(TryLockError::WouldBlock) if attempt < attempts => std::thread::sleep(WAIT),
                Err(TryLockError::WouldBlock) => {
                    return Err(io::Error::other("another agent or master target has it open: one disk is written by one of them"));
                }
                Err(TryLockError::Error(error)) => {
                    tracing::warn!(path = %path.display(), %error, "this file system knows no locks: make sure that nobody else has the disk");
                    break;
                }
            }
        }
        held.push(file);
    }
    Ok(held)
}
