//! Recovery points over their life, on real processes: thinned by a ladder, pinned, merged, over kills; every one that is
//! listed comes back exactly.
#![allow(clippy::unwrap_used, clippy::disallowed_methods, reason = "tests may unwrap, and wait by the clock")]

mod support;

use std::collections::HashMap;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use support::{Cluster, Options, Rng, s, same_bytes, tool};

fn undo_files(cluster: &Cluster) -> usize {
    let mut count = 0;
    let mut todo = vec![cluster.path("master-target").join("retain")];
    while let Some(dir) = todo.pop() {
        for entry in fs::read_dir(dir).unwrap().flatten() {
            match entry.file_type().unwrap().is_dir() {
                true => todo.push(entry.path()),
                false => count += usize::from(entry.file_name().to_string_lossy().starts_with("undo-")),
            }
        }
    }
    count
}

fn check_all(cluster: &Cluster, models: &HashMap<String, PathBuf>) -> usize {
    let mut checked = 0;
    for point in cluster.points() {
        let id = point["id"].as_str().unwrap();
        let Some(model) = models.get(id) else { continue };
        let raw = cluster.path("out.raw");
        let output = cluster.try_tidegate(&[
            "recover",
            "export",
            id,
            "--format",
            "raw",
            "--output",
            s(&raw),
            "--control",
            &cluster.control("master-target"),
        ]);
        if !output.status.success() {
            // It may have been thinned since the list was read, and only that.
            let error = String::from_utf8_lossy(&output.stderr).into_owned();
            assert!(error.contains("there is no recovery point") || error.contains("no point"), "{error}");
            continue;
        }
        assert!(same_bytes(&raw, model), "point {} differs from its model", point["label"]);
        fs::remove_file(&raw).unwrap();
        checked += 1;
    }
    checked
}

#[test]
fn a_ladder_thins_points_and_every_one_that_is_left_stays_exact() {
    let mut rng = Rng::new(11);
    let retain = "[retain]\nladder = \"all for 6s, 1/6s to 1h\"\n[apply]\ncheckpoint_interval = \"200ms\"\n".to_owned();
    let mut cluster = Cluster::start(Options { disk_bytes: 24 << 20, interval: "1s", master_target: retain, ..Options::default() });
    cluster.wait_for_delta();
    let (mut models, mut pinned) = (HashMap::new(), Vec::new());
    let mut checked = 0;
    for n in 0..36u64 {
        let mut writes = vec!["-f".to_owned(), "raw".to_owned()];
        for _ in 0..12 {
            // A hot area, so that blocks are overwritten in many intervals.
            let offset = rng.below(2000) * 4096 + rng.below(8) * 512;
            writes.extend(["-c".to_owned(), format!("write -P {} {offset} {}", n + 1, (1 + rng.below(40)) * 512)]);
        }
        writes.push(cluster.nbd_uri(0));
        tool("qemu-io", &writes.iter().map(String::as_str).collect::<Vec<_>>());
        let point = cluster.mark(&format!("n{n}"));
        let model = cluster.path(&format!("model-{n}.raw"));
        fs::copy(cluster.disk(0), &model).unwrap();
        models.insert(point.clone(), model);
        if n % 6 == 2 {
            let control = cluster.control("master-target");
            cluster.tidegate(&["point", "pin", &point, "--control", &control]);
            pinned.push(point);
        }
        if n % 9 == 8 {
            cluster.kill("master-target");
            cluster.start_role("master-target");
            cluster.wait_for_delta();
            checked += check_all(&cluster, &models);
        }
    }
    let listed = |cluster: &Cluster, id: &String| cluster.points().iter().any(|p| p["id"] == id.as_str());
    let control = cluster.control("master-target");
    // Pinned points, one of each six seconds, and what is younger than that.
    cluster.wait("points are thinned", Duration::from_secs(30), || cluster.points().len() <= pinned.len() + 26);
    let view = cluster.json("master-target", &["policy", "dry-run"]);
    assert_eq!(view["machines"][0]["pinned"], pinned.len());
    cluster.wait("intervals are merged", Duration::from_secs(30), || undo_files(&cluster) <= cluster.points().len() + 4);
    checked += check_all(&cluster, &models);
    assert!(pinned.iter().all(|id| listed(&cluster, id)), "pinned points stay");
    let dry = cluster.json("master-target", &["policy", "dry-run", "--ladder", "all for 1s, 1/1h to 1d"]);
    assert!(dry["machines"][0]["gone"].as_array().unwrap().len() > 3, "{dry}");
    for id in &pinned {
        cluster.tidegate(&["point", "unpin", id, "--control", &control]);
    }
    cluster.wait("most of them go", Duration::from_secs(30), || {
        pinned.iter().filter(|id| listed(&cluster, id)).count() <= pinned.len() / 2 + 1
    });
    checked += check_all(&cluster, &models);
    println!(
        "{} points made, {checked} times one was brought back, 0 differences; {} points and {} intervals are left",
        models.len(),
        cluster.points().len(),
        undo_files(&cluster)
    );
    assert!(checked > 40, "{checked}");
}

#[test]
fn a_point_is_mounted_for_writing_and_neither_it_nor_the_replica_sees_the_writes() {
    let recover = "[recover]\nscratch_max = \"6MiB\"\n".to_owned();
    // Not a whole number of blocks.
    let size: u64 = (24 << 20) + 1536;
    let mut cluster = Cluster::start(Options { disk_bytes: size, master_target: recover, ..Options::default() });
    tool("qemu-io", &["-f", "raw", "-c", "write -P 7 0 10M", "-c", "write -P 8 15M 9M", &cluster.nbd_uri(0)]);
    cluster.wait_for_delta();
    let point = cluster.mark("mounted");
    let expected = cluster.path("expected.raw");
    fs::copy(cluster.disk(0), &expected).unwrap();
    let control = cluster.control("master-target");
    let mount = |name: &str, more: &[&str]| {
        let socket = cluster.path(name);
        let args = ["recover", "mount", &point, "--nbd", &format!("unix:{}", socket.display()), "--detach", "--control", &control];
        cluster.tidegate(&[&args[..], more].concat());
        format!("nbd+unix:///?socket={}", socket.display())
    };
    let (writable, read_only) = (mount("w.sock", &[]), mount("r.sock", &["--read-only"]));
    let model = cluster.path("model.raw");
    fs::copy(&expected, &model).unwrap();
    let mut rng = Rng::new(3);
    let mut commands = vec![format!("write -P 99 {} 1024", size - 1024), format!("write -P 98 {} 512", size - 512)];
    for n in 0..60 {
        let len = (1 + rng.below(60)) * 512;
        let offset = rng.below((3 << 20) / 512) * 512 + rng.below(2) * (14 << 20);
        commands.push(match n % 6 {
            4 => format!("write -z {offset} {len}"),
            5 => format!("discard {} 1M", offset / 4096 * 4096),
            _ => format!("write -P {} {offset} {len}", 100 + n),
        });
    }
    for (n, command) in commands.iter().enumerate() {
        // What discard leaves in a raw file is up to the file system; zeroes in the overlay.
        let on_model = command.replace("discard", "write -z");
        tool("qemu-io", &["-f", "raw", "-c", command, &writable]);
        tool("qemu-io", &["-f", "raw", "-c", &on_model, s(&model)]);
        if n == 30 {
            tool("qemu-io", &["-f", "raw", "-c", "write -P 0x55 1M 20M", &cluster.nbd_uri(0)]);
            cluster.mark("later");
        }
    }
    let full = support::try_tool("qemu-io", &["-f", "raw", "-c", "write -P 1 4M 8M", &writable]);
    let told = format!("{}{}", String::from_utf8_lossy(&full.stdout), String::from_utf8_lossy(&full.stderr));
    assert!(told.contains("No space"), "the quota holds: {told}");
    let copy = cluster.path("copy.raw");
    for (uri, wanted, what) in [(&writable, &model, "writable"), (&read_only, &expected, "read-only")] {
        tool("nbdcopy", &["--connections=4", uri, s(&copy)]);
        if what == "writable" {
            // The write beyond the quota may have left parts of itself where it was allowed to write.
            let (got, want) = (fs::read(&copy).unwrap(), fs::read(wanted).unwrap());
            let differs = (0..got.len()).find(|&i| got[i] != want[i] && !(4 << 20..12 << 20).contains(&i));
            assert_eq!((got.len(), differs), (want.len(), None));
        } else {
            assert!(same_bytes(&copy, wanted), "{what}");
        }
        fs::remove_file(&copy).unwrap();
    }
    let refused = support::try_tool("qemu-io", &["-f", "raw", "-c", "write -P 1 0 4k", &read_only]);
    assert!(!refused.status.success());
    let exported = cluster.path("exported.raw");
    cluster.export(&point, 0, "raw", &exported);
    assert!(same_bytes(&exported, &expected), "the point is as it was");
    let list = cluster.json("master-target", &["recover", "list"]);
    for mount in list.as_array().unwrap().iter().filter(|v| v["kind"] == "mount") {
        cluster.tidegate(&["recover", "unmount", mount["name"].as_str().unwrap(), "--control", &control]);
    }
    let left = fs::read_dir(cluster.path("master-target").join("scratch")).unwrap().count();
    assert_eq!(left, 0, "scratch files have no names");
    cluster.wait_for_delta();
    cluster.mark("end");
    tool("qemu-img", &["compare", "-f", "raw", "-F", "vhdx", s(&cluster.disk(0)), s(&cluster.replica(0))]);
}
