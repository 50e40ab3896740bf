//! Which point a failover takes. Pure.

use crate::model::{Choice, PointKind, RecoveryPoint};

/// Chooses among a machine's listed points, the oldest first.
///
/// # Errors
/// A sentence that says what there is instead.
pub fn choose<'a>(points: &[&'a RecoveryPoint], choice: &Choice) -> Result<&'a RecoveryPoint, String> {
    let newest = points.last().copied().ok_or_else(|| "the machine has no recovery point yet".to_owned())?;
    match choice {
        Choice::Latest | Choice::LatestProcessed => Ok(newest),
        Choice::LatestApp => points.iter().rev().find(|p| p.kind == PointKind::App).copied().ok_or_else(|| {
            format!("none of the {} points is application-consistent: choose latest, or an id from `tidegate point list`", points.len())
        }),
        Choice::LatestMultiVm => Err("there is no multi-VM point: the machine is in no replication group. Choose latest".to_owned()),
        Choice::Point(id) => {
            let found: Vec<_> = points.iter().filter(|p| Choice::names(id, p.id, p.label.as_deref())).collect();
            match found[..] {
                [only] => Ok(only),
                [] => Err(format!("the machine has no recovery point {id}: see `tidegate point list`")),
                _ => Err(format!("{id} names {} points: give more of the id", found.len())),
            }
        }
    }
}

#[cfg(test)]
mod tests {

    use super::*;

    #[test]
    fn each_choice_takes_its_point_or_says_what_there_is() {
        let point = |n: u128, kind| RecoveryPoint { kind, ..RecoveryPoint::sample(n, n as u64) };
        let all = [point(1, PointKind::Crash), point(2, PointKind::App), point(3 << 120, PointKind::Crash)];
        let points: Vec<_> = all.iter().collect();
        assert_eq!(choose(&points, &Choice::Latest), Ok(&all[2]));
        assert_eq!(choose(&points, &Choice::LatestApp), Ok(&all[1]));
        assert_eq!(choose(&points, &Choice::Point("0300".to_owned())), Ok(&all[2]));
        assert!(choose(&points, &Choice::Point("0000".to_owned())).is_err_and(|e| e.contains("2 points")));
        assert!(choose(&points[..1], &Choice::LatestApp).is_err());
        assert!(choose(&points, &Choice::LatestMultiVm).is_err());
        assert!(choose(&[], &Choice::Latest).is_err());
    }
}
