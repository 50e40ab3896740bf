//! Many machines with their agents, one gateway, one master target and a coordinator, as processes; some of them in network
//! namespaces, which can be cut off.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;
use tidegate::control::api::Request;
use tidegate::control::client;
use tidegate::model::Address;

use super::{s, tail, tool};

/// What a test may change.
pub struct EstateOptions {
    /// Machines `m0`, `m1`, ...
    pub machines: usize,
    /// Disks of each.
    pub disks: usize,
    /// Bytes of each disk.
    pub disk_bytes: u64,
    /// Added to every agent's `[consistency]`.
    pub member: String,
    /// Added to every agent's configuration; `@` stands for the test's folder and the machine's name.
    pub agent: String,
    /// Added to the coordinator's `[consistency]`.
    pub consistency: String,
    /// Time between points of a machine alone.
    pub interval: &'static str,
    /// Roles with a network namespace of their own: `coordinator`, `m1`, ...
    pub apart: Vec<&'static str>,
    /// The coordinator runs in the process server.
    pub beside: bool,
    /// The test itself is the coordinator.
    pub test_coordinates: bool,
}

impl Default for EstateOptions {
    fn default() -> Self {
        Self {
            machines: 3,
            disks: 1,
            disk_bytes: 1 << 20,
            member: String::new(),
            agent: String::new(),
            consistency: String::new(),
            interval: "1h",
            apart: vec![],
            beside: false,
            test_coordinates: false,
        }
    }
}

/// Everything.
pub struct Estate {
    /// The test's folder.
    pub dir: TempDir,
    /// What it was made with.
    pub options: EstateOptions,
    children: BTreeMap<String, Child>,
    network: Option<Network>,
    ports: [u16; 3],
    runtime: tokio::runtime::Runtime,
}

impl Estate {
    /// Makes certificates, configuration and disks, and starts everything.
    pub fn start(options: EstateOptions) -> Self {
        Self::start_with(options, |_| {})
    }

    /// The same, with something to do before anything starts.
    pub fn start_with(options: EstateOptions, prepare: impl FnOnce(&Self)) -> Self {
        let held: Vec<_> = (0..3).map(|_| std::net::TcpListener::bind("0.0.0.0:0").expect("a free port")).collect();
        let ports: Vec<u16> = held.iter().map(|l| l.local_addr().expect("bound").port()).collect();
        drop(held);
        let network = (!options.apart.is_empty()).then(|| Network::new(&options.apart));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        let mut estate = Self {
            dir: tempfile::tempdir().expect("a folder"),
            options,
            children: BTreeMap::new(),
            network,
            ports: ports.try_into().expect("three"),
            runtime,
        };
        let ca = estate.path("ca");
        let run = |args: &[&str]| tool(env!("CARGO_BIN_EXE_tidegate"), args);
        run(&["pki", "init", s(&ca)]);
        let mut holders = vec![
            ("coordinator", "coord".to_owned(), "coordinator".to_owned()),
            ("process-server", "gw1".to_owned(), "process-server".to_owned()),
            ("master-target", "mt1".to_owned(), "master-target".to_owned()),
        ];
        holders.extend(estate.machines().into_iter().map(|m| ("agent", m.clone(), m)));
        for (role, name, dir) in &holders {
            let out = estate.path(&format!("tls-{dir}"));
            run(&["pki", "issue", "--ca", s(&ca), "--role", role, "--name", name, "--out", s(&out)]);
        }
        for machine in estate.machines() {
            for disk in 0..estate.options.disks {
                File::create(estate.disk(&machine, disk)).and_then(|f| f.set_len(estate.options.disk_bytes)).expect("a disk");
            }
        }
        estate.write_configs();
        prepare(&estate);
        estate.start_role("master-target");
        estate.start_role("process-server");
        if !estate.options.beside && !estate.options.test_coordinates {
            estate.start_role("coordinator");
        }
        for machine in estate.machines() {
            estate.spawn(&machine);
        }
        for machine in estate.machines() {
            estate.wait_answer(&machine);
        }
        estate
    }

    /// Names of the machines.
    pub fn machines(&self) -> Vec<String> {
        (0..self.options.machines).map(|i| format!("m{i}")).collect()
    }

    fn write_configs(&self) {
        let [ingest, forward, consistency] = self.ports;
        let common = |name: &str| {
            let d = self.path(&format!("tls-{name}"));
            let files = ["ca", "cert", "key"].map(|f| format!("{f} = {:?}", d.join(format!("{f}.pem"))));
            (files.join("\n"), format!("listen = \"unix:{}\"\n", self.path(&format!("{name}.sock")).display()))
        };
        let host = |of: &str| self.network.as_ref().map_or_else(|| "127.0.0.1".to_owned(), |n| n.address(of));
        let coordinator = if self.options.beside { "process-server" } else { "coordinator" };
        let disks: Vec<String> = (0..self.options.disks).map(|d| format!("\"d{d}\"")).collect();
        let machines = self.machines();
        for machine in &machines {
            let (tls, control) = common(machine);
            let mut text = format!(
                "machine = \"{machine}\"\nstate = {:?}\n[tls]\n{tls}\n[control]\n{control}[process_server]\naddress = \"{}:{ingest}\"\n[points]\ninterval = \"{}\"\n[consistency]\ncoordinator = \"{}:{consistency}\"\n{}\n",
                self.path(&format!("state-{machine}")),
                host("process-server"),
                self.options.interval,
                host(coordinator),
                self.options.member
            );
            text += &self.options.agent.replace('@', &self.path(machine).display().to_string());
            for disk in 0..self.options.disks {
                let (path, nbd) = (self.disk(machine, disk), self.nbd(machine, disk));
                text += &format!("[[disk]]\nname = \"d{disk}\"\npath = {path:?}\nnbd = \"{nbd}\"\ncache = \"writeback\"\n");
            }
            fs::write(self.config(machine), text).expect("a configuration");
        }
        let table: String = machines.iter().map(|m| format!("[[machine]]\nname = \"{m}\"\ndisks = [{}]\n", disks.join(", "))).collect();
        let (tls, control) = common("process-server");
        let mut gateway = format!(
            "state = {:?}\n[tls]\n{tls}\n[control]\n{control}[ingest]\nlisten = \"0.0.0.0:{ingest}\"\n[cache]\nsize_max = \"1GiB\"\n[forward]\nmaster_target = \"127.0.0.1:{forward}\"\nmtu = 8952\n{table}",
            self.path("state-process-server")
        );
        let (tls, control) = common("coordinator");
        let members = format!("listen = \"0.0.0.0:{consistency}\"\n{}\n", self.options.consistency);
        let state = self.path("state-coordinator");
        gateway += &if self.options.beside {
            format!(
                "[coordinator]\nstate = {state:?}\n[coordinator.tls]\n{tls}\n[coordinator.control]\n{control}[coordinator.consistency]\n{members}"
            )
        } else {
            String::new()
        };
        fs::write(self.config("process-server"), gateway).expect("a configuration");
        let coordinator = format!("state = {state:?}\n[tls]\n{tls}\n[control]\n{control}[consistency]\n{members}");
        fs::write(self.config("coordinator"), coordinator).expect("a configuration");
        let (tls, control) = common("master-target");
        let mut target = format!(
            "state = {:?}\n[tls]\n{tls}\n[control]\n{control}[receive]\nlisten = \"127.0.0.1:{forward}\"\nmtu = 8952\n[retain]\nladder = \"all for 1d\"\n",
            self.path("state-master-target")
        );
        for machine in &machines {
            target += &format!("[[machine]]\nname = \"{machine}\"\n");
            for disk in 0..self.options.disks {
                target += &format!("[[machine.disk]]\nname = \"d{disk}\"\nformat = \"raw\"\n");
            }
        }
        fs::write(self.config("master-target"), target).expect("a configuration");
    }

    /// A path in the test's folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Configuration of a role, or of the agent of a machine.
    pub fn config(&self, name: &str) -> PathBuf {
        self.path(&format!("{name}.toml"))
    }

    /// Where members look for the coordinator.
    pub fn consistency_port(&self) -> u16 {
        self.ports[2]
    }

    fn disk(&self, machine: &str, disk: usize) -> PathBuf {
        self.path(&format!("{machine}-d{disk}.raw"))
    }

    /// Where a disk's export listens.
    pub fn nbd(&self, machine: &str, disk: usize) -> Address {
        Address::Unix(self.path(&format!("{machine}-d{disk}.nbd")))
    }

    /// Control socket of a role, or of the agent of a machine.
    pub fn control(&self, name: &str) -> Address {
        Address::Unix(self.path(&format!("{name}.sock")))
    }

    fn spawn(&mut self, name: &str) {
        let role = if name.starts_with('m') && name != "master-target" { "agent" } else { name };
        let log = File::options().create(true).append(true).open(self.path(&format!("{name}.log"))).expect("a log");
        let mut command = match self.network.as_ref().and_then(|n| n.namespace(name)) {
            Some(namespace) => {
                let mut command = Command::new("ip");
                command.args(["netns", "exec", &namespace, env!("CARGO_BIN_EXE_tidegate")]);
                command
            }
            None => Command::new(env!("CARGO_BIN_EXE_tidegate")),
        };
        let child = command.args([role, "--config", s(&self.config(name))]).stdout(Stdio::null()).stderr(log).spawn();
        self.children.insert(name.to_owned(), child.expect("the program starts"));
    }

    fn wait_answer(&self, name: &str) {
        let control = self.control(name);
        self.wait(&format!("{name} answers"), Duration::from_secs(60), || self.call::<Value>(&control, &Request::Status).is_ok());
    }

    /// Starts a role, or the agent of a machine, and waits until it answers.
    pub fn start_role(&mut self, name: &str) {
        self.spawn(name);
        self.wait_answer(name);
    }

    /// SIGKILL.
    pub fn kill(&mut self, name: &str) {
        if let Some(mut child) = self.children.remove(name) {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// SIGSTOP, or SIGCONT.
    pub fn pause(&self, name: &str, paused: bool) {
        let pid = self.children[name].id().to_string();
        tool("kill", &[if paused { "-STOP" } else { "-CONT" }, &pid]);
    }

    /// Cuts a role off that has a namespace of its own, or heals it.
    pub fn cut(&self, name: &str, cut: bool) {
        self.network.as_ref().expect("a network").cut(name, cut);
    }

    /// Asks a server.
    pub fn call<T: serde::de::DeserializeOwned>(&self, control: &Address, request: &Request) -> Result<T, String> {
        self.runtime.block_on(client::call(control, request)).map_err(|e| e.to_string())
    }

    /// Runs the program and takes its JSON.
    pub fn json(&self, name: &str, args: &[&str]) -> Value {
        let control = self.control(name).to_string();
        let output = super::try_tool(env!("CARGO_BIN_EXE_tidegate"), &[args, &["--json", "--control", &control]].concat());
        serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{args:?}: {e}: {}", String::from_utf8_lossy(&output.stderr)))
    }

    /// A role's log so far.
    pub fn log(&self, name: &str) -> String {
        fs::read_to_string(self.path(&format!("{name}.log"))).unwrap_or_default()
    }

    /// Waits for something, or fails with what.
    pub fn wait(&self, what: &str, limit: Duration, mut done: impl FnMut() -> bool) {
        let started = Instant::now();
        while !done() {
            assert!(started.elapsed() <= limit, "waited {limit:?} for: {what}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

impl Drop for Estate {
    fn drop(&mut self) {
        let names: Vec<String> = self.children.keys().cloned().collect();
        for name in &names {
            // A paused process dies all the same.
            self.kill(name);
        }
        if std::thread::panicking() {
            for name in &names {
                eprintln!("--- {name}\n{}", tail(&self.log(name), 12));
            }
        }
    }
}

/// A bridge with namespaces on it. Gone with the test.
struct Network {
    id: u32,
    apart: Vec<&'static str>,
}

impl Network {
    fn new(apart: &[&'static str]) -> Self {
        let network = Self { id: std::process::id() % 50_000, apart: apart.to_vec() };
        let ip = |args: &str| tool("ip", &args.split_whitespace().collect::<Vec<_>>());
        let bridge = network.bridge();
        ip(&format!("link add {bridge} type bridge"));
        ip(&format!("addr add {}/24 dev {bridge}", network.address("")));
        ip(&format!("link set {bridge} up"));
        for (index, name) in apart.iter().enumerate() {
            let (namespace, cable) = (network.namespace(name).expect("its own"), network.cable(index));
            ip(&format!("netns add {namespace}"));
            ip(&format!("link add {cable} type veth peer name eth0 netns {namespace}"));
            ip(&format!("link set {cable} master {bridge} up"));
            ip(&format!("-n {namespace} addr add {}/24 dev eth0", network.address(name)));
            ip(&format!("-n {namespace} link set eth0 up"));
            ip(&format!("-n {namespace} link set lo up"));
        }
        network
    }

    fn bridge(&self) -> String {
        format!("tg{}b", self.id)
    }

    fn cable(&self, index: usize) -> String {
        format!("tg{}v{index}", self.id)
    }

    fn place(&self, name: &str) -> Option<usize> {
        self.apart.iter().position(|n| *n == name)
    }

    fn namespace(&self, name: &str) -> Option<String> {
        self.place(name).map(|index| format!("tg{}-{index}", self.id))
    }

    /// Where a role is reached; of those that are not apart, the bridge.
    fn address(&self, name: &str) -> String {
        let last = self.place(name).map_or(1, |index| index + 2);
        format!("10.213.{}.{last}", self.id % 250)
    }

    fn cut(&self, name: &str, cut: bool) {
        let cable = self.cable(self.place(name).expect("apart"));
        tool("ip", &["link", "set", &cable, if cut { "down" } else { "up" }]);
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for name in &self.apart {
            let _ = super::try_tool("ip", &["netns", "del", &self.namespace(name).expect("its own")]);
        }
        let _ = super::try_tool("ip", &["link", "del", &self.bridge()]);
    }
}
