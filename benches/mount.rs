//! How soon the oldest of a thousand points is mounted, and what reads through it take against the newest, as a client over NBD has
//! them. `benches/run mount`.
//!
//! The product's own master target but for the link: 13 GB of random 16 KiB overwrites of a 4 GiB disk, content that compresses to a
//! half, a point every 13.5 MiB. Both points are mounted at once, read-only, and read in turn.
#![allow(clippy::unwrap_used, clippy::disallowed_methods, missing_docs, reason = "a benchmark reads the clock")]

#[path = "support/target.rs"]
mod target;

use std::path::Path;
use std::time::Instant;

use target::{BATCH_BLOCKS, BLOCK, DISK, Target, WITH_POINTS, scattered};
use tidegate::master_target::recover::{self, Command, Recoveries, Scratch};
use tidegate::model::{Address, Extent, PointId};
use tidegate::nbd::client::Client;
use tidegate::storage::uring;
use tokio::sync::{mpsc, oneshot};

const ROUNDS: u64 = 3;
const POINTS: u64 = 1001;
/// Batches between two points.
const POINT_BATCHES: u64 = 54;
/// Points that are made at once: their batches fit the journal.
const POINTS_AT_ONCE: u64 = 70;
/// Clients at once where there are several.
const CLIENTS: u64 = 16;
/// Reads of one measurement.
const READS: u64 = 2000;

/// Mounts a point; milliseconds until a client can connect.
async fn mount(commands: &mpsc::Sender<Command>, target: &Target, point: PointId, address: &Address) -> f64 {
    let started = Instant::now();
    let (done, answer) = oneshot::channel();
    let disk = &target.disks[WITH_POINTS].shared;
    let target = recover::Target::Nbd { address: address.clone(), writable: false };
    let start = Command::Start { point, disk: disk.id, label: disk.label.clone(), target, done };
    commands.send(start).await.unwrap_or_else(|_| panic!("the recover thread runs"));
    answer.await.unwrap().unwrap();
    started.elapsed().as_secs_f64() * 1e3
}

/// Median and 99th percentile in microseconds of reads of `len` bytes at random places, one at a time.
async fn reads(address: &Address, len: u64, seed: u64) -> (f64, f64) {
    let mut client = Client::connect(address, "").await.unwrap();
    let mut times = Vec::new();
    for n in 0..READS {
        let started = Instant::now();
        client.read(Extent::new(scattered(seed + n, DISK / len) * len, len)).await.unwrap();
        times.push(started.elapsed().as_secs_f64() * 1e6);
    }
    times.sort_by(f64::total_cmp);
    (times[times.len() / 2], times[times.len() * 99 / 100])
}

/// MB/s of the same by several clients at once.
async fn reads_of_many(address: &Address, len: u64, seed: u64) -> f64 {
    let started = Instant::now();
    futures_util::future::join_all((0..CLIENTS).map(|client| reads(address, len, seed + client * READS))).await;
    (CLIENTS * READS * len) as f64 / started.elapsed().as_secs_f64() / 1e6
}

async fn measure(target: &Target, dir: &Path, commands: mpsc::Sender<Command>) {
    let listed: Vec<PointId> = {
        let book = target.shared.book();
        let mut points: Vec<_> = book.listed().map(|point| (point.wall_ms, point.id)).collect();
        points.sort_unstable();
        points.into_iter().map(|(_, id)| id).collect()
    };
    println!(
        "{} points listed, {:.1} GB of old content on disk",
        listed.len(),
        target.disks[WITH_POINTS].shared.condition().retained_bytes as f64 / 1e9
    );
    let at = |name: &str| Address::Unix(dir.join(name));
    let (old, new) = (at("oldest.sock"), at("newest.sock"));
    println!(
        "mounted over NBD: the oldest in {:.1} ms, the newest in {:.1} ms",
        mount(&commands, target, listed[0], &old).await,
        mount(&commands, target, *listed.last().unwrap(), &new).await
    );
    for round in 0..ROUNDS {
        for len in [BLOCK, 4 * BLOCK] {
            let seed = round * 104_729;
            let (a, b) = (reads(&old, len, seed).await, reads(&new, len, seed + 7919).await);
            println!(
                "reads of {} KiB through NBD, one at a time: the oldest {:.0} us (p99 {:.0}), the newest {:.0} us (p99 {:.0}), ratio {:.2}",
                len >> 10,
                a.0,
                a.1,
                b.0,
                b.1,
                a.0 / b.0
            );
            let (a, b) = (reads_of_many(&old, len, seed).await, reads_of_many(&new, len, seed + 7919).await);
            println!("    by {CLIENTS} clients at once: the oldest {a:.0} MB/s, the newest {b:.0}, ratio {:.2}", b / a);
        }
    }
}

fn main() {
    let dir = tempfile::tempdir().unwrap();
    let mut target = Target::start(dir.path(), "raw", "", 2048);
    let all: Vec<u64> = (0..DISK / BLOCK).map(|n| n * BLOCK).collect();
    for part in all.chunks((DISK / BLOCK / 4) as usize) {
        target.drain(WITH_POINTS, part, false);
    }
    target.point_every = POINT_BATCHES * BATCH_BLOCKS * BLOCK;
    let mut made = 0;
    while made < POINTS {
        let count = POINTS_AT_ONCE.min(POINTS - made);
        let places = |n| scattered(made << 32 | n, DISK / BLOCK) * BLOCK;
        target.drain(WITH_POINTS, &(0..count * POINT_BATCHES * BATCH_BLOCKS).map(places).collect::<Vec<_>>(), false);
        made += count;
    }
    let (commands, asked) = mpsc::channel(16);
    let scratch = Scratch { dir: dir.path().join("scratch"), max: 1 << 30 };
    let apply = target.commands.clone();
    std::thread::spawn(move || uring::run(recover::run(asked, apply, Recoveries::default(), scratch)).unwrap());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(measure(&target, dir.path(), commands));
}
