//! Where the grains of a sparse VMDK stand, and which tables must be written. Pure: returns orders, writes nothing.
//!
//! Every grain table exists from the start, so a directory entry never changes: other writers of the format put data at
//! garbage places when one is missing. A table entry is 4 bytes, so a torn sector holds old and new entries, each valid.

use super::format::{Header, SECTOR, TABLE_ENTRIES, TABLE_SECTORS};
use crate::disk::places::{Page, Places, Table};

/// Something wrong with one entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadGrain {
    /// What.
    pub what: &'static str,
    /// Number of the grain.
    pub grain: u64,
}

/// The grain tables of one extent.
#[derive(Debug)]
pub struct Grains {
    header: Header,
    table: Table,
    places: Places,
    /// First sector of each grain table, and of its second copy.
    directory: Vec<u64>,
    redundant: Vec<u64>,
}

impl Grains {
    /// The tables of a new extent, whose directories say where they stand.
    pub fn new(header: Header, directory: Vec<u64>, redundant: Vec<u64>) -> Self {
        let places = Places::new(header.grain * SECTOR, header.overhead * SECTOR);
        Self { header, table: Table::default(), places, directory, redundant }
    }

    /// The tables of an existing extent of `file_len` bytes. `moved` are bytes behind the overhead that hold no grains.
    ///
    /// # Errors
    /// The first entry that is wrong.
    pub fn load(
        header: Header,
        table: Table,
        directory: Vec<u64>,
        redundant: Vec<u64>,
        file_len: u64,
        moved: Option<(u64, u64)>,
    ) -> Result<Self, BadGrain> {
        if let Some(bad) = faults(&table, &header, file_len).next() {
            return Err(bad);
        }
        let places = if header.compressed() {
            Places::new(header.grain * SECTOR, file_len)
        } else {
            let mut used: Vec<u64> = placed(&table, &header).map(|(_, at)| at).collect();
            if let Some((start, end)) = moved {
                used.extend((start..end).step_by((header.grain * SECTOR) as usize));
            }
            Places::of(used, header.grain * SECTOR, header.overhead * SECTOR).map_err(|at| {
                let grain = placed(&table, &header).filter(|&(_, place)| place == at).map(|(grain, _)| grain).last();
                BadGrain { what: "two grains overlap", grain: grain.unwrap_or_default() }
            })?
        };
        Ok(Self { header, table, places, directory, redundant })
    }

    /// Where a grain stands in the file, in bytes, if it does.
    pub fn place_of(&self, grain: u64) -> Option<u64> {
        place(self.table.get(grain), &self.header)
    }

    /// Whether a grain hides the parent's content with zeroes.
    pub fn is_zero(&self, grain: u64) -> bool {
        self.header.flags & super::format::FLAG_ZERO_GRAIN != 0 && self.table.get(grain) == 1
    }

    /// The first grain from `grain` on that stands in the file.
    pub fn next_placed(&self, grain: u64) -> Option<u64> {
        self.table.iter_from(grain).find(|&(n, entry)| n < self.header.grains() && place(entry, &self.header).is_some()).map(|(n, _)| n)
    }

    /// Gives a reserved place, which reads as zeroes, to a grain that has none.
    pub fn assign(&mut self, grain: u64, at: u64) {
        debug_assert!(self.place_of(grain).is_none(), "a grain is placed once");
        self.table.set(grain, at / SECTOR);
    }

    /// Makes a grain zero. Its place is free after the next barrier.
    pub fn clear(&mut self, grain: u64) {
        if let Some(at) = self.place_of(grain) {
            self.table.set(grain, 0);
            self.places.release(at);
        }
    }

    /// First sector of each grain table.
    pub fn directory(&self) -> &[u64] {
        &self.directory
    }

    /// A grain table as bytes; `None` if it is all zeroes.
    pub fn page(&self, number: u64) -> Option<Vec<u8>> {
        let page = self.table.page(number);
        page.iter().any(|&entry| entry != 0).then(|| encode(&page))
    }

    /// The extent has more grains, and as many tables as before.
    pub fn resize(&mut self, header: Header) {
        debug_assert_eq!(header.tables(), self.header.tables(), "the tables stay where they are");
        self.header = header;
    }

    /// The extent has more grains, and its tables stand elsewhere.
    pub fn grow(&mut self, header: Header, directory: Vec<u64>, redundant: Vec<u64>) {
        (self.header, self.directory, self.redundant) = (header, directory, redundant);
    }

    /// The places of the grains.
    pub fn places(&mut self) -> &mut Places {
        &mut self.places
    }

    /// First byte after everything placed.
    pub fn end(&self) -> u64 {
        self.places.end()
    }

    /// Whether a grain table is missing, in either copy.
    pub fn has_gaps(&self) -> bool {
        self.directory.contains(&0) || self.redundant.contains(&0) || self.redundant.len() != self.directory.len()
    }

    /// The second copies of these tables as they should be: (first byte in the file, bytes).
    pub fn copies_of(&self, numbers: &[u64]) -> Vec<(u64, Vec<u8>)> {
        let copy = |&number: &u64| Some((self.redundant.get(number as usize)? * SECTOR, encode(&self.table.page(number))));
        numbers.iter().filter_map(copy).collect()
    }

    /// What must be written for the tables that changed: (first byte in the file, bytes), both copies.
    pub fn take_dirty(&mut self) -> Vec<(u64, Vec<u8>)> {
        let mut writes = Vec::new();
        for (number, page) in self.table.take_dirty() {
            let bytes = encode(&page);
            for directory in [&self.directory, &self.redundant] {
                if let Some(at) = directory.get(number as usize) {
                    writes.push((at * SECTOR, bytes.clone()));
                }
            }
        }
        writes
    }

    /// What was cleared before the barrier may be used again.
    pub fn barrier_done(&mut self) {
        self.places.barrier_done();
    }
}

fn encode(page: &Page) -> Vec<u8> {
    page.iter().flat_map(|&entry| (entry as u32).to_le_bytes()).collect()
}

/// A grain table as a page of entries.
pub fn page_of(bytes: &[u8]) -> Page {
    let mut page: Page = Box::new([0; TABLE_ENTRIES as usize]);
    for (slot, entry) in page.iter_mut().zip(super::format::decode_entries(bytes)) {
        *slot = entry;
    }
    page
}

/// Grains that stand in the file: number and first byte.
pub fn placed<'a>(table: &'a Table, header: &'a Header) -> impl Iterator<Item = (u64, u64)> + 'a {
    table.iter_from(0).filter(|&(grain, _)| grain < header.grains()).filter_map(|(grain, entry)| Some((grain, place(entry, header)?)))
}

/// Every entry that breaks a rule by itself; overlaps between grains are not looked for.
pub fn faults<'a>(table: &'a Table, header: &'a Header, file_len: u64) -> impl Iterator<Item = BadGrain> + 'a {
    // How long a compressed grain is, only its marker tells.
    let len = if header.compressed() { 12 } else { header.grain * SECTOR };
    let short_tail = (header.capacity % header.grain) * SECTOR;
    placed(table, header).filter_map(move |(grain, at)| {
        let needed = if grain + 1 == header.grains() && short_tail > 0 { len.min(short_tail) } else { len };
        let what = if at < header.overhead * SECTOR && !header.compressed() {
            "a grain lies over the structures of the file"
        } else if at + needed > file_len {
            "a grain lies outside the file"
        } else {
            return None;
        };
        Some(BadGrain { what, grain })
    })
}

/// Where the directories and tables of a new extent stand: redundant ones first, as VMware and qemu do it.
pub fn layout(header: &mut Header) -> (Vec<u64>, Vec<u64>) {
    let (directory, redundant, _) = layout_at(header, DIRECTORY_AT);
    let end = header.gd_at + (header.gd_at - header.rgd_at);
    header.overhead = end.next_multiple_of(header.grain);
    (directory, redundant)
}

/// The same from sector `first` on: directory, redundant directory, and the first sector after both, rounded up so that whole
/// grains follow.
pub fn layout_at(header: &mut Header, first: u64) -> (Vec<u64>, Vec<u64>, u64) {
    let directory_sectors = header.directory_sectors();
    let tables = header.tables();
    let tables_at = |directory_at: u64| (0..tables).map(|i| directory_at + directory_sectors + i * TABLE_SECTORS).collect();
    let len = directory_sectors + tables * TABLE_SECTORS;
    (header.rgd_at, header.gd_at) = (first, first + len);
    (tables_at(header.gd_at), tables_at(header.rgd_at), first + (2 * len).next_multiple_of(header.grain))
}

const DIRECTORY_AT: u64 = super::format::DESCRIPTOR_AT + super::format::DESCRIPTOR_SECTORS;

fn place(entry: u64, header: &Header) -> Option<u64> {
    let zero_grain = header.flags & super::format::FLAG_ZERO_GRAIN != 0 && entry == 1;
    (entry != 0 && !zero_grain).then_some(entry * SECTOR)
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::super::format::{FLAG_NEWLINE, FLAG_REDUNDANT, GRAIN_SECTORS};
    use super::*;

    fn header(capacity: u64) -> Header {
        Header {
            version: 1,
            flags: FLAG_NEWLINE | FLAG_REDUNDANT,
            capacity,
            grain: GRAIN_SECTORS,
            descriptor_at: 1,
            descriptor_len: 20,
            rgd_at: 0,
            gd_at: 0,
            overhead: 0,
            unclean: false,
        }
    }

    #[test]
    fn the_layout_is_the_one_others_write() {
        let mut header = header((64 << 20) / 512);
        let (tables, redundant) = layout(&mut header);
        assert_eq!((header.rgd_at, header.gd_at, header.overhead), (21, 30, 128));
        assert_eq!((tables, redundant), (vec![31, 35], vec![22, 26]));
    }

    proptest! {
        #[test]
        fn both_copies_of_the_tables_always_say_the_same_and_no_grain_shares_a_place(ops in proptest::collection::vec((0u64..2000, 0u8..4), 1..300)) {
            let mut header = header(2000 * GRAIN_SECTORS);
            let (directory, redundant) = layout(&mut header);
            let mut grains = Grains::new(header, directory.clone(), redundant.clone());
            let mut file = vec![0u8; (header.overhead * SECTOR) as usize];
            let mut durable: HashMap<u64, u64> = HashMap::new();
            for (grain, op) in ops {
                match op {
                    0 | 1 if grains.place_of(grain).is_none() => {
                        let placed = grains.places().reserve();
                        grains.assign(grain, placed.at);
                        prop_assert!(!durable.values().any(|&at| at == placed.at));
                    }
                    2 => grains.clear(grain),
                    3 => {
                        for (at, bytes) in grains.take_dirty() {
                            file[at as usize..at as usize + bytes.len()].copy_from_slice(&bytes);
                        }
                        grains.barrier_done();
                        let mut table = Table::default();
                        for (number, (&first, &second)) in directory.iter().zip(&redundant).enumerate() {
                            let [a, b] = [first, second].map(|s| &file[(s * SECTOR) as usize..][..2048]);
                            prop_assert_eq!(a, b);
                            table.load(number as u64, page_of(a));
                        }
                        let loaded = Grains::load(header, table, directory.clone(), redundant.clone(), grains.end(), None).expect("the durable table is always legal");
                        durable = (0..2000).filter_map(|n| Some((n, loaded.place_of(n)?))).collect();
                        for n in 0..2000 {
                            prop_assert_eq!(loaded.place_of(n), grains.place_of(n));
                        }
                    }
                    _ => {}
                }
            }
        }
    }

    #[test]
    fn hostile_tables_are_refused() {
        let mut header = header(4 * GRAIN_SECTORS);
        let (directory, redundant) = layout(&mut header);
        let load = |entries: [u32; 4]| {
            let mut table = Table::default();
            table.load(0, page_of(&entries.map(u32::to_le_bytes).concat()));
            Grains::load(header, table, directory.clone(), redundant.clone(), (128 + 3 * 128) * 512, None).map(|_| ())
        };
        assert!(load([128, 256, 0, 384]).is_ok());
        assert!(load([128, 128, 0, 0]).is_err(), "two grains in one place");
        assert!(load([128, 200, 0, 0]).is_err(), "overlapping");
        assert!(load([30, 0, 0, 0]).is_err(), "over the tables");
        assert!(load([512, 0, 0, 0]).is_err(), "past the end");
        assert!(load([u32::MAX, 0, 0, 0]).is_err(), "far past the end");
    }
}
