//! A virtual disk file as something one reads and writes. The format comes from configuration, never from the bytes:
//! a guest writes those.

pub mod raw;
pub mod vhdx;

use std::io;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use self::raw::Raw;
use self::vhdx::Vhdx;
use crate::model::Extent;
use crate::storage::{AlignedBuf, File, OpenMode, Storage};

/// Image formats of a replica.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Format {
    /// The bytes of the disk and nothing else.
    Raw,
    /// Dynamic VHDX.
    #[default]
    Vhdx,
}

impl Format {
    /// File name extension, which is also the name of the format.
    pub fn as_str(self) -> &'static str {
        match self {
            Format::Raw => "raw",
            Format::Vhdx => "vhdx",
        }
    }
}

impl std::str::FromStr for Format {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "raw" => Ok(Format::Raw),
            "vhdx" => Ok(Format::Vhdx),
            other => Err(format!("{other:?} is not an image format of this version: use raw or vhdx")),
        }
    }
}

/// Why an image cannot be used.
#[derive(Debug, Error)]
pub enum DiskError {
    /// The file system failed.
    #[error("{path}: {source}")]
    Io {
        /// The image.
        path: PathBuf,
        /// The failure.
        source: io::Error,
    },
    /// The file is not what its format says.
    #[error("{path} at byte {offset}: {what}")]
    Corrupt {
        /// The image.
        path: PathBuf,
        /// Where.
        offset: u64,
        /// What is wrong.
        what: &'static str,
    },
    /// A legal image that this version does not write.
    #[error("{path}: {what}")]
    Unsupported {
        /// The image.
        path: PathBuf,
        /// What, and what to do.
        what: &'static str,
    },
    /// A size that the format cannot hold.
    #[error("a disk of {size} bytes cannot be kept as {format}: {why}")]
    Size {
        /// Asked for.
        size: u64,
        /// In which format.
        format: &'static str,
        /// The rule.
        why: &'static str,
    },
}

/// An open image; lives on one thread. Reads and writes may run side by side; [`Image::barrier`] runs alone.
#[allow(clippy::large_enum_variant, reason = "there is one for each disk, not one for each operation")]
pub enum Image<F: File> {
    /// See [`raw`].
    Raw(Raw<F>),
    /// See [`vhdx`].
    Vhdx(Vhdx<F>),
}

impl<F: File> Image<F> {
    /// Makes an image of `size` zero bytes at `path`, durably.
    ///
    /// # Errors
    /// [`DiskError`]; a partly made file is left behind and holds nothing.
    pub async fn create<S: Storage<File = F>>(storage: &S, path: &Path, format: Format, size: u64) -> Result<Self, DiskError> {
        let file = open_file(storage, path, OpenMode::Create).await?;
        let image = match format {
            Format::Raw => Image::Raw(Raw::create(path, file, size).await?),
            Format::Vhdx => Image::Vhdx(Vhdx::create(path, file, size).await?),
        };
        if let Some(dir) = path.parent() {
            storage.sync_dir(dir).map_err(|source| DiskError::Io { path: dir.to_owned(), source })?;
        }
        Ok(image)
    }

    /// Opens an image for reading and writing.
    ///
    /// # Errors
    /// [`DiskError`]; nothing is changed before the whole structure was checked.
    pub async fn open<S: Storage<File = F>>(storage: &S, path: &Path, format: Format) -> Result<Self, DiskError> {
        let file = open_file(storage, path, OpenMode::Write).await?;
        Ok(match format {
            Format::Raw => Image::Raw(Raw::open(path, file)?),
            Format::Vhdx => Image::Vhdx(Vhdx::open(path, file).await?),
        })
    }

    /// Opens an image to read it; the file is not changed.
    ///
    /// # Errors
    /// [`DiskError`].
    pub async fn open_read_only<S: Storage<File = F>>(storage: &S, path: &Path, format: Format) -> Result<Self, DiskError> {
        let file = open_file(storage, path, OpenMode::Read).await?;
        Ok(match format {
            Format::Raw => Image::Raw(Raw::open(path, file)?),
            Format::Vhdx => Image::Vhdx(Vhdx::load(path, file).await?.0),
        })
    }

    /// Size of the virtual disk in bytes.
    pub fn size(&self) -> u64 {
        match self {
            Image::Raw(raw) => raw.size(),
            Image::Vhdx(vhdx) => vhdx.size(),
        }
    }

    /// Reads `extent`, which must lie within the disk.
    ///
    /// # Errors
    /// [`DiskError::Io`].
    pub async fn read(&self, extent: Extent) -> Result<AlignedBuf, DiskError> {
        debug_assert!(extent.fits(self.size()), "reads stay within the disk");
        match self {
            Image::Raw(raw) => raw.read(extent).await,
            Image::Vhdx(vhdx) => vhdx.read(extent).await,
        }
    }

    /// Writes `data` at `offset`. Durable after the next [`Image::barrier`].
    ///
    /// # Errors
    /// [`DiskError::Io`]; a full file system is reported before the image refers to anything that is not there.
    pub async fn write(&self, offset: u64, data: Bytes) -> Result<(), DiskError> {
        debug_assert!(Extent::new(offset, data.len() as u64).fits(self.size()), "writes stay within the disk");
        match self {
            Image::Raw(raw) => raw.write(offset, data).await,
            Image::Vhdx(vhdx) => vhdx.write(offset, data).await,
        }
    }

    /// Makes `extent` read as zeroes, releasing space where it can.
    ///
    /// # Errors
    /// [`DiskError::Io`].
    pub async fn zero(&self, extent: Extent) -> Result<(), DiskError> {
        match self {
            Image::Raw(raw) => raw.zero(extent).await,
            Image::Vhdx(vhdx) => vhdx.zero(extent).await,
        }
    }

    /// Makes everything written so far durable and reachable. At most two syncs.
    ///
    /// # Errors
    /// [`DiskError::Io`]; the image takes no more writes then.
    pub async fn barrier(&self) -> Result<(), DiskError> {
        match self {
            Image::Raw(raw) => raw.barrier().await,
            Image::Vhdx(vhdx) => vhdx.barrier().await,
        }
    }

    /// Makes everything durable and gives back space that was reserved ahead. For images that are written once.
    ///
    /// # Errors
    /// [`DiskError::Io`].
    pub async fn finish(&self) -> Result<(), DiskError> {
        self.barrier().await?;
        match self {
            Image::Raw(_) => Ok(()),
            Image::Vhdx(vhdx) => vhdx.cut_tail().await,
        }
    }

    /// The next extent at or after `offset` that may hold something else than zeroes.
    ///
    /// # Errors
    /// [`DiskError::Io`].
    pub fn next_data(&self, offset: u64) -> Result<Option<Extent>, DiskError> {
        match self {
            Image::Raw(raw) => raw.next_data(offset),
            Image::Vhdx(vhdx) => Ok(vhdx.next_data(offset)),
        }
    }
}

async fn open_file<S: Storage>(storage: &S, path: &Path, mode: OpenMode) -> Result<S::File, DiskError> {
    storage.open(path, mode).await.map_err(|source| DiskError::Io { path: path.to_owned(), source })
}
