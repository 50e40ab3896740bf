//! What a process server does when its cache fills: by disk, in steps, and for those first whose owners can wait longest. Pure.
//!
//! | free | level | what happens |
//! |---|---|---|
//! | above `warn` | normal | everybody has the full window |
//! | below `warn` (30 %) | warn | `status` says so |
//! | below `shrink` (25 %) | shrink | disks above their fair share get a quarter of the window |
//! | below `throttle` (20 %) | throttle | disks above their fair share get nothing more: first those with the longest RPO target, and the closer `protect` comes, those with shorter ones |
//! | below `protect` (10 %) | protect | nobody gets anything; what is cached goes out |
//!
//! A disk that gets nothing more keeps its changes at its agent: in memory, then in the agent's log, then as regions of its dirty
//! map. A disk below its fair share does not notice anything above `protect`, whatever the others do. The fair share of a
//! disk is an equal part of what lies above `protect`; beside it each disk has a quota, which always holds.
//!
//! A level is left only when it is [`AWAY`] better than where it began, so that it does not flap.

use std::time::Duration;

/// Percent by which it must be better before a level is left.
const AWAY: u64 = 2;
/// Below this part of its bound a cache is not said to fill, however long it takes to send.
const SLOW_FROM_PERCENT: u64 = 5;
/// Data that takes longer to send than this counts as `warn`, and twice as long as `shrink`.
const DRAIN_WARN: Duration = Duration::from_secs(30 * 60);

/// Where the levels begin, in percent of the cache that are free.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Thresholds {
    /// Warn.
    pub warn: u64,
    /// Shrink.
    pub shrink: u64,
    /// Throttle.
    pub throttle: u64,
    /// Protect.
    pub protect: u64,
}

/// How full the cache is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// Room enough.
    #[default]
    Normal,
    /// Somebody should look.
    Warn,
    /// Those who take most get less.
    Shrink,
    /// Those who take most get nothing.
    Throttle,
    /// Nobody gets anything.
    Protect,
}

impl Level {
    /// As people read it.
    pub fn as_str(self) -> &'static str {
        match self {
            Level::Normal => "normal",
            Level::Warn => "warn",
            Level::Shrink => "shrink",
            Level::Throttle => "throttle",
            Level::Protect => "protect",
        }
    }
}

/// The cache as a whole.
#[derive(Clone, Copy, Debug)]
pub struct Space {
    /// Bytes it may hold.
    pub capacity: u64,
    /// Bytes that it can still take: of its own bound, and of the file system.
    pub free: u64,
    /// How long what is in it takes to send, as fast as lately; `None` while nothing is sent.
    pub drain: Option<Duration>,
}

/// One disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Load {
    /// Bytes in the cache.
    pub queued: u64,
    /// Most bytes it may have there.
    pub quota: u64,
    /// How old its newest point may be, by its owner.
    pub rpo_target: Duration,
}

/// What a disk gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Grant {
    /// The window.
    Full,
    /// A quarter of it.
    Quarter,
    /// Nothing more.
    Nothing,
}

impl Grant {
    /// The part of `window` that is granted, if any.
    pub fn of(self, window: u64) -> Option<u64> {
        match self {
            Grant::Full => Some(window),
            Grant::Quarter => Some(window / 4),
            Grant::Nothing => None,
        }
    }
}

/// The level, given the one before.
pub fn level(space: &Space, thresholds: &Thresholds, before: Level) -> Level {
    let percent = space.free.saturating_mul(100) / space.capacity.max(1);
    let at = |percent: u64| match percent {
        p if p < thresholds.protect => Level::Protect,
        p if p < thresholds.throttle => Level::Throttle,
        p if p < thresholds.shrink => Level::Shrink,
        p if p < thresholds.warn => Level::Warn,
        _ => Level::Normal,
    };
    // As if there were less, for whoever comes from below.
    let by_space = at(percent).max(at(percent.saturating_sub(AWAY)).min(before));
    // A trickle that takes long is no pressure.
    let fills = space.capacity.saturating_sub(space.free) >= space.capacity / 100 * SLOW_FROM_PERCENT;
    let by_time = match space.drain.filter(|_| fills) {
        Some(drain) if drain >= 2 * DRAIN_WARN => Level::Shrink,
        Some(drain) if drain >= DRAIN_WARN => Level::Warn,
        _ => Level::Normal,
    };
    by_space.max(by_time)
}

/// What each disk gets, in the order of `loads`.
pub fn grants(level: Level, space: &Space, thresholds: &Thresholds, loads: &[Load]) -> Vec<Grant> {
    let share = space.capacity / 100 * (100 - thresholds.protect) / loads.len().max(1) as u64;
    let mut targets: Vec<Duration> = loads.iter().filter(|l| l.queued > share).map(|l| l.rpo_target).collect();
    targets.sort_unstable();
    targets.dedup();
    // How far it is from `throttle` to `protect`, in steps of one class of targets: the longest is the first to wait.
    let percent = space.free.saturating_mul(100) / space.capacity.max(1);
    let (band, below) = (thresholds.throttle - thresholds.protect, thresholds.throttle.saturating_sub(percent));
    let waiting = (1 + below * targets.len() as u64 / band.max(1)).min(targets.len() as u64) as usize;
    let shortest_that_waits = targets.len().checked_sub(waiting).and_then(|index| targets.get(index)).copied();
    let grant = |load: &Load| match level {
        _ if load.queued >= load.quota => Grant::Nothing,
        Level::Protect => Grant::Nothing,
        Level::Normal | Level::Warn => Grant::Full,
        _ if load.queued <= share => Grant::Full,
        Level::Shrink => Grant::Quarter,
        Level::Throttle if shortest_that_waits.is_some_and(|shortest| load.rpo_target >= shortest) => Grant::Nothing,
        Level::Throttle => Grant::Quarter,
    };
    loads.iter().map(grant).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const THRESHOLDS: Thresholds = Thresholds { warn: 30, shrink: 25, throttle: 20, protect: 10 };

    fn space(free: u64) -> Space {
        Space { capacity: 1000, free: free * 10, drain: None }
    }

    fn load(queued: u64, minutes: u64) -> Load {
        Load { queued, quota: 500, rpo_target: Duration::from_secs(60 * minutes) }
    }

    #[test]
    fn levels_begin_where_they_are_said_to_and_do_not_flap() {
        let of = |free, before| level(&space(free), &THRESHOLDS, before);
        assert_eq!(
            [31, 29, 24, 19, 9].map(|free| of(free, Level::Normal)),
            [Level::Normal, Level::Warn, Level::Shrink, Level::Throttle, Level::Protect]
        );
        assert_eq!(of(11, Level::Protect), Level::Protect);
        assert_eq!(of(12, Level::Protect), Level::Throttle);
        assert_eq!(of(50, Level::Protect), Level::Normal);
        let slow = Space { drain: Some(Duration::from_secs(2000)), ..space(90) };
        assert_eq!(level(&slow, &THRESHOLDS, Level::Normal), Level::Warn);
        assert_eq!(level(&Space { drain: Some(Duration::from_secs(4000)), ..slow }, &THRESHOLDS, Level::Normal), Level::Shrink);
    }

    #[test]
    fn who_takes_most_waits_first_and_among_them_who_can_wait_longest() {
        // Fair share: 300.
        let loads = [load(400, 60), load(350, 5), load(10, 60)];
        let of = |free, level| grants(level, &space(free), &THRESHOLDS, &loads);
        assert_eq!(of(24, Level::Shrink), [Grant::Quarter, Grant::Quarter, Grant::Full]);
        assert_eq!(of(19, Level::Throttle), [Grant::Nothing, Grant::Quarter, Grant::Full]);
        assert_eq!(of(12, Level::Throttle), [Grant::Nothing, Grant::Nothing, Grant::Full]);
        assert_eq!(of(5, Level::Protect), [Grant::Nothing; 3]);
        assert_eq!(grants(Level::Normal, &space(90), &THRESHOLDS, &[load(500, 1)]), [Grant::Nothing], "a quota always holds");
    }

    proptest! {
        /// Whatever the others do, a disk below its share has the full window above `protect`, and somebody who is above it is
        /// held once there is less than `throttle`.
        #[test]
        fn a_modest_disk_never_notices_a_greedy_one(
            loads in proptest::collection::vec((0u64..2000, 1u64..100), 1..20), free in 0u64..100,
        ) {
            let loads: Vec<Load> = loads.into_iter().map(|(queued, minutes)| load(queued, minutes)).collect();
            let level = level(&space(free), &THRESHOLDS, Level::Normal);
            let granted = grants(level, &space(free), &THRESHOLDS, &loads);
            let share = 900 / loads.len() as u64;
            for (load, grant) in loads.iter().zip(&granted) {
                if level < Level::Protect && load.queued <= share && load.queued < load.quota {
                    prop_assert_eq!(*grant, Grant::Full);
                }
                if load.queued >= load.quota || level == Level::Protect {
                    prop_assert_eq!(*grant, Grant::Nothing);
                }
            }
            let greedy = loads.iter().any(|l| l.queued > share);
            if level == Level::Throttle && greedy {
                prop_assert!(granted.contains(&Grant::Nothing));
            }
        }
    }
}
