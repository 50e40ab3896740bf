//! The agent's log on disk: segments of the backlogs that memory has no room for, sealed, in the order in which they were captured.
//!
//! It belongs to one life of the agent. Its key is in memory only, and what an earlier life left is removed at start: after a
//! crash the dirty map covers what stood in it. So nothing here has to be found again, and a stolen disk says nothing.
//!
//! A segment is given back when it is safe at the master target, or when the stream starts anew.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use thiserror::Error;
use tokio::sync::{Semaphore, mpsc};
use uuid::Uuid;

use super::backlog::{Held, SegmentName};
use super::shared::{AgentShared, VolumeShared};
use crate::clock::Mono;
use crate::config::agent::Backlog as Settings;
use crate::crypto::scratch::{SEAL_BYTES, Scratch};
use crate::storage::AlignedBuf;
use crate::storage::log::format::RECORD_HEADER_LEN;
use crate::storage::log::service::{self, Append, Appended, LogHandle, Setup};
use crate::storage::log::{Location, LogError, Options};
use crate::storage::uring::create_dir_durable;
use crate::wire::WireError;
use crate::wire::ingest::{FRAME_LEN, Frame, decode_change, encode_change};

/// Size of a segment file. A record, a segment of the backlog, is 256 KiB and a little.
const FILE_BYTES: u64 = 16 << 20;
/// Longest record: a segment full of the largest markers.
const RECORD_BYTES_MAX: usize = 8 << 20;
/// Records on their way to the log at once.
const UNDER_WAY_MAX: usize = 16;
const COMPLETIONS_QUEUED_MAX: usize = 64;
/// How often backlogs are looked at.
const LOOK: Duration = Duration::from_millis(10);

/// Why a segment cannot be read back.
#[derive(Debug, Error)]
pub enum SpillError {
    /// The log.
    #[error(transparent)]
    Log(#[from] LogError),
    /// It is damaged.
    #[error("a segment of the agent's log is damaged")]
    Damaged,
    /// It is damaged.
    #[error("a segment of the agent's log is damaged: {0}")]
    Wire(#[from] WireError),
}

/// What comes back with a written segment.
struct Tag {
    volume: usize,
    name: SegmentName,
    _place: tokio::sync::OwnedSemaphorePermit,
}

/// The agent's log.
pub struct Spill {
    handle: LogHandle<Tag>,
    scratch: Scratch,
}

impl Spill {
    /// Makes an empty log in `state`, and the thread that fills it. `None` if there is to be none.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn start(state: &Path, settings: &Settings, shared: Arc<AgentShared>) -> io::Result<Option<Arc<Self>>> {
        let dir = state.join("backlog");
        remove_left_over(&dir)?;
        if settings.log_max == 0 {
            return Ok(None);
        }
        create_dir_durable(&dir)?;
        let (results, completions) = mpsc::channel(COMPLETIONS_QUEUED_MAX);
        // One more for each disk: a file is used again when all in it was given back.
        let files = settings.log_max.div_ceil(FILE_BYTES) as usize + 1 + shared.volumes.len();
        let setup = Setup {
            name: "backlog",
            dir,
            id: Uuid::new_v4(),
            options: Options { segment_bytes: FILE_BYTES, segments_max: files, body_bytes_max: RECORD_BYTES_MAX },
            completions: results,
            observe_commit: |_| {},
        };
        let (handle, _, _) = service::spawn(setup).map_err(io::Error::other)?;
        let spill = Arc::new(Self { handle, scratch: Scratch::default() });
        let for_thread = spill.clone();
        std::thread::Builder::new().name("spill".to_owned()).spawn(move || {
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime on one thread can always be built");
            runtime.block_on(for_thread.run(&shared, completions));
        })?;
        Ok(Some(spill))
    }

    async fn run(&self, shared: &AgentShared, mut completions: mpsc::Receiver<Vec<Appended<Tag>>>) {
        let places = Arc::new(Semaphore::new(UNDER_WAY_MAX));
        let mut told = false;
        while !shared.stopping.load(Ordering::Relaxed) {
            let waited = tokio::time::timeout(LOOK, completions.recv()).await;
            for appended in waited.ok().flatten().into_iter().flatten() {
                let volume = &shared.volumes[appended.tag.volume];
                let place = appended.result.map(|(location, _)| location);
                if let (Err(error), false) = (&place, told) {
                    told = true;
                    tracing::error!(%error, "the agent's log cannot be written any more; what memory has no room for is tracked by region");
                }
                volume.backlog().spilled(appended.tag.name, place.ok());
                shared.wake.ring();
            }
            for (index, volume) in shared.volumes.iter().enumerate() {
                self.fill(index, volume, &places).await;
                let given_up = volume.backlog().take_given_up();
                if !given_up.is_empty() {
                    self.handle.release(given_up).await;
                }
            }
        }
    }

    async fn fill(&self, index: usize, volume: &VolumeShared, places: &Arc<Semaphore>) {
        if self.handle.figures.failed.load(Ordering::Relaxed) != 0 {
            return;
        }
        // What finds no place is written after some of these are: the order in the log is of no importance.
        while let Ok(place) = places.clone().try_acquire_owned() {
            let Some((name, changes)) = volume.backlog().spill() else { return };
            let record = self.record(index, name, &changes);
            let tag = Tag { volume: index, name, _place: place };
            match self.handle.reserve().await {
                Ok(slot) => slot.send(Append { record, tag }),
                Err(_) => return volume.backlog().spilled(name, None),
            }
        }
    }

    fn record(&self, volume: usize, name: SegmentName, changes: &[Held]) -> AlignedBuf {
        let mut plain = Vec::with_capacity(changes.iter().map(|held| FRAME_LEN + held.kind.data_len()).sum());
        for (index, held) in changes.iter().enumerate() {
            // Whatever was taken into the backlog encodes: the session does the same.
            let _ = encode_change(0, index as u64 + 1, &held.kind, held.captured.0, &mut plain);
        }
        let mut record = AlignedBuf::with_capacity(RECORD_HEADER_LEN + plain.len() + SEAL_BYTES);
        record.pad_to(RECORD_HEADER_LEN);
        self.scratch.seal(&name_bytes(volume, name), &plain, &mut record);
        record
    }

    /// Reads a segment back.
    ///
    /// # Errors
    /// [`SpillError`]; the stream has to begin anew.
    pub async fn read(&self, volume: usize, name: SegmentName, location: Location) -> Result<Vec<Held>, SpillError> {
        let record = self.handle.read(location).await?;
        let plain = self.scratch.open(&name_bytes(volume, name), &record[RECORD_HEADER_LEN..]).ok_or(SpillError::Damaged)?;
        let plain = Bytes::from(plain);
        let mut changes = Vec::new();
        let mut at = 0;
        while at < plain.len() {
            let header = plain.get(at..).and_then(|rest| rest.first_chunk::<FRAME_LEN>()).ok_or(SpillError::Damaged)?;
            let frame = Frame::decode(header)?;
            let (from, to) = (at + FRAME_LEN, at + FRAME_LEN + frame.payload_len as usize);
            if to > plain.len() {
                return Err(SpillError::Damaged);
            }
            changes.push(Held { kind: decode_change(&frame, plain.slice(from..to))?, captured: Mono(frame.age_us) });
            at = to;
        }
        Ok(changes)
    }

    /// Whether it takes nothing any more.
    pub fn has_failed(&self) -> bool {
        self.handle.figures.failed.load(Ordering::Relaxed) != 0
    }
}

/// A record read from another place is not taken for what stood there.
fn name_bytes(volume: usize, name: SegmentName) -> [u8; 24] {
    let mut bytes = [0; 24];
    bytes[..8].copy_from_slice(&(volume as u64).to_le_bytes());
    bytes[8..16].copy_from_slice(&name.life.to_le_bytes());
    bytes[16..].copy_from_slice(&name.first.to_le_bytes());
    bytes
}

/// Removes the log of an earlier life, which nobody can read.
fn remove_left_over(dir: &Path) -> io::Result<()> {
    match std::fs::remove_dir_all(dir) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}
