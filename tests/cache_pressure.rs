//! A gateway that fills: who takes most waits first, the others do not notice, and a full file system damages nothing.
#![allow(clippy::unwrap_used, clippy::disallowed_methods, reason = "tests may unwrap, and wait by the clock")]

mod support;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use support::known::Known;
use support::mounted::let_go;
use support::writer::Writer;
use support::{Cluster, Options, s, tool};

const SIZE: u64 = 64 << 20;

/// Sequences of a disk that are captured and not at `rung`.
fn behind(cluster: &Cluster, disk: usize, rung: usize) -> u64 {
    let positions = cluster.agent_disk(disk)["positions"].clone();
    let at = |rung: usize| positions[rung][1].as_str().and_then(|p| p.split_once(':')?.1.parse::<u64>().ok()).unwrap_or(0);
    at(0).saturating_sub(at(rung))
}

fn level(cluster: &Cluster) -> f64 {
    cluster.metric("process-server", "tidegate_cache_level")
}

fn cached(cluster: &Cluster, disk: usize) -> f64 {
    cluster.metric("process-server", &format!("tidegate_cache_bytes{{disk=\"m1/d{disk}\"}}"))
}

#[test]
fn one_that_takes_too_much_waits_and_the_others_do_not_notice() {
    let cache = "[cache]\nsegment = \"4MiB\"\nsize_max = \"256MiB\"\ndisk_share_percent = 95\n".to_owned();
    let mut cluster = Cluster::start(Options {
        disk_bytes: SIZE,
        disks: 3,
        cache: "writeback",
        format: "raw",
        process_server: cache,
        interval: "1h",
        ..Options::default()
    });
    cluster.wait_for_delta();
    let before = cluster.metric("agent", "tidegate_resynchronisations_total");
    cluster.kill("master-target");
    let noisy = Writer::start(cluster.nbd(0), SIZE, 2, 60 << 20, 41);
    let quiet: Vec<Writer> = (1..3).map(|n| Writer::start(cluster.nbd(n), SIZE, 1, 200 << 10, 41 + n as u64)).collect();
    cluster.wait("the cache is throttled", Duration::from_secs(60), || level(&cluster) >= 3.0);
    assert!(cluster.metric("process-server", "tidegate_cache_held_disks") >= 1.0);
    let held = cluster.json("process-server", &["status"])[0]["machines"][0]["disks"][0].clone();
    // The others have all that they want, second after second.
    let (started, mut worst) = (Instant::now(), 0);
    while started.elapsed() < Duration::from_secs(8) {
        worst = worst.max(behind(&cluster, 1, 2)).max(behind(&cluster, 2, 2));
        std::thread::sleep(Duration::from_millis(200));
    }
    let (big, small) = (cached(&cluster, 0), cached(&cluster, 1));
    assert!(worst < 200, "a quiet disk is {worst} changes behind");
    assert!(behind(&cluster, 0, 2) > 100, "the noisy one waits");
    assert!(level(&cluster) < 4.0, "the cache is not full");
    let figures = noisy.stop();
    assert!(figures.longest < Duration::from_secs(1), "its application does not wait: {figures:?}");
    for writer in quiet {
        writer.stop();
    }
    cluster.start_role("master-target");
    cluster.wait_for_delta();
    cluster.mark("end");
    for disk in 0..3 {
        assert!(support::same_bytes(&cluster.disk(disk), &cluster.replica(disk)), "disk {disk}");
    }
    assert_eq!(cluster.metric("agent", "tidegate_resynchronisations_total"), before, "what waited kept its order");
    cluster.wait("the cache is in order again", Duration::from_secs(20), || level(&cluster) == 0.0);
    eprintln!(
        "noisy disk: {} MB written, held at {:.0} MB of a cache of 268 MB ({}); quiet disks at most {worst} changes behind, {:.1} MB cached; 0 resynchronisations",
        figures.bytes / 1_000_000,
        big / 1e6,
        held["reason"].as_str().unwrap_or("-"),
        small / 1e6
    );
}

#[test]
fn under_a_noisy_neighbour_the_recovery_points_of_others_stay_young() {
    let mut cluster =
        Cluster::start(Options { disk_bytes: SIZE, disks: 2, cache: "writeback", format: "raw", interval: "1h", ..Options::default() });
    cluster.wait_for_delta();
    let quiet = Writer::start(cluster.nbd(1), SIZE, 1, 500 << 10, 51);
    let lag = |cluster: &Cluster| cluster.metric("agent", "tidegate_source_lag_seconds{disk=\"m1/d1\"}");
    let measure = |cluster: &Cluster| {
        let mut lags: Vec<f64> = (0..30)
            .map(|_| {
                std::thread::sleep(Duration::from_millis(200));
                lag(cluster)
            })
            .collect();
        lags.sort_by(f64::total_cmp);
        lags[lags.len() / 2]
    };
    let alone = measure(&cluster);
    let noisy = Writer::start(cluster.nbd(0), SIZE, 2, 0, 52);
    let beside = measure(&cluster);
    let written = noisy.stop();
    quiet.stop();
    // The noisy disk has a backlog of its own; the quiet one's changes do not queue behind it.
    assert!(beside < alone + 2.0, "alone {alone:.2} s, beside {beside:.2} s");
    cluster.wait_for_delta();
    eprintln!(
        "a quiet disk is safe after {alone:.2} s alone and {beside:.2} s beside one that writes {} MB in 6 s (median)",
        written.bytes / 1_000_000
    );
}

/// A small file system of its own, given back with the test.
struct Small(PathBuf);

impl Small {
    fn new(dir: &Path, bytes: u64) -> Self {
        let (image, point) = (dir.join("small.img"), dir.join("small"));
        std::fs::File::create(&image).unwrap().set_len(bytes).unwrap();
        tool("mkfs.ext4", &["-q", "-F", "-m", "0", s(&image)]);
        std::fs::create_dir(&point).unwrap();
        tool("mount", &["-o", "loop", s(&image), s(&point)]);
        Self(point)
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let_go(&self.0);
    }
}

#[test]
fn a_full_file_system_damages_nothing_and_empties_by_itself() {
    let dir = tempfile::tempdir().unwrap();
    let small = Small::new(dir.path(), 160 << 20);
    let cache = "[cache]\nsegment = \"4MiB\"\nsize_max = \"1GiB\"\nreserve = \"8MiB\"\n".to_owned();
    let mut cluster = Cluster::start(Options {
        disk_bytes: SIZE,
        cache: "writeback",
        format: "raw",
        interval: "1h",
        process_server: cache,
        gateway_state: Some(small.0.join("state")),
        ..Options::default()
    });
    cluster.wait_for_delta();
    let before = cluster.metric("agent", "tidegate_resynchronisations_total");
    cluster.kill("master-target");
    let writer = Writer::start(cluster.nbd(0), SIZE, 2, 40 << 20, 61);
    let mut known = Known::default();
    for n in 0..3 {
        std::thread::sleep(Duration::from_millis(700));
        known.mark(&cluster, &writer, &format!("filling-{n}"));
    }
    // Somebody else takes the rest of the file system.
    cluster.wait("the cache has most of it", Duration::from_secs(60), || cached(&cluster, 0) > 50e6);
    let hog = support::try_tool("dd", &["if=/dev/zero", &format!("of={}", s(&small.0.join("hog"))), "bs=1M", "status=none"]);
    assert!(!hog.status.success(), "it ends because there is no space");
    std::thread::sleep(Duration::from_secs(2));
    known.mark(&cluster, &writer, "full");
    let held = cached(&cluster, 0);
    // It starts on a full file system, too.
    cluster.kill("process-server");
    cluster.start_role("process-server");
    let written = writer.stop();
    cluster.start_role("master-target");
    cluster.wait("it empties", Duration::from_secs(90), || behind(&cluster, 0, 3) == 0);
    std::fs::remove_file(small.0.join("hog")).unwrap();
    cluster.wait_for_delta();
    let points = known.check(&cluster);
    assert_eq!(cluster.metric("agent", "tidegate_resynchronisations_total"), before);
    assert!(support::same_bytes(&cluster.disk(0), &cluster.replica(0)));
    assert!(written.longest < Duration::from_secs(1), "{written:?}");
    eprintln!("a file system of 160 MB full with {:.0} MB cached, restarted so: {points} points exact, 0 resynchronisations", held / 1e6);
    drop(cluster);
    drop(small);
}
