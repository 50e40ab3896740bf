//! Failovers of groups, for `tidegate failover`.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::bail;

use super::failover::{Told, Wait, confirm, lost};
use super::{Ask, Usage, ask, output};
use crate::control::api::{Decision, JobView, Request};
use crate::control::client;
use crate::control::groups::{GroupAsk, GroupPlanView, Named};
use crate::model::{Choice, JobKind};

/// Says what a name means where it is a machine's and a group's.
#[derive(clap::Args, Clone, Copy)]
pub(super) struct Which {
    /// The name is that of a group.
    #[arg(long, conflicts_with = "machine")]
    group: bool,
    /// The name is that of a machine.
    #[arg(long)]
    machine: bool,
}

impl Which {
    /// Whether a name means a group.
    pub(super) fn is_group(self, name: &str, args: &Ask) -> anyhow::Result<bool> {
        if self.group || self.machine {
            return Ok(self.group);
        }
        if name.parse::<u64>().is_ok() {
            return Ok(false);
        }
        let named: Named = ask(&args.control, &Request::Named { name: name.to_owned() })?;
        if named.group && named.machine {
            return Err(Usage(format!("{name} is the name of a machine and of a group: add --machine or --group")).into());
        }
        Ok(named.group)
    }
}

/// Starts a failover of a group.
pub(super) fn start(group: String, kind: JobKind, point: Choice, hook: Option<String>, yes: bool, wait: &Wait) -> anyhow::Result<()> {
    if kind != JobKind::Test {
        let ask_plan = GroupAsk::Plan { kind, point: point.clone() };
        let plan: GroupPlanView = ask(&wait.ask.control, &Request::GroupFailover { group: group.clone(), ask: ask_plan })?;
        confirm(&question(&plan, kind, &point), yes, wait.ask.json)?;
    }
    run(&Request::GroupFailover { group, ask: GroupAsk::Start { kind, point, hook } }, wait).map(drop)
}

/// A test that is cleaned up as soon as its result is known.
pub(super) fn test_and_clean_up(group: String, point: Choice, hook: Option<String>, wait: &Wait) -> anyhow::Result<()> {
    let start = GroupAsk::Start { kind: JobKind::Test, point, hook };
    let mut jobs = watch(&Request::GroupFailover { group, ask: start }, wait)?;
    let verdict = verdict(&jobs);
    if let Some(run) = jobs.iter().filter(|j| j.state == "running").find_map(|j| j.group_job.clone()) {
        jobs = watch(&Request::GroupFailover { group: run, ask: GroupAsk::Decide(Decision::Cleanup) }, wait)?;
    }
    finish(&jobs, wait)?;
    verdict
}

/// Decides about a failover of a group.
pub(super) fn decide(group: String, decision: Decision, wait: &Wait) -> anyhow::Result<()> {
    run(&Request::GroupFailover { group, ask: GroupAsk::Decide(decision) }, wait).map(drop)
}

/// What a failover of a group takes and loses.
fn question(plan: &GroupPlanView, kind: JobKind, choice: &Choice) -> String {
    let machines = plan.machines.join(", ");
    if kind == JobKind::Planned {
        return format!(
            "The agents of {machines} stop taking writes now, all of them before anything is done here: shut the machines down first if they can be. Nothing is lost."
        );
    }
    let mut text = format!("group    {}: {machines}\n", plan.group);
    if let Some(point) = &plan.point {
        text += &format!("point    {} of {}, {} ({} of {} machines)\n", point.point, point.time, point.kind, point.members, point.machines);
    }
    if matches!(choice, Choice::Latest | Choice::LatestMultiVm) {
        text += "         or a newer one of these machines, if one is complete once everything that arrived is applied\n";
    }
    if !plan.missing.is_empty() {
        text += &format!("missing  {}: not in the point, and not failed over\n", plan.missing.join(", "));
    }
    for note in &plan.notes {
        text += &format!("note     {note}\n");
    }
    for machine in &plan.plans {
        text += &format!("\n{}\n{}\n", machine.machine, lost(machine, &Choice::LatestProcessed));
    }
    text
}

/// Sends a request, watches the jobs, says how they stand; an error if one does not go on.
fn run(request: &Request, wait: &Wait) -> anyhow::Result<Vec<JobView>> {
    let jobs = watch(request, wait)?;
    finish(&jobs, wait)?;
    verdict(&jobs)?;
    Ok(jobs)
}

/// An error that names every machine that does not go on, and what to do.
fn verdict(jobs: &[JobView]) -> anyhow::Result<()> {
    let fault = |j: &&JobView| j.error.is_some() && (!j.over || j.state == "failed");
    let faults: Vec<String> = jobs
        .iter()
        .filter(fault)
        .map(|j| {
            let remedy = j.remedy.as_ref().map_or_else(String::new, |r| format!(". Do: {r}"));
            format!("{} (failover {}): {}{remedy}", j.machine, j.id, j.error.as_deref().unwrap_or_default())
        })
        .collect();
    if faults.is_empty() {
        return Ok(());
    }
    bail!("{} of {} machines did not go on; the others are as they are shown: {}", faults.len(), jobs.len(), faults.join("; "))
}

/// Sends a request and watches the jobs until all of them wait for somebody.
fn watch(request: &Request, wait: &Wait) -> anyhow::Result<Vec<JobView>> {
    let control = &wait.ask.control;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let mut jobs: Vec<JobView> = runtime.block_on(client::call(control, request))?;
    let is_new = matches!(request, Request::GroupFailover { ask: GroupAsk::Start { .. }, .. });
    // What was done before was told before.
    let done = |j: &JobView| if is_new { 0 } else { j.steps.iter().filter(|s| s.seconds.is_some()).count() };
    let mut told: BTreeMap<u64, Told> = jobs.iter().map(|j| (j.id, Told::new(done(j), format!("{}: ", j.machine)))).collect();
    let mut missed = 0;
    loop {
        if !wait.ask.json {
            jobs.iter().for_each(|job| told.entry(job.id).or_default().print(job));
        }
        if wait.detach || jobs.iter().all(|j| !j.busy) {
            break;
        }
        std::thread::sleep(Duration::from_millis(100));
        match runtime.block_on(client::call::<Vec<JobView>>(control, &Request::Failovers)) {
            Ok(all) => {
                missed = 0;
                jobs = all.into_iter().filter(|j| told.contains_key(&j.id)).collect();
            }
            // The jobs go on when the master target is started again.
            Err(error) if missed < 100 => {
                missed += 1;
                tracing::debug!(%error, "asking again");
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(jobs)
}

/// Says how jobs stand that were watched.
fn finish(jobs: &[JobView], wait: &Wait) -> anyhow::Result<()> {
    if wait.ask.json {
        return output::json(&jobs);
    }
    end(jobs);
    Ok(())
}

fn end(jobs: &[JobView]) {
    for job in jobs {
        println!("failover {} of {}: {}{}", job.id, job.machine, job.state, if job.busy { ", goes on" } else { "" });
        job.disks.iter().filter_map(|d| d.nbd.as_ref().map(|nbd| (d, nbd))).for_each(|(d, nbd)| println!("  disk {}  {nbd}", d.name));
    }
    let Some(name) = jobs.iter().find_map(|j| j.group_job.as_deref()) else { return };
    match jobs.iter().map(|j| j.state.as_str()).min() {
        Some("running") => println!("the copies stand until `tidegate failover cleanup {name}`; what is written to them is dropped then"),
        Some("failed-over") => println!(
            "run the machines from the disks above. Then: `tidegate failover change-point {name} --point P`, `commit {name}` or `cancel {name}`"
        ),
        Some("committed") => println!(
            "the machines go on from the disks above; to run them from the image files instead, stop them and `tidegate failover cleanup {name}`"
        ),
        Some("released") => {
            println!("the image files are yours; machines are protected again one by one: `tidegate failover reprotect MACHINE`")
        }
        _ => {}
    }
}

/// `failover show` of a group: its newest failover, machine by machine.
pub(super) fn show(which: &str, args: &Ask) -> anyhow::Result<()> {
    let all: Vec<JobView> = ask(&args.control, &Request::Failovers)?;
    let of = |j: &&JobView| j.group.as_deref() == Some(which) || j.group_job.as_deref() == Some(which);
    let Some(run) = all.iter().rev().find(of).and_then(|j| j.group_job.clone()) else {
        bail!("there is no failover of group {which}: see `tidegate failover list`");
    };
    let jobs: Vec<&JobView> = all.iter().filter(|j| j.group_job.as_ref() == Some(&run)).collect();
    if args.json {
        return output::json(&jobs);
    }
    let first = jobs[0];
    println!("failover   {run}  {} of {} machines", first.kind, jobs.len());
    println!(
        "point      {}",
        first.group_point.as_deref().unwrap_or(if first.kind == "planned" { "a final one of each machine" } else { "-" })
    );
    println!("asked for  by {} at {}", first.by, first.started);
    if !first.group_missing.is_empty() {
        println!("missing    {}: not in the point, and not failed over", first.group_missing.join(", "));
    }
    if jobs.iter().any(|j| j.group_point != first.group_point) {
        println!(
            "note       the machines do not stand at one point: `tidegate failover change-point {run} --point P` brings them together"
        );
    }
    let row = |j: &&JobView| {
        vec![
            j.id.to_string(),
            j.machine.clone(),
            j.state.clone(),
            j.point_time.clone().unwrap_or_else(|| "-".to_owned()),
            j.error.clone().unwrap_or_default(),
        ]
    };
    output::table(&["JOB", "MACHINE", "STATE", "POINT", "ERROR"], &jobs.iter().map(row).collect::<Vec<_>>());
    for job in jobs.iter().filter(|j| j.error.is_some()) {
        println!("do         {}: {}", job.machine, job.remedy.as_deref().unwrap_or("see `tidegate failover show` with its number"));
    }
    Ok(())
}
