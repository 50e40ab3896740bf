//! The apply thread: owns every replica and its retention journal; lazily brings replicas up to the journal.
//!
//! A checkpoint of one disk, in this order, each step durable before the next begins:
//! 1. old content of what will be overwritten -> retention journal (cut by cut, a cut ends at a marker);
//! 2. new content -> replica (two syncs);
//! 3. position, markers and completed points -> catalogue (one transaction);
//! 4. the journal's records are given up.
//!
//! If power goes anywhere in between, the same batches are applied again from the last checkpoint; step 1 keeps what the
//! first attempt kept.

pub mod ahead;
pub mod checkpoint;
pub mod compare;
mod damage;
pub mod failover;
pub mod overwrite;
pub mod plan;
pub mod replica;
pub mod roll;
pub mod standing;

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};

use self::checkpoint::ApplyError;
use self::replica::Replica;
use super::catalogue::Records;
use super::journal::{Found, JournalHandle};
use super::policy::LivePolicy;
use super::retain::{EARLY_MAX, Early, Portion, View};
use super::shared::{DiskShared, TargetShared};
use crate::clock;
use crate::config::master_target::MasterTargetSettings;
use crate::crypto::keyring::KeyEncryptionKey;
use crate::crypto::statement::Verifier;
use crate::disk::Disk;
use crate::disk::recent::Memory;
use crate::model::{Compare, DiskId, Extent, Hold, PointId, Position};
use crate::storage::uring::Uring;

/// A batch that could not be read is read once more after this.
const READ_AGAIN: Duration = Duration::from_millis(200);
/// After a merge failed.
const THIN_AGAIN: Duration = Duration::from_secs(60);
/// How often dropped points are looked for.
const THIN_EVERY: Duration = Duration::from_secs(2);
/// A checkpoint that brings a marker comes this soon after the one before.
const MARKER_CHECKPOINT: Duration = Duration::from_millis(100);

/// A request to the apply thread.
pub enum Command {
    /// Make sure that a replica exists for a source disk of `size` (0: not known) and tell what the link needs.
    Prepare {
        /// Which disk.
        disk: DiskId,
        /// Bytes of the source.
        size: u64,
        /// The answer.
        done: oneshot::Sender<Result<Prepared, Refusal>>,
    },
    /// Open a disk at a point. The point is pinned until the view is closed.
    OpenView {
        /// Which point.
        point: PointId,
        /// Which of its disks.
        disk: DiskId,
        /// Number of the view and size of the disk.
        done: oneshot::Sender<Result<(u64, u64), String>>,
    },
    /// Read through a view.
    Read {
        /// Number of the view.
        view: u64,
        /// What.
        extent: Extent,
        /// Records may come sealed, so that the thread that asks opens some of them.
        sealed: bool,
        /// The content; ends with the last answer or the first error. Has room for [`ANSWERS_MAX`].
        answers: mpsc::Sender<Result<Portions, String>>,
    },
    /// Where the next data is.
    NextData {
        /// Number of the view.
        view: u64,
        /// From where.
        offset: u64,
        /// The extent.
        done: oneshot::Sender<Result<Option<Extent>, String>>,
    },
    /// Close a view.
    CloseView {
        /// Its number.
        view: u64,
    },
    /// A failover wants something of a replica.
    Failover {
        /// Which.
        disk: DiskId,
        /// What.
        order: failover::Order,
    },
    /// Read every record of the next interval of a disk's retention journal. Damage is dealt with.
    Inspect {
        /// Which disk.
        disk: DiskId,
        /// The interval before, if any.
        after: Option<Position>,
        /// Bytes a second.
        rate: u64,
        /// Which one it was; `None` after the last.
        done: oneshot::Sender<Result<Option<Position>, String>>,
    },
}

/// Answers to one read, at most.
pub const ANSWERS_MAX: usize = EARLY_MAX + 1;

/// Some of what a read asked for.
pub struct Portions {
    /// These.
    pub portions: Vec<Portion>,
    /// Nothing follows; every portion is as good as this one.
    pub last: bool,
}

/// What the link needs of a replica.
#[derive(Clone)]
pub struct Prepared {
    /// The history of its data.
    pub generation: u64,
    /// The disk's data key.
    pub key: crate::crypto::keyring::DataKey,
    /// Bytes.
    pub size: u64,
    /// The highest epoch obeyed.
    pub epoch: u64,
    /// The process server that has it.
    pub carrier: Option<crate::model::Name>,
    /// Which life of the journal that belongs to, see [`DiskShared::lives`].
    pub life: u64,
    /// Everything through here is in the replica or the journal.
    pub journaled: Position,
    /// Damage of the replica that its source has to send again.
    pub damaged: Vec<crate::model::Extent>,
    /// Whether the disk is compared with the replica before it is sent.
    pub compare: Compare,
}

/// Why there is no replica.
#[derive(Clone, Debug)]
pub struct Refusal {
    /// Trying again can help without anybody acting.
    pub retry: bool,
    /// For a person.
    pub message: String,
}

/// Everything on the apply thread.
pub struct Apply {
    /// As configured.
    pub settings: MasterTargetSettings,
    /// Shared state.
    pub shared: Arc<TargetShared>,
    /// Metadata.
    pub records: Records,
    /// Which points stay.
    pub policy: Arc<LivePolicy>,
    /// Wraps data keys.
    pub kek: Arc<KeyEncryptionKey>,
    /// Knows what coordinators have signed.
    pub verifier: Verifier,
    /// To the journal.
    pub journal: JournalHandle,
    /// Files.
    pub storage: Uring,
    /// What was written to the replicas lately.
    recent: Rc<Memory>,
    replicas: RefCell<HashMap<DiskId, Rc<Replica>>>,
    /// Intervals that the catalogue knows of replicas that are not open yet.
    intervals: RefCell<HashMap<DiskId, BTreeMap<Position, u64>>>,
    preparing: tokio::sync::Mutex<()>,
    views: RefCell<HashMap<u64, OpenView>>,
    next_view: std::cell::Cell<u64>,
    writers: RefCell<HashMap<DiskId, standing::Writer>>,
}

#[derive(Clone)]
struct OpenView {
    view: Rc<View<Uring>>,
    replica: Rc<Replica>,
    point: PointId,
    /// Bytes of the disk at the point; the replica may have grown since.
    size: u64,
}

/// What the thread is given.
pub struct Setup {
    /// As configured.
    pub settings: MasterTargetSettings,
    /// Shared state.
    pub shared: Arc<TargetShared>,
    /// Metadata.
    pub records: Records,
    /// Which points stay.
    pub policy: Arc<LivePolicy>,
    /// Wraps data keys.
    pub kek: Arc<KeyEncryptionKey>,
    /// Knows what coordinators have signed.
    pub verifier: Verifier,
    /// To the journal.
    pub journal: JournalHandle,
    /// What the journal held at start.
    pub found: Found,
}

/// Opens every replica that exists, reports, then serves until every sender of commands is gone.
pub async fn run(setup: Setup, mut commands: mpsc::Receiver<Command>, opened: std::sync::mpsc::SyncSender<()>) {
    let (intervals, unknown) = match setup.records.intervals() {
        Ok(intervals) => (intervals, None),
        // What is missing would not be noticed.
        Err(error) => (HashMap::new(), Some(error.to_string())),
    };
    let apply = Rc::new(Apply {
        recent: Memory::new(setup.settings.apply.recent_max),
        settings: setup.settings,
        shared: setup.shared,
        records: setup.records,
        policy: setup.policy,
        kek: setup.kek,
        verifier: setup.verifier,
        journal: setup.journal,
        storage: Uring::direct(),
        replicas: RefCell::default(),
        intervals: RefCell::new(intervals),
        preparing: tokio::sync::Mutex::new(()),
        views: RefCell::default(),
        next_view: std::cell::Cell::new(1),
        writers: RefCell::default(),
    });
    let mut found = setup.found;
    for disk in apply.shared.disks.clone() {
        if let Some(error) = &unknown {
            tracing::error!(disk = disk.label, error, "replica cannot be used");
            disk.condition().error = Some(error.clone());
            continue;
        }
        if let Err(refusal) = apply.open_existing(&disk, &mut found).await {
            tracing::error!(disk = disk.label, reason = refusal.message, "replica cannot be used; the others go on");
            disk.condition().error = Some(refusal.message);
        }
    }
    apply.give_up_unneeded(found).await;
    let _ = opened.send(());
    while let Some(command) = commands.recv().await {
        let apply = apply.clone();
        tokio::task::spawn_local(async move { apply.handle(command).await });
    }
}

/// Gives back the space of points that were dropped from the middle, beside everything else.
async fn thin(apply: Rc<Apply>, replica: Rc<Replica>) {
    let disk = &replica.shared;
    let mut policy = apply.policy.version();
    // So that points open at once later; nothing waits for it.
    replica.retention.learn().await;
    let mut told = String::new();
    while !replica.retired.get() {
        replica.pause(THIN_EVERY).await;
        // A policy that was set counts at once, also for machines that send nothing. A bound of space counts while a checkpoint
        // waits for space: it is what gives some back.
        disk.condition().retained_bytes = replica.retention.bytes();
        let too_much =
            apply.policy.now(disk.machine_name.as_str()).space_max.is_some_and(|most| apply.shared.retained_bytes(disk.machine) > most);
        if too_much || apply.policy.version() != policy {
            policy = apply.policy.version();
            if let Err(error) = checkpoint::expire(&apply, &replica).await {
                tracing::error!(disk = disk.label, %error, "the policy could not be applied now; it is with the next checkpoint");
            }
        }
        while !replica.retired.get() {
            let needed = apply.shared.book().needed(disk.id);
            let forget = async |starts: Vec<Position>| {
                let (records, id) = (apply.records.clone(), disk.id);
                matches!(tokio::task::spawn_blocking(move || records.forget_intervals(id, &starts)).await, Ok(Ok(())))
            };
            match replica.retention.merge_some(&needed, replica.noted_marker.get(), forget).await {
                Ok(false) => break,
                Ok(true) => disk.condition().retained_bytes = replica.retention.bytes(),
                Err(error) => {
                    apply.judge(&replica, &error, None).await;
                    let error = error.to_string();
                    if error != told {
                        tracing::error!(disk = disk.label, error, "space of dropped points cannot be given back now; it is tried again");
                        told = error;
                    }
                    replica.pause(THIN_AGAIN).await;
                    break;
                }
            }
        }
    }
}

impl Apply {
    async fn handle(self: Rc<Self>, command: Command) {
        match command {
            Command::Prepare { disk, size, done } => drop(done.send(self.prepare(disk, size).await)),
            Command::OpenView { point, disk, done } => drop(done.send(self.open_view(point, disk).await)),
            Command::Read { view, extent, sealed, answers } => {
                // It has room, or nobody wants them any more.
                let early = |portions| drop(answers.try_send(Ok(Portions { portions, last: false })));
                let rest = self.read(view, extent, if sealed { Some(&early) } else { None }).await;
                let _ = answers.send(rest.map(|portions| Portions { portions, last: true })).await;
            }
            Command::NextData { view, offset, done } => {
                let found = self.open_view_of(view).and_then(|OpenView { view, replica, size, .. }| {
                    let next = view.next_data(&replica.image, offset).map_err(|e| e.to_string())?;
                    Ok(next.filter(|e| e.offset < size).map(|e| Extent::new(e.offset, e.end().min(size) - e.offset)))
                });
                let _ = done.send(found);
            }
            Command::Failover { disk, order } => self.order(disk, order).await,
            Command::Inspect { disk, after, rate, done } => drop(done.send(self.inspect(disk, after, rate).await)),
            Command::CloseView { view } => {
                let closed = self.views.borrow_mut().remove(&view);
                if let Some(open) = closed {
                    self.shared.book().unpin(open.point);
                }
            }
        }
    }

    fn open_view_of(&self, number: u64) -> Result<OpenView, String> {
        Ok(self.views.borrow().get(&number).ok_or("the view was closed")?.clone())
    }

    async fn read(&self, number: u64, extent: Extent, early: Option<Early<'_>>) -> Result<Vec<Portion>, String> {
        let OpenView { view, replica, size, point } = self.open_view_of(number)?;
        if !extent.fits(size) {
            return Err("the read lies outside the disk".to_owned());
        }
        let read = view.read_for(&replica.image, extent, early).await;
        // Its history may have ended while it was read.
        self.open_view_of(number)?;
        match read {
            Ok(content) => Ok(content),
            Err(error) => Err(self.judge_of(&replica, &error, point).await),
        }
    }

    async fn open_view(&self, point: PointId, disk: DiskId) -> Result<(u64, u64), String> {
        let (position, size) = {
            let mut book = self.shared.book();
            let found = book.get(point).ok_or_else(|| damage::why_not_listed(&book, point))?;
            let position = found.disks.get(&disk).copied().ok_or("the point does not have this disk")?;
            let size = found.sizes.get(&disk).copied();
            book.pin(point);
            (position, size)
        };
        let opened = async {
            let replica = self.replicas.borrow().get(&disk).cloned().ok_or("the replica of this disk is not open")?;
            let view = match replica.retention.view(position).await {
                Ok(view) => view,
                Err(error) => return Err(self.judge_of(&replica, &error, point).await),
            };
            if self.shared.book().get(point).is_none() {
                // It expired while it was opened: what it needs may have gone.
                return Err(match self.shared.book().get_bad(point) {
                    Some(bad) => damage::unusable(&bad.cause),
                    None => "the recovery point expired while it was opened: choose another one".to_owned(),
                });
            }
            Ok::<_, String>((view, replica))
        };
        match opened.await {
            Ok((view, replica)) => {
                let whole = replica.image.size();
                let (number, size) = (self.next_view.get(), size.map_or(whole, |size| size.min(whole)));
                self.next_view.set(number + 1);
                self.views.borrow_mut().insert(number, OpenView { view, replica, point, size });
                Ok((number, size))
            }
            Err(e) => {
                self.shared.book().unpin(point);
                Err(e)
            }
        }
    }

    /// Starts the task that applies to a replica.
    fn adopt(self: &Rc<Self>, replica: Replica) {
        let replica = Rc::new(replica);
        self.replicas.borrow_mut().insert(replica.shared.id, replica.clone());
        let apply = self.clone();
        tokio::task::spawn_local(damage::judge_found_at_start(self.clone(), replica.clone()));
        tokio::task::spawn_local(thin(self.clone(), replica.clone()));
        tokio::task::spawn_local(async move {
            let disk = replica.shared.clone();
            if let Err(error) = apply.keep_applying(&replica).await {
                tracing::error!(disk = disk.label, %error, "the replica cannot go on; what arrives stays in the journal. Repair the storage and restart the master target");
                // The others have use for the memory.
                apply.shared.body_bytes.fetch_sub(disk.close_bodies(), Ordering::Relaxed);
                if !replica.retired.get() {
                    disk.condition().error = Some(error.to_string());
                }
            }
        });
    }

    async fn keep_applying(&self, replica: &Replica) -> Result<(), ApplyError> {
        let (interval, bytes) = (self.settings.apply.checkpoint_interval, self.settings.apply.checkpoint_bytes);
        let mut last = clock::now();
        loop {
            let disk = &replica.shared;
            if replica.retired.get() {
                return Ok(());
            }
            if disk.waiting() == 0 || disk.condition().hold >= Hold::Standing {
                disk.queued.notified().await;
                continue;
            }
            loop {
                // A marker is not kept waiting: the age of the newest point is what people are judged by.
                let due = if disk.markers_waiting.load(Ordering::Relaxed) > 0 { interval.min(MARKER_CHECKPOINT) } else { interval };
                let since = clock::now().since(last);
                if disk.waiting_bytes() >= bytes || since >= due {
                    break;
                }
                tokio::time::sleep(due.saturating_sub(since).min(Duration::from_millis(5))).await;
            }
            last = clock::now();
            let _alone = replica.changing.lock().await;
            // A failover may have begun meanwhile: from then on the replica is the machine's.
            if disk.condition().hold >= Hold::Standing {
                continue;
            }
            let mut items = disk.take(2 * bytes);
            let mut opened = ahead::open_bodies(self, replica, &mut items).await;
            if opened.as_ref().is_err_and(ApplyError::is_damaged_batch) {
                // Read once more: what was only misread is not given up.
                tokio::time::sleep(READ_AGAIN).await;
                opened = ahead::open_bodies(self, replica, &mut items).await;
            }
            let opened = opened.and_then(|()| checkpoint::check_continues(disk.condition().checkpointed, &items));
            match opened {
                Err(error) if error.is_damaged_batch() => {
                    self.lose_journaled(replica, items, &error).await?;
                    continue;
                }
                Err(error) => {
                    // What the journal has of them stays there.
                    let _ = self.shared.drop_items(items);
                    return Err(error);
                }
                Ok(()) => {}
            }
            // What comes next is opened meanwhile, so that it can begin at once.
            let (ran, ()) =
                futures_util::future::join(checkpoint::run(self, replica, items), ahead::open_waiting(self, replica, 2 * bytes)).await;
            ran?;
            crate::observe::metrics::observe(crate::observe::metrics::CHECKPOINT, clock::now().since(last));
        }
    }

    /// What the journal holds of replicas that are gone, or have it already, is given up; the rest waits for its disk to
    /// be configured again.
    async fn give_up_unneeded(&self, found: Found) {
        let mut kept = 0;
        for ((id, generation), items) in found {
            let Ok(record) = self.records.replica(id).map(|record| record.filter(|r| r.generation == generation)) else {
                // Nobody knows whether they are needed.
                kept += items.len();
                continue;
            };
            let unneeded = items.iter().filter(|item| record.as_ref().is_none_or(|r| item.end <= r.checkpoint));
            let locations: Vec<_> = unneeded.map(|item| item.location).collect();
            kept += items.len() - locations.len();
            self.journal.release(locations).await;
        }
        if kept > 0 {
            tracing::warn!(batches = kept, "the journal holds batches of disks that cannot be used now; they are kept");
        }
    }

    fn disk(&self, id: DiskId) -> Result<Arc<DiskShared>, Refusal> {
        self.shared.disk(id).cloned().ok_or_else(|| Refusal {
            retry: false,
            message: format!("disk {id} is not registered at the master target: add its machine and name to the configuration there"),
        })
    }
}
