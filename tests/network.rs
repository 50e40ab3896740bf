//! Networks that lose, delay, reorder, duplicate, corrupt, throttle and cut, between real processes in namespaces of their own:
//! the application does not notice, every point is exact, and when the network heals everything becomes safe by itself.
//!
//! Most of the time goes into waiting for silence to be noticed, so two sites go through their courses at once. Each scenario tells
//! what it did in numbers. TIDEGATE_NETWORK_ROUNDS repeats all of it with other seeds, TIDEGATE_NETWORK_COURSE takes
//! one of the courses only: rough or cuts.
#![allow(clippy::unwrap_used, clippy::disallowed_methods, reason = "tests may unwrap, and wait by the clock")]

#[path = "support/model_writer.rs"]
mod model_writer;
#[path = "support/relay.rs"]
mod relay;
mod support;
#[path = "support/wire.rs"]
mod wire;

use std::fs;
use std::io::Write;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use model_writer::{Writer, differences};
use relay::{Kind, Relay};
use serde_json::Value;
use support::{Cluster, Options, ROLES, Rng};
use tidegate::config::limits::{HANDSHAKE_SECONDS, SILENCE_SECONDS};
use wire::{ALL, GATEWAY_ADDRESS, LINKS, Link, Place, TARGET_ADDRESS, WAYS, Way, Wire};

const DISK_BYTES: u64 = 32 << 20;
const MIB: u64 = 1 << 20;
/// Bytes a second, when a scenario does not want another load.
const USUAL_RATE: u64 = 512 << 10;
/// No write may take longer, whatever the network does.
const WRITE_LIMIT: Duration = Duration::from_secs(1);
/// From a healed network to everything safe: a dead connection is noticed, an attempt fails, the longest pause between attempts (10 s at
/// the agent) passes, and what waited is sent.
const SAFE_LIMIT: Duration = Duration::from_secs(SILENCE_SECONDS + HANDSHAKE_SECONDS + 10 + 10);
/// From a cut to everybody's knowing: the silence that is allowed, and time to be asked on a busy machine.
const NOTICE_LIMIT: Duration = Duration::from_secs(SILENCE_SECONDS + 5);
/// Points of a scenario that are brought back.
const CHECKED: usize = 3;

/// Memory of the process server, small against what has to wait in the cache.
const INGEST_MEMORY: u64 = 8 * MIB;
const CACHE_MEMORY: u64 = 4 * MIB;
const WINDOW: u64 = 4 * MIB;
const POOLED: u64 = 32 * MIB;

/// A point and the file with what the disk held at its marker.
struct Marked {
    id: String,
    model: PathBuf,
}

/// Three roles with their network and an application. Ends from the top: nobody writes to processes or processes to cables that are gone.
struct Site {
    name: &'static str,
    seed: u64,
    writer: Writer,
    relays: Vec<Relay>,
    cluster: Cluster,
    wire: Wire,
    marked: Vec<Marked>,
    marks: u32,
}

fn place(role: &str) -> Place {
    match role {
        "agent" => Place::Agent,
        "process-server" => Place::Gateway,
        _ => Place::Target,
    }
}

/// The roles look for each other where the cables lead.
fn readdress(cluster: &Cluster) {
    let (ingest, forward) = (cluster.ingest_port(), cluster.forward_port());
    for role in ROLES {
        let mut text = fs::read_to_string(cluster.config(role)).unwrap();
        for (from, to) in [
            (format!("address = \"127.0.0.1:{ingest}\""), format!("address = \"{GATEWAY_ADDRESS}:{ingest}\"")),
            (format!("master_target = \"127.0.0.1:{forward}\""), format!("master_target = \"{TARGET_ADDRESS}:{forward}\"")),
            (format!("listen = \"127.0.0.1:{ingest}\""), format!("listen = \"0.0.0.0:{ingest}\"")),
            (format!("listen = \"127.0.0.1:{forward}\""), format!("listen = \"0.0.0.0:{forward}\"")),
        ] {
            text = text.replace(&from, &to);
        }
        if role == "process-server" {
            text = text.replace("[ingest]\n", &format!("[ingest]\nmemory_max = {INGEST_MEMORY}\n"));
            text = text.replace("[forward]\n", &format!("[forward]\nwindow = {WINDOW}\n"));
        }
        fs::write(cluster.config(role), text).unwrap();
    }
}

impl Site {
    fn new(name: &'static str, seed: u64) -> Self {
        let wire = Wire::new();
        let cache = format!("[cache]\nsize_max = \"1GiB\"\nsegment = \"8MiB\"\nmemory_max = {CACHE_MEMORY}\n");
        let options = Options { disk_bytes: DISK_BYTES, format: "raw", cache: "writeback", process_server: cache, ..Options::default() };
        let mut cluster = Cluster::prepare(options);
        readdress(&cluster);
        for role in ["master-target", "process-server", "agent"] {
            wire.inside(place(role), || cluster.start_role(role));
        }
        cluster.wait_for_delta();
        let writer = Writer::start(cluster.nbd(0), DISK_BYTES, seed, USUAL_RATE);
        Self { name, seed, writer, relays: Vec::new(), cluster, wire, marked: Vec::new(), marks: 0 }
    }

    fn status(&self, role: &str) -> Value {
        self.cluster.json(role, &["status"])[0].clone()
    }

    fn points(&self) -> usize {
        self.cluster.points().len()
    }

    /// A point whose content is known: nothing is written between the copy and the marker.
    fn mark(&mut self) {
        self.marks += 1;
        let (id, held) = {
            let model = self.writer.pause();
            (self.cluster.mark_unlisted(&format!("{}-{}", self.name, self.marks)), model.clone())
        };
        let model = self.cluster.path(&format!("model-{id}"));
        fs::write(&model, held).unwrap();
        self.marked.push(Marked { id, model });
    }

    /// Lets time pass, with points at even distances.
    fn pass(&mut self, time: Duration, points: u32) {
        let started = Instant::now();
        for n in 1..=points {
            std::thread::sleep((time * n / (points + 1)).saturating_sub(started.elapsed()));
            self.mark();
        }
        std::thread::sleep(time.saturating_sub(started.elapsed()));
    }

    /// Waits until all that was written is journaled at the master target. Nothing is written meanwhile.
    fn settle(&self) -> Duration {
        let started = Instant::now();
        let _paused = self.writer.pause();
        self.cluster.wait(&format!("{}: everything is safe", self.name), SAFE_LIMIT, || {
            let disk = self.cluster.agent_disk(0);
            disk["state"] == "delta" && disk["positions"][0][1] == disk["positions"][3][1]
        });
        started.elapsed()
    }

    /// Brings points of this scenario back and compares. Returns how many points, sectors that differ, and bytes.
    fn bring_back(&mut self, scenario: &str) -> (usize, u64, u64) {
        let marked = std::mem::take(&mut self.marked);
        assert!(!marked.is_empty(), "{scenario}: a scenario without a point proves nothing");
        let (mut checked, mut differing, mut bytes) = (0, 0, 0);
        for (index, point) in marked.iter().enumerate() {
            let what = format!("{scenario}: point {} is listed", point.id);
            self.cluster.wait(&what, Duration::from_secs(20), || self.cluster.points().iter().any(|p| p["id"] == point.id.as_str()));
            // The first and the last ones.
            if index == 0 || index + CHECKED > marked.len() {
                let out = self.cluster.path("out.raw");
                self.cluster.export(&point.id, 0, "raw", &out);
                let (found, expected) = (fs::read(&out).unwrap(), fs::read(&point.model).unwrap());
                let (sectors, told) = differences(&found, &expected);
                assert_eq!(sectors, 0, "{scenario}, seed {}: point {} is not exact, {told}", self.seed, point.id);
                (checked, differing, bytes) = (checked + 1, differing + sectors, bytes + found.len() as u64);
                fs::remove_file(&out).unwrap();
            }
            fs::remove_file(&point.model).unwrap();
        }
        (checked, differing, bytes)
    }

    fn assert_sound(&mut self, scenario: &str) {
        for role in ROLES {
            assert!(self.cluster.runs(role), "{scenario}: {role} ended");
            let log = self.cluster.log(role);
            assert!(!log.contains("panicked"), "{scenario}: {role} panicked:\n{log}");
        }
    }

    /// Runs a scenario, which leaves the network healed, and what must hold after each of them. `body` returns what else is to be told.
    fn scenario(&mut self, scenario: &str, body: impl FnOnce(&mut Self) -> String) {
        let (started, listed) = (Instant::now(), self.points());
        self.writer.figures();
        let told = body(self);
        self.writer.set_rate(USUAL_RATE);
        let safe_after = self.settle();
        let figures = self.writer.figures();
        assert!(figures.writes > 0, "{scenario}: nothing was written");
        assert!(figures.longest < WRITE_LIMIT, "{scenario}: a write took {:?}: the application was blocked", figures.longest);
        let (checked, differing, bytes) = self.bring_back(scenario);
        self.assert_sound(scenario);
        eprintln!(
            "{}: {scenario}: {:.1} s, safe {:.1} s after healing; {} writes, {:.1} MB, longest write {:.1} ms; {} points listed, {checked} materialised, {:.0} MB compared, {differing} differences; {told}",
            self.name,
            started.elapsed().as_secs_f64(),
            safe_after.as_secs_f64(),
            figures.writes,
            figures.bytes as f64 / 1e6,
            figures.longest.as_secs_f64() * 1e3,
            self.points() - listed,
            bytes as f64 / 1e6,
        );
    }

    fn lose(&mut self, link: Link, percent: u32, seconds: u64, rate: u64) {
        self.scenario(&format!("{percent} % of the packets lost, {link:?}"), |site| {
            site.writer.set_rate(rate);
            let listed = site.points();
            site.wire.drop_both_ways(link, &format!("numgen random mod 100 < {percent}"));
            site.pass(Duration::from_secs(seconds), 2);
            let during = site.points() - listed;
            let dropped = site.wire.heal(link);
            assert!(dropped > 0, "the loss lost nothing");
            assert!(during >= 2, "{percent} % on {link:?}: {during} points were listed in {seconds} s of loss");
            format!("{dropped} packets lost, {during} points listed meanwhile")
        });
    }

    fn throttle(&mut self) {
        self.scenario("8 Mbit/s to the master target", |site| {
            site.settle();
            let before = site.memory();
            site.wire.limit(Some("8mbit"));
            site.writer.set_rate(20 * MIB);
            let (started, mut memory, mut cached) = (Instant::now(), 0, 0);
            // Beside what is configured, buffers that were used rest in pools.
            let bound = INGEST_MEMORY + CACHE_MEMORY + 2 * WINDOW + POOLED;
            // As long as it takes on this machine.
            while cached <= 2 * bound && started.elapsed() < Duration::from_secs(60) {
                site.pass(Duration::from_millis(200), u32::from(site.marked.len() < 2));
                memory = memory.max(site.memory());
                cached = cached.max(site.status("process-server")["cache_bytes"][0].as_u64().unwrap());
            }
            site.writer.set_rate(USUAL_RATE);
            site.wire.limit(None);
            let grown = memory.saturating_sub(before);
            assert!(cached > 2 * bound, "the cache held {cached} bytes: too little to tell whether memory is bounded");
            assert!(grown < bound, "the process server grew by {grown} bytes, its configuration allows {bound}");
            format!("cache up to {:.0} MB, memory {:.1} + {:.1} MB", cached as f64 / 1e6, before as f64 / 1e6, grown as f64 / 1e6)
        });
    }

    /// VmRSS of the process server.
    fn memory(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.cluster.pid("process-server"))).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10
    }

    /// UDP payload that the link to the master target carries.
    fn link_mtu(&self) -> u64 {
        let port = self.cluster.metrics_port("process-server");
        let text = self.wire.inside(Place::Gateway, || {
            let mut stream = std::net::TcpStream::connect(("127.0.0.1", port)).unwrap();
            stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").unwrap();
            std::io::read_to_string(stream).unwrap()
        });
        let figure = text.lines().find(|line| line.starts_with("tidegate_link_mtu_bytes")).unwrap_or_else(|| panic!("{text}"));
        figure.rsplit(' ').next().unwrap().parse::<f64>().unwrap() as u64
    }

    fn swallow_large_packets(&mut self) {
        self.scenario("packets above 1300 bytes swallowed on the QUIC link", |site| {
            site.cluster.wait("the link finds its MTU", Duration::from_secs(20), || site.link_mtu() > 8000);
            let (listed, before) = (site.points(), site.link_mtu());
            site.wire.drop_both_ways(Link::Forward, "meta l4proto udp meta length > 1300");
            site.pass(Duration::from_secs(7), 3);
            let (during, after) = (site.points() - listed, site.link_mtu());
            let dropped = site.wire.heal(Link::Forward);
            assert!(dropped > 0, "no packet was larger: the path was not used up to its MTU");
            assert!(during >= 3, "{during} points were listed while only small packets passed");
            assert!(after < 1300, "the link still takes packets of {after} bytes for passing");
            format!("{dropped} packets swallowed, MTU {before} became {after}, {during} points listed meanwhile")
        });
    }

    fn flap(&mut self) {
        self.scenario("both links flap", |site| {
            let (mut rng, started, mut cuts, mut dropped) = (Rng::new(site.seed), Instant::now(), 0, 0);
            while started.elapsed() < Duration::from_secs(15) {
                let cut = [&LINKS[..1], &LINKS[1..], &LINKS[..]][rng.below(3) as usize];
                cut.iter().for_each(|link| site.wire.drop_both_ways(*link, ALL));
                site.pass(Duration::from_millis(1000 + rng.below(1000)), u32::from(cuts % 2 == 0));
                dropped += cut.iter().map(|link| site.wire.heal(*link)).sum::<u64>();
                site.pass(Duration::from_millis(1000 + rng.below(1000)), 0);
                cuts += 1;
            }
            assert!(dropped > 0, "the cuts cut nothing");
            format!("{cuts} cuts, {dropped} packets lost")
        });
    }

    fn partition(&mut self, links: &[Link], seconds: u64) {
        self.scenario(&format!("{links:?} cut for {seconds} s"), |site| {
            links.iter().for_each(|link| site.wire.drop_both_ways(*link, ALL));
            site.pass(Duration::from_secs(seconds), 2);
            let dropped: Vec<u64> = links.iter().map(|link| site.wire.heal(*link)).collect();
            assert!(dropped.iter().all(|d| *d > 0), "the cut cut nothing: {dropped:?}");
            format!("{} packets lost", dropped.iter().sum::<u64>())
        });
    }

    /// Both links at once: silence is noticed on each of them on its own.
    fn cut_one_way(&mut self, way: Way) {
        self.scenario(&format!("both links cut in one direction, {way:?}"), |site| {
            LINKS.iter().for_each(|link| site.wire.drop_packets(*link, way, ALL));
            let (cut, mut noticed) = (Instant::now(), [None; 3]);
            while noticed.contains(&None) && cut.elapsed() < 3 * NOTICE_LIMIT {
                let (agent, gateway) = (site.status("agent"), site.status("process-server"));
                let gone = [
                    agent["connected"] == false,
                    gateway["machines"][0]["disks"][0]["state"] == "not connected",
                    gateway["connected"] == false,
                ];
                for (seen, gone) in noticed.iter_mut().zip(gone) {
                    *seen = seen.or(gone.then(|| cut.elapsed()));
                }
                site.pass(Duration::from_millis(250), u32::from(site.marked.len() < 3));
            }
            let dropped: u64 = LINKS.iter().map(|link| site.wire.heal(*link)).sum();
            assert!(dropped > 0, "the cut cut nothing");
            let who = ["the agent its process server", "the process server its agent", "the process server its master target"];
            for (who, noticed) in who.iter().zip(noticed) {
                assert!(
                    noticed.is_some_and(|after| after <= NOTICE_LIMIT),
                    "{way:?}: {who} after {noticed:?}, not within {NOTICE_LIMIT:?}"
                );
            }
            let told: Vec<String> = noticed.iter().flatten().map(|after| format!("{:.1}", after.as_secs_f64())).collect();
            format!("agent, process server and link noticed after {} s, {dropped} packets lost", told.join(", "))
        });
    }

    /// From here on the process server is behind a relay, and the master target too; the agent and the process server are not told.
    fn put_relays(&mut self) {
        // What is connected stays so past a relay that comes later.
        self.cluster.kill("process-server");
        for (link, kind, place, port) in [
            (Link::Ingest, Kind::Tcp, Place::Gateway, self.cluster.ingest_port()),
            (Link::Forward, Kind::Udp, Place::Target, self.cluster.forward_port()),
        ] {
            let relay = Relay::start(kind, self.wire.namespace(place), port, self.seed);
            self.wire.redirect(link, port, relay.port());
            self.relays.push(relay);
        }
        self.wire.inside(Place::Gateway, || self.cluster.start_role("process-server"));
    }

    fn roughen(&mut self) {
        self.scenario("delay, reordering, duplicates, corruption, resets", |site| {
            site.put_relays();
            site.settle();
            site.relays.iter().for_each(|relay| relay.rough(true));
            site.pass(Duration::from_secs(15), 4);
            site.relays.iter().for_each(|relay| relay.rough(false));
            let get = |n: &std::sync::atomic::AtomicU64| n.load(Ordering::Relaxed);
            let (tcp, udp) = (site.relays[0].counts(), site.relays[1].counts());
            for (harm, count) in
                [("lost", &udp.lost), ("late", &udp.late), ("twice", &udp.twice), ("corrupt", &udp.corrupt), ("reset", &tcp.reset)]
            {
                assert!(get(count) > 0, "no harm of the kind {harm} was done: {tcp:?}, {udp:?}");
            }
            format!(
                "{} packets, of these {} lost, {} late, {} twice, {} corrupt; {} pieces over TCP, {} corrupt, {} resets",
                get(&udp.passed),
                get(&udp.lost),
                get(&udp.late),
                get(&udp.twice),
                get(&udp.corrupt),
                get(&tcp.passed),
                get(&tcp.corrupt),
                get(&tcp.reset)
            )
        });
    }
}

/// What slows or harms packets.
fn rough_roads(seed: u64) {
    let mut site = Site::new("rough", seed);
    // First: much loss makes QUIC keep its packets small for a minute.
    site.swallow_large_packets();
    for link in LINKS {
        site.lose(link, 1, 4, MIB);
        site.lose(link, 10, 5, USUAL_RATE);
        site.lose(link, 30, 8, MIB / 8);
    }
    site.throttle();
    site.roughen();
}

/// What cuts.
fn cuts(seed: u64) {
    let mut site = Site::new("cuts", seed);
    site.partition(&[Link::Ingest], 6);
    site.partition(&[Link::Forward], 6);
    site.partition(&LINKS, 8);
    site.flap();
    for way in WAYS {
        site.cut_one_way(way);
    }
}

#[test]
fn whatever_the_network_does_every_point_is_exact_and_all_becomes_safe_when_it_heals() {
    wire::demand_tools();
    let number = |name: &str, usual: u64| std::env::var(name).ok().map_or(usual, |text| text.parse().unwrap());
    let (rounds, seed) = (number("TIDEGATE_NETWORK_ROUNDS", 1), number("TIDEGATE_SEED", 20_261_125));
    let only = std::env::var("TIDEGATE_NETWORK_COURSE").ok();
    eprintln!("seed {seed}; TIDEGATE_SEED repeats it");
    for seed in seed..seed + rounds {
        std::thread::scope(|scope| {
            let wanted = |course: &str| only.as_ref().is_none_or(|only| only == course);
            if wanted("rough") {
                scope.spawn(move || rough_roads(seed));
            }
            if wanted("cuts") {
                scope.spawn(move || cuts(seed));
            }
        });
    }
}

#[test]
fn a_comparison_finds_a_single_changed_byte_and_a_missing_end() {
    let model: Vec<u8> = (0..64 << 10).map(|n: u32| n as u8).collect();
    assert_eq!(differences(&model, &model).0, 0);
    let mut other = model.clone();
    other[40_000] ^= 1;
    assert_eq!(differences(&other, &model).0, 1);
    assert_eq!(differences(&model[1..], &model).0, 1);
}
