//! Test failovers: a machine's disks at a point, mounted for writing where nobody else sees them.

use std::rc::Rc;

use tokio::sync::oneshot;

use super::engine::Engine;
use super::steps::{describe, gone, set_disk};
use crate::clock;
use crate::master_target::catalogue::Effects;
use crate::master_target::recover::{Command as RecoverCommand, Target};
use crate::model::{Address, Job, JobKind, JobState};

impl Engine {
    pub(super) async fn test(self: &Rc<Self>, job: &mut Job) -> Result<(), String> {
        self.step(job, "choose the point").await?;
        let point = self.choose(job)?;
        let told = describe(&point);
        job.take(&point);
        self.done(job, Some(told)).await?;
        let dir = self.dir(job.id);
        crate::storage::uring::create_dir_durable(&dir).map_err(|e| format!("{}: {e}", dir.display()))?;
        // A disk that joined later is not there.
        job.disks.retain(|d| point.disks.contains_key(&d.id));
        for disk in self.disks(job.machine).into_iter().filter(|d| point.disks.contains_key(&d.id)) {
            self.step(job, &format!("mount {}", disk.name)).await?;
            let address = Address::Unix(dir.join(format!("{}.sock", disk.name)));
            let (done, answer) = oneshot::channel();
            let target = Target::Nbd { address: address.clone(), writable: true };
            let start = RecoverCommand::Start { point: point.id, disk: disk.id, label: disk.label.clone(), target, done };
            self.setup.recover.send(start).await.map_err(|_| gone())?;
            let view = answer.await.map_err(|_| gone())??;
            self.mounts.borrow_mut().entry(job.id).or_default().push(view.name.clone());
            set_disk(job, disk.id, |d| (d.nbd, d.size) = (Some(address.clone()), view.total_bytes));
            self.done(job, Some(address.nbd_uri())).await?;
        }
        let checked = self.start_machine(job).await;
        // A machine that does not come up is a result, and is left standing to be looked at.
        job.passed = job.hook.is_some().then_some(checked.is_ok());
        if let Err(error) = checked {
            job.end(Err(error.clone()), clock::wall_ms());
            job.error = Some(error);
            job.remedy = Some(format!("look at the machine and the output, then `tidegate failover cleanup {}`", job.id));
        }
        job.enter(JobState::Running, clock::wall_ms());
        self.keep(job.clone(), &Effects::default()).await
    }

    pub(super) async fn clean_up(self: &Rc<Self>, job: &mut Job) -> Result<(), String> {
        self.stop_machine(job).await?;
        self.step(job, "end the mounts").await?;
        self.unmount(job).await;
        self.done(job, None).await?;
        // There is nothing to look at any more.
        job.remedy = job.remedy.take().filter(|_| job.passed.is_none());
        job.enter(JobState::Cleaned, clock::wall_ms());
        self.keep(job.clone(), &Effects::default()).await
    }

    /// Mounts do not outlive the process: what is left of the test is taken away.
    pub(super) async fn end_test(self: &Rc<Self>, job: &mut Job) -> Result<(), String> {
        if job.state == JobState::Preparing {
            job.error = Some("the master target was restarted meanwhile".to_owned());
            job.remedy = Some("start the test again".to_owned());
        }
        self.clean_up(job).await
    }

    pub(super) async fn unmount(&self, job: &Job) {
        let mounts = self.mounts.borrow_mut().remove(&job.id).unwrap_or_default();
        for name in mounts {
            let _ = self.stop_service(&name).await;
        }
        if job.kind == JobKind::Test {
            let _ = std::fs::remove_dir_all(self.dir(job.id));
        }
    }
}
