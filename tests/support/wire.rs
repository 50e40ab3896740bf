//! Two cables between three network namespaces (agent, process server, master target), and what can go wrong on them: packets lost or
//! cut in one direction or both, large ones swallowed, a slow link.
#![allow(clippy::disallowed_methods, unreachable_pub, missing_docs, reason = "a part of the tests")]

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use super::support::{tool, try_tool};

/// Where a role lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Place {
    Agent,
    Gateway,
    Target,
}

/// A cable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Link {
    /// Agent and process server.
    Ingest,
    /// Process server and master target.
    Forward,
}

/// Where a packet goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Way {
    /// As the changes do.
    Forth,
    /// As the acknowledgements do.
    Back,
}

pub const PLACES: [Place; 3] = [Place::Agent, Place::Gateway, Place::Target];
pub const LINKS: [Link; 2] = [Link::Ingest, Link::Forward];
pub const WAYS: [Way; 2] = [Way::Forth, Way::Back];

/// Everything that arrives.
pub const ALL: &str = "";

/// Where agents find the process server.
pub const GATEWAY_ADDRESS: &str = "10.213.1.2";
/// Where the process server finds the master target.
pub const TARGET_ADDRESS: &str = "10.213.2.2";

/// Jumbo frames, so that the largest UDP payload of the configuration fits.
const CABLE_MTU: u32 = 9000;

/// Tells apart what one process makes.
static NEXT: AtomicU32 = AtomicU32::new(0);

/// The namespaces and cables. Gone with this.
pub struct Wire {
    name: String,
    drops: BTreeMap<(Link, Way), String>,
}

/// Fails with the package to install, or with who has to run it.
pub fn demand_tools() {
    assert!(rustix::process::geteuid().is_root(), "network namespaces need root: run this as root");
    for (program, question, package) in [("ip", "-Version", "iproute2"), ("tc", "-Version", "iproute2"), ("nft", "--version", "nftables")] {
        let found = std::process::Command::new(program).arg(question).output().is_ok_and(|o| o.status.success());
        assert!(found, "{program} is missing: install the package {package} (apt-get install {package})");
    }
}

/// Which end of a cable a packet arrives at, and under which name its namespace knows that end.
fn receiver(link: Link, way: Way) -> (Place, &'static str) {
    match (link, way) {
        (Link::Ingest, Way::Forth) => (Place::Gateway, "eth0"),
        (Link::Ingest, Way::Back) => (Place::Agent, "eth0"),
        (Link::Forward, Way::Forth) => (Place::Target, "eth0"),
        (Link::Forward, Way::Back) => (Place::Gateway, "eth1"),
    }
}

impl Wire {
    pub fn new() -> Self {
        demand_tools();
        let wire = Self { name: format!("tgw{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::SeqCst)), drops: BTreeMap::new() };
        let ip = |args: String| tool("ip", &args.split_whitespace().collect::<Vec<_>>());
        for place in PLACES {
            ip(format!("netns add {}", wire.namespace(place)));
            ip(format!("-n {} link set lo up", wire.namespace(place)));
        }
        let [agent, gateway, target] = PLACES.map(|p| wire.namespace(p));
        for (near, name, far, net) in [(&agent, "eth0", &gateway, 1), (&gateway, "eth1", &target, 2)] {
            ip(format!("-n {near} link add {name} mtu {CABLE_MTU} type veth peer name eth0 mtu {CABLE_MTU} netns {far}"));
            for (end, device, host) in [(near, name, 1), (far, "eth0", 2)] {
                ip(format!("-n {end} addr add 10.213.{net}.{host}/24 dev {device}"));
                // Packets as a real cable has them: else the kernel hands over up to 64 KiB as one, and one loss takes all of it.
                ip(format!("-n {end} link set {device} gso_max_segs 1 up"));
            }
        }
        wire
    }

    pub fn namespace(&self, place: Place) -> String {
        format!("{}-{}", self.name, format!("{place:?}").to_lowercase())
    }

    /// Runs something in a namespace; processes that it starts stay there.
    pub fn inside<T: Send>(&self, place: Place, work: impl FnOnce() -> T + Send) -> T {
        let namespace = self.namespace(place);
        std::thread::scope(|scope| {
            let run = scope.spawn(|| {
                enter(&namespace);
                work()
            });
            run.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Drops what matches (an nft expression) among the packets of a cable that go one way; replaces what was dropped before.
    pub fn drop_packets(&mut self, link: Link, way: Way, matches: &str) {
        self.drops.insert((link, way), matches.to_owned());
        self.apply(receiver(link, way).0);
    }

    /// The same for both ways.
    pub fn drop_both_ways(&mut self, link: Link, matches: &str) {
        for way in WAYS {
            self.drop_packets(link, way, matches);
        }
    }

    /// Nothing is dropped any more. Returns how many packets were.
    pub fn heal(&mut self, link: Link) -> u64 {
        let places: Vec<Place> =
            WAYS.into_iter().filter(|way| self.drops.contains_key(&(link, *way))).map(|way| receiver(link, way).0).collect();
        let dropped = places.iter().map(|place| self.counted(*place, link)).sum();
        for way in WAYS {
            self.drops.remove(&(link, way));
        }
        places.iter().for_each(|place| self.apply(*place));
        dropped
    }

    fn apply(&self, place: Place) {
        let mut rules = String::new();
        for ((link, way), matches) in &self.drops {
            let (at, device) = receiver(*link, *way);
            if at == place {
                rules += &format!("iifname \"{device}\" {matches} counter drop comment \"{link:?}\"; ");
            }
        }
        let table = "table inet wire";
        let hook = "type filter hook input priority filter; policy accept;";
        self.nft(place, &format!("{table}; delete {table}; {table} {{ chain arriving {{ {hook} {rules} }}; }}"));
    }

    fn counted(&self, place: Place, link: Link) -> u64 {
        let listed = self.nft(place, "list table inet wire");
        let ours = listed.lines().filter(|line| line.contains(&format!("\"{link:?}\"")));
        ours.filter_map(|line| line.split("counter packets ").nth(1)?.split(' ').next()?.parse::<u64>().ok()).sum()
    }

    /// Sends what arrives for `port` on a cable to another port of the same place; connections that are open already are not moved.
    pub fn redirect(&self, link: Link, port: u16, to: u16) {
        let (place, device) = receiver(link, Way::Forth);
        let protocol = if link == Link::Ingest { "tcp" } else { "udp" };
        let hook = "type nat hook prerouting priority dstnat;";
        let rule = format!("iifname \"{device}\" {protocol} dport {port} redirect to :{to};");
        self.nft(place, &format!("table inet relay {{ chain {protocol}_relay {{ {hook} {rule} }}; }}"));
    }

    fn nft(&self, place: Place, rules: &str) -> String {
        tool("ip", &["netns", "exec", &self.namespace(place), "nft", rules])
    }

    /// What the process server can send to the master target: a `tc` rate, or as much as there is.
    pub fn limit(&self, rate: Option<&str>) {
        let gateway = self.namespace(Place::Gateway);
        match rate {
            Some(rate) => {
                let shape = format!("-n {gateway} qdisc replace dev eth1 root tbf rate {rate} burst 32kb latency 50ms");
                tool("tc", &shape.split(' ').collect::<Vec<_>>());
            }
            None => drop(tool("tc", &["-n", &gateway, "qdisc", "del", "dev", "eth1", "root"])),
        }
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        for place in PLACES {
            let _ = try_tool("ip", &["netns", "del", &self.namespace(place)]);
        }
    }
}

/// Moves the calling thread into a namespace, for good.
pub fn enter(namespace: &str) {
    let file = File::open(format!("/run/netns/{namespace}")).unwrap_or_else(|e| panic!("namespace {namespace}: {e}"));
    move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network)).unwrap_or_else(|e| panic!("entering {namespace}: {e}"));
}
