//! What the process server tells the command line.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::catalogue::Records;
use super::pressure::Level;
use super::{ProcessServer, ProcessServerView};
use crate::control::api::{ApiError, DiskView, DrainView, MachineView, Request, RoleStatus};
use crate::control::server::{Answer, Role};
use crate::model::{Health, MachineId};

struct Control {
    view: Arc<Mutex<ProcessServerView>>,
    draining: Arc<AtomicBool>,
    records: Records,
}

impl ProcessServer {
    /// Its side of the control interface.
    pub fn control(&self) -> Arc<dyn Role> {
        Arc::new(Control { view: self.view.clone(), draining: self.draining.clone(), records: self.records.clone() })
    }
}

/// Health, reason and remedy.
type Finding = (Health, Option<String>, Option<&'static str>);

/// What is to be said of the cache.
fn of_cache(view: &ProcessServerView) -> Option<Finding> {
    let free = view.cache_free_bytes * 100 / view.cache_capacity_bytes.max(1);
    let drain = view.drain_seconds.filter(|s| *s >= 1800.0).map(|s| format!("what is cached takes {:.0} min to send", s / 60.0));
    let reason = || Some(drain.clone().unwrap_or_else(|| format!("{free} % of the cache is free")));
    let remedy = "the link is slower than the churn: enlarge [cache] size_max or the link; `disk list` shows who is held back";
    match view.level {
        Level::Normal => None,
        Level::Warn => Some((Health::Warning, reason(), Some("watch the link and the churn"))),
        Level::Shrink | Level::Throttle | Level::Protect => Some((Health::Critical, reason(), Some(remedy))),
    }
}

impl Role for Control {
    fn status(&self) -> RoleStatus {
        let view = self.view.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let draining = || {
            (view.draining).then(|| {
                let remedy = "stop it when `tidegate gateway drain` says so, or `tidegate gateway resume`";
                (Health::Warning, Some("it is to be taken out of service: agents that know another one go there".to_owned()), Some(remedy))
            })
        };
        let (health, reason, remedy) = match view.link_up {
            false => (
                Health::Critical,
                view.link_error.clone(),
                Some("check the master target and the network; changes are kept in the cache meanwhile"),
            ),
            true => of_cache(&view).or_else(draining).unwrap_or((Health::Healthy, None, None)),
        };
        let machines = machines(&view);
        let worst = machines.iter().map(|m| m.health).max().unwrap_or_default();
        // Whoever was refused may be the agent of a disk that nobody sends here.
        let refused = view.last_refused.is_some() && view.disks.iter().any(|disk| !disk.connected);
        let worst = if refused { worst.max(Health::Warning) } else { worst };
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

    fn call<'a>(&'a self, request: &'a Request, _: &'a str) -> Answer<'a> {
        Box::pin(async move {
            let Request::Drain { on } = request else { return None };
            if let Some(on) = *on {
                let records = self.records.clone();
                let noted = tokio::task::spawn_blocking(move || records.set_draining(on)).await;
                let failed = match noted {
                    Ok(Ok(())) => None,
                    Ok(Err(error)) => Some(error.to_string()),
                    Err(error) => Some(error.to_string()),
                };
                if let Some(message) = failed {
                    return Some(Err(ApiError { message }));
                }
                self.draining.store(on, Ordering::Relaxed);
            }
            let view = self.view.lock().unwrap_or_else(PoisonError::into_inner).clone();
            let drained = DrainView {
                draining: self.draining.load(Ordering::Relaxed),
                agents: view.agents,
                waiting_bytes: view.disks.iter().map(|d| d.cache_bytes).sum(),
            };
            Some(serde_json::to_value(drained).map_err(|e| ApiError { message: e.to_string() }))
        })
    }
}

fn machines(view: &ProcessServerView) -> Vec<MachineView> {
    let mut machines: Vec<MachineView> = Vec::new();
    for disk in &view.disks {
        let (machine, name) = disk.disk.split_once('/').unwrap_or(("", &disk.disk));
        let idle = (!disk.connected && !view.draining).then(|| "its agent is not connected".to_owned());
        // A process server that stands by is as it should be; whether the disk is sent at all the master target says.
        let reason = disk.not_ready.clone().or(idle).or(disk.held_back.map(str::to_owned)).filter(|_| !disk.standby);
        let health = if reason.is_some() { Health::Warning } else { Health::Healthy };
        let shown = DiskView {
            name: name.to_owned(),
            id: disk.id.clone(),
            state: match (disk.connected, disk.standby) {
                (true, _) => "connected",
                (false, true) => "standby",
                (false, false) => "not connected",
            }
            .to_owned(),
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
