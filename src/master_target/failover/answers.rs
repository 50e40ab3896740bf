//! Failovers as the control interface sees them.

use std::sync::Arc;

use tokio::sync::{mpsc, oneshot};

use super::steps::describe_group;
use super::{Ask, Entry, Jobs, Request, choose};
use crate::clock;
use crate::control::api::{Decision, JobDiskView, JobView, PlanView, StepView};
use crate::master_target::apply;
use crate::master_target::apply::failover::Order;
use crate::master_target::shared::TargetShared;
use crate::model::job::JobGroup;
use crate::model::{Choice, Job, JobKind, JobState, MachineId};

/// Characters of a test's error in `status`: hooks may say much.
const ERROR_SHOWN: usize = 120;

/// The way to failovers.
#[derive(Clone)]
pub struct Desk {
    /// Shared state.
    pub shared: Arc<TargetShared>,
    /// All jobs.
    pub jobs: Jobs,
    /// To the failover thread.
    pub requests: mpsc::Sender<Request>,
    /// To the apply thread.
    pub apply: mpsc::Sender<apply::Command>,
}

impl Desk {
    /// All jobs, the oldest first.
    pub fn list(&self) -> Vec<JobView> {
        self.jobs.list().iter().map(view).collect()
    }

    /// What a failover of the machine does now, and how its last test went; for `status`.
    pub fn of_machine(&self, machine: MachineId) -> (Option<String>, Option<String>) {
        let all = self.jobs.list();
        let of = || all.iter().map(|e| &e.job).filter(|j| j.machine == machine).rev();
        // What was before the machine was protected again is over.
        let since = || of().filter(|j| j.kind != JobKind::Test).take_while(|j| j.state != JobState::Protected);
        let now = since().find(|j| !j.state.is_over() || j.state.hold() != crate::model::Hold::None);
        let now = now.map(|j| {
            let point = j.point.as_ref().map_or_else(String::new, |p| format!(", point {}", clock::rfc3339(p.wall_ms)));
            let error = j.error.as_ref().map_or_else(String::new, |e| format!(": {e}"));
            format!("{} (failover {}, {}{point}){error}", j.state.as_str(), j.id, j.kind.as_str())
        });
        let tests = of().filter(|j| j.kind == JobKind::Test && !j.state.is_over()).count();
        let now = now.or_else(|| {
            (tests > 0).then(|| {
                format!("{tests} test {}, see `tidegate failover list`", if tests == 1 { "failover stands" } else { "failovers stand" })
            })
        });
        let test = of().find(|j| j.kind == JobKind::Test && (j.passed.is_some() || j.state.is_at_rest()));
        let test = test.map(|j| {
            let result = match (j.passed, &j.error) {
                (Some(true), _) => "passed".to_owned(),
                (_, Some(error)) => {
                    let first: String = error.lines().next().unwrap_or_default().chars().take(ERROR_SHOWN).collect();
                    format!("failed: {first}{}, see `tidegate failover show {}`", if first.len() < error.len() { " ..." } else { "" }, j.id)
                }
                (Some(false), None) => "failed".to_owned(),
                (None, None) => "mounted, not checked (no hook)".to_owned(),
            };
            format!("{} {result}", clock::rfc3339(j.started_ms))
        });
        (now, test)
    }

    /// Takes a request.
    ///
    /// # Errors
    /// A sentence.
    pub async fn ask(&self, ask: Ask, by: &str) -> Result<Vec<JobView>, String> {
        let (done, answer) = oneshot::channel();
        let gone = || "the master target is stopping".to_owned();
        self.requests.send(Request { ask, by: by.to_owned(), done }).await.map_err(|_| gone())?;
        let jobs = answer.await.map_err(|_| gone())??;
        let view = |job: Job| self.jobs.get(job.id).map_or_else(|| view(&Entry { job, busy: false, progress: None }), |entry| view(&entry));
        Ok(jobs.into_iter().map(view).collect())
    }

    async fn ask_one(&self, ask: Ask, by: &str) -> Result<JobView, String> {
        self.ask(ask, by).await?.pop().ok_or_else(|| "there is no such failover: see `tidegate failover list`".to_owned())
    }

    /// A new job.
    ///
    /// # Errors
    /// A sentence.
    pub async fn start(
        &self,
        kind: JobKind,
        machine: &str,
        choice: Choice,
        hook: Option<String>,
        overwrite: Vec<String>,
        by: &str,
    ) -> Result<JobView, String> {
        let machine = self.machine(machine)?;
        self.ask_one(Ask::Start { kind, machine, choice, hook, overwrite }, by).await
    }

    /// A decision about a job.
    ///
    /// # Errors
    /// A sentence.
    pub async fn decide(&self, job: &str, decision: &Decision, by: &str) -> Result<JobView, String> {
        let job = self.find(job)?;
        let ask = match decision.clone() {
            Decision::ChangePoint(choice) => Ask::ChangePoint { job, choice },
            Decision::Commit { drop_pinned } => Ask::Commit { job, drop_pinned },
            Decision::Cancel => Ask::Cancel { job },
            Decision::Cleanup => Ask::Cleanup { job },
        };
        self.ask_one(ask, by).await
    }

    fn find(&self, text: &str) -> Result<u64, String> {
        let all = self.jobs.list();
        if let Ok(id) = text.parse::<u64>() {
            return all
                .iter()
                .any(|e| e.job.id == id)
                .then_some(id)
                .ok_or_else(|| format!("there is no failover {id}: see `tidegate failover list`"));
        }
        let open: Vec<&Entry> = all.iter().filter(|e| e.job.machine_name == text && !e.job.state.is_over()).collect();
        // Tests beside the failover that stands are named by their numbers.
        let standing: Vec<&Entry> = open.iter().copied().filter(|e| e.job.kind != JobKind::Test).collect();
        match if standing.is_empty() { &open[..] } else { &standing[..] } {
            [only] => Ok(only.job.id),
            [] => Err(format!("{text} has no failover that is not over: see `tidegate failover list`")),
            _ => {
                Err(format!("{text} has {} failovers that are not over: give the number of one, see `tidegate failover list`", open.len()))
            }
        }
    }

    /// A machine by name.
    fn machine(&self, name: &str) -> Result<MachineId, String> {
        let found = self.shared.disks.iter().find(|d| d.machine_name.as_str() == name);
        found.map(|d| d.machine).ok_or_else(|| format!("machine {name} is not known here: see `tidegate machine list`"))
    }

    /// What an unplanned failover would take and lose.
    ///
    /// # Errors
    /// A sentence.
    pub async fn plan(&self, machine: &str, choice: &Choice) -> Result<PlanView, String> {
        let id = self.machine(machine)?;
        let held = self
            .shared
            .disks
            .iter()
            .find(|d| d.machine == id)
            .map(|d| d.condition().clone())
            .filter(|c| c.hold != crate::model::Hold::None);
        if let Some(held) = held {
            return Err(held.hold_reason);
        }
        let (point, newest) = {
            let book = self.shared.book();
            let point = choose(&book, id, choice)?.clone();
            let newest = book.of(id).last().is_some_and(|p| p.id == point.id);
            (point, newest)
        };
        let now = clock::now();
        let mut plan = PlanView {
            machine: machine.to_owned(),
            point: point.id.to_string(),
            point_time: clock::rfc3339(point.wall_ms),
            kind: point.kind.as_str().to_owned(),
            label: point.label.clone(),
            note: point.group.as_ref().map(describe_group),
            lost_seconds: ((clock::wall_ms() - point.wall_ms).max(0) as f64) / 1e3,
            lost_seconds_monotonic: false,
            newer_bytes: Some(0),
            waiting_bytes: 0,
            unsent_bytes: 0,
            heard_seconds: None,
        };
        let mut measured = newest.then_some(0f64);
        let mut all_heard = true;
        for disk in self.shared.disks.iter().filter(|d| d.machine == id) {
            let condition = disk.condition().clone();
            let age = condition.newest.map(|n| now.since(n.travel.captured()).as_secs_f64());
            measured = measured.zip(age).map(|(a, b)| a.max(b));
            plan.waiting_bytes += disk.waiting_bytes();
            if let Some((report, at)) = &condition.report {
                let heard = now.since(*at).as_secs_f64();
                plan.heard_seconds = Some(plan.heard_seconds.map_or(heard, |h| h.max(heard)));
                plan.unsent_bytes += report.missing_bytes + report.backlog_bytes;
            }
            all_heard &= condition.report.is_some();
            if let Some(&position) = point.disks.get(&disk.id) {
                let (done, answer) = oneshot::channel();
                let order = Order::Since { position, done };
                if self.apply.send(apply::Command::Failover { disk: disk.id, order }).await.is_ok() {
                    let counted = answer.await.map_err(|_| "the master target is stopping".to_owned()).and_then(|counted| counted);
                    if let Err(error) = &counted {
                        tracing::warn!(disk = disk.label, error, "what came after the point cannot be counted");
                    }
                    plan.newer_bytes = plan.newer_bytes.zip(counted.ok()).map(|(sum, bytes)| sum + bytes);
                }
            }
        }
        if !all_heard {
            // What one of its disks misses is known to nobody here.
            plan.heard_seconds = None;
        }
        if let Some(seconds) = measured {
            (plan.lost_seconds, plan.lost_seconds_monotonic) = (seconds, true);
        }
        Ok(plan)
    }
}

fn view(entry: &Entry) -> JobView {
    let job = &entry.job;
    JobView {
        id: job.id,
        kind: job.kind.as_str().to_owned(),
        machine: job.machine_name.clone(),
        group: job.group.as_ref().map(|g| g.name.to_string()),
        group_job: job.group.as_ref().map(JobGroup::label),
        group_point: job.group.as_ref().and_then(|g| g.point).map(|id| id.to_string()),
        group_missing: job.group.iter().flat_map(|g| &g.missing).map(ToString::to_string).collect(),
        state: job.state.as_str().to_owned(),
        busy: entry.busy,
        over: job.state.is_over(),
        choice: job.choice.to_string(),
        point: job.point.as_ref().map(|p| p.id.to_string()),
        point_time: job.point.as_ref().map(|p| clock::rfc3339(p.wall_ms)),
        label: job.point.as_ref().and_then(|p| p.label.clone()),
        hook: job.hook.clone(),
        passed: job.passed,
        disks: job
            .disks
            .iter()
            .map(|d| JobDiskView { name: d.name.clone(), nbd: d.nbd.as_ref().map(crate::model::Address::nbd_uri), size_bytes: d.size })
            .collect(),
        steps: job
            .steps
            .iter()
            .map(|s| StepView {
                name: s.name.clone(),
                started: clock::rfc3339(s.started_ms),
                seconds: s.ended_ms.map(|end| (end - s.started_ms) as f64 / 1e3),
                detail: s.detail.clone(),
                error: s.error.clone(),
            })
            .collect(),
        progress: entry.progress.as_deref().map(super::progress),
        by: job.by.clone(),
        started: clock::rfc3339(job.started_ms),
        ended: job.ended_ms.map(clock::rfc3339),
        error: job.error.clone(),
        remedy: job.remedy.clone(),
    }
}
