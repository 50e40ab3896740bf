//! Grain tables behind a header.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tidegate_fuzz::vmdk_grains(data));
