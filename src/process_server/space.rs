//! Looks how full the cache is, and tells each disk what it gets. Decides nothing: see [`super::pressure`].

use std::rc::Rc;
use std::sync::PoisonError;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::disk::Disk;
use super::pressure::{Grant, Level, Load, Space, Thresholds, grants, level};
use super::server::Server;
use crate::clock;
use crate::observe::metrics;

const LOOK_EVERY: Duration = Duration::from_millis(200);
/// A cache cannot work in fewer: a file system that has less than this counts as full.
const LEAST_SEGMENTS: u64 = 4;
/// The rate of sending is that of about the last ten seconds.
const RATE_OVER: f64 = 10.0;

/// Looks until the process ends.
pub(super) async fn watch(server: Rc<Server>) {
    let cache = &server.settings.cache;
    let thresholds = Thresholds {
        warn: cache.warn_percent,
        shrink: cache.shrink_percent,
        throttle: cache.throttle_percent,
        protect: cache.protect_percent,
    };
    let (mut rate, mut last, mut sent) = (0.0, clock::now(), 0);
    loop {
        tokio::time::sleep(LOOK_EVERY).await;
        let now = clock::now();
        let passed = now.since(last).as_secs_f64();
        last = now;
        let gone = std::mem::replace(&mut sent, server.released_bytes.get());
        if !server.link_up.get() {
            // How fast it will go once there is somebody to send to, nobody knows.
            look(&server, &thresholds, None).await;
            continue;
        }
        rate += ((server.released_bytes.get() - gone) as f64 / passed.max(0.001) - rate) * (passed / RATE_OVER).min(1.0);
        look(&server, &thresholds, Some(rate)).await;
    }
}

/// `rate`: bytes a second that were sent lately, if that says anything.
async fn look(server: &Server, thresholds: &Thresholds, rate: Option<f64>) {
    let figures = &server.cache.figures;
    let used = figures.live_bytes.load(Ordering::Relaxed);
    let made = figures.made_bytes.load(Ordering::Relaxed);
    // Of the file system only what new segments could take; segments that were made are used again.
    let available = server.reserve.available().unwrap_or(u64::MAX);
    let growth = available.saturating_sub(server.settings.cache.reserve);
    // The cache is as large as its bound, or as its file system lets it become: otherwise a bound above what the file system has
    // would count as a full cache from the start.
    let bound = figures.capacity_bytes.load(Ordering::Relaxed);
    let least = bound.min(LEAST_SEGMENTS * server.settings.cache.segment);
    let capacity = bound.min(made.saturating_add(growth)).max(least);
    let free = (made.saturating_sub(used).saturating_add(growth)).min(capacity.saturating_sub(used));
    let drain = rate.filter(|rate| *rate > 1.0).map(|rate| Duration::from_secs_f64((used as f64 / rate).min(1e9)));
    let space = Space { capacity, free, drain };
    let before = server.level.get();
    let now = level(&space, thresholds, before);
    server.level.set(now);
    if now != before {
        let what = if now > before { "the cache fills" } else { "the cache empties" };
        tracing::warn!(from = before.as_str(), to = now.as_str(), free, capacity, drain_seconds = drain.map(|d| d.as_secs()), "{what}");
        if now <= Level::Warn
            && let Err(error) = server.reserve.keep()
        {
            tracing::warn!(%error, "there is no space for the reserve");
        }
    }
    let disks: Vec<&Rc<Disk>> = server.disks.values().collect();
    let load = |d: &&Rc<Disk>| Load { queued: d.stream.borrow().queue_bytes(), quota: d.quota, rpo_target: d.rpo_target };
    let active: Vec<&Rc<Disk>> =
        disks.into_iter().filter(|d| d.acknowledge.borrow().is_some() || d.stream.borrow().queue_bytes() > 0).collect();
    let loads: Vec<Load> = active.iter().map(load).collect();
    for (disk, grant) in active.iter().zip(grants(now, &space, thresholds, &loads)) {
        if disk.grant.replace(grant) != grant {
            tracing::info!(disk = %disk.label, ?grant, level = now.as_str(), "what the disk gets has changed");
            disk.tell_agent();
        }
    }
    let held = active.iter().filter(|d| d.grant.get() == Grant::Nothing).count();
    metrics::disk_gauge(metrics::CACHE_FREE, "", metrics::number(free) / metrics::number(capacity.max(1)));
    metrics::disk_gauge(metrics::CACHE_DRAIN, "", drain.map_or(f64::NAN, |d| d.as_secs_f64()));
    metrics::disk_gauge(metrics::CACHE_LEVEL, "", f64::from(now as u8));
    metrics::disk_gauge(metrics::CACHE_HELD, "", held as f64);
    let mut view = server.view.lock().unwrap_or_else(PoisonError::into_inner);
    (view.level, view.cache_capacity_bytes, view.cache_free_bytes, view.drain_seconds) =
        (now, capacity, free, drain.map(|d| d.as_secs_f64()));
}
