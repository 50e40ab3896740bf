//! Structures of a VHDX made by somebody else: header, regions, metadata, block table, log.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tidegate::disk::places::Table;
use tidegate::disk::vhdx::bat::{Bat, Geometry, load_pages};
use tidegate::disk::vhdx::format::{Header, MIB, Metadata, Regions};
use tidegate::disk::vhdx::log;

fuzz_target!(|data: &[u8]| {
    let _ = Header::decode(data);
    let _ = Regions::decode(data, 1 << 40);
    let _ = Metadata::decode(data);
    for differencing in [false, true] {
        let mut table = Table::default();
        load_pages(&mut table, 0, data);
        let geometry = Geometry { size: 64 * MIB, block: MIB, sector: 512, differencing };
        let _ = Bat::load(table, geometry, 256 * MIB, &[(0, 4 * MIB)]);
    }
    let whole = data.len() / log::LOG_SECTOR * log::LOG_SECTOR;
    if let Some(id) = data.get(32..48) {
        let _ = log::replay(&data[..whole], uuid::Uuid::from_bytes_le(id.try_into().expect("sixteen bytes")));
    }
});
