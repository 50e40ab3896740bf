//! Which process server the agent tries next, and when. Pure.
//!
//! The one that served the disks last is tried again for `switch_after`: a restart is no reason to move. Then the next in the
//! order of the configuration, one after the other, each of them for a moment. One that is to be taken out of service, or is cut
//! off, is left for another that was asked and is better ([`Choice::go_to`]), and for no other.

use std::time::Duration;

use crate::clock::Mono;

const BACKOFF_FIRST: Duration = Duration::from_millis(100);
const BACKOFF_MAX: Duration = Duration::from_secs(10);
/// While there are others to try.
const ROUND_MAX: Duration = Duration::from_secs(1);
/// How long one that took no disk is not gone to for being better.
const UNFIT_FOR: Duration = Duration::from_secs(60);

/// See the module.
#[derive(Debug)]
pub struct Choice {
    switch_after: Duration,
    current: usize,
    count: usize,
    unfit: Vec<Option<Mono>>,
    /// When the current one served the disks last, or failed first.
    since: Option<Mono>,
    backoff: Duration,
}

impl Choice {
    /// `count` process servers, of which the first is tried first.
    pub fn new(count: usize, switch_after: Duration) -> Self {
        Self { switch_after, current: 0, count, unfit: vec![None; count], since: None, backoff: BACKOFF_FIRST }
    }

    /// The one to try.
    pub fn current(&self) -> usize {
        self.current
    }

    /// The others, in the order in which they would be tried, and until when each is known not to serve.
    pub fn others(&self) -> impl Iterator<Item = (usize, Option<Mono>)> {
        let (current, count) = (self.current, self.count);
        (1..count).map(move |step| (current + step) % count).map(|other| (other, self.unfit[other]))
    }

    /// The current one took no disk, although it is there: for a while it is no better than another.
    pub fn took_nothing(&mut self, now: Mono) -> Duration {
        self.unfit[self.current] = Some(now.plus(UNFIT_FOR));
        self.failed(now)
    }

    /// Another one was found to serve better.
    pub fn go_to(&mut self, better: usize) -> Duration {
        (self.current, self.since, self.backoff) = (better, None, BACKOFF_FIRST);
        Duration::ZERO
    }

    /// The attempt that ended served the disks until then, if it did.
    pub fn served_until(&mut self, at: Option<Mono>) {
        if at.is_some() {
            (self.since, self.backoff) = (at, BACKOFF_FIRST);
        }
    }

    /// The attempt ended. Answers how long to wait before the next.
    pub fn failed(&mut self, now: Mono) -> Duration {
        let since = *self.since.get_or_insert(now);
        if self.count > 1 && now.since(since) >= self.switch_after {
            return self.go_on();
        }
        let wait = self.backoff;
        let most = if self.count > 1 { ROUND_MAX } else { BACKOFF_MAX };
        self.backoff = (self.backoff * 2).min(most);
        wait
    }

    fn go_on(&mut self) -> Duration {
        let next = (self.current + 1) % self.count;
        // All of them were tried: not at once again.
        let wait = if next <= self.current { self.backoff } else { BACKOFF_FIRST };
        self.backoff = (self.backoff * 2).min(BACKOFF_MAX);
        // The next has a chance to be reached, and to take the disks.
        self.since = None;
        self.current = next;
        wait
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> Mono {
        Mono(seconds * 1_000_000)
    }

    #[test]
    fn a_restart_is_no_reason_to_move_and_a_death_is() {
        let mut choice = Choice::new(3, Duration::from_secs(5));
        choice.served_until(Some(at(100)));
        choice.failed(at(100));
        choice.failed(at(104));
        assert_eq!(choice.current(), 0);
        choice.failed(at(105));
        assert_eq!(choice.current(), 1);
        choice.failed(at(106));
        assert_eq!(choice.current(), 1, "it has its time too");
        choice.failed(at(111));
        choice.failed(at(112));
        choice.failed(at(117));
        assert_eq!(choice.current(), 0, "round and round");
        choice.go_to(2);
        assert_eq!((choice.current(), choice.others().map(|(other, _)| other).collect::<Vec<_>>()), (2, vec![0, 1]));
        choice.took_nothing(at(120));
        choice.took_nothing(at(126));
        assert_eq!(choice.others().collect::<Vec<_>>(), [(1, None), (2, Some(at(186)))], "not to and fro");
    }
}
