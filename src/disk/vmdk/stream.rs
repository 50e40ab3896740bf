//! Writes a streamOptimized VMDK: compressed grains in ascending order, tables behind them, a footer at the end. The form that
//! ESXi imports (as part of an OVF package) and that is smallest to send. Written once; never changed.
//!
//! header (version 3, directory at the end) · descriptor · {marker, zlib grain}... · table marker, table ... · directory
//! marker, directory · footer marker, footer · end marker. A grain of zeroes is left out.

use std::cell::Cell;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use flate2::Compression;
use flate2::write::ZlibEncoder;
use tokio::sync::Mutex;

use super::descriptor::Kind;
use super::format::{
    DESCRIPTOR_AT, DESCRIPTOR_SECTORS, FLAG_COMPRESSED, FLAG_MARKERS, FLAG_NEWLINE, GD_AT_END, GRAIN_SECTORS, Header, Marker, SECTOR,
    TABLE_ENTRIES, TABLE_SECTORS, grain_marker,
};
use super::sparse::own_descriptor;
use crate::disk::DiskError;
use crate::storage::{AlignedBuf, File};

const GRAIN_BYTES: u64 = GRAIN_SECTORS * SECTOR;
/// Sectors before the first grain.
const OVERHEAD: u64 = 128;
/// Bytes written at once.
const WRITE_BYTES: usize = 1 << 20;

/// A stream that is being written.
pub struct Stream<F> {
    path: PathBuf,
    file: F,
    size: u64,
    state: Mutex<State>,
    failed: Cell<bool>,
}

struct State {
    /// Grain that is being filled.
    grain: u64,
    filling: Vec<u8>,
    touched: bool,
    /// Entries of the table that is being filled, and its number.
    table: Vec<u32>,
    table_number: u64,
    directory: Vec<u32>,
    /// Bytes that wait to be written, and where they go.
    out: Vec<u8>,
    out_at: u64,
}

impl State {
    fn position(&self) -> u64 {
        self.out_at + self.out.len() as u64
    }

    fn pad(&mut self) {
        let len = self.out.len().next_multiple_of(SECTOR as usize);
        self.out.resize(len, 0);
    }
}

impl<F: File> Stream<F> {
    /// Begins a stream in an empty file.
    ///
    /// # Errors
    /// [`DiskError::Size`].
    pub fn create(path: &Path, file: F, size: u64) -> Result<Self, DiskError> {
        let sectors = size / SECTOR;
        if size == 0 || !size.is_multiple_of(SECTOR) || sectors > u64::from(u32::MAX) - 1 {
            let why = "the size must be a positive multiple of 512 below 2 TiB";
            return Err(DiskError::Size { size, format: "vmdk-stream", why });
        }
        let header = Self::header(sectors, GD_AT_END);
        let mut out = header.encode().to_vec();
        out.extend_from_slice(own_descriptor(path, sectors, Kind::StreamOptimized).encode().as_bytes());
        out.resize((OVERHEAD * SECTOR) as usize, 0);
        let state = State {
            grain: 0,
            filling: vec![0; GRAIN_BYTES as usize],
            touched: false,
            table: vec![0; TABLE_ENTRIES as usize],
            table_number: 0,
            directory: vec![0; header.tables() as usize],
            out,
            out_at: 0,
        };
        Ok(Self { path: path.to_owned(), file, size, state: Mutex::new(state), failed: Cell::new(false) })
    }

    fn header(sectors: u64, gd_at: u64) -> Header {
        Header {
            version: 3,
            flags: FLAG_NEWLINE | FLAG_COMPRESSED | FLAG_MARKERS,
            capacity: sectors,
            grain: GRAIN_SECTORS,
            descriptor_at: DESCRIPTOR_AT,
            descriptor_len: DESCRIPTOR_SECTORS,
            rgd_at: 0,
            gd_at,
            overhead: OVERHEAD,
            unclean: false,
        }
    }

    pub(in crate::disk) fn size(&self) -> u64 {
        self.size
    }

    pub(in crate::disk) fn only_written(&self) -> DiskError {
        DiskError::Unsupported { path: self.path.clone(), what: "a stream that is being written is not read or changed" }
    }

    /// Adds bytes; offsets must not go back behind a grain that was finished.
    pub(in crate::disk) async fn write(&self, offset: u64, data: &[u8]) -> Result<(), DiskError> {
        let mut state = self.state.lock().await;
        if offset / GRAIN_BYTES < state.grain {
            return Err(DiskError::Unsupported { path: self.path.clone(), what: "a stream is written from its beginning to its end" });
        }
        let mut done = 0;
        while done < data.len() {
            let at = offset + done as u64;
            if at / GRAIN_BYTES != state.grain {
                self.end_grain(&mut state).await?;
                state.grain = at / GRAIN_BYTES;
            }
            let within = (at % GRAIN_BYTES) as usize;
            let len = (GRAIN_BYTES as usize - within).min(data.len() - done);
            state.filling[within..within + len].copy_from_slice(&data[done..done + len]);
            state.touched = true;
            done += len;
        }
        Ok(())
    }

    /// Writes tables, directory, footer and end mark, durably. The file is a disk only now.
    pub(in crate::disk) async fn finish(&self) -> Result<(), DiskError> {
        let mut state = self.state.lock().await;
        self.end_grain(&mut state).await?;
        self.end_table(&mut state).await?;
        let directory: Vec<u8> = state.directory.iter().flat_map(|entry| entry.to_le_bytes()).collect();
        let sectors = (directory.len() as u64).div_ceil(SECTOR);
        state.out.extend_from_slice(&Marker::Directory.encode(sectors));
        let gd_at = state.position() / SECTOR;
        state.out.extend_from_slice(&directory);
        state.pad();
        state.out.extend_from_slice(&Marker::Footer.encode(1));
        let footer = Self::header(self.size / SECTOR, gd_at);
        state.out.extend_from_slice(&footer.encode());
        state.out.extend_from_slice(&Marker::End.encode(0));
        self.flush(&mut state, 0).await?;
        self.file.sync_data().await.map_err(|e| self.io(e))
    }

    async fn end_grain(&self, state: &mut State) -> Result<(), DiskError> {
        let grain = state.grain;
        if !std::mem::take(&mut state.touched) {
            return Ok(());
        }
        let zero = state.filling.iter().all(|&b| b == 0);
        if !zero {
            if grain / TABLE_ENTRIES != state.table_number {
                self.end_table(state).await?;
                state.table_number = grain / TABLE_ENTRIES;
            }
            let start = state.position();
            if start / SECTOR > u64::from(u32::MAX) {
                return Err(DiskError::Size { size: self.size, format: "vmdk-stream", why: "the stream grew beyond 2 TiB" });
            }
            state.table[(grain % TABLE_ENTRIES) as usize] = (start / SECTOR) as u32;
            let mut packer = ZlibEncoder::new(Vec::with_capacity(GRAIN_BYTES as usize / 2), Compression::fast());
            let packed = packer.write_all(&state.filling).and_then(|()| packer.finish()).map_err(|e| self.io(e))?;
            state.out.extend_from_slice(&grain_marker(grain * GRAIN_SECTORS, packed.len() as u32));
            state.out.extend_from_slice(&packed);
            state.pad();
            state.filling.fill(0);
            self.flush(state, WRITE_BYTES).await?;
        }
        Ok(())
    }

    async fn end_table(&self, state: &mut State) -> Result<(), DiskError> {
        if state.table.iter().all(|&entry| entry == 0) {
            return Ok(());
        }
        let bytes: Vec<u8> = state.table.iter().flat_map(|entry| entry.to_le_bytes()).collect();
        state.table.fill(0);
        state.out.extend_from_slice(&Marker::Table.encode(TABLE_SECTORS));
        let number = state.table_number as usize;
        state.directory[number] = (state.position() / SECTOR) as u32;
        state.out.extend_from_slice(&bytes);
        self.flush(state, WRITE_BYTES).await
    }

    /// Writes what waits if it is at least so long.
    async fn flush(&self, state: &mut State, at_least: usize) -> Result<(), DiskError> {
        if self.failed.get() {
            return Err(self.io(io::Error::other("an earlier write of the stream failed")));
        }
        if state.out.len() < at_least.max(1) {
            return Ok(());
        }
        let bytes = AlignedBuf::copy_of(&state.out).freeze();
        let written = self.file.write_at(state.out_at, bytes).await;
        self.failed.set(written.is_err());
        written.map_err(|e| self.io(e))?;
        state.out_at += state.out.len() as u64;
        state.out.clear();
        Ok(())
    }

    fn io(&self, source: io::Error) -> DiskError {
        DiskError::Io { path: self.path.clone(), source }
    }
}
