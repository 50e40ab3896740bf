//! fio writes through the agent's NBD export and verifies: on the live disk, and on the recovered image.
#![allow(clippy::unwrap_used, clippy::disallowed_methods, reason = "tests may unwrap, and wait by the clock")]

mod support;

use support::{Cluster, Options, s, tool};

#[test]
fn what_fio_wrote_verifies_on_the_disk_and_on_the_recovered_image() {
    for cache in ["direct", "writeback"] {
        verify(cache);
    }
}

fn verify(cache: &'static str) {
    let mut cluster = Cluster::start(Options { disk_bytes: 128 << 20, cache, ..Options::default() });
    let uri = format!("--uri={}", cluster.nbd_uri(0));
    let job = [
        "--name=v",
        "--rw=randwrite",
        "--bsrange=4k-64k",
        "--size=128m",
        "--iodepth=16",
        "--verify=crc32c",
        "--randseed=7",
        "--fsync=64",
        "--verify_state_save=0",
    ];
    // While initial replication is still going on.
    tool("fio", &[&["--ioengine=nbd", &uri][..], &job, &["--do_verify=1", "--verify_fatal=1"]].concat());
    cluster.wait_for_delta();
    let point = cluster.mark("fio");
    let raw = cluster.path("fio.raw");
    cluster.export(&point, 0, "raw", &raw);
    let file = format!("--filename={}", s(&raw));
    tool("fio", &[&["--ioengine=psync", &file][..], &job, &["--verify_only", "--verify_fatal=1"]].concat());
    let vhdx = cluster.path("fio.vhdx");
    cluster.export(&point, 0, "vhdx", &vhdx);
    tool("qemu-img", &["compare", "-f", "vhdx", "-F", "raw", s(&vhdx), s(&raw)]);
}
