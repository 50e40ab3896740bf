//! Compares the replica with a digest of the source, at the digest's place in the stream: everything before it is written,
//! nothing after it. What is found goes to the agent, which sends what differs; nothing is changed here.

use super::checkpoint::ApplyError;
use super::replica::Replica;
use crate::disk::Disk;
use crate::model::{Digest, Position, Verdict};
use crate::storage::digest::{hash_blocks, hash_zeroes};

/// Compares and tells.
///
/// # Errors
/// [`ApplyError::Replica`]; the replica cannot be read.
pub async fn answer(replica: &Replica, at: Position, digest: &Digest) -> Result<(), ApplyError> {
    let extent = digest.extent;
    // Checked when it was received; a replica never shrinks.
    let data = replica.image.next_data(extent.offset)?.filter(|d| d.offset < extent.end());
    let ours = match data {
        None => hash_zeroes(extent.len),
        Some(_) => {
            let content = replica.image.read(extent).await?;
            // Off the thread that does I/O.
            let hashed = tokio::task::spawn_blocking(move || hash_blocks(&content)).await;
            hashed.map_err(|e| std::io::Error::other(e.to_string()))?
        }
    };
    replica.shared.add_verdict(Verdict { at, extent, differs: digest.differs(&ours) });
    Ok(())
}
