//! Opens batches that have to be read back from the journal: several at once, and those of the next checkpoint while one is
//! applied. Nothing is changed by it: what cannot be opened ahead is opened again when its turn comes, for its error.

use std::sync::atomic::Ordering;

use futures_util::StreamExt;
use futures_util::future::try_join_all;

use super::Apply;
use super::checkpoint::ApplyError;
use super::replica::Replica;
use crate::crypto::seal::{Opener, Purpose};
use crate::master_target::shared::{Item, Opened};
use crate::storage::log::Location;
use crate::storage::log::format::RECORD_HEADER_LEN;

/// Batches that are read at once, and opened by one visit to another thread, which costs as much as to open a small one.
const GROUP: usize = 8;
/// Such groups under way.
const GROUPS: usize = 3;

/// Reads and opens batches; `put` is given each, by its number in `places`, until one fails.
async fn open(apply: &Apply, replica: &Replica, places: &[Location], mut put: impl FnMut(usize, Opened) -> bool) -> Result<(), ApplyError> {
    let groups = places.chunks(GROUP).map(|places| async move {
        let sealed = try_join_all(places.iter().map(|place| apply.journal.read(*place))).await?;
        let opener = Opener::new(replica.key.clone(), Purpose::Stream, replica.shared.id, replica.generation);
        let opened = tokio::task::spawn_blocking(move || {
            sealed.iter().map(|record| opener.open(&record[RECORD_HEADER_LEN..])).collect::<Result<Vec<Opened>, _>>()
        });
        Ok::<_, ApplyError>(opened.await.map_err(|e| std::io::Error::other(e.to_string()))??)
    });
    let mut groups = futures_util::stream::iter(groups).buffered(GROUPS);
    let mut number = 0;
    while let Some(group) = groups.next().await {
        for opened in group? {
            if !put(number, opened) {
                return Ok(());
            }
            number += 1;
        }
    }
    Ok(())
}

/// Opens those of `items` that are not in memory.
///
/// # Errors
/// [`ApplyError`].
pub async fn open_bodies(apply: &Apply, replica: &Replica, items: &mut [Item]) -> Result<(), ApplyError> {
    let (numbers, places): (Vec<usize>, Vec<Location>) =
        items.iter().enumerate().filter(|(_, item)| item.body.is_none()).map(|(number, item)| (number, item.location)).unzip();
    open(apply, replica, &places, |number, opened| {
        apply.shared.body_bytes.fetch_add(opened.1.len() as u64, Ordering::Relaxed);
        items[numbers[number]].body = Some(opened);
        true
    })
    .await
}

/// Opens what waits within the next `bytes`, as far as half of the memory for bodies reaches: the rest is for what arrives, which
/// need not be read back then.
pub async fn open_waiting(apply: &Apply, replica: &Replica, bytes: u64) {
    let places = replica.shared.unopened(bytes);
    let has_room = || apply.shared.body_bytes.load(Ordering::Relaxed) < apply.settings.apply.memory_max / 2;
    if places.is_empty() || !has_room() {
        return;
    }
    // An error is met again when it is their turn.
    let _ = open(apply, replica, &places, |number, opened| {
        let len = opened.1.len() as u64;
        if replica.shared.give_body(places[number], opened) {
            apply.shared.body_bytes.fetch_add(len, Ordering::Relaxed);
        }
        has_room()
    })
    .await;
}
