//! Decides where payload blocks stand and what the block allocation table says. Pure: returns orders, writes nothing.
//!
//! A block goes `zero -> placed (RAM) -> [data durable] -> in the table -> [table durable]`, and back
//! `present -> zero in the table -> [table durable] -> free`. States that are only in RAM vanish in a crash: a leak at
//! most, never two blocks in one place.
//!
//! An entry is u64: bits 0-2 state (0 not present, 2 zero, 6 present), bits 20-63 place in MiB. After every
//! `2^23 * sector / block` payload entries stands one entry of a sector bitmap, unused here ([MS-VHDX] 2.5).

use std::collections::{BTreeSet, VecDeque};

use super::format::MIB;

const STATE_MASK: u64 = 7;
const ZERO: u64 = 2;
const PRESENT: u64 = 6;
/// Bytes of the table that are written at once; a torn write leaves old and new entries, each valid.
pub const TABLE_PAGE: u64 = 4096;

/// The table of one image.
#[derive(Debug)]
pub struct Bat {
    entries: Vec<u64>,
    ratio: u64,
    block: u64,
    blocks: u64,
    dirty_pages: BTreeSet<u64>,
    free: VecDeque<u64>,
    free_after_barrier: Vec<u64>,
    /// First byte after the last block that is or was placed.
    end: u64,
}

/// Number of table entries of a disk, and the chunk ratio.
pub fn entries_needed(size: u64, block: u64, sector: u64) -> (u64, u64) {
    let ratio = (1 << 23) * sector / block;
    let blocks = size.div_ceil(block);
    (blocks + blocks.saturating_sub(1) / ratio, ratio)
}

impl Bat {
    /// The table of a new image whose payload may begin at `data_at`.
    pub fn new(size: u64, block: u64, sector: u64, data_at: u64) -> Self {
        let (count, ratio) = entries_needed(size, block, sector);
        Self {
            entries: vec![0; count as usize],
            ratio,
            block,
            blocks: size.div_ceil(block),
            dirty_pages: BTreeSet::new(),
            free: VecDeque::new(),
            free_after_barrier: Vec::new(),
            end: data_at,
        }
    }

    /// The table of an existing image. `reserved` are the ranges that no block may touch.
    ///
    /// # Errors
    /// What is wrong, and the index of the entry.
    pub fn load(bytes: &[u8], geometry: (u64, u64, u64), file_len: u64, reserved: &[(u64, u64)]) -> Result<Self, (&'static str, u64)> {
        let (size, block, sector) = geometry;
        let data_at = reserved.iter().map(|&(at, len)| at + len).max().unwrap_or(MIB);
        let mut bat = Self::new(size, block, sector, data_at);
        for (entry, raw) in bat.entries.iter_mut().zip(bytes.chunks_exact(8)) {
            *entry = u64::from_le_bytes(*raw.first_chunk().expect("chunks of eight"));
        }
        let mut used = BTreeSet::new();
        for number in 0..bat.blocks {
            let index = bat.index(number);
            let entry = bat.entries[index];
            match entry & STATE_MASK {
                PRESENT => {}
                0..=3 => continue,
                _ => return Err(("a block has a state that a dynamic image must not have", index as u64)),
            }
            let at = (entry >> 20) * MIB;
            if at < MIB || at.checked_add(block).is_none_or(|end| end > file_len) {
                return Err(("a block lies outside the file", index as u64));
            }
            if reserved.iter().any(|&(start, len)| at < start + len && start < at + block) {
                return Err(("a block overlaps a structure of the file", index as u64));
            }
            let before = used.range(..=at).next_back().is_some_and(|&other: &u64| other + block > at);
            let after = used.range(at..).next().is_some_and(|&other| at + block > other);
            if before || after {
                return Err(("two blocks overlap", index as u64));
            }
            used.insert(at);
        }
        bat.find_free(&used, data_at);
        Ok(bat)
    }

    fn find_free(&mut self, used: &BTreeSet<u64>, data_at: u64) {
        let mut at = data_at;
        for &start in used {
            while at + self.block <= start {
                self.free.push_back(at);
                at += self.block;
            }
            at = at.max(start + self.block);
        }
        self.end = at;
    }

    /// Where a block's payload stands, if it has one.
    pub fn place_of(&self, number: u64) -> Option<u64> {
        let entry = self.entries[self.index(number)];
        (entry & STATE_MASK == PRESENT).then_some((entry >> 20) * MIB)
    }

    /// Reserves a place. Reused ones come first and must be cleared before they are given to a block.
    pub fn reserve(&mut self) -> Placed {
        match self.free.pop_front() {
            Some(at) => Placed { at, reused: true },
            None => {
                self.end += self.block;
                Placed { at: self.end - self.block, reused: false }
            }
        }
    }

    /// Gives a reserved place, which reads as zeroes, to a block that has none.
    pub fn assign(&mut self, number: u64, at: u64) {
        debug_assert!(self.place_of(number).is_none(), "a block is placed once");
        self.set(number, (at / MIB) << 20 | PRESENT);
    }

    /// Takes back a reserved place that could not be made ready.
    pub fn give_back(&mut self, at: u64) {
        self.free.push_front(at);
    }

    /// Makes a block zero. Its place is free after the next barrier.
    pub fn clear(&mut self, number: u64) {
        if let Some(at) = self.place_of(number) {
            self.set(number, ZERO);
            self.free_after_barrier.push(at);
        }
    }

    /// First byte after everything placed.
    pub fn end(&self) -> u64 {
        self.end
    }

    /// Number of payload blocks.
    pub fn blocks(&self) -> u64 {
        self.blocks
    }

    /// The pages of the table that changed, as (offset in the table, bytes). Taken when a barrier begins.
    pub fn take_dirty(&mut self) -> Vec<(u64, Vec<u8>)> {
        let per_page = (TABLE_PAGE / 8) as usize;
        std::mem::take(&mut self.dirty_pages)
            .into_iter()
            .map(|page| {
                let first = page as usize * per_page;
                let mut bytes: Vec<u8> = self.entries[first..].iter().take(per_page).flat_map(|e| e.to_le_bytes()).collect();
                bytes.resize(TABLE_PAGE as usize, 0);
                (page * TABLE_PAGE, bytes)
            })
            .collect()
    }

    /// What was cleared before the barrier may be used again.
    pub fn barrier_done(&mut self) {
        self.free.extend(self.free_after_barrier.drain(..));
    }

    /// Bytes of the table.
    pub fn table_len(&self) -> u64 {
        self.entries.len() as u64 * 8
    }

    fn index(&self, number: u64) -> usize {
        (number + number / self.ratio) as usize
    }

    fn set(&mut self, number: u64, entry: u64) {
        let index = self.index(number);
        self.entries[index] = entry;
        self.dirty_pages.insert(index as u64 * 8 / TABLE_PAGE);
    }
}

/// Where a block goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Placed {
    /// First byte in the file.
    pub at: u64,
    /// It held another block once; its bytes must be cleared first.
    pub reused: bool,
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn blocks_never_share_a_place_and_the_table_says_where_they_are(ops in proptest::collection::vec((0u64..6000, 0u8..4), 1..300)) {
            let (size, block) = (6000 * MIB, MIB);
            let mut bat = Bat::new(size, block, 512, 4 * MIB);
            let mut durable = vec![0u8; bat.table_len().next_multiple_of(TABLE_PAGE) as usize];
            let mut durable_places: HashMap<u64, u64> = HashMap::new();
            for (number, op) in ops {
                match op {
                    0 | 1 if bat.place_of(number).is_none() => {
                        let placed = bat.reserve();
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
                        let loaded = Bat::load(&durable, (size, block, 512), bat.end(), &[(0, 4 * MIB)]).expect("the durable table is always legal");
                        durable_places = (0..6000).filter_map(|n| Some((n, loaded.place_of(n)?))).collect();
                        for n in 0..6000 {
                            prop_assert_eq!(loaded.place_of(n), bat.place_of(n));
                        }
                    }
                    _ => {}
                }
            }
        }
    }

    #[test]
    fn the_bitmap_entry_after_each_chunk_is_skipped() {
        let mut bat = Bat::new(10_000 * MIB, MIB, 512, 4 * MIB);
        for number in [4095, 4096] {
            let placed = bat.reserve();
            bat.assign(number, placed.at);
        }
        assert_eq!(bat.index(4095), 4095);
        assert_eq!(bat.index(4096), 4097);
        assert_eq!(bat.entries[4096], 0);
    }

    #[test]
    fn tables_of_hostile_images_are_refused() {
        let entry = |mib: u64, state: u64| (mib << 20 | state).to_le_bytes();
        let load = |entries: &[[u8; 8]]| Bat::load(&entries.concat(), (4 * MIB, MIB, 512), 10 * MIB, &[(0, 4 * MIB)]).map(|_| ());
        assert!(load(&[entry(5, 6), entry(6, 6), entry(0, 2), entry(0, 0)]).is_ok());
        assert!(load(&[entry(5, 6), entry(5, 6), entry(0, 0), entry(0, 0)]).is_err(), "two blocks in one place");
        assert!(load(&[entry(10, 6), entry(0, 0), entry(0, 0), entry(0, 0)]).is_err(), "past the end");
        assert!(load(&[entry(2, 6), entry(0, 0), entry(0, 0), entry(0, 0)]).is_err(), "over the structures");
        assert!(load(&[entry(5, 7), entry(0, 0), entry(0, 0), entry(0, 0)]).is_err(), "partially present");
        assert!(load(&[entry(u64::MAX >> 20, 6), entry(0, 0), entry(0, 0), entry(0, 0)]).is_err(), "wraps");
    }
}
