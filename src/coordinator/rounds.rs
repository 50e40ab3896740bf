//! One round of a group: freeze, prepare, commit, or release. Pure: takes what members say and what timers say, returns orders.
//!
//! Why the point is one moment: a member says *held* when new writes of it wait. The decision to commit falls when every member of
//! the point has said so, and a member puts its marker in only while it still holds, without having opened in between. So all of
//! them hold at the moment of the decision. Take a write that is in the point: it was issued before its member held, so before the
//! decision. What it was issued because of was answered earlier still, so before any marker was put in, and a write has its
//! place in the stream before it is answered: it is in the point too. Writes that are under way while a member holds need not
//! be waited for: until they are answered nothing can follow from them.
//!
//! A member opens as soon as its marker is in; nothing is gained by waiting for the others, which hold still or have marked.
//!
//! Nothing here keeps a member held: it opens by its own clock whatever becomes of the coordinator, and says `Failed`.

/// What a member's part in the round has come to.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Part {
    /// Asked in this phase; has not answered.
    Asked,
    /// Answered the freeze: at rest, or not.
    Frozen(bool),
    /// Holds its writes; at rest or not.
    Held(bool),
    /// Has put its marker in.
    Marked,
    /// Takes no part.
    Out(Cause),
}

/// Why a member takes no part.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Cause {
    /// It was not there, or not ready, when the round began.
    Absent(String),
    /// It did not answer in time.
    Silent,
    /// Its connection ended.
    Gone,
    /// It says so itself.
    Failed(String),
}

impl std::fmt::Display for Cause {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Cause::Absent(why) | Cause::Failed(why) => f.write_str(why),
            Cause::Silent => f.write_str("did not answer in time"),
            Cause::Gone => f.write_str("its connection ended"),
        }
    }
}

impl Cause {
    /// The same in one word, for a metric.
    pub fn word(&self) -> &'static str {
        match self {
            Cause::Absent(_) => "absent",
            Cause::Silent => "silent",
            Cause::Gone => "gone",
            Cause::Failed(_) => "failed",
        }
    }
}

/// Where the round stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Phase {
    /// Hooks run everywhere; writes go on.
    Freezing,
    /// Members hold.
    Preparing,
    /// Members put their markers in.
    Committing,
    /// Nothing more happens.
    Over,
}

/// What happens to a round. Members are named by their place in its list.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Event {
    /// A member's hooks have run.
    Frozen(usize, bool),
    /// A member holds, at rest or not.
    Held(usize, bool),
    /// A member's marker is in.
    Marked(usize),
    /// A member takes no part and holds nothing.
    Failed(usize, String),
    /// A member's connection ended.
    Gone(usize),
    /// The time for a phase is over.
    Timeout(Phase),
    /// The group changes.
    Abort,
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Order {
    /// Tell a member to bring its applications to rest.
    Freeze(usize),
    /// Tell a member to hold.
    Prepare(usize),
    /// Tell these members to put the marker in; `true`: all of them are at rest.
    Commit(Vec<usize>, bool),
    /// Tell a member to let go.
    Release(usize),
    /// [`Event::Timeout`] after the time allowed for this phase.
    Timer(Phase),
    /// It has ended.
    Over(Outcome),
}

/// How a round ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// Every member of the point has its marker; `true`: application-consistent.
    Made(bool),
    /// No marker was made.
    Skipped,
    /// Markers were made, and not every member has confirmed its own: the point may never be complete.
    Unconfirmed,
}

/// What the group wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Wish {
    /// Applications at rest.
    pub app: bool,
    /// Rather no point than one whose applications are not at rest.
    pub app_or_nothing: bool,
    /// Rather a point without some members than none.
    pub partial: bool,
}

/// A round.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Round {
    wish: Wish,
    phase: Phase,
    parts: Vec<Part>,
    /// Who was told to commit, and whether all of them are at rest.
    committed: Vec<usize>,
    app: bool,
}

impl Round {
    /// Begins with the members of a group; `absent` says of each why it cannot take part, if so.
    pub fn start(wish: Wish, absent: Vec<Option<String>>) -> (Self, Vec<Order>) {
        let part = |why: Option<String>| why.map_or(Part::Asked, |why| Part::Out(Cause::Absent(why)));
        let mut round = Self { wish, phase: Phase::Freezing, parts: absent.into_iter().map(part).collect(), committed: vec![], app: false };
        let orders = if !round.is_enough() {
            round.end(Outcome::Skipped)
        } else if wish.app {
            let mut orders: Vec<_> = round.asked().map(Order::Freeze).collect();
            orders.push(Order::Timer(Phase::Freezing));
            orders
        } else {
            round.prepare()
        };
        (round, orders)
    }

    /// Where it stands.
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// What became of each member.
    pub fn parts(&self) -> &[Part] {
        &self.parts
    }

    /// Members without a part, with the reason.
    pub fn missing(&self) -> impl Iterator<Item = (usize, &Cause)> {
        self.parts.iter().enumerate().filter_map(|(i, p)| if let Part::Out(cause) = p { Some((i, cause)) } else { None })
    }

    /// Takes an event. What does not fit the phase changes nothing: it is late, or repeated.
    pub fn on(&mut self, event: Event) -> Vec<Order> {
        match (self.phase, event) {
            (Phase::Over, _) => vec![],
            // Whoever was told to commit may have done so.
            (Phase::Committing, Event::Abort) => self.end(Outcome::Unconfirmed),
            (_, Event::Abort) => self.end(Outcome::Skipped),
            (_, Event::Gone(i)) => self.leaves(i, Cause::Gone),
            (_, Event::Failed(i, why)) => self.leaves(i, Cause::Failed(why)),
            (Phase::Freezing, Event::Frozen(i, good)) => self.answers(i, Part::Asked, Part::Frozen(good)),
            (Phase::Preparing, Event::Held(i, good)) => self.answers(i, Part::Asked, Part::Held(good)),
            (Phase::Committing, Event::Marked(i)) => {
                let held = self.parts.get(i).cloned().filter(|p| matches!(p, Part::Held(_)));
                held.map_or_else(Vec::new, |held| self.answers(i, held, Part::Marked))
            }
            (phase, Event::Timeout(of)) if phase == of => self.timeout(),
            _ => vec![],
        }
    }

    fn answers(&mut self, i: usize, from: Part, to: Part) -> Vec<Order> {
        match self.parts.get_mut(i) {
            Some(part) if *part == from => *part = to,
            _ => return vec![],
        }
        self.go_on()
    }

    fn leaves(&mut self, i: usize, cause: Cause) -> Vec<Order> {
        match self.parts.get_mut(i) {
            Some(part @ (Part::Asked | Part::Frozen(_) | Part::Held(_))) => *part = Part::Out(cause),
            _ => return vec![],
        }
        // As soon as nothing can come of it nobody waits any longer.
        if self.phase != Phase::Committing && !self.is_enough() {
            return self.end(Outcome::Skipped);
        }
        self.go_on()
    }

    fn timeout(&mut self) -> Vec<Order> {
        let late: Vec<usize> = match self.phase {
            // They may be at rest a moment later; whether they were when they held they say themselves.
            Phase::Freezing => vec![],
            Phase::Preparing => self.asked().collect(),
            Phase::Committing => self.held().collect(),
            Phase::Over => vec![],
        };
        for &i in &late {
            self.parts[i] = Part::Out(Cause::Silent);
        }
        let mut orders: Vec<_> = late.into_iter().map(Order::Release).collect();
        orders.extend(match self.phase {
            Phase::Freezing => self.after_freeze(),
            Phase::Preparing => self.decide(),
            Phase::Committing => self.end(Outcome::Unconfirmed),
            Phase::Over => vec![],
        });
        orders
    }

    fn go_on(&mut self) -> Vec<Order> {
        let waits = match self.phase {
            Phase::Freezing | Phase::Preparing => self.asked().next().is_some(),
            Phase::Committing => self.held().next().is_some(),
            Phase::Over => true,
        };
        match self.phase {
            _ if waits => vec![],
            Phase::Freezing => self.after_freeze(),
            Phase::Preparing => self.decide(),
            Phase::Committing => {
                let confirmed = self.committed.iter().all(|&i| self.parts[i] == Part::Marked);
                self.end(if confirmed { Outcome::Made(self.app) } else { Outcome::Unconfirmed })
            }
            Phase::Over => vec![],
        }
    }

    fn after_freeze(&mut self) -> Vec<Order> {
        let at_rest = self.parts.iter().all(|p| matches!(p, Part::Frozen(true) | Part::Out(_)));
        if self.wish.app_or_nothing && !at_rest { self.end(Outcome::Skipped) } else { self.prepare() }
    }

    fn prepare(&mut self) -> Vec<Order> {
        self.phase = Phase::Preparing;
        for part in self.parts.iter_mut().filter(|p| matches!(p, Part::Frozen(_))) {
            *part = Part::Asked;
        }
        let mut orders: Vec<_> = self.asked().map(Order::Prepare).collect();
        orders.push(Order::Timer(Phase::Preparing));
        orders
    }

    fn decide(&mut self) -> Vec<Order> {
        let at_rest = self.held().all(|i| self.parts[i] == Part::Held(true));
        if !self.is_enough() || (self.wish.app_or_nothing && !at_rest) {
            return self.end(Outcome::Skipped);
        }
        self.phase = Phase::Committing;
        self.committed = self.held().collect();
        self.app = self.wish.app && at_rest;
        vec![Order::Commit(self.committed.clone(), self.app), Order::Timer(Phase::Committing)]
    }

    /// Ends; whoever may hold or be at rest is told to let go.
    fn end(&mut self, outcome: Outcome) -> Vec<Order> {
        self.phase = Phase::Over;
        let bound = |p: &Part| matches!(p, Part::Asked | Part::Frozen(_) | Part::Held(_));
        let mut orders: Vec<_> = (0..self.parts.len()).filter(|&i| bound(&self.parts[i])).map(Order::Release).collect();
        orders.push(Order::Over(outcome));
        orders
    }

    fn asked(&self) -> impl Iterator<Item = usize> {
        (0..self.parts.len()).filter(|&i| self.parts[i] == Part::Asked)
    }

    fn held(&self) -> impl Iterator<Item = usize> {
        (0..self.parts.len()).filter(|&i| matches!(self.parts[i], Part::Held(_)))
    }

    /// Whether a point of those who are left would be wanted. One machine alone is no group, unless it is all of it.
    fn is_enough(&self) -> bool {
        let inside = self.parts.iter().filter(|p| !matches!(p, Part::Out(_))).count();
        let least = if self.wish.partial { self.parts.len().min(2) } else { self.parts.len() };
        inside > 0 && inside >= least
    }
}
