//! Which points need what an interval lost. Pure.

use crate::model::Extent;

/// What is left of a loss while one goes from the interval that has it to older ones.
///
/// A point at the begin of the damaged interval or before it reads the loss where no interval between has the block: those
/// hide it from the points before them.
#[derive(Clone, Debug)]
pub struct Hunt {
    /// Nobody knows what was lost, so nothing hides it.
    all: bool,
    left: Vec<Extent>,
}

impl Hunt {
    /// The content of `extents` was lost; of anything, if `all`.
    pub fn new(extents: Vec<Extent>, all: bool) -> Self {
        Self { all, left: extents }
    }

    /// Whether a point here, whose disk had `size` bytes, needs what was lost.
    pub fn needs(&self, size: u64) -> bool {
        self.all || self.left.iter().any(|e| e.offset < size)
    }

    /// Whether no older point can need it.
    pub fn is_over(&self) -> bool {
        !self.all && self.left.is_empty()
    }

    /// Goes to before an interval that has `extents`, which are in order and do not overlap.
    pub fn pass(&mut self, extents: &[Extent]) {
        let mut left = Vec::new();
        for lost in &self.left {
            let mut at = lost.offset;
            let first = extents.partition_point(|e| e.end() <= lost.offset);
            for cover in extents[first..].iter().take_while(|e| e.offset < lost.end()) {
                if cover.offset > at {
                    left.push(Extent::new(at, cover.offset - at));
                }
                at = at.max(cover.end());
            }
            if at < lost.end() {
                left.push(Extent::new(at, lost.end() - at));
            }
        }
        self.left = left;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::model::OverlayMap;

    /// Extents in order that do not overlap, as an index has them.
    fn index(extents: &[(u64, u64)]) -> Vec<Extent> {
        let mut map = OverlayMap::default();
        extents.iter().for_each(|&(offset, len)| map.insert_below(Extent::new(offset, len), ()));
        map.iter().map(|p| p.extent).collect()
    }

    proptest! {
        #[test]
        fn a_point_needs_a_loss_if_its_view_resolves_a_byte_to_it(
            intervals in proptest::collection::vec(proptest::collection::vec((0u64..100, 1u64..30), 0..5), 1..7),
            lost in proptest::collection::vec((0u64..100, 1u64..30), 1..4),
            size in 1u64..140,
        ) {
            let intervals: Vec<_> = intervals.iter().map(|i| index(i)).collect();
            let damaged = intervals.len();
            let mut hunt = Hunt::new(index(&lost), false);
            // A point at the begin of each interval, the newest first; the last interval is the damaged one.
            for from in (0..=damaged).rev() {
                let mut view = OverlayMap::default();
                for (number, extents) in intervals.iter().enumerate().skip(from) {
                    extents.iter().for_each(|e| view.insert_below(*e, number));
                }
                index(&lost).iter().for_each(|e| view.insert_below(*e, damaged));
                let resolves = view.iter().any(|p| p.source == damaged && p.extent.offset < size);
                prop_assert_eq!(hunt.needs(size), resolves, "from {}", from);
                prop_assert!(!(hunt.is_over() && resolves));
                if from > 0 {
                    hunt.pass(&intervals[from - 1]);
                }
            }
        }
    }

    #[test]
    fn what_nobody_knows_is_hidden_by_nothing() {
        let mut hunt = Hunt::new(Vec::new(), true);
        hunt.pass(&[Extent::new(0, 1 << 40)]);
        assert!(hunt.needs(1) && !hunt.is_over());
    }
}
