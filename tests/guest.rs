//! A guest under qemu-system (software emulation) starts from recovered images: a Debian kernel, a root of its own on the
//! protected disk, files whose checksum the test knows. `tests/run guest` installs what this needs and unpacks the kernel.
#![allow(clippy::unwrap_used, clippy::disallowed_methods, missing_docs, reason = "a test")]

mod support;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use support::{Cluster, Options, Rng, s, tool};

const SIZE: u64 = 96 << 20;
/// In the order they are loaded.
const MODULES: [&str; 7] = ["crc32c_generic", "libcrc32c", "crc16", "mbcache", "jbd2", "crc32_generic", "ext4"];

/// Kernel image and folder of its modules, as `tests/run` unpacked them.
fn kernel() -> (PathBuf, PathBuf) {
    let root = PathBuf::from(std::env::var("TIDEGATE_GUEST_KERNEL").expect("run this through tests/run, which unpacks a kernel"));
    let only = |dir: &Path, prefix: &str| {
        let found =
            fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()).find(|p| p.file_name().unwrap().to_str().unwrap().starts_with(prefix));
        found.unwrap_or_else(|| panic!("nothing like {prefix} in {}", dir.display()))
    };
    (only(&root.join("boot"), "vmlinuz"), only(&root.join("lib/modules"), "6"))
}

fn find(dir: &Path, name: &str) -> Option<PathBuf> {
    for entry in fs::read_dir(dir).unwrap().map(|e| e.unwrap()) {
        let path = entry.path();
        if path.is_dir()
            && let Some(found) = find(&path, name)
        {
            return Some(found);
        }
        if path.file_name().unwrap().to_str().unwrap().starts_with(&format!("{name}.ko")) {
            return Some(path);
        }
    }
    None
}

fn script(path: &Path, text: &str) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, text).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
}

/// An initial RAM disk that loads what the kernel needs and hands over to the root on the disk.
fn initrd(dir: &Path, modules: &Path) -> PathBuf {
    let root = dir.join("initrd");
    fs::create_dir_all(root.join("bin")).unwrap();
    fs::copy(which("busybox"), root.join("bin/busybox")).unwrap();
    let mut load = String::new();
    for name in MODULES {
        if let Some(path) = find(modules, name) {
            let file = path.file_name().unwrap().to_str().unwrap();
            fs::copy(&path, root.join(file)).unwrap();
            load.push_str(&format!("busybox insmod /{file}\n"));
        }
    }
    let text = format!(
        "#!/bin/busybox sh\nexport PATH=/bin\nbusybox mkdir -p /proc /sys /dev /root\nbusybox mount -t devtmpfs dev /dev\nbusybox mount -t proc proc /proc\n{load}\
         busybox sleep 1\nbusybox mount -t ext4 /dev/nvme0n1 /root || {{ echo ROOT FAILED; busybox poweroff -f; }}\nexec busybox switch_root /root /init\n"
    );
    script(&root.join("init"), &text);
    let archive = dir.join("initrd.img");
    let packed = format!("cd {} && find . | cpio -o -H newc --quiet > {}", s(&root), s(&archive));
    tool("sh", &["-c", &packed]);
    archive
}

fn which(name: &str) -> String {
    tool("sh", &["-c", &format!("command -v {name}")]).trim().to_owned()
}

/// A root file system with a busybox, files, and an init that says what they add up to.
fn root_disk(dir: &Path, disk: &Path) -> String {
    let root = dir.join("root");
    for sub in ["bin", "proc", "dev", "data"] {
        fs::create_dir_all(root.join(sub)).unwrap();
    }
    fs::copy(which("busybox"), root.join("bin/busybox")).unwrap();
    let mut rng = Rng::new(11);
    for n in 0..20 {
        let bytes: Vec<u8> = (0..rng.below(900_000)).map(|_| rng.below(256) as u8).collect();
        fs::write(root.join(format!("data/file-{n:02}")), bytes).unwrap();
    }
    let text = "#!/bin/busybox sh\nexport PATH=/bin\nbusybox mount -t proc proc /proc\n\
                echo CHECKSUM $(busybox cat /data/* | busybox sha256sum)\necho written by the guest > /data/zz\nbusybox sync\nbusybox poweroff -f\n";
    script(&root.join("init"), text);
    tool("truncate", &["-s", &SIZE.to_string(), s(disk)]);
    tool("mkfs.ext4", &["-q", "-F", "-d", s(&root), s(disk)]);
    let sum = tool("sh", &["-c", &format!("cat {}/data/* | sha256sum", s(&root))]);
    sum.split_whitespace().next().unwrap().to_owned()
}

/// Starts a guest from an image and returns what it printed.
fn start_guest(image: &Path, format: &str, kernel: &Path, initrd: &Path) -> String {
    let drive = format!("file={},format={format},if=none,id=root", s(image));
    let output = Command::new("timeout")
        .args(["180", "qemu-system-x86_64", "-accel", "tcg", "-m", "384", "-nographic", "-no-reboot", "-nodefaults", "-serial", "stdio"])
        .args([
            "-kernel",
            s(kernel),
            "-initrd",
            s(initrd),
            "-append",
            "console=ttyS0 quiet panic=-1",
            "-drive",
            &drive,
            "-device",
            "nvme,drive=root,serial=root",
        ])
        .output()
        .unwrap();
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

#[test]
fn a_guest_starts_from_recovered_images_and_finds_its_files() {
    let (kernel, modules) = kernel();
    let mut cluster = Cluster::start(Options { disk_bytes: SIZE, ..Options::default() });
    let (initrd, disk) = (initrd(cluster.dir.path(), &modules), cluster.path("root.raw"));
    let sum = root_disk(cluster.dir.path(), &disk);
    // Installed over the network block device, while it is replicated.
    tool("nbdcopy", &["--flush", s(&disk), &cluster.nbd_uri(0)]);
    cluster.wait_for_delta();
    let point = cluster.mark("installed");
    cluster.wait("the point is listed", Duration::from_secs(30), || cluster.points().iter().any(|p| p["id"].as_str() == Some(&point)));
    for format in ["vhdx", "vmdk", "vmdk-flat"] {
        let kind = if format == "vhdx" { "vhdx" } else { "vmdk" };
        let image = cluster.path(&format!("{format}.{kind}"));
        cluster.export(&point, 0, format, &image);
        let said = start_guest(&image, kind, &kernel, &initrd);
        assert!(said.contains(&format!("CHECKSUM {sum}")), "{format}: the guest said: {said}");
        // The guest wrote: other writers leave our images whole.
        cluster.tidegate(&["check", "image", s(&image)]);
        eprintln!("{format}: the guest started and found its files");
    }
}
