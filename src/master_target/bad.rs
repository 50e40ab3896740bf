//! Recovery points that became unusable: taken off the list with the cause, kept apart until a person has seen them.

use std::io;

use serde::{Deserialize, Serialize};

use super::catalogue::Records;
use super::shared::TargetShared;
use crate::clock;
use crate::model::{DiskId, PointId, RecoveryPoint};
use crate::storage::catalogue::CatalogueError;

/// A point that cannot be brought back exactly any more.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BadPoint {
    /// As it was listed.
    pub point: RecoveryPoint,
    /// The disk that is not what it was.
    pub disk: DiskId,
    /// Why, for a person.
    pub cause: String,
    /// When it was noticed, wall clock here, milliseconds since 1970.
    pub wall_ms: i64,
    /// Its content is kept as if it were listed, so that it can be put back: it is another than the source's, and a person may find
    /// that it is the good one.
    pub kept: bool,
}

/// Takes points off the list because of `disk`, durably and at once, so that nobody chooses them. Those that still wait for
/// other disks are given up. The number of those that were listed.
///
/// # Errors
/// Those of the catalogue; nothing was changed then.
pub async fn mark(
    shared: &TargetShared,
    records: &Records,
    disk: DiskId,
    points: &[PointId],
    cause: &str,
    kept: bool,
) -> Result<usize, CatalogueError> {
    let _alone = shared.noting.lock().await;
    let bad: Vec<BadPoint> = {
        let book = shared.book();
        let listed = points.iter().filter_map(|id| book.get(*id));
        listed.map(|point| BadPoint { point: point.clone(), disk, cause: cause.to_owned(), wall_ms: clock::wall_ms(), kept }).collect()
    };
    if points.is_empty() {
        return Ok(0);
    }
    let (catalogue, noted, gone) = (records.clone(), bad.clone(), points.to_vec());
    let done = tokio::task::spawn_blocking(move || catalogue.mark_bad(&noted, &gone)).await;
    done.map_err(|e| records.failed(io::Error::other(e.to_string())))??;
    let count = bad.len();
    let mut book = shared.book();
    let newest = bad.iter().map(|b| (b.point.machine, b.point.order)).max();
    book.mark_bad(bad);
    book.forget_pending(points);
    // How old the newest point is, is known again with the next one.
    let hidden = newest.filter(|(machine, order)| book.of(*machine).iter().all(|p| p.order < *order));
    drop(book);
    shared.disks.iter().filter(|d| hidden.is_some_and(|(machine, _)| d.machine == machine)).for_each(|d| d.condition().newest = None);
    if count > 0 {
        let disk = shared.disk(disk).map_or_else(|| disk.to_string(), |d| d.label.clone());
        tracing::error!(
            disk,
            points = count,
            cause,
            "recovery points became unusable and are not listed any more; those that are listed are good"
        );
    }
    Ok(count)
}
