//! A guest that writes is failed over while it runs: its host, agent and process server are killed at once, a hook starts it from
//! the disks that the failover serves, and every file that it had synced before the point is there. The guest itself tells.
#![allow(clippy::unwrap_used, clippy::disallowed_methods, missing_docs, reason = "a test")]

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use sha2::{Digest, Sha256};
use support::guest::Console;
use support::mounted::check_file_system;
use support::{Cluster, Options, guest, s, tool, try_tool};

const SIZE: u64 = 96 << 20;
/// How long the guest writes before everything around it is killed.
const WRITES: Duration = Duration::from_secs(12);

/// What the initial RAM disk does: replays the journal, looks at the file system, hands over. The same for every start.
const HAND_OVER: &str = "while [ ! -b /dev/vda ]; do busybox sleep 0.1; done
busybox mount -t ext4 /dev/vda /root || { echo ROOT FAILED; busybox poweroff -f; }
busybox umount /root
if busybox dmesg | busybox grep -q 'EXT4-fs (vda): recovery complete'; then echo JOURNAL replayed; else echo JOURNAL clean; fi
e2fsck -fn /dev/vda
echo FSCK $?
busybox mount -t ext4 /dev/vda /root
exec busybox switch_root /root /init
";

/// What the machine does: says which files it finds, and goes on writing the next ones. A number is printed once its file is synced.
const INIT: &str = "cd /data
for name in $(busybox ls | busybox sort -n); do busybox sha256sum $name; done | while read sum name; do echo FILE $name $sum; done
n=$(busybox ls | busybox sort -n | busybox tail -n 1)
n=${n:-0}
echo FOUND $(busybox ls | busybox wc -l)
while true; do
  n=$((n + 1))
  busybox yes \"file $n of the guest\" | busybox head -c $((n % 16 * 3000 + n)) | busybox dd of=$n bs=16k conv=fsync 2>/dev/null
  echo SYNCED $n
done
";

/// What the guest writes as file `n`.
fn content(n: u32) -> Vec<u8> {
    format!("file {n} of the guest\n").into_bytes().into_iter().cycle().take((n % 16 * 3000 + n) as usize).collect()
}

fn sum(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The arguments of a guest that starts from the disk behind a URI.
fn arguments(kernel: &Path, initrd: &Path, serial: &Path, uri: &str) -> Vec<String> {
    let serial = format!("file:{}", s(serial));
    let drive = format!("file={uri},format=raw,if=virtio,cache=none");
    let own = ["-display", "none", "-serial", &serial, "-kernel", s(kernel), "-initrd", s(initrd), "-drive", &drive];
    let boot = ["-append", "console=ttyS0 quiet loglevel=0 panic=-1"];
    guest::QEMU.iter().chain(&own).chain(&boot).map(|a| (*a).to_owned()).collect()
}

/// The machine at the primary site; killed with the test.
struct Primary(Child);

impl Primary {
    fn burn(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Drop for Primary {
    fn drop(&mut self) {
        self.burn();
    }
}

/// What the hook started; ended with the test if the hook did not.
struct Started(PathBuf);

impl Started {
    /// Its process, if it runs: the number may be somebody else's by now.
    fn pid(&self) -> Option<String> {
        let pid = fs::read_to_string(&self.0).ok()?.trim().to_owned();
        let line = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        String::from_utf8_lossy(&line).contains(s(&self.0)).then_some(pid)
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        if let Some(pid) = self.pid() {
            let _ = try_tool("kill", &["-9", &pid]);
        }
    }
}

/// A hook that starts the machine from what the failover serves, waits for its report, and ends it by its process.
fn hook(dir: &Path, kernel: &Path, initrd: &Path) -> String {
    let qemu = arguments(kernel, initrd, &dir.join("serial"), "$TIDEGATE_NBD_0");
    let qemu: Vec<String> = qemu.iter().map(|a| format!("\"{a}\"")).collect();
    let text = format!(
        "#!/bin/sh
cd {dir} || exit 1
case $1 in
  start) [ -S \"$TIDEGATE_SOCKET_0\" ] && exec {qemu} -daemonize -pidfile {dir}/guest.pid ;;
  check)
    grep -E '^(JOURNAL|FSCK|FOUND|ROOT) ' serial
    grep -q '^JOURNAL replayed' serial && grep -q '^FSCK 0' serial && grep -q '^FOUND ' serial ;;
  stop)
    pid=$(cat guest.pid 2>/dev/null) || exit 0
    kill \"$pid\"
    # Ended, whether or not anybody has collected it.
    while grep -q guest.pid /proc/$pid/cmdline 2>/dev/null; do sleep 0.1; done ;;
esac
",
        dir = s(dir),
        qemu = qemu.join(" ")
    );
    let script = dir.join("boot.sh");
    guest::script(&script, &text);
    let command = |phase: &str| format!("{phase} = [{script:?}, \"{phase}\"]\n");
    format!("[[hook]]\nname = \"boot\"\n{}{}{}check_timeout = \"120s\"\n", command("start"), command("check"), command("stop"))
}

/// The largest number that a label up to a point promises: `nN` was given after the console had shown N.
fn promised(points: &[serde_json::Value], point: &str) -> u32 {
    let upto = 1 + points.iter().position(|p| p["id"] == point).expect("the point is listed");
    points[..upto].iter().filter_map(|p| p["label"].as_str()?.strip_prefix('n')?.parse().ok()).max().expect("a labelled point")
}

#[test]
fn a_machine_that_burns_while_it_writes_goes_on_at_the_other_site() {
    let (kernel, modules) = guest::kernel();
    let dir = tempfile::tempdir().unwrap();
    let initrd = guest::initrd(dir.path(), &modules, &["e2fsck"], HAND_OVER);
    let disk = dir.path().join("root.raw");
    fs::create_dir_all(dir.path().join("root/data")).unwrap();
    guest::root_disk(&dir.path().join("root"), INIT, &disk, SIZE);
    let started = Started(dir.path().join("guest.pid"));
    let options = Options { disk_bytes: SIZE, master_target: hook(dir.path(), &kernel, &initrd), ..Options::default() };
    let mut cluster = Cluster::start(options);
    tool("nbdcopy", &["--flush", s(&disk), &cluster.nbd_uri(0)]);
    cluster.wait_for_delta();

    let console = Console(dir.path().join("primary"));
    let command = arguments(&kernel, &initrd, &console.0, &cluster.nbd_uri(0));
    let mut primary = Primary(Command::new(&command[0]).args(&command[1..]).stdin(Stdio::null()).spawn().unwrap());
    console.wait("the first file", || console.synced() > 0);
    assert_eq!((console.said("JOURNAL"), console.said("FSCK")), (vec!["clean".to_owned()], vec!["0".to_owned()]), "the first start");
    let begun = Instant::now();
    while begun.elapsed() < WRITES {
        cluster.mark_unlisted(&format!("n{}", console.synced()));
        std::thread::sleep(Duration::from_secs(1));
    }
    primary.burn();
    cluster.kill("agent");
    cluster.kill("process-server");
    let written = console.synced();

    let job = cluster.failover(&["unplanned", "m1", "--point", "latest", "--hook", "boot", "--yes"]);
    assert_eq!(job["state"], "failed-over", "{job}");
    let promised = promised(&cluster.points(), job["point"].as_str().unwrap());
    let here = Console(dir.path().join("serial"));
    // What the hook's check waited for, once more: it is what the failover rests on.
    assert_eq!((here.said("JOURNAL"), here.said("FSCK")), (vec!["replayed".to_owned()], vec!["0".to_owned()]));
    let found: BTreeMap<u32, String> = here
        .said("FILE")
        .iter()
        .map(|line| line.split_once(' ').unwrap())
        .map(|(name, sum)| (name.parse().unwrap(), sum.to_owned()))
        .collect();
    assert_eq!(here.said("FOUND"), [found.len().to_string()]);
    // Each file was synced before the next was begun: all but the last are whole too, promised or not.
    let last = *found.keys().last().expect("files are found");
    let whole = promised.max(last - 1);
    for n in 1..=whole {
        let names = format!("file {n} of {} found; up to {promised} they were synced before the point", found.len());
        assert_eq!(found.get(&n), Some(&sum(&content(n))), "{names}");
    }
    assert!(promised >= 10, "the guest wrote {written} files and {promised} before the point: too few to say anything");
    // Not from the future either: one file was being written when it ended.
    assert!(last <= written + 1, "file {last} was found and {written} were written");
    eprintln!(
        "{written} files synced before everything was killed, {promised} of them surely before the point, {} found, {whole} of them whole",
        found.len()
    );

    // It runs here: before and after there is no way back.
    here.wait("a file written at this site", || here.synced() > last);
    let committed = cluster.failover(&["commit", "--yes", "m1"]);
    assert_eq!(committed["state"], "committed", "{committed}");
    let before = here.synced();
    here.wait("a file written after the commit", || here.synced() > before + 1);
    assert!(started.pid().is_some(), "the guest runs");
    let released = cluster.failover(&["cleanup", "1"]);
    assert_eq!(released["state"], "released", "{released}");
    let ended = here.synced();
    std::thread::sleep(Duration::from_secs(1));
    assert!(started.pid().is_none() && here.synced() == ended, "the hook ended the guest");

    // The image is anybody's now, and holds what was synced there and here.
    let (image, raw, out) = (cluster.replica(0), dir.path().join("released.raw"), dir.path().join("out"));
    tool("qemu-img", &["check", "-f", "vhdx", s(&image)]);
    cluster.tidegate(&["check", "image", s(&image)]);
    tool("qemu-img", &["convert", "-f", "vhdx", "-O", "raw", s(&image), s(&raw)]);
    check_file_system(&raw);
    fs::create_dir_all(&out).unwrap();
    tool("debugfs", &["-R", &format!("rdump /data {}", s(&out)), s(&raw)]);
    let end = here.synced();
    for n in (1..=whole).chain(last + 1..=end) {
        let same = fs::read(out.join(format!("data/{n}"))).is_ok_and(|bytes| bytes == content(n));
        assert!(same, "file {n} in the image that was released");
    }
    eprintln!("{} files synced here, all whole in the image", end - last);
}
