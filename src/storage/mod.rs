//! The file system as we use it: a small trait, so that tests can lose, tear and fail what the real one would keep.
//!
//! Rules every implementation keeps:
//! - `write_at` writes all of it or fails; `read_at` reads all of it or fails.
//! - `sync_data` makes every write that *completed before it was called* durable, with the file size they need.
//! - After a failed `sync_data` the file refuses every further write and sync: the kernel may have dropped the
//!   dirty pages, so a second sync that succeeds would prove nothing.
//! - A file that was created is found after a crash only once `sync_dir` of its folder returned.

pub mod aligned;
pub mod catalogue;
pub mod digest;
pub mod freeze;
pub mod lock;
pub mod log;
pub mod uring;

use std::future::Future;
use std::io;
use std::path::Path;

use bytes::Bytes;

pub use aligned::{ALIGN, AlignedBuf};

/// How a file is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OpenMode {
    /// Must exist; not written.
    Read,
    /// Must exist.
    Write,
    /// Must not exist; an empty file is made.
    Create,
}

/// An open file. Not `Send`: it lives on the thread that drives it.
#[allow(clippy::len_without_is_empty, reason = "nobody asks a file whether it is empty")]
pub trait File: 'static {
    /// Reads exactly `len` bytes at `offset`.
    fn read_at(&self, offset: u64, len: usize) -> impl Future<Output = io::Result<AlignedBuf>>;
    /// Reads the last bytes of a file whose length is not a multiple of 512, from the sector at `offset`.
    fn read_tail(&self, offset: u64, len: usize) -> impl Future<Output = io::Result<AlignedBuf>>;
    /// Writes all of `data` at `offset`.
    fn write_at(&self, offset: u64, data: Bytes) -> impl Future<Output = io::Result<()>>;
    /// Reads at once if the bytes are in memory; `None` otherwise, and for implementations that always wait.
    fn read_now(&self, _offset: u64, _len: usize) -> Option<AlignedBuf> {
        None
    }
    /// Writes at once if that is only a copy into the page cache: `true` when all was written, `false` when nothing was
    /// tried and `write_at` must be used.
    ///
    /// # Errors
    /// As `write_at`: some of it may have been written.
    fn write_now(&self, _offset: u64, _data: &[u8]) -> io::Result<bool> {
        Ok(false)
    }
    /// Lets what others asked of this thread begin: for who works for a while without waiting.
    fn breathe(&self) -> impl Future<Output = ()> {
        std::future::ready(())
    }
    /// Makes completed writes durable. See the module for what a failure means.
    fn sync_data(&self) -> impl Future<Output = io::Result<()>>;
    /// Refuses every further write, sync and change of length: for who knows that what is in memory and what is on disk went
    /// apart.
    fn close_for_writing(&self);
    /// Reserves space for `[offset, offset + len)`, growing the file to it; the new bytes read as zeroes.
    fn allocate(&self, offset: u64, len: u64) -> impl Future<Output = io::Result<()>>;
    /// Makes a range read as zeroes, releasing its space where the file system can. Does not change the length.
    fn punch(&self, offset: u64, len: u64) -> impl Future<Output = io::Result<()>>;
    /// Length in bytes.
    fn len(&self) -> io::Result<u64>;
    /// Sets the length.
    fn set_len(&self, len: u64) -> io::Result<()>;
    /// The next `[start, end)` at or after `offset` that may hold data; `None` if the rest is a hole.
    fn next_data(&self, offset: u64) -> io::Result<Option<(u64, u64)>>;
}

/// A file system.
pub trait Storage: Clone + 'static {
    /// Its files.
    type File: File;
    /// Opens a file, past the page cache where the file system allows it.
    fn open(&self, path: &Path, mode: OpenMode) -> impl Future<Output = io::Result<Self::File>>;
    /// Names in a folder, in no order.
    fn list(&self, dir: &Path) -> io::Result<Vec<String>>;
    /// Makes a folder and its parents, durably.
    fn create_dir(&self, dir: &Path) -> io::Result<()>;
    /// Removes a file. Durable after `sync_dir`.
    fn remove(&self, path: &Path) -> io::Result<()>;
    /// Gives a file another name in its folder, in place of the file that has it, if any: one step, before or after which a
    /// crash leaves everything. Durable after `sync_dir`.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Makes creations, renames and removals in a folder durable.
    fn sync_dir(&self, dir: &Path) -> io::Result<()>;
}

/// Whether an error means that the disk does not give back what was written there. Linux says EIO, ENODATA for a medium error
/// and EILSEQ for one of protection information (`blk_errors` in block/blk-core.c).
pub fn is_unreadable(error: &io::Error) -> bool {
    use rustix::io::Errno;
    [Errno::IO, Errno::NODATA, Errno::ILSEQ].iter().any(|kind| error.raw_os_error() == Some(kind.raw_os_error()))
}

/// The error every implementation gives for a write to a file whose sync failed.
pub fn closed_for_writing() -> io::Error {
    io::Error::other("a sync of this file failed earlier, it takes no more writes: restart to recover from what is durable")
}
