//! VMDK: sparse and flat disks that are written; those and deltas, split disks and streams that are read.
//!
//! A flat disk is a descriptor and a file of plain bytes: it opens after any crash, one sync a barrier. The content id in
//! the descriptor changes once a session, within one sector.

pub mod descriptor;
pub mod format;
pub mod grains;
pub mod sparse;
pub mod stream;
pub(in crate::disk) mod survey;

use std::cell::Cell;
use std::io;
use std::path::{Path, PathBuf};

use bytes::Bytes;

use self::descriptor::{DESCRIPTOR_MAX, Descriptor, ExtentKind, Kind};
use self::format::SECTOR;
use self::sparse::{Sparse, put};
use super::{Disk, DiskError, Image, beneath, open_file};
use crate::model::Extent;
use crate::storage::{AlignedBuf, File, OpenMode, Storage};

/// Largest flat disk.
pub(super) const FLAT_MAX: u64 = 62 << 40;

/// An open VMDK.
pub struct Vmdk<F: File> {
    path: PathBuf,
    parts: Vec<Part<F>>,
    size: Cell<u64>,
    descriptor: Descriptor,
    parent: Option<Box<Image<F>>>,
    /// The descriptor of a flat disk that is written.
    head: Option<F>,
}

struct Part<F> {
    /// Where it stands on the disk.
    extent: Cell<Extent>,
    body: Body<F>,
}

#[allow(clippy::large_enum_variant, reason = "there are a few for each disk")]
enum Body<F> {
    Sparse(Sparse<F>),
    Flat { path: PathBuf, file: F, offset: u64 },
}

/// The file of plain bytes beside a descriptor.
pub fn flat_path(descriptor: &Path) -> PathBuf {
    let mut name = descriptor.file_stem().unwrap_or_default().to_owned();
    name.push("-flat.vmdk");
    descriptor.with_file_name(name)
}

impl<F: File> Vmdk<F> {
    /// Makes a monolithicSparse disk.
    ///
    /// # Errors
    /// [`DiskError`].
    pub async fn create_sparse(path: &Path, file: F, size: u64) -> Result<Self, DiskError> {
        let descriptor = sparse::own_descriptor(path, size / SECTOR, Kind::MonolithicSparse);
        let body = Body::Sparse(Sparse::create(path, file, size).await?);
        Ok(Self::single(path, descriptor, body, size))
    }

    /// Makes a flat disk: the bytes first, then the descriptor that refers to them.
    ///
    /// # Errors
    /// [`DiskError`].
    pub async fn create_flat<S: Storage<File = F>>(storage: &S, path: &Path, kind: Kind, size: u64) -> Result<Self, DiskError> {
        if size == 0 || !size.is_multiple_of(SECTOR) || size > FLAT_MAX {
            return Err(DiskError::Size { size, format: "vmdk-flat", why: "the size must be a positive multiple of 512 up to 62 TiB" });
        }
        let flat = flat_path(path);
        if flat.to_string_lossy().contains(|c: char| c == '"' || c.is_control()) {
            return Err(DiskError::Unsupported {
                path: path.to_owned(),
                what: "the name of a flat VMDK cannot have quotes or line ends in it",
            });
        }
        let descriptor = sparse::own_descriptor(path, size / SECTOR, kind);
        let file = open_file(storage, &flat, OpenMode::Create).await?;
        file.set_len(size).map_err(|e| at(&flat, e))?;
        file.sync_data().await.map_err(|e| at(&flat, e))?;
        if let Some(dir) = path.parent() {
            storage.sync_dir(dir).map_err(|e| at(dir, e))?;
        }
        let mut text = descriptor.encode().into_bytes();
        // Whole sectors, for direct I/O; readers skip empty lines.
        text.resize(text.len().next_multiple_of(SECTOR as usize), b'\n');
        let head = open_file(storage, path, OpenMode::Create).await?;
        put(&head, 0, &text).await.map_err(|e| at(path, e))?;
        head.sync_data().await.map_err(|e| at(path, e))?;
        Ok(Self { head: Some(head), ..Self::single(path, descriptor, Body::Flat { path: flat, file, offset: 0 }, size) })
    }

    /// Opens a disk of one extent for writing.
    ///
    /// # Errors
    /// [`DiskError`]; [`DiskError::Unsupported`] for a disk with a parent or several extents.
    pub async fn open<S: Storage<File = F>>(storage: &S, path: &Path) -> Result<Self, DiskError> {
        let unsupported = |what| DiskError::Unsupported { path: path.to_owned(), what };
        let file = open_file(storage, path, OpenMode::Write).await?;
        if is_sparse(&file).await.map_err(|e| at(path, e))? {
            let loaded = Sparse::load(path, file, true).await?;
            let text = loaded.descriptor.as_deref().unwrap_or_default();
            let descriptor = Descriptor::parse(text).map_err(|what| corrupt(path, SECTOR, what))?;
            let size = loaded.sparse.size();
            if descriptor.has_parent() || descriptor.extents.len() != 1 || !sizes_agree(&descriptor, &loaded.sparse) {
                return Err(unsupported("a disk with a parent or several extents is read, not written"));
            }
            let sparse = Sparse::open(loaded).await?;
            if descriptor.sectors() * SECTOR != size {
                sparse.finish_growth().await?;
            }
            return Ok(Self::single(path, descriptor, Body::Sparse(sparse), size));
        }
        let text = read_descriptor(&file).await.map_err(|e| at(path, e))?;
        let descriptor = Descriptor::parse(&text).map_err(|what| corrupt(path, 0, what))?;
        let flat = flat_path(path);
        let ours = |d: &Descriptor| matches!(&d.extents[..], [one] if one.kind == ExtentKind::Flat && one.offset == 0 && flat.file_name() == Some(one.file.as_ref()));
        if descriptor.has_parent() || !ours(&descriptor) {
            return Err(unsupported("only a flat disk whose one extent is the -flat.vmdk beside it is written"));
        }
        let size = descriptor.sectors() * SECTOR;
        let body = open_file(storage, &flat, OpenMode::Write).await?;
        if body.len().map_err(|e| at(&flat, e))? < size {
            return Err(corrupt(&flat, 0, "the flat file is shorter than its descriptor says"));
        }
        let sector = &text[..text.len().min(512)];
        let changed = descriptor::with_cid(sector, sparse::new_cid()).filter(|s| s.len() == 512);
        let changed = changed.ok_or_else(|| unsupported("the descriptor is shorter than a sector or has no CID in its first one"))?;
        put(&file, 0, &changed).await.map_err(|e| at(path, e))?;
        file.sync_data().await.map_err(|e| at(path, e))?;
        Ok(Self { head: Some(file), ..Self::single(path, descriptor, Body::Flat { path: flat, file: body, offset: 0 }, size) })
    }

    /// Opens a disk of any kind to read it, without its parent. Files that it names must lie beneath its own folder.
    ///
    /// # Errors
    /// [`DiskError`].
    pub(super) async fn load<S: Storage<File = F>>(storage: &S, path: &Path) -> Result<Self, DiskError> {
        let file = open_file(storage, path, OpenMode::Read).await?;
        if is_sparse(&file).await.map_err(|e| at(path, e))? {
            let loaded = Sparse::load(path, file, false).await?;
            let text =
                loaded.descriptor.ok_or_else(|| corrupt(path, 28, "the file has no descriptor: it is one extent of a split disk"))?;
            let descriptor = Descriptor::parse(&text).map_err(|what| corrupt(path, SECTOR, what))?;
            let size = loaded.sparse.size();
            if descriptor.extents.len() != 1 || !sizes_agree(&descriptor, &loaded.sparse) {
                return Err(corrupt(path, SECTOR, "the descriptor and the header disagree about the size"));
            }
            return Ok(Self::single(path, descriptor, Body::Sparse(loaded.sparse), size));
        }
        let text = read_descriptor(&file).await.map_err(|e| at(path, e))?;
        let descriptor = Descriptor::parse(&text).map_err(|what| corrupt(path, 0, what))?;
        let mut parts = Vec::new();
        let mut start = 0;
        let mut sparse_files = std::collections::HashSet::new();
        for line in &descriptor.extents {
            if line.kind == ExtentKind::Sparse && !sparse_files.insert(&line.file) {
                return Err(corrupt(path, 0, "two extents are in one sparse file"));
            }
            let extent = Extent::new(start, line.sectors * SECTOR);
            start += extent.len;
            let named = beneath(path, &line.file).map_err(|what| DiskError::Unsupported { path: path.to_owned(), what })?;
            let file = open_file(storage, &named, OpenMode::Read).await?;
            let body = match line.kind {
                ExtentKind::Sparse => {
                    let sparse = Sparse::load(&named, file, false).await?.sparse;
                    if sparse.size() < extent.len {
                        return Err(corrupt(&named, 12, "the extent is smaller than the descriptor says"));
                    }
                    Body::Sparse(sparse)
                }
                ExtentKind::Flat => {
                    let offset = line.offset * SECTOR;
                    if file.len().map_err(|e| at(&named, e))? < offset + extent.len {
                        return Err(corrupt(&named, 0, "the flat file is shorter than its descriptor says"));
                    }
                    Body::Flat { path: named, file, offset }
                }
            };
            parts.push(Part { extent: Cell::new(extent), body });
        }
        Ok(Self { path: path.to_owned(), parts, size: Cell::new(start), descriptor, parent: None, head: None })
    }

    fn single(path: &Path, descriptor: Descriptor, body: Body<F>, size: u64) -> Self {
        let parts = vec![Part { extent: Cell::new(Extent::new(0, size)), body }];
        Self { path: path.to_owned(), parts, size: Cell::new(size), descriptor, parent: None, head: None }
    }

    pub(super) fn descriptor(&self) -> &Descriptor {
        &self.descriptor
    }

    pub(super) fn set_parent(&mut self, parent: Image<F>) {
        self.parent = Some(Box::new(parent));
    }

    pub(super) fn size(&self) -> u64 {
        self.size.get()
    }

    pub(super) async fn read(&self, extent: Extent) -> Result<AlignedBuf, DiskError> {
        if let [Part { body: Body::Flat { path, file, offset }, .. }] = &self.parts[..] {
            return file.read_at(offset + extent.offset, extent.len as usize).await.map_err(|e| at(path, e));
        }
        let mut out = AlignedBuf::zeroed(extent.len as usize);
        let first = self.parts.partition_point(|part| part.extent.get().end() <= extent.offset);
        for part in self.parts[first..].iter().take_while(|part| part.extent.get().offset < extent.end()) {
            let start = extent.offset.max(part.extent.get().offset);
            let here = Extent::new(start, extent.end().min(part.extent.get().end()) - start);
            let target = &mut out[(start - extent.offset) as usize..][..here.len as usize];
            let within = Extent::new(start - part.extent.get().offset, here.len);
            match &part.body {
                Body::Flat { path, file, offset } => {
                    let bytes = file.read_at(offset + within.offset, within.len as usize).await.map_err(|e| at(path, e))?;
                    target.copy_from_slice(&bytes);
                }
                Body::Sparse(sparse) => {
                    for absent in sparse.read(within, target).await? {
                        let piece = &mut target[(absent.offset - within.offset) as usize..][..absent.len as usize];
                        super::read_parent(
                            self.parent.as_deref(),
                            Extent::new(absent.offset + part.extent.get().offset, absent.len),
                            piece,
                        )
                        .await?;
                    }
                }
            }
        }
        Ok(out)
    }

    /// The one extent of a disk that is written.
    fn body(&self) -> Result<&Body<F>, DiskError> {
        match &self.parts[..] {
            [part] if self.parent.is_none() => Ok(&part.body),
            _ => Err(DiskError::Unsupported {
                path: self.path.clone(),
                what: "a disk with a parent or several extents is read, not written",
            }),
        }
    }

    pub(super) async fn write(&self, offset: u64, data: Bytes) -> Result<(), DiskError> {
        match self.body()? {
            Body::Sparse(sparse) => sparse.write(offset, data).await,
            Body::Flat { path, file, .. } => file.write_at(offset, data).await.map_err(|e| at(path, e)),
        }
    }

    pub(super) async fn zero(&self, extent: Extent) -> Result<(), DiskError> {
        match self.body()? {
            Body::Sparse(sparse) => sparse.zero(extent).await,
            Body::Flat { path, file, .. } => file.punch(extent.offset, extent.len).await.map_err(|e| at(path, e)),
        }
    }

    pub(super) async fn barrier(&self) -> Result<(), DiskError> {
        match self.body()? {
            Body::Sparse(sparse) => sparse.barrier().await,
            Body::Flat { path, file, .. } => file.sync_data().await.map_err(|e| at(path, e)),
        }
    }

    pub(super) async fn finish(&self) -> Result<(), DiskError> {
        match self.body()? {
            Body::Sparse(sparse) => sparse.finish().await,
            Body::Flat { .. } => Ok(()),
        }
    }

    pub(super) async fn grow(&self, size: u64) -> Result<(), DiskError> {
        match self.body()? {
            Body::Sparse(sparse) => sparse.grow(size).await?,
            Body::Flat { path, file, .. } => {
                let refuse = |why| DiskError::Size { size, format: "vmdk-flat", why };
                if size < self.size() || !size.is_multiple_of(SECTOR) || size > FLAT_MAX {
                    return Err(refuse("a disk cannot shrink, and grows by multiples of 512 up to 62 TiB"));
                }
                // The bytes first, then the one sector that says how many they are: a longer file is in order at any time.
                let head = self.head.as_ref().ok_or_else(|| refuse("the descriptor is not open for writing"))?;
                let sector = head.read_at(0, SECTOR as usize).await.map_err(|e| at(&self.path, e))?;
                let changed = descriptor::with_sectors(&sector, size / SECTOR);
                let changed = changed.ok_or_else(|| refuse("its descriptor has no room for a longer number of sectors"))?;
                file.set_len(size).map_err(|e| at(path, e))?;
                file.sync_data().await.map_err(|e| at(path, e))?;
                put(head, 0, &changed).await.map_err(|e| at(&self.path, e))?;
                head.sync_data().await.map_err(|e| at(&self.path, e))?;
            }
        }
        self.size.set(size);
        self.parts[0].extent.set(Extent::new(0, size));
        Ok(())
    }

    pub(super) fn next_data(&self, offset: u64) -> Result<Option<Extent>, DiskError> {
        let inherited = match &self.parent {
            Some(parent) if offset < parent.size() => parent.next_data(offset)?,
            _ => None,
        };
        let mut own = None;
        let first = self.parts.partition_point(|part| part.extent.get().end() <= offset);
        for part in &self.parts[first..] {
            let from = offset.max(part.extent.get().offset) - part.extent.get().offset;
            let found = match &part.body {
                Body::Sparse(sparse) => sparse.next_data(from)?,
                Body::Flat { path, file, offset: base } => {
                    let next = file.next_data(base + from).map_err(|e| at(path, e))?;
                    next.map(|(start, end)| Extent::new(start - base, end - start))
                }
            };
            if let Some(found) = found.filter(|f| f.offset < part.extent.get().len) {
                let end = found.end().min(part.extent.get().len);
                own = Some(Extent::new(part.extent.get().offset + found.offset, end - found.offset));
                break;
            }
        }
        let earliest = [own, inherited].into_iter().flatten().min_by_key(|e| e.offset).filter(|e| e.offset < self.size.get());
        Ok(earliest.map(|e| Extent::new(e.offset, e.end().min(self.size.get()) - e.offset)))
    }
}

/// Whether descriptor and header say the same size, or a crash while the disk grew left the descriptor behind.
pub(super) fn sizes_agree<F: File>(descriptor: &Descriptor, sparse: &Sparse<F>) -> bool {
    let said = descriptor.sectors() * SECTOR;
    said == sparse.size() || sparse.is_unclean() && said < sparse.size()
}

pub(super) async fn is_sparse<F: File>(file: &F) -> io::Result<bool> {
    Ok(file.len()? >= 512 && file.read_at(0, 512).await?[..4] == *b"KDMV")
}

pub(super) async fn read_descriptor<F: File>(file: &F) -> io::Result<Vec<u8>> {
    let len = file.len()?.min(DESCRIPTOR_MAX as u64 + 1) as usize;
    // Direct I/O reads whole sectors; the file may end within one.
    let whole = len / 512 * 512;
    let mut text = file.read_at(0, whole).await?.to_vec();
    if len > whole {
        text.extend_from_slice(&file.read_tail(whole as u64, len - whole).await?);
    }
    Ok(text)
}

fn at(path: &Path, source: io::Error) -> DiskError {
    DiskError::Io { path: path.to_owned(), source }
}

fn corrupt(path: &Path, offset: u64, what: &'static str) -> DiskError {
    DiskError::Corrupt { path: path.to_owned(), offset, what }
}
