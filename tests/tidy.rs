//! The layout checks itself: imports go one way, every file states its duty, pure files stay pure, files stay readable.
#![allow(clippy::unwrap_used, clippy::disallowed_methods, reason = "tests may unwrap, and wait by the clock")]

use std::fs;
use std::path::{Path, PathBuf};

fn sources(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(sources(&path));
        } else if path.extension().is_some_and(|e| e == "rs") {
            found.push(path);
        }
    }
    found.sort();
    found
}

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// Product code only: what follows the first test module is not looked at.
fn code(path: &Path) -> String {
    let text = fs::read_to_string(path).unwrap();
    text.split("#[cfg(test)]").next().unwrap_or_default().to_owned()
}

#[test]
fn every_file_states_its_duty_on_its_first_line() {
    let bare: Vec<_> = sources(&root().join("src"))
        .into_iter()
        .chain(sources(&root().join("tests")))
        .filter(|p| !fs::read_to_string(p).unwrap().starts_with("//! "))
        .collect();
    assert!(bare.is_empty(), "files without a duty on line one: {bare:?}");
}

#[test]
fn no_file_is_longer_than_600_lines() {
    let long: Vec<_> = sources(&root().join("src")).into_iter().filter(|p| fs::read_to_string(p).unwrap().lines().count() > 600).collect();
    assert!(long.is_empty(), "a room inside wants its own door: {long:?}");
}

#[test]
fn imports_go_one_way() {
    // A module may use those that stand after it, and itself.
    let servers = ["agent", "process_server", "master_target", "coordinator"];
    let ground = [
        "disk", "nbd", "crypto", "control", "observe", "config", "storage", "wire", "checksum", "clock", "hook", "priority", "sabotage",
        "model",
    ];
    let may: &[(&str, &[&str])] = &[
        ("model", &[]),
        ("checksum", &[]),
        ("clock", &[]),
        ("priority", &[]),
        ("hook", &[]),
        ("wire", &["model", "checksum", "clock"]),
        ("sabotage", &[]),
        ("storage", &["model", "checksum", "clock", "wire", "sabotage", "panics"]),
        ("config", &["model", "wire", "crypto", "disk"]),
        ("observe", &["model", "clock"]),
        ("crypto", &["model", "checksum", "clock", "storage", "wire", "config"]),
        ("disk", &["model", "checksum", "storage", "sabotage"]),
        ("nbd", &["model", "storage", "clock"]),
        ("control", &["model"]),
    ];
    for path in sources(&root().join("src")) {
        let relative = path.strip_prefix(root().join("src")).unwrap();
        let module = relative.components().next().unwrap().as_os_str().to_str().unwrap().trim_end_matches(".rs").to_owned();
        if matches!(module.as_str(), "lib" | "main" | "cli") {
            continue;
        }
        let text = code(&path);
        for (at, _) in text.match_indices("crate::") {
            let used: String = text[at + 7..].chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
            let allowed = if used == module {
                true
            } else if servers.contains(&module.as_str()) {
                ground.contains(&used.as_str())
            } else {
                may.iter().find(|(m, _)| *m == module).is_some_and(|(_, list)| list.contains(&used.as_str()))
            };
            assert!(
                allowed,
                "{} uses crate::{used}: imports go cli -> servers -> (disk, nbd, crypto, control, observe) -> (wire, storage) -> model",
                relative.display()
            );
        }
    }
}

#[test]
fn pure_files_do_no_io() {
    let pure = [
        "agent/rest/guest_agent.rs",
        "agent/rest/plan.rs",
        "agent/backlog.rs",
        "agent/regions.rs",
        "agent/choice.rs",
        "agent/scrub.rs",
        "process_server/adoption.rs",
        "process_server/pressure.rs",
        "master_target/receive/claim.rs",
        "agent/consistency/member.rs",
        "coordinator/groups.rs",
        "coordinator/rounds.rs",
        "agent/dirty_map/format.rs",
        "process_server/stream.rs",
        "process_server/optimize/batcher.rs",
        "process_server/optimize/fold.rs",
        "master_target/points.rs",
        "master_target/groups.rs",
        "master_target/lookup.rs",
        "master_target/apply/plan.rs",
        "master_target/receive/order.rs",
        "master_target/retain/atlas.rs",
        "master_target/retain/index.rs",
        "master_target/retain/loss.rs",
        "master_target/verify/digest.rs",
        "master_target/verify/rounds.rs",
        "disk/places.rs",
        "disk/vhdx/bat.rs",
        "disk/vhdx/log.rs",
        "disk/vhdx/format.rs",
        "storage/log/format.rs",
        "wire/batch.rs",
        "wire/consistency.rs",
        "wire/ingest.rs",
        "wire/forward.rs",
        "nbd/protocol.rs",
    ];
    for file in pure {
        let text = code(&root().join("src").join(file));
        for banned in ["async ", "tokio::", "std::fs", "std::net", "clock::now", "clock::wall_ms", "Uring"] {
            assert!(!text.contains(banned), "{file} must stay pure, it says {banned:?}");
        }
    }
}

#[test]
fn readme_names_every_metric_and_every_port() {
    let readme = fs::read_to_string(root().join("README.md")).unwrap();
    for metric in tidegate::observe::metrics::ALL {
        assert!(readme.contains(metric.name), "README does not mention {}", metric.name);
    }
    for port in ["9443", "9444", "20004"] {
        assert!(readme.contains(port));
    }
}

#[test]
fn configuration_examples_are_what_the_servers_accept() {
    use tidegate::config::{
        self, agent::AgentSettings, coordinator::CoordinatorSettings, master_target::MasterTargetSettings,
        process_server::ProcessServerSettings,
    };
    let file = |name: &str| root().join("config").join(name);
    config::load::<AgentSettings>(&file("agent.toml")).unwrap();
    config::load::<ProcessServerSettings>(&file("process-server.toml")).unwrap();
    config::load::<MasterTargetSettings>(&file("master-target.toml")).unwrap();
    config::load::<CoordinatorSettings>(&file("coordinator.toml")).unwrap();
}

#[test]
fn a_mistyped_key_is_answered_with_the_nearest_one() {
    use tidegate::config::{self, agent::AgentSettings};
    let text = fs::read_to_string(root().join("config/agent.toml")).unwrap().replace("hold_max", "hold_mx");
    let error = config::parse::<AgentSettings>(Path::new("agent.toml"), &text).unwrap_err().to_string();
    assert!(error.contains("did you mean `hold_max`"), "{error}");
}
