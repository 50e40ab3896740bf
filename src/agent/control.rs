//! What the agent tells the command line, and the points it makes for it.

use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};

use super::backlog::Fate;
use super::rest::Trouble;
use super::shared::Made;
use super::{Agent, AgentShared, Command};
use crate::clock;
use crate::control::api::{ApiError, DiskView, MachineView, Marked, Request, RoleStatus, ScrubView, Verifying};
use crate::control::server::{Answer, Role};
use crate::model::change::{LABEL_RULE, may_be_given};
use crate::model::{Health, PointKind, ReplicationState};

/// How often is looked whether a point is safe.
const LOOK: Duration = Duration::from_millis(20);

struct Control {
    shared: Arc<AgentShared>,
    commands: mpsc::Sender<Command>,
}

impl Agent {
    /// Its side of the control interface.
    pub fn control(&self) -> Arc<dyn Role> {
        Arc::new(Control { shared: self.shared.clone(), commands: self.commands.clone() })
    }
}

impl Role for Control {
    fn status(&self) -> RoleStatus {
        let connected = self.shared.connected.load(Ordering::Relaxed);
        let error = self.shared.last_error.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let handed_over = self.shared.handed_over.load(Ordering::Relaxed);
        let view = |v: &Arc<super::shared::VolumeShared>| disk(v, handed_over, connected && !v.open.load(Ordering::Relaxed));
        let disks: Vec<DiskView> = self.shared.volumes.iter().map(view).collect();
        let Trouble { stuck, failed } = self.shared.rest.trouble();
        let failed = failed.map(|reason| format!("the last application-consistent point could not be made: {reason}"));
        let at_rest = stuck.map(|reason| format!("something may still be frozen: {reason}")).or(failed);
        let group = self.shared.group.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let group_name = group.group.as_ref().map(|(name, _)| name.to_string());
        let worst = disks.iter().map(|d| d.health).max().unwrap_or_default();
        let (health, reason, remedy) = match (connected, error) {
            (false, error) => (
                Health::Critical,
                error.or(Some("not connected to the process server".to_owned())),
                Some("correct what the reason names, or check the process server and the network; writes go on and are kept".to_owned()),
            ),
            // What the other side refuses then is as it should be.
            (true, Some(error)) if !handed_over => (
                Health::Warning.max(worst),
                Some(error),
                Some("correct what the reason names; it is tried again every few seconds".to_owned()),
            ),
            (true, None) if worst < Health::Critical && at_rest.is_some() => {
                let remedy = "correct what the reason names; `tidegate point mark --app` tries it again";
                (Health::Warning.max(worst), at_rest, Some(remedy.to_owned()))
            }
            (true, None) if worst == Health::Healthy && group.configured && !group.connected => {
                let remedy = "check the coordinator and the network; points of this machine alone go on, those of its group do without it";
                (
                    Health::Warning,
                    Some(group.error.unwrap_or_else(|| "not connected to the coordinator".to_owned())),
                    Some(remedy.to_owned()),
                )
            }
            (true, _) => {
                let of = disks.iter().find(|d| d.reason.is_some());
                (worst, of.and_then(|d| d.reason.clone()), of.and_then(|d| d.remedy.clone()))
            }
        };
        let machine = MachineView {
            name: self.shared.machine.to_string(),
            id: self.shared.machine_id.to_string(),
            health: worst,
            rpo_seconds: None,
            points: None,
            oldest_point: None,
            newest_point: None,
            group: group_name,
            failover: None,
            last_test: None,
            disks,
        };
        RoleStatus {
            role: "agent".to_owned(),
            name: self.shared.machine.to_string(),
            health,
            reason,
            remedy,
            machines: vec![machine],
            cache_bytes: None,
            connected: Some(connected),
            gateway: self.shared.gateway.lock().unwrap_or_else(PoisonError::into_inner).as_ref().map(|(_, name)| name.to_string()),
            ..RoleStatus::default()
        }
    }

    fn call<'a>(&'a self, request: &'a Request, _: &'a str) -> Answer<'a> {
        Box::pin(async move {
            if let Request::VerifyDisk { disk, what } = request {
                return Some(
                    self.verify(disk, *what).await.and_then(|v| serde_json::to_value(v).map_err(|e| ApiError { message: e.to_string() })),
                );
            }
            let (Request::Mark { machine, .. } | Request::Resume { machine }) = request else { return None };
            if *machine != self.shared.machine.as_str() {
                let message = format!("this agent protects machine {}, not {machine}: ask the agent of {machine}", self.shared.machine);
                return Some(Err(ApiError { message }));
            }
            let Request::Mark { label, app, wait_seconds, .. } = request else {
                let (done, answer) = oneshot::channel();
                let gone = || ApiError { message: "the agent is stopping".to_owned() };
                if self.commands.send(Command::Resume(done)).await.is_err() {
                    return Some(Err(gone()));
                }
                let resumed = answer.await.map_err(|_| gone()).and_then(|r| r.map_err(|message| ApiError { message }));
                return Some(resumed.map(|()| serde_json::Value::Null));
            };
            if label.as_ref().is_some_and(|label| !may_be_given(label)) {
                return Some(Err(ApiError { message: LABEL_RULE.to_owned() }));
            }
            let kind = if *app { PointKind::App } else { PointKind::Crash };
            let (done, answer) = oneshot::channel();
            let asked = self.commands.send(Command::Mark { label: label.clone(), kind, done }).await;
            let made = match asked {
                Ok(()) => answer.await.unwrap_or_else(|_| Err("the agent is stopping".to_owned())),
                Err(_) => Err("the agent is stopping".to_owned()),
            };
            let made = match (made, wait_seconds) {
                (Ok(made), Some(seconds)) => self.wait_until_safe(&made, Duration::from_secs(u64::from(*seconds))).await.map(|()| made),
                (made, _) => made,
            };
            let marked = made.map(|made| {
                let kind = if made.remark.is_none() { kind } else { PointKind::Crash };
                Marked { point: made.point.to_string(), kind: kind.as_str().to_owned(), remark: made.remark }
            });
            Some(
                marked
                    .map_err(|message| ApiError { message })
                    .and_then(|m| serde_json::to_value(m).map_err(|e| ApiError { message: e.to_string() })),
            )
        })
    }
}

impl Control {
    /// Until every disk's marker is durable at the master target.
    async fn wait_until_safe(&self, made: &Made, limit: Duration) -> Result<(), String> {
        let began = clock::now();
        loop {
            let fates: Vec<Fate> = self.shared.volumes.iter().zip(&made.numbers).map(|(v, number)| v.backlog().fate(*number)).collect();
            if fates.contains(&Fate::Lost) {
                return Err(format!(
                    "point {} was lost: the stream of a disk began anew before it had arrived (the log of the agent says why). Make another one when the machine is in delta replication again",
                    made.point
                ));
            }
            if fates.iter().all(|fate| *fate == Fate::Safe) {
                return Ok(());
            }
            if clock::now().since(began) >= limit {
                return Err(format!(
                    "point {} is not safe at the master target after {} s; it is still on its way, `tidegate status` says what holds it up",
                    made.point,
                    limit.as_secs()
                ));
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    async fn verify(&self, disk: &str, what: Verifying) -> Result<ScrubView, ApiError> {
        let gone = || ApiError { message: "the agent is stopping".to_owned() };
        let found = self.shared.volumes.iter().enumerate().find(|(_, v)| v.label == disk || v.name.as_str() == disk);
        let Some((index, volume)) = found else {
            let known: Vec<&str> = self.shared.volumes.iter().map(|v| v.label.as_str()).collect();
            return Err(ApiError { message: format!("this agent has no disk {disk}; it has {}", known.join(", ")) });
        };
        if what == Verifying::Begin {
            let (done, answer) = oneshot::channel();
            self.commands.send(Command::VerifyDisk { volume: index, done }).await.map_err(|_| gone())?;
            answer.await.map_err(|_| gone())?;
        }
        Ok(scrub_view(volume, what))
    }
}

fn scrub_view(volume: &super::shared::VolumeShared, what: Verifying) -> ScrubView {
    let rounds = volume.scrub();
    let (round, last) = match what {
        Verifying::Any => (rounds.under_way, rounds.last),
        // The next one begins by itself as soon as it has ended.
        Verifying::Begin | Verifying::Asked => (rounds.under_way.filter(|round| round.asked), rounds.last_asked),
    };
    let now = clock::now();
    let size = volume.size();
    let of = |round: &super::scrub::Round| size / round.regions.max(1) * round.done;
    let shown = round.as_ref().or(last.as_ref());
    let report = volume.report();
    let waits = match (&round, report.state, volume.open.load(Ordering::Relaxed)) {
        (None, ..) => None,
        (_, ReplicationState::FailedOver, _) => {
            Some("the machine was handed over: nothing is written here that could be compared".to_owned())
        }
        (_, ReplicationState::Delta, true) => None,
        (_, _, false) => Some("the process server does not take the disk now".to_owned()),
        (_, state, true) => Some(format!("the disk is in state {}: it is compared when everything is in the stream", state.as_str())),
    };
    ScrubView {
        disk: volume.label.clone(),
        running: round.is_some(),
        done_bytes: shown.map_or(0, |r| if r.ended.is_some() { size } else { of(r) }),
        total_bytes: size,
        differing_bytes: shown.map_or(0, |r| r.differing),
        unread_bytes: shown.map_or(0, |r| r.unread),
        seconds: shown.map_or(0.0, |r| r.ended.unwrap_or(now).since(r.began).as_secs_f64()),
        last_differing_bytes: last.as_ref().map(|r| r.differing),
        last_age_seconds: last.and_then(|r| r.ended).map(|at| now.since(at).as_secs_f64()),
        waits,
    }
}

/// A disk; `left_out`: the process server is there, and does not take it.
fn disk(volume: &super::shared::VolumeShared, handed_over: bool, left_out: bool) -> DiskView {
    let report = volume.report();
    let trouble = volume.trouble();
    let health = match report.state {
        _ if handed_over => Health::Critical,
        ReplicationState::Delta if trouble.is_some() || left_out => Health::Warning,
        ReplicationState::Delta => Health::Healthy,
        ReplicationState::InitialReplication | ReplicationState::Resynchronising => Health::Warning,
        ReplicationState::Error | ReplicationState::FailedOver => Health::Critical,
    };
    let (reason, remedy) = match trouble {
        trouble if handed_over => (
            Some(format!(
                "the machine was handed over in a planned failover: the disk takes no writes{}",
                trouble.map_or_else(String::new, |trouble| format!("; {trouble}"))
            )),
            Some(
                "while the failover stands it can be cancelled at the master target; if the machine runs nowhere else, and is to run here again: `tidegate machine resume`"
                    .to_owned(),
            ),
        ),
        Some(trouble) => (Some(trouble), Some("do what the reason says".to_owned())),
        None if left_out => (
            Some("the process server does not take the disk now".to_owned()),
            Some("wait a few seconds; then see why above, and what `tidegate status` says at the master target".to_owned()),
        ),
        None => (None, None),
    };
    let rungs = volume.backlog().rungs();
    DiskView {
        name: volume.name.to_string(),
        id: volume.id.to_string(),
        state: report.state.as_str().to_owned(),
        health,
        remedy,
        reason,
        size_bytes: Some(volume.size()),
        missing_bytes: report.missing_bytes,
        backlog_bytes: report.backlog_bytes,
        positions: rungs.iter().map(|(r, p)| (r.as_str().to_owned(), p.to_string())).collect(),
        ..DiskView::default()
    }
}
