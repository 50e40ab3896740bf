//! Checks an image as a whole: what `qemu-img check` looks at and what it does not. Changes nothing, lists every fault.
//!
//! A *fault* makes some reader see wrong bytes or refuse the file. A *note* is what a crash or another program may leave
//! behind and every reader copes with: a log to replay, an older header, space that nothing refers to.

use std::io;
use std::path::Path;

use serde::Serialize;

use super::vhdx::bat::{self, Geometry, state};
use super::vhdx::format::{HEADER_AT, HEADER_LEN, Header as VhdxHeader, MIB, Metadata, REGION_AT, REGION_LEN, Regions};
use super::vhdx::open::{self, Overlay, read_through};
use super::vmdk::descriptor::{Descriptor, ExtentKind, Kind};
use super::vmdk::{sparse, survey};
use super::{Disk, DiskError, Format, Image, beneath, open_file, vmdk};
use crate::model::Extent;
use crate::storage::{File, OpenMode, Storage};

/// Findings of one kind that are listed; more are only counted.
const LISTED_MAX: usize = 1000;
/// Bytes compared at once.
const COMPARE_STEP: u64 = 1 << 20;

/// Something found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// In which file.
    pub file: String,
    /// Where, in bytes of that file (of the disk for differences in content).
    pub offset: u64,
    /// What.
    pub what: String,
}

/// What a check found.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Report {
    /// See the module.
    pub faults: Vec<Finding>,
    /// Faults in all, listed or not.
    pub fault_count: u64,
    /// See the module.
    pub notes: Vec<Finding>,
    /// Size of the virtual disk in bytes, once that is known.
    pub size: Option<u64>,
    /// Blocks or grains that hold data.
    pub blocks: u64,
    /// Bytes of content compared.
    pub compared_bytes: u64,
}

impl Report {
    fn fault(&mut self, file: &Path, offset: u64, what: impl Into<String>) {
        self.fault_count += 1;
        if self.faults.len() < LISTED_MAX {
            self.faults.push(Finding { file: file.display().to_string(), offset, what: what.into() });
        }
    }

    fn note(&mut self, file: &Path, offset: u64, what: impl Into<String>) {
        if self.notes.len() < LISTED_MAX {
            self.notes.push(Finding { file: file.display().to_string(), offset, what: what.into() });
        }
    }

    fn failed(&mut self, error: &DiskError) {
        match error {
            DiskError::Corrupt { path, offset, what } => self.fault(path, *offset, *what),
            DiskError::Parent { path, why } => self.fault(path, 0, why.as_str()),
            DiskError::Unsupported { path, what } => self.fault(path, 0, *what),
            DiskError::Io { path, source } => self.fault(path, 0, source.to_string()),
            other => self.fault(Path::new("-"), 0, other.to_string()),
        }
    }

    /// Whether the image is good.
    pub fn is_good(&self) -> bool {
        self.fault_count == 0
    }
}

/// The format that a file's name and first bytes suggest. For commands given by a person about a file; never for a replica,
/// whose first bytes a guest may have written.
///
/// # Errors
/// Those of the file.
pub async fn guess<S: Storage>(storage: &S, path: &Path) -> Result<Format, DiskError> {
    let file = open_file(storage, path, OpenMode::Read).await?;
    let io = |source| DiskError::Io { path: path.to_owned(), source };
    let extension = path.extension().and_then(|e| e.to_str()).unwrap_or_default().to_ascii_lowercase();
    let is_long = file.len().map_err(io)? >= 512;
    let first = if is_long { file.read_at(0, 512).await.map_err(io)?.to_vec() } else { Vec::new() };
    Ok(match extension.as_str() {
        // Only what is called raw may begin with anything: its first bytes are a guest's.
        "raw" => Format::Raw,
        _ if first.starts_with(b"vhdxfile") => Format::Vhdx,
        _ if first.starts_with(b"KDMV") || first.starts_with(b"# Disk DescriptorFile") => Format::Vmdk,
        "vhdx" | "avhdx" => Format::Vhdx,
        "vmdk" => Format::Vmdk,
        _ => Format::Raw,
    })
}

/// Checks the structure of an image and, with `content`, that it holds the same bytes as that raw file. Parents and extents
/// are followed beneath the image's own folder.
///
/// # Errors
/// Only what keeps the check from being made at all, such as a file that cannot be opened.
pub async fn image<S: Storage>(storage: &S, path: &Path, format: Format, content: Option<&Path>) -> Result<Report, DiskError> {
    let mut report = Report::default();
    match format {
        Format::Raw => {
            let file = open_file(storage, path, OpenMode::Read).await?;
            let len = file.len().map_err(|source| DiskError::Io { path: path.to_owned(), source })?;
            report.size = Some(len);
            if len == 0 || !len.is_multiple_of(512) {
                report.fault(path, len, "the length is not a positive multiple of 512");
            }
        }
        Format::Vhdx | Format::VhdxFixed => vhdx(storage, path, &mut report).await?,
        _ => vmdk(storage, path, &mut report).await?,
    }
    if !report.is_good() {
        return Ok(report);
    }
    // The reader's own view must agree: parents, ids, everything that a check of one file cannot see.
    match Image::open_read_only(storage, path, format, true).await {
        Err(error) => report.failed(&error),
        Ok(image) => {
            if let Some(content) = content {
                compare(storage, &image, content, &mut report).await?;
            }
        }
    }
    Ok(report)
}

async fn compare<S: Storage>(storage: &S, image: &Image<S::File>, content: &Path, report: &mut Report) -> Result<(), DiskError> {
    let other = Image::open_read_only(storage, content, Format::Raw, false).await?;
    let longest = image.size().max(other.size());
    if image.size() != other.size() {
        report.fault(
            content,
            image.size().min(other.size()),
            format!("the image holds {} bytes, this file {}", image.size(), other.size()),
        );
    }
    let mut at = 0;
    while at < longest.min(image.size()).min(other.size()) {
        let next = [image.next_data(at)?, other.next_data(at)?].into_iter().flatten().map(|e| e.offset).min();
        let Some(next) = next else { break };
        let start = next / COMPARE_STEP * COMPARE_STEP;
        let extent = Extent::new(start, COMPARE_STEP.min(image.size().min(other.size()) - start));
        let (mine, theirs) = (image.read(extent).await, other.read(extent).await?);
        match mine {
            Err(error) => report.failed(&error),
            Ok(mine) if mine[..] != theirs[..] => {
                let differs = mine.iter().zip(theirs.iter()).position(|(a, b)| a != b).unwrap_or_default() as u64;
                report.fault(content, start + differs, "the image holds other bytes here");
            }
            Ok(_) => report.compared_bytes += extent.len,
        }
        at = extent.end();
    }
    Ok(())
}

async fn vhdx<S: Storage>(storage: &S, path: &Path, report: &mut Report) -> Result<(), DiskError> {
    let file = open_file(storage, path, OpenMode::Read).await?;
    vhdx_file(&file, path, report).await.map_err(|source| DiskError::Io { path: path.to_owned(), source })
}

async fn vhdx_file<F: File>(file: &F, path: &Path, report: &mut Report) -> io::Result<()> {
    let file_len = file.len()?;
    if file_len < 2 * MIB || file.read_at(0, 512).await?[..8] != *b"vhdxfile" {
        report.fault(path, 0, "the file does not begin with a VHDX identifier, or is too short for one");
        return Ok(());
    }
    for at in HEADER_AT {
        if VhdxHeader::decode(&file.read_at(at, HEADER_LEN).await?).is_none() {
            report.note(path, at, "this header is not valid; the other one counts");
        }
    }
    let header = match open::read_headers(file).await? {
        Ok((header, _)) => header,
        Err(what) => {
            report.fault(path, HEADER_AT[0], what);
            return Ok(());
        }
    };
    let overlay = match open::read_log(file, &header, file_len).await? {
        Err(what) => {
            report.fault(path, header.log_at, what);
            None
        }
        Ok(None) => None,
        Ok(Some(replay)) => {
            let what = format!("the log is not empty: {} entries with {} changes are replayed", replay.entries, replay.changes.len());
            report.note(path, header.log_at, what);
            Some(Overlay::new(replay, file_len))
        }
    };
    let overlay = overlay.as_ref();
    let file_len = overlay.map_or(file_len, Overlay::len);
    let mut tables = Vec::new();
    for at in REGION_AT {
        match Regions::decode(&read_through(file, overlay, at, REGION_LEN).await?, file_len) {
            Ok(regions) => tables.push(regions),
            Err(what) => report.fault(path, at, what),
        }
    }
    if let [first, second] = &tables[..]
        && first != second
    {
        report.note(path, REGION_AT[1], "the copy of the region table differs: the disk was being grown; the first one counts");
    }
    let Some(regions) = tables.into_iter().next() else { return Ok(()) };
    if regions.metadata_len > 64 * MIB {
        report.fault(path, regions.metadata_at, "the metadata region is larger than 64 MiB");
        return Ok(());
    }
    let metadata = Metadata::decode(&read_through(file, overlay, regions.metadata_at, regions.metadata_len as usize).await?);
    let metadata = match metadata {
        Ok(metadata) => metadata,
        Err(what) => {
            report.fault(path, regions.metadata_at, what);
            return Ok(());
        }
    };
    report.size = Some(metadata.size);
    let geometry = Geometry::of(&metadata);
    if geometry.entries() * 8 > regions.bat_len {
        report.fault(path, regions.bat_at, "the BAT is too short for the disk");
        return Ok(());
    }
    let table = open::read_table(file, overlay, &regions, geometry.entries() * 8).await?;
    let reserved = open::reserved(&header, &regions);
    for (i, &(at, len)) in reserved.iter().enumerate() {
        if len > 0 && reserved[..i].iter().any(|&(other, other_len)| at < other + other_len && other < at + len) {
            report.fault(path, at, "a region or the log overlaps another");
        }
    }
    for bad in bat::faults(&table, geometry, file_len, &reserved) {
        report.fault(path, regions.bat_at + bad.index * 8, bad.what);
    }
    let mut places = Vec::new();
    for (index, entry) in table.iter_from(0).filter(|&(index, _)| index < geometry.entries()) {
        let (kind, at) = bat::split(entry);
        let entry_at = regions.bat_at + index * 8;
        if entry & 0xf_fff8 != 0 {
            report.fault(path, entry_at, "reserved bits of a BAT entry are set");
        }
        match (geometry.number(index), kind) {
            (Some(_), _) if bat::is_here(kind) => places.push((at, geometry.block, entry_at)),
            (None, state::PRESENT) => places.push((at, MIB, entry_at)),
            (Some(_), state::ZERO) if at != 0 => report.fault(path, entry_at, "a zero block has a place: Hyper-V refuses the disk"),
            (Some(_), state::NOT_PRESENT) if at != 0 => report.note(path, entry_at, "a block that is not present has a place"),
            _ => {}
        }
    }
    report.blocks = places.len() as u64;
    let used: u64 = places.iter().map(|&(_, len, _)| len).sum();
    overlaps(places, path, report);
    let structures: u64 = reserved.iter().map(|&(_, len)| len).sum();
    if file_len > used + structures {
        report.note(path, 0, format!("{} bytes of the file are referred to by nothing", file_len - used - structures));
    }
    Ok(())
}

/// Blocks that share bytes, as (first byte, length, where the entry stands).
fn overlaps(mut places: Vec<(u64, u64, u64)>, path: &Path, report: &mut Report) {
    places.sort_unstable();
    for pair in places.windows(2) {
        if pair[0].0.saturating_add(pair[0].1) > pair[1].0 {
            report.fault(path, pair[1].2, format!("two blocks overlap; the other entry stands at byte {}", pair[0].2));
        }
    }
}

async fn vmdk<S: Storage>(storage: &S, path: &Path, report: &mut Report) -> Result<(), DiskError> {
    let file = open_file(storage, path, OpenMode::Read).await?;
    let io = |source| DiskError::Io { path: path.to_owned(), source };
    if vmdk::is_sparse(&file).await.map_err(io)? {
        let Some(found) = vmdk_extent(file, path, report).await? else { return Ok(()) };
        report.size = Some(found.0);
        let Some(text) = found.1 else {
            report.note(path, 28, "the file has no descriptor: it is one extent of a split disk");
            return Ok(());
        };
        match Descriptor::parse(&text) {
            Err(what) => report.fault(path, 512, what),
            Ok(d) if d.extents.len() == 1 && d.sectors() * 512 < found.0 && found.2 => {
                report.note(path, 512, "the descriptor is behind the header: the disk was being grown; the header counts");
            }
            Ok(d) if d.extents.len() != 1 || d.sectors() * 512 != found.0 => {
                report.fault(path, 512, "the descriptor and the header disagree about the size");
            }
            Ok(_) => {}
        }
        return Ok(());
    }
    let text = vmdk::read_descriptor(&file).await.map_err(io)?;
    let descriptor = match Descriptor::parse(&text) {
        Ok(descriptor) => descriptor,
        Err(what) => {
            report.fault(path, 0, what);
            return Ok(());
        }
    };
    report.size = Some(descriptor.sectors() * 512);
    if matches!(descriptor.kind, Kind::MonolithicSparse | Kind::StreamOptimized) {
        report.fault(path, 0, "a disk of this createType has its descriptor inside the sparse file: other readers refuse it");
    }
    for line in &descriptor.extents {
        let named = match beneath(path, &line.file) {
            Ok(named) => named,
            Err(what) => {
                report.fault(path, 0, format!("{}: {what}", line.file));
                continue;
            }
        };
        let file = match open_file(storage, &named, OpenMode::Read).await {
            Ok(file) => file,
            Err(error) => {
                report.fault(&named, 0, format!("an extent cannot be opened: {error}"));
                continue;
            }
        };
        match line.kind {
            ExtentKind::Flat => {
                let len = file.len().map_err(|source| DiskError::Io { path: named.clone(), source })?;
                if len < (line.offset + line.sectors) * 512 {
                    report.fault(&named, len, "the flat file is shorter than its descriptor says");
                }
            }
            ExtentKind::Sparse => {
                if let Some((size, ..)) = vmdk_extent(file, &named, report).await?
                    && size < line.sectors * 512
                {
                    report.fault(&named, 12, "the extent is smaller than the descriptor says");
                }
            }
        }
    }
    Ok(())
}

/// Checks one sparse file. Its size, its descriptor and whether it was not closed, unless it is too damaged.
async fn vmdk_extent<F: File>(file: F, path: &Path, report: &mut Report) -> Result<Option<(u64, Option<Vec<u8>>, bool)>, DiskError> {
    let survey = match survey::survey(path, &file).await {
        Ok(survey) => survey,
        Err(DiskError::Corrupt { path, offset, what }) => {
            report.fault(&path, offset, what);
            return Ok(None);
        }
        Err(other) => return Err(other),
    };
    let header = survey.header;
    let io = |source| DiskError::Io { path: path.to_owned(), source };
    let file_len = file.len().map_err(io)?;
    let before = report.fault_count;
    for bad in vmdk::grains::faults(&survey.table, &header, file_len) {
        report.fault(path, survey.entry_at(bad.grain), bad.what);
    }
    let grain_bytes = header.grain * 512;
    if !header.compressed() && survey.structures_end > header.overhead && survey.moved.is_none() {
        report.fault(path, 64, "tables or the descriptor stand where grains may be put");
    }
    if !header.compressed() {
        let mut places: Vec<_> =
            vmdk::grains::placed(&survey.table, &header).map(|(n, at)| (at, grain_bytes, survey.entry_at(n))).collect();
        report.blocks += places.len() as u64;
        places.extend(survey.moved.map(|(start, end)| (start, end - start, 56)));
        overlaps(places, path, report);
        for (number, _) in survey.directory.iter().enumerate().filter(|&(_, &at)| at == 0) {
            report.fault(
                path,
                header.gd_at * 512 + number as u64 * 4,
                "a grain table is missing: other writers put data at garbage places then",
            );
        }
    }
    for number in &survey.stale_copies {
        let at = header.rgd_at * 512 + number * 4;
        if header.unclean {
            report.note(path, at, "a second copy of a grain table is older: the image was not closed; the first one counts");
        } else {
            report.fault(path, at, "the two copies of a grain table differ");
        }
    }
    if header.unclean {
        report.note(path, 72, "the image was not closed");
    }
    let descriptor = survey.descriptor.clone();
    if header.compressed() && report.fault_count == before {
        let loaded = sparse::Sparse::load(path, file, false).await?.sparse;
        let mut at = 0;
        while let Some(extent) = loaded.next_data(at)? {
            let mut grain = vec![0; extent.len as usize];
            report.blocks += 1;
            if let Err(error) = loaded.read(extent, &mut grain).await {
                report.failed(&error);
            }
            at = extent.end();
        }
    }
    Ok(Some((header.capacity * 512, descriptor, header.unclean)))
}
