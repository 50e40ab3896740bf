//! What jobs do, step by step. Each state is durable before its work begins and its work can be done again.

use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::sync::oneshot;

use super::engine::Engine;
use super::group::Stage;
use super::hooks::{self, Phase};
use crate::clock;
use crate::config::units::show_size;
use crate::master_target::apply::Command as ApplyCommand;
use crate::master_target::apply::failover::Order;
use crate::master_target::apply::roll::Progress;
use crate::master_target::catalogue::Effects;
use crate::master_target::recover::{Command as RecoverCommand, Serve};
use crate::master_target::shared::DiskShared;
use crate::model::job::{ChosenPoint, JobDisk};
use crate::model::{
    Address, Choice, DiskId, GroupPart, Hold, Job, JobKind, JobState, PointId, PointKind, Position, RecoveryPoint, ReplicationState, Wanted,
};

/// How often what is waited for is looked at.
const LOOK: Duration = Duration::from_millis(50);
/// Batches that were received must be in the journal by then, or the journal is stuck.
const JOURNAL_LIMIT: Duration = Duration::from_secs(60);
/// A marker that does not become a point for so long was lost.
const POINT_LIMIT: Duration = Duration::from_secs(30);
/// An agent that is heard and has not stopped after this is told of.
const STOP_LIMIT: Duration = Duration::from_secs(45);
/// Why a job ends that somebody does not want to wait for.
const CANCELLED: &str = "it was cancelled";
/// Between two attempts to note a job's end.
const KEEP_AGAIN: Duration = Duration::from_secs(1);

impl Engine {
    /// Does what the job's state asks for, until it waits for a person.
    pub(super) async fn run_job(self: &Rc<Self>, id: u64, restarted: bool) {
        let Ok(mut job) = self.job(id) else { return };
        let result = match job.state {
            JobState::Preparing | JobState::Running | JobState::CleaningUp if restarted => self.end_test(&mut job).await,
            JobState::Preparing => self.test(&mut job).await,
            JobState::CleaningUp => self.clean_up(&mut job).await,
            JobState::Quiescing | JobState::Draining => self.fail_over(&mut job).await,
            JobState::Rolling => self.roll(&mut job).await,
            JobState::FailedOver | JobState::Committed if restarted => self.stand_again(&mut job).await,
            JobState::Cancelling => self.roll_back(&mut job).await,
            JobState::Committing => self.end_history(&mut job).await,
            JobState::Releasing => self.release(&mut job).await,
            JobState::Comparing => self.compare(&mut job).await,
            JobState::Resynchronising => self.resynchronise(&mut job).await,
            _ => Ok(()),
        };
        let Err(error) = result else { return };
        job.end(Err(error.clone()), clock::wall_ms());
        // What somebody asked for is no failure.
        let cancelled = error == CANCELLED;
        job.error = (!cancelled).then(|| error.clone());
        job.remedy = Some(match job.state {
            // Nothing was changed yet.
            JobState::Preparing | JobState::Quiescing | JobState::Draining | JobState::Comparing => {
                self.unmount(&job).await;
                "nothing was changed: correct what the error names and ask again. Meanwhile `failover test` runs the machine from any point"
                    .to_owned()
            }
            JobState::Rolling => format!(
                "correct what the error names, then `tidegate failover change-point {id}` to go on or `tidegate failover cancel {id}` to go back; every point is as it was"
            ),
            JobState::Cancelling => format!("correct what the error names, then `tidegate failover cancel {id}` again"),
            _ => format!("correct what the error names, then ask again; see `tidegate failover show {id}`"),
        });
        let undone = matches!(job.state, JobState::Preparing | JobState::Quiescing | JobState::Draining | JobState::Comparing);
        if undone {
            job.enter(if cancelled { JobState::Cancelled } else { JobState::Failed }, clock::wall_ms());
        }
        if cancelled {
            job.remedy = None;
        } else {
            tracing::error!(job = id, machine = job.machine_name, error, "failover does not go on");
        }
        // The source goes on only when it is durable that this failover does not: a restart must not take it up again.
        let mut told = false;
        while let Err(error) = self.keep(job.clone(), &Effects::default()).await {
            if !std::mem::replace(&mut told, true) {
                tracing::error!(job = id, error, "the state of a failover cannot be noted; it is tried again");
            }
            tokio::time::sleep(KEEP_AGAIN).await;
        }
        if undone && job.kind != JobKind::Test && job.kind != JobKind::Reprotect {
            self.set_hold(&job, Hold::None);
            for disk in self.disks(job.machine) {
                disk.set_wanted(Wanted::Release);
            }
        }
    }

    /// Whether somebody wants a job to end instead of waiting. Asked between its durable steps, so that none is cut in two.
    pub(super) fn go_on_waiting(&self, id: u64) -> Result<(), String> {
        if self.given_up.borrow().contains(&id) { Err(CANCELLED.to_owned()) } else { Ok(()) }
    }

    async fn fail_over(self: &Rc<Self>, job: &mut Job) -> Result<(), String> {
        self.halt_and_choose(job).await?;
        // From here on nobody gives up by waiting: cancelling is a roll.
        self.roll(job).await
    }

    async fn halt_and_choose(self: &Rc<Self>, job: &mut Job) -> Result<(), String> {
        let disks = self.disks(job.machine);
        if job.state == JobState::Quiescing {
            self.quiesce(job, &disks).await?;
            self.meet(job, Stage::Stopped).await?;
            job.enter(JobState::Draining, clock::wall_ms());
            self.keep(job.clone(), &Effects::default()).await?;
        }
        // Durable by now: the hold comes back with a restart.
        self.set_hold(job, Hold::Draining);
        self.step(job, "take what has arrived").await?;
        let started = clock::now();
        for disk in &disks {
            loop {
                let condition = disk.condition().clone();
                if condition.received == condition.journaled {
                    break;
                }
                if clock::now().since(started) > JOURNAL_LIMIT {
                    return Err(format!("the journal does not take what arrived of {}", disk.label));
                }
                self.go_on_waiting(job.id)?;
                tokio::time::sleep(LOOK).await;
            }
        }
        for disk in &disks {
            self.settle(job, disk).await?;
        }
        self.done(job, None).await?;
        self.step(job, "halt the replicas").await?;
        self.set_hold(job, Hold::Standing);
        let mut unusable = BTreeMap::new();
        for disk in &disks {
            match self.order(disk.id, |done| Order::Halt { done }).await {
                Ok((before, size)) => set_disk(job, disk.id, |d| (d.before, d.size) = (Some(before), size)),
                // Only a disk that the point has is needed.
                Err(error) => drop(unusable.insert(disk.id, error)),
            }
        }
        self.done(job, None).await?;
        // Of a group nobody rolls when one cannot: what may be needed of a disk is settled before the machines meet.
        let is_of_points = |disk: &DiskId| self.setup.shared.book().of(job.machine).iter().any(|p| p.disks.contains_key(disk));
        if let (Some(_), Some((_, error))) = (&job.group, unusable.iter().find(|(disk, _)| is_of_points(disk))) {
            return Err(error.clone());
        }
        self.meet(job, Stage::Halted).await?;
        self.step(job, "choose the point").await?;
        self.go_on_waiting(job.id)?;
        // Nothing expires meanwhile; from here on the hold keeps every point.
        let noting = self.setup.shared.noting.lock().await;
        let point = self.choose(job)?;
        drop(noting);
        if let Some((_, error)) = unusable.iter().find(|(disk, _)| point.disks.contains_key(disk)) {
            return Err(error.clone());
        }
        let told = aim(job, &point);
        self.done(job, Some(told)).await?;
        job.enter(JobState::Rolling, clock::wall_ms());
        let stand = job.disks.iter().map(|d| (d.id, d.before)).collect();
        self.keep(job.clone(), &Effects { stand, ..Effects::default() }).await
    }

    /// Waits until a disk's replica stands at a checkpoint and nothing beyond it: what a crash cut off half-way has to be
    /// applied to its end first, whichever point is wanted, because old content that the attempt kept behind the checkpoint
    /// counts from where it was kept. With [`Choice::Latest`] also until everything that arrived is applied.
    async fn settle(&self, job: &Job, disk: &DiskShared) -> Result<(), String> {
        let has_points = self.setup.shared.book().of(job.machine).iter().any(|p| p.disks.contains_key(&disk.id));
        if !has_points {
            return Ok(());
        }
        let to_the_end = job.choice == Choice::Latest || job.group.is_some() && job.choice == Choice::LatestMultiVm;
        loop {
            let condition = disk.condition().clone();
            let all = disk.waiting() == 0 && condition.checkpointed == condition.journaled;
            if all || !to_the_end && self.order(disk.id, |done| Order::IsSettled { done }).await? {
                return Ok(());
            }
            if let Some(error) = condition.error {
                return Err(format!("what arrived of {} cannot be applied: {error}", disk.label));
            }
            self.go_on_waiting(job.id)?;
            tokio::time::sleep(LOOK).await;
        }
    }

    async fn quiesce(self: &Rc<Self>, job: &mut Job, disks: &[Arc<DiskShared>]) -> Result<(), String> {
        self.step(job, "stop the source and take the final point").await?;
        let (began, mut asked) = (clock::now(), clock::now());
        let listed = loop {
            let point = match &job.point {
                Some(point) => point.id,
                None => {
                    let id = PointId(uuid::Uuid::new_v4());
                    job.point = Some(ChosenPoint { id, kind: PointKind::Crash, label: None, wall_ms: clock::wall_ms() });
                    self.keep(job.clone(), &Effects::default()).await?;
                    asked = clock::now();
                    id
                }
            };
            disks.iter().filter(|d| d.wanted() != Wanted::Quiesce(point)).for_each(|d| d.set_wanted(Wanted::Quiesce(point)));
            let found = self.setup.shared.book().get(point).cloned();
            if let Some(found) = found {
                break found;
            }
            // Handed over, everything sent, and still no point: a marker was lost with its agent. Another one is asked for.
            let handed_over =
                |d: &Arc<DiskShared>| d.condition().report.as_ref().is_some_and(|(r, _)| r.state == ReplicationState::FailedOver);
            if !disks.iter().all(handed_over) {
                asked = clock::now();
            } else if clock::now().since(asked) > POINT_LIMIT {
                job.point = None;
            }
            self.go_on_waiting(job.id)?;
            let disks: Vec<&DiskShared> = disks.iter().map(|disk| &**disk).collect();
            let else_do = format!("; if it is gone for good, `tidegate failover cancel {}`, then `failover unplanned`", job.id);
            self.tell_whether_heard(job.id, &disks, &else_do);
            let busy = |d: &&DiskShared| d.condition().report.as_ref().is_some_and(|(r, _)| r.state != ReplicationState::FailedOver);
            if clock::now().since(began) > STOP_LIMIT
                && disks.iter().any(busy)
                && let Some(entry) = self.setup.jobs.lock().get_mut(&job.id)
            {
                entry.job.remedy.get_or_insert_with(|| {
                    format!(
                        "the agent of {} is heard, and has not stopped and sent everything yet: `tidegate status` and the log there say why; `tidegate failover cancel {}` ends this",
                        job.machine_name, job.id
                    )
                });
            }
            tokio::time::sleep(LOOK).await;
        };
        job.choice = Choice::Point(listed.id.to_string());
        // The agent takes no more writes: its newest change is the final marker of each disk.
        let started = clock::now();
        let mut proof = Vec::new();
        for disk in disks {
            let marker = listed.disks.get(&disk.id).copied().ok_or_else(|| format!("the final point has no disk {}", disk.name))?;
            loop {
                let captured = disk.condition().report.as_ref().map(|(report, _)| report.captured);
                if captured == Some(marker) {
                    break;
                }
                if clock::now().since(started) > JOURNAL_LIMIT {
                    return Err(format!(
                        "the agent has {} of {} and the final point stands at {marker}: something was written after it",
                        captured.map_or_else(|| "nothing".to_owned(), |p| p.to_string()),
                        disk.label
                    ));
                }
                tokio::time::sleep(LOOK).await;
            }
            proof.push(format!("{} captured {marker} = in the point {marker}", disk.name));
        }
        self.done(job, Some(format!("nothing is lost: {}", proof.join(", ")))).await
    }

    async fn roll(self: &Rc<Self>, job: &mut Job) -> Result<(), String> {
        self.stop_machine(job).await?;
        self.stop_serving(job).await;
        for disk in job.disks.clone() {
            let (Some(before), Some(target)) = (disk.before, disk.target) else {
                return Err(format!("{} has no place to roll to", disk.name));
            };
            self.step(job, &format!("roll {}", disk.name)).await?;
            let bytes = self.roll_disk(job.id, &disk, before, target).await?;
            self.done(job, Some(format!("{} written", show_size(bytes)))).await?;
        }
        (job.error, job.remedy) = (None, None);
        job.enter(JobState::FailedOver, clock::wall_ms());
        self.keep(job.clone(), &Effects::default()).await?;
        self.serve(job).await?;
        self.start_machine(job).await
    }

    async fn roll_disk(&self, id: u64, disk: &JobDisk, before: Position, target: Position) -> Result<u64, String> {
        let progress = Arc::new(Progress::default());
        if let Some(entry) = self.setup.jobs.lock().get_mut(&id) {
            entry.progress = Some(progress.clone());
        }
        let rolled = self.order(disk.id, |done| Order::Roll { before, target, progress, done }).await;
        if let Some(entry) = self.setup.jobs.lock().get_mut(&id) {
            entry.progress = None;
        }
        rolled
    }

    /// Serves the replicas as the machine's disks.
    async fn serve(self: &Rc<Self>, job: &mut Job) -> Result<(), String> {
        let dir = self.dir(job.id);
        crate::storage::uring::create_dir_durable(&dir).map_err(|e| format!("{}: {e}", dir.display()))?;
        for disk in job.disks.clone() {
            self.step(job, &format!("serve {}", disk.name)).await?;
            let address = Address::Unix(dir.join(format!("{}.sock", disk.name)));
            let label = format!("{}/{}", job.machine_name, disk.name);
            let period = self.order(disk.id, |done| Order::BeginServing { done }).await?;
            let serve = Serve { name: service(job.id, &disk), disk: disk.id, label, address: address.clone(), size: disk.size, period };
            let (done, answer) = oneshot::channel();
            self.setup.recover.send(RecoverCommand::Serve { serve, done }).await.map_err(|_| gone())?;
            answer.await.map_err(|_| gone())??;
            set_disk(job, disk.id, |d| d.nbd = Some(address.clone()));
            self.done(job, Some(address.nbd_uri())).await?;
        }
        Ok(())
    }

    /// After a restart: the disks are served again where they were; the machine is whoever started it's.
    async fn stand_again(self: &Rc<Self>, job: &mut Job) -> Result<(), String> {
        if job.state == JobState::Committed {
            self.end_histories(job).await?;
        }
        self.serve(job).await?;
        // It went down between the roll and the hook: the machine was not started yet.
        if job.state == JobState::FailedOver && !job.hook_started { self.start_machine(job).await } else { Ok(()) }
    }

    async fn end_history(self: &Rc<Self>, job: &mut Job) -> Result<(), String> {
        self.step(job, "drop the history").await?;
        self.end_histories(job).await?;
        self.done(job, None).await?;
        job.enter(JobState::Committed, clock::wall_ms());
        self.keep(job.clone(), &Effects::default()).await?;
        self.set_hold(job, Hold::Committed);
        // A restart comes here without anybody serving.
        if job.disks.iter().all(|d| d.nbd.is_some()) && self.is_served(job).await { Ok(()) } else { self.serve(job).await }
    }

    async fn end_histories(&self, job: &Job) -> Result<(), String> {
        self.set_hold(job, Hold::Committed);
        for disk in &job.disks {
            self.order(disk.id, |done| Order::EndHistory { done }).await?;
        }
        Ok(())
    }

    async fn roll_back(self: &Rc<Self>, job: &mut Job) -> Result<(), String> {
        self.stop_machine(job).await?;
        self.stop_serving(job).await;
        for disk in job.disks.clone() {
            let Some(before) = disk.before else { continue };
            self.step(job, &format!("bring {} back to where it was", disk.name)).await?;
            let bytes = self.roll_disk(job.id, &disk, before, before).await?;
            self.done(job, Some(format!("{} written", show_size(bytes)))).await?;
        }
        job.enter(JobState::Cancelled, clock::wall_ms());
        self.keep(job.clone(), &Effects::default()).await?;
        self.set_hold(job, Hold::None);
        for disk in self.disks(job.machine) {
            // A source that was stopped for this goes on.
            disk.set_wanted(Wanted::Release);
        }
        let _ = std::fs::remove_dir_all(self.dir(job.id));
        Ok(())
    }

    async fn release(self: &Rc<Self>, job: &mut Job) -> Result<(), String> {
        self.stop_machine(job).await?;
        self.stop_serving(job).await;
        for disk in job.disks.clone() {
            self.step(job, &format!("give {} out of hand", disk.name)).await?;
            let files = self.order(disk.id, |done| Order::Retire { done }).await?;
            let files: Vec<String> = files.iter().map(|f| f.display().to_string()).collect();
            self.done(job, Some(files.join(", "))).await?;
        }
        job.enter(JobState::Released, clock::wall_ms());
        self.keep(job.clone(), &Effects::default()).await?;
        self.set_hold(job, Hold::Released);
        Ok(())
    }

    pub(super) async fn start_machine(self: &Rc<Self>, job: &mut Job) -> Result<(), String> {
        let Some(name) = job.hook.clone() else { return Ok(()) };
        let hook = self.hook(&name)?;
        let dir = self.dir(job.id);
        for phase in [Phase::Start, Phase::Check] {
            // Noted before: a machine that may run is stopped later.
            job.hook_started = true;
            self.step(job, &format!("hook {name}: {}", phase.as_str())).await?;
            let told = hooks::run(&hook, phase, job, &dir).await?;
            self.done(job, told).await?;
        }
        Ok(())
    }

    pub(super) async fn stop_machine(self: &Rc<Self>, job: &mut Job) -> Result<(), String> {
        let Some(name) = job.hook.clone().filter(|_| job.hook_started) else { return Ok(()) };
        let hook = self.hook(&name)?;
        self.step(job, &format!("hook {name}: stop")).await?;
        let stopped = hooks::run(&hook, Phase::Stop, job, &self.dir(job.id)).await;
        if let Err(error) = &stopped {
            job.end(Err(error.clone()), clock::wall_ms());
            self.keep(job.clone(), &Effects::default()).await?;
        }
        let told = stopped?;
        job.hook_started = false;
        self.done(job, told).await
    }

    async fn stop_serving(&self, job: &mut Job) {
        for disk in &mut job.disks {
            let _ = self.stop_service(&format!("failover-{}-{}", job.id, disk.name)).await;
            disk.nbd = None;
        }
    }

    pub(super) async fn stop_service(&self, name: &str) -> Result<bool, String> {
        let (done, answer) = oneshot::channel();
        self.setup.recover.send(RecoverCommand::Stop { name: name.to_owned(), done }).await.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())
    }

    async fn is_served(&self, job: &Job) -> bool {
        for disk in &job.disks {
            let Some(address) = &disk.nbd else { return false };
            if crate::nbd::Stream::connect(address).await.is_err() {
                return false;
            }
        }
        true
    }

    /// Asks the apply thread.
    pub(super) async fn order<T>(&self, disk: DiskId, make: impl FnOnce(oneshot::Sender<Result<T, String>>) -> Order) -> Result<T, String> {
        let (done, answer) = oneshot::channel();
        self.setup.apply.send(ApplyCommand::Failover { disk, order: make(done) }).await.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }

    pub(super) fn choose(&self, job: &Job) -> Result<RecoveryPoint, String> {
        let book = self.setup.shared.book();
        let together = matches!(job.choice, Choice::Latest | Choice::LatestMultiVm) && job.state == JobState::Draining;
        match job.group.as_ref().filter(|_| together) {
            // All of them are halted, so each finds the same.
            Some(group) => {
                let entry = super::choose_group(&book, &group.name, &job.choice, Some(&self.machines_of(group.run)))?;
                let part = entry.part_of(job.machine).and_then(|id| book.get(id));
                part.cloned().ok_or_else(|| "the group's point is not listed any more".to_owned())
            }
            None => super::choose(&book, job.machine, &job.choice).cloned(),
        }
    }

    pub(super) fn set_hold(&self, job: &Job, hold: Hold) {
        let reason = reason(job);
        for disk in self.disks(job.machine) {
            disk.set_hold(hold, &reason);
        }
    }

    pub(super) async fn step(&self, job: &mut Job, name: &str) -> Result<(), String> {
        job.begin(name, clock::wall_ms());
        self.keep(job.clone(), &Effects::default()).await
    }

    pub(super) async fn done(&self, job: &mut Job, detail: Option<String>) -> Result<(), String> {
        job.end(Ok(detail), clock::wall_ms());
        self.keep(job.clone(), &Effects::default()).await
    }
}

/// What the source is told while a failover holds the machine.
pub fn reason(job: &Job) -> String {
    let name = &job.machine_name;
    let at = clock::rfc3339(job.started_ms);
    match job.state {
        JobState::Committed | JobState::Releasing | JobState::Released => format!(
            "{name} failed over to this site (failover {}, begun {at}, committed): nothing is taken from the old source any more. To replicate it again, protect it from the side where it runs now",
            job.id
        ),
        _ => format!(
            "{name} is failing over to this site (failover {}, begun {at}): nothing is taken from the source until `tidegate failover cancel {}` at the master target",
            job.id, job.id
        ),
    }
}

pub(super) fn gone() -> String {
    "the master target is stopping".to_owned()
}

fn service(job: u64, disk: &JobDisk) -> String {
    format!("failover-{job}-{}", disk.name)
}

pub(super) fn set_disk(job: &mut Job, id: DiskId, change: impl FnOnce(&mut JobDisk)) {
    if let Some(disk) = job.disks.iter_mut().find(|d| d.id == id) {
        change(disk);
    }
}

/// Sets where each disk is to stand; a disk that joined after the point is left out. What a person is told.
pub(super) fn aim(job: &mut Job, point: &RecoveryPoint) -> String {
    let (there, left_out): (Vec<JobDisk>, Vec<JobDisk>) =
        std::mem::take(&mut job.disks).into_iter().partition(|d| point.disks.contains_key(&d.id));
    job.disks = there;
    for disk in &mut job.disks {
        disk.target = point.disks.get(&disk.id).copied();
        if let Some(&size) = point.sizes.get(&disk.id) {
            disk.size = size;
        }
    }
    job.take(point);
    let left_out: Vec<String> = left_out.into_iter().map(|d| d.name).collect();
    if left_out.is_empty() {
        return describe(point);
    }
    format!("{}; it does not have {}, which joined later", describe(point), left_out.join(", "))
}

pub(super) fn describe(point: &RecoveryPoint) -> String {
    let label = point.label.as_ref().map_or_else(String::new, |l| format!(" {l:?}"));
    let group = point.group.as_ref().map_or_else(String::new, |group| format!("; {}", describe_group(group)));
    format!("{}{label} of {} ({}){group}", point.id, clock::rfc3339(point.wall_ms), point.kind.as_str())
}

/// What a machine's part of a group point is part of.
pub(super) fn describe_group(part: &GroupPart) -> String {
    let missing: Vec<&str> = part.missing.iter().map(crate::model::Name::as_str).collect();
    let without = if missing.is_empty() { String::new() } else { format!(", which is without {}", missing.join(", ")) };
    format!("its part of point {} of group {}{without}", part.point, part.group)
}

/// Progress of the step that runs, bytes.
pub fn progress(progress: &Progress) -> (u64, u64) {
    (progress.done.load(Ordering::Relaxed), progress.total.load(Ordering::Relaxed))
}
