//! The admin interface of every server: HTTP/JSON on a unix socket, and its client for the command line.

pub mod api;
pub mod client;
pub mod coordinator;
pub mod failovers;
pub mod groups;
pub mod scrub;
pub mod server;
