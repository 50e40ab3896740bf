//! Sets up logging, once, to stderr.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;

/// Logs `info` and above, or what `TIDEGATE_LOG` says (for example `tidegate=debug`). With `json`, one object a line.
pub fn init(default: &str, json: bool) {
    let filter = EnvFilter::try_from_env("TIDEGATE_LOG").unwrap_or_else(|_| EnvFilter::new(default));
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_ansi(std::io::stderr().is_terminal()).with_writer(std::io::stderr);
    // A second call keeps the first subscriber; quickstart and tests run several roles in one process.
    let _ = if json { builder.json().try_init() } else { builder.try_init() };
}
