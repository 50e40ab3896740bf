//! The coordinator: makes the machines of a group come back from one moment.

pub mod rounds;
