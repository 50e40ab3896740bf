//! Which missing regions may already stand in the replica as they are here: they are compared by digest before they are sent,
//! and only what differs travels. Pure.
//!
//! A region that waits for its verdict stays missing, so writes to it stay out of the stream; one that is written meanwhile is
//! sent as a whole. What is known to differ is forgotten by the next write to it: all of the region is sent then.

use std::collections::HashMap;
use std::ops::RangeInclusive;
use std::time::Duration;

use crate::clock::Mono;
use crate::model::{Compare, Extent, RegionSet};

/// Regions that wait for their verdict at once.
const AWAITING_MAX: usize = 256;
/// A verdict that takes longer was lost on the way: asked again.
const VERDICT_LIMIT: Duration = Duration::from_secs(60);

#[derive(Debug)]
struct Awaiting {
    sequence: u64,
    since: Mono,
    touched: bool,
}

/// What is to be done with a missing region.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Task {
    /// Send a digest.
    Compare,
    /// Send all of it, or only these parts.
    Send(Option<Vec<Extent>>),
    /// Nothing now.
    Wait,
}

/// What a verdict means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The replica has it: it is not missing any more.
    Same,
    /// Parts of it have to be sent.
    Differs,
    /// Nobody waits for it.
    Nothing,
}

/// The comparison of one disk.
#[derive(Debug, Default)]
pub struct Comparison {
    held: bool,
    open: Option<RegionSet>,
    awaiting: HashMap<u64, Awaiting>,
    differs: HashMap<u64, Vec<Extent>>,
}

impl Comparison {
    /// Begins: `missing` are compared if `compare` says so.
    pub fn begin(&mut self, compare: Compare, missing: &RegionSet) {
        *self = Self { held: compare == Compare::Held, open: (compare != Compare::No).then(|| missing.clone()), ..Self::default() };
    }

    /// The master target allows, or no longer allows, to be overwritten. What was found stays found.
    pub fn hold(&mut self, compare: Compare) {
        self.held = compare == Compare::Held;
    }

    /// The stream starts anew.
    pub fn restart(&mut self) {
        *self = Self::default();
    }

    /// What is to be done with a missing region.
    pub fn task(&mut self, region: u64, now: Mono) -> Task {
        if let Some(awaiting) = self.awaiting.get(&region) {
            if now.since(awaiting.since) < VERDICT_LIMIT {
                return Task::Wait;
            }
            self.awaiting.remove(&region);
        }
        if self.open.as_ref().is_some_and(|open| region < open.regions() && open.contains(region)) {
            return if self.awaiting.len() < AWAITING_MAX { Task::Compare } else { Task::Wait };
        }
        if self.held { Task::Wait } else { Task::Send(self.differs.get(&region).cloned()) }
    }

    /// A digest of the region is in the stream.
    pub fn asked(&mut self, region: u64, sequence: u64, now: Mono) {
        self.awaiting.insert(region, Awaiting { sequence, since: now, touched: false });
    }

    /// Regions were written here.
    pub fn touched(&mut self, regions: RangeInclusive<u64>) {
        if self.awaiting.is_empty() && self.differs.is_empty() {
            return;
        }
        for region in regions {
            if let Some(awaiting) = self.awaiting.get_mut(&region) {
                awaiting.touched = true;
            }
            self.differs.remove(&region);
        }
    }

    /// The content of these regions is not what the replica has: they are sent, not compared.
    pub fn lost(&mut self, regions: RangeInclusive<u64>) {
        if self.open.is_none() {
            return;
        }
        for region in regions {
            self.forget(region);
        }
    }

    /// A region is in the stream.
    pub fn sent(&mut self, region: u64) {
        if self.open.is_some() {
            self.forget(region);
        }
    }

    /// What the replica says.
    pub fn verdict(&mut self, region: u64, sequence: u64, differs: Vec<Extent>) -> Outcome {
        match self.awaiting.get(&region) {
            Some(awaiting) if awaiting.sequence == sequence => {}
            _ => return Outcome::Nothing,
        }
        let touched = self.awaiting.get(&region).is_some_and(|a| a.touched);
        self.forget(region);
        if touched {
            // Written since: all of it is sent.
            return Outcome::Differs;
        }
        if differs.is_empty() {
            return Outcome::Same;
        }
        self.differs.insert(region, differs);
        Outcome::Differs
    }

    /// Whether nothing can be done with any missing region before somebody at the master target allows it.
    pub fn is_held_up(&self) -> bool {
        self.held && self.unverified() == 0
    }

    /// Regions that still have to be compared.
    pub fn unverified(&self) -> u64 {
        self.open.as_ref().map_or(0, RegionSet::count)
    }

    fn forget(&mut self, region: u64) {
        if let Some(open) = self.open.as_mut().filter(|open| region < open.regions()) {
            open.remove(region);
        }
        self.awaiting.remove(&region);
        self.differs.remove(&region);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn held(compare: Compare) -> Comparison {
        let mut comparison = Comparison::default();
        comparison.begin(compare, &RegionSet::full(4));
        comparison
    }

    const NOW: Mono = Mono(1_000_000);

    #[test]
    fn only_what_differs_is_sent_and_not_before_it_may() {
        let mut c = held(Compare::Held);
        let differs = vec![Extent::new(65536, 65536)];
        for region in 0..3 {
            assert_eq!(c.task(region, NOW), Task::Compare);
            c.asked(region, 10 + region, NOW);
            assert_eq!(c.task(region, NOW), Task::Wait);
        }
        assert_eq!(c.verdict(0, 10, vec![]), Outcome::Same);
        assert_eq!(c.verdict(1, 11, differs.clone()), Outcome::Differs);
        assert_eq!(c.verdict(2, 99, vec![]), Outcome::Nothing, "of another digest");
        assert_eq!(c.unverified(), 2);
        assert_eq!(c.task(1, NOW), Task::Wait, "nobody allowed it yet");
        assert!(!c.is_held_up(), "two are still to be compared");
        c.hold(Compare::Yes);
        assert_eq!(c.task(1, NOW), Task::Send(Some(differs)));
        c.sent(1);
        assert_eq!(c.task(1, NOW), Task::Send(None), "if it is missing again");
    }

    #[test]
    fn a_write_makes_a_verdict_worthless_and_a_loss_ends_the_comparison() {
        let mut c = held(Compare::Yes);
        c.asked(0, 5, NOW);
        c.touched(0..=0);
        assert_eq!(c.verdict(0, 5, vec![]), Outcome::Differs);
        assert_eq!(c.task(0, NOW), Task::Send(None), "all of it");
        c.asked(1, 6, NOW);
        assert_eq!(c.verdict(1, 6, vec![Extent::new(0, 512)]), Outcome::Differs);
        c.touched(1..=1);
        assert_eq!(c.task(1, NOW), Task::Send(None), "all of it");
        c.asked(2, 7, NOW);
        c.lost(2..=2);
        assert_eq!(c.verdict(2, 7, vec![]), Outcome::Nothing);
        assert_eq!(c.task(2, NOW), Task::Send(None));
        c.asked(3, 8, NOW);
        assert_eq!(c.task(3, Mono(NOW.0 + 61_000_000)), Task::Compare, "a verdict that never came");
    }

    #[test]
    fn an_empty_replica_is_not_asked() {
        let mut c = held(Compare::No);
        assert_eq!(c.task(0, NOW), Task::Send(None));
        assert_eq!(c.unverified(), 0);
    }
}
