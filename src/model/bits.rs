//! Sets of regions and blocks as bitmaps: dense for the dirty map, paged for first-touch tracking.

use std::collections::HashMap;

/// A dense set of region numbers below a fixed bound. One bit each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RegionSet {
    words: Vec<u64>,
    regions: u64,
    count: u64,
}

impl RegionSet {
    /// The empty set over regions `0..regions`.
    pub fn empty(regions: u64) -> Self {
        let words = usize::try_from(regions.div_ceil(64)).expect("region count fits memory: bounded by limits");
        Self { words: vec![0; words], regions, count: 0 }
    }

    /// The set of all regions.
    pub fn full(regions: u64) -> Self {
        let mut set = Self::empty(regions);
        for region in 0..regions {
            set.insert(region);
        }
        set
    }

    /// Raises the bound to `regions`; what is new is not in the set.
    pub fn grow(&mut self, regions: u64) {
        debug_assert!(regions >= self.regions, "disks do not shrink");
        self.words.resize(Self::empty(regions).words.len(), 0);
        self.regions = regions;
    }

    /// Adds `region`; false if it was there already.
    pub fn insert(&mut self, region: u64) -> bool {
        debug_assert!(region < self.regions, "region within the disk");
        let word = &mut self.words[(region / 64) as usize];
        let fresh = *word & (1 << (region % 64)) == 0;
        *word |= 1 << (region % 64);
        self.count += u64::from(fresh);
        fresh
    }

    /// Removes `region`; false if it was not there.
    pub fn remove(&mut self, region: u64) -> bool {
        let word = &mut self.words[(region / 64) as usize];
        let there = *word & (1 << (region % 64)) != 0;
        *word &= !(1 << (region % 64));
        self.count -= u64::from(there);
        there
    }

    /// Whether `region` is in the set.
    pub fn contains(&self, region: u64) -> bool {
        self.words.get((region / 64) as usize).is_some_and(|w| w & (1 << (region % 64)) != 0)
    }

    /// Number of regions in the set.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Bound of the region numbers.
    pub fn regions(&self) -> u64 {
        self.regions
    }

    /// Adds every member of `other`, which must have the same bound.
    pub fn union(&mut self, other: &RegionSet) {
        debug_assert_eq!(self.regions, other.regions, "sets of one disk");
        for (mine, theirs) in self.words.iter_mut().zip(&other.words) {
            *mine |= theirs;
        }
        self.count = self.words.iter().map(|w| u64::from(w.count_ones())).sum();
    }

    /// The first member at or after `from`.
    pub fn next_from(&self, from: u64) -> Option<u64> {
        let mut index = (from / 64) as usize;
        let mut word = *self.words.get(index)? & (u64::MAX << (from % 64));
        loop {
            if word != 0 {
                return Some(index as u64 * 64 + u64::from(word.trailing_zeros()));
            }
            index += 1;
            word = *self.words.get(index)?;
        }
    }

    /// All members in order.
    pub fn iter(&self) -> impl Iterator<Item = u64> + '_ {
        std::iter::successors(self.next_from(0), move |&at| self.next_from(at + 1))
    }
}

/// Blocks of one page of a [`BlockSet`]: 32768 blocks, which is 128 MiB of disk at 4 KiB.
const PAGE_BLOCKS: u64 = 32768;

/// A sparse set of block numbers. Costs 4 KiB for each 32768 consecutive blocks that hold a member.
#[derive(Clone, Debug, Default)]
pub struct BlockSet {
    pages: HashMap<u64, Box<[u64; (PAGE_BLOCKS / 64) as usize]>>,
}

impl BlockSet {
    /// Adds `block`; false if it was there already.
    pub fn insert(&mut self, block: u64) -> bool {
        let page = self.pages.entry(block / PAGE_BLOCKS).or_insert_with(|| Box::new([0; (PAGE_BLOCKS / 64) as usize]));
        let word = &mut page[(block % PAGE_BLOCKS / 64) as usize];
        let fresh = *word & (1 << (block % 64)) == 0;
        *word |= 1 << (block % 64);
        fresh
    }

    /// Removes `block`.
    pub fn remove(&mut self, block: u64) {
        if let Some(page) = self.pages.get_mut(&(block / PAGE_BLOCKS)) {
            page[(block % PAGE_BLOCKS / 64) as usize] &= !(1 << (block % 64));
        }
    }

    /// Whether `block` is in the set.
    pub fn contains(&self, block: u64) -> bool {
        self.pages.get(&(block / PAGE_BLOCKS)).is_some_and(|page| page[(block % PAGE_BLOCKS / 64) as usize] & (1 << (block % 64)) != 0)
    }

    /// Runs of blocks in `[first, last]` that are not members, as (first, count).
    pub fn missing_runs(&self, first: u64, last: u64) -> Vec<(u64, u64)> {
        let mut runs: Vec<(u64, u64)> = Vec::new();
        for block in first..=last {
            if self.contains(block) {
                continue;
            }
            match runs.last_mut() {
                Some((start, count)) if *start + *count == block => *count += 1,
                _ => runs.push((block, 1)),
            }
        }
        runs
    }

    /// Removes everything.
    pub fn clear(&mut self) {
        self.pages.clear();
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn region_set_equals_a_tree_set(ops in proptest::collection::vec((any::<bool>(), 0u64..300), 0..200)) {
            let mut set = RegionSet::empty(300);
            let mut model = BTreeSet::new();
            for (add, region) in ops {
                if add {
                    prop_assert_eq!(set.insert(region), model.insert(region));
                } else {
                    prop_assert_eq!(set.remove(region), model.remove(&region));
                }
            }
            prop_assert_eq!(set.count(), model.len() as u64);
            prop_assert!(set.iter().eq(model.iter().copied()));
        }

        #[test]
        fn missing_runs_are_the_complement(members in proptest::collection::btree_set(32_700u64..32_850, 0..80)) {
            let mut set = BlockSet::default();
            for &block in &members {
                prop_assert!(set.insert(block));
                prop_assert!(!set.insert(block));
            }
            let expanded: Vec<u64> = set.missing_runs(32_690, 32_860).into_iter().flat_map(|(s, n)| s..s + n).collect();
            let model: Vec<u64> = (32_690..=32_860).filter(|b| !members.contains(b)).collect();
            prop_assert_eq!(expanded, model);
        }
    }
}
