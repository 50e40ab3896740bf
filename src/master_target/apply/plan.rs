//! Plans a checkpoint: batches are cut at markers and digests, and within a cut only the last write to each byte is left. Pure.

use crate::model::{Digest, Extent, OverlayMap, Position, Trailer};
use crate::sabotage;
use crate::wire::WireError;
use crate::wire::batch::{BatchHeader, parse_entries, parse_trailer};

/// What is written between two markers or digests.
#[derive(Debug, Default)]
pub struct Cut {
    /// What stands where: which batch, and the place in its data (`None` for zeroes).
    pub pieces: OverlayMap<Content>,
    /// What it ends with: its place, what it says, and the batch that brought it.
    pub end: Option<(Position, Trailer, usize)>,
}

/// Where the content of a piece comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Content {
    /// Index of the batch.
    pub batch: usize,
    /// Place in its data.
    pub data_at: Option<u32>,
}

/// Cuts and folds batches given in order.
///
/// # Errors
/// [`WireError`] if a body contradicts its header, which the receiver has checked: the journal was damaged.
pub fn plan<'a>(batches: impl Iterator<Item = (&'a BatchHeader, &'a [u8])>) -> Result<Vec<Cut>, WireError> {
    let mut cuts = vec![Cut::default()];
    for (index, (header, body)) in batches.enumerate() {
        let cut = cuts.last_mut().expect("there is always one cut");
        if index == 1 && sabotage::is("drop-batch") {
            continue;
        }
        for entry in parse_entries(header, body)? {
            let content = Content { batch: index, data_at: entry.data_at };
            if index == 1 && sabotage::is("swap-batches") {
                cut.pieces.insert_below(entry.extent, content);
                continue;
            }
            cut.pieces.insert(entry.extent, content);
        }
        if let Some(trailer) = parse_trailer(header, body)? {
            cut.end = Some((header.end(), trailer, index));
            cuts.push(Cut::default());
        }
    }
    cuts.retain(|cut| !cut.pieces.is_empty() || cut.end.is_some());
    Ok(cuts)
}

/// What a cut does to the disk, in order of offset.
pub fn writes(cut: &Cut) -> impl Iterator<Item = (Extent, Content)> + '_ {
    cut.pieces.iter().map(|p| {
        let data_at = p.source.data_at.map(|at| at + p.skip as u32);
        (p.extent, Content { data_at, ..p.source })
    })
}

/// Whether the replica can be judged by a digest at `at`. After a start it may have some of what the journal held then, up to
/// `blind_until`, already: what differs from a scrub's digest up to there is its future, not damage.
pub fn can_judge(digest: &Digest, at: Position, blind_until: Position) -> bool {
    !digest.scrub || at > blind_until
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::model::{DiskId, Marker};
    use crate::wire::batch::push_entry;

    fn batch(last: u64, extents: &[(u64, u64, bool)], marked: bool) -> (BatchHeader, Vec<u8>) {
        let data_len: u64 = extents.iter().filter(|e| !e.2).map(|e| e.1).sum();
        let mut body = vec![last as u8; data_len as usize];
        for &(offset, len, zero) in extents {
            push_entry(&mut body, Extent::new(offset, len), zero);
        }
        let table_end = body.len();
        if marked {
            let marker = Marker::sample(last.into(), &[DiskId(Uuid::nil())]);
            body.extend(postcard::to_stdvec(&marker).unwrap());
        }
        let header = BatchHeader {
            epoch: 1,
            first: last,
            last,
            data_len: data_len as u32,
            extents: extents.len() as u32,
            marker_len: (body.len() - table_end) as u32,
            stored_len: 16,
            ..BatchHeader::new(DiskId(Uuid::nil()), 1)
        };
        (header, body)
    }

    #[test]
    fn writes_fold_within_a_cut_and_never_across_a_marker() {
        let batches = [batch(1, &[(0, 1024, false)], false), batch(2, &[(512, 1024, false)], true), batch(3, &[(0, 512, true)], false)];
        let cuts = plan(batches.iter().map(|(h, b)| (h, b.as_slice()))).unwrap();
        assert_eq!(cuts.len(), 2);
        let first: Vec<_> = writes(&cuts[0]).collect();
        assert_eq!(
            first,
            [
                (Extent::new(0, 512), Content { batch: 0, data_at: Some(0) }),
                (Extent::new(512, 1024), Content { batch: 1, data_at: Some(0) }),
            ]
        );
        assert_eq!(cuts[0].end.as_ref().unwrap().0, Position::new(1, 2));
        let second: Vec<_> = writes(&cuts[1]).collect();
        assert_eq!(second, [(Extent::new(0, 512), Content { batch: 2, data_at: None })]);
        assert!(cuts[1].end.is_none());
    }
}
