//! Hands the machine over in a planned failover: takes no more writes, makes the final point, and stays so over restarts until
//! the machine may go on.
//!
//! The note that writes are refused is durable before the final marker is made: whatever happens to this process afterwards,
//! nothing is written behind the point from which the machine goes on elsewhere.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::Capture;
use super::markers::Mark;
use crate::clock;
use crate::model::{PointId, PointKind, Wanted};
use crate::storage::uring::sync_dir;

/// Between two attempts at the final point: regions may still have to be sent.
const AGAIN: Duration = Duration::from_millis(200);
/// Writes under way have this long to finish.
const DRAIN_LIMIT: Duration = Duration::from_secs(30);
/// A wish that could not be fulfilled is tried again after this: writes that cannot be held for long are not held at once again.
const QUIESCE_AGAIN: Duration = Duration::from_secs(30);
const RELEASE_AGAIN: Duration = Duration::from_secs(1);
const LABEL: &str = "planned failover";

/// Says that writes are refused, and for which point.
fn note_path(state: &Path) -> PathBuf {
    state.join("handed-over")
}

/// Says which point's failover is over for this machine: it runs here again.
fn declined_path(state: &Path) -> PathBuf {
    state.join("resumed-after")
}

/// Whether the machine was handed over before the last stop.
pub(super) fn is_noted(state: &Path) -> bool {
    note_path(state).exists()
}

impl Capture {
    /// Whether writes are refused.
    pub(super) fn is_handed_over(&self) -> bool {
        self.gate.is_closed()
    }

    /// Does what the master target wants, if need be again and again: it is told once, and another word ends it.
    pub(super) async fn heed(self: Rc<Self>, wanted: Wanted) {
        self.word.set(Some(wanted));
        while let Err(error) = self.obey(wanted).await {
            tracing::error!(machine = %self.shared.machine, error, "the master target's wish cannot be fulfilled now; it is tried again");
            tokio::time::sleep(if wanted == Wanted::Release { RELEASE_AGAIN } else { QUIESCE_AGAIN }).await;
            if self.word.get() != Some(wanted) {
                return;
            }
        }
    }

    /// Repeating changes nothing.
    async fn obey(self: &Rc<Self>, wanted: Wanted) -> Result<(), String> {
        match wanted {
            Wanted::Release => {
                // Also of one that is not done stopping.
                self.final_point.set(None);
                if self.is_handed_over() { self.go_on() } else { Ok(()) }
            }
            Wanted::Run => Ok(()),
            // A word that is older than the machine's return; whoever repeats it has not heard of that.
            Wanted::Quiesce(point)
                if std::fs::read_to_string(declined_path(&self.settings.state)).is_ok_and(|id| id == point.to_string()) =>
            {
                Ok(())
            }
            Wanted::Quiesce(point) => {
                if self.final_point.replace(Some(point)) == Some(point) {
                    return Ok(());
                }
                let result = self.quiesce(point).await;
                if result.is_err() && self.final_point.get() == Some(point) {
                    self.final_point.set(None);
                }
                result
            }
        }
    }

    async fn quiesce(self: &Rc<Self>, point: PointId) -> Result<(), String> {
        let _one_at_a_time = self.marking.lock().await;
        if !self.is_handed_over() {
            self.gate.hold();
            let drained = tokio::time::timeout(DRAIN_LIMIT, self.gate.drained()).await;
            // From here to the closed gate nothing waits, so that nobody can take the word back unnoticed.
            if self.final_point.get() != Some(point) {
                self.gate.release();
                return Ok(());
            }
            if drained.is_err() {
                self.gate.release();
                return Err("writes under way did not finish: the machine goes on".to_owned());
            }
        } else if self.final_point.get() != Some(point) {
            return Ok(());
        }
        // Also of a point that takes the place of one that was lost: it is this one that a return of the machine ends.
        if let Err(error) = self.note(point) {
            // Stays closed if it was.
            self.gate.release();
            return Err(format!("cannot note that the machine is handed over: {error}"));
        }
        if !self.is_handed_over() {
            self.gate.close();
            self.gate.release();
            self.shared.handed_over.store(true, Ordering::Relaxed);
            tracing::warn!(machine = %self.shared.machine, %point, "planned failover: the disks take no more writes from here on");
        }
        for volume in &self.volumes {
            volume.make_durable().await.map_err(|e| format!("{}: {e}", volume.shared.label))?;
        }
        let capture = self.clone();
        // Regions that are not in the stream come first; the capture thread serves reads meanwhile.
        tokio::task::spawn_local(async move {
            while capture.final_point.get() == Some(point) && capture.is_handed_over() {
                // A difference that a scrub still finds is sent again before the point, too.
                if capture.is_consistent() && capture.volumes.iter().all(|v| v.scrub_rests()) {
                    let _one_at_a_time = capture.marking.lock().await;
                    match capture.insert(Mark { point, ..Mark::plain(Some(LABEL.to_owned()), PointKind::Crash) }, clock::now()) {
                        Ok(made) => {
                            return tracing::info!(machine = %capture.shared.machine, point = %made.point, "the final point is in the stream");
                        }
                        Err(skip) => tracing::debug!(%skip, "the final point waits"),
                    }
                }
                tokio::time::sleep(AGAIN).await;
            }
        });
        Ok(())
    }

    /// The machine is here again.
    ///
    /// # Errors
    /// If the note cannot be removed durably: writes stay refused.
    pub(super) fn go_on(&self) -> Result<(), String> {
        let path = note_path(&self.settings.state);
        let stopping = self.final_point.get().map(|point| point.to_string().into_bytes());
        let point = std::fs::read(&path).ok().or(stopping).unwrap_or_default();
        if !point.is_empty() {
            write_durable(&declined_path(&self.settings.state), &point).map_err(|e| format!("{}: {e}", path.display()))?;
        }
        let removed = match std::fs::remove_file(&path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(e),
            _ => sync_dir(&self.settings.state),
        };
        removed.map_err(|e| format!("{}: {e}", path.display()))?;
        self.final_point.set(None);
        self.gate.reopen();
        self.shared.handed_over.store(false, Ordering::Relaxed);
        tracing::info!(machine = %self.shared.machine, "the disks take writes again");
        Ok(())
    }

    fn note(&self, point: PointId) -> std::io::Result<()> {
        write_durable(&note_path(&self.settings.state), point.to_string().as_bytes())?;
        sync_dir(&self.settings.state)
    }
}

fn write_durable(path: &Path, text: &[u8]) -> std::io::Result<()> {
    let mut file = std::fs::File::create(path)?;
    file.write_all(text)?;
    file.sync_all()
}
