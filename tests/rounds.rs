//! The round machine of consistency groups, exhaustively: every state with every event, and every run of three members with
//! lost, late and repeated messages and with crashes of any party.
#![allow(clippy::unwrap_used, clippy::disallowed_methods, reason = "tests may unwrap")]

use std::collections::{BTreeSet, HashSet, VecDeque};
use std::fmt::Write;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::Path;

use tidegate::agent::consistency::member::{Input, Member, Output, Say};
use tidegate::coordinator::rounds::{Event, Order, Outcome, Part, Phase, Round, Wish};

const PLAIN: Wish = Wish { app: false, app_or_nothing: false, partial: false };

/// Compares with `tests/snapshots/NAME`, or writes it when `TIDEGATE_SNAPSHOTS=write`.
fn snapshot(name: &str, found: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/snapshots").join(name);
    if std::env::var("TIDEGATE_SNAPSHOTS").is_ok_and(|v| v == "write") {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, found).unwrap();
    }
    let known = std::fs::read_to_string(&path).unwrap_or_default();
    for (number, (was, is)) in known.lines().zip(found.lines()).enumerate() {
        assert_eq!(was, is, "{name} line {}: if this is meant, run again with TIDEGATE_SNAPSHOTS=write", number + 1);
    }
    assert_eq!(known.lines().count(), found.lines().count(), "{name}: if this is meant, run again with TIDEGATE_SNAPSHOTS=write");
}

fn short(text: &impl std::fmt::Debug) -> String {
    format!("{text:?}").replace("(\"\")", "")
}

#[test]
fn every_state_of_a_round_with_every_event() {
    let mut listing = String::new();
    let mut pairs = 0;
    for wish in [
        PLAIN,
        Wish { partial: true, ..PLAIN },
        Wish { app: true, partial: true, ..PLAIN },
        Wish { app: true, app_or_nothing: true, ..PLAIN },
    ] {
        writeln!(listing, "# two members, {wish:?}").unwrap();
        let events: Vec<Event> = (0..2)
            .flat_map(|i| {
                let flags = [false, true].into_iter().flat_map(move |good| [Event::Frozen(i, good), Event::Held(i, good)]);
                flags.chain([Event::Marked(i), Event::Failed(i, String::new()), Event::Gone(i)])
            })
            .chain([Phase::Freezing, Phase::Preparing, Phase::Committing].map(Event::Timeout))
            .chain([Event::Abort])
            .collect();
        let mut seen: Vec<Round> = vec![];
        for absent in [vec![None, None], vec![None, Some(String::new())]] {
            let (round, orders) = Round::start(wish, absent.clone());
            writeln!(listing, "start {} -> {}", short(&absent), short(&orders)).unwrap();
            seen.push(round);
        }
        let mut at = 0;
        while at < seen.len() {
            let state = seen[at].clone();
            at += 1;
            writeln!(listing, "{:?} {}", state.phase(), short(&state.parts())).unwrap();
            for event in &events {
                pairs += 1;
                let mut next = state.clone();
                let orders = next.on(event.clone());
                if next == state {
                    assert!(orders.is_empty(), "an event that changes nothing orders nothing: {state:?} {event:?}");
                    continue;
                }
                writeln!(listing, "  {} -> {:?} {} {}", short(event), next.phase(), short(&next.parts()), short(&orders)).unwrap();
                if !seen.contains(&next) {
                    seen.push(next);
                }
            }
        }
        writeln!(listing, "# {} states; pairs that are not listed change nothing and order nothing\n", seen.len()).unwrap();
    }
    println!("{pairs} pairs of a state and an event");
    snapshot("round.txt", &listing);
}

#[test]
fn every_state_of_a_member_with_every_input() {
    let inputs: Vec<Input> = (1..=2)
        .flat_map(|r| {
            [
                Input::Freeze(r),
                Input::Rest(r, true),
                Input::Rest(r, false),
                Input::RestOver(r),
                Input::Prepare(r),
                Input::Holding(r),
                Input::Limit(r),
                Input::Commit(r),
                Input::Release(r),
            ]
        })
        .chain([Input::Lost])
        .collect();
    let (mut listing, mut seen, mut at, mut pairs) = (String::new(), vec![Member::default()], 0, 0);
    while at < seen.len() {
        let state = seen[at].clone();
        at += 1;
        writeln!(listing, "{state:?}").unwrap();
        for input in &inputs {
            pairs += 1;
            let mut next = state.clone();
            let mut out = next.on(*input);
            if let Some(Output::InsertAndOpen(round)) = out.first().copied() {
                out.extend(next.on(Input::Inserted(round, true)));
            }
            assert!(!state.is_holding() || next.is_holding() || out.iter().any(|o| matches!(o, Output::Open | Output::InsertAndOpen(_))));
            assert!(
                !state.is_resting()
                    || next.is_resting()
                    || out.contains(&Output::EndRest)
                    || matches!(input, Input::RestOver(_) | Input::Rest(_, false))
            );
            writeln!(listing, "  {input:?} -> {next:?} {out:?}").unwrap();
            if !seen.contains(&next) {
                seen.push(next);
            }
        }
    }
    println!("{} states of a member, {pairs} pairs of a state and an input", seen.len());
    snapshot("member.txt", &listing);
}

/// What travels to a member.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Down {
    Freeze(u64),
    Prepare(u64),
    Commit(u64),
    Release(u64),
}

/// What travels to the coordinator.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Up {
    Frozen(u64, bool),
    Held(u64, bool),
    Marked(u64),
    Failed(u64),
}

/// A wrong way to build it, to see that it is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Fault {
    None,
    /// Put the marker in although writes went on meanwhile.
    MarkAfterLimit,
    /// Say held while nothing is held.
    HeldWithoutHolding,
    /// The member forgets to open when its limit passes.
    NoLimit,
}

/// Everything: the coordinator, the members, what is under way, and what an observer knows who sees all disks.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct World {
    /// The round that runs and its number; none before, between and after.
    round: Option<Round>,
    number: u64,
    /// Who was told to commit in each round.
    committed: [Vec<usize>; 2],
    outcomes: [Option<Outcome>; 2],
    members: Vec<Member>,
    /// New writes wait here, as the disks see it.
    held: Vec<bool>,
    /// The round that hooks run or have run for; and whether they have been reported.
    resting: Vec<Option<(u64, bool)>>,
    /// A connection that ended, and the side that does not know it yet: member, coordinator.
    lost: Vec<(bool, bool)>,
    /// Delivered ones stay: a message may arrive again, late, or never.
    down: Vec<BTreeSet<Down>>,
    up: Vec<BTreeSet<Up>>,
    crashes: u8,
    /// Of each round: a write that followed somebody's marker may be read anywhere.
    leaked: [bool; 2],
    /// Of each round and member: something that was read from such a write may be on the disk.
    tainted: [Vec<bool>; 2],
    /// Of each round and member: the marker is in; with such a write before it.
    marked: [Vec<Option<bool>>; 2],
}

struct Explorer {
    members: usize,
    rounds: u64,
    wish: Wish,
    crashes: u8,
    fault: Fault,
}

impl Explorer {
    fn start(&self) -> World {
        let n = self.members;
        World {
            round: None,
            number: 0,
            committed: Default::default(),
            outcomes: [None; 2],
            members: vec![Member::default(); n],
            held: vec![false; n],
            resting: vec![None; n],
            lost: vec![(false, false); n],
            down: vec![BTreeSet::new(); n],
            up: vec![BTreeSet::new(); n],
            crashes: self.crashes,
            leaked: [false; 2],
            tainted: [vec![false; n], vec![false; n]],
            marked: [vec![None; n], vec![None; n]],
        }
    }

    fn orders(&self, world: &mut World, orders: Vec<Order>) {
        let number = world.number;
        for order in orders {
            let mut send = |i: usize, what: Down| {
                if world.lost[i] == (false, false) {
                    world.down[i].insert(what);
                }
            };
            match order {
                Order::Freeze(i) => send(i, Down::Freeze(number)),
                Order::Prepare(i) => send(i, Down::Prepare(number)),
                Order::Release(i) => send(i, Down::Release(number)),
                Order::Commit(to, _) => {
                    to.iter().for_each(|&i| send(i, Down::Commit(number)));
                    world.committed[number as usize - 1] = to;
                }
                Order::Timer(_) => {}
                Order::Over(outcome) => {
                    world.outcomes[number as usize - 1] = Some(outcome);
                    world.round = None;
                }
            }
        }
    }

    fn event(&self, world: &mut World, event: Event) {
        if let Some(mut round) = world.round.take() {
            let orders = round.on(event);
            world.round = Some(round);
            self.orders(world, orders);
        }
    }

    fn input(&self, world: &mut World, i: usize, input: Input) {
        let outputs = world.members[i].on(input);
        let late = matches!(input, Input::Commit(_)) && self.fault == Fault::MarkAfterLimit;
        for output in outputs {
            let output = match output {
                Output::Say(Say::Failed(round, _)) if late && round == world.number && world.marked[round as usize - 1][i].is_none() => {
                    Output::InsertAndOpen(round)
                }
                other => other,
            };
            let mut say = |what: Up| {
                if world.lost[i] == (false, false) {
                    world.up[i].insert(what);
                }
            };
            match output {
                Output::BeginRest(round) => world.resting[i] = Some((round, false)),
                Output::EndRest => world.resting[i] = None,
                Output::Hold(_) => world.held[i] = self.fault != Fault::HeldWithoutHolding,
                Output::Open => world.held[i] = self.fault == Fault::NoLimit && matches!(input, Input::Limit(_)),
                Output::InsertAndOpen(round) => {
                    let at = round as usize - 1;
                    world.marked[at][i] = Some(world.tainted[at][i]);
                    world.held[i] = false;
                    self.input(world, i, Input::Inserted(round, true));
                }
                Output::Say(Say::Frozen(round, good)) => say(Up::Frozen(round, good)),
                Output::Say(Say::Held(round, good)) => say(Up::Held(round, good)),
                Output::Say(Say::Marked(round)) => say(Up::Marked(round)),
                Output::Say(Say::Failed(round, _)) => say(Up::Failed(round)),
            }
        }
    }

    /// The connection of a member ends: nothing that is under way on it arrives any more.
    fn disconnect(&self, world: &mut World, i: usize) {
        world.down[i].clear();
        world.up[i].clear();
        world.lost[i] = (true, true);
    }

    /// Writes that follow a marker happen at once, and are read by everybody who may write.
    fn spread(&self, world: &mut World) {
        for at in 0..2 {
            world.leaked[at] |= (0..self.members).any(|i| world.marked[at][i].is_some() && !world.held[i]);
            for i in 0..self.members {
                world.tainted[at][i] |= world.leaked[at] && world.marked[at][i].is_none() && !world.held[i];
            }
        }
    }

    fn next(&self, world: &World) -> Vec<World> {
        let mut all = vec![];
        let mut add = |step: &dyn Fn(&mut World)| {
            let mut next = world.clone();
            step(&mut next);
            self.spread(&mut next);
            all.push(next);
        };
        match &world.round {
            None if world.number < self.rounds => add(&|w| {
                w.number += 1;
                let absent = w.lost.iter().map(|l| (*l != (false, false)).then(String::new)).collect();
                let (round, orders) = Round::start(self.wish, absent);
                w.round = Some(round);
                self.orders(w, orders);
            }),
            None => {}
            Some(round) => {
                let phase = round.phase();
                add(&|w| self.event(w, Event::Timeout(phase)));
            }
        }
        for i in 0..self.members {
            for &message in &world.down[i] {
                let input = match message {
                    Down::Freeze(r) => Input::Freeze(r),
                    Down::Prepare(r) => Input::Prepare(r),
                    Down::Commit(r) => Input::Commit(r),
                    Down::Release(r) => Input::Release(r),
                };
                add(&|w| self.input(w, i, input));
            }
            for &message in &world.up[i] {
                let (of, event) = match message {
                    Up::Frozen(r, good) => (r, Event::Frozen(i, good)),
                    Up::Held(r, good) => (r, Event::Held(i, good)),
                    Up::Marked(r) => (r, Event::Marked(i)),
                    Up::Failed(r) => (r, Event::Failed(i, String::new())),
                };
                if of == world.number {
                    add(&|w| self.event(w, event.clone()));
                }
            }
            if let Some((round, reported)) = world.resting[i] {
                if !reported {
                    for good in [false, true] {
                        add(&|w| {
                            w.resting[i] = good.then_some((round, true));
                            self.input(w, i, Input::Rest(round, good));
                        });
                    }
                }
                add(&|w| {
                    w.resting[i] = None;
                    self.input(w, i, Input::RestOver(round));
                });
            }
            if world.members[i].is_holding() {
                add(&|w| self.input(w, i, Input::Holding(w.number)));
                for round in 1..=world.number {
                    add(&|w| self.input(w, i, Input::Limit(round)));
                }
            }
            let (member_unaware, coordinator_unaware) = world.lost[i];
            if member_unaware {
                add(&|w| {
                    w.lost[i].0 = false;
                    self.input(w, i, Input::Lost);
                });
            }
            if coordinator_unaware {
                add(&|w| {
                    w.lost[i].1 = false;
                    self.event(w, Event::Gone(i));
                });
            }
            if world.crashes > 0 && world.lost[i] == (false, false) && world.number > 0 {
                // The connection alone; the process, with whatever its streams have not brought away yet.
                add(&|w| {
                    w.crashes -= 1;
                    self.disconnect(w, i);
                });
                add(&|w| {
                    w.crashes -= 1;
                    self.disconnect(w, i);
                    w.lost[i].0 = false;
                    w.members[i] = Member::default();
                    (w.held[i], w.resting[i]) = (false, None);
                });
            }
        }
        if world.crashes > 0 && world.round.is_some() {
            add(&|w| {
                w.crashes -= 1;
                w.round = None;
                (0..self.members).for_each(|i| self.disconnect(w, i));
                w.lost.iter_mut().for_each(|l| l.1 = false);
            });
        }
        all
    }

    /// What must hold everywhere.
    fn judge(&self, world: &World) -> Result<(), String> {
        for at in 0..2 {
            let list = &world.committed[at];
            let complete = !list.is_empty() && list.iter().all(|&i| world.marked[at][i].is_some());
            if complete && let Some(i) = list.iter().find(|&&i| world.marked[at][i] == Some(true)) {
                return Err(format!("the point of round {} is complete, and member {i} has something in it that follows it", at + 1));
            }
            if let Some(Outcome::Made(_)) = world.outcomes[at]
                && !complete
            {
                return Err(format!("round {} is said to be made, and is not", at + 1));
            }
        }
        for i in 0..self.members {
            if world.held[i] != world.members[i].is_holding() {
                return Err(format!("member {i} holds writes and does not know it, or the other way round"));
            }
            if world.resting[i].is_some() && !world.members[i].is_resting() {
                return Err(format!("the applications of member {i} are at rest and nobody wakes them"));
            }
        }
        Ok(())
    }

    /// Walks through every state that can be reached. Answers how many there are, or the first that must not be.
    fn explore(&self) -> Result<(usize, usize), String> {
        let key = |world: &World| {
            // Two hashes: the chance that two of a few million states meet in both is far below that of a broken memory.
            let mut hashes = [DefaultHasher::new(), DefaultHasher::new()];
            1u8.hash(&mut hashes[1]);
            hashes.iter_mut().for_each(|h| world.hash(h));
            hashes.map(|h| h.finish())
        };
        let first = self.start();
        let mut seen = HashSet::from([key(&first)]);
        let mut queue = VecDeque::from([first]);
        let mut made = 0;
        while let Some(world) = queue.pop_front() {
            self.judge(&world).map_err(|e| format!("{e}\n{world:#?}"))?;
            made += usize::from(matches!(world.outcomes[self.rounds as usize - 1], Some(Outcome::Made(_))));
            for next in self.next(&world) {
                if seen.insert(key(&next)) {
                    queue.push_back(next);
                }
            }
        }
        Ok((seen.len(), made))
    }
}

fn run(name: &str, explorer: &Explorer) {
    let (states, made) = explorer.explore().unwrap_or_else(|e| panic!("{name}: {e}"));
    println!("{name}: {states} states, in {made} of them the last round has made its point");
    assert!(made > 0, "{name}: no point was ever made: this explores nothing");
}

#[test]
fn three_members_with_every_loss_delay_repetition_and_crash() {
    let plain = Explorer { members: 3, rounds: 1, wish: PLAIN, crashes: 2, fault: Fault::None };
    run("three members, one round, two crashes or lost connections", &plain);
    run("the same, points without some members allowed", &Explorer { wish: Wish { partial: true, ..PLAIN }, ..plain });
    run("two members, two rounds, one crash", &Explorer { members: 2, rounds: 2, crashes: 1, ..plain });
    let app = Wish { app: true, partial: true, ..PLAIN };
    run("two members, applications at rest, one crash", &Explorer { members: 2, rounds: 1, crashes: 1, wish: app, ..plain });
}

#[test]
fn wrong_ways_to_build_it_are_found() {
    for fault in [Fault::MarkAfterLimit, Fault::HeldWithoutHolding, Fault::NoLimit] {
        let explorer = Explorer { members: 2, rounds: 1, wish: PLAIN, crashes: 0, fault };
        let found = explorer.explore().expect_err("a broken member must be found");
        println!("{fault:?}: {}", found.lines().next().unwrap());
    }
}

#[test]
fn a_member_that_is_gone_costs_a_partial_group_no_hold_and_a_full_one_its_point() {
    let absent = || vec![None, None, Some("not connected".to_owned())];
    let (round, orders) = Round::start(PLAIN, absent());
    assert_eq!((round.phase(), orders), (Phase::Over, vec![Order::Release(0), Order::Release(1), Order::Over(Outcome::Skipped)]));
    let (mut round, orders) = Round::start(Wish { partial: true, ..PLAIN }, absent());
    assert_eq!(orders, vec![Order::Prepare(0), Order::Prepare(1), Order::Timer(Phase::Preparing)]);
    round.on(Event::Held(0, false));
    assert_eq!(round.on(Event::Held(1, false))[0], Order::Commit(vec![0, 1], false));
    assert!(matches!(round.parts()[2], Part::Out(_)));
}
