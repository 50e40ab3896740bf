//! Takes part in the rounds of a replication group: the connection to the coordinator on 20004.

pub(in crate::agent) mod connection;
pub mod member;

use crate::model::Name;

/// What `status` shows of the group.
#[derive(Clone, Debug, Default)]
pub struct GroupStatus {
    /// A coordinator is configured.
    pub configured: bool,
    /// Connected to it.
    pub connected: bool,
    /// The group and its epoch, as the coordinator says.
    pub group: Option<(Name, u64)>,
    /// What the last failed attempt said.
    pub error: Option<String>,
}
