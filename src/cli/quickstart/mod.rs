//! `tidegate quickstart`: all roles in one process over loopback, on real data, ending with a report.

mod roles;
mod sample;
mod verify;
mod workload;

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use self::roles::Roles;
use self::verify::Recovered;
use self::workload::Workload;
use super::Usage;
use crate::clock;
use crate::config::units::{parse_size, show_size};
use crate::observe::{logging, metrics};

/// Arguments of the quickstart.
#[derive(clap::Args)]
pub(super) struct Args {
    /// Protect this raw disk file or block device until interrupted, instead of a sample disk.
    #[arg(long, value_name = "PATH")]
    disk: Option<PathBuf>,
    /// Page cache use with --disk: direct or writeback, see config/agent.toml.
    #[arg(long, value_name = "MODE", default_value = "direct", value_parser = ["direct", "writeback"])]
    cache: String,
    /// What the disk of --disk is: raw, vhdx, vhdx-fixed, vmdk, vmdk-flat or vmfs [default: raw].
    #[arg(long, value_name = "FORMAT")]
    format: Option<crate::disk::Format>,
    /// Folder for everything that is made [default: tidegate-quickstart; with --disk, tidegate-quickstart-NAME].
    #[arg(long, value_name = "DIR")]
    state: Option<PathBuf>,
    /// Size of the sample disk.
    #[arg(long, value_name = "BYTES", default_value = "1GiB", value_parser = parse_size)]
    size: u64,
    /// Length of the workload.
    #[arg(long, value_name = "N", default_value_t = 15)]
    seconds: u64,
    /// Print the report as one JSON object.
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Replicated {
    bytes: u64,
    seconds: f64,
    bytes_per_second: f64,
}

#[derive(Serialize)]
struct Worked {
    writes: u64,
    bytes: u64,
    seconds: f64,
}

#[derive(Clone, Copy, Serialize)]
struct Spread {
    p50: f64,
    p99: f64,
    max: f64,
}

#[derive(Serialize)]
struct Report {
    initial_replication: Replicated,
    workload: Worked,
    rpo_seconds: Spread,
    marker_hold_seconds: Spread,
    points: usize,
    recovered: Vec<Recovered>,
    replica: PathBuf,
    state: PathBuf,
}

/// Smallest sample: a file system and room for the workload.
const SIZE_MIN: u64 = 64 << 20;
/// Initial replication must finish in this time; far beyond what any machine needs.
const REPLICATION_LIMIT: Duration = Duration::from_secs(3600);

/// Runs the quickstart.
pub(super) fn run(args: Args) -> anyhow::Result<()> {
    logging::init(if args.disk.is_some() { "tidegate=info" } else { "tidegate=warn" }, false);
    crate::panics::abort_on_panic();
    metrics::install();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    // A folder for each disk: one that took over another's folder would continue its replica.
    let state = match (&args.state, args.disk.as_deref().and_then(Path::file_name)) {
        (Some(state), _) => state.clone(),
        (None, None) => PathBuf::from("tidegate-quickstart"),
        (None, Some(name)) => PathBuf::from(format!("tidegate-quickstart-{}", name.to_string_lossy())),
    };
    let state = std::path::absolute(state)?;
    if let Some(missing) = args.disk.as_ref().filter(|disk| !disk.exists()) {
        return Err(Usage(format!("there is no file or device {}", missing.display())).into());
    }
    runtime.block_on(tokio::task::LocalSet::new().run_until(async {
        match &args.disk {
            Some(disk) => {
                let disk = std::path::absolute(disk)?;
                claim(&state, &disk.display().to_string())?;
                protect(&disk, &state, &args.cache, args.format).await
            }
            None => {
                claim(&state, SAMPLE)?;
                demonstrate(&args, &state).await
            }
        }
    }))
}

/// What a state folder is for when it holds the sample.
const SAMPLE: &str = "the sample disk";

/// A state folder belongs to one disk: another one must not continue its replica.
fn claim(state: &Path, what: &str) -> anyhow::Result<()> {
    let note = state.join("protects");
    let before = match std::fs::read_to_string(&note) {
        Ok(text) => Some(text),
        Err(_) if state.join("disk.raw").exists() => Some(SAMPLE.to_owned()),
        Err(_) => None,
    };
    if let Some(before) = before.filter(|b| b != what) {
        let text = format!(
            "{} holds the replica of {before}, not of {what}: remove that folder if it is not needed, or choose another with --state",
            state.display()
        );
        return Err(Usage(text).into());
    }
    std::fs::create_dir_all(state).with_context(|| format!("cannot make {}", state.display()))?;
    Ok(std::fs::write(&note, what)?)
}

async fn demonstrate(args: &Args, state: &Path) -> anyhow::Result<()> {
    let size = args.size / 4096 * 4096;
    if size < SIZE_MIN {
        return Err(Usage(format!("--size {} is too small: give at least {}", args.size, show_size(SIZE_MIN))).into());
    }
    if state.join("disk.raw").exists() {
        sample::clear(state)?;
    }
    std::fs::create_dir_all(state.join("recovered")).with_context(|| format!("cannot make {}", state.display()))?;
    let say = |text: &str| {
        if !args.json {
            println!("{text}");
        }
    };
    say(&format!("making a sample disk of {} with a file system ...", show_size(size)));
    let disk = state.join("disk.raw");
    let sample = sample::make(state, &disk, size)?;
    let mut workload = Workload::new(state, &disk, sample.workload_area, size)?;
    let started = clock::now();
    let roles = Roles::start(state, &disk, Duration::from_secs(1), "direct", None).await?;
    let seconds = wait_for_replica(&roles, started, args.json).await?;
    let initial = Replicated { bytes: sample.bytes, seconds, bytes_per_second: sample.bytes as f64 / seconds };
    say(&format!("initial replication: {} in {seconds:.1} s, {}/s", show_size(sample.bytes), show_size(initial.bytes_per_second as u64)));
    say(&format!("workload of {} s while points are taken every second ...", args.seconds));
    let worked = workload.run(&roles, Duration::from_secs(args.seconds), state).await?;
    let mut rpo = worked.rpo.clone();
    let mut holds: Vec<f64> = roles.points().iter().map(|p| Duration::from_micros(p.hold_us).as_secs_f64()).collect();
    say("bringing points back ...");
    let recovered = verify::recover(&roles, &worked.marked, state).await?;
    let report = Report {
        initial_replication: initial,
        workload: Worked { writes: worked.writes, bytes: worked.bytes, seconds: worked.seconds },
        rpo_seconds: spread(&mut rpo),
        marker_hold_seconds: spread(&mut holds),
        points: roles.points().len(),
        recovered,
        replica: state.join("master-target/replicas/sample/disk0.vhdx"),
        state: state.to_owned(),
    };
    roles.stop().await;
    let all_identical = !report.recovered.is_empty() && report.recovered.iter().all(|r| r.identical);
    if args.json {
        println!("{}", serde_json::to_string(&report)?)
    } else {
        print(&report)
    }
    if all_identical {
        Ok(())
    } else {
        bail!("a recovered point differs from what was expected: please report this with the folder {}", state.display())
    }
}

/// Waits until the replica holds everything durably; the time it took since `started`.
async fn wait_for_replica(roles: &Roles, started: clock::Mono, quiet: bool) -> anyhow::Result<f64> {
    let total = roles.disk_size();
    let bar = if quiet || !std::io::stderr().is_terminal() { ProgressBar::hidden() } else { ProgressBar::new(total) };
    bar.set_style(ProgressStyle::with_template("replicating {bar:40} {binary_bytes} of {binary_total_bytes}, {binary_bytes_per_sec}")?);
    loop {
        bar.set_position(total - roles.missing_bytes().min(total));
        if roles.is_replicated() {
            break;
        }
        let waited = clock::now().since(started);
        if waited > REPLICATION_LIMIT {
            bail!(
                "initial replication did not finish: {}",
                roles.last_error().unwrap_or_else(|| "no reason known, see the log".to_owned())
            );
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    bar.finish_and_clear();
    Ok(clock::now().since(started).as_secs_f64())
}

async fn protect(disk: &Path, state: &Path, cache: &str, format: Option<crate::disk::Format>) -> anyhow::Result<()> {
    std::fs::create_dir_all(state)?;
    // A gateway on the protected machine itself: when cores are short the machine comes first, points may wait. Every thread
    // started from here on inherits it; the one that serves the disk raises itself again.
    let _ = rustix::process::nice(5);
    let roles = Roles::start(state, disk, Duration::from_secs(5), cache, format).await?;
    println!("protecting {}", disk.display());
    println!("  give this to the hypervisor:  {}", roles.nbd_uri());
    println!("  is it working:                tidegate status --control {}", roles.control());
    println!("  points:                       tidegate point list --control {}", roles.control());
    println!("  bring one back:               tidegate recover export latest --output back.vhdx --control {}", roles.control());
    println!(
        "  writes that do not pass through the NBD export are not seen. Press Ctrl-C to stop; it goes on where it was when started again."
    );
    let started = clock::now();
    tokio::select! {
        waited = wait_for_replica(&roles, started, false) => {
            println!("initial replication is complete after {:.1} s; recovery points are taken every 5 s", waited?);
            interrupted().await?;
        }
        result = interrupted() => result?,
    }
    roles.stop().await;
    Ok(())
}

async fn interrupted() -> anyhow::Result<()> {
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    tokio::select! {
        result = tokio::signal::ctrl_c() => result?,
        _ = terminate.recv() => {}
    }
    Ok(())
}

fn spread(values: &mut [f64]) -> Spread {
    values.sort_by(f64::total_cmp);
    let at = |part: usize| values.get((values.len().saturating_sub(1)) * part / 100).copied().unwrap_or(0.0);
    Spread { p50: at(50), p99: at(99), max: at(100) }
}

fn print(report: &Report) {
    let (initial, work) = (&report.initial_replication, &report.workload);
    let ms = |s: Spread| format!("p50 {:.1} ms, p99 {:.1} ms, max {:.1} ms", s.p50 * 1e3, s.p99 * 1e3, s.max * 1e3);
    println!();
    println!(
        "initial replication  {} in {:.1} s: {}/s, durable in cache, journal and VHDX",
        show_size(initial.bytes),
        initial.seconds,
        show_size(initial.bytes_per_second as u64)
    );
    println!("workload             {} writes, {} in {:.1} s", work.writes, show_size(work.bytes), work.seconds);
    println!("RPO                  {}", ms(report.rpo_seconds));
    println!("writes held          {}", ms(report.marker_hold_seconds));
    println!("points               {}", report.points);
    for r in &report.recovered {
        let verdict = if r.identical { "identical" } else { "DIFFERENT" };
        println!("recovered            {} as {} {}: {verdict}", &r.point[..8], r.kind, r.path.display());
    }
    println!("replica              {}", report.replica.display());
    println!();
    println!("Everything is in {}; remove that folder when you have looked around.", report.state.display());
    println!("Next: protect a disk of your own with `deploy/quickstart DISK`, or run each role by hand as README shows.");
}
