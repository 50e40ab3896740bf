//! Takes requests, keeps jobs durable, runs one task for each job that has something to do.

use std::cell::RefCell;
use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;

use tokio::sync::mpsc;

use super::group::Stage;
use super::log::Log;
use super::{Ask, Entry, Jobs, Request};
use crate::clock;
use crate::config::master_target::{Hook, MasterTargetSettings};
use crate::crypto::keyring::KeyEncryptionKey;
use crate::master_target::apply;
use crate::master_target::catalogue::{Effects, Records};
use crate::master_target::recover;
use crate::master_target::shared::{DiskShared, TargetShared};
use crate::model::job::JobDisk;
use crate::model::{Choice, Hold, Job, JobKind, JobState, MachineId, PointId};

/// An agent that was not heard for longer cannot be asked for anything.
const HEARD: std::time::Duration = std::time::Duration::from_secs(15);
/// Jobs that are over and remembered.
const OVER_KEPT: usize = 200;

/// What the thread is given.
pub struct Setup {
    /// As configured.
    pub settings: MasterTargetSettings,
    /// Shared state.
    pub shared: Arc<TargetShared>,
    /// Metadata.
    pub records: Records,
    /// Wraps data keys.
    pub kek: Arc<KeyEncryptionKey>,
    /// To the apply thread.
    pub apply: mpsc::Sender<apply::Command>,
    /// To the recover thread.
    pub recover: mpsc::Sender<recover::Command>,
    /// Filled here.
    pub jobs: Jobs,
}

/// Everything on this thread.
pub(super) struct Engine {
    pub(super) setup: Setup,
    pub(super) log: RefCell<Log>,
    /// Jobs that somebody wants to end instead of waiting.
    pub(super) given_up: RefCell<HashSet<u64>>,
    /// Mounts of tests.
    pub(super) mounts: RefCell<HashMap<u64, Vec<String>>>,
    /// How far the jobs of a group have come that wait for each other.
    pub(super) reached: RefCell<HashMap<u64, Stage>>,
    /// Points that do not expire until the job's task ends.
    pub(super) kept: RefCell<HashMap<u64, PointId>>,
    next_id: std::cell::Cell<u64>,
    taking: tokio::sync::Mutex<()>,
    keeping: tokio::sync::Mutex<()>,
}

/// Goes on with what was under way, then serves until every sender is gone.
///
/// # Errors
/// If the folder of failovers cannot be used.
pub async fn run(setup: Setup, found: Vec<Job>, mut requests: mpsc::Receiver<Request>) -> std::io::Result<()> {
    let dir = setup.settings.failovers();
    crate::storage::uring::create_dir_durable(&dir)?;
    let next_id = found.iter().map(|j| j.id + 1).max().unwrap_or(1);
    for job in found {
        setup.jobs.lock().insert(job.id, Entry { job, busy: false, progress: None });
    }
    let engine = Rc::new(Engine {
        log: RefCell::new(Log::open(&dir)?),
        setup,
        given_up: RefCell::default(),
        mounts: RefCell::default(),
        reached: RefCell::default(),
        kept: RefCell::default(),
        next_id: std::cell::Cell::new(next_id),
        taking: tokio::sync::Mutex::new(()),
        keeping: tokio::sync::Mutex::new(()),
    });
    for entry in engine.setup.jobs.list() {
        if !entry.job.state.is_over() {
            engine.go_on(entry.job.id, true);
        }
    }
    while let Some(request) = requests.recv().await {
        let engine = engine.clone();
        tokio::task::spawn_local(async move {
            let taken = engine.take(request.ask, &request.by).await;
            let _ = request.done.send(taken);
        });
    }
    Ok(())
}

impl Engine {
    /// Runs a job's task.
    pub(super) fn go_on(self: &Rc<Self>, id: u64, restarted: bool) {
        let engine = self.clone();
        if let Some(entry) = self.setup.jobs.lock().get_mut(&id) {
            entry.busy = true;
        }
        tokio::task::spawn_local(async move {
            engine.run_job(id, restarted).await;
            if let Some(entry) = engine.setup.jobs.lock().get_mut(&id) {
                (entry.busy, entry.progress) = (false, None);
            }
            engine.given_up.borrow_mut().remove(&id);
            engine.reached.borrow_mut().remove(&id);
            if let Some(point) = engine.kept.borrow_mut().remove(&id) {
                engine.setup.shared.book().unpin(point);
            }
        });
    }

    async fn take(self: &Rc<Self>, ask: Ask, by: &str) -> Result<Vec<Job>, String> {
        // Two requests must not both find that nothing is under way.
        let _alone = self.taking.lock().await;
        let (ids, action) = match ask {
            Ask::Start { kind: JobKind::Reprotect, machine, overwrite, .. } => {
                (vec![self.reprotect(machine, overwrite, by).await?], "reprotect")
            }
            Ask::Start { kind, machine, choice, hook, .. } => (vec![self.start(kind, machine, choice, hook, by).await?], "start"),
            Ask::StartGroup { kind, group, choice, hook } => (self.start_group(kind, &group, &choice, hook, by).await?, "start"),
            Ask::DecideGroup { group, decision } => (self.decide_group(&group, &decision).await?, "decide"),
            Ask::ChangePoint { job, choice } => (vec![self.change_point(job, choice).await?], "change-point"),
            Ask::Commit { job, drop_pinned } => (vec![self.commit(job, drop_pinned).await?], "commit"),
            Ask::Cancel { job } => (vec![self.cancel(job).await?], "cancel"),
            Ask::Cleanup { job } => (vec![self.cleanup(job).await?], "cleanup"),
        };
        let jobs: Vec<Job> = ids.into_iter().map(|id| self.job(id)).collect::<Result<_, _>>()?;
        for job in &jobs {
            tracing::info!(job = job.id, machine = job.machine_name, action, by, "failover request");
            self.log.borrow_mut().note(job, by, action);
        }
        Ok(jobs)
    }

    async fn start(
        self: &Rc<Self>,
        kind: JobKind,
        machine: MachineId,
        choice: Choice,
        hook: Option<String>,
        by: &str,
    ) -> Result<u64, String> {
        if let Some(name) = &hook {
            self.hook(name)?;
        }
        let disks = self.startable(kind, machine, &choice)?;
        let job = self.new_job(kind, choice, hook, &disks, by);
        let id = job.id;
        self.keep(job, &Effects::default()).await?;
        self.go_on(id, false);
        Ok(id)
    }

    /// The disks of a machine that may begin a failover.
    pub(super) fn startable(&self, kind: JobKind, machine: MachineId, choice: &Choice) -> Result<Vec<Arc<DiskShared>>, String> {
        let disks = self.disks(machine);
        let Some(first) = disks.first() else { return Err("the machine has no disks here".to_owned()) };
        let name = first.machine_name.to_string();
        self.may_start(machine, kind, &name)?;
        if kind == JobKind::Planned && *choice != Choice::Latest {
            return Err(
                "a planned failover makes a final point of its own: leave --point out, or use `failover unplanned` for an older one"
                    .to_owned(),
            );
        }
        let book = self.setup.shared.book();
        match kind {
            // The final point needs no older one; but a machine that never had one is still being copied.
            JobKind::Planned if book.of(machine).is_empty() => {
                return Err(format!("{name} has no recovery point yet: wait until initial replication is complete"));
            }
            JobKind::Planned => {
                let now = clock::now();
                let silent = disks.iter().find(|d| d.condition().report.as_ref().is_none_or(|(_, at)| now.since(*at) >= HEARD));
                if let Some(silent) = silent {
                    return Err(format!(
                        "the agent of {} is not heard, so nobody can stop the machine there: start it, or use `failover unplanned`",
                        silent.label
                    ));
                }
            }
            _ => drop(super::choose(&book, machine, choice)?),
        }
        drop(book);
        Ok(disks)
    }

    /// A job that is not durable yet.
    pub(super) fn new_job(&self, kind: JobKind, choice: Choice, hook: Option<String>, disks: &[Arc<DiskShared>], by: &str) -> Job {
        let state = match kind {
            JobKind::Test => JobState::Preparing,
            JobKind::Planned => JobState::Quiescing,
            JobKind::Unplanned => JobState::Draining,
            JobKind::Reprotect => JobState::Comparing,
        };
        let id = self.next_id.get();
        self.next_id.set(id + 1);
        let disk = |d: &Arc<DiskShared>| JobDisk {
            id: d.id,
            name: d.name.to_string(),
            nbd: None,
            size: 0,
            before: None,
            target: None,
            overwrite: false,
        };
        Job {
            id,
            kind,
            machine: disks[0].machine,
            machine_name: disks[0].machine_name.to_string(),
            state,
            choice,
            point: None,
            disks: disks.iter().map(disk).collect(),
            hook,
            hook_started: false,
            steps: Vec::new(),
            by: by.to_owned(),
            started_ms: clock::wall_ms(),
            ended_ms: None,
            error: None,
            remedy: None,
            passed: None,
            group: None,
        }
    }

    /// One failover of a machine at a time.
    pub(super) fn may_start(&self, machine: MachineId, kind: JobKind, name: &str) -> Result<(), String> {
        let jobs = self.setup.jobs.list();
        if kind != JobKind::Test
            && let Some(other) = jobs.iter().map(|e| &e.job).find(|j| j.machine == machine && j.kind != JobKind::Test && !j.state.is_over())
        {
            let cancel = matches!(other.state, JobState::Quiescing | JobState::Draining | JobState::Comparing);
            let how = if cancel { "end it with `tidegate failover cancel" } else { "finish it first, see `tidegate failover show" };
            return Err(format!("{name} has failover {} ({}): {how} {}`", other.id, other.state.as_str(), other.id));
        }
        match crate::model::job::hold(jobs.iter().map(|e| &e.job), machine) {
            Some((other, Hold::Released)) if kind != JobKind::Reprotect => Err(format!(
                "{name} failed over and its disks were given out of hand (failover {}): protect it again first, `tidegate failover reprotect {name}`",
                other.id
            )),
            Some((other, Hold::Committed)) if kind == JobKind::Test => {
                Err(format!("{name} runs from its replicas (failover {}): there is no point to test", other.id))
            }
            _ => Ok(()),
        }
    }

    /// The machine's disks as configured.
    pub(super) fn disks(&self, machine: MachineId) -> Vec<Arc<DiskShared>> {
        self.setup.shared.disks.iter().filter(|d| d.machine == machine).cloned().collect()
    }

    /// A hook of the configuration.
    pub(super) fn hook(&self, name: &str) -> Result<Hook, String> {
        let all = &self.setup.settings.hook;
        all.iter().find(|h| h.name.as_str() == name).cloned().ok_or_else(|| {
            let names: Vec<&str> = all.iter().map(|h| h.name.as_str()).collect();
            match names.is_empty() {
                true => format!("there is no hook {name}: add a [[hook]] table to the master target's configuration and restart it"),
                false => format!("there is no hook {name}: the configuration has {}", names.join(", ")),
            }
        })
    }

    /// A job as it stands.
    pub(super) fn job(&self, id: u64) -> Result<Job, String> {
        self.setup.jobs.get(id).map(|e| e.job).ok_or_else(|| format!("there is no failover {id}: see `tidegate failover list`"))
    }

    /// A job that waits for a decision, in one of `states`.
    pub(super) fn at_rest(&self, id: u64, states: &[JobState], wanted: &str) -> Result<Job, String> {
        let entry = self.setup.jobs.get(id).ok_or_else(|| format!("there is no failover {id}: see `tidegate failover list`"))?;
        if entry.busy {
            let step = entry.job.steps.last().map_or_else(String::new, |s| format!(" ({})", s.name));
            return Err(format!(
                "failover {id} is {}{step}: wait until it is done, see `tidegate failover show {id}`",
                entry.job.state.as_str()
            ));
        }
        if entry.job.state.is_over() && !states.contains(&entry.job.state) {
            return Err(format!("failover {id} is over ({}): nothing is left to decide", entry.job.state.as_str()));
        }
        if !states.contains(&entry.job.state) {
            return Err(format!("failover {id} is {}: {wanted}", entry.job.state.as_str()));
        }
        Ok(entry.job)
    }

    /// Makes a job durable with its effects, then shows it. States that were entered are logged.
    pub(super) async fn keep(&self, job: Job, effects: &Effects) -> Result<(), String> {
        // One after the other: the state that is noted last is the one that was entered last.
        let _alone = self.keeping.lock().await;
        let (mut job, mut effects) = (job, effects.clone());
        let before = self.setup.jobs.get(job.id).map(|e| e.job.state);
        {
            let jobs = self.setup.jobs.lock();
            let over: Vec<u64> = jobs.values().filter(|e| e.job.state.is_over()).map(|e| e.job.id).collect();
            // What was said meanwhile about disks that may be overwritten stays said.
            let said = jobs.get(&job.id).map(|e| e.job.disks.clone()).unwrap_or_default();
            for disk in &mut job.disks {
                disk.overwrite |= said.iter().any(|d| d.id == disk.id && d.overwrite);
            }
            // The one that says what holds a machine, or that nothing does any more, is never forgotten.
            let decides = |id: &u64| {
                jobs.get(id).is_some_and(|e| {
                    let failover = |j: &Job| j.machine == e.job.machine && j.kind != JobKind::Test && j.state != JobState::Failed;
                    failover(&e.job) && jobs.values().filter(|other| failover(&other.job)).all(|other| other.job.id <= e.job.id)
                })
            };
            let old: Vec<u64> = over.iter().copied().filter(|id| !decides(id)).collect();
            effects.forgotten = old[..old.len().saturating_sub(OVER_KEPT)].to_vec();
        }
        // A history that ends, or loses its end, takes what was kept of unusable points along.
        let ends = effects.stand.iter().any(|(_, at)| at.is_none())
            || !(effects.ended.is_empty() && effects.replicas.is_empty() && effects.dropped.is_empty());
        if ends {
            let disks: Vec<crate::model::DiskId> = job.disks.iter().map(|disk| disk.id).collect();
            effects.released = self.setup.shared.book().kept_bad_with(&disks);
        }
        let released = effects.released.clone();
        let (records, kept) = (self.setup.records.clone(), job.clone());
        let gone = effects.forgotten.clone();
        let noted = tokio::task::spawn_blocking(move || records.put_job(&kept, &effects)).await;
        noted.map_err(|e| e.to_string())?.map_err(|e| e.to_string())?;
        self.setup.shared.book().replace_bad(released);
        if before != Some(job.state) {
            tracing::info!(job = job.id, machine = job.machine_name, kind = job.kind.as_str(), state = job.state.as_str(), "failover");
            self.log.borrow_mut().note(&job, "-", "state");
        }
        let mut jobs = self.setup.jobs.lock();
        gone.iter().for_each(|id| drop(jobs.remove(id)));
        match jobs.get_mut(&job.id) {
            Some(entry) => entry.job = job,
            None => drop(jobs.insert(job.id, Entry { job, busy: false, progress: None })),
        }
        Ok(())
    }

    /// Folder of a job.
    pub(super) fn dir(&self, id: u64) -> PathBuf {
        self.setup.settings.failovers().join(id.to_string())
    }
}
