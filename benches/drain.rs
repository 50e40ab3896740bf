//! How fast a master target drains its journal into replicas, with points and without. `benches/run drain`.
//!
//! The product's own apply thread, journal and catalogue with the default settings: sealed batches of 16 KiB overwrites at random
//! places of allocated replicas are in the journal; the clock runs until the last of them is in a checkpoint. Two disks are served
//! in turn, one of which has a point every 512 MiB (five seconds of a machine that writes 100 MB/s), and one that has none, so that
//! nothing is kept; once also with a point every 64 MiB. Only the link is left out. Batches are read back from the journal and opened, as after a break or a restart; or
//! they were opened when they arrived, and are in memory still.
//!
//! What is overwritten: places all over the disk, with memory for all of it, with the default memory (an eighth of it) and with
//! none; and a working set that fits the default memory.
#![allow(clippy::unwrap_used, clippy::disallowed_methods, missing_docs, reason = "a benchmark reads the clock")]

#[path = "support/target.rs"]
mod target;

use target::{BLOCK, DISK, Target, WITH_POINTS, WITHOUT, scattered};

const ROUNDS: u64 = 3;
/// Bytes of one measurement.
const BYTES: u64 = 1 << 30;
/// Bytes between points: five seconds, the default, of a machine that writes 100 MB/s.
const POINT_EVERY: u64 = 512 << 20;
/// The same where points come so often that checkpoints are cut in two.
const OFTEN: u64 = 64 << 20;

/// What is measured.
struct Case {
    name: &'static str,
    what: &'static str,
    /// Of `[apply]`.
    settings: &'static str,
    /// Of every 4096 bytes, how many do not compress.
    random: usize,
    /// Places are chosen among so many bytes.
    set: u64,
    point_every: u64,
}

fn cases() -> [Case; 6] {
    let case = |name, what, settings| Case { name, what, settings, random: 2048, set: DISK, point_every: POINT_EVERY };
    let all = "recent_max = \"9GiB\"";
    [
        Case { set: 384 << 20, ..case("set", "all over 384 MiB, default memory", "") },
        case("part", "all over a 4 GiB disk, default memory", ""),
        case("all", "all over a 4 GiB disk, memory for all of it", all),
        case("none", "all over a 4 GiB disk, no memory", "recent_max = \"0\""),
        Case { point_every: OFTEN, ..case("often", "all over a 4 GiB disk, memory for all of it, a point every 64 MiB", all) },
        Case { random: 4096, ..case("dense", "all over a 4 GiB disk, memory for all of it, content that does not compress", all) },
    ]
}

/// Measures on a new master target.
fn measure(format: &str, case: &Case) {
    let dir = tempfile::tempdir().unwrap();
    let mut target = Target::start(dir.path(), format, case.settings, case.random);
    target.point_every = case.point_every;
    let all: Vec<u64> = (0..DISK / BLOCK).map(|n| n * BLOCK).collect();
    for disk in [WITH_POINTS, WITHOUT] {
        target.drain(disk, &all, false);
    }
    let places = |seed: u64| (0..BYTES / BLOCK).map(|n| scattered(seed << 40 | n, case.set / BLOCK) * BLOCK).collect::<Vec<_>>();
    for (round, in_memory) in (0..2 * ROUNDS).map(|n| (n, n % 2 == 1)) {
        if case.set < DISK {
            // What the working set is is known by then, and in memory as far as it fits.
            for disk in [WITHOUT, WITH_POINTS] {
                target.drain(disk, &places(100 + round), false);
            }
        }
        let mut speeds = [0.0; 2];
        // In turn, which is first.
        for disk in if round / 2 % 2 == 0 { [WITHOUT, WITH_POINTS] } else { [WITH_POINTS, WITHOUT] } {
            speeds[disk] = target.drain(disk, &places(200 + round), in_memory);
        }
        println!(
            "{format}, {}, batches {}: {:.0} MB/s with points, {:.0} without: {:.2} times the time",
            case.what,
            if in_memory { "in memory" } else { "read back" },
            speeds[WITH_POINTS],
            speeds[WITHOUT],
            speeds[WITHOUT] / speeds[WITH_POINTS]
        );
    }
}

fn main() {
    let only = std::env::var("DRAIN_ONLY").unwrap_or_default();
    let chosen = |what: &str| only.split(',').any(|o| o == what);
    // Of formats and of cases: those that are named, or all.
    let cases = cases();
    let names = cases.each_ref().map(|case| case.name);
    let is_on = |name: &str, all: &[&str]| chosen(name) || !all.iter().any(|other| chosen(other));
    let formats = ["raw", "vhdx"];
    for format in formats.into_iter().filter(|format| is_on(format, &formats)) {
        cases.iter().filter(|case| is_on(case.name, &names)).for_each(|case| measure(format, case));
    }
}
