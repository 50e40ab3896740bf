//! Recovery points over their life, on real processes: thinned by a ladder, pinned, merged, over kills; every one that is
//! listed comes back exactly.
#![allow(clippy::unwrap_used, clippy::disallowed_methods, reason = "tests may unwrap, and wait by the clock")]

mod support;

use std::collections::HashMap;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
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
    let retain =
        "[retain]\nladder = \"all for 6s, 1/6s to 1h\"\n[apply]\ncheckpoint_interval = \"200ms\"\nrecent_max = \"4MiB\"\n".to_owned();
    let mut cluster = Cluster::start(Options { disk_bytes: 24 << 20, interval: "1s", master_target: retain, ..Options::default() });
    cluster.wait_for_delta();
    let (mut models, mut pinned) = (HashMap::new(), Vec::new());
    let (mut checked, mut kept) = (0, [0.0; 2]);
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
            for (bytes, from) in kept.iter_mut().zip(["memory", "replica"]) {
                *bytes += cluster.metric("master-target", &format!("tidegate_kept_bytes_total{{disk=\"m1/d0\",from=\"{from}\"}}"));
            }
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
    assert!(kept.iter().all(|bytes| *bytes > 0.0), "old content comes from memory and from the replica: {kept:?}");
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

/// The interval files of the only disk, in order.
fn intervals(cluster: &Cluster) -> Vec<PathBuf> {
    let mut todo = vec![cluster.path("master-target").join("retain")];
    let mut found = Vec::new();
    while let Some(dir) = todo.pop() {
        for entry in fs::read_dir(dir).unwrap().flatten() {
            match entry.file_type().unwrap().is_dir() {
                true => todo.push(entry.path()),
                false if entry.file_name().to_string_lossy().ends_with(".tgu") => found.push(entry.path()),
                false => {}
            }
        }
    }
    found.sort();
    found
}

fn flip(path: &Path, at: u64) {
    let file = File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 0x40], at).unwrap();
    file.sync_all().unwrap();
}

/// Flips a byte in the middle of a data record of an interval file: the first one, or the last.
fn damage_record(path: &Path, last: bool) {
    let bytes = fs::read(path).unwrap();
    let record = |at: &usize| bytes[*at..].starts_with(b"TGR1") && bytes[at + 64..].starts_with(b"TGB1");
    let records: Vec<usize> = (4096..bytes.len()).step_by(4096).filter(record).collect();
    let at = if last { *records.last().unwrap() } else { records[0] };
    let len = u32::from_le_bytes(bytes[at + 16..at + 20].try_into().unwrap()) as usize;
    flip(path, (at + 64 + len / 2) as u64);
}

/// Labels of points, sorted; `n` and a digit only.
fn labels(points: &serde_json::Value) -> Vec<String> {
    let all = points.as_array().unwrap().iter().filter_map(|p| p["label"].as_str().map(str::to_owned));
    let mut all: Vec<String> = all.collect();
    all.sort();
    all
}

fn change_config(cluster: &Cluster, from: &str, to: &str) {
    let path = cluster.config("master-target");
    let text = fs::read_to_string(&path).unwrap();
    assert!(text.contains(from), "{text}");
    fs::write(&path, text.replace(from, to)).unwrap();
}

#[test]
fn damaged_old_content_costs_exactly_the_points_that_need_it() {
    let retain = "[retain]\nscrub_every = \"0s\"\n[apply]\ncheckpoint_interval = \"200ms\"\n".to_owned();
    let options = Options { disk_bytes: 16 << 20, format: "raw", interval: "1h", master_target: retain, ..Options::default() };
    let mut cluster = Cluster::start(options);
    let nbd = cluster.nbd_uri(0);
    let write = |n: u8, areas: &[&str]| {
        for area in areas {
            let offset = match *area {
                "a" => "1M",
                "b" => "4M",
                "c" => "8M",
                _ => "12M",
            };
            tool("qemu-io", &["-f", "raw", "-c", &format!("write -P {n} {offset} 1M"), &nbd]);
        }
    };
    tool("qemu-io", &["-f", "raw", "-c", "write -P 1 0 16M", &nbd]);
    cluster.wait_for_delta();
    let (mut ids, mut models) = (Vec::new(), HashMap::new());
    // What is written after each point: its interval keeps the content from before.
    for (n, areas) in [&["a", "b"][..], &["a", "c"], &["b", "d"], &["a"], &["b"], &["c"], &["d"]].into_iter().enumerate() {
        let point = cluster.mark(&format!("n{n}"));
        let model = cluster.path(&format!("model-{n}.raw"));
        fs::copy(cluster.disk(0), &model).unwrap();
        models.insert(point.clone(), model);
        ids.push(point);
        write(n as u8 + 2, areas);
    }
    let control = cluster.control("master-target");
    let all = |bad: &[usize]| -> Vec<String> { (0..7).filter(|n| !bad.contains(n)).map(|n| format!("n{n}")).collect() };
    let expect = |cluster: &Cluster, bad: &[usize]| {
        let found = cluster.json("master-target", &["point", "list", "--bad"]);
        assert_eq!(labels(&found), bad.iter().map(|n| format!("n{n}")).collect::<Vec<_>>(), "{found}");
        assert_eq!(labels(&cluster.json("master-target", &["point", "list"])), all(bad));
        assert_eq!(check_all(cluster, &models), 7 - bad.len(), "the others come back exactly");
    };
    cluster.wait_for_delta();
    cluster.wait("the last interval has a file", Duration::from_secs(10), || intervals(&cluster).len() >= 7);
    // By name: what only unusable points needed is merged away later.
    let files = intervals(&cluster).split_off(intervals(&cluster).len() - 7);
    expect(&cluster, &[]);
    let good = cluster.json("master-target", &["point", "verify", &ids[1]]);
    assert_eq!((good["state"].as_str(), good["first"].as_bool()), (Some("good"), Some(true)), "{good}");
    let shown = cluster.json("master-target", &["point", "show", &ids[1]]);
    assert_eq!(shown["disks"][0]["digest"], good["disks"][0]["digest"]);
    assert!(shown["verified"].is_string());

    // Stopped: `a` of interval 1. Point 0 has its own content of `a`, so point 1 alone needs the record.
    cluster.kill("master-target");
    damage_record(&files[1], false);
    cluster.start_role("master-target");
    let listed = cluster.points().len();
    let refused = cluster.try_tidegate(&["point", "verify", &ids[1], "--control", &control]);
    let told = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && told.contains("retention record damaged"), "{told}");
    assert_eq!(cluster.points().len(), listed - 1);
    expect(&cluster, &[1]);
    cluster.kill("master-target");
    cluster.start_role("master-target");
    expect(&cluster, &[1]);
    cluster.wait_for_delta();
    cluster.wait("the status says so", Duration::from_secs(20), || {
        let status = cluster.json("master-target", &["status"]);
        let reason = status[0]["reason"].as_str().unwrap_or_default();
        status[0]["health"] == "warning" && reason.starts_with("1 recovery point became unusable: retention record damaged")
    });

    // Running: `a` of interval 3, met by an export of point 3. Points 2 and 3 need it; 0 has its own.
    damage_record(&files[3], false);
    let out = cluster.path("out.raw");
    let refused = cluster.try_tidegate(&["recover", "export", &ids[3], "--format", "raw", "--output", s(&out), "--control", &control]);
    assert!(String::from_utf8_lossy(&refused.stderr).contains("became unusable"), "{refused:?}");
    expect(&cluster, &[1, 2, 3]);
    // A header, and an index: the records say the same.
    flip(&files[4], 9);
    let index = fs::metadata(&files[5]).unwrap().len() - 4096;
    flip(&files[5], index + 64 + 40);
    expect(&cluster, &[1, 2, 3]);

    // A scrub meets what nobody asked for. Of interval 5 the index and a record are gone: nobody knows what it lost, so the
    // points before its end go, and 6 stays.
    damage_record(&files[5], true);
    change_config(&cluster, "scrub_every = \"0s\"", "scrub_every = \"1s\"");
    cluster.kill("master-target");
    cluster.start_role("master-target");
    cluster.wait("the scrub finds it", Duration::from_secs(30), || {
        cluster.json("master-target", &["point", "list", "--bad"]).as_array().unwrap().len() >= 6
    });
    expect(&cluster, &[0, 1, 2, 3, 4, 5]);
    cluster.wait("the scrub verifies what is left", Duration::from_secs(30), || {
        cluster.points().iter().any(|p| p["label"] == "n6" && p["verified"].is_string())
    });
    cluster.tidegate(&["point", "forget", &ids[1], "--control", &control]);
    assert_eq!(labels(&cluster.json("master-target", &["point", "list", "--bad"])), ["n0", "n2", "n3", "n4", "n5"]);
    cluster.tidegate(&["point", "forget", "--all", "--control", &control]);
    let good_again = || cluster.json("master-target", &["status"])[0]["health"] == "healthy";
    cluster.wait("cleared", Duration::from_secs(20), good_again);

    // A file that is gone is noticed at the start, by what the catalogue knows.
    cluster.mark("n7");
    write(20, &["a"]);
    cluster.wait_for_delta();
    cluster.mark("n8");
    cluster.kill("master-target");
    let files = intervals(&cluster);
    fs::remove_file(&files[files.len() - 1]).unwrap();
    cluster.start_role("master-target");
    cluster.wait("what needed it is off the list", Duration::from_secs(20), || {
        labels(&cluster.json("master-target", &["point", "list"])) == ["n8"]
    });
    println!("7 points, damage by record, header, index and file: each time exactly the points that need it went");
}

#[test]
fn a_digest_holds_over_thinning_and_growth_and_finds_a_silent_change() {
    let retain = "[retain]\nscrub_every = \"0s\"\nladder = \"all for 1h\"\n[apply]\ncheckpoint_interval = \"200ms\"\n".to_owned();
    let options = Options { disk_bytes: 16 << 20, format: "raw", interval: "1h", master_target: retain, ..Options::default() };
    let mut cluster = Cluster::start(options);
    tool("qemu-io", &["-f", "raw", "-c", "write -P 1 0 12M", &cluster.nbd_uri(0)]);
    cluster.wait_for_delta();
    let control = cluster.control("master-target");
    let mut points = Vec::new();
    for n in 0..8u64 {
        points.push(cluster.mark(&format!("n{n}")));
        tool("qemu-io", &["-f", "raw", "-c", &format!("write -P {} {}k 1M", n + 2, 512 * n), &cluster.nbd_uri(0)]);
    }
    cluster.wait_for_delta();
    let verify = |cluster: &Cluster, point: &str| cluster.json("master-target", &["point", "verify", point]);
    let digest = |view: &serde_json::Value| view["disks"][0]["digest"].as_str().unwrap_or_else(|| panic!("{view}")).to_owned();
    let (first, third) = (verify(&cluster, &points[0]), verify(&cluster, &points[3]));
    assert_ne!(digest(&first), digest(&third));
    for point in [&points[0], &points[3]] {
        cluster.tidegate(&["point", "pin", point, "--control", &control]);
    }
    let before = intervals(&cluster).len();
    change_config(&cluster, "all for 1h", "all for 1s, 1/1h to 1d");
    cluster.kill("master-target");
    cluster.start_role("master-target");
    cluster.wait_for_delta();
    // All of them have to be older than the ladder's first step when the next checkpoint looks.
    std::thread::sleep(Duration::from_secs(3));
    cluster.mark("end");
    cluster.wait("points are thinned and intervals merged", Duration::from_secs(30), || intervals(&cluster).len() < before - 2);
    for (point, known) in [(&points[0], &first), (&points[3], &third)] {
        let again = verify(&cluster, point);
        assert_eq!((again["state"].as_str(), again["first"].as_bool(), digest(&again)), (Some("good"), Some(false), digest(known)));
    }
    File::options().write(true).open(cluster.disk(0)).unwrap().set_len(20 << 20).unwrap();
    cluster.wait("the replica grows", Duration::from_secs(20), || fs::metadata(cluster.replica(0)).unwrap().len() == 20 << 20);
    assert_eq!(digest(&verify(&cluster, &points[0])), digest(&first));
    let told = cluster.tidegate(&["point", "verify", &points[0], "--control", &control]);
    assert!(told.contains("good, the same as before") && told.contains(&digest(&first)), "{told}");
    // A place that nobody has written since: all points read it from the replica.
    cluster.kill("master-target");
    flip(&cluster.replica(0), 11 << 20);
    cluster.start_role("master-target");
    let changed = verify(&cluster, &points[0]);
    assert_eq!(changed["state"], "bad", "{changed}");
    assert!(changed["error"].as_str().unwrap().contains("is not what it was"), "{changed}");
    let bad = cluster.json("master-target", &["point", "list", "--bad"]);
    assert_eq!((labels(&bad), bad[0]["pinned"].as_bool()), (vec!["n0".to_owned()], Some(true)));
    assert!(cluster.points().iter().any(|p| p["id"] == points[3].as_str()), "what was not found is not judged");
}

fn partial_of(output: &std::path::Path) -> Option<PathBuf> {
    let prefix = format!(".{}.partial-", output.file_name().unwrap().to_str().unwrap());
    let entries = fs::read_dir(output.parent().unwrap()).unwrap().flatten().map(|e| e.path());
    entries.into_iter().find(|p| p.file_name().unwrap().to_str().unwrap().starts_with(&prefix))
}

#[test]
fn an_export_goes_on_after_the_master_target_was_killed() {
    let mut rng = Rng::new(5);
    let mut cluster = Cluster::prepare(Options { disk_bytes: 400 << 20, interval: "1h", ..Options::default() });
    let content: Vec<u8> = (0..(380usize << 20) / 8).flat_map(|_| rng.below(u64::MAX).to_le_bytes()).collect();
    std::os::unix::fs::FileExt::write_all_at(&fs::File::options().write(true).open(cluster.disk(0)).unwrap(), &content, 0).unwrap();
    drop(content);
    for role in ["master-target", "process-server", "agent"] {
        cluster.start_role(role);
    }
    cluster.wait_for_delta();
    let point = cluster.mark("exported");
    let control = cluster.control("master-target");
    let mut resumed = 0;
    for (format, ending) in [("raw", "raw"), ("vhdx", "vhdx"), ("vmdk", "vmdk")] {
        let output = cluster.path(&format!("out.{ending}"));
        let args = ["recover", "export", &point, "--format", format, "--output", s(&output), "--control", &control];
        let mut export =
            std::process::Command::new(env!("CARGO_BIN_EXE_tidegate")).args(args).stderr(std::process::Stdio::null()).spawn().unwrap();
        cluster.wait("the export notes how far it is", Duration::from_secs(60), || {
            partial_of(&output).is_some_and(|dir| dir.join("progress").exists()) || output.exists()
        });
        cluster.kill("master-target");
        assert!(!export.wait().unwrap().success() || output.exists());
        let noted = partial_of(&output).and_then(|dir| fs::read(dir.join("progress")).ok());
        if let (Some(noted), "raw") = (&noted, format) {
            // Nothing behind the mark is believed.
            let done = u64::from_le_bytes(noted[16..24].try_into().unwrap());
            let staged = fs::File::options().write(true).open(partial_of(&output).unwrap().join("out.raw")).unwrap();
            std::os::unix::fs::FileExt::write_all_at(&staged, &[0xee; 8192], done).unwrap();
            // Dirty pages would collide with what is then written past the page cache, which the kernel reports as EIO.
            staged.sync_all().unwrap();
        }
        cluster.start_role("master-target");
        if output.exists() {
            continue;
        }
        let again = cluster.try_tidegate(&args);
        let told = String::from_utf8_lossy(&again.stderr).into_owned();
        assert!(again.status.success(), "{told}");
        assert!(noted.is_none() || told.contains("resumed at"), "{told}");
        resumed += usize::from(noted.is_some());
        tool("qemu-img", &["compare", "-f", "raw", "-F", format, s(&cluster.disk(0)), s(&output)]);
        assert_eq!(partial_of(&output), None, "nothing is left beside the output");
        fs::remove_file(&output).unwrap();
    }
    assert!(resumed > 0, "at least one export was killed half-way");
}

#[test]
fn a_policy_that_is_set_counts_at_once_and_until_it_is_reset() {
    let mut cluster = Cluster::start(Options { disk_bytes: 8 << 20, interval: "1h", ..Options::default() });
    cluster.wait_for_delta();
    let control = cluster.control("master-target");
    for n in 0..5 {
        cluster.mark(&format!("n{n}"));
    }
    let before = cluster.points().len();
    let set = |args: &[&str]| cluster.try_tidegate(&[&["policy", "set", "--control", &control], args].concat());
    let refused = set(&["--points-max", "2"]);
    assert!(!refused.status.success());
    assert!(String::from_utf8_lossy(&refused.stdout).contains("would go"));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("--yes"));
    assert_eq!(cluster.points().len(), before, "nothing was changed");
    assert!(!set(&["--points-min", "99999"]).status.success());
    assert!(!set(&[]).status.success(), "nothing to set");
    assert!(set(&["--points-max", "2", "--span", "3d", "--yes"]).status.success());
    cluster.wait("points go at once", Duration::from_secs(10), || cluster.points().len() == 2);
    cluster.kill("master-target");
    cluster.start_role("master-target");
    let shown = cluster.tidegate(&["policy", "show", "--control", &cluster.control("master-target")]);
    assert!(shown.contains("points_max  2  (policy set)") && shown.contains("span        3d  (policy set)"), "{shown}");
    assert!(shown.contains("points_min  1  (configuration)"), "{shown}");
    cluster.tidegate(&["policy", "set", "--reset", "--control", &cluster.control("master-target")]);
    let shown = cluster.tidegate(&["policy", "show", "--control", &cluster.control("master-target")]);
    assert!(shown.contains("points_max  10000  (configuration)"), "{shown}");
    let set = |args: &[&str]| cluster.try_tidegate(&[&["policy", "set", "--control", &control], args].concat());
    assert!(set(&["--machine", "m1", "--points-max", "1", "--yes"]).status.success());
    cluster.wait("the machine's own bound counts", Duration::from_secs(10), || cluster.points().len() == 1);
    let shown = cluster.tidegate(&["policy", "show", "--control", &cluster.control("master-target")]);
    assert!(shown.contains("its own: points_max 1") && shown.contains("points_max  10000  (configuration)"), "{shown}");
    assert!(!set(&["--machine", "nobody", "--points-max", "1"]).status.success());
}

/// Who makes a point before something risky wants to know that it is there.
#[test]
fn a_mark_that_waits_says_whether_the_point_is_safe() {
    let mut cluster = Cluster::start(Options { interval: "1h", ..Options::default() });
    cluster.wait_for_delta();
    let control = cluster.control("agent");
    let mark = |limit: &str| {
        let args = ["point", "mark", "--machine", "m1", "--wait", limit, "--control", &control];
        std::process::Command::new(env!("CARGO_BIN_EXE_tidegate")).args(args).output().unwrap()
    };
    let text = |output: &std::process::Output| String::from_utf8_lossy(&[&output.stdout[..], &output.stderr[..]].concat()).into_owned();
    let safe = mark("30");
    assert!(safe.status.success() && text(&safe).contains("is safe at the master target"), "{}", text(&safe));
    cluster.kill("master-target");
    let late = mark("1");
    assert!(!late.status.success() && text(&late).contains("still on its way"), "{}", text(&late));
    // The master target comes back without what it knew: what was on its way belongs to a stream that is over.
    let lost = std::thread::scope(|scope| {
        let waiting = scope.spawn(|| mark("120"));
        std::thread::sleep(std::time::Duration::from_millis(500));
        std::fs::remove_dir_all(cluster.path("master-target")).unwrap();
        cluster.start_role("master-target");
        waiting.join().unwrap()
    });
    assert!(!lost.status.success() && text(&lost).contains("was lost"), "{}", text(&lost));
}
