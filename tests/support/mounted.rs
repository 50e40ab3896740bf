//! An NBD export as a mounted ext4, by nbdfuse and a loop device.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::{s, tool, try_tool};

/// Ends with the test.
pub struct Mounted {
    fuse: Child,
    /// The disk as a file.
    pub file: PathBuf,
    /// Where the file system is, once it is mounted.
    pub point: PathBuf,
}

impl Mounted {
    /// Attaches the export at `uri`; what it needs goes into `dir`.
    pub fn new(dir: &Path, uri: &str) -> Self {
        let (file, point) = (dir.join("fuse-file"), dir.join("mnt"));
        fs::create_dir_all(&point).expect("a folder");
        fs::write(&file, b"").expect("a file to mount over");
        let fuse = Command::new("nbdfuse").arg(&file).arg(uri).stdout(Stdio::null()).spawn().expect("nbdfuse: run tests through tests/run");
        let started = Instant::now();
        while !fs::metadata(&file).is_ok_and(|m| m.len() > 0) {
            assert!(started.elapsed() < Duration::from_secs(10), "nbdfuse does not come up");
            std::thread::sleep(Duration::from_millis(20));
        }
        Self { fuse, file, point }
    }

    /// Makes an ext4.
    pub fn mkfs(&self) {
        tool("mkfs.ext4", &["-q", "-F", s(&self.file)]);
    }

    /// Mounts it.
    pub fn mount(&self) {
        tool("mount", &["-o", "loop", s(&self.file), s(&self.point)]);
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = try_tool("umount", &[s(&self.point)]);
        let _ = try_tool("umount", &[s(&self.file)]);
        let _ = self.fuse.kill();
        let _ = self.fuse.wait();
    }
}

/// Writes files, each synced.
pub fn write_files(dir: &Path, round: usize, count: usize) {
    use std::io::Write;
    for n in 0..count {
        let mut file = fs::File::create(dir.join(format!("file-{round}-{n}"))).expect("a file");
        file.write_all(format!("round {round} file {n} ").repeat(1 + n * 400).as_bytes()).expect("room for a file");
        file.sync_all().expect("a file is synced");
    }
}

/// How many of the files of a round are there, whole.
pub fn whole_files(dir: &Path, round: usize, count: usize) -> usize {
    let whole = |n: &usize| {
        let wanted = format!("round {round} file {n} ").repeat(1 + n * 400);
        fs::read(dir.join(format!("file-{round}-{n}"))).is_ok_and(|bytes| bytes == wanted.as_bytes())
    };
    (0..count).filter(whole).count()
}

/// Journal replay as a mount would do it, on a copy; then the file system must be clean.
pub fn check_file_system(raw: &Path) {
    let replay = try_tool("e2fsck", &["-fy", "-E", "journal_only", s(raw)]);
    assert!(replay.status.code().is_some_and(|c| c <= 1), "journal replay: {}", String::from_utf8_lossy(&replay.stdout));
    tool("e2fsck", &["-fn", s(raw)]);
}
