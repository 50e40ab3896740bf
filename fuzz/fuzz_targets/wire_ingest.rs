//! Frames and messages between agent and process server.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tidegate_fuzz::wire_ingest(data));
