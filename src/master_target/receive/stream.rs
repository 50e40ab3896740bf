//! One disk's QUIC stream at the master target.

use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use thiserror::Error;
use tokio::sync::oneshot;

use super::claim::{self, Claim};
use super::order::{Gap, Order, Verdict};
use super::{IncomingDisk, Receiver};
use crate::clock;
use crate::config::limits::{HANDSHAKE_SECONDS, SILENCE_SECONDS};
use crate::crypto::seal::{OpenError, Opener, Purpose};
use crate::master_target::apply::{Command, Prepared};
use crate::master_target::journal::Tag;
use crate::master_target::shared::{DiskShared, Item, Travel};
use crate::model::{Compare, DiskReport, Hold, Name, Position, Trailer, Wanted};
use crate::observe::metrics;
use crate::storage::AlignedBuf;
use crate::storage::catalogue::CatalogueError;
use crate::storage::log::Location;
use crate::storage::log::format::RECORD_HEADER_LEN;
use crate::storage::log::service::Append;
use crate::wire::batch::{BatchHeader, parse_entries, parse_trailer};
use crate::wire::forward::{ItemType, Open, PREFIX_LEN, Prefix, Reply};
use crate::wire::{PROTOCOL, WireError, control_len, decode_control, encode_control};

/// While a disk's share of the journal is full.
const FULL_WAIT: Duration = Duration::from_millis(20);
/// While what was received is on its way to the journal.
const SETTLE_LOOK: Duration = Duration::from_millis(1);

#[derive(Debug, Error)]
enum StreamError {
    #[error("{0}")]
    Quic(String),
    #[error("the stream was opened again")]
    Superseded,
    #[error("the process server did not say which disk")]
    Silent,
    #[error(transparent)]
    Wire(#[from] WireError),
    #[error("{0}")]
    Open(#[from] OpenError),
    #[error(transparent)]
    Gap(#[from] Gap),
    #[error("a change of {len} bytes at {offset} lies outside the replica of {size} bytes")]
    Outside { offset: u64, len: u64, size: u64 },
    #[error("a batch of epoch {found}, but epoch {obeyed} is obeyed: the stream was taken over")]
    StaleEpoch { found: u64, obeyed: u64 },
    #[error("a marker of another machine")]
    ForeignMarker,
    #[error("content for a replica that may not be overwritten yet")]
    Unconfirmed,
    #[error(transparent)]
    Catalogue(#[from] CatalogueError),
    #[error("the disk is at another process server, in epoch {0}")]
    Fenced(u64),
    #[error("{message}")]
    Refused { retry: bool, message: String },
}

impl StreamError {
    fn retry(&self) -> bool {
        match self {
            StreamError::Refused { retry, .. } => *retry,
            // A batch is missing: opening again starts where the journal stands.
            StreamError::Gap(_) => true,
            _ => false,
        }
    }
}

/// Serves a stream until it ends.
pub(super) async fn serve(
    receiver: &Receiver,
    connection: &quinn::Connection,
    who: &Name,
    mut send: quinn::SendStream,
    mut receive: quinn::RecvStream,
) {
    let result = run(receiver, connection, who, &mut send, &mut receive).await;
    let Err(error) = result else { return };
    if matches!(error, StreamError::Quic(_) | StreamError::Superseded) {
        return;
    }
    metrics::count_reason(metrics::REFUSED, "forward");
    tracing::warn!(%error, "refused a stream of a process server");
    let reply = match error {
        StreamError::Fenced(obeyed) | StreamError::StaleEpoch { obeyed, .. } => Reply::Fenced { obeyed },
        error => Reply::Refused { retry: error.retry(), message: error.to_string() },
    };
    if let Ok(reply) = encode_control(&reply) {
        let _ = send.write_all(&reply).await;
        let _ = send.finish();
        // The reply must arrive before the stream goes away with this task.
        let _ = tokio::time::timeout(Duration::from_secs(5), send.stopped()).await;
    }
}

async fn run(
    receiver: &Receiver,
    connection: &quinn::Connection,
    who: &Name,
    send: &mut quinn::SendStream,
    receive: &mut quinn::RecvStream,
) -> Result<(), StreamError> {
    let open =
        tokio::time::timeout(Duration::from_secs(HANDSHAKE_SECONDS), read_open(receive)).await.map_err(|_| StreamError::Silent)??;
    if open.protocol != PROTOCOL {
        return Err(WireError::Version { what: "forward protocol", found: open.protocol }.into());
    }
    // Read before the replica is asked: if it changes meanwhile, what is told here is old.
    let openings = receiver.shared.disk(open.disk).map_or(0, |shared| shared.openings.load(Ordering::Relaxed));
    let (done, answer) = oneshot::channel();
    let gone = || StreamError::Refused { retry: true, message: "the master target is stopping".to_owned() };
    receiver.apply.send(Command::Prepare { disk: open.disk, size: open.size, done }).await.map_err(|_| gone())?;
    let prepared = answer.await.map_err(|_| gone())?.map_err(|r| StreamError::Refused { retry: r.retry, message: r.message })?;
    let (Some(disk), Some(shared)) = (receiver.disks.get(&open.disk).cloned(), receiver.shared.disk(open.disk).cloned()) else {
        return Err(gone());
    };
    let owner = claim(receiver, &disk, &shared, &prepared, open.epoch, who).await?;
    let journaled = settled(&disk, owner).await?;
    let wanted = shared.wanted();
    let reply = Reply::Opened {
        generation: prepared.generation,
        epoch: disk.epoch.get(),
        journaled,
        data_key: *prepared.key.bytes(),
        compare: prepared.compare,
        wanted,
    };
    write_reply(send, &reply).await?;
    for extent in &prepared.damaged {
        // No digest stands at sequence 0: this is what is known from before.
        let at = Position::new(disk.epoch.get(), 0);
        write_reply(send, &Reply::Verdict(crate::model::Verdict { at, extent: *extent, differs: vec![*extent] })).await?;
    }
    tracing::info!(disk = shared.label, %journaled, "process server forwards this disk");
    let stream_shared = shared.clone();
    let mut stream = DiskStream { receiver, disk: disk.clone(), shared, prepared, owner, openings, opener: None };
    tokio::select! {
        result = stream.take_items(connection, receive) => result,
        result = acknowledge(&disk, &stream_shared, owner, openings, wanted, send) => result,
    }
}

/// Decides whether this stream may send, and notes it before it may. Older streams end.
async fn claim(
    receiver: &Receiver,
    disk: &IncomingDisk,
    shared: &DiskShared,
    prepared: &Prepared,
    epoch: u64,
    who: &Name,
) -> Result<u64, StreamError> {
    let _one_at_a_time = disk.claiming.lock().await;
    let same_life = disk.life.replace(prepared.life) == prepared.life;
    if disk.generation.replace(prepared.generation) != prepared.generation || !same_life {
        // Another history, or a journal that lost something: nothing of what was before is under way any more.
        disk.epoch.set(prepared.epoch);
        disk.carrier.replace(prepared.carrier.clone());
        let bodies = disk.order.borrow().as_ref().map_or(0, Order::body_bytes);
        receiver.shared.body_bytes.fetch_sub(bodies, Ordering::Relaxed);
        let replaced = disk.order.borrow().as_ref().map_or_else(|| Order::new(prepared.journaled), |o| o.replaced(prepared.journaled));
        *disk.order.borrow_mut() = Some(replaced);
    }
    disk.order.borrow_mut().get_or_insert_with(|| Order::new(prepared.journaled));
    disk.epoch.set(disk.epoch.get().max(prepared.epoch));
    let judged = claim::judge(disk.epoch.get(), disk.carrier.borrow().as_ref(), epoch, who);
    if judged.map_err(|fenced| StreamError::Fenced(fenced.obeyed))? == Claim::TakesOver {
        let (records, id, carrier) = (receiver.records.clone(), shared.id, who.clone());
        let noted = tokio::task::spawn_blocking(move || records.take_over(id, epoch, &carrier)).await;
        noted.map_err(|e| StreamError::Quic(e.to_string()))??;
        disk.epoch.set(epoch);
        if let Some(before) = disk.carrier.replace(Some(who.clone())).filter(|before| before != who) {
            tracing::warn!(disk = shared.label, epoch, from = %before, to = %who, "another process server has the disk from here on");
        }
    }
    let owner = receiver.new_owner();
    disk.owner.set(owner);
    // Whoever had it looks, and ends.
    disk.journaled.notify_one();
    Ok(owner)
}

/// Where the journal stands when everything that was received is in it: nothing else is received meanwhile.
async fn settled(disk: &IncomingDisk, owner: u64) -> Result<Position, StreamError> {
    loop {
        let (received, journaled) = disk.order.borrow().as_ref().map(Order::positions).unwrap_or_default();
        if let Some(reason) = disk.failed.borrow().clone() {
            return Err(StreamError::Refused { retry: false, message: format!("the journal is closed for writing: {reason}") });
        }
        if disk.owner.get() != owner {
            return Err(StreamError::Superseded);
        }
        if received == journaled {
            return Ok(journaled);
        }
        tokio::time::sleep(SETTLE_LOOK).await;
    }
}

async fn read_open(receive: &mut quinn::RecvStream) -> Result<Open, StreamError> {
    let mut prefix = [0; 4];
    read_exact(receive, &mut prefix).await?;
    let mut body = vec![0; control_len(prefix)?];
    read_exact(receive, &mut body).await?;
    Ok(decode_control(&body)?)
}

async fn read_exact(receive: &mut quinn::RecvStream, buf: &mut [u8]) -> Result<(), StreamError> {
    receive.read_exact(buf).await.map_err(|e| StreamError::Quic(e.to_string()))
}

async fn write_reply(send: &mut quinn::SendStream, reply: &Reply) -> Result<(), StreamError> {
    send.write_all(&encode_control(reply)?).await.map_err(|e| StreamError::Quic(e.to_string()))
}

/// Tells the newest journaled position, once for however many batches, and what is wanted; `wanted` was told.
async fn acknowledge(
    disk: &Rc<IncomingDisk>,
    shared: &DiskShared,
    owner: u64,
    openings: u64,
    mut wanted: Wanted,
    send: &mut quinn::SendStream,
) -> Result<(), StreamError> {
    let mut told = None;
    let mut first = true;
    loop {
        if !std::mem::take(&mut first) {
            tokio::select! {
                () = disk.journaled.notified() => {}
                () = shared.tell.notified() => {}
            }
        }
        if disk.owner.get() != owner {
            // The bell rang for the newer stream.
            disk.journaled.notify_one();
            shared.tell.notify_one();
            return Err(StreamError::Superseded);
        }
        if shared.openings.load(Ordering::Relaxed) != openings {
            return Err(StreamError::Refused { retry: true, message: "the disk has to be opened again".to_owned() });
        }
        if shared.wanted() != wanted {
            wanted = shared.wanted();
            write_reply(send, &Reply::Wanted(wanted)).await?;
        }
        for verdict in shared.take_verdicts() {
            write_reply(send, &Reply::Verdict(verdict)).await?;
        }
        if let Some(reason) = disk.failed.borrow().clone() {
            return Err(StreamError::Refused { retry: false, message: format!("the journal is closed for writing: {reason}") });
        }
        let acknowledged = disk.order.borrow().as_ref().map(Order::acknowledged);
        if let Some(position) = acknowledged.filter(|p| told != Some(*p)) {
            told = Some(position);
            write_reply(send, &Reply::Journaled(position)).await?;
        }
    }
}

struct DiskStream<'a> {
    receiver: &'a Receiver,
    disk: Rc<IncomingDisk>,
    shared: Arc<DiskShared>,
    prepared: Prepared,
    owner: u64,
    /// See [`DiskShared::openings`]: what was told when the stream was opened holds as long as it stays.
    openings: u64,
    opener: Option<Opener>,
}

impl DiskStream<'_> {
    async fn take_items(&mut self, connection: &quinn::Connection, receive: &mut quinn::RecvStream) -> Result<(), StreamError> {
        let mut prefix = [0; PREFIX_LEN];
        loop {
            read_exact(receive, &mut prefix).await?;
            let prefix = Prefix::decode(&prefix)?;
            let len = prefix.len as usize;
            // Room for the record header: the journal writes this very buffer.
            let mut record = AlignedBuf::with_capacity(RECORD_HEADER_LEN + len);
            record.set_len(RECORD_HEADER_LEN + len);
            let body = read_exact(receive, &mut record[RECORD_HEADER_LEN..]);
            tokio::time::timeout(Duration::from_secs(SILENCE_SECONDS), body)
                .await
                .map_err(|_| StreamError::Quic("an item was not completed in time".to_owned()))??;
            if self.disk.owner.get() != self.owner {
                return Err(StreamError::Superseded);
            }
            match prefix.kind {
                ItemType::Report => {
                    let mut report: DiskReport = decode_control(&record[RECORD_HEADER_LEN..])?;
                    if report.generation != self.prepared.generation {
                        // What was compared was another history's.
                        report.unverified_bytes = None;
                    }
                    self.shared.condition().report = Some((report, clock::now()));
                }
                ItemType::Batch => self.take_batch(prefix, record, connection).await?,
            }
        }
    }

    async fn take_batch(&mut self, prefix: Prefix, record: AlignedBuf, connection: &quinn::Connection) -> Result<(), StreamError> {
        let sealed = &record[RECORD_HEADER_LEN..];
        let header = BatchHeader::decode(sealed)?;
        if header.epoch < self.disk.epoch.get() {
            return Err(StreamError::StaleEpoch { found: header.epoch, obeyed: self.disk.epoch.get() });
        }
        let judge = |disk: &IncomingDisk| disk.order.borrow().as_ref().map(|o| o.judge(header.epoch, header.first, header.last));
        if matches!(judge(&self.disk).transpose()?, Some(Verdict::Known) | None) {
            self.disk.journaled.notify_one();
            return Ok(());
        }
        let (header, body) = self.opener().open(sealed)?;
        let entries = parse_entries(&header, &body)?;
        if self.prepared.compare == Compare::Held && !entries.is_empty() {
            return Err(StreamError::Unconfirmed);
        }
        for entry in entries {
            if !entry.extent.fits(self.prepared.size) {
                return Err(StreamError::Outside { offset: entry.extent.offset, len: entry.extent.len, size: self.prepared.size });
            }
        }
        match parse_trailer(&header, &body)? {
            Some(Trailer::Mark(marker)) if marker.machine != self.shared.machine => return Err(StreamError::ForeignMarker),
            Some(Trailer::Digest(digest)) if !digest.extent.fits(self.prepared.size) => {
                return Err(StreamError::Outside { offset: digest.extent.offset, len: digest.extent.len, size: self.prepared.size });
            }
            _ => {}
        }
        // Only what is authentic may raise the epoch.
        let behind = self.disk.order.borrow().as_ref().map(|order| order.positions().0).unwrap_or_default();
        if header.epoch > behind.epoch {
            if !claim::may_raise(self.disk.epoch.get(), header.epoch) {
                return Err(StreamError::StaleEpoch { found: header.epoch, obeyed: self.disk.epoch.get() });
            }
            // Stored before it is obeyed: after a crash the older epoch is refused as well, and where this one begins is known.
            let (records, disk, epoch) = (self.receiver.records.clone(), self.shared.id, header.epoch);
            let stored = tokio::task::spawn_blocking(move || records.begin_epoch(disk, epoch, behind)).await;
            stored.map_err(|e| StreamError::Quic(e.to_string()))??;
            if self.disk.owner.get() != self.owner {
                return Err(StreamError::Superseded);
            }
            self.disk.epoch.set(self.disk.epoch.get().max(header.epoch));
        }
        let share = self.receiver.settings.journal.size_max / 2;
        while self.shared.waiting_bytes() > share {
            // One replica that cannot go on must not fill the journal for all.
            if self.disk.owner.get() != self.owner || connection.close_reason().is_some() {
                return Err(StreamError::Superseded);
            }
            tokio::time::sleep(FULL_WAIT).await;
        }
        let Ok(permit) = self.receiver.pipeline.clone().acquire_owned().await else { return Ok(()) };
        // The journal's slot too is had before the batch counts as received: nothing waits from there on.
        let slot = self.receiver.journal.reserve().await.map_err(|e| StreamError::Quic(e.to_string()))?;
        // Another stream of this disk may have brought it meanwhile.
        if self.disk.owner.get() != self.owner || !matches!(judge(&self.disk).transpose()?, Some(Verdict::Next)) {
            return Ok(());
        }
        let travel = Travel {
            received: clock::now(),
            source: Duration::from_micros(header.age_us),
            gateway: Duration::from_micros(prefix.age_us.saturating_sub(header.age_us)),
            link: connection.rtt() / 2,
        };
        let number = self.queue(header, body, travel)?;
        let tag = Tag { disk: self.shared.id, number, permit };
        slot.send(Append { record, tag });
        Ok(())
    }

    /// Counts a batch as received, unless a failover began: from the moment in which it did nothing new counts.
    fn queue(&self, header: BatchHeader, body: AlignedBuf, travel: Travel) -> Result<u64, StreamError> {
        let opened_again = self.shared.openings.load(Ordering::Relaxed) != self.openings;
        if self.disk.generation.get() != self.prepared.generation {
            return Err(StreamError::Superseded);
        }
        if opened_again {
            return Err(StreamError::Refused { retry: true, message: "the disk has to be opened again".to_owned() });
        }
        let mut condition = self.shared.condition();
        if condition.hold != Hold::None {
            return Err(StreamError::Refused { retry: false, message: condition.hold_reason.clone() });
        }
        let shared = &self.receiver.shared;
        let keep = condition.error.is_none() && shared.body_bytes.load(Ordering::Relaxed) < self.receiver.settings.apply.memory_max;
        if keep {
            shared.body_bytes.fetch_add(body.len() as u64, Ordering::Relaxed);
        }
        let (first, end, marked) = (header.first, header.end(), header.marker_len > 0);
        let mut order = self.disk.order.borrow_mut();
        let order = order.as_mut().expect("made when the stream was opened");
        let number = order.received(end, || Item {
            first,
            end,
            location: Location::nowhere(),
            marked,
            body_len: body.len() as u32,
            body: keep.then_some((header, body)),
            travel: Some(travel),
        });
        condition.received = order.positions().0;
        Ok(number)
    }

    fn opener(&mut self) -> &mut Opener {
        let prepared = &self.prepared;
        let disk = self.shared.id;
        self.opener.get_or_insert_with(|| Opener::new(prepared.key.clone(), Purpose::Stream, disk, prepared.generation))
    }
}
