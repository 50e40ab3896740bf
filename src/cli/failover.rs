//! `tidegate failover`.

use std::io::{IsTerminal, Write};
use std::time::Duration;

use anyhow::bail;

use super::group_failover::{self, Which};
use super::{Ask, Usage, ask, output};
use crate::config::units::show_size;
use crate::control::api::{Decision, JobView, PlanView, Request};
use crate::control::client;
use crate::model::{Choice, JobKind};

/// An agent that was not heard for so long is asked for nothing.
const SILENT_SECONDS: f64 = 15.0;

/// What starting and deciding have in common.
#[derive(clap::Args, Clone)]
pub(super) struct Wait {
    /// Return at once; `failover show` tells how it goes.
    #[arg(long)]
    pub(super) detach: bool,
    #[command(flatten)]
    pub(super) ask: Ask,
}

/// What fails over, and to what.
#[derive(clap::Args)]
pub(super) struct What {
    /// Which machine, or which group.
    #[arg(value_name = "MACHINE|GROUP")]
    name: String,
    #[command(flatten)]
    which: Which,
    /// latest (after all that arrived was applied), latest-processed, latest-app, latest-multi-vm, an id, or a label. A group takes
    /// its own points.
    #[arg(long, default_value = "latest")]
    point: Choice,
    /// A hook of the master target's configuration that starts and checks each machine.
    #[arg(long)]
    hook: Option<String>,
}

/// `failover planned` and `failover unplanned`.
#[derive(clap::Args)]
pub(super) struct Start {
    #[command(flatten)]
    what: What,
    /// Do not ask.
    #[arg(long)]
    yes: bool,
    #[command(flatten)]
    wait: Wait,
}

/// Fail machines and groups over. Ask the master target. JOB is a number from `failover list`, the name of a machine, or the name
/// of a group, which stands for all its machines.
#[derive(clap::Subcommand)]
pub(super) enum FailoverCommand {
    /// Try it: all disks of a machine or group at one point, as writable block devices that nobody else sees. Replication goes on.
    #[command(
        after_help = "Examples:\n  tidegate failover test web01                        the newest point\n  tidegate failover test shop                         the newest point of a group, on every machine of it\n  tidegate failover test web01 --hook kvm             and start and check the machine\n  tidegate failover test web01 --hook kvm --cleanup   and take everything away again"
    )]
    Test {
        #[command(flatten)]
        what: What,
        /// Clean up as soon as the result is known.
        #[arg(long)]
        cleanup: bool,
        #[command(flatten)]
        wait: Wait,
    },
    /// Move a machine or group here without losing anything: its agents stop taking writes, the last change is waited for. A final
    /// point is made of each machine, so there is none to choose.
    #[command(after_help = "Examples:\n  tidegate failover planned web01 --hook kvm\n  tidegate failover planned shop")]
    Planned(Start),
    /// Bring a machine or group back here although its source is gone. Says first what will be lost.
    #[command(
        after_help = "Examples:\n  tidegate failover unplanned web01\n  tidegate failover unplanned shop --point latest-app\n  tidegate failover unplanned web01 --point latest-app --hook kvm --yes"
    )]
    Unplanned(Start),
    /// Take another point, as long as the failover is not committed. What was written since the failover is dropped.
    ChangePoint {
        /// Which failover.
        job: String,
        #[command(flatten)]
        which: Which,
        /// latest, latest-app, latest-multi-vm, an id, or a label.
        #[arg(long)]
        point: Choice,
        #[command(flatten)]
        wait: Wait,
    },
    /// Keep the failover: all points of the machine are dropped, there is no way back. The machine goes on running.
    Commit {
        /// Which failover.
        job: String,
        #[command(flatten)]
        which: Which,
        /// Pinned points go too.
        #[arg(long)]
        drop_pinned: bool,
        /// Do not ask.
        #[arg(long)]
        yes: bool,
        #[command(flatten)]
        wait: Wait,
    },
    /// Undo a failover that is not committed: the replicas are as they were, replication goes on where the source lives.
    Cancel {
        /// Which failover.
        job: String,
        #[command(flatten)]
        which: Which,
        #[command(flatten)]
        wait: Wait,
    },
    /// End a test and remove every trace of it; or, of a committed failover, stop serving the disks and leave the image files to you.
    Cleanup {
        /// Which failover.
        job: String,
        #[command(flatten)]
        which: Which,
        #[command(flatten)]
        wait: Wait,
    },
    /// Replicate a machine onto disks that have content: compares first; only differences travel, once every disk is named.
    #[command(
        after_help = "Examples:\n  tidegate failover reprotect web01                                      compares, and says what differs\n  tidegate failover reprotect web01 --overwrite sda --overwrite sdb      then the differences are sent"
    )]
    Reprotect {
        /// Which machine.
        machine: String,
        /// A disk whose content here may be overwritten; give every disk of the machine.
        #[arg(long = "overwrite", value_name = "DISK")]
        overwrite: Vec<String>,
        #[command(flatten)]
        wait: Wait,
    },
    /// All failovers, the oldest first.
    List(Ask),
    /// One failover with its steps.
    Show {
        /// Which.
        job: String,
        #[command(flatten)]
        which: Which,
        #[command(flatten)]
        ask: Ask,
    },
}

/// Runs the command.
pub(super) fn run(command: FailoverCommand) -> anyhow::Result<()> {
    match command {
        FailoverCommand::Test { what, cleanup, wait } => test(what, cleanup, &wait),
        FailoverCommand::Planned(args) => start(args, JobKind::Planned),
        FailoverCommand::Unplanned(args) => start(args, JobKind::Unplanned),
        FailoverCommand::ChangePoint { job, which, point, wait } => decide(job, which, Decision::ChangePoint(point), &wait),
        FailoverCommand::Commit { job, which, drop_pinned, yes, wait } => {
            let question = "All recovery points of what failed over are dropped, and there is no way back to before the failover.";
            // Of a failover that cannot be committed the master target says why, and nobody is asked about what does not happen.
            let jobs: Vec<JobView> = ask(&wait.ask.control, &Request::Failovers)?;
            let mut named = jobs.iter().filter(|j| j.id.to_string() == job);
            if !named.any(|j| j.kind == JobKind::Test.as_str() || j.over) {
                confirm(question, yes, wait.ask.json)?;
            }
            decide(job, which, Decision::Commit { drop_pinned }, &wait)
        }
        FailoverCommand::Cancel { job, which, wait } => decide(job, which, Decision::Cancel, &wait),
        FailoverCommand::Cleanup { job, which, wait } => decide(job, which, Decision::Cleanup, &wait),
        FailoverCommand::Reprotect { machine, overwrite, wait } => {
            let start = Request::FailoverStart { kind: JobKind::Reprotect, machine, point: Choice::Latest, hook: None, overwrite };
            request(start, &wait).map(drop)
        }
        FailoverCommand::List(args) => list(&args),
        FailoverCommand::Show { job, which, ask: args } if which.is_group(&job, &args)? => group_failover::show(&job, &args),
        FailoverCommand::Show { job, ask: args, .. } => show(&job, &args),
    }
}

fn test(what: What, cleanup: bool, wait: &Wait) -> anyhow::Result<()> {
    let What { name, which, point, hook } = what;
    let cleanup = cleanup && !wait.detach;
    match (which.is_group(&name, &wait.ask)?, cleanup) {
        (true, true) => return group_failover::test_and_clean_up(name, point, hook, wait),
        (true, false) => return group_failover::start(name, JobKind::Test, point, hook, true, wait),
        _ => {}
    }
    let start = Request::FailoverStart { kind: JobKind::Test, machine: name, point, hook, overwrite: Vec::new() };
    if !cleanup {
        return request(start, wait).and_then(|job| verdict(&job));
    }
    let mut job = watch(&start, wait)?;
    if job.state == "running" {
        job = watch(&Request::FailoverDecide { job: job.id.to_string(), decision: Decision::Cleanup }, wait)?;
    }
    finish(&job, wait)?;
    verdict(&job)
}

/// Says how a job stands that was watched.
fn finish(job: &JobView, wait: &Wait) -> anyhow::Result<()> {
    if wait.ask.json {
        return output::json(job);
    }
    end(job, wait.detach);
    Ok(())
}

fn start(args: Start, kind: JobKind) -> anyhow::Result<()> {
    let Start { what: What { name, which, point, hook }, yes, wait } = args;
    if kind == JobKind::Planned && point != Choice::Latest {
        return Err(Usage("a planned failover makes a final point of its own: leave --point out".to_owned()).into());
    }
    if which.is_group(&name, &wait.ask)? {
        return group_failover::start(name, kind, point, hook, yes, &wait);
    }
    let plan: PlanView = ask(&wait.ask.control, &Request::FailoverPlan { machine: name.clone(), point: point.clone() })?;
    let question = if kind == JobKind::Planned {
        if plan.heard_seconds.is_none_or(|heard| heard > SILENT_SECONDS) {
            bail!(
                "the agent of {name} is not heard, so nobody can stop the machine there: start it (it is heard within seconds), or use `tidegate failover unplanned {name}`"
            );
        }
        format!(
            "The agent of {name} will stop taking writes: shut the machine down first if it can be. It fails over when everything that it wrote has arrived here, so that nothing is lost; without the agent it waits."
        )
    } else {
        lost(&plan, &point)
    };
    confirm(&question, yes, wait.ask.json)?;
    request(Request::FailoverStart { kind, machine: name, point, hook, overwrite: Vec::new() }, &wait).map(drop)
}

fn decide(job: String, which: Which, decision: Decision, wait: &Wait) -> anyhow::Result<()> {
    if which.is_group(&job, &wait.ask)? {
        return group_failover::decide(job, decision, wait);
    }
    request(Request::FailoverDecide { job, decision }, wait).map(drop)
}

/// What an unplanned failover takes and loses.
pub(super) fn lost(plan: &PlanView, choice: &Choice) -> String {
    let mut text =
        format!("point    {} of {}{}\n", plan.point, plan.point_time, plan.label.as_ref().map_or_else(String::new, |l| format!(" {l:?}")));
    if let Some(note) = &plan.note {
        text += &format!("         {note}\n");
    }
    if *choice == Choice::Latest {
        text += "         or a newer one, if one is complete once everything that arrived is applied\n";
    }
    let clock = if plan.lost_seconds_monotonic { "measured here" } else { "by the source's clock" };
    text += &format!("lost     what the machine wrote after it: {} ({clock})\n", output::seconds(Some(plan.lost_seconds)));
    text += &format!(
        "         {} that came here after the point, {} that wait here to be applied\n",
        plan.newer_bytes.map_or_else(|| "an unknown amount".to_owned(), show_size),
        show_size(plan.waiting_bytes)
    );
    match plan.heard_seconds {
        Some(heard) => {
            text += &format!(
                "         {} that the agent had and not sent when it was heard, {} ago\n",
                show_size(plan.unsent_bytes),
                output::seconds(Some(heard))
            )
        }
        None => text += "         what the agent had and not sent is not known: it was not heard since this master target started\n",
    }
    text += "         and what it wrote since then, which nobody here knows\n";
    if let Some(heard) = plan.heard_seconds.filter(|heard| *heard < 5.0) {
        text += &format!(
            "note     the agent was heard {} ago: if its host lives, `failover planned` loses nothing\n",
            output::seconds(Some(heard))
        );
    }
    text + &format!("The source of {} will be refused until the failover is cancelled. Points stay until it is committed.", plan.machine)
}

/// Asks a person.
pub(super) fn confirm(question: &str, yes: bool, json: bool) -> anyhow::Result<()> {
    if yes && json {
        return Ok(());
    }
    eprintln!("{question}");
    if yes {
        return Ok(());
    }
    if !std::io::stdin().is_terminal() {
        return Err(Usage("add --yes to do it without being asked".to_owned()).into());
    }
    eprint!("Go on? [y/N] ");
    std::io::stderr().flush()?;
    let mut answer = String::new();
    std::io::stdin().read_line(&mut answer)?;
    if !matches!(answer.trim(), "y" | "Y" | "yes") {
        bail!("nothing was done");
    }
    Ok(())
}

/// Sends a request, watches the job, says how it stands; an error if it does not go on.
fn request(request: Request, wait: &Wait) -> anyhow::Result<JobView> {
    let job = watch(&request, wait)?;
    finish(&job, wait)?;
    match (&job.error, job.passed) {
        // What a test found was told when it ran.
        _ if job.over && job.state != "failed" => Ok(job),
        (Some(_), Some(false)) => verdict(&job).map(|()| job),
        (Some(error), _) => bail!("failover {}: {error}{}", job.id, job.remedy.as_ref().map_or_else(String::new, |r| format!(". Do: {r}"))),
        (None, _) => Ok(job),
    }
}

/// Sends a request and watches the job until it waits for somebody.
fn watch(request: &Request, wait: &Wait) -> anyhow::Result<JobView> {
    let control = &wait.ask.control;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let job: JobView = runtime.block_on(client::call(control, request))?;
    let id = job.id;
    // What was done before was told before.
    let before = if matches!(request, Request::FailoverDecide { .. }) || job.kind == "reprotect" { usize::MAX } else { 0 };
    let mut told = Told::new(before.min(job.steps.iter().filter(|s| s.seconds.is_some()).count()), String::new());
    let mut job = job;
    let bar =
        if wait.ask.json || !std::io::stderr().is_terminal() { indicatif::ProgressBar::hidden() } else { indicatif::ProgressBar::new(0) };
    bar.set_style(indicatif::ProgressStyle::with_template("  {bar:40} {binary_bytes} of {binary_total_bytes}")?);
    let (mut missed, mut waits) = (0, None);
    while job.busy && !wait.detach {
        if !wait.ask.json {
            told.print(&job);
        }
        if job.remedy != waits && !wait.ask.json {
            waits = job.remedy.clone();
            waits.iter().for_each(|remedy| eprintln!("  {remedy}"));
        }
        if let Some((done, total)) = job.progress {
            bar.set_length(total);
            bar.set_position(done);
        }
        std::thread::sleep(Duration::from_millis(100));
        match runtime.block_on(client::call::<Vec<JobView>>(control, &Request::Failovers)) {
            Ok(all) => {
                missed = 0;
                let Some(now) = all.into_iter().find(|j| j.id == id) else { bail!("failover {id} is not known any more") };
                job = now;
            }
            // The job goes on when the master target is started again.
            Err(error) if missed < 100 => {
                missed += 1;
                tracing::debug!(%error, "asking again");
            }
            Err(error) => return Err(error.into()),
        }
    }
    bar.finish_and_clear();
    if !wait.ask.json {
        told.print(&job);
    }
    Ok(job)
}

/// Which steps were printed.
#[derive(Default)]
pub(super) struct Told {
    steps: usize,
    open: bool,
    prefix: String,
}

impl Told {
    /// The first `steps` were printed; `prefix` says whose they are.
    pub(super) fn new(steps: usize, prefix: String) -> Self {
        Self { steps, open: false, prefix }
    }

    /// Prints what is new.
    pub(super) fn print(&mut self, job: &JobView) {
        for step in job.steps.iter().skip(self.steps) {
            let Some(seconds) = step.seconds else {
                if !self.open && std::io::stderr().is_terminal() {
                    eprintln!("  {}{} ...", self.prefix, step.name);
                }
                self.open = true;
                return;
            };
            let what = match (&step.error, &step.detail) {
                (Some(error), _) => format!(": FAILED: {error}"),
                (None, Some(detail)) => format!(": {detail}"),
                (None, None) => String::new(),
            };
            println!("  {}{} ({seconds:.1} s){what}", self.prefix, step.name);
            self.steps += 1;
            self.open = false;
        }
    }
}

fn end(job: &JobView, detached: bool) {
    let point =
        job.point_time.as_ref().filter(|_| job.state == "failed-over").map_or_else(String::new, |time| format!(", at the point of {time}"));
    println!("failover {} of {}: {}{point}", job.id, job.machine, job.state);
    if detached && job.busy {
        return println!("it goes on; see `tidegate failover show {}`", job.id);
    }
    let id = job.id;
    match job.state.as_str() {
        "running" => println!(
            "the copy stands until `tidegate failover cleanup {id}`, or a restart of the master target; what is written to it is dropped then"
        ),
        "failed-over" => println!(
            "run the machine from the disks above. Then: `tidegate failover change-point {id} --point P`, `commit {id}` or `cancel {id}`"
        ),
        "committed" => println!(
            "the machine goes on from the disks above; to run it from the image files instead, stop it and `tidegate failover cleanup {id}`"
        ),
        "comparing" => println!("nothing was overwritten. {}", job.remedy.as_deref().unwrap_or_default()),
        "released" => println!(
            "the image files above are yours; to replicate the machine back here later: `tidegate failover reprotect {}`",
            job.machine
        ),
        _ => {}
    }
}

fn verdict(job: &JobView) -> anyhow::Result<()> {
    match job.passed {
        Some(false) => bail!("the machine did not come up: {}", job.error.as_deref().unwrap_or("see `tidegate failover show`")),
        _ => Ok(()),
    }
}

fn list(args: &Ask) -> anyhow::Result<()> {
    let jobs: Vec<JobView> = ask(&args.control, &Request::Failovers)?;
    if args.json {
        return output::json(&jobs);
    }
    let row = |j: &JobView| {
        let result = match (j.passed, &j.error) {
            (Some(true), _) => "passed".to_owned(),
            (_, Some(error)) => error.chars().take(60).collect(),
            (Some(false), None) => "failed".to_owned(),
            (None, None) if j.kind == JobKind::Test.as_str() && !j.busy => "not checked".to_owned(),
            (None, None) if j.over => "done".to_owned(),
            (None, None) => "-".to_owned(),
        };
        vec![
            j.id.to_string(),
            j.machine.clone(),
            j.group_job.clone().unwrap_or_default(),
            j.kind.clone(),
            j.state.clone(),
            j.point_time.clone().unwrap_or_else(|| "-".to_owned()),
            j.started.clone(),
            j.by.clone(),
            result,
        ]
    };
    output::table(
        &["JOB", "MACHINE", "GROUP", "KIND", "STATE", "POINT", "STARTED", "BY", "RESULT"],
        &jobs.iter().map(row).collect::<Vec<_>>(),
    );
    Ok(())
}

fn show(which: &str, args: &Ask) -> anyhow::Result<()> {
    let jobs: Vec<JobView> = ask(&args.control, &Request::Failovers)?;
    // Of a machine the one that stands, if one does.
    let of = |j: &&JobView| j.id.to_string() == which || j.machine == which;
    let standing = |j: &&JobView| !j.over && j.kind != JobKind::Test.as_str();
    let all = || jobs.iter().rev().filter(of);
    let Some(job) = all().find(standing).or_else(|| all().find(|j| !j.over)).or_else(|| all().next()) else {
        bail!("there is no failover {which}: see `tidegate failover list`");
    };
    if args.json {
        return output::json(job);
    }
    println!("failover {}  {} of {}, {}{}", job.id, job.kind, job.machine, job.state, if job.busy { ", working" } else { "" });
    println!("point      {} {}", job.point.as_deref().unwrap_or("-"), job.point_time.as_deref().unwrap_or_default());
    if let (Some(group), Some(run)) = (&job.group, &job.group_job) {
        println!("group      {group}: with the others of {run}");
    }
    println!("asked for  {} by {} at {}", job.choice, job.by, job.started);
    if let Some(ended) = &job.ended {
        println!("ended      {ended}");
    }
    for disk in &job.disks {
        println!(
            "  disk {}  {}  {}",
            disk.name,
            show_size(disk.size_bytes),
            disk.nbd.as_deref().filter(|_| !job.over).unwrap_or("not served")
        );
    }
    Told { open: true, ..Told::default() }.print(job);
    if let Some((done, total)) = job.progress {
        println!("  now: {} of {}", show_size(done), show_size(total));
    }
    if let Some(error) = &job.error {
        println!("error      {error}");
    }
    if let Some(remedy) = &job.remedy {
        println!("do         {remedy}");
    }
    Ok(())
}
