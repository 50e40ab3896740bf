//! Structures of a VHDX made by somebody else.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tidegate::disk::vhdx::bat::Bat;
use tidegate::disk::vhdx::format::{Header, MIB, Metadata, Regions};

fuzz_target!(|data: &[u8]| {
    let _ = Header::decode(data);
    let _ = Regions::decode(data, 1 << 40);
    let _ = Metadata::decode(data);
    let _ = Bat::load(data, (64 * MIB, MIB, 512), 256 * MIB, &[(0, 4 * MIB)]);
});
