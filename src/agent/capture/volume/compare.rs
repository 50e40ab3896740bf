//! Which missing regions are compared with the replica, and what becomes of them.

use std::rc::Rc;

use super::Volume;
use crate::agent::comparison::{Outcome, Task};
use crate::clock::{self, Mono};
use crate::model::digest::TOLD_BYTES_MAX;
use crate::model::{Compare, Verdict};

/// Missing regions looked at for one with which something can be done.
const SCAN_MAX: usize = 4096;
/// Places of damage that wait to be sent again.
const TOLD_MAX: usize = 4096;
/// Less is sent without being compared first, unless nothing may be sent yet.
const COMPARE_BYTES_MIN: u64 = 64 << 20;

impl Volume {
    /// The next missing region with which something can be done, and what.
    pub(in crate::agent::capture) fn next_task(&self) -> Option<(u64, Task)> {
        // The application waits for this thread: nothing is looked through in vain while nothing may be sent, which can be days.
        if self.comparison.borrow().is_held_up() {
            return None;
        }
        let now = clock::now();
        for _ in 0..SCAN_MAX {
            let region = self.regions.borrow_mut().next_missing()?;
            if self.sending.borrow().contains(&region) {
                continue;
            }
            let task = self.comparison.borrow_mut().task(region, now);
            if task != Task::Wait {
                self.sending.borrow_mut().insert(region);
                return Some((region, task));
            }
        }
        None
    }

    /// Whether what is missing may already stand in the replica. Decided once for each epoch: what is lost later differs.
    pub(in crate::agent::capture) fn set_compare(&self, compare: Compare) {
        let epoch = self.map.header().epoch;
        if self.compared_epoch.replace(epoch) == epoch {
            self.comparison.borrow_mut().hold(compare);
            return;
        }
        // A few regions are sent sooner than they are compared.
        let few = !self.map.header().initial && self.missing_bytes() < COMPARE_BYTES_MIN && compare != Compare::Held;
        let compare = if few { Compare::No } else { compare };
        let missing = self.regions.borrow().missing().clone();
        self.comparison.borrow_mut().begin(compare, &missing);
        if compare != Compare::No && missing.count() > 0 {
            tracing::info!(
                disk = self.shared.label,
                bytes = self.missing_bytes(),
                held = compare == Compare::Held,
                "comparing with the replica; only what differs is sent"
            );
        }
    }

    /// What the replica says to a digest.
    pub(in crate::agent::capture) fn judge(self: &Rc<Self>, verdict: &Verdict) {
        if verdict.extent.len == 0 || !verdict.extent.fits(self.shared.size()) {
            return;
        }
        if verdict.at.sequence == 0 {
            // No digest's: damage that was found before, perhaps by an agent that is no more.
            let mut told = self.told_damage.borrow_mut();
            if told.len() < TOLD_MAX && verdict.extent.len <= TOLD_BYTES_MAX && !told.contains(&verdict.extent) {
                told.push(verdict.extent);
            }
            return;
        }
        let region = *self.regions.borrow().of(verdict.extent).start();
        let inside = verdict.differs.iter().all(|e| e.len > 0 && e.offset >= verdict.extent.offset && e.end() <= verdict.extent.end());
        // The last region may have grown since.
        if !inside || self.region_extent(region) != verdict.extent {
            return;
        }
        let number = self.shared.backlog().number(verdict.at.sequence);
        if self.judge_scrub(verdict, region, number) {
            return;
        }
        let outcome = self.comparison.borrow_mut().verdict(region, number, verdict.differs.clone());
        if outcome == Outcome::Same {
            // As if it had been sent with the digest: clean when the master target has come that far.
            self.regions.borrow_mut().captured(verdict.extent, number, clock::now());
            self.regions.borrow_mut().sent(region);
            self.agent.wake.ring();
        }
    }

    /// A digest of a region is in the stream.
    pub(in crate::agent::capture) fn asked(&self, region: u64, sequence: u64, now: Mono) {
        self.comparison.borrow_mut().asked(region, sequence, now);
        self.agent.wake.ring();
    }

    /// What is known to differ in a region, if it is known still.
    pub(in crate::agent::capture) fn task_now(&self, region: u64) -> Task {
        self.comparison.borrow_mut().task(region, clock::now())
    }

    /// Bytes that still have to be compared; nothing before that is decided in this epoch.
    pub(in crate::agent::capture) fn unverified_bytes(&self) -> Option<u64> {
        let decided = self.compared_epoch.get() == self.map.header().epoch;
        decided.then(|| (self.comparison.borrow().unverified() * self.regions.borrow().region_bytes()).min(self.shared.size()))
    }
}
