//! Application-consistent points: frozen file systems are brought back clean, databases and guests at rest, and whatever hangs,
//! fails or is killed around a freeze, nothing stays frozen and the point says what it is.
#![allow(clippy::unwrap_used, clippy::disallowed_methods, missing_docs, reason = "a test")]

mod support;

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::Value;
use support::mounted::{Image, Mounted, whole_files, write_files};
use support::postgresql::{Server, done};
use support::{Cluster, Options, guest, s, tool, try_tool};
use tempfile::TempDir;

/// Other programs take their share of the machine.
const SOON: Duration = Duration::from_secs(60);

fn mount_hook(name: &str, at: &Path) -> String {
    format!("[[app.hook]]\nname = \"{name}\"\nmount = {at:?}\n")
}

fn script_hook(name: &str, script: &Path, timeout: &str) -> String {
    format!("[[app.hook]]\nname = \"{name}\"\nscript = {script:?}\ntimeout = \"{timeout}\"\n")
}

fn guest_hook(socket: &Path) -> String {
    format!("[[app.hook]]\nname = \"guest\"\nguest_agent = {socket:?}\n")
}

fn app(keys: &str, hooks: &[String]) -> Options {
    Options { agent: format!("[app]\n{keys}\n{}", hooks.concat()), interval: "1h", ..Options::default() }
}

/// A cluster whose one disk is replicated.
fn started(options: Options) -> Cluster {
    let mut cluster = Cluster::start(options);
    tool("qemu-io", &["-f", "raw", "-c", "write -P 1 0 64k", &cluster.nbd_uri(0)]);
    cluster.wait_for_delta();
    cluster
}

fn mark_command(cluster: &Cluster) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tidegate"));
    command.args(["point", "mark", "--machine", "m1", "--app", "--json", "--control", &cluster.control("agent")]);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn mark_app(cluster: &Cluster) -> Output {
    mark_command(cluster).output().unwrap()
}

/// Makes an application-consistent point, which is listed when this returns, and returns how it is listed.
fn app_point(cluster: &Cluster) -> Value {
    let output = mark_app(cluster);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    listed(cluster, &output)
}

fn listed(cluster: &Cluster, marked: &Output) -> Value {
    let marked: Value = serde_json::from_slice(&marked.stdout).unwrap_or_else(|e| panic!("{e}: {marked:?}"));
    let (id, mut found) = (&marked["point"], Value::Null);
    cluster.wait("the point is listed", SOON, || {
        found = cluster.points().into_iter().find(|p| p["id"] == *id).unwrap_or_default();
        !found.is_null()
    });
    assert_eq!(found["remark"], marked["remark"], "whoever asked and whoever lists say the same");
    found
}

fn assert_app(point: &Value) {
    assert_eq!((point["kind"].as_str(), &point["remark"]), (Some("app-consistent"), &Value::Null), "{point}");
}

/// That it says why it is crash-consistent.
fn assert_crash(point: &Value, why: &str) {
    assert_eq!(point["kind"], "crash-consistent", "{point}");
    assert!(point["remark"].as_str().is_some_and(|r| r.contains(why)), "{why}: {point}");
}

fn exported(cluster: &Cluster, point: &Value, disk: usize) -> PathBuf {
    let id = point["id"].as_str().unwrap();
    let raw = cluster.path(&format!("{id}-{disk}.raw"));
    cluster.export(id, disk, "raw", &raw);
    raw
}

fn needs_recovery(raw: &Path) -> bool {
    tool("dumpe2fs", &["-h", s(raw)]).contains("needs_recovery")
}

/// Writes and syncs files until it is dropped.
struct Writer {
    stop: Arc<AtomicBool>,
    synced: Arc<AtomicUsize>,
    thread: Option<JoinHandle<()>>,
}

impl Writer {
    fn new(dir: &Path) -> Self {
        let (stop, synced) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let (over, count, dir) = (stop.clone(), synced.clone(), dir.to_owned());
        let thread = std::thread::spawn(move || {
            while !over.load(Ordering::Relaxed) {
                let round = count.load(Ordering::Relaxed);
                write_files(&dir, round, 3);
                count.store(round + 1, Ordering::Relaxed);
                if round > 3 {
                    (0..3).for_each(|n| drop(fs::remove_file(dir.join(format!("file-{}-{n}", round - 3)))));
                }
            }
        });
        let writer = Self { stop, synced, thread: Some(thread) };
        let begun = Instant::now();
        while writer.synced.load(Ordering::Relaxed) < 6 {
            assert!(begun.elapsed() < SOON, "the writer does not write");
            std::thread::sleep(Duration::from_millis(20));
        }
        writer
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

#[test]
fn frozen_file_systems_are_brought_back_clean_and_complete() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (dir.path().join("a"), dir.path().join("b"));
    let hooks = [mount_hook("a", &a.join("mnt")), mount_hook("b", &b.join("mnt"))];
    let mut cluster = Cluster::start(Options { disk_bytes: 320 << 20, disks: 2, ..app("freeze_max = \"60s\"", &hooks) });
    let (ext4, xfs) = (Mounted::new(&a, &cluster.nbd_uri(0)), Mounted::new(&b, &cluster.nbd_uri(1)));
    ext4.mkfs();
    xfs.mkfs_xfs();
    ext4.mount();
    xfs.mount();
    for mounted in [&ext4, &xfs] {
        fs::create_dir(mounted.point.join("kept")).unwrap();
        fs::create_dir(mounted.point.join("load")).unwrap();
        write_files(&mounted.point.join("kept"), 0, 20);
    }
    cluster.wait_for_delta();
    let writers = [Writer::new(&ext4.point.join("load")), Writer::new(&xfs.point.join("load"))];
    // Neither synced nor anything: a freeze writes it out.
    for mounted in [&ext4, &xfs] {
        fs::write(mounted.point.join("unsynced"), "in memory only ".repeat(9000)).unwrap();
    }
    let point = app_point(&cluster);
    let crash = cluster.mark("control");
    let after: Vec<usize> = writers.iter().map(|w| w.synced.load(Ordering::Relaxed)).collect();
    let goes_on = || writers.iter().zip(&after).all(|(w, n)| w.synced.load(Ordering::Relaxed) > *n);
    cluster.wait("writers go on after the point", SOON, goes_on);
    drop(writers);
    assert_app(&point);
    let crash = cluster.points().into_iter().find(|p| p["id"] == crash.as_str()).unwrap();
    assert!(needs_recovery(&exported(&cluster, &crash, 0)), "without a freeze the journal is in use: this test can fail");

    let (raw, other) = (exported(&cluster, &point, 0), exported(&cluster, &point, 1));
    assert!(!needs_recovery(&raw), "the journal is empty at the point");
    tool("e2fsck", &["-fn", s(&raw)]);
    for (file, options) in [(&raw, "loop,ro,noload"), (&other, "loop,ro,norecovery,nouuid")] {
        let image = Image::mount(dir.path(), file, options);
        assert_eq!(whole_files(&image.0.join("kept"), 0, 20), 20, "{options}");
        assert_eq!(fs::read_to_string(image.0.join("unsynced")).unwrap(), "in memory only ".repeat(9000), "{options}");
    }
    eprintln!("ext4 and XFS: complete without a replay of their journals");
}

/// A script that notes its calls, and does what a file beside it says in `--pre`.
struct Script {
    dir: TempDir,
}

impl Script {
    fn new() -> Self {
        let script = Self { dir: tempfile::tempdir().unwrap() };
        let text = format!("#!/bin/sh\ncd {}\necho $1 >> calls\n[ $1 != --pre ] || . ./pre\n", s(script.dir.path()));
        guest::script(&script.path(), &text);
        script.does("true");
        script
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("script")
    }

    /// From now on; its calls are counted anew.
    fn does(&self, pre: &str) {
        fs::write(self.dir.path().join("pre"), format!("{pre}\n")).unwrap();
        let _ = fs::remove_file(self.dir.path().join("calls"));
        let _ = fs::remove_file(self.dir.path().join("begun"));
    }

    fn calls(&self) -> String {
        fs::read_to_string(self.dir.path().join("calls")).unwrap_or_default().replace('\n', " ")
    }

    fn wait_until_undone(&self, cluster: &Cluster) {
        cluster.wait("--post was called once", SOON, || self.calls() == "--pre --post " && !at_rest(cluster).exists());
    }
}

/// The note of what may be at rest.
fn at_rest(cluster: &Cluster) -> PathBuf {
    cluster.path("agent/at-rest")
}

fn configure(cluster: &mut Cluster, from: &str, to: &str) {
    let path = cluster.config("agent");
    let text = fs::read_to_string(&path).unwrap();
    assert!(text.contains(from), "{text}");
    fs::write(&path, text.replace(from, to)).unwrap();
    cluster.terminate("agent");
    cluster.start_role("agent");
    cluster.wait_for_delta();
}

fn metrics(cluster: &Cluster) -> String {
    let mut stream = std::net::TcpStream::connect(("127.0.0.1", cluster.metrics_port("agent"))).unwrap();
    write!(stream, "GET /metrics HTTP/1.0\r\n\r\n").unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    text
}

#[test]
fn a_hook_that_hangs_or_fails_costs_the_point_its_kind_and_is_undone() {
    let script = Script::new();
    let mut cluster = started(app("on_failure = \"crash\"", &[script_hook("shop", &script.path(), "1s")]));
    script.does("nice > nice");
    assert_app(&app_point(&cluster));
    script.wait_until_undone(&cluster);
    // The capture thread comes before others; what a script starts does not.
    let nice = |text: String| text.trim().to_owned();
    assert_eq!(nice(fs::read_to_string(script.dir.path().join("nice")).unwrap()), nice(tool("nice", &[])));
    let health = |cluster: &Cluster| cluster.json("agent", &["status"])[0].clone();
    assert_eq!(health(&cluster)["health"], "healthy");

    script.does("echo hanging; sleep 600 & echo $! > sleeper; wait");
    let begun = Instant::now();
    assert_crash(&app_point(&cluster), "shop: ");
    assert!(begun.elapsed() < SOON, "{:?}", begun.elapsed());
    script.wait_until_undone(&cluster);
    let sleeper = fs::read_to_string(script.dir.path().join("sleeper")).unwrap();
    cluster.wait("what the script started is ended too", SOON, || !runs(sleeper.trim()));
    let status = health(&cluster);
    assert_eq!(status["health"], "warning", "{status}");
    assert!(status["reason"].as_str().unwrap().contains("did not end within 1s"), "{status}");

    script.does("echo the shop is shut >&2; exit 3");
    let failed = app_point(&cluster);
    assert_crash(&failed, "ended with code 3: the shop is shut");
    script.wait_until_undone(&cluster);
    let shown = cluster.tidegate(&["point", "show", failed["id"].as_str().unwrap(), "--control", &cluster.control("master-target")]);
    assert!(shown.contains("remark   shop: ") && shown.contains("crash-consistent"), "{shown}");
    let counted = metrics(&cluster);
    assert!(counted.contains("tidegate_app_points_lost_total{reason=\"script\"} 2"), "{counted}");
    assert!(counted.contains("tidegate_freezes_total{result=\"ok\"} 1"), "{counted}");

    configure(&mut cluster, "on_failure = \"crash\"", "on_failure = \"skip\"");
    let points = cluster.points().len();
    script.does("exit 3");
    let skipped = mark_app(&cluster);
    assert!(!skipped.status.success() && String::from_utf8_lossy(&skipped.stderr).contains("on_failure"), "{skipped:?}");
    script.wait_until_undone(&cluster);
    assert_eq!(cluster.points().len(), points, "no point was made");
    script.does("true");
    assert_app(&app_point(&cluster));
    script.wait_until_undone(&cluster);
    assert_eq!(health(&cluster)["health"], "healthy", "what worked again is not spoken of");

    // An agent that is told to stop leaves nothing behind either.
    script.does("touch begun; sleep 600");
    configure(&mut cluster, "timeout = \"1s\"", "timeout = \"300s\"");
    let mut mark = Background(mark_command(&cluster).spawn().unwrap());
    cluster.wait("the script is called", SOON, || script.dir.path().join("begun").exists());
    let begun = Instant::now();
    cluster.terminate("agent");
    assert!(begun.elapsed() < SOON, "{:?}", begun.elapsed());
    script.wait_until_undone(&cluster);
    let _ = mark.0.wait();
}

#[test]
fn application_consistent_points_are_made_on_a_timer() {
    let script = Script::new();
    let cluster = started(app("interval = \"10s\"", &[script_hook("shop", &script.path(), "30s")]));
    cluster.wait("a point that nobody asked for", SOON, || cluster.points().iter().any(|p| p["kind"] == "app-consistent"));
    script.wait_until_undone(&cluster);
}

#[test]
fn without_hooks_and_with_a_place_that_the_agent_needs_it_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let image = Image::new_ext4(dir.path(), "own.raw");
    let mut cluster = started(Options { interval: "1h", ..Options::default() });
    let refused = mark_app(&cluster);
    assert!(String::from_utf8_lossy(&refused.stderr).contains("[[app.hook]]"), "{refused:?}");
    let state = format!("state = {:?}", cluster.path("agent"));
    let (own, missing) = (image.0.join("state"), dir.path().join("missing"));
    configure(&mut cluster, &state, &format!("{state}\n[app]\n{}", mount_hook("a", &missing)));
    fs::create_dir(&missing).unwrap();
    assert_crash(&app_point(&cluster), "nothing is mounted at");
    cluster.terminate("agent");
    let text = fs::read_to_string(cluster.config("agent")).unwrap();
    let text = text.replace(s(&missing), s(&image.0)).replace(&state, &format!("state = {own:?}"));
    fs::write(cluster.config("agent"), text).unwrap();
    let refused = cluster.try_tidegate(&["agent", "--config", s(&cluster.config("agent"))]);
    let told = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && told.contains("app.hook a") && told.contains("the agent's state folder"), "{told}");
}

/// Whether writers of a file system wait: one that was begun now.
struct Probe(Child);

impl Probe {
    fn begin(image: &Image) -> Self {
        Self(Command::new("touch").arg(image.0.join("probe")).spawn().unwrap())
    }

    fn waits(&mut self) -> bool {
        self.0.try_wait().unwrap().is_none()
    }

    /// One that waits already. A `touch` that is slow for another reason would not take this long.
    fn that_waits(cluster: &Cluster, image: &Image) -> Self {
        let mut probe = Self::begin(image);
        let mut begun = Instant::now();
        cluster.wait("the file system is frozen", SOON, || {
            if !probe.waits() {
                (probe, begun) = (Self::begin(image), Instant::now());
            }
            begun.elapsed() > Duration::from_secs(2)
        });
        probe
    }
}

impl Drop for Probe {
    fn drop(&mut self) {
        // Ends when the file system is thawed, at the latest by whoever unmounts it.
        let _ = self.0.kill();
    }
}

/// Whether a process runs: one that ended and was not collected does not.
fn runs(pid: &str) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z"))
}

/// The process that an agent started.
fn guard_of(agent: u32) -> Option<String> {
    fs::read_dir("/proc").unwrap().flatten().find_map(|entry| {
        let stat = fs::read_to_string(entry.path().join("stat")).ok()?;
        let parent = stat.rsplit(')').next()?.split_whitespace().nth(1)?.to_owned();
        (parent == agent.to_string()).then(|| entry.file_name().to_string_lossy().into_owned())
    })
}

/// An agent that is stopped (SIGSTOP) while everything is frozen: nobody tells the guard to thaw.
fn stop_while_frozen(cluster: &Cluster, script: &Script, image: &Image) -> (Child, String, Probe) {
    script.does("touch begun; sleep 1");
    let mark = mark_command(cluster).spawn().unwrap();
    cluster.wait("the script is called", SOON, || script.dir.path().join("begun").exists());
    let agent = cluster.pid("agent");
    tool("kill", &["-STOP", &agent.to_string()]);
    let guard = guard_of(agent).expect("the agent has a guard");
    (mark, guard, Probe::that_waits(cluster, image))
}

#[test]
fn whoever_is_killed_in_between_nothing_stays_frozen() {
    let (dir, script) = (tempfile::tempdir().unwrap(), Script::new());
    let image = Image::new_ext4(dir.path(), "other.raw");
    let hooks = [script_hook("shop", &script.path(), "30s"), mount_hook("data", &image.0)];
    let mut cluster = started(app("freeze_max = \"60s\"", &hooks));
    assert_app(&app_point(&cluster));
    // Sooner than the time would be over.
    let thaw = Duration::from_secs(30);

    // The agent.
    let (mut mark, _, mut probe) = stop_while_frozen(&cluster, &script, &image);
    assert!(at_rest(&cluster).exists());
    cluster.kill("agent");
    cluster.wait("the guard thaws when the agent is killed", thaw, || !probe.waits());
    script.wait_until_undone(&cluster);
    let _ = mark.wait();
    cluster.start_role("agent");
    cluster.wait_for_delta();
    script.does("true");
    assert_app(&app_point(&cluster));

    // The guard.
    let (mark, guard, mut probe) = stop_while_frozen(&cluster, &script, &image);
    // Who asks it politely is not heard.
    for signal in ["-TERM", "-INT", "-HUP"] {
        tool("kill", &[signal, &guard]);
    }
    std::thread::sleep(Duration::from_millis(500));
    assert!(probe.waits() && runs(&guard));
    tool("kill", &["-KILL", &guard]);
    std::thread::sleep(Duration::from_secs(1));
    assert!(probe.waits(), "nobody is there who could thaw it");
    tool("kill", &["-CONT", &cluster.pid("agent").to_string()]);
    cluster.wait("the agent thaws when the guard is killed", thaw, || !probe.waits());
    script.wait_until_undone(&cluster);
    assert!(cluster.log("agent").contains("ended before it was told to"));
    // The freeze held when the marker was made, or the point says otherwise.
    let point = listed(&cluster, &mark.wait_with_output().unwrap());
    assert!(point["kind"] == "app-consistent" || point["remark"].is_string(), "{point}");

    // Both.
    let (mut mark, guard, mut probe) = stop_while_frozen(&cluster, &script, &image);
    tool("kill", &["-KILL", &guard]);
    cluster.kill("agent");
    let _ = mark.wait();
    std::thread::sleep(Duration::from_secs(1));
    assert!(probe.waits() && at_rest(&cluster).exists(), "nobody is there who could thaw it");
    cluster.start_role("agent");
    cluster.wait("the next start thaws", thaw, || !probe.waits());
    script.wait_until_undone(&cluster);
    cluster.wait_for_delta();
    script.does("true");
    assert_app(&app_point(&cluster));
}

#[test]
fn a_freeze_ends_after_its_time_and_its_point_says_so() {
    let (dir, script) = (tempfile::tempdir().unwrap(), Script::new());
    let image = Image::new_ext4(dir.path(), "other.raw");
    let hooks = [script_hook("shop", &script.path(), "30s"), mount_hook("data", &image.0)];
    let cluster = started(app("freeze_max = \"6s\"", &hooks));
    let (mark, _, mut probe) = stop_while_frozen(&cluster, &script, &image);
    cluster.wait("the time is over", Duration::from_secs(30), || !probe.waits());
    script.wait_until_undone(&cluster);
    tool("kill", &["-CONT", &cluster.pid("agent").to_string()]);
    assert_crash(&listed(&cluster, &mark.wait_with_output().unwrap()), "before the writes were held");
}

#[test]
fn a_freeze_that_hangs_in_the_kernel_does_not_keep_others_frozen() {
    let (dir, script) = (tempfile::tempdir().unwrap(), Script::new());
    let other = Image::new_ext4(dir.path(), "other.raw");
    let own = dir.path().join("own");
    let hooks = [script_hook("shop", &script.path(), "30s"), mount_hook("other", &other.0), mount_hook("own", &own.join("mnt"))];
    let mut cluster = Cluster::start(app("freeze_max = \"6s\"", &hooks));
    let mounted = Mounted::new(&own, &cluster.nbd_uri(0));
    mounted.mkfs();
    mounted.mount();
    cluster.wait_for_delta();
    fs::write(mounted.point.join("unsynced"), "in memory only ".repeat(9000)).unwrap();
    // Who serves the disk of `own` is stopped: its freeze waits in the kernel, while `other` is frozen already.
    let (mark, guard, mut probe) = stop_while_frozen(&cluster, &script, &other);
    cluster.wait("the other one is thawed when the time is over", Duration::from_secs(30), || !probe.waits());
    assert!(runs(&guard) && at_rest(&cluster).exists(), "what hangs is not forgotten");
    tool("kill", &["-CONT", &cluster.pid("agent").to_string()]);
    let output = mark.wait_with_output().unwrap();
    assert_crash(&listed(&cluster, &output), "not everything was at rest within 6s");
    script.wait_until_undone(&cluster);
    fs::write(mounted.point.join("after"), "it goes on").unwrap();
    script.does("true");
    assert_app(&app_point(&cluster));
}

/// How a guest agent behaves.
#[derive(Clone, Copy, PartialEq)]
enum Manner {
    /// As it should, after what an earlier client left unread.
    Works,
    /// Takes everything and says nothing.
    Silent,
    /// Freezes, and never answers that; a new connection finds it well.
    StuckInFreeze,
    /// Refuses the first thaw.
    RefusesOnce,
}

/// A guest agent behind a socket.
struct FakeGuest {
    socket: PathBuf,
    state: Arc<Mutex<(Manner, bool, Vec<String>)>>,
}

impl FakeGuest {
    fn new(dir: &Path) -> Self {
        let guest = Self { socket: dir.join("qga.sock"), state: Arc::new(Mutex::new((Manner::Works, false, Vec::new()))) };
        let (listener, state) = (UnixListener::bind(&guest.socket).unwrap(), guest.state.clone());
        std::thread::spawn(move || {
            for client in listener.incoming() {
                let state = state.clone();
                std::thread::spawn(move || drop(Self::serve(client.unwrap(), &state)));
            }
        });
        guest
    }

    fn serve(mut client: UnixStream, state: &Mutex<(Manner, bool, Vec<String>)>) -> std::io::Result<()> {
        client.write_all(b"{\"return\": 77}\n\xff{\"return\": 3}\n{\"ret")?;
        let mut lines = BufReader::new(client.try_clone()?);
        loop {
            let mut line = Vec::new();
            if lines.read_until(b'\n', &mut line)? == 0 {
                return Ok(());
            }
            let delimited = line.iter().rposition(|b| *b == 0xFF).map_or(0, |at| at + 1);
            let request: Value = serde_json::from_slice(&line[delimited..]).unwrap();
            let command = request["execute"].as_str().unwrap().to_owned();
            let answer = {
                let mut state = state.lock().unwrap();
                state.2.push(command.clone());
                match (command.as_str(), state.0) {
                    (_, Manner::Silent) => continue,
                    ("guest-sync-delimited", _) => format!("{{\"return\": {}}}", request["arguments"]["id"]),
                    ("guest-fsfreeze-status", _) => format!("{{\"return\": \"{}\"}}", if state.1 { "frozen" } else { "thawed" }),
                    ("guest-fsfreeze-freeze", manner) => {
                        state.1 = true;
                        if manner == Manner::StuckInFreeze {
                            std::mem::drop(state);
                            // Whatever comes on this connection stays without an answer.
                            let _ = lines.read_to_end(&mut line);
                            return Ok(());
                        }
                        "{\"return\": 2}".to_owned()
                    }
                    ("guest-fsfreeze-thaw", Manner::RefusesOnce) => {
                        state.0 = Manner::Works;
                        "{\"error\": {\"class\": \"GenericError\", \"desc\": \"not now\"}}".to_owned()
                    }
                    ("guest-fsfreeze-thaw", _) => {
                        state.1 = false;
                        "{\"return\": 2}".to_owned()
                    }
                    (other, _) => panic!("{other}"),
                }
            };
            let before = if delimited > 0 { &b"\xff"[..] } else { b"" };
            client.write_all(&[before, answer.as_bytes(), b"\n"].concat())?;
        }
    }

    /// From now on.
    fn is(&self, manner: Manner, frozen: bool) {
        *self.state.lock().unwrap() = (manner, frozen, Vec::new());
    }

    fn is_frozen(&self) -> bool {
        self.state.lock().unwrap().1
    }

    fn was_told(&self, command: &str) -> usize {
        self.state.lock().unwrap().2.iter().filter(|c| *c == command).count()
    }
}

#[test]
fn a_guest_agent_that_is_stuck_is_recovered_and_never_left_frozen() {
    let dir = tempfile::tempdir().unwrap();
    let guest = FakeGuest::new(dir.path());
    let cluster = started(app("freeze_max = \"5s\"", &[guest_hook(&guest.socket)]));
    let thawed = |why: &str| cluster.wait(why, SOON, || !guest.is_frozen() && !at_rest(&cluster).exists());

    assert_app(&app_point(&cluster));
    assert_eq!((guest.was_told("guest-fsfreeze-freeze"), guest.was_told("guest-fsfreeze-thaw")), (1, 1));
    thawed("it was thawed");

    guest.is(Manner::Silent, false);
    assert_crash(&app_point(&cluster), "guest: the guest agent does not answer");
    assert_eq!(guest.was_told("guest-fsfreeze-freeze"), 0, "whoever does not answer is asked for nothing");
    thawed("nothing is to thaw");

    guest.is(Manner::StuckInFreeze, false);
    assert_crash(&app_point(&cluster), "");
    thawed("thawed over a new connection");
    assert!(guest.was_told("guest-fsfreeze-thaw") > 0);

    guest.is(Manner::RefusesOnce, false);
    assert_app(&app_point(&cluster));
    thawed("thawed at the second attempt");

    guest.is(Manner::Works, true);
    assert_crash(&app_point(&cluster), "frozen by somebody else");
    assert!(guest.is_frozen() && guest.was_told("guest-fsfreeze-thaw") == 0, "what others froze is theirs to thaw");
}

/// The recipe, with settings of the test.
fn recipe(dir: &Path, name: &str, settings: &[(&str, &str)]) -> PathBuf {
    let settings: String = settings.iter().map(|(key, value)| format!("export {key}=\"{value}\"\n")).collect();
    let recipe = Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/hooks").join(name);
    let path = dir.join(format!("{name}-hook"));
    guest::script(&path, &format!("#!/bin/sh\n{settings}exec {} \"$@\"\n", s(&recipe)));
    path
}

/// What runs in the background, ended with the test.
struct Background(Child);

impl Drop for Background {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A server that a recipe started, ended with the test.
struct Restarted<'a>(&'a Server);

impl Drop for Restarted<'_> {
    fn drop(&mut self) {
        let mut stop = support::postgresql::as_postgres(&self.0.bin.join("pg_ctl"), &["stop", "-D", s(&self.0.data), "-m", "immediate"]);
        let _ = stop.output();
    }
}

#[test]
fn postgresql_starts_as_its_recipe_promises() {
    let dir = tempfile::tempdir().unwrap();
    for folder in [dir.path().to_owned(), dir.path().join("live")] {
        fs::create_dir_all(&folder).unwrap();
        fs::set_permissions(&folder, fs::Permissions::from_mode(0o711)).unwrap();
    }
    let (mode, sockets, live) = (dir.path().join("mode"), dir.path().join("pg-live"), dir.path().join("live"));
    let mut server = Server::new(&live.join("mnt/pg"), &sockets, "5432");
    let read_mode = format!("$(cat {})", s(&mode));
    let settings = [
        ("TIDEGATE_PG_MODE", &*read_mode),
        ("TIDEGATE_PG_BIN", s(&server.bin)),
        ("TIDEGATE_PG_HOST", s(&sockets)),
        ("TIDEGATE_PG_DATA", s(&server.data)),
        ("TIDEGATE_PG_RUN", &*format!("{}/run", s(dir.path()))),
    ];
    let hooks = [script_hook("postgresql", &recipe(dir.path(), "postgresql", &settings), "120s"), mount_hook("data", &live.join("mnt"))];
    let mut cluster = Cluster::start(Options { disk_bytes: 400 << 20, ..app("freeze_max = \"60s\"", &hooks) });
    let mounted = Mounted::new(&live, &cluster.nbd_uri(0));
    mounted.mkfs();
    mounted.mount();
    server.init();
    // Whoever starts it: with the same place for its clients.
    let file = server.data.join("postgresql.conf");
    let text = fs::read_to_string(&file).unwrap();
    fs::write(&file, format!("{text}unix_socket_directories = '{}'\nport = 5432\n", s(&sockets))).unwrap();
    server.start();
    let _restarted = Restarted(&Server::new(&server.data, &sockets, "5432"));
    done(&mut server.client("pgbench", &["-q", "-i", "-s", "1", "postgres"]));
    cluster.wait_for_delta();
    for kind in ["checkpoint", "backup", "stop"] {
        fs::write(&mode, kind).unwrap();
        let mut load = server.client("pgbench", &["-n", "-c", "2", "-T", "60", "postgres"]);
        let load = Background(load.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap());
        let earlier = server.history();
        cluster.wait("transactions are committed", SOON, || server.history() > earlier + 50);
        let before = server.history();
        let point = app_point(&cluster);
        assert_app(&point);
        cluster.wait("the recipe is done", SOON, || !at_rest(&cluster).exists());
        assert!(server.history() >= before, "the server runs after the point");
        drop(load);
        let raw = exported(&cluster, &point, 0);
        assert!(!needs_recovery(&raw));
        let image = Image::mount(dir.path(), &raw, "loop");
        // The server of the source is alive on this host, which another machine would not meet.
        let lock = fs::remove_file(image.0.join("pg/postmaster.pid"));
        assert_eq!(lock.is_err(), kind == "stop", "only a server that is shut down leaves none");
        let mut recovered = Server::new(&image.0.join("pg"), &dir.path().join(format!("pg-{kind}")), "5433");
        recovered.start();
        let (log, rows) = (recovered.log(), recovered.history());
        assert!(rows >= before, "{kind}: {rows} transactions, {before} were committed before the point");
        let replayed = log.contains("automatic recovery in progress");
        let (clean, label) = (log.contains("database system was shut down at"), dir.path().join("run/backup_label"));
        match kind {
            "stop" => assert!(clean && !replayed, "{log}"),
            _ => assert!(replayed && !clean, "{kind}: {log}"),
        }
        if kind == "backup" {
            assert!(fs::read_to_string(&label).unwrap().starts_with("START WAL LOCATION"), "the label is kept beside");
        }
        eprintln!("{kind}: {rows} transactions, {before} promised; {}", if clean { "no recovery" } else { "crash recovery" });
        recovered.stop("-INT");
    }
    assert!(!cluster.log("agent").contains("could not be set going again"));
}

#[test]
fn the_mysql_recipe_holds_writers_and_lets_them_go() {
    let dir = tempfile::tempdir().unwrap();
    let (data, socket) = (dir.path().join("data"), dir.path().join("mysql.sock"));
    tool(
        "mariadb-install-db",
        &["--no-defaults", "--auth-root-authentication-method=normal", "--user=root", "--skip-test-db", &format!("--datadir={}", s(&data))],
    );
    let mut server = Command::new("mariadbd");
    server.args(["--no-defaults", "--user=root", "--skip-networking", "--datadir", s(&data), "--socket", s(&socket)]);
    server.args(["--pid-file", s(&dir.path().join("pid")), "--innodb-buffer-pool-size=32M"]);
    let _server = Background(server.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("mariadbd: run tests through tests/run"));
    let client = |sql: &str| {
        let mut command = Command::new("mariadb");
        command
            .args(["--no-defaults", "-u", "root", "-BN", "--socket", s(&socket), "-e", sql])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    };
    let begun = Instant::now();
    while !client("select 1").output().unwrap().status.success() {
        assert!(begun.elapsed() < SOON, "the server does not start");
        std::thread::sleep(Duration::from_millis(100));
    }
    done(&mut client("create database shop; create table shop.t (n int) engine = MyISAM"));
    let options = format!("--no-defaults -u root --socket={}", s(&socket));
    let run = dir.path().join("run");
    let hook = recipe(
        dir.path(),
        "mysql",
        &[("TIDEGATE_MYSQL_OPTIONS", &options), ("TIDEGATE_MYSQL_RUN", s(&run)), ("TIDEGATE_MYSQL_LIMIT", "3")],
    );
    let waits = |child: &mut Child| child.try_wait().unwrap().is_none();
    let let_go = |insert: &mut Child, why: &str| {
        let begun = Instant::now();
        while waits(insert) {
            assert!(begun.elapsed() < SOON, "{why}");
            std::thread::sleep(Duration::from_millis(50));
        }
        assert!(insert.wait().unwrap().success());
    };
    tool(s(&hook), &["--pre"]);
    let mut insert = client("insert into shop.t values (1)").spawn().unwrap();
    std::thread::sleep(Duration::from_secs(1));
    assert!(waits(&mut insert), "writers wait");
    tool(s(&hook), &["--post"]);
    let_go(&mut insert, "writers go on after --post");
    // Nobody calls --post: the lock ends by itself, and that is said when it is called after all.
    tool(s(&hook), &["--pre"]);
    let mut insert = client("insert into shop.t values (2)").spawn().unwrap();
    std::thread::sleep(Duration::from_millis(500));
    assert!(waits(&mut insert), "writers wait");
    let_go(&mut insert, "the lock ends by itself");
    assert!(!try_tool(s(&hook), &["--post"]).status.success(), "it was not held until --post");
    assert!(try_tool(s(&hook), &["--post"]).status.success(), "nothing is left to undo");
}

/// What the guest does: writes files and says so, without a sync, with a guest agent beside.
const WRITES: &str = "while [ ! -b /dev/vda ]; do busybox sleep 0.1; done
busybox mount -t ext4 /dev/vda /root || echo ROOT FAILED
busybox mkdir -p /run
qemu-ga -m virtio-serial -p $(echo /dev/vport*p1) -t /run -f /run/qga.pid -l /run/qga.log &
n=0
while true; do
  n=$((n + 1))
  busybox yes \"file $n\" | busybox head -c $((n % 8 * 3000 + 100)) > /root/$n
  echo WROTE $n
  busybox sleep 0.05
done
";

#[test]
fn a_guest_is_frozen_by_its_agent() {
    let (kernel, modules) = guest::kernel();
    let agent = std::env::var("TIDEGATE_GUEST_AGENT").expect("run this through tests/run, which unpacks a guest agent");
    let dir = tempfile::tempdir().unwrap();
    let initrd = guest::initrd(dir.path(), &modules, &[&agent], WRITES);
    let socket = dir.path().join("qga.sock");
    let mut cluster = Cluster::start(Options { disk_bytes: 96 << 20, ..app("freeze_max = \"60s\"", &[guest_hook(&socket)]) });
    let disk = dir.path().join("disk.raw");
    fs::File::create(&disk).and_then(|f| f.set_len(96 << 20)).unwrap();
    tool("mkfs.ext4", &["-q", "-F", s(&disk)]);
    tool("nbdcopy", &["--flush", s(&disk), &cluster.nbd_uri(0)]);
    cluster.wait_for_delta();
    let console = guest::Console(dir.path().join("serial"));
    let mut qemu = Command::new(guest::QEMU[0]);
    qemu.args(&guest::QEMU[1..]).args(["-display", "none", "-serial", &format!("file:{}", s(&console.0)), "-kernel", s(&kernel)]);
    qemu.args(["-initrd", s(&initrd), "-append", "console=ttyS0 quiet loglevel=0 panic=-1"]);
    qemu.args(["-drive", &format!("file={},format=raw,if=virtio,cache=none", cluster.nbd_uri(0))]);
    qemu.args(["-chardev", &format!("socket,id=qga,path={},server=on,wait=off", s(&socket)), "-device", "virtio-serial"]);
    qemu.args(["-device", "virtserialport,chardev=qga,name=org.qemu.guest_agent.0"]);
    let _guest = Background(qemu.stdin(Stdio::null()).spawn().unwrap());
    let wrote = || console.said("WROTE").last().map_or(0, |n| n.parse::<usize>().unwrap());
    console.wait("files are written", || wrote() > 20);
    let crash = cluster.mark("control");
    let mut point = app_point(&cluster);
    // The guest's agent may still be starting.
    cluster.wait("the guest can be frozen", SOON, || {
        (point["kind"] == "app-consistent") || {
            point = app_point(&cluster);
            false
        }
    });
    let before = wrote();
    let point = app_point(&cluster);
    assert_app(&point);
    let after = wrote();
    console.wait("the guest goes on", || wrote() > after + 5);
    let crash = cluster.points().into_iter().find(|p| p["id"] == crash.as_str()).unwrap();
    assert!(needs_recovery(&exported(&cluster, &crash, 0)), "without a freeze the journal is in use: this test can fail");
    let raw = exported(&cluster, &point, 0);
    assert!(!needs_recovery(&raw), "the journal is empty at the point");
    tool("e2fsck", &["-fn", s(&raw)]);
    let image = Image::mount(dir.path(), &raw, "loop,ro,noload");
    for n in 1..=before {
        let wanted: Vec<u8> = format!("file {n}\n").into_bytes().into_iter().cycle().take(n % 8 * 3000 + 100).collect();
        assert!(fs::read(image.0.join(n.to_string())).is_ok_and(|bytes| bytes == wanted), "file {n} of {before}");
    }
    eprintln!("{before} files that the guest had written, none of them synced by it, are whole at the point");
}
