//! The log of a VHDX ([MS-VHDX] 2.3): finds the entries that must be replayed and what they change. Pure.
//!
//! A ring of 4 KiB sectors. An entry: header 64 B (`loge`, crc, length, tail, sequence u64, descriptors, 0, log id 16,
//! flushed file length, last file length), descriptors of 32 B (126 in the first sector, 128 in later ones), then one data
//! sector for each data descriptor. `desc`: trailing 4, leading 8, place u64, sequence u64. `zero`: 0, length u64, place
//! u64, sequence u64. Data sector: `data`, high sequence u32, 4084 bytes, low sequence u32.

use std::collections::HashMap;

use uuid::Uuid;

use super::format::{crc_matches, guid_at, seal_crc, u32_at, u64_at};

/// Unit of the log.
pub const LOG_SECTOR: usize = 4096;
/// Larger logs are not replayed; 1 MiB is what everybody writes.
pub const LOG_LEN_MAX: u32 = 64 << 20;
const ENTRY_HEADER: usize = 64;
const DESCRIPTOR: usize = 32;
/// Entries whose checksum is tried may add up to this many times the log: more is not plausible, and would take for ever.
const WORK_MAX: usize = 16;

/// One change that the log makes to the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// These 4096 bytes.
    Sector {
        /// Where, a multiple of 4096.
        at: u64,
        /// What.
        data: Vec<u8>,
    },
    /// Zeroes.
    Zero {
        /// Where, a multiple of 4096.
        at: u64,
        /// Bytes, a multiple of 4096.
        len: u64,
    },
}

impl Change {
    /// Whether it changes any of these bytes.
    pub fn touches(&self, at: u64, len: u64) -> bool {
        let (start, end) = self.range();
        start < at.saturating_add(len) && at < end
    }

    /// Whether it needs bytes at or after `len`; zeroes do not.
    pub fn is_past(&self, len: u64) -> bool {
        matches!(self, Change::Sector { .. }) && self.range().1 > len
    }

    fn range(&self) -> (u64, u64) {
        match self {
            Change::Sector { at, data } => (*at, at + data.len() as u64),
            Change::Zero { at, len } => (*at, at + len),
        }
    }
}

/// What a log asks for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Replay {
    /// Changes, in order.
    pub changes: Vec<Change>,
    /// The file was at least this long when the newest entry was written; a shorter one was cut.
    pub flushed_len: u64,
    /// The file must be at least this long afterwards.
    pub last_len: u64,
    /// Entries that are replayed.
    pub entries: usize,
}

struct Entry {
    sequence: u64,
    len: usize,
    tail: u64,
    flushed_len: u64,
    last_len: u64,
    changes: Vec<Change>,
}

/// Finds the active sequence of a log and what it changes; `None` if no entry is valid, which is an empty log.
///
/// # Errors
/// What is wrong, for a log whose entries cannot have been written by anybody honest.
pub fn replay(ring: &[u8], log_id: Uuid) -> Result<Option<Replay>, &'static str> {
    if ring.is_empty() || !ring.len().is_multiple_of(LOG_SECTOR) {
        return Err("the log's length is not a multiple of 4096");
    }
    let mut entries = HashMap::new();
    let mut work = 0usize;
    for at in (0..ring.len()).step_by(LOG_SECTOR) {
        if &ring[at..at + 4] != b"loge" {
            continue;
        }
        work += (u32_at(ring, at + 8) as usize).min(ring.len());
        if work > WORK_MAX * ring.len() {
            return Err("the log claims more entries than fit into it");
        }
        if let Some(entry) = parse_entry(ring, at, log_id) {
            entries.insert(at, entry);
        }
    }
    // From each entry follow the run of consecutive sequences. It counts if the last one's tail lies in it.
    let mut best: Option<(u64, Vec<usize>)> = None;
    let mut starts: Vec<usize> = entries.keys().copied().collect();
    starts.sort_unstable_by_key(|at| entries[at].sequence);
    let mut in_a_run = std::collections::HashSet::new();
    for start in starts {
        if in_a_run.contains(&start) {
            continue;
        }
        let (mut run, mut at, mut bytes) = (Vec::new(), start, 0);
        while let Some(entry) = entries.get(&at) {
            let follows = run.last().is_none_or(|last| entries[last].sequence.checked_add(1) == Some(entry.sequence));
            bytes += entry.len;
            if !follows || bytes > ring.len() {
                break;
            }
            run.push(at);
            in_a_run.insert(at);
            at = (at + entry.len) % ring.len();
        }
        let Some(last) = run.last().map(|at| &entries[at]) else { continue };
        let Some(tail) = run.iter().position(|&at| at as u64 == last.tail) else { continue };
        if best.as_ref().is_none_or(|(sequence, _)| last.sequence > *sequence) {
            best = Some((last.sequence, run.split_off(tail)));
        }
    }
    let Some((_, run)) = best else { return Ok(None) };
    let mut found = Replay { entries: run.len(), ..Replay::default() };
    for at in run {
        let entry = entries.remove(&at).ok_or("an entry of the log is in it twice")?;
        found.changes.extend(entry.changes);
        found.flushed_len = entry.flushed_len;
        found.last_len = found.last_len.max(entry.last_len);
    }
    Ok(Some(found))
}

/// A whole, untorn entry of this log, or `None`.
fn parse_entry(ring: &[u8], at: usize, log_id: Uuid) -> Option<Entry> {
    let head = &ring[at..at + LOG_SECTOR];
    let len = u32_at(head, 8) as usize;
    let count = u32_at(head, 24) as usize;
    let (sequence, tail) = (u64_at(head, 16), u64::from(u32_at(head, 12)));
    let legal = len >= LOG_SECTOR && len.is_multiple_of(LOG_SECTOR) && len <= ring.len() && sequence > 0 && guid_at(head, 32) == log_id;
    let descriptors_len = ENTRY_HEADER.checked_add(count.checked_mul(DESCRIPTOR)?)?.next_multiple_of(LOG_SECTOR);
    if !legal || descriptors_len > len || tail >= ring.len() as u64 {
        return None;
    }
    let mut whole = ring[at..(at + len).min(ring.len())].to_vec();
    whole.extend_from_slice(&ring[..len - whole.len()]);
    if !crc_matches(&whole) {
        return None;
    }
    let mut changes = Vec::new();
    let mut sectors = whole[descriptors_len..].chunks_exact(LOG_SECTOR);
    for descriptor in whole[ENTRY_HEADER..].chunks_exact(DESCRIPTOR).take(count) {
        let place = u64_at(descriptor, 16);
        if !place.is_multiple_of(LOG_SECTOR as u64) || u64_at(descriptor, 24) != sequence {
            return None;
        }
        match &descriptor[..4] {
            b"desc" => {
                place.checked_add(LOG_SECTOR as u64)?;
                let sector = sectors.next()?;
                let written = u64::from(u32_at(sector, 4)) << 32 | u64::from(u32_at(sector, 4092));
                if &sector[..4] != b"data" || written != sequence {
                    return None;
                }
                let data = [&descriptor[8..16], &sector[8..4092], &descriptor[4..8]].concat();
                changes.push(Change::Sector { at: place, data });
            }
            b"zero" => {
                let len = u64_at(descriptor, 8);
                if !len.is_multiple_of(LOG_SECTOR as u64) || place.checked_add(len).is_none() {
                    return None;
                }
                changes.push(Change::Zero { at: place, len });
            }
            _ => return None,
        }
    }
    sectors.next().is_none().then_some(Entry { sequence, len, tail, flushed_len: u64_at(head, 48), last_len: u64_at(head, 56), changes })
}

/// The bytes of an entry. Tidegate's own images never need one; tests of the reader do, and so would a repair.
pub fn encode_entry(log_id: Uuid, sequence: u64, tail: u32, file_len: (u64, u64), changes: &[Change]) -> Vec<u8> {
    let descriptors_len = (ENTRY_HEADER + changes.len() * DESCRIPTOR).next_multiple_of(LOG_SECTOR);
    let mut out = vec![0; descriptors_len];
    let mut sectors = Vec::new();
    for (slot, change) in out[ENTRY_HEADER..].chunks_exact_mut(DESCRIPTOR).zip(changes) {
        let place = match change {
            Change::Sector { at, data } => {
                slot[..4].copy_from_slice(b"desc");
                slot[4..8].copy_from_slice(&data[4092..4096]);
                slot[8..16].copy_from_slice(&data[..8]);
                sectors.extend_from_slice(b"data");
                sectors.extend_from_slice(&((sequence >> 32) as u32).to_le_bytes());
                sectors.extend_from_slice(&data[8..4092]);
                sectors.extend_from_slice(&(sequence as u32).to_le_bytes());
                at
            }
            Change::Zero { at, len } => {
                slot[..4].copy_from_slice(b"zero");
                slot[8..16].copy_from_slice(&len.to_le_bytes());
                at
            }
        };
        slot[16..24].copy_from_slice(&place.to_le_bytes());
        slot[24..32].copy_from_slice(&sequence.to_le_bytes());
    }
    out.extend_from_slice(&sectors);
    let len = out.len() as u32;
    out[..4].copy_from_slice(b"loge");
    out[8..12].copy_from_slice(&len.to_le_bytes());
    out[12..16].copy_from_slice(&tail.to_le_bytes());
    out[16..24].copy_from_slice(&sequence.to_le_bytes());
    out[24..28].copy_from_slice(&(changes.len() as u32).to_le_bytes());
    out[32..48].copy_from_slice(&log_id.to_bytes_le());
    out[48..56].copy_from_slice(&file_len.0.to_le_bytes());
    out[56..64].copy_from_slice(&file_len.1.to_le_bytes());
    seal_crc(&mut out);
    out
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ID: Uuid = Uuid::from_u128(7);

    fn sector(at: u64, fill: u8) -> Change {
        Change::Sector { at, data: vec![fill; LOG_SECTOR] }
    }

    /// Writes entries into a ring one after the other, wrapping.
    fn ring(len: usize, mut at: usize, entries: &[Vec<u8>]) -> Vec<u8> {
        let mut ring = vec![0; len];
        for entry in entries {
            for (i, &byte) in entry.iter().enumerate() {
                ring[(at + i) % len] = byte;
            }
            at = (at + entry.len()) % len;
        }
        ring
    }

    fn entry(sequence: u64, tail: usize, changes: &[Change]) -> Vec<u8> {
        encode_entry(ID, sequence, tail as u32, (1 << 20, 1 << 20), changes)
    }

    fn changes(ring: &[u8]) -> Vec<Change> {
        replay(ring, ID).unwrap().map(|r| r.changes).unwrap_or_default()
    }

    #[test]
    fn entries_with_126_127_and_300_descriptors_are_replayed_whole() {
        for count in [1u64, 126, 127, 255, 300] {
            let all: Vec<Change> = (0..count).map(|i| sector(i * 4096, i as u8)).collect();
            assert_eq!(changes(&ring(4 << 20, 0, &[entry(5, 0, &all)])), all, "{count} descriptors");
        }
    }

    #[test]
    fn a_sequence_that_wraps_around_the_end_is_found_whole() {
        let len = 8 * LOG_SECTOR;
        // Each entry takes two sectors; the third one starts at the last sector and wraps.
        for start in 0..8 {
            let at = start * LOG_SECTOR;
            let entries: Vec<_> = (0..3).map(|i| entry(10 + i, at, &[sector(i * 4096, i as u8 + 1)])).collect();
            let expected: Vec<_> = (0..3).map(|i| sector(i * 4096, i as u8 + 1)).collect();
            assert_eq!(changes(&ring(len, at, &entries)), expected, "from sector {start}");
        }
    }

    #[test]
    fn what_stands_before_the_tail_is_not_replayed() {
        let entries = [entry(1, 0, &[sector(0, 1)]), entry(2, 2 * LOG_SECTOR, &[sector(4096, 2)])];
        assert_eq!(changes(&ring(1 << 20, 0, &entries)), [sector(4096, 2)]);
    }

    #[test]
    fn a_torn_last_entry_and_a_gap_end_the_sequence() {
        let mut torn = entry(2, 0, &[sector(4096, 2)]);
        torn[5000] ^= 1;
        assert_eq!(changes(&ring(1 << 20, 0, &[entry(1, 0, &[sector(0, 1)]), torn])), [sector(0, 1)]);
        let gap = [entry(7, 0, &[sector(0, 1)]), entry(9, 2 * LOG_SECTOR, &[sector(4096, 2)])];
        assert_eq!(changes(&ring(1 << 20, 0, &gap)), [sector(4096, 2)], "only the newest run counts");
    }

    #[test]
    fn entries_of_another_log_do_not_count() {
        let ring = ring(1 << 20, 0, &[entry(1, 0, &[sector(0, 1)])]);
        assert_eq!(replay(&ring, Uuid::from_u128(8)), Ok(None));
    }

    #[test]
    fn a_log_full_of_claims_is_refused_in_bounded_time() {
        let mut ring = vec![0; 1 << 20];
        for at in (0..ring.len()).step_by(LOG_SECTOR) {
            ring[at..at + 4].copy_from_slice(b"loge");
            ring[at + 8..at + 12].copy_from_slice(&(1u32 << 20).to_le_bytes());
        }
        assert!(replay(&ring, ID).is_err());
    }

    proptest! {
        #[test]
        fn damage_never_invents_changes(at in 0usize..4 * LOG_SECTOR, xor in 1u8..) {
            let mut bytes = ring(1 << 20, 0, &[entry(1, 0, &[sector(0, 1)]), entry(2, 0, &[sector(4096, 2)])]);
            bytes[at] ^= xor;
            let found = changes(&bytes);
            prop_assert!(found.is_empty() || found == [sector(0, 1)], "{} changes", found.len());
        }
    }
}
