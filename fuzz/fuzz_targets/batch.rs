//! Sealed batches: header, table, marker.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tidegate_fuzz::batch(data));
