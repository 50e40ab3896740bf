//! Failovers of groups as the control interface sees them.

use std::collections::BTreeMap;

use super::group::Target;
use super::{Ask, Desk, choose_group};
use crate::clock;
use crate::control::api::JobView;
use crate::control::groups::{GroupAsk, GroupPlanView, Named};
use crate::master_target::group_views::{self, known, machine_names};
use crate::master_target::points::Book;
use crate::master_target::shared::TargetShared;
use crate::model::{Choice, Job, JobKind, MachineId, Name};

/// Which machines a failover of a group takes, and to what.
///
/// # Errors
/// A sentence.
pub(super) fn group_target(shared: &TargetShared, kind: JobKind, group: &Name, choice: &Choice) -> Result<Target, String> {
    let book = shared.book();
    let entry = choose_group(&book, group, choice, None)?;
    let statement = &entry.statement;
    if kind != JobKind::Planned {
        let at_once = kind == JobKind::Test || !matches!(choice, Choice::Latest | Choice::LatestMultiVm);
        let of = |(machine, part): (MachineId, _)| {
            // What arrives until the replicas stand still may make a newer point whole.
            (machine, if at_once { Choice::Point(format!("{part}")) } else { choice.clone() })
        };
        let point = at_once.then_some(statement.point);
        return Ok(Target { machines: entry.parts().map(of).collect(), point, missing: statement.missing.clone() });
    }
    if *choice != Choice::Latest {
        return Err(
            "a planned failover makes a final point of each machine: leave --point out, or use `failover unplanned` for an older one"
                .to_owned(),
        );
    }
    if book.groups().waiting(group).iter().any(|e| e.statement.epoch > statement.epoch) {
        return Err(format!(
            "the machines of group {group} have changed since its newest point: wait until one is listed that has the new ones, see `tidegate status`"
        ));
    }
    let names = machine_names(shared);
    let mut machines: Vec<MachineId> = statement.members.clone();
    for name in &statement.missing {
        machines.push(MachineId::from_name(name));
    }
    machines.sort_unstable();
    if let Some(unknown) = statement.missing.iter().find(|name| !names.contains_key(&MachineId::from_name(name))) {
        return Err(format!(
            "{unknown} of group {group} is not configured at this master target: a group lives on one master target. Fail the machines over one by one"
        ));
    }
    Ok(Target { machines: machines.into_iter().map(|m| (m, Choice::Latest)).collect(), point: None, missing: Vec::new() })
}

/// Machines that had a part of an earlier point of the group and are not in this one: they left it, or this point is not what
/// it says.
fn left(book: &Book, group: &Name, target: &Target, names: &BTreeMap<MachineId, String>) -> Vec<String> {
    let mut last: BTreeMap<MachineId, i64> = BTreeMap::new();
    for entry in book.groups().of(group) {
        last.extend(entry.parts().filter_map(|(machine, id)| Some((machine, book.get(id)?.wall_ms))));
    }
    let missing = |id: &MachineId| target.missing.iter().any(|name| MachineId::from_name(name) == *id);
    last.retain(|id, _| !missing(id) && target.machines.iter().all(|(machine, _)| machine != id));
    let tell = |(id, wall_ms): (MachineId, i64)| {
        let name = names.get(&id).cloned().unwrap_or_else(|| id.to_string());
        format!("{name} was in points of the group until {}, and is not in this one", clock::rfc3339(wall_ms))
    };
    last.into_iter().map(tell).collect()
}

impl Desk {
    /// What a name names.
    pub fn named(&self, name: &str) -> Named {
        let machine = self.shared.disks.iter().any(|d| d.machine_name.as_str() == name);
        let is = |j: &Job| j.group.as_ref().is_some_and(|g| g.name.as_str() == name || g.label() == name);
        let jobs = self.jobs.list().iter().any(|e| is(&e.job));
        Named { machine, group: jobs || known(&self.shared.book(), name).is_ok() }
    }

    /// A new failover of a group.
    ///
    /// # Errors
    /// A sentence.
    pub async fn start_group(
        &self,
        group: &str,
        kind: JobKind,
        choice: &Choice,
        hook: Option<String>,
        by: &str,
    ) -> Result<Vec<JobView>, String> {
        if kind == JobKind::Reprotect {
            return Err("machines are protected again one by one: `tidegate failover reprotect MACHINE`".to_owned());
        }
        let group = known(&self.shared.book(), group)?;
        self.ask(Ask::StartGroup { kind, group, choice: choice.clone(), hook }, by).await
    }

    /// What a failover of a group would take and lose.
    ///
    /// # Errors
    /// A sentence.
    pub async fn plan_group(&self, group: &str, kind: JobKind, choice: &Choice) -> Result<GroupPlanView, String> {
        let (mut plan, machines) = {
            let group = known(&self.shared.book(), group)?;
            let target = super::group_target(&self.shared, kind, &group, choice)?;
            let names: BTreeMap<MachineId, String> = machine_names(&self.shared).into_iter().collect();
            let book = self.shared.book();
            let entry = choose_group(&book, &group, choice, None)?;
            let part = |m: &MachineId| entry.part_of(*m).map(|id| Choice::Point(id.to_string()));
            let machines: Vec<(String, Option<Choice>)> =
                target.machines.iter().map(|(m, _)| (names.get(m).cloned().unwrap_or_else(|| m.to_string()), part(m))).collect();
            let mut notes = left(&book, &group, &target, &names);
            let (newest, full) = book.groups().newest(&group);
            if let (false, Some(full)) = (entry.statement.is_full(), full) {
                let moment = group_views::moment(&book, full);
                notes.push(format!("the newest point of every machine of the group is {} of {}", moment.point, moment.time));
            }
            if let (true, Some(newer)) = (entry.statement.is_full(), newest.filter(|n| n.order() > entry.order() && !n.statement.is_full()))
            {
                let (moment, missing) = (group_views::moment(&book, newer), &newer.statement.missing);
                let missing: Vec<_> = missing.iter().map(Name::as_str).collect();
                notes.push(format!("a newer point without {} is {} of {}", missing.join(", "), moment.point, moment.time));
            }
            let plan = GroupPlanView {
                group: group.to_string(),
                point: (kind != JobKind::Planned).then(|| group_views::moment(&book, entry)),
                plans: Vec::new(),
                machines: machines.iter().map(|(name, _)| name.clone()).collect(),
                missing: target.missing.iter().map(Name::to_string).collect(),
                notes,
            };
            (plan, machines)
        };
        for (machine, part) in machines {
            if let (Some(part), true) = (part, kind != JobKind::Planned) {
                plan.plans.push(self.plan(&machine, &part).await?);
            }
        }
        plan.machines.sort();
        plan.plans.sort_by(|a, b| a.machine.cmp(&b.machine));
        Ok(plan)
    }

    /// What is asked of a group's failover.
    ///
    /// # Errors
    /// A sentence.
    pub async fn group(&self, group: &str, ask: &GroupAsk, by: &str) -> Result<serde_json::Value, String> {
        let value = match ask {
            GroupAsk::Plan { kind, point } => serde_json::to_value(self.plan_group(group, *kind, point).await?),
            GroupAsk::Start { kind, point, hook } => serde_json::to_value(self.start_group(group, *kind, point, hook.clone(), by).await?),
            GroupAsk::Decide(decision) => {
                let ask = Ask::DecideGroup { group: group.to_owned(), decision: decision.clone() };
                serde_json::to_value(self.ask(ask, by).await?)
            }
        };
        value.map_err(|e| e.to_string())
    }

    /// What failovers of a group do now, for `status`.
    pub fn of_group(&self, group: &str) -> Option<String> {
        let all: Vec<Job> = self.jobs.list().into_iter().map(|e| e.job).collect();
        let of = |j: &&Job| j.group.as_ref().is_some_and(|g| g.name.as_str() == group);
        let run = all.iter().filter(of).filter(|j| !j.state.is_over()).filter_map(|j| j.group.as_ref()).max_by_key(|g| g.run)?;
        let mut states: BTreeMap<&str, usize> = BTreeMap::new();
        for job in all.iter().filter(|j| j.group.as_ref().is_some_and(|g| g.run == run.run)) {
            *states.entry(job.state.as_str()).or_default() += 1;
        }
        let states: Vec<String> = states.into_iter().map(|(state, count)| format!("{count} {state}")).collect();
        Some(format!("{} (failover {})", states.join(", "), run.label()))
    }
}
