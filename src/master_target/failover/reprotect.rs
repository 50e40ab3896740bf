//! Replicating a machine onto disks that have content: after a committed failover back to where it came from, or the first
//! time onto disks that were brought there some other way.
//!
//! The replica begins a new history. Source and replica are compared by digests; until a person names every disk that may be
//! overwritten nothing is written to it. Then only what differs travels, and points begin when all of it is there.

use std::collections::BTreeSet;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use super::engine::Engine;
use crate::clock;
use crate::config::units::show_size;
use crate::master_target::apply::failover::Order;
use crate::master_target::catalogue::{Content, Effects};
use crate::master_target::shared::DiskShared;
use crate::model::{Choice, DiskId, DiskReport, Hold, Job, JobKind, JobState, MachineId, ReplicationState};

/// How often what is waited for is looked at.
const LOOK: Duration = Duration::from_millis(100);
/// A report that is older says nothing about now.
const FRESH: Duration = Duration::from_secs(5);

impl Engine {
    pub(super) async fn reprotect(self: &Rc<Self>, machine: MachineId, overwrite: Vec<String>, by: &str) -> Result<u64, String> {
        let disks = self.disks(machine);
        let Some(first) = disks.first() else { return Err("the machine has no disks here".to_owned()) };
        let name = first.machine_name.to_string();
        if let Some(unknown) = overwrite.iter().find(|wanted| disks.iter().all(|d| d.name.as_str() != wanted.as_str())) {
            let names: Vec<&str> = disks.iter().map(|d| d.name.as_str()).collect();
            return Err(format!("{name} has no disk {unknown}: its disks here are {}", names.join(", ")));
        }
        let entries = self.setup.jobs.list();
        let open = entries.iter().find(|e| e.job.machine == machine && e.job.kind == JobKind::Reprotect && !e.job.state.is_over());
        if let Some(entry) = open {
            return self.allow(entry.job.clone(), entry.busy, &overwrite).await;
        }
        self.may_start(machine, JobKind::Reprotect, &name)?;
        let mut effects = Effects::default();
        let jobs: Vec<Job> = entries.into_iter().map(|e| e.job).collect();
        let mut taken = Vec::new();
        match crate::model::job::hold(jobs.iter(), machine) {
            Some((_, Hold::Released)) => {
                for disk in &disks {
                    let record = self.setup.records.replica(disk.id).map_err(|e| e.to_string())?;
                    let record = record.ok_or_else(|| format!("{} has no replica", disk.label))?;
                    // A comparison that was given up has begun the history already, and the replica may be open in it.
                    if record.content != Content::Unconfirmed {
                        effects.replicas.push((disk.id, record.anew(&self.setup.kek, disk.id)));
                        effects.ended.push(disk.id);
                    }
                    taken.push(disk.clone());
                }
            }
            Some(_) => return Err(format!("{name} is failing over: finish that first, see `tidegate failover list`")),
            None => {
                for disk in &disks {
                    let record = self.setup.records.replica(disk.id).map_err(|e| e.to_string())?;
                    let unconfirmed = record.as_ref().is_some_and(|r| r.content == Content::Unconfirmed);
                    if unconfirmed || record.is_none() && disk.adopt.is_some() {
                        taken.push(disk.clone());
                    }
                }
                if taken.is_empty() {
                    return Err(format!(
                        "{name} is replicated here already. reprotect is for a machine that failed over from here (commit, cleanup, then reprotect), or for disks with `adopt` in the configuration"
                    ));
                }
            }
        }
        let mut job = self.new_job(JobKind::Reprotect, Choice::Latest, None, &taken, by);
        mark(&mut job, &overwrite);
        let id = job.id;
        self.keep(job, &effects).await?;
        self.go_on(id, false);
        Ok(id)
    }

    /// Disks are named that may be overwritten.
    async fn allow(self: &Rc<Self>, mut job: Job, busy: bool, overwrite: &[String]) -> Result<u64, String> {
        let id = job.id;
        mark(&mut job, overwrite);
        if busy {
            // The task looks at the job that is kept.
            if let Some(entry) = self.setup.jobs.lock().get_mut(&id) {
                entry.job.disks = job.disks;
            }
            return Ok(id);
        }
        (job.error, job.remedy) = (None, None);
        self.keep(job, &Effects::default()).await?;
        self.go_on(id, false);
        Ok(id)
    }

    pub(super) async fn compare(self: &Rc<Self>, job: &mut Job) -> Result<(), String> {
        self.compare_all(job).await?;
        if job.state == JobState::Resynchronising { self.resynchronise(job).await } else { Ok(()) }
    }

    async fn compare_all(self: &Rc<Self>, job: &mut Job) -> Result<(), String> {
        let disks: Vec<Arc<DiskShared>> = self.disks(job.machine).into_iter().filter(|d| job.disk(d.id).is_some()).collect();
        for disk in &disks {
            // Also after a restart, and when the image could not be opened the last time.
            self.order(disk.id, |done| Order::Adopt { done }).await?;
        }
        self.step(job, "compare source and disks").await?;
        let mut found = Vec::new();
        for disk in &disks {
            self.wait_for(job.id, disk, |report| report.unverified_bytes == Some(0)).await?;
            let size = disk.condition().size;
            found.push(format!("{}: {} of {} differ", disk.name, show_size(disk.differing_bytes()), show_size(size)));
            if let Some(d) = job.disks.iter_mut().find(|d| d.id == disk.id) {
                d.size = size;
            }
        }
        self.done(job, Some(found.join("; "))).await?;
        // Named while it was compared.
        if let Some(entry) = self.setup.jobs.get(job.id) {
            let allowed: BTreeSet<DiskId> = entry.job.disks.iter().filter(|d| d.overwrite).map(|d| d.id).collect();
            job.disks.iter_mut().for_each(|d| d.overwrite |= allowed.contains(&d.id));
        }
        let unnamed: Vec<&str> = job.disks.iter().filter(|d| !d.overwrite).map(|d| d.name.as_str()).collect();
        if !unnamed.is_empty() {
            let all: Vec<String> = job.disks.iter().map(|d| format!("--overwrite {}", d.name)).collect();
            job.remedy = Some(format!(
                "not named yet: {}. If what stands on the disks may be overwritten: tidegate failover reprotect {} {}",
                unnamed.join(", "),
                job.machine_name,
                all.join(" ")
            ));
            return self.keep(job.clone(), &Effects::default()).await;
        }
        for disk in &disks {
            let record = self.setup.records.replica(disk.id).map_err(|e| e.to_string())?;
            record.ok_or_else(|| format!("{} has no replica yet: its agent has not connected", disk.label))?;
        }
        let effects = Effects { confirmed: disks.iter().map(|d| d.id).collect(), ..Effects::default() };
        job.remedy = None;
        job.enter(JobState::Resynchronising, clock::wall_ms());
        self.keep(job.clone(), &effects).await
    }

    pub(super) async fn resynchronise(self: &Rc<Self>, job: &mut Job) -> Result<(), String> {
        let disks: Vec<Arc<DiskShared>> = self.disks(job.machine).into_iter().filter(|d| job.disk(d.id).is_some()).collect();
        for disk in &disks {
            disk.condition().unconfirmed = false;
            disk.reopen_streams();
        }
        self.step(job, "send what differs").await?;
        for disk in &disks {
            self.wait_for(job.id, disk, |report| report.missing_bytes == 0 && report.unverified_bytes == Some(0)).await?;
        }
        self.done(job, None).await?;
        self.step(job, "wait for the first point").await?;
        while self.setup.shared.book().of(job.machine).is_empty() {
            disks.first().into_iter().for_each(|disk| self.tell_whether_resumed(job.id, disk));
            tokio::time::sleep(LOOK).await;
        }
        self.done(job, None).await?;
        job.enter(JobState::Protected, clock::wall_ms());
        self.keep(job.clone(), &Effects::default()).await
    }

    async fn wait_for(&self, id: u64, disk: &DiskShared, enough: impl Fn(&DiskReport) -> bool) -> Result<(), String> {
        loop {
            let report = disk.condition().report.clone();
            if let Some((report, at)) = report
                && clock::now().since(at) < FRESH
                && enough(&report)
            {
                return Ok(());
            }
            self.go_on_waiting(id)?;
            self.tell_whether_resumed(id, disk);
            tokio::time::sleep(LOOK).await;
        }
    }

    /// As [`Self::tell_whether_heard`], and whether the agent still takes no writes since it handed the machine over.
    fn tell_whether_resumed(&self, id: u64, disk: &DiskShared) {
        self.tell_whether_heard(id, &[disk], "");
        let stopped = disk.condition().report.as_ref().is_some_and(|(report, _)| report.state == ReplicationState::FailedOver);
        if let Some(entry) = self.setup.jobs.lock().get_mut(&id).filter(|_| stopped) {
            let machine = &disk.machine_name;
            entry.job.remedy.get_or_insert_with(|| {
                format!(
                    "the agent of {machine} takes no writes since it handed the machine over: if the machine runs there now, `tidegate machine resume {machine}` there"
                )
            });
        }
    }

    /// Says of a job that waits for agents which of them is not heard, and what helps; `else_do` is what helps otherwise. For who looks
    /// meanwhile; the next step that is kept takes it away.
    pub(super) fn tell_whether_heard(&self, id: u64, disks: &[&DiskShared], else_do: &str) {
        let is_heard = |disk: &DiskShared| disk.condition().report.as_ref().is_some_and(|(_, at)| clock::now().since(*at) < FRESH);
        let silent = disks.iter().find(|disk| !is_heard(disk));
        if let Some(entry) = self.setup.jobs.lock().get_mut(&id) {
            entry.job.remedy = silent.map(|disk| {
                format!("waiting for the agent that has {}, which is not heard: start it, and its process server{else_do}", disk.label)
            });
        }
    }
}

fn mark(job: &mut Job, overwrite: &[String]) {
    for disk in &mut job.disks {
        disk.overwrite |= overwrite.contains(&disk.name);
    }
}
