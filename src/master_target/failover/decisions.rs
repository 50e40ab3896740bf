//! What a person decides about a job that stands: another point, commit, cancel, cleanup. Each is noted durably, then the job's
//! task does it.

use std::rc::Rc;
use std::time::Duration;

use super::engine::Engine;
use super::steps::aim;
use crate::clock;
use crate::master_target::catalogue::Effects;
use crate::model::{Choice, Job, JobKind, JobState, MachineId, PointId, Wanted};

/// How often what is waited for is looked at.
const LOOK: Duration = Duration::from_millis(50);
/// A scrub that runs lets go of its point by then.
const SCRUB_LIMIT: Duration = Duration::from_secs(3);

impl Engine {
    /// Another point for a failover that is not committed; the same again goes on with one that failed.
    pub(super) async fn change_point(self: &Rc<Self>, id: u64, choice: Choice) -> Result<u64, String> {
        let mut job = self.at_rest(id, &[JobState::FailedOver, JobState::Rolling], "only a failover that stands can change its point")?;
        job.choice = match choice {
            // Nothing arrives any more; the newest is the newest.
            Choice::Latest => Choice::LatestProcessed,
            other => other,
        };
        let point = self.choose(&job)?;
        if let Some(missing) = job.disks.iter().find(|d| !point.disks.contains_key(&d.id)) {
            return Err(format!("point {} has no disk {}: it joined later. Choose a newer point", point.id, missing.name));
        }
        aim(&mut job, &point);
        (job.error, job.remedy) = (None, None);
        job.enter(JobState::Rolling, clock::wall_ms());
        self.keep(job, &Effects::default()).await?;
        self.go_on(id, false);
        Ok(id)
    }

    /// Keeps the failover and drops the points. The machine goes on running meanwhile.
    pub(super) async fn commit(self: &Rc<Self>, id: u64, drop_pinned: bool) -> Result<u64, String> {
        let mut job = self.at_rest(id, &[JobState::FailedOver, JobState::Committing], "only a failover that stands can be committed")?;
        self.wait_for_scrub(job.machine).await;
        let _alone = self.setup.shared.noting.lock().await;
        self.may_commit(&job, drop_pinned)?;
        let dropped = {
            let book = self.setup.shared.book();
            job.disks.iter().flat_map(|d| book.needing(d.id)).collect::<std::collections::BTreeSet<_>>()
        };
        let dropped: Vec<PointId> = dropped.into_iter().collect();
        job.enter(JobState::Committing, clock::wall_ms());
        let machine = job.machine;
        let stand = job.disks.iter().map(|d| (d.id, None)).collect();
        self.keep(job, &Effects { stand, dropped: dropped.clone(), ..Effects::default() }).await?;
        {
            let mut book = self.setup.shared.book();
            book.unlist(&dropped);
            book.forget_pending(&dropped);
        }
        for disk in self.disks(machine) {
            // Whoever was stopped for this stays so: the machine runs here now. But nobody is stopped again by an old word.
            disk.set_wanted(Wanted::Run);
        }
        self.go_on(id, false);
        Ok(id)
    }

    /// Nobody wants or uses the points that a commit drops.
    pub(super) fn may_commit(&self, job: &Job, drop_pinned: bool) -> Result<(), String> {
        let book = self.setup.shared.book();
        let pinned = book.of(job.machine).iter().filter(|p| p.pinned).count();
        if pinned > 0 && !drop_pinned {
            return Err(format!(
                "{} of {} pinned, and committing drops every point: export what you need, then add --drop-pinned",
                if pinned == 1 { "1 point".to_owned() } else { format!("{pinned} points") },
                format_args!("{} {}", job.machine_name, if pinned == 1 { "is" } else { "are" })
            ));
        }
        if let Some(used) = book.of(job.machine).iter().find(|p| book.is_in_use(p.id)) {
            return Err(format!("point {} is mounted or being exported: end that first, see `tidegate recover list`", used.id));
        }
        Ok(())
    }

    /// A scrub lets go of its point when it sees that the machine fails over.
    pub(super) async fn wait_for_scrub(&self, machine: MachineId) {
        let started = clock::now();
        while clock::now().since(started) < SCRUB_LIMIT {
            {
                let book = self.setup.shared.book();
                if !book.of(machine).iter().any(|p| book.is_in_use(p.id)) {
                    return;
                }
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Back to replication, or out of waiting.
    pub(super) async fn cancel(self: &Rc<Self>, id: u64) -> Result<u64, String> {
        let entry = self.setup.jobs.get(id).ok_or_else(|| format!("there is no failover {id}: see `tidegate failover list`"))?;
        match entry.job.kind {
            JobKind::Test => return self.cleanup(id).await,
            JobKind::Reprotect if entry.job.state == JobState::Comparing => {
                if entry.busy {
                    self.given_up.borrow_mut().insert(id);
                } else {
                    let mut job = entry.job;
                    (job.error, job.remedy) = (None, None);
                    job.enter(JobState::Cancelled, clock::wall_ms());
                    self.keep(job, &Effects::default()).await?;
                }
                return Ok(id);
            }
            JobKind::Reprotect => {
                return Err(format!(
                    "failover {id} protects the machine again, which has no way back: take the disk out of the configuration to stop it"
                ));
            }
            _ => {}
        }
        if entry.busy && matches!(entry.job.state, JobState::Quiescing | JobState::Draining) {
            self.given_up.borrow_mut().insert(id);
            return Ok(id);
        }
        let states = [JobState::FailedOver, JobState::Rolling, JobState::Cancelling];
        let mut job = self.at_rest(id, &states, "a committed failover has no way back: protect the machine again and fail over home")?;
        (job.error, job.remedy) = (None, None);
        job.enter(JobState::Cancelling, clock::wall_ms());
        self.keep(job, &Effects::default()).await?;
        self.go_on(id, false);
        Ok(id)
    }

    /// Ends a test, or gives the images of a committed failover out of hand.
    pub(super) async fn cleanup(self: &Rc<Self>, id: u64) -> Result<u64, String> {
        let states = [JobState::Running, JobState::Committed, JobState::CleaningUp, JobState::Releasing];
        let mut job =
            self.at_rest(id, &states, "cleanup is for tests and for committed failovers; `cancel` goes back, `commit` goes on")?;
        let next = if job.kind == JobKind::Test { JobState::CleaningUp } else { JobState::Releasing };
        job.enter(next, clock::wall_ms());
        self.keep(job, &Effects::default()).await?;
        self.go_on(id, false);
        Ok(id)
    }
}
