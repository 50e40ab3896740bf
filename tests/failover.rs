//! Failovers of a machine of three disks, with real processes: tested, unplanned with agent and process server gone, planned,
//! changed, cancelled, committed, and through kills of the master target.
#![allow(clippy::unwrap_used, clippy::disallowed_methods, reason = "tests may unwrap, and wait by the clock")]

mod support;

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use serde_json::Value;
use support::{Cluster, Options, Rng, s, same_bytes, tool, try_tool};

const DISKS: usize = 3;

/// A hook whose commands leave their variables in a file each.
fn hook(dir: &std::path::Path) -> String {
    let script = dir.join("hook.sh");
    let text = "#!/bin/sh\nenv | grep ^TIDEGATE_ | sort > \"$(dirname \"$0\")/hook-$1.env\"\necho \"hook $1\"\n[ ! -e \"$(dirname \"$0\")/fail-$1\" ]\n";
    fs::write(&script, text).unwrap();
    fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let command = |phase: &str| format!("{phase} = [\"/bin/sh\", {script:?}, \"{phase}\"]\n");
    format!("[[hook]]\nname = \"fake\"\n{}{}{}check_timeout = \"3s\"\n", command("start"), command("check"), command("stop"))
}

struct Machine {
    cluster: Cluster,
    rng: Rng,
    /// (point, the disks at it)
    models: Vec<(String, Vec<PathBuf>)>,
    hooks: tempfile::TempDir,
}

impl Machine {
    fn start(seed: u64, interval: &'static str) -> Self {
        let hooks = tempfile::tempdir().unwrap();
        let options = Options { disk_bytes: 24 << 20, disks: DISKS, interval, master_target: hook(hooks.path()), ..Options::default() };
        let mut cluster = Cluster::start(options);
        cluster.wait_for_delta();
        Self { cluster, rng: Rng::new(seed), models: Vec::new(), hooks }
    }

    fn scribble(&mut self, uris: &[String], pattern: u64) {
        for uri in uris {
            let mut args = vec!["-f".to_owned(), "raw".to_owned()];
            for _ in 0..20 {
                let offset = self.rng.below(5000) * 4096 + self.rng.below(8) * 512;
                args.extend(["-c".to_owned(), format!("write -P {} {offset} {}", 1 + pattern % 250, (1 + self.rng.below(64)) * 512)]);
            }
            args.extend(["-c".to_owned(), "flush".to_owned()]);
            args.push(uri.clone());
            tool("qemu-io", &args.iter().map(String::as_str).collect::<Vec<_>>());
        }
    }

    fn sources(&self) -> Vec<String> {
        (0..DISKS).map(|i| self.cluster.nbd_uri(i)).collect()
    }

    /// Writes, makes a point, keeps a model of each disk.
    fn point(&mut self, label: &str) -> String {
        let (uris, pattern) = (self.sources(), self.models.len() as u64 * 7 + 1);
        self.scribble(&uris, pattern);
        let id = self.cluster.mark(label);
        let copies = (0..DISKS).map(|i| self.keep(&self.cluster.disk(i), &format!("{label}-{i}"))).collect();
        self.models.push((id.clone(), copies));
        id
    }

    fn keep(&self, disk: &std::path::Path, name: &str) -> PathBuf {
        let copy = self.cluster.path(&format!("model-{name}.raw"));
        fs::copy(disk, &copy).unwrap();
        copy
    }

    fn failover(&self, args: &[&str]) -> Value {
        let control = self.cluster.control("master-target");
        let output = self.cluster.try_tidegate(&[&["failover"], args, &["--json", "--control", &control]].concat());
        assert!(output.status.success(), "failover {args:?}: {}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).unwrap()
    }

    fn refused(&self, args: &[&str]) -> String {
        let control = self.cluster.control("master-target");
        let output = self.cluster.try_tidegate(&[&["failover"], args, &["--json", "--control", &control]].concat());
        assert!(!output.status.success(), "failover {args:?} must be refused");
        String::from_utf8_lossy(&output.stderr).into_owned()
    }

    /// The disks that a job serves hold what they held at a point.
    fn check_served(&self, job: &Value, models: &[PathBuf], what: &str) {
        let copy = self.cluster.path("served.raw");
        for (disk, model) in job["disks"].as_array().unwrap().iter().zip(models) {
            tool("nbdcopy", &[disk["nbd"].as_str().unwrap(), s(&copy)]);
            assert!(same_bytes(&copy, model), "{what}: {} differs from its model", disk["name"]);
            fs::remove_file(&copy).unwrap();
        }
    }

    fn check_replicas(&self, models: &[PathBuf], what: &str) {
        for (i, model) in models.iter().enumerate() {
            let output = try_tool("qemu-img", &["compare", "-U", "-f", "raw", "-F", "vhdx", s(model), s(&self.cluster.replica(i))]);
            assert!(output.status.success(), "{what}: replica {i}: {}", String::from_utf8_lossy(&output.stdout));
        }
    }

    fn state(&self) -> String {
        self.cluster.json("master-target", &["status"])[0]["machines"][0]["disks"][0]["state"].as_str().unwrap().to_owned()
    }

    fn uris(job: &Value) -> Vec<String> {
        job["disks"].as_array().unwrap().iter().map(|d| d["nbd"].as_str().unwrap().to_owned()).collect()
    }

    /// Files of old content.
    fn kept(&self) -> BTreeSet<PathBuf> {
        let mut found = BTreeSet::new();
        let mut folders = vec![self.cluster.path("master-target")];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    folders.push(path);
                } else if path.extension().is_some_and(|e| e == "tgu") {
                    found.insert(path);
                }
            }
        }
        found
    }

    fn env(&self, phase: &str) -> String {
        fs::read_to_string(self.hooks.path().join(format!("hook-{phase}.env"))).unwrap_or_default()
    }
}

#[test]
fn a_test_failover_stands_alone_runs_the_hook_and_leaves_no_trace() {
    let mut m = Machine::start(1, "1h");
    let (first, _) = (m.point("first"), m.point("second"));
    let before = m.models[0].1.clone();
    let job = m.failover(&["test", "m1", "--point", &first[..8], "--hook", "fake"]);
    assert_eq!((job["state"].as_str(), job["passed"].as_bool()), (Some("running"), Some(true)), "{job}");
    m.check_served(&job, &before, "tested");
    let env = m.env("start");
    for wanted in [
        "TIDEGATE_KIND=test",
        "TIDEGATE_DISKS=d0 d1 d2",
        "TIDEGATE_NBD_D1=nbd+unix",
        &format!("TIDEGATE_POINT={first}"),
        "TIDEGATE_SIZE_2=25165824",
    ] {
        assert!(env.contains(wanted), "{wanted} in {env}");
    }
    // Written on both sides: neither sees the other.
    let (uris, sources) = (Machine::uris(&job), m.sources());
    m.scribble(&uris, 200);
    m.scribble(&sources, 201);
    let third = m.point("third");
    let beside = m.failover(&["test", "m1", "--point", "latest", "--cleanup"]);
    assert_eq!(beside["state"], "cleaned");
    assert!(m.refused(&["commit", "1", "--yes"]).contains("is running"), "a test is not committed");
    let cleaned = m.failover(&["cleanup", "1"]);
    assert_eq!(cleaned["state"], "cleaned");
    assert!(m.env("stop").contains("TIDEGATE_JOB=1"));
    assert!(!m.cluster.path("master-target/failover/1").exists() && !m.cluster.path("master-target/failover/2").exists());
    assert_eq!(m.cluster.json("master-target", &["recover", "list"]).as_array().unwrap().len(), 0);
    m.check_replicas(&m.models[2].1.clone(), "after tests");
    m.cluster.export(&third, 1, "raw", &m.cluster.path("third.raw"));
    assert!(same_bytes(&m.cluster.path("third.raw"), &m.models[2].1[1]));
    // A machine that does not come up is a result.
    fs::write(m.hooks.path().join("fail-check"), "").unwrap();
    let error = m.refused(&["test", "m1", "--hook", "fake", "--cleanup"]);
    assert!(error.contains("did not come up") && error.contains("did not succeed within 3 s"), "{error}");
    let told = m.cluster.json("master-target", &["status"])[0]["machines"][0]["last_test"].as_str().unwrap().to_owned();
    assert!(told.contains("failed"), "{told}");
    // What a killed master target leaves of a test is taken away.
    m.cluster.kill("master-target");
    m.cluster.start_role("master-target");
    let last = m.failover(&["show", "3"]);
    m.cluster.wait("the test is cleaned up", Duration::from_secs(10), || m.failover(&["show", "3"])["state"] == "cleaned");
    assert_eq!(last["kind"], "test");
    assert!(m.refused(&["test", "m1", "--hook", "none"]).contains("the configuration has fake"));
}

#[test]
fn an_unplanned_failover_is_changed_survives_kills_and_is_cancelled_without_a_trace() {
    let mut m = Machine::start(2, "1h");
    let ids: Vec<String> = ["a", "b", "c", "d"].iter().map(|label| m.point(label)).collect();
    let sources = m.sources();
    m.scribble(&sources, 77);
    m.cluster.wait_for_delta();
    let newest: Vec<PathBuf> = (0..DISKS).map(|i| m.keep(&m.cluster.disk(i), &format!("newest-{i}"))).collect();
    m.cluster.kill("agent");
    m.cluster.kill("process-server");
    let told = m.refused(&["unplanned", "m1"]);
    assert!(told.contains("what the machine wrote after it") && told.contains("--yes"), "the loss is told and nothing is done: {told}");
    // Four times 20 writes of up to 32 KiB to each disk, of content that takes next to nothing where it is kept.
    let told = m.refused(&["unplanned", "m1", "--point", &ids[0]]);
    assert!(told.contains("MiB that came here after the point"), "the loss is told in bytes of the disks: {told}");
    let job = m.failover(&["unplanned", "m1", "--point", &ids[1], "--yes"]);
    assert_eq!(job["state"], "failed-over", "{job}");
    m.check_served(&job, &m.models[1].1.clone(), "point b");
    m.check_replicas(&m.models[1].1.clone(), "the image itself at b");
    assert_eq!(m.state(), "failed-over");
    let again = m.refused(&["unplanned", "m1", "--yes"]);
    assert!(again.contains("is failing over to this site"), "{again}");
    let mut random = Rng::new(5);
    for round in 0..6 {
        // The machine runs here and writes, then somebody wants another moment.
        let now = m.failover(&["show", "1"]);
        m.scribble(&Machine::uris(&now), 100 + round);
        let to = random.below(4) as usize;
        let control = m.cluster.control("master-target");
        if round % 2 == 1 {
            // Killed while it rolls, or just before or after: the roll is finished by the next start.
            m.cluster.tidegate(&["failover", "change-point", "1", "--point", &ids[to], "--detach", "--control", &control]);
            std::thread::sleep(Duration::from_millis(random.below(40)));
            m.cluster.kill("master-target");
            m.cluster.start_role("master-target");
            m.cluster.wait("the roll is finished", Duration::from_secs(30), || {
                let job = m.failover(&["show", "1"]);
                job["state"] == "failed-over" && job["busy"] == false
            });
        } else {
            m.failover(&["change-point", "1", "--point", &ids[to]]);
        }
        let job = m.failover(&["show", "1"]);
        assert_eq!(job["point"], ids[to].as_str());
        m.check_served(&job, &m.models[to].1.clone(), "changed point");
    }
    // Every point is what it was, although the replica stands elsewhere and was written.
    for (n, id) in ids.iter().enumerate() {
        let out = m.cluster.path("out.raw");
        m.cluster.export(id, n % DISKS, "raw", &out);
        assert!(same_bytes(&out, &m.models[n].1[n % DISKS]), "point {n} during the failover");
        fs::remove_file(&out).unwrap();
    }
    // The old source wakes and is refused, and told why.
    m.cluster.start_role("process-server");
    m.cluster.start_role("agent");
    m.cluster.wait("the source is told", Duration::from_secs(30), || {
        m.cluster.json("agent", &["status"])[0]["reason"].as_str().is_some_and(|r| r.contains("failing over to this site"))
    });
    m.scribble(&sources, 90);
    let job = m.failover(&["cancel", "m1"]);
    assert_eq!(job["state"], "cancelled", "{job}");
    m.cluster.wait_for_delta();
    let end = m.point("end");
    for i in 0..DISKS {
        m.cluster.export(&end, i, "raw", &m.cluster.path("out.raw"));
        assert!(same_bytes(&m.cluster.path("out.raw"), &m.cluster.disk(i)));
        fs::remove_file(m.cluster.path("out.raw")).unwrap();
    }
    for (n, id) in ids.iter().enumerate() {
        let out = m.cluster.path("out.raw");
        m.cluster.export(id, n % DISKS, "raw", &out);
        assert!(same_bytes(&out, &m.models[n].1[n % DISKS]), "point {n} after the cancelled failover");
        fs::remove_file(&out).unwrap();
    }
    drop(newest);
    let log = fs::read_to_string(m.cluster.path("master-target/failover/log.jsonl")).unwrap();
    assert!(log.lines().any(|l| l.contains("\"action\":\"cancel\"") && l.contains("uid")), "who did what: {log}");
}

#[test]
fn a_committed_failover_has_no_way_back_and_gives_the_images_out_of_hand() {
    let mut m = Machine::start(3, "1h");
    let ids = [m.point("a"), m.point("b")];
    m.cluster.kill("agent");
    let job = m.failover(&["unplanned", "m1", "--point", "latest-processed", "--hook", "fake", "--yes"]);
    assert_eq!(job["point"], ids[1].as_str());
    let uris = Machine::uris(&job);
    m.scribble(&uris, 50);
    m.cluster.tidegate(&["point", "pin", &ids[0], "--control", &m.cluster.control("master-target")]);
    assert!(m.refused(&["commit", "m1", "--yes"]).contains("--drop-pinned"));
    let committed = m.failover(&["commit", "m1", "--yes", "--drop-pinned"]);
    assert_eq!(committed["state"], "committed", "{committed}");
    assert_eq!(m.cluster.points().len(), 0);
    assert!(m.refused(&["cancel", "1"]).contains("no way back"));
    // It goes on running from the same disks, also after a restart.
    m.scribble(&uris, 51);
    let copies: Vec<PathBuf> = uris
        .iter()
        .enumerate()
        .map(|(i, uri)| {
            let copy = m.cluster.path(&format!("committed-{i}.raw"));
            tool("nbdcopy", &[uri, s(&copy)]);
            copy
        })
        .collect();
    m.cluster.kill("master-target");
    m.cluster.start_role("master-target");
    m.cluster.wait("the disks are served again", Duration::from_secs(20), || m.failover(&["show", "1"])["busy"] == false);
    m.check_served(&m.failover(&["show", "1"]), &copies, "after a restart");
    let released = m.failover(&["cleanup", "1"]);
    assert_eq!(released["state"], "released", "{released}");
    m.check_replicas(&copies, "the files");
    for i in 0..DISKS {
        tool("qemu-img", &["check", "-f", "vhdx", s(&m.cluster.replica(i))]);
    }
    assert!(m.refused(&["test", "m1"]).contains("reprotect"));
    m.cluster.start_role("agent");
    m.cluster.wait("the source is told", Duration::from_secs(30), || {
        m.cluster.json("agent", &["status"])[0]["reason"].as_str().is_some_and(|r| r.contains("failed over to this site"))
    });
    m.cluster.kill("master-target");
    m.cluster.start_role("master-target");
    assert_eq!(m.state(), "failed-over", "remembered");
    m.check_replicas(&copies, "not touched by a restart");
}

#[test]
fn a_planned_failover_loses_nothing_and_a_cancelled_one_lets_the_source_go_on() {
    let mut m = Machine::start(4, "1h");
    m.point("a");
    let sources = m.sources();
    m.scribble(&sources, 60);
    let job = m.failover(&["planned", "m1", "--hook", "fake", "--yes"]);
    assert_eq!(job["state"], "failed-over", "{job}");
    let now: Vec<PathBuf> = (0..DISKS).map(|i| m.keep(&m.cluster.disk(i), &format!("planned-{i}"))).collect();
    m.check_served(&job, &now, "everything is there");
    let refused = try_tool("qemu-io", &["-f", "raw", "-c", "write -P 1 0 4k", &sources[0]]);
    assert!(!refused.status.success() || String::from_utf8_lossy(&refused.stdout).contains("failed"), "the source takes no writes");
    assert!(
        m.cluster.try_tidegate(&["point", "mark", "--machine", "m1", "--control", &m.cluster.control("agent")]).status.code() == Some(1)
    );
    // Written here, thrown away with the cancel, and what it took is given back.
    let kept = m.kept();
    m.scribble(&Machine::uris(&job), 61);
    assert_eq!(m.kept().len(), kept.len() + DISKS, "the way back is kept");
    m.cluster.kill("agent");
    m.cluster.start_role("agent");
    m.cluster.wait("the agent is there again", Duration::from_secs(30), || m.cluster.agent_disk(0)["state"].is_string());
    m.cluster.kill("agent");
    assert_eq!(m.failover(&["cancel", "m1"])["state"], "cancelled");
    assert_eq!(m.kept(), kept);
    m.cluster.start_role("agent");
    assert!(m.env("stop").contains("TIDEGATE_KIND=planned"));
    m.cluster.wait("the source goes on", Duration::from_secs(40), || {
        try_tool("qemu-io", &["-f", "raw", "-c", "write -P 9 0 4k", &sources[0]]).status.success()
            && m.cluster.agent_disk(0)["state"] == "delta"
    });
    m.cluster.wait_for_delta();
    m.point("b");
    for i in 0..DISKS {
        let out = m.cluster.path("out.raw");
        m.cluster.export(&m.models[1].0.clone(), i, "raw", &out);
        assert!(same_bytes(&out, &m.models[1].1[i]), "disk {i} after the cancelled failover");
        fs::remove_file(out).unwrap();
    }
    // An agent that is not there cannot stop its machine: the job waits, and can be given up.
    m.cluster.kill("agent");
    let control = m.cluster.control("master-target");
    m.cluster.tidegate(&["failover", "planned", "m1", "--yes", "--detach", "--control", &control]);
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(m.failover(&["show", "m1"])["state"], "quiescing");
    m.cluster.wait("it says what it waits for", Duration::from_secs(20), || {
        m.failover(&["show", "m1"])["remedy"].as_str().is_some_and(|r| r.contains("waiting for the agent") && r.contains("failover cancel"))
    });
    m.cluster.tidegate(&["failover", "cancel", "m1", "--detach", "--control", &control]);
    m.cluster.wait("it is given up", Duration::from_secs(5), || {
        m.failover(&["list"]).as_array().unwrap().iter().all(|j| j["state"] == "cancelled" || j["state"] == "failed")
    });
    m.cluster.start_role("agent");
    m.cluster.wait_for_delta();
}

#[test]
fn what_the_machine_was_writing_when_its_failover_was_cancelled_never_lands() {
    let mut cluster = Cluster::start(Options { disk_bytes: 96 << 20, interval: "1h", ..Options::default() });
    cluster.wait_for_delta();
    tool("qemu-io", &["-f", "raw", "-c", "write -P 7 0 48M", "-c", "flush", &cluster.nbd_uri(0)]);
    cluster.wait_for_delta();
    cluster.mark("a");
    let noise = cluster.path("noise.raw");
    let mut rng = Rng::new(9);
    fs::write(&noise, (0..(96usize << 20) / 8).flat_map(|_| rng.below(u64::MAX).to_le_bytes()).collect::<Vec<u8>>()).unwrap();
    let control = cluster.control("master-target");
    for round in 0..3 {
        cluster.tidegate(&["failover", "unplanned", "m1", "--yes", "--control", &control]);
        let job = cluster.json("master-target", &["failover", "show", "m1"]);
        let uri = job["disks"][0]["nbd"].as_str().unwrap().to_owned();
        let copy = ["--requests=64", "--request-size=1048576", s(&noise), &uri];
        let start = |_| std::process::Command::new("nbdcopy").args(copy).stderr(std::process::Stdio::null()).spawn().unwrap();
        let writers: Vec<_> = (0..6).map(start).collect();
        std::thread::sleep(Duration::from_millis(100 + 80 * round));
        cluster.tidegate(&["failover", "cancel", "m1", "--control", &control]);
        for mut writer in writers {
            // Its connection ends with the service: nobody waits for an answer that never comes.
            cluster.wait("the client is let go", Duration::from_secs(20), || writer.try_wait().unwrap().is_some());
        }
        cluster.wait_for_delta();
        let point = cluster.mark(&format!("after {round}"));
        let exported = cluster.path("exported.raw");
        cluster.export(&point, 0, "raw", &exported);
        assert!(same_bytes(&exported, &cluster.disk(0)), "round {round}: a point after the cancelled failover is not the source");
        fs::remove_file(exported).unwrap();
    }
}

fn small_with_a_point() -> Cluster {
    let mut cluster = Cluster::start(Options { disk_bytes: 8 << 20, interval: "1h", ..Options::default() });
    cluster.wait_for_delta();
    cluster.mark("a");
    cluster
}

fn failover(cluster: &Cluster, args: &[&str]) {
    cluster.tidegate(&[&["failover"], args, &["--control", &cluster.control("master-target")]].concat());
}

fn takes_writes(cluster: &Cluster) -> bool {
    let output = try_tool("qemu-io", &["-f", "raw", "-c", "write -P 1 0 4k", &cluster.nbd_uri(0)]);
    output.status.success() && !String::from_utf8_lossy(&output.stdout).contains("failed")
}

/// What undid one failover does not wake the source beside the next one.
#[test]
fn a_source_that_missed_a_cancel_stays_stopped_while_it_fails_over_unplanned() {
    let mut cluster = small_with_a_point();
    failover(&cluster, &["planned", "m1", "--yes"]);
    cluster.kill("agent");
    failover(&cluster, &["cancel", "m1"]);
    failover(&cluster, &["unplanned", "m1", "--yes"]);
    cluster.start_role("agent");
    for _ in 0..20 {
        assert!(!takes_writes(&cluster), "the machine runs at the other site");
        std::thread::sleep(Duration::from_millis(200));
    }
    failover(&cluster, &["cancel", "m1"]);
    cluster.wait("the source goes on", Duration::from_secs(30), || takes_writes(&cluster));
}

/// The machine runs at the other site then: nothing but a person wakes it here.
#[test]
fn a_commit_does_not_wake_the_source_and_a_cancel_does() {
    let mut cluster = small_with_a_point();
    failover(&cluster, &["planned", "m1", "--yes"]);
    assert!(!takes_writes(&cluster));
    failover(&cluster, &["cancel", "m1"]);
    cluster.wait("the source goes on", Duration::from_secs(20), || takes_writes(&cluster));
    cluster.wait_for_delta();
    // Also one that was away, of a master target that was restarted.
    failover(&cluster, &["planned", "m1", "--yes"]);
    cluster.kill("agent");
    failover(&cluster, &["cancel", "m1"]);
    cluster.kill("master-target");
    cluster.start_role("master-target");
    cluster.start_role("agent");
    cluster.wait("the source goes on", Duration::from_secs(30), || takes_writes(&cluster));
    cluster.wait_for_delta();
    failover(&cluster, &["planned", "m1", "--yes"]);
    failover(&cluster, &["commit", "m1", "--yes"]);
    let stays = |cluster: &Cluster, when: &str| {
        for _ in 0..15 {
            assert!(!takes_writes(cluster), "the source takes writes {when}");
            std::thread::sleep(Duration::from_millis(200));
        }
    };
    stays(&cluster, "after the commit");
    failover(&cluster, &["cleanup", "m1"]);
    for role in ["master-target", "process-server"] {
        cluster.kill(role);
        cluster.start_role(role);
    }
    stays(&cluster, "after the cleanup and a restart");
    // What is compared then is not written either.
    failover(&cluster, &["reprotect", "m1", "--detach"]);
    stays(&cluster, "while it is compared");
    cluster.tidegate(&["machine", "resume", "m1", "--control", &cluster.control("agent")]);
    assert!(takes_writes(&cluster));
}

#[test]
fn a_machine_that_came_back_is_not_stopped_again_by_an_old_word() {
    let mut cluster = small_with_a_point();
    failover(&cluster, &["planned", "m1", "--yes"]);
    assert!(!takes_writes(&cluster));
    // The other site is lost, the machine goes on at home, its agent connects again.
    cluster.kill("master-target");
    cluster.tidegate(&["machine", "resume", "m1", "--control", &cluster.control("agent")]);
    cluster.kill("agent");
    cluster.start_role("agent");
    std::thread::sleep(Duration::from_secs(2));
    assert!(takes_writes(&cluster), "the process server does not repeat what its master target wanted once");
    // The other site is there again, and the machine stays here: protected anew, at once after its disks were given back.
    cluster.start_role("master-target");
    cluster.wait("the disks are served", Duration::from_secs(20), || {
        cluster.json("master-target", &["failover", "show", "m1"])["busy"] == false
    });
    failover(&cluster, &["commit", "m1", "--yes"]);
    failover(&cluster, &["cleanup", "m1"]);
    failover(&cluster, &["reprotect", "m1", "--overwrite", "d0", "--detach"]);
    cluster.wait_for_delta();
    std::thread::sleep(Duration::from_secs(2));
    assert!(takes_writes(&cluster), "a failover that is over stops nobody");
    cluster.mark("protected");
    cluster.wait("the job ends", Duration::from_secs(20), || {
        cluster.json("master-target", &["failover", "list"]).as_array().unwrap().iter().any(|j| j["state"] == "protected")
    });
    // More jobs than are remembered: what they forget is never the one that says that the machine is protected.
    for _ in 0..202 {
        failover(&cluster, &["test", "m1", "--cleanup"]);
    }
    cluster.kill("master-target");
    cluster.start_role("master-target");
    cluster.wait_for_delta();
    failover(&cluster, &["unplanned", "m1", "--yes"]);
}
