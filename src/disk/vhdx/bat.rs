//! The block allocation table of a VHDX: where each payload block stands. Pure: returns orders, writes nothing.
//!
//! An entry is u64: bits 0-2 state, bits 20-63 place in MiB. After every `2^23 * sector / block` payload entries stands one
//! entry of a sector bitmap ([MS-VHDX] 2.5).

use super::format::{MIB, Metadata};
use crate::disk::places::{PAGE_ENTRIES, Page, Places, Table};

const STATE_MASK: u64 = 7;
/// In the state field of an entry.
pub mod state {
    /// Nothing here: zeroes, or the parent's content.
    pub const NOT_PRESENT: u64 = 0;
    /// Anything may be read.
    pub const UNDEFINED: u64 = 1;
    /// Zeroes.
    pub const ZERO: u64 = 2;
    /// Was given back by the guest: zeroes.
    pub const UNMAPPED: u64 = 3;
    /// The whole block is here; of a bitmap entry: the bitmap is here.
    pub const PRESENT: u64 = 6;
    /// Some sectors are here, the others in the parent.
    pub const PARTIAL: u64 = 7;
}
/// Bytes of the table that are written at once; a torn write leaves old and new entries, each valid.
pub const TABLE_PAGE: u64 = 4096;

/// What the table's shape follows from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Bytes of the virtual disk.
    pub size: u64,
    /// Bytes of a payload block.
    pub block: u64,
    /// Bytes of a logical sector.
    pub sector: u64,
    /// A differencing disk: bitmaps and partially present blocks are legal.
    pub differencing: bool,
}

impl Geometry {
    /// The shape of the table of an image.
    pub fn of(metadata: &Metadata) -> Self {
        let (block, sector) = (u64::from(metadata.block_size), u64::from(metadata.logical_sector));
        Self { size: metadata.size, block, sector, differencing: metadata.parent.is_some() }
    }

    /// Payload entries between two bitmap entries.
    pub fn ratio(&self) -> u64 {
        (1 << 23) * self.sector / self.block
    }

    /// Number of payload blocks.
    pub fn blocks(&self) -> u64 {
        self.size.div_ceil(self.block)
    }

    /// Number of table entries.
    pub fn entries(&self) -> u64 {
        let (blocks, ratio) = (self.blocks(), self.ratio());
        if self.differencing { blocks.div_ceil(ratio) * (ratio + 1) } else { blocks + blocks.saturating_sub(1) / ratio }
    }

    /// Index of a payload block's entry.
    pub fn index(&self, number: u64) -> u64 {
        number + number / self.ratio()
    }

    /// Index of the entry of the bitmap that covers a payload block.
    pub fn bitmap_index(&self, number: u64) -> u64 {
        number / self.ratio() * (self.ratio() + 1) + self.ratio()
    }

    /// The payload block of an entry; `None` for a bitmap's.
    pub fn number(&self, index: u64) -> Option<u64> {
        let (chunk, within) = (index / (self.ratio() + 1), index % (self.ratio() + 1));
        (within < self.ratio()).then_some(chunk * self.ratio() + within)
    }
}

/// Something wrong with one entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadEntry {
    /// What.
    pub what: &'static str,
    /// Index of the entry.
    pub index: u64,
}

/// The table of one image.
#[derive(Debug)]
pub struct Bat {
    geometry: Geometry,
    table: Table,
    places: Places,
}

impl Bat {
    /// The table of a new image whose payload may begin at `data_at`.
    pub fn new(geometry: Geometry, data_at: u64) -> Self {
        Self { geometry, table: Table::default(), places: Places::new(geometry.block, data_at) }
    }

    /// The table of an existing image of `file_len` bytes. `reserved` are the ranges that no block may touch, as first byte
    /// and length.
    ///
    /// # Errors
    /// The first entry that is wrong.
    pub fn load(table: Table, geometry: Geometry, file_len: u64, reserved: &[(u64, u64)]) -> Result<Self, BadEntry> {
        if let Some(bad) = faults(&table, geometry, file_len, reserved).next() {
            return Err(bad);
        }
        let used: Vec<u64> = payload(&table, geometry).filter(|(_, _, s, _)| is_here(*s)).map(|(_, _, _, at)| at).collect();
        let data_at = reserved.iter().map(|&(at, len)| at + len).max().unwrap_or(MIB);
        let places = Places::of(used, geometry.block, data_at).map_err(|at| {
            let index = payload(&table, geometry).filter(|(_, _, s, place)| is_here(*s) && *place == at).map(|(index, ..)| index).last();
            BadEntry { what: "two blocks overlap", index: index.unwrap_or_default() }
        })?;
        Ok(Self { geometry, table, places })
    }

    /// State of a block and where it stands.
    pub fn entry(&self, number: u64) -> (u64, u64) {
        split(self.table.get(self.geometry.index(number)))
    }

    /// Where a block's payload stands, if it has one.
    pub fn place_of(&self, number: u64) -> Option<u64> {
        let (state, at) = self.entry(number);
        is_here(state).then_some(at)
    }

    /// Where the bitmap of a partially present block stands.
    pub fn bitmap_of(&self, number: u64) -> u64 {
        split(self.table.get(self.geometry.bitmap_index(number))).1
    }

    /// The first block from `number` on that is not simply zero (or, in a differencing disk, the parent's).
    pub fn next_placed(&self, number: u64) -> Option<u64> {
        let here = |(index, entry): (u64, u64)| self.geometry.number(index).filter(|_| is_here(split(entry).0));
        self.table.iter_from(self.geometry.index(number)).find_map(here)
    }

    /// The places of the blocks.
    pub fn places(&mut self) -> &mut Places {
        &mut self.places
    }

    /// Gives a reserved place, which reads as zeroes, to a block that has none.
    pub fn assign(&mut self, number: u64, at: u64) {
        debug_assert!(self.place_of(number).is_none(), "a block is placed once");
        self.table.set(self.geometry.index(number), (at / MIB) << 20 | state::PRESENT);
    }

    /// Makes a block zero. Its place is free after the next barrier.
    pub fn clear(&mut self, number: u64) {
        if let Some(at) = self.place_of(number) {
            self.table.set(self.geometry.index(number), state::ZERO);
            self.places.release(at);
        }
    }

    /// First byte after everything placed.
    pub fn end(&self) -> u64 {
        self.places.end()
    }

    /// The disk became larger. The table's region must have room.
    pub fn grow(&mut self, size: u64) {
        debug_assert!(size >= self.geometry.size && !self.geometry.differencing, "disks do not shrink");
        self.geometry.size = size;
    }

    /// The table's shape.
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// The pages of the table that changed, as (offset in the table, bytes). Taken when a barrier begins.
    pub fn take_dirty(&mut self) -> Vec<(u64, Vec<u8>)> {
        self.table.take_dirty().into_iter().map(|(number, page)| (number * TABLE_PAGE, encode_page(&page))).collect()
    }

    /// What was cleared before the barrier may be used again.
    pub fn barrier_done(&mut self) {
        self.places.barrier_done();
    }
}

/// Adds a piece of the table, which begins at a multiple of [`TABLE_PAGE`] bytes into it.
pub fn load_pages(table: &mut Table, first_byte: u64, bytes: &[u8]) {
    for (i, raw) in bytes.chunks(TABLE_PAGE as usize).enumerate() {
        let mut page: Page = Box::new([0; PAGE_ENTRIES]);
        for (entry, raw) in page.iter_mut().zip(raw.chunks_exact(8)) {
            *entry = u64::from_le_bytes(*raw.first_chunk().expect("chunks of eight"));
        }
        table.load(first_byte / TABLE_PAGE + i as u64, page);
    }
}

fn encode_page(page: &Page) -> Vec<u8> {
    page.iter().flat_map(|entry| entry.to_le_bytes()).collect()
}

/// Every entry that breaks a rule by itself; overlaps between blocks are not looked for.
pub fn faults<'a>(table: &'a Table, geometry: Geometry, file_len: u64, reserved: &'a [(u64, u64)]) -> impl Iterator<Item = BadEntry> + 'a {
    let place_fault = move |at: u64, len: u64| {
        if at < MIB || at.checked_add(len).is_none_or(|end| end > file_len) {
            return Some("a block lies outside the file");
        }
        let overlaps = reserved.iter().any(|&(start, length)| at < start + length && start < at + len);
        overlaps.then_some("a block overlaps a structure of the file")
    };
    let payload_faults = payload(table, geometry).filter_map(move |(index, number, state, at)| {
        let what = match state {
            // Some writers end the file within the block that holds the end of the disk.
            state::PRESENT => place_fault(at, geometry.block.min(geometry.size - number * geometry.block)),
            state::PARTIAL if geometry.differencing => {
                let (bitmap, _) = split(table.get(geometry.bitmap_index(number)));
                if bitmap == state::PRESENT { place_fault(at, geometry.block) } else { Some("a partially present block has no bitmap") }
            }
            state::NOT_PRESENT..=state::UNMAPPED => None,
            _ => Some("a block has a state that this kind of image must not have"),
        };
        Some(BadEntry { what: what?, index })
    });
    let bitmaps = table.iter_from(0).filter(move |&(index, _)| index < geometry.entries() && geometry.number(index).is_none());
    let bitmap_faults = bitmaps.filter_map(move |(index, entry)| {
        let what = match split(entry) {
            (state::PRESENT, at) if geometry.differencing => place_fault(at, MIB),
            (state::NOT_PRESENT, _) => None,
            _ => Some("a bitmap entry has a state that this kind of image must not have"),
        };
        Some(BadEntry { what: what?, index })
    });
    payload_faults.chain(bitmap_faults)
}

/// Entries of payload blocks that are not zero: index, block, state, place.
pub fn payload(table: &Table, geometry: Geometry) -> impl Iterator<Item = (u64, u64, u64, u64)> + '_ {
    table.iter_from(0).filter_map(move |(index, entry)| {
        let number = geometry.number(index).filter(|&n| n < geometry.blocks())?;
        let (state, at) = split(entry);
        Some((index, number, state, at))
    })
}

/// Whether a block in this state has bytes in the file.
pub fn is_here(state: u64) -> bool {
    matches!(state, state::PRESENT | state::PARTIAL)
}

/// State and place of an entry.
pub fn split(entry: u64) -> (u64, u64) {
    // 44 bits of MiB: hostile ones saturate, and then lie outside every file.
    (entry & STATE_MASK, (entry >> 20).saturating_mul(MIB))
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    const GEOMETRY: Geometry = Geometry { size: 6000 * MIB, block: MIB, sector: 512, differencing: false };

    fn table_of(bytes: &[u8]) -> Table {
        let mut table = Table::default();
        load_pages(&mut table, 0, bytes);
        table
    }

    proptest! {
        #[test]
        fn blocks_never_share_a_place_and_the_table_says_where_they_are(ops in proptest::collection::vec((0u64..6000, 0u8..4), 1..300)) {
            let mut bat = Bat::new(GEOMETRY, 4 * MIB);
            let mut durable = vec![0u8; (GEOMETRY.entries() * 8).next_multiple_of(TABLE_PAGE) as usize];
            let mut durable_places: HashMap<u64, u64> = HashMap::new();
            for (number, op) in ops {
                match op {
                    0 | 1 if bat.place_of(number).is_none() => {
                        let placed = bat.places().reserve();
                        bat.assign(number, placed.at);
                        // A place whose owner in the durable table still refers to it must never be handed out.
                        prop_assert!(!durable_places.values().any(|&at| at == placed.at));
                    }
                    2 => bat.clear(number),
                    3 => {
                        for (at, page) in bat.take_dirty() {
                            durable[at as usize..at as usize + page.len()].copy_from_slice(&page);
                        }
                        bat.barrier_done();
                        let loaded = Bat::load(table_of(&durable), GEOMETRY, bat.end(), &[(0, 4 * MIB)]).expect("the durable table is always legal");
                        durable_places = (0..6000).filter_map(|n| Some((n, loaded.place_of(n)?))).collect();
                        for n in 0..6000 {
                            prop_assert_eq!(loaded.place_of(n), bat.place_of(n));
                        }
                    }
                    _ => {}
                }
            }
        }

        #[test]
        fn indices_of_blocks_and_bitmaps_never_meet(number in 0u64..1 << 26, block in 0u32..9, sector in 0usize..2, differencing in any::<bool>()) {
            let geometry = Geometry { size: 64 << 40, block: MIB << block, sector: [512, 4096][sector], differencing };
            let number = number % geometry.blocks();
            prop_assert_eq!(geometry.number(geometry.index(number)), Some(number));
            prop_assert_eq!(geometry.number(geometry.bitmap_index(number)), None);
            prop_assert!(geometry.index(number) < geometry.entries());
            prop_assert!(!differencing || geometry.bitmap_index(number) < geometry.entries());
        }
    }

    #[test]
    fn the_bitmap_entry_after_each_chunk_is_skipped() {
        assert_eq!(GEOMETRY.index(4095), 4095);
        assert_eq!(GEOMETRY.index(4096), 4097);
        assert_eq!(GEOMETRY.bitmap_index(4095), 4096);
    }

    #[test]
    fn tables_of_hostile_images_are_refused() {
        let entry = |mib: u64, state: u64| (mib << 20 | state).to_le_bytes();
        let geometry = Geometry { size: 4 * MIB, ..GEOMETRY };
        let load = |entries: &[[u8; 8]]| Bat::load(table_of(&entries.concat()), geometry, 10 * MIB, &[(0, 4 * MIB)]).map(|_| ());
        assert!(load(&[entry(5, 6), entry(6, 6), entry(0, 2), entry(0, 0)]).is_ok());
        assert!(load(&[entry(5, 6), entry(5, 6), entry(0, 0), entry(0, 0)]).is_err(), "two blocks in one place");
        assert!(load(&[entry(10, 6), entry(0, 0), entry(0, 0), entry(0, 0)]).is_err(), "past the end");
        assert!(load(&[entry(2, 6), entry(0, 0), entry(0, 0), entry(0, 0)]).is_err(), "over the structures");
        assert!(load(&[entry(5, 7), entry(0, 0), entry(0, 0), entry(0, 0)]).is_err(), "partially present");
        assert!(load(&[entry(5, 4), entry(0, 0), entry(0, 0), entry(0, 0)]).is_err(), "a reserved state");
        assert!(load(&[entry(u64::MAX >> 20, 6), entry(0, 0), entry(0, 0), entry(0, 0)]).is_err(), "wraps");
    }

    #[test]
    fn a_disk_of_64_tib_takes_memory_for_what_is_touched_only() {
        let geometry = Geometry { size: 64 << 40, block: MIB, sector: 512, differencing: false };
        let mut bat = Bat::new(geometry, 1 << 30);
        let placed = bat.places().reserve();
        bat.assign(geometry.blocks() - 1, placed.at);
        assert_eq!(bat.next_placed(0), Some(geometry.blocks() - 1));
        assert_eq!(bat.take_dirty().len(), 1);
    }
}
