//! The block table of a VHDX.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tidegate_fuzz::vhdx_bat(data));
