//! `coordinator.toml`, and `[coordinator]` of a process server.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;

use super::{Control, Metrics, Settings, in_range, units};
use crate::crypto::tls::TlsFiles;

/// Settings of a coordinator.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CoordinatorSettings {
    /// Folder for the catalogue of groups.
    pub state: PathBuf,
    /// Certificates, of role coordinator.
    pub tls: TlsFiles,
    /// Members and rounds.
    #[serde(default)]
    pub consistency: Consistency,
    /// Command line.
    #[serde(default)]
    pub control: Control,
    /// Prometheus.
    #[serde(default)]
    pub metrics: Metrics,
}

/// `[consistency]`
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Consistency {
    /// Where agents connect.
    pub listen: SocketAddr,
    /// Agents connected at once.
    pub connections_max: usize,
    /// Longest time a member is asked to hold its writes; each has a limit of its own beside.
    #[serde(deserialize_with = "units::duration")]
    pub hold_max: Duration,
    /// Longest wait for the hooks of all members before an application-consistent point.
    #[serde(deserialize_with = "units::duration")]
    pub freeze_max: Duration,
    /// Shortest time between two rounds of a group; not shorter than `consistency.rest_min` of the agents.
    #[serde(deserialize_with = "units::duration")]
    pub rest_min: Duration,
}

impl Default for Consistency {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([0, 0, 0, 0], 20004)),
            connections_max: 1024,
            hold_max: Duration::from_millis(200),
            freeze_max: Duration::from_secs(10),
            rest_min: Duration::from_millis(600),
        }
    }
}

impl Settings for CoordinatorSettings {
    fn check(&self) -> Result<(), String> {
        in_range("consistency.connections_max", self.consistency.connections_max, 1, 65536)?;
        in_range("consistency.hold_max in seconds", self.consistency.hold_max.as_secs_f64(), 0.004, 2.0)?;
        in_range("consistency.freeze_max in seconds", self.consistency.freeze_max.as_secs_f64(), 0.1, 60.0)?;
        in_range("consistency.rest_min in seconds", self.consistency.rest_min.as_secs_f64(), 0.05, 3600.0)?;
        self.control.check()
    }
}
