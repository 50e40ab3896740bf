//! Threads that come first when cores are short.

/// Somebody's writes wait for this thread: it comes before others. Needs CAP_SYS_NICE; without it the thread runs like any other.
pub fn prefer_this_thread() {
    let _ = rustix::process::setpriority_process(Some(rustix::thread::gettid()), -10);
}
