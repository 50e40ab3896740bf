//! What a coordinator says of its groups.

use serde::{Deserialize, Serialize};

use crate::model::Health;

/// How a group's points are made; what is absent stays as it is, or has its default.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GroupValues {
    /// Time between crash-consistent points.
    pub interval_seconds: Option<f64>,
    /// Time between application-consistent points; 0: none by the clock.
    pub app_interval_seconds: Option<f64>,
    /// Points without some members are made, and say so.
    pub partial: Option<bool>,
    /// Rather no application-consistent point than a crash-consistent one instead.
    pub app_or_nothing: Option<bool>,
}

/// A group as its coordinator sees it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct GroupView {
    /// Its name.
    pub name: String,
    /// Grows with every change of its members.
    pub epoch: u64,
    /// Its health.
    pub health: Health,
    /// Why it is not healthy.
    pub reason: Option<String>,
    /// What to do.
    pub remedy: Option<String>,
    /// Its machines.
    pub members: Vec<GroupMemberView>,
    /// The master target it lives on, once that is known.
    pub master_target: Option<String>,
    /// Time between crash-consistent points.
    pub interval_seconds: f64,
    /// Time between application-consistent points.
    pub app_interval_seconds: Option<f64>,
    /// Points without some members are made.
    pub partial: bool,
    /// Rather no application-consistent point than a crash-consistent one instead.
    pub app_or_nothing: bool,
    /// Points of all members since the coordinator started.
    pub full: u64,
    /// Points without some.
    pub partial_points: u64,
    /// Rounds without a point.
    pub skipped: u64,
    /// Rounds after which not every member confirmed its marker.
    pub unconfirmed: u64,
    /// Rounds that were to be application-consistent and were not.
    pub app_points_lost: u64,
    /// How often a member was missing, by cause.
    pub causes: std::collections::BTreeMap<String, u64>,
    /// The newest point.
    pub last: Option<GroupLast>,
}

/// A member of a group.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct GroupMemberView {
    /// Which machine.
    pub machine: String,
    /// Connected to the coordinator.
    pub connected: bool,
    /// Where it replicates to, as far as it is known.
    pub master_target: Option<String>,
    /// Why it could take no part in a round now.
    pub trouble: Option<String>,
}

/// The newest point of a group.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct GroupLast {
    /// Its id.
    pub point: String,
    /// RFC 3339, the coordinator's clock.
    pub time: String,
    /// Since then.
    pub age_seconds: f64,
    /// Its consistency.
    pub kind: String,
    /// Machines in it.
    pub members: usize,
    /// Machines that are missing.
    pub missing: Vec<String>,
    /// The longest that a member's writes were held.
    pub hold_seconds: f64,
    /// Why it is not what was asked for.
    pub remark: Option<String>,
}

/// Answer to `GroupMark`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct GroupMarked {
    /// Id the group's point will have once it is listed.
    pub point: String,
    /// The group.
    pub group: String,
    /// Its consistency.
    pub kind: String,
    /// Machines in it.
    pub members: usize,
    /// Machines that are missing.
    pub missing: Vec<GroupMissing>,
    /// The longest that a member's writes were held.
    pub hold_seconds: f64,
    /// Why it is not what was asked for.
    pub remark: Option<String>,
}

/// A machine that is missing in a point.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct GroupMissing {
    /// Which.
    pub machine: String,
    /// Why.
    pub why: String,
}
