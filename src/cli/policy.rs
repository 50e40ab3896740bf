//! `tidegate policy`.

use super::{Ask, ask, output};
use crate::config::units::show_size;
use crate::control::api::{PolicyView, Request};
use crate::model::Ladder;

/// Which recovery points stay.
#[derive(clap::Subcommand)]
pub(super) enum PolicyCommand {
    /// The policy of the master target, as its configuration says under `retain`.
    Show {
        #[command(flatten)]
        ask: Ask,
    },
    /// The points that would go now, and why. Changes nothing.
    DryRun {
        /// With this ladder instead of the configured one.
        #[arg(long, value_name = "LADDER")]
        ladder: Option<Ladder>,
        /// Of one machine only.
        #[arg(long)]
        machine: Option<String>,
        #[command(flatten)]
        ask: Ask,
    },
}

/// Runs the command.
pub(super) fn run(command: PolicyCommand) -> anyhow::Result<()> {
    match command {
        PolicyCommand::Show { ask: args } => {
            let view: PolicyView = ask(&args.control, &Request::Policy { machine: None, ladder: None })?;
            if args.json {
                return output::json(&view);
            }
            println!("ladder      {}", view.ladder);
            println!("points_min  {}", view.points_min);
            println!("points_max  {}", view.points_max);
            println!("span        {}", view.span_seconds.map_or_else(|| "the end of the ladder".to_owned(), |s| format!("{s} s")));
            println!("space_max   {}", view.space_max_bytes.map_or_else(|| "-".to_owned(), show_size));
            for machine in &view.machines {
                let held = format!("{} pinned", machine.pinned);
                println!(
                    "machine     {}: {} points, {held}, {} of old content",
                    machine.machine,
                    machine.points,
                    show_size(machine.retained_bytes)
                );
            }
            Ok(())
        }
        PolicyCommand::DryRun { ladder, machine, ask: args } => {
            let view: PolicyView = ask(&args.control, &Request::Policy { machine, ladder: ladder.map(|l| l.to_string()) })?;
            if args.json {
                return output::json(&view);
            }
            let rows: Vec<Vec<String>> = view
                .machines
                .iter()
                .flat_map(|m| {
                    m.gone.iter().map(|g| {
                        vec![m.machine.clone(), g.point.clone(), g.time.clone(), g.label.clone().unwrap_or_default(), g.reason.clone()]
                    })
                })
                .collect();
            output::table(&["MACHINE", "POINT", "TIME", "LABEL", "WHY"], &rows);
            for machine in &view.machines {
                let (gone, frees) = (machine.gone.len(), show_size(machine.frees_bytes_about));
                println!("{}: {gone} of {} points would go and give back about {frees}", machine.machine, machine.points);
            }
            Ok(())
        }
    }
}
