//! Machines that work together come back from one moment: tokens travel between them through their disks, and no recovered
//! group point has the effect without the cause. Members and coordinators that are late, dead, paused or cut off.
#![allow(clippy::unwrap_used, clippy::disallowed_methods, reason = "tests may unwrap, and wait by the clock")]

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use support::estate::{Estate, EstateOptions};
use support::{Rng, s};
use tidegate::control::api::{GroupMarked, Marked, PointView, RecoveryView, Request};
use tidegate::model::{MachineId, PointId};
use tidegate::nbd::client::Client;

const BLOCK: u64 = 4096;

/// Machines that pass tokens. Block `i` of machine `j` says how many tokens it has sent to `i`, block `n + i` how many it has
/// received from `i`. A token is sent when that is written and acknowledged, and received when that is, in this order.
struct Traffic {
    stop: Arc<AtomicBool>,
    passed: Arc<AtomicU64>,
    /// Longest time a write of each machine took, microseconds; taken and cleared by the test.
    longest: Arc<Vec<AtomicU64>>,
    threads: Vec<std::thread::JoinHandle<()>>,
}

impl Traffic {
    fn start(estate: &Estate, seed: u64) -> Self {
        let n = estate.options.machines;
        let stop = Arc::new(AtomicBool::new(false));
        let passed = Arc::new(AtomicU64::new(0));
        let longest: Arc<Vec<AtomicU64>> = Arc::new((0..n).map(|_| AtomicU64::new(0)).collect());
        // What was sent and acknowledged, by sender and receiver: the token, on its way between the machines.
        let sent: Arc<Vec<AtomicU64>> = Arc::new((0..n * n).map(|_| AtomicU64::new(0)).collect());
        let threads = estate.machines().into_iter().enumerate().map(|(me, machine)| {
            let (address, stop, passed, longest, sent) =
                (estate.nbd(&machine, 0), stop.clone(), passed.clone(), longest.clone(), sent.clone());
            std::thread::spawn(move || {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
                let mut rng = Rng::new(seed + me as u64);
                let mut received = vec![0; n];
                runtime.block_on(async {
                    let mut disk = Client::connect(&address, "").await.unwrap();
                    while !stop.load(Ordering::Relaxed) {
                        let peer = rng.below(n as u64) as usize;
                        let (block, count) = if rng.below(2) == 0 {
                            (peer as u64, sent[me * n + peer].load(Ordering::SeqCst) + 1)
                        } else {
                            let there = sent[peer * n + me].load(Ordering::SeqCst);
                            if there == received[peer] {
                                continue;
                            }
                            (n as u64 + peer as u64, there)
                        };
                        let mut data = vec![0; BLOCK as usize];
                        data[..8].copy_from_slice(&count.to_le_bytes());
                        let began = Instant::now();
                        if disk.write(block * BLOCK, &data, false).await.is_err() {
                            // The agent was killed by the test.
                            tokio::time::sleep(Duration::from_millis(50)).await;
                            if let Ok(again) = Client::connect(&address, "").await {
                                disk = again;
                            }
                            continue;
                        }
                        longest[me].fetch_max(began.elapsed().as_micros() as u64, Ordering::Relaxed);
                        if block < n as u64 {
                            sent[me * n + peer].store(count, Ordering::SeqCst);
                        } else {
                            received[peer] = count;
                            passed.fetch_add(1, Ordering::Relaxed);
                        }
                        if rng.below(8) == 0 {
                            tokio::time::sleep(Duration::from_micros(rng.below(3000))).await;
                        }
                    }
                });
            })
        });
        let threads = threads.collect();
        Self { stop, passed, longest, threads }
    }

    /// The longest write of each machine since this was asked last, except of those named.
    fn longest(&self, except: &[usize]) -> Duration {
        let taken = self.longest.iter().enumerate().map(|(i, l)| (i, l.swap(0, Ordering::Relaxed)));
        Duration::from_micros(taken.filter(|(i, _)| !except.contains(i)).map(|(_, l)| l).max().unwrap())
    }

    fn stop(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        self.threads.into_iter().for_each(|t| t.join().unwrap());
        self.passed.load(Ordering::Relaxed)
    }
}

fn counters(bytes: &[u8], n: usize) -> Vec<u64> {
    (0..2 * n).map(|i| u64::from_le_bytes(bytes[i * BLOCK as usize..][..8].try_into().unwrap())).collect()
}

/// Tokens that are received in what was recovered, and not sent.
fn violations(disks: &[Option<Vec<u8>>]) -> usize {
    let n = disks.len();
    let all: Vec<Option<Vec<u64>>> = disks.iter().map(|d| d.as_ref().map(|d| counters(d, n))).collect();
    let mut found = 0;
    for (me, mine) in all.iter().enumerate() {
        for (peer, theirs) in all.iter().enumerate() {
            if let (Some(mine), Some(theirs)) = (mine, theirs) {
                found += usize::from(mine[n + peer] > theirs[me]);
            }
        }
    }
    found
}

fn mark(estate: &Estate, app: bool) -> Result<GroupMarked, String> {
    estate.call(&estate.control("coordinator"), &Request::GroupMark { group: "g".to_owned(), app, label: None })
}

fn part(point: &str, machine: &str) -> String {
    PointId::part(PointId(point.parse().unwrap()), MachineId::from_name(&machine.parse().unwrap())).to_string()
}

fn listed(estate: &Estate) -> Vec<PointView> {
    estate.call(&estate.control("master-target"), &Request::Points { machine: None }).unwrap()
}

/// Brings a machine's disk back at a point.
fn bring_back(estate: &Estate, point: &str) -> Vec<u8> {
    let control = estate.control("master-target");
    let output = estate.path("recovered.raw");
    let _ = std::fs::remove_file(&output);
    let request = Request::Export { point: point.to_owned(), disk: None, format: "raw".to_owned(), output: s(&output).to_owned() };
    let mut view: RecoveryView = estate.call(&control, &request).unwrap();
    while view.state == "running" {
        std::thread::sleep(Duration::from_millis(1));
        let all: Vec<RecoveryView> = estate.call(&control, &Request::Recoveries).unwrap();
        view = all.into_iter().find(|v| v.name == view.name).unwrap();
    }
    assert_eq!((view.state.as_str(), &view.error), ("done", &None));
    let () = estate.call(&control, &Request::Unmount { name: view.name }).unwrap();
    std::fs::read(&output).unwrap()
}

fn group(estate: &Estate) -> Value {
    estate.json("coordinator", &["group", "show", "g"])
}

fn create(estate: &Estate, extra: &[&str]) {
    let machines = estate.machines();
    let mut args = vec!["group", "create", "g"];
    machines.iter().for_each(|m| args.extend(["--machine", m]));
    args.extend(extra);
    estate.json("coordinator", &args);
}

fn wait_ready(estate: &Estate) {
    estate.wait("every member is ready", Duration::from_secs(60), || {
        group(estate)["members"].as_array().unwrap().iter().all(|m| m["trouble"].is_null())
    });
}

#[test]
fn tokens_never_arrive_in_a_point_before_they_were_sent() {
    const POINTS: usize = 250;
    let options = EstateOptions {
        machines: 8,
        member: "rest_min = \"50ms\"".to_owned(),
        consistency: "rest_min = \"60ms\"".to_owned(),
        ..EstateOptions::default()
    };
    let estate = Estate::start(options);
    create(&estate, &["--interval", "1h"]);
    wait_ready(&estate);
    let traffic = Traffic::start(&estate, 20_261_121);
    let (mut points, mut partial, mut skipped) = (vec![], 0, vec![]);
    let mut naive = vec![];
    let began = Instant::now();
    while points.len() < POINTS {
        assert!(began.elapsed() < Duration::from_secs(240), "{} points, {partial} partial, not made: {skipped:?}", points.len());
        match mark(&estate, false) {
            Ok(made) => {
                partial += usize::from(!made.missing.is_empty());
                points.push(made);
            }
            Err(error) => skipped.push(error),
        }
        // As somebody would do it who has no coordinator: every machine by itself, as soon after each other as possible.
        if points.len() % 10 == 5 {
            let mut ids = vec![];
            for machine in estate.machines() {
                let request = Request::Mark { machine: machine.clone(), label: None, app: false };
                ids.push(estate.call::<Marked>(&estate.control(&machine), &request).unwrap().point);
            }
            naive.push(ids);
        }
    }
    let took = began.elapsed();
    let tokens = traffic.stop();
    let machines = estate.machines();
    estate.wait("every part is listed", Duration::from_secs(60), || {
        let there: std::collections::HashSet<String> = listed(&estate).into_iter().map(|p| p.id).collect();
        let missing = |p: &GroupMarked| p.missing.iter().map(|m| m.machine.clone()).collect::<Vec<_>>();
        points.iter().all(|p| machines.iter().filter(|m| !missing(p).contains(m)).all(|m| there.contains(&part(&p.point, m))))
            && naive.iter().flatten().all(|id| there.contains(id))
    });
    let mut found = 0;
    for point in &points {
        let gone: Vec<&str> = point.missing.iter().map(|m| m.machine.as_str()).collect();
        let disks: Vec<_> =
            machines.iter().map(|m| (!gone.contains(&m.as_str())).then(|| bring_back(&estate, &part(&point.point, m)))).collect();
        found += violations(&disks);
    }
    let without: usize = naive.iter().map(|ids| violations(&ids.iter().map(|id| Some(bring_back(&estate, id))).collect::<Vec<_>>())).sum();
    println!(
        "{} group points of 8 machines in {:.0} s ({partial} partial, {} not made), {tokens} tokens passed: {found} arrive before they were sent; {without} do in {} points without a coordinator",
        points.len(),
        took.as_secs_f64(),
        skipped.len(),
        naive.len()
    );
    assert_eq!(found, 0);
    assert!(without > 0, "the tokens show nothing: points without a coordinator would have to break the order");
    assert!(tokens > 1000 && points.len() - partial > POINTS / 2, "{tokens} tokens, {partial} partial");
}

/// Far above `hold_max` of 200 ms, because this machine has few cores and other tests; far below what a wait for the other side
/// would take.
const HELD_MAX: Duration = Duration::from_millis(900);

#[test]
fn late_dead_paused_and_cut_off_parties_hold_nobody_up() {
    let options = EstateOptions {
        machines: 4,
        consistency: "rest_min = \"510ms\"".to_owned(),
        interval: "2s",
        apart: vec!["coordinator", "m1"],
        ..EstateOptions::default()
    };
    let mut estate = Estate::start(options);
    create(&estate, &["--interval", "1s"]);
    wait_ready(&estate);
    let traffic = Traffic::start(&estate, 7);
    let full = |estate: &Estate| group(estate)["full"].as_u64().unwrap();
    let wait_full = |estate: &Estate, what: &str| {
        let before = full(estate);
        estate.wait(what, Duration::from_secs(60), || full(estate) >= before + 2);
    };
    wait_full(&estate, "full points at first");
    let calm = traffic.longest(&[]);
    let mut told = vec![format!("calm {} ms", calm.as_millis())];

    // A member that is paused: the others are held once for as long as a round waits, then it is left out.
    estate.pause("m2", true);
    let missed = |estate: &Estate, who: &str| {
        let last = group(estate)["last"].clone();
        last["missing"].as_array().is_some_and(|m| m.contains(&json!(who)))
    };
    estate.wait("points without m2", Duration::from_secs(30), || missed(&estate, "m2"));
    let view = group(&estate);
    assert!(view["partial_points"].as_u64().unwrap() > 0 && view["health"] != "healthy", "{view}");
    assert!(view["causes"].as_object().unwrap().keys().any(|k| k.starts_with("m2:")), "{view}");
    std::thread::sleep(Duration::from_secs(3));
    told.push(format!("a paused member: others {} ms", traffic.longest(&[2]).as_millis()));
    estate.pause("m2", false);
    wait_full(&estate, "full points after the pause");
    traffic.longest(&[]);

    // A member that is dead.
    estate.kill("m3");
    estate.wait("points without m3", Duration::from_secs(30), || missed(&estate, "m3"));
    let held = traffic.longest(&[3]);
    assert!(held < HELD_MAX, "a dead member: {held:?}");
    told.push(format!("a dead member: others {} ms", held.as_millis()));
    estate.start_role("m3");
    wait_full(&estate, "full points after the restart");

    // A member that is cut off; it goes on alone, and so do its own points.
    estate.cut("m1", true);
    estate.wait("points without m1", Duration::from_secs(40), || missed(&estate, "m1"));
    std::thread::sleep(Duration::from_secs(2));
    let held = traffic.longest(&[]);
    assert!(held < HELD_MAX, "a member that is cut off: {held:?}");
    told.push(format!("a member cut off: all {} ms", held.as_millis()));
    estate.cut("m1", false);
    wait_full(&estate, "full points after the cut");

    // The coordinator paused, cut off, dead: nobody is held for long, and points of each machine go on.
    let alone = |estate: &Estate| listed(estate).iter().filter(|p| p.machine == "m0").count();
    for what in ["paused", "cut off", "dead"] {
        traffic.longest(&[]);
        match what {
            "paused" => estate.pause("coordinator", true),
            "cut off" => estate.cut("coordinator", true),
            _ => estate.kill("coordinator"),
        }
        let before = alone(&estate);
        estate.wait("points of the machine alone", Duration::from_secs(40), || alone(&estate) >= before + 2);
        let held = traffic.longest(&[]);
        assert!(held < HELD_MAX, "a coordinator that is {what}: {held:?}");
        told.push(format!("a coordinator {what}: all {} ms", held.as_millis()));
        match what {
            "paused" => estate.pause("coordinator", false),
            "cut off" => estate.cut("coordinator", false),
            _ => estate.start_role("coordinator"),
        }
        estate.wait("the coordinator answers", Duration::from_secs(30), || {
            estate.call::<Value>(&estate.control("coordinator"), &Request::Status).is_ok()
        });
        wait_full(&estate, &format!("full points after the coordinator was {what}"));
    }
    assert!(traffic.stop() > 100);
    println!("longest write, as the application saw it (hold_max is 200 ms): {}", told.join("; "));
}

#[test]
fn groups_are_made_grown_and_shrunk_while_members_replicate() {
    let options = EstateOptions { machines: 4, beside: true, ..EstateOptions::default() };
    let mut estate = Estate::start(options);
    let show = |args: &[&str]| estate.json("coordinator", args);
    let made = show(&["group", "create", "g", "--machine", "m0", "--machine", "m1", "--interval", "1h"]);
    assert_eq!(made["members"].as_array().unwrap().len(), 2);
    wait_ready(&estate);
    assert_eq!(mark(&estate, false).unwrap().members, 2);
    let states = |estate: &Estate| -> Vec<String> {
        let of = |m: &String| estate.json(m, &["status"])[0]["machines"][0]["disks"][0]["state"].as_str().unwrap().to_owned();
        estate.machines().iter().map(of).collect()
    };
    assert_eq!(states(&estate), ["delta"; 4]);
    // Grown: no replication again, and the newcomer is in the next point.
    let grown = show(&["group", "add", "g", "m2"]);
    assert!(grown["epoch"].as_u64() > made["epoch"].as_u64());
    assert_eq!(states(&estate), ["delta"; 4]);
    wait_ready(&estate);
    std::thread::sleep(Duration::from_millis(700));
    let point = mark(&estate, false).unwrap();
    assert_eq!((point.members, point.missing.len()), (3, 0));
    let newcomer = part(&point.point, "m2");
    estate.wait("the newcomer's part is listed", Duration::from_secs(30), || listed(&estate).iter().any(|p| p.id == newcomer));
    // Shrunk.
    show(&["group", "remove", "g", "m0"]);
    std::thread::sleep(Duration::from_millis(700));
    let point = mark(&estate, false).unwrap();
    assert_eq!(point.members, 2);
    // Refused, with the reason.
    let refused = |args: &[&str]| {
        let control = estate.control("coordinator").to_string();
        let output = support::try_tool(env!("CARGO_BIN_EXE_tidegate"), &[args, &["--control", &control]].concat());
        assert_eq!(output.status.code(), Some(1), "{args:?}");
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    assert!(refused(&["group", "create", "h", "--machine", "m1"]).contains("is in group g"));
    assert!(refused(&["group", "show", "nope"]).contains("there are: g"));
    assert!(refused(&["group", "remove", "g", "m3"]).contains("not in group"));
    assert!(refused(&["group", "create", "i", "--machine", "m3", "--interval", "1ms"]).contains("between 1s and 24h"));
    // A policy that wants all or nothing holds nobody for nothing.
    show(&["group", "set", "g", "--partial", "no"]);
    estate.kill("m2");
    estate.wait("m2 is known to be gone", Duration::from_secs(30), || {
        group(&estate)["members"].as_array().unwrap().iter().any(|m| m["machine"] == "m2" && m["connected"] == false)
    });
    let error = mark(&estate, false).unwrap_err();
    assert!(error.contains("m2: not connected"), "{error}");
    // Everything survives a restart of the process that holds it.
    let before = group(&estate);
    estate.kill("process-server");
    estate.start_role("process-server");
    estate.wait("the coordinator answers", Duration::from_secs(30), || {
        estate.call::<Value>(&estate.control("coordinator"), &Request::Status).is_ok()
    });
    let after = group(&estate);
    assert_eq!((&before["epoch"], &before["partial"]), (&after["epoch"], &after["partial"]));
    estate.start_role("m2");
    wait_ready(&estate);
    std::thread::sleep(Duration::from_millis(700));
    assert_eq!(mark(&estate, false).unwrap().members, 2);
    estate.json("coordinator", &["group", "list"]);
    let control = estate.control("coordinator").to_string();
    support::tool(env!("CARGO_BIN_EXE_tidegate"), &["group", "delete", "g", "--control", &control]);
    assert!(mark(&estate, false).unwrap_err().contains("there are none"));
}
