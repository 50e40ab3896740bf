//! A file system on a device that logs every write and flush in their order, and what that device may hold after power was
//! lost at any place of the log: everything up to the last flush, and of what came later any sectors.
//!
//! The device is a file served by qemu-storage-daemon (driver blklogwrites) over FUSE, under a loop device. Its log is that of
//! the kernel's dm-log-writes: a super block, then entries padded to a sector, each followed by its data.
//!
//! ```text
//! super block  magic u64, version u64, entries u64, sector size u32
//! entry        sector u64, sectors u64, flags u64, length of a mark u64
//! ```

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use super::mounted::let_go;
use super::{Rng, s, tool, try_tool};

const MAGIC: u64 = 0x006a_7366_7773_6872;
const ENTRIES_AT: u64 = 16;
const SECTOR: u64 = 512;
const BLOCK: usize = 4096;
const FLUSH: u64 = 1;
const FUA: u64 = 2;
const DISCARD: u64 = 4;
const MARK: u64 = 8;

/// Which file system is under the servers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// ext4.
    Ext4,
    /// XFS, which wants 300 MiB.
    Xfs,
}

impl Kind {
    fn make(self, image: &Path) {
        let file = File::create(image).expect("an image");
        match self {
            Kind::Ext4 => {
                file.set_len(128 << 20).expect("a sparse file");
                let at_once = "lazy_itable_init=0,lazy_journal_init=0";
                tool("mkfs.ext4", &["-q", "-F", "-b", "4096", "-J", "size=8", "-E", at_once, s(image)]);
            }
            Kind::Xfs => {
                file.set_len(300 << 20).expect("a sparse file");
                tool("mkfs.xfs", &["-q", "-f", s(image)]);
            }
        }
    }
}

/// Fails with what is missing.
pub fn demand() {
    let root = rustix::process::geteuid().is_root();
    assert!(root, "this suite mounts file systems: run it as root");
    let fuse = Path::new("/dev/fuse").exists() && Path::new("/dev/loop-control").exists();
    assert!(fuse, "this suite needs /dev/fuse and /dev/loop-control: load the kernel modules fuse and loop");
    let daemon = Command::new("qemu-storage-daemon").arg("--version").output();
    assert!(daemon.is_ok_and(|o| o.status.success()), "qemu-storage-daemon is missing: install the package qemu-utils");
}

fn in_memory() -> TempDir {
    let shared = Path::new("/dev/shm");
    let made = if shared.is_dir() { tempfile::tempdir_in(shared) } else { tempfile::tempdir() };
    made.expect("a folder for images")
}

/// A mounted file system whose device is logged. Everything it started ends with it.
pub struct Recorder {
    dir: TempDir,
    mount: TempDir,
    daemon: Child,
    loop_device: Option<String>,
    base: Blocks,
}

impl Recorder {
    /// Makes the file system, empty, and mounts it.
    pub fn start(kind: Kind) -> Self {
        demand();
        let (dir, mount) = (in_memory(), tempfile::tempdir().expect("a folder to mount on"));
        let [image, log, export] = ["base.img", "log.img", "export"].map(|name| dir.path().join(name));
        kind.make(&image);
        let base = Blocks::of(&image);
        File::create(&log).and_then(|_| File::create(&export)).expect("files for the daemon");
        let daemon = Command::new("qemu-storage-daemon")
            .args(["--blockdev", &format!("driver=file,node-name=image,filename={},discard=unmap", s(&image))])
            .args(["--blockdev", &format!("driver=file,node-name=log,filename={}", s(&log))])
            .args(["--blockdev", "driver=blklogwrites,node-name=logged,file=image,log=log,log-sector-size=512,log-super-update-interval=1"])
            .args(["--export", &format!("type=fuse,id=export,node-name=logged,mountpoint={},writable=on,growable=off", s(&export))])
            .stdout(Stdio::null())
            .spawn()
            .expect("qemu-storage-daemon starts");
        let mut recorder = Self { dir, mount, daemon, loop_device: None, base };
        recorder.wait_for(&export);
        let found = tool("losetup", &["--find", "--show", s(&export)]);
        let device = recorder.loop_device.insert(found.trim().to_owned()).clone();
        tool("mount", &[&device, s(recorder.mount.path())]);
        recorder
    }

    fn wait_for(&mut self, export: &Path) {
        let started = Instant::now();
        while !fs::metadata(export).is_ok_and(|m| m.len() > 0) {
            let ended = self.daemon.try_wait().expect("our own child").is_some();
            assert!(!ended && started.elapsed() < Duration::from_secs(10), "qemu-storage-daemon does not serve: is FUSE allowed here?");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Where it is mounted.
    pub fn point(&self) -> PathBuf {
        self.mount.path().to_owned()
    }

    /// Entries of the log so far: what is true now is promised for every power loss from here on.
    pub fn entries(&self) -> u64 {
        let mut count = [0; 8];
        let log = File::open(self.dir.path().join("log.img")).expect("the log");
        log.read_exact_at(&mut count, ENTRIES_AT).expect("a super block");
        u64::from_le_bytes(count)
    }

    /// Ends recording. Whoever works on it has ended before.
    pub fn stop(mut self) -> Recording {
        self.let_go();
        let log = fs::read(self.dir.path().join("log.img")).expect("the log");
        let base = std::mem::take(&mut self.base);
        let entries = read_entries(&log);
        Recording { base, log, entries }
    }

    fn let_go(&mut self) {
        let_go(self.mount.path());
        if let Some(device) = self.loop_device.take() {
            let _ = try_tool("losetup", &["--detach", &device]);
        }
        let _ = try_tool("umount", &[s(&self.dir.path().join("export"))]);
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        self.let_go();
    }
}

struct Entry {
    offset: u64,
    bytes: u64,
    flags: u64,
    data_at: usize,
}

/// What was logged.
#[derive(Default)]
pub struct Recording {
    base: Blocks,
    log: Vec<u8>,
    entries: Vec<Entry>,
}

fn read_entries(log: &[u8]) -> Vec<Entry> {
    let number = |at: usize| u64::from_le_bytes(*log[at..].first_chunk().expect("a whole entry"));
    assert_eq!(number(0), MAGIC, "this is no log of writes");
    let sector = u32::from_le_bytes(*log[24..].first_chunk().expect("a super block"));
    assert_eq!(u64::from(sector), SECTOR, "the log has the sectors that were asked for");
    let mut entries = Vec::new();
    let mut at = SECTOR as usize;
    for _ in 0..number(ENTRIES_AT as usize) {
        let [first, sectors, flags, marked] = [0, 8, 16, 24].map(|field| number(at + field));
        let follows = match flags {
            _ if flags & DISCARD != 0 => 0,
            _ if flags & MARK != 0 => marked.next_multiple_of(SECTOR),
            _ => sectors * SECTOR,
        };
        at += SECTOR as usize;
        if flags & MARK == 0 {
            entries.push(Entry { offset: first * SECTOR, bytes: sectors * SECTOR, flags, data_at: at });
        }
        at += follows as usize;
    }
    assert!(at <= log.len(), "the log ends before its last entry");
    entries
}

/// Goes through a recording from the first power loss to the last.
pub struct Replay<'a> {
    recording: &'a Recording,
    durable: Blocks,
    applied: usize,
}

impl Recording {
    /// From the beginning.
    pub fn replay(&self) -> Replay<'_> {
        Replay { recording: self, durable: self.base.clone(), applied: 0 }
    }

    fn data(&self, entry: &Entry) -> Option<&[u8]> {
        (entry.flags & DISCARD == 0).then(|| &self.log[entry.data_at..entry.data_at + entry.bytes as usize])
    }
}

impl Replay<'_> {
    /// Writes to `file` what the device may hold if power goes at `cut`, not before the last one asked for. The last `forgotten`
    /// flushes were lies.
    pub fn lose_power(&mut self, cut: u64, forgotten: usize, rng: &mut Rng, file: &Path) {
        let recording = self.recording;
        let until = &recording.entries[..cut as usize];
        let mut flushes = until.iter().enumerate().rev().filter(|(_, e)| e.flags & FLUSH != 0).map(|(index, _)| index + 1);
        let durable = flushes.nth(forgotten).unwrap_or(0).max(self.applied);
        for entry in &until[self.applied..durable] {
            self.durable.write(entry.offset, entry.bytes, recording.data(entry));
        }
        self.applied = durable;
        let file = self.durable.write_to(file);
        let zeroes = vec![0; SECTOR as usize];
        // How much of it is kept differs from state to state.
        let kept = rng.below(5);
        for entry in &until[durable..] {
            let whole = rng.below(3);
            for at in (0..entry.bytes).step_by(SECTOR as usize) {
                // Sector by sector, any order of writes has the same results as leaving some out.
                let keep = if entry.flags & FUA != 0 && forgotten == 0 { true } else { rng.below(4) < kept };
                if keep || (whole == 0 && kept > 1) {
                    let data = recording.data(entry).map_or(&zeroes[..], |data| &data[at as usize..(at + SECTOR) as usize]);
                    file.write_all_at(data, entry.offset + at).expect("room in memory");
                }
            }
        }
    }
}

/// The blocks of an image that are not zero.
#[derive(Clone, Default)]
struct Blocks {
    blocks: BTreeMap<u64, Box<[u8; BLOCK]>>,
    len: u64,
}

impl Blocks {
    fn of(image: &Path) -> Self {
        let file = File::open(image).expect("the image");
        let len = file.metadata().expect("metadata").len();
        let mut found = Self { blocks: BTreeMap::new(), len };
        let mut bytes = vec![0; 1 << 20];
        for at in (0..len).step_by(1 << 20) {
            let some = &mut bytes[..(len - at).min(1 << 20) as usize];
            file.read_exact_at(some, at).expect("read");
            for (index, block) in some.chunks(BLOCK).enumerate().filter(|(_, block)| block.iter().any(|&b| b != 0)) {
                found.write(at + (index * BLOCK) as u64, block.len() as u64, Some(block));
            }
        }
        found
    }

    fn write(&mut self, offset: u64, len: u64, data: Option<&[u8]>) {
        let mut done = 0;
        while done < len {
            let (number, within) = ((offset + done) / BLOCK as u64, ((offset + done) % BLOCK as u64) as usize);
            let step = (BLOCK - within).min((len - done) as usize);
            let block = self.blocks.entry(number).or_insert_with(|| Box::new([0; BLOCK]));
            match data {
                Some(data) => block[within..within + step].copy_from_slice(&data[done as usize..done as usize + step]),
                None => block[within..within + step].fill(0),
            }
            done += step as u64;
        }
    }

    fn write_to(&self, path: &Path) -> File {
        let _ = fs::remove_file(path);
        let file = File::create(path).expect("an image");
        file.set_len(self.len).expect("a sparse file");
        for (number, block) in &self.blocks {
            file.write_all_at(&block[..], number * BLOCK as u64).expect("room in memory");
        }
        file
    }
}

/// A place for images after power losses, mounted where the recorded file system was.
pub struct Aftermath {
    dir: TempDir,
    point: PathBuf,
}

impl Aftermath {
    /// Images are mounted on `point`.
    pub fn new(point: PathBuf) -> Self {
        fs::create_dir_all(&point).expect("a folder to mount on");
        Self { dir: in_memory(), point }
    }

    /// The image.
    pub fn image(&self) -> PathBuf {
        self.dir.path().join("state.img")
    }

    /// Mounts the image: the file system recovers itself. Says why not.
    pub fn mount(&self) -> Result<(), String> {
        let done = try_tool("mount", &["-o", "loop", s(&self.image()), s(&self.point)]);
        if done.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&done.stderr).into_owned()) }
    }

    /// Unmounts it.
    pub fn unmount(&self) {
        let_go(&self.point);
    }
}

impl Drop for Aftermath {
    fn drop(&mut self) {
        if fs::read_to_string("/proc/mounts").is_ok_and(|mounts| mounts.contains(s(&self.point))) {
            let_go(&self.point);
        }
        let _ = fs::remove_dir(&self.point);
    }
}
