//! Long breaks and lost state: changes keep their order as long as there is room for them, and afterwards only differences travel.
#![allow(clippy::unwrap_used, clippy::disallowed_methods, reason = "tests may unwrap, and wait by the clock")]

mod support;

use std::time::Duration;

use support::known::Known;
use support::writer::Writer;
use support::{Cluster, Options, s};

const SIZE: u64 = 160 << 20;

fn options(log_max: &str) -> Options {
    Options {
        disk_bytes: SIZE,
        cache: "writeback",
        format: "raw",
        agent: format!("[backlog]\nmemory_max = \"64MiB\"\nlog_max = \"{log_max}\"\n[dirty_map]\nregion = \"256KiB\"\n"),
        ..Options::default()
    }
}

fn same_as_source(cluster: &Cluster) {
    support::tool("qemu-img", &["compare", "-f", "raw", "-F", "raw", s(&cluster.disk(0)), s(&cluster.replica(0))]);
}

fn missing(cluster: &Cluster) -> u64 {
    cluster.agent_disk(0)["missing_bytes"].as_u64().unwrap_or(u64::MAX)
}

/// Writes until `enough`, or for half a minute.
fn write_until(cluster: &Cluster, what: &str, mut enough: impl FnMut() -> bool) {
    cluster.wait(what, Duration::from_secs(60), || {
        std::thread::sleep(Duration::from_millis(100));
        enough()
    });
}

#[test]
fn points_go_on_over_a_break_that_memory_has_no_room_for() {
    let mut cluster = Cluster::start(options("1GiB"));
    cluster.wait_for_delta();
    let before = cluster.metric("agent", "tidegate_resynchronisations_total");
    cluster.kill("process-server");
    let writer = Writer::start(cluster.nbd(0), SIZE, 2, 80 << 20, 21);
    let mut known = Known::default();
    let mut peak: f64 = 0.0;
    for n in 0..5 {
        let so_far = writer.written().bytes;
        write_until(&cluster, "60 MB are written", || writer.written().bytes > so_far + 60_000_000);
        known.mark(&cluster, &writer, &format!("cut-off-{n}"));
        peak = peak.max(cluster.metric("agent", "tidegate_backlog_bytes{disk=\"m1/d0\",kind=\"log\"}"));
        assert_eq!(missing(&cluster), 0, "everything is in the stream");
    }
    assert!(peak > 50e6, "most of it waits in the log: {peak}");
    let written = writer.stop();
    cluster.start_role("process-server");
    cluster.wait_for_delta();
    cluster.mark("end");
    let points = known.check(&cluster);
    assert_eq!(cluster.metric("agent", "tidegate_resynchronisations_total"), before);
    same_as_source(&cluster);
    cluster.wait("the log is empty", Duration::from_secs(20), || {
        cluster.metric("agent", "tidegate_backlog_bytes{disk=\"m1/d0\",kind=\"log\"}") == 0.0
    });
    eprintln!(
        "cut off for {} MB, {:.0} MB of it in the log, longest write {:.0?}; {points} points from the break, 0 differences, 0 resynchronisations",
        written.bytes / 1_000_000,
        peak / 1e6,
        written.longest
    );
}

#[test]
fn when_the_log_is_full_too_only_what_was_written_travels_and_the_last_point_stays() {
    let mut cluster = Cluster::start(options("64MiB"));
    cluster.wait_for_delta();
    let mut known = Known::default();
    let writer = Writer::start(cluster.nbd(0), SIZE / 4, 2, 0, 22);
    known.mark(&cluster, &writer, "last");
    known.check(&cluster);
    cluster.kill("process-server");
    write_until(&cluster, "memory and log are full", || missing(&cluster) > 0);
    assert_eq!(cluster.agent_disk(0)["state"], "resynchronising");
    assert!(cluster.try_tidegate(&["point", "mark", "--machine", "m1", "--control", &cluster.control("agent")]).status.code() == Some(1));
    let written = writer.stop();
    // What the site would come back with now.
    let plan = cluster.json("master-target", &["point", "show", "last"]);
    assert_eq!(plan["label"], "last");
    cluster.start_role("process-server");
    cluster.wait_for_delta();
    cluster.mark("end");
    known.check(&cluster);
    same_as_source(&cluster);
    let ingested = cluster.metric("process-server", "tidegate_ingest_bytes_total");
    assert!(ingested < (SIZE + (140 << 20)) as f64, "only the quarter that was written, and what waited: {ingested}");
    eprintln!(
        "{} MB written while cut off into 40 MiB, {:.0} MB sent afterwards, longest write {:.0?}; the last point stayed exact",
        written.bytes / 1_000_000,
        ingested / 1e6,
        written.longest
    );
}

/// The agent's state is lost: nobody knows what the replica has. All of it is compared, and next to nothing sent; an agent that
/// is killed meanwhile goes on.
#[test]
fn without_the_map_digests_settle_what_differs_also_over_interruptions() {
    let mut cluster = Cluster::start(options("1GiB"));
    cluster.wait_for_delta();
    let writer = Writer::start(cluster.nbd(0), SIZE, 2, 0, 23);
    std::thread::sleep(Duration::from_secs(3));
    writer.stop();
    cluster.wait_for_delta();
    let mut known = Known::default();
    known.mark_at_rest(&cluster, "before");
    known.check(&cluster);
    cluster.terminate("agent");
    cluster.kill("process-server");
    std::fs::remove_dir_all(cluster.path("agent")).unwrap();
    // Something was written past the agent meanwhile.
    let file = std::fs::File::options().write(true).open(cluster.disk(0)).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &[0xab; 70_000], 90 << 20).unwrap();
    drop(file);
    cluster.start_role("process-server");
    for _ in 0..3 {
        cluster.start_role("agent");
        std::thread::sleep(Duration::from_millis(400));
        cluster.kill("agent");
    }
    cluster.start_role("agent");
    cluster.wait_for_delta();
    cluster.mark("end");
    known.check(&cluster);
    same_as_source(&cluster);
    let ingested = cluster.metric("process-server", "tidegate_ingest_bytes_total");
    assert!(ingested < 8e6, "{ingested}");
    eprintln!("{} MiB without a map: {:.2} MB sent, digests included, over 3 interruptions; 0 differences", SIZE >> 20, ingested / 1e6);
}

/// The master target is put back to a backup of an hour ago: it does not have what it acknowledged, and does not know it.
#[test]
fn a_master_target_from_a_backup_is_found_out_and_made_whole() {
    let mut cluster = Cluster::start(options("1GiB"));
    cluster.wait_for_delta();
    let writer = Writer::start(cluster.nbd(0), SIZE, 2, 20 << 20, 24);
    let mut known = Known::default();
    known.mark(&cluster, &writer, "in-the-backup");
    known.check(&cluster);
    cluster.terminate("master-target");
    let (state, backup) = (cluster.path("master-target"), cluster.path("backup"));
    support::tool("cp", &["-a", "--sparse=always", s(&state), s(&backup)]);
    cluster.start_role("master-target");
    std::thread::sleep(Duration::from_secs(2));
    writer.stop();
    cluster.wait_for_delta();
    // What the agent knows to be safe long enough is marked clean in its map.
    cluster.terminate("agent");
    cluster.terminate("master-target");
    std::fs::remove_dir_all(&state).unwrap();
    std::fs::rename(&backup, &state).unwrap();
    cluster.start_role("master-target");
    cluster.start_role("agent");
    cluster.wait_for_delta();
    cluster.mark("end");
    known.check(&cluster);
    same_as_source(&cluster);
    eprintln!("a master target from a backup: source and replica are the same again, the point from the backup is exact");
}

/// The machine is put back to a snapshot, its agent's state with it: what the replica has beyond it, this agent never made.
#[test]
fn a_source_from_a_snapshot_is_found_out_and_the_points_in_between_stay() {
    let mut cluster = Cluster::start(options("1GiB"));
    cluster.wait_for_delta();
    let writer = Writer::start(cluster.nbd(0), SIZE, 2, 30 << 20, 25);
    let mut known = Known::default();
    std::thread::sleep(Duration::from_secs(1));
    known.mark(&cluster, &writer, "before-the-snapshot");
    writer.stop();
    cluster.wait_for_delta();
    cluster.terminate("agent");
    let (state, disk) = (cluster.path("agent"), cluster.disk(0));
    let (old_state, old_disk) = (cluster.path("agent-snapshot"), cluster.path("disk-snapshot"));
    support::tool("cp", &["-a", s(&state), s(&old_state)]);
    support::tool("cp", &["--sparse=always", s(&disk), s(&old_disk)]);
    cluster.start_role("agent");
    cluster.wait_for_delta();
    let writer = Writer::start(cluster.nbd(0), SIZE, 2, 30 << 20, 26);
    std::thread::sleep(Duration::from_secs(1));
    known.mark(&cluster, &writer, "lost-by-the-snapshot");
    writer.stop();
    cluster.wait_for_delta();
    known.check(&cluster);
    cluster.terminate("agent");
    std::fs::remove_dir_all(&state).unwrap();
    std::fs::rename(&old_state, &state).unwrap();
    // In place, as a hypervisor does it.
    support::tool("dd", &[&format!("if={}", s(&old_disk)), &format!("of={}", s(&disk)), "bs=1M", "conv=notrunc", "status=none"]);
    cluster.start_role("agent");
    cluster.wait_for_delta();
    assert!(cluster.log("agent").contains("is not held any more"), "{}", cluster.log("agent"));
    known.mark_at_rest(&cluster, "after");
    let points = known.check(&cluster);
    same_as_source(&cluster);
    eprintln!("a source from a snapshot: source and replica are the same, {points} points exact, also the one that the source lost");
}
