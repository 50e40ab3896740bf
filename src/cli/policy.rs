//! `tidegate policy`.
use anyhow::bail;

use super::{Ask, ask, output};
use crate::config::units::{parse_size, show_size};
use crate::control::api::{PolicySet, PolicyValues, PolicyView, Request};
use crate::model::{Ladder, show_span};

/// Which recovery points stay.
#[derive(clap::Subcommand)]
pub(super) enum PolicyCommand {
    /// The policy of the master target, and whether its configuration says so or `policy set`.
    Show {
        #[command(flatten)]
        ask: Ask,
    },
    /// The points that would go now, and why. Changes nothing.
    DryRun {
        /// With this ladder instead of the one in use.
        #[arg(long, value_name = "LADDER")]
        ladder: Option<Ladder>,
        /// Of one machine only.
        #[arg(long)]
        machine: Option<String>,
        #[command(flatten)]
        ask: Ask,
    },
    /// Change the policy, at once and until `--reset`, over the configuration's `retain`. Shows what would go now; without
    /// `--yes` nothing is changed when something would.
    #[command(
        after_help = "Examples:\n  tidegate policy set --ladder \"all for 4h, 1/h for 2d\" --points-max 500\n  tidegate policy set --space-max 200GiB --yes\n  tidegate policy set --machine db01 --space-max 1TiB\n  tidegate policy set --reset"
    )]
    Set(Set),
}

/// What to set.
#[derive(clap::Args)]
#[group(id = "what", required = true, multiple = true)]
pub(super) struct Values {
    /// Fewer points the older they get.
    #[arg(long, value_name = "LADDER")]
    ladder: Option<Ladder>,
    /// Most points of a machine.
    #[arg(long, value_name = "N")]
    points_max: Option<usize>,
    /// So many of the newest stay, whatever the rest says.
    #[arg(long, value_name = "N")]
    points_min: Option<usize>,
    /// Points older than this go; `none`: the end of the ladder.
    #[arg(long, value_name = "D", value_parser = seconds)]
    span: Option<u64>,
    /// Most bytes of old content of a machine; `none`: no bound.
    #[arg(long, value_name = "B", value_parser = bytes)]
    space_max: Option<u64>,
    /// Go back to the configuration for everything that is not given here.
    #[arg(long)]
    reset: bool,
}

/// `policy set`.
#[derive(clap::Args)]
pub(super) struct Set {
    #[command(flatten)]
    values: Values,
    /// For one machine only; covers what is set for all.
    #[arg(long)]
    machine: Option<String>,
    /// Points may go.
    #[arg(long)]
    yes: bool,
    #[command(flatten)]
    ask: Ask,
}

fn seconds(text: &str) -> Result<u64, String> {
    if text == "none" {
        return Ok(0);
    }
    let parsed = humantime::parse_duration(text).map(|d| d.as_secs()).ok().filter(|&s| s > 0);
    parsed.ok_or_else(|| "write for example \"15d\", \"12h\" or \"none\"".to_owned())
}

fn bytes(text: &str) -> Result<u64, String> {
    if text == "none" {
        Ok(0)
    } else {
        parse_size(text).and_then(|b| if b > 0 { Ok(b) } else { Err("write \"none\" for no bound".to_owned()) })
    }
}

/// Runs the command.
pub(super) fn run(command: PolicyCommand) -> anyhow::Result<()> {
    match command {
        PolicyCommand::Show { ask: args } => {
            let view: PolicyView = ask(&args.control, &Request::Policy { machine: None, ladder: None })?;
            if args.json {
                return output::json(&view);
            }
            show(&view);
            Ok(())
        }
        PolicyCommand::DryRun { ladder, machine, ask: args } => {
            let view: PolicyView = ask(&args.control, &Request::Policy { machine, ladder: ladder.map(|l| l.to_string()) })?;
            if args.json {
                return output::json(&view);
            }
            show_gone(&view);
            Ok(())
        }
        PolicyCommand::Set(Set { values, machine, yes, ask: args }) => {
            let reset = values.reset;
            let values = PolicyValues {
                ladder: values.ladder.map(|l| l.to_string()),
                points_max: values.points_max,
                points_min: values.points_min,
                span_seconds: values.span,
                space_max_bytes: values.space_max,
            };
            let set: PolicySet = ask(&args.control, &Request::SetPolicy { machine, values, reset, agreed: yes })?;
            if args.json {
                output::json(&set)?;
            } else {
                show_gone(&set.policy);
                if set.done {
                    show(&set.policy);
                }
            }
            if !set.done {
                bail!("nothing was changed, because points would go: say --yes to let them");
            }
            Ok(())
        }
    }
}

fn show(view: &PolicyView) {
    let set = &view.set;
    let line = |name: &str, value: String, is_set: bool| {
        println!("{name:<11} {value}  ({})", if is_set { "policy set" } else { "configuration" });
    };
    line("ladder", view.ladder.clone(), set.ladder.is_some());
    line("points_min", view.points_min.to_string(), set.points_min.is_some());
    line("points_max", view.points_max.to_string(), set.points_max.is_some());
    line("span", view.span_seconds.map_or_else(|| "the end of the ladder".to_owned(), show_span), set.span_seconds.is_some());
    line("space_max", view.space_max_bytes.map_or_else(|| "-".to_owned(), show_size), set.space_max_bytes.is_some());
    for machine in &view.machines {
        let held = format!("{} pinned", machine.pinned);
        println!(
            "machine     {}: {} points, {held}, {} of old content{}",
            machine.machine,
            machine.points,
            show_size(machine.retained_bytes),
            own(&machine.own)
        );
    }
}

/// What is different for a machine.
fn own(values: &PolicyValues) -> String {
    let mut parts = Vec::new();
    parts.extend(values.ladder.as_ref().map(|l| format!("ladder {l:?}")));
    parts.extend(values.points_min.map(|n| format!("points_min {n}")));
    parts.extend(values.points_max.map(|n| format!("points_max {n}")));
    parts.extend(values.span_seconds.map(|s| format!("span {}", show_span(s))));
    parts.extend(values.space_max_bytes.map(|b| format!("space_max {}", show_size(b))));
    if parts.is_empty() { String::new() } else { format!("; its own: {}", parts.join(", ")) }
}

fn show_gone(view: &PolicyView) {
    let of = |m: &crate::control::api::PolicyMachine| -> Vec<Vec<String>> {
        let row = |g: &crate::control::api::PolicyGone| {
            vec![m.machine.clone(), g.point.clone(), g.time.clone(), g.label.clone().unwrap_or_default(), g.reason.clone()]
        };
        m.gone.iter().map(row).collect()
    };
    output::table(&["MACHINE", "POINT", "TIME", "LABEL", "WHY"], &view.machines.iter().flat_map(of).collect::<Vec<_>>());
    for machine in &view.machines {
        let (gone, frees) = (machine.gone.len(), show_size(machine.frees_bytes_about));
        println!("{}: {gone} of {} points would go and give back about {frees}", machine.machine, machine.points);
    }
}
