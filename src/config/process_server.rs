//! `process-server.toml`.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;

use super::coordinator::CoordinatorSettings;
use super::{Control, Keys, Metrics, Settings, in_range, limits, units};
use crate::crypto::tls::TlsFiles;
use crate::model::{DiskId, MachineId, Name};

/// Settings of a process server.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProcessServerSettings {
    /// Folder for catalogue and cache.
    pub state: PathBuf,
    /// Certificates.
    pub tls: TlsFiles,
    /// Key-encryption key.
    #[serde(default)]
    pub keys: Keys,
    /// From the agents.
    #[serde(default)]
    pub ingest: Ingest,
    /// Batches.
    #[serde(default)]
    pub optimize: Optimize,
    /// On disk.
    #[serde(default)]
    pub cache: Cache,
    /// To the master target.
    pub forward: Forward,
    /// Machines whose agents may connect.
    #[serde(default)]
    pub machine: Vec<Machine>,
    /// A coordinator in the same process.
    pub coordinator: Option<CoordinatorSettings>,
    /// Command line.
    #[serde(default)]
    pub control: Control,
    /// Prometheus.
    #[serde(default)]
    pub metrics: Metrics,
}

/// `[ingest]`
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Ingest {
    /// Where agents connect.
    pub listen: SocketAddr,
    /// Memory for changes that are not cached yet, all disks together.
    #[serde(deserialize_with = "units::size")]
    pub memory_max: u64,
    /// Agents connected at once.
    pub connections_max: usize,
}

impl Default for Ingest {
    fn default() -> Self {
        Self { listen: SocketAddr::from(([0, 0, 0, 0], 9443)), memory_max: 256 << 20, connections_max: 1024 }
    }
}

/// `[optimize]`
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Optimize {
    /// Threads that fold, compress and seal; 0: one less than cores, at least one.
    pub workers: usize,
    /// A batch that is not full is closed after this time.
    #[serde(deserialize_with = "units::duration")]
    pub batch_age: Duration,
}

impl Default for Optimize {
    fn default() -> Self {
        Self { workers: 0, batch_age: Duration::from_millis(5) }
    }
}

/// `[cache]`
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Cache {
    /// Most disk space of the cache.
    #[serde(deserialize_with = "units::size")]
    pub size_max: u64,
    /// Size of one segment.
    #[serde(deserialize_with = "units::size")]
    pub segment: u64,
    /// Share of the cache that one disk may fill, in percent, before it gets no more credit.
    pub disk_share_percent: u64,
    /// Percent of the cache that are free when `status` warns,
    pub warn_percent: u64,
    /// those who take most get less,
    pub shrink_percent: u64,
    /// those who take most get nothing more,
    pub throttle_percent: u64,
    /// nobody gets anything more.
    pub protect_percent: u64,
    /// Space that is kept back in the state folder, so that a full file system can be left again.
    #[serde(deserialize_with = "units::size")]
    pub reserve: u64,
    /// Memory for batches that are cached and wait for the link; older ones are read back.
    #[serde(deserialize_with = "units::size")]
    pub memory_max: u64,
}

impl Default for Cache {
    fn default() -> Self {
        Self {
            size_max: 64 << 30,
            segment: 64 << 20,
            disk_share_percent: 50,
            warn_percent: 30,
            shrink_percent: 25,
            throttle_percent: 20,
            protect_percent: 10,
            reserve: 32 << 20,
            memory_max: 128 << 20,
        }
    }
}

/// `[forward]`
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Forward {
    /// Host name or IP address of the master target, and port.
    pub master_target: String,
    /// Largest UDP payload the path may carry; path MTU discovery finds the real one below it.
    #[serde(default = "default_mtu")]
    pub mtu: u16,
    /// Bytes in flight on the link: at least bandwidth times round trip.
    #[serde(default = "default_window", deserialize_with = "units::size")]
    pub window: u64,
}

/// UDP payload of a 1500-byte link.
pub(super) fn default_mtu() -> u16 {
    1452
}

fn default_window() -> u64 {
    16 << 20
}

/// `[[machine]]`
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Machine {
    /// Its name, as in its certificate.
    pub name: Name,
    /// Its disks.
    pub disks: Vec<Name>,
    /// How old its newest point may be: when the cache fills, those who can wait longest wait first.
    #[serde(default = "default_rpo_target", deserialize_with = "units::duration")]
    pub rpo_target: Duration,
    /// Most of the cache that each of its disks may fill; by `cache.disk_share_percent` when absent.
    #[serde(default, deserialize_with = "units::size_option")]
    pub quota: Option<u64>,
}

fn default_rpo_target() -> Duration {
    Duration::from_secs(300)
}

impl Machine {
    /// Its id.
    pub fn id(&self) -> MachineId {
        MachineId::from_name(&self.name)
    }

    /// Ids and names of its disks.
    pub fn disk_ids(&self) -> impl Iterator<Item = (DiskId, &Name)> {
        self.disks.iter().map(|d| (DiskId::from_names(&self.name, d), d))
    }
}

impl Settings for ProcessServerSettings {
    fn check(&self) -> Result<(), String> {
        let cache = &self.cache;
        in_range("ingest.memory_max", self.ingest.memory_max, 4 * limits::DISK_WINDOW_BYTES_MIN, 1 << 40)?;
        in_range("ingest.connections_max", self.ingest.connections_max, 1, 65536)?;
        in_range("optimize.workers", self.optimize.workers, 0, 256)?;
        in_range("optimize.batch_age in seconds", self.optimize.batch_age.as_secs_f64(), 0.001, 10.0)?;
        in_range("cache.segment", self.cache.segment, 4 << 20, 1 << 30)?;
        in_range("cache.size_max", self.cache.size_max, 4 * self.cache.segment, 1 << 50)?;
        in_range("cache.disk_share_percent", self.cache.disk_share_percent, 1, 100)?;
        let levels = [cache.protect_percent, cache.throttle_percent, cache.shrink_percent, cache.warn_percent];
        if !levels.is_sorted_by(|a, b| a < b) || levels[3] > 90 || levels[0] == 0 {
            return Err("cache: protect_percent < throttle_percent < shrink_percent < warn_percent, from 1 to 90".to_owned());
        }
        in_range("cache.reserve", cache.reserve, 0, 1 << 40)?;
        in_range("forward.mtu", self.forward.mtu, 1200, 65000)?;
        in_range("forward.window", self.forward.window, 1 << 20, 4 << 30)?;
        if !self.cache.segment.is_multiple_of(4096) {
            return Err("cache.segment must be a multiple of 4096".to_owned());
        }
        for (index, machine) in self.machine.iter().enumerate() {
            if self.machine[..index].iter().any(|m| m.name == machine.name) {
                return Err(format!("machine {} is listed twice", machine.name));
            }
            in_range("machine.rpo_target in seconds", machine.rpo_target.as_secs_f64(), 1.0, 7.0 * 86400.0)?;
            in_range("machine.quota", machine.quota.unwrap_or(self.cache.segment), self.cache.segment, 1 << 50)?;
        }
        if let Some(coordinator) = &self.coordinator {
            coordinator.check()?;
            if coordinator.control.listen == self.control.listen {
                return Err("[coordinator.control] listen must be another socket than the process server's".to_owned());
            }
            if coordinator.state == self.state {
                return Err("[coordinator] state must be another folder than the process server's".to_owned());
            }
            if coordinator.metrics.listen.is_some() {
                return Err("[coordinator.metrics] is not needed: the process server's [metrics] shows both".to_owned());
            }
        }
        self.control.check()
    }
}
