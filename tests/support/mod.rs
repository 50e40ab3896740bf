//! Runs real processes of every role over loopback, with certificates, configuration and a disk of their own.
#![allow(clippy::disallowed_methods, dead_code, unreachable_pub, missing_docs, reason = "each suite uses its part")]

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

pub use rng::Rng;

use serde_json::Value;
use tempfile::TempDir;
use tidegate::model::Address;
use tidegate::nbd::client::Client;

pub mod bad_disk;
pub mod block_log;
pub mod estate;
pub mod faulty_storage;
pub mod guest;
pub mod known;
pub mod mounted;
pub mod postgresql;
mod rng;
pub mod way;
pub mod writer;

/// Roles in the order data flows.
pub const ROLES: [&str; 3] = ["agent", "process-server", "master-target"];

/// What a test may change.
pub struct Options {
    /// Bytes of each disk.
    pub disk_bytes: u64,
    /// Number of disks.
    pub disks: usize,
    /// Format of the replicas.
    pub format: &'static str,
    /// Page cache use of the agent.
    pub cache: &'static str,
    /// Added to the agent's configuration, before its tables.
    pub agent: String,
    /// Added at the end of the process server's configuration.
    pub process_server: String,
    /// Added at the end of the master target's configuration.
    pub master_target: String,
    /// Time between points.
    pub interval: &'static str,
    /// Disks that are there already, and their format, instead of new ones.
    pub sources: Option<(Vec<PathBuf>, &'static str)>,
    /// Raw disks that become replicas.
    pub adopt: Vec<PathBuf>,
    /// Where the master target keeps its state, if not in the test's folder.
    pub target_state: Option<PathBuf>,
    /// Where the process server keeps its state, if not in the test's folder.
    pub gateway_state: Option<PathBuf>,
    /// Process servers: `process-server`, then `process-server-2` and so on, which are the agent's standbys.
    pub gateways: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            disk_bytes: 64 << 20,
            disks: 1,
            format: "vhdx",
            cache: "direct",
            agent: String::new(),
            process_server: String::new(),
            master_target: String::new(),
            interval: "1s",
            sources: None,
            adopt: Vec::new(),
            target_state: None,
            gateway_state: None,
            gateways: 1,
        }
    }
}

/// A machine `m1`, a process server and a master target.
pub struct Cluster {
    /// The test's folder.
    pub dir: TempDir,
    children: BTreeMap<String, Child>,
    options: Options,
    ports: Vec<u16>,
}

impl Cluster {
    /// Makes certificates, configuration and disks; starts nothing.
    pub fn prepare(options: Options) -> Self {
        let dir = tempfile::tempdir().expect("a folder for the test");
        let cluster = Self { dir, children: BTreeMap::new(), ports: free_ports(5 + 2 * options.gateways), options };
        let ca = cluster.path("ca");
        cluster.tidegate(&["pki", "init", s(&ca)]);
        let gateways = (0..cluster.options.gateways).map(|n| (gateway_role(n), format!("gw{}", n + 1)));
        let others = [("agent", "m1"), ("master-target", "mt1")].map(|(role, name)| (role.to_owned(), name.to_owned()));
        for (role, name) in &others.into_iter().chain(gateways).collect::<Vec<_>>() {
            cluster.tidegate(&[
                "pki",
                "issue",
                "--ca",
                s(&ca),
                "--role",
                base_role(role),
                "--name",
                name,
                "--out",
                s(&cluster.path(&format!("tls-{role}"))),
            ]);
        }
        for index in 0..if cluster.options.sources.is_none() { cluster.options.disks } else { 0 } {
            let file = File::create(cluster.disk(index)).expect("a disk");
            file.set_len(cluster.options.disk_bytes).expect("space for a sparse disk");
        }
        cluster.write_configs();
        cluster
    }

    /// Prepares and starts all roles.
    pub fn start(options: Options) -> Self {
        let mut cluster = Self::prepare(options);
        cluster.start_role("master-target");
        (0..cluster.options.gateways).for_each(|n| cluster.start_role(&gateway_role(n)));
        cluster.start_role("agent");
        cluster
    }

    fn write_configs(&self) {
        let [ingest, forward, metrics @ ..] = &self.ports[..] else { unreachable!("enough ports") };
        let tls = |role: &str| {
            let d = self.path(&format!("tls-{role}"));
            format!("[tls]\nca = {:?}\ncert = {:?}\nkey = {:?}\n", d.join("ca.pem"), d.join("cert.pem"), d.join("key.pem"))
        };
        let common = |role: &str, index: usize| {
            let metrics = metrics[index];
            format!(
                "{}[control]\nlisten = \"unix:{}\"\n[metrics]\nlisten = \"127.0.0.1:{metrics}\"\n",
                tls(role),
                self.control_path(role).display()
            )
        };
        let mut agent = format!("machine = \"m1\"\nstate = {:?}\n{}{}", self.path("agent"), self.options.agent, common("agent", 0));
        let standby: Vec<String> = (1..self.options.gateways).map(|n| format!("\"127.0.0.1:{}\"", self.gateway_port(n))).collect();
        agent += &format!(
            "[process_server]\naddress = \"127.0.0.1:{ingest}\"\nstandby = [{}]\nswitch_after = \"1s\"\n[points]\ninterval = \"{}\"\n",
            standby.join(", "),
            self.options.interval
        );
        for index in 0..self.options.disks {
            let (path, nbd, cache) = (self.disk(index), self.nbd(index), self.options.cache);
            agent += &format!("[[disk]]\nname = \"d{index}\"\npath = {path:?}\nnbd = \"unix:{}\"\ncache = \"{cache}\"\n", nbd.display());
            if let Some((_, format)) = &self.options.sources {
                agent += &format!("format = \"{format}\"\n");
            }
        }
        let names: Vec<String> = (0..self.options.disks).map(|i| format!("\"d{i}\"")).collect();
        for n in 0..self.options.gateways {
            let role = gateway_role(n);
            let state = self.options.gateway_state.clone().filter(|_| n == 0).unwrap_or_else(|| self.path(&role));
            let gateway = format!(
                "state = {state:?}\n{}[ingest]\nlisten = \"127.0.0.1:{}\"\n[forward]\nmaster_target = \"127.0.0.1:{forward}\"\nmtu = 8952\n[[machine]]\nname = \"m1\"\ndisks = [{}]\n{}",
                common(&role, if n == 0 { 1 } else { 2 + 2 * n }),
                self.gateway_port(n),
                names.join(", "),
                self.options.process_server
            );
            fs::write(self.config(&role), gateway).expect("a configuration");
        }
        let state = self.options.target_state.clone().unwrap_or_else(|| self.path("master-target"));
        let mut target = format!(
            "state = {state:?}\n{}[receive]\nlisten = \"127.0.0.1:{forward}\"\nmtu = 8952\n{}[[machine]]\nname = \"m1\"\n",
            common("master-target", 2),
            self.options.master_target
        );
        for index in 0..self.options.disks {
            target += &format!("[[machine.disk]]\nname = \"d{index}\"\nformat = \"{}\"\n", self.options.format);
            if let Some(path) = self.options.adopt.get(index) {
                target += &format!("adopt = {path:?}\n");
            }
        }
        fs::write(self.config("agent"), agent).expect("a configuration");
        fs::write(self.config("master-target"), target).expect("a configuration");
    }

    /// A path in the test's folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Configuration of a role.
    pub fn config(&self, role: &str) -> PathBuf {
        self.path(&format!("{role}.toml"))
    }

    /// Source disk.
    pub fn disk(&self, index: usize) -> PathBuf {
        if let Some((paths, _)) = &self.options.sources {
            return paths[index].clone();
        }
        self.path(&format!("d{index}.raw"))
    }

    /// Socket of a disk's export.
    pub fn nbd(&self, index: usize) -> PathBuf {
        self.path(&format!("d{index}.sock"))
    }

    /// Writes `len` times the byte `fill` to a disk, durably, as an application would.
    pub fn write(&self, index: usize, offset: u64, fill: u8, len: usize) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(async {
            let mut client = Client::connect(&Address::Unix(self.nbd(index)), "").await.expect("the disk is served");
            client.write(offset, &vec![fill; len], true).await.expect("a write is taken");
        });
    }

    /// URI of a disk's export.
    pub fn nbd_uri(&self, index: usize) -> String {
        format!("nbd+unix:///?socket={}", self.nbd(index).display())
    }

    /// The replica of a disk.
    pub fn replica(&self, index: usize) -> PathBuf {
        let state = self.options.target_state.clone().unwrap_or_else(|| self.path("master-target"));
        let format: tidegate::disk::Format = self.options.format.parse().expect("a format");
        state.join(format!("replicas/m1/d{index}.{}", format.extension()))
    }

    fn control_path(&self, role: &str) -> PathBuf {
        self.path(&format!("{role}.sock"))
    }

    /// Port of a process server's listener for agents.
    pub fn gateway_port(&self, n: usize) -> u16 {
        if n == 0 { self.ports[0] } else { self.ports[3 + 2 * n] }
    }

    /// Its process servers.
    pub fn gateway_roles(&self) -> impl Iterator<Item = String> + use<> {
        (0..self.options.gateways).map(gateway_role)
    }

    /// Port of the agents' listener.
    pub fn ingest_port(&self) -> u16 {
        self.ports[0]
    }

    /// Port of the process servers' listener.
    pub fn forward_port(&self) -> u16 {
        self.ports[1]
    }

    /// Port of a role's metrics.
    pub fn metrics_port(&self, role: &str) -> u16 {
        self.ports[2 + index_of(role)]
    }

    /// What a role shows to Prometheus.
    pub fn metrics(&self, role: &str) -> String {
        self.get(role, "/metrics")
    }

    /// What its listener for Prometheus answers.
    pub fn get(&self, role: &str, path: &str) -> String {
        let n = (0..self.options.gateways).position(|n| gateway_role(n) == role);
        let port = match n {
            Some(n) if n > 0 => self.ports[4 + 2 * n],
            _ => self.metrics_port(role),
        };
        let mut stream = std::net::TcpStream::connect(("127.0.0.1", port)).expect("metrics are served");
        write!(stream, "GET {path} HTTP/1.0\r\n\r\n").expect("a request");
        let mut text = String::new();
        stream.read_to_string(&mut text).expect("an answer");
        text
    }

    /// The sum of a metric's series.
    pub fn metric(&self, role: &str, name: &str) -> f64 {
        self.metrics(role).lines().filter(|l| l.starts_with(name)).filter_map(|l| l.rsplit(' ').next()?.parse::<f64>().ok()).sum()
    }

    /// Starts a role and waits until its control interface answers.
    pub fn start_role(&mut self, role: &str) {
        self.spawn_role(role);
        self.wait(&format!("{role} answers"), Duration::from_secs(30), || self.answers(role));
    }

    /// The same for one that may refuse to start: then why, as its log has it.
    pub fn try_start_role(&mut self, role: &str, limit: Duration) -> Result<(), String> {
        let before = self.log(role).len();
        self.spawn_role(role);
        let started = Instant::now();
        while !self.answers(role) {
            if !self.runs(role) || started.elapsed() > limit {
                self.kill(role);
                return Err(format!("{role} does not start: {}", tail(&self.log(role)[before..], 3)));
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }

    fn spawn_role(&mut self, role: &str) {
        let log = File::options().create(true).append(true).open(self.path(&format!("{role}.log"))).expect("a log");
        let child = Command::new(env!("CARGO_BIN_EXE_tidegate"))
            .args([base_role(role), "--config", s(&self.config(role))])
            .env("RUST_BACKTRACE", "1")
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .expect("the program starts");
        self.children.insert(role.to_owned(), child);
    }

    fn answers(&self, role: &str) -> bool {
        self.try_tidegate(&["status", "--json", "--control", &self.control(role)]).status.code() != Some(3)
    }

    /// SIGKILL.
    pub fn kill(&mut self, role: &str) {
        if let Some(mut child) = self.children.remove(role) {
            child.kill().expect("we may kill our own child");
            child.wait().expect("it ends");
        }
    }

    /// SIGTERM, and the exit code.
    pub fn terminate(&mut self, role: &str) -> Option<i32> {
        let mut child = self.children.remove(role)?;
        Command::new("kill").arg(child.id().to_string()).status().expect("kill");
        child.wait().expect("it ends").code()
    }

    /// A role's process.
    pub fn pid(&self, role: &str) -> u32 {
        self.children[role].id()
    }

    /// Whether a role's process still runs.
    pub fn runs(&mut self, role: &str) -> bool {
        self.children.get_mut(role).is_some_and(|c| c.try_wait().is_ok_and(|s| s.is_none()))
    }

    /// What `--control` takes for a role.
    pub fn control(&self, role: &str) -> String {
        format!("unix:{}", self.control_path(role).display())
    }

    /// A role's log so far.
    pub fn log(&self, role: &str) -> String {
        fs::read_to_string(self.path(&format!("{role}.log"))).unwrap_or_default()
    }

    /// Runs the program; its output must be a success.
    pub fn tidegate(&self, args: &[&str]) -> String {
        let output = self.try_tidegate(args);
        assert!(output.status.success(), "tidegate {args:?} failed: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Runs the program.
    pub fn try_tidegate(&self, args: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_tidegate")).args(args).output().expect("the program runs")
    }

    /// Asks a role with `--json`. Status answers by exit code too, so the code is not looked at.
    pub fn json(&self, role: &str, args: &[&str]) -> Value {
        let control = self.control(role);
        let output = self.try_tidegate(&[args, &["--json", "--control", &control]].concat());
        serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{args:?}: {e}: {}", String::from_utf8_lossy(&output.stderr)))
    }

    /// The agent's view of a disk.
    pub fn agent_disk(&self, index: usize) -> Value {
        self.json("agent", &["status"])[0]["machines"][0]["disks"][index].clone()
    }

    /// Waits until every disk is in delta replication and everything is journaled.
    pub fn wait_for_delta(&mut self) {
        let disks = self.options.disks;
        self.wait("delta replication", Duration::from_secs(90), || {
            (0..disks).all(|i| {
                let disk = self.agent_disk(i);
                let at = |rung: usize| disk["positions"][rung][1].as_str().map(str::to_owned);
                disk["state"] == "delta" && at(0) == at(3) && at(0).is_some_and(|p| !p.ends_with(":0"))
            })
        });
    }

    /// Listed points.
    pub fn points(&self) -> Vec<Value> {
        self.json("master-target", &["point", "list"]).as_array().cloned().unwrap_or_default()
    }

    /// Makes a point and waits until it is listed.
    pub fn mark(&self, label: &str) -> String {
        let id = self.mark_unlisted(label);
        self.wait(&format!("point {label} is listed"), Duration::from_secs(60), || self.points().iter().any(|p| p["id"] == id.as_str()));
        id
    }

    /// Makes a point, which is listed at the master target some time later.
    pub fn mark_unlisted(&self, label: &str) -> String {
        let marked = self.json("agent", &["point", "mark", "--machine", "m1", "--label", label]);
        marked["point"].as_str().unwrap_or_else(|| panic!("no point: {marked}")).to_owned()
    }

    /// Runs a `failover` command at the master target, and returns the job.
    pub fn failover(&self, args: &[&str]) -> Value {
        let control = self.control("master-target");
        let text = self.tidegate(&[&["failover"], args, &["--json", "--control", &control]].concat());
        serde_json::from_str(&text).unwrap_or_else(|e| panic!("failover {args:?}: {e}: {text}"))
    }

    /// Exports a point.
    pub fn export(&self, point: &str, disk: usize, format: &str, output: &Path) {
        let control = self.control("master-target");
        let name = format!("d{disk}");
        self.tidegate(&["recover", "export", point, "--disk", &name, "--format", format, "--output", s(output), "--control", &control]);
    }

    /// Where every role stands with every disk.
    fn positions(&self) -> String {
        let of = |role: &str| {
            let status = self.json(role, &["status"]);
            let machines = status[0]["machines"].as_array().cloned().unwrap_or_default();
            let disks: Vec<Value> = machines.iter().flat_map(|m| m["disks"].as_array().cloned().unwrap_or_default()).collect();
            disks
                .iter()
                .map(|d| format!("{role} {} {} {} {}", d["name"], d["state"], d["positions"], d["reason"]))
                .collect::<Vec<_>>()
                .join("\n")
        };
        ROLES.iter().filter(|role| self.children.contains_key(**role)).map(|role| of(role)).collect::<Vec<_>>().join("\n")
    }

    /// Waits for something, or fails with what and the logs' ends.
    pub fn wait(&self, what: &str, limit: Duration, mut done: impl FnMut() -> bool) {
        let started = Instant::now();
        while !done() {
            if started.elapsed() > limit {
                let ends: Vec<String> = ROLES.iter().map(|r| format!("--- {r}\n{}", tail(&self.log(r), 15))).collect();
                panic!("waited {limit:?} for: {what}\n{}\n{}", ends.join("\n"), self.positions());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        let running: Vec<String> = self.children.keys().cloned().collect();
        for role in running {
            self.kill(&role);
        }
        if std::thread::panicking() {
            for role in ROLES {
                eprintln!("--- {role}\n{}", tail(&self.log(role), 40));
            }
        }
    }
}

/// What the program calls it.
fn base_role(role: &str) -> &str {
    role.trim_end_matches(|c: char| c == '-' || c.is_ascii_digit())
}

/// Role name of the `n`-th process server, from 0.
pub fn gateway_role(n: usize) -> String {
    if n == 0 { "process-server".to_owned() } else { format!("process-server-{}", n + 1) }
}

fn index_of(role: &str) -> usize {
    ROLES.iter().position(|r| *r == role).expect("a role")
}

fn tail(text: &str, lines: usize) -> String {
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

fn free_ports(count: usize) -> Vec<u16> {
    let held: Vec<_> = (0..count).map(|_| std::net::TcpListener::bind("127.0.0.1:0").expect("a free port")).collect();
    held.iter().map(|l| l.local_addr().expect("bound").port()).collect()
}

/// A path as an argument.
pub fn s(path: &Path) -> &str {
    path.to_str().expect("test paths are UTF-8")
}

/// Runs a tool and demands success. Tools that are missing fail the test with the package to install: `tests/run` installs them.
pub fn tool(name: &str, args: &[&str]) -> String {
    let output = try_tool(name, args);
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{name} {args:?} failed ({:?}): {text}", output.status.code());
    text
}

/// Runs a tool.
pub fn try_tool(name: &str, args: &[&str]) -> Output {
    Command::new(name)
        .args(args)
        .output()
        .unwrap_or_else(|e| panic!("{name}: {e}: run tests through tests/run, which installs what they need"))
}

/// Whether two files hold the same bytes; the longer one's rest counts as a difference.
pub fn same_bytes(a: &Path, b: &Path) -> bool {
    let (a, b) = (File::open(a).expect("first"), File::open(b).expect("second"));
    let len = a.metadata().expect("metadata").len();
    if len != b.metadata().expect("metadata").len() {
        return false;
    }
    let (mut x, mut y) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    let mut at = 0;
    while at < len {
        let step = x.len().min((len - at) as usize);
        a.read_exact_at(&mut x[..step], at).expect("read");
        b.read_exact_at(&mut y[..step], at).expect("read");
        if x[..step] != y[..step] {
            return false;
        }
        at += step as u64;
    }
    true
}
