//! How far a comparison of a disk with its replica is, and what it found.

use serde::{Deserialize, Serialize};

/// Which comparison of a disk is meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verifying {
    /// A new one, which begins now.
    Begin,
    /// The last one that was begun so.
    Asked,
    /// Whichever is under way, or was last.
    Any,
}

/// A comparison of a disk with its replica.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct ScrubView {
    /// MACHINE/NAME.
    pub disk: String,
    /// It is under way.
    pub running: bool,
    /// Share of the disk that is compared, in the one under way or in the last.
    pub done_bytes: u64,
    /// Bytes of the disk.
    pub total_bytes: u64,
    /// Bytes that differed.
    pub differing_bytes: u64,
    /// Bytes of the disk that could not be read, and were not compared.
    #[serde(default)]
    pub unread_bytes: u64,
    /// How long it took, or takes since.
    pub seconds: f64,
    /// How long ago the last one ended; absent without one.
    pub last_age_seconds: Option<f64>,
    /// Bytes that differed in that.
    #[serde(default)]
    pub last_differing_bytes: Option<u64>,
    /// Why nothing can be compared now.
    pub waits: Option<String>,
}
