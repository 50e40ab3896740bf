//! `tidegate point`.

use anyhow::bail;

use super::{Ask, ask, output};
use crate::config::units::show_size;
use crate::control::api::{Marked, PointView, Request};

/// Recovery points.
#[derive(clap::Subcommand)]
pub(super) enum PointCommand {
    /// Listed points, the oldest first. Ask the master target.
    List {
        /// Of one machine only.
        #[arg(long)]
        machine: Option<String>,
        #[command(flatten)]
        ask: Ask,
    },
    /// One point. Ask the master target.
    Show {
        /// Its id, or the beginning of it.
        point: String,
        #[command(flatten)]
        ask: Ask,
    },
    /// Keep a point whatever the policy says, until it is unpinned. Ask the master target.
    Pin {
        /// Its id, the beginning of it, or `latest`.
        point: String,
        #[command(flatten)]
        ask: Ask,
    },
    /// Leave a point to the policy again. Ask the master target.
    Unpin {
        /// Its id, or the beginning of it.
        point: String,
        #[command(flatten)]
        ask: Ask,
    },
    /// Make a crash-consistent point now. Ask the agent of the machine.
    Mark {
        /// Of which machine.
        #[arg(long)]
        machine: String,
        /// What to call it.
        #[arg(long)]
        label: Option<String>,
        /// Application-consistent.
        #[arg(long)]
        app: bool,
        #[command(flatten)]
        ask: Ask,
    },
}

fn pin(point: String, pinned: bool, args: &Ask) -> anyhow::Result<()> {
    let view: PointView = ask(&args.control, &Request::Pin { point, pinned })?;
    if args.json {
        return output::json(&view);
    }
    println!(
        "point {} of {} is {}",
        view.id,
        view.machine,
        if pinned { "pinned: it stays until it is unpinned" } else { "left to the policy" }
    );
    Ok(())
}

/// Runs the command.
pub(super) fn run(command: PointCommand) -> anyhow::Result<()> {
    match command {
        PointCommand::List { machine, ask: args } => {
            let points: Vec<PointView> = ask(&args.control, &Request::Points { machine })?;
            if args.json {
                return output::json(&points);
            }
            let row = |p: &PointView| {
                let disks: Vec<_> = p.disks.iter().map(|d| d.name.as_str()).collect();
                vec![
                    p.id.clone(),
                    p.machine.clone(),
                    p.time.clone(),
                    p.kind.clone(),
                    disks.join(","),
                    format!("{:.1} ms", p.hold_seconds * 1e3),
                    if p.pinned { "pinned".to_owned() } else { String::new() },
                    p.label.clone().unwrap_or_default(),
                ]
            };
            output::table(
                &["POINT", "MACHINE", "TIME", "KIND", "DISKS", "HELD", "PINNED", "LABEL"],
                &points.iter().map(row).collect::<Vec<_>>(),
            );
            Ok(())
        }
        PointCommand::Show { point, ask: args } => {
            let points: Vec<PointView> = ask(&args.control, &Request::Points { machine: None })?;
            let newest = points.last().filter(|_| point == "latest");
            let found: Vec<_> = newest.map_or_else(|| points.iter().filter(|p| p.id.starts_with(&point)).collect(), |p| vec![p]);
            let [found] = found[..] else {
                match found.len() {
                    0 => bail!("no point begins with {point:?}: see `tidegate point list`"),
                    n => bail!("{n} points begin with {point:?}: give more of the id"),
                }
            };
            if args.json {
                return output::json(found);
            }
            println!("point    {}", found.id);
            println!("machine  {}", found.machine);
            println!("time     {} (clock of the source)", found.time);
            println!("kind     {}", found.kind);
            println!("held     {:.1} ms", found.hold_seconds * 1e3);
            println!("label    {}", found.label.as_deref().unwrap_or("-"));
            println!("pinned   {}", if found.pinned { "yes" } else { "no" });
            for disk in &found.disks {
                let size = disk.size_bytes.map_or_else(|| "-".to_owned(), show_size);
                println!("  disk {} ({}) of {size} at {}", disk.name, disk.id, disk.position);
            }
            Ok(())
        }
        PointCommand::Pin { point, ask: args } => pin(point, true, &args),
        PointCommand::Unpin { point, ask: args } => pin(point, false, &args),
        PointCommand::Mark { machine, label, app, ask: args } => {
            let marked: Marked = ask(&args.control, &Request::Mark { machine, label, app })?;
            if args.json {
                return output::json(&marked);
            }
            println!("point {} is on its way; `tidegate point list` at the master target shows it when every disk has it", marked.point);
            Ok(())
        }
    }
}
