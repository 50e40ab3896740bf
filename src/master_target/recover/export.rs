//! A point as an image: written in a hidden folder beside its name, synced, then linked; a partial image is never found under
//! the name.

use std::path::{Path, PathBuf};

use bytes::Bytes;
use futures_util::StreamExt;

use super::{ApplyCommand, OpenPoint};
use crate::disk::{Disk, Format, Image};
use crate::model::Extent;
use crate::storage::log::random_u64;
use crate::storage::uring::{Uring, UringFile, sync_dir};

/// Bytes read and written at once.
const STEP: u64 = 1 << 20;
/// Steps under way.
const DEPTH: usize = 8;

/// Writes the disk to `path`.
///
/// # Errors
/// A sentence; the partial file is removed.
pub(super) async fn write(point: &OpenPoint, format: Format, path: &Path, progress: impl Fn(u64)) -> Result<(), String> {
    let name = path.file_name().ok_or("--output must name a file")?;
    let dir = path.parent().filter(|d| !d.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if !dir.is_dir() {
        return Err(format!("there is no folder {}: make it first", dir.display()));
    }
    let mut hidden = std::ffi::OsString::from(".");
    hidden.push(name);
    // Another export to the same name may run beside this one.
    hidden.push(format!(".partial-{:x}", random_u64()));
    // A folder of its own, because files of an image name each other.
    let staging = Staging(dir.join(hidden));
    std::fs::create_dir(&staging.0).map_err(|e| format!("{}: {e}", staging.0.display()))?;
    let staged = staging.0.join(name);
    write_staged(point, format, &staged, progress).await?;
    publish(&format.files(&staged), &format.files(path))?;
    sync_dir(dir).map_err(|e| format!("{}: {e}", dir.display()))
}

/// Removed whatever becomes of the export, also when it is ended half-way.
struct Staging(PathBuf);

impl Drop for Staging {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
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

async fn write_staged(point: &OpenPoint, format: Format, path: &Path, progress: impl Fn(u64)) -> Result<(), String> {
    let image = Image::create(&Uring::direct(), path, format, point.size).await.map_err(|e| e.to_string())?;
    let mut at = 0;
    while at < point.size {
        let next = point.ask(|done| ApplyCommand::NextData { view: point.view, offset: at, done }).await?;
        let Some(data) = next else { break };
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
            progress(end);
        }
        drop(running);
        at = data.end();
    }
    image.finish().await.map_err(|e| e.to_string())
}

/// Reads a piece and writes it, or gives it back if the format takes pieces in their order only.
async fn read(point: &OpenPoint, image: &Image<UringFile>, extent: Extent) -> Result<(u64, Option<(u64, Bytes)>), String> {
    let data = point.ask(|done| ApplyCommand::Read { view: point.view, extent, done }).await?;
    if data.iter().all(|&b| b == 0) {
        return Ok((extent.end(), None));
    }
    if let Image::Stream(_) = image {
        return Ok((extent.end(), Some((extent.offset, data))));
    }
    image.write(extent.offset, data).await.map_err(|e| e.to_string())?;
    Ok((extent.end(), None))
}
