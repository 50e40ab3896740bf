//! `tidegate check`: the servers' own code, read-only.

use std::path::{Path, PathBuf};

use super::Usage;
use crate::config::agent::AgentSettings;
use crate::config::coordinator::CoordinatorSettings;
use crate::config::master_target::MasterTargetSettings;
use crate::config::process_server::ProcessServerSettings;
use crate::config::units::show_size;
use crate::config::{self, ConfigError};
use crate::disk::{Format, check};
use crate::storage::uring::{self, Uring};

/// Checks.
#[derive(clap::Subcommand)]
pub(super) enum CheckCommand {
    /// Parse and check a configuration exactly as the server does.
    #[command(after_help = "Example:\n  tidegate check config /etc/tidegate/agent.toml")]
    Config {
        /// The file.
        file: PathBuf,
        /// agent, process-server, master-target or coordinator; default: by the file's name.
        #[arg(long)]
        role: Option<String>,
    },
    /// Check a disk image (VHDX, VMDK, raw) as a whole, listing every fault; exit code 1 if there is any.
    #[command(
        after_help = "Examples:\n  tidegate check image /srv/web01-sda.vhdx\n  tidegate check image web01.vmdk --content web01.raw --json"
    )]
    Image {
        /// The image; of several files, the one that names the others.
        file: PathBuf,
        /// Format of the image; default: by its name and first bytes.
        #[arg(long)]
        format: Option<Format>,
        /// Also compare the content with this raw file.
        #[arg(long, value_name = "RAW")]
        content: Option<PathBuf>,
        /// Print JSON instead of text.
        #[arg(long)]
        json: bool,
    },
}

/// Runs the check.
pub(super) fn run(command: &CheckCommand) -> anyhow::Result<()> {
    match command {
        CheckCommand::Config { file, role } => check_config(file, role.as_deref()),
        CheckCommand::Image { file, format, content, json } => check_image(file, *format, content.as_deref(), *json),
    }
}

/// A longer file is no descriptor of a VMDK.
const DESCRIPTOR_MAX: u64 = crate::disk::vmdk::descriptor::DESCRIPTOR_MAX as u64;

fn check_image(file: &Path, format: Option<Format>, content: Option<&Path>, json: bool) -> anyhow::Result<()> {
    if let Some(missing) = [Some(file), content].into_iter().flatten().find(|f| !f.exists()) {
        return Err(Usage(format!("there is no file {}", missing.display())).into());
    }
    for named in [Some(file), content].into_iter().flatten() {
        let kind = std::fs::metadata(named)?.file_type();
        if !kind.is_file() && !std::os::unix::fs::FileTypeExt::is_block_device(&kind) {
            return Err(Usage(format!("{} is neither a file nor a block device", named.display())).into());
        }
    }
    let flat = file.file_name().and_then(|n| n.to_str()).and_then(|n| n.strip_suffix("-flat.vmdk"));
    let described = || std::fs::read(file).is_ok_and(|bytes| bytes.starts_with(b"# Disk DescriptorFile"));
    if let (None, Some(name)) = (format, flat)
        && (std::fs::metadata(file)?.len() > DESCRIPTOR_MAX || !described())
    {
        return Err(Usage(format!(
            "{} holds the bytes of a flat VMDK: check its descriptor {name}.vmdk instead, or say --format raw",
            file.display()
        ))
        .into());
    }
    let (format, report) = uring::run(async {
        let storage = Uring::direct();
        let format = match format {
            Some(format) => format,
            None => check::guess(&storage, file).await?,
        };
        anyhow::Ok((format, check::image(&storage, file, format, content).await?))
    })??;
    if json {
        super::output::json(&report)?;
    } else {
        for (kind, found) in [("note", &report.notes), ("FAULT", &report.faults)] {
            for finding in found {
                println!("{kind}: {} at byte {}: {}", finding.file, finding.offset, finding.what);
            }
        }
        let size = report.size.map_or_else(|| "unknown size".to_owned(), show_size);
        let compared = if content.is_some() { format!(", {} compared", show_size(report.compared_bytes)) } else { String::new() };
        println!("{}: {}, {size}, {} blocks with data{compared}", file.display(), format.as_str(), report.blocks);
    }
    match report.fault_count {
        0 => Ok(()),
        1 => anyhow::bail!("{} has a fault", file.display()),
        n => anyhow::bail!("{} has {n} faults", file.display()),
    }
}

fn check_config(file: &Path, role: Option<&str>) -> anyhow::Result<()> {
    let stem = file.file_stem().and_then(|s| s.to_str()).unwrap_or_default().to_owned();
    if !file.exists() {
        return Err(Usage(format!("there is no file {}", file.display())).into());
    }
    let role = role.map_or(stem, ToOwned::to_owned);
    let checked = match role.as_str() {
        "agent" => config::load::<AgentSettings>(file).map(|_| ()),
        "process-server" => config::load::<ProcessServerSettings>(file).map(|_| ()),
        "master-target" => config::load::<MasterTargetSettings>(file).map(|_| ()),
        "coordinator" => config::load::<CoordinatorSettings>(file).map(|_| ()),
        other => {
            return Err(Usage(format!(
                "cannot tell the role from {other:?}: give --role agent, process-server, master-target or coordinator"
            ))
            .into());
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
