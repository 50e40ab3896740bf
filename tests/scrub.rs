//! Damage in what is kept: found while replication goes on, never served, healed from where a copy is, and said.
#![allow(clippy::unwrap_used, clippy::disallowed_methods, reason = "tests may unwrap, and wait by the clock")]

mod support;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use support::known::Known;
use support::writer::Writer;
use support::{Cluster, Options, s, tool};

const SIZE: u64 = 32 << 20;

fn options(scrub: &str) -> Options {
    Options { disk_bytes: SIZE, format: "raw", interval: "1h", agent: format!("[scrub]\nrate = \"{scrub}\"\n"), ..Options::default() }
}

/// Turns one bit, past whoever has the file open.
fn rot(path: &Path, at: u64) {
    let file = File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    byte[0] ^= 0x10;
    file.write_all_at(&byte, at).unwrap();
    file.sync_all().unwrap();
    // Direct reads see it in any case; this is for those through the page cache.
    tool("dd", &[&format!("of={}", s(path)), "oflag=nocache", "conv=notrunc,fdatasync", "count=0", "status=none"]);
}

fn same_as_source(cluster: &Cluster) -> bool {
    support::same_bytes(&cluster.disk(0), &cluster.replica(0))
}

fn labels(cluster: &Cluster, args: &[&str]) -> Vec<String> {
    let listed = cluster.json("master-target", args);
    let mut labels: Vec<String> = listed.as_array().unwrap().iter().filter_map(|p| p["label"].as_str().map(str::to_owned)).collect();
    labels.sort();
    labels
}

#[test]
fn damage_in_a_replica_is_found_told_exactly_and_healed() {
    let mut cluster = Cluster::start(options("0MiB/s"));
    cluster.wait_for_delta();
    let mut known = Known::default();
    let rotten = 20 << 20;
    cluster.write(0, rotten, 1, 256 << 10);
    known.mark_at_rest(&cluster, "overwritten-since");
    cluster.write(0, rotten, 2, 256 << 10);
    known.mark_at_rest(&cluster, "has-it");
    cluster.write(0, 4 << 20, 3, 64 << 10);
    known.mark_at_rest(&cluster, "has-it-too");
    known.check(&cluster);
    let control = cluster.control("agent");
    let clean = cluster.try_tidegate(&["disk", "verify", "m1/d0", "--json", "--control", &control]);
    assert!(clean.status.success(), "nothing is damaged yet: {}", String::from_utf8_lossy(&clean.stderr));

    rot(&cluster.replica(0), rotten + 70_000);
    assert!(!same_as_source(&cluster));
    let found = cluster.try_tidegate(&["disk", "verify", "m1/d0", "--json", "--control", &control]);
    assert_eq!(found.status.code(), Some(1), "{}", String::from_utf8_lossy(&found.stdout));
    let view: serde_json::Value = serde_json::from_slice(&found.stdout).unwrap();
    assert_eq!((view["done_bytes"].as_u64(), view["differing_bytes"].as_u64()), (Some(SIZE), Some(64 << 10)), "{view}");
    cluster.wait("the points that have it are off the list", Duration::from_secs(20), || {
        labels(&cluster, &["point", "list", "--bad"]) == ["has-it", "has-it-too"]
    });
    cluster.wait("it is healed", Duration::from_secs(20), || same_as_source(&cluster));
    let bad = cluster.json("master-target", &["point", "list", "--bad"]);
    assert!(bad[0]["cause"].as_str().unwrap().contains("source and replica differed"), "{bad}");
    // The others are good, and so is what comes after.
    known.0.retain(|(_, model)| model.ends_with("overwritten-since.model"));
    known.mark_at_rest(&cluster, "after");
    let points = known.check(&cluster);
    assert!(cluster.try_tidegate(&["disk", "verify", "d0", "--json", "--control", &control]).status.success());
    assert_eq!(cluster.metric("agent", "tidegate_scrub_differing_bytes_total"), 65536.0);
    eprintln!("one bit in a replica of {} MiB: 64 KiB found and healed, 2 points of 3 unlisted, {points} exact", SIZE >> 20);
}

#[test]
fn a_scrub_finds_it_by_itself_under_load_and_no_listed_point_has_it() {
    let cluster = Cluster::start(Options { interval: "1s", ..options("24MiB/s") });
    let mut cluster = cluster;
    cluster.wait_for_delta();
    // The upper half of the disk is not written.
    cluster.write(0, 24 << 20, 7, 1 << 20);
    let writer = Writer::start(cluster.nbd(0), SIZE / 2, 2, 8 << 20, 31);
    let mut known = Known::default();
    known.mark(&cluster, &writer, "before");
    known.check(&cluster);
    let (mut rots, mut seen) = (0, 0.0);
    for at in [(24 << 20) + 5, (25 << 20) - 4096, 30 << 20] {
        rot(&cluster.replica(0), at);
        rots += 1;
        cluster.wait("the scrub finds it", Duration::from_secs(30), || {
            let now = cluster.metric("master-target", "tidegate_scrub_differing_bytes_total");
            let found = now > seen;
            seen = now;
            found
        });
    }
    writer.pause();
    cluster.wait_for_delta();
    cluster.wait("it is healed", Duration::from_secs(20), || same_as_source(&cluster));
    known.0.clear();
    known.mark_at_rest(&cluster, "after");
    writer.go_on();
    // Every point that is still listed has what the source had: nothing of the upper half was ever written but once.
    let mut checked = 0;
    for point in cluster.points() {
        let out = cluster.path("point.raw");
        cluster.export(point["id"].as_str().unwrap(), 0, "raw", &out);
        let mut half = vec![0; 8 << 20];
        File::open(&out).unwrap().read_exact_at(&mut half, 24 << 20).unwrap();
        assert!(half[..1 << 20].iter().all(|&b| b == 7) && half[1 << 20..].iter().all(|&b| b == 0), "a listed point has damage: {point}");
        std::fs::remove_file(&out).unwrap();
        checked += 1;
    }
    known.check(&cluster);
    let bad = labels(&cluster, &["point", "list", "--bad"]);
    assert!(bad.contains(&"before".to_owned()), "{bad:?}");
    let written = writer.stop();
    // Rounds go on by themselves: the one that is asked for ends all the same.
    let verified = cluster.try_tidegate(&["disk", "verify", "d0", "--json", "--control", &cluster.control("agent")]);
    let view: serde_json::Value = serde_json::from_slice(&verified.stdout).unwrap();
    assert_eq!(
        (verified.status.code(), view["running"].as_bool(), view["done_bytes"].as_u64()),
        (Some(0), Some(false), Some(SIZE)),
        "{view}"
    );
    eprintln!(
        "{rots} bits turned under {} writes: all found by the scrub and healed, {checked} listed points without damage",
        written.writes
    );
}

/// It was the source that rotted: nobody can know that. The points leave the list, and are kept: a person puts the good one back.
#[test]
fn points_that_a_rotten_source_took_off_the_list_are_put_back() {
    let mut cluster = Cluster::start(options("0MiB/s"));
    cluster.wait_for_delta();
    cluster.write(0, 8 << 20, 5, 1 << 20);
    let mut known = Known::default();
    known.mark_at_rest(&cluster, "good");
    known.check(&cluster);
    rot(&cluster.disk(0), (8 << 20) + 70_000);
    let control = cluster.control("agent");
    let found = cluster.try_tidegate(&["disk", "verify", "d0", "--json", "--control", &control]);
    assert_eq!(found.status.code(), Some(1), "{}", String::from_utf8_lossy(&found.stdout));
    cluster.wait("the replica is what the source is now", Duration::from_secs(20), || same_as_source(&cluster));
    cluster.wait("the point is off the list", Duration::from_secs(20), || labels(&cluster, &["point", "list", "--bad"]) == ["good"]);
    // Whatever is written and marked since, and over a restart, its content stays.
    cluster.write(0, 8 << 20, 6, 1 << 20);
    cluster.mark("since");
    cluster.kill("master-target");
    cluster.start_role("master-target");
    let target = cluster.control("master-target");
    let refused = cluster.try_tidegate(&[
        "recover",
        "export",
        &known.0[0].0,
        "--disk",
        "d0",
        "--output",
        s(&cluster.path("no.raw")),
        "--control",
        &target,
    ]);
    assert!(!refused.status.success(), "nobody chooses it by mistake");
    let text = cluster.tidegate(&["point", "restore", &known.0[0].0[..8], "--control", &target]);
    assert!(text.contains("on the list again"), "{text}");
    assert_eq!(known.check(&cluster), 1);
    cluster.wait_for_delta();
    eprintln!("a bit turned in the source: 1 point off the list, put back, exact");
}

/// The largest segment file of a log, which is the one with records.
fn segment(dir: &Path) -> PathBuf {
    let mut files: Vec<PathBuf> = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()).filter(|p| p.is_file()).collect();
    files.sort();
    files.remove(0)
}

#[test]
fn damage_in_the_cache_is_never_sent_and_its_agent_sends_again() {
    let small = "[cache]\nsegment = \"4MiB\"\nsize_max = \"256MiB\"\nmemory_max = \"64KiB\"\n".to_owned();
    let mut cluster = Cluster::start(Options { process_server: small, cache: "writeback", ..options("0MiB/s") });
    cluster.wait_for_delta();
    let before = cluster.metric("agent", "tidegate_resynchronisations_total");
    cluster.kill("master-target");
    let writer = Writer::start(cluster.nbd(0), SIZE, 2, 30 << 20, 32);
    let mut known = Known::default();
    for n in 0..4 {
        std::thread::sleep(Duration::from_millis(500));
        known.mark(&cluster, &writer, &format!("cached-{n}"));
    }
    writer.stop();
    cluster.wait("everything is cached", Duration::from_secs(20), || {
        let positions = cluster.agent_disk(0)["positions"].clone();
        positions[0][1] == positions[2][1]
    });
    let dir = cluster.path("process-server/cache");
    for n in 1..=3 {
        rot(&segment(&dir).with_file_name(format!("segment-{n:010}.tgl")), 4096 + 200_000 + n);
    }
    cluster.start_role("master-target");
    cluster.wait_for_delta();
    let points = known.check(&cluster);
    assert!(same_as_source(&cluster));
    let damaged = cluster.metric("process-server", "tidegate_damaged_total");
    assert!(damaged >= 1.0, "{damaged}");
    assert_eq!(cluster.metric("agent", "tidegate_resynchronisations_total"), before, "the agent has it still");
    eprintln!("3 bits in the cache: noticed {damaged} times, {points} points from behind them exact, 0 resynchronisations");
}

#[test]
fn damage_in_the_journal_is_never_applied_and_the_replica_is_made_whole() {
    let slow = "[apply]\ncheckpoint_interval = \"60s\"\ncheckpoint_bytes = \"1GiB\"\nmemory_max = \"16MiB\"\n[journal]\nsegment = \"4MiB\"\nsize_max = \"512MiB\"\n".to_owned();
    let mut cluster = Cluster::start(Options { master_target: slow, cache: "writeback", ..options("0MiB/s") });
    cluster.wait_for_delta();
    let writer = Writer::start(cluster.nbd(0), SIZE, 2, 40 << 20, 33);
    std::thread::sleep(Duration::from_secs(3));
    writer.stop();
    cluster.wait_for_delta();
    // What is not in memory any more is in the journal only: everything up to `safe` was acknowledged.
    let dir = cluster.path("master-target/journal");
    for n in [6, 9] {
        rot(&dir.join(format!("segment-{n:010}.tgl")), 4096 + 300_000);
    }
    // A marker brings a checkpoint.
    cluster.mark_unlisted("behind");
    cluster.wait("it is noticed", Duration::from_secs(60), || cluster.log("master-target").contains("a batch in the journal is damaged"));
    // A marker before that would be of the stream that ends here.
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
    assert!(same_as_source(&cluster));
    // The same by a restart, which reads the journal through.
    let writer = Writer::start(cluster.nbd(0), SIZE, 2, 40 << 20, 34);
    std::thread::sleep(Duration::from_secs(2));
    writer.stop();
    cluster.wait_for_delta();
    cluster.kill("master-target");
    let newest = std::fs::read_dir(&dir).unwrap().map(|e| e.unwrap()).max_by_key(|e| e.metadata().unwrap().modified().unwrap()).unwrap();
    rot(&newest.path(), 4096 + 100_000);
    cluster.start_role("master-target");
    sent_again(&cluster, 2);
    cluster.wait_for_delta();
    known.mark_at_rest(&cluster, "after-restart");
    known.check(&cluster);
    assert!(same_as_source(&cluster));
    eprintln!("bits in the journal, read and found at a restart: the replica is its source again, 2 points exact");
}

#[test]
fn a_cache_of_another_server_is_moved_aside() {
    let mut cluster = Cluster::start(options("0MiB/s"));
    cluster.wait_for_delta();
    cluster.write(0, 0, 9, 1 << 20);
    cluster.mark("before");
    cluster.terminate("process-server");
    // The catalogue is another one's: as if the folder had been copied from there.
    std::fs::remove_file(cluster.path("process-server/process-server.redb")).unwrap();
    cluster.start_role("process-server");
    assert!(cluster.log("process-server").contains("belongs to another server"));
    cluster.write(0, 1 << 20, 10, 1 << 20);
    cluster.wait_for_delta();
    cluster.mark("after");
    assert!(same_as_source(&cluster));
    let aside: Vec<_> = std::fs::read_dir(cluster.path("process-server")).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert!(aside.iter().any(|n| n.to_string_lossy().starts_with("cache.foreign-")), "{aside:?}");
    // An older state of the same server, as from a snapshot of its virtual machine: what it has is over.
    cluster.terminate("process-server");
    let (state, snapshot) = (cluster.path("process-server"), cluster.path("snapshot"));
    tool("cp", &["-a", "--sparse=always", s(&state), s(&snapshot)]);
    cluster.start_role("process-server");
    cluster.write(0, 2 << 20, 11, 2 << 20);
    cluster.wait_for_delta();
    cluster.terminate("process-server");
    std::fs::remove_dir_all(&state).unwrap();
    std::fs::rename(&snapshot, &state).unwrap();
    cluster.write(0, 3 << 20, 12, 2 << 20);
    cluster.start_role("process-server");
    cluster.wait_for_delta();
    cluster.mark("after-the-snapshot");
    assert!(same_as_source(&cluster));
    eprintln!("a foreign cache was moved aside, an older one given up; source and replica are the same");
}
