//! Proves that points can be brought back, before somebody needs them.
//!
//! A *verification* recomputes a point: every byte of every disk is read as a mount would read it, so every record of old
//! content that it needs is opened, and a digest is made of it. The first one is kept; a later one that differs found a silent
//! change of the replica or of the history, and the point is taken off the list. The point is in use meanwhile, so it does
//! not expire.
//!
//! A *scrub* goes round the machines without being asked. Recomputing hundreds of points would read each disk hundreds
//! of times, so a round reads every record of old content once, which authenticates it for all points that need it, and
//! recomputes two points only ([`rounds::choose`]). A round so costs the bytes of old content and twice the data of
//! the disks, at `scrub_rate`: for 100 GiB with 50 GiB of history at 32 MiB/s two and a quarter hours in seven days. While
//! batches wait for a replica it takes a step a second. A round goes on over restarts with the interval it was at.

pub mod digest;
pub mod rounds;
mod scrub;

use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt;
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot};

use self::digest::Digester;
pub use self::rounds::ScrubState;
use super::apply::Command as ApplyCommand;
use super::bad;
use super::catalogue::Records;
use super::recover::OpenPoint;
use super::shared::TargetShared;
use crate::clock;
use crate::config::master_target::Retain;
use crate::control::api::{VerifiedDisk, VerifyView};
use crate::model::{DiskId, Extent, PointId, RecoveryPoint};

/// Bytes read at once.
const STEP: u64 = 1 << 20;
/// Steps under way.
const DEPTH: usize = 4;
/// Verifications that may run at once.
const RUNNING_MAX: usize = 4;
/// Finished ones that are remembered.
const FINISHED_KEPT: usize = 32;

/// The last verification of a point.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verification {
    /// When, wall clock here, milliseconds since 1970.
    pub wall_ms: i64,
    /// When, in seconds the master target has run.
    pub clock: u64,
    /// What was found for each disk.
    pub digests: BTreeMap<DiskId, [u8; 32]>,
}

/// A request: verify this point, and tell how it began.
type Wanted = (PointId, oneshot::Sender<Result<VerifyView, String>>);

/// Asks for verifications.
#[derive(Clone)]
pub struct Handle {
    wanted: mpsc::Sender<Wanted>,
    list: Arc<Mutex<Vec<VerifyView>>>,
}

impl Handle {
    /// Begins a verification.
    ///
    /// # Errors
    /// A sentence.
    pub async fn start(&self, point: PointId) -> Result<VerifyView, String> {
        let (done, answer) = oneshot::channel();
        let gone = || "the master target is stopping".to_owned();
        self.wanted.send((point, done)).await.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }

    /// Those that run, and the last that ended.
    pub fn list(&self) -> Vec<VerifyView> {
        self.list.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// What the recover thread verifies with.
pub struct Verifier {
    shared: Arc<TargetShared>,
    records: Records,
    apply: mpsc::Sender<ApplyCommand>,
    list: Arc<Mutex<Vec<VerifyView>>>,
    rate: u64,
    every: Duration,
}

/// A verifier, and how to ask it.
pub fn make(
    settings: &Retain,
    shared: Arc<TargetShared>,
    records: Records,
    apply: mpsc::Sender<ApplyCommand>,
) -> (Verifier, Handle, mpsc::Receiver<Wanted>) {
    let (wanted, requests) = mpsc::channel(RUNNING_MAX);
    let list = Arc::<Mutex<Vec<VerifyView>>>::default();
    let verifier = Verifier { shared, records, apply, list: list.clone(), rate: settings.scrub_rate, every: settings.scrub_every };
    (verifier, Handle { wanted, list }, requests)
}

/// Serves requests, and scrubs, until every handle is gone.
pub async fn run(verifier: Verifier, mut requests: mpsc::Receiver<Wanted>) {
    let verifier = Rc::new(verifier);
    let scrub = tokio::task::spawn_local(scrub::run(verifier.clone()));
    let mut number = 0;
    while let Some((point, done)) = requests.recv().await {
        number += 1;
        let _ = done.send(verifier.begin(point, format!("verify-{number}")));
    }
    scrub.abort();
}

/// How a verification ended, if it did not fail.
enum Outcome {
    /// The content is what it was at the first one, or this is the first.
    Good { first: bool },
    /// The point is off the list.
    Bad(String),
}

impl Verifier {
    /// Begins a verification that somebody asked for.
    fn begin(self: &Rc<Self>, id: PointId, name: String) -> Result<VerifyView, String> {
        let point =
            self.shared.book().get(id).cloned().ok_or_else(|| format!("there is no recovery point {id}: see `tidegate point list`"))?;
        let view = VerifyView {
            name,
            point: id.to_string(),
            state: "running".to_owned(),
            done_bytes: 0,
            total_bytes: point.sizes.values().sum(),
            read_bytes: 0,
            seconds: 0.0,
            first: false,
            error: None,
            disks: Vec::new(),
        };
        {
            let mut list = self.list.lock().unwrap_or_else(PoisonError::into_inner);
            if list.iter().filter(|v| v.state == "running").count() >= RUNNING_MAX {
                return Err(format!("{RUNNING_MAX} verifications run already: wait for one to end"));
            }
            while list.iter().filter(|v| v.state != "running").count() >= FINISHED_KEPT
                && let Some(at) = list.iter().position(|v| v.state != "running")
            {
                list.remove(at);
            }
            list.push(view.clone());
        }
        let (verifier, mut now) = (self.clone(), view.clone());
        tokio::task::spawn_local(async move {
            let began = clock::now();
            let pace = async |_: DiskId, _: u64| Ok(());
            let result = verifier.verify(&point, pace, &mut now).await;
            now.seconds = clock::now().since(began).as_secs_f64();
            (now.state, now.error) = match result {
                Ok(Outcome::Good { first }) => {
                    now.first = first;
                    ("good".to_owned(), None)
                }
                Ok(Outcome::Bad(cause)) => ("bad".to_owned(), Some(cause)),
                Err(error) => ("failed".to_owned(), Some(error)),
            };
            verifier.publish(&now);
        });
        Ok(view)
    }

    fn publish(&self, view: &VerifyView) {
        if let Some(known) = self.list.lock().unwrap_or_else(PoisonError::into_inner).iter_mut().find(|v| v.name == view.name) {
            *known = view.clone();
        }
    }

    /// Recomputes a point and notes what was found.
    ///
    /// # Errors
    /// A sentence, when it could not be read for another reason than damage.
    async fn verify(
        &self,
        point: &RecoveryPoint,
        pace: impl AsyncFn(DiskId, u64) -> Result<(), String>,
        view: &mut VerifyView,
    ) -> Result<Outcome, String> {
        if !self.shared.book().pin(point.id) {
            return Err("the recovery point expired before it was verified".to_owned());
        }
        let _pin = Pin(&self.shared, point.id);
        let mut digests = BTreeMap::new();
        for (before, disk) in point.disks.keys().enumerate() {
            let offset: u64 = point.disks.keys().take(before).filter_map(|d| point.sizes.get(d)).sum();
            match self.recompute(point.id, *disk, &pace, offset, view).await {
                Ok(digest) => {
                    digests.insert(*disk, digest);
                    let name = self.shared.disk(*disk).map_or_else(|| disk.to_string(), |d| d.name.to_string());
                    view.disks.push(VerifiedDisk { name, digest: digest::show(&digest) });
                }
                Err(error) => {
                    return self.shared.book().get_bad(point.id).map(|bad| Outcome::Bad(bad.cause.clone())).ok_or(error);
                }
            }
        }
        let earlier = self.shared.book().verification(point.id).cloned();
        let changed = earlier.as_ref().and_then(|e| digests.iter().find(|(disk, now)| e.digests.get(disk).is_some_and(|d| d != *now)));
        if let (Some((disk, now)), Some(earlier)) = (changed, &earlier) {
            let before = earlier.digests.get(disk).map(digest::show).unwrap_or_default();
            let cause = format!(
                "its content is not what it was when it was verified at {}: digest {}, now {}; the replica or its history was changed",
                clock::rfc3339(earlier.wall_ms),
                short(&before),
                short(&digest::show(now)),
            );
            bad::mark(&self.shared, &self.records, *disk, &[point.id], &cause, false).await.map_err(|e| e.to_string())?;
            return Ok(Outcome::Bad(cause));
        }
        let verification = Verification { wall_ms: clock::wall_ms(), clock: self.shared.clock(), digests };
        let (records, id, noted) = (self.records.clone(), point.id, verification.clone());
        let done = tokio::task::spawn_blocking(move || records.put_verified(id, &noted)).await;
        done.map_err(|e| e.to_string())?.map_err(|e| e.to_string())?;
        self.shared.book().note_verified(id, verification);
        Ok(Outcome::Good { first: earlier.is_none() })
    }

    /// Reads a disk of a point and makes its digest. `pace` is told what was read, and may wait or end it.
    async fn recompute(
        &self,
        point: PointId,
        disk: DiskId,
        pace: &impl AsyncFn(DiskId, u64) -> Result<(), String>,
        before: u64,
        view: &mut VerifyView,
    ) -> Result<[u8; 32], String> {
        let open = OpenPoint::open(&self.apply, point, disk).await?;
        let result = self.read_all(&open, disk, pace, before, view).await;
        open.close().await;
        result
    }

    async fn read_all(
        &self,
        open: &OpenPoint,
        disk: DiskId,
        pace: &impl AsyncFn(DiskId, u64) -> Result<(), String>,
        before: u64,
        view: &mut VerifyView,
    ) -> Result<[u8; 32], String> {
        let mut digester = Digester::new(open.size);
        let mut at = 0;
        while at < open.size {
            let next = open.ask(|done| ApplyCommand::NextData { view: open.view, offset: at, done }).await?;
            let Some(data) = next else { break };
            let steps = (0..data.len.div_ceil(STEP)).map(|i| {
                let offset = data.offset + i * STEP;
                read(open, Extent::new(offset, STEP.min(data.end() - offset)))
            });
            let mut running = futures_util::stream::iter(steps).buffered(DEPTH);
            while let Some(piece) = running.next().await {
                let (extent, content) = piece?;
                // Away from the thread that serves mounts.
                let hashed = tokio::task::spawn_blocking(move || {
                    digester.take(extent.offset, &content);
                    digester
                });
                digester = hashed.await.map_err(|e| e.to_string())?;
                view.read_bytes += extent.len;
                view.done_bytes = before + extent.end();
                self.publish(view);
                pace(disk, extent.len).await?;
            }
            drop(running);
            at = data.end();
        }
        view.done_bytes = before + open.size;
        Ok(digester.finish())
    }
}

async fn read(open: &OpenPoint, extent: Extent) -> Result<(Extent, Bytes), String> {
    let content = open.read(extent).await?;
    Ok((extent, content))
}

fn short(digest: &str) -> &str {
    &digest[..digest.len().min(16)]
}

/// Keeps a point from expiring between its disks.
struct Pin<'a>(&'a TargetShared, PointId);

impl Drop for Pin<'_> {
    fn drop(&mut self) {
        self.0.book().unpin(self.1);
    }
}
