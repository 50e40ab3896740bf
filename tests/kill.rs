//! SIGKILL of each role at random moments under load; after each, points are materialised and compared. This proves
//! restart, not power loss: see storage_faults for that.
#![allow(clippy::unwrap_used, clippy::disallowed_methods, reason = "tests may unwrap, and wait by the clock")]

mod support;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use support::{Cluster, Options, ROLES, Rng, same_bytes};
use tidegate::disk::Format;
use tidegate::model::{Address, Extent};
use tidegate::nbd::client::Client;

const KILLS: u64 = 36;

/// Writes until told to stop, reconnecting when the agent is gone. A pause is taken between two writes.
fn workload(socket: PathBuf, seed: u64, area: Extent, pause: Arc<AtomicBool>, paused: Arc<AtomicU64>, stop: Arc<AtomicBool>) -> u64 {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let mut rng = Rng::new(seed);
        let mut writes = 0;
        let mut client = None;
        while !stop.load(Ordering::SeqCst) {
            if pause.load(Ordering::SeqCst) {
                paused.fetch_add(1, Ordering::SeqCst);
                while pause.load(Ordering::SeqCst) {
                    tokio::time::sleep(Duration::from_millis(2)).await;
                }
                paused.fetch_sub(1, Ordering::SeqCst);
            }
            let Some(connected) = &mut client else {
                client = Client::connect(&Address::Unix(socket.clone()), "").await.ok();
                tokio::time::sleep(Duration::from_millis(5)).await;
                continue;
            };
            // Whole pages take another way through the agent than other writes do.
            let unit = if rng.below(2) == 0 { 512 } else { 4096 };
            let len = unit * (1 + rng.below(32_768 / unit));
            let start = area.offset.next_multiple_of(unit);
            let offset = start + rng.below((area.end() - start - len) / unit) * unit;
            let result = match rng.below(20) {
                0 => connected.zero(Extent::new(offset, len)).await,
                1 => connected.flush().await,
                n => connected.write(offset, &vec![rng.below(256) as u8; len as usize], n == 2).await,
            };
            match result {
                Ok(()) => writes += 1,
                Err(_) => client = None,
            }
        }
        writes
    })
}

#[test]
fn any_role_may_be_killed_at_any_moment() {
    let seed = std::env::var("TIDEGATE_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(20_261_120);
    eprintln!("seed {seed}; TIDEGATE_SEED repeats the order of kills");
    let mut rng = Rng::new(seed);
    let size: u64 = 48 << 20;
    let mut cluster = Cluster::start(Options { disk_bytes: size, cache: "writeback", ..Options::default() });
    let (pause, paused, stop) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
    let writers: Vec<_> = (0..3)
        .map(|n| {
            let area = Extent::new(n * (size / 3) / 512 * 512, size / 3 / 512 * 512);
            let (socket, pause, paused, stop) = (cluster.nbd(0), pause.clone(), paused.clone(), stop.clone());
            std::thread::spawn(move || workload(socket, seed + n, area, pause, paused, stop))
        })
        .collect();
    let mut known: Vec<(String, PathBuf)> = Vec::new();
    let mut checked = 0;
    for kill in 1..=KILLS {
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
            pause.store(true, Ordering::SeqCst);
            cluster.wait("the writers pause", Duration::from_secs(10), || paused.load(Ordering::SeqCst) == 3);
            cluster.wait_for_delta();
            let point = cluster.mark(&format!("kill-{kill}"));
            // At rest the source file is what the point must equal, whatever became of writes that were not answered.
            let model = cluster.path(&format!("model-{kill}.raw"));
            std::fs::copy(cluster.disk(0), &model).unwrap();
            pause.store(false, Ordering::SeqCst);
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
    stop.store(true, Ordering::SeqCst);
    let writes: u64 = writers.into_iter().map(|w| w.join().unwrap()).sum();
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
    eprintln!("{KILLS} kills, {writes} writes answered, {checked} points materialised, 0 differences");
}

const KILLS_PER_FORMAT: u64 = 20;

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
    let flags = [Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false))];
    let (pause, stop, paused) = (flags[0].clone(), flags[1].clone(), Arc::new(AtomicU64::new(0)));
    let writer = {
        let (socket, pause, paused, stop) = (cluster.nbd(0), pause.clone(), paused.clone(), stop.clone());
        std::thread::spawn(move || workload(socket, 7, Extent::new(0, size), pause, paused, stop))
    };
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
        if kill % 5 == 0 {
            pause.store(true, Ordering::SeqCst);
            cluster.wait("the writer pauses", Duration::from_secs(10), || paused.load(Ordering::SeqCst) == 1);
            cluster.wait_for_delta();
            let point = cluster.mark(&format!("kill-{kill}"));
            let out = cluster.path(&format!("out-{kill}.{}", format.extension()));
            cluster.export(&point, 0, format.as_str(), &out);
            support::tool("qemu-img", &["compare", "-f", "raw", "-F", format.extension(), support::s(&cluster.disk(0)), support::s(&out)]);
            for file in format.files(&out) {
                std::fs::remove_file(file).unwrap();
            }
            pause.store(false, Ordering::SeqCst);
        }
    }
    stop.store(true, Ordering::SeqCst);
    let writes = writer.join().unwrap();
    cluster.wait_for_delta();
    cluster.mark("end");
    let (source, replica) = (cluster.disk(0), cluster.replica(0));
    support::tool("qemu-img", &["compare", "-f", "raw", "-F", format.extension(), support::s(&source), support::s(&replica)]);
    eprintln!("{}: {KILLS_PER_FORMAT} kills while applying, {writes} writes answered, image clean, contents exact", format.as_str());
}
