//! `tidegate machine` and `tidegate disk`.

use std::io::IsTerminal;
use std::time::Duration;

use anyhow::bail;
use indicatif::{ProgressBar, ProgressStyle};

use super::{Ask, ask, output};
use crate::config::units::show_size;
use crate::control::api::{DiskView, MachineView, Request, RoleStatus, ScrubView, Verifying};

/// Machines.
#[derive(clap::Subcommand)]
pub(super) enum MachineCommand {
    /// All machines the server knows.
    List(Ask),
    /// Let a machine that was handed over in a planned failover run here again. Ask its agent.
    #[command(after_help = "Example:\n  tidegate machine resume web01 --control unix:/run/tidegate/agent.sock")]
    Resume {
        /// Its name.
        machine: String,
        #[command(flatten)]
        ask: Ask,
    },
    /// One machine with its disks.
    Show {
        /// Its name.
        machine: String,
        #[command(flatten)]
        ask: Ask,
    },
}

/// Disks.
#[derive(clap::Subcommand)]
pub(super) enum DiskCommand {
    /// All disks the server knows.
    List(Ask),
    /// Compare a disk with its replica, by digests of 64 KiB blocks, while replication goes on. Ask its agent.
    #[command(
        after_help = "Example:\n  tidegate disk verify web01/sda --control unix:/run/tidegate/agent.sock\n\nWhat differs is sent again, and the points that have it leave the list. Exit code 1: something differed."
    )]
    Verify {
        /// MACHINE/DISK, or the name of the disk.
        disk: String,
        /// Only tell how far the comparison is that is under way, or how the last one ended.
        #[arg(long)]
        show: bool,
        #[command(flatten)]
        ask: Ask,
    },
    /// One disk with its positions.
    Show {
        /// MACHINE/DISK, or an id.
        disk: String,
        #[command(flatten)]
        ask: Ask,
    },
}

/// Runs `machine`.
pub(super) fn machine(command: MachineCommand) -> anyhow::Result<()> {
    match command {
        MachineCommand::List(args) => {
            let machines = machines(&args)?;
            if args.json {
                return output::json(&machines);
            }
            let rows: Vec<_> = machines
                .iter()
                .map(|m| {
                    vec![
                        m.name.clone(),
                        m.health.as_str().to_owned(),
                        output::seconds(m.rpo_seconds),
                        m.disks.len().to_string(),
                        output::count(m.points),
                        m.newest_point.clone().unwrap_or_else(|| "-".to_owned()),
                    ]
                })
                .collect();
            output::table(&["MACHINE", "HEALTH", "RPO", "DISKS", "POINTS", "NEWEST"], &rows);
            Ok(())
        }
        MachineCommand::Resume { machine, ask: args } => {
            ask::<()>(&args.control, &Request::Resume { machine: machine.clone() })?;
            println!("the disks of {machine} take writes again: make sure that it runs nowhere else");
            Ok(())
        }
        MachineCommand::Show { machine, ask } => {
            let all = machines(&ask)?;
            let Some(found) = all.iter().find(|m| m.name == machine || m.id == machine) else {
                bail!("machine {machine} is not known to this server: see `tidegate machine list`");
            };
            if ask.json {
                return output::json(found);
            }
            println!("machine {} ({})", found.name, found.id);
            println!("health  {}", found.health.as_str());
            println!("rpo     {}", output::seconds(found.rpo_seconds));
            println!(
                "points  {}, {} to {}",
                output::count(found.points),
                found.oldest_point.as_deref().unwrap_or("-"),
                found.newest_point.as_deref().unwrap_or("-")
            );
            print_disks(&[found]);
            Ok(())
        }
    }
}

/// Runs `disk`.
pub(super) fn disk(command: DiskCommand) -> anyhow::Result<()> {
    match command {
        DiskCommand::List(args) => {
            let machines = machines(&args)?;
            if args.json {
                let disks: Vec<_> =
                    machines.iter().flat_map(|m| m.disks.iter().map(|d| serde_json::json!({ "machine": m.name, "disk": d }))).collect();
                return output::json(&disks);
            }
            print_disks(&machines.iter().collect::<Vec<_>>());
            Ok(())
        }
        DiskCommand::Verify { disk, show, ask } => verify(disk, show, &ask),
        DiskCommand::Show { disk, ask } => {
            let machines = machines(&ask)?;
            let mut all = machines.iter().flat_map(|m| m.disks.iter().map(move |d| (m, d)));
            let Some((machine, found)) = all.find(|(m, d)| format!("{}/{}", m.name, d.name) == disk || d.id == disk) else {
                bail!("disk {disk} is not known to this server: write MACHINE/DISK, see `tidegate disk list`");
            };
            if ask.json {
                return output::json(found);
            }
            show(machine, found);
            Ok(())
        }
    }
}

fn verify(disk: String, show: bool, args: &Ask) -> anyhow::Result<()> {
    let mut view: ScrubView =
        ask(&args.control, &Request::VerifyDisk { disk: disk.clone(), what: if show { Verifying::Any } else { Verifying::Begin } })?;
    let bar = if args.json || !std::io::stderr().is_terminal() { ProgressBar::hidden() } else { ProgressBar::new(view.total_bytes) };
    bar.set_style(ProgressStyle::with_template(
        "{bar:40} {binary_bytes} of {binary_total_bytes}, {binary_bytes_per_sec}, {eta} left {msg}",
    )?);
    while view.running && !show {
        std::thread::sleep(Duration::from_millis(200));
        view = ask(&args.control, &Request::VerifyDisk { disk: disk.clone(), what: Verifying::Asked })?;
        bar.set_position(view.done_bytes);
        bar.set_message(view.waits.clone().unwrap_or_default());
    }
    bar.finish_and_clear();
    if !show && view.done_bytes < view.total_bytes {
        bail!("the comparison ended before it was done: its agent was restarted. Begin it again");
    }
    if args.json {
        output::json(&view)?;
    } else {
        println!("disk      {}", view.disk);
        println!("compared  {} of {} in {:.1} s", show_size(view.done_bytes), show_size(view.total_bytes), view.seconds);
        println!("differing {}", show_size(view.differing_bytes));
        let differed = view.last_differing_bytes.map_or_else(String::new, |bytes| format!(", {} differed", show_size(bytes)));
        println!("last      {}{differed}", output::ago(view.last_age_seconds));
    }
    if view.unread_bytes > 0 {
        bail!("{} of {} cannot be read and were not compared: check the storage of the source", show_size(view.unread_bytes), view.disk);
    }
    if view.differing_bytes > 0 {
        bail!(
            "{} of {} differed: they are sent again; check the storage of both, and see `tidegate point list --bad` at the master target",
            show_size(view.differing_bytes),
            view.disk
        );
    }
    Ok(())
}

fn machines(args: &Ask) -> anyhow::Result<Vec<MachineView>> {
    let status: Vec<RoleStatus> = ask(&args.control, &Request::Status)?;
    // Where several roles share a process, the master target knows most.
    let best = status.iter().find(|r| r.role == "master-target").or(status.first());
    Ok(best.map(|r| r.machines.clone()).unwrap_or_default())
}

fn print_disks(machines: &[&MachineView]) {
    let rows: Vec<_> = machines
        .iter()
        .flat_map(|m| m.disks.iter().map(move |d| (*m, d)))
        .map(|(m, d)| {
            vec![
                format!("{}/{}", m.name, d.name),
                d.state.clone(),
                d.health.as_str().to_owned(),
                d.size_bytes.map_or_else(|| "-".to_owned(), show_size),
                output::seconds(d.rpo_seconds),
                show_size(d.missing_bytes),
                d.reason.clone().unwrap_or_default(),
            ]
        })
        .collect();
    output::table(&["DISK", "STATE", "HEALTH", "SIZE", "RPO", "MISSING", "REASON"], &rows);
}

fn show(machine: &MachineView, disk: &DiskView) {
    println!("disk      {}/{} ({})", machine.name, disk.name, disk.id);
    println!("state     {}", disk.state);
    println!("health    {}", disk.health.as_str());
    for (what, text) in [("reason", &disk.reason), ("do", &disk.remedy)] {
        if let Some(text) = text {
            println!("{what:<9} {text}");
        }
    }
    println!("size      {}", disk.size_bytes.map_or_else(|| "-".to_owned(), show_size));
    if let (Some(format), Some(path)) = (&disk.replica_format, &disk.replica_path) {
        println!("replica   {path} ({format})");
    }
    println!("rpo       {}", output::seconds(disk.rpo_seconds));
    println!("missing   {}", show_size(disk.missing_bytes));
    println!("backlog   {}", show_size(disk.backlog_bytes));
    println!("waiting   {}", show_size(disk.waiting_bytes));
    println!("retained  {}", show_size(disk.retained_bytes));
    for (rung, position) in &disk.positions {
        println!("  {rung:<13} {position}");
    }
}
