//! Every bound between parts, with the relations that must hold between them.

use crate::model::change::CHANGE_BYTES_MAX;
use crate::wire::batch::{BATCH_BYTES_MAX, BATCH_DATA_MAX};

/// Bytes of a disk that may be between agent and cache. 16 MiB fill a LAN, 64 bring nothing more (measured).
pub const DISK_WINDOW_BYTES: u64 = 16 << 20;
/// Least window of a disk when many share the memory of a process server.
pub const DISK_WINDOW_BYTES_MIN: u64 = 1 << 20;
/// Connections to 9443 that have not finished their handshake.
pub const HANDSHAKES_MAX: usize = 200;
/// Seconds a peer has for its handshake and its first message.
pub const HANDSHAKE_SECONDS: u64 = 10;
/// A peer that says nothing for this long is gone; both sides speak at least once a second.
pub const SILENCE_SECONDS: u64 = 15;
/// Disks on one connection.
pub const DISKS_PER_CONNECTION_MAX: u32 = 256;
/// Batches between ingest and cache, for all disks.
pub const BATCHES_IN_PIPELINE_MAX: usize = 96;
/// What resynchronisation may hold in the agent's backlog; the rest is the application's.
pub const RESYNC_WINDOW_BYTES: u64 = 32 << 20;
/// Most regions of a dirty map: 16 Mi, one bit each on disk and eight bytes each in memory.
pub const REGIONS_MAX: u64 = 16 << 20;
/// Process servers that one agent knows beside its first.
pub const STANDBYS_MAX: usize = 15;
/// Hooks of one agent's application-consistent points.
pub const HOOKS_MAX: usize = 32;
/// Writes of one checkpoint to a replica that are under way.
pub const APPLY_DEPTH: usize = 96;

const _: () =
    assert!(DISK_WINDOW_BYTES_MIN >= 2 * BATCH_DATA_MAX as u64, "a disk can always fill a batch, or nothing would ever be acknowledged");
const _: () = assert!(BATCH_BYTES_MAX < 1 << 20, "a sealed batch with its record header fits the largest pooled buffer");
const _: () = assert!(RESYNC_WINDOW_BYTES >= 16 * CHANGE_BYTES_MAX as u64, "a region's chunks fit the window");
