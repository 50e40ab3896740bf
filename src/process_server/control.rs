//! What the process server tells the command line.

use std::sync::{Arc, Mutex, PoisonError};

use super::{ProcessServer, ProcessServerView};
use crate::control::api::{DiskView, MachineView, Request, RoleStatus};
use crate::control::server::{Answer, Role};
use crate::model::{Health, MachineId};

struct Control {
    view: Arc<Mutex<ProcessServerView>>,
}

impl ProcessServer {
    /// Its side of the control interface.
    pub fn control(&self) -> Arc<dyn Role> {
        Arc::new(Control { view: self.view.clone() })
    }
}

impl Role for Control {
    fn status(&self) -> RoleStatus {
        let view = self.view.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let free = 100 - view.cache_used_bytes * 100 / view.cache_capacity_bytes.max(1);
        let (health, reason, remedy) = match (view.link_up, free) {
            (false, _) => (
                Health::Critical,
                view.link_error.clone(),
                Some("check the master target and the network; changes are kept in the cache meanwhile"),
            ),
            (true, ..25) => (
                Health::Critical,
                Some(format!("{free} % of the cache is free")),
                Some("the link is slower than the churn: enlarge [cache] size_max or the link"),
            ),
            (true, ..30) => (Health::Warning, Some(format!("{free} % of the cache is free")), Some("watch the link and the churn")),
            _ => (Health::Healthy, None, None),
        };
        let machines = machines(&view);
        let worst = machines.iter().map(|m| m.health).max().unwrap_or_default();
        let (health, reason, remedy) = if health == Health::Healthy && worst > health {
            let told =
                machines.iter().find_map(|m| m.disks.iter().find_map(|d| Some(format!("{}/{}: {}", m.name, d.name, d.reason.as_ref()?))));
            let remedy = "start the agents of these machines; if one is refused, correct what the reason names";
            (worst, view.last_refused.clone().or(told), Some(remedy))
        } else {
            (health, reason, remedy)
        };
        RoleStatus {
            role: "process-server".to_owned(),
            name: view.name.clone(),
            health,
            reason,
            remedy: remedy.map(str::to_owned),
            machines,
            cache_bytes: Some((view.cache_used_bytes, view.cache_capacity_bytes)),
            connected: Some(view.link_up),
            ..RoleStatus::default()
        }
    }

    fn call<'a>(&'a self, _: &'a Request, _: &'a str) -> Answer<'a> {
        Box::pin(async { None })
    }
}

fn machines(view: &ProcessServerView) -> Vec<MachineView> {
    let mut machines: Vec<MachineView> = Vec::new();
    for disk in &view.disks {
        let (machine, name) = disk.disk.split_once('/').unwrap_or(("", &disk.disk));
        let health = if disk.not_ready.is_some() || !disk.connected { Health::Warning } else { Health::Healthy };
        let reason = disk.not_ready.clone().or_else(|| (!disk.connected).then(|| "its agent is not connected".to_owned()));
        let shown = DiskView {
            name: name.to_owned(),
            id: disk.id.clone(),
            state: if disk.connected { "connected" } else { "not connected" }.to_owned(),
            health,
            reason,
            waiting_bytes: disk.cache_bytes,
            positions: disk.positions.clone(),
            ..DiskView::default()
        };
        match machines.iter_mut().find(|m| m.name == machine) {
            Some(found) => {
                found.health = found.health.max(health);
                found.disks.push(shown);
            }
            None => machines.push(MachineView {
                name: machine.to_owned(),
                id: machine.parse().map(|name| MachineId::from_name(&name).to_string()).unwrap_or_default(),
                health,
                rpo_seconds: None,
                points: None,
                oldest_point: None,
                newest_point: None,
                group: None,
                failover: None,
                last_test: None,
                disks: vec![shown],
            }),
        }
    }
    machines
}
