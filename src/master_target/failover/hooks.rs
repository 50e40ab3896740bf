//! Runs the commands that start, check and stop a machine: with variables that name its disks, a time limit, and their output
//! kept in a file.
//!
//! Output goes to a file and not to a pipe, so that a machine started in the background may keep it open. A command that
//! takes too long is ended with its whole process group; what it left in other groups is its own.

use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use tokio::process::Command;

use crate::config::master_target::Hook;
use crate::hook;
use crate::model::{Address, Job};

/// Bytes of output that are shown with a failure.
const TAIL_BYTES: u64 = 2000;
/// Between two attempts of a check.
const CHECK_AGAIN: Duration = Duration::from_secs(1);

/// What a hook is asked to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// Start the machine.
    Start,
    /// See whether it works; tried again until it does, or its time is over.
    Check,
    /// Stop it.
    Stop,
}

impl Phase {
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Phase::Start => "start",
            Phase::Check => "check",
            Phase::Stop => "stop",
        }
    }
}

/// Runs one phase, if the hook has a command for it.
///
/// # Errors
/// A sentence with the end of the output.
pub(super) async fn run(of: &Hook, phase: Phase, job: &Job, dir: &Path) -> Result<Option<String>, String> {
    let (command, limit) = match phase {
        Phase::Start => (&of.start, of.start_timeout),
        Phase::Check => (&of.check, of.check_timeout),
        Phase::Stop => (&of.stop, of.stop_timeout),
    };
    let Some((program, args)) = command.split_first() else { return Ok(None) };
    let log = dir.join(format!("{}.log", phase.as_str()));
    let attempt = async {
        loop {
            let status = once(program, args, job, &log).await?;
            if status.success() {
                return Ok(());
            }
            if phase != Phase::Check {
                return Err(hook::ended(program, status));
            }
            tokio::time::sleep(CHECK_AGAIN).await;
        }
    };
    let result = tokio::time::timeout(limit, attempt)
        .await
        .unwrap_or_else(|_| Err(format!("{program} did not succeed within {} s", limit.as_secs())));
    match result {
        Ok(()) => Ok(Some(tail(&log)).filter(|t| !t.is_empty())),
        Err(error) => Err(format!("{error}; output in {}: {}", log.display(), tail(&log))),
    }
}

async fn once(program: &str, args: &[String], job: &Job, log: &Path) -> Result<ExitStatus, String> {
    let named = |e: std::io::Error| format!("cannot run {program}: {e}");
    let output = std::fs::File::options().create(true).append(true).mode(0o600).open(log).map_err(named)?;
    let mut command = Command::new(program);
    command.args(args).stdin(Stdio::null()).stdout(output.try_clone().map_err(named)?).stderr(output).process_group(0);
    command.envs(variables(job));
    let mut child = command.spawn().map_err(named)?;
    let group = Group(child.id());
    let status = child.wait().await.map_err(named)?;
    // What it started and left running is what it was asked for.
    std::mem::forget(group);
    Ok(status)
}

/// Ends the process group when the wait for it is given up.
struct Group(Option<u32>);

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(leader) = self.0 {
            hook::end_group(leader);
        }
    }
}

/// What a hook knows of its job.
fn variables(job: &Job) -> Vec<(String, String)> {
    let mut variables = vec![
        ("TIDEGATE_JOB".to_owned(), job.id.to_string()),
        ("TIDEGATE_KIND".to_owned(), job.kind.as_str().to_owned()),
        ("TIDEGATE_MACHINE".to_owned(), job.machine_name.clone()),
        ("TIDEGATE_DISKS".to_owned(), job.disks.iter().map(|d| d.name.as_str()).collect::<Vec<_>>().join(" ")),
    ];
    if let Some(group) = &job.group {
        variables.push(("TIDEGATE_GROUP".to_owned(), group.name.to_string()));
    }
    if let Some(point) = &job.point {
        variables.push(("TIDEGATE_POINT".to_owned(), point.id.to_string()));
        variables.push(("TIDEGATE_POINT_TIME".to_owned(), crate::clock::rfc3339(point.wall_ms)));
    }
    for (number, disk) in job.disks.iter().enumerate() {
        // By number and by name: names may hold what variables may not.
        let name: String = disk.name.chars().map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_uppercase() } else { '_' }).collect();
        let Some(address) = &disk.nbd else { continue };
        for key in [number.to_string(), name] {
            variables.push((format!("TIDEGATE_NBD_{key}"), address.nbd_uri()));
            variables.push((format!("TIDEGATE_SIZE_{key}"), disk.size.to_string()));
            if let Address::Unix(path) = address {
                variables.push((format!("TIDEGATE_SOCKET_{key}"), path.display().to_string()));
            }
        }
        variables.push((format!("TIDEGATE_NAME_{number}"), disk.name.clone()));
    }
    variables
}

fn tail(log: &Path) -> String {
    // Whatever was started may write to it for days.
    let read = || -> std::io::Result<Vec<u8>> {
        let mut file = std::fs::File::open(log)?;
        let len = file.metadata()?.len();
        file.seek(SeekFrom::Start(len.saturating_sub(TAIL_BYTES)))?;
        let mut bytes = Vec::new();
        file.take(TAIL_BYTES).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    hook::shown(&read().unwrap_or_default())
}
