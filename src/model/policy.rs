//! Which recovery points stay: a ladder that keeps fewer the older they get, bounds by number, age and space. Pure.
//!
//! Ages are counted in time that the master target ran, so a jump of the wall clock drops nothing. Never dropped: the newest
//! point, the newest `points_min`, pinned points, points in use.
//!
//! What a stretch of the ladder keeps of a machine, in this order, and of equals the oldest: an application-consistent point of
//! its whole group (full before partial), an application-consistent point, a point of its whole group (full before partial),
//! any other. And, beside that one, the best point of each of its groups, in this order: full, application-consistent, the
//! oldest. A group's best is found among all points of the group, by a time that its parts have in common, so machines with
//! the same ladder keep the same ones although each is looked at by itself.

use std::cmp::Reverse;
use std::collections::{HashMap, HashSet};
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::Deserialize;

use super::group::GroupOrder;
use super::{Name, PointId, PointKind};

/// A ladder: `all for 2h, 1/h for 1d, 1/2h to 7d, 1/4h to 15d`. `N/T` keeps N points in each stretch of length T; `for` is how
/// long the step lasts, `to` the age at which it ends.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Ladder(Vec<Step>);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Step {
    /// One point is kept in each stretch of so many seconds; `None` keeps all.
    every: Option<u64>,
    /// The step ends at this age, seconds.
    until: u64,
}

/// Most steps of a ladder.
const STEPS_MAX: usize = 16;

impl Default for Ladder {
    fn default() -> Self {
        let step = |every, until| Step { every, until };
        const HOUR: u64 = 3600;
        Self(vec![
            step(None, 2 * HOUR),
            step(Some(HOUR), 26 * HOUR),
            step(Some(2 * HOUR), 7 * 24 * HOUR),
            step(Some(4 * HOUR), 15 * 24 * HOUR),
        ])
    }
}

impl FromStr for Ladder {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut steps: Vec<Step> = Vec::new();
        for part in text.split(',').map(str::trim) {
            let wrong =
                |what: &str| format!("step {part:?} of the ladder {what}: write for example \"all for 2h, 1/h for 1d, 1/2h to 7d\"");
            let seconds = |text: &str| {
                // `1/h` is one in each hour.
                let text = if text.starts_with(|c: char| c.is_ascii_digit()) { text.to_owned() } else { format!("1{text}") };
                humantime::parse_duration(&text).map(|d| d.as_secs()).ok().filter(|&s| s > 0)
            };
            let words: Vec<&str> = part.split_whitespace().collect();
            let [rate, word, length] = words[..] else { return Err(wrong("does not read RATE for TIME or RATE to AGE")) };
            let every = match rate.split_once('/') {
                None if rate == "all" => None,
                Some((count, stretch)) => {
                    let count = count.parse::<u64>().ok().filter(|&n| n > 0).ok_or_else(|| wrong("has no number before its /"))?;
                    let stretch = seconds(stretch).ok_or_else(|| wrong("has no time after its /"))?;
                    Some((stretch / count).max(1))
                }
                None => return Err(wrong("begins with neither `all` nor a rate such as 1/h")),
            };
            let begins = steps.last().map_or(0, |s| s.until);
            let length = seconds(length).ok_or_else(|| wrong("has no time at its end"))?;
            let until = match word {
                "for" => begins.saturating_add(length),
                "to" => length,
                _ => return Err(wrong("has neither `for` nor `to`")),
            };
            if until <= begins {
                return Err(wrong("ends before it begins"));
            }
            steps.push(Step { every, until });
            if steps.len() > STEPS_MAX {
                return Err(format!("a ladder has at most {STEPS_MAX} steps"));
            }
        }
        Ok(Self(steps))
    }
}

impl TryFrom<String> for Ladder {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

/// Seconds as a configuration has them: `1d2h`. Not in months, which are no whole days.
pub fn show_span(seconds: u64) -> String {
    let parts = [(86400, 'd'), (3600, 'h'), (60, 'm'), (1, 's')].iter().scan(seconds, |left, (unit, name)| {
        let count = *left / unit;
        *left %= unit;
        Some(if count > 0 { format!("{count}{name}") } else { String::new() })
    });
    let text: String = parts.collect();
    if text.is_empty() { "0s".to_owned() } else { text }
}

impl fmt::Display for Ladder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, step) in self.0.iter().enumerate() {
            let comma = if index == 0 { "" } else { ", " };
            match step.every {
                None => write!(f, "{comma}all to {}", show_span(step.until))?,
                Some(every) => write!(f, "{comma}1/{} to {}", show_span(every), show_span(step.until))?,
            }
        }
        Ok(())
    }
}

impl Ladder {
    /// The age at which it ends.
    pub fn span(&self) -> Duration {
        Duration::from_secs(self.0.last().map_or(0, |s| s.until))
    }
}

/// A whole policy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// Fewer points the older they get.
    pub ladder: Ladder,
    /// Most points of a machine.
    pub points_max: usize,
    /// So many of the newest stay, whatever the rest says.
    pub points_min: usize,
    /// Points older than this go.
    pub span: Option<Duration>,
    /// Most bytes of old content of a machine.
    pub space_max: Option<u64>,
}

/// What a policy has to know of a point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// Its id.
    pub id: PointId,
    /// Its consistency: application-consistent points are preferred.
    pub kind: PointKind,
    /// When it was listed, seconds the master target ran; the last of its group's parts, if it is one of a group.
    pub listed: u64,
    /// Pinned or in use, or the group's newest.
    pub held: bool,
    /// The whole group point that it is a part of.
    pub group_point: Option<PointId>,
    /// The group needs it: it stays when others would do as well, but costs no more space than there is.
    pub needed: bool,
}

/// What a policy has to know of a whole group point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GroupCandidate<'a> {
    /// Its id.
    pub id: PointId,
    /// The group.
    pub group: &'a Name,
    /// Every machine of the group has a part.
    pub full: bool,
    /// Application-consistent if every part is.
    pub kind: PointKind,
    /// When its last part was listed.
    pub listed: u64,
    /// Its order among the group's points.
    pub order: GroupOrder,
}

/// Why a point goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// The ladder keeps another one of its stretch.
    Thinned,
    /// Older than the ladder or the span.
    Age,
    /// More than `points_max`.
    Count,
    /// The old content takes more than `space_max`; one at a time, and only the oldest of all: behind a point that is held,
    /// going would give back little.
    Space,
}

impl Reason {
    /// As people read it.
    pub fn as_str(self) -> &'static str {
        match self {
            Reason::Thinned => "the ladder keeps another one of its stretch",
            Reason::Age => "older than the ladder or the span",
            Reason::Count => "more than points_max",
            Reason::Space => "old content takes more than space_max",
        }
    }
}

/// A place on a ladder: the step, and the stretch if the step keeps one point of each.
type Place = (usize, Option<u64>);

impl Ladder {
    fn place(&self, listed: u64, now: u64) -> Option<Place> {
        let age = now.saturating_sub(listed);
        let index = self.0.iter().position(|step| age < step.until)?;
        Some((index, self.0[index].every.map(|every| listed / every)))
    }
}

/// The best point of each group in each stretch.
fn best_of_groups(groups: &[GroupCandidate<'_>], ladder: &Ladder, now: u64) -> HashSet<PointId> {
    let rank = |p: &GroupCandidate<'_>| (p.full, p.kind == PointKind::App, Reverse((p.order, p.id)));
    let mut best: HashMap<(&Name, Place), &GroupCandidate<'_>> = HashMap::new();
    for point in groups {
        if let Some(place @ (_, Some(_))) = ladder.place(point.listed, now) {
            let held = best.entry((point.group, place)).or_insert(point);
            if rank(point) > rank(held) {
                *held = point;
            }
        }
    }
    best.into_values().map(|p| p.id).collect()
}

/// The best point of the machine in each stretch.
fn best_of_machine(points: &[Candidate], groups: &[GroupCandidate<'_>], ladder: &Ladder, now: u64) -> HashSet<PointId> {
    let of_group: HashMap<PointId, &GroupCandidate<'_>> = groups.iter().map(|g| (g.id, g)).collect();
    let rank = |index: usize, point: &Candidate| {
        let group = point.group_point.and_then(|id| of_group.get(&id));
        let class = match group {
            Some(g) if g.kind == PointKind::App => 4 + u8::from(g.full),
            _ if point.kind == PointKind::App => 3,
            Some(g) => 1 + u8::from(g.full),
            None => 0,
        };
        // The oldest is also the oldest of the longer stretch it will be in later. Of a group's points the order of the group
        // decides, which is the same for every member.
        let age = group.filter(|_| class != 3).map_or((0, index as u64, point.id), |g| g.order);
        (class, Reverse(age))
    };
    let mut best: HashMap<Place, ((u8, Reverse<GroupOrder>), PointId)> = HashMap::new();
    for (index, point) in points.iter().enumerate() {
        if let Some(place @ (_, Some(_))) = ladder.place(point.listed, now) {
            let candidate = (rank(index, point), point.id);
            let held = best.entry(place).or_insert(candidate);
            if candidate.0 > held.0 {
                *held = candidate;
            }
        }
    }
    best.into_values().map(|(_, id)| id).collect()
}

/// What goes of the points of one machine, given the oldest first. `groups` are all whole points of its groups, `used` the
/// bytes of its old content.
pub fn judge(points: &[Candidate], groups: &[GroupCandidate<'_>], policy: &Policy, now: u64, used: u64) -> Vec<(PointId, Reason)> {
    let free = points.len().saturating_sub(policy.points_min.max(1));
    let of_groups = best_of_groups(groups, &policy.ladder, now);
    let of_machine = best_of_machine(points, groups, &policy.ladder, now);
    let is_best = |p: &Candidate| of_machine.contains(&p.id) || p.group_point.is_some_and(|id| of_groups.contains(&id));
    let mut gone = Vec::new();
    for point in points[..free].iter().filter(|p| !p.held) {
        let is_best = |p: &Candidate| p.needed || is_best(p);
        let old = policy.span.is_some_and(|span| now.saturating_sub(point.listed) > span.as_secs());
        match policy.ladder.place(point.listed, now) {
            _ if old => gone.push((point.id, Reason::Age)),
            None => gone.push((point.id, Reason::Age)),
            Some((_, Some(_))) if !is_best(point) => gone.push((point.id, Reason::Thinned)),
            Some(_) => {}
        }
    }
    let named: HashSet<PointId> = gone.iter().map(|(id, _)| *id).collect();
    let mut left = points.len() - named.len();
    for point in points[..free].iter().filter(|p| !p.held && !p.needed && !named.contains(&p.id)) {
        if left <= policy.points_max {
            break;
        }
        gone.push((point.id, Reason::Count));
        left -= 1;
    }
    // Its space comes back at once: look again then.
    if gone.is_empty() && policy.space_max.is_some_and(|most| used > most) {
        gone.extend(points[..free].first().filter(|p| !p.held).map(|p| (p.id, Reason::Space)));
    }
    gone
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use uuid::Uuid;

    use super::*;

    fn point(n: u64, listed: u64) -> Candidate {
        Candidate { id: PointId(Uuid::from_u128(n.into())), kind: PointKind::Crash, listed, held: false, group_point: None, needed: false }
    }

    fn policy() -> Policy {
        Policy { ladder: "all for 100s, 1/100s to 1000s".parse().unwrap(), points_max: 1000, points_min: 1, span: None, space_max: None }
    }

    fn numbers(gone: &[(PointId, Reason)]) -> Vec<u128> {
        let mut all: Vec<u128> = gone.iter().map(|(id, _)| id.0.as_u128()).collect();
        all.sort_unstable();
        all
    }

    #[test]
    fn ladders_are_read_as_people_write_them() {
        let ladder: Ladder = "all for 2h, 1/h for 1d, 1/2h to 7d, 1/4h to 15d".parse().unwrap();
        assert_eq!(ladder, Ladder::default());
        assert_eq!(ladder.to_string(), "all to 2h, 1/1h to 1d2h, 1/2h to 7d, 1/4h to 15d");
        assert_eq!(ladder.to_string().parse::<Ladder>().unwrap(), ladder);
        assert_eq!("all for 31d".parse::<Ladder>().unwrap().to_string(), "all to 31d");
        assert_eq!("2/h for 1d".parse::<Ladder>().unwrap().0[0].every, Some(1800));
        for bad in [
            "",
            "all",
            "all for",
            "some for 2h",
            "1/h until 2h",
            "0/h for 1h",
            "1/ for 2h",
            "all for 2h, 1/h to 1h",
            "1/x for 2h",
            "all for 0s",
        ] {
            assert!(bad.parse::<Ladder>().is_err(), "{bad}");
        }
    }

    #[test]
    fn older_points_are_thinned_and_then_go() {
        let points: Vec<_> = (1..=15).map(|n| point(n, n * 50)).collect();
        // At 800 the newest (750, 700+) are within 100 s; of 100..700 one of each hundred is left, the oldest.
        let gone = judge(&points, &[], &policy(), 800, 0);
        assert_eq!(numbers(&gone), [3, 5, 7, 9, 11, 13]);
        assert!(gone.iter().all(|(_, reason)| *reason == Reason::Thinned));
        let gone = judge(&points, &[], &policy(), 1500, 0);
        assert_eq!(gone.iter().filter(|(_, r)| *r == Reason::Age).count(), 10, "of 50..500");
    }

    #[test]
    fn held_points_the_newest_and_the_minimum_stay() {
        let mut points: Vec<_> = (1..=10).map(|n| point(n, n)).collect();
        points[3].held = true;
        let minimum = Policy { points_min: 3, ..policy() };
        assert_eq!(numbers(&judge(&points, &[], &minimum, 1_000_000, 0)), [1, 2, 3, 5, 6, 7]);
        assert_eq!(numbers(&judge(&points, &[], &policy(), 1_000_000, 0)), [1, 2, 3, 5, 6, 7, 8, 9]);
        assert!(judge(&points[..1], &[], &policy(), 1_000_000, 0).is_empty());
        assert!(judge(&[], &[], &policy(), 5, 0).is_empty());
    }

    #[test]
    fn application_consistent_points_are_preferred_in_their_stretch() {
        let mut points: Vec<_> = (0..4).map(|n| point(n, 100 + n)).collect();
        points[2].kind = PointKind::App;
        points.push(point(9, 900));
        assert_eq!(numbers(&judge(&points, &[], &policy(), 900, 0)), [0, 1, 3]);
    }

    #[test]
    fn bounds_of_number_and_space_take_the_oldest_first() {
        let points: Vec<_> = (1..=5).map(|n| point(n, n)).collect();
        let few = Policy { points_max: 3, ..policy() };
        assert_eq!(numbers(&judge(&points, &[], &few, 5, 0)), [1, 2]);
        let small = Policy { space_max: Some(10), ..policy() };
        assert_eq!(judge(&points, &[], &small, 5, 11), [(points[0].id, Reason::Space)], "one, then look again");
        assert!(judge(&points, &[], &small, 5, 10).is_empty());
        assert!(judge(&points[4..], &[], &small, 5, 11).is_empty(), "never the newest");
        let mut held = points.clone();
        held[0].held = true;
        assert!(judge(&held, &[], &small, 5, 11).is_empty(), "nothing behind a held point");
    }

    proptest! {
        #[test]
        fn what_was_kept_stays_kept_while_time_passes_within_a_step(times in proptest::collection::btree_set(0u64..900, 2..60)) {
            let points: Vec<_> = times.iter().enumerate().map(|(n, &t)| point(n as u64, t)).collect();
            let kept = |points: &[Candidate], now| -> Vec<Candidate> {
                let gone = judge(points, &[], &policy(), now, 0);
                points.iter().filter(|p| gone.iter().all(|(id, _)| *id != p.id)).copied().collect()
            };
            // Dropping step by step and dropping at once leave the same: thinning never takes what a later look would keep.
            let at_once = kept(&points, 950);
            let mut by_steps = points;
            for now in [900, 910, 930, 950] {
                by_steps = kept(&by_steps, now);
            }
            prop_assert_eq!(at_once, by_steps);
        }
    }
}
