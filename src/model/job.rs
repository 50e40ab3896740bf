//! Failover jobs: what was asked, how far it is, what it may become. Pure.

use serde::{Deserialize, Serialize};

use super::{Address, DiskId, MachineId, Name, PointId, PointKind, Position, RecoveryPoint};

/// What a job is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum JobKind {
    /// An isolated copy at a point; replication goes on.
    Test,
    /// The source is stopped first, nothing is lost.
    Planned,
    /// The source is gone, or taken for gone.
    Unplanned,
    /// Replication onto disks that have content: only differences travel.
    Reprotect,
}

impl JobKind {
    /// As people read it.
    pub fn as_str(self) -> &'static str {
        match self {
            JobKind::Test => "test",
            JobKind::Planned => "planned",
            JobKind::Unplanned => "unplanned",
            JobKind::Reprotect => "reprotect",
        }
    }
}

/// Where a job stands. Durable before anything of the state is done, so that a restart goes on there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum JobState {
    /// Test: disks are being mounted, the machine is started.
    Preparing,
    /// Test: the copy stands, until it is cleaned up.
    Running,
    /// Test: the machine is stopped, the mounts end.
    CleaningUp,
    /// Test: nothing is left of it.
    Cleaned,
    /// Planned: the agent stops taking writes and makes the final point.
    Quiescing,
    /// Nothing is taken from the source any more; what arrived is applied.
    Draining,
    /// The replicas are brought to the point.
    Rolling,
    /// The machine may run from the replicas; the point can be changed, the failover cancelled or committed.
    FailedOver,
    /// The replicas are brought back to where they were.
    Cancelling,
    /// Replication goes on as before.
    Cancelled,
    /// The other points are dropped.
    Committing,
    /// The machine runs from the replicas; there is no way back.
    Committed,
    /// The replicas are given out of hand.
    Releasing,
    /// The image files belong to whoever runs the machine.
    Released,
    /// Reprotect: source and replica are compared; nothing is overwritten.
    Comparing,
    /// Reprotect: what differs travels.
    Resynchronising,
    /// Reprotect: the machine is replicated again.
    Protected,
    /// It could not be done; what it had begun is undone or named in the error.
    Failed,
}

impl JobState {
    /// As people read it.
    pub fn as_str(self) -> &'static str {
        match self {
            JobState::Preparing => "preparing",
            JobState::Running => "running",
            JobState::CleaningUp => "cleaning-up",
            JobState::Cleaned => "cleaned",
            JobState::Quiescing => "quiescing",
            JobState::Draining => "draining",
            JobState::Rolling => "rolling",
            JobState::FailedOver => "failed-over",
            JobState::Cancelling => "cancelling",
            JobState::Cancelled => "cancelled",
            JobState::Committing => "committing",
            JobState::Committed => "committed",
            JobState::Releasing => "releasing",
            JobState::Released => "released",
            JobState::Comparing => "comparing",
            JobState::Resynchronising => "resynchronising",
            JobState::Protected => "protected",
            JobState::Failed => "failed",
        }
    }

    /// Nothing is left to do or to decide.
    pub fn is_over(self) -> bool {
        matches!(self, JobState::Cleaned | JobState::Cancelled | JobState::Released | JobState::Protected | JobState::Failed)
    }

    /// The job waits for a person to decide.
    pub fn is_at_rest(self) -> bool {
        self.is_over() || matches!(self, JobState::Running | JobState::FailedOver | JobState::Committed)
    }

    /// What the master target does with the machine's stream while this is the newest of its failovers.
    pub fn hold(self) -> Hold {
        match self {
            JobState::Draining => Hold::Draining,
            JobState::Rolling | JobState::FailedOver | JobState::Cancelling | JobState::Committing => Hold::Standing,
            JobState::Committed | JobState::Releasing => Hold::Committed,
            JobState::Released => Hold::Released,
            _ => Hold::None,
        }
    }
}

/// What a failover keeps a master target from doing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Hold {
    /// Nothing.
    #[default]
    None,
    /// Nothing new is taken from the source.
    Draining,
    /// Nothing is applied either: the replica is the machine's disk.
    Standing,
    /// As before, and there is no history to go back to.
    Committed,
    /// The replica is somebody else's.
    Released,
}

/// Which point was asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Choice {
    /// The newest, after everything that arrived was applied.
    Latest,
    /// The newest that is listed now.
    LatestProcessed,
    /// The newest application-consistent one.
    LatestApp,
    /// The newest of a group.
    LatestMultiVm,
    /// This one: its id, the beginning of it, or its label.
    Point(String),
}

impl std::str::FromStr for Choice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Ok(match text {
            "latest" => Choice::Latest,
            "latest-processed" => Choice::LatestProcessed,
            "latest-app" => Choice::LatestApp,
            "latest-multi-vm" => Choice::LatestMultiVm,
            "" => return Err("give latest, latest-processed, latest-app, latest-multi-vm, an id, or a label".to_owned()),
            name => Choice::Point(name.to_owned()),
        })
    }
}

impl Choice {
    /// Whether a text names a point: at least four characters of its id, or all of its label.
    pub fn names(text: &str, id: PointId, label: Option<&str>) -> bool {
        label == Some(text) || text.len() >= 4 && id.to_string().starts_with(text)
    }
}

impl std::fmt::Display for Choice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Choice::Latest => "latest",
            Choice::LatestProcessed => "latest-processed",
            Choice::LatestApp => "latest-app",
            Choice::LatestMultiVm => "latest-multi-vm",
            Choice::Point(id) => id,
        })
    }
}

/// The point that was chosen, as it was then.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChosenPoint {
    /// Its id.
    pub id: PointId,
    /// Its consistency.
    pub kind: PointKind,
    /// What a person called it.
    pub label: Option<String>,
    /// Wall clock of the source, milliseconds since 1970.
    pub wall_ms: i64,
}

/// A disk of a job.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobDisk {
    /// Its id.
    pub id: DiskId,
    /// Its name.
    pub name: String,
    /// Where it is served over NBD.
    pub nbd: Option<Address>,
    /// Bytes it has there.
    pub size: u64,
    /// Where its replica stood before; cancelling brings it back there.
    pub before: Option<Position>,
    /// Where it is to stand.
    pub target: Option<Position>,
    /// Reprotect: the person's word that it may be overwritten.
    pub overwrite: bool,
}

/// One step of a job.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Step {
    /// What is done.
    pub name: String,
    /// Wall clock, milliseconds since 1970.
    pub started_ms: i64,
    /// The same; absent while it runs.
    pub ended_ms: Option<i64>,
    /// What came of it, for a person.
    pub detail: Option<String>,
    /// Why it failed.
    pub error: Option<String>,
}

/// What a job has in common with those of the other machines of a group.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobGroup {
    /// The group.
    pub name: Name,
    /// The first of the jobs that were started together.
    pub run: u64,
    /// The group's point; none before it is chosen, and of a planned failover.
    pub point: Option<PointId>,
    /// Machines of the group that did not come along.
    pub missing: Vec<Name>,
}

impl JobGroup {
    /// What names all its jobs, as people read it.
    pub fn label(&self) -> String {
        format!("{}/{}", self.name, self.run)
    }
}

/// A job.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Job {
    /// Counts up at one master target.
    pub id: u64,
    /// What it is for.
    pub kind: JobKind,
    /// Whose.
    pub machine: MachineId,
    /// Its name.
    pub machine_name: String,
    /// Where it stands.
    pub state: JobState,
    /// Which point was asked for last.
    pub choice: Choice,
    /// The one that was chosen; the final one of a planned failover before it is listed.
    pub point: Option<ChosenPoint>,
    /// Its disks.
    pub disks: Vec<JobDisk>,
    /// Name of the hook that starts and checks the machine.
    pub hook: Option<String>,
    /// The hook has started the machine, so it has to be stopped.
    pub hook_started: bool,
    /// What was done.
    pub steps: Vec<Step>,
    /// Who asked.
    pub by: String,
    /// Wall clock, milliseconds since 1970.
    pub started_ms: i64,
    /// The same; absent while it is not over.
    pub ended_ms: Option<i64>,
    /// Why it does not go on.
    pub error: Option<String>,
    /// What to do.
    pub remedy: Option<String>,
    /// Test: whether start and check succeeded.
    pub passed: Option<bool>,
    /// The machine fails over together with others.
    pub group: Option<JobGroup>,
}

/// Most steps that are remembered of one job; changing points again and again adds some each time.
pub const STEPS_MAX: usize = 200;

impl Job {
    /// A disk of it.
    pub fn disk(&self, id: DiskId) -> Option<&JobDisk> {
        self.disks.iter().find(|d| d.id == id)
    }

    /// A point was chosen.
    pub fn take(&mut self, point: &RecoveryPoint) {
        self.point = Some(ChosenPoint { id: point.id, kind: point.kind, label: point.label.clone(), wall_ms: point.wall_ms });
        if let Some(group) = &mut self.group {
            group.point = point.group.as_ref().map(|g| g.point);
        }
    }

    /// Begins a step.
    pub fn begin(&mut self, name: &str, now_ms: i64) {
        if self.steps.len() >= STEPS_MAX {
            self.steps.remove(0);
        }
        self.steps.push(Step { name: name.to_owned(), started_ms: now_ms, ended_ms: None, detail: None, error: None });
    }

    /// Ends the step that runs.
    pub fn end(&mut self, result: Result<Option<String>, String>, now_ms: i64) {
        let Some(step) = self.steps.last_mut().filter(|s| s.ended_ms.is_none()) else { return };
        step.ended_ms = Some(now_ms);
        match result {
            Ok(detail) => step.detail = detail,
            Err(error) => step.error = Some(error),
        }
    }

    /// Enters a state.
    pub fn enter(&mut self, state: JobState, now_ms: i64) {
        self.state = state;
        self.ended_ms = state.is_over().then_some(now_ms);
    }
}

/// What failovers keep a machine from; the newest of its jobs that are no tests decides.
pub fn hold<'a>(jobs: impl Iterator<Item = &'a Job>, machine: MachineId) -> Option<(&'a Job, Hold)> {
    let newest = jobs.filter(|j| j.machine == machine && j.kind != JobKind::Test && j.state != JobState::Failed).max_by_key(|j| j.id)?;
    Some((newest, newest.state.hold())).filter(|(_, hold)| *hold != Hold::None)
}

/// Whether what a machine did last was to fail over, and that was undone: it runs at its source.
pub fn is_undone<'a>(jobs: impl Iterator<Item = &'a Job> + Clone, machine: MachineId) -> bool {
    let newest = jobs.clone().filter(|j| j.machine == machine && j.kind != JobKind::Test).max_by_key(|j| j.id);
    let undone = newest.is_some_and(|j| j.kind != JobKind::Reprotect && matches!(j.state, JobState::Cancelled | JobState::Failed));
    undone && hold(jobs, machine).is_none()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn choices_are_told_apart_from_ids() {
        assert_eq!("latest-app".parse(), Ok(Choice::LatestApp));
        assert_eq!("3f2a".parse(), Ok(Choice::Point("3f2a".to_owned())));
        assert!("".parse::<Choice>().is_err());
        let id = PointId(uuid::Uuid::from_u128(0x3f2a << 112));
        assert!(Choice::names("3f2a", id, None) && Choice::names("v2", id, Some("v2")));
        assert!(!Choice::names("3f2", id, Some("v2")) && !Choice::names("v", id, Some("v2")));
    }

    #[test]
    fn the_newest_failover_decides_and_tests_and_failed_jobs_do_not_count() {
        let job = |id, kind, state| Job {
            id,
            kind,
            machine: MachineId(uuid::Uuid::nil()),
            machine_name: "m".to_owned(),
            state,
            choice: Choice::Latest,
            point: None,
            disks: vec![],
            hook: None,
            hook_started: false,
            steps: vec![],
            by: String::new(),
            started_ms: 0,
            ended_ms: None,
            error: None,
            remedy: None,
            passed: None,
            group: None,
        };
        let of = |jobs: &[Job]| hold(jobs.iter(), MachineId(uuid::Uuid::nil())).map(|(j, h)| (j.id, h));
        let released = job(1, JobKind::Planned, JobState::Released);
        assert_eq!(
            of(std::slice::from_ref(&released)),
            Some((1, Hold::Released)),
            "a released machine stays so until it is protected again"
        );
        assert_eq!(of(&[released.clone(), job(2, JobKind::Test, JobState::Running)]), Some((1, Hold::Released)));
        assert_eq!(of(&[released.clone(), job(2, JobKind::Unplanned, JobState::Failed)]), Some((1, Hold::Released)));
        assert_eq!(of(&[released.clone(), job(2, JobKind::Reprotect, JobState::Comparing)]), None);
        let undone = |jobs: &[Job]| is_undone(jobs.iter(), MachineId(uuid::Uuid::nil()));
        let (cancelled, failed) = (job(2, JobKind::Planned, JobState::Cancelled), job(3, JobKind::Unplanned, JobState::Failed));
        assert!(undone(std::slice::from_ref(&cancelled)) && undone(&[cancelled.clone(), failed.clone()]));
        assert!(undone(&[cancelled.clone(), job(3, JobKind::Test, JobState::Running)]));
        assert!(!undone(&[]) && !undone(&[job(2, JobKind::Planned, JobState::FailedOver)]));
        assert!(!undone(&[released, failed]), "the machine runs here, whatever was tried since");
        assert!(!undone(&[cancelled, job(3, JobKind::Reprotect, JobState::Protected)]));
    }
}
