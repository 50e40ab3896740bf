//! What a panic does: it ends the process, except where a library is known to panic on a damaged file.

use std::cell::Cell;
use std::panic::UnwindSafe;

thread_local! {
    static TAKEN: Cell<bool> = const { Cell::new(false) };
}

/// Ends the process at the first panic, on whatever thread: state that broke an assertion must not be used again, and a
/// restart recovers from what is durable.
pub fn abort_on_panic() {
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        if !TAKEN.get() {
            report(info);
            std::process::abort();
        }
    }));
}

/// Does `work`, whose panic is an answer: `None`. Whatever it touched must be gone with it.
pub fn taken<T>(work: impl FnOnce() -> T + UnwindSafe) -> Option<T> {
    TAKEN.set(true);
    let done = std::panic::catch_unwind(work);
    TAKEN.set(false);
    done.ok()
}
