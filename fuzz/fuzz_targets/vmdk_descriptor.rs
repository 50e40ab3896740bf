//! The descriptor of a VMDK.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tidegate_fuzz::vmdk_descriptor(data));
