//! The only reader of time. Pure code takes `now` as an argument; drivers ask here.
//!
//! Durations that decide anything come from the monotonic clock; the wall clock is used for labels
//! and for the age of data that was already on disk when this process started.

use std::sync::OnceLock;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// A moment on this process's monotonic clock, in microseconds since the process first asked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Mono(pub u64);

impl Mono {
    /// Time that passed from `earlier` to `self`; zero if `earlier` is later.
    pub fn since(self, earlier: Mono) -> Duration {
        Duration::from_micros(self.0.saturating_sub(earlier.0))
    }

    /// The moment `time` after `self`.
    pub fn plus(self, time: Duration) -> Mono {
        Mono(self.0.saturating_add(micros(time)))
    }

    /// The moment `age` before `self`, stopping at the start of the process.
    pub fn minus(self, age: Duration) -> Mono {
        Mono(self.0.saturating_sub(micros(age)))
    }
}

/// `duration` in whole microseconds, saturating.
pub fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

/// Now, on the monotonic clock.
#[allow(clippy::disallowed_methods, reason = "this is the one place that may read the clock")]
pub fn now() -> Mono {
    static START: OnceLock<Instant> = OnceLock::new();
    // The offset keeps ages of data captured before the first call representable.
    Mono(micros(START.get_or_init(Instant::now).elapsed()) + 1_000_000)
}

/// Now, on the monotonic clock that all processes of this host share, in milliseconds since it was started.
pub fn host_ms() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec.cast_unsigned() * 1000 + now.tv_nsec.cast_unsigned() / 1_000_000
}

/// Now, on the wall clock, in milliseconds since 1970. For labels only.
#[allow(clippy::disallowed_methods, reason = "this is the one place that may read the clock")]
pub fn wall_ms() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}

/// A wall-clock label as RFC 3339 UTC with milliseconds.
pub fn rfc3339(wall_ms: i64) -> String {
    let format = time::macros::format_description!("[year]-[month]-[day]T[hour]:[minute]:[second].[subsecond digits:3]Z");
    time::OffsetDateTime::from_unix_timestamp_nanos(i128::from(wall_ms) * 1_000_000)
        .ok()
        .and_then(|t| t.format(format).ok())
        .unwrap_or_else(|| "unknown".to_owned())
}
