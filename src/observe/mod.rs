//! What a running server shows of itself: metrics, liveness, logs.

pub mod http;
pub mod logging;
pub mod metrics;
