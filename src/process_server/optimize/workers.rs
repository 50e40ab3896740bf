//! Threads that fold, compress and seal batches and hand them to the cache.

use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;

use crossbeam::channel::{Receiver, Sender, bounded};

use super::batcher::RawBatch;
use super::fold::{Folded, fold};
use crate::clock::{self, micros};
use crate::config::limits::BATCHES_IN_PIPELINE_MAX;
use crate::crypto::seal::{Packer, SealingSession};
use crate::model::{DiskId, Trailer};
use crate::observe::metrics;
use crate::process_server::cache::{CacheHandle, Tag};
use crate::storage::log::service::Append;
use crate::wire::batch::BatchHeader;

/// A batch to seal.
pub struct Job {
    /// The closed batch.
    pub batch: RawBatch,
    /// Whose.
    pub disk: DiskId,
    /// Metric label.
    pub label: Arc<str>,
    /// The history it belongs to.
    pub generation: u64,
    /// The disk's sealing session.
    pub session: Arc<SealingSession>,
    /// Comes back when it is cached.
    pub tag: Tag,
}

/// The way to the workers. Never blocks: there is room for every batch that may be in the pipeline.
pub fn start(count: usize, cache: &CacheHandle) -> io::Result<(Sender<Job>, Vec<JoinHandle<()>>)> {
    let (jobs, queue) = bounded(BATCHES_IN_PIPELINE_MAX);
    let threads = (0..count)
        .map(|index| {
            let (queue, cache) = (queue.clone(), cache.clone());
            std::thread::Builder::new().name(format!("seal-{index}")).spawn(move || work(&queue, &cache))
        })
        .collect::<io::Result<_>>()?;
    Ok((jobs, threads))
}

fn work(queue: &Receiver<Job>, cache: &CacheHandle) {
    let (mut folded, mut packer) = (Folded::default(), Packer::default());
    while let Ok(job) = queue.recv() {
        fold(&job.batch, &mut folded);
        let mut header = BatchHeader {
            epoch: job.batch.epoch,
            first: job.batch.first,
            last: job.batch.last,
            data_len: folded.data_len as u32,
            extents: folded.extents as u32,
            marker_len: folded.marker_len as u32,
            digest: matches!(job.batch.trailer, Some(Trailer::Digest(_))),
            age_us: micros(clock::now().since(job.batch.captured)),
            accepted_wall_ms: clock::wall_ms(),
            ..BatchHeader::new(job.disk, job.generation)
        };
        // The content goes back to its pool before the thread may wait for the cache.
        drop(job.batch);
        let record = job.session.seal(&mut header, &folded.body, &mut packer);
        metrics::disk_count(metrics::FOLDED_BYTES, &job.label, folded.data_len as u64);
        metrics::disk_count(metrics::SEALED_BYTES, &job.label, u64::from(header.stored_len));
        if cache.append_blocking(Append { record, tag: job.tag }).is_err() {
            return;
        }
    }
}
