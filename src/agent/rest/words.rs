//! What the agent and its guard say to each other: one JSON object a line, over the guard's standard input and output.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::plan::{Failure, Plan};

/// Longest line.
pub(super) const LINE_BYTES_MAX: u64 = 1 << 20;

/// The first line that a guard reads. A further line, or the end of its input, tells it to undo everything.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Job {
    /// Where it notes what it begins.
    pub(super) note: PathBuf,
    /// What to bring to rest; `None`: only undo what the note says.
    pub(super) plan: Option<Plan>,
}

/// What a guard says, in this order.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Word {
    /// Everything is at rest, at least until this moment of [`crate::clock::host_ms`] unless it says `Undoing` before.
    Frozen {
        /// The moment.
        until_ms: u64,
    },
    /// Instead: something could not be brought to rest.
    Failed(Failure),
    /// From here on things are set going again.
    Undoing,
    /// Nothing more will be done.
    Over {
        /// How long writers of a file system waited, at most, in milliseconds.
        frozen_ms: u64,
        /// What became of each part that was touched.
        reports: Vec<Report>,
    },
}

/// What one step on one part did.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Report {
    /// The part.
    pub(super) part: String,
    /// It was set going again, or should have been.
    pub(super) undo: bool,
    /// What scripts printed, or how many file systems it was.
    pub(super) output: String,
    /// Why it did not succeed.
    pub(super) error: Option<String>,
    /// Somebody else had set it going before us.
    pub(super) early: bool,
}
