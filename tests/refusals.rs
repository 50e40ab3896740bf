//! What must be refused is refused with a clear error, and the server goes on serving the others.
#![allow(clippy::unwrap_used, clippy::disallowed_methods, reason = "tests may unwrap, and wait by the clock")]

mod support;

use std::fs;
use std::io::{Read, Write};
use std::net::{TcpStream, UdpSocket};
use std::time::Duration;

use support::{Cluster, Options, ROLES, s, same_bytes, tool, try_tool};

/// Everything still works.
fn assert_works(cluster: &mut Cluster, label: &str) {
    for role in ROLES {
        assert!(cluster.runs(role), "{role} must go on\n{}", cluster.log(role));
    }
    cluster.wait_for_delta();
    let point = cluster.mark(label);
    let out = cluster.path("works.raw");
    cluster.export(&point, 0, "raw", &out);
    assert!(same_bytes(&out, &cluster.disk(0)));
    fs::remove_file(out).unwrap();
}

#[test]
fn garbage_on_9443_and_9444_disturbs_nobody() {
    let mut cluster = Cluster::start(Options::default());
    tool("qemu-io", &["-f", "raw", "-c", "write -P 5 0 4M", &cluster.nbd_uri(0)]);
    for round in 0..30u8 {
        let junk: Vec<u8> = (0..2000u32).map(|i| (i as u8).wrapping_mul(round).wrapping_add(round)).collect();
        let mut tcp = TcpStream::connect(("127.0.0.1", cluster.ingest_port())).unwrap();
        let _ = tcp.write_all(&junk);
        let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
        udp.send_to(&junk[..1200], ("127.0.0.1", cluster.forward_port())).unwrap();
    }
    // Connections that say nothing.
    let silent: Vec<_> = (0..20).map(|_| TcpStream::connect(("127.0.0.1", cluster.ingest_port())).unwrap()).collect();
    assert_works(&mut cluster, "after garbage");
    drop(silent);
    // A NBD client that talks nonsense.
    let mut nbd = std::os::unix::net::UnixStream::connect(cluster.nbd(0)).unwrap();
    nbd.write_all(&[0xff; 5000]).unwrap();
    let mut rest = Vec::new();
    let _ = nbd.read_to_end(&mut rest);
    assert_works(&mut cluster, "after nonsense");
}

#[test]
fn certificates_of_another_ca_or_role_get_in_nowhere() {
    let mut cluster = Cluster::start(Options::default());
    cluster.wait_for_delta();
    let other = cluster.path("other-ca");
    cluster.tidegate(&["pki", "init", s(&other)]);
    cluster.kill("agent");
    let good = cluster.path("tls-good");
    fs::rename(cluster.path("tls-agent"), &good).unwrap();
    cluster.tidegate(&["pki", "issue", "--ca", s(&other), "--role", "agent", "--name", "m1", "--out", s(&cluster.path("tls-agent"))]);
    cluster.start_role("agent");
    cluster.wait("the agent says what is wrong", Duration::from_secs(10), || {
        cluster.json("agent", &["status"])[0]["reason"].as_str().is_some_and(|r| r.contains("certificate"))
    });
    cluster.kill("agent");
    fs::remove_dir_all(cluster.path("tls-agent")).unwrap();
    // The right CA, the wrong machine.
    cluster.tidegate(&[
        "pki",
        "issue",
        "--ca",
        s(&cluster.path("ca")),
        "--role",
        "agent",
        "--name",
        "m2",
        "--out",
        s(&cluster.path("tls-agent")),
    ]);
    let wrong = cluster.try_tidegate(&["agent", "--config", s(&cluster.config("agent"))]);
    assert!(String::from_utf8_lossy(&wrong.stderr).contains("m2"), "{}", String::from_utf8_lossy(&wrong.stderr));
    // The right CA, the wrong role.
    fs::remove_dir_all(cluster.path("tls-agent")).unwrap();
    cluster.tidegate(&[
        "pki",
        "issue",
        "--ca",
        s(&cluster.path("ca")),
        "--role",
        "admin",
        "--name",
        "m1",
        "--out",
        s(&cluster.path("tls-agent")),
    ]);
    let wrong = cluster.try_tidegate(&["agent", "--config", s(&cluster.config("agent"))]);
    assert!(String::from_utf8_lossy(&wrong.stderr).contains("admin"));
    // A key that others can read.
    fs::remove_dir_all(cluster.path("tls-agent")).unwrap();
    fs::rename(&good, cluster.path("tls-agent")).unwrap();
    let key = cluster.path("tls-agent/key.pem");
    tool("chmod", &["644", s(&key)]);
    let exposed = cluster.try_tidegate(&["agent", "--config", s(&cluster.config("agent"))]);
    assert!(String::from_utf8_lossy(&exposed.stderr).contains("chmod 600"));
    tool("chmod", &["600", s(&key)]);
    cluster.start_role("agent");
    assert_works(&mut cluster, "with the right certificate");
}

#[test]
fn unknown_disks_and_disks_larger_or_smaller_than_their_replica_are_named() {
    let mut cluster = Cluster::start(Options::default());
    cluster.wait_for_delta();
    cluster.kill("agent");
    let config = fs::read_to_string(cluster.config("agent")).unwrap();
    fs::write(cluster.config("agent"), config.replace("name = \"d0\"", "name = \"d9\"")).unwrap();
    cluster.start_role("agent");
    let reason = |cluster: &Cluster| cluster.json("agent", &["status"])[0]["reason"].as_str().unwrap_or_default().to_owned();
    cluster.wait("unknown disk is named", Duration::from_secs(10), || reason(&cluster).contains("not registered"));
    cluster.kill("agent");
    fs::write(cluster.config("agent"), &config).unwrap();
    // A smaller disk under the same name: half of its recovery points would be the other's content.
    tool("truncate", &["-s", "32M", s(&cluster.disk(0))]);
    cluster.start_role("agent");
    cluster.wait("both sizes are named", Duration::from_secs(20), || reason(&cluster).contains("shrank"));
    cluster.kill("agent");
    tool("truncate", &["-s", "64M", s(&cluster.disk(0))]);
    cluster.start_role("agent");
    assert_works(&mut cluster, "with the right size");
    // A bound that the operator set is kept, until it is raised.
    let config = fs::read_to_string(cluster.config("master-target")).unwrap();
    for (size, found) in [("64MiB", false), ("96MiB", true)] {
        cluster.terminate("master-target");
        fs::write(cluster.config("master-target"), format!("{config}size = \"{size}\"\n")).unwrap();
        cluster.start_role("master-target");
        tool("truncate", &["-s", "96M", s(&cluster.disk(0))]);
        let fits = |cluster: &Cluster| cluster.json("master-target", &["status"])[0]["machines"][0]["disks"][0]["size_bytes"] == 96 << 20;
        cluster.wait("the size is refused or taken", Duration::from_secs(30), || {
            if found { fits(&cluster) } else { reason(&cluster).contains("raise `size`") }
        });
    }
    assert_works(&mut cluster, "with the larger size");
}

/// Whichever page of it rots: the server says so and does not start, or nothing of what it reads is another.
#[test]
fn a_rotten_catalogue_is_named_and_nothing_is_done_with_it() {
    let mut cluster = Cluster::start(Options::default());
    cluster.wait_for_delta();
    let point = cluster.mark("before");
    // Nothing arrives meanwhile: a catalogue that is put back is then not behind the journal.
    for role in ["agent", "process-server", "master-target"] {
        cluster.terminate(role);
    }
    let path = cluster.path("master-target/master-target.redb");
    let good = std::fs::read(&path).unwrap();
    let mut pages: Vec<usize> = (0..good.len() / 4096).filter(|page| good[page * 4096..][..4096].iter().any(|b| *b != 0)).collect();
    pages.truncate(40);
    let mut refused = 0;
    for page in &pages {
        let mut rotten = good.clone();
        let at = page * 4096 + good[page * 4096..][..4096].iter().rposition(|b| *b != 0).unwrap();
        rotten[at] ^= 0x10;
        rotten[page * 4096] ^= 0xff;
        std::fs::write(&path, rotten).unwrap();
        match cluster.try_start_role("master-target", Duration::from_secs(20)) {
            Ok(()) => {
                assert!(cluster.points().iter().any(|p| p["id"] == point.as_str()), "page {page}");
                cluster.kill("master-target");
            }
            Err(why) => {
                assert!(why.contains("master-target.redb") && !why.contains("panicked"), "page {page}: {why}");
                refused += 1;
            }
        }
    }
    assert!(refused > 0);
    std::fs::write(&path, good).unwrap();
    ["master-target", "process-server", "agent"].iter().for_each(|role| cluster.start_role(role));
    assert_works(&mut cluster, "after");
    eprintln!("{} pages damaged one after the other, {refused} times refused by name, never another answer", pages.len());
}

#[test]
fn an_occupied_port_is_named_with_the_key_to_change() {
    let mut cluster = Cluster::start(Options::default());
    let text = fs::read_to_string(cluster.config("process-server")).unwrap();
    let second = cluster.path("second.toml");
    let control = cluster.control("process-server");
    let text = text
        .replace(&control, &format!("unix:{}", cluster.path("second.sock").display()))
        .replace(s(&cluster.path("process-server")), s(&cluster.path("second")));
    let text: String = text
        .lines()
        .filter(|l| !l.contains("[metrics]") && !l.starts_with("listen = \"127.0.0.1:") || l.contains(&cluster.ingest_port().to_string()))
        .map(|l| format!("{l}\n"))
        .collect();
    fs::write(&second, text).unwrap();
    let output = cluster.try_tidegate(&["process-server", "--config", s(&second)]);
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(error.contains(&cluster.ingest_port().to_string()) && error.contains("[ingest] listen"), "{error}");
    assert_works(&mut cluster, "the first one goes on");
}

#[test]
fn a_full_file_system_at_the_master_target_damages_nothing_and_heals() {
    let dir = tempfile::tempdir().unwrap();
    let (image, mount) = (dir.path().join("small.img"), dir.path().join("small"));
    fs::File::create(&image).unwrap().set_len(480 << 20).unwrap();
    fs::create_dir(&mount).unwrap();
    tool("mkfs.ext4", &["-q", "-F", s(&image)]);
    tool("mount", &["-o", "loop", s(&image), s(&mount)]);
    let options = Options {
        disk_bytes: 256 << 20,
        target_state: Some(mount.join("mt")),
        master_target: "[journal]\nsize_max = \"32MiB\"\nsegment = \"8MiB\"\n".to_owned(),
        ..Options::default()
    };
    let mut cluster = Cluster::start(options);
    cluster.wait_for_delta();
    cluster.mark("empty");
    fs::write(mount.join("ballast"), vec![1u8; 340 << 20]).unwrap();
    for n in 0..20 {
        tool("qemu-io", &["-f", "raw", "-c", &format!("write -P {} {}M 8M", n + 1, n * 8), &cluster.nbd_uri(0)]);
    }
    let reason = |cluster: &Cluster| cluster.json("master-target", &["status"])[0]["reason"].as_str().unwrap_or_default().to_owned();
    cluster.wait("the disk says so", Duration::from_secs(30), || reason(&cluster).contains("full"));
    assert!(!cluster.points().is_empty(), "what was listed stays listed");
    fs::remove_file(mount.join("ballast")).unwrap();
    cluster.wait_for_delta();
    let point = cluster.mark("after");
    let out = cluster.path("after.raw");
    cluster.export(&point, 0, "raw", &out);
    assert!(same_bytes(&out, &cluster.disk(0)));
    drop(cluster);
    let _ = try_tool("umount", &[s(&mount)]);
}

#[test]
fn a_replica_that_is_missing_for_a_moment_keeps_its_points_and_is_given_up_only_when_told() {
    let mut cluster = Cluster::start(Options::default());
    tool("qemu-io", &["-f", "raw", "-c", "write -P 7 0 1M", &cluster.nbd_uri(0)]);
    cluster.wait_for_delta();
    let point = cluster.mark("kept");
    let (replica, away) = (cluster.replica(0), cluster.path("away"));
    let folder = replica.parent().unwrap().to_owned();
    let reason = |cluster: &Cluster| {
        cluster.json("master-target", &["status"])[0]["machines"][0]["disks"][0]["reason"].as_str().unwrap_or_default().to_owned()
    };
    // Its storage is not mounted.
    cluster.kill("master-target");
    fs::rename(&folder, &away).unwrap();
    cluster.start_role("master-target");
    cluster.wait("the missing file is named", Duration::from_secs(20), || reason(&cluster).contains("is gone"));
    assert!(!replica.exists(), "nothing is made in its place");
    cluster.kill("master-target");
    let _ = fs::remove_dir_all(&folder);
    fs::rename(&away, &folder).unwrap();
    cluster.start_role("master-target");
    cluster.wait_for_delta();
    let out = cluster.path("out.raw");
    cluster.export(&point, 0, "raw", &out);
    assert!(support::same_bytes(&out, &cluster.disk(0)));
    // Really gone, and said so.
    cluster.kill("master-target");
    fs::remove_file(&replica).unwrap();
    fs::write(format!("{}.anew", s(&replica)), "").unwrap();
    cluster.start_role("master-target");
    cluster.wait("a new replica is made", Duration::from_secs(60), || replica.exists());
    std::thread::sleep(Duration::from_secs(1));
    assert_works(&mut cluster, "after the replica was given up");
}
