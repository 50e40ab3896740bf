//! How a connection waits for its next request: by polling for a moment, or asleep.

use std::io;
use std::pin::Pin;
use std::task::Poll;
use std::time::Duration;

use tokio::io::{AsyncBufRead, AsyncBufReadExt, AsyncRead, BufReader};

use crate::clock;

/// A connection whose next request is expected sooner polls for it instead of sleeping (QEMU's I/O threads do the same, with
/// 32 us).
const POLL_LIMIT: Duration = Duration::from_micros(150);
/// Requests that are waited for without polling after polling was in vain many times.
const POLL_PAUSE_MAX: u32 = 1024;

/// Whether a connection polls for its next request.
#[derive(Default)]
pub(super) struct Patience {
    /// The last request came soon after the one before.
    expects: bool,
    /// Requests to wait for without polling, because polling was in vain, and how many the next time.
    pause: u32,
    next_pause: u32,
}

/// Waits until something can be read. When the last request came soon after the one before, looks for the next a few times
/// before the thread may sleep: waking a sleeping thread costs more than the whole of a small write, and a client at depth 1
/// pays it with each request. When looking was in vain (the client may want this very core) it is done less and less often.
pub(super) async fn wait_for_request<R: AsyncRead + Unpin>(
    read: &mut BufReader<R>,
    patience: &mut Patience,
    may_poll: impl Fn() -> bool,
) -> io::Result<()> {
    let since = clock::now();
    let mut waited = Duration::ZERO;
    if patience.pause > 0 {
        patience.pause -= 1;
    } else if patience.expects {
        while waited < POLL_LIMIT && may_poll() {
            let polled = std::future::poll_fn(|cx| Poll::Ready(Pin::new(&mut *read).poll_fill_buf(cx).map_ok(|_| ()))).await;
            waited = clock::now().since(since);
            if let Poll::Ready(result) = polled {
                patience.next_pause = 0;
                return result;
            }
            tokio::task::yield_now().await;
        }
        if waited >= POLL_LIMIT {
            patience.next_pause = (patience.next_pause * 2).clamp(1, POLL_PAUSE_MAX);
            patience.pause = patience.next_pause;
        }
    }
    let result = read.fill_buf().await.map(|_| ());
    patience.expects = clock::now().since(since) < POLL_LIMIT;
    result
}
