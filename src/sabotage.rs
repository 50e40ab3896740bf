//! Faults on purpose, for the checks that have to notice them. Without the feature `sabotage` there are none, and this costs nothing.
//!
//! `TIDEGATE_SABOTAGE=NAME cargo test --features sabotage ...` breaks one thing; `tests/README.md` lists them, and what notices.

/// Whether this fault is wanted.
pub fn is(name: &str) -> bool {
    cfg!(feature = "sabotage") && std::env::var_os("TIDEGATE_SABOTAGE").is_some_and(|wanted| wanted == name)
}
