//! Prefixes and messages between process server and master target.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tidegate_fuzz::wire_forward(data));
