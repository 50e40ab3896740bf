//! Failovers of a group: a job for each machine, all of them at one point. What is done to a machine is what its own job does.
//!
//! Facts that hold here:
//! - The jobs of a group are noted together or not at all.
//! - No machine's replica is rolled before the replicas of all stand still, and of a planned failover, before all sources stopped.
//!   Until then one that cannot go on ends the others, and nothing was changed.
//! - From then on each stands for itself: what fails is told, and the others are left as they are.

use std::collections::BTreeSet;
use std::rc::Rc;
use std::time::Duration;

use super::Entry;
use super::engine::Engine;
use crate::control::api::Decision;
use crate::model::job::JobGroup;
use crate::model::{Choice, Hold, Job, JobKind, JobState, MachineId, Name, PointId};

/// How often what is waited for is looked at.
const LOOK: Duration = Duration::from_millis(50);

/// How far the jobs of a group come by themselves before they wait for each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Stage {
    /// The source takes no writes.
    Stopped,
    /// The replicas stand still, at the end of what arrived.
    Halted,
}

/// What a group fails over to.
pub(super) struct Target {
    /// The machines and what each takes, by id.
    pub(super) machines: Vec<(MachineId, Choice)>,
    /// Of a failover to a point that is chosen now.
    pub(super) point: Option<PointId>,
    /// Machines that do not come along.
    pub(super) missing: Vec<Name>,
}

impl Engine {
    /// Starts a job for each machine, or none.
    pub(super) async fn start_group(
        self: &Rc<Self>,
        kind: JobKind,
        group: &Name,
        choice: &Choice,
        hook: Option<String>,
        by: &str,
    ) -> Result<Vec<u64>, String> {
        if let Some(name) = &hook {
            self.hook(name)?;
        }
        // Nothing expires before the holds are set.
        let noting = self.setup.shared.noting.lock().await;
        let target = super::group_target(&self.setup.shared, kind, group, choice)?;
        let mut jobs: Vec<Job> = Vec::new();
        for (machine, choice) in &target.machines {
            let disks = self.startable(kind, *machine, choice).map_err(|e| {
                let name = self.disks(*machine).first().map_or_else(|| machine.to_string(), |d| d.machine_name.to_string());
                format!("nothing was started, because of {name}: {e}")
            })?;
            let mut job = self.new_job(kind, choice.clone(), hook.clone(), &disks, by);
            let run = jobs.first().map_or(job.id, |first| first.id);
            job.group = Some(JobGroup { name: group.clone(), run, point: target.point, missing: target.missing.clone() });
            jobs.push(job);
        }
        self.keep_new(&jobs).await?;
        for job in &jobs {
            match (kind, &job.choice) {
                (JobKind::Test, Choice::Point(_)) => self.keep_point(job),
                (JobKind::Unplanned, _) => self.set_hold(job, Hold::Draining),
                _ => {}
            }
        }
        drop(noting);
        let ids: Vec<u64> = jobs.iter().map(|j| j.id).collect();
        ids.iter().for_each(|id| self.go_on(*id, false));
        Ok(ids)
    }

    /// The point of a test stays until it is mounted.
    fn keep_point(&self, job: &Job) {
        let mut book = self.setup.shared.book();
        let point = super::choose(&book, job.machine, &job.choice).map(|p| p.id);
        if let Ok(point) = point
            && book.pin(point)
        {
            self.kept.borrow_mut().insert(job.id, point);
        }
    }

    /// The machines of the jobs that were started together, by id.
    pub(super) fn machines_of(&self, run: u64) -> Vec<MachineId> {
        let all: BTreeSet<MachineId> = self.run(run).iter().map(|j| j.machine).collect();
        all.into_iter().collect()
    }

    fn run(&self, run: u64) -> Vec<Job> {
        self.setup.jobs.list().into_iter().map(|e| e.job).filter(|j| j.group.as_ref().is_some_and(|g| g.run == run)).collect()
    }

    /// Waits until every job of the group has come as far as this one.
    ///
    /// # Errors
    /// If one of them does not come: nothing was changed by any of them then.
    pub(super) async fn meet(&self, job: &mut Job, stage: Stage) -> Result<(), String> {
        let Some(group) = job.group.clone() else { return Ok(()) };
        let what = match stage {
            Stage::Stopped => "wait until every source of the group has stopped",
            Stage::Halted => "wait until every machine of the group has taken what arrived",
        };
        self.step(job, what).await?;
        self.reached.borrow_mut().insert(job.id, stage);
        loop {
            let others = self.run(group.run);
            let early = |j: &&Job| matches!(j.state, JobState::Quiescing | JobState::Draining) || j.state.is_over();
            let lacks = |j: &&Job| early(j) && self.reached.borrow().get(&j.id).is_none_or(|reached| *reached < stage);
            let lacking: Vec<&Job> = others.iter().filter(|j| j.id != job.id).filter(lacks).collect();
            if lacking.is_empty() {
                return self.done(job, None).await;
            }
            if let Some(other) = lacking.iter().find(|j| j.state.is_over()) {
                let why = other.error.as_deref().unwrap_or("it was cancelled");
                return Err(format!("{} of group {} does not come along: {why}", other.machine_name, group.name));
            }
            self.go_on_waiting(job.id)?;
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Decides about the jobs of a group's newest failover that the decision concerns.
    pub(super) async fn decide_group(self: &Rc<Self>, group: &str, decision: &Decision) -> Result<Vec<u64>, String> {
        let jobs = self.concerned(group, decision)?;
        let ids: Vec<u64> = jobs.iter().map(|j| j.id).collect();
        match decision {
            Decision::ChangePoint(choice) => {
                let choices = self.parts_for(&jobs, choice)?;
                for (id, choice) in choices {
                    self.change_point(id, choice).await?;
                }
            }
            Decision::Commit { drop_pinned } => {
                for job in &jobs {
                    self.at_rest(job.id, &[JobState::FailedOver, JobState::Committing], "only a failover that stands can be committed")?;
                    self.wait_for_scrub(job.machine).await;
                    self.may_commit(job, *drop_pinned)?;
                }
                for id in &ids {
                    self.commit(*id, *drop_pinned).await?;
                }
            }
            Decision::Cancel => {
                for id in &ids {
                    self.cancel(*id).await?;
                }
            }
            Decision::Cleanup => {
                for id in &ids {
                    self.cleanup(*id).await?;
                }
            }
        }
        Ok(ids)
    }

    /// The jobs that a decision about a group concerns; all of them can be decided about.
    fn concerned(&self, group: &str, decision: &Decision) -> Result<Vec<Job>, String> {
        let concerns = |j: &Job| match decision {
            Decision::ChangePoint(_) => matches!(j.state, JobState::FailedOver | JobState::Rolling),
            Decision::Commit { .. } => matches!(j.state, JobState::FailedOver | JobState::Committing),
            Decision::Cancel => !j.state.is_over(),
            Decision::Cleanup => {
                matches!(j.state, JobState::Running | JobState::CleaningUp | JobState::Committed | JobState::Releasing)
            }
        };
        let of_group = |j: &Job| j.group.as_ref().is_some_and(|g| g.name.as_str() == group || g.label() == group);
        let jobs: Vec<Job> = self.setup.jobs.list().into_iter().map(|e| e.job).filter(|j| of_group(j) && concerns(j)).collect();
        let runs: BTreeSet<(u64, bool)> = jobs.iter().filter_map(|j| Some((j.group.as_ref()?.run, j.kind == JobKind::Test))).collect();
        let moves: Vec<u64> = runs.iter().filter(|(_, test)| !test).map(|(run, _)| *run).collect();
        // Cancelling is for what holds the machines, unless there are only tests.
        let runs: Vec<u64> = match decision {
            Decision::Cancel if !moves.is_empty() => moves,
            _ => runs.into_iter().map(|(run, _)| run).collect(),
        };
        let run = match runs[..] {
            [only] => only,
            [] => return Err(format!("{group} has no failover that this is for: see `tidegate failover list`")),
            _ => {
                let names: Vec<String> = runs.iter().map(|run| format!("{}/{run}", group.split('/').next().unwrap_or(group))).collect();
                return Err(format!("{group} has several failovers: say which, one of {}", names.join(", ")));
            }
        };
        let jobs: Vec<Job> = jobs.into_iter().filter(|j| j.group.as_ref().is_some_and(|g| g.run == run)).collect();
        self.all_at_rest(&jobs, run, decision)?;
        Ok(jobs)
    }

    /// Nothing is decided about some of the machines while others are on their way, or cannot follow.
    fn all_at_rest(&self, jobs: &[Job], run: u64, decision: &Decision) -> Result<(), String> {
        let cancels = matches!(decision, Decision::Cancel);
        for job in self.run(run).iter().filter(|j| !j.state.is_over()) {
            let (concerned, name) = (jobs.iter().any(|j| j.id == job.id), &job.machine_name);
            let waits = matches!(job.state, JobState::Quiescing | JobState::Draining);
            if self.setup.jobs.get(job.id).is_some_and(|e| e.busy) && !(cancels && waits) {
                return Err(format!("{name} is {}: wait until it is done, see `tidegate failover show {}`", job.state.as_str(), job.id));
            }
            let past = matches!(job.state, JobState::Committing | JobState::Committed | JobState::Releasing);
            if cancels && past {
                return Err(format!(
                    "{name} is {}, which has no way back: cancel the others one by one, see `tidegate failover list`",
                    job.state.as_str()
                ));
            }
            if !concerned && matches!(decision, Decision::Commit { .. }) && !past {
                let state = job.state.as_str();
                return Err(format!(
                    "{name} is {state}: bring it to the point first, `tidegate failover change-point {}`, or commit the others one by one",
                    job.id
                ));
            }
        }
        Ok(())
    }

    /// What each job takes so that all of them stand at one point.
    fn parts_for(&self, jobs: &[Job], choice: &Choice) -> Result<Vec<(u64, Choice)>, String> {
        let Some(group) = jobs.first().and_then(|j| j.group.clone()) else { return Ok(Vec::new()) };
        let machines: Vec<MachineId> = self.run(group.run).iter().map(|j| j.machine).collect::<BTreeSet<_>>().into_iter().collect();
        if jobs.len() < machines.len() {
            return Err(format!(
                "not every machine of {} stands failed over: change the point of each by itself, see `tidegate failover list`",
                group.label()
            ));
        }
        let book = self.setup.shared.book();
        let entry = super::choose_group(&book, &group.name, choice, Some(&machines))?;
        let mut choices = Vec::new();
        for job in jobs {
            let part = entry.part_of(job.machine).and_then(|id| book.get(id)).ok_or("the group's point is not listed any more")?;
            if let Some(disk) = job.disks.iter().find(|d| !part.disks.contains_key(&d.id)) {
                let (point, name, machine) = (entry.statement.point, &disk.name, &job.machine_name);
                return Err(format!("point {point} has no disk {name} of {machine}: it joined later. Choose a newer point"));
            }
            choices.push((job.id, Choice::Point(part.id.to_string())));
        }
        Ok(choices)
    }

    /// Makes new jobs durable together, then shows them.
    async fn keep_new(&self, jobs: &[Job]) -> Result<(), String> {
        let (records, kept) = (self.setup.records.clone(), jobs.to_vec());
        let noted = tokio::task::spawn_blocking(move || records.put_new_jobs(&kept)).await;
        noted.map_err(|e| e.to_string())?.map_err(|e| e.to_string())?;
        for job in jobs {
            tracing::info!(job = job.id, machine = job.machine_name, kind = job.kind.as_str(), state = job.state.as_str(), "failover");
            self.log.borrow_mut().note(job, "-", "state");
            self.setup.jobs.lock().insert(job.id, Entry { job: job.clone(), busy: false, progress: None });
        }
        Ok(())
    }
}
