//! A PostgreSQL server of the test's own, as an unprivileged user.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use super::{s, tool, try_tool};

/// Runs a program of PostgreSQL as its user: it refuses root.
pub fn as_postgres(program: &Path, args: &[&str]) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--reuid=postgres", "--regid=postgres", "--init-groups", s(program)]).args(args).current_dir("/").stdin(Stdio::null());
    command
}

/// Runs a command to its success; what it printed.
pub fn done(command: &mut Command) -> String {
    let Output { status, stdout, stderr } = command.output().expect("setpriv: run tests through tests/run");
    let text = format!("{}{}", String::from_utf8_lossy(&stdout), String::from_utf8_lossy(&stderr));
    assert!(status.success(), "{command:?} failed ({:?}): {text}", status.code());
    text
}

/// The newest version's programs.
pub fn programs() -> PathBuf {
    let versions = fs::read_dir("/usr/lib/postgresql").expect("run this through tests/run, which installs PostgreSQL");
    let number = |p: &PathBuf| p.file_name().and_then(|n| n.to_str()?.parse::<u32>().ok());
    let newest = versions.map(|e| e.unwrap().path()).filter(|p| p.join("bin/pg_amcheck").exists()).max_by_key(number);
    newest.expect("run this through tests/run, which installs PostgreSQL").join("bin")
}

/// A server of its own, ended with the test.
pub struct Server {
    /// Programs.
    pub bin: PathBuf,
    /// Data.
    pub data: PathBuf,
    /// Socket and log.
    dir: PathBuf,
    port: &'static str,
    process: Option<Child>,
}

impl Server {
    /// Does not start it.
    pub fn new(data: &Path, dir: &Path, port: &'static str) -> Self {
        fs::create_dir_all(dir).unwrap();
        tool("chown", &["postgres:", s(dir)]);
        Self { bin: programs(), data: data.to_owned(), dir: dir.to_owned(), port, process: None }
    }

    /// Makes its data.
    pub fn init(&self) {
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
    pub fn start(&mut self) {
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
    pub fn stop(&mut self, signal: &str) {
        if let Some(mut process) = self.process.take() {
            let _ = try_tool("kill", &[signal, &process.id().to_string()]);
            let _ = process.wait();
        }
    }

    /// Its log so far.
    pub fn log(&self) -> String {
        fs::read_to_string(self.dir.join("log")).unwrap_or_default()
    }

    /// A client program with the arguments that lead to this server.
    pub fn client(&self, program: &str, args: &[&str]) -> Command {
        as_postgres(&self.bin.join(program), &[&["-h", s(&self.dir), "-p", self.port, "-U", "postgres"][..], args].concat())
    }

    /// The numbers that a query answers.
    pub fn numbers(&self, query: &str) -> Vec<i64> {
        let text = done(&mut self.client("psql", &["-XAtq", "-F", " ", "-d", "postgres", "-c", query]));
        text.split_whitespace().map(|n| n.parse().unwrap_or_else(|e| panic!("{query}: {e}: {text}"))).collect()
    }

    /// Transactions of pgbench.
    pub fn history(&self) -> i64 {
        self.numbers("select count(*) from pgbench_history")[0]
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop("-QUIT");
    }
}
