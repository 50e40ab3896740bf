//! Where the old content of every closed interval stands, for all points at once. Pure.
//!
//! Costs 16 bytes for each extent, or for each 64 KiB of a longer one: 26 MB for 100 GiB of old content in pieces of 64 KiB.
//! The disk is cut into *tiles* of 64 KiB, intervals are numbered in order of their begin, and an entry is
//!
//! | bits | first word | bits | second word |
//! |---|---|---|---|
//! | 33 | tile | 35 | first sector of the record in its file |
//! | 24 | number of the interval | 10 | sectors of the record |
//! | 7 | first sector in the tile | 11 | sector in the record's data |
//! | | | 1 | zeroes, there is no data |
//! | | | 7 | sectors, less one |
//!
//! Entries stand in runs sorted by their first word, each run at least twice as long as the next, so that adding an interval
//! costs a logarithm. A tile's content at a point: the first interval from the point on that has a sector, by walking the
//! tile's entries in order; a mask of 128 bits says which sectors are still looked for. Extents that would be cut into many
//! tiles (zeroes, mostly: a TRIM of a whole disk) or do not fit the fields are kept beside, as they are.

use std::collections::BTreeMap;
use std::ops::Range;

use super::index::Source;
use super::record::stored;
use crate::model::{Extent, SECTOR};

/// Bytes of a tile: as many sectors as a mask has bits.
const TILE: u64 = 128 * SECTOR;
/// Extents from here on are not cut into tiles.
const WIDE: u64 = 16 * TILE;
/// Tiles that one answer of [`Atlas::next_data`] spans at most.
const NEXT_TILES_MAX: u64 = 256;
/// Intervals that can be numbered; then the atlas has to be made anew.
pub const NUMBERS_MAX: u32 = 1 << 24;

/// Where an extent's old content is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Spot {
    /// First byte of the record in its file.
    pub record_at: u64,
    /// Bytes it takes there.
    pub stored: u32,
    /// Place in the record's data; `None` for zeroes.
    pub data_at: Option<u32>,
}

impl From<Source> for Spot {
    fn from(source: Source) -> Self {
        Self { record_at: source.record_at, stored: stored(source.body_len as usize) as u32, data_at: source.data_at }
    }
}

/// A spot and the number of its interval.
pub type Found = (u32, Spot);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Entry {
    key: u64,
    place: u64,
}

impl Entry {
    fn new(tile: u64, number: u32, first: u64, sectors: u64, spot: Spot) -> Self {
        let data_at = spot.data_at.map_or(1, |at| (u64::from(at) / SECTOR) << 1);
        let place = ((spot.record_at / SECTOR) << 29) | ((u64::from(spot.stored) / SECTOR) << 19) | (data_at << 7) | (sectors - 1);
        Self { key: key(tile, number) | first, place }
    }

    fn tile(self) -> u64 {
        self.key >> 31
    }

    fn number(self) -> u32 {
        (self.key >> 7) as u32 & (NUMBERS_MAX - 1)
    }

    fn first(self) -> u64 {
        self.key & 127
    }

    fn sectors(self) -> u64 {
        (self.place & 127) + 1
    }

    fn is_hole(self) -> bool {
        self.place & (1 << 7) != 0
    }

    fn mask(self) -> u128 {
        mask(self.first(), self.sectors())
    }

    fn spot(self) -> Spot {
        let data_at = (!self.is_hole()).then_some((((self.place >> 8) & 0x7ff) * SECTOR) as u32);
        Spot { record_at: (self.place >> 29) * SECTOR, stored: (((self.place >> 19) & 0x3ff) * SECTOR) as u32, data_at }
    }
}

/// The least key of an interval's entries in a tile.
fn key(tile: u64, number: u32) -> u64 {
    (tile << 31) | (u64::from(number) << 7)
}

fn mask(first: u64, sectors: u64) -> u128 {
    (u128::MAX >> (128 - sectors)) << first
}

/// The sectors of a tile that share a byte with `extent`.
fn mask_of(tile: u64, extent: Extent) -> u128 {
    let (start, end) = (extent.offset.max(tile * TILE), extent.end().min((tile + 1) * TILE));
    if start >= end {
        return 0;
    }
    let (first, last) = ((start - tile * TILE) / SECTOR, (end - tile * TILE).div_ceil(SECTOR));
    mask(first, last - first)
}

/// Runs of ones: (first, count).
fn ones(mut mask: u128) -> impl Iterator<Item = (u64, u64)> {
    std::iter::from_fn(move || {
        let first = mask.trailing_zeros();
        let count = mask.checked_shr(first)?.trailing_ones();
        mask &= !self::mask(u64::from(first), u64::from(count));
        Some((u64::from(first), u64::from(count)))
    })
}

/// See the module.
#[derive(Clone, Debug, Default)]
pub struct Atlas {
    runs: Vec<Vec<Entry>>,
    wide: BTreeMap<u32, Vec<(Extent, Spot)>>,
    /// Entries by interval.
    counts: BTreeMap<u32, usize>,
}

impl Atlas {
    /// Adds an interval's extents, which do not overlap each other and are sector-aligned.
    pub fn add(&mut self, number: u32, entries: impl IntoIterator<Item = (Extent, Spot)>) {
        debug_assert!(number < NUMBERS_MAX, "the atlas is made anew before numbers run out");
        let mut run = Vec::new();
        for (extent, spot) in entries {
            let fits = extent.end() <= TILE << 33
                && spot.record_at >> 44 == 0
                && spot.record_at.is_multiple_of(SECTOR)
                && u64::from(spot.stored) >> 19 == 0
                && spot.data_at.is_none_or(|at| u64::from(at).is_multiple_of(SECTOR) && u64::from(at) + extent.len <= SECTOR << 11);
            if extent.len >= WIDE || !fits {
                self.wide.entry(number).or_default().push((extent, spot));
                continue;
            }
            let mut at = extent.offset;
            while at < extent.end() {
                let end = ((at / TILE + 1) * TILE).min(extent.end());
                let part = Spot { data_at: spot.data_at.map(|d| d + (at - extent.offset) as u32), ..spot };
                run.push(Entry::new(at / TILE, number, at % TILE / SECTOR, (end - at) / SECTOR, part));
                at = end;
            }
        }
        if let Some(wide) = self.wide.get_mut(&number) {
            wide.sort_by_key(|(extent, _)| extent.offset);
        }
        if run.is_empty() {
            return;
        }
        run.sort_unstable_by_key(|e| e.key);
        run.shrink_to_fit();
        *self.counts.entry(number).or_default() += run.len();
        self.runs.push(run);
        while let [.., a, b] = &self.runs[..]
            && a.len() < 2 * b.len()
        {
            let (b, a) = (self.runs.pop().unwrap_or_default(), self.runs.pop().unwrap_or_default());
            self.runs.push(merge(&a, &b));
        }
    }

    /// Makes one run of all, so that looking something up takes one search.
    pub fn settle(&mut self) {
        while let [.., _, _] = &self.runs[..] {
            let (b, a) = (self.runs.pop().unwrap_or_default(), self.runs.pop().unwrap_or_default());
            self.runs.push(merge(&a, &b));
        }
    }

    /// Takes everything of some intervals out.
    pub fn remove(&mut self, gone: impl Fn(u32) -> bool) {
        self.wide.retain(|number, _| !gone(*number));
        let before = self.counts.len();
        self.counts.retain(|number, _| !gone(*number));
        if self.counts.len() < before {
            for run in &mut self.runs {
                run.retain(|e| !gone(e.number()));
                run.shrink_to(run.len() + run.len() / 4);
            }
            self.runs.retain(|run| !run.is_empty());
        }
    }

    /// Nobody asks for intervals before `number` any more. Their room is given back when they are half of everything.
    pub fn forget_before(&mut self, number: u32) {
        let gone: usize = self.counts.range(..number).map(|(_, count)| count).sum();
        if gone * 2 > self.len() || self.wide.range(..number).next().is_some() {
            self.remove(|n| n < number);
        }
    }

    /// Number of entries.
    pub fn len(&self) -> usize {
        self.runs.iter().map(Vec::len).sum()
    }

    /// Whether there are no entries.
    pub fn is_empty(&self) -> bool {
        self.len() == 0 && self.wide.is_empty()
    }

    /// Bytes of memory it takes, about.
    pub fn bytes(&self) -> usize {
        let wide: usize = self.wide.values().map(Vec::len).sum();
        self.len() * size_of::<Entry>() + wide * size_of::<(Extent, Spot)>()
    }

    /// What each part of `extent` was before the first of `numbers` that has it; `None` where none does. In order of offset,
    /// parts of one record that follow each other in it as one.
    pub fn resolve(&self, extent: Extent, numbers: Range<u32>) -> Vec<(Extent, Option<Found>)> {
        let mut out: Vec<(Extent, Option<Found>)> = Vec::new();
        let mut parts = Vec::new();
        for tile in extent.offset / TILE..extent.end().div_ceil(TILE) {
            self.resolve_tile(tile, mask_of(tile, extent), &numbers, &mut parts);
            parts.sort_unstable_by_key(|(first, ..)| *first);
            for (first, sectors, found) in parts.drain(..) {
                let part = Extent::new(tile * TILE + first * SECTOR, sectors * SECTOR);
                // The ends of what was asked need not be sectors.
                let (start, end) = (part.offset.max(extent.offset), part.end().min(extent.end()));
                let found = found.map(|(number, spot)| (number, shift(spot, start - part.offset)));
                match out.last_mut() {
                    Some((last, before)) if last.end() == start && follows(*before, last.len, found) => last.len = end - last.offset,
                    _ => out.push((Extent::new(start, end - start), found)),
                }
            }
        }
        out
    }

    /// Appends what the sectors of `wanted` are in a tile: (first sector, sectors, where).
    fn resolve_tile(&self, tile: u64, mut wanted: u128, numbers: &Range<u32>, out: &mut Vec<(u64, u64, Option<Found>)>) {
        let (from, to) = (key(tile, numbers.start), key(tile, numbers.end));
        let mut cursors: Vec<&[Entry]> = Vec::with_capacity(self.runs.len());
        for run in &self.runs {
            let rest = &run[run.partition_point(|e| e.key < from)..];
            if rest.first().is_some_and(|e| e.key < to) {
                cursors.push(rest);
            }
        }
        let whole = Extent::new(tile * TILE, TILE);
        let mut wide = self
            .wide
            .range(numbers.clone())
            .flat_map(|(number, list)| overlapping(list, whole).iter().map(move |(extent, spot)| (*number, *extent, *spot)))
            .peekable();
        while wanted != 0 {
            let next = cursors.iter_mut().filter(|c| c.first().is_some_and(|e| e.key < to)).min_by_key(|c| c[0].key);
            let is_wide = wide.peek().is_some_and(|(number, ..)| next.as_ref().is_none_or(|c| key(tile, *number) <= c[0].key));
            let (number, hit, begin, spot) = if is_wide {
                let Some((number, extent, spot)) = wide.next() else { break };
                (number, mask_of(tile, extent), extent.offset, spot)
            } else {
                let Some(cursor) = next else { break };
                let entry = cursor[0];
                *cursor = &cursor[1..];
                (entry.number(), entry.mask(), tile * TILE + entry.first() * SECTOR, entry.spot())
            };
            for (first, sectors) in ones(hit & wanted) {
                out.push((first, sectors, Some((number, shift(spot, tile * TILE + first * SECTOR - begin)))));
            }
            wanted &= !hit;
        }
        out.extend(ones(wanted).map(|(first, sectors)| (first, sectors, None)));
    }

    /// The next extent from `offset` on of which one of `numbers` has content; with `zeroes`, also content that is just zeroes.
    pub fn next_data(&self, offset: u64, numbers: Range<u32>, zeroes: bool) -> Option<Extent> {
        let counts = |e: &&Entry| numbers.contains(&e.number()) && (zeroes || !e.is_hole());
        let first = offset / TILE;
        let ahead = Extent::new(offset, u64::MAX - offset);
        let narrow = self.runs.iter().filter_map(|run| {
            let rest = &run[run.partition_point(|e| e.key < key(first, 0))..];
            rest.iter().filter(counts).find(|e| e.mask() & mask_of(e.tile(), ahead) != 0).map(|e| e.tile())
        });
        let wide =
            self.wide.range(numbers.clone()).flat_map(|(_, list)| overlapping(list, ahead)).filter(|(_, s)| zeroes || s.data_at.is_some());
        let wide = wide.map(|(extent, _)| Extent::new(extent.offset.max(offset), extent.end() - extent.offset.max(offset)));
        let wide = wide.min_by_key(|extent| extent.offset);
        let Some(tile) = narrow.min() else { return wide };
        let (start, count) = ones(self.data_of(tile, &counts) & mask_of(tile, ahead)).next()?;
        let mut found = Extent::new(tile * TILE + start * SECTOR, count * SECTOR);
        while found.end().is_multiple_of(TILE) && found.end() / TILE < tile + NEXT_TILES_MAX {
            let Some((0, count)) = ones(self.data_of(found.end() / TILE, &counts)).next() else { break };
            found.len += count * SECTOR;
        }
        Some(wide.filter(|w| w.offset < found.offset).unwrap_or(found))
    }

    /// Sectors of a tile of which an entry that counts has something.
    fn data_of(&self, tile: u64, counts: &impl Fn(&&Entry) -> bool) -> u128 {
        let of_tile = self.runs.iter().flat_map(|run| {
            let rest = &run[run.partition_point(|e| e.key < key(tile, 0))..];
            rest.iter().take_while(|e| e.tile() == tile)
        });
        of_tile.filter(|e| counts(e)).fold(0, |mask, e| mask | e.mask())
    }
}

/// Two sorted runs as one.
fn merge(a: &[Entry], b: &[Entry]) -> Vec<Entry> {
    let mut out = Vec::with_capacity(a.len() + b.len());
    let (mut a, mut b) = (a.iter().peekable(), b.iter().peekable());
    while let (Some(x), Some(y)) = (a.peek(), b.peek()) {
        let (first, from) = if x.key <= y.key { (**x, &mut a) } else { (**y, &mut b) };
        out.push(first);
        from.next();
    }
    out.extend(a.chain(b));
    out
}

/// Of a sorted list without overlaps those that share a byte with `extent`.
fn overlapping(list: &[(Extent, Spot)], extent: Extent) -> &[(Extent, Spot)] {
    let from = list.partition_point(|(e, _)| e.end() <= extent.offset);
    let to = list.partition_point(|(e, _)| e.offset < extent.end());
    &list[from..to.max(from)]
}

fn shift(spot: Spot, bytes: u64) -> Spot {
    Spot { data_at: spot.data_at.map(|at| at + bytes as u32), ..spot }
}

/// Whether `found` goes on in its record where `before`, which is `len` bytes long, ends.
fn follows(before: Option<Found>, len: u64, found: Option<Found>) -> bool {
    match (before, found) {
        (None, None) => true,
        (Some((a, x)), Some((b, y))) => a == b && shift(x, len) == y,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::model::OverlayMap;

    const SECTORS: u64 = 128 * 40;

    /// Some intervals, each a list of (sector, sectors, zeroes).
    fn intervals() -> impl Strategy<Value = Vec<Vec<(u64, u64, bool)>>> {
        let extent = (0..SECTORS, prop_oneof![1u64..20, 100u64..300, 2048u64..3000], any::<bool>());
        proptest::collection::vec(proptest::collection::vec(extent, 0..12), 1..14)
    }

    /// An interval's extents as its index has them: without overlaps, data no longer than a record holds.
    fn entries(list: &[(u64, u64, bool)]) -> Vec<(Extent, Spot)> {
        let mut map = OverlayMap::default();
        for (index, &(at, sectors, zero)) in list.iter().enumerate() {
            let sectors = if zero { sectors } else { sectors.min(512) }.min(SECTORS - at);
            let spot = Spot { record_at: 4096 + 512 * (index as u64 * 600), stored: 512 * 525, data_at: (!zero).then_some(512) };
            map.insert_below(Extent::new(at * SECTOR, sectors * SECTOR), spot);
        }
        map.iter().map(|p| (p.extent, shift(p.source, p.skip))).collect()
    }

    /// Each sector of an answer, with the place of its own.
    fn by_sector(answer: &[(Extent, Option<Found>)]) -> Vec<(u64, Option<Found>)> {
        let sectors = |(extent, found): &(Extent, Option<Found>)| {
            let (extent, found) = (*extent, *found);
            (0..extent.len / SECTOR).map(move |i| (extent.offset + i * SECTOR, found.map(|(n, s)| (n, shift(s, i * SECTOR)))))
        };
        answer.iter().flat_map(sectors).collect()
    }

    fn naive(all: &BTreeMap<u32, Vec<(Extent, Spot)>>, extent: Extent, numbers: Range<u32>) -> Vec<(Extent, Option<Found>)> {
        let mut map: OverlayMap<Option<Found>> = OverlayMap::default();
        for (number, list) in all.range(numbers) {
            list.iter().for_each(|(extent, spot)| map.insert_below(*extent, Some((*number, *spot))));
        }
        map.insert_below(extent, None);
        map.overlapping(extent).iter().map(|p| (p.extent, p.source.map(|(n, s)| (n, shift(s, p.skip))))).collect()
    }

    proptest! {
        #[test]
        fn it_answers_as_a_map_of_every_interval_does(
            lists in intervals(), from in 0u32..14, asked in (0..SECTORS, 1u64..600), removed in proptest::collection::vec(0u32..14, 0..4),
            forgotten in 0u32..6, settled in any::<bool>(), merged in proptest::option::of(0u32..14),
        ) {
            let mut atlas = Atlas::default();
            let mut all = BTreeMap::new();
            for (number, list) in lists.iter().enumerate() {
                atlas.add(number as u32, entries(list));
                all.insert(number as u32, entries(list));
            }
            atlas.remove(|n| removed.contains(&n));
            all.retain(|n, _| !removed.contains(n));
            // What a merge leaves stands under the number of the first.
            if let Some(number) = merged {
                atlas.remove(|n| n == number);
                atlas.add(number, entries(&lists[0]));
                all.insert(number, entries(&lists[0]));
            }
            atlas.forget_before(forgotten.min(from));
            if settled {
                atlas.settle();
            }
            let extent = Extent::new(asked.0 * SECTOR, asked.1.min(SECTORS - asked.0) * SECTOR);
            let answer = atlas.resolve(extent, from..14);
            prop_assert_eq!(by_sector(&answer), by_sector(&naive(&all, extent, from..14)));
            // Any bytes: the same, clipped.
            if extent.len > 600 {
                let inner = Extent::new(extent.offset + 100, extent.len - 300);
                let clipped = atlas.resolve(inner, from..14);
                prop_assert_eq!(clipped.iter().map(|(e, _)| e.len).sum::<u64>(), inner.len);
                let expected = naive(&all, inner, from..14);
                for (part, found) in clipped {
                    let piece = expected.iter().find(|(e, _)| e.offset <= part.offset && part.offset < e.end()).unwrap();
                    prop_assert_eq!(found, piece.1.map(|(n, s)| (n, shift(s, part.offset - piece.0.offset))));
                }
            }
            // Data is never skipped, and where nothing has data nothing is told.
            let mut has = vec![false; SECTORS as usize + 4096];
            for (extent, spot) in all.range(from..14).flat_map(|(_, l)| l).filter(|(_, s)| s.data_at.is_some()) {
                (extent.offset / SECTOR..extent.end() / SECTOR).for_each(|s| has[s as usize] = true);
                let _ = spot;
            }
            let mut at = extent.offset;
            while let Some(next) = atlas.next_data(at, from..14, false) {
                prop_assert!(next.offset >= at && next.len > 0);
                prop_assert!(has[(at / SECTOR) as usize..(next.offset / SECTOR) as usize].iter().all(|h| !h));
                prop_assert!(has[(next.offset / SECTOR) as usize..(next.end() / SECTOR) as usize].iter().all(|h| *h));
                at = next.end();
            }
            prop_assert!(has[(at / SECTOR) as usize..].iter().all(|h| !h));
        }
    }

    #[test]
    fn an_extent_costs_sixteen_bytes_and_a_trim_of_a_whole_disk_next_to_nothing() {
        let mut atlas = Atlas::default();
        let spot = Spot { record_at: 4096, stored: 69632, data_at: Some(0) };
        for number in 0..100 {
            atlas.add(number, (0..1000).map(|n| (Extent::new((n * 100 + u64::from(number)) * TILE, TILE), spot)));
        }
        assert_eq!((atlas.len(), atlas.bytes()), (100_000, 1_600_000));
        assert!(atlas.runs.len() < 18, "{}", atlas.runs.len());
        atlas.add(100, [(Extent::new(0, 1 << 40), Spot { data_at: None, ..spot })]);
        assert!(atlas.bytes() < 1_600_100);
        assert_eq!(
            atlas.resolve(Extent::new(1 << 39, TILE), 0..101),
            [(Extent::new(1 << 39, TILE), Some((100, Spot { data_at: None, ..spot })))]
        );
    }
}
