//! PostgreSQL under pgbench on an ext4 on the protected disk: ten points of its run, each tested as a failover: the journal is
//! replayed, the server recovers, every page, table and index is whole, the books balance, and no commit from before the point is missing.
#![allow(clippy::unwrap_used, clippy::disallowed_methods, missing_docs, reason = "a test")]

mod support;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use support::mounted::Mounted;
use support::{Cluster, Options, s, tool, try_tool};

const RUN: Duration = Duration::from_secs(25);
const CLIENTS: u64 = 4;
const POINTS: usize = 10;

/// Runs a program of PostgreSQL as its user: it refuses root.
fn as_postgres(program: &Path, args: &[&str]) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--reuid=postgres", "--regid=postgres", "--init-groups", s(program)]).args(args).current_dir("/").stdin(Stdio::null());
    command
}

fn done(command: &mut Command) -> String {
    let Output { status, stdout, stderr } = command.output().expect("setpriv: run tests through tests/run");
    let text = format!("{}{}", String::from_utf8_lossy(&stdout), String::from_utf8_lossy(&stderr));
    assert!(status.success(), "{command:?} failed ({:?}): {text}", status.code());
    text
}

/// The newest version's programs.
fn programs() -> PathBuf {
    let versions = fs::read_dir("/usr/lib/postgresql").expect("run this through tests/run, which installs PostgreSQL");
    let number = |p: &PathBuf| p.file_name().and_then(|n| n.to_str()?.parse::<u32>().ok());
    let newest = versions.map(|e| e.unwrap().path()).filter(|p| p.join("bin/pg_amcheck").exists()).max_by_key(number);
    newest.expect("run this through tests/run, which installs PostgreSQL").join("bin")
}

/// A server of its own, ended with the test.
struct Server {
    bin: PathBuf,
    data: PathBuf,
    /// Socket and log.
    dir: PathBuf,
    port: &'static str,
    process: Option<Child>,
}

impl Server {
    fn new(data: &Path, dir: &Path, port: &'static str) -> Self {
        fs::create_dir_all(dir).unwrap();
        tool("chown", &["postgres:", s(dir)]);
        Self { bin: programs(), data: data.to_owned(), dir: dir.to_owned(), port, process: None }
    }

    fn init(&self) {
        fs::create_dir(&self.data).unwrap();
        tool("chown", &["postgres:", s(&self.data)]);
        done(&mut as_postgres(&self.bin.join("initdb"), &["--data-checksums", "-A", "trust", "-U", "postgres", "-D", s(&self.data)]));
        // Small, so that checkpoints and reused log are part of the run.
        let settings = "listen_addresses = ''\nshared_buffers = 32MB\nmin_wal_size = 32MB\nmax_wal_size = 64MB\ncheckpoint_timeout = 30s\n";
        let file = self.data.join("postgresql.conf");
        fs::write(&file, fs::read_to_string(&file).unwrap() + settings).unwrap();
        tool("sync", &[s(&file)]);
    }

    /// Our own child, so that nothing is left of it once it ended, whoever is process 1 here.
    fn start(&mut self) {
        let log = fs::File::options().create(true).append(true).open(self.dir.join("log")).unwrap();
        let mut postgres = as_postgres(&self.bin.join("postgres"), &["-D", s(&self.data), "-p", self.port, "-k", s(&self.dir)]);
        self.process = Some(postgres.stdout(log.try_clone().unwrap()).stderr(log).spawn().unwrap());
        let begun = Instant::now();
        while !self.client("pg_isready", &["-q"]).status().unwrap().success() {
            let ended = self.process.as_mut().unwrap().try_wait().unwrap();
            assert!(ended.is_none() && begun.elapsed() < Duration::from_secs(60), "the server does not start: {ended:?}: {}", self.log());
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// SIGINT is a fast shutdown; SIGQUIT one without a checkpoint, as a crash.
    fn stop(&mut self, signal: &str) {
        if let Some(mut process) = self.process.take() {
            let _ = try_tool("kill", &[signal, &process.id().to_string()]);
            let _ = process.wait();
        }
    }

    fn log(&self) -> String {
        fs::read_to_string(self.dir.join("log")).unwrap_or_default()
    }

    /// A client program with the arguments that lead to this server.
    fn client(&self, program: &str, args: &[&str]) -> Command {
        as_postgres(&self.bin.join(program), &[&["-h", s(&self.dir), "-p", self.port, "-U", "postgres"][..], args].concat())
    }

    fn numbers(&self, query: &str) -> Vec<i64> {
        let text = done(&mut self.client("psql", &["-XAtq", "-F", " ", "-d", "postgres", "-c", query]));
        text.split_whitespace().map(|n| n.parse().unwrap_or_else(|e| panic!("{query}: {e}: {text}"))).collect()
    }

    fn history(&self) -> i64 {
        self.numbers("select count(*) from pgbench_history")[0]
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop("-QUIT");
    }
}

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
