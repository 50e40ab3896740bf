//! A whole VMDK, sparse, stream or flat descriptor: opened, checked and read.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tidegate_fuzz::vmdk_image(data));
