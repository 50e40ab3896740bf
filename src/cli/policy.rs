//! `tidegate policy`.
use super::failover::confirm;
use super::{Ask, Usage, ask, output};
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
    /// The points that would go now, and why; or with `policy set` and the same values. Changes nothing.
    #[command(
        after_help = "Examples:\n  tidegate policy dry-run\n  tidegate policy dry-run --ladder \"all for 1h, 1/h to 7d\"\n  tidegate policy dry-run --machine db01 --space-max 200GiB"
    )]
    DryRun {
        #[command(flatten)]
        values: Values,
        /// Of one machine only; the values are then those of `policy set --machine`.
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

/// Values of a policy.
#[derive(clap::Args)]
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
}

impl Values {
    fn to_set(&self) -> PolicyValues {
        PolicyValues {
            ladder: self.ladder.as_ref().map(ToString::to_string),
            points_max: self.points_max,
            points_min: self.points_min,
            span_seconds: self.span,
            space_max_bytes: self.space_max,
        }
    }
}

/// `policy set`.
#[derive(clap::Args)]
pub(super) struct Set {
    #[command(flatten)]
    values: Values,
    /// Go back to the configuration for everything that is not given here.
    #[arg(long)]
    reset: bool,
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
            let view: PolicyView = ask(&args.control, &Request::Policy { machine: None, values: PolicyValues::default() })?;
            if args.json {
                return output::json(&view);
            }
            show(&view);
            Ok(())
        }
        PolicyCommand::DryRun { values, machine, ask: args } => {
            let view: PolicyView = ask(&args.control, &Request::Policy { machine, values: values.to_set() })?;
            if args.json {
                return output::json(&view);
            }
            show_gone(&view, false);
            Ok(())
        }
        PolicyCommand::Set(Set { values, reset, machine, yes, ask: args }) => {
            let values = values.to_set();
            if values == PolicyValues::default() && !reset {
                return Err(Usage("say what to set, or --reset: see `tidegate policy set --help`".to_owned()).into());
            }
            set(args, &|agreed| Request::SetPolicy { machine: machine.clone(), values: values.clone(), reset, agreed }, yes)
        }
    }
}

/// Sets a policy; somebody has to agree when points would go.
fn set(args: Ask, request: &dyn Fn(bool) -> Request, yes: bool) -> anyhow::Result<()> {
    let mut set: PolicySet = ask(&args.control, &request(yes))?;
    if !set.done && !args.json {
        show_gone(&set.policy, false);
        confirm("The points above go with this policy, for good.", false, false)?;
        set = ask(&args.control, &request(true))?;
    }
    if args.json {
        output::json(&set)?;
        return if set.done {
            Ok(())
        } else {
            Err(Usage("nothing was changed, because points would go: add --yes to let them".to_owned()).into())
        };
    }
    show_gone(&set.policy, set.done);
    show(&set.policy);
    Ok(())
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

/// `done`: the policy counts by now.
fn show_gone(view: &PolicyView, done: bool) {
    let of = |m: &crate::control::api::PolicyMachine| -> Vec<Vec<String>> {
        let row = |g: &crate::control::api::PolicyGone| {
            vec![m.machine.clone(), g.point.clone(), g.time.clone(), g.label.clone().unwrap_or_default(), g.reason.clone()]
        };
        m.gone.iter().map(row).collect()
    };
    output::table(&["MACHINE", "POINT", "TIME", "LABEL", "WHY"], &view.machines.iter().flat_map(of).collect::<Vec<_>>());
    for machine in &view.machines {
        let (gone, frees) = (machine.gone.len(), show_size(machine.frees_bytes_about));
        let go = if done { "go in the background" } else { "would go" };
        let own = own(&machine.own);
        let held = if machine.held && gone > 0 { "; not before the failover that stands is over" } else { "" };
        println!("{}: {gone} of {} points {go} and give back about {frees}{held}{own}", machine.machine, machine.points);
    }
}
