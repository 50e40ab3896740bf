//! Random writes into sparse images against a raw file, sequential fill against qemu-img, and opening a huge disk; each
//! round runs all of them in turn. `benches/run images`.
#![allow(clippy::unwrap_used, clippy::disallowed_methods, missing_docs, reason = "a benchmark reads the clock")]

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::StreamExt;
use tidegate::disk::{Disk, Format, Image};
use tidegate::storage::AlignedBuf;
use tidegate::storage::uring::{self, Uring};

const SIZE: u64 = 4 << 30;
const BLOCK: u64 = 16 << 10;
const DEPTH: usize = 32;
const ROUNDS: usize = 3;
const WRITES: u64 = 40_000;

/// Scattered numbers below `bound`, the same in every run.
fn scattered(n: u64, bound: u64) -> u64 {
    n.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29).wrapping_mul(0xbf58_476d_1ce4_e5b9) % bound
}

fn noise(len: usize) -> Bytes {
    let mut buf = AlignedBuf::with_capacity(len);
    buf.set_len(len);
    for (i, chunk) in buf.chunks_mut(8).enumerate() {
        chunk.copy_from_slice(&scattered(i as u64 + 1, u64::MAX).to_le_bytes()[..chunk.len()]);
    }
    buf.freeze()
}

/// MB/s of random 16 KiB writes at depth into an image half of whose 1 MiB pieces are allocated, with a barrier each second's
/// worth of writes and at the end.
fn random_writes(path: &Path, format: Format) -> f64 {
    uring::run(async {
        let image = Image::create(&Uring::direct(), path, format, SIZE).await.unwrap();
        let mib = noise(1 << 20);
        for piece in (0..SIZE >> 20).step_by(2) {
            image.write(piece << 20, mib.clone()).await.unwrap();
        }
        image.barrier().await.unwrap();
        let data = noise(BLOCK as usize);
        let started = Instant::now();
        for batch in 0..4 {
            let numbers = (batch * WRITES / 4..(batch + 1) * WRITES / 4).map(|n| scattered(n, SIZE / BLOCK) * BLOCK);
            let writes = futures_util::stream::iter(numbers.map(|at| image.write(at, data.clone())));
            writes
                .buffer_unordered(DEPTH)
                .for_each(|done| {
                    done.unwrap();
                    std::future::ready(())
                })
                .await;
            image.barrier().await.unwrap();
        }
        (WRITES * BLOCK) as f64 / started.elapsed().as_secs_f64() / 1e6
    })
    .unwrap()
}

/// MB/s of copying a raw file into a new dynamic VHDX, durably.
fn fill(source: &Path, path: &Path) -> f64 {
    uring::run(async {
        let started = Instant::now();
        let source = Image::open_read_only(&Uring::direct(), source, Format::Raw, false).await.unwrap();
        let image = Image::create(&Uring::direct(), path, Format::Vhdx, source.size()).await.unwrap();
        let steps = (0..source.size() >> 20).map(|n| {
            let (source, image) = (&source, &image);
            async move {
                let data = source.read(tidegate::model::Extent::new(n << 20, 1 << 20)).await.unwrap();
                image.write(n << 20, data.freeze()).await.unwrap();
            }
        });
        futures_util::stream::iter(steps).buffer_unordered(8).for_each(std::future::ready).await;
        image.finish().await.unwrap();
        source.size() as f64 / started.elapsed().as_secs_f64() / 1e6
    })
    .unwrap()
}

fn qemu_fill(source: &Path, path: &Path) -> f64 {
    let started = Instant::now();
    let status = Command::new("qemu-img")
        .args(["convert", "-f", "raw", "-O", "vhdx", "-o", "subformat=dynamic", "-T", "none", "-t", "none", "-W"])
        .args([source, path])
        .status()
        .unwrap();
    assert!(status.success());
    std::fs::File::open(path).unwrap().sync_all().unwrap();
    std::fs::metadata(source).unwrap().len() as f64 / started.elapsed().as_secs_f64() / 1e6
}

fn open_huge(path: &Path) -> (Duration, u64) {
    let _ = std::fs::remove_file(path);
    uring::run(async {
        let image = Image::create(&Uring::direct(), path, Format::Vhdx, 64 << 40).await.unwrap();
        for n in 0..1000 {
            image.write(n << 36, noise(4096)).await.unwrap();
        }
        image.finish().await.unwrap();
    })
    .unwrap();
    let before = resident();
    uring::run(async {
        let started = Instant::now();
        let image = Image::open_read_only(&Uring::direct(), path, Format::Vhdx, false).await.unwrap();
        let took = started.elapsed();
        let memory = resident().saturating_sub(before);
        assert_eq!(image.size(), 64 << 40);
        (took, memory)
    })
    .unwrap()
}

/// Resident memory of this process in bytes.
fn resident() -> u64 {
    let text = std::fs::read_to_string("/proc/self/statm").unwrap();
    text.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * 4096
}

fn main() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    for _ in 0..ROUNDS {
        let mut speeds = Vec::new();
        for format in [Format::Raw, Format::Vhdx, Format::Vmdk] {
            let _ = std::fs::remove_file(&path);
            speeds.push(random_writes(&path, format));
        }
        println!(
            "random 16 KiB writes at depth 32, half allocated: raw {:.0} MB/s, vhdx {:.0} ({:.2}), vmdk {:.0} ({:.2})",
            speeds[0],
            speeds[1],
            speeds[1] / speeds[0],
            speeds[2],
            speeds[2] / speeds[0]
        );
    }
    let source = dir.path().join("source.raw");
    std::fs::File::create(&source).unwrap().set_len(2 << 30).unwrap();
    uring::run(async {
        let image = Image::open(&Uring::direct(), &source, Format::Raw).await.unwrap();
        for n in 0..2 << 10 {
            image.write(n << 20, noise(1 << 20)).await.unwrap();
        }
        image.barrier().await.unwrap();
    })
    .unwrap();
    for _ in 0..ROUNDS {
        let _ = std::fs::remove_file(&path);
        let ours = fill(&source, &path);
        let _ = std::fs::remove_file(&path);
        let qemu = qemu_fill(&source, &path);
        println!(
            "sequential fill of a dynamic VHDX with 2 GiB: {ours:.0} MB/s, qemu-img convert -t none -W {qemu:.0} MB/s, ratio {:.2}",
            ours / qemu
        );
    }
    let (took, memory) = open_huge(&path);
    println!("opening a dynamic VHDX of 64 TiB with 1000 blocks: {:.1} ms, {} KiB of memory", took.as_secs_f64() * 1e3, memory >> 10);
}
