//! Tidegate keeps a second copy of running machines, seconds behind, at another site.
//!
//! ```text
//! source host                    primary site                       secondary site
//!  hypervisor --NBD--> agent --TLS 9443--> process server --QUIC 9444--> master target --> replica.vhdx / raw
//!              local disk <+  changes      ingest>optimise>cache>forward  receive>journal>apply>retain>recover
//! ```
//!
//! Modules in the order a write flows, then the ground they stand on. Imports go one way:
//! `cli -> servers -> (disk, nbd, crypto, control, observe) -> (wire, storage) -> model`.

#![deny(unsafe_code)]

pub mod agent;
pub mod process_server;

pub mod master_target;

pub mod coordinator;

pub mod disk;
pub mod nbd;

pub mod control;
pub mod crypto;
pub mod observe;

pub mod storage;
pub mod wire;

pub mod checksum;
pub mod clock;
pub mod config;
pub mod hook;
pub mod model;
pub mod panics;
pub mod priority;
pub mod sabotage;

pub mod cli;
