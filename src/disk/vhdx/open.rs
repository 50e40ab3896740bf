//! Reads and checks the structure of a VHDX, changing nothing: headers, log, regions, metadata, block table.

use std::cell::{Cell, RefCell};
use std::io;
use std::path::Path;

use tokio::sync::Mutex;

use super::Vhdx;
use super::bat::{self, Bat, Geometry, TABLE_PAGE};
use super::format::{HEADER_AT, HEADER_LEN, Header, MIB, Metadata, REGION_AT, REGION_LEN, Regions};
use super::log::{self, Change, LOG_LEN_MAX, Replay};
use crate::disk::DiskError;
use crate::disk::places::Table;
use crate::model::{Extent, OverlayMap};
use crate::storage::{AlignedBuf, File};

/// Bytes of the block table read at once.
const TABLE_STEP: u64 = MIB;
/// Longest metadata region that is read.
const METADATA_MAX: u64 = 64 * MIB;

/// What a writing session starts from.
pub(in crate::disk) struct Session {
    pub header: Header,
    /// Which of the two headers that is.
    pub current: usize,
    /// The two region tables differ: where the one stands that does not count, and what it must say.
    pub repair_regions: Option<(u64, AlignedBuf)>,
}

/// Changes of a log, laid over the file.
pub(in crate::disk) struct Overlay {
    replay: Replay,
    /// Which change covers what.
    map: OverlayMap<usize>,
    len: u64,
}

impl Overlay {
    pub(in crate::disk) fn new(replay: Replay, file_len: u64) -> Self {
        let mut map = OverlayMap::default();
        for (index, change) in replay.changes.iter().enumerate() {
            let extent = match change {
                Change::Sector { at, data } => Extent::new(*at, data.len() as u64),
                Change::Zero { at, len } => Extent::new(*at, *len),
            };
            map.insert(extent, index);
        }
        let len = file_len.max(replay.last_len);
        Self { replay, map, len }
    }

    /// Length of the file once the log was replayed.
    pub(in crate::disk) fn len(&self) -> u64 {
        self.len
    }

    fn patch(&self, at: u64, bytes: &mut [u8]) {
        for piece in self.map.overlapping(Extent::new(at, bytes.len() as u64)) {
            let target = &mut bytes[(piece.extent.offset - at) as usize..][..piece.extent.len as usize];
            match &self.replay.changes[piece.source] {
                Change::Sector { data, .. } => target.copy_from_slice(&data[piece.skip as usize..][..target.len()]),
                Change::Zero { .. } => target.fill(0),
            }
        }
    }

    /// Makes the changes in the file. Doing so twice does no harm.
    pub(super) async fn apply<F: File>(&self, file: &F) -> io::Result<()> {
        if file.len()? < self.len {
            file.set_len(self.len)?;
        }
        for change in &self.replay.changes {
            match change {
                Change::Sector { at, data } => super::write(file, *at, data).await?,
                Change::Zero { at, len } => {
                    let end = at.saturating_add(*len).min(self.len);
                    if end > *at {
                        file.punch(*at, end - at).await?;
                    }
                }
            }
        }
        Ok(())
    }
}

/// Reads bytes of the file as they are once the log was replayed.
pub(in crate::disk) async fn read_through<F: File>(file: &F, overlay: Option<&Overlay>, at: u64, len: usize) -> io::Result<AlignedBuf> {
    let Some(overlay) = overlay else { return file.read_at(at, len).await };
    let there = (len as u64).min(file.len()?.saturating_sub(at)) as usize;
    let mut bytes = AlignedBuf::with_capacity(len);
    // A file that was cut may end within a sector, which direct I/O reads in its own way.
    let whole = there / 512 * 512;
    if whole > 0 {
        bytes.extend(&file.read_at(at, whole).await?);
    }
    if there > whole {
        bytes.extend(&file.read_tail(at + whole as u64, there - whole).await?);
    }
    bytes.pad_to(len);
    overlay.patch(at, &mut bytes);
    Ok(bytes)
}

impl<F: File> Vhdx<F> {
    /// Checks the whole structure and changes nothing. A log that is not empty is replayed in memory.
    ///
    /// # Errors
    /// [`DiskError`].
    pub(in crate::disk) async fn load(path: &Path, file: F) -> Result<(Self, Session), DiskError> {
        let io = |source| DiskError::Io { path: path.to_owned(), source };
        let corrupt = |offset, what| DiskError::Corrupt { path: path.to_owned(), offset, what };
        let file_len = file.len().map_err(io)?;
        if file_len < 2 * MIB {
            return Err(corrupt(0, "the file is too short for a VHDX"));
        }
        if file.read_at(0, 512).await.map_err(io)?[..8] != *b"vhdxfile" {
            return Err(corrupt(0, "the file does not begin with a VHDX identifier"));
        }
        let (header, current) = read_headers(&file).await.map_err(io)?.map_err(|what| corrupt(HEADER_AT[0], what))?;
        let overlay = read_log(&file, &header, file_len).await.map_err(io)?.map_err(|what| corrupt(header.log_at, what))?;
        let overlay = overlay.map(|replay| Overlay::new(replay, file_len));
        let file_len = overlay.as_ref().map_or(file_len, |o| o.len);
        let first = read_through(&file, overlay.as_ref(), REGION_AT[0], REGION_LEN).await.map_err(io)?;
        let copy = read_through(&file, overlay.as_ref(), REGION_AT[1], REGION_LEN).await.map_err(io)?;
        let (regions, repair_regions) = match Regions::decode(&first, file_len) {
            Ok(regions) => (regions, (first[..] != copy[..]).then_some((REGION_AT[1], first))),
            Err(what) => (Regions::decode(&copy, file_len).map_err(|_| corrupt(REGION_AT[0], what))?, Some((REGION_AT[0], copy))),
        };
        if regions.metadata_len > METADATA_MAX {
            return Err(corrupt(regions.metadata_at, "the metadata region is larger than 64 MiB"));
        }
        let region = read_through(&file, overlay.as_ref(), regions.metadata_at, regions.metadata_len as usize).await.map_err(io)?;
        let metadata = Metadata::decode(&region).map_err(|what| corrupt(regions.metadata_at, what))?;
        if Geometry::of(&metadata).entries() * 8 > regions.bat_len {
            return Err(corrupt(regions.bat_at, "the BAT is too short for the disk"));
        }
        let table = read_table(&file, overlay.as_ref(), &regions, Geometry::of(&metadata).entries() * 8).await.map_err(io)?;
        let reserved = reserved(&header, &regions);
        let bat = Bat::load(table, Geometry::of(&metadata), file_len, &reserved)
            .map_err(|bad| corrupt(regions.bat_at + bad.index * 8, bad.what))?;
        let vhdx = Self {
            path: path.to_owned(),
            file,
            metadata,
            regions: RefCell::new(regions),
            data_write: header.data_write,
            grown_to: Cell::new(bat.end()),
            bat: RefCell::new(bat),
            placing: Mutex::new(()),
            overlay,
            parent: None,
        };
        Ok((vhdx, Session { header, current, repair_regions }))
    }
}

/// The ranges of the file that no block may touch.
pub(in crate::disk) fn reserved(header: &Header, regions: &Regions) -> Vec<(u64, u64)> {
    let log = (header.log_at, u64::from(header.log_len));
    let mut all = vec![(0, MIB), log, (regions.bat_at, regions.bat_len), (regions.metadata_at, regions.metadata_len)];
    all.extend(&regions.others);
    all
}

/// Reads those parts of the block table that the file holds; holes are entries of zero.
pub(in crate::disk) async fn read_table<F: File>(file: &F, overlay: Option<&Overlay>, regions: &Regions, bytes: u64) -> io::Result<Table> {
    let mut table = Table::default();
    let whole = Extent::new(regions.bat_at, bytes.next_multiple_of(TABLE_PAGE).min(regions.bat_len));
    let mut ranges = Vec::new();
    let mut at = whole.offset;
    while at < whole.end()
        && let Some((start, end)) = file.next_data(at)?.filter(|&(start, _)| start < whole.end())
    {
        ranges.push((start, end.min(whole.end())));
        at = end;
    }
    if let Some(overlay) = overlay {
        ranges.extend(overlay.map.overlapping(whole).iter().map(|piece| (piece.extent.offset, piece.extent.end())));
    }
    for (start, end) in ranges {
        let mut from = whole.offset + (start - whole.offset) / TABLE_PAGE * TABLE_PAGE;
        while from < end {
            let len = TABLE_STEP.min(end.next_multiple_of(TABLE_PAGE).min(whole.end()) - from);
            let piece = read_through(file, overlay, from, len as usize).await?;
            bat::load_pages(&mut table, from - whole.offset, &piece);
            from += len;
        }
    }
    Ok(table)
}

/// The valid header with the larger sequence, and which of the two it is.
pub(in crate::disk) async fn read_headers<F: File>(file: &F) -> io::Result<Result<(Header, usize), &'static str>> {
    let first = Header::decode(&file.read_at(HEADER_AT[0], HEADER_LEN).await?);
    let second = Header::decode(&file.read_at(HEADER_AT[1], HEADER_LEN).await?);
    Ok(match (first, second) {
        (Some(a), Some(b)) if a.sequence == b.sequence && a != b => Err("both headers claim to be the newest and differ"),
        (Some(a), Some(b)) if b.sequence > a.sequence => Ok((b, 1)),
        (Some(a), _) => Ok((a, 0)),
        (None, Some(b)) => Ok((b, 1)),
        (None, None) => Err("neither header is valid"),
    })
}

/// What the log asks to be changed; `None` if it is empty.
pub(in crate::disk) async fn read_log<F: File>(
    file: &F,
    header: &Header,
    file_len: u64,
) -> io::Result<Result<Option<Replay>, &'static str>> {
    let len = u64::from(header.log_len);
    let whole = header.log_at >= MIB && header.log_at.is_multiple_of(MIB) && len.is_multiple_of(MIB);
    if !whole || header.log_at.checked_add(len).is_none_or(|end| end > file_len) {
        return Ok(Err("the log lies outside the file or is not aligned to 1 MiB"));
    }
    if header.log.is_nil() || len == 0 {
        return Ok(Ok(None));
    }
    if header.log_len > LOG_LEN_MAX {
        return Ok(Err("the log is not empty and larger than 64 MiB: open the image once with its own hypervisor"));
    }
    let ring = file.read_at(header.log_at, len as usize).await?;
    Ok(match log::replay(&ring, header.log) {
        Ok(Some(replay)) if replay.changes.iter().any(|c| c.touches(0, REGION_AT[0]) || c.touches(header.log_at, len)) => {
            Err("the log changes the headers or itself")
        }
        Ok(Some(replay)) if replay.changes.iter().any(|c| c.is_past(replay.last_len.max(file_len))) => {
            Err("the log changes something past the end of the file")
        }
        Ok(Some(replay)) if replay.flushed_len > file_len => Err("the file was cut: its log says that it was longer"),
        Ok(Some(replay)) if replay.last_len > file_len.saturating_add(replay_growth_max(file_len)) => {
            Err("the log wants the file to be longer than is plausible")
        }
        other => other,
    })
}

/// A log can announce growth by the blocks it places; hostile ones announce exabytes.
fn replay_growth_max(file_len: u64) -> u64 {
    file_len.max(64 << 30)
}
