//! Reads the structures of a sparse VMDK as they stand in the file, and judges their places.

use std::io;
use std::path::Path;

use super::descriptor::DESCRIPTOR_MAX;
use super::format::{GD_AT_END, Header, Marker, SECTOR, TABLE_ENTRIES, TABLE_SECTORS, decode_entries};
use super::grains::{layout_at, page_of};
use crate::disk::DiskError;
use crate::disk::places::Table;
use crate::storage::File;

/// Tables read at once, in sectors.
const TABLE_STEP: u64 = 2048;

/// The structures of a sparse file, as they stand, before their entries were judged.
pub(in crate::disk) struct Survey {
    pub header: Header,
    pub descriptor: Option<Vec<u8>>,
    pub table: Table,
    pub directory: Vec<u64>,
    pub(super) redundant: Vec<u64>,
    pub stale_copies: Vec<u64>,
    /// First sector after header, descriptor, directories and tables.
    pub structures_end: u64,
    /// Directories and tables stand together behind grains, where growing put them: first byte and end, in whole grains.
    pub moved: Option<(u64, u64)>,
}

impl Survey {
    /// Where the table entry of a grain stands in the file, in bytes.
    pub(in crate::disk) fn entry_at(&self, grain: u64) -> u64 {
        let table = self.directory.get((grain / TABLE_ENTRIES) as usize).copied().unwrap_or_default();
        table * SECTOR + grain % TABLE_ENTRIES * 4
    }
}

/// Reads the structures of a sparse file, with both copies of its tables.
///
/// # Errors
/// [`DiskError`].
pub(in crate::disk) async fn survey<F: File>(path: &Path, file: &F) -> Result<Survey, DiskError> {
    survey_tables(path, file, true).await
}

pub(super) async fn survey_tables<F: File>(path: &Path, file: &F, both: bool) -> Result<Survey, DiskError> {
    let io = |source| DiskError::Io { path: path.to_owned(), source };
    let corrupt = |offset, what| DiskError::Corrupt { path: path.to_owned(), offset, what };
    let file_len = file.len().map_err(io)?;
    if file_len < 2 * SECTOR {
        return Err(corrupt(0, "the file is too short for a sparse VMDK"));
    }
    let first = file.read_at(0, 512).await.map_err(io)?;
    let mut header = Header::decode(&first).map_err(|what| corrupt(0, what))?;
    if header.gd_at == GD_AT_END {
        let at = (file_len / SECTOR).checked_sub(3).ok_or_else(|| corrupt(0, "the stream has no footer: it was cut"))? * SECTOR;
        let tail = file.read_at(at, 1536).await.map_err(io)?;
        let (marker, footer, end) = (&tail[..512], &tail[512..1024], &tail[1024..]);
        if marker[..16] != Marker::Footer.encode(1)[..16] || end.iter().any(|&b| b != 0) {
            return Err(corrupt(at, "the stream has no footer or no end mark: it was cut"));
        }
        header = Header::decode(footer).map_err(|what| corrupt(at + SECTOR, what))?;
    }
    if header.gd_at == GD_AT_END || !file_holds(file_len, header.gd_at, header.directory_sectors()) {
        return Err(corrupt(56, "the grain directory lies outside the file"));
    }
    if header.overhead > file_len / SECTOR {
        return Err(corrupt(64, "the file ends before its first grain"));
    }
    let descriptor_bytes = header.descriptor_len.saturating_mul(SECTOR);
    let descriptor = if header.descriptor_at == 0 {
        None
    } else if descriptor_bytes > DESCRIPTOR_MAX as u64 || !file_holds(file_len, header.descriptor_at, header.descriptor_len) {
        return Err(corrupt(28, "the descriptor lies outside the file or is longer than 64 KiB"));
    } else {
        Some(file.read_at(header.descriptor_at * SECTOR, descriptor_bytes as usize).await.map_err(io)?.to_vec())
    };
    let directory = read_directory(file, &header, header.gd_at).await.map_err(io)?;
    let table = read_tables(file, &directory, file_len).await.map_err(io)?;
    let table = table.map_err(|what| corrupt(header.gd_at * SECTOR, what))?;
    let (mut redundant, mut stale_copies) = (Vec::new(), Vec::new());
    if both && header.redundant() {
        if !file_holds(file_len, header.rgd_at, header.directory_sectors()) {
            return Err(corrupt(48, "the redundant grain directory lies outside the file"));
        }
        redundant = read_directory(file, &header, header.rgd_at).await.map_err(io)?;
        let copy = read_tables(file, &redundant, file_len).await.map_err(io)?;
        let copy = copy.map_err(|what| corrupt(header.rgd_at * SECTOR, what))?;
        stale_copies = (0..header.tables()).filter(|&n| !table.same_page(&copy, n)).collect();
    }
    let mut structures = vec![(0, 1), (header.gd_at, header.directory_sectors())];
    if descriptor.is_some() {
        structures.push((header.descriptor_at, header.descriptor_len));
    }
    structures.extend(directory.iter().filter(|&&at| at != 0).map(|&at| (at, TABLE_SECTORS)));
    if !redundant.is_empty() {
        structures.push((header.rgd_at, header.directory_sectors()));
        structures.extend(redundant.iter().filter(|&&at| at != 0).map(|&at| (at, TABLE_SECTORS)));
    }
    structures.sort_unstable();
    if let Some(pair) = structures.windows(2).find(|pair| pair[0].0 + pair[0].1 > pair[1].0) {
        return Err(corrupt(pair[1].0 * SECTOR, "two structures of the file overlap"));
    }
    let structures_end = structures.last().map_or(0, |&(at, len)| at + len);
    let moved = structures.iter().find(|&&(at, _)| at >= header.overhead).map(|&(at, _)| at).filter(|&start| {
        let own = |&&(at, _): &&(u64, u64)| at == 0 || at == header.descriptor_at;
        let as_we_grow = layout_at(&mut header.clone(), start);
        let ours = (header.rgd_at, header.gd_at) == (start, as_we_grow.0[0] - header.directory_sectors()) && as_we_grow.0 == directory;
        ours && (start - header.overhead).is_multiple_of(header.grain) && structures.iter().filter(|s| !own(s)).all(|&(at, _)| at >= start)
    });
    let moved = moved.map(|start| (start * SECTOR, (start + (structures_end - start).next_multiple_of(header.grain)) * SECTOR));
    Ok(Survey { header, descriptor, table, directory, redundant, stale_copies, structures_end, moved })
}

/// Reads whole sectors from `at` for `len` bytes, and no more than the file has: others do not always fill the last sector.
pub(super) async fn read_up_to<F: File>(file: &F, at: u64, len: u64, file_len: u64) -> io::Result<Vec<u8>> {
    let end = (at + len.next_multiple_of(SECTOR)).min(file_len);
    let whole = (end - at) / SECTOR * SECTOR;
    let mut bytes = file.read_at(at, whole as usize).await?.to_vec();
    if at + whole < end {
        bytes.extend_from_slice(&file.read_tail(at + whole, (end - at - whole) as usize).await?);
    }
    Ok(bytes)
}

fn file_holds(file_len: u64, at: u64, sectors: u64) -> bool {
    at > 0 && at.checked_add(sectors).and_then(|end| end.checked_mul(SECTOR)).is_some_and(|end| end <= file_len)
}

async fn read_directory<F: File>(file: &F, header: &Header, at: u64) -> io::Result<Vec<u64>> {
    let bytes = file.read_at(at * SECTOR, (header.directory_sectors() * SECTOR) as usize).await?;
    Ok(decode_entries(&bytes).take(header.tables() as usize).collect())
}

/// Reads those grain tables that the file holds data for; tables that follow each other are read together.
async fn read_tables<F: File>(file: &F, directory: &[u64], file_len: u64) -> io::Result<Result<Table, &'static str>> {
    let mut table = Table::default();
    let mut order: Vec<(u64, u64)> = directory.iter().copied().zip(0..).filter(|&(at, _)| at != 0).collect();
    order.sort_unstable();
    if order.windows(2).any(|pair| pair[1].0 - pair[0].0 < TABLE_SECTORS) {
        return Ok(Err("two grain tables overlap"));
    }
    let mut next = 0;
    while next < order.len() {
        let (first, _) = order[next];
        let mut count = 1;
        while count < TABLE_STEP / TABLE_SECTORS
            && order.get(next + count as usize).is_some_and(|&(at, _)| at == first + count * TABLE_SECTORS)
        {
            count += 1;
        }
        if !file_holds(file_len, first, count * TABLE_SECTORS) {
            return Ok(Err("a grain table lies outside the file"));
        }
        let (start, len) = (first * SECTOR, count * TABLE_SECTORS * SECTOR);
        if file.next_data(start)?.is_some_and(|(data, _)| data < start + len) {
            let bytes = file.read_at(start, len as usize).await?;
            for (raw, &(_, number)) in bytes.chunks_exact((TABLE_SECTORS * SECTOR) as usize).zip(&order[next..]) {
                table.load(number, page_of(raw));
            }
        }
        next += count as usize;
    }
    Ok(Ok(table))
}
