//! Brings points back: as a block device over NBD, or as an image file. Reads through the apply thread; replication goes on.

mod export;
mod mount;
mod overlay;
mod staging;
mod standing;

use std::collections::HashMap;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use tokio::sync::{Notify, mpsc, oneshot};

use self::overlay::Overlay;
pub use self::standing::Serve;
use super::apply::{ANSWERS_MAX, Command as ApplyCommand, Portions};
use super::retain::Gathered;
use crate::control::api::RecoveryView;
use crate::disk::Format;
use crate::model::{Address, DiskId, Extent, PointId};

/// Mounts and exports that may run at once.
const RUNNING_MAX: usize = 64;
/// Portions of a read that are opened before others have their turn.
const PORTIONS_AT_ONCE: usize = 4;
/// Finished exports that are remembered.
const FINISHED_KEPT: usize = 32;

/// What is wanted.
#[derive(Clone, Debug)]
pub enum Target {
    /// A block device.
    Nbd {
        /// Where.
        address: Address,
        /// Writes are taken, into scratch space.
        writable: bool,
    },
    /// An image file.
    File(Format, PathBuf),
}

/// Where writes to mounted points go.
#[derive(Clone, Debug)]
pub struct Scratch {
    /// Folder.
    pub dir: PathBuf,
    /// Most bytes of one mount.
    pub max: u64,
}

/// A request to the recover thread.
pub enum Command {
    /// Start a mount or an export.
    Start {
        /// Which point.
        point: PointId,
        /// Which disk.
        disk: DiskId,
        /// `machine/disk`.
        label: String,
        /// Where to.
        target: Target,
        /// How it began.
        done: oneshot::Sender<Result<RecoveryView, String>>,
    },
    /// Serve a disk that failed over.
    Serve {
        /// Which and where.
        serve: Serve,
        /// How it began.
        done: oneshot::Sender<Result<(), String>>,
    },
    /// End one.
    Stop {
        /// Its name.
        name: String,
        /// Whether there was one.
        done: oneshot::Sender<bool>,
    },
}

/// What runs and what finished; shared with the control interface.
#[derive(Clone, Default)]
pub struct Recoveries(Arc<Mutex<Vec<RecoveryView>>>);

impl Recoveries {
    /// All of them.
    pub fn list(&self) -> Vec<RecoveryView> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn update(&self, name: &str, change: impl FnOnce(&mut RecoveryView)) {
        if let Some(view) = self.0.lock().unwrap_or_else(PoisonError::into_inner).iter_mut().find(|v| v.name == name) {
            change(view);
        }
    }

    fn remove(&self, name: &str) -> bool {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let before = all.len();
        all.retain(|v| v.name != name);
        all.len() < before
    }

    fn add(&self, view: RecoveryView) -> Result<(), String> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if all.iter().filter(|v| v.state == "running").count() >= RUNNING_MAX {
            return Err(format!("{RUNNING_MAX} mounts and exports run already: end one with `tidegate recover unmount`"));
        }
        while all.iter().filter(|v| v.state != "running").count() >= FINISHED_KEPT
            && let Some(at) = all.iter().position(|v| v.state != "running")
        {
            all.remove(at);
        }
        // What was written there before is not what is there from now on.
        all.retain(|v| v.state == "running" || v.target != view.target);
        all.push(view);
        Ok(())
    }
}

/// A disk at a point, open; the point stays pinned until it is closed.
pub(super) struct OpenPoint {
    apply: mpsc::Sender<ApplyCommand>,
    pub(super) view: u64,
    pub(super) size: u64,
}

impl OpenPoint {
    pub(super) async fn open(apply: &mpsc::Sender<ApplyCommand>, point: PointId, disk: DiskId) -> Result<Self, String> {
        let (done, answer) = oneshot::channel();
        let gone = || "the master target is stopping".to_owned();
        apply.send(ApplyCommand::OpenView { point, disk, done }).await.map_err(|_| gone())?;
        let (view, size) = answer.await.map_err(|_| gone())??;
        Ok(Self { apply: apply.clone(), view, size })
    }

    pub(super) async fn ask<T>(&self, make: impl FnOnce(oneshot::Sender<Result<T, String>>) -> ApplyCommand) -> Result<T, String> {
        let (done, answer) = oneshot::channel();
        let gone = || "the master target is stopping".to_owned();
        self.apply.send(make(done)).await.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }

    /// Reads `extent`, whose bounds are those of sectors. Part of the work is done on this thread, which waits for the rest anyway.
    pub(super) async fn read(&self, extent: Extent) -> Result<Bytes, String> {
        if let Some(content) = self.read_once(extent, true).await? {
            return Ok(content);
        }
        // What a record that does not open means for the point, the apply thread finds out when it meets it itself.
        self.read_once(extent, false).await?.ok_or_else(|| "the retention journal changed while it was read: try again".to_owned())
    }

    /// `None` if a record did not open.
    async fn read_once(&self, extent: Extent, sealed: bool) -> Result<Option<Bytes>, String> {
        let (answers, mut answered) = mpsc::channel(ANSWERS_MAX);
        let gone = || "the master target is stopping".to_owned();
        self.apply.send(ApplyCommand::Read { view: self.view, extent, sealed, answers }).await.map_err(|_| gone())?;
        let mut gathered = Gathered::of(extent);
        loop {
            let Portions { portions, last } = answered.recv().await.ok_or_else(gone)??;
            for (index, portion) in portions.into_iter().enumerate() {
                if index % PORTIONS_AT_ONCE == PORTIONS_AT_ONCE - 1 {
                    tokio::task::yield_now().await;
                }
                if gathered.add(portion).is_err() {
                    return Ok(None);
                }
            }
            if last {
                return Ok(gathered.finish());
            }
        }
    }

    pub(super) async fn close(&self) {
        let _ = self.apply.send(ApplyCommand::CloseView { view: self.view }).await;
    }
}

/// Serves requests until every sender is gone.
pub async fn run(mut commands: mpsc::Receiver<Command>, apply: mpsc::Sender<ApplyCommand>, recoveries: Recoveries, scratch: Scratch) {
    let mut running: Vec<(String, Rc<Notify>, Option<PathBuf>)> = Vec::new();
    let mut serving: HashMap<String, (Rc<Notify>, tokio::task::JoinHandle<()>)> = HashMap::new();
    let mut number = 0;
    while let Some(command) = commands.recv().await {
        match command {
            Command::Start { point, disk, label, target, done } => {
                number += 1;
                let kind = if matches!(target, Target::Nbd { .. }) { "mount" } else { "export" };
                let name = format!("{kind}-{number}");
                let stop = Rc::new(Notify::new());
                let partial = match &target {
                    Target::File(format, path) => staging::folder(point, disk, *format, path),
                    Target::Nbd { .. } => None,
                };
                running.push((name.clone(), stop.clone(), partial.clone()));
                let job = Job {
                    name,
                    label,
                    point,
                    disk,
                    target,
                    stop,
                    partial,
                    recoveries: recoveries.clone(),
                    apply: apply.clone(),
                    scratch: scratch.clone(),
                };
                tokio::task::spawn_local(job.run(done));
            }
            Command::Serve { serve, done } => {
                let (name, stop) = (serve.name.clone(), Rc::new(Notify::new()));
                let task = tokio::task::spawn_local(standing::serve(serve, apply.clone(), stop.clone(), done));
                serving.insert(name, (stop, task));
            }
            Command::Stop { name, done } => {
                if let Some((stop, task)) = serving.remove(&name) {
                    stop.notify_one();
                    // Its address is free when this is answered.
                    let _ = task.await;
                    let _ = done.send(true);
                    continue;
                }
                if let Some(at) = running.iter().position(|(n, ..)| *n == name) {
                    let (_, stop, partial) = running.swap_remove(at);
                    stop.notify_one();
                    // Of one that failed; one that runs is in use, and removes its own.
                    partial.iter().for_each(|dir| staging::discard(dir));
                }
                let _ = done.send(recoveries.remove(&name));
            }
        }
    }
}

struct Job {
    name: String,
    label: String,
    point: PointId,
    disk: DiskId,
    target: Target,
    stop: Rc<Notify>,
    /// The folder an export is written in.
    partial: Option<PathBuf>,
    recoveries: Recoveries,
    apply: mpsc::Sender<ApplyCommand>,
    scratch: Scratch,
}

impl Job {
    async fn run(self, done: oneshot::Sender<Result<RecoveryView, String>>) {
        let open = match OpenPoint::open(&self.apply, self.point, self.disk).await {
            Ok(open) => Rc::new(open),
            Err(e) => return drop(done.send(Err(e))),
        };
        let result = self.start(&open, done).await;
        open.close().await;
        match result {
            Ok(()) => self.recoveries.update(&self.name, |v| {
                v.state = "done".to_owned();
                v.done_bytes = v.total_bytes;
            }),
            Err(error) => {
                tracing::warn!(name = self.name, error, "recovery failed");
                self.recoveries.update(&self.name, |v| (v.state, v.error) = ("failed".to_owned(), Some(error)));
            }
        }
        if matches!(self.target, Target::Nbd { .. }) {
            self.recoveries.remove(&self.name);
        }
    }

    /// Begins, answers how that went, and goes on until it is done or stopped.
    async fn start(&self, open: &Rc<OpenPoint>, done: oneshot::Sender<Result<RecoveryView, String>>) -> Result<(), String> {
        let view = RecoveryView {
            name: self.name.clone(),
            writable: matches!(self.target, Target::Nbd { writable: true, .. }),
            kind: if matches!(self.target, Target::Nbd { .. }) { "mount" } else { "export" }.to_owned(),
            point: self.point.to_string(),
            disk: self.label.clone(),
            target: match &self.target {
                Target::Nbd { address, .. } => address.to_string(),
                Target::File(_, path) => path.display().to_string(),
            },
            state: "running".to_owned(),
            done_bytes: 0,
            resumed_bytes: 0,
            total_bytes: open.size,
            error: None,
        };
        let begun = match &self.target {
            Target::Nbd { address, .. } => crate::nbd::Listener::bind(address).await.map(Some).map_err(|e| e.to_string()),
            Target::File(format, path) => match format.files(path).into_iter().find(|f| f.exists()) {
                Some(file) => Err(format!("{} exists already: remove it or choose another --output", file.display())),
                None => Ok(None),
            },
        };
        let listener = match begun.and_then(|l| self.recoveries.add(view.clone()).map(|()| l)) {
            Ok(listener) => listener,
            Err(e) => {
                let _ = done.send(Err(e));
                return Ok(());
            }
        };
        let overlay = match &self.target {
            Target::Nbd { writable: true, .. } => match Overlay::make(&self.scratch.dir, open.size, self.scratch.max).await {
                Ok(overlay) => Some(overlay),
                Err(e) => {
                    self.recoveries.remove(&self.name);
                    if let Target::Nbd { address: Address::Unix(path), .. } = &self.target {
                        let _ = std::fs::remove_file(path);
                    }
                    let _ = done.send(Err(format!(
                        "cannot make scratch space in {}: {e}; choose another [recover] scratch folder, or mount with --read-only",
                        self.scratch.dir.display()
                    )));
                    return Ok(());
                }
            },
            _ => None,
        };
        let _ = done.send(Ok(view));
        tracing::info!(name = self.name, point = %self.point, disk = self.label, "recovery begins");
        let work = async {
            match (&self.target, listener) {
                (Target::Nbd { .. }, Some(listener)) => {
                    mount::serve(listener, open.clone(), &self.label, overlay).await;
                    Ok(())
                }
                (Target::File(format, path), _) => {
                    let progress = |p: export::Progress| {
                        self.recoveries.update(&self.name, |v| (v.done_bytes, v.resumed_bytes) = (p.done, p.resumed));
                    };
                    let staging = self.partial.as_deref().ok_or("--output must name a file")?;
                    export::write(open, *format, path, staging, progress).await
                }
                (Target::Nbd { .. }, None) => Ok(()),
            }
        };
        let (result, stopped) = tokio::select! {
            result = work => (result, false),
            () = self.stop.notified() => (Ok(()), true),
        };
        if stopped {
            // Somebody does not want it any more, so nobody will go on with it.
            self.partial.iter().for_each(|dir| staging::discard(dir));
        }
        if let Target::Nbd { address: Address::Unix(path), .. } = &self.target {
            let _ = std::fs::remove_file(path);
        }
        result
    }
}
