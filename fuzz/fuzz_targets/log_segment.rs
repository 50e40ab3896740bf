//! Segment and record headers of the cache and the journal, and the retention journal's index.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tidegate_fuzz::log_segment(data));
