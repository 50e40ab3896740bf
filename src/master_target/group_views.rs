//! Points of groups as the command line and Prometheus see them.

use std::collections::{BTreeSet, HashMap};
use std::time::Duration;

use super::groups::Entry;
use super::points::Book;
use super::shared::TargetShared;
use crate::clock;
use crate::control::groups::{GroupMoment, GroupPartView, GroupPointView, GroupStatus};
use crate::model::{MachineId, Name, RecoveryPoint};
use crate::observe::metrics;

/// Longest remark of a group point, in characters.
const REMARK_MAX: usize = 1000;
/// Groups that have metrics of their own; the first by name.
const METRIC_GROUPS_MAX: usize = 256;

/// Age of something that is labelled by the wall clock.
pub fn age_seconds(wall_ms: i64) -> f64 {
    Duration::from_millis(u64::try_from(clock::wall_ms().saturating_sub(wall_ms)).unwrap_or(0)).as_secs_f64()
}

/// Names of the configured machines.
pub fn machine_names(shared: &TargetShared) -> HashMap<MachineId, String> {
    shared.disks.iter().map(|d| (d.machine, d.machine_name.to_string())).collect()
}

/// Machines of a group in all, as one of its points states.
fn machines(entry: &Entry) -> usize {
    entry.statement.members.len() + entry.statement.missing.len()
}

fn missing(entry: &Entry) -> Vec<String> {
    entry.statement.missing.iter().map(Name::to_string).collect()
}

/// The listed parts of a group point.
pub fn parts<'a>(book: &'a Book, entry: &Entry) -> Vec<&'a RecoveryPoint> {
    entry.parts().filter_map(|(_, id)| book.get(id)).collect()
}

/// A group's point.
pub fn view(book: &Book, entry: &Entry, names: &HashMap<MachineId, String>) -> GroupPointView {
    let name = |id: MachineId| names.get(&id).cloned().unwrap_or_else(|| id.to_string());
    let mut parts = parts(book, entry);
    parts.sort_by_key(|p| name(p.machine));
    let label = parts.first().and_then(|p| p.label.clone()).filter(|label| parts.iter().all(|p| p.label.as_ref() == Some(label)));
    // A round's remark is the same in every part.
    let remarks: std::collections::BTreeSet<&str> = parts.iter().filter_map(|p| p.remark.as_deref()).collect();
    let remarks: Vec<&str> = remarks.into_iter().collect();
    let remark: String = remarks.join("; ").chars().take(REMARK_MAX).collect();
    let seconds = |us| Duration::from_micros(us).as_secs_f64();
    let part = |p: &&RecoveryPoint| GroupPartView {
        machine: name(p.machine),
        point: p.id.to_string(),
        kind: p.kind.as_str().to_owned(),
        time: clock::rfc3339(p.wall_ms),
        hold_seconds: seconds(p.hold_us),
        pinned: p.pinned,
        verified_age_seconds: book.verification(p.id).map(|v| age_seconds(v.wall_ms)),
    };
    GroupPointView {
        id: entry.statement.point.to_string(),
        group: entry.statement.group.to_string(),
        epoch: entry.statement.epoch,
        kind: entry.kind().as_str().to_owned(),
        label,
        remark: Some(remark).filter(|r| !r.is_empty()),
        time: clock::rfc3339(wall_ms(&parts)),
        hold_seconds: seconds(parts.iter().map(|p| p.hold_us).max().unwrap_or(0)),
        pinned: parts.iter().all(|p| p.pinned),
        machines: machines(entry),
        missing: missing(entry),
        parts: parts.iter().map(part).collect(),
    }
}

/// The time of a group point: the earliest that one of its sources' clocks showed, so that nothing later is promised.
fn wall_ms(parts: &[&RecoveryPoint]) -> i64 {
    parts.iter().map(|p| p.wall_ms).min().unwrap_or(0)
}

/// A group's point in short.
pub fn moment(book: &Book, entry: &Entry) -> GroupMoment {
    let wall_ms = wall_ms(&parts(book, entry));
    GroupMoment {
        point: entry.statement.point.to_string(),
        time: clock::rfc3339(wall_ms),
        age_seconds: age_seconds(wall_ms),
        kind: entry.kind().as_str().to_owned(),
        members: entry.statement.members.len(),
        machines: machines(entry),
        missing: missing(entry),
    }
}

/// Listed points of one group or of all, the oldest first.
///
/// # Errors
/// If nothing was ever heard of the group.
pub fn points(shared: &TargetShared, group: Option<&str>) -> Result<Vec<GroupPointView>, String> {
    let names = machine_names(shared);
    let book = shared.book();
    if let Some(group) = group {
        known(&book, group)?;
    }
    let mut entries: Vec<&Entry> = book.groups().all().filter(|e| group.is_none_or(|g| e.statement.group.as_str() == g)).collect();
    entries.sort_by_key(|e| e.order());
    Ok(entries.into_iter().map(|e| view(&book, e, &names)).collect())
}

/// The name of a group that has parts here.
///
/// # Errors
/// A sentence.
pub fn known(book: &Book, group: &str) -> Result<Name, String> {
    book.groups().names().find(|name| name.as_str() == group).cloned().ok_or_else(|| {
        let names: Vec<&str> = book.groups().names().map(Name::as_str).collect();
        match names.is_empty() {
            true => format!("no point of group {group} has arrived here, nor of any other: `tidegate group list` at the coordinator shows the groups, which live on one master target each"),
            false => format!("no point of group {group} has arrived here: there are points of {}", names.join(", ")),
        }
    })
}

/// How every group does that has parts here.
pub fn status(shared: &TargetShared) -> Vec<GroupStatus> {
    let (names, now) = (machine_names(shared), shared.clock());
    let book = shared.book();
    let of = |group: &Name| {
        let (newest, full) = book.groups().newest(group);
        let waiting = book.groups().waiting(group);
        let lacking: BTreeSet<MachineId> = waiting.iter().flat_map(|e| e.lacking()).collect();
        let name = |id: &MachineId| names.get(id).cloned().unwrap_or_else(|| id.to_string());
        let since = waiting.first().and_then(|e| parts(&book, e).iter().map(|p| p.listed_clock).min());
        GroupStatus {
            name: group.to_string(),
            points: book.groups().count(group),
            newest: newest.map(|e| moment(&book, e)),
            newest_full: full.map(|e| moment(&book, e)),
            waiting: waiting.len(),
            waiting_seconds: since.map(|since| Duration::from_secs(now.saturating_sub(since)).as_secs_f64()),
            waiting_for: lacking.iter().map(name).collect(),
            not_here: lacking.iter().filter(|id| !names.contains_key(id)).map(name).collect(),
            conflicting: book.groups().conflicting(group),
            failover: None,
        }
    };
    book.groups().names().map(of).collect()
}

/// Logs what was found about groups, and publishes their figures. `known` are the groups that have figures.
pub fn publish(shared: &TargetShared, known: &mut BTreeSet<String>) {
    let (news, conflicts) = {
        let mut book = shared.book();
        (book.take_group_news(), book.groups().conflicts())
    };
    news.iter().for_each(|news| tracing::error!("{news}"));
    metrics::group_conflicts(conflicts);
    let status = status(shared);
    for group in &status {
        if known.len() < METRIC_GROUPS_MAX || known.contains(&group.name) {
            known.insert(group.name.clone());
            metrics::group_gauge(metrics::GROUP_POINTS, &group.name, metrics::number(group.points as u64));
            metrics::group_gauge(metrics::GROUP_WAITING, &group.name, metrics::number(group.waiting as u64));
            let age = group.newest.as_ref().map_or(f64::NAN, |newest| newest.age_seconds);
            metrics::group_gauge(metrics::GROUP_POINT_AGE, &group.name, age);
        }
    }
    // A group that is no more does not keep the figures it had.
    for gone in known.iter().filter(|name| status.iter().all(|g| g.name != **name)) {
        metrics::group_gauge(metrics::GROUP_POINTS, gone, 0.0);
        metrics::group_gauge(metrics::GROUP_WAITING, gone, 0.0);
        metrics::group_gauge(metrics::GROUP_POINT_AGE, gone, f64::NAN);
    }
}
