//! A process server and a master target for several machines, whose agents are stand-ins.
#![allow(clippy::disallowed_methods, unreachable_pub, missing_docs, reason = "a part of the tests")]

use std::collections::HashMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;
use tidegate::model::{GroupPart, MachineId, PointId, PointKind};

use super::feeder::Feeder;
use super::support::{s, tool};

/// Of points of groups.
static SEQUENCE: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(1);

/// Both servers and the machines.
pub struct Site {
    dir: TempDir,
    children: HashMap<&'static str, Child>,
    ports: Vec<u16>,
    /// The machines by name.
    pub machines: HashMap<String, Feeder>,
    /// What every disk of every machine held at each group point that was asked for.
    pub models: HashMap<PointId, HashMap<String, Vec<Vec<u8>>>>,
    epoch: u64,
}

impl Site {
    /// Starts the servers and the machines, given with their number of disks. `target` is added to the master target's
    /// configuration.
    pub fn start(machines: &[(&str, usize)], target: &str) -> Self {
        let dir = tempfile::tempdir().expect("a folder for the test");
        let held: Vec<_> = (0..4).map(|_| std::net::TcpListener::bind("127.0.0.1:0").expect("a free port")).collect();
        let ports: Vec<u16> = held.iter().map(|l| l.local_addr().expect("bound").port()).collect();
        drop(held);
        let mut site = Self { dir, children: HashMap::new(), ports, machines: HashMap::new(), models: HashMap::new(), epoch: 1 };
        let ca = site.path("ca");
        site.tidegate(&["pki", "init", s(&ca)]);
        let agents = machines.iter().map(|(name, _)| ("agent", *name));
        for (role, name) in [("process-server", "gw1"), ("master-target", "mt1"), ("coordinator", "coord")].into_iter().chain(agents) {
            site.tidegate(&[
                "pki",
                "issue",
                "--ca",
                s(&ca),
                "--role",
                role,
                "--name",
                name,
                "--out",
                s(&site.path(&format!("tls-{name}"))),
            ]);
        }
        site.configure(machines, target);
        for role in ["master-target", "process-server"] {
            site.start_role(role);
        }
        for (name, disks) in machines {
            let feeder = Feeder::start(name, *disks, &site.path(&format!("tls-{name}")), &site.path("tls-coord"), site.ports[0]);
            site.machines.insert((*name).to_owned(), feeder);
        }
        site
    }

    fn configure(&self, machines: &[(&str, usize)], target: &str) {
        let common = |role: &str, name: &str, metrics: u16| {
            let d = self.path(&format!("tls-{name}"));
            format!(
                "state = {:?}\n[tls]\nca = {:?}\ncert = {:?}\nkey = {:?}\n[control]\nlisten = \"{}\"\n[metrics]\nlisten = \"127.0.0.1:{metrics}\"\n",
                self.path(role),
                d.join("ca.pem"),
                d.join("cert.pem"),
                d.join("key.pem"),
                self.control(role)
            )
        };
        let [ingest, forward, metrics @ ..] = &self.ports[..] else { unreachable!("four ports") };
        let mut gateway = common("process-server", "gw1", metrics[0]);
        gateway += &format!("[ingest]\nlisten = \"127.0.0.1:{ingest}\"\n[forward]\nmaster_target = \"127.0.0.1:{forward}\"\n");
        let mut far = common("master-target", "mt1", metrics[1]);
        far += &format!("[receive]\nlisten = \"127.0.0.1:{forward}\"\n[apply]\ncheckpoint_interval = \"100ms\"\n{target}");
        for (name, disks) in machines {
            let names: Vec<String> = (0..*disks).map(|n| format!("\"d{n}\"")).collect();
            gateway += &format!("[[machine]]\nname = \"{name}\"\ndisks = [{}]\n", names.join(", "));
            far += &format!("[[machine]]\nname = \"{name}\"\n");
            (0..*disks).for_each(|n| far += &format!("[[machine.disk]]\nname = \"d{n}\"\nformat = \"raw\"\n"));
        }
        for (role, text) in [("process-server", gateway), ("master-target", far)] {
            fs::write(self.path(&format!("{role}.toml")), text).expect("a configuration");
        }
    }

    /// A path in the test's folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn control(&self, role: &str) -> String {
        format!("unix:{}", self.path(&format!("{role}.sock")).display())
    }

    /// Starts a server and waits until it answers.
    pub fn start_role(&mut self, role: &'static str) {
        let log = File::options().create(true).append(true).open(self.path(&format!("{role}.log"))).expect("a log");
        let config = self.path(&format!("{role}.toml"));
        let child = Command::new(env!("CARGO_BIN_EXE_tidegate"))
            .args([role, "--config", s(&config)])
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .expect("the program starts");
        self.children.insert(role, child);
        let control = self.control(role);
        self.wait(&format!("{role} answers"), || self.try_tidegate(&["status", "--control", &control]).status.code() != Some(3));
    }

    /// SIGKILL.
    pub fn kill(&mut self, role: &str) {
        if let Some(mut child) = self.children.remove(role) {
            child.kill().expect("we may kill our own child");
            child.wait().expect("it ends");
        }
    }

    fn try_tidegate(&self, args: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_tidegate")).args(args).output().expect("the program runs")
    }

    fn tidegate(&self, args: &[&str]) -> String {
        let output = self.try_tidegate(args);
        assert!(output.status.success(), "tidegate {args:?} failed: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Asks the master target, for people.
    pub fn ask(&self, args: &[&str]) -> String {
        let control = self.control("master-target");
        self.tidegate(&[args, &["--control", &control]].concat())
    }

    /// Asks the master target, for programs. Some answers come with an exit code of their own.
    pub fn json(&self, args: &[&str]) -> Value {
        let control = self.control("master-target");
        let output = self.try_tidegate(&[args, &["--json", "--control", &control]].concat());
        serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{args:?}: {e}: {}", String::from_utf8_lossy(&output.stderr)))
    }

    /// Something that must be refused, and why it was.
    pub fn refused(&self, args: &[&str]) -> String {
        let control = self.control("master-target");
        let output = self.try_tidegate(&[args, &["--control", &control]].concat());
        assert!(!output.status.success(), "{args:?} must be refused: {}", String::from_utf8_lossy(&output.stdout));
        String::from_utf8_lossy(&output.stderr).into_owned()
    }

    /// Metrics of the master target.
    pub fn metrics(&self) -> String {
        use std::io::{Read, Write};
        let mut stream = std::net::TcpStream::connect(("127.0.0.1", self.ports[3])).expect("metrics are served");
        stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").expect("a request");
        let mut text = String::new();
        stream.read_to_string(&mut text).expect("an answer");
        text
    }

    /// Writes to every machine, then puts an honest round of group `shop` into the streams of `members`; `absent` are not in it.
    pub fn round(&mut self, members: &[&str], absent: &[&str], kind: PointKind, label: Option<&str>) -> PointId {
        let statement = self.statement(members, absent);
        let pattern = self.models.len() as u8 * 7 + 1;
        for (n, name) in members.iter().enumerate() {
            let machine = self.machines.get_mut(*name).expect("a machine");
            for disk in 0..machine.disks.len() {
                machine.write(disk, (usize::from(pattern) * 3 + n) * 4096 % (1 << 19), pattern + n as u8, 64 << 10);
            }
            machine.mark(machine.part(&statement, kind, label));
        }
        let images = members.iter().map(|name| ((*name).to_owned(), self.machines[*name].images())).collect();
        self.models.insert(statement.point, images);
        statement.point
    }

    /// What the parts of a new round state.
    pub fn statement(&self, members: &[&str], absent: &[&str]) -> GroupPart {
        let mut ids: Vec<MachineId> = members.iter().map(|n| MachineId::from_name(&n.parse().expect("a name"))).collect();
        ids.sort_unstable();
        let mut missing: Vec<_> = absent.iter().map(|n| n.parse().expect("a name")).collect();
        missing.sort();
        let point = PointId(uuid::Uuid::new_v4());
        GroupPart {
            point,
            group: "shop".parse().expect("a name"),
            epoch: self.epoch,
            sequence: SEQUENCE.fetch_add(1, std::sync::atomic::Ordering::Relaxed),
            members: ids,
            missing,
        }
    }

    /// Listed points of the group; none before the group is known.
    pub fn group_points(&self) -> Vec<Value> {
        let control = self.control("master-target");
        let output = self.try_tidegate(&["point", "list", "--group", "shop", "--json", "--control", &control]);
        serde_json::from_slice(&output.stdout).unwrap_or_default()
    }

    /// Waits until a point of the group is listed.
    pub fn wait_listed(&self, point: PointId) {
        self.wait(&format!("point {point} of the group is listed"), || self.group_points().iter().any(|p| p["id"] == point.to_string()));
    }

    /// How the group does.
    pub fn status(&self) -> Value {
        self.json(&["status"])[0]["groups"][0].clone()
    }

    /// The disks that the jobs serve hold what their machines held at a group point.
    pub fn check_served(&self, jobs: &Value, point: PointId) {
        let models = &self.models[&point];
        let jobs = jobs.as_array().expect("jobs");
        assert_eq!(jobs.len(), models.len(), "a job for each machine: {jobs:?}");
        for job in jobs {
            let name = job["machine"].as_str().expect("a machine");
            for (disk, model) in job["disks"].as_array().expect("disks").iter().zip(&models[name]) {
                self.check_disk(disk["nbd"].as_str().expect("served"), model, &format!("{name} at {point}"));
            }
        }
    }

    /// What is served holds these bytes.
    pub fn check_disk(&self, uri: &str, model: &[u8], what: &str) {
        let copy = self.path("served.raw");
        tool("nbdcopy", &[uri, s(&copy)]);
        let same = fs::read(&copy).expect("a copy") == model;
        fs::remove_file(&copy).expect("ours");
        assert!(same, "{what} differs from its model");
    }

    /// Waits for something, or fails with what and the log's end.
    pub fn wait(&self, what: &str, mut done: impl FnMut() -> bool) {
        let started = Instant::now();
        while !done() {
            assert!(started.elapsed() < Duration::from_secs(90), "waited for: {what}\n{}", self.log());
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// The end of the servers' logs.
    pub fn log(&self) -> String {
        let read = |path: &Path| fs::read_to_string(path).unwrap_or_default();
        let end = |text: String| text.lines().rev().take(15).map(str::to_owned).collect::<Vec<_>>().join("\n");
        ["process-server", "master-target"].map(|role| end(read(&self.path(&format!("{role}.log"))))).join("\n---\n")
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        for role in ["process-server", "master-target"] {
            self.kill(role);
        }
    }
}
