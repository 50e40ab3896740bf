//! Old content first, then new content: piece by piece, so that the old content of the next piece is kept while this one is
//! written. The first pieces and the last are small: only one of both is done beside nothing else.

use futures_util::StreamExt;

use crate::model::Extent;

/// Most bytes of a piece. Each costs a sync of the retention journal, which nothing but the next piece waits for.
const PIECE_MAX: u64 = 8 << 20;
/// Bytes of the first.
const PIECE_MIN: u64 = 2 << 20;

/// Overwrites extents, which are in order and do not overlap, `depth` at once. `keep` makes the old content of some of them
/// durable; none of them is written before.
///
/// # Errors
/// The first failure; some may have been overwritten.
pub async fn overwrite<T: Copy, E, W: Future<Output = Result<(), E>>>(
    extents: &[(Extent, T)],
    depth: usize,
    keep: Option<impl AsyncFn(&[(Extent, T)]) -> Result<(), E>>,
    write: impl Fn(Extent, T) -> W,
) -> Result<(), E> {
    let put = async |piece: &[(Extent, T)]| {
        let mut running = futures_util::stream::iter(piece.iter().map(|(extent, what)| write(*extent, *what))).buffer_unordered(depth);
        let mut result = Ok(());
        while let Some(done) = running.next().await {
            result = result.and(done);
        }
        result
    };
    let Some(keep) = keep else { return put(extents).await };
    let mut kept: &[(Extent, T)] = &[];
    let mut rest = extents;
    let mut left: u64 = extents.iter().map(|(extent, _)| extent.len).sum();
    let mut most = PIECE_MIN;
    while !(kept.is_empty() && rest.is_empty()) {
        let before = rest.iter().scan(0, |bytes, (extent, _)| Some(std::mem::replace(bytes, *bytes + extent.len)));
        let wanted = most.min((left / 2).max(PIECE_MIN));
        let count = before.take_while(|bytes| *bytes < wanted).count();
        let (piece, after) = rest.split_at(count);
        let keeping = async { if piece.is_empty() { Ok(()) } else { keep(piece).await } };
        let (now, before) = futures_util::future::join(keeping, put(kept)).await;
        before.and(now)?;
        left -= piece.iter().map(|(extent, _)| extent.len).sum::<u64>();
        most = PIECE_MAX.min(2 * most);
        (kept, rest) = (piece, after);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    #[tokio::test(flavor = "current_thread")]
    async fn nothing_is_written_before_it_is_kept_and_everything_is_written_once() {
        let extents: Vec<(Extent, u64)> = (0..1000).map(|n| (Extent::new(n << 20, 100_000 + n * 100), n)).collect();
        let (kept, written, together) = (RefCell::new(Vec::new()), RefCell::new(Vec::new()), RefCell::new(0));
        let keep = async |piece: &[(Extent, u64)]| {
            tokio::task::yield_now().await;
            kept.borrow_mut().extend(piece.iter().map(|(_, n)| *n));
            Ok::<_, ()>(())
        };
        let write = |_, n| {
            assert!(kept.borrow().contains(&n), "{n}");
            written.borrow_mut().push(n);
            *together.borrow_mut() += usize::from(kept.borrow().len() < 1000);
            std::future::ready(Ok(()))
        };
        overwrite(&extents, 8, Some(keep), write).await.unwrap();
        assert_eq!(*written.borrow(), (0..1000).collect::<Vec<_>>());
        assert!(*together.borrow() > 500, "pieces are written while others are kept");
    }

    #[tokio::test(flavor = "current_thread")]
    async fn what_could_not_be_kept_is_not_written() {
        let extents: Vec<(Extent, u64)> = (0..10).map(|n| (Extent::new(n << 24, 9 << 20), n)).collect();
        let written = RefCell::new(Vec::new());
        let keep = async |piece: &[(Extent, u64)]| if piece[0].1 == 3 { Err("full") } else { Ok(()) };
        let write = |_, n| {
            written.borrow_mut().push(n);
            std::future::ready(Ok(()))
        };
        assert_eq!(overwrite(&extents, 8, Some(keep), write).await, Err("full"));
        assert_eq!(*written.borrow(), [0, 1, 2]);
    }
}
