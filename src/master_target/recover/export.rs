//! A point as an image file: written beside its name, synced, then renamed; a partial image is never found under it.

use std::path::Path;

use futures_util::StreamExt;

use super::{ApplyCommand, OpenPoint};
use crate::disk::{Format, Image};
use crate::model::Extent;
use crate::storage::uring::{Uring, sync_dir};

/// Bytes read and written at once.
const STEP: u64 = 1 << 20;
/// Steps under way.
const DEPTH: usize = 8;

/// Writes the disk to `path`.
///
/// # Errors
/// A sentence; the partial file is removed.
pub(super) async fn write(point: &OpenPoint, format: Format, path: &Path, progress: impl Fn(u64)) -> Result<(), String> {
    let mut name = path.file_name().ok_or("--output must name a file")?.to_owned();
    name.push(".partial");
    let partial = path.with_file_name(name);
    let _ = std::fs::remove_file(&partial);
    let written = write_partial(point, format, &partial, progress).await;
    let finished = written.and_then(|()| {
        // Another file may have come meanwhile; link fails then, rename would replace it.
        std::fs::hard_link(&partial, path).map_err(|e| format!("{}: {e}", path.display()))
    });
    let _ = std::fs::remove_file(&partial);
    finished?;
    let dir = path.parent().filter(|d| !d.as_os_str().is_empty()).unwrap_or(Path::new("."));
    sync_dir(dir).map_err(|e| format!("{}: {e}", dir.display()))
}

async fn write_partial(point: &OpenPoint, format: Format, partial: &Path, progress: impl Fn(u64)) -> Result<(), String> {
    let image = Image::create(&Uring::direct(), partial, format, point.size).await.map_err(|e| e.to_string())?;
    let mut at = 0;
    while at < point.size {
        let next = point.ask(|done| ApplyCommand::NextData { view: point.view, offset: at, done }).await?;
        let Some(data) = next else { break };
        let steps = (0..data.len.div_ceil(STEP)).map(|i| {
            let offset = data.offset + i * STEP;
            copy(point, &image, Extent::new(offset, STEP.min(data.end() - offset)))
        });
        let mut running = futures_util::stream::iter(steps).buffered(DEPTH);
        while let Some(end) = running.next().await {
            progress(end?);
        }
        drop(running);
        at = data.end();
    }
    image.finish().await.map_err(|e| e.to_string())
}

async fn copy(point: &OpenPoint, image: &Image<crate::storage::uring::UringFile>, extent: Extent) -> Result<u64, String> {
    let data = point.ask(|done| ApplyCommand::Read { view: point.view, extent, done }).await?;
    if data.iter().any(|&b| b != 0) {
        image.write(extent.offset, data).await.map_err(|e| e.to_string())?;
    }
    Ok(extent.end())
}
