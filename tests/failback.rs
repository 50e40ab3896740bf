//! There and home again: a machine with a file system moves to the secondary site and back, files are written on both sides, and
//! only what changed travels.
#![allow(clippy::unwrap_used, clippy::disallowed_methods, reason = "tests may unwrap, and wait by the clock")]

mod support;

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::time::Duration;

use serde_json::Value;
use support::mounted::{Mounted, check_file_system, whole_files, write_files};
use support::{Cluster, Options, s, same_bytes, tool, try_tool};

const DISK: u64 = 192 << 20;

fn failover(cluster: &Cluster, args: &[&str]) -> Value {
    let control = cluster.control("master-target");
    let output = cluster.try_tidegate(&[&["failover"], args, &["--json", "--control", &control]].concat());
    assert!(output.status.success(), "failover {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// A counter of the process server: bytes that went through it.
fn ingested(cluster: &Cluster) -> u64 {
    let mut stream = TcpStream::connect(("127.0.0.1", cluster.metrics_port("process-server"))).unwrap();
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    let line = text.lines().find(|l| l.starts_with("tidegate_ingest_bytes_total")).unwrap_or("0 0");
    line.rsplit(' ').next().unwrap().parse::<f64>().unwrap() as u64
}

fn write_through(dir: &Path, uri: &str, round: usize) {
    let mounted = Mounted::new(dir, uri);
    mounted.mount();
    write_files(&mounted.point, round, 12);
}

/// The agent takes no more writes, the final point has everything, the disk is served at the other site.
fn move_away(cluster: &mut Cluster, what: &str) -> String {
    let source = cluster.nbd_uri(0);
    let job = failover(cluster, &["planned", "m1", "--yes"]);
    assert_eq!(job["state"], "failed-over", "{what}: {job}");
    let told = job["steps"].as_array().unwrap().iter().filter_map(|s| s["detail"].as_str()).find(|d| d.contains("nothing is lost"));
    assert!(told.is_some_and(|d| d.contains("captured")), "{what}: by position: {job}");
    let refused = try_tool("qemu-io", &["-f", "raw", "-c", "write -P 1 0 4k", &source]);
    assert!(
        !refused.status.success() || String::from_utf8_lossy(&refused.stdout).contains("failed"),
        "{what}: the old disk takes no writes"
    );
    job["disks"][0]["nbd"].as_str().unwrap().to_owned()
}

fn release(cluster: &Cluster) {
    assert_eq!(failover(cluster, &["commit", "m1", "--yes"])["state"], "committed");
    assert_eq!(failover(cluster, &["cleanup", "m1"])["state"], "released");
}

fn machine_state(cluster: &Cluster, role: &str) -> String {
    cluster.json(role, &["status"])[0]["machines"][0]["disks"][0]["state"].as_str().unwrap_or_default().to_owned()
}

#[test]
fn a_machine_moves_to_the_other_site_and_home_again_and_only_what_changed_travels() {
    let mut a = Cluster::start(Options { disk_bytes: DISK, interval: "1h", ..Options::default() });
    {
        let mounted = Mounted::new(a.dir.path(), &a.nbd_uri(0));
        mounted.mkfs();
        mounted.mount();
        write_files(&mounted.point, 0, 40);
        // Content that has to travel once, and never again.
        let mut noise = fs::File::create(mounted.point.join("noise")).unwrap();
        let mut rng = support::Rng::new(4);
        for _ in 0..1024 {
            let block: Vec<u8> = (0..8192).flat_map(|_| rng.below(u64::MAX).to_le_bytes()).collect();
            noise.write_all(&block).unwrap();
        }
    }
    a.wait_for_delta();
    a.mark("before");

    // To the secondary site. The machine runs there from the export of the master target, then from the image file.
    let served = move_away(&mut a, "away");
    let copy = a.path("copy.raw");
    tool("nbdcopy", &[&served, s(&copy)]);
    assert!(same_bytes(&copy, &a.disk(0)), "nothing was lost");
    write_through(a.dir.path(), &served, 1);
    release(&a);
    // A wish to stop is remembered: the old source stays stopped when it is started again.
    a.kill("agent");
    a.start_role("agent");
    assert!(
        try_tool("qemu-io", &["-f", "raw", "-c", "write -P 1 0 4k", &a.nbd_uri(0)]).stdout.windows(6).any(|w| w == b"failed")
            || machine_state(&a, "agent") != "delta"
    );
    a.kill("agent");
    a.kill("process-server");
    a.kill("master-target");

    // Protected from there, onto the old disk.
    let old = a.path("old.raw");
    fs::copy(a.disk(0), &old).unwrap();
    let options = Options {
        disk_bytes: DISK,
        interval: "1h",
        format: "raw",
        sources: Some((vec![a.replica(0)], "vhdx")),
        adopt: vec![a.disk(0)],
        ..Options::default()
    };
    let mut b = Cluster::start(options);
    let compared = failover(&b, &["reprotect", "m1"]);
    assert_eq!(compared["state"], "comparing", "{compared}");
    let detail = compared["steps"][0]["detail"].as_str().unwrap().to_owned();
    assert!(detail.contains("differ"), "{detail}");
    write_through(b.dir.path(), &b.nbd_uri(0), 2);
    std::thread::sleep(Duration::from_secs(2));
    assert!(same_bytes(&a.disk(0), &old), "nothing is overwritten before somebody allows it");
    let wrong = b.try_tidegate(&["failover", "reprotect", "m1", "--overwrite", "d7", "--control", &b.control("master-target")]);
    assert!(String::from_utf8_lossy(&wrong.stderr).contains("has no disk d7"));
    let protected = failover(&b, &["reprotect", "m1", "--overwrite", "d0", "--detach"]);
    assert_eq!(protected["id"], 1);
    b.wait_for_delta();
    b.mark("home");
    b.wait("the job ends", Duration::from_secs(20), || failover(&b, &["show", "1"])["state"] == "protected");
    let sent = ingested(&b);
    println!("{detail}; {} KiB went through the process server for a disk of {} MiB", sent >> 10, DISK >> 20);
    assert!(sent < DISK / 6, "{sent} bytes for a few files");
    tool("qemu-img", &["compare", "-U", "-f", "raw", "-F", "vhdx", s(&a.disk(0)), s(&a.replica(0))]);

    // Home.
    write_through(b.dir.path(), &b.nbd_uri(0), 3);
    move_away(&mut b, "home");
    release(&b);
    for role in ["agent", "process-server", "master-target"] {
        b.kill(role);
    }
    tool("qemu-img", &["compare", "-f", "raw", "-F", "vhdx", s(&a.disk(0)), s(&a.replica(0))]);
    fs::copy(a.disk(0), &copy).unwrap();
    check_file_system(&copy);

    // And protected in the first direction again, by the servers of the beginning.
    for role in ["master-target", "process-server", "agent"] {
        a.start_role(role);
    }
    a.tidegate(&["machine", "resume", "m1", "--control", &a.control("agent")]);
    {
        let mounted = Mounted::new(a.dir.path(), &a.nbd_uri(0));
        mounted.mount();
        for (round, count) in [(0, 40), (1, 12), (2, 12), (3, 12)] {
            assert_eq!(whole_files(&mounted.point, round, count), count, "files of round {round}");
        }
        write_files(&mounted.point, 4, 12);
    }
    // A comparison that is given up, over a restart: nothing was overwritten, and it can be asked for again.
    assert_eq!(failover(&a, &["reprotect", "m1"])["state"], "comparing");
    assert_eq!(failover(&a, &["cancel", "m1"])["state"], "cancelled");
    a.kill("master-target");
    a.start_role("master-target");
    failover(&a, &["reprotect", "m1", "--overwrite", "d0", "--detach"]);
    a.wait_for_delta();
    let point = a.mark("again");
    let sent = ingested(&a);
    assert!(sent < DISK / 6, "{sent} bytes");
    a.export(&point, 0, "raw", &a.path("again.raw"));
    assert!(same_bytes(&a.path("again.raw"), &a.disk(0)));
    a.wait("the job ends", Duration::from_secs(20), || failover(&a, &["show", "m1"])["state"] == "protected");
}
