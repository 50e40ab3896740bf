//! Digests by which source and replica are compared without sending content.

use serde::{Deserialize, Serialize};

use super::{Extent, Position, SECTOR};

/// Bytes of one compared block: what differs is found, and sent, in these. 32 bytes of digest for each are 1/2048 of the disk.
pub const DIGEST_BLOCK: u64 = 64 << 10;
/// Most bytes of one piece of damage that an agent is told to send again.
pub const TOLD_BYTES_MAX: u64 = 1 << 20;
/// Most blocks of one digest.
pub const DIGEST_BLOCKS_MAX: usize = 1024;

/// A BLAKE3 hash of each [`DIGEST_BLOCK`] of an extent, as the source has it at one place in its stream. The last block of a
/// disk may be short.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Digest {
    /// The bytes of the disk.
    pub extent: Extent,
    /// One hash for each block, in order.
    pub hashes: Vec<[u8; 32]>,
    /// Both are thought to be the same: a difference is damage. Otherwise it is asked what has to be sent.
    pub scrub: bool,
}

impl Digest {
    /// Whether the digest respects its bounds. Receivers refuse others.
    pub fn is_sane(&self) -> bool {
        self.extent.fits(i64::MAX as u64)
            && self.extent.offset.is_multiple_of(DIGEST_BLOCK)
            && self.extent.len.is_multiple_of(SECTOR)
            && self.hashes.len() <= DIGEST_BLOCKS_MAX
            && self.hashes.len() as u64 == self.extent.len.div_ceil(DIGEST_BLOCK)
    }

    /// The blocks whose hash is another one here, neighbours joined.
    pub fn differs(&self, ours: &[[u8; 32]]) -> Vec<Extent> {
        let mut found: Vec<Extent> = Vec::new();
        for index in (0..self.hashes.len()).filter(|&index| ours.get(index) != self.hashes.get(index)) {
            let offset = self.extent.offset + index as u64 * DIGEST_BLOCK;
            let len = DIGEST_BLOCK.min(self.extent.end() - offset);
            match found.last_mut() {
                Some(last) if last.end() == offset => last.len += len,
                _ => found.push(Extent::new(offset, len)),
            }
        }
        found
    }
}

/// What the replica says to a digest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdict {
    /// Where the digest stood in the stream.
    pub at: Position,
    /// What was compared.
    pub extent: Extent,
    /// What differs.
    pub differs: Vec<Extent>,
}

/// What ends a batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Trailer {
    /// A point.
    Mark(Box<super::Marker>),
    /// A comparison.
    Digest(Digest),
}

/// Whether a disk is compared with its replica before it is sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Compare {
    /// The replica is empty.
    #[default]
    No,
    /// It holds something: only what differs is sent.
    Yes,
    /// The same, and nothing is sent until somebody at the master target allows it to be overwritten.
    Held,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differing_blocks_are_named_joined_and_the_last_may_be_short() {
        let extent = Extent::new(DIGEST_BLOCK * 4, DIGEST_BLOCK * 3 + 512);
        let digest = Digest { extent, hashes: vec![[1; 32], [2; 32], [3; 32], [4; 32]], scrub: false };
        assert!(digest.is_sane());
        assert_eq!(digest.differs(&digest.hashes.clone()), []);
        assert_eq!(digest.differs(&[[1; 32], [0; 32], [0; 32], [4; 32]]), [Extent::new(DIGEST_BLOCK * 5, DIGEST_BLOCK * 2)]);
        assert_eq!(digest.differs(&[[1; 32], [2; 32], [3; 32]]), [Extent::new(DIGEST_BLOCK * 7, 512)], "what is not there differs");
        assert!(!Digest { hashes: vec![[0; 32]; 3], ..digest.clone() }.is_sane());
        assert!(!Digest { extent: Extent::new(512, DIGEST_BLOCK), hashes: vec![[0; 32]], scrub: false }.is_sane());
        assert!(!Digest { extent: Extent::new(0, u64::MAX), hashes: vec![], scrub: false }.is_sane());
    }
}
