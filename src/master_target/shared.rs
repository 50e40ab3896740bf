//! What the network thread and the apply thread share of each disk: the queue of journaled batches, and figures.

use std::collections::{BTreeMap, VecDeque};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;

use super::points::Book;
use crate::clock::{self, Mono};
use crate::disk::Format;
use crate::model::{DiskId, DiskReport, Hold, MachineId, Name, Position, Verdict, Wanted};
use crate::storage::AlignedBuf;
use crate::storage::log::Location;
use crate::wire::batch::BatchHeader;

/// Verdicts that may wait for the process server.
const VERDICTS_MAX: usize = 4096;
/// Batches that are opened ahead at once.
const UNOPENED_MAX: usize = 4096;

/// A batch's header and its opened body.
pub type Opened = (BatchHeader, AlignedBuf);

/// A journaled batch that is not in the replica.
pub struct Item {
    /// First sequence.
    pub first: u64,
    /// Where the stream stands after it.
    pub end: Position,
    /// Where it is in the journal.
    pub location: Location,
    /// It ends with a marker: a point waits for it.
    pub marked: bool,
    /// Bytes of its opened body.
    pub body_len: u32,
    /// That, unless it has to be read back.
    pub body: Option<Opened>,
    /// How it travelled.
    pub travel: Option<Travel>,
}

impl Item {
    /// A batch found at start.
    pub fn recovered(header: &BatchHeader, location: Location) -> Self {
        let body_len = header.body_len() as u32;
        Self { first: header.first, end: header.end(), location, marked: header.marker_len > 0, body_len, body: None, travel: None }
    }
}

/// Where a batch's last change spent its time. All of it monotonic.
#[derive(Clone, Copy, Debug)]
pub struct Travel {
    /// When it arrived here.
    pub received: Mono,
    /// At the agent.
    pub source: Duration,
    /// At the process server.
    pub gateway: Duration,
    /// On the link.
    pub link: Duration,
}

impl Travel {
    /// When the change was captured, on this process's clock.
    pub fn captured(&self) -> Mono {
        self.received.minus(self.source + self.gateway + self.link)
    }
}

/// The newest listed point of a disk, for its RPO.
#[derive(Clone, Copy, Debug)]
pub struct Newest {
    /// How its marker travelled.
    pub travel: Travel,
    /// From arrival to listing.
    pub apply: Duration,
}

/// Positions and condition of a replica.
#[derive(Clone, Debug, Default)]
pub struct Condition {
    /// Received by the network thread.
    pub received: Position,
    /// Durable in the journal.
    pub journaled: Position,
    /// In the replica.
    pub applied: Position,
    /// Durable in the replica.
    pub checkpointed: Position,
    /// What the agent said last, and when.
    pub report: Option<(DiskReport, Mono)>,
    /// Why the replica does not go on, if so.
    pub error: Option<String>,
    /// Why the disk as its agent has it cannot go into its replica, if so.
    pub refused: Option<String>,
    /// The newest listed point.
    pub newest: Option<Newest>,
    /// Bytes of the disk; 0 when there is no replica yet.
    pub size: u64,
    /// Bytes of old content kept.
    pub retained_bytes: u64,
    /// The replica has content that nobody has allowed to be overwritten.
    pub unconfirmed: bool,
    /// The image, once there is one.
    pub image: Option<(Format, PathBuf)>,
    /// What a failover keeps the replica from.
    pub hold: Hold,
    /// The same for a person.
    pub hold_reason: String,
    /// When a failover last gave the replica back.
    pub freed: Option<Mono>,
}

/// One disk.
pub struct DiskShared {
    /// Its id.
    pub id: DiskId,
    /// Whose.
    pub machine: MachineId,
    /// The machine's name.
    pub machine_name: Name,
    /// Its name.
    pub name: Name,
    /// `machine/disk`.
    pub label: String,
    /// Format of new replicas.
    pub format: Format,
    /// Size by configuration.
    pub configured_size: Option<u64>,
    /// An image that is there already and becomes the replica.
    pub adopt: Option<PathBuf>,
    queue: Mutex<VecDeque<Item>>,
    /// A batch with a marker waits.
    pub markers_waiting: AtomicUsize,
    /// Bytes in the journal of this disk.
    pub queue_bytes: AtomicU64,
    /// Rung when something was queued.
    pub queued: Notify,
    wanted: Mutex<Wanted>,
    /// Rung when there is something to tell the agent.
    pub tell: Notify,
    /// Changes when streams have to be opened again.
    pub openings: AtomicU64,
    /// Changes when what was journaled is not there any more: streams go on behind the replica.
    pub lives: AtomicU64,
    verdicts: Mutex<Vec<Verdict>>,
    compared: Mutex<BTreeMap<u64, u64>>,
    condition: Mutex<Condition>,
}

impl DiskShared {
    /// A disk of the configuration.
    pub fn new(machine: &crate::config::master_target::Machine, disk: &crate::config::master_target::Disk) -> Self {
        Self {
            id: machine.disk_id(disk),
            machine: machine.id(),
            machine_name: machine.name.clone(),
            name: disk.name.clone(),
            label: format!("{}/{}", machine.name, disk.name),
            format: disk.format,
            configured_size: disk.size,
            adopt: disk.adopt.clone(),
            queue: Mutex::default(),
            markers_waiting: AtomicUsize::new(0),
            queue_bytes: AtomicU64::new(0),
            queued: Notify::new(),
            wanted: Mutex::new(Wanted::Run),
            tell: Notify::new(),
            openings: AtomicU64::new(0),
            lives: AtomicU64::new(0),
            verdicts: Mutex::default(),
            compared: Mutex::default(),
            condition: Mutex::default(),
        }
    }

    /// The condition. Held for moments only.
    pub fn condition(&self) -> MutexGuard<'_, Condition> {
        self.condition.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A comparison was done: the agent is told, and what differs is counted.
    pub fn add_verdict(&self, verdict: Verdict) {
        let differs: u64 = verdict.differs.iter().map(|e| e.len).sum();
        let mut compared = self.compared.lock().unwrap_or_else(PoisonError::into_inner);
        if differs > 0 {
            compared.insert(verdict.extent.offset, differs);
        } else {
            compared.remove(&verdict.extent.offset);
        }
        drop(compared);
        self.tell_verdict(verdict);
    }

    /// The agent is told what a comparison found.
    pub fn tell_verdict(&self, verdict: Verdict) {
        let mut verdicts = self.verdicts.lock().unwrap_or_else(PoisonError::into_inner);
        // Whoever does not take them asks again.
        if verdicts.len() < VERDICTS_MAX {
            verdicts.push(verdict);
        }
        drop(verdicts);
        self.tell.notify_one();
    }

    /// Verdicts that the agent has not been told.
    pub fn take_verdicts(&self) -> Vec<Verdict> {
        std::mem::take(&mut *self.verdicts.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Bytes found to differ since this history of the replica began, in blocks of [`crate::model::digest::DIGEST_BLOCK`].
    pub fn differing_bytes(&self) -> u64 {
        self.compared.lock().unwrap_or_else(PoisonError::into_inner).values().sum()
    }

    /// Another history begins: positions and comparisons are those of nobody any more, streams are opened again.
    pub fn begin_history(&self) {
        self.compared.lock().unwrap_or_else(PoisonError::into_inner).clear();
        self.take_verdicts();
        {
            let mut condition = self.condition();
            (condition.received, condition.journaled) = Default::default();
            (condition.applied, condition.checkpointed) = Default::default();
            (condition.newest, condition.report) = (None, None);
        }
        self.reopen_streams();
    }

    /// Streams are closed; the process server opens them again and learns what has changed.
    pub fn reopen_streams(&self) {
        self.openings.fetch_add(1, Ordering::Relaxed);
        self.tell.notify_one();
    }

    /// What the agent is told to do.
    pub fn wanted(&self) -> Wanted {
        *self.wanted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes that.
    pub fn set_wanted(&self, wanted: Wanted) {
        *self.wanted.lock().unwrap_or_else(PoisonError::into_inner) = wanted;
        self.tell.notify_one();
    }

    /// Sets what a failover keeps the replica from. From [`Hold::Draining`] on nothing new counts as received.
    pub fn set_hold(&self, hold: Hold, reason: &str) {
        let mut condition = self.condition();
        if condition.hold != Hold::None && hold == Hold::None {
            // What was refused for the failover is not any more.
            condition.refused = None;
            if condition.hold < Hold::Committed {
                condition.freed = Some(clock::now());
            }
        }
        (condition.hold, condition.hold_reason) = (hold, reason.to_owned());
        drop(condition);
        if hold != Hold::None && self.wanted() == Wanted::Release {
            // What an earlier failover was undone with does not wake a source beside this one.
            self.set_wanted(Wanted::Run);
        }
        self.queued.notify_one();
    }

    /// Forgets what waits to be applied.
    pub fn clear_queue(&self) -> Vec<Item> {
        self.queue_bytes.store(0, Ordering::Relaxed);
        let mut queue = self.lock_queue();
        self.markers_waiting.store(0, Ordering::Relaxed);
        queue.drain(..).collect()
    }

    /// Queues a journaled batch.
    pub fn push(&self, item: Item) {
        self.queue_bytes.fetch_add(item.location.stored_bytes(), Ordering::Relaxed);
        {
            let mut queue = self.lock_queue();
            // Under the lock: whoever takes the queue meanwhile says what is left in it.
            self.markers_waiting.fetch_add(usize::from(item.marked), Ordering::Relaxed);
            queue.push_back(item);
        }
        self.queued.notify_one();
    }

    /// Takes batches in order until about `bytes` are taken.
    pub fn take(&self, bytes: u64) -> Vec<Item> {
        let mut queue = self.lock_queue();
        let mut taken = Vec::new();
        let mut sum = 0;
        while sum < bytes
            && let Some(item) = queue.pop_front()
        {
            sum += u64::from(item.body_len);
            taken.push(item);
        }
        self.markers_waiting.fetch_sub(taken.iter().filter(|item| item.marked).count(), Ordering::Relaxed);
        taken
    }

    /// Where those of the next `bytes` are that have to be read back, at most [`UNOPENED_MAX`].
    pub fn unopened(&self, bytes: u64) -> Vec<Location> {
        let queue = self.lock_queue();
        let mut sum = 0;
        let next = queue.iter().take_while(|item| {
            sum += u64::from(item.body_len);
            sum <= bytes
        });
        next.filter(|item| item.body.is_none()).map(|item| item.location).take(UNOPENED_MAX).collect()
    }

    /// The opened body of a batch that was read back from `location`; false if that does not wait any more.
    pub fn give_body(&self, location: Location, body: Opened) -> bool {
        let mut queue = self.lock_queue();
        let Ok(at) = queue.binary_search_by_key(&body.0.end(), |item| item.end) else { return false };
        let item = &mut queue[at];
        // Its place may have been given up, and used again.
        if item.body.is_some() || (item.location, item.first) != (location, body.0.first) {
            return false;
        }
        item.body = Some(body);
        true
    }

    /// Nobody will apply what waits: the bodies are given up. Their bytes.
    pub fn close_bodies(&self) -> u64 {
        self.lock_queue().iter_mut().filter_map(|item| item.body.take()).map(|(_, body)| body.len() as u64).sum()
    }

    /// Batches waiting.
    pub fn waiting(&self) -> usize {
        self.lock_queue().len()
    }

    /// Bytes of opened bodies waiting.
    pub fn waiting_bytes(&self) -> u64 {
        self.queue_bytes.load(Ordering::Relaxed)
    }

    fn lock_queue(&self) -> MutexGuard<'_, VecDeque<Item>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What all parts of a master target share.
pub struct TargetShared {
    /// Every configured disk.
    pub disks: Vec<Arc<DiskShared>>,
    book: Mutex<Book>,
    /// Bytes of opened bodies in memory.
    pub body_bytes: AtomicU64,
    /// Held while the book and the catalogue are changed together.
    pub noting: tokio::sync::Mutex<()>,
    /// Seconds run before this start.
    pub clock_before: u64,
    started: Mono,
}

impl TargetShared {
    /// The shared state at start.
    pub fn new(disks: Vec<Arc<DiskShared>>, book: Book, clock_before: u64) -> Self {
        Self {
            disks,
            book: Mutex::new(book),
            body_bytes: AtomicU64::new(0),
            noting: tokio::sync::Mutex::new(()),
            clock_before,
            started: clock::now(),
        }
    }

    /// The book of points. Held for moments only.
    pub fn book(&self) -> MutexGuard<'_, Book> {
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Seconds this master target has run in all.
    pub fn clock(&self) -> u64 {
        self.clock_before + clock::now().since(self.started).as_secs()
    }

    /// Batches that will not be applied: their places in the journal.
    pub fn drop_items(&self, items: Vec<Item>) -> Vec<Location> {
        let bodies: u64 = items.iter().filter_map(|item| item.body.as_ref()).map(|(_, body)| body.len() as u64).sum();
        self.body_bytes.fetch_sub(bodies, Ordering::Relaxed);
        items.into_iter().map(|item| item.location).collect()
    }

    /// A disk by id.
    pub fn disk(&self, id: DiskId) -> Option<&Arc<DiskShared>> {
        self.disks.iter().find(|d| d.id == id)
    }

    /// Bytes of old content kept for all disks of a machine.
    pub fn retained_bytes(&self, machine: MachineId) -> u64 {
        self.disks.iter().filter(|d| d.machine == machine).map(|d| d.condition().retained_bytes).sum()
    }

    /// The disks of a machine.
    pub fn disks_of(&self, machine: MachineId) -> Vec<DiskId> {
        self.disks.iter().filter(|d| d.machine == machine).map(|d| d.id).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk() -> DiskShared {
        let text = include_str!("../../config/master-target.toml");
        let settings: crate::config::master_target::MasterTargetSettings = toml::from_str(text).unwrap();
        DiskShared::new(&settings.machine[0], &settings.machine[0].disk[0])
    }

    fn header(last: u64) -> BatchHeader {
        BatchHeader { epoch: 1, first: last, last, data_len: 1000, ..BatchHeader::new(DiskId(uuid::Uuid::nil()), 1) }
    }

    fn body() -> AlignedBuf {
        AlignedBuf::zeroed(1000)
    }

    #[test]
    fn a_body_reaches_the_batch_it_was_read_for_or_nobody() {
        let (disk, place) = (disk(), Location::of_length);
        for last in 1..=4 {
            let mut item = Item::recovered(&header(last), place(last));
            item.body = (last == 2).then(|| (header(last), body()));
            disk.push(item);
        }
        assert_eq!(disk.unopened(3500), [place(1), place(3)], "two is open, and four lies behind the bound");
        assert!(disk.give_body(place(3), (header(3), body())));
        assert!(!disk.give_body(place(3), (header(3), body())), "it has one");
        assert!(!disk.give_body(place(3), (header(4), body())), "another batch stands there by now");
        assert!(!disk.give_body(place(9), (header(9), body())));
        assert_eq!(disk.take(2500).iter().map(|item| item.body.is_some()).collect::<Vec<_>>(), [false, true, true]);
        assert!(!disk.give_body(place(1), (header(1), body())), "it is under way");
        assert!(disk.give_body(place(4), (header(4), body())));
        assert_eq!((disk.close_bodies(), disk.close_bodies()), (1000, 0));
        disk.clear_queue();
        assert!(!disk.give_body(place(4), (header(4), body())));
    }
}
