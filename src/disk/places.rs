//! What all sparse formats share: a table of entries kept by page, and where the blocks of a file stand. Pure: returns
//! orders, writes nothing.
//!
//! A block goes `zero -> placed (RAM) -> [data durable] -> in the table -> [table durable]`, and back
//! `present -> zero in the table -> [table durable] -> free`. States that are only in RAM vanish in a crash: a leak at
//! most, never two blocks in one place.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// Entries of a page: 4 KiB of a VHDX block table, one grain table of a VMDK.
pub const PAGE_ENTRIES: usize = 512;

/// A page of entries.
pub type Page = Box<[u64; PAGE_ENTRIES]>;

/// Entries by index; pages of zeroes take no memory.
#[derive(Clone, Debug, Default)]
pub struct Table {
    pages: BTreeMap<u64, Page>,
    dirty: BTreeSet<u64>,
}

impl Table {
    /// The entry at `index`.
    pub fn get(&self, index: u64) -> u64 {
        let page = self.pages.get(&(index / PAGE_ENTRIES as u64));
        page.map_or(0, |page| page[(index % PAGE_ENTRIES as u64) as usize])
    }

    /// Changes an entry; its page is written with the next barrier.
    pub fn set(&mut self, index: u64, entry: u64) {
        let number = index / PAGE_ENTRIES as u64;
        self.pages.entry(number).or_insert_with(|| Box::new([0; PAGE_ENTRIES]))[(index % PAGE_ENTRIES as u64) as usize] = entry;
        self.dirty.insert(number);
    }

    /// Takes a page as it stands in the file.
    pub fn load(&mut self, number: u64, page: Page) {
        if page.iter().any(|&entry| entry != 0) {
            self.pages.insert(number, page);
        }
    }

    /// A whole page.
    pub fn page(&self, number: u64) -> Page {
        self.pages.get(&number).cloned().unwrap_or_else(|| Box::new([0; PAGE_ENTRIES]))
    }

    /// Whether a page holds the same entries in both tables.
    pub fn same_page(&self, other: &Table, number: u64) -> bool {
        match (self.pages.get(&number), other.pages.get(&number)) {
            (None, None) => true,
            (Some(a), Some(b)) => a == b,
            (Some(page), None) | (None, Some(page)) => page.iter().all(|&entry| entry == 0),
        }
    }

    /// Entries that are not zero, from `index` on.
    pub fn iter_from(&self, index: u64) -> impl Iterator<Item = (u64, u64)> + '_ {
        let per_page = PAGE_ENTRIES as u64;
        self.pages
            .range(index / per_page..)
            .flat_map(move |(number, page)| page.iter().enumerate().map(move |(i, &entry)| (number * per_page + i as u64, entry)))
            .filter(move |&(at, entry)| at >= index && entry != 0)
    }

    /// Numbers and contents of the pages that changed. Taken when a barrier begins.
    pub fn take_dirty(&mut self) -> Vec<(u64, Page)> {
        let dirty = std::mem::take(&mut self.dirty);
        dirty.into_iter().filter_map(|number| Some((number, self.pages.get(&number)?.clone()))).collect()
    }
}

/// Where blocks of one length stand in a file.
#[derive(Debug)]
pub struct Places {
    block: u64,
    /// Runs of unused places: first byte, number of blocks.
    free: VecDeque<(u64, u64)>,
    resting: Vec<u64>,
    end: u64,
}

/// Where a block goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Placed {
    /// First byte in the file.
    pub at: u64,
    /// It held another block once; its bytes must be cleared first.
    pub reused: bool,
}

impl Places {
    /// No block is placed yet; the first may stand at `data_at`.
    pub fn new(block: u64, data_at: u64) -> Self {
        Self { block, free: VecDeque::new(), resting: Vec::new(), end: data_at }
    }

    /// The places of an existing file. `used` come in any order, at `data_at` or later.
    ///
    /// # Errors
    /// The place of a block that shares bytes with the one before it.
    pub fn of(mut used: Vec<u64>, block: u64, data_at: u64) -> Result<Self, u64> {
        used.sort_unstable();
        if let Some(pair) = used.windows(2).find(|pair| pair[1] - pair[0] < block) {
            return Err(pair[1]);
        }
        let mut places = Self::new(block, data_at);
        for start in used {
            let gap = start.saturating_sub(places.end) / block;
            if gap > 0 {
                places.free.push_back((places.end, gap));
            }
            places.end = places.end.max(start + block);
        }
        Ok(places)
    }

    /// Reserves a place. Reused ones come first and must be cleared before they are given to a block.
    pub fn reserve(&mut self) -> Placed {
        let Some((at, count)) = self.free.pop_front() else {
            self.end += self.block;
            return Placed { at: self.end - self.block, reused: false };
        };
        if count > 1 {
            self.free.push_front((at + self.block, count - 1));
        }
        Placed { at, reused: true }
    }

    /// Whether the next place is one that was used before.
    pub fn reuses(&self) -> bool {
        !self.free.is_empty()
    }

    /// Takes back a reserved place that could not be made ready.
    pub fn give_back(&mut self, at: u64) {
        self.free.push_front((at, 1));
    }

    /// A block left its place; the place is free after the next barrier, when no durable table refers to it.
    pub fn release(&mut self, at: u64) {
        self.resting.push(at);
    }

    /// The table that no longer refers to what was released before is durable.
    pub fn barrier_done(&mut self) {
        self.free.extend(self.resting.drain(..).map(|at| (at, 1)));
    }

    /// New places begin at `end` or later.
    pub fn skip_to(&mut self, end: u64) {
        self.end = self.end.max(end);
    }

    /// First byte after everything placed.
    pub fn end(&self) -> u64 {
        self.end
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_are_found_and_overlaps_are_refused() {
        let mut places = Places::of(vec![40, 10, 90], 10, 10).expect("apart");
        let order: Vec<u64> = (0..6).map(|_| places.reserve().at).collect();
        assert_eq!(order, [20, 30, 50, 60, 70, 80]);
        assert_eq!(places.reserve(), Placed { at: 100, reused: false });
        assert_eq!(Places::of(vec![10, 15], 10, 10).unwrap_err(), 15);
        assert_eq!(Places::of(vec![10, 10], 10, 10).unwrap_err(), 10);
    }

    #[test]
    fn a_released_place_rests_until_the_barrier() {
        let mut places = Places::of(vec![0], 10, 0).expect("one block");
        places.release(0);
        assert_eq!(places.reserve().at, 10);
        places.barrier_done();
        assert_eq!(places.reserve(), Placed { at: 0, reused: true });
    }

    #[test]
    fn a_table_keeps_what_was_set_and_tells_which_pages_changed() {
        let mut table = Table::default();
        assert_eq!(table.get(1 << 40), 0);
        table.set(513, 7);
        table.set(5000, 9);
        assert_eq!(table.iter_from(514).collect::<Vec<_>>(), [(5000, 9)]);
        assert_eq!(table.take_dirty().iter().map(|(n, _)| *n).collect::<Vec<_>>(), [1, 9]);
        assert!(table.take_dirty().is_empty());
        table.set(513, 0);
        assert_eq!(table.take_dirty().len(), 1, "an entry that became zero must reach the file");
    }
}
