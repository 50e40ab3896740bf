//! The nouns of the product: ids, extents, changes, markers, points, positions. No I/O, no async, imports nothing of ours.

pub mod address;
pub mod bits;
pub mod change;
pub mod digest;
pub mod extent;
pub mod group;
pub mod ids;
pub mod job;
pub mod point;
pub mod policy;
pub mod position;
pub mod state;

pub use address::Address;
pub use bits::{BlockSet, RegionSet};
pub use change::{Change, ChangeKind, Marker};
pub use digest::{Compare, Digest, Trailer, Verdict};
pub use extent::{Extent, OverlayMap, Piece};
pub use group::GroupPart;
pub use ids::{DiskId, MachineId, Name, NameError, PointId};
pub use job::{Choice, Hold, Job, JobKind, JobState};
pub use point::{PointKind, RecoveryPoint};
pub use policy::{Ladder, Policy, show_span};
pub use position::{Position, Reliance, Rung};
pub use state::{DiskReport, Health, ReplicationState, Wanted};

/// Smallest addressable unit of a protected disk, in bytes.
pub const SECTOR: u64 = 512;
/// Unit in which old content is kept by the retention journal and zeroes are found, in bytes.
pub const BLOCK: u64 = 4096;
