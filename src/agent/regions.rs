//! What is known of each region of a disk: whether its content is in the stream, and since when it may be clean. Pure.

use std::collections::HashMap;
use std::ops::RangeInclusive;
use std::time::Duration;

use crate::clock::Mono;
use crate::model::{Extent, RegionSet};

/// Regions of one disk.
#[derive(Debug)]
pub struct Regions {
    bytes: u64,
    size: u64,
    missing: RegionSet,
    /// Last change captured in each region, and when; 0 for none in this epoch.
    last: HashMap<u64, (u64, Mono)>,
    /// Writes under way in each region.
    busy: HashMap<u64, u32>,
    cursor: u64,
}

impl Regions {
    /// Regions of `bytes` each over a disk of `size`, of which `missing` are not in the stream.
    pub fn new(bytes: u64, size: u64, missing: RegionSet) -> Self {
        Self { bytes, size, missing, last: HashMap::new(), busy: HashMap::new(), cursor: 0 }
    }

    /// The disk has `size` bytes from now on. What is new is not in the stream, nor is the region that was the last.
    pub fn grow(&mut self, size: u64) {
        let last = (self.size - 1) / self.bytes;
        self.size = size;
        self.missing.grow(size.div_ceil(self.bytes));
        for region in last..self.missing.regions() {
            self.missing.insert(region);
        }
    }

    /// The regions an extent touches.
    pub fn of(&self, extent: Extent) -> RangeInclusive<u64> {
        extent.offset / self.bytes..=(extent.end() - 1) / self.bytes
    }

    /// The bytes of a region.
    pub fn extent(&self, region: u64) -> Extent {
        let offset = region * self.bytes;
        Extent::new(offset, self.bytes.min(self.size - offset))
    }

    /// A write begins.
    pub fn begin(&mut self, extent: Extent) {
        for region in self.of(extent) {
            *self.busy.entry(region).or_default() += 1;
        }
    }

    /// A write ended, whatever came of it.
    pub fn end(&mut self, extent: Extent) {
        for region in self.of(extent) {
            if let Some(count) = self.busy.get_mut(&region) {
                *count -= 1;
                if *count == 0 {
                    self.busy.remove(&region);
                }
            }
        }
    }

    /// Whether a write to `extent` may stay out of the stream because all of it will be read later anyway.
    pub fn all_missing(&self, extent: Extent) -> bool {
        self.missing.count() > 0 && self.of(extent).all(|r| self.missing.contains(r))
    }

    /// A change was captured.
    pub fn captured(&mut self, extent: Extent, sequence: u64, now: Mono) {
        for region in self.of(extent) {
            self.last.insert(region, (sequence, now));
        }
    }

    /// The content of these regions is not in the stream any more. True if that was not so before.
    pub fn lose(&mut self, extent: Extent) -> bool {
        let was_whole = self.missing.count() == 0;
        for region in self.of(extent) {
            self.missing.insert(region);
        }
        was_whole
    }

    /// Every region of `marked` is missing from now on: the stream starts anew. True if anything is missing.
    pub fn restart(&mut self, marked: &RegionSet) -> bool {
        self.missing.union(marked);
        self.last.clear();
        self.cursor = 0;
        self.missing.count() > 0
    }

    /// The next missing region to send, in a round over the disk.
    pub fn next_missing(&mut self) -> Option<u64> {
        let region = self.missing.next_from(self.cursor).or_else(|| self.missing.next_from(0))?;
        self.cursor = region + 1;
        Some(region)
    }

    /// What is missing.
    pub fn missing(&self) -> &RegionSet {
        &self.missing
    }

    /// Bytes of a region.
    pub fn region_bytes(&self) -> u64 {
        self.bytes
    }

    /// Whether a region is missing.
    pub fn is_missing(&self, region: u64) -> bool {
        self.missing.contains(region)
    }

    /// A missing region is in the stream now.
    pub fn sent(&mut self, region: u64) {
        self.missing.remove(region);
    }

    /// Bytes that are missing; 0 means that the stream is consistent.
    pub fn missing_bytes(&self) -> u64 {
        (self.missing.count() * self.bytes).min(self.size)
    }

    /// Regions of `marked` that may be marked clean: in the stream, safe, at rest for `idle`.
    pub fn cleanable(&self, marked: &RegionSet, safe: u64, now: Mono, idle: Duration) -> Vec<u64> {
        let at_rest = |region: &u64| match self.last.get(region) {
            Some(&(sequence, at)) => sequence <= safe && now.since(at) >= idle,
            None => true,
        };
        marked.iter().filter(|r| !self.missing.contains(*r) && !self.busy.contains_key(r)).filter(at_rest).collect()
    }

    /// A region was marked clean; nothing about it needs to be remembered.
    pub fn cleaned(&mut self, region: u64) {
        self.last.remove(&region);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn regions() -> Regions {
        Regions::new(100, 1050, RegionSet::empty(11))
    }

    #[test]
    fn a_region_is_clean_only_when_safe_idle_and_at_rest() {
        let mut regions = regions();
        let mut marked = RegionSet::empty(11);
        marked.insert(2);
        let extent = Extent::new(210, 20);
        let idle = Duration::from_secs(1);
        regions.begin(extent);
        assert!(regions.cleanable(&marked, 99, Mono(9_000_000), idle).is_empty(), "a write is under way");
        regions.captured(extent, 7, Mono(1_000_000));
        regions.end(extent);
        assert!(regions.cleanable(&marked, 6, Mono(9_000_000), idle).is_empty(), "not safe yet");
        assert!(regions.cleanable(&marked, 7, Mono(1_500_000), idle).is_empty(), "written a moment ago");
        assert_eq!(regions.cleanable(&marked, 7, Mono(2_000_000), idle), [2]);
        regions.lose(extent);
        assert!(regions.cleanable(&marked, 7, Mono(9_000_000), idle).is_empty(), "its content is not in the stream");
    }

    #[test]
    fn missing_regions_come_round_and_the_last_one_is_short() {
        let mut regions = regions();
        assert!(regions.lose(Extent::new(950, 100)));
        assert_eq!(regions.missing_bytes(), 200);
        assert_eq!(regions.next_missing(), Some(9));
        assert_eq!(regions.next_missing(), Some(10));
        assert_eq!(regions.extent(10), Extent::new(1000, 50));
        assert_eq!(regions.next_missing(), Some(9), "again, until it was sent");
        regions.sent(9);
        regions.sent(10);
        assert_eq!(regions.next_missing(), None);
        assert_eq!(regions.missing_bytes(), 0);
    }

    #[test]
    fn what_a_disk_gained_is_missing_and_so_is_the_region_that_was_cut_short() {
        let mut regions = regions();
        regions.grow(1210);
        assert_eq!((regions.next_missing(), regions.next_missing(), regions.next_missing()), (Some(10), Some(11), Some(12)));
        assert_eq!((regions.extent(10), regions.extent(12)), (Extent::new(1000, 100), Extent::new(1200, 10)));
        regions.restart(&RegionSet::full(13));
        assert_eq!(regions.missing_bytes(), 1210);
    }

    #[test]
    fn a_write_stays_out_of_the_stream_only_if_all_of_it_is_missing() {
        let mut regions = regions();
        regions.lose(Extent::new(100, 100));
        assert!(regions.all_missing(Extent::new(120, 20)));
        assert!(!regions.all_missing(Extent::new(180, 40)));
    }
}
