//! The index of a closed interval: where the old content of each extent stands in the file. Bytes only.
//!
//! Written after the last record as records of their own (the framing of [`crate::storage::log::format`]), each body:
//! magic `TGIX`, entries u32, entries in all u64, then entries of 32 bytes: offset u64, length u64, record offset u64,
//! record body length u32, place in the record's data u32 (all ones: zeroes).

use crate::model::Extent;
use crate::wire::batch::BATCH_BYTES_MAX;

/// Most entries of one index record: 512 KiB.
pub const ENTRIES_MAX: usize = 16384;
/// Magic of an index record's body.
pub const MAGIC: [u8; 4] = *b"TGIX";
const HEAD_LEN: usize = 16;
/// No record stands here or behind: more than a file can have.
const RECORDS_END: u64 = 1 << 62;
const ENTRY_LEN: usize = 32;

/// Where an extent's old content is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Source {
    /// First byte of the record in the file.
    pub record_at: u64,
    /// Length of its body.
    pub body_len: u32,
    /// Place in the record's data; `None` for zeroes.
    pub data_at: Option<u32>,
}

/// One index record's body; `total` counts the entries of all of them.
pub fn encode(entries: &[(Extent, Source)], total: u64) -> Vec<u8> {
    debug_assert!(entries.len() <= ENTRIES_MAX, "callers cut the index into records");
    let mut out = MAGIC.to_vec();
    out.extend_from_slice(&(entries.len() as u32).to_le_bytes());
    out.extend_from_slice(&total.to_le_bytes());
    for (extent, source) in entries {
        for field in [extent.offset, extent.len, source.record_at] {
            out.extend_from_slice(&field.to_le_bytes());
        }
        out.extend_from_slice(&source.body_len.to_le_bytes());
        out.extend_from_slice(&source.data_at.unwrap_or(u32::MAX).to_le_bytes());
    }
    out
}

/// The entries of an index record's body and how many there are in all; `None` if it is not one.
pub fn decode(body: &[u8]) -> Option<(Vec<(Extent, Source)>, u64)> {
    let u32_at = |at: usize| Some(u32::from_le_bytes(*body.get(at..)?.first_chunk()?));
    let u64_at = |at: usize| Some(u64::from_le_bytes(*body.get(at..)?.first_chunk()?));
    let count = u32_at(4)? as usize;
    if body.get(..4)? != MAGIC || count > ENTRIES_MAX || body.len() != HEAD_LEN + count * ENTRY_LEN {
        return None;
    }
    let entries = (0..count).map(|index| {
        let at = HEAD_LEN + index * ENTRY_LEN;
        let extent = Extent::new(u64_at(at)?, u64_at(at + 8)?);
        let data_at = Some(u32_at(at + 28)?).filter(|&d| d != u32::MAX);
        let (record_at, body_len) = (u64_at(at + 16)?, u32_at(at + 24)?);
        let sane = extent.fits(u64::MAX) && record_at < RECORDS_END && body_len as usize <= BATCH_BYTES_MAX;
        sane.then_some((extent, Source { record_at, body_len, data_at }))
    });
    Some((entries.collect::<Option<Vec<_>>>()?, u64_at(8)?))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn entries_round_trip(fields in proptest::collection::vec((0u64..1 << 40, 1u64..1 << 30, 0..RECORDS_END, 0..BATCH_BYTES_MAX as u32, proptest::option::of(0u32..u32::MAX)), 0..50)) {
            let entries: Vec<_> = fields.into_iter().map(|(offset, len, record_at, body_len, data_at)| (Extent::new(offset, len), Source { record_at, body_len, data_at })).collect();
            prop_assert_eq!(decode(&encode(&entries, 99)), Some((entries, 99)));
        }

        #[test]
        fn any_bytes_decode_or_not_without_panic(body in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = decode(&body);
        }
    }
}
