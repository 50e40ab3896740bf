//! One disk at the process server: its stream, its open batch, its seal, and the bells that its tasks wait for.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::Notify;

use super::catalogue::DiskRecord;
use super::optimize::batcher::{Batcher, RawBatch};
use super::pressure::Grant;
use super::stream::{Queued, Stream};
use crate::config::process_server::Machine;
use crate::crypto::seal::SealingSession;
use crate::model::{DiskId, DiskReport, MachineId, Position, Reliance, Verdict, Wanted};
use crate::storage::log::Location;

/// Verdicts that may wait for the agent.
const VERDICTS_MAX: usize = 4096;

/// Why a disk does not take changes now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NotReady {
    /// The master target has not told the key yet.
    NoKey,
    /// The master target refuses the disk.
    Refused(String),
    /// The cache failed.
    Cache(String),
}

impl NotReady {
    /// For a person.
    pub fn message(&self) -> String {
        match self {
            NotReady::NoKey => "the process server has not reached the master target yet, which gives the disk's key".to_owned(),
            // Cut, so that it fits a message whatever the other side wrote.
            NotReady::Refused(reason) => format!("the master target refuses the disk: {}", reason.chars().take(500).collect::<String>()),
            NotReady::Cache(reason) => format!("the cache is closed for writing: {reason}"),
        }
    }
}

/// A disk; lives on the network thread.
pub struct Disk {
    /// Its id.
    pub id: DiskId,
    /// Whose it is.
    pub machine: MachineId,
    /// `machine/disk`.
    pub label: Arc<str>,
    /// Positions and queue.
    pub stream: RefCell<Stream>,
    /// Changes of the open batch.
    pub batcher: RefCell<Batcher>,
    /// What the catalogue says.
    pub record: RefCell<Option<DiskRecord>>,
    /// Seals batches; there when the key is known.
    pub session: RefCell<Option<Arc<SealingSession>>>,
    /// Why it does not take changes, if so.
    pub not_ready: RefCell<Option<NotReady>>,
    /// Which opening of the disk may send changes; an older connection is refused.
    pub owner: Cell<u64>,
    /// Size the agent told.
    pub size: Cell<u64>,
    /// The highest epoch an agent told.
    pub agent_epoch: Cell<u64>,
    /// The epoch in which an agent wants to go on with a stream from elsewhere: the master target is to be asked.
    pub claim: Cell<Option<u64>>,
    /// The epoch for which it was asked, and where it stood.
    pub claimed: Cell<Option<(u64, Position)>>,
    /// The highest epoch that another process server has.
    pub foreign: Cell<u64>,
    /// The stream to the master target is open: it said where it stands.
    pub told: Cell<bool>,
    /// What the agent told last.
    pub report: RefCell<DiskReport>,
    /// Told again to the master target.
    pub report_fresh: Cell<bool>,
    /// Something to forward.
    pub forward: Notify,
    /// Something to acknowledge to the agent.
    pub acknowledge: RefCell<Option<Rc<Notify>>>,
    /// What the master target wants of the agent, once it said so.
    pub wanted: Cell<Option<Wanted>>,
    /// What the replica said to digests and the agent has not heard.
    pub verdicts: RefCell<VecDeque<Verdict>>,
    /// What it may still send, as the cache fills.
    pub grant: Cell<Grant>,
    /// Most bytes it may have in the cache.
    pub quota: u64,
    /// How old its newest point may be.
    pub rpo_target: Duration,
    /// Locations to give up once the position is durable.
    pub to_release: RefCell<Vec<Location>>,
}

impl Disk {
    /// A disk as a restart finds it.
    pub fn new(id: DiskId, machine: &Machine, label: &str, stream: Stream, record: Option<DiskRecord>, quota: u64) -> Self {
        Self {
            id,
            machine: machine.id(),
            label: label.into(),
            stream: RefCell::new(stream),
            batcher: RefCell::default(),
            record: RefCell::new(record),
            session: RefCell::default(),
            not_ready: RefCell::new(Some(NotReady::NoKey)),
            owner: Cell::new(0),
            size: Cell::new(0),
            agent_epoch: Cell::new(0),
            claim: Cell::new(None),
            claimed: Cell::new(None),
            foreign: Cell::new(0),
            told: Cell::new(false),
            report: RefCell::default(),
            report_fresh: Cell::new(false),
            forward: Notify::new(),
            acknowledge: RefCell::default(),
            wanted: Cell::new(None),
            verdicts: RefCell::default(),
            grant: Cell::new(Grant::Full),
            quota: machine.quota.unwrap_or(quota),
            rpo_target: machine.rpo_target,
            to_release: RefCell::default(),
        }
    }

    /// The epoch with which the master target is asked: that of what is sent next.
    pub fn epoch_to_ask(&self) -> u64 {
        let stream = self.stream.borrow();
        self.claim.get().or(stream.waiting_epoch()).unwrap_or_else(|| stream.epoch().max(self.agent_epoch.get()))
    }

    /// Where the master target stands, while the stream to it is open.
    pub fn stands(&self) -> Option<Position> {
        let epoch = self.stream.borrow().epoch();
        let taken_over = self.claimed.get().filter(|(claimed, _)| *claimed == epoch).map(|(_, stands)| stands);
        let acknowledged = self.stream.borrow().acknowledged();
        taken_over.filter(|stands| acknowledged <= *stands).or(self.told.get().then_some(acknowledged))
    }

    /// Whether what an agent relies on is at the master target or in the cache, or the agent is told where the master target stands
    /// and sees for itself. Else a master target that lost something since would be given what comes behind the loss.
    pub fn vouches_for(&self, relies_on: Reliance) -> bool {
        let of_another = self.record.borrow().as_ref().is_none_or(|record| record.generation != relies_on.generation);
        self.told.get() || of_another || self.stream.borrow().has_through(relies_on.through)
    }

    /// Enters a closed batch into the pipeline.
    pub fn enter_pipeline(&self, batch: &RawBatch) -> u64 {
        self.stream.borrow_mut().closed(Position::new(batch.epoch, batch.last), batch.cost)
    }

    /// Batches are not needed in the cache any more.
    pub fn give_up(&self, gone: Vec<Queued>) {
        if gone.is_empty() {
            return;
        }
        self.to_release.borrow_mut().extend(gone.iter().map(|q| q.location));
        self.tell_agent();
    }

    /// Wakes the task that acknowledges to the agent.
    pub fn tell_agent(&self) {
        if let Some(bell) = &*self.acknowledge.borrow() {
            bell.notify_one();
        }
    }

    /// Keeps a verdict for the agent. One that is dropped is asked for again.
    pub fn add_verdict(&self, verdict: Verdict) {
        let mut verdicts = self.verdicts.borrow_mut();
        if verdicts.len() < VERDICTS_MAX {
            verdicts.push_back(verdict);
        }
        drop(verdicts);
        self.tell_agent();
    }

    /// Takes the next batch to forward, with its bytes if they are in memory.
    pub fn next_to_forward(&self) -> Option<(Queued, Option<Bytes>)> {
        self.stream.borrow().next_to_forward().map(|q| (q.clone(), q.sealed.clone()))
    }
}
