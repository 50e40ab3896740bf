//! Which point a failover takes. Pure.

use crate::master_target::groups::Entry;
use crate::master_target::lookup::several;
use crate::master_target::points::Book;
use crate::model::{Choice, MachineId, Name, PointKind, RecoveryPoint};

/// Chooses among a machine's listed points.
///
/// # Errors
/// A sentence that says what there is instead.
pub fn choose<'a>(book: &'a Book, machine: MachineId, choice: &Choice) -> Result<&'a RecoveryPoint, String> {
    let points = book.of(machine);
    let newest = points.last().copied().ok_or_else(|| "the machine has no recovery point yet".to_owned())?;
    match choice {
        Choice::Latest | Choice::LatestProcessed => Ok(newest),
        Choice::LatestApp => points.iter().rev().find(|p| p.kind == PointKind::App).copied().ok_or_else(|| {
            format!("none of the {} points is application-consistent: choose latest, or an id from `tidegate point list`", points.len())
        }),
        Choice::LatestMultiVm => {
            let of_group = |p: &&&RecoveryPoint| book.groups().whole_of(p).is_some();
            let is_full = |p: &&&RecoveryPoint| book.groups().whole_of(p).is_some_and(|e| e.statement.is_full());
            let found = points.iter().rev().find(is_full).or_else(|| points.iter().rev().find(of_group));
            found.copied().ok_or_else(|| {
                "there is no multi-VM point of the machine: it is in no replication group, or none of its points has arrived from every machine. Choose latest".to_owned()
            })
        }
        Choice::Point(id) => {
            // A group's point stands for the machine's part of it.
            let names = |p: &&&RecoveryPoint| {
                Choice::names(id, p.id, p.label.as_deref()) || p.group.as_ref().is_some_and(|g| Choice::names(id, g.point, None))
            };
            let found: Vec<_> = points.iter().filter(names).collect();
            match found[..] {
                [only] => Ok(only),
                [] => Err(format!("the machine has no recovery point {id}: see `tidegate point list`")),
                _ => Err(several(id, found.into_iter().map(|p| (p.id, p.wall_ms)))),
            }
        }
    }
}

/// Chooses among the whole points of a group; only among those that have exactly `machines`, if they are given.
///
/// # Errors
/// A sentence that says what there is instead.
pub fn choose_group<'a>(book: &'a Book, group: &Name, choice: &Choice, machines: Option<&[MachineId]>) -> Result<&'a Entry, String> {
    let fits = |e: &&Entry| machines.is_none_or(|machines| machines == e.statement.members);
    let points: Vec<&Entry> = book.groups().of(group).rev().filter(fits).collect();
    let newest = |found: Option<&'a Entry>| {
        found.ok_or_else(|| {
            let waiting = book.groups().waiting(group).len();
            let waiting = if waiting > 0 { format!("; {waiting} wait for parts, see `tidegate status`") } else { String::new() };
            format!("group {group} has no point that has arrived from every machine{waiting}. Each machine can be failed over by itself")
        })
    };
    match choice {
        // A point without some machines leaves them behind: only if there is no other.
        Choice::Latest | Choice::LatestProcessed | Choice::LatestMultiVm => {
            newest(points.iter().find(|e| e.statement.is_full()).or(points.first()).copied())
        }
        Choice::LatestApp => {
            let all = points.len();
            let app = || points.iter().filter(|e| e.kind() == PointKind::App);
            app().find(|e| e.statement.is_full()).or_else(|| app().next()).copied().ok_or_else(|| {
                format!("none of the {all} points of group {group} is application-consistent: choose latest, or an id from `tidegate point list --group {group}`")
            })
        }
        Choice::Point(text) => {
            let label = |e: &Entry| e.parts().all(|(_, id)| book.get(id).is_some_and(|p| p.label.as_ref() == Some(text)));
            let found: Vec<&Entry> = points.into_iter().filter(|e| Choice::names(text, e.statement.point, None) || label(e)).collect();
            match found[..] {
                [only] => Ok(only),
                [] => Err(format!(
                    "group {group} has no listed point {text} of exactly these machines: see `tidegate point list --group {group}`; for a point of more or fewer machines cancel and start again"
                )),
                _ => Err(format!("{text} names {} points of group {group}: give more of the id", found.len())),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::model::{GroupPart, PointId};

    fn book(points: &[RecoveryPoint]) -> Book {
        Book::load(points.to_vec(), vec![], vec![], vec![])
    }

    #[test]
    fn each_choice_takes_its_point_or_says_what_there_is() {
        let point = |n: u128, kind| RecoveryPoint { kind, ..RecoveryPoint::sample(n, if n > 9 { 9 } else { n as u64 }) };
        let all = [point(1, PointKind::Crash), point(2, PointKind::App), point(3 << 120, PointKind::Crash)];
        let (points, machine) = (book(&all), all[0].machine);
        assert_eq!(choose(&points, machine, &Choice::Latest), Ok(&all[2]));
        assert_eq!(choose(&points, machine, &Choice::LatestApp), Ok(&all[1]));
        assert_eq!(choose(&points, machine, &Choice::Point("0300".to_owned())), Ok(&all[2]));
        assert!(choose(&points, machine, &Choice::Point("0000".to_owned())).is_err_and(|e| e.contains("2 points")));
        assert!(choose(&book(&all[..1]), machine, &Choice::LatestApp).is_err());
        assert!(choose(&points, machine, &Choice::LatestMultiVm).is_err());
        assert!(choose(&book(&[]), machine, &Choice::Latest).is_err());
    }

    #[test]
    fn a_group_takes_one_point_and_a_machine_its_part_of_the_newest_full_one() {
        let names: Vec<Name> = ["a", "b"].map(|n| n.parse().unwrap()).to_vec();
        let mut machines: Vec<(MachineId, Name)> = names.iter().map(|n| (MachineId::from_name(n), n.clone())).collect();
        machines.sort();
        let part = |n: u128, of: usize, only: bool, kind, order| {
            let members = if only { vec![machines[0].0] } else { machines.iter().map(|m| m.0).collect() };
            let missing = if only { vec![machines[1].1.clone()] } else { vec![] };
            let group = GroupPart {
                point: PointId(Uuid::from_u128(n << 112)),
                group: "shop".parse().unwrap(),
                epoch: 1,
                sequence: n as u64,
                members,
                missing,
            };
            let id = PointId::part(group.point, machines[of].0);
            RecoveryPoint { id, machine: machines[of].0, kind, group: Some(group), ..RecoveryPoint::sample(0, order) }
        };
        let (first, own) = (0x1111, RecoveryPoint { machine: machines[0].0, ..RecoveryPoint::sample(9, 9) });
        let all = [
            part(first, 0, false, PointKind::App, 1),
            part(first, 1, false, PointKind::App, 2),
            part(0x2222, 0, false, PointKind::Crash, 3),
            part(0x2222, 1, false, PointKind::Crash, 4),
            part(0x3333, 0, true, PointKind::Crash, 5),
            own,
        ];
        let (shop, book) = ("shop".parse().unwrap(), book(&all));
        let (a, both) = (machines[0].0, machines.iter().map(|m| m.0).collect::<Vec<_>>());
        let group = |choice: &str, machines| {
            choose_group(&book, &shop, &choice.parse().unwrap(), machines).map(|e| e.statement.point.0.as_u128() >> 112)
        };
        assert_eq!(group("latest", None), Ok(0x2222), "no machine is left behind while there is a point of all");
        assert_eq!(group("latest", Some(&both[..])), Ok(0x2222), "of these machines and no others");
        assert_eq!((group("latest-multi-vm", None), group("latest-app", None), group("2222", None)), (Ok(0x2222), Ok(first), Ok(0x2222)));
        assert!(group("3333", Some(&both[..])).is_err());
        assert!(choose_group(&book, &"web".parse().unwrap(), &Choice::Latest, None).is_err());
        assert_eq!(choose(&book, a, &Choice::LatestMultiVm), Ok(&all[2]), "full before partial");
        assert_eq!(choose(&book, a, &Choice::Point("3333".to_owned())), Ok(&all[4]));
        assert_eq!(choose(&book, a, &Choice::Latest), Ok(&all[5]));
        let partial = super::tests::book(&all[4..]);
        assert_eq!(choose(&partial, a, &Choice::LatestMultiVm), Ok(&all[4]), "a partial one if there is no other");
    }
}
