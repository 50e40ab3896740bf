//! The durable cache: a [`crate::storage::log`] of sealed batches, shared by all disks.

use std::path::Path;

use tokio::sync::{OwnedSemaphorePermit, mpsc};
use uuid::Uuid;

use crate::clock::Mono;
use crate::config::process_server::Cache;
use crate::model::DiskId;
use crate::observe::metrics;
use crate::storage::log::service::{self, Appended, LogHandle, Setup};
use crate::storage::log::{LogError, Options, Recovered};
use crate::storage::uring::sync_dir;
use crate::wire::batch::BATCH_BYTES_MAX;

/// Groups of results that may wait for the network thread.
const COMPLETIONS_QUEUED_MAX: usize = 64;

/// What comes back with a cached batch.
pub struct Tag {
    /// Whose.
    pub disk: DiskId,
    /// Its number in the disk's pipeline.
    pub number: u64,
    /// When its last change was captured.
    pub captured: Mono,
    /// Its place in the pipeline, free for another batch when this is dropped.
    pub permit: OwnedSemaphorePermit,
}

/// The way to the cache.
pub type CacheHandle = LogHandle<Tag>;
/// Results of the cache.
pub type Completions = mpsc::Receiver<Vec<Appended<Tag>>>;

/// A running cache, what it found at start, and its thread.
pub struct Opened {
    /// To it.
    pub handle: CacheHandle,
    /// From it.
    pub completions: Completions,
    /// Batches found.
    pub recovered: Vec<Recovered>,
    /// Ends when every handle is dropped.
    pub thread: std::thread::JoinHandle<()>,
}

/// Opens the cache in `state`. One that belongs to another server is moved aside, and an empty one begun: nothing in it can be
/// forwarded from here, and its own server may want it back.
///
/// # Errors
/// See [`crate::storage::log::Log::open`].
pub fn open(state: &Path, id: Uuid, settings: &Cache) -> Result<Opened, LogError> {
    match open_as_it_is(state, id, settings) {
        Err(LogError::Foreign { found, path, .. }) => {
            let dir = state.join("cache");
            let aside = (0..).map(|n| state.join(format!("cache.foreign-{found}-{n}"))).find(|p| !p.exists()).unwrap_or_default();
            let moved = std::fs::rename(&dir, &aside).and_then(|()| sync_dir(state));
            moved.map_err(|source| LogError::Io { path: dir.clone(), source })?;
            metrics::count_reason(metrics::DAMAGED, "foreign-cache");
            tracing::error!(
                path = %path.display(), aside = %aside.display(),
                "the cache folder belongs to another server, or to this one before its state was replaced: it is moved aside, and an empty cache begun; agents send again what is not at the master target"
            );
            open_as_it_is(state, id, settings)
        }
        other => other,
    }
}

fn open_as_it_is(state: &Path, id: Uuid, settings: &Cache) -> Result<Opened, LogError> {
    let (results, completions) = mpsc::channel(COMPLETIONS_QUEUED_MAX);
    let options = Options {
        segment_bytes: settings.segment,
        segments_max: (settings.size_max / settings.segment) as usize,
        body_bytes_max: BATCH_BYTES_MAX,
    };
    let setup = Setup {
        name: "cache",
        dir: state.join("cache"),
        id,
        options,
        completions: results,
        observe_commit: |took| metrics::observe(metrics::CACHE_COMMIT, took),
    };
    let (handle, recovered, thread) = service::spawn(setup)?;
    Ok(Opened { handle, completions, recovered, thread })
}
