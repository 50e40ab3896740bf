//! Configuration: the file as typed becomes settings as meant. `check config` runs exactly this.

pub mod agent;
pub mod coordinator;
pub mod limits;
pub mod master_target;
pub mod process_server;
pub mod units;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::DeserializeOwned;
use thiserror::Error;

use crate::model::Address;

/// Largest configuration file, in bytes.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// Why a configuration is refused.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read configuration {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It is larger than any configuration.
    #[error("configuration {0} is larger than 1 MiB")]
    TooLarge(PathBuf),
    /// It does not parse, or a key is unknown or has the wrong kind of value.
    #[error("configuration {path}: {message}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// Place and reason, with the nearest known key.
        message: String,
    },
    /// It parses but cannot be meant.
    #[error("configuration {path}: {message}")]
    Meaning {
        /// The file.
        path: PathBuf,
        /// What, and what to write instead.
        message: String,
    },
}

/// A role's configuration.
pub trait Settings: DeserializeOwned {
    /// Checks what the types cannot.
    ///
    /// # Errors
    /// A sentence that names the key.
    fn check(&self) -> Result<(), String>;
}

/// Reads, parses and checks a configuration file.
///
/// # Errors
/// [`ConfigError`], naming file, place and remedy.
pub fn load<T: Settings>(path: &Path) -> Result<T, ConfigError> {
    let read = |source| ConfigError::Read { path: path.to_owned(), source };
    if std::fs::metadata(path).map_err(read)?.len() > FILE_BYTES_MAX {
        return Err(ConfigError::TooLarge(path.to_owned()));
    }
    let text = std::fs::read_to_string(path).map_err(read)?;
    parse(path, &text)
}

/// As [`load`], from text. `path` is for messages.
///
/// # Errors
/// [`ConfigError::Parse`], [`ConfigError::Meaning`].
pub fn parse<T: Settings>(path: &Path, text: &str) -> Result<T, ConfigError> {
    let settings: T =
        toml::from_str(text).map_err(|e| ConfigError::Parse { path: path.to_owned(), message: with_nearest_key(&e.to_string()) })?;
    settings.check().map_err(|message| ConfigError::Meaning { path: path.to_owned(), message })?;
    Ok(settings)
}

/// Adds `did you mean` to serde's message about an unknown key.
fn with_nearest_key(message: &str) -> String {
    let quoted: Vec<&str> =
        message.split_once("unknown field").map(|(_, rest)| rest.split('`').skip(1).step_by(2).collect()).unwrap_or_default();
    let [typed, known @ ..] = &quoted[..] else { return message.trim_end().to_owned() };
    let near = known.iter().min_by_key(|k| strsim::damerau_levenshtein(k, typed));
    match near.filter(|k| strsim::damerau_levenshtein(k, typed) <= 4) {
        Some(key) => format!("{}\ndid you mean `{key}`?", message.trim_end()),
        None => message.trim_end().to_owned(),
    }
}

/// `[control]`: where the role answers the command line.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Control {
    /// A unix socket.
    pub listen: Address,
}

impl Default for Control {
    fn default() -> Self {
        Self { listen: Address::Unix("/run/tidegate/control.sock".into()) }
    }
}

impl Control {
    fn check(&self) -> Result<(), String> {
        match self.listen {
            Address::Unix(_) => Ok(()),
            Address::Tcp(_) => Err("[control] listen must be a unix socket: control over TCP is not available in this version".to_owned()),
        }
    }
}

/// `[metrics]`: where Prometheus scrapes.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Metrics {
    /// TCP address; no metrics listener when absent.
    pub listen: Option<SocketAddr>,
}

/// A secret by reference: `file:/path`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct SecretRef(pub PathBuf);

impl TryFrom<String> for SecretRef {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        match text.split_once(':') {
            Some(("file", path)) if !path.is_empty() => Ok(Self(path.into())),
            Some(("credential", name)) if !name.is_empty() && !name.contains('/') => {
                let dir = std::env::var_os("CREDENTIALS_DIRECTORY")
                    .ok_or("credential: needs systemd's CREDENTIALS_DIRECTORY, which is not set")?;
                Ok(Self(PathBuf::from(dir).join(name)))
            }
            _ => Err("a secret is a reference, never a value: write \"file:/path/to/key\" or \"credential:NAME\"".to_owned()),
        }
    }
}

/// `[keys]`: what wraps the data keys at rest.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Keys {
    /// Reference to 32 random bytes; default: `kek` in the state folder, made at first start.
    pub kek: Option<SecretRef>,
}

impl Keys {
    /// Path of the key file, and whether it may be made.
    pub fn path(&self, state: &Path) -> (PathBuf, bool) {
        match &self.kek {
            Some(SecretRef(path)) => (path.clone(), false),
            None => (state.join("kek"), true),
        }
    }
}

fn in_range<T: PartialOrd + std::fmt::Display + Copy>(key: &str, value: T, low: T, high: T) -> Result<(), String> {
    if value >= low && value <= high { Ok(()) } else { Err(format!("{key} is {value}, it must be between {low} and {high}")) }
}
