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
