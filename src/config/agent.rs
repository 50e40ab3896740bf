//! `agent.toml`.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;

use super::{Control, Metrics, Settings, in_range, limits, units};
use crate::crypto::tls::TlsFiles;
use crate::disk::Format;
use crate::model::change::{CHANGE_BYTES_MAX, DISKS_PER_MACHINE_MAX};
use crate::model::{Address, DiskId, MachineId, Name};

/// Settings of an agent.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AgentSettings {
    /// Name of the protected machine; the certificate must be issued for it.
    pub machine: Name,
    /// Folder for the dirty maps.
    pub state: PathBuf,
    /// Certificates.
    pub tls: TlsFiles,
    /// Where the changes go.
    pub process_server: ProcessServer,
    /// Recovery points.
    #[serde(default)]
    pub points: Points,
    /// Application-consistent points.
    #[serde(default)]
    pub app: App,
    /// The replication group.
    #[serde(default)]
    pub consistency: Consistency,
    /// Changes that wait in memory.
    #[serde(default)]
    pub backlog: Backlog,
    /// Write-intent map.
    #[serde(default)]
    pub dirty_map: DirtyMap,
    /// Comparison with the replica.
    #[serde(default)]
    pub scrub: Scrub,
    /// The protected disks.
    pub disk: Vec<Disk>,
    /// Command line.
    #[serde(default)]
    pub control: Control,
    /// Prometheus.
    #[serde(default)]
    pub metrics: Metrics,
}

/// `[process_server]`
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProcessServer {
    /// Host name or IP address, and port.
    pub address: String,
    /// Others, to which the stream goes when this one does not serve the machine's disks.
    #[serde(default)]
    pub standby: Vec<String>,
    /// How long a process server may be away before the next one is tried.
    #[serde(default = "default_switch_after", deserialize_with = "units::duration")]
    pub switch_after: Duration,
}

fn default_switch_after() -> Duration {
    Duration::from_secs(5)
}

impl ProcessServer {
    /// All of them, in order of preference.
    pub fn addresses(&self) -> impl Iterator<Item = &String> {
        std::iter::once(&self.address).chain(&self.standby)
    }

    fn check(&self) -> Result<(), String> {
        for address in self.addresses() {
            if address.parse::<SocketAddr>().is_err() && !address.contains(':') {
                return Err(format!("process_server: {address:?} needs a port, for example \"gateway.example:9443\""));
            }
        }
        if self.standby.len() > limits::STANDBYS_MAX {
            return Err(format!("process_server.standby has {} addresses, at most {} are used", self.standby.len(), limits::STANDBYS_MAX));
        }
        in_range("process_server.switch_after in seconds", self.switch_after.as_secs_f64(), 0.5, 3600.0)
    }
}

/// `[points]`
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Points {
    /// Time between crash-consistent points.
    #[serde(deserialize_with = "units::duration")]
    pub interval: Duration,
}

impl Default for Points {
    fn default() -> Self {
        Self { interval: Duration::from_secs(5) }
    }
}

/// `[consistency]`
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Consistency {
    /// Host name or IP address of the coordinator, and port. Without one the machine belongs to no group.
    pub coordinator: Option<String>,
    /// Longest time new writes are held for a point of the group, whatever the coordinator wants.
    #[serde(deserialize_with = "units::duration")]
    pub hold_max: Duration,
    /// Shortest time between two such holds.
    #[serde(deserialize_with = "units::duration")]
    pub rest_min: Duration,
    /// Shortest time between two times that applications are at rest for a point of the group.
    #[serde(deserialize_with = "units::duration")]
    pub freeze_rest_min: Duration,
}

impl Default for Consistency {
    fn default() -> Self {
        Self {
            coordinator: None,
            hold_max: Duration::from_millis(200),
            rest_min: Duration::from_millis(500),
            freeze_rest_min: Duration::from_secs(10),
        }
    }
}

/// `[app]`
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct App {
    /// Time between application-consistent points; none on a timer when absent.
    #[serde(deserialize_with = "units::duration_option")]
    pub interval: Option<Duration>,
    /// Longest time that file systems are frozen, or, without any, that scripts hold their applications at rest.
    #[serde(deserialize_with = "units::duration")]
    pub freeze_max: Duration,
    /// What is done when something cannot be brought to rest in time.
    pub on_failure: OnFailure,
    /// What is brought to rest.
    pub hook: Vec<AppHook>,
}

impl Default for App {
    fn default() -> Self {
        Self { interval: None, freeze_max: Duration::from_secs(10), on_failure: OnFailure::Crash, hook: Vec::new() }
    }
}

/// What becomes of a point that was to be application-consistent and cannot be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnFailure {
    /// It is made crash-consistent, and says why.
    #[default]
    Crash,
    /// It is not made.
    Skip,
}

/// `[[app.hook]]`: one of `mount`, `guest_agent` and `script`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AppHook {
    /// What it is called in logs and remarks.
    pub name: Name,
    /// Where a file system of this host is mounted, that is frozen.
    #[serde(default)]
    pub mount: Option<PathBuf>,
    /// The socket of a guest's agent, that freezes the guest's file systems.
    #[serde(default)]
    pub guest_agent: Option<PathBuf>,
    /// A program that is called with `--pre` before and `--post` after.
    #[serde(default)]
    pub script: Option<PathBuf>,
    /// How long each call of `script` may take.
    #[serde(default, deserialize_with = "units::duration_option")]
    pub timeout: Option<Duration>,
}

impl AppHook {
    /// How long each call of a script may take.
    pub fn timeout(&self) -> Duration {
        self.timeout.unwrap_or(Duration::from_secs(30))
    }

    fn check(&self) -> Result<(), String> {
        let ways: Vec<_> = [&self.mount, &self.guest_agent, &self.script].into_iter().flatten().collect();
        let [path] = ways[..] else {
            return Err(format!("app.hook {}: give exactly one of mount, guest_agent and script", self.name));
        };
        if !path.is_absolute() {
            return Err(format!("app.hook {}: {} must be an absolute path", self.name, path.display()));
        }
        if self.timeout.is_some() && self.script.is_none() {
            return Err(format!("app.hook {}: timeout is for scripts; app.freeze_max bounds the others", self.name));
        }
        in_range("app.hook.timeout in seconds", self.timeout().as_secs_f64(), 0.1, 600.0)
    }
}

impl App {
    fn check(&self) -> Result<(), String> {
        in_range("app.freeze_max in seconds", self.freeze_max.as_secs_f64(), 0.1, 60.0)?;
        if self.hook.len() > limits::HOOKS_MAX {
            return Err(format!("at most {} [[app.hook]] tables, found {}", limits::HOOKS_MAX, self.hook.len()));
        }
        for (index, hook) in self.hook.iter().enumerate() {
            hook.check()?;
            if self.hook[..index].iter().any(|h| h.name == hook.name) {
                return Err(format!("app.hook {} is there twice", hook.name));
            }
        }
        match self.interval {
            Some(_) if self.hook.is_empty() => Err("app.interval needs at least one [[app.hook]]".to_owned()),
            Some(interval) => in_range("app.interval in seconds", interval.as_secs_f64(), 10.0, 7.0 * 86400.0),
            None => Ok(()),
        }
    }
}

/// `[backlog]`
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Backlog {
    /// Memory for changes that are not safe yet, per disk.
    #[serde(deserialize_with = "units::size")]
    pub memory_max: u64,
    /// Disk space in the state folder for what memory has no room for, all disks together; 0: none.
    #[serde(deserialize_with = "units::size")]
    pub log_max: u64,
}

impl Default for Backlog {
    fn default() -> Self {
        Self { memory_max: 256 << 20, log_max: 4 << 30 }
    }
}

/// `[dirty_map]`
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DirtyMap {
    /// Bytes of disk per bit; what a crash makes the agent send again is a multiple of it.
    #[serde(deserialize_with = "units::size")]
    pub region: u64,
    /// A region that is safe and was not written for this long is marked clean.
    #[serde(deserialize_with = "units::duration")]
    pub clean_after: Duration,
}

impl Default for DirtyMap {
    fn default() -> Self {
        Self { region: 1 << 20, clean_after: Duration::from_secs(30) }
    }
}

/// `[scrub]`
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Scrub {
    /// Bytes of each disk that are read and compared with the replica a second; 0: only when somebody asks.
    #[serde(deserialize_with = "units::rate")]
    pub rate: u64,
}

impl Default for Scrub {
    fn default() -> Self {
        Self { rate: 2 << 20 }
    }
}

/// How the agent uses the page cache of its host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CacheMode {
    /// Past it (O_DIRECT): a write that was answered is with the device.
    #[default]
    Direct,
    /// Through it: a write that was answered may be in memory until a flush, as `nbdkit file` and qemu's `writeback` do.
    Writeback,
}

/// `[[disk]]`
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Disk {
    /// Its name on the machine.
    pub name: Name,
    /// Raw file or block device, or an image of `format`.
    pub path: PathBuf,
    /// What `path` is. Never guessed.
    #[serde(default)]
    pub format: Option<Format>,
    /// Replicate it as it is; nobody may write it. Also opens images that can only be read.
    #[serde(default)]
    pub read_only: bool,
    /// The image may have parents, beneath its own folder. Only with `read_only`.
    #[serde(default)]
    pub parents: bool,
    /// Where the hypervisor connects.
    pub nbd: Address,
    /// Page cache use.
    #[serde(default)]
    pub cache: CacheMode,
}

/// Endings of files that are images, unless somebody says otherwise.
const IMAGE_ENDINGS: [&str; 6] = ["vhdx", "avhdx", "vmdk", "vhd", "qcow2", "vdi"];

impl Disk {
    /// What `path` is.
    pub fn kind(&self) -> Format {
        self.format.unwrap_or(Format::Raw)
    }
}

impl AgentSettings {
    /// Id of the machine.
    pub fn machine_id(&self) -> MachineId {
        MachineId::from_name(&self.machine)
    }

    /// Id of a disk.
    pub fn disk_id(&self, disk: &Disk) -> DiskId {
        DiskId::from_names(&self.machine, &disk.name)
    }
}

impl Settings for AgentSettings {
    fn check(&self) -> Result<(), String> {
        if self.disk.is_empty() || self.disk.len() > DISKS_PER_MACHINE_MAX {
            return Err(format!("a machine needs 1 to {DISKS_PER_MACHINE_MAX} [[disk]] tables, found {}", self.disk.len()));
        }
        for (index, disk) in self.disk.iter().enumerate() {
            let files = disk.kind().files(&disk.path);
            let shares = |d: &Disk| d.kind().files(&d.path).iter().any(|file| files.contains(file));
            if self.disk[..index].iter().any(|d| d.name == disk.name || d.nbd == disk.nbd || shares(d)) {
                return Err(format!("disk {} repeats the name, path or nbd address of another disk", disk.name));
            }
            let ending = disk.path.extension().and_then(|e| e.to_str()).unwrap_or_default().to_ascii_lowercase();
            if disk.format.is_none() && IMAGE_ENDINGS.contains(&ending.as_str()) {
                return Err(format!(
                    "disk {}: {} looks like an image by its name: set `format` of the disk, for example \"vhdx\" or \"vmdk\", or \"raw\" if its bytes are those of the disk",
                    disk.name,
                    disk.path.display()
                ));
            }
            if disk.parents && !disk.read_only {
                return Err(format!(
                    "disk {}: an image with parents is read, not written: set read_only = true, or flatten it first",
                    disk.name
                ));
            }
            if disk.kind() == Format::VmdkStream && !disk.read_only {
                return Err(format!("disk {}: a vmdk-stream is read, not written: set read_only = true", disk.name));
            }
        }
        in_range("points.interval in seconds", self.points.interval.as_secs_f64(), 1.0, 86400.0)?;
        in_range("consistency.hold_max in seconds", self.consistency.hold_max.as_secs_f64(), 0.001, 2.0)?;
        in_range("consistency.freeze_rest_min in seconds", self.consistency.freeze_rest_min.as_secs_f64(), 0.1, 86400.0)?;
        in_range("consistency.rest_min in seconds", self.consistency.rest_min.as_secs_f64(), 0.05, 3600.0)?;
        if self.consistency.coordinator.as_ref().is_some_and(|address| !address.contains(':')) {
            return Err("consistency.coordinator needs a port, for example \"gateway.example:20004\"".to_owned());
        }
        self.app.check()?;
        in_range("backlog.memory_max", self.backlog.memory_max, 2 * limits::RESYNC_WINDOW_BYTES, 1 << 40)?;
        let region = self.dirty_map.region;
        in_range("dirty_map.region", region, CHANGE_BYTES_MAX as u64, 64 << 20)?;
        if !region.is_power_of_two() {
            return Err(format!("dirty_map.region is {region}, it must be a power of two"));
        }
        if self.backlog.log_max != 0 {
            in_range("backlog.log_max", self.backlog.log_max, 64 << 20, 1 << 50)?;
        }
        in_range("scrub.rate", self.scrub.rate, 0, 1 << 40)?;
        self.process_server.check()?;
        self.control.check()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn app(text: &str) -> Result<(), String> {
        toml::from_str::<App>(text).map_err(|e| e.to_string())?.check()
    }

    #[test]
    fn a_hook_is_exactly_one_thing() {
        let hook = |keys: &str| app(&format!("[[hook]]\nname = \"a\"\n{keys}"));
        for good in ["mount = \"/m\"", "guest_agent = \"/g\"", "script = \"/s\"\ntimeout = \"2m\""] {
            assert_eq!(hook(good), Ok(()), "{good}");
        }
        for bad in [
            "",
            "mount = \"/m\"\nscript = \"/s\"",
            "mount = \"m\"",
            "mount = \"/m\"\ntimeout = \"1s\"",
            "script = \"/s\"\ntimeout = \"1h\"",
        ] {
            assert!(hook(bad).is_err(), "{bad}");
        }
        assert_eq!(app(""), Ok(()));
        for bad in ["interval = \"1h\"", "freeze_max = \"2m\"", "freeze_max = \"1ms\"", "on_failure = \"ignore\""] {
            assert!(app(bad).is_err(), "{bad}");
        }
        assert!(app("[[hook]]\nname = \"a\"\nmount = \"/a\"\n[[hook]]\nname = \"a\"\nmount = \"/b\"").is_err());
        assert!(app("interval = \"1s\"\n[[hook]]\nname = \"a\"\nmount = \"/a\"").is_err());
    }
}
