//! A header of a VHDX made by somebody else.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tidegate_fuzz::vhdx_header(data));
