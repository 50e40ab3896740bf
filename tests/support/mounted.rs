//! An NBD export as a mounted ext4 or XFS, by nbdfuse and a loop device.

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

    /// Makes an XFS.
    pub fn mkfs_xfs(&self) {
        tool("mkfs.xfs", &["-q", "-f", s(&self.file)]);
    }

    /// Mounts it.
    pub fn mount(&self) {
        self.mount_with("loop");
    }

    /// Mounts it with other options.
    pub fn mount_with(&self, options: &str) {
        tool("mount", &["-o", options, s(&self.file), s(&self.point)]);
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let_go(&self.point);
        let _ = try_tool("umount", &[s(&self.file)]);
        let _ = self.fuse.kill();
        let _ = self.fuse.wait();
    }
}

/// Unmounts what a test mounted. One that is frozen would stay so for ever.
pub fn let_go(point: &Path) {
    let _ = try_tool("fsfreeze", &["-u", s(point)]);
    for _ in 0..50 {
        let unmounted = try_tool("umount", &[s(point)]);
        if unmounted.status.success() || !String::from_utf8_lossy(&unmounted.stderr).contains("busy") {
            return;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    // Somebody has it open: it goes with him.
    let _ = try_tool("umount", &["-l", s(point)]);
}

/// An image file that is mounted; unmounted with the test.
pub struct Image(pub PathBuf);

impl Image {
    /// Mounts `file` below `dir`.
    pub fn mount(dir: &Path, file: &Path, options: &str) -> Self {
        let point = dir.join(format!("mnt-{}", file.file_name().and_then(|n| n.to_str()).expect("a name")));
        fs::create_dir_all(&point).expect("a folder");
        let mounted = Self(point);
        tool("mount", &["-o", options, s(file), s(&mounted.0)]);
        mounted
    }

    /// Makes a small ext4 in a file of its own, and mounts it.
    pub fn new_ext4(dir: &Path, name: &str) -> Self {
        let file = dir.join(name);
        fs::File::create(&file).and_then(|f| f.set_len(32 << 20)).expect("a file");
        tool("mkfs.ext4", &["-q", "-F", s(&file)]);
        Self::mount(dir, &file, "loop")
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        let_go(&self.0);
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
