//! How soon the oldest of a thousand points can be read, and how long rolling to one takes. `benches/run points`. What points cost
//! while they are made: `benches/run drain`.
//!
//! Mounting: 1000 intervals of real sealed records, kept from a real replica. Of the large histories the content compresses
//! about 14:1, so that they fit the disk; the number of index entries is that of 100 GiB. Their long runs of zeroes unpack slowly:
//! beside them smaller ones whose content compresses to a half, or not at all.
#![allow(clippy::unwrap_used, clippy::disallowed_methods, missing_docs, reason = "a benchmark reads the clock")]

use std::path::Path;
use std::time::Instant;

use bytes::Bytes;
use futures_util::StreamExt;
use tidegate::config::limits::APPLY_DEPTH as DEPTH;
use tidegate::crypto::keyring::DataKey;
use tidegate::disk::{Disk, Format, Image};
use tidegate::master_target::apply::overwrite::overwrite;
use tidegate::master_target::apply::roll::{Progress, bring_back};
use tidegate::master_target::retain::{Retention, Subject, View};
use tidegate::model::{DiskId, Extent, Position};
use tidegate::storage::AlignedBuf;
use tidegate::storage::uring::{self, Uring, UringFile};

const ROUNDS: usize = 3;

/// Scattered numbers below `bound`, the same in every run.
fn scattered(n: u64, bound: u64) -> u64 {
    n.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29).wrapping_mul(0xbf58_476d_1ce4_e5b9).rotate_left(31) % bound
}

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

/// Median and 99th percentile in microseconds of reads of `len` bytes at random places, one at a time.
async fn reads(view: &View<Uring>, image: &Image<UringFile>, len: u64, seed: u64) -> (f64, f64) {
    let mut times = Vec::new();
    for n in 0..2000 {
        let at = scattered(seed + n, image.size() / len) * len;
        let started = Instant::now();
        view.read(image, Extent::new(at, len)).await.unwrap();
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
            let (old_deep, new_deep) = (reads_at_depth(&view, &image, round * 31).await, reads_at_depth(&now, &image, round * 37).await);
            println!(
                "{name}: the oldest of {POINTS} points opens in {opened:.3} ms (right after a start {learned:.0} ms), first read {first:.2} ms, index {:.1} MB; \
                 reads of 64 KiB, 16 at a time: {old_deep:.0} MB/s, of the newest {new_deep:.0}, ratio {:.2}",
                retention.index_bytes() as f64 / 1e6,
                new_deep / old_deep
            );
            // Of as much as was overwritten at once, and of several such pieces.
            for read in std::collections::BTreeSet::from([len, 64 << 10]) {
                let old = reads(&view, &image, read, round * 7919).await;
                let new = reads(&now, &image, read, round * 104_729).await;
                println!(
                    "    reads of {} KiB, one at a time: {:.0} us (p99 {:.0}), of the newest {:.0} us (p99 {:.0}), ratio {:.2}",
                    read >> 10,
                    old.0,
                    old.1,
                    new.0,
                    new.1,
                    old.0 / new.0
                );
            }
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
    if only.is_empty() || only == "half" {
        mounting(dir.path(), "13 GiB of history that compresses to a half, in 16 KiB", 16 << 10, 850, 2048, 4 << 30);
    }
    if only.is_empty() || only == "64k" {
        mounting(dir.path(), "100 GiB of history in 64 KiB", 64 << 10, 1640, 256, 8 << 30);
    }
    if only.is_empty() || only == "16k" {
        mounting(dir.path(), "100 GiB of history in 16 KiB", 16 << 10, 6600, 256, 8 << 30);
    }
}
