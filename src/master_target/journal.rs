//! The journal: a [`crate::storage::log`] of sealed batches that are acknowledged and not yet in their replicas.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use tokio::sync::{OwnedSemaphorePermit, mpsc};
use uuid::Uuid;

use super::shared::Item;
use crate::config::master_target::Journal;
use crate::model::{DiskId, Position};
use crate::observe::metrics;
use crate::storage::log::service::{self, Appended, LogHandle, Setup};
use crate::storage::log::{Location, LogError, Options, Recovered};
use crate::wire::batch::{BATCH_BYTES_MAX, BatchHeader};

/// Groups of results that may wait for the network thread.
const COMPLETIONS_QUEUED_MAX: usize = 64;

/// What comes back with a journaled batch.
pub struct Tag {
    /// Whose.
    pub disk: DiskId,
    /// Its number in the disk's pipeline.
    pub number: u64,
    /// Its place in the pipeline, free for another batch when this is dropped.
    pub permit: OwnedSemaphorePermit,
}

/// The way to the journal.
pub type JournalHandle = LogHandle<Tag>;
/// Results of the journal.
pub type Completions = mpsc::Receiver<Vec<Appended<Tag>>>;

/// Opens the journal in `state`.
///
/// # Errors
/// See [`crate::storage::log::Log::open`].
pub fn open(state: &Path, id: Uuid, settings: &Journal) -> Result<(JournalHandle, Completions, Vec<Recovered>), LogError> {
    let (results, completions) = mpsc::channel(COMPLETIONS_QUEUED_MAX);
    let options = Options {
        segment_bytes: settings.segment,
        segments_max: (settings.size_max / settings.segment) as usize,
        body_bytes_max: BATCH_BYTES_MAX,
    };
    let observe_commit = |took| metrics::observe(metrics::JOURNAL_COMMIT, took);
    let setup = Setup { name: "journal", dir: state.join("journal"), id, options, completions: results, observe_commit };
    let (handle, recovered, _) = service::spawn(setup)?;
    Ok((handle, completions, recovered))
}

/// What a restart finds, by disk and generation.
pub type Found = HashMap<(DiskId, u64), Vec<Item>>;

/// Sorts what was found by disk. The second part are records that are no batches.
pub fn sort(recovered: Vec<Recovered>) -> (Found, Vec<Location>) {
    let mut found: Found = HashMap::new();
    let mut unneeded = Vec::new();
    for record in recovered {
        match BatchHeader::decode(&record.head) {
            Ok(header) => {
                let item = Item::recovered(&header, record.location);
                found.entry((header.disk, header.generation)).or_default().push(item);
            }
            Err(_) => unneeded.push(record.location),
        }
    }
    (found, unneeded)
}

/// What the journal holds of one disk.
#[derive(Default)]
pub struct Replayed {
    /// The batches that continue the checkpoint without a gap, in order.
    pub queue: Vec<Item>,
    /// The others.
    pub unneeded: Vec<Location>,
    /// How many of these lie behind a gap: what stood there was acknowledged, and is gone.
    pub cut_off: usize,
    /// The highest position of all: as far as a checkpoint that was cut off may have come.
    pub reached: Position,
}

/// Puts in order what was found of one disk. `begins` says behind which position each epoch begins: what an older epoch has
/// behind that was given up when it began.
pub fn replay(checkpoint: Position, begins: &BTreeMap<u64, Position>, mut found: Vec<Item>) -> Replayed {
    found.sort_by_key(|item| (item.end.epoch, item.first, item.end.sequence));
    let mut at = checkpoint;
    let reached = found.iter().map(|item| item.end).max().unwrap_or_default().max(checkpoint);
    let mut replayed = Replayed { reached, ..Replayed::default() };
    for item in found {
        let given_up = begins.iter().any(|(epoch, behind)| *epoch > item.end.epoch && item.end > *behind);
        let begins = begins.get(&item.end.epoch).filter(|_| item.end.epoch > at.epoch);
        let follows = at.accepts(item.end.epoch, item.first) && begins.is_none_or(|begins| at >= *begins);
        if item.end > at && follows && !given_up {
            at = item.end;
            replayed.queue.push(item);
        } else {
            replayed.cut_off += usize::from(item.end > at && !given_up);
            replayed.unneeded.push(item.location);
        }
    }
    replayed
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::log::Location;

    fn item(epoch: u64, first: u64, last: u64) -> Item {
        Item { first, end: Position::new(epoch, last), location: Location::nowhere(), marked: false, body_len: 0, body: None, travel: None }
    }

    #[test]
    fn a_batch_that_is_gone_from_the_end_of_an_epoch_is_missed() {
        let begins = BTreeMap::from([(6, Position::new(5, 9))]);
        let ends = |found: Vec<Item>| replay(Position::new(5, 4), &begins, found).queue.iter().map(|i| i.end).collect::<Vec<_>>();
        let whole = || vec![item(5, 5, 6), item(5, 7, 9), item(6, 1, 3)];
        assert_eq!(ends(whole()), [Position::new(5, 6), Position::new(5, 9), Position::new(6, 3)]);
        let mut gone = whole();
        gone.remove(1);
        assert_eq!(ends(gone), [Position::new(5, 6)], "the next epoch begins at 1 as always, and yet something is missing");
    }

    #[test]
    fn what_an_epoch_was_begun_without_stays_given_up() {
        // Number 5 of epoch 7 was lost; 8 began behind what was left, and its agent sent again what came after that.
        let begins = BTreeMap::from([(8, Position::new(7, 2))]);
        let found = vec![item(7, 3, 4), item(7, 6, 9), item(8, 1, 5)];
        let replayed = replay(Position::new(7, 2), &begins, found);
        assert_eq!(replayed.queue.iter().map(|i| i.end).collect::<Vec<_>>(), [Position::new(8, 5)]);
        assert_eq!((replayed.unneeded.len(), replayed.cut_off), (2, 0));
        let replayed = replay(Position::new(7, 2), &BTreeMap::new(), vec![item(7, 3, 4), item(7, 6, 9)]);
        assert_eq!((replayed.queue.len(), replayed.cut_off), (1, 1), "nothing has begun since: what continues counts");
        assert_eq!(replayed.reached, Position::new(7, 9), "what is cut off may be in the replica");
    }
}
