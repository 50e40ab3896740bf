//! A replication group in the simulation: the product's rounds and members, the connections between them, and what each machine held
//! at the moment at which a point was decided. The coordinator keeps nothing but the number of its next round.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::disallowed_methods,
    unreachable_pub,
    missing_docs,
    reason = "a part of the tests"
)]

use std::collections::{HashMap, VecDeque};

use tidegate::agent::consistency::member::{Input, Member, Output, Say};
use tidegate::coordinator::rounds::{Event, Order, Outcome, Phase, Round, Wish};
use tidegate::model::{DiskId, GroupPart, MachineId, Name, PointId, PointKind};
use uuid::Uuid;

use super::agent::Agent;
use super::support::Rng;

/// Steps that a member holds at most.
const HOLD_MAX: u64 = 24;
/// Steps that the coordinator waits, in each phase.
const WAITS: u64 = 18;

enum Told {
    Freeze(u64),
    Prepare(u64),
    Commit(u64, GroupPart, PointKind),
    Release(u64),
}

/// A connection, as both ends see it.
#[derive(Default)]
struct Line {
    down: VecDeque<Told>,
    up: VecDeque<Say>,
    /// Nothing passes any more; each end finds out in its own time.
    broken: bool,
    at_member: bool,
    at_coordinator: bool,
}

/// A machine's side. Times are steps.
#[derive(Default)]
struct Side {
    member: Member,
    /// No write passes, since then.
    held: Option<u64>,
    holds_at: Option<(u64, u64)>,
    limit_at: Option<(u64, u64)>,
    rests_at: Option<(u64, u64)>,
    commit: Option<(GroupPart, PointKind)>,
}

struct Running {
    number: u64,
    point: PointId,
    round: Round,
    timer: Option<(Phase, u64)>,
    members: usize,
}

/// What disks held.
pub type Content = HashMap<DiskId, Vec<u8>>;

/// The coordinator, its members, and what is between them.
pub struct Group {
    name: Name,
    machines: Vec<MachineId>,
    is_up: bool,
    next_round: u64,
    running: Option<Running>,
    lines: Vec<Line>,
    sides: Vec<Side>,
    now: u64,
    seed: u64,
    /// What the members held when a point was decided, by the group's point.
    pub moments: HashMap<PointId, Content>,
    /// What a machine held when its marker was put in, by the machine's point; not taken yet.
    pub marked: Vec<(PointId, Content)>,
    pub rounds: u64,
    /// Points of all machines.
    pub full: Vec<PointId>,
}

impl Group {
    pub fn new(machines: Vec<MachineId>, seed: u64) -> Self {
        Self {
            name: "shop".parse().expect("a name"),
            is_up: true,
            next_round: 1,
            running: None,
            lines: machines.iter().map(|_| Line::default()).collect(),
            sides: machines.iter().map(|_| Side::default()).collect(),
            now: 0,
            seed,
            moments: HashMap::new(),
            marked: vec![],
            rounds: 0,
            full: vec![],
            machines,
        }
    }

    /// Whether the application's writes wait.
    pub fn holds(&self, machine: usize) -> bool {
        self.sides[machine].held.is_some()
    }

    /// Nothing passes between a machine and the coordinator any more.
    pub fn cut(&mut self, machine: usize) {
        let line = &mut self.lines[machine];
        line.broken = true;
        line.down.clear();
        line.up.clear();
    }

    /// A machine lost power: its application runs again, and nothing is held.
    pub fn machine_crashed(&mut self, machine: usize) {
        self.sides[machine] = Side::default();
        self.cut(machine);
        self.lines[machine].at_member = false;
    }

    /// The coordinator lost power. It remembers which numbers it may not use again.
    pub fn crash(&mut self) {
        (self.running, self.is_up) = (None, false);
        for machine in 0..self.lines.len() {
            self.cut(machine);
            self.lines[machine].at_coordinator = false;
        }
    }

    /// A little of everything. `ways` says whose way to the coordinator is open, `wanted` whether a round may begin.
    pub fn work(&mut self, rng: &mut Rng, agents: &mut [Agent], ways: &[bool], wanted: bool) {
        self.now += 1;
        self.is_up |= rng.below(6) == 0;
        for (machine, way) in ways.iter().enumerate() {
            self.connect(rng, agents, machine, *way);
        }
        for _ in 0..rng.below(6) {
            let machine = rng.below(agents.len() as u64) as usize;
            if rng.below(2) == 0 {
                self.tell(rng, agents, machine);
            } else {
                self.hear(agents, machine);
            }
        }
        for machine in 0..agents.len() {
            self.pass_time(rng, agents, machine);
        }
        let late = self.running.as_mut().and_then(|r| r.timer.take_if(|(_, at)| *at <= self.now));
        if let Some((phase, _)) = late {
            self.feed(agents, Event::Timeout(phase));
        }
        if wanted && self.is_up && self.running.is_none() && rng.below(8) == 0 {
            self.begin(rng, agents);
        }
    }

    fn connect(&mut self, rng: &mut Rng, agents: &mut [Agent], machine: usize, way: bool) {
        let line = &mut self.lines[machine];
        if line.broken && line.at_member && rng.below(4) == 0 {
            line.at_member = false;
            return self.enter(rng, agents, machine, Input::Lost);
        }
        if line.broken && line.at_coordinator && rng.below(4) == 0 {
            line.at_coordinator = false;
            return self.feed(agents, Event::Gone(machine));
        }
        if way && self.is_up && !line.at_member && !line.at_coordinator && rng.below(4) == 0 {
            *line = Line { at_member: true, at_coordinator: true, ..Line::default() };
        }
    }

    fn begin(&mut self, rng: &mut Rng, agents: &mut [Agent]) {
        let wish = Wish { app: rng.below(3) == 0, app_or_nothing: rng.below(2) == 0, partial: rng.below(2) == 0 };
        let absent = self.lines.iter().map(|line| (!line.at_coordinator).then(|| "not connected".to_owned())).collect();
        let (round, orders) = Round::start(wish, absent);
        let number = self.next_round;
        self.next_round += 1;
        self.rounds += 1;
        let point = PointId(Uuid::from_u128((u128::from(self.seed) << 64) | u128::from(number) | 1 << 40));
        self.running = Some(Running { number, point, round, timer: None, members: 0 });
        self.obey(agents, orders);
    }

    fn feed(&mut self, agents: &mut [Agent], event: Event) {
        if let Some(running) = &mut self.running {
            let orders = running.round.on(event);
            self.obey(agents, orders);
        }
    }

    fn obey(&mut self, agents: &[Agent], orders: Vec<Order>) {
        for order in orders {
            let Some(running) = &mut self.running else { return };
            let (number, point) = (running.number, running.point);
            match order {
                Order::Freeze(to) => self.send(to, Told::Freeze(number)),
                Order::Prepare(to) => self.send(to, Told::Prepare(number)),
                Order::Release(to) => self.send(to, Told::Release(number)),
                Order::Timer(phase) => running.timer = Some((phase, self.now + WAITS)),
                Order::Commit(to, app) => {
                    running.members = to.len();
                    let part = GroupPart {
                        point,
                        group: self.name.clone(),
                        epoch: 1,
                        sequence: number,
                        members: to.iter().map(|&n| self.machines[n]).collect(),
                        missing: (0..self.machines.len())
                            .filter(|n| !to.contains(n))
                            .map(|n| format!("m{n}").parse().expect("a name"))
                            .collect(),
                    };
                    let kind = if app { PointKind::App } else { PointKind::Crash };
                    self.moments.insert(point, to.iter().flat_map(|&n| agents[n].content()).collect());
                    to.into_iter().for_each(|n| self.send(n, Told::Commit(number, part.clone(), kind)));
                }
                Order::Over(outcome) => {
                    if matches!(outcome, Outcome::Made(_)) && running.members == self.machines.len() {
                        self.full.push(point);
                    }
                    self.running = None;
                }
            }
        }
    }

    fn send(&mut self, to: usize, told: Told) {
        if !self.lines[to].broken {
            self.lines[to].down.push_back(told);
        }
    }

    /// The coordinator hears a machine once.
    fn hear(&mut self, agents: &mut [Agent], machine: usize) {
        let Some(say) = self.lines[machine].up.pop_front() else { return };
        let (round, event) = match say {
            Say::Frozen(round, good) => (round, Event::Frozen(machine, good)),
            Say::Held(round, good) => (round, Event::Held(machine, good)),
            Say::Marked(round) => (round, Event::Marked(machine)),
            Say::Failed(round, why) => (round, Event::Failed(machine, format!("{why:?}"))),
        };
        if self.running.as_ref().is_some_and(|r| r.number == round) {
            self.feed(agents, event);
        }
    }

    /// A machine hears the coordinator once.
    fn tell(&mut self, rng: &mut Rng, agents: &mut [Agent], machine: usize) {
        let Some(told) = self.lines[machine].down.pop_front() else { return };
        let input = match told {
            Told::Freeze(round) => Input::Freeze(round),
            Told::Prepare(round) => Input::Prepare(round),
            Told::Release(round) => Input::Release(round),
            Told::Commit(round, part, kind) => {
                self.sides[machine].commit = Some((part, kind));
                Input::Commit(round)
            }
        };
        self.enter(rng, agents, machine, input);
    }

    /// What a machine's own clock brings.
    fn pass_time(&mut self, rng: &mut Rng, agents: &mut [Agent], machine: usize) {
        let (now, side) = (self.now, &mut self.sides[machine]);
        if let Some((round, _)) = side.rests_at.take_if(|(_, at)| *at <= now) {
            let good = rng.below(8) > 0;
            self.enter(rng, agents, machine, Input::Rest(round, good));
        }
        let side = &mut self.sides[machine];
        if let Some((round, _)) = side.holds_at.take_if(|(_, at)| *at <= now)
            && side.member.is_waiting(round)
        {
            side.held = Some(now);
            self.enter(rng, agents, machine, Input::Holding(round));
        }
        let side = &mut self.sides[machine];
        if let Some((round, _)) = side.limit_at.take_if(|(_, at)| *at <= now) {
            self.enter(rng, agents, machine, Input::Limit(round));
        }
        let held = self.sides[machine].held;
        assert!(held.is_none_or(|since| now - since <= HOLD_MAX), "a machine is held longer than its own limit");
    }

    fn enter(&mut self, rng: &mut Rng, agents: &mut [Agent], machine: usize, input: Input) {
        let now = self.now;
        for output in self.sides[machine].member.on(input) {
            let side = &mut self.sides[machine];
            match output {
                Output::BeginRest(round) => side.rests_at = Some((round, now + rng.below(12))),
                Output::EndRest => side.rests_at = None,
                Output::Hold(round) => {
                    (side.holds_at, side.limit_at) = (Some((round, now + rng.below(4))), Some((round, now + HOLD_MAX)));
                }
                Output::Open => side.held = None,
                Output::InsertAndOpen(round) => {
                    let commit = side.commit.take();
                    let point = commit.as_ref().map(|(part, _)| PointId::part(part.point, self.machines[machine]));
                    let content = point.zip(commit).and_then(|(point, (part, kind))| agents[machine].mark(point, kind, Some(part)));
                    self.marked.extend(point.zip(content.clone()));
                    self.sides[machine].held = None;
                    self.enter(rng, agents, machine, Input::Inserted(round, content.is_some()));
                }
                Output::Say(say) => {
                    let line = &mut self.lines[machine];
                    if line.at_member && !line.broken {
                        line.up.push_back(say);
                    }
                }
            }
        }
    }
}
