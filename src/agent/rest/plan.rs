//! What is brought to rest around a marker and in which order, how far that is, and what has to be undone. Pure: touches
//! nothing itself.
//!
//! Facts that hold here:
//! - Scripts first, then guests, then file systems, each kind as configured; undone in the exact reverse order.
//! - Nothing is begun once anything was undone, or anybody wanted it undone.
//! - Whatever was begun is undone exactly once, unless it is known that it changed nothing. What is still being done is undone
//!   when it is done.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::model::change::{LABEL_BYTES_MAX, is_label};

/// Something that can be brought to rest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    /// What the configuration calls it.
    pub name: String,
    /// What it is.
    pub what: What,
}

/// How something is brought to rest and set going again. The order is that in which it is done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum What {
    /// A command, called with `--pre` and with `--post`.
    Script {
        /// The program.
        path: PathBuf,
        /// Each call ends within this time, or is ended.
        timeout: Duration,
    },
    /// The file systems of a guest, by the guest agent behind a socket.
    Guest {
        /// The socket.
        socket: PathBuf,
    },
    /// A file system of this host.
    Mount {
        /// Where it is mounted.
        path: PathBuf,
    },
}

impl What {
    fn rank(&self) -> u8 {
        match self {
            What::Script { .. } => 0,
            What::Guest { .. } => 1,
            What::Mount { .. } => 2,
        }
    }

    /// Whether writers wait as long as it is at rest.
    pub fn stops_writers(&self) -> bool {
        !matches!(self, What::Script { .. })
    }
}

/// Everything that is brought to rest together.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// The machine, for scripts.
    pub machine: String,
    /// In the order in which it is done.
    pub parts: Vec<Part>,
    /// From the first file system on, everything is undone after this time, whatever happens.
    pub freeze_max: Duration,
}

impl Plan {
    /// Puts the parts into their order.
    pub fn new(machine: String, mut parts: Vec<Part>, freeze_max: Duration) -> Self {
        parts.sort_by_key(|part| part.what.rank());
        Self { machine, parts, freeze_max }
    }

    /// The longest that bringing everything to rest takes.
    pub fn longest(&self) -> Duration {
        self.scripts() + self.freeze_max
    }

    /// The sum of the scripts' limits: the longest that one round over them takes.
    pub fn scripts(&self) -> Duration {
        let limit = |part: &Part| if let What::Script { timeout, .. } = part.what { timeout } else { Duration::ZERO };
        self.parts.iter().map(limit).sum()
    }
}

/// Why a point that was to be application-consistent is not: the kind for counters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Cause {
    /// A script failed or took too long.
    Script,
    /// A guest agent.
    Guest,
    /// A file system.
    Mount,
    /// The time was over before the writes were held.
    Late,
    /// What was to do it ended, or could not begin.
    Guard,
    /// Something of an earlier time is still at rest.
    Unfinished,
}

impl Cause {
    /// As a label of a metric.
    pub fn as_str(self) -> &'static str {
        match self {
            Cause::Script => "script",
            Cause::Guest => "guest-agent",
            Cause::Mount => "mount",
            Cause::Late => "late",
            Cause::Guard => "guard",
            Cause::Unfinished => "unfinished",
        }
    }
}

impl From<&What> for Cause {
    fn from(what: &What) -> Self {
        match what {
            What::Script { .. } => Cause::Script,
            What::Guest { .. } => Cause::Guest,
            What::Mount { .. } => Cause::Mount,
        }
    }
}

/// Why something is not at rest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// For counters.
    pub cause: Cause,
    /// For a person.
    pub reason: String,
}

impl Failure {
    /// The reason as a remark of a point: one line, bounded.
    pub fn remark(&self) -> String {
        let mut text: String = self.reason.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
        while !is_label(&text) {
            // Never within a character.
            let end = (0..LABEL_BYTES_MAX.min(text.len())).rev().find(|&end| text.is_char_boundary(end)).unwrap_or_default();
            text.truncate(end);
        }
        text
    }
}

/// How far a part is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Waiting,
    Doing,
    /// At rest, or perhaps so.
    Done,
    Undoing,
    Clean,
}

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Bring this part to rest.
    Do(usize),
    /// Everything is at rest.
    Hold,
    /// Set this part going again.
    Undo(usize),
    /// Something is under way.
    Wait,
    /// Nothing is at rest any more.
    End,
}

/// One time of bringing everything to rest and setting it going again.
#[derive(Debug)]
pub struct Progress {
    stages: Vec<Stage>,
    ending: bool,
}

impl Progress {
    /// Nothing is done yet.
    pub fn new(parts: usize) -> Self {
        Self { stages: vec![Stage::Waiting; parts], ending: false }
    }

    /// Only to be undone: the parts that an earlier process began.
    pub fn left_behind(parts: usize, begun: &BTreeSet<usize>) -> Self {
        let stage = |n| if begun.contains(&n) { Stage::Done } else { Stage::Clean };
        Self { stages: (0..parts).map(stage).collect(), ending: true }
    }

    /// What to do now. The same until it is begun.
    pub fn order(&self) -> Order {
        let first = |stage| self.stages.iter().position(|s| *s == stage);
        if self.ending {
            // The last that was done is the first to be undone.
            return match self.stages.iter().rposition(|s| *s == Stage::Done) {
                Some(part) => Order::Undo(part),
                None if self.stages.iter().any(|s| matches!(s, Stage::Doing | Stage::Undoing)) => Order::Wait,
                None => Order::End,
            };
        }
        match (first(Stage::Doing), first(Stage::Waiting)) {
            (Some(_), _) => Order::Wait,
            (None, Some(part)) => Order::Do(part),
            (None, None) => Order::Hold,
        }
    }

    /// The order was given to somebody who carries it out.
    pub fn begin(&mut self, order: Order) {
        match order {
            Order::Do(part) => self.stages[part] = Stage::Doing,
            Order::Undo(part) => self.stages[part] = Stage::Undoing,
            Order::Hold | Order::Wait | Order::End => {}
        }
    }

    /// A part was done, or failed; `clean` when it is sure that there is nothing to undo.
    pub fn handle_done(&mut self, part: usize, failed: bool, clean: bool) {
        self.stages[part] = if clean { Stage::Clean } else { Stage::Done };
        self.ending |= failed;
    }

    /// A part was undone, or nothing more can be tried.
    pub fn handle_undone(&mut self, part: usize) {
        self.stages[part] = Stage::Clean;
    }

    /// From now on only to undo: somebody asked, the time is over, or who asked is gone.
    pub fn handle_end(&mut self) {
        self.ending = true;
        self.stages.iter_mut().filter(|s| **s == Stage::Waiting).for_each(|s| *s = Stage::Clean);
    }

    /// Whether something is still being brought to rest.
    pub fn is_doing(&self) -> bool {
        self.stages.contains(&Stage::Doing)
    }

    /// Whether everything is to be undone.
    pub fn is_ending(&self) -> bool {
        self.ending
    }
}

/// The note of what is begun, by who may have died since. One line for the plan, then a line for each part: `begun N` before
/// it is touched, `clean N` when it turned out, or was made, not to be at rest.
pub mod note {
    use super::{BTreeSet, Plan};

    /// Most bytes of a note that are looked at.
    pub const BYTES_MAX: u64 = 1 << 20;

    /// The first line.
    pub fn head(plan: &Plan) -> String {
        serde_json::to_string(plan).unwrap_or_default() + "\n"
    }

    /// Says that a part is about to be begun.
    pub fn begun(part: usize) -> String {
        format!("begun {part}\n")
    }

    /// Says that a part is not at rest.
    pub fn clean(part: usize) -> String {
        format!("clean {part}\n")
    }

    /// The plan, and the parts that may be at rest. A last line that was not written to its end does not count: what it says
    /// was not begun. `None` for a note without a plan: nothing was begun.
    pub fn read(text: &str) -> Option<(Plan, BTreeSet<usize>)> {
        let whole = &text[..=text.rfind('\n')?];
        let mut lines = whole.lines();
        let plan: Plan = serde_json::from_str(lines.next()?).ok()?;
        let mut begun = BTreeSet::new();
        for line in lines {
            match line.split_once(' ').map(|(word, number)| (word, number.parse::<usize>())) {
                Some(("begun", Ok(part))) if part < plan.parts.len() => drop(begun.insert(part)),
                Some(("clean", Ok(part))) => drop(begun.remove(&part)),
                _ => {}
            }
        }
        Some((plan, begun))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn plan() -> Plan {
        let part = |name: &str, what| Part { name: name.to_owned(), what };
        let script = |name: &str| part(name, What::Script { path: "/s".into(), timeout: Duration::from_secs(2) });
        let mount = |name: &str| part(name, What::Mount { path: "/m".into() });
        let parts = vec![mount("m1"), script("s1"), part("g", What::Guest { socket: "/g".into() }), mount("m2"), script("s2")];
        Plan::new("web01".to_owned(), parts, Duration::from_secs(10))
    }

    #[test]
    fn scripts_come_first_then_guests_then_file_systems() {
        let plan = plan();
        let names: Vec<_> = plan.parts.iter().map(|p| p.name.as_str()).collect();
        assert_eq!(names, ["s1", "s2", "g", "m1", "m2"]);
        assert_eq!((plan.scripts(), plan.longest()), (Duration::from_secs(4), Duration::from_secs(14)));
    }

    #[test]
    fn a_part_that_hangs_is_undone_last_and_the_others_at_once() {
        let mut progress = Progress::new(3);
        for part in 0..2 {
            assert_eq!(progress.order(), Order::Do(part));
            progress.begin(Order::Do(part));
            progress.handle_done(part, false, false);
        }
        progress.begin(Order::Do(2));
        assert_eq!(progress.order(), Order::Wait);
        progress.handle_end();
        for part in [1, 0] {
            assert_eq!(progress.order(), Order::Undo(part));
            progress.begin(Order::Undo(part));
            progress.handle_undone(part);
        }
        assert_eq!(progress.order(), Order::Wait);
        progress.handle_done(2, false, false);
        assert_eq!(progress.order(), Order::Undo(2));
        progress.begin(Order::Undo(2));
        progress.handle_undone(2);
        assert_eq!(progress.order(), Order::End);
    }

    #[test]
    fn a_note_tells_what_may_be_at_rest() {
        let mut text = note::head(&plan());
        assert_eq!(note::read(&text), Some((plan(), BTreeSet::new())));
        text += &(note::begun(0) + &note::begun(1) + &note::clean(1) + &note::begun(3) + "begun 4");
        assert_eq!(note::read(&text), Some((plan(), BTreeSet::from([0, 3]))));
        assert_eq!(note::read(""), None);
        assert_eq!(note::read(note::head(&plan()).trim_end()), None, "torn");
        assert_eq!(note::read(&(note::head(&plan()) + "begun 99\nbegun x\n\n")), Some((plan(), BTreeSet::new())));
    }

    #[test]
    fn a_remark_is_one_bounded_line() {
        let failure = |reason: &str| Failure { cause: Cause::Script, reason: reason.to_owned() };
        assert_eq!(failure("a\nb\u{7}").remark(), "a b ");
        let long = failure(&"ü".repeat(400)).remark();
        assert!(is_label(&long) && long.len() >= LABEL_BYTES_MAX - 2);
    }

    proptest! {
        /// Whatever fails, hangs or is asked, and whenever: all that was begun and may be at rest is undone once.
        #[test]
        fn what_was_begun_is_undone_once(parts in 0usize..6, choices in proptest::collection::vec(0u8..8, 0..60)) {
            let mut progress = Progress::new(parts);
            let (mut doing, mut undoing, mut at_rest, mut begun_undo) = (Vec::new(), Vec::new(), BTreeSet::new(), false);
            let mut choices = choices.into_iter().chain(std::iter::repeat(7));
            for _ in 0..200 {
                let order = progress.order();
                if order == Order::End {
                    break;
                }
                let choice = choices.next().unwrap();
                match (order, choice) {
                    (Order::Do(part), _) => {
                        prop_assert!(!begun_undo && !progress.is_ending() && at_rest.len() == part);
                        progress.begin(order);
                        doing.push(part);
                        at_rest.insert(part);
                    }
                    (Order::Undo(part), _) => {
                        begun_undo = true;
                        prop_assert!(at_rest.contains(&part) && !doing.contains(&part) && !undoing.contains(&part));
                        progress.begin(order);
                        undoing.push(part);
                    }
                    (_, 0) | (Order::Hold, _) => progress.handle_end(),
                    (_, _) => {
                        if let Some(part) = doing.pop() {
                            progress.handle_done(part, choice < 3, choice == 1);
                            if choice == 1 {
                                at_rest.remove(&part);
                            }
                        } else if let Some(part) = undoing.pop() {
                            progress.handle_undone(part);
                            prop_assert!(at_rest.remove(&part));
                        }
                    }
                }
            }
            prop_assert_eq!(progress.order(), Order::End);
            prop_assert!(at_rest.is_empty());
        }
    }
}
