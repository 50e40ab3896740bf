//! What the master target tells the command line and Prometheus.

use std::collections::{BTreeSet, HashMap};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use serde_json::Value;
use tokio::sync::{mpsc, oneshot};

use super::MasterTarget;
use super::bad::BadPoint;
use super::catalogue::Records;
use super::failover::Desk;
use super::group_views::{self, age_seconds};
use super::journal::JournalHandle;
use super::lookup::{self, Found};
use super::policy::{self, LivePolicy, SetValues};
use super::recover::{self, Recoveries, Target};
use super::shared::{Condition, DiskShared, TargetShared};
use super::verify::{self, digest};
use crate::clock::{self, Mono};
use crate::control::api::{
    ApiError, DiskView, MachineView, PointDisk, PointView, PolicyGone, PolicyMachine, PolicySet, PolicyValues, PolicyView, RecoveryView,
    Request, RoleStatus,
};
use crate::control::groups::{GroupPointView, ResolvedPoint};
use crate::control::server::{Answer, Role};
use crate::disk::Format;
use crate::model::{DiskId, Health, Hold, MachineId, PointId, PointKind, Position, RecoveryPoint, ReplicationState, Rung};
use crate::observe::metrics;

const FIGURES_EVERY: Duration = Duration::from_secs(1);
/// A report older than this says nothing about now.
const REPORT_FRESH: Duration = Duration::from_secs(15);

/// The master target as the control interface sees it.
pub struct Control {
    pub(super) shared: Arc<TargetShared>,
    recoveries: Recoveries,
    recover: mpsc::Sender<recover::Command>,
    name: String,
    pub(super) records: Records,
    verify: verify::Handle,
    policy: Arc<LivePolicy>,
    failovers: Desk,
}

impl MasterTarget {
    /// Its side of the control interface.
    pub fn control(&self) -> Arc<dyn Role> {
        Arc::new(Control {
            shared: self.shared.clone(),
            recoveries: self.recoveries.clone(),
            recover: self.recover.clone(),
            name: self.name.clone(),
            records: self.records.clone(),
            verify: self.verify.clone(),
            policy: self.policy.clone(),
            failovers: self.failovers.clone(),
        })
    }
}

impl Role for Control {
    fn status(&self) -> RoleStatus {
        let mut machines = machines(&self.shared);
        for (view, disk) in
            machines.iter_mut().filter_map(|m| self.shared.disks.iter().find(|d| d.machine_name.as_str() == m.name).map(|d| (m, d)))
        {
            (view.failover, view.last_test) = self.failovers.of_machine(disk.machine);
        }
        let mut groups = group_views::status(&self.shared);
        groups.iter_mut().for_each(|group| group.failover = self.failovers.of_group(&group.name));
        let health = machines.iter().map(|m| m.health).max().unwrap_or_default();
        let worst = machines.iter().flat_map(|m| &m.disks).find(|d| d.health == health && d.reason.is_some());
        let (reason, remedy) = worst.map_or((None, None), |d| (d.reason.clone(), d.remedy.clone()));
        RoleStatus {
            role: "master-target".to_owned(),
            name: self.name.clone(),
            health,
            reason,
            remedy,
            machines,
            cache_bytes: None,
            connected: None,
            groups,
            ..RoleStatus::default()
        }
    }

    fn call<'a>(&'a self, request: &'a Request, by: &'a str) -> Answer<'a> {
        Box::pin(async move {
            let result = match request {
                Request::Points { machine } => self.points(machine.as_deref()).and_then(|points| to_value(&points)),
                Request::GroupPoints { group } => group_views::points(&self.shared, group.as_deref()).and_then(|points| to_value(&points)),
                Request::ResolvePoint { point, machine } => self.resolve(point, machine.as_deref()).and_then(|found| to_value(&found)),
                Request::PinGroupPoint { point, pinned } => self.pin_group_point(point, *pinned).await.and_then(|point| to_value(&point)),
                Request::Mount { point, disk, nbd, read_only } => {
                    let target = Target::Nbd { address: nbd.clone(), writable: !read_only };
                    self.start(point, disk.as_deref(), target).await.and_then(|v| to_value(&v))
                }
                Request::Export { point, disk, format, output } => match format.parse::<Format>() {
                    Ok(format) => {
                        self.start(point, disk.as_deref(), Target::File(format, PathBuf::from(output))).await.and_then(|v| to_value(&v))
                    }
                    Err(message) => Err(message),
                },
                Request::Pin { point, pinned } => self.pin(point, *pinned).await.and_then(|point| to_value(&point)),
                Request::Policy { machine, values } => {
                    let set = self.with_set(machine.as_deref(), values, false);
                    self.policy(machine.as_deref(), &set).and_then(|view| to_value(&view))
                }
                Request::SetPolicy { machine, values, reset, agreed } => {
                    self.set_policy(machine.as_deref(), values, *reset, *agreed).await.and_then(|set| to_value(&set))
                }
                Request::FailoverPlan { machine, point } => self.failovers.plan(machine, point).await.and_then(|plan| to_value(&plan)),
                Request::FailoverStart { kind, machine, point, hook, overwrite } => {
                    let started = self.failovers.start(*kind, machine, point.clone(), hook.clone(), overwrite.clone(), by);
                    started.await.and_then(|job| to_value(&job))
                }
                Request::FailoverDecide { job, decision } => self.failovers.decide(job, decision, by).await.and_then(|job| to_value(&job)),
                Request::GroupFailover { group, ask } => self.failovers.group(group, ask, by).await,
                Request::Named { name } => to_value(&self.failovers.named(name)),
                Request::Failovers => to_value(&self.failovers.list()),
                Request::Recoveries => to_value(&self.recoveries.list()),
                Request::BadPoints { machine } => self.bad_points(machine.as_deref()).and_then(|points| to_value(&points)),
                Request::RestoreBad { point } => self.restore_bad(point).await.and_then(|view| to_value(&view)),
                Request::ForgetBad { point, machine, kept } => {
                    self.forget_bad(point.as_deref(), machine.as_deref(), *kept).await.and_then(|count| to_value(&count))
                }
                Request::Verify { point } => match self.find_point(point) {
                    Ok(point) => self.verify.start(point.id).await.and_then(|view| to_value(&view)),
                    Err(message) => Err(message),
                },
                Request::Verifications => to_value(&self.verify.list()),
                Request::Unmount { name } => self.unmount(name).await.and_then(|()| to_value(&())),
                Request::Status
                | Request::Mark { .. }
                | Request::Resume { .. }
                | Request::Drain { .. }
                | Request::VerifyDisk { .. }
                | Request::Groups
                | Request::GroupCreate { .. }
                | Request::GroupChange { .. }
                | Request::GroupSet { .. }
                | Request::GroupDelete { .. }
                | Request::GroupMark { .. } => return None,
            };
            Some(result.map_err(|message| ApiError { message }))
        })
    }
}

fn to_value<T: serde::Serialize>(value: &T) -> Result<Value, String> {
    serde_json::to_value(value).map_err(|e| e.to_string())
}

impl Control {
    pub(super) fn machine_names(&self) -> HashMap<MachineId, String> {
        group_views::machine_names(&self.shared)
    }

    fn points(&self, machine: Option<&str>) -> Result<Vec<PointView>, String> {
        let names = self.machine_names();
        check_machine(&names, machine)?;
        let wanted = |p: &RecoveryPoint| machine.is_none_or(|m| names.get(&p.machine).is_some_and(|n| n == m));
        // The book is looked into for each of them again: not while it is held.
        let all = self.shared.book().all();
        Ok(all.into_iter().filter(wanted).map(|p| self.view(&p, &names)).collect())
    }

    pub(super) fn view(&self, point: &RecoveryPoint, names: &HashMap<MachineId, String>) -> PointView {
        let (verification, group) = {
            let book = self.shared.book();
            (book.verification(point.id).cloned(), book.groups().whole_of(point).map(|e| e.statement.clone()))
        };
        let disk_name = |id: DiskId| self.shared.disk(id).map_or_else(|| "(removed)".to_owned(), |d| d.name.to_string());
        let disk = |(id, at): (&DiskId, &Position)| PointDisk {
            name: disk_name(*id),
            id: id.to_string(),
            position: at.to_string(),
            size_bytes: point.sizes.get(id).copied(),
            digest: verification.as_ref().and_then(|v| v.digests.get(id)).map(digest::show),
        };
        PointView {
            id: point.id.to_string(),
            machine: names.get(&point.machine).cloned().unwrap_or_else(|| point.machine.to_string()),
            kind: point.kind.as_str().to_owned(),
            label: point.label.clone(),
            remark: point.remark.clone(),
            pinned: point.pinned,
            group: group.as_ref().map(|g| g.group.to_string()),
            group_point: group.as_ref().map(|g| g.point.to_string()),
            group_members: group.as_ref().map(|g| (g.members.len(), g.members.len() + g.missing.len())),
            time: clock::rfc3339(point.wall_ms),
            hold_seconds: Duration::from_micros(point.hold_us).as_secs_f64(),
            verified: verification.as_ref().map(|v| clock::rfc3339(v.wall_ms)),
            verified_age_seconds: verification.as_ref().map(|v| age_seconds(v.wall_ms)),
            disks: point.disks.iter().map(disk).collect(),
        }
    }

    /// A machine's point by id, by the beginning of its id, by its label, or `latest` when there is one machine.
    pub(super) fn find_point(&self, text: &str) -> Result<RecoveryPoint, String> {
        lookup::find_machine_point(&self.shared.book(), text, &self.machine_names()).cloned()
    }

    fn resolve(&self, text: &str, machine: Option<&str>) -> Result<ResolvedPoint, String> {
        let names = self.machine_names();
        check_machine(&names, machine)?;
        let machine = machine.and_then(|wanted| names.iter().find(|(_, name)| *name == wanted)).map(|(id, _)| *id);
        let book = self.shared.book();
        Ok(match lookup::find(&book, text, machine)? {
            Found::Machine(point) => ResolvedPoint { point: Some(point.id.to_string()), group_point: None },
            Found::Group(entry) => ResolvedPoint { point: None, group_point: Some(group_views::view(&book, entry, &names)) },
        })
    }

    fn find_disk(&self, point: &RecoveryPoint, name: Option<&str>) -> Result<(DiskId, String), String> {
        let disks: Vec<_> = point.disks.keys().filter_map(|id| self.shared.disk(*id)).collect();
        let found = match (name, &disks[..]) {
            (None, [only]) => Some(*only),
            (None, _) => {
                let names: Vec<_> = disks.iter().map(|d| d.name.as_str()).collect();
                return Err(format!("the point has several disks: choose one with --disk ({})", names.join(", ")));
            }
            (Some(name), _) => disks.iter().copied().find(|d| d.name.as_str() == name || d.id.to_string() == name),
        };
        found.map(|d| (d.id, d.label.clone())).ok_or_else(|| {
            let names: Vec<_> = disks.iter().map(|d| d.name.as_str()).collect();
            format!("the point has no disk {}; it has {}", name.unwrap_or_default(), names.join(", "))
        })
    }

    async fn pin(&self, point: &str, pinned: bool) -> Result<PointView, String> {
        // Nothing expires meanwhile.
        let _alone = self.shared.noting.lock().await;
        let point = self.find_point(point)?;
        self.pin_all(vec![point.clone()], pinned).await?;
        Ok(self.view(&RecoveryPoint { pinned, ..point }, &self.machine_names()))
    }

    async fn pin_group_point(&self, text: &str, pinned: bool) -> Result<GroupPointView, String> {
        let _alone = self.shared.noting.lock().await;
        let (id, parts) = {
            let book = self.shared.book();
            let Found::Group(entry) = lookup::find(&book, text, None)? else { return Err(format!("{text} is no point of a group")) };
            (entry.statement.point, group_views::parts(&book, entry).into_iter().cloned().collect())
        };
        self.pin_all(parts, pinned).await?;
        let book = self.shared.book();
        let entry = book.groups().entry(id).ok_or("the point is not listed any more")?;
        Ok(group_views::view(&book, entry, &self.machine_names()))
    }

    /// All of them or none, durably when it returns. Nothing expires meanwhile, the caller sees to it.
    async fn pin_all(&self, points: Vec<RecoveryPoint>, pinned: bool) -> Result<(), String> {
        let changed: Vec<RecoveryPoint> = points.into_iter().map(|p| RecoveryPoint { pinned, ..p }).collect();
        let (records, noted) = (self.records.clone(), changed.clone());
        let done = tokio::task::spawn_blocking(move || records.put_points(&noted)).await;
        done.map_err(|e| e.to_string())?.map_err(|e| e.to_string())?;
        for point in changed {
            tracing::info!(point = %point.id, pinned, "a point was pinned or unpinned");
            self.shared.book().replace(point);
        }
        Ok(())
    }

    /// Durable and in use when it returns, unless points would go and nobody agreed.
    async fn set_policy(&self, machine: Option<&str>, values: &PolicyValues, reset: bool, agreed: bool) -> Result<PolicySet, String> {
        // Nothing expires meanwhile.
        let _alone = self.shared.noting.lock().await;
        let set = self.with_set(machine, values, reset);
        let view = self.policy(machine, &set)?;
        if !agreed && view.machines.iter().any(|m| !m.gone.is_empty()) {
            return Ok(PolicySet { done: false, policy: view });
        }
        let (records, changed) = (self.records.clone(), set.clone());
        let noted = tokio::task::spawn_blocking(move || records.put_policy(&changed)).await;
        noted.map_err(|e| e.to_string())?.map_err(|e| e.to_string())?;
        tracing::info!(machine, ?values, "the policy was set");
        self.policy.replace(set);
        Ok(PolicySet { done: true, policy: view })
    }

    /// What is set, with `values` for a machine or for all.
    fn with_set(&self, machine: Option<&str>, values: &PolicyValues, reset: bool) -> SetValues {
        let (name, mut set) = (machine.unwrap_or_default().to_owned(), self.policy.set());
        let older = if reset { PolicyValues::default() } else { set.get(&name).cloned().unwrap_or_default() };
        if reset && machine.is_none() {
            set.clear();
        }
        set.insert(name, policy::merged(older, values.clone()));
        set
    }

    /// The policy with `set`, and what it means now.
    fn policy(&self, machine: Option<&str>, set: &SetValues) -> Result<PolicyView, String> {
        let policy = self.policy.common(set)?;
        let mut machines: Vec<(MachineId, String)> = self.machine_names().into_iter().collect();
        machines.sort_by(|a, b| a.1.cmp(&b.1));
        if machine.is_some_and(|wanted| machines.iter().all(|(_, name)| name != wanted)) {
            return Err(format!("machine {} is not known here: see `tidegate machine list`", machine.unwrap_or_default()));
        }
        machines.retain(|(_, name)| machine.is_none_or(|wanted| wanted == name));
        let (book, clock) = (self.shared.book(), self.shared.clock());
        let of_machine = |(id, name): (MachineId, String)| {
            let (points, used) = (book.of(id), self.shared.retained_bytes(id));
            let gone = book.expired(id, &self.policy.of(set, &name)?, clock, used);
            Ok(PolicyMachine {
                own: self.policy.own(set, &name),
                machine: name,
                points: points.len(),
                pinned: points.iter().filter(|p| p.pinned).count(),
                held: self.shared.disks.iter().any(|d| d.machine == id && d.condition().hold != Hold::None),
                retained_bytes: used,
                // Each point's own interval holds about as much as another's.
                frees_bytes_about: used / points.len().max(1) as u64 * gone.len() as u64,
                gone: gone
                    .iter()
                    .filter_map(|(id, reason)| Some((book.get(*id)?, reason)))
                    .map(|(p, reason)| PolicyGone {
                        point: p.id.to_string(),
                        time: clock::rfc3339(p.wall_ms),
                        label: p.label.clone(),
                        reason: reason.as_str().to_owned(),
                    })
                    .collect(),
            })
        };
        Ok(PolicyView {
            set: set.get("").cloned().unwrap_or_default(),
            machines: machines.into_iter().map(of_machine).collect::<Result<_, String>>()?,
            ladder: policy.ladder.to_string(),
            points_min: policy.points_min,
            points_max: policy.points_max,
            span_seconds: policy.span.map(|s| s.as_secs()),
            space_max_bytes: policy.space_max,
        })
    }

    async fn start(&self, point: &str, disk: Option<&str>, target: Target) -> Result<RecoveryView, String> {
        let point = self.find_point(point)?;
        let (disk, label) = self.find_disk(&point, disk)?;
        let (done, answer) = oneshot::channel();
        let gone = || "the master target is stopping".to_owned();
        let id: PointId = point.id;
        self.recover.send(recover::Command::Start { point: id, disk, label, target, done }).await.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }

    async fn unmount(&self, name: &str) -> Result<(), String> {
        let (done, answer) = oneshot::channel();
        let gone = || "the master target is stopping".to_owned();
        self.recover.send(recover::Command::Stop { name: name.to_owned(), done }).await.map_err(|_| gone())?;
        if answer.await.map_err(|_| gone())? {
            Ok(())
        } else {
            Err(format!("there is no mount or export {name}: see `tidegate recover list`"))
        }
    }
}

/// Refuses the name of a machine that is none.
pub(super) fn check_machine(names: &HashMap<MachineId, String>, wanted: Option<&str>) -> Result<(), String> {
    match wanted {
        Some(wanted) if !names.values().any(|n| n == wanted) => {
            Err(format!("machine {wanted} is not known here: see `tidegate machine list`"))
        }
        _ => Ok(()),
    }
}

/// A disk that goes on well, whose history was damaged, says so until somebody has seen it.
fn tell_bad(shared: &TargetShared, machine: MachineId, disk: DiskId, view: &mut DiskView) {
    let book = shared.book();
    let bad: Vec<&BadPoint> = book.bad().into_iter().filter(|b| b.disk == disk).collect();
    if let (Health::Healthy, Some(newest)) = (view.health, bad.iter().max_by_key(|b| b.wall_ms)) {
        let points = if bad.len() == 1 { "1 recovery point".to_owned() } else { format!("{} recovery points", bad.len()) };
        view.health = Health::Warning;
        let others = if book.of(machine).is_empty() { "there are no others" } else { "the others are good" };
        view.reason = Some(format!("{points} became unusable: {}; {others}", newest.cause));
        let remedy = if bad.iter().any(|b| b.kept) {
            "find out which storage was damaged before anything else: if it was the source's, `tidegate point restore P` puts the good copies of \
             `tidegate point list --bad` back; `tidegate point forget` clears this, and deletes them for good"
        } else {
            "look at `tidegate point list --bad`, check the storage of the master target; `tidegate point forget P` (or --all) clears this"
        };
        view.remedy = Some(remedy.to_owned());
    }
}

fn machines(shared: &TargetShared) -> Vec<MachineView> {
    let now = clock::now();
    let mut machines: Vec<MachineView> = Vec::new();
    for disk in &shared.disks {
        let mut view = disk_view(disk, now);
        tell_bad(shared, disk.machine, disk.id, &mut view);
        match machines.iter_mut().find(|m| m.id == disk.machine.to_string()) {
            Some(machine) => {
                machine.health = machine.health.max(view.health);
                machine.rpo_seconds = machine.rpo_seconds.zip(view.rpo_seconds).map(|(a, b)| a.max(b));
                machine.disks.push(view);
            }
            None => {
                let book = shared.book();
                let points = book.of(disk.machine);
                machines.push(MachineView {
                    name: disk.machine_name.to_string(),
                    id: disk.machine.to_string(),
                    health: view.health,
                    rpo_seconds: view.rpo_seconds,
                    points: Some(points.len()),
                    oldest_point: points.first().map(|p| clock::rfc3339(p.wall_ms)),
                    newest_point: points.last().map(|p| clock::rfc3339(p.wall_ms)),
                    group: None,
                    failover: None,
                    last_test: None,
                    disks: vec![view],
                });
            }
        }
    }
    machines
}

fn disk_view(disk: &DiskShared, now: Mono) -> DiskView {
    let condition = disk.condition().clone();
    let report = condition.report.as_ref().filter(|(_, at)| now.since(*at) < REPORT_FRESH).map(|(r, _)| r.clone());
    let rungs = [
        (Rung::Received, condition.received),
        (Rung::Journaled, condition.journaled),
        (Rung::Applied, condition.applied),
        (Rung::Checkpointed, condition.checkpointed),
    ];
    let (health, reason, remedy) = judge(&condition, now, report.as_ref().map(|r| r.state));
    let parts = condition.newest.map(|n| [n.travel.source, n.travel.gateway, n.travel.link, n.apply].map(|d| d.as_secs_f64()));
    DiskView {
        name: disk.name.to_string(),
        id: disk.id.to_string(),
        state: match (&condition.error, &report) {
            (None, _) if condition.hold != Hold::None => ReplicationState::FailedOver.as_str().to_owned(),
            (Some(_), _) => ReplicationState::Error.as_str().to_owned(),
            (None, Some(report)) => report.state.as_str().to_owned(),
            (None, None) => "not connected".to_owned(),
        },
        health,
        reason,
        remedy,
        size_bytes: (condition.size > 0).then_some(condition.size),
        missing_bytes: report.as_ref().map_or(0, |r| r.missing_bytes),
        backlog_bytes: report.as_ref().map_or(0, |r| r.backlog_bytes),
        waiting_bytes: disk.waiting_bytes(),
        retained_bytes: condition.retained_bytes,
        replica_format: condition.image.as_ref().map(|(format, _)| format.as_str().to_owned()),
        replica_path: condition.image.as_ref().map(|(_, path)| path.display().to_string()),
        // Without points there is nothing to go back to, of whatever age.
        rpo_seconds: condition.newest.filter(|_| condition.hold < Hold::Committed).map(|n| now.since(n.travel.captured()).as_secs_f64()),
        rpo_parts: parts,
        positions: rungs.iter().map(|(r, p)| (r.as_str().to_owned(), p.to_string())).collect(),
    }
}

fn judge(condition: &Condition, now: Mono, state: Option<ReplicationState>) -> (Health, Option<String>, Option<String>) {
    let told = |health, reason: &str, remedy: &str| (health, Some(reason.to_owned()), Some(remedy.to_owned()));
    if condition.hold != Hold::None && condition.error.is_none() {
        let remedy = match condition.hold {
            Hold::Committed => {
                "`tidegate failover cleanup` gives the image files out of hand; until then the machine runs from the master target"
            }
            Hold::Released => "to replicate the machine here again: `tidegate failover reprotect`",
            _ => "decide with `tidegate failover commit`, `change-point` or `cancel`",
        };
        return told(Health::Warning, &condition.hold_reason, remedy);
    }
    if condition.unconfirmed && condition.error.is_none() {
        return told(
            Health::Warning,
            "the replica has content of its own; it is compared with the source, and not overwritten until somebody allows it",
            "`tidegate failover reprotect` says what differs, and takes the names of the disks that may be overwritten",
        );
    }
    if let (None, Some(refused)) = (&condition.error, &condition.refused) {
        return told(Health::Critical, refused, "do what the reason says; the points made so far stay good");
    }
    match (&condition.error, state) {
        (Some(error), _) => told(Health::Critical, error, "act on the reason; restart the master target if it does not go on by itself"),
        (None, None) if condition.size == 0 => {
            told(Health::Critical, "nothing has arrived yet", "start the agent and the process server, look at their logs")
        }
        (None, None) if condition.freed.is_some_and(|at| now.since(at) < REPORT_FRESH) => told(
            Health::Warning,
            "a failover was undone a moment ago; the agent is not heard yet",
            "wait: a running agent is heard within seconds",
        ),
        (None, None) => {
            let reason = match condition.report.as_ref().map(|(_, at)| now.since(*at)) {
                Some(silent) => format!("nothing heard from the agent for {} s", silent.as_secs()),
                None => "nothing heard from the agent since this master target was started".to_owned(),
            };
            told(Health::Critical, &reason, "check the agent, the process server and the network between them")
        }
        (None, Some(ReplicationState::InitialReplication)) => {
            told(Health::Warning, "initial replication is under way", "wait; points begin when it is complete")
        }
        (None, Some(ReplicationState::Resynchronising)) => {
            told(Health::Warning, "regions are being sent again", "wait; older points stay good meanwhile")
        }
        (None, Some(ReplicationState::Error)) => told(
            Health::Critical,
            "the source disk failed or became smaller",
            "ask `tidegate status` at the agent: it says which, and what to do",
        ),
        (None, Some(ReplicationState::FailedOver)) => told(
            Health::Warning,
            "the agent takes no writes: the machine was stopped for a planned failover",
            "see `tidegate failover list`; to let it go on, cancel the failover, or `tidegate machine resume` at the agent",
        ),
        (None, Some(ReplicationState::Delta)) => (Health::Healthy, None, None),
    }
}

/// Publishes figures once a second.
pub async fn publish(shared: &TargetShared, journal: &JournalHandle) {
    let mut groups = BTreeSet::new();
    loop {
        metrics::disk_gauge(metrics::JOURNAL_BYTES, "", metrics::number(journal.figures.live_bytes.load(Ordering::Relaxed)));
        let now = clock::now();
        for disk in &shared.disks {
            let view = disk_view(disk, now);
            let condition = disk.condition().clone();
            metrics::machine_gauge(metrics::FAILED_OVER, disk.machine_name.as_str(), f64::from(u8::from(condition.hold != Hold::None)));
            metrics::disk_gauge(metrics::DIFFERING_BYTES, &disk.label, metrics::number(disk.differing_bytes()));
            metrics::position(&disk.label, Rung::Received, condition.received);
            metrics::position(&disk.label, Rung::Journaled, condition.journaled);
            metrics::position(&disk.label, Rung::Applied, condition.applied);
            metrics::position(&disk.label, Rung::Checkpointed, condition.checkpointed);
            if let Some(rpo) = view.rpo_seconds {
                metrics::disk_gauge(metrics::RPO, &disk.label, rpo);
            }
            for (part, seconds) in ["source", "gateway", "link", "apply"].into_iter().zip(view.rpo_parts.unwrap_or_default()) {
                metrics::disk_part(metrics::RPO_PART, &disk.label, "part", part, seconds);
            }
        }
        metrics::points_incomplete(shared.book().incomplete());
        for machine in machines(shared) {
            let of = shared.disks.iter().find(|d| d.machine_name.as_str() == machine.name).map(|d| d.machine);
            let app = of.map_or(0, |of| shared.book().of(of).iter().filter(|p| p.kind == PointKind::App).count());
            metrics::machine_points(&machine.name, machine.points.unwrap_or_default().saturating_sub(app), app);
        }
        publish_trust(shared);
        group_views::publish(shared, &mut groups);
        tokio::time::sleep(FIGURES_EVERY).await;
    }
}

/// Publishes how far the points can be trusted.
fn publish_trust(shared: &TargetShared) {
    let book = shared.book();
    let names: HashMap<MachineId, &str> = shared.disks.iter().map(|d| (d.machine, d.machine_name.as_str())).collect();
    for (machine, name) in names {
        let bad = book.bad().iter().filter(|b| b.point.machine == machine).count();
        metrics::machine_gauge(metrics::POINTS_BAD, name, metrics::number(bad as u64));
        let newest = book.of(machine).into_iter().rev().find_map(|p| book.verification(p.id));
        metrics::machine_gauge(metrics::POINT_VERIFIED_AGE, name, newest.map_or(f64::NAN, |v| age_seconds(v.wall_ms)));
    }
}
