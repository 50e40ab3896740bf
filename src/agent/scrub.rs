//! Which region is compared with the replica next, while replication goes on: one after the other, round and round. Pure.
//!
//! A digest stands at an exact place in the stream, so what is written before or after it is no difference. Only regions that are
//! in the stream as a whole are compared; what differs is damage, here or there, and is sent again.

use std::collections::HashMap;
use std::time::Duration;

use crate::clock::Mono;

/// Regions that wait for their verdict at once.
const AWAITING_MAX: usize = 32;
/// A verdict that takes longer was lost on the way, with a stream that began anew: the region is compared again.
const VERDICT_LIMIT: Duration = Duration::from_secs(60);

/// A round over the disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Round {
    /// Somebody asked for it: as fast as it goes.
    pub asked: bool,
    /// Regions of the disk.
    pub regions: u64,
    /// Regions whose verdict came.
    pub done: u64,
    /// Bytes that differed.
    pub differing: u64,
    /// Bytes that could not be read here.
    pub unread: u64,
    /// When it began.
    pub began: Mono,
    /// When it ended, if it did.
    pub ended: Option<Mono>,
}

/// What is known of the rounds over a disk.
#[derive(Clone, Debug, Default)]
pub struct Rounds {
    /// The one under way.
    pub under_way: Option<Round>,
    /// The last one that ended.
    pub last: Option<Round>,
    /// The last one that somebody asked for and that ended.
    pub last_asked: Option<Round>,
}

/// The scrub of one disk.
#[derive(Debug, Default)]
pub struct Scrub {
    /// The next region; all of them were asked for when it is the number of regions.
    cursor: u64,
    again: Vec<u64>,
    awaiting: HashMap<u64, (u64, Mono)>,
    rounds: Rounds,
}

impl Scrub {
    /// Begins a round now, in place of one that began by itself. One that somebody asked for goes on.
    pub fn begin(&mut self, regions: u64, asked: bool, now: Mono) {
        if self.is_urgent() {
            return;
        }
        let under_way = Some(Round { asked, regions, done: 0, differing: 0, unread: 0, began: now, ended: None });
        *self = Self { rounds: Rounds { under_way, ..std::mem::take(&mut self.rounds) }, ..Self::default() };
    }

    /// Whether a round is under way that somebody asked for.
    pub fn is_urgent(&self) -> bool {
        self.round().is_some_and(|round| round.asked)
    }

    /// The region to compare now, if there is one. The caller says [`Scrub::asked`] or [`Scrub::passed_over`].
    pub fn next(&mut self, now: Mono) -> Option<u64> {
        let regions = self.round()?.regions;
        let late: Vec<u64> =
            self.awaiting.iter().filter(|(_, (_, at))| now.since(*at) >= VERDICT_LIMIT).map(|(region, _)| *region).collect();
        for region in late {
            self.awaiting.remove(&region);
            self.again.push(region);
        }
        if self.awaiting.len() >= AWAITING_MAX {
            return None;
        }
        if let Some(region) = self.again.pop() {
            return Some(region);
        }
        if self.cursor >= regions {
            return None;
        }
        self.cursor += 1;
        Some(self.cursor - 1)
    }

    /// A digest of the region is in the stream, with this number.
    pub fn asked(&mut self, region: u64, number: u64, now: Mono) {
        self.awaiting.insert(region, (number, now));
    }

    /// There was no room for its digest: it comes again.
    pub fn put_back(&mut self, region: u64) {
        self.again.push(region);
    }

    /// The region cannot be compared now: it is being sent, or is gone. That settles what it is.
    pub fn passed_over(&mut self, now: Mono) {
        self.count(0, now);
    }

    /// So many bytes cannot be read. That settles what they are, for this round.
    pub fn unread(&mut self, bytes: u64, now: Mono) {
        if let Some(round) = &mut self.rounds.under_way {
            round.unread += bytes;
        }
        self.count(0, now);
    }

    /// The stream began anew: what was asked is not answered any more.
    pub fn restart(&mut self) {
        let lost: Vec<u64> = self.awaiting.drain().map(|(region, _)| region).collect();
        self.again.extend(lost);
    }

    /// A verdict. False if nobody here waits for it.
    pub fn verdict(&mut self, region: u64, number: u64, differing: u64, now: Mono) -> bool {
        let ours = self.awaiting.get(&region).is_some_and(|(asked, _)| *asked == number);
        if ours {
            self.awaiting.remove(&region);
            self.count(differing, now);
        }
        ours
    }

    /// Whether a verdict is waited for that can still come.
    pub fn awaits(&self, now: Mono) -> bool {
        self.awaiting.values().any(|(_, at)| now.since(*at) < VERDICT_LIMIT)
    }

    /// The round under way.
    pub fn round(&self) -> Option<&Round> {
        self.rounds.under_way.as_ref()
    }

    /// What is known of rounds.
    pub fn rounds(&self) -> &Rounds {
        &self.rounds
    }

    fn count(&mut self, differing: u64, now: Mono) {
        let Some(round) = &mut self.rounds.under_way else { return };
        round.done += 1;
        round.differing += differing;
        if round.done >= round.regions {
            round.ended = Some(now);
            let ended = self.rounds.under_way.take();
            if ended.as_ref().is_some_and(|round| round.asked) {
                self.rounds.last_asked.clone_from(&ended);
            }
            self.rounds.last = ended;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Mono = Mono(1_000_000);

    #[test]
    fn every_region_is_compared_once_and_a_lost_verdict_is_asked_for_again() {
        let mut scrub = Scrub::default();
        assert_eq!(scrub.next(NOW), None);
        scrub.begin(40, true, NOW);
        let mut asked = Vec::new();
        while let Some(region) = scrub.next(NOW) {
            scrub.asked(region, 100 + region, NOW);
            asked.push(region);
        }
        assert_eq!(asked.len(), AWAITING_MAX);
        assert!(!scrub.verdict(0, 99, 0, NOW), "of another digest");
        for region in 1..32 {
            assert!(scrub.verdict(region, 100 + region, u64::from(region == 7) * 65536, NOW));
        }
        scrub.restart();
        assert!(!scrub.verdict(0, 100, 0, NOW), "of a stream that is over");
        let later = Mono(NOW.0 + 61_000_000);
        let mut rest = Vec::new();
        while let Some(region) = scrub.next(later) {
            rest.push(region);
            match region {
                39 => scrub.passed_over(later),
                _ => scrub.asked(region, 200 + region, later),
            }
        }
        assert_eq!(rest, [0, 32, 33, 34, 35, 36, 37, 38, 39]);
        assert!(scrub.rounds().last.is_none());
        for region in [0, 32, 33, 34, 35, 36, 37, 38] {
            assert!(scrub.verdict(region, 200 + region, 0, later));
        }
        let last = scrub.rounds().last.clone().unwrap();
        assert_eq!((last.done, last.differing, last.ended), (40, 65536, Some(later)));
        assert_eq!(scrub.next(later), None);
        // One that begins by itself does not hide how the one ended that somebody waits for.
        scrub.begin(40, false, later);
        assert!(scrub.round().is_some() && !scrub.is_urgent());
        assert_eq!(scrub.rounds().last_asked, Some(last));
    }
}
