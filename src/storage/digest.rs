//! Hashes of blocks, as [`crate::model::Digest`] carries them.

use std::sync::OnceLock;

use crate::model::digest::DIGEST_BLOCK;

/// The hash of each block of `data`; the last may be short.
pub fn hash_blocks(data: &[u8]) -> Vec<[u8; 32]> {
    data.chunks(DIGEST_BLOCK as usize).map(|block| *blake3::hash(block).as_bytes()).collect()
}

/// The hashes of `len` zeroes.
pub fn hash_zeroes(len: u64) -> Vec<[u8; 32]> {
    static WHOLE: OnceLock<[u8; 32]> = OnceLock::new();
    let whole = *WHOLE.get_or_init(|| *blake3::hash(&[0; DIGEST_BLOCK as usize]).as_bytes());
    let mut hashes = vec![whole; (len / DIGEST_BLOCK) as usize];
    let rest = (len % DIGEST_BLOCK) as usize;
    if rest > 0 {
        hashes.push(*blake3::hash(&vec![0; rest]).as_bytes());
    }
    hashes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeroes_hash_as_zeroes_and_a_bit_makes_a_difference() {
        let len = DIGEST_BLOCK * 2 + 512;
        let mut data = vec![0; len as usize];
        assert_eq!(hash_blocks(&data), hash_zeroes(len));
        data[DIGEST_BLOCK as usize] = 1;
        let (ours, zeroes) = (hash_blocks(&data), hash_zeroes(len));
        assert_eq!((ours[0], ours[2]), (zeroes[0], zeroes[2]));
        assert_ne!(ours[1], zeroes[1]);
    }
}
