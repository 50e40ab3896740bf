//! Makes crash-consistent markers: hold, wait for what is under way, mark every stream in one step, release.

use std::rc::Rc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use thiserror::Error;
use uuid::Uuid;

use super::Capture;
use crate::clock;
use crate::model::{ChangeKind, GroupPart, Marker, PointId, PointKind};
use crate::observe::metrics;

/// Why a point was not made.
#[derive(Clone, Copy, Debug, Error)]
pub enum Skip {
    /// Some regions are not in the stream.
    #[error("a disk of the machine is still being copied; points begin when initial replication or resynchronisation is complete")]
    NotConsistent,
    /// Writes under way did not finish in the time allowed.
    #[error("writes under way did not finish within points.hold_max; the application was not held longer")]
    HoldTooLong,
    /// Only crash-consistent points are made by this version.
    #[error("application-consistent points are not available in this version")]
    NoAppPoints,
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
    pub(super) fn reason(self) -> &'static str {
        match self {
            Skip::NotConsistent => "not-consistent",
            Skip::HoldTooLong => "hold-too-long",
            Skip::NoAppPoints => "app-unavailable",
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
    pub async fn mark(&self, label: Option<String>, kind: PointKind) -> Result<PointId, Skip> {
        let made = self.try_mark(label, kind).await;
        match made {
            Ok(_) => self.shared.points[0].fetch_add(1, Ordering::Relaxed),
            Err(skip) => {
                metrics::count_reason(metrics::POINTS_SKIPPED, skip.reason());
                self.shared.points[1].fetch_add(1, Ordering::Relaxed)
            }
        };
        made
    }

    async fn try_mark(&self, label: Option<String>, kind: PointKind) -> Result<PointId, Skip> {
        let _one_at_a_time = self.marking.lock().await;
        if kind == PointKind::App {
            return Err(Skip::NoAppPoints);
        }
        if let Some(skip) = self.cannot_mark() {
            return Err(skip);
        }
        let started = clock::now();
        self.gate.hold();
        let drained = tokio::time::timeout(self.settings.points.hold_max, self.gate.drained()).await.is_ok();
        let point = if drained { self.insert(Mark::plain(label, kind), started) } else { Err(Skip::HoldTooLong) };
        self.let_writes_pass();
        metrics::observe(metrics::HOLD, clock::now().since(started));
        point
    }

    /// Puts the marker into every stream. Nothing awaits here: no write can come between two disks.
    pub(super) fn insert(&self, mark: Mark, started: clock::Mono) -> Result<PointId, Skip> {
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
        for volume in &self.volumes {
            volume.shared.backlog().push(ChangeKind::Mark(Box::new(marker.clone())), clock::now()).expect("a backlog always takes markers");
        }
        self.shared.wake.ring();
        Ok(marker.point)
    }
}
