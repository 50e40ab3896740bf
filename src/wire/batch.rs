//! The sealed batch: a run of consecutive changes of one disk, folded, compressed, encrypted once.
//!
//! The same bytes travel over QUIC, stand in the cache and in the journal; the retention journal keeps old
//! content in the same form. Header, 160 bytes, which is also the authenticated data of the seal:
//!
//! | offset | size | field |
//! |---|---|---|
//! | 0 | 4 | magic `TGB1` |
//! | 4 | 2 | version (1) |
//! | 6 | 2 | flags: bit 0 compressed with LZ4 (block format), bit 1 it ends with a digest instead of a marker |
//! | 8 | 16 | disk |
//! | 24 | 8 | generation |
//! | 32 | 8 | epoch |
//! | 40 | 8 | first sequence |
//! | 48 | 8 | last sequence |
//! | 56 | 4 | data bytes |
//! | 60 | 4 | extents in the table |
//! | 64 | 4 | marker or digest bytes (0: neither) |
//! | 68 | 4 | stored bytes after this header, tag included |
//! | 72 | 4 | CRC-32C of the plain body |
//! | 76 | 4 | 0 |
//! | 80 | 8 | age of the last change when it was accepted, microseconds |
//! | 88 | 8 | wall clock of the process server when it was accepted, milliseconds |
//! | 96 | 32 | salt of the sealing session |
//! | 128 | 8 | nonce counter within the session |
//! | 136 | 20 | 0 |
//! | 156 | 4 | CRC-32C of bytes 0..156 |
//!
//! The plain body is data, then the table, then the marker. Data stands first so that it is aligned for direct
//! I/O where the body is; a table entry is offset u64, length u32, kind u32 (0 data, in order; 1 zero).

use uuid::Uuid;

use super::{CONTROL_BYTES_MAX, Fields, WireError, check_len};
use crate::checksum;
use crate::model::change::{CHANGE_BYTES_MAX, ZERO_BYTES_MAX};
use crate::model::{Digest, DiskId, Extent, Marker, Position, SECTOR, Trailer};

/// Length of the header, in bytes.
pub const HEADER_LEN: usize = 160;
/// Length of the AES-GCM tag at the end, in bytes.
pub const TAG_LEN: usize = 16;
/// A batch is closed when it holds this much data: half an L2 cache, where LZ4 and AES run best (measured).
pub const BATCH_DATA_TARGET: usize = 256 * 1024;
/// Most data of a batch, in bytes: one change may arrive when it is one byte short of the target.
pub const BATCH_DATA_MAX: usize = BATCH_DATA_TARGET + CHANGE_BYTES_MAX;
/// Most extents of a batch.
pub const BATCH_EXTENTS_MAX: usize = 4096;
/// Length of a table entry.
pub const ENTRY_LEN: usize = 16;
/// Largest plain body, in bytes.
pub const BODY_BYTES_MAX: usize = BATCH_DATA_MAX + BATCH_EXTENTS_MAX * ENTRY_LEN + CONTROL_BYTES_MAX;
/// Largest sealed batch with header and tag, in bytes. Bodies that do not shrink are stored as they are.
pub const BATCH_BYTES_MAX: usize = HEADER_LEN + BODY_BYTES_MAX + TAG_LEN;

const MAGIC: [u8; 4] = *b"TGB1";
const VERSION: u16 = 1;

/// The header of a sealed batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BatchHeader {
    /// Body is LZ4-compressed.
    pub compressed: bool,
    /// Whose changes.
    pub disk: DiskId,
    /// History they belong to.
    pub generation: u64,
    /// Stream they belong to.
    pub epoch: u64,
    /// First change.
    pub first: u64,
    /// Last change.
    pub last: u64,
    /// Data bytes of the plain body.
    pub data_len: u32,
    /// Table entries.
    pub extents: u32,
    /// Marker or digest bytes.
    pub marker_len: u32,
    /// They are a digest.
    pub digest: bool,
    /// Bytes after the header.
    pub stored_len: u32,
    /// CRC-32C of the plain body, made where it was folded and checked where it is applied.
    pub body_crc: u32,
    /// Age of the last change at acceptance, microseconds.
    pub age_us: u64,
    /// Wall clock at acceptance, milliseconds.
    pub accepted_wall_ms: i64,
    /// Salt of the sealing session.
    pub salt: [u8; 32],
    /// Counter within the sealing session.
    pub nonce: u64,
}

impl BatchHeader {
    /// The header of a batch of nothing, whose maker says what it holds, and which is not sealed.
    pub const fn new(disk: DiskId, generation: u64) -> Self {
        Self {
            compressed: false,
            disk,
            generation,
            epoch: 0,
            first: 0,
            last: 0,
            data_len: 0,
            extents: 0,
            marker_len: 0,
            digest: false,
            stored_len: 0,
            body_crc: 0,
            age_us: 0,
            accepted_wall_ms: 0,
            salt: [0; 32],
            nonce: 0,
        }
    }

    /// Length of the plain body.
    pub fn body_len(&self) -> usize {
        self.data_len as usize + self.extents as usize * ENTRY_LEN + self.marker_len as usize
    }

    /// Length of the whole sealed batch.
    pub fn sealed_len(&self) -> usize {
        HEADER_LEN + self.stored_len as usize
    }

    /// Where the stream stands after this batch.
    pub fn end(&self) -> Position {
        Position::new(self.epoch, self.last)
    }

    /// The header as bytes.
    pub fn encode(&self) -> [u8; HEADER_LEN] {
        let mut out = Vec::with_capacity(HEADER_LEN);
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(&VERSION.to_le_bytes());
        out.extend_from_slice(&(u16::from(self.compressed) | u16::from(self.digest) << 1).to_le_bytes());
        out.extend_from_slice(self.disk.0.as_bytes());
        for field in [self.generation, self.epoch, self.first, self.last] {
            out.extend_from_slice(&field.to_le_bytes());
        }
        for field in [self.data_len, self.extents, self.marker_len, self.stored_len, self.body_crc, 0] {
            out.extend_from_slice(&field.to_le_bytes());
        }
        out.extend_from_slice(&self.age_us.to_le_bytes());
        out.extend_from_slice(&self.accepted_wall_ms.to_le_bytes());
        out.extend_from_slice(&self.salt);
        out.extend_from_slice(&self.nonce.to_le_bytes());
        out.extend_from_slice(&[0; 20]);
        let crc = checksum::crc32c(&out);
        out.extend_from_slice(&crc.to_le_bytes());
        out.try_into().expect("the fields above add up to the header")
    }

    /// Parses the first [`HEADER_LEN`] bytes of a sealed batch and checks every bound.
    ///
    /// # Errors
    /// [`WireError`] if they are not a header this version can hold.
    pub fn decode(bytes: &[u8]) -> Result<BatchHeader, WireError> {
        let bytes = bytes.get(..HEADER_LEN).ok_or(WireError::Short("batch header"))?;
        let mut fields = Fields(bytes);
        if fields.take::<4>() != MAGIC {
            return Err(WireError::Magic("Tidegate batch"));
        }
        let version = fields.u16();
        if version != VERSION {
            return Err(WireError::Version { what: "batch format", found: version });
        }
        let crc = u32::from_le_bytes([bytes[156], bytes[157], bytes[158], bytes[159]]);
        if checksum::crc32c(&bytes[..156]) != crc {
            return Err(WireError::Checksum("batch header"));
        }
        let flags = fields.u16();
        let disk = DiskId(Uuid::from_bytes(fields.take()));
        let [generation, epoch, first, last] = [fields.u64(), fields.u64(), fields.u64(), fields.u64()];
        let [data_len, extents, marker_len, stored_len, body_crc, _] =
            [fields.u32(), fields.u32(), fields.u32(), fields.u32(), fields.u32(), fields.u32()];
        let header = BatchHeader {
            compressed: flags & 1 != 0,
            disk,
            generation,
            epoch,
            first,
            last,
            data_len,
            extents,
            marker_len,
            digest: flags & 2 != 0,
            stored_len,
            body_crc,
            age_us: fields.u64(),
            accepted_wall_ms: i64::from_le_bytes(fields.take()),
            salt: fields.take(),
            nonce: fields.u64(),
        };
        if flags > 3 || flags & 2 != 0 && marker_len == 0 {
            return Err(WireError::Illegal("batch flags"));
        }
        header.check()?;
        Ok(header)
    }

    fn check(&self) -> Result<(), WireError> {
        check_len("batch data", self.data_len as usize, BATCH_DATA_MAX)?;
        check_len("batch extents", self.extents as usize, BATCH_EXTENTS_MAX)?;
        check_len("batch marker", self.marker_len as usize, CONTROL_BYTES_MAX)?;
        check_len("stored batch", self.stored_len as usize, self.body_len() + TAG_LEN)?;
        if (self.stored_len as usize) < TAG_LEN || self.first == 0 || self.first > self.last {
            return Err(WireError::Illegal("batch header"));
        }
        Ok(())
    }
}

/// One entry of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Bytes of the disk.
    pub extent: Extent,
    /// Where its content stands in the body; `None` for zeroes.
    pub data_at: Option<u32>,
}

/// Appends one table entry to a body under construction.
pub fn push_entry(body: &mut Vec<u8>, extent: Extent, zero: bool) {
    debug_assert!(extent.len <= ZERO_BYTES_MAX, "an extent of a batch fits its length field");
    body.extend_from_slice(&extent.offset.to_le_bytes());
    body.extend_from_slice(&(extent.len as u32).to_le_bytes());
    body.extend_from_slice(&u32::from(zero).to_le_bytes());
}

/// Reads the table of a plain body. The entries' data is proven to lie within the body and to be sector-aligned.
///
/// # Errors
/// [`WireError`] if the table contradicts the header.
pub fn parse_entries(header: &BatchHeader, body: &[u8]) -> Result<Vec<Entry>, WireError> {
    if body.len() != header.body_len() {
        return Err(WireError::Short("batch body"));
    }
    let table_at = header.data_len as usize;
    let table = &body[table_at..table_at + header.extents as usize * ENTRY_LEN];
    let mut entries = Vec::with_capacity(header.extents as usize);
    let mut data_at = 0u32;
    for bytes in table.chunks_exact(ENTRY_LEN) {
        let mut fields = Fields(bytes);
        let (offset, len, kind) = (fields.u64(), fields.u32(), fields.u32());
        let extent = Extent::new(offset, u64::from(len));
        let sane = extent.fits(u64::MAX) && offset.is_multiple_of(SECTOR) && extent.len.is_multiple_of(SECTOR);
        if !sane || kind > 1 || extent.len > ZERO_BYTES_MAX {
            return Err(WireError::Illegal("batch extent"));
        }
        let at = (kind == 0).then_some(data_at);
        if kind == 0 {
            data_at = data_at.checked_add(len).filter(|&at| at <= header.data_len).ok_or(WireError::Short("batch data"))?;
        }
        entries.push(Entry { extent, data_at: at });
    }
    if data_at != header.data_len {
        return Err(WireError::Illegal("batch data length"));
    }
    Ok(entries)
}

/// Reads what a plain body ends with, if there is something.
///
/// # Errors
/// [`WireError::Illegal`] if the bytes are not a marker or digest within its bounds.
pub fn parse_trailer(header: &BatchHeader, body: &[u8]) -> Result<Option<Trailer>, WireError> {
    if header.marker_len == 0 {
        return Ok(None);
    }
    let at = body.len().checked_sub(header.marker_len as usize).ok_or(WireError::Short("marker"))?;
    if header.digest {
        let digest: Digest = super::decode_control(&body[at..])?;
        return if digest.is_sane() { Ok(Some(Trailer::Digest(digest))) } else { Err(WireError::Illegal("digest")) };
    }
    let marker: Marker = super::decode_control(&body[at..])?;
    if marker.is_sane() { Ok(Some(Trailer::Mark(Box::new(marker)))) } else { Err(WireError::Illegal("marker")) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn header() -> BatchHeader {
        BatchHeader {
            compressed: true,
            disk: DiskId(Uuid::from_u128(7)),
            generation: 2,
            epoch: 3,
            first: 10,
            last: 20,
            data_len: 8192,
            extents: 2,
            marker_len: 0,
            digest: false,
            stored_len: 4000,
            body_crc: 1,
            age_us: 5,
            accepted_wall_ms: 6,
            salt: [9; 32],
            nonce: 4,
        }
    }

    #[test]
    fn header_round_trips_and_matches_the_golden_bytes() {
        let bytes = header().encode();
        assert_eq!(BatchHeader::decode(&bytes), Ok(header()));
        let golden = include_bytes!("../../tests/golden/batch_header_v1.bin");
        assert_eq!(&bytes, golden, "the format of a released version must not change: add a version instead");
    }

    #[test]
    fn entries_round_trip() {
        let mut body = vec![1; 8192];
        push_entry(&mut body, Extent::new(4096, 8192), false);
        push_entry(&mut body, Extent::new(1 << 30, 1 << 20), true);
        let entries = parse_entries(&header(), &body).unwrap();
        assert_eq!(entries[0], Entry { extent: Extent::new(4096, 8192), data_at: Some(0) });
        assert_eq!(entries[1], Entry { extent: Extent::new(1 << 30, 1 << 20), data_at: None });
    }

    #[test]
    fn a_table_that_claims_more_data_than_there_is_is_refused() {
        let mut body = vec![1; 8192];
        push_entry(&mut body, Extent::new(0, 8192), false);
        push_entry(&mut body, Extent::new(8192, 512), false);
        assert!(parse_entries(&header(), &body).is_err());
    }

    proptest! {
        #[test]
        fn any_bytes_decode_or_fail_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400), body in proptest::collection::vec(any::<u8>(), 0..400)) {
            let _ = BatchHeader::decode(&bytes);
            let header = BatchHeader { data_len: 16, extents: 3, marker_len: 20, ..header() };
            let _ = parse_entries(&header, &body);
            let _ = parse_trailer(&header, &body);
            let _ = parse_trailer(&BatchHeader { digest: true, ..header }, &body);
        }

        #[test]
        fn one_flipped_bit_is_noticed(bit in 0usize..HEADER_LEN * 8) {
            let mut bytes = header().encode();
            bytes[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(BatchHeader::decode(&bytes).is_err());
        }
    }
}
