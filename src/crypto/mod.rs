//! Keys, seals and certificates. Nothing here prints a key.

pub mod keyring;
pub mod messages;
pub mod pki;
pub mod quic;
pub mod scratch;
pub mod seal;
pub mod statement;
pub mod tls;
