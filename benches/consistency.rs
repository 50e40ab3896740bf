//! How long writes are held for points: a group of 64 machines with 128 disks, one machine with four disks that are loaded,
//! and what a point every second costs a group of 16. All roles in this process, over loopback, with real certificates, disks
//! and streams. `benches/run consistency`.
#![allow(clippy::unwrap_used, clippy::disallowed_methods, missing_docs, reason = "a benchmark reads the clock")]

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tidegate::agent::Agent;
use tidegate::config::{self, Settings};
use tidegate::control::api::{GroupMarked, GroupValues, GroupView, Marked, Request};
use tidegate::control::{client, server};
use tidegate::coordinator::Coordinator;
use tidegate::crypto::pki::{self, Identity, Role};
use tidegate::master_target::MasterTarget;
use tidegate::model::{Address, ReplicationState};
use tidegate::nbd::client::Client;
use tidegate::process_server::ProcessServer;

struct Site {
    agents: Vec<Agent>,
    gateway: ProcessServer,
    target: MasterTarget,
    coordinator: Coordinator,
    control: Address,
    dir: tempfile::TempDir,
}

fn settings<T: Settings>(text: &str) -> T {
    config::parse(Path::new("bench"), text).unwrap()
}

impl Site {
    async fn start(machines: usize, disks: usize, disk_bytes: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        pki::init(&at("ca")).unwrap();
        let tls = |role: Role, name: &str| {
            let out = at(&format!("tls-{name}"));
            pki::issue(&at("ca"), &Identity { role, name: name.parse().unwrap() }, &out).unwrap();
            format!("[tls]\nca = {:?}\ncert = {:?}\nkey = {:?}\n", out.join("ca.pem"), out.join("cert.pem"), out.join("key.pem"))
        };
        let names: Vec<String> = (0..machines).map(|m| format!("m{m}")).collect();
        let tables = |table: &str, format: &str| -> String {
            let list: Vec<String> = (0..disks).map(|d| format!("\"d{d}\"")).collect();
            let each: String = (0..disks).map(|d| format!("[[machine.disk]]\nname = \"d{d}\"\n{format}")).collect();
            let one = |m: &String| match table {
                "list" => format!("[[machine]]\nname = \"{m}\"\ndisks = [{}]\n", list.join(", ")),
                _ => format!("[[machine]]\nname = \"{m}\"\n{each}"),
            };
            names.iter().map(one).collect()
        };
        let target = MasterTarget::start(settings(&format!(
            "state = {:?}\n{}[receive]\nlisten = \"127.0.0.1:0\"\nmtu = 16000\n{}",
            at("target"),
            tls(Role::MasterTarget, "target"),
            tables("tables", "format = \"raw\"\n")
        )))
        .unwrap();
        let gateway = ProcessServer::start(settings(&format!(
            "state = {:?}\n{}[ingest]\nlisten = \"127.0.0.1:0\"\n[cache]\nsize_max = \"4GiB\"\n[forward]\nmaster_target = \"{}\"\nmtu = 16000\n{}",
            at("gateway"),
            tls(Role::ProcessServer, "gateway"),
            target.listen,
            tables("list", "")
        )))
        .unwrap();
        let coordinator = Coordinator::start(settings(&format!(
            "state = {:?}\n{}[consistency]\nlisten = \"127.0.0.1:0\"\nrest_min = \"60ms\"\n",
            at("coordinator"),
            tls(Role::Coordinator, "coord")
        )))
        .unwrap();
        let mut agents = vec![];
        for name in &names {
            let mut text = format!(
                "machine = \"{name}\"\nstate = {:?}\n{}[process_server]\naddress = \"{}\"\n[points]\ninterval = \"1h\"\n[consistency]\ncoordinator = \"{}\"\nrest_min = \"50ms\"\n",
                at(&format!("agent-{name}")),
                tls(Role::Agent, name),
                gateway.listen,
                coordinator.listen
            );
            for d in 0..disks {
                let path = at(&format!("{name}-d{d}.raw"));
                std::fs::File::create(&path).unwrap().set_len(disk_bytes).unwrap();
                text += &format!("[[disk]]\nname = \"d{d}\"\npath = {path:?}\nnbd = \"unix:{}\"\n", nbd(dir.path(), name, d).display());
            }
            agents.push(Agent::start(settings(&text)).unwrap());
        }
        let control = at("control.sock");
        let listener = server::bind(&control).await.unwrap();
        tokio::spawn(server::serve(listener, vec![coordinator.control(), agents[0].control()]));
        let site = Self { agents, gateway, target, coordinator, control: Address::Unix(control), dir };
        let values = GroupValues { interval_seconds: Some(86400.0), ..GroupValues::default() };
        let _: GroupView = site.call(&Request::GroupCreate { name: "g".to_owned(), machines: names, values }).await;
        loop {
            let groups: Vec<GroupView> = site.call(&Request::Groups).await;
            let delta = |a: &Agent| a.shared.volumes.iter().all(|v| v.report().state == ReplicationState::Delta);
            if groups[0].members.iter().all(|m| m.trouble.is_none()) && site.agents.iter().all(delta) {
                return site;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    async fn call<T: serde::de::DeserializeOwned>(&self, request: &Request) -> T {
        client::call(&self.control, request).await.unwrap()
    }

    /// Held times of every listed point, or of every part of one, in milliseconds, sorted.
    fn holds(&self) -> Vec<f64> {
        let mut all: Vec<f64> = self.target.shared.book().all().iter().map(|p| p.hold_us as f64 / 1e3).collect();
        all.sort_by(f64::total_cmp);
        all
    }

    async fn stop(self) {
        for agent in self.agents {
            agent.stop().await;
        }
        self.coordinator.stop().await;
        self.gateway.stop().await;
        self.target.stop().await;
    }
}

fn nbd(dir: &Path, machine: &str, disk: usize) -> std::path::PathBuf {
    dir.join(format!("{machine}-d{disk}.sock"))
}

/// Writers on every disk, each one write after the other with `pause` between.
struct Load {
    stop: Arc<AtomicBool>,
    written: Arc<AtomicU64>,
    threads: Vec<std::thread::JoinHandle<()>>,
}

impl Load {
    fn start(site: &Site, per_disk: usize, bytes: usize, pause: Duration) -> Self {
        let (stop, written) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let disks: Vec<_> = site
            .agents
            .iter()
            .flat_map(|a| (0..a.shared.volumes.len()).map(|d| nbd(site.dir.path(), a.shared.machine.as_str(), d)).collect::<Vec<_>>())
            .collect();
        let (thread_stop, thread_written) = (stop.clone(), written.clone());
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            let local = tokio::task::LocalSet::new();
            local.block_on(&runtime, async {
                let mut tasks = vec![];
                for (n, path) in disks.into_iter().enumerate() {
                    for writer in 0..per_disk {
                        let (stop, written, address) = (thread_stop.clone(), thread_written.clone(), Address::Unix(path.clone()));
                        tasks.push(tokio::task::spawn_local(async move {
                            let mut disk = Client::connect(&address, "").await.unwrap();
                            let (blocks, mut at) = (disk.size() / bytes as u64, (n * 977 + writer * 131) as u64);
                            let data: Vec<u8> = (0..bytes).map(|i| (i * 31 + writer) as u8).collect();
                            while !stop.load(Ordering::Relaxed) {
                                at = at.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                                disk.write((at >> 20) % blocks * bytes as u64, &data, false).await.unwrap();
                                written.fetch_add(bytes as u64, Ordering::Relaxed);
                                if !pause.is_zero() {
                                    tokio::time::sleep(pause).await;
                                }
                            }
                        }));
                    }
                }
                for task in tasks {
                    task.await.unwrap();
                }
            });
        });
        Self { stop, written, threads: vec![thread] }
    }

    fn stop(self) {
        self.stop.store(true, Ordering::Relaxed);
        self.threads.into_iter().for_each(|t| t.join().unwrap());
    }
}

fn quantile(sorted: &[f64], q: f64) -> f64 {
    sorted[((sorted.len() - 1) as f64 * q) as usize]
}

fn report(what: &str, holds: &[f64]) {
    println!(
        "{what}: held p50 {:.2} ms, p99 {:.2} ms, longest {:.2} ms, of {} holds",
        quantile(holds, 0.5),
        quantile(holds, 0.99),
        holds[holds.len() - 1],
        holds.len()
    );
}

async fn listed(site: &Site, parts: usize) {
    for _ in 0..3000 {
        if site.target.shared.book().all().len() >= parts {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("{parts} parts are not listed within a minute");
}

async fn group_of_64() {
    let site = Site::start(64, 2, 1 << 20).await;
    let load = Load::start(&site, 1, 4096, Duration::from_millis(100));
    tokio::time::sleep(Duration::from_secs(2)).await;
    let (mut parts, mut partial) = (0, 0);
    for _ in 0..60 {
        let made: Result<GroupMarked, _> =
            client::call(&site.control, &Request::GroupMark { group: "g".to_owned(), app: false, label: None }).await;
        if let Ok(made) = made {
            parts += made.members;
            partial += usize::from(!made.missing.is_empty());
        }
        tokio::time::sleep(Duration::from_millis(150)).await;
    }
    load.stop();
    listed(&site, parts).await;
    report(&format!("group of 64 machines, 128 disks, each written 10 times a second, {partial} of 60 points partial"), &site.holds());
    site.stop().await;
}

async fn one_machine_of_four_disks() {
    for (per_disk, pause) in [(1, 0), (4, 0)] {
        let site = Site::start(1, 4, 256 << 20).await;
        let load = Load::start(&site, per_disk, 16 << 10, Duration::from_millis(pause));
        tokio::time::sleep(Duration::from_secs(2)).await;
        let before = (load.written.load(Ordering::Relaxed), Instant::now());
        let mut made = 0;
        for _ in 0..300 {
            let request = Request::Mark { machine: "m0".to_owned(), label: None, app: false, wait_seconds: None };
            made += usize::from(client::call::<Marked>(&site.control, &request).await.is_ok());
            tokio::time::sleep(Duration::from_millis(40)).await;
        }
        let rate = (load.written.load(Ordering::Relaxed) - before.0) as f64 / before.1.elapsed().as_secs_f64() / 1e6;
        load.stop();
        listed(&site, made).await;
        report(
            &format!(
                "one machine, 4 disks, {per_disk} writers on each, 16 KiB past the page cache, {rate:.0} MB/s, {made} of 300 points made"
            ),
            &site.holds(),
        );
        site.stop().await;
    }
}

/// Bytes in turn with and without a point every second.
async fn cost_of_a_point_every_second() {
    let site = Site::start(16, 1, 64 << 20).await;
    let load = Load::start(&site, 2, 16 << 10, Duration::from_millis(2));
    let mut figures = [vec![], vec![]];
    for round in 0..12 {
        let with = round % 2;
        let interval = if with == 1 { 1.0 } else { 86400.0 };
        let values = GroupValues { interval_seconds: Some(interval), ..GroupValues::default() };
        let _: GroupView = site.call(&Request::GroupSet { group: "g".to_owned(), values }).await;
        tokio::time::sleep(Duration::from_secs(1)).await;
        let before = (load.written.load(Ordering::Relaxed), Instant::now());
        tokio::time::sleep(Duration::from_secs(8)).await;
        figures[with].push((load.written.load(Ordering::Relaxed) - before.0) as f64 / before.1.elapsed().as_secs_f64() / 1e6);
    }
    load.stop();
    let groups: Vec<GroupView> = site.call(&Request::Groups).await;
    let points = groups[0].full + groups[0].partial_points;
    figures.iter_mut().for_each(|f| f.sort_by(f64::total_cmp));
    let (without, with) = (quantile(&figures[0], 0.5), quantile(&figures[1], 0.5));
    println!(
        "group of 16 machines under load: {without:.1} MB/s without points, {with:.1} MB/s with a point every second ({points} points): {:+.1} % (medians of 6, spread without points {:.1} to {:.1})",
        (with / without - 1.0) * 100.0,
        figures[0][0],
        figures[0][5]
    );
    site.stop().await;
}

fn main() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        group_of_64().await;
        one_machine_of_four_disks().await;
        cost_of_a_point_every_second().await;
    });
}
