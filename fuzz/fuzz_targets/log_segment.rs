//! Segment and record headers of the cache and the journal, and the retention journal's index.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tidegate::master_target::retain::index;
use tidegate::storage::log::format::{SegmentHeader, peek_record, record_is_whole};

fuzz_target!(|data: &[u8]| {
    let _ = SegmentHeader::decode(data);
    if let Some(len) = peek_record(data, 1, 1 << 20) {
        let _ = record_is_whole(data, len);
    }
    let _ = index::decode(data);
});
