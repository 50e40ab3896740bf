//! Replication groups at a master target, with real servers and machines whose agents are stand-ins: points of several machines,
//! also from agents that lie; failovers of a whole group at one point, with kills of the master target.
#![allow(clippy::unwrap_used, clippy::disallowed_methods, reason = "tests may unwrap, and wait by the clock")]

#[path = "support/feeder.rs"]
mod feeder;
#[path = "support/site.rs"]
mod site;
mod support;

use std::fs;

use serde_json::Value;
use site::Site;
use support::s;
use tidegate::model::{GroupPart, MachineId, Marker, PointId, PointKind};

const SHOP: [&str; 3] = ["web01", "web02", "db01"];

/// One machine has two disks; the ladder keeps all.
fn shop(target: &str) -> Site {
    Site::start(&[("web01", 2), ("web02", 1), ("db01", 1)], target)
}

fn ids(points: &Value) -> Vec<String> {
    points.as_array().unwrap().iter().map(|p| p["id"].as_str().unwrap().to_owned()).collect()
}

fn states(jobs: &Value) -> Vec<&str> {
    jobs.as_array().unwrap().iter().map(|j| j["state"].as_str().unwrap()).collect()
}

#[test]
fn points_of_a_group_are_listed_when_whole_shown_pinned_verified_and_brought_back() {
    let mut site = shop("");
    let first = site.round(&SHOP, &[], PointKind::App, Some("month-end"));
    site.wait_listed(first);
    // A round that goes on without the database, and one for which its marker never comes.
    let partial = site.round(&["web01", "web02"], &["db01"], PointKind::Crash, None);
    site.wait_listed(partial);
    let open = site.statement(&SHOP, &[]);
    for name in ["web01", "web02"] {
        site.machines[name].mark(site.machines[name].part(&open, PointKind::Crash, None));
    }
    site.wait("the open point waits", || site.status()["waiting"] == 1);
    assert_eq!(site.status()["waiting_for"], serde_json::json!(["db01"]));
    // Of a machine of two disks whose second has no marker yet nothing is listed.
    let torn = site.statement(&SHOP, &[]);
    let part = site.machines["web01"].part(&torn, PointKind::Crash, None);
    site.machines["web01"].mark_on(part.clone(), vec![0]);

    let points = site.group_points();
    assert_eq!(points.iter().map(|p| p["id"].as_str().unwrap()).collect::<Vec<_>>(), [first.to_string(), partial.to_string()]);
    assert_eq!((points[0]["kind"].as_str(), points[0]["label"].as_str()), (Some("app-consistent"), Some("month-end")));
    assert_eq!((&points[1]["missing"], &points[1]["machines"]), (&serde_json::json!(["db01"]), &serde_json::json!(3)));
    let table = site.ask(&["point", "list", "--group", "shop"]);
    assert!(table.contains("3 of 3") && table.contains("2 of 3, missing: db01"), "{table}");
    let listed = site.json(&["point", "list", "--machine", "web02"]);
    assert_eq!(listed.as_array().unwrap().len(), 3);
    assert_eq!((listed[0]["group"].as_str(), listed[0]["group_point"].as_str()), (Some("shop"), Some(&first.to_string()[..])));
    assert_eq!(listed[1]["group_members"], serde_json::json!([2, 3]));
    assert!(listed[2]["group"].is_null(), "a part of a point that is not whole is its machine's own");
    let table = site.ask(&["point", "list"]);
    assert!(table.contains(" shop 2/3") && table.contains("GROUP"), "{table}");

    // A label means the group where a group is meant, and the part where a machine is.
    let shown = site.json(&["point", "show", "month-end"]);
    assert_eq!((shown["id"].as_str(), shown["parts"].as_array().unwrap().len()), (Some(&first.to_string()[..]), 3));
    assert!(site.ask(&["point", "show", &first.to_string()[..8]]).contains("part of db01"));
    assert!(site.ask(&["point", "show", listed[0]["id"].as_str().unwrap()]).contains("a part of its point"));
    let pinned = site.json(&["point", "pin", "month-end"]);
    assert_eq!(pinned["pinned"], true);
    assert!(site.json(&["point", "list"]).as_array().unwrap().iter().filter(|p| p["pinned"] == true).count() == 3);
    let half = site.ask(&["point", "unpin", &PointId::part(first, site.machines["db01"].id()).to_string()]);
    assert!(half.contains("of db01"), "{half}");
    assert_eq!(site.group_points()[0]["pinned"], false, "only pinned when every part is");
    let verified = site.json(&["point", "verify", &first.to_string()]);
    assert!(verified.as_array().unwrap().iter().all(|v| v["state"] == "good") && verified.as_array().unwrap().len() == 3, "{verified}");

    // A disk is of one machine, which has to be said.
    let out = site.path("out.raw");
    let export = ["recover", "export", "month-end", "--disk", "d0", "--output", s(&out)];
    assert!(site.refused(&export).contains("--machine (db01, web01, web02)"));
    site.ask(&[&export[..], &["--machine", "web01"]].concat());
    assert!(fs::read(&out).unwrap() == site.models[&first]["web01"][0], "web01/d0 at the group's point");
    assert!(site.refused(&["point", "show", &open.point.to_string()]).contains("not every machine has its part"));
    assert!(site.refused(&["point", "list", "--group", "depot"]).contains("there are points of shop"));

    let status = site.status();
    assert_eq!(
        (status["newest"]["point"].as_str(), status["newest_full"]["point"].as_str()),
        (Some(&partial.to_string()[..]), Some(&first.to_string()[..]))
    );
    let control = format!("unix:{}", site.path("master-target.sock").display());
    let table = support::try_tool(env!("CARGO_BIN_EXE_tidegate"), &["status", "--control", &control]);
    assert!(String::from_utf8_lossy(&table.stdout).contains("NEWEST OF ALL"), "{}", String::from_utf8_lossy(&table.stdout));
    site.wait("metrics", || {
        let text = site.metrics();
        text.contains("tidegate_group_points{group=\"shop\"} 2") && text.contains("tidegate_group_points_waiting{group=\"shop\"} 1")
    });

    // What waits is found again after a crash, and becomes whole when the last marker comes.
    site.kill("master-target");
    site.start_role("master-target");
    assert_eq!((site.group_points().len(), site.status()["waiting"].as_u64()), (2, Some(1)));
    site.machines["web01"].mark_on(part, vec![1]);
    for (name, statement) in [("db01", &open), ("web02", &torn), ("db01", &torn)] {
        site.machines[name].mark(site.machines[name].part(statement, PointKind::Crash, None));
    }
    site.wait_listed(open.point);
    site.wait_listed(torn.point);
    assert_eq!(site.status()["waiting"], 0);
}

#[test]
fn parts_that_lie_make_no_group_point_and_keep_nobody_from_one() {
    let mut site = Site::start(&[("web01", 1), ("web02", 1), ("mallory", 1)], "");
    let good = site.round(&["web01", "web02"], &[], PointKind::Crash, None);
    site.wait_listed(good);
    let mark = |site: &Site, name: &str, statement: &GroupPart, change: &dyn Fn(Marker) -> Marker| {
        let machine = &site.machines[name];
        let marker = change(machine.part(statement, PointKind::Crash, None));
        machine.mark(marker.clone());
        site.wait("the machine's own point", || ids(&site.json(&["point", "list", "--machine", name])).contains(&marker.point.to_string()));
    };
    let same = |marker: Marker| marker;
    // One says that a third machine is missing.
    let honest = site.statement(&["web01", "web02"], &[]);
    mark(&site, "web01", &honest, &same);
    mark(&site, "web02", &GroupPart { missing: vec!["db01".parse().unwrap()], ..honest.clone() }, &same);
    assert!(site.refused(&["point", "show", &honest.point.to_string()]).contains("contradict each other"));
    assert_eq!((site.status()["conflicting"].as_u64(), site.group_points().len()), (Some(1), 1));
    // A stranger claims a part of a point that does not name it, under its own id and under a member's; then the members bring theirs.
    let next = site.statement(&["web01", "web02"], &[]);
    mark(&site, "mallory", &next, &same);
    let member = PointId::part(next.point, MachineId::from_name(&"web02".parse().unwrap()));
    mark(&site, "web01", &next, &same);
    mark(&site, "web02", &next, &same);
    site.wait_listed(next.point);
    let later = site.statement(&["web01", "web02"], &[]);
    mark(&site, "mallory", &later, &|marker| Marker { point: PointId(uuid::Uuid::new_v4()), ..marker });
    assert_eq!(ids(&site.json(&["point", "list", "--machine", "mallory"])).len(), 2, "its own points are good");
    assert!(!ids(&site.json(&["point", "list", "--machine", "mallory"])).contains(&member.to_string()));
    // A member that no machine of this master target can be: waits, and says so.
    let elsewhere = site.statement(&["web01", "web02", "moon01"], &[]);
    mark(&site, "web01", &elsewhere, &same);
    site.wait("it waits", || site.status()["waiting"] == 1);
    assert_eq!(site.status()["not_here"].as_array().unwrap().len(), 2 - 1);
    let control = format!("unix:{}", site.path("master-target.sock").display());
    let text = support::try_tool(env!("CARGO_BIN_EXE_tidegate"), &["status", "--control", &control]);
    assert!(String::from_utf8_lossy(&text.stdout).contains("a group lives on one master target"));
    // A point in the group's name that no coordinator has signed, or that says something else than was signed: the machine's own.
    let mut lie = site.statement(&["web01"], &[]);
    mark(&site, "web01", &lie, &|marker| Marker { proof: vec![], ..marker });
    lie.point = PointId(uuid::Uuid::new_v4());
    let signed = GroupPart { members: honest.members.clone(), ..lie.clone() };
    let proof = site.machines["web01"].part(&signed, PointKind::Crash, None).proof;
    mark(&site, "web01", &lie, &|marker| Marker { proof: proof.clone(), ..marker });
    assert!(!site.group_points().iter().any(|p| p["id"] == lie.point.to_string().as_str()));
    site.wait("they are counted", || {
        let text = site.metrics();
        text.contains("tidegate_group_conflicts_total 1") && text.contains("tidegate_refused_total{reason=\"group-point\"} 4")
    });
    assert_eq!(site.log().matches("contradict each other").count(), 1, "told once");
    // A marker in another machine's name ends its stream and lists nothing.
    let before = ids(&site.json(&["point", "list"])).len();
    let mallory = &site.machines["mallory"];
    let fake = Marker { machine: site.machines["web01"].id(), ..mallory.part(&later, PointKind::Crash, None) };
    mallory.mark(fake);
    let again = site.round(&["web01", "web02"], &[], PointKind::Crash, None);
    site.wait_listed(again);
    assert_eq!(ids(&site.json(&["point", "list"])).len(), before + 2);
}

/// A hook whose check fails for the machine that a file names.
fn hook(dir: &std::path::Path) -> String {
    let script = dir.join("hook.sh");
    let text = "#!/bin/sh\ncd \"$(dirname \"$0\")\"\nenv | grep ^TIDEGATE_ > \"$1-$TIDEGATE_MACHINE.env\"\n[ \"$1\" != check ] || [ ! -e \"broken-$TIDEGATE_MACHINE\" ]\n";
    fs::write(&script, text).unwrap();
    let command = |phase: &str| format!("{phase} = [\"/bin/sh\", {script:?}, \"{phase}\"]\n");
    format!("[[hook]]\nname = \"fake\"\n{}{}{}check_timeout = \"2s\"\n", command("start"), command("check"), command("stop"))
}

#[test]
fn a_group_is_tested_at_one_point_and_one_that_fails_leaves_the_others_standing() {
    let hooks = tempfile::tempdir().unwrap();
    let mut site = shop(&hook(hooks.path()));
    let first = site.round(&SHOP, &[], PointKind::App, Some("before"));
    site.wait_listed(first);
    let second = site.round(&SHOP, &[], PointKind::Crash, None);
    site.wait_listed(second);
    let jobs = site.json(&["failover", "test", "shop", "--hook", "fake"]);
    assert_eq!(states(&jobs), ["running"; 3]);
    site.check_served(&jobs, second);
    assert!(fs::read_to_string(hooks.path().join("start-db01.env")).unwrap().contains("TIDEGATE_GROUP=shop"));
    let older = site.json(&["failover", "test", "shop", "--point", "latest-app", "--detach"]);
    let run = older[0]["group_job"].as_str().unwrap().to_owned();
    site.wait("the second test stands", || states(&site.json(&["failover", "show", &run])) == ["running"; 3]);
    site.check_served(&site.json(&["failover", "show", &run]), first);
    let told = site.refused(&["failover", "cleanup", "shop"]);
    assert!(told.contains("several failovers") && told.contains(&run), "{told}");
    assert_eq!(states(&site.json(&["failover", "cleanup", &run])), ["cleaned"; 3]);
    assert_eq!(states(&site.json(&["failover", "cleanup", "shop"])), ["cleaned"; 3]);
    // One machine does not come up: the others stand, and it is told which.
    fs::write(hooks.path().join("broken-web02"), "").unwrap();
    let told = site.refused(&["failover", "test", "shop", "--point", "before", "--hook", "fake"]);
    assert!(told.contains("1 of 3 machines did not go on") && told.contains("web02 (failover"), "{told}");
    let jobs = site.json(&["failover", "show", "shop"]);
    assert_eq!(jobs.as_array().unwrap().iter().filter(|j| j["passed"] == true).count(), 2);
    site.check_served(&jobs, first);
    assert!(site.ask(&["failover", "show", "shop"]).contains("do         web02"));
    // A machine takes its part of the group's point, and the newest of all its machines.
    site.ask(&["failover", "cleanup", "shop"]);
    let third = site.round(&["web01", "db01"], &["web02"], PointKind::Crash, None);
    site.wait_listed(third);
    let of = |args: &[&str]| site.json(&[&["failover", "test", "web01", "--cleanup"], args].concat())["point"].as_str().unwrap().to_owned();
    let part = |point| PointId::part(point, site.machines["web01"].id()).to_string();
    assert_eq!(of(&["--point", "latest-multi-vm"]), part(second));
    assert_eq!(of(&["--point", "before"]), part(first));
    assert_eq!(of(&["--point", &third.to_string()]), part(third));
}

#[test]
fn a_group_fails_over_at_one_point_through_kills_and_back_and_is_committed() {
    let mut site = shop("");
    let first = site.round(&SHOP, &[], PointKind::App, None);
    let second = site.round(&SHOP, &[], PointKind::Crash, None);
    site.wait_listed(second);
    // What each machine wrote after the group's point is not in it: one of them even has a point of its own.
    let web02 = site.machines.get_mut("web02").unwrap();
    web02.write(0, 4096, 0xee, 128 << 10);
    let own = Marker {
        point: PointId(uuid::Uuid::new_v4()),
        group: None,
        ..web02.part(
            &GroupPart { point: first, group: "shop".parse().unwrap(), epoch: 1, sequence: 1, members: vec![], missing: vec![] },
            PointKind::Crash,
            None,
        )
    };
    let own_id = own.point.to_string();
    web02.mark(own);
    site.wait("its own point", || ids(&site.json(&["point", "list"])).contains(&own_id));
    site.machines.values_mut().for_each(feeder::Feeder::stop);
    site.kill("process-server");

    let plan = site.refused(&["failover", "unplanned", "shop"]);
    assert!(plan.contains("3 of 3 machines") && plan.contains("add --yes") && plan.matches("lost     ").count() == 3, "{plan}");
    let jobs = site.json(&["failover", "unplanned", "shop", "--yes", "--detach"]);
    assert_eq!(jobs.as_array().unwrap().len(), 3);
    site.kill("master-target");
    site.start_role("master-target");
    site.wait("it stands after the kill", || {
        let jobs = site.json(&["failover", "show", "shop"]);
        jobs.as_array().unwrap().iter().all(|j| j["state"] == "failed-over" && j["busy"] == false)
    });
    let jobs = site.json(&["failover", "show", "shop"]);
    site.check_served(&jobs, second);
    assert!(jobs.as_array().unwrap().iter().all(|j| j["group_point"] == second.to_string()), "{jobs}");
    let text = site.ask(&["failover", "list"]);
    assert!(text.contains(jobs[0]["group_job"].as_str().unwrap()), "{text}");
    assert!(site.status()["failover"].as_str().unwrap().contains("3 failed-over"));
    assert!(site.refused(&["failover", "unplanned", "shop", "--yes"]).contains("is failing over"));

    let jobs = site.json(&["failover", "change-point", "shop", "--point", "latest-app"]);
    site.check_served(&jobs, first);
    // One machine by itself leaves the common point, which is shown; the group brings them together again.
    site.ask(&["failover", "change-point", "web02", "--point", "latest"]);
    assert!(site.ask(&["failover", "show", "shop"]).contains("do not stand at one point"));
    site.json(&["failover", "change-point", "shop", "--point", &second.to_string()[..8]]);
    site.check_served(&site.json(&["failover", "show", "shop"]), second);
    assert_eq!(states(&site.json(&["failover", "cancel", "shop"])), ["cancelled"; 3]);
    assert_eq!(site.group_points().len(), 2, "nothing is lost before the commit");

    // One that has failed over by itself keeps the group from starting at all.
    site.ask(&["failover", "unplanned", "db01", "--yes"]);
    let told = site.refused(&["failover", "unplanned", "shop", "--yes"]);
    assert!(told.contains("db01"), "{told}");
    let jobs = site.json(&["failover", "list"]);
    assert!(jobs.as_array().unwrap().iter().filter(|j| j["over"] == false).all(|j| j["machine"] == "db01"), "{jobs}");
    site.ask(&["failover", "cancel", "db01"]);

    let jobs = site.json(&["failover", "unplanned", "shop", "--point", &first.to_string(), "--yes"]);
    site.check_served(&jobs, first);
    site.ask(&["point", "pin", &second.to_string()]);
    assert!(site.refused(&["failover", "commit", "shop", "--yes"]).contains("--drop-pinned"));
    assert!(states(&site.json(&["failover", "show", "shop"])) == ["failed-over"; 3], "none of them was committed");
    assert_eq!(states(&site.json(&["failover", "commit", "shop", "--yes", "--drop-pinned"])), ["committed"; 3]);
    site.check_served(&site.json(&["failover", "show", "shop"]), first);
    assert!(site.refused(&["failover", "cancel", "shop"]).contains("no way back"));
    assert_eq!(states(&site.json(&["failover", "cleanup", "shop"])), ["released"; 3]);
    for name in ["web02", "db01"] {
        let replica = site.path("master-target/replicas").join(name).join("d0.raw");
        assert!(fs::read(&replica).unwrap() == site.models[&first][name][0], "{name}: the image that is given out of hand");
    }
}

#[test]
fn a_planned_failover_of_a_group_stops_every_source_first_and_loses_nothing() {
    let mut site = Site::start(&[("web01", 2), ("web02", 1), ("db01", 1), ("shop", 1)], "");
    let full = site.round(&SHOP, &[], PointKind::Crash, None);
    site.wait_listed(full);
    let partial = site.round(&["web01", "db01"], &["web02"], PointKind::Crash, None);
    site.wait_listed(partial);
    assert!(site.refused(&["failover", "planned", "shop", "--yes"]).contains("add --machine or --group"));
    // No machine is left behind unless somebody wants the newer point without it, and is told who is missing.
    let plan = site.refused(&["failover", "unplanned", "shop", "--group"]);
    assert!(
        plan.contains("3 of 3 machines") && plan.contains("newer point without web02") && plan.contains(&partial.to_string()),
        "{plan}"
    );
    let plan = site.refused(&["failover", "unplanned", "shop", "--group", "--point", &partial.to_string()]);
    assert!(plan.contains("missing  web02") && plan.contains(&full.to_string()), "{plan}");
    // One source is not heard: none is stopped.
    site.machines.get_mut("web02").unwrap().stop();
    site.wait("web02 is silent", || {
        let machines = site.json(&["status"])[0]["machines"].clone();
        machines.as_array().unwrap().iter().any(|m| m["name"] == "web02" && m["disks"][0]["state"] == "not connected")
    });
    let told = site.refused(&["failover", "planned", "shop", "--group", "--yes"]);
    assert!(told.contains("nothing was started, because of web02") && told.contains("not heard"), "{told}");
    let open = |site: &Site| site.json(&["failover", "list"]).as_array().unwrap().iter().filter(|j| j["over"] == false).count();
    assert_eq!(open(&site), 0);
}

#[test]
fn a_planned_failover_of_a_group_moves_every_machine_with_its_last_write() {
    let mut site = shop("");
    let full = site.round(&SHOP, &[], PointKind::Crash, None);
    site.wait_listed(full);
    for machine in site.machines.values_mut() {
        machine.write(0, 512 << 10, 0x77, 64 << 10);
    }
    site.wait("the agents are heard", || {
        let machines = site.json(&["status"])[0]["machines"].clone();
        machines.as_array().unwrap().iter().all(|m| m["disks"].as_array().unwrap().iter().all(|d| d["state"] == "delta"))
    });
    let jobs = site.json(&["failover", "planned", "shop", "--yes"]);
    assert_eq!(states(&jobs), ["failed-over"; 3], "{jobs}");
    for job in jobs.as_array().unwrap() {
        let name = job["machine"].as_str().unwrap();
        let images = site.machines[name].images();
        for (disk, image) in job["disks"].as_array().unwrap().iter().zip(&images) {
            site.check_disk(disk["nbd"].as_str().unwrap(), image, name);
        }
        let steps: Vec<&str> = job["steps"].as_array().unwrap().iter().map(|s| s["name"].as_str().unwrap()).collect();
        let stopped = steps.iter().position(|s| s.contains("every source of the group has stopped")).unwrap();
        assert!(stopped < steps.iter().position(|s| s.starts_with("roll")).unwrap(), "{steps:?}");
    }
    assert_eq!(states(&site.json(&["failover", "cancel", "shop"])), ["cancelled"; 3]);
}
