//! Bytes of a sparse VMDK extent: header, markers of a stream. Parses; changes nothing. After the "Virtual Disk Format" note
//! of VMware; all numbers are in sectors of 512 bytes unless said otherwise.

/// Bytes of a sector, the unit of all numbers in a VMDK.
pub const SECTOR: u64 = 512;
/// Entries of a grain table.
pub const TABLE_ENTRIES: u64 = 512;
/// Sectors of a grain table.
pub const TABLE_SECTORS: u64 = TABLE_ENTRIES * 4 / SECTOR;
/// Sectors of a grain that we write: 64 KiB.
pub const GRAIN_SECTORS: u64 = 128;
/// Sectors kept for the descriptor in what we write, and the place where qemu looks for it.
pub const DESCRIPTOR_AT: u64 = 1;
/// See [`DESCRIPTOR_AT`].
pub const DESCRIPTOR_SECTORS: u64 = 20;
/// `gd_at` of a stream whose real header is the footer.
pub const GD_AT_END: u64 = u64::MAX;

/// The newline check bytes are there.
pub const FLAG_NEWLINE: u32 = 1;
/// A second copy of all tables is kept.
pub const FLAG_REDUNDANT: u32 = 2;
/// A table entry of 1 is a grain of zeroes.
pub const FLAG_ZERO_GRAIN: u32 = 4;
/// Grains are compressed.
pub const FLAG_COMPRESSED: u32 = 1 << 16;
/// Markers stand before grains and tables.
pub const FLAG_MARKERS: u32 = 1 << 17;

const MAGIC: [u8; 4] = *b"KDMV";

/// The header of a sparse extent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// 1, 2 or 3.
    pub version: u32,
    /// See the constants.
    pub flags: u32,
    /// Sectors of the extent.
    pub capacity: u64,
    /// Sectors of a grain, a power of two.
    pub grain: u64,
    /// First sector of the descriptor; 0 for none.
    pub descriptor_at: u64,
    /// Sectors of the descriptor.
    pub descriptor_len: u64,
    /// First sector of the redundant grain directory.
    pub rgd_at: u64,
    /// First sector of the grain directory.
    pub gd_at: u64,
    /// Sectors before the first grain.
    pub overhead: u64,
    /// It was not closed.
    pub unclean: bool,
}

impl Header {
    /// The header's sector.
    pub fn encode(&self) -> [u8; 512] {
        let mut out = [0; 512];
        out[..4].copy_from_slice(&MAGIC);
        out[4..8].copy_from_slice(&self.version.to_le_bytes());
        out[8..12].copy_from_slice(&self.flags.to_le_bytes());
        for (at, value) in [(12, self.capacity), (20, self.grain), (28, self.descriptor_at), (36, self.descriptor_len)] {
            out[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
        out[44..48].copy_from_slice(&(TABLE_ENTRIES as u32).to_le_bytes());
        for (at, value) in [(48, self.rgd_at), (56, self.gd_at), (64, self.overhead)] {
            out[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
        out[72] = u8::from(self.unclean);
        out[73..77].copy_from_slice(b"\n \r\n");
        out[77..79].copy_from_slice(&u16::from(self.flags & FLAG_COMPRESSED != 0).to_le_bytes());
        out
    }

    /// Parses and checks a header.
    ///
    /// # Errors
    /// What is wrong or not supported, as text.
    pub fn decode(bytes: &[u8]) -> Result<Header, &'static str> {
        if bytes.len() < 512 || bytes[..4] != MAGIC {
            return Err("the file does not begin with a sparse VMDK header");
        }
        let (version, flags) = (u32_at(bytes, 4), u32_at(bytes, 8));
        if !(1..=3).contains(&version) {
            return Err("the VMDK has a version that is not 1, 2 or 3");
        }
        if flags & FLAG_NEWLINE != 0 && &bytes[73..77] != b"\n \r\n" {
            return Err("the header was changed by a text transfer: its newline bytes are wrong");
        }
        if u64::from(u32_at(bytes, 44)) != TABLE_ENTRIES {
            return Err("grain tables do not have 512 entries");
        }
        if flags & FLAG_COMPRESSED != 0 && u16::from_le_bytes([bytes[77], bytes[78]]) != 1 {
            return Err("grains are compressed by a method other than deflate");
        }
        let header = Header {
            version,
            flags,
            capacity: u64_at(bytes, 12),
            grain: u64_at(bytes, 20),
            descriptor_at: u64_at(bytes, 28),
            descriptor_len: u64_at(bytes, 36),
            rgd_at: u64_at(bytes, 48),
            gd_at: u64_at(bytes, 56),
            overhead: u64_at(bytes, 64),
            unclean: bytes[72] != 0,
        };
        if !header.grain.is_power_of_two() || !(8..=2048).contains(&header.grain) {
            return Err("the grain size is not a power of two between 4 KiB and 1 MiB");
        }
        if header.capacity == 0 || header.capacity > 1 << 37 {
            return Err("the capacity is zero or larger than 64 TiB");
        }
        if header.overhead > 1 << 47 {
            return Err("the first grain stands farther in the file than any file is long");
        }
        Ok(header)
    }

    /// Grains of the extent; the last may be short.
    pub fn grains(&self) -> u64 {
        self.capacity.div_ceil(self.grain)
    }

    /// Grain tables of the extent.
    pub fn tables(&self) -> u64 {
        self.grains().div_ceil(TABLE_ENTRIES)
    }

    /// Sectors of a grain directory.
    pub fn directory_sectors(&self) -> u64 {
        (self.tables() * 4).div_ceil(SECTOR)
    }

    /// Whether grains are compressed.
    pub fn compressed(&self) -> bool {
        self.flags & FLAG_COMPRESSED != 0
    }

    /// Whether there is a second copy of the tables.
    pub fn redundant(&self) -> bool {
        self.flags & FLAG_REDUNDANT != 0
    }
}

/// What stands in the type field of a marker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Marker {
    /// The end of the stream.
    End = 0,
    /// A grain table follows.
    Table = 1,
    /// The grain directory follows.
    Directory = 2,
    /// The footer follows.
    Footer = 3,
}

impl Marker {
    /// The marker's sector; `sectors` follow it.
    pub fn encode(self, sectors: u64) -> [u8; 512] {
        let mut out = [0; 512];
        out[..8].copy_from_slice(&sectors.to_le_bytes());
        out[12..16].copy_from_slice(&(self as u32).to_le_bytes());
        out
    }
}

/// The twelve bytes before a compressed grain: its first sector, and the length of what follows in bytes.
pub fn grain_marker(sector: u64, len: u32) -> [u8; 12] {
    let mut out = [0; 12];
    out[..8].copy_from_slice(&sector.to_le_bytes());
    out[8..].copy_from_slice(&len.to_le_bytes());
    out
}

/// See [`grain_marker`].
pub fn decode_grain_marker(bytes: &[u8]) -> Option<(u64, u32)> {
    (bytes.len() >= 12).then(|| (u64_at(bytes, 0), u32_at(bytes, 8)))
}

/// Numbers of a table or directory.
pub fn decode_entries(bytes: &[u8]) -> impl Iterator<Item = u64> + '_ {
    bytes.chunks_exact(4).map(|raw| u64::from(u32::from_le_bytes([raw[0], raw[1], raw[2], raw[3]])))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(*bytes[at..].first_chunk().expect("callers stay within structures of known length"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(*bytes[at..].first_chunk().expect("callers stay within structures of known length"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn headers_round_trip() {
        let header = Header {
            version: 1,
            flags: 3,
            capacity: 131072,
            grain: 128,
            descriptor_at: 1,
            descriptor_len: 20,
            rgd_at: 21,
            gd_at: 30,
            overhead: 128,
            unclean: true,
        };
        assert_eq!(Header::decode(&header.encode()), Ok(header));
        assert_eq!((header.grains(), header.tables(), header.directory_sectors()), (1024, 2, 1));
    }

    proptest! {
        #[test]
        fn any_bytes_are_parsed_or_refused(mut bytes in proptest::collection::vec(any::<u8>(), 512..=512)) {
            let _ = Header::decode(&bytes);
            bytes[..4].copy_from_slice(&MAGIC);
            bytes[4..12].copy_from_slice(&[1, 0, 0, 0, 0, 0, 0, 0]);
            bytes[44..48].copy_from_slice(&512u32.to_le_bytes());
            if let Ok(header) = Header::decode(&bytes) {
                let _ = (header.tables(), header.directory_sectors());
            }
        }
    }
}
