//! Unusable points as the command line asks for them: shown, cleared, put back.

use super::bad::BadPoint;
use super::control::{Control, check_machine};
use crate::clock;
use crate::control::api::{BadPointView, PointView};
use crate::model::PointId;

impl Control {
    fn bad_of(&self, machine: Option<&str>) -> Result<Vec<BadPoint>, String> {
        let names = self.machine_names();
        check_machine(&names, machine)?;
        let wanted = |b: &&&BadPoint| machine.is_none_or(|m| names.get(&b.point.machine).is_some_and(|n| n == m));
        Ok(self.shared.book().bad().iter().filter(wanted).map(|b| (*b).clone()).collect())
    }

    pub(super) fn bad_points(&self, machine: Option<&str>) -> Result<Vec<BadPointView>, String> {
        let names = self.machine_names();
        let view = |b: BadPoint| BadPointView {
            point: self.view(&b.point, &names),
            disk: self.shared.disk(b.disk).map_or_else(|| b.disk.to_string(), |d| d.name.to_string()),
            noticed: clock::rfc3339(b.wall_ms),
            cause: b.cause,
            kept: b.kept,
        };
        Ok(self.bad_of(machine)?.into_iter().map(view).collect())
    }

    /// The one unusable point that is meant.
    fn find_bad(&self, text: &str, machine: Option<&str>) -> Result<BadPoint, String> {
        let mut found = self.bad_of(machine)?;
        let labelled = |bad: &BadPoint| bad.point.label.as_deref() == Some(text);
        if found.iter().filter(|bad| labelled(bad)).count() == 1 {
            return found.into_iter().find(labelled).ok_or_else(String::new);
        }
        found.retain(|bad| bad.point.id.to_string().starts_with(text));
        match (found.len(), found.pop()) {
            (1, Some(bad)) if text.len() >= 4 => Ok(bad),
            (1, _) => Err(format!("{text:?} is too short to name a point: give at least four characters")),
            (0, _) if self.find_point(text).is_ok() => Err(format!(
                "point {text} is on the list: there is nothing to put back or to clear; when it goes is up to `tidegate policy show`"
            )),
            (0, _) if text.len() < 4 => Err(format!("{text:?} is too short to name a point: give at least four characters")),
            (0, _) => Err(format!("no unusable point begins with {text:?}: see `tidegate point list --bad`")),
            (n, _) => Err(format!("{text} begins the ids of {n} unusable points: give more of it")),
        }
    }

    /// Durable when it returns.
    pub(super) async fn restore_bad(&self, text: &str) -> Result<PointView, String> {
        let _alone = self.shared.noting.lock().await;
        let bad = self.find_bad(text, None)?;
        if !bad.kept {
            return Err(format!("the content of point {} is not kept any more: {}", bad.point.id, bad.cause));
        }
        let (records, point) = (self.records.clone(), bad.point.clone());
        let noted = tokio::task::spawn_blocking(move || records.readmit(&point)).await;
        noted.map_err(|e| e.to_string())?.map_err(|e| e.to_string())?;
        self.shared.book().readmit(bad.point.id);
        tracing::warn!(point = %bad.point.id, cause = bad.cause, "an unusable point is on the list again, because somebody said so");
        Ok(self.view(&bad.point, &self.machine_names()))
    }

    /// Durable when it returns.
    pub(super) async fn forget_bad(&self, point: Option<&str>, machine: Option<&str>, kept: bool) -> Result<usize, String> {
        let _alone = self.shared.noting.lock().await;
        let ids: Vec<PointId> = match point {
            Some(text) => {
                let bad = self.find_bad(text, machine)?;
                if bad.kept && !kept {
                    return Err(format!(
                        "point {} may be the good copy: find out which storage was damaged; then `tidegate point restore` it, or forget it with --kept",
                        bad.point.id
                    ));
                }
                vec![bad.point.id]
            }
            None => self.bad_of(machine)?.into_iter().filter(|b| kept || !b.kept).map(|b| b.point.id).collect(),
        };
        let (records, cleared) = (self.records.clone(), ids.clone());
        let noted = tokio::task::spawn_blocking(move || records.clear_bad(&cleared)).await;
        noted.map_err(|e| e.to_string())?.map_err(|e| e.to_string())?;
        self.shared.book().clear_bad(&ids);
        Ok(ids.len())
    }
}
