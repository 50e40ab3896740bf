//! Structures of a VMDK made by somebody else: header, descriptor, grain tables, markers.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tidegate::disk::places::Table;
use tidegate::disk::vmdk::descriptor::{Descriptor, with_cid};
use tidegate::disk::vmdk::format::{Header, decode_grain_marker};
use tidegate::disk::vmdk::grains::{Grains, page_of};

fuzz_target!(|data: &[u8]| {
    if let Ok(descriptor) = Descriptor::parse(data)
        && !descriptor.has_parent()
    {
        // What was understood is written so that it reads the same.
        let again = Descriptor::parse(descriptor.encode().as_bytes());
        assert!(again.is_ok_and(|a| a.extents == descriptor.extents) || descriptor.extents.iter().any(|e| e.offset > 0));
    }
    let _ = with_cid(data, 7);
    let _ = decode_grain_marker(data);
    if let Ok(header) = Header::decode(data) {
        let mut table = Table::default();
        for (number, raw) in data.get(512..).unwrap_or_default().chunks(2048).enumerate() {
            table.load(number as u64, page_of(raw));
        }
        let _ = Grains::load(header, table, vec![21], vec![31], 1 << 40);
    }
});
