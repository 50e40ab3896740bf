//! A member's side of the rounds of its group. Pure: takes what the coordinator says and what happens here, returns what to do.
//!
//! What holds whatever the coordinator does: a hold has a limit of its own ([`Input::Limit`]) after which writes go on; a
//! marker is put in only while writes are held without a break since the member said so; applications that were brought to
//! rest for a round are woken when it ends in any way.

/// What happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Input {
    /// The coordinator wants the applications at rest.
    Freeze(u64),
    /// They are, or could not be brought to rest.
    Rest(u64, bool),
    /// They were woken because their time was over.
    RestOver(u64),
    /// The coordinator wants the writes held.
    Prepare(u64),
    /// No new write passes any more.
    Holding(u64),
    /// The writes have been held as long as they may.
    Limit(u64),
    /// The coordinator wants the marker put in.
    Commit(u64),
    /// The marker is in every stream, or could not be put there.
    Inserted(u64, bool),
    /// The coordinator lets go.
    Release(u64),
    /// The connection ended.
    Lost,
}

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Output {
    /// Bring the applications to rest; [`Input::Rest`] follows, and [`Input::RestOver`] when they are woken by their own limit.
    BeginRest(u64),
    /// Wake them, whether they are at rest already or on the way.
    EndRest,
    /// Let no new write pass; [`Input::Holding`] follows, and [`Input::Limit`] after the limit.
    Hold(u64),
    /// Put the marker into every stream and let writes pass, in one step; [`Input::Inserted`] follows at once.
    InsertAndOpen(u64),
    /// Let writes pass.
    Open,
    /// Tell the coordinator.
    Say(Say),
}

/// What a member tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Say {
    /// At rest, or not.
    Frozen(u64, bool),
    /// Holding, at rest or not.
    Held(u64, bool),
    /// The marker is in.
    Marked(u64),
    /// No part in this round, nothing held.
    Failed(u64, Why),
}

/// Why a member takes no part.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Why {
    /// What the coordinator says belongs to a round that is over here, or to none.
    Late,
    /// Its own limit for holding writes has passed.
    Limit,
    /// The marker could not be put in.
    Insert,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
enum Gate {
    #[default]
    Open,
    /// Another marker is being made.
    Waiting,
    /// Held; the coordinator knows.
    Held,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
enum Rest {
    #[default]
    None,
    OnTheWay,
    Good,
}

/// The member. One connection to a coordinator has one, from its beginning.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Member {
    /// The newest round that was obeyed.
    round: u64,
    /// The newest round that was held for.
    prepared: u64,
    /// The newest round whose marker is in.
    marked: u64,
    gate: Gate,
    rest: Rest,
}

impl Member {
    /// Whether writes are held.
    pub fn is_holding(&self) -> bool {
        self.gate != Gate::Open
    }

    /// Whether it is to hold for `round` and does not yet.
    pub fn is_waiting(&self, round: u64) -> bool {
        self.gate == Gate::Waiting && self.round == round
    }

    /// Whether applications are at rest for `round`.
    pub fn is_at_rest(&self, round: u64) -> bool {
        self.rest == Rest::Good && self.round == round
    }

    /// Whether applications are at rest or on the way to it.
    pub fn is_resting(&self) -> bool {
        self.rest != Rest::None
    }

    /// Takes what happened.
    pub fn on(&mut self, input: Input) -> Vec<Output> {
        match input {
            Input::Freeze(round) => self.freeze(round),
            Input::Rest(round, good) => self.rest_began(round, good),
            Input::RestOver(round) if round == self.round => {
                self.rest = Rest::None;
                vec![]
            }
            Input::Prepare(round) => self.prepare(round),
            Input::Holding(round) if round == self.round && self.gate == Gate::Waiting => {
                self.gate = Gate::Held;
                vec![Output::Say(Say::Held(round, self.rest == Rest::Good))]
            }
            Input::Limit(round) if round == self.round && self.is_holding() => {
                let mut out = self.let_go();
                out.push(Output::Say(Say::Failed(round, Why::Limit)));
                out
            }
            Input::Commit(round) => self.commit(round),
            Input::Inserted(round, true) => {
                self.marked = round;
                vec![Output::Say(Say::Marked(round))]
            }
            Input::Inserted(round, false) => vec![Output::Say(Say::Failed(round, Why::Insert))],
            Input::Release(round) if round == self.round => self.let_go(),
            Input::Lost => {
                let out = self.let_go();
                *self = Self::default();
                out
            }
            Input::RestOver(_) | Input::Holding(_) | Input::Limit(_) | Input::Release(_) => vec![],
        }
    }

    fn freeze(&mut self, round: u64) -> Vec<Output> {
        if round <= self.round || self.is_holding() || self.is_resting() {
            return vec![Output::Say(Say::Frozen(round, false))];
        }
        self.round = round;
        self.rest = Rest::OnTheWay;
        vec![Output::BeginRest(round)]
    }

    fn rest_began(&mut self, round: u64, good: bool) -> Vec<Output> {
        if round != self.round || self.rest != Rest::OnTheWay {
            // Its round is over, and with it the rest.
            return vec![];
        }
        self.rest = if good { Rest::Good } else { Rest::None };
        vec![Output::Say(Say::Frozen(round, good))]
    }

    fn prepare(&mut self, round: u64) -> Vec<Output> {
        if round < self.round || round <= self.prepared || self.is_holding() {
            return vec![Output::Say(Say::Failed(round, Why::Late))];
        }
        // A rest that belongs to an earlier round says nothing about this one.
        let mut out = if round > self.round { self.wake() } else { vec![] };
        (self.round, self.prepared, self.gate) = (round, round, Gate::Waiting);
        out.push(Output::Hold(round));
        out
    }

    fn commit(&mut self, round: u64) -> Vec<Output> {
        if round == self.round && self.gate == Gate::Held {
            self.gate = Gate::Open;
            let mut out = vec![Output::InsertAndOpen(round)];
            out.extend(self.wake());
            return out;
        }
        // Said again, because the answer may have been lost.
        vec![Output::Say(if round == self.marked { Say::Marked(round) } else { Say::Failed(round, Why::Late) })]
    }

    fn let_go(&mut self) -> Vec<Output> {
        let mut out = vec![];
        if self.is_holding() {
            self.gate = Gate::Open;
            out.push(Output::Open);
        }
        out.extend(self.wake());
        out
    }

    fn wake(&mut self) -> Vec<Output> {
        let resting = std::mem::take(&mut self.rest) != Rest::None;
        if resting { vec![Output::EndRest] } else { vec![] }
    }
}
