//! Power loss under the running servers, block by block: their state lies on a real file system whose device logs every write
//! and flush; after any cut through that log the file system, then the server recovers, and what was promised before it is there.
#![allow(clippy::unwrap_used, clippy::disallowed_methods, reason = "tests may unwrap, and wait by the clock")]

mod support;

use std::collections::BTreeMap;
use std::time::Duration;

use support::block_log::{Aftermath, Kind, Recorder, Recording, demand};
use support::{Cluster, Options, Rng, s};
use tidegate::model::Address;
use tidegate::nbd::client::Client;

const SIZE: u64 = 8 << 20;
const SECTOR: usize = 512;
/// How long a server may take to recover.
const START: Duration = Duration::from_secs(20);
/// Points that the master target keeps while it is recorded: older ones go.
const POINTS: usize = 6;

fn seed() -> u64 {
    std::env::var("TIDEGATE_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(20_261_125)
}

/// How many states: what fits, or what the environment says.
fn states(usual: usize) -> usize {
    std::env::var("TIDEGATE_POWER_STATES").ok().and_then(|s| s.parse().ok()).unwrap_or(usual)
}

/// `epoch:sequence`, in an order.
type Position = (u64, u64);

fn position(text: &str) -> Position {
    let (epoch, sequence) = text.split_once(':').unwrap();
    (epoch.parse().unwrap(), sequence.parse().unwrap())
}

/// A point, and the cuts after which it must be listed.
struct Kept {
    from: u64,
    until: u64,
    model: Vec<u8>,
}

/// What was promised, each with the length of the log by when it was.
#[derive(Default)]
struct Promises {
    positions: Vec<(u64, Position)>,
    points: BTreeMap<String, Kept>,
    /// Points that were marked and not seen in the list yet.
    marked: BTreeMap<String, Vec<u8>>,
}

impl Promises {
    fn position(&mut self, recorder: &Recorder, promised: Position) {
        if self.positions.last().is_none_or(|(_, last)| *last < promised) {
            self.positions.push((recorder.entries(), promised));
        }
    }

    fn points(&mut self, recorder: &Recorder, cluster: &Cluster) {
        let before = recorder.entries();
        let listed: Vec<String> = cluster.points().iter().map(|p| p["id"].as_str().unwrap().to_owned()).collect();
        let after = recorder.entries();
        for id in listed {
            if let Some(model) = self.marked.remove(&id) {
                self.points.insert(id.clone(), Kept { from: after, until: after, model });
            }
            if let Some(kept) = self.points.get_mut(&id) {
                kept.until = kept.until.max(before);
            }
        }
    }

    /// The highest position promised before `cut`.
    fn position_at(&self, cut: u64) -> Position {
        self.positions.iter().filter(|(at, _)| *at <= cut).map(|(_, position)| *position).max().unwrap_or_default()
    }

    fn points_at(&self, cut: u64) -> impl Iterator<Item = (&String, &Kept)> {
        self.points.iter().filter(move |(_, kept)| (kept.from..=kept.until).contains(&cut))
    }
}

/// Writes to the disk of the machine, and knows what it holds.
struct Writer {
    runtime: tokio::runtime::Runtime,
    client: Client,
    model: Vec<u8>,
    rng: Rng,
    writes: u64,
}

impl Writer {
    fn connect(cluster: &Cluster, seed: u64) -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let client = runtime.block_on(Client::connect(&Address::Unix(cluster.nbd(0)), "")).unwrap();
        Self { runtime, client, model: vec![0; SIZE as usize], rng: Rng::new(seed), writes: 0 }
    }

    /// Sectors that say where they belong and which write they are of; the rest does not compress.
    fn write(&mut self) {
        self.writes += 1;
        let len = (1 + self.rng.below(64)) as usize * SECTOR;
        let offset = self.rng.below((SIZE - len as u64) / SECTOR as u64) as usize * SECTOR;
        if self.rng.below(12) == 0 {
            self.runtime.block_on(self.client.zero(tidegate::model::Extent::new(offset as u64, len as u64))).unwrap();
            self.model[offset..offset + len].fill(0);
            return;
        }
        let mut data = Vec::with_capacity(len);
        for at in (offset..offset + len).step_by(SECTOR) {
            data.extend((at as u64).to_le_bytes());
            data.extend(self.writes.to_le_bytes());
            while !data.len().is_multiple_of(SECTOR) {
                data.extend((self.rng.below(1 << 40) as u32).to_le_bytes());
            }
        }
        self.runtime.block_on(self.client.write(offset as u64, &data, self.writes.is_multiple_of(8))).unwrap();
        self.model[offset..offset + len].copy_from_slice(&data);
    }
}

/// A rung of the agent's ladder.
fn rung(cluster: &Cluster, name: &str) -> Position {
    let disk = cluster.agent_disk(0);
    let rungs = disk["positions"].as_array().unwrap();
    rungs.iter().find(|r| r[0] == name).map(|r| position(r[1].as_str().unwrap())).unwrap()
}

/// A rung of a server that was started after a power loss, once it shows one.
fn recovered_rung(cluster: &Cluster, role: &str, name: &str) -> Position {
    let mut found = None;
    cluster.wait("a position is shown", Duration::from_secs(5), || {
        let status = cluster.json(role, &["status"]);
        let rungs = status[0]["machines"][0]["disks"][0]["positions"].as_array().cloned().unwrap_or_default();
        found = rungs.iter().find(|r| r[0] == name).map(|r| position(r[1].as_str().unwrap()));
        found.is_some()
    });
    found.unwrap()
}

/// A recording, and what was promised in it.
struct Session {
    cluster: Cluster,
    recording: Recording,
    promises: Promises,
    /// Length of the log when replication was in delta, and when the server was gone.
    delta: u64,
    end: u64,
}

fn record_master_target(kind: Kind, format: &'static str) -> (Session, Aftermath) {
    let recorder = Recorder::start(kind);
    let target = format!(
        "[journal]\nsegment = \"4MiB\"\nsize_max = \"16MiB\"\n[apply]\ncheckpoint_interval = \"100ms\"\n[retain]\npoints_max = {POINTS}\n"
    );
    let state = Some(recorder.point().join("state"));
    let options = Options { disk_bytes: SIZE, format, interval: "1h", master_target: target, target_state: state, ..Options::default() };
    let mut cluster = Cluster::start(options);
    cluster.wait_for_delta();
    let delta = recorder.entries();
    let (mut promises, mut writer) = (Promises::default(), Writer::connect(&cluster, seed()));
    for round in 0..100 {
        (0..10).for_each(|_| writer.write());
        promises.position(&recorder, rung(&cluster, "safe"));
        if round % 6 == 5 {
            let point = cluster.mark_unlisted(&format!("round-{round}"));
            promises.marked.insert(point, writer.model.clone());
        }
        promises.points(&recorder, &cluster);
    }
    let settled = std::time::Instant::now();
    while settled.elapsed() < Duration::from_secs(2) && !promises.marked.is_empty() {
        promises.position(&recorder, rung(&cluster, "safe"));
        promises.points(&recorder, &cluster);
    }
    let end = recorder.entries();
    println!(
        "recorded: {} writes, {} positions, {} points, {end} log entries",
        writer.writes,
        promises.positions.len(),
        promises.points.len()
    );
    // What is in the journal is applied after the restart, and brings points for which others would go at once.
    let config = std::fs::read_to_string(cluster.config("master-target")).unwrap();
    let keeping = config.replace(&format!("points_max = {POINTS}"), "points_max = 1000");
    assert_ne!(config, keeping, "the policy is in the configuration");
    std::fs::write(cluster.config("master-target"), keeping).unwrap();
    finish(cluster, recorder, promises, delta, end)
}

fn record_process_server(kind: Kind) -> (Session, Aftermath) {
    let recorder = Recorder::start(kind);
    let gateway = "[cache]\nsegment = \"4MiB\"\nsize_max = \"16MiB\"\n".to_owned();
    let state = Some(recorder.point().join("state"));
    let options = Options { disk_bytes: SIZE, interval: "1h", process_server: gateway, gateway_state: state, ..Options::default() };
    let mut cluster = Cluster::start(options);
    cluster.wait_for_delta();
    let delta = recorder.entries();
    let (mut promises, mut writer) = (Promises::default(), Writer::connect(&cluster, seed()));
    for round in 0..120 {
        // Without a master target, what is cached stays in the cache.
        match round % 40 {
            10 => cluster.kill("master-target"),
            30 => cluster.start_role("master-target"),
            _ => {}
        }
        (0..8).for_each(|_| writer.write());
        promises.position(&recorder, rung(&cluster, "cached"));
    }
    let end = recorder.entries();
    println!("recorded: {} writes, {} positions, {end} log entries", writer.writes, promises.positions.len());
    finish(cluster, recorder, promises, delta, end)
}

fn finish(mut cluster: Cluster, recorder: Recorder, promises: Promises, delta: u64, end: u64) -> (Session, Aftermath) {
    for role in support::ROLES {
        cluster.kill(role);
    }
    let point = recorder.point();
    let recording = recorder.stop();
    // Dropped after the cluster: servers are gone before the file system is.
    (Session { cluster, recording, promises, delta, end }, Aftermath::new(point))
}

/// What was found over many states.
#[derive(Default)]
struct Tally {
    states: usize,
    positions: usize,
    points: usize,
    violations: Vec<String>,
    /// States with at least one.
    bad: usize,
}

/// Loses power at random moments, most of them soon after a promise, and looks at each state.
fn lose_power(
    (session, aftermath): (&mut Session, &Aftermath),
    count: usize,
    lying: bool,
    check: impl Fn(&mut Session, &Aftermath, u64, &mut Tally) -> Result<(), String>,
) -> Tally {
    let mut rng = Rng::new(seed() + u64::from(lying));
    let promised: Vec<u64> = session.promises.positions.iter().map(|(at, _)| *at).filter(|at| *at >= session.delta).collect();
    let mut cuts: Vec<u64> = (0..count)
        .map(|n| match n % 6 {
            0 if !lying => rng.below(session.delta),
            1 | 2 if !lying => session.delta + rng.below(session.end - session.delta),
            _ => promised[rng.below(promised.len() as u64) as usize] + rng.below(4),
        })
        .map(|cut| cut.min(session.end))
        .collect();
    cuts.sort_unstable();
    let recording = std::mem::take(&mut session.recording);
    let mut replay = recording.replay();
    let mut tally = Tally::default();
    for cut in cuts {
        // As many flushes as lie between two looks at a position.
        let forgotten = if lying { 1 + rng.below(12) as usize } else { 0 };
        replay.lose_power(cut, forgotten, &mut rng, &aftermath.image());
        let before = tally.violations.len();
        let looked = aftermath.mount().and_then(|()| check(session, aftermath, cut, &mut tally));
        for role in support::ROLES {
            session.cluster.kill(role);
        }
        aftermath.unmount();
        tally.violations.extend(looked.err().map(|e| format!("cut {cut}: {e}")));
        tally.bad += usize::from(tally.violations.len() > before);
        tally.states += 1;
    }
    session.recording = recording;
    tally
}

fn check_master_target(session: &mut Session, format: &str, cut: u64, tally: &mut Tally) -> Result<(), String> {
    let Session { cluster, promises, delta, .. } = session;
    if cut >= *delta {
        let image = cluster.replica(0);
        let checked = cluster.try_tidegate(&["check", "image", "--format", format, s(&image)]);
        if !checked.status.success() {
            return Err(format!("the replica is not clean: {}", String::from_utf8_lossy(&checked.stdout)));
        }
    }
    cluster.try_start_role("master-target", START)?;
    let promised = promises.position_at(cut);
    if promised > Position::default() {
        let found = recovered_rung(cluster, "master-target", "journaled");
        if found < promised {
            tally.violations.push(format!("cut {cut}: {promised:?} was safe, {found:?} is journaled"));
        }
        tally.positions += 1;
    }
    let listed: Vec<String> = cluster.points().iter().map(|p| p["id"].as_str().unwrap().to_owned()).collect();
    let out = cluster.path("out.raw");
    for (id, kept) in promises.points_at(cut) {
        if !listed.contains(id) {
            tally.violations.push(format!("cut {cut}: point {id} was listed and is not"));
            continue;
        }
        let control = cluster.control("master-target");
        let args = ["recover", "export", id, "--disk", "d0", "--format", "raw", "--output", s(&out), "--control", &control];
        let exported = cluster.try_tidegate(&args);
        if !exported.status.success() {
            tally.violations.push(format!("cut {cut}: point {id}: {}", String::from_utf8_lossy(&exported.stderr)));
        } else if std::fs::read(&out).unwrap() != kept.model {
            tally.violations.push(format!("cut {cut}: point {id} is not exact"));
        }
        let _ = std::fs::remove_file(&out);
        tally.points += 1;
    }
    if cluster.runs("master-target") { Ok(()) } else { Err("the master target ended".to_owned()) }
}

fn check_process_server(session: &mut Session, cut: u64, tally: &mut Tally) -> Result<(), String> {
    let Session { cluster, promises, .. } = session;
    cluster.try_start_role("process-server", START)?;
    let promised = promises.position_at(cut);
    let found = recovered_rung(cluster, "process-server", "cached");
    if found < promised {
        tally.violations.push(format!("cut {cut}: {promised:?} was cached, {found:?} is"));
    }
    tally.positions += usize::from(promised > Position::default());
    if cluster.runs("process-server") { Ok(()) } else { Err("the process server ended".to_owned()) }
}

fn report(what: &str, tally: &Tally, control: Option<&Tally>) {
    let Tally { states, positions, points, violations, .. } = tally;
    println!("{what}: {states} states, {positions} positions compared, {points} points materialised, {} violations", violations.len());
    if let Some(control) = control {
        println!("{what}, with flushes that lie: {} of {} states violate a promise", control.bad, control.states);
        println!("  among them: {}", control.violations.first().map_or("", String::as_str));
    }
    assert!(tally.violations.is_empty(), "seed {}: {:#?}", seed(), tally.violations);
    if let Some(control) = control.filter(|c| c.states > 0) {
        assert!(control.bad * 4 >= control.states, "the power test must be able to fail: {} of {}", control.bad, control.states);
    }
}

fn master_target_on(kind: Kind, format: &'static str, usual: usize, control: usize) {
    demand();
    let (mut session, aftermath) = record_master_target(kind, format);
    let check = |session: &mut Session, _: &Aftermath, cut: u64, tally: &mut Tally| check_master_target(session, format, cut, tally);
    let tally = lose_power((&mut session, &aftermath), states(usual), false, check);
    let lied = (control > 0).then(|| lose_power((&mut session, &aftermath), control, true, check));
    report(&format!("master target on {kind:?}, {format} replica"), &tally, lied.as_ref());
}

#[test]
fn a_master_target_on_ext4_keeps_every_promise_wherever_power_goes() {
    master_target_on(Kind::Ext4, "vhdx", 30, 8);
}

#[test]
fn a_master_target_on_xfs_keeps_every_promise_wherever_power_goes() {
    master_target_on(Kind::Xfs, "vmdk", 15, 0);
}

#[test]
fn a_process_server_keeps_what_it_called_cached_wherever_power_goes() {
    demand();
    let (mut session, aftermath) = record_process_server(Kind::Ext4);
    let check = |session: &mut Session, _: &Aftermath, cut: u64, tally: &mut Tally| check_process_server(session, cut, tally);
    let tally = lose_power((&mut session, &aftermath), states(20), false, check);
    let lied = lose_power((&mut session, &aftermath), 8, true, check);
    report("process server on Ext4", &tally, Some(&lied));
}
