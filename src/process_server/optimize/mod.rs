//! Makes batches of changes and seals them. `batcher` decides what belongs together, `fold` what is left of it,
//! `workers` run it on threads of their own.

pub mod batcher;
pub mod fold;
pub mod workers;
