//! A guest under qemu-system (software emulation) starts from recovered images: a Debian kernel, a root of its own on the
//! protected disk, files whose checksum the test knows. `tests/run guest` installs what this needs and unpacks the kernel.
#![allow(clippy::unwrap_used, clippy::disallowed_methods, missing_docs, reason = "a test")]

mod support;

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use support::{Cluster, Options, Rng, guest, s, tool};

const SIZE: u64 = 96 << 20;
/// What the initial RAM disk does with the root.
const HAND_OVER: &str = "busybox sleep 1\nbusybox mount -t ext4 /dev/nvme0n1 /root || { echo ROOT FAILED; busybox poweroff -f; }\nexec busybox switch_root /root /init\n";

/// A root file system with files, and an init that says what they add up to.
fn root_disk(dir: &Path, disk: &Path) -> String {
    let root = dir.join("root");
    fs::create_dir_all(root.join("data")).unwrap();
    let mut rng = Rng::new(11);
    for n in 0..20 {
        let bytes: Vec<u8> = (0..rng.below(900_000)).map(|_| rng.below(256) as u8).collect();
        fs::write(root.join(format!("data/file-{n:02}")), bytes).unwrap();
    }
    let init = "echo CHECKSUM $(busybox cat /data/* | busybox sha256sum)\necho written by the guest > /data/zz\nbusybox sync\nbusybox poweroff -f\n";
    guest::root_disk(&root, init, disk, SIZE);
    let sum = tool("sh", &["-c", &format!("cat {}/data/* | sha256sum", s(&root))]);
    sum.split_whitespace().next().unwrap().to_owned()
}

/// Starts a guest from an image and returns what it printed.
fn start_guest(image: &Path, format: &str, kernel: &Path, initrd: &Path) -> String {
    let drive = format!("file={},format={format},if=none,id=root", s(image));
    let output = Command::new("timeout")
        .arg("180")
        .args(guest::QEMU)
        .args(["-nographic", "-serial", "stdio", "-kernel", s(kernel), "-initrd", s(initrd), "-append", "console=ttyS0 quiet panic=-1"])
        .args(["-drive", &drive, "-device", "nvme,drive=root,serial=root"])
        .output()
        .unwrap();
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

#[test]
fn a_guest_starts_from_recovered_images_and_finds_its_files() {
    let (kernel, modules) = guest::kernel();
    let mut cluster = Cluster::start(Options { disk_bytes: SIZE, ..Options::default() });
    let (initrd, disk) = (guest::initrd(cluster.dir.path(), &modules, &[], HAND_OVER), cluster.path("root.raw"));
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
