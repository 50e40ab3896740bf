//! Makes the markers of points of this machine alone.
//!
//! No write has to wait for one. A write gets its sequence on this thread, before it is answered, and the marker goes into every
//! stream in one step on this thread. So what was answered before that step is in the point on every disk, and whatever was
//! written because of an answer after it is not. A write that is under way at that moment is answered later, and sequenced
//! later: as after a power cut it may be lost, and nobody has been told otherwise.

use std::rc::Rc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use thiserror::Error;
use uuid::Uuid;

use super::{Capture, Volume};
use crate::agent::rest::Frozen;
use crate::agent::rest::plan::Failure;
use crate::agent::shared::Made;
use crate::clock;
use crate::config::agent::OnFailure;
use crate::model::{ChangeKind, GroupPart, Marker, PointId, PointKind};
use crate::observe::metrics;

/// Why a point was not made.
#[derive(Clone, Debug, Error)]
pub enum Skip {
    /// Some regions are not in the stream.
    #[error("a disk of the machine is still being copied; points begin when initial replication or resynchronisation is complete")]
    NotConsistent,
    /// Nothing says how an application-consistent point is made.
    #[error(
        "application-consistent points need at least one [[app.hook]] in the agent's configuration: a mount, a guest_agent or a script"
    )]
    NoHooks,
    /// The machine could not be brought to rest, and no other point is wanted then.
    #[error("no application-consistent point (app.on_failure = \"skip\"): {}", .0.reason)]
    NotAtRest(Failure),
    /// The agent stops.
    #[error("the agent is stopping")]
    Stopping,
    /// Nothing is written here any more.
    #[error("the machine was handed over in a planned failover")]
    HandedOver,
    /// The stream has been cut off for so long that the backlog is full.
    #[error("the backlog is full of changes that wait for the process server")]
    BacklogFull,
    /// A label that receivers would refuse.
    #[error("a label has at most 256 bytes and no control characters")]
    Label,
}

impl Skip {
    pub(super) fn reason(&self) -> &'static str {
        match self {
            Skip::NotConsistent => "not-consistent",
            Skip::NoHooks => "no-hooks",
            Skip::NotAtRest(_) => "not-at-rest",
            Skip::Stopping => "stopping",
            Skip::HandedOver => "handed-over",
            Skip::BacklogFull => "backlog-full",
            Skip::Label => "label",
        }
    }
}

/// What a marker says beside the disks.
pub(super) struct Mark {
    pub(super) point: PointId,
    pub(super) kind: PointKind,
    pub(super) label: Option<String>,
    pub(super) group: Option<GroupPart>,
    pub(super) proof: Vec<u8>,
    pub(super) remark: Option<String>,
}

impl Mark {
    /// A new point of this machine alone.
    pub(super) fn plain(label: Option<String>, kind: PointKind) -> Self {
        Self { point: PointId(Uuid::new_v4()), kind, label, group: None, proof: vec![], remark: None }
    }
}

/// What a point is made of.
enum Rest<'a> {
    /// Crash-consistent, perhaps because of a failure.
    Crash(Option<Failure>),
    /// Application-consistent, if it still holds when the writes are held.
    App(&'a Frozen),
}

impl Rest<'_> {
    fn decide(self) -> Result<(), Option<Failure>> {
        match self {
            Rest::Crash(failure) => Err(failure),
            Rest::App(frozen) => frozen.is_still().map_err(Some),
        }
    }
}

/// Makes an application-consistent point every interval, if there is one.
pub(super) async fn app_timer(capture: Rc<Capture>) {
    let Some(interval) = capture.settings.app.interval else { return };
    let mut due = clock::now();
    loop {
        tokio::time::sleep(interval.saturating_sub(clock::now().since(due)).max(Duration::from_millis(1))).await;
        if capture.shared.stopping.load(Ordering::Relaxed) {
            return;
        }
        due = clock::now();
        if let Err(skip) = capture.mark(None, PointKind::App).await {
            tracing::warn!(machine = %capture.shared.machine, reason = %skip, "an application-consistent point is skipped");
        }
    }
}

/// Makes a point every interval, and one as soon as the machine becomes consistent.
pub(super) async fn timer(capture: Rc<Capture>) {
    let interval = capture.settings.points.interval;
    let mut told = false;
    let mut due = clock::now();
    loop {
        let wait = interval.saturating_sub(clock::now().since(due)).min(Duration::from_millis(100));
        tokio::time::sleep(wait.max(Duration::from_millis(1))).await;
        if capture.shared.stopping.load(Ordering::Relaxed) {
            return;
        }
        let consistent = capture.is_consistent();
        if clock::now().since(due) < interval && !(consistent && told) {
            continue;
        }
        due = clock::now();
        match capture.mark(None, PointKind::Crash).await {
            Ok(_) => told = false,
            Err(skip) => {
                // Logged once for each stretch without points; counted every time.
                if !told {
                    if matches!(skip, Skip::NotConsistent) {
                        // The state of the disk says the same, with its progress.
                        tracing::info!(machine = %capture.shared.machine, reason = %skip, "recovery points are skipped");
                    } else {
                        tracing::warn!(machine = %capture.shared.machine, reason = %skip, "recovery points are skipped");
                    }
                }
                told = true;
            }
        }
    }
}

impl Capture {
    /// Makes one point over all disks.
    ///
    /// # Errors
    /// [`Skip`], which was counted.
    pub async fn mark(&self, label: Option<String>, kind: PointKind) -> Result<Made, Skip> {
        let made = match kind {
            PointKind::Crash => self.try_mark(label, Rest::Crash(None)).await,
            PointKind::App => self.mark_at_rest(label).await,
        };
        match &made {
            Ok(_) => self.shared.points[0].fetch_add(1, Ordering::Relaxed),
            Err(skip) => {
                metrics::count_reason(metrics::POINTS_SKIPPED, skip.reason());
                self.shared.points[1].fetch_add(1, Ordering::Relaxed)
            }
        };
        made
    }

    /// Brings the machine to rest first. Other points may be made meanwhile.
    async fn mark_at_rest(&self, label: Option<String>) -> Result<Made, Skip> {
        if !self.shared.rest.is_configured() {
            return Err(Skip::NoHooks);
        }
        if let Some(skip) = self.cannot_mark() {
            return Err(skip);
        }
        match self.shared.rest.begin().await {
            Ok(frozen) => {
                let made = self.try_mark(label, Rest::App(&frozen)).await;
                frozen.undo().await;
                made
            }
            Err(failure) if self.settings.app.on_failure == OnFailure::Skip => Err(Skip::NotAtRest(failure)),
            Err(failure) => self.try_mark(label, Rest::Crash(Some(failure))).await,
        }
    }

    async fn try_mark(&self, label: Option<String>, rest: Rest<'_>) -> Result<Made, Skip> {
        let _one_at_a_time = self.marking.lock().await;
        if let Some(skip) = self.cannot_mark() {
            return Err(skip);
        }
        let started = clock::now();
        let (kind, remark) = match rest.decide() {
            Ok(()) => (PointKind::App, None),
            Err(None) => (PointKind::Crash, None),
            Err(Some(failure)) if self.settings.app.on_failure == OnFailure::Skip => return Err(Skip::NotAtRest(failure)),
            Err(Some(failure)) => {
                metrics::count_reason(metrics::APP_POINTS_LOST, failure.cause.as_str());
                (PointKind::Crash, Some(failure.remark()))
            }
        };
        let made = self.insert(Mark { remark, ..Mark::plain(label, kind) }, started)?;
        metrics::observe(metrics::HOLD, clock::now().since(started));
        Ok(made)
    }

    /// Puts the marker into every stream. Nothing awaits here: no write can be sequenced or answered between two disks. `started`
    /// is when writes began to be held for it.
    pub(super) fn insert(&self, mark: Mark, started: clock::Mono) -> Result<Made, Skip> {
        // A write that was under way may have met a full backlog.
        if !self.is_consistent() {
            return Err(Skip::NotConsistent);
        }
        if !self.volumes.iter().all(|v| v.shared.backlog().has_room_for_marker()) {
            return Err(Skip::BacklogFull);
        }
        let marker = Marker {
            point: mark.point,
            machine: self.shared.machine_id,
            kind: mark.kind,
            disks: self.volumes.iter().map(|v| v.shared.id).collect(),
            sizes: self.volumes.iter().map(|v| v.shared.size()).collect(),
            label: mark.label,
            wall_ms: clock::wall_ms(),
            hold_us: clock::micros(clock::now().since(started)),
            group: mark.group,
            proof: mark.proof,
            remark: mark.remark,
        };
        if !marker.is_sane() {
            return Err(Skip::Label);
        }
        let push = |volume: &Rc<Volume>| volume.shared.backlog().push(ChangeKind::Mark(Box::new(marker.clone())), clock::now());
        let numbers = self.volumes.iter().map(|volume| push(volume).expect("a backlog always takes markers")).collect();
        self.shared.wake.ring();
        Ok(Made { point: marker.point, numbers, remark: marker.remark })
    }
}
