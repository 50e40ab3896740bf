//! A whole VHDX of 4 MiB and one block: opened, checked and read.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tidegate_fuzz::vhdx_image(data));
