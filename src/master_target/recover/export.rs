//! A point as an image: written in a hidden folder beside its name, synced, then linked; a partial image is never found under
//! the name. What was written stays when the export fails, and the same export goes on from there; see [`super::staging`].

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use futures_util::StreamExt;

use super::staging::{self, Staging};
use super::{ApplyCommand, OpenPoint};
use crate::disk::{Disk, Format, Image};
use crate::model::Extent;
use crate::storage::uring::{Uring, UringFile, sync_dir};

/// Bytes read and written at once.
const STEP: u64 = 1 << 20;
/// Steps under way.
const DEPTH: usize = 8;
/// Bytes written between two notes of how far it got.
const NOTE_EVERY: u64 = 64 << 20;

/// Where an export is, for those who watch.
pub(super) struct Progress {
    /// Bytes of the disk gone through.
    pub(super) done: u64,
    /// Bytes that an earlier attempt had written.
    pub(super) resumed: u64,
}

/// Writes the disk to `path`, by way of the folder `staging`.
///
/// # Errors
/// A sentence; what was written stays in the folder.
pub(super) async fn write(
    point: &OpenPoint,
    format: Format,
    path: &Path,
    staging: &Path,
    progress: impl Fn(Progress),
) -> Result<(), String> {
    let name = path.file_name().ok_or("--output must name a file")?;
    let dir = staging::beside(path);
    if !dir.is_dir() {
        return Err(format!("there is no folder {}: make it first", dir.display()));
    }
    for other in staging::stale(path, staging) {
        tracing::info!(folder = %other.display(), "an earlier export to the same file was not finished; its folder goes when this one is done");
    }
    let own = staging;
    let staging = Staging::take(own.to_owned())?;
    let staged = staging.path(name);
    write_staged(point, format, &staging, name, progress).await?;
    publish(&format.files(&staged), &format.files(path))?;
    sync_dir(dir).map_err(|e| format!("{}: {e}", dir.display()))?;
    staging.remove();
    staging::stale(path, own).iter().for_each(|other| staging::discard(other));
    Ok(())
}

/// Gives finished files their names, all or none. Others may have come meanwhile: a link fails then, a rename would replace them.
fn publish(staged: &[PathBuf], names: &[PathBuf]) -> Result<(), String> {
    for (done, (from, to)) in staged.iter().zip(names).enumerate() {
        if let Err(e) = std::fs::hard_link(from, to) {
            for made in &names[..done] {
                let _ = std::fs::remove_file(made);
            }
            return Err(format!("{}: {e}", to.display()));
        }
    }
    Ok(())
}

/// The image as an earlier attempt left it, and the bytes that are certain in it; or a new one.
async fn open_staged(point: &OpenPoint, format: Format, staging: &Staging, name: &OsStr) -> Result<(Image<UringFile>, u64), String> {
    let path = staging.path(name);
    if let Some(done) = staging.progress(point.size).filter(|_| format != Format::VmdkStream) {
        match Image::open(&Uring::direct(), &path, format).await {
            Ok(image) if image.size() == point.size => return Ok((image, done)),
            Ok(_) => tracing::warn!(path = %path.display(), "the partial image has another size; the export begins anew"),
            Err(error) => tracing::warn!(%error, "the partial image cannot be used; the export begins anew"),
        }
    }
    staging.clear().map_err(|e| format!("{}: {e}", path.display()))?;
    let image = Image::create(&Uring::direct(), &path, format, point.size).await.map_err(|e| e.to_string())?;
    Ok((image, 0))
}

async fn write_staged(
    point: &OpenPoint,
    format: Format,
    staging: &Staging,
    name: &OsStr,
    progress: impl Fn(Progress),
) -> Result<(), String> {
    let (image, resumed) = open_staged(point, format, staging, name).await?;
    progress(Progress { done: resumed, resumed });
    let (mut at, mut noted) = (resumed, 0);
    let mut written = 0;
    while at < point.size {
        let next = point.ask(|done| ApplyCommand::NextData { view: point.view, offset: at, done }).await?;
        let Some(data) = next else { break };
        // No further than to the next note.
        let data = Extent::new(data.offset, data.len.min(NOTE_EVERY));
        let steps = (0..data.len.div_ceil(STEP)).map(|i| {
            let offset = data.offset + i * STEP;
            read(point, &image, Extent::new(offset, STEP.min(data.end() - offset)))
        });
        let mut running = futures_util::stream::iter(steps).buffered(DEPTH);
        while let Some(piece) = running.next().await {
            let (end, late) = piece?;
            if let Some((offset, data)) = late {
                image.write(offset, data).await.map_err(|e| e.to_string())?;
            }
            progress(Progress { done: end, resumed });
        }
        drop(running);
        at = data.end();
        written += data.len;
        if written - noted >= NOTE_EVERY && format != Format::VmdkStream {
            image.barrier().await.map_err(|e| e.to_string())?;
            staging.note(point.size, at).map_err(|e| format!("{}: {e}", staging.path(name).display()))?;
            noted = written;
        }
    }
    image.finish().await.map_err(|e| e.to_string())
}

/// Reads a piece and writes it, or gives it back if the format takes pieces in their order only.
async fn read(point: &OpenPoint, image: &Image<UringFile>, extent: Extent) -> Result<(u64, Option<(u64, Bytes)>), String> {
    let data = point.read(extent).await?;
    if data.iter().all(|&b| b == 0) {
        return Ok((extent.end(), None));
    }
    if let Image::Stream(_) = image {
        return Ok((extent.end(), Some((extent.offset, data))));
    }
    image.write(extent.offset, data).await.map_err(|e| e.to_string())?;
    Ok((extent.end(), None))
}
