//! What old content is cut into: parts, records of them, and runs of records. Pure but for asking an image where its holes are.
//!
//! A record is opened as a whole, whoever wants a byte of it. Parts that lie together on the disk are wanted together and share
//! records of 64 KiB; scattered ones are not, and get smaller records. Those of a run are written as one and stand close.

use super::record::stored_at_most;
use crate::disk::{Disk, DiskError};
use crate::model::Extent;
use crate::model::change::ZERO_BYTES_MAX;
use crate::wire::batch::BATCH_EXTENTS_MAX;

/// Data of one record. Small enough that a read of 64 KiB opens little else, large enough to compress.
const RECORD_DATA: u64 = 64 << 10;
/// The same of parts that do not lie together.
const SCATTERED_DATA: u64 = 16 << 10;
/// Bytes of the records of one run: the largest pooled buffer.
const RUN_BYTES: u64 = 1 << 20;

/// An extent, and whether it is a hole.
pub(super) type Part = (Extent, bool);

/// Whether `next` does not belong into the record that holds `parts` with `held` bytes of content.
fn is_full(parts: &[Part], held: u64, next: Part) -> bool {
    let Some((last, _)) = parts.last() else { return false };
    let most = if last.end() == next.0.offset { RECORD_DATA } else { SCATTERED_DATA };
    held > 0 && held + data_of(&[next]) > most || parts.len() >= BATCH_EXTENTS_MAX
}

/// Bytes of content.
pub(super) fn data_of(parts: &[Part]) -> u64 {
    parts.iter().filter(|(_, hole)| !hole).map(|(extent, _)| extent.len).sum()
}

/// Cuts extents where the image has holes, which need no reading.
pub(super) fn split_holes<D: Disk>(image: &D, extents: Vec<Extent>) -> Result<Vec<Part>, DiskError> {
    let mut parts = Vec::new();
    // To ask takes time in proportion to how much data lies together, so an answer is used as far as it goes.
    let (mut asked, mut next) = (u64::MAX, Extent::new(0, 0));
    for extent in extents {
        let mut at = extent.offset;
        while at < extent.end() {
            if at < asked || at >= next.end() {
                (asked, next) = (at, image.next_data(at)?.unwrap_or(Extent::new(u64::MAX, 0)));
            }
            let data = if next.offset < extent.end() { next } else { Extent::new(extent.end(), 0) };
            if data.offset > at {
                parts.push((Extent::new(at, data.offset - at), true));
            }
            let end = data.end().min(extent.end());
            if end > data.offset {
                parts.push((Extent::new(data.offset.max(at), end - data.offset.max(at)), false));
            }
            at = end.max(data.offset);
        }
    }
    Ok(parts)
}

/// Groups parts into records, cutting long ones.
pub(super) fn group(parts: Vec<Part>) -> Vec<Vec<Part>> {
    let mut groups: Vec<Vec<Part>> = vec![Vec::new()];
    let mut held = 0;
    for (extent, hole) in parts {
        let mut at = extent.offset;
        while at < extent.end() {
            let limit = if hole { ZERO_BYTES_MAX } else { RECORD_DATA };
            let part = (Extent::new(at, limit.min(extent.end() - at)), hole);
            at = part.0.end();
            if groups.last().is_some_and(|group| is_full(group, held, part)) {
                groups.push(Vec::new());
                held = 0;
            }
            held += data_of(&[part]);
            groups.last_mut().expect("there is always one group").push(part);
        }
    }
    groups.retain(|g| !g.is_empty());
    groups
}

/// Records that are sealed and written as one.
pub(super) fn runs(mut groups: &[Vec<Part>]) -> Vec<&[Vec<Part>]> {
    let mut runs = Vec::new();
    while !groups.is_empty() {
        let mut bytes = 0;
        let fits = |group: &&Vec<Part>| {
            bytes += stored_at_most(group);
            bytes <= RUN_BYTES
        };
        let (run, rest) = groups.split_at(groups.iter().take_while(fits).count().max(1));
        runs.push(run);
        groups = rest;
    }
    runs
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn every_byte_is_in_one_record_and_no_record_is_too_large(
            gaps in proptest::collection::vec((prop_oneof![Just(0u64), 1u64..100], 1u64..200, any::<bool>()), 1..200),
        ) {
            let mut at = 0;
            let parts: Vec<Part> = gaps.iter().map(|(gap, blocks, hole)| {
                let extent = Extent::new(at + gap * 4096, blocks * 4096);
                at = extent.end();
                (extent, *hole)
            }).collect();
            let groups = group(parts.clone());
            let bytes = |parts: &[Part]| parts.iter().flat_map(|(e, hole)| (e.offset / 4096..e.end() / 4096).map(move |b| (b, *hole))).collect::<Vec<_>>();
            prop_assert_eq!(bytes(&groups.concat()), bytes(&parts));
            for group in &groups {
                prop_assert!(data_of(group) <= RECORD_DATA);
            }
            let runs = runs(&groups);
            prop_assert_eq!(&runs.concat(), &groups);
            prop_assert!(runs.iter().all(|run| run.len() == 1 || run.iter().map(|g| stored_at_most(g)).sum::<u64>() <= RUN_BYTES));
        }
    }

    #[test]
    fn scattered_parts_get_records_of_their_own_and_neighbours_share() {
        let sizes = |parts: &[(u64, u64)]| {
            let parts = parts.iter().map(|&(at, kib)| (Extent::new(at << 10, kib << 10), false)).collect();
            group(parts).iter().map(|group| data_of(group) >> 10).collect::<Vec<_>>()
        };
        assert_eq!(sizes(&[(0, 16), (100, 16), (200, 16)]), [16, 16, 16]);
        assert_eq!(sizes(&[(0, 4), (100, 4), (200, 4), (300, 4), (400, 4)]), [16, 4]);
        assert_eq!(sizes(&[(0, 16), (16, 16), (32, 32), (64, 16)]), [64, 16]);
        assert_eq!(sizes(&[(0, 200)]), [64, 64, 64, 8]);
        assert_eq!(sizes(&[(0, 40), (100, 4)]), [40, 4]);
    }
}
