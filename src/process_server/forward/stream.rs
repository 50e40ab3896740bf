//! One disk's QUIC stream: opens where the master target stands, sends what is cached, takes acknowledgements.

use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use thiserror::Error;

use crate::clock::{self, micros};
use crate::crypto::keyring::DataKey;
use crate::crypto::seal::{Purpose, SealingSession};
use crate::model::Compare;
use crate::observe::metrics;
use crate::process_server::adoption::{Adoption, Here, Known, There, judge};
use crate::process_server::catalogue::DiskRecord;
use crate::process_server::disk::{Disk, NotReady};
use crate::process_server::server::Server;
use crate::process_server::stream::Queued;
use crate::storage::catalogue::CatalogueError;
use crate::storage::log::LogError;
use crate::storage::log::format::RECORD_HEADER_LEN;
use crate::wire::forward::{ItemType, Open, Prefix, Reply};
use crate::wire::{PROTOCOL, WireError, control_len, decode_control, encode_control};

/// After a refusal that somebody has to act on.
const REFUSED_WAIT: Duration = Duration::from_secs(5);
/// After an epoch that is not obeyed.
const FENCED_WAIT: Duration = Duration::from_millis(100);
/// After any other failure.
const RETRY_WAIT: Duration = Duration::from_millis(500);

#[derive(Debug, Error)]
enum StreamError {
    #[error("{0}")]
    Quic(String),
    #[error(transparent)]
    Wire(#[from] WireError),
    #[error("{message}")]
    Refused { retry: bool, message: String },
    #[error("the disk is at another process server, in epoch {0}: nothing of it is taken from here any more")]
    Fenced(u64),
    #[error(transparent)]
    Catalogue(#[from] CatalogueError),
    #[error(transparent)]
    Cache(#[from] LogError),
}

/// However a stream ends, also with its task: nobody knows what its master target wants from then on, nor where it stands.
struct Forget<'a>(&'a Disk);

impl Drop for Forget<'_> {
    fn drop(&mut self) {
        self.0.wanted.set(None);
        self.0.told.set(false);
    }
}

/// Runs until the connection ends.
pub(super) async fn run(server: Rc<Server>, disk: Rc<Disk>, connection: quinn::Connection) {
    let mut told = String::new();
    loop {
        // A disk that nobody ever opened has nothing to send and no size to tell; one that is in other hands neither.
        while disk.record.borrow().is_none() && disk.size.get() == 0 || is_fenced(&disk) {
            disk.forward.notified().await;
        }
        let ended = {
            let _forget = Forget(&disk);
            session(&server, &disk, &connection).await
        };
        let Err(error) = ended else { continue };
        if connection.close_reason().is_some() {
            return;
        }
        let message = error.to_string();
        if message != told {
            tracing::warn!(disk = %disk.label, error = message, "the disk's stream to the master target ended");
            told.clone_from(&message);
        }
        let wait = match error {
            StreamError::Fenced(obeyed) => {
                metrics::count_reason(metrics::REFUSED, "fenced");
                disk.foreign.set(disk.foreign.get().max(obeyed));
                // Whoever sends now must open the disk again and learn that.
                disk.owner.set(server.new_owner());
                disk.claim.set(disk.claim.get().filter(|claim| *claim > obeyed));
                disk.tell_agent();
                // Whatever is asked next: not at once, and not for ever as fast as it goes.
                FENCED_WAIT
            }
            StreamError::Refused { retry: false, message } => {
                metrics::count_reason(metrics::REFUSED, "master-target");
                *disk.not_ready.borrow_mut() = Some(NotReady::Refused(message));
                disk.tell_agent();
                REFUSED_WAIT
            }
            _ => RETRY_WAIT,
        };
        let _ = tokio::time::timeout(wait, disk.forward.notified()).await;
    }
}

/// Whether all that could be sent belongs to epochs that are over. What is cached of them is given up: its agent has it still, or
/// its dirty map.
fn is_fenced(disk: &Disk) -> bool {
    let foreign = disk.foreign.get();
    let gone = disk.stream.borrow_mut().drop_epochs_before(foreign + 1);
    if !gone.is_empty() {
        tracing::warn!(disk = %disk.label, batches = gone.len(), epoch = foreign, "what was cached is at the master target by another process server, or its agent sends it again: it is dropped here");
    }
    disk.give_up(gone);
    disk.epoch_to_ask() <= foreign && foreign > 0
}

/// One opening of the stream. Ends without an error when it should be opened again at once.
async fn session(server: &Server, disk: &Disk, connection: &quinn::Connection) -> Result<(), StreamError> {
    let quic = |e: &dyn std::fmt::Display| StreamError::Quic(e.to_string());
    let (mut send, mut receive) = connection.open_bi().await.map_err(|e| quic(&e))?;
    let (size, epoch, claim) = (disk.size.get(), disk.epoch_to_ask(), disk.claim.get());
    let open = encode_control(&Open { protocol: PROTOCOL, disk: disk.id, size, epoch })?;
    send.write_all(&open).await.map_err(|e| quic(&e))?;
    match read_reply(&mut receive).await? {
        Reply::Opened { generation, epoch, journaled, data_key, compare, wanted } => {
            let there = There { generation, epoch, journaled };
            adopt(server, disk, &Told { there, claim, size, compare, key: DataKey::from_bytes(data_key) }).await?;
            disk.wanted.set(Some(wanted));
            disk.tell_agent();
        }
        Reply::Refused { retry, message } => return Err(StreamError::Refused { retry, message }),
        Reply::Fenced { obeyed } => return Err(StreamError::Fenced(obeyed)),
        _ => return Err(WireError::Illegal("first reply of the master target").into()),
    }
    tokio::select! {
        result = send_items(server, disk, &mut send, size) => result,
        result = take_replies(disk, &mut receive) => result,
    }
}

/// What the master target says of a replica.
struct Told {
    there: There,
    /// The epoch in which a stream from elsewhere is to go on, if that was asked.
    claim: Option<u64>,
    /// Bytes it was asked for and has room for now; 0 if it was not asked.
    size: u64,
    compare: Compare,
    key: DataKey,
}

/// Takes over what the master target says about the disk's history and position.
async fn adopt(server: &Server, disk: &Disk, told: &Told) -> Result<(), StreamError> {
    let known = disk.record.borrow().as_ref().map(|r| Known { generation: r.generation, epoch: r.epoch });
    let here = {
        let stream = disk.stream.borrow();
        let follows = stream.follows(told.there.journaled, told.there.epoch);
        Here { accepted: stream.accepted(), acknowledged: stream.acknowledged(), follows }
    };
    match judge(known, here, told.there, told.claim) {
        Adoption::GoesOn => go_on(server, disk, told).await?,
        Adoption::TakenOver => {
            begin(server, disk, told, told.there.epoch).await?;
            disk.claimed.set(Some((told.there.epoch, told.there.journaled)));
            disk.claim.set(disk.claim.get().filter(|wanted| Some(*wanted) != told.claim));
            tracing::info!(disk = %disk.label, epoch = told.there.epoch, stands = %told.there.journaled, "the stream goes on here");
        }
        Adoption::Anew { epoch } => {
            if known.is_some() {
                tracing::warn!(
                    disk = %disk.label, generation = told.there.generation, epoch, journaled = %told.there.journaled,
                    "the replica has a history that did not pass here: what was cached is dropped, the agent begins a new epoch"
                );
            }
            begin(server, disk, told, epoch).await?;
        }
    }
    disk.told.set(true);
    *disk.not_ready.borrow_mut() = None;
    disk.tell_agent();
    Ok(())
}

async fn go_on(server: &Server, disk: &Disk, told: &Told) -> Result<(), StreamError> {
    let known = disk.record.borrow().clone();
    if let Some(mut record) = known.filter(|r| r.size < told.size) {
        // Durable before anything behind the old end is accepted: it can then be forwarded whatever happens here.
        record.size = told.size;
        let (records, update) = (server.records.clone(), [(disk.id, record)]);
        let stored = tokio::task::spawn_blocking(move || records.merge(&update)).await;
        stored.map_err(|e| StreamError::Quic(e.to_string()))??;
        if let Some(record) = disk.record.borrow_mut().as_mut() {
            record.size = record.size.max(told.size);
        }
    }
    let known = disk.record.borrow().clone();
    if let Some(mut record) = known.filter(|r| r.compare != told.compare) {
        record.compare = told.compare;
        let (records, id) = (server.records.clone(), disk.id);
        let stored = tokio::task::spawn_blocking(move || records.set_compare(id, &record)).await;
        stored.map_err(|e| StreamError::Quic(e.to_string()))??;
        if let Some(record) = disk.record.borrow_mut().as_mut() {
            record.compare = told.compare;
        }
        // The agent learns it when it opens the disk again.
        disk.owner.set(server.new_owner());
    }
    let gone = disk.stream.borrow_mut().link_opened(told.there.journaled);
    disk.give_up(gone);
    Ok(())
}

/// Begins with nothing, where the master target stands.
async fn begin(server: &Server, disk: &Disk, told: &Told, epoch: u64) -> Result<(), StreamError> {
    let there = &told.there;
    let record = DiskRecord {
        generation: there.generation,
        wrapped_key: server.kek.wrap(&told.key, disk.id, there.generation),
        epoch,
        begun: epoch,
        relied: BTreeMap::new(),
        released: there.journaled,
        size: told.size,
        compare: told.compare,
    };
    let (records, update) = (server.records.clone(), [(disk.id, record.clone())]);
    let stored = tokio::task::spawn_blocking(move || records.put(&update)).await;
    stored.map_err(|e| StreamError::Quic(e.to_string()))??;
    disk.record.replace(Some(record));
    let session = SealingSession::start(&told.key, Purpose::Stream, disk.id, there.generation);
    *disk.session.borrow_mut() = Some(Arc::new(session));
    disk.batcher.borrow_mut().close();
    // Whoever sends now must open the disk again and learn generation and epoch.
    disk.owner.set(server.new_owner());
    let gone = disk.stream.borrow_mut().reset(there.journaled);
    disk.give_up(gone);
    Ok(())
}

async fn send_items(server: &Server, disk: &Disk, send: &mut quinn::SendStream, size: u64) -> Result<(), StreamError> {
    let quic = |e: quinn::WriteError| StreamError::Quic(e.to_string());
    loop {
        if disk.size.get() != size || disk.claim.get().is_some() {
            return Ok(());
        }
        if disk.report_fresh.replace(false) {
            let body = postcard::to_stdvec(&*disk.report.borrow()).map_err(|_| WireError::Illegal("report"))?;
            let prefix = Prefix { kind: ItemType::Report, len: body.len() as u32, age_us: 0 };
            send.write_all(&[&prefix.encode()[..], &body].concat()).await.map_err(quic)?;
        }
        let Some((batch, sealed)) = disk.next_to_forward() else {
            disk.forward.notified().await;
            continue;
        };
        let sealed = match sealed {
            Some(sealed) => sealed,
            None => match server.cache.read(batch.location).await {
                Ok(record) => record.slice(RECORD_HEADER_LEN..),
                Err(error) if error.is_lost() => return lose_cached(server, disk, &batch, &error),
                Err(error) => return Err(error.into()),
            },
        };
        let age_us = micros(clock::now().since(batch.captured));
        let prefix = Prefix { kind: ItemType::Batch, len: sealed.len() as u32, age_us };
        metrics::disk_count(metrics::FORWARDED_BYTES, &disk.label, sealed.len() as u64);
        // From here on the master target may have it, and may acknowledge it before the write returns.
        if disk.stream.borrow_mut().forwarded(batch.end) {
            metrics::disk_count(metrics::RESENT_BATCHES, &disk.label, 1);
        }
        send.write_all_chunks(&mut [Bytes::copy_from_slice(&prefix.encode()), sealed]).await.map_err(quic)?;
    }
}

/// A batch rotted in the cache: it is never sent, nor what follows it. The agent has both still, or its dirty map; it opens the
/// disk again, behind what the master target has.
fn lose_cached(server: &Server, disk: &Disk, batch: &Queued, error: &LogError) -> Result<(), StreamError> {
    let stands = disk.stream.borrow().acknowledged();
    metrics::count_reason(metrics::DAMAGED, "cache");
    tracing::error!(disk = %disk.label, batch = %batch.end, %error, stands = %stands, "a batch in the cache is damaged: the agent sends again what the master target does not have. Check the storage of the cache");
    disk.batcher.borrow_mut().close();
    disk.owner.set(server.new_owner());
    let gone = disk.stream.borrow_mut().reset(stands);
    disk.give_up(gone);
    disk.tell_agent();
    Ok(())
}

async fn take_replies(disk: &Disk, receive: &mut quinn::RecvStream) -> Result<(), StreamError> {
    loop {
        match read_reply(receive).await? {
            Reply::Journaled(position) => {
                let gone = disk.stream.borrow_mut().acknowledged_through(position);
                disk.give_up(gone);
            }
            Reply::Wanted(wanted) => {
                disk.wanted.set(Some(wanted));
                disk.tell_agent();
            }
            Reply::Verdict(verdict) => disk.add_verdict(verdict),
            Reply::Fenced { obeyed } => return Err(StreamError::Fenced(obeyed)),
            Reply::Refused { retry, message } => return Err(StreamError::Refused { retry, message }),
            Reply::Opened { .. } => return Err(WireError::Illegal("second opening").into()),
        }
    }
}

async fn read_reply(receive: &mut quinn::RecvStream) -> Result<Reply, StreamError> {
    let quic = |e: quinn::ReadExactError| StreamError::Quic(e.to_string());
    let mut prefix = [0; 4];
    receive.read_exact(&mut prefix).await.map_err(quic)?;
    let mut body = vec![0; control_len(prefix)?];
    receive.read_exact(&mut body).await.map_err(quic)?;
    Ok(decode_control(&body)?)
}
