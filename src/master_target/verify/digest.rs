//! The digest of a disk's content, whatever way it is stored. Pure.
//!
//! BLAKE3 over, for each 64 KiB block that is not all zeroes, in order: offset u64, length u64, content; then the size of the
//! disk u64. Numbers are little-endian; the last block is as long as the disk says.

/// Bytes that are looked at together.
const BLOCK: usize = 64 << 10;

/// Takes content in order; what is left out is zeroes.
pub struct Digester {
    hasher: blake3::Hasher,
    size: u64,
    /// Number of the block that is being filled.
    number: u64,
    block: Vec<u8>,
    /// The block holds something else than zeroes.
    filled: bool,
}

impl Digester {
    /// For a disk of `size` bytes.
    pub fn new(size: u64) -> Self {
        Self { hasher: blake3::Hasher::new(), size, number: 0, block: vec![0; BLOCK], filled: false }
    }

    /// Takes `data` at `offset`, which lies behind all that was taken before and within the disk.
    pub fn take(&mut self, mut offset: u64, mut data: &[u8]) {
        while !data.is_empty() {
            let number = offset / BLOCK as u64;
            if number != self.number {
                self.flush();
                self.number = number;
            }
            let at = (offset % BLOCK as u64) as usize;
            let (part, rest) = data.split_at(data.len().min(BLOCK - at));
            if part.iter().any(|&b| b != 0) {
                self.block[at..at + part.len()].copy_from_slice(part);
                self.filled = true;
            }
            (offset, data) = (offset + part.len() as u64, rest);
        }
    }

    fn flush(&mut self) {
        if self.filled {
            let offset = self.number * BLOCK as u64;
            let len = self.size.saturating_sub(offset).min(BLOCK as u64);
            self.hasher.update(&offset.to_le_bytes());
            self.hasher.update(&len.to_le_bytes());
            self.hasher.update(&self.block[..len as usize]);
            self.block.fill(0);
            self.filled = false;
        }
    }

    /// The digest of the disk.
    pub fn finish(mut self) -> [u8; 32] {
        self.flush();
        self.hasher.update(&self.size.to_le_bytes());
        *self.hasher.finalize().as_bytes()
    }
}

/// As people read it.
pub fn show(digest: &[u8; 32]) -> String {
    digest.iter().map(|b| format!("{b:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn whole(content: &[u8]) -> [u8; 32] {
        let mut digester = Digester::new(content.len() as u64);
        digester.take(0, content);
        digester.finish()
    }

    proptest! {
        #[test]
        fn the_digest_does_not_depend_on_how_content_is_cut_or_which_zeroes_are_told(
            writes in proptest::collection::vec((0usize..500, 1usize..300, 0u8..3), 0..6),
            cuts in proptest::collection::vec((1usize..400, any::<bool>()), 1..20),
            changed in any::<prop::sample::Index>(),
        ) {
            let mut content = vec![0u8; 512 * 512];
            for (at, len, value) in writes {
                let (from, to) = (at * 512, ((at + len) * 512).min(content.len()));
                content[from..to].fill(value);
            }
            let expected = whole(&content);
            let mut digester = Digester::new(content.len() as u64);
            let mut at = 0;
            for (sectors, skip) in cuts.into_iter().cycle() {
                let part = &content[at..(at + sectors * 512).min(content.len())];
                if !skip || part.iter().any(|&b| b != 0) {
                    digester.take(at as u64, part);
                }
                at += part.len();
                if at == content.len() {
                    break;
                }
            }
            prop_assert_eq!(digester.finish(), expected);
            let at = changed.index(content.len());
            content[at] ^= 1;
            prop_assert_ne!(whole(&content), expected);
        }
    }

    #[test]
    fn content_at_another_place_and_another_size_have_other_digests() {
        let mut content = vec![0; 3 * BLOCK];
        content[..512].fill(7);
        let first = whole(&content);
        content.copy_within(..512, BLOCK);
        content[..512].fill(0);
        assert_ne!(whole(&content), first);
        assert_ne!(whole(&[0; 512]), whole(&[0; 1024]));
        assert_eq!(show(&whole(&[])), show(blake3::hash(&0u64.to_le_bytes()).as_bytes()));
    }
}
