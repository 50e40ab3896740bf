//! The header of a sparse VMDK, and the marker of a grain.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tidegate_fuzz::vmdk_header(data));
