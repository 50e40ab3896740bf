//! A virtual disk file as something one reads and writes. The format comes from configuration, never from the bytes:
//! a guest writes those.

pub mod check;
pub mod places;
pub mod raw;
pub mod recent;
pub mod vhdx;
pub mod vmdk;

use std::cell::{Cell, RefMut};
use std::io;
use std::path::{Component, Path, PathBuf};

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use self::places::Places;
use self::raw::Raw;
use self::vhdx::Vhdx;
use self::vmdk::Vmdk;
use self::vmdk::descriptor::Kind;
use self::vmdk::stream::Stream;
use crate::model::Extent;
use crate::storage::{self, AlignedBuf, File, OpenMode, Storage};

/// Longest chain of parents that is followed.
const CHAIN_MAX: u32 = 32;

/// Image formats.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Format {
    /// The bytes of the disk and nothing else.
    Raw,
    /// Dynamic VHDX.
    #[default]
    Vhdx,
    /// Fixed VHDX: every block allocated.
    VhdxFixed,
    /// VMDK, monolithicSparse.
    Vmdk,
    /// VMDK, monolithicFlat: a descriptor and a file of plain bytes beside it.
    VmdkFlat,
    /// VMDK as on a VMware datastore: a descriptor and a file of plain bytes beside it.
    Vmfs,
    /// VMDK, streamOptimized: compressed, written once. For export only.
    VmdkStream,
}

impl Format {
    /// All of them.
    pub const ALL: [Format; 7] =
        [Format::Raw, Format::Vhdx, Format::VhdxFixed, Format::Vmdk, Format::VmdkFlat, Format::Vmfs, Format::VmdkStream];

    /// Its name in configuration and commands.
    pub fn as_str(self) -> &'static str {
        match self {
            Format::Raw => "raw",
            Format::Vhdx => "vhdx",
            Format::VhdxFixed => "vhdx-fixed",
            Format::Vmdk => "vmdk",
            Format::VmdkFlat => "vmdk-flat",
            Format::Vmfs => "vmfs",
            Format::VmdkStream => "vmdk-stream",
        }
    }

    /// File name extension that hypervisors expect.
    pub fn extension(self) -> &'static str {
        match self {
            Format::Raw => "raw",
            Format::Vhdx | Format::VhdxFixed => "vhdx",
            Format::Vmdk | Format::VmdkFlat | Format::Vmfs | Format::VmdkStream => "vmdk",
        }
    }

    /// Whether a replica can be kept in it.
    pub fn can_be_replica(self) -> bool {
        self != Format::VmdkStream
    }

    /// Largest disk that it holds, bytes.
    pub fn size_max(self) -> u64 {
        match self {
            Format::Raw => i64::MAX as u64,
            Format::Vhdx | Format::VhdxFixed => vhdx::format::SIZE_MAX,
            Format::Vmdk | Format::VmdkStream => 2 << 40,
            Format::VmdkFlat | Format::Vmfs => vmdk::FLAT_MAX,
        }
    }

    /// The files of an image at `path`; those that others refer to come first.
    pub fn files(self, path: &Path) -> Vec<PathBuf> {
        match self {
            Format::VmdkFlat | Format::Vmfs => vec![vmdk::flat_path(path), path.to_owned()],
            _ => vec![path.to_owned()],
        }
    }
}

impl std::str::FromStr for Format {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Format::ALL.into_iter().find(|f| f.as_str() == text).ok_or_else(|| {
            let names: Vec<&str> = Format::ALL.iter().map(|f| f.as_str()).collect();
            format!("{text:?} is not an image format: use one of {}", names.join(", "))
        })
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
    /// An image that needs another one.
    #[error("{path}: {why}")]
    Parent {
        /// The child.
        path: PathBuf,
        /// What is wrong with its parent.
        why: String,
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

impl DiskError {
    /// The disk below does not give back what was written (EIO).
    pub fn is_unreadable(&self) -> bool {
        matches!(self, DiskError::Io { source, .. } if storage::is_unreadable(source))
    }
}

/// A virtual disk in a file; lives on one thread. Reads and writes may run side by side; `barrier` and `grow` run alone.
pub trait Disk {
    /// Size of the virtual disk in bytes.
    fn size(&self) -> u64;
    /// Bytes of a logical and of a physical sector.
    fn sector_sizes(&self) -> (u32, u32);
    /// Reads `extent`, which must lie within the disk.
    ///
    /// # Errors
    /// [`DiskError::Io`], [`DiskError::Corrupt`].
    fn read(&self, extent: Extent) -> impl Future<Output = Result<AlignedBuf, DiskError>>;
    /// What `extent` holds, if all of it is in memory because it was written lately; see [`recent`].
    fn recent(&self, _extent: Extent) -> Option<AlignedBuf> {
        None
    }
    /// Writes `data` at `offset`. Durable after the next [`Disk::barrier`].
    ///
    /// # Errors
    /// [`DiskError::Io`]; a full file system is reported before the image refers to anything that is not there.
    fn write(&self, offset: u64, data: Bytes) -> impl Future<Output = Result<(), DiskError>>;
    /// Makes `extent` read as zeroes, releasing space where it can.
    ///
    /// # Errors
    /// [`DiskError::Io`].
    fn zero(&self, extent: Extent) -> impl Future<Output = Result<(), DiskError>>;
    /// Makes everything written so far durable and reachable. At most two syncs.
    ///
    /// # Errors
    /// [`DiskError::Io`]; the image takes no more writes then.
    fn barrier(&self) -> impl Future<Output = Result<(), DiskError>>;
    /// Makes everything durable and gives back space that was reserved ahead. For images that are written once.
    ///
    /// # Errors
    /// [`DiskError::Io`].
    fn finish(&self) -> impl Future<Output = Result<(), DiskError>>;
    /// Makes the disk larger; what is new reads as zeroes.
    ///
    /// # Errors
    /// [`DiskError::Size`] for a smaller size, [`DiskError::Unsupported`] for a kind of image that cannot grow in place.
    fn grow(&self, size: u64) -> impl Future<Output = Result<(), DiskError>>;
    /// The allocation map: the next extent at or after `offset` that may hold something else than zeroes.
    ///
    /// # Errors
    /// [`DiskError::Io`].
    fn next_data(&self, offset: u64) -> Result<Option<Extent>, DiskError>;
}

/// An open image of any format.
#[allow(clippy::large_enum_variant, reason = "there is one for each disk, not one for each operation")]
pub enum Image<F: File> {
    /// See [`raw`].
    Raw(Raw<F>),
    /// See [`vhdx`].
    Vhdx(Vhdx<F>),
    /// See [`vmdk`].
    Vmdk(Vmdk<F>),
    /// See [`vmdk::stream`].
    Stream(Stream<F>),
}

impl<F: File> Image<F> {
    /// Makes an image of `size` zero bytes at `path`, durably.
    ///
    /// # Errors
    /// [`DiskError`]; what was made of it is removed.
    pub async fn create<S: Storage<File = F>>(storage: &S, path: &Path, format: Format, size: u64) -> Result<Self, DiskError> {
        match Self::create_files(storage, path, format, size).await {
            // Somebody else's file stays.
            Err(error) if matches!(&error, DiskError::Io { source, .. } if source.kind() == io::ErrorKind::AlreadyExists) => Err(error),
            Err(error) => {
                // What was made may hold much of the space that was not enough.
                for file in format.files(path) {
                    let _ = storage.remove(&file);
                }
                Err(error)
            }
            made => made,
        }
    }

    async fn create_files<S: Storage<File = F>>(storage: &S, path: &Path, format: Format, size: u64) -> Result<Self, DiskError> {
        let image = match format {
            Format::VmdkFlat => Image::Vmdk(Vmdk::create_flat(storage, path, Kind::MonolithicFlat, size).await?),
            Format::Vmfs => Image::Vmdk(Vmdk::create_flat(storage, path, Kind::Vmfs, size).await?),
            _ => {
                let file = open_file(storage, path, OpenMode::Create).await?;
                match format {
                    Format::Vhdx => Image::Vhdx(Vhdx::create(path, file, size, false).await?),
                    Format::VhdxFixed => Image::Vhdx(Vhdx::create(path, file, size, true).await?),
                    Format::Vmdk => Image::Vmdk(Vmdk::create_sparse(path, file, size).await?),
                    Format::VmdkStream => Image::Stream(Stream::create(path, file, size)?),
                    _ => Image::Raw(Raw::create(path, file, size).await?),
                }
            }
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
        Ok(match format {
            Format::Raw => Image::Raw(Raw::open(path, open_file(storage, path, OpenMode::Write).await?)?),
            Format::Vhdx | Format::VhdxFixed => Image::Vhdx(Vhdx::open(path, open_file(storage, path, OpenMode::Write).await?).await?),
            Format::Vmdk | Format::VmdkFlat | Format::Vmfs => Image::Vmdk(Vmdk::open(storage, path).await?),
            Format::VmdkStream => {
                let what = "a stream is written once and read; use another format for a disk that changes";
                return Err(DiskError::Unsupported { path: path.to_owned(), what });
            }
        })
    }

    /// Opens an image to read it; no file is changed. Parents are looked for beneath the image's own folder, and only if the
    /// caller allows them.
    ///
    /// # Errors
    /// [`DiskError`]; [`DiskError::Parent`] for a parent that is missing, changed or not allowed.
    pub async fn open_read_only<S: Storage<File = F>>(storage: &S, path: &Path, format: Format, parents: bool) -> Result<Self, DiskError> {
        Self::open_chain(storage, path, format, if parents { CHAIN_MAX } else { 0 }).await
    }

    async fn open_chain<S: Storage<File = F>>(storage: &S, path: &Path, format: Format, parents: u32) -> Result<Self, DiskError> {
        let refuse = |why: String| DiskError::Parent { path: path.to_owned(), why };
        let allowed = || {
            if parents > 0 {
                Ok(())
            } else {
                Err(refuse("it has a parent, and parents are not allowed here or there are too many".to_owned()))
            }
        };
        match format {
            Format::Raw => Ok(Image::Raw(Raw::open(path, open_file(storage, path, OpenMode::Read).await?)?)),
            Format::Vhdx | Format::VhdxFixed => {
                let mut vhdx = Vhdx::load(path, open_file(storage, path, OpenMode::Read).await?).await?.0;
                if let Some(locator) = vhdx.locator().cloned() {
                    allowed()?;
                    let named = [&locator.relative_path, &locator.absolute_path];
                    let found = named.into_iter().flatten().find_map(|name| beneath(path, name).ok().filter(|p| p.exists()));
                    let found = found.ok_or_else(|| refuse("its parent is not beneath its own folder".to_owned()))?;
                    let parent = Box::pin(Self::open_chain(storage, &found, format, parents - 1)).await?;
                    match &parent {
                        Image::Vhdx(p) if locator.is_parent(p.data_write()) => {}
                        _ => return Err(refuse(format!("{} was changed after the child was made from it", found.display()))),
                    }
                    vhdx.set_parent(parent);
                }
                Ok(Image::Vhdx(vhdx))
            }
            Format::Vmdk | Format::VmdkFlat | Format::Vmfs | Format::VmdkStream => {
                let mut vmdk = Vmdk::load(storage, path).await?;
                if vmdk.descriptor().has_parent() {
                    allowed()?;
                    let hint = vmdk.descriptor().parent_hint.clone().ok_or_else(|| refuse("it does not name its parent".to_owned()))?;
                    let found = beneath(path, &hint).map_err(|what| refuse(what.to_owned()))?;
                    let parent = Box::pin(Self::open_chain(storage, &found, Format::Vmdk, parents - 1)).await?;
                    match &parent {
                        Image::Vmdk(p) if p.descriptor().cid == vmdk.descriptor().parent_cid => {}
                        _ => return Err(refuse(format!("{} was changed after the child was made from it", found.display()))),
                    }
                    vmdk.set_parent(parent);
                }
                Ok(Image::Vmdk(vmdk))
            }
        }
    }
}

impl<F: File> Disk for Image<F> {
    fn size(&self) -> u64 {
        match self {
            Image::Raw(raw) => raw.size(),
            Image::Vhdx(vhdx) => vhdx.size(),
            Image::Vmdk(vmdk) => vmdk.size(),
            Image::Stream(stream) => stream.size(),
        }
    }

    fn sector_sizes(&self) -> (u32, u32) {
        match self {
            Image::Vhdx(vhdx) => vhdx.sector_sizes(),
            _ => (512, 512),
        }
    }

    async fn read(&self, extent: Extent) -> Result<AlignedBuf, DiskError> {
        debug_assert!(extent.fits(self.size()), "reads stay within the disk");
        match self {
            Image::Raw(raw) => raw.read(extent).await,
            Image::Vhdx(vhdx) => vhdx.read(extent).await,
            Image::Vmdk(vmdk) => vmdk.read(extent).await,
            Image::Stream(stream) => Err(stream.only_written()),
        }
    }

    async fn write(&self, offset: u64, data: Bytes) -> Result<(), DiskError> {
        debug_assert!(Extent::new(offset, data.len() as u64).fits(self.size()), "writes stay within the disk");
        match self {
            Image::Raw(raw) => raw.write(offset, data).await,
            Image::Vhdx(vhdx) => vhdx.write(offset, data).await,
            Image::Vmdk(vmdk) => vmdk.write(offset, data).await,
            Image::Stream(stream) => stream.write(offset, &data).await,
        }
    }

    async fn zero(&self, extent: Extent) -> Result<(), DiskError> {
        match self {
            Image::Raw(raw) => raw.zero(extent).await,
            Image::Vhdx(vhdx) => vhdx.zero(extent).await,
            Image::Vmdk(vmdk) => vmdk.zero(extent).await,
            Image::Stream(stream) => Err(stream.only_written()),
        }
    }

    async fn barrier(&self) -> Result<(), DiskError> {
        match self {
            Image::Raw(raw) => raw.barrier().await,
            Image::Vhdx(vhdx) => vhdx.barrier().await,
            Image::Vmdk(vmdk) => vmdk.barrier().await,
            Image::Stream(_) => Ok(()),
        }
    }

    async fn finish(&self) -> Result<(), DiskError> {
        self.barrier().await?;
        match self {
            Image::Raw(_) => Ok(()),
            Image::Vhdx(vhdx) => vhdx.cut_tail().await,
            Image::Vmdk(vmdk) => vmdk.finish().await,
            Image::Stream(stream) => stream.finish().await,
        }
    }

    async fn grow(&self, size: u64) -> Result<(), DiskError> {
        match self {
            Image::Raw(raw) => raw.grow(size).await,
            Image::Vhdx(vhdx) => vhdx.grow_disk(size).await,
            Image::Vmdk(vmdk) => vmdk.grow(size).await,
            Image::Stream(stream) => Err(stream.only_written()),
        }
    }

    fn next_data(&self, offset: u64) -> Result<Option<Extent>, DiskError> {
        match self {
            Image::Raw(raw) => raw.next_data(offset),
            Image::Vhdx(vhdx) => vhdx.next_data(offset),
            Image::Vmdk(vmdk) => vmdk.next_data(offset),
            Image::Stream(stream) => Err(stream.only_written()),
        }
    }
}

/// A file that an image names, which must lie beneath the folder of the image: images come from others, and a name in one
/// must not lead to a file of somebody else. Windows paths that are absolute count by their last part.
///
/// # Errors
/// What is wrong with the name.
pub(crate) fn beneath(image: &Path, named: &str) -> Result<PathBuf, &'static str> {
    let text = named.replace('\\', "/");
    let drive = text.as_bytes().get(1) == Some(&b':') || text.starts_with("//");
    let relative = if drive { text.rsplit('/').next().unwrap_or_default() } else { text.as_str() };
    let relative = Path::new(relative);
    let plain = relative.components().all(|c| matches!(c, Component::Normal(_) | Component::CurDir));
    if !plain || relative.file_name().is_none() {
        return Err("a file that the image names does not lie beneath the image's own folder");
    }
    let dir = image.parent().filter(|d| !d.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let found = dir.join(relative);
    if found.symlink_metadata().is_ok() {
        let inside = dir.canonicalize().and_then(|dir| Ok(found.canonicalize()?.starts_with(dir)));
        if !inside.unwrap_or(false) {
            return Err("a file that the image names leads out of the image's own folder by a link");
        }
        if !found.is_file() {
            return Err("a file that the image names is no regular file");
        }
    }
    Ok(found)
}

/// Fills `target` with what a parent has at `extent`; zeroes without one, and behind its end.
async fn read_parent<F: File>(parent: Option<&Image<F>>, extent: Extent, target: &mut [u8]) -> Result<(), DiskError> {
    let Some(parent) = parent else { return Ok(()) };
    let len = extent.len.min(parent.size().saturating_sub(extent.offset));
    if len > 0 {
        // The chain is bounded when it is opened; boxed because an image's parent is an image.
        let bytes = Box::pin(parent.read(Extent::new(extent.offset, len))).await?;
        target[..len as usize].copy_from_slice(&bytes);
    }
    Ok(())
}

/// Grows a file durably before any block beyond its old end is referred to. Falls back to the least growth when space is
/// short. Returns the new end.
async fn grow_file<F: File>(file: &F, from: u64, at_least: u64, step: u64) -> io::Result<u64> {
    let wanted = (from + step).max(at_least);
    let to = match file.allocate(from, wanted - from).await {
        Ok(()) => wanted,
        Err(e) if crate::storage::uring::is_full(&e) && wanted > at_least => {
            file.allocate(from, at_least - from).await?;
            at_least
        }
        Err(e) => return Err(e),
    };
    file.sync_data().await?;
    Ok(to)
}

/// Reserves a place for a block and makes it ready: allocated, zero, within the durable file length.
async fn ready_place<'a, F: File>(
    file: &F,
    grown_to: &Cell<u64>,
    block: u64,
    step: u64,
    places: impl Fn() -> RefMut<'a, Places>,
) -> io::Result<u64> {
    let end = places().end() + block;
    if !places().reuses() && end > grown_to.get() {
        grown_to.set(grow_file(file, grown_to.get(), end, step).await?);
    }
    let placed = places().reserve();
    if placed.reused {
        let cleared = async {
            file.punch(placed.at, block).await?;
            file.allocate(placed.at, block).await
        };
        if let Err(e) = cleared.await {
            places().give_back(placed.at);
            return Err(e);
        }
    }
    Ok(placed.at)
}

async fn open_file<S: Storage>(storage: &S, path: &Path, mode: OpenMode) -> Result<S::File, DiskError> {
    storage.open(path, mode).await.map_err(|source| DiskError::Io { path: path.to_owned(), source })
}
