//! `tidegate pki`: a CA and certificates for every role.

use std::path::PathBuf;

use super::{Usage, output};
use crate::crypto::pki::{self, Identity, LEAF_DAYS};

/// Certificates.
#[derive(clap::Subcommand)]
pub(super) enum PkiCommand {
    /// Make a new CA: ca.pem for everybody, ca.key for this folder only.
    Init {
        /// Folder of the CA.
        dir: PathBuf,
    },
    /// Issue a certificate: cert.pem, key.pem and ca.pem.
    #[command(after_help = "Example:\n  tidegate pki issue --ca ./ca --role process-server --name gw1 --out ./gw1")]
    Issue {
        /// Folder of the CA.
        #[arg(long, default_value = ".")]
        ca: PathBuf,
        /// agent, process-server, master-target, coordinator or admin.
        #[arg(long)]
        role: String,
        /// Name of the holder; for an agent the machine's.
        #[arg(long)]
        name: String,
        /// Folder for the files.
        #[arg(long)]
        out: PathBuf,
    },
    /// Show whom a certificate names and how long it is valid.
    Show {
        /// PEM file.
        file: PathBuf,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
}

/// Runs the command.
pub(super) fn run(command: PkiCommand) -> anyhow::Result<()> {
    match command {
        PkiCommand::Init { dir } => {
            pki::init(&dir)?;
            println!(
                "CA made in {}. Keep ca.key there and away from the servers; issue certificates with `tidegate pki issue --ca {}`.",
                dir.display(),
                dir.display()
            );
        }
        PkiCommand::Issue { ca, role, name, out } => {
            let identity = Identity {
                role: role.parse().map_err(|e: pki::PkiError| Usage(e.to_string()))?,
                name: name.parse().map_err(|e: crate::model::NameError| Usage(e.to_string()))?,
            };
            pki::issue(&ca, &identity, &out)?;
            println!("{identity} issued for {LEAF_DAYS} days into {} (cert.pem, key.pem, ca.pem)", out.display());
        }
        PkiCommand::Show { file, json } => {
            let shown = pki::describe(&file)?;
            if json {
                return output::json(&shown);
            }
            let days = shown.expires_in_seconds / 86400;
            let state = if shown.expires_in_seconds < 0 { "EXPIRED".to_owned() } else { format!("{days} days left") };
            println!(
                "identity    {}",
                shown.identity.as_deref().unwrap_or(if shown.is_ca { "(certificate authority)" } else { "(none of ours)" })
            );
            println!("valid       {} to {} ({state})", shown.not_before, shown.not_after);
            println!("serial      {}", shown.serial);
        }
    }
    Ok(())
}
