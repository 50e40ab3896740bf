//! The metadata region of a VHDX.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tidegate_fuzz::vhdx_metadata(data));
