//! Losing a process server, its disk and all: the agent goes on at another one, from where the master target stands.
#![allow(clippy::unwrap_used, clippy::disallowed_methods, reason = "tests may unwrap, and wait by the clock")]

mod support;

use std::time::{Duration, Instant};

use support::known::Known;
use support::way::Way;
use support::writer::Writer;
use support::{Cluster, Options, Rng, gateway_role};

const SIZE: u64 = 64 << 20;

fn options() -> Options {
    Options { disk_bytes: SIZE, gateways: 2, cache: "writeback", format: "raw", ..Options::default() }
}

fn missing(cluster: &Cluster) -> u64 {
    cluster.agent_disk(0)["missing_bytes"].as_u64().unwrap_or(u64::MAX)
}

fn gateway(cluster: &Cluster) -> String {
    cluster.json("agent", &["status"])[0]["gateway"].as_str().unwrap_or_default().to_owned()
}

fn wait_for_gateway(cluster: &Cluster, name: &str) {
    cluster.wait(&format!("the agent is at {name}"), Duration::from_secs(30), || {
        gateway(cluster) == name && cluster.json("agent", &["status"])[0]["connected"] == true
    });
}

/// Both are killed in turn, with all that they have on disk, while changes that only they have are on their way. Nothing is read
/// from the source again, and points that were made in between are exact.
#[test]
fn a_process_server_that_dies_with_its_disk_costs_nothing_but_a_moment() {
    let mut cluster = Cluster::start(options());
    cluster.wait_for_delta();
    let before = cluster.metric("agent", "tidegate_resynchronisations_total");
    let writer = Writer::start(cluster.nbd(0), SIZE, 2, 20 << 20, 11);
    let (mut known, mut rng, mut away) = (Known::default(), Rng::new(5), Vec::new());
    for loss in 0..4 {
        let (dies, stays) = (gateway_role(loss % 2), gateway_role((loss + 1) % 2));
        wait_for_gateway(&cluster, &format!("gw{}", loss % 2 + 1));
        std::thread::sleep(Duration::from_millis(300 + rng.below(500)));
        // What it has cannot reach the master target any more: only it and the agent have it.
        if loss == 1 {
            cluster.kill("master-target");
            std::thread::sleep(Duration::from_millis(700));
        }
        known.mark(&cluster, &writer, &format!("before-{loss}"));
        cluster.kill(&dies);
        std::fs::remove_dir_all(cluster.path(&dies)).unwrap();
        let died = Instant::now();
        known.mark(&cluster, &writer, &format!("after-{loss}"));
        if loss == 1 {
            cluster.start_role("master-target");
        }
        wait_for_gateway(&cluster, &format!("gw{}", (loss + 1) % 2 + 1));
        cluster.wait("the disk is sent again", Duration::from_secs(30), || cluster.agent_disk(0)["state"] == "delta");
        away.push(died.elapsed().as_secs_f64());
        assert_eq!(missing(&cluster), 0, "nothing is read from the source again");
        assert!(cluster.runs(&stays));
        cluster.start_role(&dies);
    }
    let points = known.check(&cluster);
    let resyncs = cluster.metric("agent", "tidegate_resynchronisations_total");
    assert_eq!(resyncs, before, "no region was sent again");
    let written = writer.stop();
    cluster.wait_for_delta();
    cluster.mark("end");
    support::tool("qemu-img", &["compare", "-f", "raw", "-F", "raw", support::s(&cluster.disk(0)), support::s(&cluster.replica(0))]);
    assert!(written.longest < Duration::from_secs(2), "{written:?}");
    eprintln!(
        "4 process servers lost with their disks, away {away:.1?} s, {} writes ({} MB), longest {:.0?}, {points} points materialised, 0 differences, 0 resynchronisations",
        written.writes,
        written.bytes / 1_000_000,
        written.longest
    );
}

/// The one that was thought dead wakes with changes that were sent elsewhere since: none of them is applied.
#[test]
fn one_that_wakes_late_is_fenced() {
    let mut cluster = Cluster::start(options());
    cluster.wait_for_delta();
    let writer = Writer::start(cluster.nbd(0), SIZE, 2, 20 << 20, 12);
    let mut known = Known::default();
    for round in 0..3 {
        let (sleeps, name) = (gateway_role(round % 2), format!("gw{}", (round + 1) % 2 + 1));
        std::thread::sleep(Duration::from_millis(500));
        signal(&cluster, &sleeps, "STOP");
        known.mark(&cluster, &writer, &format!("asleep-{round}"));
        // The connection is not closed by anybody: it is the silence that is noticed.
        wait_for_gateway(&cluster, &name);
        known.mark(&cluster, &writer, &format!("elsewhere-{round}"));
        signal(&cluster, &sleeps, "CONT");
        std::thread::sleep(Duration::from_millis(700));
        known.mark(&cluster, &writer, &format!("awake-{round}"));
        assert_eq!(gateway(&cluster), name, "nobody goes back to it");
    }
    let points = known.check(&cluster);
    let fenced = cluster.metric("process-server", "tidegate_refused_total{reason=\"fenced\"}")
        + cluster.metric("process-server-2", "tidegate_refused_total{reason=\"fenced\"}");
    assert!(fenced >= 2.0, "{fenced}");
    let written = writer.stop();
    cluster.wait_for_delta();
    cluster.mark("end");
    support::tool("qemu-img", &["compare", "-f", "raw", "-F", "raw", support::s(&cluster.disk(0)), support::s(&cluster.replica(0))]);
    eprintln!(
        "3 process servers woken late, fenced {fenced} times, {} writes, {points} points materialised, 0 differences",
        written.writes
    );
}

/// It lives, and so does its cache; only its way to the master target is cut. The agent goes where there is a way, and the one that
/// was cut off is fenced when it is back. With both cut off, nobody moves.
#[test]
fn one_that_is_cut_off_from_the_master_target_is_left() {
    let mut cluster = Cluster::prepare(options());
    let ways = Way::between(&cluster);
    for role in ["master-target", "process-server", "process-server-2", "agent"] {
        cluster.start_role(role);
    }
    cluster.wait_for_delta();
    let before = cluster.metric("agent", "tidegate_resynchronisations_total");
    let writer = Writer::start(cluster.nbd(0), SIZE, 2, 20 << 20, 14);
    let mut known = Known::default();
    known.mark(&cluster, &writer, "whole");
    ways[0].cut(true);
    let cut = Instant::now();
    known.mark(&cluster, &writer, "cut");
    // The silence of the link is noticed, the other one is asked and is given time to be no better.
    cluster.wait("the agent goes to gw2", Duration::from_secs(60), || gateway(&cluster) == "gw2");
    cluster.wait("the disk is sent from there", Duration::from_secs(30), || cluster.agent_disk(0)["state"] == "delta");
    let took = cut.elapsed().as_secs_f64();
    known.mark(&cluster, &writer, "elsewhere");
    // Points that were made meanwhile arrive by the other way, before the first is back.
    cluster.wait("the points are listed", Duration::from_secs(30), || {
        let points = cluster.points();
        known.0.iter().all(|(id, _)| points.iter().any(|p| p["id"] == id.as_str()))
    });
    ways[1].cut(true);
    cluster.wait("the agent says why nothing goes on", Duration::from_secs(60), || {
        cluster.json("agent", &["status"])[0]["reason"].as_str().is_some_and(|reason| reason.contains("no process server reaches"))
    });
    assert_eq!(gateway(&cluster), "gw2", "there is nothing better");
    ways.iter().for_each(|way| way.cut(false));
    known.mark(&cluster, &writer, "healed");
    let points = known.check(&cluster);
    assert_eq!(cluster.metric("agent", "tidegate_resynchronisations_total"), before, "no region was sent again");
    let written = writer.stop();
    cluster.wait_for_delta();
    cluster.mark("end");
    support::tool("qemu-img", &["compare", "-f", "raw", "-F", "raw", support::s(&cluster.disk(0)), support::s(&cluster.replica(0))]);
    assert!(written.longest < Duration::from_secs(2), "{written:?}");
    eprintln!(
        "a process server cut off, left after {took:.1} s, then both cut off; {} writes, longest {:.0?}, {points} points materialised, 0 differences, 0 resynchronisations",
        written.writes, written.longest
    );
}

/// Taken out of service for maintenance: agents go elsewhere at once, and come back when the other one is drained.
#[test]
fn a_process_server_is_drained_without_a_gap() {
    let cluster = Cluster::start(options());
    let mut cluster = cluster;
    cluster.wait_for_delta();
    let before = cluster.metric("agent", "tidegate_resynchronisations_total");
    let writer = Writer::start(cluster.nbd(0), SIZE, 2, 20 << 20, 13);
    let mut known = Known::default();
    known.mark(&cluster, &writer, "before");
    let drained = Instant::now();
    let text = cluster.tidegate(&["gateway", "drain", "--control", &cluster.control("process-server")]);
    let took = drained.elapsed();
    assert!(cluster.get("process-server", "/readyz").contains(" 503 "), "whoever balances agents must not send any here");
    assert!(cluster.get("process-server-2", "/readyz").contains(" 200 "));
    assert!(text.contains("may be stopped"), "{text}");
    wait_for_gateway(&cluster, "gw2");
    known.mark(&cluster, &writer, "elsewhere");
    // It stays so over a restart, until somebody says otherwise.
    cluster.terminate("process-server");
    cluster.start_role("process-server");
    cluster.wait("it says that it is out of service", Duration::from_secs(20), || {
        cluster.json("process-server", &["status"])[0]["reason"].as_str().is_some_and(|reason| reason.contains("out of service"))
    });
    cluster.tidegate(&["gateway", "resume", "--control", &cluster.control("process-server")]);
    cluster.tidegate(&["gateway", "drain", "--control", &cluster.control("process-server-2")]);
    wait_for_gateway(&cluster, "gw1");
    known.mark(&cluster, &writer, "back");
    writer.stop();
    // All of them: it stays where it is, and that drain does not end.
    let mut waits = std::process::Command::new(env!("CARGO_BIN_EXE_tidegate"))
        .args(["gateway", "drain", "--control", &cluster.control("process-server")])
        .spawn()
        .unwrap();
    cluster.wait("the agent says that it has nowhere to go", Duration::from_secs(20), || {
        cluster.json("agent", &["status"])[0]["reason"].as_str().is_some_and(|reason| reason.contains("no other one takes this machine"))
    });
    std::thread::sleep(Duration::from_secs(4));
    assert!(waits.try_wait().unwrap().is_none(), "an agent is still there");
    assert_eq!(gateway(&cluster), "gw1");
    // Both in service again: it moves once at most, not from one to the other.
    let moves = || cluster.log("agent").matches("connected to the process server").count();
    let so_far = moves();
    for role in ["process-server-2", "process-server"] {
        cluster.tidegate(&["gateway", "resume", "--control", &cluster.control(role)]);
    }
    std::thread::sleep(Duration::from_secs(6));
    assert!(moves() <= so_far + 1, "{} moves in 6 s", moves() - so_far);
    waits.kill().unwrap();
    waits.wait().unwrap();
    known.mark_at_rest(&cluster, "in-service");
    let points = known.check(&cluster);
    assert_eq!(cluster.metric("agent", "tidegate_resynchronisations_total"), before);
    eprintln!("drained in {:.1} s and back, {points} points materialised, 0 differences", took.as_secs_f64());
}

/// The process server that has the disk is not the preferred one, nobody can ask the master target, and the agent begins anew. What
/// it relies on is at that one only: the preferred one does not take the disk, and the agent finds back.
#[test]
fn an_agent_that_starts_while_the_master_target_is_away_finds_back_to_the_one_that_has_the_disk() {
    let mut cluster = Cluster::start(Options { agent: "[dirty_map]\nclean_after = \"1s\"\n".to_owned(), ..options() });
    cluster.wait_for_delta();
    let mut known = Known::default();
    let writer = Writer::start(cluster.nbd(0), SIZE, 2, 20 << 20, 15);
    known.mark(&cluster, &writer, "preferred");
    cluster.kill("process-server");
    wait_for_gateway(&cluster, "gw2");
    cluster.start_role("process-server");
    known.mark(&cluster, &writer, "elsewhere");
    writer.stop();
    cluster.wait("all of it is safe", Duration::from_secs(30), || {
        let points = cluster.points();
        known.0.iter().all(|(id, _)| points.iter().any(|p| p["id"] == id.as_str()))
    });
    // Until the agent keeps no trace of what the preferred one never had.
    std::thread::sleep(Duration::from_secs(4));
    cluster.kill("master-target");
    let writer = Writer::start(cluster.nbd(0), SIZE, 2, 20 << 20, 17);
    known.mark(&cluster, &writer, "only-cached");
    writer.stop();
    cluster.terminate("agent");
    cluster.start_role("agent");
    let began = Instant::now();
    wait_for_gateway(&cluster, "gw2");
    cluster.wait("the disk is sent there", Duration::from_secs(30), || {
        let disk = cluster.agent_disk(0);
        disk["state"] == "delta" && disk["missing_bytes"] == 0
    });
    let took = began.elapsed().as_secs_f64();
    let writer = Writer::start(cluster.nbd(0), SIZE, 2, 20 << 20, 16);
    known.mark(&cluster, &writer, "while-away");
    cluster.start_role("master-target");
    known.mark(&cluster, &writer, "together");
    let points = known.check(&cluster);
    writer.stop();
    assert!(!cluster.log("agent").contains("does not have what it acknowledged"), "nothing was lost");
    cluster.wait_for_delta();
    cluster.mark("end");
    support::tool("qemu-img", &["compare", "-f", "raw", "-F", "raw", support::s(&cluster.disk(0)), support::s(&cluster.replica(0))]);
    eprintln!(
        "an agent started while the master target was away: sent again after {took:.1} s, {points} points materialised, 0 differences"
    );
}

fn signal(cluster: &Cluster, role: &str, signal: &str) {
    support::tool("kill", &[&format!("-{signal}"), &cluster.pid(role).to_string()]);
}
