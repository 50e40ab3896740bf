//! Writes to the protected disk and keeps, beside it, what the disk must hold: the second observer.
//!
//! The model is an ordinary file that this code writes itself. At a marker the workload pauses, and a copy of the model
//! is what the point must equal.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;

use super::roles::Roles;
use super::sample::Content;
use crate::clock;
use crate::model::Extent;
use crate::nbd::client::Client;

/// Connections that write.
const WRITERS: usize = 4;
/// Time between samples of the RPO.
const SAMPLE_EVERY: Duration = Duration::from_millis(50);

/// A point that was marked while the model was known.
pub(super) struct Marked {
    /// Its id.
    pub point: String,
    /// What the disk held.
    pub expected: PathBuf,
}

/// What was done.
pub(super) struct Done {
    /// Writes answered.
    pub writes: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Time spent writing.
    pub seconds: f64,
    /// Samples of the RPO, seconds.
    pub rpo: Vec<f64>,
    /// Points whose content is known.
    pub marked: Vec<Marked>,
}

/// The workload and its model.
pub(super) struct Workload {
    model: PathBuf,
    area: Extent,
    round: u64,
}

#[derive(Default)]
struct Sum {
    writes: u64,
    bytes: u64,
}

impl Workload {
    /// Takes a copy of the disk as the model's beginning. Nothing may write to the disk meanwhile.
    pub(super) fn new(state: &Path, disk: &Path, area: Extent, size: u64) -> anyhow::Result<Self> {
        let model = state.join("model.raw");
        copy_sparse(disk, &model)?;
        debug_assert_eq!(std::fs::metadata(&model)?.len(), size, "the model is as long as the disk");
        Ok(Self { model, area, round: 0 })
    }

    /// Writes for `time` in three parts, marking a point after each.
    pub(super) async fn run(&mut self, roles: &Roles, time: Duration, state: &Path) -> anyhow::Result<Done> {
        let mut done = Done { writes: 0, bytes: 0, seconds: 0.0, rpo: Vec::new(), marked: Vec::new() };
        for part in 1..=3 {
            let started = clock::now();
            let sum = self.write_for(roles, time / 3, &mut done.rpo).await?;
            done.seconds += clock::now().since(started).as_secs_f64();
            done.writes += sum.writes;
            done.bytes += sum.bytes;
            let point = roles.mark(&format!("quickstart-{part}")).await?;
            let expected = state.join("recovered").join(format!("model-{part}.raw"));
            copy_sparse(&self.model, &expected)?;
            done.marked.push(Marked { point, expected });
        }
        Ok(done)
    }

    async fn write_for(&mut self, roles: &Roles, time: Duration, rpo: &mut Vec<f64>) -> anyhow::Result<Sum> {
        let model = File::options().write(true).open(&self.model)?;
        let until = clock::now();
        let mut tasks = tokio::task::JoinSet::new();
        for writer in 0..WRITERS {
            self.round += 1;
            let share = self.area.len / WRITERS as u64 / 4096 * 4096;
            // Each connection has its own part of the area: NBD gives overlapping writes no order.
            let area = Extent::new(self.area.offset + writer as u64 * share, share);
            tasks.spawn_local(write(roles.nbd(), model.try_clone()?, area, self.round, until, time));
        }
        let mut sum = Sum::default();
        let mut ticker = tokio::time::interval(SAMPLE_EVERY);
        loop {
            tokio::select! {
                joined = tasks.join_next() => match joined {
                    Some(result) => {
                        let one = result.context("a writer ended early")??;
                        sum.writes += one.writes;
                        sum.bytes += one.bytes;
                    }
                    None => return Ok(sum),
                },
                _ = ticker.tick() => rpo.extend(roles.rpo()),
            }
        }
    }
}

async fn write(
    nbd: crate::model::Address,
    model: File,
    area: Extent,
    seed: u64,
    started: clock::Mono,
    time: Duration,
) -> anyhow::Result<Sum> {
    let mut client = Client::connect(&nbd, "").await?;
    let mut content = Content::new(seed);
    let mut sum = Sum::default();
    while clock::now().since(started) < time {
        let pick = content.random();
        let len = (4096 * (1 + pick % 16)).min(area.len);
        let offset = area.offset + (pick >> 16) % ((area.len - len) / 4096 + 1) * 4096;
        if pick.is_multiple_of(64) {
            client.zero(Extent::new(offset, len)).await?;
            model.write_all_at(&vec![0; len as usize], offset)?;
        } else {
            let data = content.next(len as usize);
            client.write(offset, data, false).await?;
            model.write_all_at(data, offset)?;
        }
        sum.writes += 1;
        sum.bytes += len;
        if sum.writes.is_multiple_of(64) {
            client.flush().await?;
        }
    }
    client.flush().await?;
    Ok(sum)
}

/// Copies a file without filling its holes.
pub(super) fn copy_sparse(from: &Path, to: &Path) -> anyhow::Result<()> {
    let source = File::open(from).with_context(|| from.display().to_string())?;
    let target = File::create(to).with_context(|| to.display().to_string())?;
    let len = source.metadata()?.len();
    target.set_len(len)?;
    let mut buffer = vec![0; 1 << 20];
    let mut at = 0;
    while at < len {
        let step = buffer.len().min((len - at) as usize);
        source.read_exact_at(&mut buffer[..step], at)?;
        if buffer[..step].iter().any(|&b| b != 0) {
            target.write_all_at(&buffer[..step], at)?;
        }
        at += step as u64;
    }
    Ok(())
}
