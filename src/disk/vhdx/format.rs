//! Bytes of a VHDX file ([MS-VHDX] 2.1 to 2.6): identifier, headers, region table, metadata. Parses; changes nothing.
//!
//! | offset | size | content |
//! |---|---|---|
//! | 0 | 64 KiB | file identifier `vhdxfile` and creator |
//! | 64 KiB, 128 KiB | 4 KiB each | header 1 and 2; the valid one with the larger sequence counts |
//! | 192 KiB, 256 KiB | 64 KiB each | region table and its copy |
//! | 1 MiB and up | | log, BAT, metadata, payload blocks, each at a multiple of 1 MiB |

use crate::checksum;
use uuid::Uuid;

/// Unit of everything in the file.
pub const MIB: u64 = 1 << 20;
/// Where the two headers stand.
pub const HEADER_AT: [u64; 2] = [64 << 10, 128 << 10];
/// Length of a header.
pub const HEADER_LEN: usize = 4096;
/// Where the two region tables stand.
pub const REGION_AT: [u64; 2] = [192 << 10, 256 << 10];
/// Length of a region table.
pub const REGION_LEN: usize = 64 << 10;
/// Length of the metadata table, which begins its region.
pub const METADATA_TABLE_LEN: usize = 64 << 10;
/// Largest virtual disk.
pub const SIZE_MAX: u64 = 64 << 40;

const BAT_REGION: Uuid = Uuid::from_u128(0x2dc2_7766_f623_4200_9d64_115e_9bfd_4a08);
const METADATA_REGION: Uuid = Uuid::from_u128(0x8b7c_a206_4790_4b9a_b8fe_575f_050f_886e);
const FILE_PARAMETERS: Uuid = Uuid::from_u128(0xcaa1_6737_fa36_4d43_b3b6_33f0_aa44_e76b);
const VIRTUAL_SIZE: Uuid = Uuid::from_u128(0x2fa5_4224_cd1b_4876_b211_5dbe_d83b_f4b8);
const DISK_ID: Uuid = Uuid::from_u128(0xbeca_12ab_b2e6_4523_93ef_c309_e000_c746);
const LOGICAL_SECTOR: Uuid = Uuid::from_u128(0x8141_bf1d_a96f_4709_ba47_f233_a8fa_ab5f);
const PARENT_LOCATOR: Uuid = Uuid::from_u128(0xa8d3_5f2d_b30b_454d_abf7_d3d8_4834_ab0c);
const LOCATOR_TYPE: Uuid = Uuid::from_u128(0xb04a_efb7_d19e_4a81_b789_25b8_e944_5913);
const PHYSICAL_SECTOR: Uuid = Uuid::from_u128(0xcda3_48c7_445d_4471_9cc9_e988_5251_c556);

/// A header: which log is active, and ids that tell others that the file was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// The larger of two valid ones counts.
    pub sequence: u64,
    /// New for every session that writes anything.
    pub file_write: Uuid,
    /// New before content changes in a session.
    pub data_write: Uuid,
    /// Zero: the log is empty.
    pub log: Uuid,
    /// Bytes of the log.
    pub log_len: u32,
    /// Where the log begins.
    pub log_at: u64,
}

impl Header {
    /// The header with its checksum.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = vec![0; HEADER_LEN];
        out[..4].copy_from_slice(b"head");
        out[8..16].copy_from_slice(&self.sequence.to_le_bytes());
        out[16..32].copy_from_slice(&self.file_write.to_bytes_le());
        out[32..48].copy_from_slice(&self.data_write.to_bytes_le());
        out[48..64].copy_from_slice(&self.log.to_bytes_le());
        out[66..68].copy_from_slice(&1u16.to_le_bytes());
        out[68..72].copy_from_slice(&self.log_len.to_le_bytes());
        out[72..80].copy_from_slice(&self.log_at.to_le_bytes());
        seal_crc(&mut out);
        out
    }

    /// `None` unless signature, checksum and version are right.
    pub fn decode(bytes: &[u8]) -> Option<Header> {
        if bytes.len() != HEADER_LEN || &bytes[..4] != b"head" || !crc_matches(bytes) || u16_at(bytes, 66) != 1 || u16_at(bytes, 64) != 0 {
            return None;
        }
        Some(Header {
            sequence: u64_at(bytes, 8),
            file_write: guid_at(bytes, 16),
            data_write: guid_at(bytes, 32),
            log: guid_at(bytes, 48),
            log_len: u32_at(bytes, 68),
            log_at: u64_at(bytes, 72),
        })
    }
}

/// The first 64 KiB.
pub fn file_identifier() -> Vec<u8> {
    let mut out = vec![0; 64 << 10];
    out[..8].copy_from_slice(b"vhdxfile");
    for (slot, unit) in out[8..].chunks_exact_mut(2).zip("Tidegate".encode_utf16()) {
        slot.copy_from_slice(&unit.to_le_bytes());
    }
    out
}

/// Where BAT and metadata stand.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Regions {
    /// First byte of the BAT.
    pub bat_at: u64,
    /// Its length.
    pub bat_len: u64,
    /// First byte of the metadata region.
    pub metadata_at: u64,
    /// Its length.
    pub metadata_len: u64,
    /// Regions of kinds we do not know and that nobody requires, as first byte and length.
    pub others: Vec<(u64, u64)>,
}

impl Regions {
    /// The region table with its checksum.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = vec![0; REGION_LEN];
        out[..4].copy_from_slice(b"regi");
        out[8..12].copy_from_slice(&2u32.to_le_bytes());
        let entries = [(BAT_REGION, self.bat_at, self.bat_len), (METADATA_REGION, self.metadata_at, self.metadata_len)];
        for (slot, (id, at, len)) in out[16..].chunks_exact_mut(32).zip(entries) {
            slot[..16].copy_from_slice(&id.to_bytes_le());
            slot[16..24].copy_from_slice(&at.to_le_bytes());
            slot[24..28].copy_from_slice(&(len as u32).to_le_bytes());
            slot[28..32].copy_from_slice(&1u32.to_le_bytes());
        }
        seal_crc(&mut out);
        out
    }

    /// The bytes of a region table in which the BAT stands elsewhere; `None` if its entry is not in the first sector.
    pub fn moved(&self, table: &[u8], bat_at: u64, bat_len: u64) -> Option<Vec<u8>> {
        let entry = (16..512 - 32).step_by(32).find(|&at| guid_at(table, at) == BAT_REGION && u64_at(table, at + 16) == self.bat_at)?;
        let mut changed = table.to_vec();
        changed[entry + 16..entry + 24].copy_from_slice(&bat_at.to_le_bytes());
        changed[entry + 24..entry + 28].copy_from_slice(&(bat_len as u32).to_le_bytes());
        seal_crc(&mut changed);
        Some(changed)
    }

    /// Parses a region table and checks that its regions lie in a file of `file_len` bytes and apart from each other.
    ///
    /// # Errors
    /// What is wrong, as text.
    pub fn decode(bytes: &[u8], file_len: u64) -> Result<Regions, &'static str> {
        if bytes.len() != REGION_LEN || &bytes[..4] != b"regi" || !crc_matches(bytes) {
            return Err("the region table is damaged");
        }
        let count = u32_at(bytes, 8) as usize;
        if count > 2047 {
            return Err("the region table claims more than 2047 regions");
        }
        let (mut bat, mut metadata, mut others) = (None, None, Vec::new());
        for entry in bytes[16..].chunks_exact(32).take(count) {
            let (id, at, len) = (guid_at(entry, 0), u64_at(entry, 16), u64::from(u32_at(entry, 24)));
            let whole = at >= MIB && at.is_multiple_of(MIB) && len > 0 && len.is_multiple_of(MIB);
            if !whole || at.checked_add(len).is_none_or(|end| end > file_len) {
                return Err("a region lies outside the file or is not aligned to 1 MiB");
            }
            match id {
                BAT_REGION if bat.is_none() => bat = Some((at, len)),
                METADATA_REGION if metadata.is_none() => metadata = Some((at, len)),
                BAT_REGION | METADATA_REGION => return Err("a region stands in the table twice"),
                _ if u32_at(entry, 28) & 1 != 0 => return Err("a required region is of a kind unknown to this version"),
                _ => others.push((at, len)),
            }
        }
        let ((bat_at, bat_len), (metadata_at, metadata_len)) = bat.zip(metadata).ok_or("the BAT or the metadata region is missing")?;
        if bat_at < metadata_at + metadata_len && metadata_at < bat_at + bat_len {
            return Err("the BAT and the metadata region overlap");
        }
        Ok(Regions { bat_at, bat_len, metadata_at, metadata_len, others })
    }
}

/// What the metadata says about the disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Metadata {
    /// Bytes of a payload block: a power of two, 1 to 256 MiB.
    pub block_size: u32,
    /// Every block is meant to stay allocated: a fixed image.
    pub fixed: bool,
    /// Bytes of the virtual disk.
    pub size: u64,
    /// Where that number stands in the region, in bytes.
    pub size_at: u64,
    /// The disk's own id.
    pub disk_id: Uuid,
    /// 512 or 4096.
    pub logical_sector: u32,
    /// 512 or 4096.
    pub physical_sector: u32,
    /// How a differencing disk finds its parent.
    pub parent: Option<ParentLocator>,
}

/// How a differencing disk finds its parent.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ParentLocator {
    /// The parent's `data_write` ids that are right, in lower case with braces.
    pub linkage: Vec<String>,
    /// Path relative to the child's folder, as written.
    pub relative_path: Option<String>,
    /// Path on the host that made it, as written.
    pub absolute_path: Option<String>,
}

impl Metadata {
    /// The first 128 KiB of the metadata region of an image without a parent: table and items. `size_at` is not looked at.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = vec![0; 2 * METADATA_TABLE_LEN];
        out[..8].copy_from_slice(b"metadata");
        let parameters = [self.block_size.to_le_bytes(), u32::from(self.fixed).to_le_bytes()].concat();
        let items: [(Uuid, Vec<u8>, u32); 5] = [
            (FILE_PARAMETERS, parameters, 4),
            (VIRTUAL_SIZE, self.size.to_le_bytes().to_vec(), 6),
            (DISK_ID, self.disk_id.to_bytes_le().to_vec(), 6),
            (LOGICAL_SECTOR, self.logical_sector.to_le_bytes().to_vec(), 6),
            (PHYSICAL_SECTOR, self.physical_sector.to_le_bytes().to_vec(), 6),
        ];
        out[10..12].copy_from_slice(&(items.len() as u16).to_le_bytes());
        let mut at = METADATA_TABLE_LEN;
        for (index, (id, value, flags)) in items.iter().enumerate() {
            let entry = 32 + index * 32;
            out[entry..entry + 16].copy_from_slice(&id.to_bytes_le());
            out[entry + 16..entry + 20].copy_from_slice(&(at as u32).to_le_bytes());
            out[entry + 20..entry + 24].copy_from_slice(&(value.len() as u32).to_le_bytes());
            out[entry + 24..entry + 28].copy_from_slice(&flags.to_le_bytes());
            out[at..at + value.len()].copy_from_slice(value);
            at += value.len();
        }
        out
    }

    /// Parses the whole metadata region.
    ///
    /// # Errors
    /// What is wrong, as text.
    pub fn decode(region: &[u8]) -> Result<Metadata, &'static str> {
        if region.len() < METADATA_TABLE_LEN || &region[..8] != b"metadata" {
            return Err("the metadata table is damaged");
        }
        let count = usize::from(u16_at(region, 10));
        if count > 2047 {
            return Err("the metadata table claims more than 2047 items");
        }
        let entries = || region[32..METADATA_TABLE_LEN].chunks_exact(32).take(count);
        let known = [FILE_PARAMETERS, VIRTUAL_SIZE, DISK_ID, LOGICAL_SECTOR, PHYSICAL_SECTOR, PARENT_LOCATOR];
        if entries().any(|e| u32_at(e, 24) & 4 != 0 && !known.contains(&guid_at(e, 0))) {
            return Err("a required metadata item is of a kind unknown to this version");
        }
        let item = |wanted: Uuid, len: Option<usize>| -> Result<(u64, &[u8]), &'static str> {
            let entry = entries().find(|e| guid_at(e, 0) == wanted).ok_or("a required metadata item is missing")?;
            let (at, has) = (u32_at(entry, 16) as usize, u32_at(entry, 20) as usize);
            if at < METADATA_TABLE_LEN || len.is_some_and(|len| has != len) {
                return Err("a metadata item has an illegal place or length");
            }
            let bytes = region.get(at..at.saturating_add(has)).ok_or("a metadata item lies outside its region")?;
            Ok((at as u64, bytes))
        };
        let (_, parameters) = item(FILE_PARAMETERS, Some(8))?;
        let flags = u32_at(parameters, 4);
        let (size_at, size) = item(VIRTUAL_SIZE, Some(8))?;
        let parent = if flags & 2 != 0 { Some(ParentLocator::decode(item(PARENT_LOCATOR, None)?.1)?) } else { None };
        let metadata = Metadata {
            block_size: u32_at(parameters, 0),
            fixed: flags & 1 != 0,
            size: u64_at(size, 0),
            size_at,
            disk_id: guid_at(item(DISK_ID, Some(16))?.1, 0),
            logical_sector: u32_at(item(LOGICAL_SECTOR, Some(4))?.1, 0),
            physical_sector: u32_at(item(PHYSICAL_SECTOR, Some(4))?.1, 0),
            parent,
        };
        let block = u64::from(metadata.block_size);
        if !block.is_power_of_two() || !(MIB..=256 * MIB).contains(&block) {
            return Err("the block size is not a power of two between 1 and 256 MiB");
        }
        if !matches!(metadata.logical_sector, 512 | 4096) || !matches!(metadata.physical_sector, 512 | 4096) {
            return Err("a sector size is neither 512 nor 4096");
        }
        if metadata.size == 0 || metadata.size > SIZE_MAX || !metadata.size.is_multiple_of(u64::from(metadata.logical_sector)) {
            return Err("the virtual size is not a positive multiple of the sector size up to 64 TiB");
        }
        Ok(metadata)
    }
}

impl ParentLocator {
    /// Parses the item.
    ///
    /// # Errors
    /// What is wrong, as text.
    pub fn decode(item: &[u8]) -> Result<ParentLocator, &'static str> {
        const SHORT: &str = "the parent locator is damaged";
        if item.len() < 20 || guid_at(item, 0) != LOCATOR_TYPE {
            return Err("the parent locator is damaged or of a kind that is not VHDX");
        }
        let mut locator = ParentLocator::default();
        let text = |at: u32, len: u16| -> Result<String, &'static str> {
            let bytes = item.get(at as usize..(at as usize).saturating_add(usize::from(len))).ok_or(SHORT)?;
            let units: Vec<u16> = bytes.chunks_exact(2).map(|c| u16::from_le_bytes([c[0], c[1]])).collect();
            String::from_utf16(&units).map_err(|_| "the parent locator holds text that is not UTF-16")
        };
        for entry in item[20..].chunks_exact(12).take(usize::from(u16_at(item, 18))) {
            let key = text(u32_at(entry, 0), u16_at(entry, 8))?;
            let value = text(u32_at(entry, 4), u16_at(entry, 10))?;
            match key.as_str() {
                "parent_linkage" | "parent_linkage2" => locator.linkage.push(value.to_lowercase()),
                "relative_path" => locator.relative_path = Some(value),
                "absolute_win32_path" => locator.absolute_path = Some(value),
                _ => {}
            }
        }
        if locator.linkage.is_empty() || locator.relative_path.is_none() && locator.absolute_path.is_none() {
            return Err("the parent locator names no parent");
        }
        Ok(locator)
    }

    /// Whether an image whose header says `data_write` is the parent that the child was made from.
    pub fn is_parent(&self, data_write: Uuid) -> bool {
        self.linkage.contains(&format!("{{{data_write}}}"))
    }
}

pub(super) fn seal_crc(bytes: &mut [u8]) {
    bytes[4..8].fill(0);
    let crc = checksum::crc32c(bytes);
    bytes[4..8].copy_from_slice(&crc.to_le_bytes());
}

pub(super) fn crc_matches(bytes: &[u8]) -> bool {
    let crc = checksum::crc32c_append(checksum::crc32c_append(checksum::crc32c(&bytes[..4]), &[0; 4]), &bytes[8..]);
    u32_at(bytes, 4) == crc
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

pub(super) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(*bytes[at..].first_chunk().expect("callers stay within structures of known length"))
}

pub(super) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(*bytes[at..].first_chunk().expect("callers stay within structures of known length"))
}

pub(super) fn guid_at(bytes: &[u8], at: usize) -> Uuid {
    Uuid::from_bytes_le(*bytes[at..].first_chunk().expect("callers stay within structures of known length"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn metadata() -> Metadata {
        Metadata {
            block_size: 2 << 20,
            fixed: false,
            size: 1 << 30,
            size_at: METADATA_TABLE_LEN as u64 + 8,
            disk_id: Uuid::from_u128(3),
            logical_sector: 512,
            physical_sector: 4096,
            parent: None,
        }
    }

    #[test]
    fn structures_round_trip() {
        let header = Header {
            sequence: 7,
            file_write: Uuid::from_u128(1),
            data_write: Uuid::from_u128(2),
            log: Uuid::nil(),
            log_len: 1 << 20,
            log_at: MIB,
        };
        assert_eq!(Header::decode(&header.encode()), Some(header));
        let regions = Regions { bat_at: 2 * MIB, bat_len: MIB, metadata_at: 3 * MIB, metadata_len: MIB, others: vec![] };
        assert!(Regions::decode(&regions.encode(), 3 * MIB).is_err(), "a region past the end of the file");
        assert_eq!(Regions::decode(&regions.encode(), 8 * MIB), Ok(regions));
        assert_eq!(Metadata::decode(&metadata().encode()), Ok(metadata()));
    }

    proptest! {
        #[test]
        fn damaged_structures_are_refused_without_panic(at in 0usize..4096, value in any::<u8>()) {
            let header = Header { sequence: 7, file_write: Uuid::from_u128(1), data_write: Uuid::from_u128(2), log: Uuid::nil(), log_len: 1 << 20, log_at: MIB };
            let mut bytes = header.encode();
            if bytes[at] != value {
                bytes[at] = value;
                prop_assert_eq!(Header::decode(&bytes), None);
            }
            let mut bytes = metadata().encode();
            bytes[at % 256] = value;
            let _ = Metadata::decode(&bytes);
        }
    }
}
