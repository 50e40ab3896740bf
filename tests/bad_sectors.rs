//! Sectors that are not given back, and a disk that hangs, under running servers: replica, retention, journal and cache on a
//! real file system whose device answers EIO where it is told to.
#![allow(clippy::unwrap_used, clippy::disallowed_methods, reason = "tests may unwrap, and wait by the clock")]

mod support;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use support::bad_disk::BadDisk;
use support::known::Known;
use support::writer::Writer;
use support::{Cluster, Options, Rng};

const SIZE: u64 = 32 << 20;

fn options() -> Options {
    Options {
        disk_bytes: SIZE,
        format: "raw",
        interval: "1h",
        cache: "writeback",
        agent: "[scrub]\nrate = \"0MiB/s\"\n".to_owned(),
        ..Options::default()
    }
}

fn resynchronisations(cluster: &Cluster) -> f64 {
    cluster.metric("agent", "tidegate_resynchronisations_total")
}

fn unusable(cluster: &Cluster) -> Vec<String> {
    let listed = cluster.json("master-target", &["point", "list", "--bad"]);
    let mut labels: Vec<String> = listed.as_array().unwrap().iter().filter_map(|p| p["label"].as_str().map(str::to_owned)).collect();
    labels.sort();
    labels
}

fn wait_until_same(cluster: &Cluster) {
    cluster.wait("the replica is its source again", Duration::from_secs(60), || {
        same_bytes_or_not_readable(&cluster.disk(0), &cluster.replica(0))
    });
}

/// A comparison that takes an unreadable sector for a difference.
fn same_bytes_or_not_readable(a: &Path, b: &Path) -> bool {
    matches!((std::fs::read(a), std::fs::read(b)), (Ok(a), Ok(b)) if a == b)
}

fn segment(dir: &Path, number: u32) -> PathBuf {
    dir.join(format!("segment-{number:010}.tgl"))
}

/// The disk itself: what this suite stands on.
#[test]
fn a_spoilt_page_gives_eio_until_it_is_written() {
    let disk = BadDisk::start(64 << 20);
    let path = disk.point().join("file");
    let written: Vec<u8> = (0..16 * 4096_u32).map(|n| (n / 4096) as u8 + 1).collect();
    std::fs::write(&path, &written).unwrap();
    disk.spoil(&path, 5 * 4096 + 7, 4096);
    let read = |page: u32| {
        let out = Command::new("dd")
            .args([&format!("if={}", support::s(&path)), "bs=4096", "count=1", &format!("skip={page}"), "iflag=direct", "status=none"])
            .output()
            .unwrap();
        (out.status.success(), out.stdout.first().copied())
    };
    let pages: Vec<_> = (4..8).map(read).collect();
    assert_eq!(pages, [(true, Some(5)), (false, None), (false, None), (true, Some(8))]);
    support::tool(
        "dd",
        &[
            "if=/dev/zero",
            &format!("of={}", support::s(&path)),
            "bs=4096",
            "count=1",
            "seek=5",
            "oflag=direct",
            "conv=notrunc",
            "status=none",
        ],
    );
    assert_eq!((read(5), read(6).0), ((true, Some(0)), false));
    assert_eq!(disk.bad_pages(), 1);
}

/// What a comparison cannot read is a difference, which is healed; what an overwrite cannot read first costs the points that
/// need it, and stops nothing.
#[test]
fn unreadable_sectors_of_a_replica_are_healed_and_stop_nothing() {
    let disk = BadDisk::start(400 << 20);
    // Nothing in memory: all old content is read from the replica.
    let target = "[apply]\nrecent_max = \"0\"\n".to_owned();
    let mut cluster =
        Cluster::start(Options { target_state: Some(disk.point().join("master-target")), master_target: target, ..options() });
    cluster.wait_for_delta();
    let mut known = Known::default();
    cluster.write(0, 8 << 20, 1, 1 << 20);
    known.mark_at_rest(&cluster, "first");
    cluster.write(0, 20 << 20, 2, 1 << 20);
    known.mark_at_rest(&cluster, "second");
    known.check(&cluster);
    // A comparison meets it.
    disk.spoil(&cluster.replica(0), (8 << 20) + 70_000, 100);
    let control = cluster.control("agent");
    let found = cluster.try_tidegate(&["disk", "verify", "m1/d0", "--json", "--control", &control]);
    assert_eq!(found.status.code(), Some(1), "{}", String::from_utf8_lossy(&found.stdout));
    let view: serde_json::Value = serde_json::from_slice(&found.stdout).unwrap();
    assert_eq!(view["differing_bytes"].as_u64(), Some(64 << 10), "{view}");
    wait_until_same(&cluster);
    assert_eq!(disk.bad_pages(), 0, "it was written again");
    cluster.wait("the points that have it are off the list", Duration::from_secs(20), || unusable(&cluster) == ["first", "second"]);
    // An overwrite meets it: the old content is gone, for the points that need it.
    known.0.clear();
    known.mark_at_rest(&cluster, "third");
    cluster.write(0, 24 << 20, 3, 1 << 20);
    known.mark_at_rest(&cluster, "fourth");
    known.check(&cluster);
    disk.spoil(&cluster.replica(0), (20 << 20) + 5, 3 * 4096);
    cluster.write(0, 20 << 20, 4, 256 << 10);
    cluster.wait_for_delta();
    known.0.clear();
    known.mark_at_rest(&cluster, "after");
    assert_eq!(known.check(&cluster), 1);
    wait_until_same(&cluster);
    assert_eq!(unusable(&cluster), ["first", "fourth", "second", "third"]);
    // That is known after a crash, too.
    cluster.kill("master-target");
    cluster.start_role("master-target");
    cluster.wait_for_delta();
    known.check(&cluster);
    assert_eq!(unusable(&cluster), ["first", "fourth", "second", "third"]);
    eprintln!("{} reads of a replica refused: healed, 4 points unlisted, replication went on, the next point is exact", disk.refused());
}

/// Records of old content that are not given back: no point is made of them, and those that do not need them are exact.
#[test]
fn unreadable_sectors_of_the_retention_journal_spare_the_points_that_do_not_need_them() {
    let disk = BadDisk::start(400 << 20);
    let mut cluster = Cluster::start(Options { target_state: Some(disk.point().join("master-target")), ..options() });
    cluster.wait_for_delta();
    cluster.write(0, 8 << 20, 1, 1 << 20);
    let mut known = Known::default();
    known.mark_at_rest(&cluster, "needs-it");
    cluster.write(0, 8 << 20, 2, 1 << 20);
    known.mark_at_rest(&cluster, "does-not");
    cluster.write(0, 9 << 20, 3, 1 << 20);
    known.mark_at_rest(&cluster, "newest");
    known.check(&cluster);
    let undo = |cluster: &Cluster| -> Vec<PathBuf> {
        let mut found = Vec::new();
        let mut dirs = vec![disk.point().join("master-target")];
        while let Some(dir) = dirs.pop() {
            for path in std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()) {
                if path.is_dir() {
                    dirs.push(path);
                } else if path.extension().is_some_and(|e| e == "tgu") {
                    found.push(path);
                }
            }
        }
        found.sort();
        assert!(!found.is_empty(), "{}", cluster.log("master-target"));
        found
    };
    // The interval of the first point that was marked: its records follow the first page.
    let files = undo(&cluster);
    let needed = &files[files.len() - 2];
    disk.spoil(needed, 4096 + 200, 100);
    let control = cluster.control("master-target");
    let out = cluster.path("no.raw");
    let refused =
        cluster.try_tidegate(&["recover", "export", &known.0[0].0, "--disk", "d0", "--output", support::s(&out), "--control", &control]);
    assert!(
        !refused.status.success(),
        "an image was made of what cannot be read: {} refused, {needed:?}, {files:?} {}",
        disk.refused(),
        support::tool("filefrag", &["-v", support::s(needed)])
    );
    known.0.remove(0);
    assert_eq!(known.check(&cluster), 2);
    cluster.write(0, 0, 4, 1 << 20);
    known.mark_at_rest(&cluster, "after");
    cluster.kill("master-target");
    cluster.start_role("master-target");
    assert_eq!(known.check(&cluster), 3);
    eprintln!("{} reads of old content refused: no image of the point that needs it, 3 points exact", disk.refused());
}

/// While it runs, and when it starts: a batch that cannot be read is one that is not there, and the replica is made whole.
#[test]
fn unreadable_sectors_of_the_journal_are_sent_again() {
    let disk = BadDisk::start(700 << 20);
    let slow = "[apply]\ncheckpoint_interval = \"60s\"\ncheckpoint_bytes = \"1GiB\"\nmemory_max = \"16MiB\"\n[journal]\nsegment = \"4MiB\"\nsize_max = \"256MiB\"\n".to_owned();
    let state = disk.point().join("master-target");
    let mut cluster = Cluster::start(Options { master_target: slow, target_state: Some(state.clone()), ..options() });
    cluster.wait_for_delta();
    let writer = Writer::start(cluster.nbd(0), SIZE, 2, 40 << 20, 41);
    std::thread::sleep(Duration::from_secs(3));
    writer.stop();
    cluster.wait_for_delta();
    // What is not in memory any more is in the journal only.
    for number in [6, 9] {
        disk.spoil(&segment(&state.join("journal"), number), 4096 + 300_000, 1);
    }
    cluster.mark_unlisted("behind");
    let sent_again = |cluster: &Cluster, times: usize| {
        cluster.wait("the agent sends again", Duration::from_secs(60), || {
            cluster.log("agent").matches("is not held any more").count() >= times
        });
    };
    sent_again(&cluster, 1);
    cluster.wait_for_delta();
    let mut known = Known::default();
    known.mark_at_rest(&cluster, "after");
    known.check(&cluster);
    wait_until_same(&cluster);
    let writer = Writer::start(cluster.nbd(0), SIZE, 2, 30 << 20, 42);
    std::thread::sleep(Duration::from_secs(2));
    writer.stop();
    cluster.wait_for_delta();
    cluster.kill("master-target");
    let files = std::fs::read_dir(state.join("journal")).unwrap().map(|e| e.unwrap());
    let newest = files.max_by_key(|e| e.metadata().unwrap().modified().unwrap()).unwrap().path();
    disk.spoil(&newest, 4096 + 100_000, 1);
    let refused = disk.refused();
    cluster.start_role("master-target");
    assert!(disk.refused() > refused, "the sector was met");
    sent_again(&cluster, 2);
    cluster.wait_for_delta();
    known.mark_at_rest(&cluster, "after-restart");
    known.check(&cluster);
    wait_until_same(&cluster);
    eprintln!(
        "{} reads of the journal refused, while it ran and at a start: the replica is its source again, 2 points exact",
        disk.refused()
    );
}

/// All of the journal is gone, often in the middle of a checkpoint: the replica goes back to its last point, and whatever is listed
/// is exact.
#[test]
fn without_its_journal_a_replica_goes_back_to_its_last_point() {
    let target = "[apply]\ncheckpoint_interval = \"1s\"\n".to_owned();
    let mut cluster = Cluster::start(Options { master_target: target, interval: "1s", ..options() });
    cluster.wait_for_delta();
    let writer = Writer::start(cluster.nbd(0), SIZE, 2, 6 << 20, 43);
    let (mut known, mut rng, mut back, mut losses) = (Known::default(), Rng::new(7), 0, 0);
    // Whether a kill comes in the middle of a checkpoint is chance; `storage_faults` brings that about as often as it takes.
    while back < 1 && losses < 8 {
        losses += 1;
        known.mark(&cluster, &writer, &format!("before-{losses}"));
        known.check(&cluster);
        std::thread::sleep(Duration::from_millis(100 + rng.below(900)));
        // Markers close to each other: a checkpoint has some in its middle.
        for n in 0..4 {
            let label = format!("close-{losses}-{n}");
            cluster.try_tidegate(&["point", "mark", "--machine", "m1", "--label", &label, "--control", &cluster.control("agent")]);
            std::thread::sleep(Duration::from_millis(rng.below(30)));
        }
        cluster.kill("master-target");
        let opened = cluster.log("master-target").matches("process server forwards this disk").count();
        std::fs::remove_dir_all(cluster.path("master-target/journal")).unwrap();
        cluster.start_role("master-target");
        back = cluster.log("master-target").matches("is at its last point again").count();
        // The newest ones, which are nearest to what was lost.
        let skip = known.0.len().saturating_sub(2);
        known.0.drain(..skip);
        known.check(&cluster);
        // A point before that may be of a stream that is over.
        cluster.wait("the stream is open again", Duration::from_secs(60), || {
            cluster.log("master-target").matches("process server forwards this disk").count() > opened
        });
        std::thread::sleep(Duration::from_secs(1));
        let mark = ["point", "mark", "--machine", "m1", "--control", &cluster.control("agent")];
        cluster.wait("points go on", Duration::from_secs(90), || cluster.try_tidegate(&mark).status.success());
    }
    writer.stop();
    cluster.wait_for_delta();
    known.mark_at_rest(&cluster, "after");
    let points = known.check(&cluster);
    wait_until_same(&cluster);
    eprintln!("{losses} journals lost, {back} of them in the middle of a checkpoint: {points} points exact, the replica is its source");
}

/// The same of a cache: its agent holds what it held.
#[test]
fn unreadable_sectors_of_a_cache_cost_no_resynchronisation() {
    let disk = BadDisk::start(400 << 20);
    let small = "[cache]\nsegment = \"4MiB\"\nsize_max = \"128MiB\"\nmemory_max = \"64KiB\"\nreserve = \"1MiB\"\n".to_owned();
    let state = disk.point().join("process-server");
    let mut cluster = Cluster::start(Options { process_server: small, gateway_state: Some(state.clone()), ..options() });
    cluster.wait_for_delta();
    let before = resynchronisations(&cluster);
    let mut known = Known::default();
    let mut round = |cluster: &mut Cluster, seed: u64, restart: bool| {
        cluster.kill("master-target");
        let writer = Writer::start(cluster.nbd(0), SIZE, 2, 16 << 20, seed);
        for n in 0..3 {
            std::thread::sleep(Duration::from_millis(400));
            known.mark(cluster, &writer, &format!("cached-{seed}-{n}"));
        }
        writer.stop();
        cluster.wait("everything is cached", Duration::from_secs(20), || {
            let positions = cluster.agent_disk(0)["positions"].clone();
            positions[0][1] == positions[2][1]
        });
        if restart {
            cluster.kill("process-server");
        }
        for number in 1..=2 {
            disk.spoil(&segment(&state.join("cache"), number), 4096 + 200_000, 1);
        }
        if restart {
            // The header and the first record of one: the others say what it is.
            disk.spoil(&segment(&state.join("cache"), 3), 0, 2 * 4096);
            cluster.start_role("process-server");
        }
        cluster.start_role("master-target");
        cluster.wait_for_delta();
    };
    round(&mut cluster, 51, false);
    round(&mut cluster, 52, true);
    let points = known.check(&cluster);
    wait_until_same(&cluster);
    assert!(cluster.log("process-server").contains("some of a segment cannot be read"), "{}", cluster.log("process-server"));
    assert_eq!(resynchronisations(&cluster), before, "the agent has it still");
    eprintln!("{} reads of a cache refused, while it ran and at a start: {points} points exact, 0 resynchronisations", disk.refused());
}

/// Nothing fails, nothing answers: the machine writes on, and its agent goes elsewhere.
#[test]
fn an_agent_leaves_a_process_server_whose_disk_hangs() {
    let disk = BadDisk::start(300 << 20);
    let small = "[cache]\nsegment = \"4MiB\"\nsize_max = \"128MiB\"\nreserve = \"1MiB\"\n".to_owned();
    let state = Some(disk.point().join("process-server"));
    let mut cluster = Cluster::start(Options { process_server: small, gateway_state: state, gateways: 2, ..options() });
    cluster.wait_for_delta();
    let writer = Writer::start(cluster.nbd(0), SIZE, 2, 2 << 20, 61);
    let mut known = Known::default();
    known.mark(&cluster, &writer, "before");
    let gateway = |cluster: &Cluster| cluster.json("agent", &["status"])[0]["gateway"].as_str().unwrap_or_default().to_owned();
    assert_eq!(gateway(&cluster), "gw1");
    disk.hang(true);
    let began = Instant::now();
    known.mark(&cluster, &writer, "while-it-hangs");
    cluster.wait("the agent is elsewhere", Duration::from_secs(120), || gateway(&cluster) == "gw2");
    let left = began.elapsed();
    known.mark(&cluster, &writer, "elsewhere");
    let written = writer.stop();
    let points = known.check(&cluster);
    cluster.wait_for_delta();
    assert!(written.longest < Duration::from_secs(5), "{written:?}");
    disk.hang(false);
    wait_until_same(&cluster);
    eprintln!(
        "a cache's disk that hangs: left after {:.0} s, longest write {:.2} s, {points} points exact",
        left.as_secs_f64(),
        written.longest.as_secs_f64()
    );
}
