//! Byte ranges of a disk, and the map in which later ranges cover earlier ones.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// A run of bytes of a disk: `[offset, offset + len)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Extent {
    /// First byte.
    pub offset: u64,
    /// Number of bytes.
    pub len: u64,
}

impl Extent {
    /// The extent of `len` bytes from `offset`.
    pub const fn new(offset: u64, len: u64) -> Self {
        Self { offset, len }
    }

    /// One past the last byte; saturates, so that hostile values cannot wrap.
    pub const fn end(&self) -> u64 {
        self.offset.saturating_add(self.len)
    }

    /// Whether both share a byte.
    pub const fn overlaps(&self, other: &Extent) -> bool {
        self.offset < other.end() && other.offset < self.end()
    }

    /// Whether the extent is not empty, does not wrap and ends within `size` bytes.
    pub fn fits(&self, size: u64) -> bool {
        self.len > 0 && self.offset.checked_add(self.len).is_some_and(|end| end <= size)
    }

    /// The smallest extent that contains this one, begins and ends at multiples of `unit`, and ends by `size`.
    pub fn aligned_out(&self, unit: u64, size: u64) -> Extent {
        let offset = self.offset / unit * unit;
        let end = self.end().div_ceil(unit).saturating_mul(unit).min(size.max(self.end()));
        Extent::new(offset, end - offset)
    }
}

/// A piece of an [`OverlayMap`]: which source covers it, and how many bytes into that source it begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece<S> {
    /// Where the piece stands on the disk.
    pub extent: Extent,
    /// What was inserted.
    pub source: S,
    /// Bytes of the inserted extent that precede this piece.
    pub skip: u64,
}

/// Extents inserted in order, later ones hiding what they cover. Used to fold changes and to resolve points.
#[derive(Clone, Debug)]
pub struct OverlayMap<S> {
    pieces: BTreeMap<u64, (u64, S, u64)>,
}

impl<S> Default for OverlayMap<S> {
    fn default() -> Self {
        Self { pieces: BTreeMap::new() }
    }
}

impl<S: Copy> OverlayMap<S> {
    /// Covers `extent` with `source`, hiding everything inserted there before. Empty extents change nothing.
    pub fn insert(&mut self, extent: Extent, source: S) {
        if extent.len == 0 {
            return;
        }
        let (start, end) = (extent.offset, extent.end());
        if let Some((&at, &(len, old, skip))) = self.pieces.range(..start).next_back()
            && at + len > start
        {
            self.pieces.insert(at, (start - at, old, skip));
            if at + len > end {
                self.pieces.insert(end, (at + len - end, old, skip + (end - at)));
            }
        }
        let covered: Vec<u64> = self.pieces.range(start..end).map(|(&at, _)| at).collect();
        for at in covered {
            if let Some((len, old, skip)) = self.pieces.remove(&at)
                && at + len > end
            {
                self.pieces.insert(end, (at + len - end, old, skip + (end - at)));
            }
        }
        self.pieces.insert(start, (extent.len, source, 0));
    }

    /// Covers only those parts of `extent` that nothing covers yet: the earlier insertion wins.
    pub fn insert_below(&mut self, extent: Extent, source: S) {
        let mut gaps = Vec::new();
        let mut at = extent.offset;
        for piece in self.overlapping(extent) {
            if piece.extent.offset > at {
                gaps.push(Extent::new(at, piece.extent.offset - at));
            }
            at = at.max(piece.extent.end());
        }
        if at < extent.end() {
            gaps.push(Extent::new(at, extent.end() - at));
        }
        for gap in gaps {
            self.pieces.insert(gap.offset, (gap.len, source, gap.offset - extent.offset));
        }
    }

    /// All pieces in order of offset.
    pub fn iter(&self) -> impl Iterator<Item = Piece<S>> + '_ {
        self.pieces.iter().map(|(&at, &(len, source, skip))| Piece { extent: Extent::new(at, len), source, skip })
    }

    /// The pieces that share a byte with `extent`, clipped to it, in order of offset.
    pub fn overlapping(&self, extent: Extent) -> Vec<Piece<S>> {
        let before = self.pieces.range(..extent.offset).next_back();
        let within = self.pieces.range(extent.offset..extent.end());
        before
            .into_iter()
            .chain(within)
            .filter_map(|(&at, &(len, source, skip))| {
                let start = at.max(extent.offset);
                let end = (at + len).min(extent.end());
                (start < end).then(|| Piece { extent: Extent::new(start, end - start), source, skip: skip + (start - at) })
            })
            .collect()
    }

    /// What is left of the first piece that ends after `offset`.
    pub fn next_from(&self, offset: u64) -> Option<Extent> {
        let before = self.pieces.range(..offset).next_back();
        let after = self.pieces.range(offset..).next();
        let found = before.into_iter().chain(after).find(|(at, (len, ..))| *at + len > offset);
        found.map(|(&at, &(len, ..))| Extent::new(at.max(offset), at + len - at.max(offset)))
    }

    /// Number of pieces.
    pub fn len(&self) -> usize {
        self.pieces.len()
    }

    /// Whether nothing is covered.
    pub fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn overlay_equals_an_array_where_the_last_write_wins(
            writes in proptest::collection::vec((0u64..200, 0u64..60, any::<bool>()), 0..40),
        ) {
            let mut map = OverlayMap::default();
            let mut model = vec![None; 300];
            for (index, &(offset, len, below)) in writes.iter().enumerate() {
                let extent = Extent::new(offset, len);
                if below { map.insert_below(extent, index) } else { map.insert(extent, index) }
                for at in offset..offset + len {
                    let cell = &mut model[at as usize];
                    if !below || cell.is_none() {
                        *cell = Some((index, at - offset));
                    }
                }
            }
            let mut seen = vec![None; 300];
            for piece in map.iter() {
                for i in 0..piece.extent.len {
                    let cell = &mut seen[(piece.extent.offset + i) as usize];
                    prop_assert!(cell.is_none(), "pieces must not overlap");
                    *cell = Some((piece.source, piece.skip + i));
                }
            }
            prop_assert_eq!(&seen, &model);
            let window = Extent::new(50, 70);
            for piece in map.overlapping(window) {
                prop_assert!(piece.extent.offset >= 50 && piece.extent.end() <= 120);
                prop_assert_eq!(model[piece.extent.offset as usize], Some((piece.source, piece.skip)));
            }
        }

        #[test]
        fn aligning_out_contains_and_is_aligned(offset in 0u64..10_000, len in 1u64..9000) {
            let size = 20_000;
            let out = Extent::new(offset, len).aligned_out(4096, size);
            prop_assert!(out.offset <= offset && out.end() >= offset + len);
            prop_assert_eq!(out.offset % 4096, 0);
            prop_assert!(out.end().is_multiple_of(4096) || out.end() == size);
        }
    }
}
