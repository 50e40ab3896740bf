//! Which point a person means: a machine's or a group's, by id, the beginning of one, or label. Pure.

use std::collections::{HashMap, HashSet};

use super::groups::Entry;
use super::points::Book;
use crate::clock;
use crate::model::{Choice, MachineId, PointId, RecoveryPoint};

/// What a text names.
pub enum Found<'a> {
    /// A point of a machine.
    Machine(&'a RecoveryPoint),
    /// A whole point of a group.
    Group(&'a Entry),
}

/// Finds the point that `text` names: of `machine` only, if one is given; then a group's point stands for the machine's part.
/// A label that a group point has in common with its parts names the group point.
///
/// # Errors
/// A sentence.
pub fn find<'a>(book: &'a Book, text: &str, machine: Option<MachineId>) -> Result<Found<'a>, String> {
    if text == "latest" {
        return latest(book, machine).map(Found::Machine);
    }
    let named = |id: PointId, label: Option<&str>| Choice::names(text, id, label);
    let points: Vec<&RecoveryPoint> = book.listed().filter(|p| named(p.id, p.label.as_deref())).collect();
    let has_label = |e: &&Entry| e.parts().all(|(_, id)| book.get(id).is_some_and(|p| p.label.as_deref() == Some(text)));
    let groups: Vec<&Entry> = book.groups().all().filter(|e| named(e.statement.point, None) || has_label(e)).collect();
    if let Some(machine) = machine {
        let of_groups = groups.iter().filter_map(|e| book.get(e.part_of(machine)?));
        let mut all: Vec<&RecoveryPoint> = points.into_iter().filter(|p| p.machine == machine).chain(of_groups).collect();
        all.sort_by_key(|p| p.id);
        all.dedup_by_key(|p| p.id);
        return match all[..] {
            [only] => Ok(Found::Machine(only)),
            [] => Err(missing(book, text)),
            _ => Err(several(text, all.into_iter().map(|p| (p.id, p.wall_ms)))),
        };
    }
    let parts: HashSet<PointId> = groups.iter().flat_map(|e| e.parts()).map(|(_, id)| id).collect();
    match (&groups[..], &points[..]) {
        ([], [only]) => Ok(Found::Machine(only)),
        ([], []) => Err(missing(book, text)),
        ([only], points) if points.iter().all(|p| parts.contains(&p.id)) => Ok(Found::Group(only)),
        _ => {
            let of_group = |e: &Entry| Some((e.statement.point, e.parts().find_map(|(_, id)| book.get(id))?.wall_ms));
            let own = points.iter().filter(|p| !parts.contains(&p.id)).map(|p| (p.id, p.wall_ms));
            Err(several(text, groups.iter().filter_map(|e| of_group(e)).chain(own)))
        }
    }
}

/// The same where only a point of a machine will do.
///
/// # Errors
/// A sentence; for a group's point it says which machines there are.
pub fn find_machine_point<'a>(book: &'a Book, text: &str, names: &HashMap<MachineId, String>) -> Result<&'a RecoveryPoint, String> {
    match find(book, text, None)? {
        Found::Machine(point) => Ok(point),
        Found::Group(entry) => {
            let mut machines: Vec<&str> = entry.parts().filter_map(|(m, _)| names.get(&m)).map(String::as_str).collect();
            machines.sort_unstable();
            Err(format!(
                "{text} is a point of group {}: say of which machine with --machine ({})",
                entry.statement.group,
                machines.join(", ")
            ))
        }
    }
}

/// Points that are named where a text names several.
const NAMED_MAX: usize = 5;

fn latest(book: &Book, machine: Option<MachineId>) -> Result<&RecoveryPoint, String> {
    let newest = book.listed().filter(|p| machine.is_none_or(|m| m == p.machine)).max_by_key(|p| p.order);
    let newest = newest.ok_or_else(|| "there is no recovery point yet".to_owned())?;
    if machine.is_none() && book.listed().any(|p| p.machine != newest.machine) {
        return Err("several machines have points: give the id of one, see `tidegate point list --machine M`".to_owned());
    }
    Ok(newest)
}

/// What is said of a text that names several points, each an id and a time: which, the newest last.
pub fn several(text: &str, points: impl Iterator<Item = (PointId, i64)>) -> String {
    let mut points: Vec<(i64, PointId)> = points.map(|(id, at)| (at, id)).collect();
    points.sort_unstable();
    let named: Vec<String> = points.iter().rev().take(NAMED_MAX).rev().map(|(at, id)| format!("{id} of {}", clock::rfc3339(*at))).collect();
    let newest = if points.len() > NAMED_MAX { ", the newest of them" } else { "" };
    format!("{text} names {} points, give the id of one{newest}: {}", points.len(), named.join(", "))
}

fn missing(book: &Book, text: &str) -> String {
    let begins = |id: PointId| text.len() >= 4 && id.to_string().starts_with(text);
    if let Some(bad) = book.bad().iter().find(|b| begins(b.point.id) || b.point.label.as_deref() == Some(text)) {
        let kept = if bad.kept { ", or put it back with `tidegate point restore` if it is the good copy" } else { "" };
        return format!("recovery point {} became unusable: {}; choose another one{kept}", bad.point.id, bad.cause);
    }
    if let Some(entry) = book.groups().unfinished_points().find(|e| begins(e.statement.point)) {
        let why =
            if entry.is_conflicting() { "its machines contradict each other about it" } else { "not every machine has its part here" };
        return format!(
            "point {} of group {} is not listed: {why}; the parts that are here are points of their machines",
            entry.statement.point, entry.statement.group
        );
    }
    format!("there is no recovery point {text}: give `latest`, a label, or at least four characters of an id from `tidegate point list`")
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::model::GroupPart;

    #[test]
    fn a_label_means_the_group_where_a_group_is_meant_and_the_part_where_a_machine_is() {
        let machines = ["web01", "web02"].map(|n| MachineId::from_name(&n.parse().unwrap()));
        let mut members = machines.to_vec();
        members.sort_unstable();
        let part = |point: u128, of: usize, order| {
            let group = GroupPart {
                point: PointId(Uuid::from_u128(point)),
                group: "shop".parse().unwrap(),
                epoch: 1,
                sequence: point as u64,
                members: members.clone(),
                missing: vec![],
            };
            RecoveryPoint {
                id: PointId::part(group.point, machines[of]),
                machine: machines[of],
                label: Some("month-end".to_owned()),
                group: Some(group),
                ..RecoveryPoint::sample(0, order)
            }
        };
        let first = 0xabcd << 112;
        let mut points = vec![part(first, 0, 1), part(first, 1, 2)];
        let names: HashMap<MachineId, String> = machines.iter().zip(["web01", "web02"]).map(|(m, n)| (*m, n.to_owned())).collect();
        let book = |points: &[RecoveryPoint]| Book::load(points.to_vec(), vec![], vec![], vec![]);
        let all = book(&points);
        assert!(matches!(find(&all, "month-end", None), Ok(Found::Group(e)) if e.statement.point.0.as_u128() == first));
        assert!(matches!(find(&all, "abcd", None), Ok(Found::Group(_))));
        assert!(matches!(find(&all, "abcd", Some(machines[1])), Ok(Found::Machine(p)) if p.machine == machines[1]));
        assert!(matches!(find(&all, "month-end", Some(machines[0])), Ok(Found::Machine(p)) if p.machine == machines[0]));
        assert!(find_machine_point(&all, "month-end", &names).is_err_and(|e| e.contains("--machine (web01, web02)")));
        let id = points[1].id.to_string();
        assert!(matches!(find(&all, &id[..13], None), Ok(Found::Machine(p)) if p.id == points[1].id));
        // A machine's own point of the same label is meant as well.
        points.push(RecoveryPoint { machine: machines[0], label: Some("month-end".to_owned()), ..RecoveryPoint::sample(9, 3) });
        let (group, own) = (PointId(Uuid::from_u128(first)), points[2].id);
        let said = find(&book(&points), "month-end", None).err().unwrap();
        assert!(said.contains("names 2 points") && [group, own].iter().all(|id| said.contains(&id.to_string())), "{said}");
        // Of a group point that lost a part nothing is left but the other.
        let half = book(&points[..1]);
        assert!(matches!(find(&half, "month-end", None), Ok(Found::Machine(_))));
        assert!(find(&half, "abcd", None).is_err_and(|e| e.contains("not every machine has its part")));
    }
}
