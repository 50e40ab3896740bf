//! Power loss against every format that a replica can have: whatever unsynced writes are lost, kept, reordered or torn, the
//! image opens, checks clean by our checker and by qemu's, and holds everything that a barrier covered.
#![allow(clippy::unwrap_used, clippy::disallowed_methods, missing_docs, reason = "a test")]

mod support;

use std::path::{Path, PathBuf};
use std::process::Command;

use bytes::Bytes;
use support::Rng;
use support::faulty_storage::Faulty;
use tidegate::disk::{Disk, DiskError, Format, Image, check};
use tidegate::model::Extent;

/// Bytes of the disk: a few VHDX blocks, several grain tables' worth of grains.
const SIZE: u64 = 12 << 20;
/// Crash states for each format.
const STATES: u64 = 500;
const UNIT: u64 = 512;
/// It grows no further than this and one step.
const SIZE_MAX: u64 = SIZE + (40 << 20);

fn run<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(work)
}

/// What each sector may hold: the stamp a barrier made durable, or one written (or zeroed) after it.
struct Model {
    durable: Vec<u32>,
    since: Vec<Vec<u32>>,
    live: Vec<u32>,
    /// Sectors of the disk when it grew last and said so; it may have more if power went while it grew.
    grown: usize,
}

impl Model {
    fn new() -> Self {
        let sectors = (SIZE / UNIT) as usize;
        Self { durable: vec![0; sectors], since: vec![Vec::new(); sectors], live: vec![0; sectors], grown: sectors }
    }

    fn size(&self) -> u64 {
        self.durable.len() as u64 * UNIT
    }

    fn resize(&mut self, size: u64) {
        let sectors = (size / UNIT) as usize;
        self.durable.resize(sectors, 0);
        self.since.resize(sectors, Vec::new());
        self.live.resize(sectors, 0);
    }

    fn write(&mut self, extent: Extent, stamp: u32) {
        for sector in extent.offset / UNIT..extent.end() / UNIT {
            self.live[sector as usize] = stamp;
            self.since[sector as usize].push(stamp);
        }
    }

    fn barrier(&mut self) {
        self.durable.clone_from(&self.live);
        self.since.iter_mut().for_each(Vec::clear);
    }

    /// Compares with what an image holds, and takes that as the state to go on from.
    fn adopt(&mut self, content: &[u8]) -> Result<(), String> {
        let sectors = content.len() / UNIT as usize;
        if sectors != self.durable.len() && sectors != self.grown {
            return Err(format!("the disk has {sectors} sectors, not {} or {}", self.grown, self.durable.len()));
        }
        self.resize(content.len() as u64);
        self.grown = sectors;
        for (sector, bytes) in content.chunks(UNIT as usize).enumerate() {
            let stamp = u32::from_le_bytes(*bytes.first_chunk().unwrap());
            if bytes.chunks(4).any(|c| c != stamp.to_le_bytes()) {
                return Err(format!("sector {sector} is a mix"));
            }
            if stamp != self.durable[sector] && !self.since[sector].contains(&stamp) {
                return Err(format!(
                    "sector {sector} holds {stamp}, a barrier covered {} and {:?} came later",
                    self.durable[sector], self.since[sector]
                ));
            }
            self.live[sector] = stamp;
        }
        self.barrier();
        Ok(())
    }
}

fn stamped(extent: Extent, stamp: u32) -> Bytes {
    stamp.to_le_bytes().repeat(extent.len as usize / 4).into()
}

/// One session of random operations; ends by itself or by power loss at some operation.
async fn session(storage: &Faulty, path: &Path, format: Format, model: &mut Model, rng: &mut Rng, stamp: &mut u32) {
    let image = match Image::open(storage, path, format).await {
        Ok(image) => image,
        Err(DiskError::Io { .. }) => return,
        Err(other) => panic!("{other}"),
    };
    for _ in 0..rng.below(40) {
        *stamp += 1;
        let size = model.size();
        if size < SIZE_MAX && rng.below(60) == 0 {
            // By a little, or so much that tables move.
            let most = [300, 70_000][rng.below(2) as usize];
            let larger = size + (1 + rng.below(most)) * UNIT;
            model.resize(larger);
            if image.grow(larger).await.is_err() {
                return;
            }
            model.grown = model.durable.len();
            continue;
        }
        let offset = rng.below(size / UNIT) * UNIT;
        let longest = [1, 16, 300][rng.below(3) as usize];
        let len = (1 + rng.below(longest)) * UNIT;
        let extent = Extent::new(offset, len.min(size - offset));
        match rng.below(10) {
            0 | 1 => match image.barrier().await {
                Ok(()) => model.barrier(),
                Err(_) => return,
            },
            2 => {
                // Whole blocks too: their places are given away.
                let start = offset / (2 << 20) * (2 << 20);
                let whole = Extent::new(start, (2 << 20).min(size - start));
                let extent = if rng.below(2) == 0 { whole } else { extent };
                model.write(extent, 0);
                if image.zero(extent).await.is_err() {
                    return;
                }
            }
            _ => {
                model.write(extent, *stamp);
                if image.write(extent.offset, stamped(extent, *stamp)).await.is_err() {
                    return;
                }
            }
        }
    }
}

/// Lives one image through several sessions and crashes. The number of states checked.
async fn life(seed: u64, format: Format, lying: bool, qemu: Option<&Path>) -> Result<u64, String> {
    let mut rng = Rng::new(seed);
    let storage = Faulty::default();
    let path = PathBuf::from(format!("/r/image.{}", format.extension()));
    drop(Image::create(&storage, &path, format, SIZE).await.map_err(|e| e.to_string())?);
    storage.lying.set(lying);
    let (mut model, mut stamp, mut states) = (Model::new(), 0, 0);
    for _ in 0..5 {
        use support::faulty_storage::Fault;
        if rng.below(2) == 0 {
            storage.fail_at(1 + rng.below(120), Fault::Dead);
        }
        session(&storage, &path, format, &mut model, &mut rng, &mut stamp).await;
        storage.crash(&mut rng);
        states += 1;
        let report = check::image(&storage, &path, format, None).await.map_err(|e| e.to_string())?;
        if !report.is_good() {
            return Err(format!("seed {seed}: our checker says {:?}", report.faults));
        }
        if let Some(dir) = qemu {
            qemu_check(&storage, dir, &path, format).map_err(|e| format!("seed {seed}: {e}"))?;
        }
        let image = Image::open_read_only(&storage, &path, format, false).await.map_err(|e| format!("seed {seed}: {e}"))?;
        let content = image.read(Extent::new(0, image.size())).await.map_err(|e| e.to_string())?;
        model.adopt(&content).map_err(|e| format!("seed {seed}: {e}"))?;
    }
    Ok(states)
}

fn qemu_check(storage: &Faulty, dir: &Path, path: &Path, format: Format) -> Result<(), String> {
    for (file, bytes) in storage.files() {
        std::fs::write(dir.join(file.file_name().unwrap()), bytes).unwrap();
    }
    let image = dir.join(path.file_name().unwrap());
    let kind = if format == Format::Raw { "raw" } else { format.extension() };
    // Flat and raw images have nothing that `check` looks at: opening them is the check.
    let command = if matches!(format, Format::Vhdx | Format::VhdxFixed | Format::Vmdk) { "check" } else { "info" };
    let done = Command::new("qemu-img").args([command, "-f", kind]).arg(&image).output().unwrap();
    if done.status.success() { Ok(()) } else { Err(format!("qemu-img {command}: {}", String::from_utf8_lossy(&done.stderr))) }
}

fn survive(format: Format) {
    let dir = tempfile::tempdir_in(if Path::new("/dev/shm").is_dir() { "/dev/shm" } else { "/tmp" }).unwrap();
    let (mut states, mut seed) = (0, 0);
    while states < STATES {
        states += run(life(seed, format, false, Some(dir.path()))).unwrap_or_else(|e| panic!("{format:?}: {e}"));
        seed += 1;
    }
    println!("{}: {states} crash states, all good", format.as_str());
}

#[test]
fn raw() {
    survive(Format::Raw);
}

#[test]
fn vhdx() {
    survive(Format::Vhdx);
}

#[test]
fn vhdx_fixed() {
    survive(Format::VhdxFixed);
}

#[test]
fn vmdk() {
    survive(Format::Vmdk);
}

#[test]
fn vmdk_flat() {
    survive(Format::VmdkFlat);
}

#[test]
fn vmfs() {
    survive(Format::Vmfs);
}

#[test]
fn a_barrier_that_keeps_nothing_is_noticed() {
    for format in [Format::Raw, Format::Vhdx, Format::Vmdk, Format::Vmfs] {
        let noticed = (0..20).filter(|&seed| run(life(seed, format, true, None)).is_err()).count();
        assert!(noticed > 10, "{format:?}: the crash test must be able to fail: {noticed} of 20");
    }
}

/// One operation fails once, while a barrier or a growth writes structures. The image either goes on as if nothing was, or
/// takes no more writes; whatever it said is durable is there after a power loss, and it opens and checks clean.
#[test]
fn an_operation_that_fails_once_leaves_no_image_in_between() {
    use support::faulty_storage::Fault;
    let (mut refused, mut cases) = (0, 0);
    for format in Format::ALL.into_iter().filter(|f| f.can_be_replica()) {
        for (fault, at) in [Fault::Once, Fault::Full].into_iter().flat_map(|fault| (1..60).map(move |at| (fault, at))) {
            run(async {
                let what = format!("{format:?}, {fault:?} at {at}");
                let storage = Faulty::default();
                let path = PathBuf::from(format!("/r/image.{}", format.extension()));
                let image = Image::create(&storage, &path, format, SIZE).await.unwrap();
                let first = Extent::new(3 << 20, 4096);
                image.write(first.offset, stamped(first, 1)).await.unwrap();
                image.barrier().await.unwrap();
                storage.fail_at(at, fault);
                let second = Extent::new(5 << 20, 4096);
                let steps = async {
                    image.write(second.offset, stamped(second, 2)).await?;
                    image.barrier().await?;
                    image.grow(SIZE + (33 << 20)).await
                };
                let failed = steps.await.is_err();
                if fault == Fault::Full {
                    // Space comes back, and growing is tried again.
                    storage.fail_at(1 << 40, Fault::Once);
                }
                // Goes on as a master target would: grows again, writes into new places, makes that durable.
                let third = Extent::new(SIZE - 4096, 4096);
                let again = async {
                    image.grow(SIZE + (33 << 20)).await?;
                    for n in 0..20 {
                        let extent = Extent::new(SIZE + n * (1 << 20), 4096);
                        image.write(extent.offset, stamped(extent, 4)).await?;
                    }
                    image.write(third.offset, stamped(third, 3)).await?;
                    image.barrier().await
                };
                let durable = again.await.is_ok();
                refused += u32::from(failed && !durable);
                cases += 1;
                drop(image);
                storage.crash(&mut Rng::new(at));
                let report = check::image(&storage, &path, format, None).await.unwrap();
                assert!(report.is_good(), "{what}: {:?}", report.faults);
                let image = Image::open(&storage, &path, format).await.unwrap_or_else(|e| panic!("{what}: {e}"));
                assert_eq!(image.read(first).await.unwrap()[..], stamped(first, 1)[..], "{what}");
                if durable {
                    assert_eq!(image.read(third).await.unwrap()[..], stamped(third, 3)[..], "{what}");
                    let last = Extent::new(SIZE + (19 << 20), 4096);
                    assert_eq!(image.read(last).await.unwrap()[..], stamped(last, 4)[..], "{what}");
                }
            });
        }
    }
    println!("{cases} cases of one failing operation, {refused} closed the image, all good");
    assert!(refused > 20, "some of them must have closed the image: {refused}");
}
