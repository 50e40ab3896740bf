//! The main job on real processes: a file system on the agent's export, replicated while files are written; every point
//! comes back, checked by tools nobody here wrote.
#![allow(clippy::unwrap_used, clippy::disallowed_methods, reason = "tests may unwrap, and wait by the clock")]

mod support;

use std::fs;
use std::path::Path;
use std::time::Duration;

use support::mounted::{Mounted, check_file_system, write_files};
use support::{Cluster, Options, s, same_bytes, tool, try_tool};

#[test]
fn a_file_system_written_while_it_is_replicated_comes_back_at_every_point() {
    let mut cluster = Cluster::start(Options { disk_bytes: 256 << 20, ..Options::default() });
    let mounted = Mounted::new(cluster.dir.path(), &cluster.nbd_uri(0));
    mounted.mkfs();
    mounted.mount();
    write_files(&mounted.point, 0, 20);
    cluster.wait_for_delta();
    let mut exact = Vec::new();
    for round in 1..=3 {
        write_files(&mounted.point, round, 20);
        // At rest: a frozen file system, so that the source file itself says what the point must hold.
        tool("fsfreeze", &["-f", s(&mounted.point)]);
        let point = cluster.mark(&format!("frozen-{round}"));
        let model = cluster.path(&format!("model-{round}.raw"));
        fs::copy(cluster.disk(0), &model).unwrap();
        tool("fsfreeze", &["-u", s(&mounted.point)]);
        exact.push((point, model));
        // Under load: writes go on while the marker is taken.
        let dir = mounted.point.clone();
        let writer = std::thread::spawn(move || write_files(&dir, 100 + round, 40));
        cluster.mark(&format!("loaded-{round}"));
        writer.join().unwrap();
    }
    for (index, (point, model)) in exact.iter().enumerate() {
        let (vhdx, raw) = (cluster.path(&format!("exact-{index}.vhdx")), cluster.path(&format!("exact-{index}.raw")));
        cluster.export(point, 0, "vhdx", &vhdx);
        tool("qemu-img", &["check", "-f", "vhdx", s(&vhdx)]);
        tool("qemu-img", &["compare", "-f", "vhdx", "-F", "raw", s(&vhdx), s(model)]);
        cluster.export(point, 0, "raw", &raw);
        assert!(same_bytes(&raw, model), "point {index} differs from the source at its marker");
        tool("e2fsck", &["-fn", s(&raw)]);
    }
    let points = cluster.points();
    assert!(points.len() >= 9, "points were taken by the timer too: {}", points.len());
    for (index, point) in points.iter().enumerate() {
        let raw = cluster.path("any.raw");
        cluster.export(point["id"].as_str().unwrap(), 0, "raw", &raw);
        // Points from before the file system existed hold none.
        let magic = fs::read(&raw).unwrap()[1080..1082] == [0x53, 0xef];
        if magic && index > 2 {
            check_file_system(&raw);
        }
        fs::remove_file(&raw).unwrap();
    }
    drop(mounted);
    cluster.wait_for_delta();
    cluster.mark("quiet");
    tool("qemu-img", &["check", "-f", "vhdx", s(&cluster.replica(0))]);
    tool("qemu-img", &["compare", "-f", "raw", "-F", "vhdx", s(&cluster.disk(0)), s(&cluster.replica(0))]);
}

#[test]
fn a_mounted_point_stays_as_it_was_while_replication_goes_on() {
    let mut cluster = Cluster::start(Options::default());
    tool("qemu-io", &["-f", "raw", "-c", "write -P 0x11 0 32M", &cluster.nbd_uri(0)]);
    cluster.wait_for_delta();
    let point = cluster.mark("eleven");
    let socket = cluster.path("point.sock");
    let nbd = format!("unix:{}", socket.display());
    let control = cluster.control("master-target");
    cluster.tidegate(&["recover", "mount", &point, "--nbd", &nbd, "--detach", "--control", &control]);
    let uri = format!("nbd+unix:///?socket={}", socket.display());
    for pattern in ["0x22", "0x33"] {
        tool("qemu-io", &["-f", "raw", "-c", &format!("write -P {pattern} 1M 16M"), "-c", "write -z 20M 4M", &cluster.nbd_uri(0)]);
        cluster.mark(pattern);
        tool("qemu-io", &["-r", "-f", "raw", "-c", "read -P 0x11 0 32M", "-c", "read -P 0 32M 32M", &uri]);
    }
    assert!(tool("nbdinfo", &[&uri]).contains("can_multi_conn: true"));
    assert!(tool("nbdinfo", &["--map", &uri]).contains("hole"));
    let copy = cluster.path("copy.raw");
    tool("nbdcopy", &["--connections=4", &uri, s(&copy)]);
    let exported = cluster.path("exported.raw");
    cluster.export(&point, 0, "raw", &exported);
    assert!(same_bytes(&copy, &exported));
    let list = cluster.json("master-target", &["recover", "list"]);
    let mount = list.as_array().unwrap().iter().find(|v| v["kind"] == "mount").unwrap().clone();
    cluster.tidegate(&["recover", "unmount", mount["name"].as_str().unwrap(), "--control", &control]);
    assert!(!try_tool("nbdinfo", &[&uri]).status.success());
}

#[test]
fn a_machine_of_three_disks_gets_points_over_all_of_them_and_raw_replicas_work() {
    let mut cluster = Cluster::start(Options { disks: 3, format: "raw", ..Options::default() });
    for index in 0..3 {
        tool("qemu-io", &["-f", "raw", "-c", &format!("write -P {} 0 8M", index + 1), &cluster.nbd_uri(index)]);
    }
    cluster.wait_for_delta();
    let point = cluster.mark("all");
    let shown = cluster.json("master-target", &["point", "show", &point]);
    assert_eq!(shown["disks"].as_array().unwrap().len(), 3);
    for index in 0..3 {
        let raw = cluster.path(&format!("out-{index}.raw"));
        cluster.export(&point, index, "raw", &raw);
        assert!(same_bytes(&raw, &cluster.disk(index)));
        assert!(same_bytes(&cluster.replica(index), &cluster.disk(index)));
    }
}

#[test]
fn the_master_target_may_be_away_and_the_application_does_not_notice() {
    let mut cluster = Cluster::start(Options::default());
    cluster.wait_for_delta();
    cluster.mark("before");
    cluster.kill("master-target");
    for n in 1..=20 {
        tool("qemu-io", &["-f", "raw", "-c", &format!("write -P {n} {}M 2M", n), "-c", "flush", &cluster.nbd_uri(0)]);
    }
    cluster.start_role("master-target");
    cluster.wait_for_delta();
    let point = cluster.mark("after");
    let raw = cluster.path("after.raw");
    cluster.export(&point, 0, "raw", &raw);
    assert!(same_bytes(&raw, &cluster.disk(0)));
}

#[test]
fn a_backlog_beyond_its_bound_becomes_regions_and_heals_by_itself() {
    let mut cluster =
        Cluster::start(Options { disk_bytes: 256 << 20, agent: "backlog = { memory_max = \"64MiB\" }\n".to_owned(), ..Options::default() });
    cluster.wait_for_delta();
    cluster.kill("process-server");
    for n in 0..4 {
        tool("qemu-io", &["-f", "raw", "-c", &format!("write -P {} {}M 48M", n + 1, n * 48), &cluster.nbd_uri(0)]);
    }
    cluster.wait("the agent says so", Duration::from_secs(10), || cluster.agent_disk(0)["state"] == "resynchronising");
    let marked = cluster.try_tidegate(&["point", "mark", "--machine", "m1", "--control", &cluster.control("agent")]);
    assert_eq!(marked.status.code(), Some(1), "no point of a mixture");
    cluster.start_role("process-server");
    cluster.wait_for_delta();
    let point = cluster.mark("healed");
    let raw = cluster.path("healed.raw");
    cluster.export(&point, 0, "raw", &raw);
    assert!(same_bytes(&raw, &cluster.disk(0)));
}

/// Makes the source file larger and waits until clients of the export see it.
fn enlarge(cluster: &Cluster, size: u64) {
    fs::File::options().write(true).open(cluster.disk(0)).unwrap().set_len(size).unwrap();
    cluster.wait("the export grows", Duration::from_secs(10), || {
        try_tool("nbdinfo", &["--size", &cluster.nbd_uri(0)]).stdout == format!("{size}\n").into_bytes()
    });
}

fn write_at(cluster: &Cluster, pattern: u8, offset: u64, len: u64) {
    tool("qemu-io", &["-f", "raw", "-c", &format!("write -P {pattern} {offset} {len}"), &cluster.nbd_uri(0)]);
}

fn check_point(cluster: &Cluster, point: &str, model: &Path, size: u64) {
    let shown = cluster.json("master-target", &["point", "show", point]);
    assert_eq!(shown["disks"][0]["size_bytes"], size, "{shown}");
    let raw = cluster.path("point.raw");
    let _ = fs::remove_file(&raw);
    cluster.export(point, 0, "raw", &raw);
    assert_eq!(fs::metadata(&raw).unwrap().len(), size);
    assert!(same_bytes(&raw, model), "a point of {size} bytes differs from its model");
}

#[test]
fn a_disk_grows_while_it_is_replicated_and_every_point_keeps_its_own_size() {
    // Neither size ends with a region of the map or a block of the image.
    let sizes: [u64; 5] = [(40 << 20) + 512, (71 << 20) + 1024, 90 << 20, (150 << 20) + 4096, 160 << 20];
    for format in ["vhdx", "vmdk", "vmdk-flat"] {
        let mut cluster = Cluster::start(Options { disk_bytes: sizes[0], format, ..Options::default() });
        write_at(&cluster, 1, sizes[0] - (1 << 20), 1 << 20);
        cluster.wait_for_delta();
        let mut points = vec![(cluster.mark("first"), cluster.path("model-0.raw"))];
        fs::copy(cluster.disk(0), &points[0].1).unwrap();
        for (index, &size) in sizes.iter().enumerate().skip(1) {
            let before = sizes[index - 1];
            match index {
                1 => enlarge(&cluster, size),
                2 => {
                    // Nobody is there to grow the replica; what is written meanwhile waits.
                    cluster.kill("master-target");
                    enlarge(&cluster, size);
                    write_at(&cluster, 7, before - 4096, 8192);
                    cluster.kill("process-server");
                    cluster.start_role("process-server");
                    cluster.start_role("master-target");
                }
                3 => {
                    // The agent is not there to see it: what it knows of the old part stays valid.
                    cluster.wait("regions become clean", Duration::from_secs(30), || cluster.agent_disk(0)["missing_bytes"] == 0);
                    cluster.terminate("agent");
                    fs::File::options().write(true).open(cluster.disk(0)).unwrap().set_len(size).unwrap();
                    cluster.start_role("agent");
                }
                _ => {
                    enlarge(&cluster, size);
                    cluster.kill("master-target");
                    cluster.start_role("master-target");
                }
            }
            write_at(&cluster, index as u8 + 1, before - (1 << 20), 2 << 20);
            write_at(&cluster, index as u8 + 1, size - 512, 512);
            cluster.wait_for_delta();
            let model = cluster.path(&format!("model-{index}.raw"));
            points.push((cluster.mark(&format!("size-{index}")), model.clone()));
            fs::copy(cluster.disk(0), &model).unwrap();
        }
        write_at(&cluster, 9, 0, 8 << 20);
        cluster.mark("last");
        for ((point, model), size) in points.iter().zip(sizes) {
            check_point(&cluster, point, model, size);
        }
        let report = cluster.try_tidegate(&["check", "image", s(&cluster.replica(0)), "--format", format]);
        assert!(report.status.success(), "{}", String::from_utf8_lossy(&report.stdout));
        // A smaller disk is refused, with the reason.
        cluster.terminate("agent");
        fs::File::options().write(true).open(cluster.disk(0)).unwrap().set_len(sizes[0]).unwrap();
        cluster.start_role("agent");
        cluster.wait("the refusal is shown", Duration::from_secs(20), || {
            cluster.json("master-target", &["status"]).to_string().contains("shrank")
        });
        check_point(&cluster, &points[4].0, &points[4].1, sizes[4]);
    }
}

/// A cluster whose disks are images, each given as (path, further keys of the disk).
fn of_images(images: &[(&str, &str)], make: impl FnOnce(&Path)) -> Cluster {
    let mut cluster = Cluster::prepare(Options { disks: images.len(), format: "raw", ..Options::default() });
    make(cluster.dir.path());
    let mut text = fs::read_to_string(cluster.config("agent")).unwrap();
    for (index, (name, keys)) in images.iter().enumerate() {
        text = text.replace(&format!("path = {:?}\n", cluster.disk(index)), &format!("path = {:?}\n{keys}\n", cluster.path(name)));
    }
    fs::write(cluster.config("agent"), text).unwrap();
    for role in ["master-target", "process-server", "agent"] {
        cluster.start_role(role);
    }
    cluster
}

#[test]
fn images_of_hypervisors_are_protected_while_they_are_written() {
    let images = [("a.vhdx", "format = \"vhdx\""), ("b.vmdk", "format = \"vmdk\""), ("c.vmdk", "format = \"vmdk-flat\"")];
    let mut cluster = of_images(&images, |dir| {
        for (name, options) in
            [("a.vhdx", "subformat=dynamic"), ("b.vmdk", "subformat=monolithicSparse"), ("c.vmdk", "subformat=monolithicFlat")]
        {
            let (path, kind) = (dir.join(name), &name[2..]);
            tool("qemu-img", &["create", "-q", "-f", kind, "-o", options, s(&path), "48M"]);
            tool("qemu-io", &["-f", kind, "-c", "write -P 0x5a 1M 9M", "-c", "write -P 0x5b 40M 3M", s(&path)]);
        }
    });
    for index in 0..3 {
        assert!(tool("nbdinfo", &["--map", &cluster.nbd_uri(index)]).contains("hole"));
        tool(
            "qemu-io",
            &[
                "-f",
                "raw",
                "-c",
                "read -P 0x5a 1M 9M",
                "-c",
                "write -P 1 4M 100k",
                "-c",
                "write -P 2 20M 5M",
                "-c",
                "flush",
                &cluster.nbd_uri(index),
            ],
        );
    }
    cluster.wait_for_delta();
    let early = cluster.mark("early");
    cluster.kill("agent");
    cluster.start_role("agent");
    for index in 0..3 {
        tool(
            "qemu-io",
            &[
                "-f",
                "raw",
                "-c",
                "write -z 0 3M",
                "-c",
                "discard 41M 1M",
                "-c",
                "write -P 3 30000k 3M",
                "-c",
                "write -P 4 47M 1M",
                &cluster.nbd_uri(index),
            ],
        );
    }
    cluster.wait_for_delta();
    let late = cluster.mark("late");
    assert_eq!(cluster.terminate("agent"), Some(0));
    for (index, (name, keys)) in images.iter().enumerate() {
        let (source, raw) = (cluster.path(name), cluster.path(&format!("late-{index}.raw")));
        if index < 2 {
            tool("qemu-img", &["check", "-f", &name[2..], s(&source)]);
        }
        let format = keys.split('"').nth(1).unwrap();
        assert!(cluster.try_tidegate(&["check", "image", s(&source), "--format", format]).status.success());
        cluster.export(&late, index, "raw", &raw);
        tool("qemu-img", &["compare", "-f", &name[2..], "-F", "raw", s(&source), s(&raw)]);
        let raw = cluster.path(&format!("early-{index}.raw"));
        cluster.export(&early, index, "raw", &raw);
        tool(
            "qemu-io",
            &[
                "-f",
                "raw",
                "-c",
                "read -P 0x5a 1M 3M",
                "-c",
                "read -P 1 4M 100k",
                "-c",
                "read -P 2 20M 5M",
                "-c",
                "read -P 0x5b 40M 3M",
                s(&raw),
            ],
        );
    }
}

#[test]
fn images_that_can_only_be_read_are_replicated_as_they_are() {
    let images = [
        ("child.vmdk", "format = \"vmdk\"\nread_only = true\nparents = true"),
        ("split.vmdk", "format = \"vmdk\"\nread_only = true"),
        ("stream.vmdk", "format = \"vmdk-stream\"\nread_only = true"),
    ];
    let mut cluster = of_images(&images, |dir| {
        let path = |name: &str| dir.join(name).to_str().unwrap().to_owned();
        tool("qemu-img", &["create", "-q", "-f", "vmdk", &path("parent.vmdk"), "32M"]);
        tool("qemu-io", &["-f", "vmdk", "-c", "write -P 7 0 20M", &path("parent.vmdk")]);
        std::process::Command::new("qemu-img")
            .args(["create", "-q", "-f", "vmdk", "-b", "parent.vmdk", "-F", "vmdk", "child.vmdk"])
            .current_dir(dir)
            .status()
            .unwrap();
        tool("qemu-io", &["-f", "vmdk", "-c", "write -P 8 5M 1M", "-c", "write -P 9 25M 1M", &path("child.vmdk")]);
        tool(
            "qemu-img",
            &["convert", "-f", "vmdk", "-O", "vmdk", "-o", "subformat=twoGbMaxExtentSparse", &path("child.vmdk"), &path("split.vmdk")],
        );
        tool(
            "qemu-img",
            &["convert", "-f", "vmdk", "-O", "vmdk", "-o", "subformat=streamOptimized", &path("child.vmdk"), &path("stream.vmdk")],
        );
    });
    cluster.wait_for_delta();
    let refused = try_tool("qemu-io", &["-f", "raw", "-c", "write -P 1 0 4k", &cluster.nbd_uri(0)]);
    assert!(!refused.status.success(), "nobody may write it");
    let point = cluster.mark("as it is");
    for index in 0..3 {
        let raw = cluster.path(&format!("out-{index}.raw"));
        cluster.export(&point, index, "raw", &raw);
        tool("qemu-img", &["compare", "-f", "vmdk", "-F", "raw", s(&cluster.path("child.vmdk")), s(&raw)]);
    }
    assert_eq!(cluster.terminate("agent"), Some(0));
}

#[test]
fn a_disk_that_lost_a_part_or_was_replaced_is_noticed_and_sent_again() {
    let mut cluster = Cluster::start(Options::default());
    write_at(&cluster, 9, 20 << 20, 30 << 20);
    cluster.wait_for_delta();
    let exact = |cluster: &Cluster, label: &str| {
        let point = cluster.mark(label);
        let raw = cluster.path(&format!("{label}.raw"));
        cluster.export(&point, 0, "raw", &raw);
        assert!(same_bytes(&raw, &cluster.disk(0)), "{label}: the point differs from the disk");
    };
    exact(&cluster, "before");
    for size in [32 << 20, 30 << 20] {
        fs::File::options().write(true).open(cluster.disk(0)).unwrap().set_len(size).unwrap();
        cluster.wait("it is critical", Duration::from_secs(10), || {
            let status = cluster.json("master-target", &["status"]).to_string();
            cluster.agent_disk(0)["state"] == "error" && status.contains("became smaller")
        });
        let marked = cluster.try_tidegate(&["point", "mark", "--machine", "m1", "--control", &cluster.control("agent")]);
        assert_eq!(marked.status.code(), Some(1), "no points of a disk that lost a part");
    }
    fs::File::options().write(true).open(cluster.disk(0)).unwrap().set_len(64 << 20).unwrap();
    cluster.wait_for_delta();
    exact(&cluster, "after");
    // A second agent with a state folder of its own.
    let text = fs::read_to_string(cluster.config("agent")).unwrap();
    let second = cluster.path("second.toml");
    let text = text.replace(s(&cluster.path("agent")), s(&cluster.path("second"))).replace(".sock", ".sock2");
    let text = text.replace(&cluster.metrics_port("agent").to_string(), "0");
    fs::write(&second, text).unwrap();
    let refused = cluster.try_tidegate(&["agent", "--config", s(&second)]);
    let error = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && error.contains("another agent"), "{error}");
    // Another file of the same size in its place.
    assert_eq!(cluster.terminate("agent"), Some(0));
    let other = cluster.path("other.raw");
    fs::copy(cluster.disk(0), &other).unwrap();
    tool("qemu-io", &["-f", "raw", "-c", "write -P 0x77 45M 1M", s(&other)]);
    fs::rename(&other, cluster.disk(0)).unwrap();
    cluster.start_role("agent");
    cluster.wait("all of it is compared again", Duration::from_secs(20), || cluster.log("agent").contains("another file or device"));
    cluster.wait_for_delta();
    exact(&cluster, "replaced");
}
