//! `tidegate recover`.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::bail;
use indicatif::{ProgressBar, ProgressStyle};

use super::{Ask, absolute, ask, group_point, output};
use crate::config::units::show_size;
use crate::control::api::{RecoveryView, Request};
use crate::control::client;
use crate::disk::Format;
use crate::model::Address;

/// Bring points back. Ask the master target.
#[derive(clap::Subcommand)]
pub(super) enum RecoverCommand {
    /// Serve a disk of a point as a block device over NBD until interrupted; replication goes on. What is written to it goes to
    /// scratch space and is gone when it ends; the point stays as it is.
    #[command(
        after_help = "Example:\n  tidegate recover mount latest --disk sda --nbd unix:/tmp/point.sock\n  nbdinfo 'nbd+unix:///?socket=/tmp/point.sock'"
    )]
    Mount {
        /// Id of the point, the beginning of it, a label, or `latest`.
        point: String,
        /// Of which machine; needed for the point of a group.
        #[arg(long)]
        machine: Option<String>,
        /// Where: unix:PATH or tcp:ADDRESS:PORT.
        #[arg(long)]
        nbd: Address,
        /// Name of the disk; needed when the machine has several.
        #[arg(long)]
        disk: Option<String>,
        /// Refuse writes.
        #[arg(long)]
        read_only: bool,
        /// Leave it mounted and return. It ends with `recover unmount`, or with the master target.
        #[arg(long)]
        detach: bool,
        #[command(flatten)]
        ask: Ask,
    },
    /// Write a disk of a point to an image file. If it fails or the master target ends, the same command again goes on from
    /// where it was, except in format vmdk-stream.
    #[command(
        after_help = "Example:\n  tidegate recover export latest --disk sda --format vhdx --output /srv/web01-sda.vhdx\n  tidegate recover unmount export-1      # give it up, with what it wrote"
    )]
    Export {
        /// As in `mount`.
        point: String,
        /// As in `mount`.
        #[arg(long)]
        machine: Option<String>,
        /// As in `mount`.
        #[arg(long)]
        disk: Option<String>,
        /// raw, vhdx, vhdx-fixed, vmdk, vmdk-flat, vmfs or vmdk-stream (for ESXi) [default: by the ending of the output: raw,
        /// img, vhdx or vmdk].
        #[arg(long)]
        format: Option<Format>,
        /// File on the master target's host; must not exist.
        #[arg(long)]
        output: PathBuf,
        #[command(flatten)]
        ask: Ask,
    },
    /// Mounts and exports.
    List(Ask),
    /// End a mount; end an export and remove what it wrote, or forget one that is done.
    Unmount {
        /// Its name, see `recover list`.
        name: String,
        #[command(flatten)]
        ask: Ask,
    },
}

/// Runs the command.
pub(super) fn run(command: RecoverCommand) -> anyhow::Result<()> {
    match command {
        RecoverCommand::Mount { point, machine, nbd, disk, read_only, detach, ask: args } => {
            let point = group_point::of_machine(point, machine.as_deref(), &args)?;
            mount(point, nbd, disk, read_only, detach, &args)
        }
        RecoverCommand::Export { point, machine, disk, format, output, ask: args } => {
            let point = group_point::of_machine(point, machine.as_deref(), &args)?;
            export(point, disk, format.map_or_else(|| by_ending(&output), Ok)?, output, &args)
        }
        RecoverCommand::List(args) => {
            let all: Vec<RecoveryView> = ask(&args.control, &Request::Recoveries)?;
            if args.json {
                return output::json(&all);
            }
            let row = |v: &RecoveryView| {
                let progress =
                    if v.kind == "mount" { "-".to_owned() } else { format!("{} of {}", show_size(v.done_bytes), show_size(v.total_bytes)) };
                vec![
                    v.name.clone(),
                    v.kind.clone(),
                    v.disk.clone(),
                    v.point.clone(),
                    v.state.clone(),
                    progress,
                    v.target.clone(),
                    v.error.clone().unwrap_or_default(),
                ]
            };
            output::table(
                &["NAME", "KIND", "DISK", "POINT", "STATE", "PROGRESS", "TARGET", "ERROR"],
                &all.iter().map(row).collect::<Vec<_>>(),
            );
            Ok(())
        }
        RecoverCommand::Unmount { name, ask: args } => {
            let () = ask(&args.control, &Request::Unmount { name: name.clone() })?;
            if args.json {
                output::json(&serde_json::json!({ "unmounted": name }))
            } else {
                println!("{name} ended");
                Ok(())
            }
        }
    }
}

fn by_ending(output: &std::path::Path) -> anyhow::Result<Format> {
    match output.extension().and_then(|e| e.to_str()).unwrap_or_default() {
        "raw" | "img" => Ok(Format::Raw),
        "vhdx" => Ok(Format::Vhdx),
        "vmdk" => Ok(Format::Vmdk),
        _ => Err(super::Usage(format!("cannot tell the format from the name {}: give --format", output.display())).into()),
    }
}

fn mount(point: String, nbd: Address, disk: Option<String>, read_only: bool, detach: bool, args: &Ask) -> anyhow::Result<()> {
    let nbd = match nbd {
        Address::Unix(path) => Address::Unix(absolute(&path)?),
        tcp @ Address::Tcp(_) => tcp,
    };
    let view: RecoveryView = ask(&args.control, &Request::Mount { point, disk, nbd: nbd.clone(), read_only })?;
    if args.json {
        output::json(&view)?;
    } else {
        let uri = nbd.nbd_uri();
        let how = if view.writable { "writes go to scratch space" } else { "read-only" };
        println!("{} of {} is at {uri} ({how}), name {}", view.point, view.disk, view.name);
    }
    if detach {
        if !args.json {
            println!("it stays until `tidegate recover unmount {}`, or a restart of the master target", view.name);
        }
        return Ok(());
    }
    if !args.json {
        println!("press Ctrl-C to unmount");
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
        loop {
            tokio::select! {
                _ = tokio::signal::ctrl_c() => break,
                _ = terminate.recv() => break,
                () = tokio::time::sleep(Duration::from_secs(1)) => {}
            }
            let all: Vec<RecoveryView> = client::call(&args.control, &Request::Recoveries).await?;
            if !all.iter().any(|v| v.name == view.name) {
                return Ok(());
            }
        }
        client::call::<()>(&args.control, &Request::Unmount { name: view.name }).await.map_err(anyhow::Error::from)
    })
}

fn export(point: String, disk: Option<String>, format: Format, file: PathBuf, args: &Ask) -> anyhow::Result<()> {
    let file = absolute(&file)?.display().to_string();
    let mut view: RecoveryView = ask(&args.control, &Request::Export { point, disk, format: format.as_str().to_owned(), output: file })?;
    let bar = if args.json || !std::io::stderr().is_terminal() { ProgressBar::hidden() } else { ProgressBar::new(view.total_bytes) };
    let style = ProgressStyle::with_template("{bar:40} {binary_bytes} of {binary_total_bytes}, {binary_bytes_per_sec}, {eta} left")?;
    bar.set_style(style);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        while view.state == "running" {
            tokio::time::sleep(Duration::from_millis(50)).await;
            let all: Vec<RecoveryView> = client::call(&args.control, &Request::Recoveries).await?;
            let Some(now) = all.into_iter().find(|v| v.name == view.name) else { bail!("the export was ended by somebody") };
            if view.resumed_bytes == 0 && now.resumed_bytes > 0 {
                bar.suspend(|| eprintln!("resumed at {}%", now.resumed_bytes * 100 / now.total_bytes.max(1)));
            }
            bar.set_position(now.done_bytes);
            view = now;
        }
        Ok(())
    })?;
    bar.finish_and_clear();
    if let Some(error) = &view.error {
        if view.done_bytes == 0 {
            bail!("export failed before anything was written: {error}");
        }
        bail!(
            "export failed: {error}; the same command again goes on from what was safe on disk, `tidegate recover unmount {}` gives it up",
            view.name
        );
    }
    if args.json {
        return output::json(&view);
    }
    println!("{} of {} written to {} ({})", view.point, view.disk, view.target, show_size(view.total_bytes));
    Ok(())
}
