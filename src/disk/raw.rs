//! A raw image: byte n of the file is byte n of the disk. Opens after any crash; one sync a barrier.

use std::cell::Cell;
use std::io;
use std::path::{Path, PathBuf};

use bytes::Bytes;

use super::DiskError;
use crate::model::{Extent, SECTOR};
use crate::storage::{AlignedBuf, File};

/// An open raw image.
pub struct Raw<F> {
    path: PathBuf,
    file: F,
    size: Cell<u64>,
}

impl<F: File> Raw<F> {
    /// Gives an empty file its size; the file stays sparse.
    ///
    /// # Errors
    /// [`DiskError::Size`] for a size that is zero or not a multiple of 512.
    pub async fn create(path: &Path, file: F, size: u64) -> Result<Self, DiskError> {
        if size == 0 || !size.is_multiple_of(SECTOR) {
            return Err(DiskError::Size { size, format: "raw", why: "the size must be a positive multiple of 512" });
        }
        let raw = Self { path: path.to_owned(), file, size: Cell::new(size) };
        raw.file.set_len(size).map_err(|e| raw.io(e))?;
        raw.barrier().await?;
        Ok(raw)
    }

    /// Opens a file whose length is the disk's size.
    ///
    /// # Errors
    /// [`DiskError::Io`].
    pub fn open(path: &Path, file: F) -> Result<Self, DiskError> {
        let size = file.len().map_err(|source| DiskError::Io { path: path.to_owned(), source })?;
        Ok(Self { path: path.to_owned(), file, size: Cell::new(size / SECTOR * SECTOR) })
    }

    pub(super) fn size(&self) -> u64 {
        self.size.get()
    }

    pub(super) async fn read(&self, extent: Extent) -> Result<AlignedBuf, DiskError> {
        self.file.read_at(extent.offset, extent.len as usize).await.map_err(|e| self.io(e))
    }

    pub(super) async fn write(&self, offset: u64, data: Bytes) -> Result<(), DiskError> {
        self.file.write_at(offset, data).await.map_err(|e| self.io(e))
    }

    pub(super) async fn zero(&self, extent: Extent) -> Result<(), DiskError> {
        self.file.punch(extent.offset, extent.len).await.map_err(|e| self.io(e))
    }

    pub(super) async fn barrier(&self) -> Result<(), DiskError> {
        self.file.sync_data().await.map_err(|e| self.io(e))
    }

    pub(super) async fn grow(&self, size: u64) -> Result<(), DiskError> {
        if size < self.size.get() || !size.is_multiple_of(SECTOR) {
            return Err(DiskError::Size { size, format: "raw", why: "a disk cannot shrink, and grows by multiples of 512" });
        }
        self.file.set_len(size).map_err(|e| self.io(e))?;
        self.barrier().await?;
        self.size.set(size);
        Ok(())
    }

    pub(super) fn next_data(&self, offset: u64) -> Result<Option<Extent>, DiskError> {
        let next = self.file.next_data(offset).map_err(|e| self.io(e))?;
        Ok(next.map(|(start, end)| Extent::new(start, end.min(self.size.get()) - start)))
    }

    fn io(&self, source: io::Error) -> DiskError {
        DiskError::Io { path: self.path.clone(), source }
    }
}
