//! `master-target.toml`.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;

use super::{Control, Keys, Metrics, Settings, in_range, process_server::default_mtu, units};
use crate::crypto::tls::TlsFiles;
use crate::disk::Format;
use crate::model::{DiskId, Ladder, MachineId, Name, Policy};

/// Settings of a master target.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MasterTargetSettings {
    /// Folder for catalogue, journal and retention journal.
    pub state: PathBuf,
    /// Folder for the replica images; default: `replicas` in the state folder.
    pub replicas: Option<PathBuf>,
    /// Certificates.
    pub tls: TlsFiles,
    /// Key-encryption key.
    #[serde(default)]
    pub keys: Keys,
    /// From the process servers.
    #[serde(default)]
    pub receive: Receive,
    /// What arrived and is not in the replica.
    #[serde(default)]
    pub journal: Journal,
    /// To the replica.
    #[serde(default)]
    pub apply: Apply,
    /// Recovery points.
    #[serde(default)]
    pub retain: Retain,
    /// Mounted points.
    #[serde(default)]
    pub recover: Recover,
    /// Failed over machines.
    #[serde(default)]
    pub failover: Failover,
    /// Commands that start, check and stop a machine.
    #[serde(default)]
    pub hook: Vec<Hook>,
    /// Machines that have replicas here.
    #[serde(default)]
    pub machine: Vec<Machine>,
    /// Command line.
    #[serde(default)]
    pub control: Control,
    /// Prometheus.
    #[serde(default)]
    pub metrics: Metrics,
}

/// `[receive]`
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Receive {
    /// Where process servers connect (UDP).
    pub listen: SocketAddr,
    /// Largest UDP payload to accept; at least what the process servers send.
    pub mtu: u16,
}

impl Default for Receive {
    fn default() -> Self {
        Self { listen: SocketAddr::from(([0, 0, 0, 0], 9444)), mtu: default_mtu() }
    }
}

/// `[journal]`
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Journal {
    /// Most disk space of the journal.
    #[serde(deserialize_with = "units::size")]
    pub size_max: u64,
    /// Size of one segment.
    #[serde(deserialize_with = "units::size")]
    pub segment: u64,
}

impl Default for Journal {
    fn default() -> Self {
        Self { size_max: 16 << 30, segment: 64 << 20 }
    }
}

/// `[apply]`
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Apply {
    /// Time between checkpoints of a replica.
    #[serde(deserialize_with = "units::duration")]
    pub checkpoint_interval: Duration,
    /// A checkpoint is made earlier when this much waits.
    #[serde(deserialize_with = "units::size")]
    pub checkpoint_bytes: u64,
    /// Memory for received changes that are not applied; older ones are read back from the journal.
    #[serde(deserialize_with = "units::size")]
    pub memory_max: u64,
    /// Memory for what was written to replicas lately, so that overwriting it again reads nothing; 0: none.
    #[serde(deserialize_with = "units::size")]
    pub recent_max: u64,
}

impl Default for Apply {
    fn default() -> Self {
        Self { checkpoint_interval: Duration::from_secs(1), checkpoint_bytes: 64 << 20, memory_max: 256 << 20, recent_max: 512 << 20 }
    }
}

/// `[retain]`: which recovery points stay. See [`crate::model::policy`].
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Retain {
    /// Fewer points the older they get.
    pub ladder: Ladder,
    /// Most points of a machine.
    pub points_max: usize,
    /// So many of the newest stay, whatever the rest says.
    pub points_min: usize,
    /// Points older than this are dropped.
    #[serde(deserialize_with = "units::duration_option")]
    pub span: Option<Duration>,
    /// Most bytes of old content of a machine.
    #[serde(deserialize_with = "units::size_option")]
    pub space_max: Option<u64>,
    /// Bytes a second that looking for damage reads; 0: do not look.
    #[serde(deserialize_with = "units::rate")]
    pub scrub_rate: u64,
    /// Time between two looks at everything that is kept; 0: do not look.
    #[serde(deserialize_with = "units::duration")]
    pub scrub_every: Duration,
}

impl Retain {
    /// As the rules want it.
    pub fn policy(&self) -> Policy {
        Policy {
            ladder: self.ladder.clone(),
            points_max: self.points_max,
            points_min: self.points_min,
            span: self.span,
            space_max: self.space_max,
        }
    }
}

impl Default for Retain {
    fn default() -> Self {
        Self {
            ladder: Ladder::default(),
            points_max: 10_000,
            points_min: 1,
            span: None,
            space_max: None,
            scrub_rate: 32 << 20,
            scrub_every: Duration::from_secs(7 * 86400),
        }
    }
}

/// `[recover]`
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Recover {
    /// Folder for what is written to mounted points; default: `scratch` in the state folder.
    pub scratch: Option<PathBuf>,
    /// Most bytes that one mount takes there.
    #[serde(deserialize_with = "units::size")]
    pub scratch_max: u64,
}

impl Default for Recover {
    fn default() -> Self {
        Self { scratch: None, scratch_max: 16 << 30 }
    }
}

/// `[failover]`
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Failover {
    /// Folder for the sockets of disks that failed over and for the output of hooks; default: `failover` in the state folder.
    pub dir: Option<PathBuf>,
}

/// `[[hook]]`: each command is a program and its arguments, and may be left out.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Hook {
    /// Its name in commands.
    pub name: Name,
    /// Starts the machine and returns.
    #[serde(default)]
    pub start: Vec<String>,
    /// Succeeds when the machine works; tried again until then.
    #[serde(default)]
    pub check: Vec<String>,
    /// Stops the machine; succeeds too when it does not run.
    #[serde(default)]
    pub stop: Vec<String>,
    /// How long each may take.
    #[serde(default = "Hook::minute", deserialize_with = "units::duration")]
    pub start_timeout: Duration,
    /// The same, with all its attempts.
    #[serde(default = "Hook::minutes", deserialize_with = "units::duration")]
    pub check_timeout: Duration,
    /// The same.
    #[serde(default = "Hook::minute", deserialize_with = "units::duration")]
    pub stop_timeout: Duration,
}

impl Hook {
    fn minute() -> Duration {
        Duration::from_secs(60)
    }

    fn minutes() -> Duration {
        Duration::from_secs(300)
    }
}

/// `[[machine]]`
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Machine {
    /// Its name.
    pub name: Name,
    /// What of `[retain]` is different for it.
    #[serde(default)]
    pub retain: Option<OwnRetain>,
    /// Its disks.
    pub disk: Vec<Disk>,
}

/// `[machine.retain]`: see [`Retain`].
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct OwnRetain {
    /// Fewer points the older they get.
    pub ladder: Option<Ladder>,
    /// Most points.
    pub points_max: Option<usize>,
    /// So many of the newest stay.
    pub points_min: Option<usize>,
    /// Points older than this are dropped.
    #[serde(deserialize_with = "units::duration_option")]
    pub span: Option<Duration>,
    /// Most bytes of old content.
    #[serde(deserialize_with = "units::size_option")]
    pub space_max: Option<u64>,
}

/// `[[machine.disk]]`
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Disk {
    /// Its name on the machine.
    pub name: Name,
    /// Format of the replica.
    #[serde(default)]
    pub format: Format,
    /// An image or raw disk that is there already becomes the replica: only what differs is sent, once somebody allows it.
    #[serde(default)]
    pub adopt: Option<PathBuf>,
    /// Size of the replica; default: the size the agent reports first.
    #[serde(default, deserialize_with = "units::size_option")]
    pub size: Option<u64>,
}

impl Machine {
    /// Its id.
    pub fn id(&self) -> MachineId {
        MachineId::from_name(&self.name)
    }

    /// Id of one of its disks.
    pub fn disk_id(&self, disk: &Disk) -> DiskId {
        DiskId::from_names(&self.name, &disk.name)
    }
}

impl MasterTargetSettings {
    /// Folder of what failovers need while they run.
    pub fn failovers(&self) -> PathBuf {
        self.failover.dir.clone().unwrap_or_else(|| self.state.join("failover"))
    }

    /// Folder of the replica images.
    pub fn replicas(&self) -> PathBuf {
        self.replicas.clone().unwrap_or_else(|| self.state.join("replicas"))
    }
}

impl Settings for MasterTargetSettings {
    fn check(&self) -> Result<(), String> {
        in_range("receive.mtu", self.receive.mtu, 1200, 65000)?;
        in_range("journal.segment", self.journal.segment, 4 << 20, 1 << 30)?;
        in_range("journal.size_max", self.journal.size_max, 4 * self.journal.segment, 1 << 50)?;
        in_range("apply.checkpoint_interval in seconds", self.apply.checkpoint_interval.as_secs_f64(), 0.05, 60.0)?;
        in_range("apply.checkpoint_bytes", self.apply.checkpoint_bytes, 1 << 20, 4 << 30)?;
        in_range("apply.memory_max", self.apply.memory_max, 16 << 20, 1 << 40)?;
        in_range("apply.recent_max", self.apply.recent_max, 0, 64 << 30)?;
        in_range("retain.points_max", self.retain.points_max, 1, 100_000)?;
        in_range("retain.points_min", self.retain.points_min, 1, self.retain.points_max)?;
        in_range("retain.scrub_rate", self.retain.scrub_rate, 0, 1 << 40)?;
        if !self.journal.segment.is_multiple_of(4096) {
            return Err("journal.segment must be a multiple of 4096".to_owned());
        }
        for (index, hook) in self.hook.iter().enumerate() {
            if self.hook[..index].iter().any(|h| h.name == hook.name) {
                return Err(format!("hook {} is listed twice", hook.name));
            }
            for (name, command) in [("start", &hook.start), ("check", &hook.check), ("stop", &hook.stop)] {
                if command.first().is_some_and(|program| !program.starts_with('/')) {
                    return Err(format!("hook {}: {name} must begin with the absolute path of a program", hook.name));
                }
            }
        }
        for (index, machine) in self.machine.iter().enumerate() {
            if machine.disk.is_empty() || self.machine[..index].iter().any(|m| m.name == machine.name) {
                return Err(format!("machine {} is listed twice or has no [[machine.disk]]", machine.name));
            }
            if let Some(own) = &machine.retain {
                let most = own.points_max.unwrap_or(self.retain.points_max);
                in_range("machine.retain.points_max", most, 1, 100_000)?;
                in_range("machine.retain.points_min", own.points_min.unwrap_or(self.retain.points_min), 1, most)?;
            }
            for (at, disk) in machine.disk.iter().enumerate() {
                if machine.disk[..at].iter().any(|d| d.name == disk.name) {
                    return Err(format!("disk {} of machine {} is listed twice", disk.name, machine.name));
                }
                let files = |d: &Disk| d.format.files(std::path::Path::new(&format!("{}.{}", d.name, d.format.extension())));
                if let Some(other) = machine.disk[..at].iter().find(|other| files(other).iter().any(|f| files(disk).contains(f))) {
                    return Err(format!(
                        "disks {} and {} of machine {} would share a file: rename one",
                        other.name, disk.name, machine.name
                    ));
                }
                if !disk.format.can_be_replica() {
                    let name = disk.format.as_str();
                    return Err(format!("format of disk {} of machine {}: {name} is for exports only", disk.name, machine.name));
                }
                let ending =
                    disk.adopt.as_ref().and_then(|p| p.extension()).and_then(|e| e.to_str()).unwrap_or_default().to_ascii_lowercase();
                if ["raw", "img", "vhdx", "vmdk"].contains(&ending.as_str()) && ending.replace("img", "raw") != disk.format.extension() {
                    return Err(format!(
                        "disk {} of machine {}: `adopt` looks like another format than {}: set `format` of the disk",
                        disk.name,
                        machine.name,
                        disk.format.as_str()
                    ));
                }
                if disk.size.is_some_and(|s| s == 0 || !s.is_multiple_of(512)) {
                    return Err(format!("size of disk {} of machine {} must be a positive multiple of 512", disk.name, machine.name));
                }
                if let Some(size) = disk.size.filter(|&size| size > disk.format.size_max()) {
                    let (format, most) = (disk.format.as_str(), units::show_size(disk.format.size_max()));
                    let size = units::show_size(size);
                    return Err(format!(
                        "disk {} of machine {}: a {format} replica holds up to {most}, not {size}",
                        disk.name, machine.name
                    ));
                }
            }
        }
        self.control.check()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_that_would_share_a_file_and_formats_for_exports_are_refused() {
        let parse = |disks: &str| -> Result<(), String> {
            let text = include_str!("../../config/master-target.toml");
            let (front, _) = text.split_once("[[machine]]").expect("the example has a machine");
            let tail = "[control]\nlisten = \"unix:/x\"\n";
            let text = format!("{front}{tail}[[machine]]\nname = \"m\"\n{disks}");
            toml::from_str::<MasterTargetSettings>(&text).map_err(|e| e.to_string())?.check()
        };
        let disk = |name: &str, format: &str| format!("[[machine.disk]]\nname = \"{name}\"\nformat = \"{format}\"\n");
        assert_eq!(parse(&(disk("x", "vmdk-flat") + &disk("y", "vmfs"))), Ok(()));
        assert!(parse(&(disk("x", "vmdk-flat") + &disk("x-flat", "vmdk"))).is_err_and(|e| e.contains("share a file")));
        assert!(parse(&disk("x", "vmdk-stream")).is_err_and(|e| e.contains("exports only")));
    }
}
