//! What points cost while a replica is applied to, how soon the oldest of a thousand points can be read, and how long rolling
//! to one takes. `benches/run points`.
//!
//! Applying: random 16 KiB overwrites of allocated blocks through the library as the apply thread does them (old content kept
//! and durable, as many writes at once, a barrier for each 64 MiB, a point at each), against the same without points, in turn.
//! The journal, the link and the catalogue are left out of both. Both with what is overwritten in memory because it was written
//! lately (`apply.recent_max`), with content that compresses to a half and that does not; and with nothing in memory.
//!
//! Mounting: 1000 intervals of real sealed records, kept from a real replica. Of the large histories the content compresses
//! about 14:1, so that they fit the disk; the number of index entries is that of 100 GiB. The last one does not compress.
#![allow(clippy::unwrap_used, clippy::disallowed_methods, missing_docs, reason = "a benchmark reads the clock")]

use std::path::Path;
use std::time::Instant;

use bytes::Bytes;
use futures_util::StreamExt;
use tidegate::config::limits::APPLY_DEPTH as DEPTH;
use tidegate::crypto::keyring::DataKey;
use tidegate::disk::recent::{Memory, Recent};
use tidegate::disk::{Disk, Format, Image};
use tidegate::master_target::apply::overwrite::overwrite;
use tidegate::master_target::apply::roll::{Progress, bring_back};
use tidegate::master_target::retain::{Retention, Subject, View};
use tidegate::model::{DiskId, Extent, Position};
use tidegate::storage::AlignedBuf;
use tidegate::storage::uring::{self, Uring, UringFile};

const ROUNDS: usize = 3;
const CHECKPOINT: u64 = 64 << 20;

/// Scattered numbers below `bound`, the same in every run.
fn scattered(n: u64, bound: u64) -> u64 {
    n.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29).wrapping_mul(0xbf58_476d_1ce4_e5b9).rotate_left(31) % bound
}

/// Memory in which all of the replica finds room that is applied to.
const ROOM: u64 = 4 << 30;

/// Bytes of which `random` in every 4096 do not compress.
fn content(len: usize, random: usize, seed: u64) -> Bytes {
    let mut buf = AlignedBuf::zeroed(len);
    for (p, page) in buf.chunks_mut(4096).enumerate() {
        for (i, word) in page[..random].chunks_mut(8).enumerate() {
            word.copy_from_slice(&scattered(seed + (p * 512 + i) as u64 + 1, u64::MAX).to_le_bytes());
        }
    }
    buf.freeze()
}

fn subject() -> Subject {
    Subject { disk: DiskId(uuid::Uuid::from_u128(5)), generation: 1, key: DataKey::from_bytes([3; 32]) }
}

async fn filled(path: &Path, format: Format, size: u64, random: usize) -> Image<UringFile> {
    let image = Image::create(&Uring::direct(), path, format, size).await.unwrap();
    for mib in 0..size >> 20 {
        image.write(mib << 20, content(1 << 20, random, mib)).await.unwrap();
    }
    image.barrier().await.unwrap();
    image
}

/// 16 KiB places of one checkpoint, as folding leaves them: sorted, each once.
fn places(image: &impl Disk, seed: u64, checkpoint: u64) -> Vec<(Extent, ())> {
    const BLOCK: u64 = 16 << 10;
    let numbers = (0..CHECKPOINT / BLOCK).map(|n| scattered(seed + checkpoint * CHECKPOINT + n, image.size() / BLOCK) * BLOCK);
    let places: std::collections::BTreeSet<u64> = numbers.collect();
    places.into_iter().map(|at| (Extent::new(at, BLOCK), ())).collect()
}

/// MB/s of reading such places and nothing else: what keeping old content cannot do without.
async fn reading(image: &impl Disk, seed: u64, bytes: u64) -> f64 {
    let started = Instant::now();
    for checkpoint in 0..bytes / CHECKPOINT {
        let reads = places(image, seed, checkpoint).into_iter().map(|(extent, ())| image.read(extent));
        let mut reads = futures_util::stream::iter(reads).buffer_unordered(DEPTH);
        while let Some(read) = reads.next().await {
            read.unwrap();
        }
    }
    bytes as f64 / started.elapsed().as_secs_f64() / 1e6
}

/// MB/s of overwrites.
async fn apply(image: &impl Disk, retention: Option<&Retention<Uring>>, seed: u64, random: usize, bytes: u64) -> f64 {
    let data = content(1 << 20, random, seed);
    let started = Instant::now();
    for checkpoint in 0..bytes / CHECKPOINT {
        let places = places(image, seed, checkpoint);
        if let Some(retention) = retention {
            retention.begin(Position::new(1, seed * 1000 + checkpoint + 1)).await.unwrap();
        }
        let write = |extent: Extent, ()| {
            let at = (extent.offset % (1 << 19)) as usize;
            image.write(extent.offset, data.slice(at..at + extent.len as usize))
        };
        let keep = async |piece: &[(Extent, ())]| match retention {
            Some(retention) => retention.preserve(image, piece.iter().map(|(extent, ())| *extent)).await.map_err(|e| panic!("{e}")),
            None => Ok(()),
        };
        overwrite(&places, DEPTH, retention.is_some().then_some(keep), write).await.unwrap();
        image.barrier().await.unwrap();
    }
    bytes as f64 / started.elapsed().as_secs_f64() / 1e6
}

fn applying(dir: &Path) {
    for (format, room, random) in [Format::Raw, Format::Vhdx].into_iter().flat_map(|f| [(f, ROOM, 2048), (f, ROOM, 4096), (f, 0, 4096)]) {
        uring::run(async {
            let path = dir.join("replica");
            let image = Image::create(&Uring::direct(), &path, format, ROOM).await.unwrap();
            let image = Recent::new(image, &Memory::new(room));
            for mib in 0..ROOM >> 20 {
                image.write(mib << 20, content(1 << 20, random, mib)).await.unwrap();
            }
            image.barrier().await.unwrap();
            for round in 0..ROUNDS as u64 {
                let undo = dir.join(format!("undo-{round}"));
                let without = apply(&image, None, 10 + round, random, 1 << 30).await;
                let retention = Retention::open(Uring::direct(), &undo, subject(), None).await.unwrap();
                let with = apply(&image, Some(&retention), 20 + round, random, 1 << 30).await;
                let read = reading(&image, 30 + round, 1 << 30).await;
                let (memory, replica) = retention.take_kept();
                println!(
                    "random 16 KiB overwrites of an allocated {} replica, content that compresses to {:.1}, a point every 64 MiB, {:.0} % of the old content in memory: {with:.0} MB/s, without points {without:.0} MB/s, costs {:.2} times as much; reading such places alone {read:.0} MB/s",
                    format.as_str(),
                    random as f64 / 4096.0,
                    100.0 * memory as f64 / (memory + replica) as f64,
                    without / with,
                );
                std::fs::remove_dir_all(&undo).unwrap();
            }
            std::fs::remove_file(&path).unwrap();
        })
        .unwrap();
    }
}

/// Median and 99th percentile in microseconds of reads of 64 KiB at random places, one at a time.
async fn reads(view: &View<Uring>, image: &Image<UringFile>, seed: u64) -> (f64, f64) {
    const LEN: u64 = 64 << 10;
    let mut times = Vec::new();
    for n in 0..2000 {
        let at = scattered(seed + n, image.size() / LEN) * LEN;
        let started = Instant::now();
        view.read(image, Extent::new(at, LEN)).await.unwrap();
        times.push(started.elapsed().as_secs_f64() * 1e6);
    }
    times.sort_by(f64::total_cmp);
    (times[times.len() / 2], times[times.len() * 99 / 100])
}

/// MB/s of the same, 16 at a time.
async fn reads_at_depth(view: &View<Uring>, image: &Image<UringFile>, seed: u64) -> f64 {
    const LEN: u64 = 64 << 10;
    let started = Instant::now();
    let reads = (0..4000).map(|n| view.read(image, Extent::new(scattered(seed + n, image.size() / LEN) * LEN, LEN)));
    futures_util::stream::iter(reads)
        .buffer_unordered(16)
        .for_each(|done| {
            done.unwrap();
            std::future::ready(())
        })
        .await;
    4000.0 * LEN as f64 / started.elapsed().as_secs_f64() / 1e6
}

/// Keeps `extents` of `len` bytes in each of 1000 intervals, then mounts the oldest.
fn mounting(dir: &Path, name: &str, len: u64, extents: u64, random: usize, disk: u64) {
    const POINTS: u64 = 1001;
    let undo = dir.join("undo");
    let made = Instant::now();
    uring::run(async {
        let image = filled(&dir.join("replica"), Format::Raw, disk, random).await;
        let retention = Retention::open(Uring::direct(), &undo, subject(), None).await.unwrap();
        for point in 1..=POINTS {
            retention.begin(Position::new(1, point)).await.unwrap();
            if point < POINTS {
                let places: std::collections::BTreeSet<u64> =
                    (0..extents).map(|n| scattered(point * 1_000_003 + n, disk / len) * len).collect();
                retention.preserve(&image, places.into_iter().map(|at| Extent::new(at, len))).await.unwrap();
            }
        }
        println!("{name}: made in {:.0} s, {:.1} GB on disk", made.elapsed().as_secs_f64(), retention.bytes() as f64 / 1e9);
    })
    .unwrap();
    for round in 0..ROUNDS as u64 {
        uring::run(async {
            let image = Image::open(&Uring::direct(), &dir.join("replica"), Format::Raw).await.unwrap();
            let retention = Retention::open(Uring::direct(), &undo, subject(), Some(Position::new(1, POINTS))).await.unwrap();
            let (oldest, newest) = (Position::new(1, 1), Position::new(1, POINTS));
            let ms = |since: Instant| since.elapsed().as_secs_f64() * 1e3;
            let started = Instant::now();
            let cold = retention.view(oldest).await.unwrap();
            let learned = ms(started);
            drop(cold);
            let started = Instant::now();
            let view = retention.view(oldest).await.unwrap();
            let opened = ms(started);
            view.read(&image, Extent::new(scattered(round, disk >> 16) << 16, 64 << 10)).await.unwrap();
            let first = ms(started);
            let now = retention.view(newest).await.unwrap();
            let (old, new) = (reads(&view, &image, round * 7919).await, reads(&now, &image, round * 104_729).await);
            let (old_deep, new_deep) = (reads_at_depth(&view, &image, round * 31).await, reads_at_depth(&now, &image, round * 37).await);
            println!(
                "{name}: the oldest of {POINTS} points opens in {opened:.3} ms (right after a start {learned:.0} ms), first read {first:.2} ms, index {:.1} MB; \
                 64 KiB reads {:.0} us (p99 {:.0}), of the newest {:.0} us (p99 {:.0}), ratio {:.2}; 16 at a time {old_deep:.0} and {new_deep:.0} MB/s, ratio {:.2}",
                retention.index_bytes() as f64 / 1e6,
                old.0,
                old.1,
                new.0,
                new.1,
                old.0 / new.0,
                new_deep / old_deep
            );
        })
        .unwrap();
    }
    std::fs::remove_dir_all(&undo).unwrap();
    std::fs::remove_file(dir.join("replica")).unwrap();
}

/// Rolls a disk of `disk` bytes back over `churn` bytes of random 64 KiB overwrites of allocated blocks, spread over 60 points, and looks
/// whether it is what it was. Nothing else of the disk is allocated.
fn rolling(dir: &Path, disk: u64, churn: u64) {
    const LEN: u64 = 64 << 10;
    const POINTS: u64 = 60;
    let (undo, path) = (dir.join("undo"), dir.join("replica"));
    uring::run(async {
        let image = Image::create(&Uring::direct(), &path, Format::Raw, disk).await.unwrap();
        let retention = Retention::open(Uring::direct(), &undo, subject(), None).await.unwrap();
        let (old, new) = (content(2 << 20, 4096, 1), content(2 << 20, 4096, 2));
        let of = |data: &Bytes, at: u64| data.slice((at / LEN % 241 * 4096) as usize..(at / LEN % 241 * 4096 + LEN) as usize);
        let churned: Vec<std::collections::BTreeSet<u64>> = (0..POINTS)
            .map(|point| (0..churn / LEN / POINTS).map(|n| scattered(point * 1_000_003 + n + 1, disk / LEN) * LEN).collect())
            .collect();
        let all: std::collections::BTreeSet<u64> = churned.iter().flatten().copied().collect();
        let put = |extent: Extent, data: Bytes| image.write(extent.offset, data);
        for part in all.iter().copied().collect::<Vec<_>>().chunks(1024) {
            let writes = part.iter().map(|&at| put(Extent::new(at, LEN), of(&old, at)));
            futures_util::stream::iter(writes).buffer_unordered(DEPTH).map(Result::unwrap).collect::<Vec<()>>().await;
        }
        image.barrier().await.unwrap();
        for (point, places) in (1..).zip(&churned) {
            retention.begin(Position::new(1, point)).await.unwrap();
            let places: Vec<(Extent, ())> = places.iter().map(|&at| (Extent::new(at, LEN), ())).collect();
            let keep = async |piece: &[(Extent, ())]| {
                retention.preserve(&image, piece.iter().map(|(extent, ())| *extent)).await.map_err(|e| panic!("{e}"))
            };
            overwrite(&places, DEPTH, Some(keep), |extent, ()| put(extent, of(&new, extent.offset))).await.unwrap();
            image.barrier().await.unwrap();
        }
        retention.begin(Position::new(1, POINTS + 1)).await.unwrap();
        let started = Instant::now();
        let bytes = bring_back(&image, &retention, Position::new(1, 1), &Progress::default()).await.unwrap();
        let seconds = started.elapsed().as_secs_f64();
        for at in all.iter().step_by(all.len() / 500 + 1) {
            assert_eq!(image.read(Extent::new(*at, LEN)).await.unwrap()[..], of(&old, *at)[..], "at {at}");
        }
        println!(
            "a disk of {} GiB with {:.2} GB of churn in {POINTS} points: rolled to the first in {seconds:.1} s, {:.2} GB written, {:.0} MB/s",
            disk >> 30,
            churn as f64 / 1e9,
            bytes as f64 / 1e9,
            bytes as f64 / seconds / 1e6
        );
    })
    .unwrap();
    std::fs::remove_dir_all(&undo).unwrap();
    std::fs::remove_file(&path).unwrap();
}

fn main() {
    let dir = tempfile::tempdir().unwrap();
    let only = std::env::var("POINTS_ONLY").unwrap_or_default();
    if only.is_empty() || only == "apply" {
        applying(dir.path());
    }
    if only.is_empty() || only == "roll" {
        // A tenth of what 20 MB/s are in an hour; then a tenth of that, then a tenth of the disk.
        for (disk, churn) in [(100 << 30, 7_200_000_000), (100 << 30, 720_000_000), (10 << 30, 720_000_000)] {
            let most: u64 = std::env::var("ROLL_BYTES").map_or(churn, |bytes| bytes.parse().unwrap());
            rolling(dir.path(), disk, churn.min(most));
        }
    }
    if only.is_empty() || only == "small" {
        mounting(dir.path(), "6.5 GiB of history that does not compress, in 64 KiB", 64 << 10, 105, 4096, 4 << 30);
    }
    if only.is_empty() || only == "64k" {
        mounting(dir.path(), "100 GiB of history in 64 KiB", 64 << 10, 1640, 256, 8 << 30);
    }
    if only.is_empty() || only == "16k" {
        mounting(dir.path(), "100 GiB of history in 16 KiB", 16 << 10, 6600, 256, 8 << 30);
    }
}
