//! Owns groups, connections and rounds: takes what members and people say, runs the rounds' orders and timers.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde_json::Value;
use tokio::sync::{mpsc, oneshot};
use uuid::Uuid;

use super::CoordinatorError;
use super::groups::{Group, Groups, home};
use super::history::{History, Point};
use super::rounds::{Cause, Event as RoundEvent, Order, Outcome, Part, Phase, Round, Wish};
use crate::clock::{self, Mono, micros};
use crate::config::coordinator::{Consistency, CoordinatorSettings};
use crate::control::api::{GroupMarked, GroupMissing, Request, RoleStatus};
use crate::crypto::statement::Signer;
use crate::crypto::tls::Credentials;
use crate::model::change::{GROUP_SUBJECT, group_statement};
use crate::model::{GroupPart, MachineId, Name, PointId, PointKind};
use crate::observe::metrics;
use crate::storage::catalogue::{Catalogue, CatalogueError, Table};
use crate::wire::consistency::{Common, CoordinatorMessage, MemberMessage, bounded};

/// Events that may wait.
pub(super) const EVENTS_MAX: usize = 1024;
/// What a connection is told that another one of the same machine takes over from.
pub(super) const REPLACED: &str = "the machine has connected again, or takes no messages";
/// How long the confirmation of markers is waited for; nobody holds meanwhile.
const CONFIRM_MAX: Duration = Duration::from_secs(2);
/// The view for `status` is made anew this often.
const PUBLISH_EVERY: Duration = Duration::from_millis(250);

const SERVER: Table = Table::new("server");
pub(super) const GROUPS: Table = Table::new("groups");
/// Changes with the types that are stored.
const FORMAT: u32 = 1;

/// What happens.
pub(super) enum Event {
    /// A member has connected.
    Connected { name: Name, id: u64, outbox: mpsc::Sender<CoordinatorMessage> },
    /// A member says something.
    Message { name: Name, id: u64, message: MemberMessage },
    /// A connection has ended.
    Gone { name: Name, id: u64 },
    /// A person wants something.
    Ask(Box<Request>, Reply),
}

pub(super) type Reply = oneshot::Sender<Result<Value, String>>;

/// A connected machine, of a group or not.
pub(super) struct Connected {
    id: u64,
    outbox: mpsc::Sender<CoordinatorMessage>,
    /// What it said last of itself: its master target, and why it can make no point.
    pub(super) state: Option<(Option<Name>, Option<String>)>,
    /// It did not answer the last round, and was not heard since.
    pub(super) silent: bool,
}

/// How a machine kept the last rounds, over connections: one that fails again and again must not cost the others a hold, or the
/// point its worth, each time.
#[derive(Clone, Copy, Default)]
pub(super) struct Conduct {
    /// Rounds in a row that it was told to take part in and did not.
    misses: u32,
    /// It is left out until then.
    out_until: Mono,
}

/// A machine that fails again is left out for two seconds, then four, and so on up to about a minute.
const MISSES_MAX: u32 = 6;

impl Conduct {
    fn missed(&mut self, now: Mono) {
        let pause = if self.misses == 0 { Duration::ZERO } else { Duration::from_secs(1 << self.misses) };
        (self.misses, self.out_until) = ((self.misses + 1).min(MISSES_MAX), now.plus(pause));
    }
}

/// A round under way.
struct Running {
    number: u64,
    point: PointId,
    group: Group,
    roster: Vec<Name>,
    round: Round,
    app: bool,
    label: Option<String>,
    /// Why members are not at rest.
    not_at_rest: BTreeMap<usize, String>,
    committed: Option<Common>,
    held: Duration,
    /// Somebody was not at rest in time.
    late_rest: bool,
    began: Mono,
    timer: Option<(Phase, Mono)>,
    replies: Vec<Reply>,
}

/// What a group's timer and its waiting people want.
pub(super) struct Schedule {
    due: Mono,
    app_due: Option<Mono>,
    /// Application-consistent rounds in a row for which somebody was not at rest in time.
    late_rests: u32,
    /// Members are left alone until then.
    not_before: Mono,
    pub(super) asks: VecDeque<(bool, Option<String>, Reply)>,
    pub(super) history: History,
}

/// The state; see [`Hub::run`].
pub(super) struct Hub {
    limits: Consistency,
    pub(super) groups: Groups,
    pub(super) catalogue: Catalogue,
    pub(super) members: BTreeMap<Name, Connected>,
    conduct: BTreeMap<Name, Conduct>,
    running: BTreeMap<Name, Running>,
    pub(super) schedules: BTreeMap<Name, Schedule>,
    /// Rounds have numbers that only grow, also over restarts: by them a group's points are in order.
    next_round: u64,
    pub(super) name: Name,
    signer: Signer,
    view: Arc<Mutex<RoleStatus>>,
}

impl Hub {
    /// Reads the groups.
    pub(super) fn open(
        settings: &CoordinatorSettings,
        credentials: &Credentials,
        view: Arc<Mutex<RoleStatus>>,
    ) -> Result<Self, CoordinatorError> {
        let catalogue = Catalogue::open(&settings.state.join("catalogue.redb"), &[SERVER, GROUPS])?;
        catalogue.identity(SERVER, b"coordinator-id", FORMAT)?;
        let groups: Vec<(Vec<u8>, Group)> = catalogue.all(GROUPS)?;
        let next_round = reserve(&catalogue)?;
        let groups = Groups::load(groups.into_iter().map(|(_, group)| group).collect());
        let mut hub = Self {
            limits: settings.consistency.clone(),
            groups,
            catalogue,
            members: BTreeMap::new(),
            conduct: BTreeMap::new(),
            running: BTreeMap::new(),
            schedules: BTreeMap::new(),
            next_round,
            name: credentials.identity.name.clone(),
            signer: credentials.signer()?,
            view,
        };
        let all: Vec<Group> = hub.groups.all().cloned().collect();
        all.iter().for_each(|group| hub.schedule(group));
        hub.publish();
        Ok(hub)
    }

    /// Runs until the process ends.
    pub(super) async fn run(mut self, mut events: mpsc::Receiver<Event>) {
        let mut published = clock::now();
        loop {
            let now = clock::now();
            if now.since(published) >= PUBLISH_EVERY {
                self.publish();
                published = now;
            }
            let next = self.next_deadline().since(now).min(PUBLISH_EVERY);
            match tokio::time::timeout(next, events.recv()).await {
                Ok(Some(event)) => self.take(event).await,
                Ok(None) => return,
                Err(_) => {}
            }
            self.run_timers();
        }
    }

    async fn take(&mut self, event: Event) {
        match event {
            Event::Connected { name, id, outbox } => {
                let connected = Connected { id, outbox, state: None, silent: false };
                if self.members.insert(name.clone(), connected).is_some() {
                    self.gone(&name);
                }
                self.assign(&name);
            }
            Event::Gone { name, id } => {
                if self.members.get(&name).is_some_and(|m| m.id == id) {
                    self.members.remove(&name);
                    self.gone(&name);
                }
            }
            Event::Message { name, id, message } => {
                if self.members.get(&name).is_some_and(|m| m.id == id) {
                    self.hear(&name, message);
                }
            }
            Event::Ask(request, reply) => self.ask(*request, reply).await,
        }
    }

    fn hear(&mut self, name: &Name, message: MemberMessage) {
        let Some(member) = self.members.get_mut(name) else { return };
        member.silent = false;
        let (round, event): (u64, Box<dyn FnOnce(usize) -> RoundEvent>) = match message {
            MemberMessage::Hello { .. } => return,
            MemberMessage::State { target, trouble } => {
                member.state = Some((target, trouble.as_deref().map(bounded)));
                return;
            }
            MemberMessage::Frozen { round, trouble } => {
                if let Some(why) = &trouble {
                    self.note_unrest(name, round, why);
                }
                (round, Box::new(move |i| RoundEvent::Frozen(i, trouble.is_none())))
            }
            MemberMessage::Held { round, frozen, .. } => {
                if !frozen {
                    self.note_unrest(name, round, "was not at rest any more when all were (its app.freeze_max)");
                }
                (round, Box::new(move |i| RoundEvent::Held(i, frozen)))
            }
            MemberMessage::Marked { round, held_us } => {
                self.note_hold(name, round, Duration::from_micros(held_us));
                (round, Box::new(RoundEvent::Marked))
            }
            MemberMessage::Failed { round, why } => (round, Box::new(move |i| RoundEvent::Failed(i, bounded(&why)))),
        };
        if let Some((group, i)) = self.place(name, Some(round)) {
            self.feed(&group, event(i));
        }
    }

    /// The group whose round under way a member is in, and its place there.
    fn place(&self, member: &Name, round: Option<u64>) -> Option<(Name, usize)> {
        let fits = |r: &&Running| round.is_none_or(|n| n == r.number) && r.roster.binary_search(member).is_ok();
        let running = self.running.values().find(fits)?;
        Some((running.group.name.clone(), running.roster.binary_search(member).ok()?))
    }

    fn note_unrest(&mut self, member: &Name, round: u64, why: &str) {
        if let Some((group, i)) = self.place(member, Some(round))
            && let Some(running) = self.running.get_mut(&group).filter(|r| r.app)
        {
            // The first reason is the cause.
            running.not_at_rest.entry(i).or_insert_with(|| bounded(why));
        }
    }

    fn note_hold(&mut self, member: &Name, round: u64, held: Duration) {
        if let Some((group, _)) = self.place(member, Some(round))
            && let Some(running) = self.running.get_mut(&group)
        {
            running.held = running.held.max(held);
        }
    }

    fn gone(&mut self, name: &Name) {
        if let Some((group, i)) = self.place(name, None) {
            self.feed(&group, RoundEvent::Gone(i));
        }
    }

    pub(super) fn assign(&self, machine: &Name) {
        let group = self.groups.of(machine).map(|g| (g.name.clone(), g.epoch));
        self.send(machine, CoordinatorMessage::Assigned { group });
    }

    fn send(&self, machine: &Name, message: CoordinatorMessage) {
        if let Some(member) = self.members.get(machine) {
            // A member that takes nothing is found silent, and its connection ends by itself.
            let _ = member.outbox.try_send(message);
        }
    }

    /// Why a member cannot take part in a round now.
    pub(super) fn absence(&self, member: &Name, home: Option<&Name>) -> Option<String> {
        let Some(connected) = self.members.get(member) else { return Some("not connected to the coordinator".to_owned()) };
        match &connected.state {
            _ if self.conduct.get(member).is_some_and(|c| c.out_until > clock::now()) => {
                Some("failed several rounds in a row: left out for a while".to_owned())
            }
            _ if connected.silent => Some("did not answer the last round and was not heard since".to_owned()),
            None => Some("has just connected".to_owned()),
            Some((_, Some(trouble))) => Some(trouble.clone()),
            Some((None, _)) => Some("its process server has not reached a master target yet".to_owned()),
            Some((Some(target), _)) if home != Some(target) => {
                let home = home.map_or("another one", Name::as_str);
                Some(format!("replicates to master target {target}, the group lives on {home}"))
            }
            Some(_) => None,
        }
    }

    /// The master target that a group lives on, as far as it is known.
    pub(super) fn home(&self, group: &Group) -> Option<Name> {
        home(group.members.iter().filter_map(|m| self.target_of(m)))
    }

    pub(super) fn target_of(&self, machine: &Name) -> Option<Name> {
        self.members.get(machine)?.state.as_ref()?.0.clone()
    }

    pub(super) fn schedule(&mut self, group: &Group) {
        let now = clock::now();
        let new = Schedule { due: now, app_due: None, late_rests: 0, not_before: now, asks: VecDeque::new(), history: History::default() };
        let schedule = self.schedules.entry(group.name.clone()).or_insert(new);
        schedule.due = now.plus(group.policy.interval);
        schedule.app_due = group.policy.app_interval.map(|time| now.plus(time));
    }

    fn next_deadline(&self) -> Mono {
        let rounds = self.running.values().filter_map(|r| r.timer.map(|(_, at)| at));
        let idle = self.schedules.iter().filter(|(name, _)| !self.running.contains_key(*name));
        let due = idle.map(|(_, s)| {
            let wanted = if s.asks.is_empty() { s.app_due.map_or(s.due, |app| app.min(s.due)) } else { Mono(0) };
            wanted.max(s.not_before)
        });
        rounds.chain(due).min().unwrap_or(Mono(u64::MAX))
    }

    fn run_timers(&mut self) {
        let now = clock::now();
        let late: Vec<(Name, Phase)> = self
            .running
            .iter()
            .filter_map(|(name, r)| r.timer.filter(|(_, at)| *at <= now).map(|(phase, _)| (name.clone(), phase)))
            .collect();
        for (group, phase) in late {
            if let Some(running) = self.running.get_mut(&group) {
                running.timer = None;
                if phase == Phase::Freezing {
                    running.note_late_rests();
                }
            }
            self.feed(&group, RoundEvent::Timeout(phase));
        }
        let idle: Vec<Name> = self.schedules.keys().filter(|name| !self.running.contains_key(*name)).cloned().collect();
        for name in idle {
            self.begin_if_due(&name, now);
        }
    }

    fn begin_if_due(&mut self, name: &Name, now: Mono) {
        let Ok(group) = self.groups.get(name.as_str()).cloned() else { return };
        let Some(schedule) = self.schedules.get_mut(name).filter(|s| s.not_before <= now) else { return };
        let (app, label, replies) = if let Some((app, label, reply)) = schedule.asks.pop_front() {
            (app, label, vec![reply])
        } else if schedule.app_due.is_some_and(|due| due <= now) {
            (true, None, vec![])
        } else if schedule.due <= now {
            (false, None, vec![])
        } else {
            return;
        };
        schedule.due = if schedule.due <= now { now.plus(group.policy.interval) } else { schedule.due };
        if app {
            schedule.app_due = group.policy.app_interval.map(|time| now.plus(time));
        }
        self.begin(group, app, label, replies);
    }

    fn begin(&mut self, group: Group, app: bool, label: Option<String>, replies: Vec<Reply>) {
        let home = self.home(&group);
        let roster: Vec<Name> = group.members.iter().cloned().collect();
        let absent = roster.iter().map(|m| self.absence(m, home.as_ref())).collect();
        let wish = Wish { app, app_or_nothing: app && group.policy.app_or_nothing, partial: group.policy.partial };
        let (round, orders) = Round::start(wish, absent);
        let number = self.next_round;
        self.next_round += 1;
        let name = group.name.clone();
        let running = Running {
            number,
            point: PointId(Uuid::new_v4()),
            group,
            roster,
            round,
            app,
            label,
            not_at_rest: BTreeMap::new(),
            committed: None,
            held: Duration::ZERO,
            late_rest: false,
            began: clock::now(),
            timer: None,
            replies,
        };
        self.running.insert(name.clone(), running);
        self.obey(&name, orders);
    }

    pub(super) fn feed(&mut self, group: &Name, event: RoundEvent) {
        if let Some(running) = self.running.get_mut(group) {
            let orders = running.round.on(event);
            self.obey(group, orders);
        }
    }

    fn obey(&mut self, group: &Name, orders: Vec<Order>) {
        let limits = self.limits.clone();
        for order in orders {
            let Some(running) = self.running.get_mut(group) else { return };
            let round = running.number;
            match order {
                Order::Freeze(i) => {
                    let to = running.roster[i].clone();
                    self.send(&to, CoordinatorMessage::Freeze { round });
                }
                Order::Prepare(i) => {
                    let to = running.roster[i].clone();
                    self.send(&to, CoordinatorMessage::Prepare { round, limit_us: micros(limits.hold_max) });
                }
                Order::Release(i) => {
                    let to = running.roster[i].clone();
                    self.send(&to, CoordinatorMessage::Release { round });
                }
                Order::Commit(to, app) => {
                    let common = running.common(&to, app, &self.signer);
                    running.committed = Some(common.clone());
                    let names: Vec<Name> = to.iter().map(|&i| running.roster[i].clone()).collect();
                    for name in names {
                        self.send(&name, CoordinatorMessage::Commit { round, common: common.clone() });
                    }
                }
                Order::Timer(phase) => {
                    let time = match phase {
                        Phase::Freezing => limits.freeze_max,
                        // Sooner than the members' own limit, so that a commit still finds them holding.
                        Phase::Preparing => limits.hold_max * 3 / 4,
                        Phase::Committing | Phase::Over => CONFIRM_MAX,
                    };
                    running.timer = Some((phase, clock::now().plus(time)));
                }
                Order::Over(outcome) => self.finish(group, outcome),
            }
        }
    }

    fn finish(&mut self, name: &Name, outcome: Outcome) {
        let Some(running) = self.running.remove(name) else { return };
        for (i, part) in running.round.parts().iter().enumerate() {
            let name = &running.roster[i];
            match part {
                Part::Marked => drop(self.conduct.remove(name)),
                Part::Out(Cause::Silent) => {
                    self.conduct.entry(name.clone()).or_default().missed(clock::now());
                    if let Some(member) = self.members.get_mut(name) {
                        member.silent = true;
                    }
                }
                // It held and did not mark: the others' markers name it, and their point is worth nothing.
                Part::Out(Cause::Failed(_) | Cause::Gone)
                    if running.committed.as_ref().is_some_and(|c| c.part.members.contains(&MachineId::from_name(name))) =>
                {
                    self.conduct.entry(name.clone()).or_default().missed(clock::now());
                }
                _ => {}
            }
        }
        let missing: Vec<(Name, Cause)> = running.round.missing().map(|(i, cause)| (running.roster[i].clone(), cause.clone())).collect();
        metrics::observe(metrics::GROUP_ROUND, clock::now().since(running.began));
        if let Some(schedule) = self.schedules.get_mut(name) {
            schedule.not_before = clock::now().plus(self.limits.rest_min);
            if running.app {
                // The others were at rest for nothing all the time: by the clock that is not done again soon.
                schedule.late_rests = if running.late_rest { (schedule.late_rests + 1).min(MISSES_MAX) } else { 0 };
                let pause = self.limits.freeze_max * if running.late_rest { 1 << schedule.late_rests } else { 0 };
                schedule.app_due = schedule.app_due.map(|due| due.max(clock::now().plus(pause)));
            }
            let point = running.committed.as_ref().filter(|_| matches!(outcome, Outcome::Made(_))).map(|common| Point {
                id: running.point,
                wall_ms: clock::wall_ms(),
                at: clock::now(),
                kind: common.kind,
                members: common.part.members.len(),
                missing: common.part.missing.clone(),
                held: running.held,
                remark: common.remark.clone(),
            });
            schedule.history.note(name, outcome, point, &missing, &running.unrest());
        }
        let answer = running.answer(outcome, &missing);
        for reply in running.replies {
            let _ = reply.send(answer.clone());
        }
    }

    pub(super) fn publish(&self) {
        *self.view.lock().unwrap_or_else(PoisonError::into_inner) = self.status();
    }
}

impl Running {
    fn note_late_rests(&mut self) {
        for (i, part) in self.round.parts().iter().enumerate() {
            if *part == Part::Asked {
                self.not_at_rest.entry(i).or_insert_with(|| "was not at rest in time (consistency.freeze_max)".to_owned());
                self.late_rest = true;
            }
        }
    }

    /// Who was not at rest, and why.
    fn unrest(&self) -> Vec<String> {
        self.not_at_rest.iter().map(|(&i, why)| format!("{}: {why}", self.roster[i])).collect()
    }

    /// What every marker says.
    fn common(&self, to: &[usize], app: bool, signer: &Signer) -> Common {
        let mut members: Vec<MachineId> = to.iter().map(|&i| MachineId::from_name(&self.roster[i])).collect();
        members.sort_unstable();
        let missing = self.round.missing().map(|(i, _)| self.roster[i].clone()).collect();
        let remark = (self.app && !app).then(|| bounded(&format!("asked for app-consistent; {}", self.unrest().join("; "))));
        let part = GroupPart {
            point: self.point,
            group: self.group.name.clone(),
            epoch: self.group.epoch,
            sequence: self.number,
            members,
            missing,
        };
        let kind = if app { PointKind::App } else { PointKind::Crash };
        let statement = group_statement(&part, kind, self.label.as_deref(), remark.as_deref());
        let proof = statement.map(|s| signer.sign(GROUP_SUBJECT, &s)).transpose().unwrap_or_else(|error| {
            tracing::error!(%error, "a group's point cannot be signed; master targets will take its parts as points of single machines");
            None
        });
        Common { part, kind, label: self.label.clone(), remark, proof: proof.unwrap_or_default() }
    }

    fn answer(&self, outcome: Outcome, missing: &[(Name, Cause)]) -> Result<Value, String> {
        let told: Vec<_> = missing.iter().map(|(name, cause)| format!("{name}: {cause}")).collect();
        match (outcome, &self.committed) {
            (Outcome::Made(_), Some(common)) => serde_json::to_value(GroupMarked {
                point: self.point.to_string(),
                group: self.group.name.to_string(),
                kind: common.kind.as_str().to_owned(),
                members: common.part.members.len(),
                missing: missing.iter().map(|(name, cause)| GroupMissing { machine: name.to_string(), why: cause.to_string() }).collect(),
                hold_seconds: self.held.as_secs_f64(),
                remark: common.remark.clone(),
            })
            .map_err(|e| e.to_string()),
            (Outcome::Unconfirmed, _) => {
                Err(format!("not every member has confirmed its marker ({}): the point may never be complete", told.join("; ")))
            }
            _ => {
                let why = [told, self.unrest()].concat().join("; ");
                Err(if why.is_empty() {
                    "no point was made: the group was changed meanwhile".to_owned()
                } else {
                    format!("no point was made: {why}")
                })
            }
        }
    }
}

/// Numbers that no earlier process has used: so many that none comes to their end.
fn reserve(catalogue: &Catalogue) -> Result<u64, CatalogueError> {
    let first = catalogue.get::<u64>(SERVER, b"rounds")?.unwrap_or(1);
    catalogue.write(|batch| batch.put(SERVER, b"rounds", &(first + (1 << 40))))?;
    Ok(first)
}
