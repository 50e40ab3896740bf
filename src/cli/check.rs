//! `tidegate check`: the servers' own code, read-only.

use std::path::{Path, PathBuf};

use super::Usage;
use crate::config::agent::AgentSettings;
use crate::config::master_target::MasterTargetSettings;
use crate::config::process_server::ProcessServerSettings;
use crate::config::{self, ConfigError};

/// Checks.
#[derive(clap::Subcommand)]
pub(super) enum CheckCommand {
    /// Parse and check a configuration exactly as the server does.
    #[command(after_help = "Example:\n  tidegate check config /etc/tidegate/agent.toml")]
    Config {
        /// The file.
        file: PathBuf,
        /// agent, process-server or master-target; default: by the file's name.
        #[arg(long)]
        role: Option<String>,
    },
}

/// Runs the check.
pub(super) fn run(command: &CheckCommand) -> anyhow::Result<()> {
    let CheckCommand::Config { file, role } = command;
    let stem = file.file_stem().and_then(|s| s.to_str()).unwrap_or_default().to_owned();
    if !file.exists() {
        return Err(Usage(format!("there is no file {}", file.display())).into());
    }
    let role = role.clone().unwrap_or(stem);
    let checked = match role.as_str() {
        "agent" => config::load::<AgentSettings>(file).map(|_| ()),
        "process-server" => config::load::<ProcessServerSettings>(file).map(|_| ()),
        "master-target" => config::load::<MasterTargetSettings>(file).map(|_| ()),
        other => {
            return Err(Usage(format!("cannot tell the role from {other:?}: give --role agent, process-server or master-target")).into());
        }
    };
    checked?;
    println!("{} is a good {role} configuration", file.display());
    Ok(())
}

/// Loads a configuration for a server; a mistake in it is exit code 2.
pub(super) fn load<T: config::Settings>(file: &Path) -> anyhow::Result<T> {
    config::load(file).map_err(|e: ConfigError| Usage(e.to_string()).into())
}
