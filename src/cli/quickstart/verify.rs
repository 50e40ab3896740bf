//! Brings the marked points back, in each way there is, and compares them with the model, byte by byte.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::Context;
use serde::Serialize;

use super::roles::Roles;
use super::workload::Marked;
use crate::control::api::Request;
use crate::disk::{Disk, Format, Image};
use crate::model::{Address, Extent};
use crate::nbd::client::Client;
use crate::storage::uring::{self, Uring};

/// Bytes compared at once.
const STEP: u64 = 1 << 20;

/// A point brought back.
#[derive(Serialize)]
pub(super) struct Recovered {
    /// Its id.
    pub point: String,
    /// `export` or `mount`.
    pub kind: &'static str,
    /// Format of the file at `path`.
    pub format: &'static str,
    /// The recovered image; what was expected is beside it as `PATH.expected.raw`.
    pub path: PathBuf,
    /// Whether both hold the same bytes.
    pub identical: bool,
}

/// Brings the points back: the first as VHDX, the second as raw, the last as a block device that is read.
pub(super) async fn recover(roles: &Roles, marked: &[Marked], state: &Path) -> anyhow::Result<Vec<Recovered>> {
    let mut recovered = Vec::new();
    for (index, marked) in marked.iter().enumerate() {
        let (kind, format) = [("export", Format::Vhdx), ("export", Format::Raw), ("mount", Format::Raw)][index % 3];
        let path = state.join("recovered").join(format!("point-{}-{kind}.{}", index + 1, format.extension()));
        if kind == "export" {
            let request = Request::Export {
                point: marked.point.clone(),
                disk: None,
                format: format.as_str().to_owned(),
                output: path.display().to_string(),
            };
            roles.recover(request).await?;
        } else {
            read_mounted(roles, &marked.point, state, &path).await?;
        }
        let mut expected = path.clone().into_os_string();
        expected.push(".expected.raw");
        let expected = PathBuf::from(expected);
        std::fs::rename(&marked.expected, &expected)?;
        let (image, model) = (path.clone(), expected.clone());
        let identical = tokio::task::spawn_blocking(move || compare(&image, format, &model)).await??;
        recovered.push(Recovered { point: marked.point.clone(), kind, format: format.as_str(), path, identical });
    }
    Ok(recovered)
}

async fn read_mounted(roles: &Roles, point: &str, state: &Path, path: &Path) -> anyhow::Result<()> {
    let nbd = Address::Unix(state.join("point.sock"));
    let view = roles.recover(Request::Mount { point: point.to_owned(), disk: None, nbd: nbd.clone(), read_only: true }).await?;
    let mut client = Client::connect(&nbd, "").await?;
    let file = File::create(path)?;
    file.set_len(client.size())?;
    let mut at = 0;
    while at < client.size() {
        let extent = Extent::new(at, STEP.min(client.size() - at));
        let data = client.read(extent).await?;
        if data.iter().any(|&b| b != 0) {
            file.write_all_at(&data, at)?;
        }
        at = extent.end();
    }
    drop(client);
    crate::control::client::call::<()>(&roles.control(), &Request::Unmount { name: view.name }).await.context("unmount")
}

/// Compares an image with a raw model through the image reader.
fn compare(image: &Path, format: Format, model: &Path) -> anyhow::Result<bool> {
    let model = File::open(model)?;
    let size = model.metadata()?.len();
    uring::run(async {
        let image = Image::open_read_only(&Uring::direct(), image, format, false).await?;
        if image.size() != size {
            return Ok(false);
        }
        let mut expected = vec![0; STEP as usize];
        let mut at = 0;
        while at < size {
            let extent = Extent::new(at, STEP.min(size - at));
            let found = image.read(extent).await?;
            model.read_exact_at(&mut expected[..extent.len as usize], at)?;
            if found[..] != expected[..extent.len as usize] {
                return Ok(false);
            }
            at = extent.end();
        }
        Ok(true)
    })?
}
