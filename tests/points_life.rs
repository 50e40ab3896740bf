//! Hundreds of recovery points against a model: thinned, pinned, pressed for space, rolled to and back, with the master target
//! killed in the middle of each; and a file system that is full. Every point that is listed comes back exactly.
#![allow(clippy::unwrap_used, clippy::disallowed_methods, reason = "tests may unwrap, and wait by the clock")]

mod support;

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use serde_json::Value;
use support::{Cluster, Options, Rng, s, tool, try_tool};
use tidegate::model::{Address, Extent};
use tidegate::nbd::client::Client;

const DISK: u64 = 6 << 20;
/// Points looked at after each phase, beside the pinned ones.
const SAMPLE: usize = 30;

/// A change of a disk: `seed` says the content, 0 is zeroes.
#[derive(Clone, Copy)]
struct Change {
    disk: usize,
    offset: u64,
    len: u64,
    seed: u64,
}

impl Change {
    fn content(&self) -> Vec<u8> {
        let mut rng = Rng::new(self.seed);
        // Half of it compresses.
        (0..self.len / 8).flat_map(|i| if i % 2 == 0 { self.seed } else { rng.below(u64::MAX) }.to_le_bytes()).collect()
    }

    fn apply(&self, content: &mut [u8]) {
        let place = &mut content[self.offset as usize..(self.offset + self.len) as usize];
        if self.seed == 0 { place.fill(0) } else { place.copy_from_slice(&self.content()) }
    }
}

/// A machine, and all that was ever written to it: a model of any moment is made when it is asked for.
struct Life {
    cluster: Cluster,
    runtime: tokio::runtime::Runtime,
    rng: Rng,
    disks: usize,
    disk_bytes: u64,
    changes: Vec<Change>,
    /// How many changes were made before each point.
    points: HashMap<String, usize>,
    pinned: Vec<String>,
    exported: AtomicUsize,
    mounted: usize,
    kills: usize,
}

impl Life {
    fn start(seed: u64, options: Options) -> Self {
        let (disks, disk_bytes) = (options.disks, options.disk_bytes);
        let mut cluster = Cluster::start(options);
        cluster.wait_for_delta();
        Self {
            cluster,
            runtime: tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap(),
            rng: Rng::new(seed),
            disks,
            disk_bytes,
            changes: Vec::new(),
            points: HashMap::new(),
            pinned: Vec::new(),
            exported: AtomicUsize::new(0),
            mounted: 0,
            kills: 0,
        }
    }

    /// Random changes of every disk, in a hot area and everywhere.
    fn change(&mut self, count: usize, len_max: u64) {
        let mut new = Vec::new();
        for disk in 0..self.disks {
            for _ in 0..count {
                let area = if self.rng.below(3) == 0 { self.disk_bytes } else { self.disk_bytes / 8 };
                let len = (1 + self.rng.below(len_max / 512)) * 512;
                let offset = self.rng.below((area.max(2 * len) - len) / 512) * 512;
                let seed = if self.rng.below(12) == 0 { 0 } else { 1 + self.changes.len() as u64 * 1000 + new.len() as u64 };
                new.push(Change { disk, offset, len, seed });
            }
        }
        let uris: Vec<PathBuf> = (0..self.disks).map(|disk| self.cluster.nbd(disk)).collect();
        self.write(&uris, &new);
        self.changes.append(&mut new);
    }

    fn write(&self, sockets: &[PathBuf], changes: &[Change]) {
        self.runtime.block_on(async {
            for (disk, socket) in sockets.iter().enumerate() {
                let mut client = Client::connect(&Address::Unix(socket.clone()), "").await.unwrap();
                for change in changes.iter().filter(|c| c.disk == disk) {
                    match change.seed {
                        0 => client.zero(Extent::new(change.offset, change.len)).await.unwrap(),
                        _ => client.write(change.offset, &change.content(), false).await.unwrap(),
                    }
                }
                client.flush().await.unwrap();
            }
        });
    }

    /// A disk after so many changes.
    fn model(&self, changes: usize, disk: usize) -> Vec<u8> {
        let mut content = vec![0; self.disk_bytes as usize];
        self.changes[..changes].iter().filter(|c| c.disk == disk).for_each(|c| c.apply(&mut content));
        content
    }

    /// A point, which need not be listed yet.
    fn mark(&mut self) -> String {
        let label = format!("n{}", self.points.len());
        let marked = self.cluster.json("agent", &["point", "mark", "--machine", "m1", "--label", &label]);
        let id = marked["point"].as_str().unwrap_or_else(|| panic!("no point: {marked}")).to_owned();
        self.points.insert(id.clone(), self.changes.len());
        id
    }

    fn mark_some(&mut self, count: usize, changes: usize) {
        for _ in 0..count {
            self.change(changes, 24 << 10);
            self.mark();
        }
    }

    fn settle(&mut self) -> String {
        self.cluster.wait_for_delta();
        let id = self.mark();
        self.cluster.wait("the newest point is listed", Duration::from_secs(60), || self.listed().contains(&id));
        id
    }

    fn listed(&self) -> Vec<String> {
        self.cluster.points().iter().map(|p| p["id"].as_str().unwrap().to_owned()).collect()
    }

    fn pin(&mut self, id: &str) {
        let control = self.cluster.control("master-target");
        if self.cluster.try_tidegate(&["point", "pin", id, "--control", &control]).status.success() {
            self.pinned.push(id.to_owned());
        }
    }

    fn policy(&self, args: &[&str]) {
        let control = self.cluster.control("master-target");
        self.cluster.tidegate(&[&["policy", "set", "--control", &control], args].concat());
    }

    fn restart(&mut self, wait: u64) {
        std::thread::sleep(Duration::from_millis(wait));
        self.cluster.kill("master-target");
        self.kills += 1;
        self.cluster.start_role("master-target");
    }

    /// A random sample of what is listed, and all that is pinned, each with one of its disks, against the model.
    fn check(&mut self, what: &str) {
        let listed = self.listed();
        assert!(self.pinned.iter().all(|p| listed.contains(p)), "{what}: pinned points stay");
        let bad = self.cluster.json("master-target", &["point", "list", "--bad"]);
        assert_eq!(bad.as_array().unwrap().len(), 0, "{what}: {bad}");
        let mut chosen: Vec<String> = self.pinned.clone();
        let mut rest: Vec<String> = listed.iter().filter(|id| self.points.contains_key(*id) && !chosen.contains(id)).cloned().collect();
        for _ in 0..SAMPLE.min(rest.len()) {
            chosen.push(rest.swap_remove(self.rng.below(rest.len() as u64) as usize));
        }
        let todo: Vec<(usize, String, usize)> =
            chosen.into_iter().enumerate().map(|(n, id)| (n, id, self.rng.below(self.disks as u64) as usize)).collect();
        let mounts = todo.iter().rev().take(2).cloned().collect::<Vec<_>>();
        let (next, life) = (AtomicUsize::new(0), &*self);
        let (control, count) = (self.cluster.control("master-target"), todo.len());
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    while let Some((n, id, disk)) = todo.get(next.fetch_add(1, Ordering::Relaxed)) {
                        life.check_export(&control, *n, id, *disk, what);
                    }
                });
            }
        });
        for (n, id, disk) in mounts {
            self.check_mount(&control, n, &id, disk, what);
        }
        eprintln!("{what}: {} points listed, {count} brought back", listed.len());
    }

    fn check_export(&self, control: &str, n: usize, id: &str, disk: usize, what: &str) {
        let (raw, name) = (self.cluster.path(&format!("out-{n}.raw")), format!("d{disk}"));
        let args = ["recover", "export", id, "--disk", &name, "--format", "raw", "--output", s(&raw), "--control", control];
        let output = self.cluster.try_tidegate(&args);
        if !output.status.success() {
            let error = String::from_utf8_lossy(&output.stderr).into_owned();
            // It may have been thinned since the list was read, and only that.
            assert!(error.contains("there is no recovery point") || error.contains("expired"), "{what}: {id}: {error}");
            return;
        }
        self.same(&fs::read(&raw).unwrap(), id, disk, what);
        fs::remove_file(&raw).unwrap();
        self.exported.fetch_add(1, Ordering::Relaxed);
    }

    fn check_mount(&mut self, control: &str, n: usize, id: &str, disk: usize, what: &str) {
        let (socket, name) = (self.cluster.path(&format!("mount-{n}.sock")), format!("d{disk}"));
        let nbd = format!("unix:{}", socket.display());
        let output = self.cluster.try_tidegate(&["recover", "mount", id, "--disk", &name, "--nbd", &nbd, "--detach", "--control", control]);
        if !output.status.success() {
            return;
        }
        self.same(&self.read(&socket), id, disk, what);
        for mount in self.cluster.json("master-target", &["recover", "list"]).as_array().unwrap() {
            if mount["kind"] == "mount" {
                self.cluster.tidegate(&["recover", "unmount", mount["name"].as_str().unwrap(), "--control", control]);
            }
        }
        self.mounted += 1;
    }

    fn read(&self, socket: &Path) -> Vec<u8> {
        self.runtime.block_on(async {
            let mut client = Client::connect(&Address::Unix(socket.to_owned()), "").await.unwrap();
            let mut content = Vec::new();
            while (content.len() as u64) < client.size() {
                let at = content.len() as u64;
                content.extend(client.read(Extent::new(at, (client.size() - at).min(1 << 20))).await.unwrap());
            }
            content
        })
    }

    fn same(&self, got: &[u8], id: &str, disk: usize, what: &str) {
        self.same_as(got, &self.model(self.points[id], disk), &format!("{what}: point {id} (after {} changes), d{disk}", self.points[id]));
    }

    fn same_as(&self, got: &[u8], want: &[u8], what: &str) {
        assert_eq!(got.len(), want.len(), "{what}");
        if got != want {
            let differs: Vec<usize> =
                (0..got.len() / 512).filter(|b| got[b * 512..b * 512 + 512] != want[b * 512..b * 512 + 512]).collect();
            panic!("{what}: {} sectors differ, the first at {}", differs.len(), differs[0] * 512);
        }
    }

    fn failover(&self, args: &[&str]) -> Result<Value, String> {
        let control = self.cluster.control("master-target");
        let output = self.cluster.try_tidegate(&[&["failover"], args, &["--json", "--control", &control]].concat());
        if !output.status.success() {
            return Err(String::from_utf8_lossy(&output.stderr).into_owned());
        }
        Ok(serde_json::from_slice(&output.stdout).unwrap_or(Value::Null))
    }

    /// The newest job at rest.
    fn at_rest(&self) -> Option<Value> {
        let started = Instant::now();
        loop {
            let jobs = self.failover(&["list"]).unwrap();
            // In order or not: the newest has the highest number.
            let newest = jobs.as_array().unwrap().iter().max_by_key(|j| j["id"].as_u64()).cloned();
            let at_work = ["quiescing", "draining", "rolling", "cancelling", "committing"];
            let rests =
                |job: &Value| job["busy"] == false && (!at_work.contains(&job["state"].as_str().unwrap()) || !job["error"].is_null());
            if newest.as_ref().is_none_or(rests) {
                return newest;
            }
            assert!(started.elapsed() < Duration::from_secs(60), "{newest:?} does not come to rest");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// The image itself is the disk as it was at `id`.
    fn check_replicas(&self, id: &str, what: &str) {
        for disk in 0..self.disks {
            let model = self.cluster.path("model.raw");
            fs::write(&model, self.model(self.points[id], disk)).unwrap();
            let replica = self.cluster.replica(disk);
            let output = try_tool("qemu-img", &["compare", "-U", "-f", "raw", "-F", "vhdx", s(&model), s(&replica)]);
            assert!(output.status.success(), "{what}: the replica of d{disk} at {id}: {}", String::from_utf8_lossy(&output.stdout));
        }
    }

    /// Writes to the disks that a job serves; nobody shall see it later.
    fn scribble(&mut self, job: &Value) {
        let sockets: Vec<PathBuf> = job["disks"].as_array().unwrap().iter().map(|d| socket_of(d["nbd"].as_str().unwrap())).collect();
        let mut changes = Vec::new();
        for disk in 0..self.disks {
            for _ in 0..10 {
                let (offset, seed) = (self.rng.below(DISK / 4096 - 16) * 4096, 7_000_000 + self.rng.below(1 << 30));
                changes.push(Change { disk, offset, len: 512 * (1 + self.rng.below(64)), seed });
            }
        }
        self.write(&sockets, &changes);
    }

    fn any_listed(&mut self) -> String {
        let known: Vec<String> = self.listed().into_iter().filter(|id| self.points.contains_key(id)).collect();
        known[self.rng.below(known.len() as u64) as usize].clone()
    }
}

fn socket_of(uri: &str) -> PathBuf {
    PathBuf::from(uri.split_once("socket=").unwrap_or_else(|| panic!("{uri}")).1)
}

fn seed() -> u64 {
    let seed = std::env::var("TIDEGATE_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(20_261_121);
    eprintln!("seed {seed}; TIDEGATE_SEED repeats it");
    seed
}

#[test]
fn hundreds_of_points_stay_exact_over_thinning_pressure_failovers_and_kills() {
    // Memory for a part of what is overwritten.
    let retain = "[retain]\nscrub_every = \"0s\"\n[apply]\ncheckpoint_interval = \"100ms\"\nrecent_max = \"8MiB\"\n".to_owned();
    let options = Options { disk_bytes: DISK, disks: 2, interval: "1h", cache: "writeback", master_target: retain, ..Options::default() };
    let mut life = Life::start(seed(), options);
    // Hundreds of points; some are pinned.
    for n in 0..300 {
        life.change(4, 24 << 10);
        let id = life.mark();
        if n % 40 == 7 {
            life.cluster.wait("it is listed", Duration::from_secs(30), || life.listed().contains(&id));
            life.pin(&id);
        }
    }
    life.settle();
    assert!(life.listed().len() > 300, "all are there: {}", life.listed().len());
    life.check("hundreds of points");
    life.restart(0);
    life.check("after a restart");

    // A ladder thins them; merges follow. Killed again and again meanwhile.
    life.policy(&["--ladder", "all for 10s, 1/2s to 1h", "--yes"]);
    for _ in 0..8 {
        let wait = life.rng.below(700);
        life.mark_some(4, 4);
        life.restart(wait);
    }
    life.cluster.wait_for_delta();
    life.check("thinned, with kills");
    life.policy(&["--ladder", "all for 1s, 1/10s to 1h", "--yes"]);
    for _ in 0..6 {
        // Merges begin a little after a start.
        let wait = 1900 + life.rng.below(600);
        life.mark_some(2, 4);
        life.restart(wait);
    }
    life.settle();
    life.check("thinned more, with kills");

    // Failovers: killed while they begin, roll, change and go back.
    life.policy(&["--reset"]);
    life.mark_some(40, 6);
    life.settle();
    let mut rolls = 0;
    for round in 0..6 {
        let to = life.any_listed();
        let begun = life.failover(&["unplanned", "m1", "--point", &to, "--yes", "--detach"]);
        assert!(begun.is_ok(), "{begun:?}");
        let wait = life.rng.below(60);
        life.restart(wait);
        let Some(mut job) = life.at_rest() else { panic!("a failover that was accepted is remembered") };
        assert_eq!((job["state"].as_str(), job["point"].as_str()), (Some("failed-over"), Some(to.as_str())), "{job}");
        life.check_replicas(&to, "rolled");
        let id = job["id"].to_string();
        for _ in 0..2 {
            life.scribble(&job);
            let to = life.any_listed();
            life.failover(&["change-point", &id, "--point", &to, "--detach"]).unwrap();
            let wait = life.rng.below(50);
            life.restart(wait);
            job = life.at_rest().unwrap();
            assert_eq!((job["state"].as_str(), job["point"].as_str()), (Some("failed-over"), Some(to.as_str())), "{job}");
            life.check_replicas(&to, "rolled to another");
            rolls += 1;
        }
        if round % 3 == 1 {
            life.check("while failed over");
        }
        life.scribble(&job);
        life.failover(&["cancel", &id, "--detach"]).unwrap();
        let wait = life.rng.below(50);
        life.restart(wait);
        let job = life.at_rest().unwrap();
        assert_eq!(job["state"], "cancelled", "{job}");
        life.cluster.wait_for_delta();
        life.mark_some(4, 6);
        rolls += 2;
    }
    let newest = life.settle();
    life.check_replicas(&newest, "replication goes on");
    life.check("after cancelled failovers");

    // Space: the oldest go, one by one, and never one that is pinned.
    let control = life.cluster.control("master-target");
    for id in std::mem::take(&mut life.pinned) {
        life.cluster.tidegate(&["point", "unpin", &id, "--control", &control]);
    }
    let before = life.listed().len();
    let used = |life: &Life| life.cluster.json("master-target", &["policy", "show"])["machines"][0]["retained_bytes"].as_u64().unwrap();
    // What grows has space reserved, of each disk.
    let most = used(&life) / 3 + (16 << 20);
    life.policy(&["--space-max", &most.to_string(), "--yes"]);
    let (mut made, mut rounds) = (0, 0);
    // Until the bound is felt: how much is kept before depends on what was merged by then.
    loop {
        life.mark_some(3, 6);
        (made, rounds) = (made + 3, rounds + 1);
        if rounds % 4 == 0 {
            life.restart(100);
        }
        if rounds >= 12 {
            life.settle();
            made += 1;
            if life.listed().len() < before + made {
                break;
            }
            assert!(rounds < 60, "no point of {before} and {made} new ones went");
        }
    }
    life.cluster.wait("old content fits", Duration::from_secs(30), || used(&life) <= most + (16 << 20));
    life.check("pressed for space");

    // Committed, and killed: it is done or it is not.
    let (to, mut commits) = (life.any_listed(), 0);
    life.failover(&["unplanned", "m1", "--point", &to, "--yes"]).unwrap();
    loop {
        let job = life.at_rest().unwrap();
        life.check_replicas(&to, "before and after the commit");
        match job["state"].as_str().unwrap() {
            "committed" => break,
            "failed-over" => assert!(!life.listed().is_empty()),
            other => panic!("{other} is neither"),
        }
        life.check("not committed");
        let control = life.cluster.control("master-target");
        let id = job["id"].to_string();
        let mut asking = std::process::Command::new(env!("CARGO_BIN_EXE_tidegate"))
            .args(["failover", "commit", "--yes", &id, "--drop-pinned", "--detach", "--control", &control])
            .stderr(std::process::Stdio::null())
            .spawn()
            .unwrap();
        let wait = life.rng.below(25);
        life.restart(wait);
        let _ = asking.wait();
        commits += 1;
    }
    assert_eq!(life.listed().len(), 0);
    println!(
        "{} points made, {} brought back by export and {} by mount, {} kills of the master target, {rolls} rolls, {commits} commits until one was done; 0 differences",
        life.points.len(),
        life.exported.load(Ordering::Relaxed),
        life.mounted,
        life.kills
    );
    assert!(life.points.len() > 400 && life.exported.load(Ordering::Relaxed) > 250);
}

/// A small file system of its own, given back with the test.
struct SmallFileSystem {
    dir: tempfile::TempDir,
}

impl SmallFileSystem {
    fn new(bytes: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("image");
        fs::File::create(&image).unwrap().set_len(bytes).unwrap();
        tool("mkfs.ext4", &["-q", "-F", "-m", "0", s(&image)]);
        let there = dir.path().join("there");
        fs::create_dir(&there).unwrap();
        tool("mount", &["-o", "loop", s(&image), s(&there)]);
        Self { dir }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("there")
    }
}

impl Drop for SmallFileSystem {
    fn drop(&mut self) {
        let _ = try_tool("umount", &["-l", s(&self.path())]);
    }
}

#[test]
fn a_full_file_system_costs_points_by_policy_only_and_pauses_what_does_not_fit() {
    let small = SmallFileSystem::new(160 << 20);
    let ballast = small.path().join("ballast");
    tool("fallocate", &["-l", "16M", s(&ballast)]);
    let target = "[journal]\nsegment = \"4MiB\"\nsize_max = \"32MiB\"\n[retain]\nspace_max = \"48MiB\"\nscrub_every = \"0s\"\n[apply]\ncheckpoint_interval = \"100ms\"\n";
    let options = Options {
        disk_bytes: DISK,
        format: "raw",
        interval: "1h",
        cache: "writeback",
        master_target: target.to_owned(),
        target_state: Some(small.path().join("state")),
        ..Options::default()
    };
    let mut life = Life::start(3, options);
    life.change(40, 1 << 20);
    let reason = |life: &Life| {
        let status = life.cluster.json("master-target", &["status"]);
        (status[0]["health"].as_str().unwrap_or_default().to_owned(), status[0].to_string())
    };
    // By policy first: far more than fits is written, and nothing ever waits.
    for n in 0..140 {
        life.change(8, 1 << 20);
        life.mark();
        if n % 20 == 19 {
            // On a busy machine the agent's backlog would fill up, and its points pause.
            life.settle();
        }
    }
    assert!(!life.cluster.log("master-target").contains("file system is full"), "points went in time");
    let left = life.listed().len();
    assert!(left < 120, "{left}");
    life.check("points went by policy");
    // Without it the file system fills up.
    life.policy(&["--space-max", "1TiB", "--yes"]);
    let mut made = 0;
    while reason(&life).0 != "critical" {
        life.change(8, 1 << 20);
        life.mark();
        made += 1;
        assert!(made < 200, "it fills up");
        std::thread::sleep(Duration::from_millis(100));
    }
    let (_, told) = reason(&life);
    assert!(told.contains("file system is full") && told.contains(s(&small.path())), "{told}");
    life.check("full");
    life.change(8, 1 << 20);
    life.mark();
    life.restart(0);
    // The restart gave back what was reserved for the interval that grew: it may take some more to fill that.
    let mut made = 0;
    while !reason(&life).1.contains("file system is full") {
        life.change(8, 1 << 20);
        life.mark();
        made += 1;
        assert!(made < 400, "it says so again");
        std::thread::sleep(Duration::from_millis(100));
    }
    life.check("full, after a kill");
    // Space is freed by somebody, then by a policy.
    fs::remove_file(&ballast).unwrap();
    life.cluster.wait("it goes on, until it is full again", Duration::from_secs(30), || {
        life.cluster.log("master-target").contains("the replica goes on")
    });
    life.check("some space was freed");
    life.policy(&["--space-max", "40MiB", "--yes"]);
    life.cluster.wait("it goes on", Duration::from_secs(60), || reason(&life).0 == "healthy");
    life.change(8, 1 << 20);
    life.settle();
    life.check("the policy freed space");
    println!(
        "{} points made, {} brought back; the file system was full, and went on",
        life.points.len(),
        life.exported.load(Ordering::Relaxed)
    );
}
