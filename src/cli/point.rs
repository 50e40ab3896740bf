//! `tidegate point`.

use std::io::IsTerminal;
use std::time::Duration;

use anyhow::bail;
use indicatif::{ProgressBar, ProgressStyle};

use super::{Ask, Usage, ask, group_point, output};
use crate::config::units::show_size;
use crate::control::api::{BadPointView, GroupMarked, Marked, PointView, Request, VerifyView};
use crate::control::client;

/// Recovery points.
#[derive(clap::Subcommand)]
pub(super) enum PointCommand {
    /// Listed points, the oldest first. Ask the master target.
    #[command(
        after_help = "Examples:\n  tidegate point list --last 20\n  tidegate point list --machine web01 --json\n  tidegate point list --bad"
    )]
    List {
        /// Of one machine only.
        #[arg(long)]
        machine: Option<String>,
        /// Points of this group instead: each is a moment of all its machines.
        #[arg(long, conflicts_with_all = ["machine", "bad"])]
        group: Option<String>,
        /// Points that became unusable instead, with the cause.
        #[arg(long)]
        bad: bool,
        /// Only the newest so many.
        #[arg(long, value_name = "COUNT")]
        last: Option<usize>,
        #[command(flatten)]
        ask: Ask,
    },
    /// Read a point from end to end, as a recovery would, and compare it with the first time. Ask the master target.
    #[command(
        after_help = "Examples:\n  tidegate point verify latest\n  tidegate point verify 3f2a --json\n\nThe digest is BLAKE3 of the content; it does not depend on how that is stored. Exit code 1: the point is bad, or could not be read."
    )]
    Verify {
        /// Its id, the beginning of it, its label, or `latest`.
        point: String,
        #[command(flatten)]
        ask: Ask,
    },
    /// Clear points that became unusable from `point list --bad` and from the status. Ask the master target.
    #[command(
        after_help = "Examples:\n  tidegate point forget 3f2a\n  tidegate point forget --all --machine web01\n\nPoints whose content is kept are left alone without --kept."
    )]
    Forget {
        /// Its id, or the beginning of it.
        point: Option<String>,
        /// All of them.
        #[arg(long, conflicts_with = "point")]
        all: bool,
        /// Also those that could be put back with `point restore`: their content is deleted.
        #[arg(long)]
        kept: bool,
        /// Of one machine only.
        #[arg(long)]
        machine: Option<String>,
        #[command(flatten)]
        ask: Ask,
    },
    /// Put a point back on the list that a comparison with the source took off it: when it was the source that was damaged, the
    /// points were the good copies. Ask the master target.
    #[command(after_help = "Example:\n  tidegate point list --bad\n  tidegate point restore 3f2a")]
    Restore {
        /// Its id, or the beginning of it.
        point: String,
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
        /// Its id, the beginning of it, its label, or `latest`.
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
    /// Make a point now. Ask the agent of the machine, or the coordinator of the group.
    #[command(
        after_help = "Examples:\n  tidegate point mark --machine web01 --label before-upgrade --wait --control unix:/run/tidegate/agent.sock\n  tidegate point mark --group shop --app --control unix:/run/tidegate/coordinator.sock"
    )]
    Mark {
        /// Of which machine.
        #[arg(long, required_unless_present = "group", conflicts_with = "group")]
        machine: Option<String>,
        /// Of all machines of which group, at one moment.
        #[arg(long)]
        group: Option<String>,
        /// What to call it.
        #[arg(long)]
        label: Option<String>,
        /// Application-consistent: with the machine at rest, by the [[app.hook]] tables of the agent's configuration.
        #[arg(long)]
        app: bool,
        /// Return when it is durable at the master target; fail if it is lost, or has not arrived after so many seconds.
        #[arg(long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "60", conflicts_with = "group")]
        wait: Option<u32>,
        #[command(flatten)]
        ask: Ask,
    },
}

fn pin(point: String, pinned: bool, args: &Ask) -> anyhow::Result<()> {
    if let Some(group_point) = group_point::resolve(&point, None, args)?.group_point {
        return group_point::pin(&group_point, pinned, args);
    }
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

fn mark_group(group: String, app: bool, label: Option<String>, args: &Ask) -> anyhow::Result<()> {
    let marked: GroupMarked = ask(&args.control, &Request::GroupMark { group, app, label })?;
    if args.json {
        return output::json(&marked);
    }
    let all = marked.members + marked.missing.len();
    println!(
        "point {} of group {} is on its way, {}, {} of {all} machines, held for at most {:.1} ms; `tidegate point list --group {}` at the master target shows it when every part is there",
        marked.point,
        marked.group,
        marked.kind,
        marked.members,
        marked.hold_seconds * 1e3,
        marked.group
    );
    for missing in &marked.missing {
        println!("missing: {}: {}", missing.machine, missing.why);
    }
    if let Some(remark) = &marked.remark {
        println!("remark: {remark}");
    }
    Ok(())
}

fn list_bad(machine: Option<String>, last: Option<usize>, args: &Ask) -> anyhow::Result<()> {
    let points: Vec<BadPointView> = output::newest(ask(&args.control, &Request::BadPoints { machine })?, last);
    if args.json {
        return output::json(&points);
    }
    let row = |b: &BadPointView| {
        vec![
            b.point.id.clone(),
            b.point.machine.clone(),
            b.point.time.clone(),
            b.point.kind.clone(),
            b.disk.clone(),
            b.noticed.clone(),
            b.point.label.clone().unwrap_or_default(),
            if b.kept { "yes" } else { "no" }.to_owned(),
            b.cause.clone(),
        ]
    };
    output::table(
        &["POINT", "MACHINE", "TIME", "KIND", "DISK", "NOTICED", "LABEL", "KEPT", "CAUSE"],
        &points.iter().map(row).collect::<Vec<_>>(),
    );
    Ok(())
}

/// The parts of a group's point one after another; one that is bad does not keep the others from being verified.
fn verify(point: String, args: &Ask) -> anyhow::Result<()> {
    let Some(group_point) = group_point::resolve(&point, None, args)?.group_point else {
        let view = verify_one(point, args)?;
        if args.json {
            output::json(&view)?;
        }
        return verdict(&view);
    };
    let (mut views, mut faults) = (Vec::new(), Vec::new());
    for part in &group_point.parts {
        if !args.json {
            println!("machine {}", part.machine);
        }
        let view = verify_one(part.point.clone(), args)?;
        if let Err(fault) = verdict(&view) {
            faults.push(format!("{}: {fault}", part.machine));
        }
        views.push(view);
    }
    if args.json {
        output::json(&views)?;
    }
    if faults.is_empty() { Ok(()) } else { bail!("{}", faults.join("; ")) }
}

fn verify_one(point: String, args: &Ask) -> anyhow::Result<VerifyView> {
    let mut view: VerifyView = ask(&args.control, &Request::Verify { point })?;
    let bar = if args.json || !std::io::stderr().is_terminal() { ProgressBar::hidden() } else { ProgressBar::new(view.total_bytes) };
    bar.set_style(ProgressStyle::with_template("{bar:40} {binary_bytes} of {binary_total_bytes}, {binary_bytes_per_sec}, {eta} left")?);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        while view.state == "running" {
            tokio::time::sleep(Duration::from_millis(50)).await;
            let all: Vec<VerifyView> = client::call(&args.control, &Request::Verifications).await?;
            let Some(now) = all.into_iter().find(|v| v.name == view.name) else { bail!("the master target was restarted: try again") };
            bar.set_position(now.done_bytes);
            view = now;
        }
        Ok(())
    })?;
    bar.finish_and_clear();
    if !args.json {
        println!("point   {}", view.point);
        for disk in &view.disks {
            println!("disk    {}: blake3 {}", disk.name, disk.digest);
        }
        println!("read    {} of {} in {:.1} s", show_size(view.read_bytes), show_size(view.total_bytes), view.seconds);
    }
    if !args.json && view.state == "good" {
        println!("result  good, {}", if view.first { "verified for the first time" } else { "the same as before" });
    }
    Ok(view)
}

fn verdict(view: &VerifyView) -> anyhow::Result<()> {
    match (view.state.as_str(), &view.error) {
        ("good", _) => Ok(()),
        ("bad", cause) => bail!(
            "point {} is not usable and not listed any more: {}; see `tidegate point list --bad`",
            view.point,
            cause.as_deref().unwrap_or("-")
        ),
        (_, error) => bail!("the point could not be verified: {}", error.as_deref().unwrap_or("unknown")),
    }
}

/// Runs the command.
pub(super) fn run(command: PointCommand) -> anyhow::Result<()> {
    match command {
        PointCommand::List { machine, bad: true, last, ask: args, .. } => list_bad(machine, last, &args),
        PointCommand::List { group: Some(group), last, ask: args, .. } => group_point::list(group, last, &args),
        PointCommand::Verify { point, ask: args } => verify(point, &args),
        PointCommand::Forget { point: None, all: false, .. } => {
            Err(Usage("which one? Give the id of an unusable point, or --all".to_owned()).into())
        }
        PointCommand::Forget { point, all: _, kept, machine, ask: args } => {
            let count: usize = ask(&args.control, &Request::ForgetBad { point, machine: machine.clone(), kept })?;
            if args.json {
                return output::json(&serde_json::json!({ "forgotten": count }));
            }
            println!("{count} unusable {} cleared", if count == 1 { "point" } else { "points" });
            let left: Vec<BadPointView> = ask(&args.control, &Request::BadPoints { machine })?;
            if !kept && !left.is_empty() {
                println!("{} left that may be the good copies: `tidegate point restore` them, or forget them with --kept", left.len());
            }
            Ok(())
        }
        PointCommand::Restore { point, ask: args } => {
            let view: PointView = ask(&args.control, &Request::RestoreBad { point })?;
            if args.json {
                return output::json(&view);
            }
            println!(
                "point {} of {} is on the list again; compare what it holds with what you expect before you rely on it",
                view.id, view.machine
            );
            Ok(())
        }
        PointCommand::List { machine, last, ask: args, .. } => {
            let points: Vec<PointView> = output::newest(ask(&args.control, &Request::Points { machine })?, last);
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
                    output::ago(p.verified_age_seconds),
                    group_point::column(p),
                    p.label.clone().unwrap_or_default(),
                ]
            };
            output::table(
                &["POINT", "MACHINE", "TIME", "KIND", "DISKS", "HELD", "PINNED", "VERIFIED", "GROUP", "LABEL"],
                &points.iter().map(row).collect::<Vec<_>>(),
            );
            Ok(())
        }
        PointCommand::Show { point, ask: args } => {
            let named = group_point::resolve(&point, None, &args)?;
            if let Some(group_point) = &named.group_point {
                return group_point::show(group_point, &args);
            }
            let points: Vec<PointView> = ask(&args.control, &Request::Points { machine: None })?;
            let Some(found) = points.iter().find(|p| named.point.as_ref() == Some(&p.id)) else {
                bail!("point {point} is not listed any more: see `tidegate point list`");
            };
            if args.json {
                return output::json(found);
            }
            println!("point    {}", found.id);
            println!("machine  {}", found.machine);
            println!("time     {} (clock of the source)", found.time);
            println!("kind     {}", found.kind);
            println!("held     {:.1} ms", found.hold_seconds * 1e3);
            if let (Some(group), Some(point)) = (&found.group, &found.group_point) {
                println!("group    {group}: a part of its point {point}");
            }
            println!("label    {}", found.label.as_deref().unwrap_or("-"));
            if let Some(remark) = &found.remark {
                println!("remark   {remark}");
            }
            println!("pinned   {}", if found.pinned { "yes" } else { "no" });
            let ago = output::ago(found.verified_age_seconds);
            println!("verified {}", found.verified.as_ref().map_or("-".to_owned(), |at| format!("{at} ({ago})")));
            for disk in &found.disks {
                let size = disk.size_bytes.map_or_else(|| "-".to_owned(), show_size);
                println!("  disk {} ({}) of {size} at {}", disk.name, disk.id, disk.position);
                if let Some(digest) = &disk.digest {
                    println!("    blake3 {digest}");
                }
            }
            Ok(())
        }
        PointCommand::Pin { point, ask: args } => pin(point, true, &args),
        PointCommand::Unpin { point, ask: args } => pin(point, false, &args),
        PointCommand::Mark { group: Some(group), label, app, ask: args, .. } => mark_group(group, app, label, &args),
        PointCommand::Mark { machine, label, app, wait, ask: args, .. } => {
            let machine = machine.ok_or_else(|| Usage("which one? Give --machine or --group".to_owned()))?;
            let marked: Marked = ask(&args.control, &Request::Mark { machine, label, app, wait_seconds: wait })?;
            if args.json {
                return output::json(&marked);
            }
            if let Some(remark) = &marked.remark {
                eprintln!("tidegate: the point is crash-consistent only: {remark}");
            }
            if wait.is_some() {
                println!(
                    "point {} is safe at the master target; `tidegate point list` there shows it when every disk has it",
                    marked.point
                );
                return Ok(());
            }
            println!("point {} is on its way; `tidegate point list` at the master target shows it when every disk has it", marked.point);
            Ok(())
        }
    }
}
