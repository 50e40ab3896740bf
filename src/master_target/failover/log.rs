//! Who did what: one line of JSON for each thing that a person asked for and for each state that a job entered. Only appended
//! to, synced before the thing is done.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use serde::Serialize;

use crate::clock;
use crate::model::Job;

/// The open log.
pub(super) struct Log(File);

#[derive(Serialize)]
struct Line<'a> {
    time: String,
    job: u64,
    kind: &'a str,
    machine: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    group: Option<String>,
    by: &'a str,
    action: &'a str,
    state: &'a str,
    point: Option<String>,
    error: Option<&'a str>,
}

impl Log {
    /// Opens the log in `dir`.
    ///
    /// # Errors
    /// Those of the file system.
    pub(super) fn open(dir: &Path) -> io::Result<Self> {
        let path = dir.join("log.jsonl");
        let file = File::options().create(true).append(true).mode(0o600).open(path)?;
        crate::storage::uring::sync_dir(dir)?;
        Ok(Self(file))
    }

    /// Notes something, durably. A log that cannot be written does not keep a machine from coming back: it is told.
    pub(super) fn note(&mut self, job: &Job, by: &str, action: &str) {
        let line = Line {
            time: clock::rfc3339(clock::wall_ms()),
            job: job.id,
            kind: job.kind.as_str(),
            machine: &job.machine_name,
            group: job.group.as_ref().map(crate::model::job::JobGroup::label),
            by,
            action,
            state: job.state.as_str(),
            point: job.point.as_ref().map(|p| p.id.to_string()),
            error: job.error.as_deref(),
        };
        let written = serde_json::to_vec(&line).map_err(io::Error::from).and_then(|mut bytes| {
            bytes.push(b'\n');
            self.0.write_all(&bytes)?;
            self.0.sync_data()
        });
        if let Err(error) = written {
            tracing::error!(%error, job = job.id, action, by, "the log of failovers cannot be written");
        }
    }
}
