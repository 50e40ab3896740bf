//! Bytes of a dirty map file. Parses; decides nothing.
//!
//! | offset | size | content |
//! |---|---|---|
//! | 0, 4096 | 512 | two headers; the valid one with the larger sequence counts |
//! | 8192 | 512 each | bit sectors: 508 bytes of bits, CRC-32C of them |
//!
//! Header: 0 magic `TGDM`, 4 version u32 (3), 8 sequence u64, 16 disk 16, 32 size u64, 40 region bytes u64, 48 epoch u64,
//! 56 generation u64, 64 flags u32 (bit 0: initial replication not finished), 68 origin u64, 76 cleaned epoch u64,
//! 84 cleaned sequence u64, 92 CRC-32C of bytes 0..92. Version 2 ends with the origin, and its CRC stands at 76.
//!
//! A sector is written by the device as a whole, so each is old or new after a power loss; both cover what was durable.
//! A sector whose checksum does not match counts as all ones.

use uuid::Uuid;

use crate::checksum;
use crate::model::{DiskId, Position, RegionSet};

/// Unit that a device writes as a whole.
pub const SECTOR_LEN: usize = 512;
/// Where the headers stand.
pub const HEADER_AT: [u64; 2] = [0, 4096];
/// Where the bits begin.
pub const BITS_AT: u64 = 8192;
/// Regions in one bit sector.
pub const REGIONS_PER_SECTOR: u64 = 508 * 8;
const MAGIC: [u8; 4] = *b"TGDM";
const VERSION: u32 = 3;

/// What the map remembers besides the bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// The larger of two valid headers counts.
    pub sequence: u64,
    /// Whose map.
    pub disk: DiskId,
    /// Bytes of the disk.
    pub size: u64,
    /// Bytes of a region.
    pub region: u64,
    /// The stream's last epoch.
    pub epoch: u64,
    /// The replica's history; 0 when there is none yet.
    pub generation: u64,
    /// Initial replication has not finished.
    pub initial: bool,
    /// Which file or device it was, see [`super::DirtyMap::open`].
    pub origin: u64,
    /// Regions were marked clean because the master target stood here, or later. One that stands before this lost what it had.
    pub cleaned: Position,
}

impl Header {
    /// The header's sector.
    pub fn encode(&self) -> [u8; SECTOR_LEN] {
        let mut out = [0; SECTOR_LEN];
        out[..4].copy_from_slice(&MAGIC);
        out[4..8].copy_from_slice(&VERSION.to_le_bytes());
        out[8..16].copy_from_slice(&self.sequence.to_le_bytes());
        out[16..32].copy_from_slice(self.disk.0.as_bytes());
        for (slot, value) in out[32..64].chunks_exact_mut(8).zip([self.size, self.region, self.epoch, self.generation]) {
            slot.copy_from_slice(&value.to_le_bytes());
        }
        out[64..68].copy_from_slice(&u32::from(self.initial).to_le_bytes());
        out[68..76].copy_from_slice(&self.origin.to_le_bytes());
        out[76..84].copy_from_slice(&self.cleaned.epoch.to_le_bytes());
        out[84..92].copy_from_slice(&self.cleaned.sequence.to_le_bytes());
        let crc = checksum::crc32c(&out[..92]);
        out[92..96].copy_from_slice(&crc.to_le_bytes());
        out
    }

    /// `None` unless magic, version and checksum are right.
    pub fn decode(bytes: &[u8]) -> Option<Header> {
        let u64_at = |at: usize| Some(u64::from_le_bytes(*bytes.get(at..)?.first_chunk()?));
        let u32_at = |at: usize| Some(u32::from_le_bytes(*bytes.get(at..)?.first_chunk()?));
        if bytes.get(..4)? != MAGIC {
            return None;
        }
        let (crc_at, cleaned) = match u32_at(4)? {
            VERSION => (92, Position::new(u64_at(76)?, u64_at(84)?)),
            2 => (76, Position::default()),
            _ => return None,
        };
        if u32_at(crc_at)? != checksum::crc32c(&bytes[..crc_at]) {
            return None;
        }
        Some(Header {
            sequence: u64_at(8)?,
            disk: DiskId(Uuid::from_slice(&bytes[16..32]).ok()?),
            size: u64_at(32)?,
            region: u64_at(40)?,
            epoch: u64_at(48)?,
            generation: u64_at(56)?,
            initial: u32_at(64)? & 1 != 0,
            origin: u64_at(68)?,
            cleaned,
        })
    }
}

/// Number of bit sectors for so many regions.
pub fn sectors(regions: u64) -> u64 {
    regions.div_ceil(REGIONS_PER_SECTOR)
}

/// The bytes of one bit sector.
pub fn encode_sector(bits: &RegionSet, sector: u64) -> [u8; SECTOR_LEN] {
    let mut out = [0; SECTOR_LEN];
    let first = sector * REGIONS_PER_SECTOR;
    let last = (first + REGIONS_PER_SECTOR).min(bits.regions());
    let mut at = first;
    while let Some(region) = bits.next_from(at).filter(|&r| r < last) {
        let bit = region - first;
        out[(bit / 8) as usize] |= 1 << (bit % 8);
        at = region + 1;
    }
    let crc = checksum::crc32c(&out[..508]);
    out[508..].copy_from_slice(&crc.to_le_bytes());
    out
}

/// Adds the regions of one bit sector to `bits`; all of them if the sector is damaged. False if it was.
pub fn decode_sector(bytes: &[u8], sector: u64, bits: &mut RegionSet) -> bool {
    let first = sector * REGIONS_PER_SECTOR;
    let last = (first + REGIONS_PER_SECTOR).min(bits.regions());
    let whole = bytes.len() == SECTOR_LEN && checksum::crc32c(&bytes[..508]).to_le_bytes() == bytes[508..];
    for region in first..last {
        let bit = region - first;
        if !whole || bytes[(bit / 8) as usize] & 1 << (bit % 8) != 0 {
            bits.insert(region);
        }
    }
    whole
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn bits_round_trip(members in proptest::collection::btree_set(0u64..9000, 0..200)) {
            let mut bits = RegionSet::empty(9000);
            for &m in &members { bits.insert(m); }
            let mut back = RegionSet::empty(9000);
            for sector in 0..sectors(9000) {
                prop_assert!(decode_sector(&encode_sector(&bits, sector), sector, &mut back));
            }
            prop_assert_eq!(back, bits);
        }

        #[test]
        fn a_damaged_sector_counts_as_all_dirty(at in 0usize..SECTOR_LEN, xor in 1u8..) {
            let mut bytes = encode_sector(&RegionSet::empty(100), 0);
            bytes[at] ^= xor;
            let mut back = RegionSet::empty(100);
            prop_assert!(!decode_sector(&bytes, 0, &mut back));
            prop_assert_eq!(back.count(), 100);
        }
    }

    #[test]
    fn header_round_trips() {
        let header = Header {
            sequence: 4,
            disk: DiskId(Uuid::from_u128(9)),
            size: 1 << 30,
            region: 1 << 20,
            epoch: 3,
            generation: 8,
            initial: true,
            origin: 77,
            cleaned: Position::new(3, 99),
        };
        assert_eq!(Header::decode(&header.encode()), Some(header));
        let mut old = header.encode();
        old[4..8].copy_from_slice(&2u32.to_le_bytes());
        let crc = checksum::crc32c(&old[..76]);
        old[76..80].copy_from_slice(&crc.to_le_bytes());
        assert_eq!(Header::decode(&old), Some(Header { cleaned: Position::default(), ..header }), "a map of the version before");
        assert_eq!(Header::decode(&[0; 512]), None);
        assert_eq!(Header::decode(&[]), None);
    }
}
