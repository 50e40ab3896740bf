//! The three roles with certificates and settings made on the spot.

use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use anyhow::Context;

use crate::agent::Agent;
use crate::config::{self, Settings};
use crate::control::api::{Marked, RecoveryView, Request};
use crate::control::{client, server};
use crate::crypto::pki::{self, Identity, Role};
use crate::disk::Format;
use crate::master_target::MasterTarget;
use crate::master_target::shared::DiskShared;
use crate::model::{Address, RecoveryPoint, ReplicationState};
use crate::observe::http;
use crate::process_server::ProcessServer;

/// Name of the sample machine and disk.
pub(super) const MACHINE: &str = "sample";
const DISK: &str = "disk0";

/// Everything running.
pub(super) struct Roles {
    agent: Agent,
    process_server: ProcessServer,
    target: MasterTarget,
    nbd: PathBuf,
    control: PathBuf,
}

impl Roles {
    /// Makes what is missing in `state` and starts all roles on loopback ports that are free.
    pub(super) async fn start(state: &Path, disk: &Path, interval: Duration, cache: &str, format: Option<Format>) -> anyhow::Result<Self> {
        let pki_dir = state.join("pki");
        if !pki_dir.join("ca.pem").exists() {
            pki::init(&pki_dir)?;
        }
        for (role, name) in [(Role::Agent, MACHINE), (Role::ProcessServer, "gateway"), (Role::MasterTarget, "target")] {
            pki::issue(&pki_dir, &Identity { role, name: name.parse()? }, &pki_dir.join(role.as_str()))?;
        }
        let (nbd, control) = (state.join("nbd.sock"), state.join("control.sock"));
        let target = MasterTarget::start(settings(&format!(
            "state = {:?}\n{}\n[receive]\nlisten = \"127.0.0.1:0\"\nmtu = 16000\n[[machine]]\nname = \"{MACHINE}\"\n[[machine.disk]]\nname = \"{DISK}\"\n",
            state.join("master-target"),
            tls(&pki_dir, Role::MasterTarget)
        ))?)
        .context("the master target does not start")?;
        let process_server = ProcessServer::start(settings(&format!(
            "state = {:?}\n{}\n[ingest]\nlisten = \"127.0.0.1:0\"\n[cache]\nsize_max = \"8GiB\"\n[forward]\nmaster_target = \"{}\"\nmtu = 16000\n[[machine]]\nname = \"{MACHINE}\"\ndisks = [\"{DISK}\"]\n",
            state.join("process-server"),
            tls(&pki_dir, Role::ProcessServer),
            target.listen
        ))?)
        .context("the process server does not start")?;
        let format = format.map_or_else(String::new, |f| format!("format = \"{}\"\n", f.as_str()));
        let agent = Agent::start(settings(&format!(
            "machine = \"{MACHINE}\"\nstate = {:?}\n{}\n[process_server]\naddress = \"{}\"\n[points]\ninterval = \"{}ms\"\n[[disk]]\nname = \"{DISK}\"\npath = {disk:?}\nnbd = \"unix:{}\"\ncache = \"{cache}\"\n{format}",
            state.join("agent"),
            tls(&pki_dir, Role::Agent),
            process_server.listen,
            interval.as_millis(),
            nbd.display()
        ))?)
        .context("the agent does not start")?;
        let listener = server::bind(&control).await?;
        tokio::spawn(server::serve(listener, vec![agent.control(), process_server.control(), target.control()]));
        let scrape = http::bind(([127, 0, 0, 1], 0).into()).await?;
        tokio::spawn(http::serve(scrape, target.readiness.clone()));
        Ok(Self { agent, process_server, target, nbd, control })
    }

    /// The protected disk's export.
    pub(super) fn nbd(&self) -> Address {
        Address::Unix(self.nbd.clone())
    }

    /// The same, as tools want it.
    pub(super) fn nbd_uri(&self) -> String {
        format!("nbd+unix:///{DISK}?socket={}", self.nbd.display())
    }

    /// The control interface of all roles.
    pub(super) fn control(&self) -> Address {
        Address::Unix(self.control.clone())
    }

    /// Bytes of the disk.
    pub(super) fn disk_size(&self) -> u64 {
        self.agent.shared.volumes[0].size()
    }

    /// Bytes not in the stream yet.
    pub(super) fn missing_bytes(&self) -> u64 {
        self.agent.shared.volumes[0].report().missing_bytes
    }

    /// What the agent complains about.
    pub(super) fn last_error(&self) -> Option<String> {
        self.agent.shared.last_error.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether everything captured is durable in the replica.
    pub(super) fn is_replicated(&self) -> bool {
        let volume = &self.agent.shared.volumes[0];
        let captured = volume.backlog().rungs()[0].1;
        let report = volume.report();
        report.state == ReplicationState::Delta
            && report.missing_bytes == 0
            && captured.sequence > 0
            && self.disk().condition().checkpointed >= captured
    }

    /// Age of the newest point, as the master target measures it.
    pub(super) fn rpo(&self) -> Option<f64> {
        let newest = self.disk().condition().newest?;
        Some(crate::clock::now().since(newest.travel.captured()).as_secs_f64())
    }

    /// All listed points, the oldest first.
    pub(super) fn points(&self) -> Vec<RecoveryPoint> {
        self.target.shared.book().all()
    }

    /// Makes a point and waits until it is listed.
    pub(super) async fn mark(&self, label: &str) -> anyhow::Result<String> {
        let request = Request::Mark { machine: MACHINE.to_owned(), label: Some(label.to_owned()), app: false, wait_seconds: None };
        let marked: Marked = client::call(&self.control(), &request).await?;
        for _ in 0..6000 {
            if self.points().iter().any(|p| p.id.to_string() == marked.point) {
                return Ok(marked.point);
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        anyhow::bail!("point {} was not listed within a minute: {}", marked.point, self.last_error().unwrap_or_default())
    }

    /// Runs a mount or an export; an export is waited for.
    pub(super) async fn recover(&self, request: Request) -> anyhow::Result<RecoveryView> {
        let mut view: RecoveryView = client::call(&self.control(), &request).await?;
        while view.kind == "export" && view.state == "running" {
            tokio::time::sleep(Duration::from_millis(20)).await;
            let all: Vec<RecoveryView> = client::call(&self.control(), &Request::Recoveries).await?;
            view = all.into_iter().find(|v| v.name == view.name).context("the export vanished")?;
        }
        if let Some(error) = &view.error {
            anyhow::bail!("recovery failed: {error}");
        }
        Ok(view)
    }

    /// Stops all roles, the agent first.
    pub(super) async fn stop(self) {
        self.agent.stop().await;
        self.process_server.stop().await;
        self.target.stop().await;
        let _ = std::fs::remove_file(&self.control);
        let _ = std::fs::remove_file(&self.nbd);
    }

    fn disk(&self) -> &Arc<DiskShared> {
        &self.target.shared.disks[0]
    }
}

fn tls(pki_dir: &Path, role: Role) -> String {
    let dir = pki_dir.join(role.as_str());
    format!("[tls]\nca = {:?}\ncert = {:?}\nkey = {:?}", dir.join("ca.pem"), dir.join("cert.pem"), dir.join("key.pem"))
}

fn settings<T: Settings>(text: &str) -> anyhow::Result<T> {
    Ok(config::parse(Path::new("quickstart"), text)?)
}
