//! Folds the changes of a batch: later writes replace earlier ones, neighbours join, zeroes become zero extents. Pure.

use super::batcher::RawBatch;
use crate::model::change::ZERO_BYTES_MAX;
use crate::model::{BLOCK, Extent, OverlayMap, Trailer};
use crate::wire::batch::{BATCH_EXTENTS_MAX, push_entry};

/// Zero runs shorter than this stay data: LZ4 packs them as well, and each run cuts an extent.
const ZERO_RUN_MIN: u64 = 4 * BLOCK;

/// What folding left, ready to be sealed.
#[derive(Debug, Default)]
pub struct Folded {
    /// Data, table and marker, see [`crate::wire::batch`].
    pub body: Vec<u8>,
    /// Length of the data.
    pub data_len: usize,
    /// Table entries.
    pub extents: usize,
    /// Length of the marker.
    pub marker_len: usize,
}

/// Folds `batch` into `out`, whose buffer is reused.
pub fn fold(batch: &RawBatch, out: &mut Folded) {
    let mut map = OverlayMap::default();
    for (index, change) in batch.changes.iter().enumerate() {
        map.insert(change.extent, index);
    }
    out.body.clear();
    let mut table: Vec<(Extent, bool)> = Vec::new();
    for piece in map.iter() {
        match &batch.changes[piece.source].data {
            None => push(&mut table, piece.extent, true),
            Some(data) => {
                let bytes = &data[piece.skip as usize..(piece.skip + piece.extent.len) as usize];
                fold_data(piece.extent, bytes, &mut table, &mut out.body);
            }
        }
    }
    out.data_len = out.body.len();
    out.extents = table.len();
    for (extent, zero) in table {
        push_entry(&mut out.body, extent, zero);
    }
    let table_end = out.body.len();
    let bytes = match &batch.trailer {
        None => Vec::new(),
        Some(Trailer::Mark(marker)) => postcard::to_stdvec(marker).expect("a marker within its bounds encodes"),
        Some(Trailer::Digest(digest)) => postcard::to_stdvec(digest).expect("a digest within its bounds encodes"),
    };
    out.body.extend_from_slice(&bytes);
    out.marker_len = out.body.len() - table_end;
}

/// Splits one piece into data and runs of zero blocks, as long as the table has room.
fn fold_data(extent: Extent, bytes: &[u8], table: &mut Vec<(Extent, bool)>, body: &mut Vec<u8>) {
    let mut at = 0;
    while at < bytes.len() {
        let room = table.len() + 4 < BATCH_EXTENTS_MAX / 2;
        let (start, end) = if room { next_zero_run(bytes, at) } else { (bytes.len(), bytes.len()) };
        if start > at {
            push(table, Extent::new(extent.offset + at as u64, (start - at) as u64), false);
            body.extend_from_slice(&bytes[at..start]);
        }
        if end > start {
            push(table, Extent::new(extent.offset + start as u64, (end - start) as u64), true);
        }
        at = end;
    }
}

/// The next run of zeroes worth an extent of its own at or after `from`; (len, len) if there is none.
fn next_zero_run(bytes: &[u8], from: usize) -> (usize, usize) {
    let block = BLOCK as usize;
    let mut start = None;
    let mut at = from;
    while at < bytes.len() {
        let end = (at + block).min(bytes.len());
        if is_zero(&bytes[at..end]) {
            start.get_or_insert(at);
        } else if let Some(run) = start.take()
            && (at - run) as u64 >= ZERO_RUN_MIN
        {
            return (run, at);
        }
        at = end;
    }
    match start {
        Some(run) if (bytes.len() - run) as u64 >= ZERO_RUN_MIN || run == 0 => (run, bytes.len()),
        _ => (bytes.len(), bytes.len()),
    }
}

fn is_zero(bytes: &[u8]) -> bool {
    // The first word decides for nearly all data.
    let (words, tail) = bytes.as_chunks::<8>();
    words.first().is_none_or(|w| *w == [0; 8])
        && words.iter().fold(0, |any, w| any | u64::from_le_bytes(*w)) == 0
        && tail.iter().all(|&b| b == 0)
}

/// Adds an extent, joining it to the one before if it continues it.
fn push(table: &mut Vec<(Extent, bool)>, extent: Extent, zero: bool) {
    let limit = if zero { ZERO_BYTES_MAX } else { u64::from(u32::MAX) };
    match table.last_mut() {
        Some((last, kind)) if *kind == zero && last.end() == extent.offset && last.len + extent.len <= limit => last.len += extent.len,
        _ => table.push((extent, zero)),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::clock::Mono;
    use crate::model::DiskId;
    use crate::process_server::optimize::batcher::Collected;
    use crate::storage::AlignedBuf;
    use crate::wire::batch::{BatchHeader, parse_entries};

    proptest! {
        /// Applying the folded batch gives the same disk as applying the changes one by one.
        #[test]
        fn folding_changes_nothing_but_the_size(writes in proptest::collection::vec((0u64..60, 1u64..40, 0u8..4), 1..40)) {
            let sector = 1024;
            let mut model = vec![0xeeu8; 100 * sector];
            let mut changes = Vec::new();
            for (offset, len, fill) in writes {
                let extent = Extent::new(offset * sector as u64, len * sector as u64);
                let range = extent.offset as usize..extent.end() as usize;
                // Fill 0 is written as data that happens to be zero, 3 as a zero extent.
                model[range.clone()].fill(if fill == 3 { 0 } else { fill });
                let data = (fill != 3).then(|| { let mut d = AlignedBuf::zeroed(range.len()); d.fill(fill); d });
                changes.push(Collected { extent, data });
            }
            let batch = RawBatch { epoch: 1, first: 1, last: 9, changes, trailer: None, captured: Mono(0), cost: 0 };
            let mut folded = Folded::default();
            fold(&batch, &mut folded);
            let header = BatchHeader {
                epoch: 1, first: 1, last: 9, data_len: folded.data_len as u32, extents: folded.extents as u32, stored_len: 16,
                ..BatchHeader::new(DiskId(uuid::Uuid::nil()), 1)
            };
            let mut applied = vec![0xeeu8; 100 * sector];
            for entry in parse_entries(&header, &folded.body).unwrap() {
                let range = entry.extent.offset as usize..entry.extent.end() as usize;
                match entry.data_at {
                    Some(at) => applied[range.clone()].copy_from_slice(&folded.body[at as usize..at as usize + range.len()]),
                    None => applied[range].fill(0),
                }
            }
            prop_assert!(applied == model);
        }
    }
}
