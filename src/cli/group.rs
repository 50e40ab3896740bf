//! `tidegate group`.

use super::{Ask, ask, output};
use crate::control::api::{GroupValues, GroupView, Request};

/// Replication groups.
#[derive(clap::Subcommand)]
pub(super) enum GroupCommand {
    /// All groups, their members and newest points.
    List {
        #[command(flatten)]
        ask: Ask,
    },
    /// One group with its members and what went wrong.
    Show {
        /// Its name.
        group: String,
        #[command(flatten)]
        ask: Ask,
    },
    /// Make a group of machines; they go on replicating as they are.
    #[command(
        after_help = "Examples:\n  tidegate group create shop --machine db01 --machine web01 --interval 30s\n  tidegate group create shop --machine db01 --machine web01 --app-interval 1h --partial no"
    )]
    Create {
        /// Its name.
        group: String,
        /// A machine; repeat for each.
        #[arg(long, required = true)]
        machine: Vec<String>,
        #[command(flatten)]
        values: Values,
        #[command(flatten)]
        ask: Ask,
    },
    /// Add a machine to a group. Nothing is replicated again.
    Add {
        /// The group.
        group: String,
        /// Machines to add.
        #[arg(required = true)]
        machine: Vec<String>,
        #[command(flatten)]
        ask: Ask,
    },
    /// Remove a machine from a group. It goes on being replicated by itself; points that were made stay.
    Remove {
        /// The group.
        group: String,
        /// Machines to remove.
        #[arg(required = true)]
        machine: Vec<String>,
        #[command(flatten)]
        ask: Ask,
    },
    /// Change how a group's points are made.
    #[command(after_help = "Example:\n  tidegate group set shop --interval 10s --app-interval never")]
    Set {
        /// The group.
        group: String,
        #[command(flatten)]
        values: Values,
        #[command(flatten)]
        ask: Ask,
    },
    /// Forget a group. Its machines go on being replicated by themselves; points that were made stay.
    Delete {
        /// The group.
        group: String,
        #[command(flatten)]
        ask: Ask,
    },
}

/// How a group's points are made.
#[derive(clap::Args)]
pub(super) struct Values {
    /// Time between crash-consistent points, 1s to 24h [default: 30s].
    #[arg(long, value_parser = humantime::parse_duration)]
    interval: Option<std::time::Duration>,
    /// Time between application-consistent points, 1s to 24h, or `never` [default: never].
    #[arg(long, value_name = "TIME|never")]
    app_interval: Option<String>,
    /// Make points without the machines that are missing, and say so [default: yes].
    #[arg(long, value_name = "yes|no", value_parser = yes_or_no)]
    partial: Option<bool>,
    /// When applications cannot be brought to rest everywhere: make the point crash-consistent, or make none [default: crash].
    #[arg(long, value_name = "crash|skip", value_parser = ["crash", "skip"])]
    app_failure: Option<String>,
}

fn yes_or_no(text: &str) -> Result<bool, String> {
    match text {
        "yes" => Ok(true),
        "no" => Ok(false),
        other => Err(format!("{other:?} is neither yes nor no")),
    }
}

impl Values {
    fn meant(&self) -> anyhow::Result<GroupValues> {
        let seconds = |text: &str| humantime::parse_duration(text).map(|t| t.as_secs_f64());
        let app_interval_seconds = match self.app_interval.as_deref() {
            None => None,
            Some("never") => Some(0.0),
            Some(text) => Some(seconds(text).map_err(|e| super::Usage(format!("--app-interval {text}: {e}")))?),
        };
        Ok(GroupValues {
            interval_seconds: self.interval.map(|t| t.as_secs_f64()),
            app_interval_seconds,
            partial: self.partial,
            app_or_nothing: self.app_failure.as_deref().map(|text| text == "skip"),
        })
    }
}

/// Runs the command.
pub(super) fn run(command: GroupCommand) -> anyhow::Result<()> {
    match command {
        GroupCommand::List { ask: args } => {
            let groups: Vec<GroupView> = ask(&args.control, &Request::Groups)?;
            if args.json {
                return output::json(&groups);
            }
            if groups.is_empty() {
                println!("there are no groups; make one with `tidegate group create`");
            }
            print_all(&groups);
            Ok(())
        }
        GroupCommand::Show { group, ask: args } => {
            let groups: Vec<GroupView> = ask(&args.control, &Request::Groups)?;
            let all: Vec<_> = groups.iter().map(|g| g.name.clone()).collect();
            let Some(found) = groups.into_iter().find(|g| g.name == group) else {
                anyhow::bail!(
                    "no group is called {group:?}; there are: {}",
                    if all.is_empty() { "none".to_owned() } else { all.join(", ") }
                );
            };
            show(&found, &args)
        }
        GroupCommand::Create { group, machine, values, ask: args } => {
            change(&Request::GroupCreate { name: group, machines: machine, values: values.meant()? }, &args)
        }
        GroupCommand::Add { group, machine, ask: args } => change(&Request::GroupChange { group, add: machine, remove: vec![] }, &args),
        GroupCommand::Remove { group, machine, ask: args } => change(&Request::GroupChange { group, add: vec![], remove: machine }, &args),
        GroupCommand::Set { group, values, ask: args } => change(&Request::GroupSet { group, values: values.meant()? }, &args),
        GroupCommand::Delete { group, ask: args } => {
            let () = ask(&args.control, &Request::GroupDelete { group: group.clone() })?;
            if !args.json {
                println!("group {group} is deleted; its machines go on being replicated by themselves, its points stay");
            }
            Ok(())
        }
    }
}

fn change(request: &Request, args: &Ask) -> anyhow::Result<()> {
    let view: GroupView = ask(&args.control, request)?;
    show(&view, args)
}

fn show(group: &GroupView, args: &Ask) -> anyhow::Result<()> {
    if args.json {
        return output::json(group);
    }
    let time = |seconds: f64| humantime::format_duration(std::time::Duration::from_secs_f64(seconds)).to_string();
    println!("group         {} ({})", group.name, group.health.as_str());
    if let Some(reason) = &group.reason {
        println!("reason        {reason}");
    }
    if let Some(remedy) = &group.remedy {
        println!("do            {remedy}");
    }
    println!("epoch         {}", group.epoch);
    println!("master target {}", group.master_target.as_deref().unwrap_or("not known yet"));
    println!("points        every {}", time(group.interval_seconds));
    println!("app points    {}", group.app_interval_seconds.map_or_else(|| "on demand".to_owned(), |t| format!("every {}", time(t))));
    println!("partial       {}", if group.partial { "made, and labelled" } else { "not made" });
    println!("app failure   {}", if group.app_or_nothing { "no point" } else { "a crash-consistent point instead" });
    println!(
        "rounds        {} full, {} partial, {} skipped, {} not confirmed (since the coordinator started)",
        group.full, group.partial_points, group.skipped, group.unconfirmed
    );
    if group.app_points_lost > 0 {
        println!("              {} not application-consistent as they were to be", group.app_points_lost);
    }
    for (cause, count) in &group.causes {
        println!("  {count} {} without {cause}", if *count == 1 { "time" } else { "times" });
    }
    if let Some(last) = &group.last {
        println!("newest        {} at {}, {}, {}", last.point, last.time, last.kind, parts(group));
        if let Some(remark) = &last.remark {
            println!("  {remark}");
        }
    }
    let rows: Vec<_> = group
        .members
        .iter()
        .map(|m| {
            let state = m.trouble.clone().unwrap_or_else(|| "ready".to_owned());
            vec![m.machine.clone(), m.master_target.clone().unwrap_or_else(|| "-".to_owned()), state]
        })
        .collect();
    output::table(&["MACHINE", "MASTER TARGET", "STATE"], &rows);
    Ok(())
}

fn parts(group: &GroupView) -> String {
    group.last.as_ref().map_or_else(
        || "-".to_owned(),
        |last| {
            let missing = if last.missing.is_empty() { String::new() } else { format!(", missing: {}", last.missing.join(", ")) };
            format!("{} of {}{missing}", last.members, last.members + last.missing.len())
        },
    )
}

/// A table of groups, if there are any.
pub(super) fn print_all(groups: &[GroupView]) {
    if groups.is_empty() {
        return;
    }
    let rows: Vec<_> = groups
        .iter()
        .map(|g| {
            let ready = g.members.iter().filter(|m| m.trouble.is_none()).count();
            vec![
                g.name.clone(),
                g.health.as_str().to_owned(),
                format!("{ready} of {}", g.members.len()),
                output::ago(g.last.as_ref().map(|l| l.age_seconds)),
                parts(g),
                g.last.as_ref().map_or_else(|| "-".to_owned(), |l| format!("{:.1} ms", l.hold_seconds * 1e3)),
                g.full.to_string(),
                g.partial_points.to_string(),
                g.skipped.to_string(),
            ]
        })
        .collect();
    output::table(&["GROUP", "HEALTH", "READY", "NEWEST", "MACHINES", "HELD", "FULL", "PARTIAL", "SKIPPED"], &rows);
}
