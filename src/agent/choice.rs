//! Which process server the agent tries next, and when. Pure.
//!
//! The one that served the disks last is tried again for `switch_after`: a restart is no reason to move. Then the next in the
//! order of the configuration, one after the other, each of them for a moment; one that is to be taken out of service comes last.

use std::time::Duration;

use crate::clock::Mono;

const BACKOFF_FIRST: Duration = Duration::from_millis(100);
const BACKOFF_MAX: Duration = Duration::from_secs(10);
/// While there are others to try.
const ROUND_MAX: Duration = Duration::from_secs(1);
/// How long one that is to be taken out of service is not tried.
const LEFT_FOR: Duration = Duration::from_secs(60);

/// See the module.
#[derive(Debug)]
pub struct Choice {
    switch_after: Duration,
    current: usize,
    left: Vec<Option<Mono>>,
    /// When the current one served the disks last, or failed first.
    since: Option<Mono>,
    backoff: Duration,
}

impl Choice {
    /// `count` process servers, of which the first is tried first.
    pub fn new(count: usize, switch_after: Duration) -> Self {
        Self { switch_after, current: 0, left: vec![None; count], since: None, backoff: BACKOFF_FIRST }
    }

    /// The one to try.
    pub fn current(&self) -> usize {
        self.current
    }

    /// The others, in the order in which they would be tried.
    pub fn others(&self) -> impl Iterator<Item = usize> + use<> {
        let (current, count) = (self.current, self.left.len());
        (1..count).map(move |step| (current + step) % count)
    }

    /// Another one was found to serve better.
    pub fn go_to(&mut self, better: usize) -> Duration {
        (self.current, self.since, self.backoff) = (better, None, BACKOFF_FIRST);
        Duration::ZERO
    }

    /// The current one is to be taken out of service, and nobody else could be found.
    pub fn is_last_resort(&self, now: Mono) -> bool {
        self.left[self.current].is_some_and(|at| now.since(at) < LEFT_FOR)
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
        if self.left.len() > 1 && now.since(since) >= self.switch_after {
            return self.go_on(now);
        }
        let wait = self.backoff;
        let most = if self.left.len() > 1 { ROUND_MAX } else { BACKOFF_MAX };
        self.backoff = (self.backoff * 2).min(most);
        wait
    }

    /// The current one is to be taken out of service.
    pub fn leave(&mut self, now: Mono) -> Duration {
        self.left[self.current] = Some(now);
        if self.left.len() > 1 { self.go_on(now) } else { self.failed(now) }
    }

    fn go_on(&mut self, now: Mono) -> Duration {
        let count = self.left.len();
        let stays = |left: &Option<Mono>| left.is_none_or(|at| now.since(at) >= LEFT_FOR);
        let mut others = (1..count).map(|step| (self.current + step) % count);
        // One that is to be taken out of service is better than one that does not serve.
        let next = others.clone().find(|&i| stays(&self.left[i])).or_else(|| others.next()).unwrap_or(self.current);
        // All of them were tried: not at once again.
        let wait = if next <= self.current { self.backoff } else { BACKOFF_FIRST };
        self.backoff = (self.backoff * 2).min(BACKOFF_MAX);
        // The next has a chance to be reached, and to take the disks.
        self.since = (next == self.current).then_some(now);
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
        assert_eq!((choice.current(), choice.others().collect::<Vec<_>>()), (2, vec![0, 1]));
    }

    #[test]
    fn one_that_is_to_be_taken_out_of_service_is_left_at_once_and_comes_last() {
        let mut choice = Choice::new(2, Duration::from_secs(5));
        choice.served_until(Some(at(1)));
        choice.leave(at(1));
        assert_eq!(choice.current(), 1);
        choice.failed(at(2));
        choice.failed(at(5));
        assert_eq!(choice.current(), 1, "it has its time");
        choice.failed(at(8));
        assert_eq!((choice.current(), choice.is_last_resort(at(8))), (0, true), "going away is better than dead");
        choice.leave(at(9));
        choice.failed(at(10));
        choice.failed(at(80));
        assert_eq!((choice.current(), choice.is_last_resort(at(80))), (0, false), "after a while it may have come back to stay");
        let mut alone = Choice::new(1, Duration::from_secs(5));
        assert!(alone.leave(at(1)) > Duration::ZERO);
        assert_eq!(alone.current(), 0);
    }
}
