//! Every metric in one place: name, kind, unit, meaning. The documentation shows this list.

use std::sync::OnceLock;
use std::time::Duration;

use metrics::{counter, gauge, histogram};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};

use crate::model::{Position, Rung};

/// Kind of a metric.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Goes up and down.
    Gauge,
    /// Only grows.
    Counter,
    /// A distribution.
    Histogram,
}

/// A declared metric.
#[derive(Clone, Copy, Debug)]
pub struct Metric {
    /// Full name.
    pub name: &'static str,
    /// Its kind.
    pub kind: Kind,
    /// Labels it carries.
    pub labels: &'static str,
    /// What it says, with the unit.
    pub help: &'static str,
}

macro_rules! declare {
    ($($ident:ident = $name:literal, $kind:ident, $labels:literal, $help:literal;)*) => {
        $(#[doc = $help] pub const $ident: &str = $name;)*
        /// All of them.
        pub const ALL: &[Metric] = &[$(Metric { name: $name, kind: Kind::$kind, labels: $labels, help: $help }),*];
    };
}

declare! {
    POSITION = "tidegate_position", Gauge, "disk, rung", "Sequence each rung of the ladder has reached in the current epoch";
    RPO = "tidegate_rpo_seconds", Gauge, "disk", "Age of the newest recovery point that can be recovered, seconds; absent while unknown";
    RPO_PART = "tidegate_rpo_part_seconds", Gauge, "disk, part", "Where the newest point spent its time: source, gateway, link, apply; seconds";
    LAG = "tidegate_source_lag_seconds", Gauge, "disk", "Age of the oldest captured change that is not yet safe, seconds";
    CAPTURED_BYTES = "tidegate_captured_bytes_total", Counter, "disk", "Bytes written to the protected disk through the agent";
    BACKLOG = "tidegate_backlog_bytes", Gauge, "disk, kind", "Agent's backlog: memory (changes held), log (changes on its disk), map (regions to send again); bytes";
    HOLD = "tidegate_marker_hold_seconds", Histogram, "", "How long writes of a machine were held for a marker, seconds";
    GROUP_HOLD = "tidegate_group_hold_seconds", Histogram, "", "How long writes of a machine were held for a round of its group, seconds";
    GROUP_ROUND = "tidegate_group_round_seconds", Histogram, "", "Time of a whole round of a group, hooks included, seconds";
    GROUP_ROUNDS = "tidegate_group_rounds_total", Counter, "group, result", "Rounds of a group: full, partial, skipped, unconfirmed";
    GROUP_MISSING = "tidegate_group_missing_total", Counter, "reason", "Members that a round went without: absent, silent, gone, failed";
    GROUP_MEMBERS = "tidegate_group_members", Gauge, "group, state", "Members of a group: all, ready";
    POINTS_SKIPPED = "tidegate_points_skipped_total", Counter, "reason", "Recovery points that were due and not made";
    FREEZES = "tidegate_freezes_total", Counter, "result", "Times the machine was brought to rest for an application-consistent point, or should have been: ok, late, failed";
    FREEZE = "tidegate_freeze_seconds", Histogram, "", "How long writers waited on file systems that were frozen for a point, seconds";
    APP_POINTS_LOST = "tidegate_app_points_lost_total", Counter, "reason", "Points that were to be application-consistent and are crash-consistent";
    RESYNCS = "tidegate_resynchronisations_total", Counter, "disk", "Times a disk left delta replication";
    INGEST_BYTES = "tidegate_ingest_bytes_total", Counter, "disk", "Bytes of changes received by the process server";
    FOLDED_BYTES = "tidegate_folded_bytes_total", Counter, "disk", "Bytes left after folding and zero detection";
    SEALED_BYTES = "tidegate_sealed_bytes_total", Counter, "disk", "Bytes left after compression, sealed";
    CACHE_BYTES = "tidegate_cache_bytes", Gauge, "disk", "Bytes of a disk in the cache, not acknowledged by the master target";
    CACHE_FREE = "tidegate_cache_free_ratio", Gauge, "", "Share of the cache that is free";
    CACHE_DRAIN = "tidegate_cache_drain_seconds", Gauge, "", "How long what is in the cache takes to send, as fast as lately, seconds; NaN while nothing is sent";
    CACHE_LEVEL = "tidegate_cache_level", Gauge, "", "How full the cache is: 0 normal, 1 warn, 2 shrink, 3 throttle, 4 protect";
    CACHE_HELD = "tidegate_cache_held_disks", Gauge, "", "Disks that may send nothing more until the cache has room";
    CACHE_COMMIT = "tidegate_cache_commit_seconds", Histogram, "", "Time to make a group of batches durable in the cache, seconds";
    FORWARDED_BYTES = "tidegate_forwarded_bytes_total", Counter, "disk", "Sealed bytes given to the link";
    RESENT_BATCHES = "tidegate_resent_batches_total", Counter, "disk", "Batches sent again after a reconnect";
    LINK_UP = "tidegate_link_up", Gauge, "", "1 while the process server is connected to the master target";
    LINK_MTU = "tidegate_link_mtu_bytes", Gauge, "", "UDP payload the link carries now; 1200 means that larger packets are lost on the way";
    DAMAGED = "tidegate_damaged_total", Counter, "reason", "Damage found in what is kept, by where: cache, journal; what is lost is sent again";
    REFUSED = "tidegate_refused_total", Counter, "reason", "Connections, disks and messages refused";
    JOURNAL_BYTES = "tidegate_journal_bytes", Gauge, "", "Bytes in the journal of the master target, not yet in replicas";
    JOURNAL_COMMIT = "tidegate_journal_commit_seconds", Histogram, "", "Time to make a group of batches durable in the journal, seconds";
    APPLIED_BYTES = "tidegate_applied_bytes_total", Counter, "disk", "Bytes written to the replica after folding";
    CHECKPOINT = "tidegate_checkpoint_seconds", Histogram, "", "Time of one checkpoint of a replica, seconds";
    KEPT_BYTES = "tidegate_kept_bytes_total", Counter, "disk, from", "Old content that was kept for older points, by where it came from: memory (see recent_max), replica";
    RETAINED_BYTES = "tidegate_retained_bytes", Gauge, "disk", "Bytes of old content in the retention journal";
    POINTS = "tidegate_points", Gauge, "machine, kind", "Listed recovery points";
    POINTS_BAD = "tidegate_points_bad", Gauge, "machine", "Recovery points that became unusable and were not cleared with `point forget`";
    POINT_VERIFIED_AGE = "tidegate_point_verified_age_seconds", Gauge, "machine", "Time since the newest of the listed points that were ever verified was verified last, seconds; NaN without one";
    GROUP_POINTS = "tidegate_group_points", Gauge, "group", "Listed points of a replication group";
    GROUP_WAITING = "tidegate_group_points_waiting", Gauge, "group", "Points of a group that wait for the part of a machine";
    GROUP_POINT_AGE = "tidegate_group_point_age_seconds", Gauge, "group", "Age of the newest listed point of a group by the sources' clocks, seconds; NaN without one";
    GROUP_CONFLICTS = "tidegate_group_conflicts_total", Counter, "", "Group points that were not listed because their machines contradict each other, and parts that do not fit what they say";
    FAILED_OVER = "tidegate_failed_over", Gauge, "machine", "1 while a failover keeps the machine from being replicated here";
    SCRUBBED_BYTES = "tidegate_scrubbed_bytes_total", Counter, "disk", "Bytes of the disk that were compared with the replica while replication went on";
    SCRUB_DIFFERING_BYTES = "tidegate_scrub_differing_bytes_total", Counter, "disk", "Bytes in which source and replica differed that should have been the same: damage";
    DIFFERING_BYTES = "tidegate_differing_bytes", Gauge, "disk", "Bytes found to differ when source and replica were compared last, in blocks of 64 KiB";
    CERTIFICATE_EXPIRY = "tidegate_certificate_expiry_seconds", Gauge, "role", "Time until the certificate of this process expires, seconds";
}

/// Installs the recorder, once for the process, and describes every metric.
pub fn install() -> PrometheusHandle {
    static HANDLE: OnceLock<PrometheusHandle> = OnceLock::new();
    HANDLE
        .get_or_init(|| {
            let seconds = [0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];
            let handle = PrometheusBuilder::new()
                .set_buckets_for_metric(Matcher::Suffix("_seconds".to_owned()), &seconds)
                .expect("the bucket list is not empty")
                .install_recorder()
                .expect("install runs once in a process");
            for metric in ALL {
                match metric.kind {
                    Kind::Gauge => metrics::describe_gauge!(metric.name, metric.help),
                    Kind::Counter => metrics::describe_counter!(metric.name, metric.help),
                    Kind::Histogram => metrics::describe_histogram!(metric.name, metric.help),
                }
            }
            handle
        })
        .clone()
}

/// Reports a rung. `disk` is `machine/disk`.
pub fn position(disk: &str, rung: Rung, position: Position) {
    #[allow(clippy::cast_precision_loss, reason = "Prometheus numbers are doubles; a sequence stays exact up to 2^53")]
    gauge!(POSITION, "disk" => disk.to_owned(), "rung" => rung.as_str()).set(position.sequence as f64);
}

/// Sets a gauge of a disk.
pub fn disk_gauge(name: &'static str, disk: &str, value: f64) {
    gauge!(name, "disk" => disk.to_owned()).set(value);
}

/// Sets a gauge of a disk with one more label.
pub fn disk_part(name: &'static str, disk: &str, label: &'static str, part: &'static str, value: f64) {
    gauge!(name, "disk" => disk.to_owned(), label => part).set(value);
}

/// Adds to a counter of a disk.
pub fn disk_count(name: &'static str, disk: &str, by: u64) {
    counter!(name, "disk" => disk.to_owned()).increment(by);
}

/// Adds to what was kept of old content.
pub fn kept(disk: &str, memory: u64, replica: u64) {
    for (from, bytes) in [("memory", memory), ("replica", replica)] {
        counter!(KEPT_BYTES, "disk" => disk.to_owned(), "from" => from).increment(bytes);
    }
}

/// Sets the number of crash- and of application-consistent points of a machine.
pub fn machine_points(machine: &str, crash: usize, app: usize) {
    for (kind, points) in [("crash", crash), ("app", app)] {
        gauge!(POINTS, "machine" => machine.to_owned(), "kind" => kind).set(number(points as u64));
    }
}

/// Sets a gauge of a machine.
pub fn machine_gauge(name: &'static str, machine: &str, value: f64) {
    gauge!(name, "machine" => machine.to_owned()).set(value);
}

/// Sets a gauge of a group.
pub fn group_gauge(name: &'static str, group: &str, value: f64) {
    gauge!(name, "group" => group.to_owned()).set(value);
}

/// Sets how many contradictions about group points were found.
pub fn group_conflicts(total: u64) {
    counter!(GROUP_CONFLICTS).absolute(total);
}

/// Sets how many points were given up because a disk's marker never came.
pub fn points_incomplete(total: u64) {
    counter!(POINTS_SKIPPED, "reason" => "incomplete").absolute(total);
}

/// Counts a round of a group.
pub fn group_round(group: &str, result: &'static str) {
    counter!(GROUP_ROUNDS, "group" => group.to_owned(), "result" => result).increment(1);
}

/// Sets how many members a group has, and how many could take part in a round.
pub fn group_members(group: &str, ready: usize, all: usize) {
    for (state, count) in [("ready", ready), ("all", all)] {
        gauge!(GROUP_MEMBERS, "group" => group.to_owned(), "state" => state).set(number(count as u64));
    }
}

/// Counts something with a reason.
pub fn count_reason(name: &'static str, reason: &'static str) {
    counter!(name, "reason" => reason).increment(1);
}

/// Counts something by how it ended.
pub fn count_result(name: &'static str, result: &'static str) {
    counter!(name, "result" => result).increment(1);
}

/// Adds a duration to a histogram.
pub fn observe(name: &'static str, duration: Duration) {
    histogram!(name).record(duration.as_secs_f64());
}

/// Bytes or counts as Prometheus wants them.
#[allow(clippy::cast_precision_loss, reason = "Prometheus numbers are doubles")]
pub fn number(value: u64) -> f64 {
    value as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_follow_the_rules() {
        for metric in ALL {
            assert!(metric.name.starts_with("tidegate_"), "{}", metric.name);
            assert_eq!(metric.kind == Kind::Counter, metric.name.ends_with("_total"), "{}", metric.name);
            assert!(!metric.help.is_empty());
        }
    }
}
