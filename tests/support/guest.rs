//! What guests under qemu-system (software emulation) have in common: a Debian kernel, an initial RAM disk of busybox and modules,
//! roots made of a folder. `tests/run` installs what this needs and unpacks the kernel.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::{s, tool};

/// Programs and options of every guest; what it starts from and where it talks to come after.
pub const QEMU: [&str; 7] = ["qemu-system-x86_64", "-accel", "tcg", "-m", "384", "-no-reboot", "-nodefaults"];
/// Guests are emulated in software, and whatever else runs here takes its share.
const BOOT: Duration = Duration::from_secs(120);
/// In the order they are loaded; what the kernel has built in is left out.
const MODULES: [&str; 14] = [
    "crc32c_generic",
    "libcrc32c",
    "crc16",
    "mbcache",
    "jbd2",
    "crc32_generic",
    "ext4",
    "virtio_ring",
    "virtio",
    "virtio_pci_legacy_dev",
    "virtio_pci_modern_dev",
    "virtio_pci",
    "virtio_blk",
    "virtio_console",
];

/// What a guest said on its serial console so far, whole lines.
pub struct Console(pub PathBuf);

impl Console {
    /// What follows a word at the beginning of lines.
    pub fn said(&self, word: &str) -> Vec<String> {
        let text = String::from_utf8_lossy(&fs::read(&self.0).unwrap_or_default()).into_owned();
        let whole = &text[..text.rfind('\n').unwrap_or(0)];
        whole.lines().filter_map(|l| l.trim_end().strip_prefix(word)?.strip_prefix(' ').map(str::to_owned)).collect()
    }

    /// The last file that was synced.
    pub fn synced(&self) -> u32 {
        self.said("SYNCED").last().map_or(0, |n| n.parse().expect("a number"))
    }

    /// Waits for something, or fails with what the guest said.
    pub fn wait(&self, what: &str, mut done: impl FnMut() -> bool) {
        let started = Instant::now();
        while !done() {
            let said = || String::from_utf8_lossy(&fs::read(&self.0).unwrap_or_default()).into_owned();
            assert!(started.elapsed() < BOOT, "waited {BOOT:?} for {what}; the guest said: {}", said());
            std::thread::sleep(Duration::from_millis(100));
        }
    }
}

/// Kernel image and folder of its modules, as `tests/run` unpacked them.
pub fn kernel() -> (PathBuf, PathBuf) {
    let root = PathBuf::from(std::env::var("TIDEGATE_GUEST_KERNEL").expect("run this through tests/run, which unpacks a kernel"));
    let only = |dir: &Path, prefix: &str| {
        let found = entries(dir).into_iter().find(|p| name(p).starts_with(prefix));
        found.unwrap_or_else(|| panic!("nothing like {prefix} in {}", dir.display()))
    };
    (only(&root.join("boot"), "vmlinuz"), only(&root.join("lib/modules"), "6"))
}

fn entries(dir: &Path) -> Vec<PathBuf> {
    fs::read_dir(dir).expect("a folder").map(|e| e.expect("an entry").path()).collect()
}

fn name(path: &Path) -> &str {
    path.file_name().and_then(|n| n.to_str()).expect("names are UTF-8")
}

fn find(dir: &Path, module: &str) -> Option<PathBuf> {
    for path in entries(dir) {
        if path.is_dir()
            && let Some(found) = find(&path, module)
        {
            return Some(found);
        }
        if name(&path).starts_with(&format!("{module}.ko")) {
            return Some(path);
        }
    }
    None
}

/// Makes a file that can be run.
pub fn script(path: &Path, text: &str) {
    fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
    fs::write(path, text).expect("a script");
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).expect("a script that can be run");
}

fn which(program: &str) -> String {
    tool("sh", &["-c", &format!("command -v {program}")]).trim().to_owned()
}

/// Makes `/bin/busybox` in a root.
pub fn busybox(root: &Path) {
    fs::create_dir_all(root.join("bin")).expect("a folder");
    fs::copy(which("busybox"), root.join("bin/busybox")).expect("a busybox");
}

/// Copies a program of this host, by name or path, with the libraries that it loads to `/sbin` and their places in a root.
pub fn program(root: &Path, program: &str) {
    let path = which(program);
    fs::create_dir_all(root.join("sbin")).expect("a folder");
    fs::copy(&path, root.join("sbin").join(name(Path::new(program)))).expect("a program");
    for library in tool("ldd", &[&path]).split_whitespace().filter(|word| word.starts_with('/')) {
        let to = root.join(&library[1..]);
        fs::create_dir_all(to.parent().expect("a folder")).expect("a folder");
        fs::copy(library, to).expect("a library");
    }
}

/// An initial RAM disk that loads what the kernel needs and runs the lines that follow, with the programs that they name.
pub fn initrd(dir: &Path, modules: &Path, programs: &[&str], then: &str) -> PathBuf {
    let root = dir.join("initrd");
    busybox(&root);
    programs.iter().for_each(|name| program(&root, name));
    let mut load = String::new();
    for module in MODULES {
        if let Some(path) = find(modules, module) {
            let file = name(&path);
            fs::copy(&path, root.join(file)).expect("a module");
            load.push_str(&format!("busybox insmod /{file}\n"));
        }
    }
    let text = format!(
        "#!/bin/busybox sh\nexport PATH=/bin:/sbin\nbusybox mkdir -p /proc /sys /dev /root\nbusybox mount -t devtmpfs dev /dev\nbusybox mount -t proc proc /proc\n{load}{then}"
    );
    script(&root.join("init"), &text);
    let archive = dir.join("initrd.img");
    let packed = format!("cd {} && find . | cpio -o -H newc --quiet > {}", s(&root), s(&archive));
    tool("sh", &["-c", &packed]);
    archive
}

/// A disk with an ext4 that holds what is in a folder, a busybox, and an `/init`.
pub fn root_disk(root: &Path, init: &str, disk: &Path, size: u64) {
    for sub in ["proc", "dev"] {
        fs::create_dir_all(root.join(sub)).expect("a folder");
    }
    busybox(root);
    script(&root.join("init"), &format!("#!/bin/busybox sh\nexport PATH=/bin\nbusybox mount -t proc proc /proc\n{init}"));
    tool("truncate", &["-s", &size.to_string(), s(disk)]);
    tool("mkfs.ext4", &["-q", "-F", "-d", s(root), s(disk)]);
}
