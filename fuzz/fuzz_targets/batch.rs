//! Sealed batches: header, table, marker.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tidegate::wire::batch::{BatchHeader, HEADER_LEN, parse_entries, parse_marker};

fuzz_target!(|data: &[u8]| {
    if let Ok(header) = BatchHeader::decode(data) {
        let body = &data[HEADER_LEN..];
        if let Ok(entries) = parse_entries(&header, body) {
            for entry in entries {
                assert!(entry.data_at.is_none_or(|at| u64::from(at) + entry.extent.len <= u64::from(header.data_len)));
            }
        }
        let _ = parse_marker(&header, body);
    }
});
