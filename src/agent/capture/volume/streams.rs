//! Epochs of a disk's stream: when it moves to another process server, when it starts anew, and what the map has to say of it.

use std::io;

use super::Volume;
use crate::model::position::EPOCH_STEP_MAX;
use crate::model::{Name, Position, RegionSet, Reliance};
use crate::observe::metrics;

/// What is sent in a stream that starts anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::agent::capture) enum Restart {
    /// What the map marks, which is everything that is not safe.
    Marked,
    /// All of the disk, as far as the replica differs: it does not have what it had.
    Everything,
    /// The same, to a replica with this history.
    History(u64),
}

impl Volume {
    /// The disk is about to be opened at `carrier`. An epoch belongs to one process server: if another one has it, or knows a
    /// higher one, the stream moves. Answers what the replica is relied on to have, because regions were marked clean since.
    ///
    /// # Errors
    /// Those of the map's file; nothing was changed then.
    pub(in crate::agent::capture) async fn carry(&self, carrier: Name, above: Option<u64>) -> io::Result<Reliance> {
        let _alone = self.changing.lock().await;
        let stays = above.is_none() && self.carrier.borrow().as_ref().is_none_or(|known| *known == carrier);
        if above.is_some_and(|above| above > self.map.header().epoch.saturating_add(EPOCH_STEP_MAX)) {
            return Err(io::Error::other("the process server names an epoch that nobody can have come to"));
        }
        if !stays {
            self.map.update_header(|h| h.epoch = h.epoch.max(above.unwrap_or(0)) + 1).await?;
            let epoch = self.map.header().epoch;
            self.shared.backlog().begin_move(epoch);
            // What is asked of the replica is asked again there.
            self.scrub.borrow_mut().restart();
            self.compared_epoch.set(epoch);
            tracing::info!(disk = self.shared.label, epoch, process_server = %carrier, "the stream moves");
            self.carrier.replace(Some(carrier));
        }
        let header = self.map.header();
        Ok(Reliance { generation: header.generation, through: header.cleaned })
    }

    /// A process server takes the disk: its epoch belongs to it from now on. One that was asked and took nothing does not have it, so
    /// that another one needs not be asked in a new epoch, of which only the master target could say where it begins.
    pub(in crate::agent::capture) fn opened_at(&self, carrier: Name) {
        self.carrier.replace(Some(carrier));
    }

    /// Whether the replica has everything because of which regions were marked clean. A replica that stands before that lost
    /// what it had, whatever it says: all of it is compared then.
    ///
    /// # Errors
    /// Those of the map's file.
    pub(in crate::agent::capture) async fn check_stands(&self, stands: Position) -> io::Result<bool> {
        // An epoch that this agent never had: the disk was sent by another life of it, of which its map knows nothing.
        let own = self.shared.backlog().epoch();
        if stands.epoch > own {
            tracing::error!(disk = self.shared.label, replica = %stands, epoch = own, "the replica has changes of this disk that did not come from here: was this machine or its state put back from a snapshot, or do two agents protect it? All of the disk is compared with the replica, and what differs is sent");
            self.restart_stream(Restart::Everything, "another life of the disk was sent").await?;
            return Ok(false);
        }
        if stands >= self.map.header().cleaned {
            return Ok(true);
        }
        tracing::error!(
            disk = self.shared.label,
            replica = %stands,
            acknowledged = %self.map.header().cleaned,
            "the master target does not have what it acknowledged: was it restored from a backup, or does its storage ignore flushes? All of the disk is compared with the replica, and what differs is sent"
        );
        self.restart_stream(Restart::Everything, "the replica lost what it had").await?;
        Ok(false)
    }

    /// The master target's position, before regions are marked clean because of it.
    ///
    /// # Errors
    /// Those of the map's file.
    pub(super) async fn note_cleaned(&self) -> io::Result<()> {
        let safe = self.shared.backlog().safe_position();
        if safe > self.map.header().cleaned { self.map.update_header(|h| h.cleaned = h.cleaned.max(safe)).await } else { Ok(()) }
    }

    /// Starts a new epoch, because the stream cannot go on. What the map marks is missing from then on, and it marks everything
    /// that is not safe.
    ///
    /// # Errors
    /// Those of the map's file; the old stream then stays as it is.
    pub(in crate::agent::capture) async fn restart_stream(&self, restart: Restart, reason: &'static str) -> io::Result<u64> {
        let _alone = self.changing.lock().await;
        self.restarting.set(true);
        let result = self.restart_marked(restart, reason).await;
        self.restarting.set(false);
        result
    }

    async fn restart_marked(&self, restart: Restart, reason: &'static str) -> io::Result<u64> {
        if restart != Restart::Marked {
            self.map.mark_all().await?;
        }
        self.map
            .update_header(|h| {
                h.epoch += 1;
                if restart != Restart::Marked {
                    h.cleaned = Position::default();
                }
                if let Restart::History(generation) = restart {
                    h.generation = generation;
                    h.initial = true;
                }
            })
            .await?;
        let epoch = self.map.header().epoch;
        // No await from here on: a write captured between these steps would be in neither.
        self.shared.backlog().restart(epoch, restart != Restart::Marked);
        // A new replica holds nothing, whatever the map says.
        let marked = self.map.marked();
        let missing = if restart == Restart::Marked { marked } else { RegionSet::full(marked.regions()) };
        self.comparison.borrow_mut().restart();
        self.scrub.borrow_mut().restart();
        if self.regions.borrow_mut().restart(&missing) {
            metrics::disk_count(metrics::RESYNCS, &self.shared.label, 1);
        }
        tracing::info!(disk = self.shared.label, epoch, reason, missing_bytes = self.missing_bytes(), "a new epoch of the stream begins");
        Ok(epoch)
    }
}
