//! Soak, by hand: a site of two process servers under load for as long as is wanted, with one trouble after the other, and a report
//! at its end. `TIDEGATE_SOAK_MINUTES` (10) says how long, `TIDEGATE_SEED` repeats the order of troubles.
//!
//! What must hold: a point that is listed is exact, whatever happened since; no write waits long; when the troubles are over
//! everything becomes safe, a whole comparison finds no difference, and nobody has grown.
#![allow(clippy::unwrap_used, clippy::disallowed_methods, reason = "tests may unwrap, and wait by the clock")]

mod support;

use std::collections::{BTreeMap, VecDeque};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde_json::Value;
use support::way::Way;
use support::writer::Writer;
use support::{Cluster, Options, Rng, same_bytes};

const SIZE: u64 = 64 << 20;
/// Points whose content is known and that are looked at again and again.
const KNOWN: usize = 6;
const ROLES: [&str; 4] = ["agent", "process-server", "process-server-2", "master-target"];

/// What happened, how often.
#[derive(Debug, Default)]
struct Tally {
    troubles: BTreeMap<&'static str, u64>,
    marks: u64,
    skipped: u64,
    never_listed: u64,
    materialised: u64,
    rpo_max: f64,
    /// Memory and open files of each process that has run for a while: first and most, kB and number.
    grown: BTreeMap<String, (u64, [u64; 2], [u64; 2])>,
}

/// A point, what the disk held, and when it was made.
struct Point {
    id: String,
    model: PathBuf,
    made: Instant,
    listed: bool,
}

struct Soak {
    cluster: Cluster,
    ways: Vec<Way>,
    writer: Writer,
    rng: Rng,
    known: VecDeque<Point>,
    tally: Tally,
}

impl Soak {
    fn start(seed: u64) -> Self {
        let options = Options {
            disk_bytes: SIZE,
            gateways: 2,
            cache: "writeback",
            agent: "[backlog]\nmemory_max = \"64MiB\"\nlog_max = \"256MiB\"\n[scrub]\nrate = \"8MiB/s\"\n".to_owned(),
            // Old content of ten minutes, whatever the soak's length.
            master_target: "[retain]\nladder = \"all for 10m, 1/m for 30m\"\n".to_owned(),
            ..Options::default()
        };
        let mut cluster = Cluster::prepare(options);
        let ways = Way::between(&cluster);
        for role in ["master-target", "process-server", "process-server-2", "agent"] {
            cluster.start_role(role);
        }
        cluster.wait_for_delta();
        let writer = Writer::start(cluster.nbd(0), SIZE, 2, 4 << 20, seed);
        Self { cluster, ways, writer, rng: Rng::new(seed), known: VecDeque::new(), tally: Tally::default() }
    }

    fn some_role(&mut self) -> &'static str {
        // Those in the middle more often: what lives long shows whether it grows.
        ROLES[[1, 1, 1, 2, 2, 2, 0, 3][self.rng.below(8) as usize]]
    }

    fn some_gateway(&mut self) -> (usize, String) {
        let n = self.rng.below(2) as usize;
        (n, support::gateway_role(n))
    }

    fn rest(&mut self, least_ms: u64, most_ms: u64) {
        std::thread::sleep(Duration::from_millis(least_ms + self.rng.below(most_ms - least_ms)));
    }

    fn trouble(&mut self) {
        let what = match self.rng.below(12) {
            0..=2 => {
                let role = self.some_role();
                self.cluster.kill(role);
                self.rest(1, 3000);
                "killed"
            }
            3 => {
                let (one, other) = (self.some_role(), self.some_role());
                self.cluster.kill(one);
                self.cluster.kill(other);
                self.rest(1, 3000);
                "two killed at once"
            }
            4..=5 => {
                let role = self.some_role();
                self.signal(role, "STOP");
                self.rest(200, 6000);
                self.signal(role, "CONT");
                "paused"
            }
            6 => {
                let (_, role) = self.some_gateway();
                self.cluster.kill(&role);
                std::fs::remove_dir_all(self.cluster.path(&role)).unwrap();
                self.rest(1, 4000);
                "lost with their disks"
            }
            7..=9 => {
                let (n, _) = self.some_gateway();
                self.ways[n].cut(true);
                self.rest(500, 30_000);
                self.ways[n].cut(false);
                "cut off from the master target"
            }
            10 => {
                self.ways.iter().for_each(|way| way.cut(true));
                self.rest(500, 12_000);
                self.ways.iter().for_each(|way| way.cut(false));
                "all cut off from the master target"
            }
            _ => {
                let (_, role) = self.some_gateway();
                let control = self.cluster.control(&role);
                // Drained is told only when it is empty; nobody waits for that here.
                let drained = self.cluster.try_tidegate(&["gateway", "drain", "--no-wait", "--control", &control]);
                assert!(drained.status.success(), "{}", String::from_utf8_lossy(&drained.stderr));
                self.rest(500, 6000);
                self.cluster.tidegate(&["gateway", "resume", "--control", &control]);
                "drained"
            }
        };
        *self.tally.troubles.entry(what).or_default() += 1;
        for role in ["master-target", "process-server", "process-server-2", "agent"] {
            if !self.cluster.runs(role) {
                self.cluster.start_role(role);
            }
        }
    }

    fn signal(&self, role: &str, signal: &str) {
        support::tool("kill", &[&format!("-{signal}"), &self.cluster.pid(role).to_string()]);
    }

    /// A point whose content is known. None while the machine is not consistent.
    fn mark(&mut self) {
        self.writer.pause();
        let answer = self.cluster.json("agent", &["point", "mark", "--machine", "m1"]);
        if let Some(id) = answer["point"].as_str() {
            self.tally.marks += 1;
            let model = self.cluster.path(&format!("{id}.model"));
            std::fs::copy(self.cluster.disk(0), &model).unwrap();
            self.known.push_back(Point { id: id.to_owned(), model, made: Instant::now(), listed: false });
        } else {
            self.tally.skipped += 1;
        }
        self.writer.go_on();
        while self.known.len() > KNOWN {
            let gone = self.known.pop_front().unwrap();
            self.tally.never_listed += u64::from(!gone.listed);
            std::fs::remove_file(gone.model).unwrap();
        }
    }

    /// Whichever of the known points is listed is exact.
    fn check(&mut self) {
        let listed: Vec<Value> = self.cluster.points();
        let is_listed = |point: &Point| listed.iter().any(|p| p["id"] == point.id.as_str());
        let found = self.known.iter().map(is_listed).collect::<Vec<_>>();
        for (point, found) in self.known.iter_mut().zip(found) {
            let young = point.made.elapsed() < Duration::from_secs(9 * 60);
            assert!(found || !point.listed || !young, "point {} was listed and is not any more", point.id);
            point.listed = found;
            if found {
                let out = self.cluster.path("out.raw");
                self.cluster.export(&point.id, 0, "raw", &out);
                assert!(same_bytes(&out, &point.model), "point {} is not exact", point.id);
                std::fs::remove_file(&out).unwrap();
                self.tally.materialised += 1;
            }
        }
    }

    fn look(&mut self) {
        let rpo = self.cluster.metric("master-target", "tidegate_rpo_seconds");
        self.tally.rpo_max = self.tally.rpo_max.max(if rpo.is_finite() { rpo } else { 0.0 });
        for role in ROLES {
            let pid = self.cluster.pid(role);
            let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
            let memory = status.lines().find_map(|l| l.strip_prefix("VmRSS:")?.split_whitespace().next()?.parse().ok()).unwrap();
            let files = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count() as u64;
            // Keyed by process; what it has when it is first seen is what it is compared with.
            let seen = self.tally.grown.entry(format!("{role} {pid}")).or_insert((0, [memory; 2], [files; 2]));
            seen.0 += 1;
            (seen.1[1], seen.2[1]) = (seen.1[1].max(memory), seen.2[1].max(files));
        }
    }

    fn end(mut self, minutes: u64, seed: u64) {
        self.ways.iter().for_each(|way| way.cut(false));
        let written = self.writer.stop();
        self.cluster.wait_for_delta();
        let control = self.cluster.control("agent");
        let verified = self.cluster.tidegate(&["disk", "verify", "m1/d0", "--json", "--control", &control]);
        let last = self.cluster.mark("end");
        let (source, replica) = (self.cluster.disk(0), self.cluster.replica(0));
        support::tool("qemu-img", &["compare", "-f", "raw", "-F", "vhdx", support::s(&source), support::s(&replica)]);
        let out = self.cluster.path("last.raw");
        self.cluster.export(&last, 0, "raw", &out);
        assert!(same_bytes(&out, &source));
        let tally = &self.tally;
        eprintln!("soak of {minutes} minutes, seed {seed}");
        for (what, times) in &tally.troubles {
            eprintln!("  {times:>6}  {what}");
        }
        eprintln!("  {:>6}  writes answered ({} MB), the longest took {:.0?}", written.writes, written.bytes / 1_000_000, written.longest);
        eprintln!("  {:>6}  points made, {} refused while the machine was not consistent", tally.marks, tally.skipped);
        eprintln!("  {:>6}  of them never listed: their stream had to begin anew", tally.never_listed);
        eprintln!("  {:>6}  points materialised, 0 differences; at the end: {}", tally.materialised, verified.trim());
        eprintln!("  {:>6.0}  seconds: the oldest that the newest point ever was", tally.rpo_max);
        for (process, (looks, memory, files)) in tally.grown.iter().filter(|(_, seen)| seen.0 >= 12) {
            eprintln!(
                "  {process}: seen {looks} times; memory {} kB, at most {}; files {}, at most {}",
                memory[0], memory[1], files[0], files[1]
            );
            assert!(memory[1] < 2 * memory[0] + (192 << 10), "{process} grows");
            // A master target keeps up to 256 files of old content open for a disk.
            let kept = if process.starts_with("master") { 320 } else { 64 };
            assert!(files[1] < files[0] + kept, "{process} leaks files");
        }
        assert!(written.longest < Duration::from_secs(10), "a write waited for {:?}", written.longest);
        assert!(tally.materialised > 0 && !tally.troubles.is_empty());
    }
}

#[test]
fn a_site_in_trouble_for_long_loses_nothing_and_does_not_grow() {
    let number = |name: &str, otherwise: u64| std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(otherwise);
    let (minutes, seed) = (number("TIDEGATE_SOAK_MINUTES", 10), number("TIDEGATE_SEED", 6));
    let mut soak = Soak::start(seed);
    let started = Instant::now();
    while started.elapsed() < Duration::from_secs(minutes * 60) {
        soak.trouble();
        soak.rest(500, 4000);
        soak.look();
        soak.mark();
        soak.check();
    }
    soak.end(minutes, seed);
}
