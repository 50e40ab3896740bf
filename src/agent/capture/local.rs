//! The protected disk as the agent reads and writes it: a raw file or device, or an image of a hypervisor.
//!
//! An image is used through [`crate::disk`]: a write is answered when its bytes are written, and a flush is the image's
//! barrier, with no write under way beside it. So an image behaves as a disk with a volatile cache, whatever the cache mode;
//! what a crash of the host may take from it unflushed is what the dirty map makes the agent send again.

use std::io;
use std::path::Path;

use bytes::Bytes;
use tokio::sync::RwLock;

use crate::config::agent::{CacheMode, Disk};
use crate::disk::{Disk as _, DiskError, Format, Image};
use crate::model::{Extent, SECTOR};
use crate::storage::lock::lock_files;
use crate::storage::uring::{Uring, UringFile};
use crate::storage::{AlignedBuf, File, OpenMode, Storage};

/// Who looks for file systems on devices locks each for a moment.
const LOCK_ATTEMPTS: u32 = 20;

/// An open disk.
#[allow(clippy::large_enum_variant, reason = "there is one for each disk, not one for each operation")]
pub(super) enum Local {
    /// Its bytes and nothing else.
    Raw(UringFile),
    /// An image. Whoever writes holds the lock shared, a barrier holds it alone.
    Image(Image<UringFile>, RwLock<()>),
}

impl Local {
    /// Opens the disk as configured. The files that come with it are its lock, held until they are dropped.
    ///
    /// # Errors
    /// Those of the file system and of the image; a disk shorter than a sector; one that another agent has.
    pub(super) async fn open(disk: &Disk) -> io::Result<(Self, Vec<std::fs::File>)> {
        // Before anything is opened for writing: an image that is opened changes.
        let lock = lock_files(&disk.kind().files(&disk.path), !disk.read_only, LOCK_ATTEMPTS)?;
        let storage = if disk.cache == CacheMode::Direct { Uring::direct() } else { Uring::buffered() };
        let local = match disk.kind() {
            Format::Raw => {
                let mode = if disk.read_only { OpenMode::Read } else { OpenMode::Write };
                Local::Raw(storage.open(&disk.path, mode).await?)
            }
            _ => Local::Image(open_image(&storage, &disk.path, disk).await.map_err(error)?, RwLock::default()),
        };
        let size = local.size()?;
        if size == 0 {
            return Err(io::Error::other("it is shorter than a sector of 512 bytes; enlarge the file"));
        }
        Ok((local, lock))
    }

    /// Bytes of the disk as it is now, in whole sectors.
    ///
    /// # Errors
    /// Those of the file system.
    pub(super) fn size(&self) -> io::Result<u64> {
        match self {
            Local::Raw(file) => Ok(file.len()? / SECTOR * SECTOR),
            Local::Image(image, _) => Ok(image.size()),
        }
    }

    /// Reads `len` bytes.
    ///
    /// # Errors
    /// Those of the disk.
    pub(super) async fn read_at(&self, offset: u64, len: usize) -> io::Result<AlignedBuf> {
        match self {
            Local::Raw(file) => file.read_at(offset, len).await,
            Local::Image(image, _) => image.read(Extent::new(offset, len as u64)).await.map_err(error),
        }
    }

    /// Writes whole sectors.
    ///
    /// # Errors
    /// Those of the disk; parts may have been written.
    pub(super) async fn write_at(&self, offset: u64, data: Bytes) -> io::Result<()> {
        match self {
            Local::Raw(file) => file.write_at(offset, data).await,
            Local::Image(image, lock) => {
                let _shared = lock.read().await;
                image.write(offset, data).await.map_err(error)
            }
        }
    }

    /// Makes an extent read as zeroes.
    ///
    /// # Errors
    /// As [`Local::write_at`].
    pub(super) async fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        match self {
            Local::Raw(file) => file.punch(offset, len).await,
            Local::Image(image, lock) => {
                let _shared = lock.read().await;
                image.zero(Extent::new(offset, len)).await.map_err(error)
            }
        }
    }

    /// Makes everything durable whose write was answered.
    ///
    /// # Errors
    /// Those of the disk, which is closed for writing then.
    pub(super) async fn sync_data(&self) -> io::Result<()> {
        match self {
            Local::Raw(file) => file.sync_data().await,
            Local::Image(image, lock) => {
                let _alone = lock.write().await;
                image.barrier().await.map_err(error)
            }
        }
    }

    /// Leaves everything durable and, for an image, marked as closed.
    ///
    /// # Errors
    /// Those of the disk.
    pub(super) async fn close(&self) -> io::Result<()> {
        match self {
            Local::Raw(file) => file.sync_data().await,
            Local::Image(image, lock) => {
                let _alone = lock.write().await;
                image.barrier().await.map_err(error)?;
                image.finish().await.map_err(error)
            }
        }
    }

    /// The next range that may hold data: first byte and end.
    ///
    /// # Errors
    /// Those of the disk.
    pub(super) fn next_data(&self, offset: u64) -> io::Result<Option<(u64, u64)>> {
        match self {
            Local::Raw(file) => file.next_data(offset),
            Local::Image(image, _) => Ok(image.next_data(offset).map_err(error)?.map(|extent| (extent.offset, extent.end()))),
        }
    }

    /// See [`File::read_now`].
    pub(super) fn read_now(&self, offset: u64, len: usize) -> Option<AlignedBuf> {
        match self {
            Local::Raw(file) => file.read_now(offset, len),
            Local::Image(..) => None,
        }
    }

    /// See [`File::write_now`].
    ///
    /// # Errors
    /// Those of the disk.
    pub(super) fn write_now(&self, offset: u64, data: &[u8]) -> io::Result<bool> {
        match self {
            Local::Raw(file) => file.write_now(offset, data),
            Local::Image(..) => Ok(false),
        }
    }
}

async fn open_image(storage: &Uring, path: &Path, disk: &Disk) -> Result<Image<UringFile>, DiskError> {
    if disk.read_only {
        return Image::open_read_only(storage, path, disk.kind(), disk.parents).await;
    }
    Image::open(storage, path, disk.kind()).await
}

/// Keeps the kind, by which a full file system is told from a broken one.
fn error(error: DiskError) -> io::Error {
    match &error {
        DiskError::Io { source, .. } => io::Error::new(source.kind(), error),
        DiskError::Unsupported { .. } => {
            io::Error::other(format!("{error}; or set `read_only = true` of the disk, to replicate it as it is"))
        }
        DiskError::Parent { .. } => {
            io::Error::other(format!("{error}; set `parents = true` of the disk to allow parents beneath its folder"))
        }
        _ => io::Error::new(io::ErrorKind::InvalidData, error),
    }
}
