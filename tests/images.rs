//! Image formats against tools and readers that nobody here wrote: qemu-img both ways, a second VHDX reader, and the shapes of
//! files that other writers and crashes leave behind.
#![allow(clippy::unwrap_used, clippy::disallowed_methods, missing_docs, reason = "a test")]

mod support;

use std::fs::{self, File, OpenOptions};
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use futures_util::future::join_all;
use support::{Rng, s, tool, try_tool};
use tempfile::TempDir;
use tidegate::disk::vhdx::format::{HEADER_AT, HEADER_LEN, Header, MIB, Metadata, Regions};
use tidegate::disk::vhdx::log::{Change, encode_entry};
use tidegate::disk::{Disk, DiskError, Format, Image, check};
use tidegate::model::Extent;
use tidegate::storage::AlignedBuf;
use tidegate::storage::uring::{self, Uring, UringFile};
use uuid::Uuid;

const SIZE: u64 = (200 << 20) + 512 * 7;

fn run<T>(work: impl Future<Output = T>) -> T {
    uring::run(work).unwrap()
}

fn folder() -> TempDir {
    tempfile::tempdir().unwrap()
}

async fn open(path: &Path, format: Format) -> Image<UringFile> {
    Image::open_read_only(&Uring::direct(), path, format, true).await.unwrap_or_else(|e| panic!("{e}"))
}

/// Direct I/O wants memory that begins on a page.
fn aligned(bytes: Vec<u8>) -> Bytes {
    AlignedBuf::copy_of(&bytes).freeze()
}

/// Faults that our checker finds.
fn faults(path: &Path, format: Format, content: Option<&Path>) -> Vec<String> {
    let report = run(check::image(&Uring::direct(), path, format, content)).unwrap();
    report.faults.into_iter().map(|f| format!("{} at {}: {}", f.file, f.offset, f.what)).collect()
}

fn good(path: &Path, format: Format, content: &Path) {
    assert_eq!(faults(path, format, Some(content)), Vec::<String>::new(), "{}", path.display());
}

/// A raw file with runs of data and holes, incompressible in places, with a short last block.
fn sample(path: &Path, size: u64, seed: u64) {
    let file = File::create(path).unwrap();
    file.set_len(size).unwrap();
    let mut rng = Rng::new(seed);
    for _ in 0..60 {
        let at = rng.below(size / 512) * 512;
        let len = ((1 + rng.below(600)) * 512).min(size - at);
        let kind = rng.below(3);
        let bytes: Vec<u8> =
            (0..len).map(|i| if kind == 0 { rng.below(256) as u8 } else { ((i / 512) as u8).wrapping_add(kind as u8) }).collect();
        file.write_all_at(&bytes, at).unwrap();
    }
    file.write_all_at(&[9; 512], size - 512).unwrap();
}

/// Random writes and zeroes at depth, in several sessions, mirrored in a raw model.
fn random_operations(path: &Path, format: Format, model: &File, seed: u64) {
    let mut rng = Rng::new(seed);
    for _session in 0..3 {
        run(async {
            let image = Image::open(&Uring::direct(), path, format).await.unwrap();
            for _ in 0..12 {
                let mut batch: Vec<(Extent, Option<Bytes>)> = Vec::new();
                while batch.len() < 32 {
                    let at = rng.below(SIZE / 512) * 512;
                    let longest = [8, 64, 2048, 8192][rng.below(4) as usize];
                    let extent = Extent::new(at, ((1 + rng.below(longest)) * 512).min(SIZE - at));
                    // What runs side by side must not overlap: which one wins is not defined.
                    if batch.iter().any(|(e, _)| e.overlaps(&extent)) {
                        continue;
                    }
                    let data = (rng.below(6) > 0).then(|| aligned(vec![1 + rng.below(255) as u8; extent.len as usize]));
                    batch.push((extent, data));
                }
                join_all(batch.iter().map(async |(extent, data)| match data {
                    Some(data) => image.write(extent.offset, data.clone()).await.unwrap(),
                    None => image.zero(*extent).await.unwrap(),
                }))
                .await;
                for (extent, data) in &batch {
                    let bytes = data.clone().unwrap_or_else(|| aligned(vec![0; extent.len as usize]));
                    model.write_all_at(&bytes, extent.offset).unwrap();
                }
                if rng.below(3) == 0 {
                    image.barrier().await.unwrap();
                }
            }
            image.finish().await.unwrap();
        });
    }
}

fn qemu_format(format: Format) -> &'static str {
    format.extension()
}

#[test]
fn what_we_write_is_what_qemu_reads() {
    for (seed, format) in Format::ALL.into_iter().filter(|f| f.can_be_replica()).enumerate() {
        let dir = folder();
        let (path, model) = (dir.path().join(format!("image.{}", format.extension())), dir.path().join("model.raw"));
        let raw = File::create(&model).unwrap();
        raw.set_len(SIZE).unwrap();
        run(async { Image::create(&Uring::direct(), &path, format, SIZE).await.unwrap().finish().await.unwrap() });
        random_operations(&path, format, &raw, seed as u64);
        let kind = qemu_format(format);
        if matches!(format, Format::Vhdx | Format::VhdxFixed | Format::Vmdk) {
            tool("qemu-img", &["check", "-f", kind, s(&path)]);
        }
        tool("qemu-img", &["compare", "-f", "raw", "-F", kind, s(&model), s(&path)]);
        good(&path, format, &model);
        let back = dir.path().join("back.raw");
        tool("qemu-img", &["convert", "-f", kind, "-O", "raw", s(&path), s(&back)]);
        assert!(support::same_bytes(&back, &model), "{format:?}");
        // And once more after qemu wrote into it (it cannot write vmfs made elsewhere less than what it reads).
        tool("qemu-io", &["-f", kind, "-c", "write -P 77 12345856 1000448", s(&path)]);
        raw.write_all_at(&vec![77; 1_000_448], 12_345_856).unwrap();
        good(&path, format, &model);
        random_operations(&path, format, &raw, 100 + seed as u64);
        good(&path, format, &model);
        println!("{}: written, checked and compared", format.as_str());
    }
}

#[test]
fn a_stream_is_small_and_reads_back() {
    let dir = folder();
    let (path, model) = (dir.path().join("image.vmdk"), dir.path().join("model.raw"));
    sample(&model, SIZE, 3);
    run(async {
        let source = open(&model, Format::Raw).await;
        let image = Image::create(&Uring::direct(), &path, Format::VmdkStream, SIZE).await.unwrap();
        let mut at = 0;
        while let Some(extent) = source.next_data(at).unwrap() {
            // In pieces that end within grains.
            let extent = Extent::new(extent.offset, extent.len.min(100 * 512));
            image.write(extent.offset, source.read(extent).await.unwrap().freeze()).await.unwrap();
            at = extent.end();
        }
        assert!(image.write(0, aligned(vec![1; 512])).await.is_err(), "a stream does not go back");
        image.finish().await.unwrap();
    });
    tool("qemu-img", &["check", "-f", "vmdk", s(&path)]);
    tool("qemu-img", &["compare", "-f", "raw", "-F", "vmdk", s(&model), s(&path)]);
    good(&path, Format::VmdkStream, &model);
    assert!(fs::metadata(&path).unwrap().len() < SIZE / 4);
    // Cut off, or with a damaged grain, it is a fault.
    let whole = fs::read(&path).unwrap();
    fs::write(&path, &whole[..whole.len() - 512]).unwrap();
    assert!(!faults(&path, Format::VmdkStream, None).is_empty(), "the end mark is missing");
    let mut damaged = whole.clone();
    damaged[128 * 512 + 40] ^= 0x55;
    fs::write(&path, damaged).unwrap();
    assert!(!faults(&path, Format::VmdkStream, None).is_empty(), "a grain does not unpack");
}

#[test]
fn what_qemu_writes_is_what_we_read() {
    let dir = folder();
    let model = dir.path().join("model.raw");
    sample(&model, SIZE, 5);
    let kinds = [
        ("vhdx", "subformat=dynamic,block_size=1M"),
        ("vhdx", "subformat=dynamic,block_size=32M,block_state_zero=off"),
        ("vhdx", "subformat=fixed"),
        ("vmdk", "subformat=monolithicSparse"),
        ("vmdk", "subformat=monolithicSparse,zeroed_grain=on"),
        ("vmdk", "subformat=monolithicFlat"),
        ("vmdk", "subformat=twoGbMaxExtentSparse"),
        ("vmdk", "subformat=twoGbMaxExtentFlat"),
        ("vmdk", "subformat=streamOptimized"),
    ];
    for (index, (kind, options)) in kinds.into_iter().enumerate() {
        let path = dir.path().join(format!("from qemu {index}.{kind}"));
        tool("qemu-img", &["convert", "-f", "raw", "-O", kind, "-o", options, s(&model), s(&path)]);
        good(&path, kind.parse().unwrap(), &model);
    }
}

#[test]
fn a_delta_is_read_with_its_parents_and_refused_when_a_parent_changed() {
    let dir = folder();
    let path = |name: &str| dir.path().join(name);
    let (base, middle, top, model) = (path("base.vmdk"), path("middle.vmdk"), path("top.vmdk"), path("model.raw"));
    sample(&model, 64 << 20, 7);
    tool("qemu-img", &["convert", "-f", "raw", "-O", "vmdk", s(&model), s(&base)]);
    for (child, parent) in [(&middle, "base.vmdk"), (&top, "middle.vmdk")] {
        tool("qemu-img", &["create", "-q", "-f", "vmdk", "-b", parent, "-F", "vmdk", s(child)]);
        tool("qemu-io", &["-f", "vmdk", "-c", "write -P 5 3145728 70144", "-c", "write -P 6 40000512 512", s(child)]);
    }
    tool("qemu-io", &["-f", "vmdk", "-c", "write -P 8 1048576 4096", s(&top)]);
    let flattened = path("flat.raw");
    tool("qemu-img", &["convert", "-f", "vmdk", "-O", "raw", s(&top), s(&flattened)]);
    good(&top, Format::Vmdk, &flattened);
    let refused = run(Image::open_read_only(&Uring::direct(), &top, Format::Vmdk, false)).err().unwrap();
    assert!(matches!(refused, DiskError::Parent { .. }), "parents only when they are allowed: {refused}");
    assert!(matches!(run(Image::open(&Uring::direct(), &top, Format::Vmdk)).err().unwrap(), DiskError::Unsupported { .. }));
    tool("qemu-io", &["-f", "vmdk", "-c", "write -P 9 0 512", s(&base)]);
    assert!(faults(&top, Format::Vmdk, None)[0].contains("was changed after the child was made"));
}

// ---- VHDX that others leave behind

/// A VHDX of 64 MiB with one block of 7s, and how to put a log into it.
struct Dirty {
    dir: TempDir,
    path: PathBuf,
    id: Uuid,
}

/// First byte of the payload of our images of this size, and where their block table stands.
const DATA_AT: u64 = 4 * MIB;
const BAT_AT: u64 = 2 * MIB;
const BLOCK: u64 = 2 * MIB;

impl Dirty {
    fn new() -> Self {
        let dir = folder();
        let path = dir.path().join("dirty.vhdx");
        run(async {
            let image = Image::create(&Uring::direct(), &path, Format::Vhdx, 64 << 20).await.unwrap();
            image.write(0, aligned(vec![7; BLOCK as usize])).await.unwrap();
            image.finish().await.unwrap();
        });
        // Payload that no table entry refers to yet.
        let file = OpenOptions::new().write(true).open(&path).unwrap();
        for n in 1..4u64 {
            file.write_all_at(&vec![10 + n as u8; BLOCK as usize], DATA_AT + n * BLOCK).unwrap();
        }
        Self { dir, path, id: Uuid::new_v4() }
    }

    fn file(&self) -> File {
        OpenOptions::new().read(true).write(true).open(&self.path).unwrap()
    }

    fn len(&self) -> u64 {
        fs::metadata(&self.path).unwrap().len()
    }

    /// A change of the first page of the block table: block n is the n-th payload, for all up to `blocks`.
    fn bat(&self, blocks: u64) -> Change {
        let mut page = vec![0; 4096];
        for n in 0..=blocks {
            page[n as usize * 8..][..8].copy_from_slice(&(((DATA_AT + n * BLOCK) / MIB) << 20 | 6).to_le_bytes());
        }
        Change::Sector { at: BAT_AT, data: page }
    }

    fn entry(&self, sequence: u64, tail: u64, changes: &[Change]) -> Vec<u8> {
        encode_entry(self.id, sequence, tail as u32, (self.len(), self.len()), changes)
    }

    /// Puts bytes into the ring, wrapping, and makes the log active.
    fn put(&self, at: u64, bytes: &[u8]) {
        let file = self.file();
        for (i, sector) in bytes.chunks(4096).enumerate() {
            file.write_all_at(sector, MIB + (at + i as u64 * 4096) % MIB).unwrap();
        }
        for place in HEADER_AT {
            let mut bytes = vec![0; HEADER_LEN];
            file.read_exact_at(&mut bytes, place).unwrap();
            let header = Header::decode(&bytes).unwrap();
            file.write_all_at(&Header { log: self.id, ..header }.encode(), place).unwrap();
        }
    }

    /// What block n begins with, read without changing the file.
    fn seen(&self) -> Vec<u8> {
        let before = fs::read(&self.path).unwrap();
        let seen = run(async {
            let image = open(&self.path, Format::Vhdx).await;
            let mut seen = Vec::new();
            for n in 0..4 {
                seen.push(image.read(Extent::new(n * BLOCK, 512)).await.unwrap()[0]);
            }
            seen
        });
        assert!(before == fs::read(&self.path).unwrap(), "reading changes nothing");
        seen
    }

    /// Opens a copy for writing, which replays the log, and lets qemu read that.
    fn replayed(&self) -> Vec<u8> {
        let copy = self.dir.path().join("replayed.vhdx");
        fs::copy(&self.path, &copy).unwrap();
        run(async { Image::open(&Uring::direct(), &copy, Format::Vhdx).await.unwrap().finish().await.unwrap() });
        tool("qemu-img", &["check", "-f", "vhdx", s(&copy)]);
        self.first_bytes(&copy)
    }

    /// Lets qemu replay a copy.
    fn replayed_by_qemu(&self) -> Vec<u8> {
        let copy = self.dir.path().join("qemu.vhdx");
        fs::copy(&self.path, &copy).unwrap();
        tool("qemu-img", &["check", "-r", "all", "-f", "vhdx", s(&copy)]);
        self.first_bytes(&copy)
    }

    fn first_bytes(&self, image: &Path) -> Vec<u8> {
        let raw = self.dir.path().join("out.raw");
        tool("qemu-img", &["convert", "-f", "vhdx", "-O", "raw", s(image), s(&raw)]);
        let raw = File::open(raw).unwrap();
        (0..4u64)
            .map(|n| {
                let mut byte = [0];
                raw.read_exact_at(&mut byte, n * BLOCK).unwrap();
                byte[0]
            })
            .collect()
    }
}

#[test]
fn a_log_is_replayed_in_memory_and_when_the_image_is_opened_for_writing() {
    let dirty = Dirty::new();
    dirty.put(0, &[dirty.entry(1, 0, &[dirty.bat(1)]), dirty.entry(2, 0, &[dirty.bat(2)])].concat());
    for seen in [dirty.seen(), dirty.replayed(), dirty.replayed_by_qemu()] {
        assert_eq!(seen, [7, 11, 12, 0]);
    }
    let report = run(check::image(&Uring::direct(), &dirty.path, Format::Vhdx, None)).unwrap();
    assert!(report.is_good() && report.notes.iter().any(|n| n.what.contains("2 entries")), "{report:?}");
}

#[test]
fn logs_of_every_shape_are_replayed_as_the_specification_says() {
    // Torn second entry: the first counts.
    let dirty = Dirty::new();
    let mut torn = dirty.entry(2, 0, &[dirty.bat(2)]);
    torn[4096 + 700] ^= 1;
    dirty.put(0, &[dirty.entry(1, 0, &[dirty.bat(1)]), torn].concat());
    assert_eq!((dirty.seen(), dirty.replayed(), dirty.replayed_by_qemu()), (vec![7, 11, 0, 0], vec![7, 11, 0, 0], vec![7, 11, 0, 0]));

    // A gap in the sequence: only the newest run.
    let dirty = Dirty::new();
    let gap = [dirty.entry(7, 0, &[dirty.bat(3)]), dirty.entry(9, 8192, &[dirty.bat(1)])].concat();
    dirty.put(0, &gap);
    assert_eq!((dirty.seen(), dirty.replayed()), (vec![7, 11, 0, 0], vec![7, 11, 0, 0]));

    // Before the tail: was applied long ago, and undone since.
    let dirty = Dirty::new();
    let zero = Change::Zero { at: BAT_AT + 4096, len: 4096 };
    dirty.put(0, &[dirty.entry(1, 0, &[dirty.bat(3)]), dirty.entry(2, 8192, &[dirty.bat(1), zero])].concat());
    assert_eq!((dirty.seen(), dirty.replayed()), (vec![7, 11, 0, 0], vec![7, 11, 0, 0]));

    // Around the end of the ring.
    let dirty = Dirty::new();
    let at = MIB - 3 * 4096;
    dirty.put(at, &[dirty.entry(1, at, &[dirty.bat(1)]), dirty.entry(2, at, &[dirty.bat(2)])].concat());
    assert_eq!((dirty.seen(), dirty.replayed()), (vec![7, 11, 12, 0], vec![7, 11, 12, 0]));

    // 126 and 127 descriptors, and more than fit two sectors: other sectors of the first block change with the table.
    for count in [126, 127, 250] {
        let dirty = Dirty::new();
        let others = (1..count).map(|i| Change::Sector { at: DATA_AT + i * 4096, data: vec![99; 4096] });
        dirty.put(0, &dirty.entry(1, 0, &std::iter::once(dirty.bat(1)).chain(others).collect::<Vec<_>>()));
        assert_eq!((dirty.seen(), dirty.replayed()), (vec![7, 11, 0, 0], vec![7, 11, 0, 0]), "{count} descriptors");
        let last = run(async { open(&dirty.path, Format::Vhdx).await.read(Extent::new((count - 1) * 4096, 512)).await.unwrap()[0] });
        assert_eq!(last, 99, "{count} descriptors");
    }

    // Active, but nothing valid in it: empty.
    let dirty = Dirty::new();
    dirty.put(0, &[0; 4096]);
    assert_eq!((dirty.seen(), dirty.replayed()), (vec![7, 0, 0, 0], vec![7, 0, 0, 0]));

    // The file was longer when the entry was written.
    let dirty = Dirty::new();
    dirty.put(0, &encode_entry(dirty.id, 1, 0, (dirty.len() + MIB, dirty.len() + MIB), &[dirty.bat(1)]));
    assert!(faults(&dirty.path, Format::Vhdx, None)[0].contains("cut"));
    assert!(run(Image::open(&Uring::direct(), &dirty.path, Format::Vhdx)).is_err());

    // The file must become longer: a block stands behind its end, unwritten.
    let dirty = Dirty::new();
    let len = dirty.len();
    dirty.file().set_len(len - MIB).unwrap();
    dirty.put(0, &encode_entry(dirty.id, 1, 0, (len - MIB, len), &[dirty.bat(3)]));
    assert_eq!((dirty.seen(), dirty.replayed()), (vec![7, 11, 12, 13], vec![7, 11, 12, 13]));
}

#[test]
fn either_header_and_either_region_table_is_enough() {
    for torn in HEADER_AT {
        let dirty = Dirty::new();
        dirty.file().write_all_at(&[0xee; 100], torn).unwrap();
        assert_eq!(dirty.seen()[0], 7);
        assert!(faults(&dirty.path, Format::Vhdx, None).is_empty());
    }
    let dirty = Dirty::new();
    dirty.file().write_all_at(&[0xee; 100], 192 << 10).unwrap();
    assert_eq!(dirty.seen()[0], 7);
    assert_eq!(faults(&dirty.path, Format::Vhdx, None).len(), 1, "other readers refuse it");
    assert_eq!(dirty.replayed()[0], 7, "writing mends it");
    let dirty = Dirty::new();
    let file = dirty.file();
    for (at, id) in HEADER_AT.into_iter().zip([1, 2]) {
        let mut bytes = vec![0; HEADER_LEN];
        file.read_exact_at(&mut bytes, at).unwrap();
        let header = Header { sequence: 9, file_write: Uuid::from_u128(id), ..Header::decode(&bytes).unwrap() };
        file.write_all_at(&header.encode(), at).unwrap();
    }
    assert!(faults(&dirty.path, Format::Vhdx, None)[0].contains("newest"));
}

/// Reads bytes through a reader that is not ours.
fn second_reader(path: &Path, parent: Option<&Path>, at: u64, len: usize) -> Vec<u8> {
    use std::io::Seek;
    let bytes = fs::read(path).unwrap();
    let mut reader = match parent {
        None => vhdx::VhdxReader::from_bytes(bytes).unwrap(),
        Some(parent) => vhdx::VhdxReader::from_bytes_with_parent(bytes, vhdx::VhdxReader::open(parent).unwrap()).unwrap(),
    };
    let mut out = vec![0; len];
    reader.seek(std::io::SeekFrom::Start(at)).unwrap();
    reader.read_exact(&mut out).unwrap();
    out
}

/// A VHDX put together by hand: sector size, parent, and payload of its blocks (state 6, or 7 with the sectors that are here).
fn by_hand(path: &Path, size: u64, sector: u32, parent: Option<(&str, Uuid)>, blocks: &[(u64, u64, Vec<u8>, Vec<u64>)]) {
    let metadata = Metadata {
        block_size: MIB as u32,
        fixed: false,
        size,
        size_at: 0,
        disk_id: Uuid::new_v4(),
        logical_sector: sector,
        physical_sector: 4096,
        parent: None,
    };
    let regions = Regions { bat_at: 2 * MIB, bat_len: MIB, metadata_at: 3 * MIB, metadata_len: MIB, others: vec![] };
    let mut region = metadata.encode();
    if let Some((name, linkage)) = parent {
        let utf16 = |text: &str| text.encode_utf16().flat_map(u16::to_le_bytes).collect::<Vec<u8>>();
        let pairs = [("parent_linkage", format!("{{{linkage}}}")), ("relative_path", format!(".\\{name}"))];
        let mut locator = Uuid::from_u128(0xb04a_efb7_d19e_4a81_b789_25b8_e944_5913).to_bytes_le().to_vec();
        locator.extend_from_slice(&[0, 0, pairs.len() as u8, 0]);
        let mut text = Vec::new();
        let start = 20 + pairs.len() * 12;
        for (key, value) in &pairs {
            let (key, value) = (utf16(key), utf16(value));
            locator.extend_from_slice(&((start + text.len()) as u32).to_le_bytes());
            locator.extend_from_slice(&((start + text.len() + key.len()) as u32).to_le_bytes());
            locator.extend_from_slice(&(key.len() as u16).to_le_bytes());
            locator.extend_from_slice(&(value.len() as u16).to_le_bytes());
            text.extend_from_slice(&[key, value].concat());
        }
        locator.extend_from_slice(&text);
        // File parameters are the first item: has a parent.
        region[65536 + 4] |= 2;
        region[10] = 6;
        let entry = 32 + 5 * 32;
        region[entry..entry + 16].copy_from_slice(&Uuid::from_u128(0xa8d3_5f2d_b30b_454d_abf7_d3d8_4834_ab0c).to_bytes_le());
        region[entry + 16..entry + 20].copy_from_slice(&(66_000u32).to_le_bytes());
        region[entry + 20..entry + 24].copy_from_slice(&(locator.len() as u32).to_le_bytes());
        region[entry + 24..entry + 28].copy_from_slice(&4u32.to_le_bytes());
        region[66_000..66_000 + locator.len()].copy_from_slice(&locator);
    }
    let file = File::create(path).unwrap();
    file.write_all_at(&tidegate::disk::vhdx::format::file_identifier(), 0).unwrap();
    let header =
        Header { sequence: 1, file_write: Uuid::new_v4(), data_write: Uuid::new_v4(), log: Uuid::nil(), log_len: MIB as u32, log_at: MIB };
    file.write_all_at(&header.encode(), HEADER_AT[0]).unwrap();
    file.write_all_at(&Header { sequence: 2, ..header }.encode(), HEADER_AT[1]).unwrap();
    file.write_all_at(&region, 3 * MIB).unwrap();
    let ratio = (1 << 23) * u64::from(sector) / MIB;
    let mut at = 4 * MIB;
    let mut bitmap = vec![0u8; MIB as usize];
    for (number, state, payload, here) in blocks {
        file.write_all_at(payload, at).unwrap();
        file.write_all_at(&((at / MIB) << 20 | state).to_le_bytes(), 2 * MIB + (number + number / ratio) * 8).unwrap();
        for bit in here.iter().map(|s| number % ratio * MIB / u64::from(sector) + s) {
            bitmap[(bit / 8) as usize] |= 1 << (bit % 8);
        }
        at += MIB;
    }
    if parent.is_some() {
        file.write_all_at(&bitmap, at).unwrap();
        file.write_all_at(&((at / MIB) << 20 | 6).to_le_bytes(), 2 * MIB + ratio * 8).unwrap();
        at += MIB;
    }
    file.set_len(at).unwrap();
    for table in [192 << 10, 256 << 10] {
        file.write_all_at(&regions.encode(), table).unwrap();
    }
}

fn data_write(path: &Path) -> Uuid {
    let mut bytes = vec![0; HEADER_LEN];
    File::open(path).unwrap().read_exact_at(&mut bytes, HEADER_AT[1]).unwrap();
    Header::decode(&bytes).unwrap().data_write
}

#[test]
fn differencing_disks_are_read_sector_by_sector_with_their_parents() {
    let dir = folder();
    let (parent, child, grandchild) =
        (dir.path().join("parent.vhdx"), dir.path().join("child.avhdx"), dir.path().join("grand child.avhdx"));
    let size = 16 * MIB;
    by_hand(&parent, size, 512, None, &[(0, 6, vec![1; MIB as usize], vec![]), (1, 6, vec![2; MIB as usize], vec![])]);
    let here: Vec<u64> = (0..2048).filter(|s| s % 3 == 0 || (100..140).contains(s)).collect();
    let blocks = [(0, 7, vec![3; MIB as usize], here.clone()), (2, 6, vec![4; MIB as usize], vec![])];
    by_hand(&child, size, 512, Some(("parent.vhdx", data_write(&parent))), &blocks);
    by_hand(&grandchild, size, 512, Some(("child.avhdx", data_write(&child))), &[(1, 7, vec![5; MIB as usize], vec![8, 9])]);
    let expected = |level: usize, sector: u64| -> u8 {
        match (level, sector / 2048) {
            (_, 0) if here.contains(&sector) => 3,
            (_, 0) => 1,
            (2, 1) if matches!(sector - 2048, 8 | 9) => 5,
            (_, 1) => 2,
            (_, 2) => 4,
            _ => 0,
        }
    };
    for (level, path) in [(1, &child), (2, &grandchild)] {
        run(async {
            let image = open(path, Format::Vhdx).await;
            let whole = image.read(Extent::new(0, size)).await.unwrap();
            for sector in 0..size / 512 {
                let bytes = &whole[(sector * 512) as usize..][..512];
                assert!(bytes.iter().all(|&b| b == expected(level, sector)), "level {level}, sector {sector}");
            }
            // Odd pieces.
            let piece = image.read(Extent::new(99 * 512, 1000 * 512)).await.unwrap();
            assert_eq!(piece[..], whole[99 * 512..1099 * 512]);
        });
        assert_eq!(faults(path, Format::Vhdx, None), Vec::<String>::new());
    }
    let other = second_reader(&child, Some(&parent), 0, (3 * MIB) as usize);
    assert!(other.chunks(512).enumerate().all(|(s, bytes)| bytes.iter().all(|&b| b == expected(1, s as u64))), "the second reader agrees");
    let refused = run(Image::open_read_only(&Uring::direct(), &child, Format::Vhdx, false)).err().unwrap();
    assert!(matches!(refused, DiskError::Parent { .. }));
    // The parent is written to: the child must not be read any more.
    run(async { Image::open(&Uring::direct(), &parent, Format::Vhdx).await.unwrap().finish().await.unwrap() });
    assert!(faults(&child, Format::Vhdx, None)[0].contains("was changed"));
}

#[test]
fn sectors_of_4096_bytes_change_where_the_table_has_gaps() {
    let dir = folder();
    let path = dir.path().join("4k.vhdx");
    // One chunk has 32768 blocks of 1 MiB; the table entry of block 4096 would be elsewhere with sectors of 512 bytes.
    by_hand(&path, 5000 * MIB, 4096, None, &[(0, 6, vec![1; MIB as usize], vec![]), (4096, 6, vec![2; MIB as usize], vec![])]);
    run(async {
        let image = Image::open(&Uring::direct(), &path, Format::Vhdx).await.unwrap();
        assert_eq!(image.sector_sizes(), (4096, 4096));
        assert_eq!(image.read(Extent::new(4096 * MIB, 512)).await.unwrap()[..], [2; 512]);
        image.write(4999 * MIB, aligned(vec![3; MIB as usize])).await.unwrap();
        image.finish().await.unwrap();
    });
    for (at, value) in [(0, 1), (4096 * MIB, 2), (4999 * MIB + 77, 3), (MIB, 0)] {
        assert_eq!(second_reader(&path, None, at, 1), [value]);
    }
    assert!(faults(&path, Format::Vhdx, None).is_empty());
}

#[test]
fn a_disk_of_64_tib_opens_with_little_memory() {
    let dir = folder();
    let path = dir.path().join("huge.vhdx");
    let size = 64 << 40;
    run(async {
        let image = Image::create(&Uring::direct(), &path, Format::Vhdx, size).await.unwrap();
        image.write(size - 4096, aligned(vec![5; 4096])).await.unwrap();
        image.finish().await.unwrap();
    });
    run(async {
        let image = open(&path, Format::Vhdx).await;
        let first = image.next_data(0).unwrap().unwrap();
        assert!(first.end() == size && first.len <= 32 * MIB, "{first:?}");
        assert_eq!(image.read(Extent::new(size - 512, 512)).await.unwrap()[..], [5; 512]);
    });
    tool("qemu-img", &["check", "-f", "vhdx", s(&path)]);
}

#[test]
fn a_disk_grows_and_what_is_new_is_zero() {
    for (format, from, to) in [
        (Format::Vhdx, 64 * MIB, 200 * MIB + 512),
        // The table needs another region.
        (Format::Vhdx, 250 << 30, 700 << 30),
        (Format::VhdxFixed, 16 * MIB, 40 * MIB),
        (Format::Raw, 16 * MIB, 40 * MIB),
        (Format::VmdkFlat, 16 * MIB, 40 * MIB + 512),
        (Format::Vmfs, 16 * MIB, 40 * MIB),
        // Within the last grain table; by one more; far beyond.
        (Format::Vmdk, 40 * MIB + 512, 60 * MIB),
        (Format::Vmdk, 64 * MIB, 64 * MIB + 1024),
        (Format::Vmdk, 250 << 30, 700 << 30),
    ] {
        let dir = folder();
        let path = dir.path().join(format!("grow.{}", format.extension()));
        run(async {
            let image = Image::create(&Uring::direct(), &path, format, from).await.unwrap();
            image.write(from - 4096, aligned(vec![1; 4096])).await.unwrap();
            image.grow(to).await.unwrap();
            assert_eq!(image.size(), to);
            image.write(to - 512, aligned(vec![2; 512])).await.unwrap();
            assert!(matches!(image.grow(from).await, Err(DiskError::Size { .. })), "shrinking is refused");
            image.finish().await.unwrap();
        });
        run(async {
            let image = Image::open(&Uring::direct(), &path, format).await.unwrap();
            assert_eq!(image.size(), to);
            assert_eq!(image.read(Extent::new(from - 512, 512)).await.unwrap()[..], [1; 512]);
            assert_eq!(image.read(Extent::new(from, 512)).await.unwrap()[..], [0; 512]);
            assert_eq!(image.read(Extent::new(to - 512, 512)).await.unwrap()[..], [2; 512]);
        });
        assert_eq!(faults(&path, format, None), Vec::<String>::new());
        if format == Format::Vhdx {
            tool("qemu-img", &["check", "-f", "vhdx", s(&path)]);
            let info = tool("qemu-img", &["info", "-f", "vhdx", "--output=json", s(&path)]);
            assert!(info.contains(&format!("\"virtual-size\": {to}")), "{info}");
        }
    }
}

// ---- damage

/// Each change of a good image, and what our checker must say about it.
#[test]
fn every_kind_of_damage_is_found_and_nothing_is_read_from_it() {
    let entry = |place: u64, state: u64| ((place / MIB) << 20 | state).to_le_bytes();
    let vhdx: [(&str, u64, Vec<u8>); 9] = [
        ("outside", BAT_AT + 8, entry(1 << 40, 6).to_vec()),
        ("overlaps a structure", BAT_AT + 8, entry(BAT_AT, 6).to_vec()),
        ("two blocks overlap", BAT_AT + 8, entry(DATA_AT, 6).to_vec()),
        ("two blocks overlap", BAT_AT + 8, entry(DATA_AT + MIB, 6).to_vec()),
        ("a state", BAT_AT + 8, entry(DATA_AT + BLOCK, 4).to_vec()),
        ("a state", BAT_AT + 8, entry(DATA_AT + BLOCK, 7).to_vec()),
        ("reserved bits", BAT_AT + 8, (((DATA_AT + BLOCK) / MIB) << 20 | 0x16).to_le_bytes().to_vec()),
        ("zero block has a place", BAT_AT + 8, entry(DATA_AT + BLOCK, 2).to_vec()),
        ("identifier", 0, b"vhdxFILE".to_vec()),
    ];
    for (what, at, bytes) in vhdx {
        let dirty = Dirty::new();
        dirty.file().write_all_at(&bytes, at).unwrap();
        let found = faults(&dirty.path, Format::Vhdx, None);
        assert!(found.iter().any(|f| f.contains(what)), "{what}: {found:?}");
        let readable = matches!(what, "reserved bits" | "zero block has a place");
        assert_eq!(run(Image::open(&Uring::direct(), &dirty.path, Format::Vhdx)).is_ok(), readable, "{what}");
    }
    let dirty = Dirty::new();
    dirty.file().set_len(DATA_AT + BLOCK / 2).unwrap();
    assert!(faults(&dirty.path, Format::Vhdx, None)[0].contains("outside"), "the tail was cut");

    let dir = folder();
    let path = dir.path().join("good.vmdk");
    let fresh = || {
        let _ = fs::remove_file(&path);
        run(async {
            let image = Image::create(&Uring::direct(), &path, Format::Vmdk, 64 << 20).await.unwrap();
            image.write(0, aligned(vec![7; 1 << 20])).await.unwrap();
            image.finish().await.unwrap();
        });
    };
    // Grain tables begin at sector 31, their copies at 22, grains at 128; see the unit test of the layout.
    let vmdk: [(&str, u64, Vec<u8>, bool); 11] = [
        ("where grains may be put", 64, 1u64.to_le_bytes().to_vec(), false),
        ("two grain tables overlap", 30 * 512, [35u32.to_le_bytes(), 35u32.to_le_bytes()].concat(), false),
        ("outside", 31 * 512 + 16 * 4, 0x7fff_ffffu32.to_le_bytes().to_vec(), false),
        ("over the structures", 31 * 512 + 16 * 4, 30u32.to_le_bytes().to_vec(), false),
        ("two blocks overlap", 31 * 512 + 16 * 4, 128u32.to_le_bytes().to_vec(), false),
        ("the two copies", 22 * 512, 999u32.to_le_bytes().to_vec(), true),
        ("a grain table is missing", 30 * 512, vec![0; 4], false),
        ("512 entries", 44, 256u32.to_le_bytes().to_vec(), false),
        ("directory lies outside", 56, (1u64 << 40).to_le_bytes().to_vec(), false),
        ("newline", 73, b"\r\n".to_vec(), false),
        ("signature", 512, b"! ".to_vec(), false),
    ];
    for (what, at, bytes, writable) in vmdk {
        fresh();
        OpenOptions::new().write(true).open(&path).unwrap().write_all_at(&bytes, at).unwrap();
        let found = faults(&path, Format::Vmdk, None);
        assert!(found.iter().any(|f| f.contains(what)), "{what}: {found:?}");
        assert_eq!(run(Image::open(&Uring::direct(), &path, Format::Vmdk)).is_ok(), writable, "{what}");
    }
    fresh();
    OpenOptions::new().write(true).open(&path).unwrap().set_len(128 * 512 + 700_000).unwrap();
    assert!(faults(&path, Format::Vmdk, None)[0].contains("outside"), "the tail was cut");
}

#[test]
fn names_in_an_image_never_lead_out_of_its_folder() {
    let dir = folder();
    let inner = dir.path().join("inner");
    fs::create_dir(&inner).unwrap();
    let secret = dir.path().join("secret.raw");
    fs::write(&secret, vec![1; 1 << 20]).unwrap();
    std::os::unix::fs::symlink(&secret, inner.join("link.vmdk")).unwrap();
    for name in ["../secret.raw", s(&secret), "link.vmdk", "a/../../secret.raw", "..\\secret.raw"] {
        let path = inner.join("disk.vmdk");
        let text = format!(
            "# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=ffffffff\ncreateType=\"monolithicFlat\"\nRW 2048 FLAT \"{name}\" 0\n"
        );
        fs::write(&path, text).unwrap();
        let refused = run(Image::open_read_only(&Uring::direct(), &path, Format::VmdkFlat, true)).err();
        assert!(matches!(refused, Some(DiskError::Unsupported { .. })), "{name}: {refused:?}");
        assert!(faults(&path, Format::VmdkFlat, None)[0].contains("folder"), "{name}");
    }
}

#[test]
fn the_check_command_tells_by_its_exit_code_and_in_json() {
    let dirty = Dirty::new();
    let binary = env!("CARGO_BIN_EXE_tidegate");
    let done = try_tool(binary, &["check", "image", s(&dirty.path), "--json"]);
    assert!(done.status.success());
    let report: serde_json::Value = serde_json::from_slice(&done.stdout).unwrap();
    assert_eq!((report["fault_count"].as_u64(), report["size"].as_u64()), (Some(0), Some(64 << 20)));
    dirty.file().write_all_at(&[0xff; 8], BAT_AT + 8).unwrap();
    let done = try_tool(binary, &["check", "image", s(&dirty.path)]);
    assert_eq!(done.status.code(), Some(1));
    let text = String::from_utf8_lossy(&done.stdout).into_owned();
    assert!(text.contains(&format!("at byte {}", BAT_AT + 8)), "{text}");
    assert_eq!(try_tool(binary, &["check", "image", "/no/such/file"]).status.code(), Some(2));
}
