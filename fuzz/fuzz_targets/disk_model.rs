//! Random operations on an image of each format against a model in memory.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tidegate_fuzz::disk_model(data));
