//! Freezes and thaws mounted file systems (FIFREEZE, FITHAW). Decides nothing about when, and remembers nothing.
#![allow(unsafe_code, reason = "the two requests have no wrapper in the libraries that we use")]

use std::fs::File;
use std::io;
use std::path::Path;

use rustix::io::Errno;
use rustix::ioctl::{NoArg, Opcode, ioctl, opcode};

const FREEZE: Opcode = opcode::read_write::<i32>(b'X', 119);
const THAW: Opcode = opcode::read_write::<i32>(b'X', 120);

const _: () = assert!(FREEZE == 0xC004_5877 && THAW == 0xC004_5878, "as linux/fs.h has them");

/// How a freeze failed.
#[derive(Debug, PartialEq, Eq)]
pub struct NotFrozen {
    /// For a person.
    pub reason: String,
    /// It is frozen, by somebody else who also has to thaw it.
    pub by_others: bool,
}

/// What a thaw met.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Thawed {
    /// It was frozen and is not any more.
    Now,
    /// It was not frozen, or nothing is there.
    Already,
}

/// Writes everything to the device of the file system that holds `path` and stops whoever writes to it until [`thaw`]. Takes as
/// long as the device needs.
///
/// # Errors
/// [`NotFrozen`]: nothing was changed.
pub fn freeze(path: &Path) -> Result<(), NotFrozen> {
    let other = |reason: String| NotFrozen { reason: format!("{}: {reason}", path.display()), by_others: false };
    let dir = File::open(path).map_err(|e| other(e.to_string()))?;
    loop {
        // SAFETY: the request takes a file descriptor, reads and writes no memory of ours and ignores its argument.
        match unsafe { ioctl(&dir, NoArg::<FREEZE>::new()) } {
            Ok(()) => return Ok(()),
            Err(Errno::INTR) => {}
            Err(Errno::BUSY) => {
                return Err(NotFrozen { by_others: true, ..other("is frozen by somebody else".to_owned()) });
            }
            Err(Errno::PERM) => return Err(other("freezing a file system needs CAP_SYS_ADMIN: run the agent as root".to_owned())),
            Err(Errno::OPNOTSUPP) => return Err(other("this kind of file system cannot be frozen".to_owned())),
            Err(e) => return Err(other(io::Error::from(e).to_string())),
        }
    }
}

/// Undoes [`freeze`]. Repeating it changes nothing.
///
/// # Errors
/// Those of the system: it may still be frozen.
pub fn thaw(path: &Path) -> io::Result<Thawed> {
    let dir = match File::open(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Thawed::Already),
        opened => opened?,
    };
    loop {
        // SAFETY: as in `freeze`.
        match unsafe { ioctl(&dir, NoArg::<THAW>::new()) } {
            Ok(()) => return Ok(Thawed::Now),
            Err(Errno::INVAL) => return Ok(Thawed::Already),
            Err(Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_frozen_or_not_there_needs_no_thaw() {
        assert_eq!(thaw(Path::new("/nonexistent-for-a-thaw")).unwrap(), Thawed::Already);
        let error = freeze(Path::new("/nonexistent-for-a-freeze")).unwrap_err();
        assert!(!error.by_others && error.reason.contains("nonexistent"), "{error:?}");
        // Kinds without a device are never frozen.
        assert!(!freeze(Path::new("/proc")).unwrap_err().by_others);
    }
}
