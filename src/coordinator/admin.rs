//! What people ask of the coordinator: groups made, changed and deleted, points made now.

use std::time::Duration;

use serde_json::Value;

use super::groups::{Group, GroupPolicy};
use super::hub::{GROUPS, Hub, Reply};
use super::rounds::Event as RoundEvent;
use crate::clock;
use crate::control::api::{GroupValues, Request};
use crate::model::Name;
use crate::model::change::{LABEL_RULE, may_be_given};
use crate::storage::catalogue::CatalogueError;

/// Points that people may wait for, of one group.
const ASKS_MAX: usize = 16;

impl Hub {
    pub(super) async fn ask(&mut self, request: Request, reply: Reply) {
        let answer = match request {
            Request::Groups => serde_json::to_value(self.views()).map_err(|e| e.to_string()),
            Request::GroupMark { group, app, label } => return self.ask_mark(&group, app, label, reply),
            Request::GroupCreate { name, machines, values } => self.create(&name, &machines, &values),
            Request::GroupChange { group, add, remove } => self.change(&group, &add, &remove),
            Request::GroupSet { group, values } => self.set(&group, &values),
            Request::GroupDelete { group } => self.delete(&group),
            _ => Err("this is no question for a coordinator".to_owned()),
        };
        let _ = reply.send(answer);
        self.publish();
    }

    fn ask_mark(&mut self, group: &str, app: bool, label: Option<String>, reply: Reply) {
        let refused = match self.groups.get(group).map(|g| g.name.clone()) {
            Err(error) => error,
            Ok(_) if label.as_ref().is_some_and(|l| !may_be_given(l)) => LABEL_RULE.to_owned(),
            Ok(name) => match self.schedules.get_mut(&name) {
                Some(schedule) if schedule.asks.len() < ASKS_MAX => return schedule.asks.push_back((app, label, reply)),
                _ => format!("{ASKS_MAX} points of the group are waited for already"),
            },
        };
        let _ = reply.send(Err(refused));
    }

    fn create(&mut self, name: &str, machines: &[String], values: &GroupValues) -> Result<Value, String> {
        let (name, machines) = (parse(name)?, parse_all(machines)?);
        let group =
            self.groups.create(&name, &machines, policy(&GroupPolicy::default(), values), clock::wall_ms(), &|m| self.target_of(m))?;
        self.store(group)
    }

    fn change(&mut self, group: &str, add: &[String], remove: &[String]) -> Result<Value, String> {
        let known = self.groups.get(group)?.clone();
        let (add, remove) = (parse_all(add)?, parse_all(remove)?);
        let changed = self.groups.change(&known, &add, &remove, clock::wall_ms(), &|m| self.target_of(m))?;
        let value = self.store(changed)?;
        remove.iter().for_each(|machine| self.assign(machine));
        Ok(value)
    }

    fn set(&mut self, group: &str, values: &GroupValues) -> Result<Value, String> {
        let known = self.groups.get(group)?.clone();
        let changed = Group { policy: policy(&known.policy, values), ..known };
        changed.policy.check()?;
        self.store(changed)
    }

    /// Durable first, then obeyed. A round under way belongs to the members of before: it ends.
    fn store(&mut self, group: Group) -> Result<Value, String> {
        let told = |e: CatalogueError| e.to_string();
        self.catalogue.write(|batch| batch.put(GROUPS, group.name.as_str().as_bytes(), &group)).map_err(told)?;
        tracing::info!(group = %group.name, epoch = group.epoch, members = group.members.len(), "the group was changed");
        self.feed(&group.name.clone(), RoundEvent::Abort);
        self.groups.put(group.clone());
        self.schedule(&group);
        group.members.iter().for_each(|machine| self.assign(machine));
        let view = self.views().into_iter().find(|v| v.name == group.name.as_str());
        serde_json::to_value(view).map_err(|e| e.to_string())
    }

    fn delete(&mut self, group: &str) -> Result<Value, String> {
        let known = self.groups.get(group)?.clone();
        let told = |e: CatalogueError| e.to_string();
        self.catalogue.write(|batch| batch.remove(GROUPS, known.name.as_str().as_bytes())).map_err(told)?;
        tracing::info!(group = %known.name, "the group was deleted");
        self.feed(&known.name, RoundEvent::Abort);
        self.groups.remove(&known.name);
        if let Some(schedule) = self.schedules.remove(&known.name) {
            for (_, _, reply) in schedule.asks {
                let _ = reply.send(Err("the group was deleted".to_owned()));
            }
        }
        known.members.iter().for_each(|machine| self.assign(machine));
        Ok(Value::Null)
    }
}

fn parse(name: &str) -> Result<Name, String> {
    name.parse().map_err(|e: crate::model::NameError| e.to_string())
}

fn parse_all(names: &[String]) -> Result<Vec<Name>, String> {
    names.iter().map(|name| parse(name)).collect()
}

fn policy(known: &GroupPolicy, values: &GroupValues) -> GroupPolicy {
    let time = Duration::from_secs_f64;
    let bounded = |seconds: f64| time(seconds.clamp(0.0, 1e9));
    GroupPolicy {
        interval: values.interval_seconds.map_or(known.interval, bounded),
        app_interval: match values.app_interval_seconds {
            None => known.app_interval,
            Some(0.0) => None,
            Some(seconds) => Some(bounded(seconds)),
        },
        partial: values.partial.unwrap_or(known.partial),
        app_or_nothing: values.app_or_nothing.unwrap_or(known.app_or_nothing),
    }
}
