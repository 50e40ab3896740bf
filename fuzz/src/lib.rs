//! What every fuzz target does with its bytes, so that tests can replay the corpora without a fuzzer.

#[allow(dead_code, reason = "the tests use what is not needed here")]
#[path = "../../tests/support/faulty_storage.rs"]
mod memory;
#[allow(dead_code, reason = "as above")]
#[path = "../../tests/support/rng.rs"]
mod rng;

use std::path::Path;

use memory::Faulty;
use rng::Rng;
use tidegate::checksum;
use tidegate::disk::places::Table;
use tidegate::disk::vhdx::bat::{Bat, Geometry, load_pages};
use tidegate::disk::vhdx::format::{HEADER_LEN as HEADER_LEN_VHDX, Header as VhdxHeader, MIB, Metadata, REGION_LEN, Regions};
use tidegate::disk::vhdx::log;
use tidegate::disk::vmdk::descriptor::{Descriptor, with_cid, with_sectors};
use tidegate::disk::vmdk::format::{Header as VmdkHeader, decode_grain_marker};
use tidegate::disk::vmdk::grains::{Grains, page_of};
use tidegate::disk::{Disk, Format, Image, check};
use tidegate::master_target::retain::index;
use tidegate::model::Extent;
use tidegate::storage::log::format::{SegmentHeader, peek_record, record_is_whole};
use tidegate::storage::{AlignedBuf, File, OpenMode, Storage};
use tidegate::wire::batch::{BatchHeader, HEADER_LEN, parse_entries, parse_trailer};
use tidegate::wire::decode_control;
use tidegate::wire::forward::{Open, PREFIX_LEN, Prefix, Reply};
use tidegate::wire::ingest::{AgentMessage, FRAME_LEN, Frame, ServerMessage};

/// What is done with bytes.
pub type Target = fn(&[u8]);

/// Every target by name.
pub const TARGETS: &[(&str, Target)] = &[
    ("wire_ingest", wire_ingest),
    ("wire_forward", wire_forward),
    ("batch", batch),
    ("guest_agent", guest_agent),
    ("log_segment", log_segment),
    ("vhdx_header", vhdx_header),
    ("vhdx_regions", vhdx_regions),
    ("vhdx_metadata", vhdx_metadata),
    ("vhdx_bat", vhdx_bat),
    ("vhdx_log", vhdx_log),
    ("vhdx_image", vhdx_image),
    ("vmdk_header", vmdk_header),
    ("vmdk_descriptor", vmdk_descriptor),
    ("vmdk_grains", vmdk_grains),
    ("vmdk_image", vmdk_image),
    ("disk_model", disk_model),
];

/// Frames and messages between agent and process server.
pub fn wire_ingest(data: &[u8]) {
    if let Some(&(mut head)) = data.first_chunk::<FRAME_LEN>() {
        let _ = Frame::decode(&head);
        let crc = checksum::crc32c(&head[..60]);
        head[60..].copy_from_slice(&crc.to_le_bytes());
        if let Ok(frame) = Frame::decode(&head) {
            assert_eq!(frame.encode()[..52], head[..52]);
        }
    }
    let _ = decode_control::<AgentMessage>(data);
    let _ = decode_control::<ServerMessage>(data);
}

/// Prefixes and messages between process server and master target.
pub fn wire_forward(data: &[u8]) {
    if let Some(head) = data.first_chunk::<PREFIX_LEN>() {
        let _ = Prefix::decode(head);
    }
    let _ = decode_control::<Open>(data);
    let _ = decode_control::<Reply>(data);
}

/// Sealed batches: header, table, marker.
pub fn batch(data: &[u8]) {
    if let Ok(header) = BatchHeader::decode(data) {
        let body = &data[HEADER_LEN..];
        if let Ok(entries) = parse_entries(&header, body) {
            for entry in entries {
                assert!(entry.data_at.is_none_or(|at| u64::from(at) + entry.extent.len <= u64::from(header.data_len)));
            }
        }
        let _ = parse_trailer(&header, body);
    }
}

/// Replies of a guest's agent, whole and in pieces, while what is old is skipped and after.
pub fn guest_agent(data: &[u8]) {
    use tidegate::agent::rest::guest_agent::Decoder;
    for (skipping, piece) in [(true, 1), (true, 5000), (false, 7)] {
        let mut decoder = Decoder::default();
        if skipping {
            decoder.expect(7);
        }
        for bytes in data.chunks(piece) {
            if decoder.handle_bytes(bytes).is_err() {
                break;
            }
            while !matches!(decoder.poll_reply(), Ok(None)) {}
        }
    }
}

/// Segment and record headers of the cache and the journal, and the retention journal's index.
pub fn log_segment(data: &[u8]) {
    let _ = SegmentHeader::decode(data);
    if let Some(len) = peek_record(data, 1, 1 << 20) {
        let _ = record_is_whole(data, len);
    }
    let _ = index::decode(data);
}

/// A header of a VHDX made by somebody else.
pub fn vhdx_header(data: &[u8]) {
    let _ = VhdxHeader::decode(data);
    let mut whole = data.to_vec();
    whole.resize(HEADER_LEN_VHDX, 0);
    checksum(&mut whole);
    let _ = VhdxHeader::decode(&whole);
}

/// A region table of a VHDX.
pub fn vhdx_regions(data: &[u8]) {
    let _ = Regions::decode(data, 1 << 40);
    let mut whole = data.to_vec();
    whole.resize(REGION_LEN, 0);
    checksum(&mut whole);
    let _ = Regions::decode(&whole, 1 << 40);
}

/// The metadata region of a VHDX.
pub fn vhdx_metadata(data: &[u8]) {
    let _ = Metadata::decode(data);
}

/// The block table of a VHDX.
pub fn vhdx_bat(data: &[u8]) {
    for differencing in [false, true] {
        let mut table = Table::default();
        load_pages(&mut table, 0, data);
        let geometry = Geometry { size: 64 * MIB, block: MIB, sector: 512, differencing };
        let _ = Bat::load(table, geometry, 256 * MIB, &[(0, 4 * MIB)]);
    }
}

/// The log of a VHDX.
pub fn vhdx_log(data: &[u8]) {
    let mut entries = data[..data.len() / log::LOG_SECTOR * log::LOG_SECTOR].to_vec();
    let mut at = 0;
    while let Some(len) = entries.get(at + 8..at + 12) {
        // Entries one after the other get the checksums they should have, so that what lies behind them is reached.
        let len = u32::from_le_bytes(len.try_into().expect("four bytes")) as usize;
        let Some(entry) = entries.get_mut(at..at.saturating_add(len)).filter(|e| e.len() >= log::LOG_SECTOR) else { break };
        checksum(entry);
        at += len;
    }
    if let Some(id) = data.get(32..48) {
        let _ = log::replay(&entries, uuid::Uuid::from_bytes_le(id.try_into().expect("sixteen bytes")));
    }
}

/// Holes of a VHDX are most of it: what is fuzzed is its metadata, put where the format wants it: (place, length).
const VHDX_PARTS: [(u64, usize); 7] =
    [(0, 512), (64 << 10, 512), (128 << 10, 512), (192 << 10, 512), (MIB, 8192), (2 * MIB, 4096), (3 * MIB, 4096)];

/// A whole VHDX of 4 MiB and one block: opened, checked and read.
pub fn vhdx_image(data: &[u8]) {
    let mut file = vec![0; 8 << 20];
    let mut rest = data;
    for (at, len) in VHDX_PARTS {
        let (part, after) = rest.split_at(len.min(rest.len()));
        file[at as usize..][..part.len()].copy_from_slice(part);
        rest = after;
    }
    // The metadata items stand 64 KiB into their region.
    let part = &rest[..rest.len().min(512)];
    file[(3 * MIB + (64 << 10)) as usize..][..part.len()].copy_from_slice(part);
    reseal(&mut file);
    open_and_check(&file, Format::Vhdx);
}

/// Gives headers and region tables the checksums they should have, so that what lies behind them is reached.
fn reseal(file: &mut [u8]) {
    for (at, len) in [(64 << 10, HEADER_LEN_VHDX), (128 << 10, HEADER_LEN_VHDX), (192 << 10, REGION_LEN)] {
        checksum(&mut file[at..at + len]);
    }
    file.copy_within(192 << 10..256 << 10, 256 << 10);
}

/// Sets the checksum of a VHDX structure.
fn checksum(bytes: &mut [u8]) {
    bytes[4..8].fill(0);
    let crc = checksum::crc32c(bytes);
    bytes[4..8].copy_from_slice(&crc.to_le_bytes());
}

/// The header of a sparse VMDK, and the marker of a grain.
pub fn vmdk_header(data: &[u8]) {
    let _ = VmdkHeader::decode(data);
    let _ = decode_grain_marker(data);
}

/// The descriptor of a VMDK.
pub fn vmdk_descriptor(data: &[u8]) {
    if let Ok(descriptor) = Descriptor::parse(data)
        && !descriptor.has_parent()
    {
        // What was understood is written so that it reads the same.
        let again = Descriptor::parse(descriptor.encode().as_bytes());
        assert!(again.is_ok_and(|a| a.extents == descriptor.extents) || descriptor.extents.iter().any(|e| e.offset > 0));
    }
    let _ = with_cid(data, 7);
    if let Some(changed) = with_sectors(data, 77) {
        assert_eq!(changed.len(), data.len());
    }
}

/// Grain tables behind a header.
pub fn vmdk_grains(data: &[u8]) {
    if let Ok(header) = VmdkHeader::decode(data) {
        let mut table = Table::default();
        for (number, raw) in data.get(512..).unwrap_or_default().chunks(2048).enumerate() {
            table.load(number as u64, page_of(raw));
        }
        let moved = data.len().is_multiple_of(2).then_some((1 << 20, 2 << 20));
        let _ = Grains::load(header, table, vec![21], vec![31], 1 << 40, moved);
    }
}

/// A whole VMDK, sparse, stream or flat descriptor: opened, checked and read.
pub fn vmdk_image(data: &[u8]) {
    open_and_check(data, Format::Vmdk);
}

/// Opens, checks and reads an image that somebody else made. Whatever the check calls good can be opened and read.
fn open_and_check(bytes: &[u8], format: Format) {
    run(async {
        let storage = Faulty::default();
        let path = Path::new("/image");
        let file = storage.open(path, OpenMode::Create).await.expect("a new file");
        if !bytes.is_empty() {
            file.write_at(0, AlignedBuf::copy_of(bytes).freeze()).await.expect("memory takes it");
        }
        let good = check::image(&storage, path, format, None).await.is_ok_and(|report| report.is_good());
        let opened = Image::open_read_only(&storage, path, format, false).await;
        assert!(!good || opened.is_ok(), "the check calls it good, opening fails: {:?}", opened.err());
        if let Ok(image) = opened {
            let size = image.size();
            for at in [0, size / 2 / 512 * 512, size - 512] {
                let read = image.read(Extent::new(at, 512)).await;
                assert!(!good || read.is_ok(), "the check calls it good, reading fails: {:?}", read.err());
            }
            let mut at = 0;
            for _ in 0..64 {
                let Ok(Some(next)) = image.next_data(at) else { break };
                assert!(next.offset >= at && next.len > 0 && next.end() <= size, "{next:?} from {at} of {size}");
                at = next.end();
            }
        }
    });
}

/// Random operations on an image of each format against a model in memory.
pub fn disk_model(data: &[u8]) {
    const SIZE: u64 = 9 << 20;
    let Some((&first, operations)) = data.split_first() else { return };
    let formats: Vec<Format> = Format::ALL.into_iter().filter(|f| f.can_be_replica()).collect();
    let format = formats[usize::from(first) % formats.len()];
    let path = Path::new("/image");
    let mut model = vec![0u8; SIZE as usize];
    run(async {
        let storage = Faulty::default();
        let mut image = Image::create(&storage, path, format, SIZE).await.expect("made");
        for op in operations.chunks_exact(4).take(64) {
            let size = model.len() as u64;
            let offset = u64::from(u16::from_le_bytes([op[0], op[1]])) % (size / 512) * 512;
            let extent = Extent::new(offset, ((u64::from(op[2]) + 1) * 512 * 8).min(size - offset));
            let target = &mut model[extent.offset as usize..extent.end() as usize];
            match op[3] % 8 {
                0 => image.barrier().await.expect("barrier"),
                1 => {
                    image.finish().await.expect("finished");
                    image = Image::open(&storage, path, format).await.expect("opened");
                }
                2 => {
                    image.zero(extent).await.expect("zeroed");
                    target.fill(0);
                }
                3 if size < 2 * SIZE => {
                    let larger = size + (u64::from(op[2]) + 1) * 512;
                    image.grow(larger).await.expect("grown");
                    model.resize(larger as usize, 0);
                }
                value => {
                    target.fill(value | op[0]);
                    image.write(extent.offset, AlignedBuf::copy_of(target).freeze()).await.expect("written");
                }
            }
        }
        assert!(image.read(Extent::new(0, model.len() as u64)).await.expect("read")[..] == model[..]);
        image.finish().await.expect("finished");
        assert!(check::image(&storage, path, format, None).await.expect("checked").is_good());
    });
}

fn run<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().build().expect("a runtime of one thread").block_on(work)
}
