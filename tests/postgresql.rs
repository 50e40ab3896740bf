//! PostgreSQL under pgbench on an ext4 on the protected disk: ten points of its run, each tested as a failover: the journal is
//! replayed, the server recovers, every page, table and index is whole, the books balance, and no commit from before the point is missing.
#![allow(clippy::unwrap_used, clippy::disallowed_methods, missing_docs, reason = "a test")]

mod support;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use support::mounted::Mounted;
use support::postgresql::{Server, as_postgres, done};
use support::{Cluster, Options, s, tool};

const RUN: Duration = Duration::from_secs(25);
const CLIENTS: u64 = 4;
const POINTS: usize = 10;

/// The load, ended with the test.
struct Load(Child);

impl Drop for Load {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What was committed when a point was asked for, and soon after it was made.
struct Bounds {
    point: String,
    before: i64,
    after: i64,
}

#[test]
fn postgresql_recovers_at_every_point_with_all_that_was_committed() {
    let mut cluster = Cluster::start(Options { disk_bytes: 512 << 20, ..Options::default() });
    // The server's user passes through.
    fs::set_permissions(cluster.dir.path(), fs::Permissions::from_mode(0o711)).unwrap();
    let live = Mounted::new(&cluster.path("live"), &cluster.nbd_uri(0));
    live.mkfs();
    live.mount();
    let mut server = Server::new(&live.point.join("pg"), &cluster.path("pg-live"), "5432");
    server.init();
    server.start();
    done(&mut server.client("pgbench", &["-q", "-i", "-s", "5", "postgres"]));
    cluster.wait_for_delta();

    let seconds = RUN.as_secs().to_string();
    let run = ["-n", "-c", &CLIENTS.to_string(), "-T", &seconds, "postgres"];
    let mut load = Load(server.client("pgbench", &run).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap());
    let (begun, mut marks) = (Instant::now(), Vec::new());
    while begun.elapsed() < RUN {
        let second = begun.elapsed();
        let before = server.history();
        let point = cluster.mark_unlisted(&format!("h{before}"));
        // Commits that are durable become visible a moment later, one of each client at most.
        marks.push(Bounds { point, before, after: server.history() + CLIENTS as i64 });
        std::thread::sleep(Duration::from_secs(1).saturating_sub(begun.elapsed() - second));
    }
    assert!(load.0.wait().unwrap().success(), "pgbench");
    let total = server.history();
    let newest = cluster.mark("end");
    marks.push(Bounds { point: newest, before: total, after: total });
    // A machine that is recovered does not find its old server alive.
    server.stop("-QUIT");
    drop((server, live));

    let points: Vec<String> = cluster.points().iter().map(|p| p["id"].as_str().unwrap().to_owned()).collect();
    let place = |id: &String| points.iter().position(|p| p == id).expect("a point that was made is listed");
    let marks: Vec<(usize, Bounds)> = marks.into_iter().map(|m| (place(&m.point), m)).collect();
    let (first, last) = (marks[0].0, marks[marks.len() - 1].0);
    assert!(last - first >= POINTS, "{} points", points.len());
    eprintln!("{total} transactions committed in {seconds} s, {} points", points.len());
    let mut previous = 0;
    for n in 0..POINTS {
        let at = first + (last - first) * n / (POINTS - 1);
        let before = marks.iter().rev().find(|(place, _)| *place <= at).unwrap().1.before;
        let after = marks.iter().find(|(place, _)| *place >= at).unwrap().1.after;
        let rows = recovered(&cluster, &points[at], n);
        eprintln!("point {at}: {rows} transactions, {before} were committed before it and at most {after} when it was made");
        assert!((before..=after).contains(&rows), "point {at} has {rows} transactions: {before} to {after} were committed");
        assert!(rows >= previous, "point {at} has {rows} transactions, one before it had {previous}");
        previous = rows;
    }
}

/// Brings the server up at a point, looks at everything, takes it away again; how many transactions it had.
fn recovered(cluster: &Cluster, point: &str, n: usize) -> i64 {
    let job = cluster.failover(&["test", "m1", "--point", point]);
    assert_eq!(job["state"], "running", "{job}");
    let mounted = Mounted::new(&cluster.path(&format!("at-{n}")), job["disks"][0]["nbd"].as_str().unwrap());
    assert!(tool("dumpe2fs", &["-h", s(&mounted.file)]).contains("needs_recovery"), "the file system was in use at the point");
    mounted.mount();
    let mut server = Server::new(&mounted.point.join("pg"), &cluster.path(&format!("pg-{n}")), "5433");
    server.start();
    let log = server.log();
    assert!(log.contains("automatic recovery in progress") && log.contains("redo done"), "the server was running at the point: {log}");
    done(&mut server.client("pg_amcheck", &["--all", "--install-missing", "--heapallindexed", "--parent-check"]));
    let query = "select (select sum(abalance) from pgbench_accounts), (select sum(bbalance) from pgbench_branches), \
                 (select sum(tbalance) from pgbench_tellers), coalesce(sum(delta), 0), count(*) from pgbench_history";
    let books = server.numbers(query);
    assert!(books[..4].iter().all(|sum| *sum == books[3]), "accounts, branches, tellers and history differ: {books:?}");
    server.stop("-INT");
    done(&mut as_postgres(&server.bin.join("pg_checksums"), &["--check", "-D", s(&server.data)]));
    drop((server, mounted));
    let cleaned = cluster.failover(&["cleanup", &job["id"].to_string()]);
    assert_eq!(cleaned["state"], "cleaned", "{cleaned}");
    books[4]
}
