//! SIGKILL of each role at random moments under load; after each, points are materialised and compared. This proves
//! restart, not power loss: see storage_faults for that.
#![allow(clippy::unwrap_used, clippy::disallowed_methods, reason = "tests may unwrap, and wait by the clock")]

mod support;

use std::path::PathBuf;
use std::time::Duration;

use support::writer::Writer;
use support::{Cluster, Options, ROLES, Rng, same_bytes};
use tidegate::disk::Format;

/// Unless TIDEGATE_KILLS says otherwise.
const KILLS: u64 = 24;

#[test]
fn any_role_may_be_killed_at_any_moment() {
    let seed = std::env::var("TIDEGATE_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(20_261_120);
    eprintln!("seed {seed}; TIDEGATE_SEED repeats the order of kills");
    let kills = std::env::var("TIDEGATE_KILLS").ok().and_then(|s| s.parse().ok()).unwrap_or(KILLS);
    let mut rng = Rng::new(seed);
    let size: u64 = 48 << 20;
    let mut cluster = Cluster::start(Options { disk_bytes: size, cache: "writeback", ..Options::default() });
    let writer = Writer::start(cluster.nbd(0), size, 3, 24 << 20, seed);
    let mut known: Vec<(String, PathBuf)> = Vec::new();
    let mut checked = 0;
    for kill in 1..=kills {
        std::thread::sleep(Duration::from_millis(20 + rng.below(400)));
        let role = ROLES[(kill % 3) as usize];
        cluster.kill(role);
        if rng.below(4) == 0 {
            // Two at once now and then.
            cluster.kill(ROLES[rng.below(3) as usize]);
        }
        std::thread::sleep(Duration::from_millis(rng.below(150)));
        for role in ["master-target", "process-server", "agent"] {
            if !cluster.runs(role) {
                cluster.start_role(role);
            }
        }
        if kill % 3 == 0 {
            writer.pause();
            cluster.wait_for_delta();
            let point = cluster.mark(&format!("kill-{kill}"));
            // At rest the source file is what the point must equal, whatever became of writes that were not answered.
            let model = cluster.path(&format!("model-{kill}.raw"));
            std::fs::copy(cluster.disk(0), &model).unwrap();
            writer.go_on();
            known.push((point, model));
        }
        // Any of the points made so far, through everything that was killed since.
        if !known.is_empty() {
            let (point, model) = &known[rng.below(known.len() as u64) as usize];
            let out = cluster.path("out.raw");
            cluster.export(point, 0, "raw", &out);
            assert!(same_bytes(&out, model), "seed {seed}: after kill {kill} of {role} point {point} is not exact");
            std::fs::remove_file(&out).unwrap();
            checked += 1;
        }
    }
    let writes = writer.stop().writes;
    for (point, model) in &known {
        let out = cluster.path("final.raw");
        cluster.export(point, 0, "raw", &out);
        assert!(same_bytes(&out, model), "seed {seed}: at the end point {point} is not exact");
        std::fs::remove_file(&out).unwrap();
        checked += 1;
    }
    cluster.wait_for_delta();
    cluster.mark("end");
    support::tool("qemu-img", &["compare", "-f", "raw", "-F", "vhdx", support::s(&cluster.disk(0)), support::s(&cluster.replica(0))]);
    eprintln!("{kills} kills, {writes} writes answered, {checked} points materialised, 0 differences");
}

const KILLS_PER_FORMAT: u64 = 12;

#[test]
fn a_replica_of_any_format_survives_kills_of_the_master_target() {
    // One format only: TIDEGATE_FORMAT.
    let only = std::env::var("TIDEGATE_FORMAT").ok();
    let wanted = |f: &Format| f.can_be_replica() && only.as_ref().is_none_or(|only| only == f.as_str());
    let formats: Vec<Format> = Format::ALL.into_iter().filter(wanted).collect();
    // Most of the time goes into waiting for reconnections: three sites at once.
    for some in formats.chunks(3) {
        std::thread::scope(|scope| {
            for &format in some {
                scope.spawn(move || kill_while_applying(format));
            }
        });
    }
}

fn kill_while_applying(format: Format) {
    let mut rng = Rng::new(7);
    let size: u64 = 48 << 20;
    let quick = "[apply]\ncheckpoint_interval = \"100ms\"\n".to_owned();
    let mut cluster = Cluster::start(Options { disk_bytes: size, format: format.as_str(), master_target: quick, ..Options::default() });
    let writer = Writer::start(cluster.nbd(0), size, 1, 8 << 20, 7);
    // On a slow machine the first kill could come before there is anything to apply to.
    cluster.wait("the replica is made", Duration::from_secs(60), || cluster.log("master-target").contains("replica made"));
    for kill in 1..=KILLS_PER_FORMAT {
        std::thread::sleep(Duration::from_millis(50 + rng.below(350)));
        cluster.kill("master-target");
        cluster.tidegate(&["check", "image", "--format", format.as_str(), support::s(&cluster.replica(0))]);
        if matches!(format, Format::Vhdx | Format::VhdxFixed | Format::Vmdk) {
            support::tool("qemu-img", &["check", "-f", format.extension(), support::s(&cluster.replica(0))]);
        }
        cluster.start_role("master-target");
        if kill % 4 == 0 {
            writer.pause();
            cluster.wait_for_delta();
            let point = cluster.mark(&format!("kill-{kill}"));
            let out = cluster.path(&format!("out-{kill}.{}", format.extension()));
            cluster.export(&point, 0, format.as_str(), &out);
            support::tool("qemu-img", &["compare", "-f", "raw", "-F", format.extension(), support::s(&cluster.disk(0)), support::s(&out)]);
            for file in format.files(&out) {
                std::fs::remove_file(file).unwrap();
            }
            writer.go_on();
        }
    }
    let writes = writer.stop().writes;
    cluster.wait_for_delta();
    cluster.mark("end");
    let (source, replica) = (cluster.disk(0), cluster.replica(0));
    support::tool("qemu-img", &["compare", "-f", "raw", "-F", format.extension(), support::s(&source), support::s(&replica)]);
    eprintln!("{}: {KILLS_PER_FORMAT} kills while applying, {writes} writes answered, image clean, contents exact", format.as_str());
}
