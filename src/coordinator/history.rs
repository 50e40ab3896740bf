//! What became of a group's rounds, and how that looks to a person.

use std::collections::BTreeMap;
use std::time::Duration;

use super::groups::Group;
use super::hub::Hub;
use super::rounds::{Cause, Outcome};
use crate::clock::{self, Mono};
use crate::control::api::{GroupLast, GroupMemberView, GroupView, RoleStatus};
use crate::model::{Health, Name, PointId, PointKind};
use crate::observe::metrics;

/// Different causes that are counted by name; the rest is counted together.
const CAUSES_MAX: usize = 32;
/// Intervals without a point after which a group is not protected as one.
const LATE_AFTER: u32 = 5;

/// A point that was made.
pub(super) struct Point {
    pub(super) id: PointId,
    pub(super) wall_ms: i64,
    pub(super) at: Mono,
    pub(super) kind: PointKind,
    pub(super) members: usize,
    pub(super) missing: Vec<Name>,
    pub(super) held: Duration,
    pub(super) remark: Option<String>,
}

/// Of one group, since the coordinator started.
#[derive(Default)]
pub(super) struct History {
    full: u64,
    partial: u64,
    skipped: u64,
    unconfirmed: u64,
    causes: BTreeMap<String, u64>,
    last: Option<Point>,
    /// Why the last application-consistent point was not one, until there is one.
    unrest: Option<String>,
    apps_lost: u64,
    /// What kept the last round from being a full one, and when.
    trouble: Option<(i64, String)>,
    /// The trouble of the last round, which is over when one was full.
    is_troubled: bool,
}

impl History {
    /// A round has ended.
    pub(super) fn note(&mut self, group: &Name, outcome: Outcome, point: Option<Point>, missing: &[(Name, Cause)], unrest: &[String]) {
        let partial = point.as_ref().is_some_and(|p| !p.missing.is_empty());
        let (count, word) = match outcome {
            Outcome::Made(_) if partial => (&mut self.partial, "partial"),
            Outcome::Made(_) => (&mut self.full, "full"),
            Outcome::Skipped => (&mut self.skipped, "skipped"),
            Outcome::Unconfirmed => (&mut self.unconfirmed, "unconfirmed"),
        };
        *count += 1;
        metrics::group_round(group.as_str(), word);
        for (name, cause) in missing {
            metrics::count_reason(metrics::GROUP_MISSING, cause.word());
            let text = format!("{name}: {cause}");
            let text = if self.causes.len() < CAUSES_MAX || self.causes.contains_key(&text) { text } else { "others".to_owned() };
            *self.causes.entry(text).or_default() += 1;
        }
        let told: Vec<_> = missing.iter().map(|(name, cause)| format!("{name}: {cause}")).chain(unrest.iter().cloned()).collect();
        match &point {
            Some(p) if p.kind == PointKind::App => self.unrest = None,
            _ if !unrest.is_empty() => {
                self.apps_lost += 1;
                self.unrest = Some(unrest.join("; "));
            }
            _ => {}
        }
        if word == "full" {
            self.is_troubled = false;
        } else {
            let text = if told.is_empty() { "the group was changed".to_owned() } else { told.join("; ") };
            let is_new = self.trouble.as_ref().is_none_or(|(_, known)| *known != text);
            // Once for each stretch of the same trouble; every round is counted.
            if !self.is_troubled || is_new {
                tracing::warn!(%group, result = word, missing = text, "the group's point is not a full one");
            }
            self.trouble = Some((clock::wall_ms(), text));
            self.is_troubled = true;
        }
        if let Some(point) = point {
            self.last = Some(point);
        }
    }

    fn last_view(&self) -> Option<GroupLast> {
        self.last.as_ref().map(|p| GroupLast {
            point: p.id.to_string(),
            time: clock::rfc3339(p.wall_ms),
            age_seconds: clock::now().since(p.at).as_secs_f64(),
            kind: p.kind.as_str().to_owned(),
            members: p.members,
            missing: p.missing.iter().map(Name::to_string).collect(),
            hold_seconds: p.held.as_secs_f64(),
            remark: p.remark.clone(),
        })
    }
}

impl Hub {
    /// What `status` says.
    pub(super) fn status(&self) -> RoleStatus {
        let groups = self.views();
        let worst = groups.iter().max_by_key(|g| g.health);
        let (health, reason, remedy) = match worst.filter(|g| g.health > Health::Healthy) {
            Some(g) => (g.health, g.reason.as_ref().map(|r| format!("group {}: {r}", g.name)), g.remedy.clone()),
            None => (Health::Healthy, None, None),
        };
        for group in &groups {
            let ready = group.members.iter().filter(|m| m.trouble.is_none()).count();
            metrics::group_members(&group.name, ready, group.members.len());
        }
        RoleStatus {
            role: "coordinator".to_owned(),
            name: self.name.to_string(),
            health,
            reason,
            remedy,
            coordinated: groups,
            connected: None,
            ..RoleStatus::default()
        }
    }

    /// Every group as it stands.
    pub(super) fn views(&self) -> Vec<GroupView> {
        self.groups.all().map(|group| self.view_of(group)).collect()
    }

    fn view_of(&self, group: &Group) -> GroupView {
        let home = self.home(group);
        let member = |name: &Name| GroupMemberView {
            machine: name.to_string(),
            connected: self.members.contains_key(name),
            master_target: self.members.get(name).and_then(|m| m.state.as_ref()).and_then(|(t, _)| t.as_ref().map(Name::to_string)),
            trouble: self.absence(name, home.as_ref()),
        };
        let members: Vec<GroupMemberView> = group.members.iter().map(member).collect();
        let empty = History::default();
        let history = self.schedules.get(&group.name).map_or(&empty, |s| &s.history);
        let last = history.last_view();
        let missing: Vec<_> = members.iter().filter_map(|m| m.trouble.as_ref().map(|t| format!("{}: {t}", m.machine))).collect();
        let late = last.as_ref().is_none_or(|l| l.age_seconds > (group.policy.interval * LATE_AFTER).as_secs_f64().max(60.0));
        let health = match (missing.is_empty(), late) {
            (true, _) if !history.is_troubled && history.unrest.is_none() => Health::Healthy,
            (true, _) if !history.is_troubled => Health::Warning,
            (_, true) => Health::Critical,
            _ => Health::Warning,
        };
        let reason = match (&history.trouble, missing.is_empty()) {
            _ if health == Health::Healthy => None,
            (_, true) if !history.is_troubled => {
                history.unrest.as_ref().map(|why| format!("the last application-consistent point could not be made: {why}"))
            }
            (_, false) => Some(missing.join("; ")),
            (Some((at, text)), true) => Some(format!("the last round was not a full one ({}): {text}", clock::rfc3339(*at))),
            (None, true) => None,
        };
        let remedy =
            reason.as_ref().map(|_| "correct what the reason names; a machine that is gone for good: `tidegate group remove`".to_owned());
        GroupView {
            name: group.name.to_string(),
            epoch: group.epoch,
            health,
            reason,
            remedy,
            members,
            master_target: home.map(|h| h.to_string()),
            interval_seconds: group.policy.interval.as_secs_f64(),
            app_interval_seconds: group.policy.app_interval.map(|t| t.as_secs_f64()),
            partial: group.policy.partial,
            app_or_nothing: group.policy.app_or_nothing,
            full: history.full,
            partial_points: history.partial,
            skipped: history.skipped,
            unconfirmed: history.unconfirmed,
            app_points_lost: history.apps_lost,
            causes: history.causes.clone(),
            last,
        }
    }
}
