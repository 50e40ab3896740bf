//! Commands, exit codes, JSON and metrics, against real processes.
#![allow(clippy::unwrap_used, clippy::disallowed_methods, reason = "tests may unwrap, and wait by the clock")]

mod support;

use std::io::{Read, Write};
use std::net::TcpStream;

use support::{Cluster, Options, ROLES, s, tool};

fn http(port: u16, path: &str) -> String {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    write!(stream, "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    text
}

#[test]
fn status_machines_disks_and_points_answer_in_tables_and_json() {
    let mut cluster = Cluster::start(Options::default());
    tool("qemu-io", &["-f", "raw", "-c", "write -P 1 0 4M", &cluster.nbd_uri(0)]);
    cluster.wait_for_delta();
    let point = cluster.mark("a label");
    let control = cluster.control("master-target");
    let ask = ["status", "--control", &control].map(str::to_owned);
    let status = || std::process::Command::new(env!("CARGO_BIN_EXE_tidegate")).args(&ask).output().unwrap();
    cluster.wait("healthy is 0", std::time::Duration::from_secs(10), || status().status.code() == Some(0));
    let status = status();
    assert!(String::from_utf8_lossy(&status.stdout).contains("m1/d0"));
    let machines = cluster.json("master-target", &["machine", "list"]);
    assert_eq!(machines[0]["name"], "m1");
    assert!(machines[0]["rpo_seconds"].as_f64().unwrap() < 60.0);
    let disk = cluster.json("master-target", &["disk", "show", "m1/d0"]);
    assert_eq!(disk["state"], "delta");
    assert_eq!(disk["size_bytes"], 64 << 20);
    assert_eq!(disk["rpo_parts"].as_array().unwrap().len(), 4);
    assert!(cluster.tidegate(&["machine", "show", "m1", "--control", &control]).contains("points"));
    assert!(cluster.tidegate(&["disk", "list", "--control", &control]).contains("delta"));
    assert!(cluster.tidegate(&["point", "list", "--machine", "m1", "--control", &control]).contains("a label"));
    let shown = cluster.json("master-target", &["point", "show", &point[..8]]);
    assert_eq!(shown["label"], "a label");
    assert_eq!(shown["kind"], "crash-consistent");
    let unknown = cluster.try_tidegate(&["point", "list", "--machine", "nobody", "--control", &control]);
    assert_eq!(unknown.status.code(), Some(1));
    let wrong_server = cluster.try_tidegate(&["point", "mark", "--machine", "m1", "--control", &control]);
    assert!(String::from_utf8_lossy(&wrong_server.stderr).contains("agent"), "it says whom to ask");
    cluster.kill("process-server");
    let agent = ["status", "--control", &cluster.control("agent")].map(str::to_owned);
    cluster.wait("critical is 2", std::time::Duration::from_secs(10), || {
        std::process::Command::new(env!("CARGO_BIN_EXE_tidegate")).args(&agent).output().unwrap().status.code() == Some(2)
    });
    for role in ["agent", "master-target"] {
        assert_eq!(cluster.terminate(role), Some(0), "{role} ends cleanly on SIGTERM");
    }
}

#[test]
fn every_role_shows_its_rungs_to_prometheus() {
    let mut cluster = Cluster::start(Options::default());
    tool("qemu-io", &["-f", "raw", "-c", "write -P 1 0 4M", &cluster.nbd_uri(0)]);
    cluster.wait_for_delta();
    cluster.mark("x");
    std::thread::sleep(std::time::Duration::from_millis(2100));
    let rungs = [
        ("agent", &["captured", "sent", "cached", "safe"][..]),
        ("process-server", &["accepted", "cached", "forwarded", "acknowledged", "released"]),
        ("master-target", &["received", "journaled", "applied", "checkpointed"]),
    ];
    for (role, rungs) in rungs {
        let port = cluster.metrics_port(role);
        let text = http(port, "/metrics");
        for rung in rungs {
            assert!(text.contains(&format!("tidegate_position{{disk=\"m1/d0\",rung=\"{rung}\"}}")), "{role} lacks {rung}:\n{text}");
        }
        assert!(http(port, "/livez").contains("200 OK"));
        assert!(http(port, "/readyz").contains("200 OK"));
    }
    let text = http(cluster.metrics_port("master-target"), "/metrics");
    for name in ["tidegate_rpo_seconds", "tidegate_rpo_part_seconds", "tidegate_journal_commit_seconds", "tidegate_points"] {
        assert!(text.contains(name), "{name}");
    }
    assert!(http(cluster.metrics_port("agent"), "/metrics").contains("tidegate_marker_hold_seconds"));
}

#[test]
fn usage_and_configuration_mistakes_are_exit_code_2_and_say_what_to_write() {
    let cluster = Cluster::prepare(Options::default());
    let bad = cluster.path("bad.toml");
    std::fs::write(&bad, std::fs::read_to_string(cluster.config("agent")).unwrap().replace("interval", "intervall")).unwrap();
    for args in [&["check", "config", "--role", "agent", s(&bad)][..], &["agent", "--config", s(&bad)]] {
        let output = cluster.try_tidegate(args);
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(text.contains("did you mean `interval`"), "{text}");
        let expected = if args[0] == "agent" { 2 } else { 1 };
        assert_eq!(output.status.code(), Some(expected));
    }
    assert_eq!(cluster.try_tidegate(&["agent", "--config", "/does/not/exist"]).status.code(), Some(2));
    assert_eq!(cluster.try_tidegate(&["no-such-command"]).status.code(), Some(2));
    assert_eq!(cluster.try_tidegate(&["status", "--control", "unix:/does/not/exist"]).status.code(), Some(3));
    for role in ROLES {
        assert!(cluster.tidegate(&["check", "config", s(&cluster.config(role))]).contains("good"));
    }
    assert!(cluster.tidegate(&["pki", "show", s(&cluster.path("tls-agent/cert.pem"))]).contains("spiffe://tidegate/agent/m1"));
    assert!(cluster.tidegate(&["completions", "bash"]).contains("tidegate"));
    for command in [
        "quickstart",
        "agent",
        "process-server",
        "master-target",
        "status",
        "machine",
        "disk",
        "point",
        "recover",
        "pki",
        "check",
        "completions",
    ] {
        assert!(cluster.tidegate(&[command, "--help"]).contains("Example"), "{command} --help has no example");
    }
}

#[test]
fn quickstart_reports_in_json_and_leaves_what_it_compared() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("qs");
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_tidegate"))
        .args(["quickstart", "--state", s(&state), "--size", "134217728", "--seconds", "3", "--json"])
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(report["initial_replication"]["bytes_per_second"].as_f64().unwrap() > 0.0);
    assert!(report["workload"]["writes"].as_u64().unwrap() > 0);
    assert!(report["points"].as_u64().unwrap() >= 3);
    for key in ["p50", "p99", "max"] {
        assert!(report["rpo_seconds"][key].is_number() && report["marker_hold_seconds"][key].is_number());
    }
    let recovered = report["recovered"].as_array().unwrap();
    assert_eq!(recovered.len(), 3);
    for one in recovered {
        assert_eq!(one["identical"], true);
        let (path, format) = (one["path"].as_str().unwrap(), one["format"].as_str().unwrap());
        // A tool that nobody here wrote agrees.
        tool("qemu-img", &["compare", "-f", format, "-F", "raw", path, &format!("{path}.expected.raw")]);
    }
}
