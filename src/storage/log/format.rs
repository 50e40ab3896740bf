//! Bytes of a log segment and of its records. Parses; decides nothing.
//!
//! A segment is a file of fixed size. Its first page:
//!
//! | offset | size | field |
//! |---|---|---|
//! | 0 | 8 | magic `TGSEG\0\0\1` (the last byte is the version) |
//! | 8 | 16 | log id: which server's log this belongs to |
//! | 24 | 8 | incarnation: new, random, each time the file is used again |
//! | 32 | 4 | CRC-32C of bytes 0..32 |
//!
//! From byte 4096 on, records follow each other, each beginning at a multiple of 4096 and padded with zeroes:
//!
//! | offset | size | field |
//! |---|---|---|
//! | 0 | 4 | magic `TGR1` |
//! | 4 | 4 | CRC-32C of bytes 8..24 and of the body |
//! | 8 | 8 | incarnation of the segment, so that records of an earlier use do not pass |
//! | 16 | 4 | body length |
//! | 20 | 4 | in files whose records stand closer: bytes to the next one; else 0 |
//! | 24 | 40 | 0 |
//! | 64 | | body |

use uuid::Uuid;

use crate::checksum;
use crate::storage::aligned::ALIGN;

/// Bytes before a record's body. Writers leave this much room in front.
pub const RECORD_HEADER_LEN: usize = 64;
/// Bytes before the first record.
pub const SEGMENT_HEADER_LEN: usize = ALIGN;
const SEGMENT_MAGIC: [u8; 8] = *b"TGSEG\0\0\x01";
const RECORD_MAGIC: [u8; 4] = *b"TGR1";

/// What the first page of a segment says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SegmentHeader {
    /// The log it belongs to.
    pub log: Uuid,
    /// This use of the file.
    pub incarnation: u64,
}

impl SegmentHeader {
    /// The first bytes of the page.
    pub fn encode(&self) -> [u8; 36] {
        let mut out = [0; 36];
        out[..8].copy_from_slice(&SEGMENT_MAGIC);
        out[8..24].copy_from_slice(self.log.as_bytes());
        out[24..32].copy_from_slice(&self.incarnation.to_le_bytes());
        let crc = checksum::crc32c(&out[..32]);
        out[32..].copy_from_slice(&crc.to_le_bytes());
        out
    }

    /// `None` if the page is not a header, as after a crash while the file was made.
    pub fn decode(page: &[u8]) -> Option<SegmentHeader> {
        let head = page.first_chunk::<36>()?;
        if head[..8] != SEGMENT_MAGIC || le_u32(&head[32..]) != checksum::crc32c(&head[..32]) {
            return None;
        }
        Some(SegmentHeader { log: Uuid::from_slice(&head[8..24]).ok()?, incarnation: le_u64(&head[24..]) })
    }
}

/// Bytes a record with this body takes in its segment.
pub fn record_len(body_len: usize) -> usize {
    (RECORD_HEADER_LEN + body_len).next_multiple_of(ALIGN)
}

/// Writes the header into the room before the body. `record` is header room and body, without padding.
pub fn finish_record(record: &mut [u8], incarnation: u64) {
    finish_close_record(record, incarnation, 0);
}

/// The same for a record that the next one follows after `span` bytes, at most a page behind its own end.
pub fn finish_close_record(record: &mut [u8], incarnation: u64, span: usize) {
    let body_len = record.len() - RECORD_HEADER_LEN;
    record[..RECORD_HEADER_LEN].fill(0);
    record[..4].copy_from_slice(&RECORD_MAGIC);
    record[8..16].copy_from_slice(&incarnation.to_le_bytes());
    record[16..20].copy_from_slice(&(body_len as u32).to_le_bytes());
    record[20..24].copy_from_slice(&(span as u32).to_le_bytes());
    let crc = record_crc(record, body_len);
    record[4..8].copy_from_slice(&crc.to_le_bytes());
}

/// The body length of a record header, if it is one of this incarnation and not longer than `max`. The body is not checked.
pub fn peek_record(bytes: &[u8], incarnation: u64, max: usize) -> Option<usize> {
    let head = bytes.first_chunk::<RECORD_HEADER_LEN>()?;
    let body_len = le_u32(&head[16..]) as usize;
    (head[..4] == RECORD_MAGIC && le_u64(&head[8..]) == incarnation && body_len > 0 && body_len <= max).then_some(body_len)
}

/// Bytes from the begin of a whole record to the next.
pub fn span_of(record: &[u8], body_len: usize) -> usize {
    match le_u32(&record[20..]) as usize {
        span if span < RECORD_HEADER_LEN + body_len => record_len(body_len),
        span => span.min(record_len(body_len) + ALIGN),
    }
}

/// The incarnation that a record's header says, whether it is one or not.
pub fn incarnation_of(bytes: &[u8]) -> u64 {
    bytes.get(8..).and_then(<[u8]>::first_chunk).map_or(0, |field| u64::from_le_bytes(*field))
}

/// Whether `record` (header and body, padding allowed) is undamaged.
pub fn record_is_whole(record: &[u8], body_len: usize) -> bool {
    record.len() >= RECORD_HEADER_LEN + body_len && le_u32(&record[4..]) == record_crc(record, body_len)
}

fn record_crc(record: &[u8], body_len: usize) -> u32 {
    let head = checksum::crc32c(&record[8..24]);
    checksum::crc32c_append(head, &record[RECORD_HEADER_LEN..RECORD_HEADER_LEN + body_len])
}

fn le_u32(bytes: &[u8]) -> u32 {
    u32::from_le_bytes(*bytes.first_chunk().expect("caller passes four bytes"))
}

fn le_u64(bytes: &[u8]) -> u64 {
    u64::from_le_bytes(*bytes.first_chunk().expect("caller passes eight bytes"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_record_passes_and_any_flipped_bit_does_not(body in proptest::collection::vec(any::<u8>(), 1..300), flip in any::<prop::sample::Index>()) {
            let mut record = vec![0; RECORD_HEADER_LEN];
            record.extend_from_slice(&body);
            finish_record(&mut record, 42);
            prop_assert_eq!(peek_record(&record, 42, 1000), Some(body.len()));
            prop_assert!(record_is_whole(&record, body.len()));
            prop_assert_eq!(peek_record(&record, 43, 1000), None, "a record of an earlier use must not pass");
            let bit = flip.index(24 * 8 + body.len() * 8);
            let byte = if bit < 24 * 8 { bit / 8 } else { RECORD_HEADER_LEN + (bit - 24 * 8) / 8 };
            record[byte] ^= 1 << (bit % 8);
            let passes = peek_record(&record, 42, 1000).is_some_and(|len| record_is_whole(&record, len));
            prop_assert!(!passes);
        }

        #[test]
        fn any_page_decodes_or_not_without_panic(page in proptest::collection::vec(any::<u8>(), 0..100)) {
            let _ = SegmentHeader::decode(&page);
            let _ = peek_record(&page, 1, 1000);
        }
    }

    #[test]
    fn segment_header_round_trips() {
        let header = SegmentHeader { log: Uuid::from_u128(5), incarnation: 6 };
        assert_eq!(SegmentHeader::decode(&header.encode()), Some(header));
    }
}
