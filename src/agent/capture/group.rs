//! Takes part in the rounds of the machine's group: does what the [`Member`] says with the gate and the streams.
//!
//! It runs on the capture thread, so that a hold needs no other thread to begin or to end: its limit passes here whatever
//! becomes of the network.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use rustls::ClientConfig;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{OwnedMutexGuard, mpsc, oneshot};

use super::markers::Mark;
use super::{Capture, Skip};
use crate::agent::consistency::GroupStatus;
use crate::agent::consistency::connection::{ConnectionError, connect};
use crate::agent::consistency::member::{Input, Member, Output, Say, Why};
use crate::agent::rest::Frozen;
use crate::clock::{self, Mono, micros};
use crate::config::agent::Consistency;
use crate::crypto::messages;
use crate::model::{Name, PointId};
use crate::observe::metrics;
use crate::wire::consistency::{Common, CoordinatorMessage, MemberMessage, bounded};

const BACKOFF_FIRST: Duration = Duration::from_millis(100);
const BACKOFF_MAX: Duration = Duration::from_secs(5);
const REPORT_EVERY: Duration = Duration::from_secs(1);
/// Answers that may wait for the network.
const OUTBOX: usize = 64;

/// Connects to the coordinator and serves its rounds until the agent stops.
pub(super) async fn run(capture: Rc<Capture>, settings: Consistency, tls: Arc<ClientConfig>) {
    let Some(address) = settings.coordinator.clone() else { return };
    capture.group_status(|s| s.configured = true);
    let mut backoff = BACKOFF_FIRST;
    let mut told = String::new();
    loop {
        let started = clock::now();
        let error = match connect(&address, tls.clone(), capture.shared.machine_id).await {
            Ok(stream) => {
                tracing::info!(address, "connected to the coordinator");
                told.clear();
                capture.group_status(|s| (s.connected, s.error) = (true, None));
                let (read, write) = tokio::io::split(stream);
                Part::serve(&capture, &settings, read, write).await
            }
            Err(error) => error,
        };
        let message = error.to_string();
        capture.group_status(|s| (s.connected, s.error) = (false, Some(message.clone())));
        if message != told {
            tracing::warn!(error = message, "not connected to the coordinator; points of this machine alone go on");
            told = message;
        }
        backoff = if clock::now().since(started) > Duration::from_secs(10) { BACKOFF_FIRST } else { (backoff * 2).min(BACKOFF_MAX) };
        let jitter = Duration::from_micros(crate::storage::log::random_u64() % micros(backoff));
        tokio::time::sleep(backoff / 2 + jitter / 2).await;
    }
}

/// Writes are held. While it lives, nobody else makes a marker.
struct Hold {
    since: Mono,
    _alone: OwnedMutexGuard<()>,
}

/// This machine's part in the rounds of one connection.
struct Part {
    capture: Rc<Capture>,
    settings: Consistency,
    member: RefCell<Member>,
    assigned: RefCell<Option<(Name, u64)>>,
    hold: RefCell<Option<Hold>>,
    /// How long the coordinator allows the hold under way.
    asked: Cell<Duration>,
    /// What the marker of the round under way will say.
    common: RefCell<Option<Common>>,
    /// Why the last marker could not be put in.
    insert_error: RefCell<String>,
    held_for: Cell<Duration>,
    /// The applications at rest, and how to stop bringing them there.
    frozen: RefCell<Option<Frozen>>,
    cancel_rest: RefCell<Option<oneshot::Sender<()>>>,
    /// Why they are not.
    unrest: RefCell<String>,
    outbox: mpsc::Sender<MemberMessage>,
}

impl Part {
    async fn serve(
        capture: &Rc<Capture>,
        settings: &Consistency,
        mut read: impl AsyncRead + Unpin,
        mut write: impl AsyncWrite + Unpin,
    ) -> ConnectionError {
        let (outbox, mut waiting) = mpsc::channel(OUTBOX);
        let part = Rc::new(Self {
            capture: capture.clone(),
            settings: settings.clone(),
            member: RefCell::default(),
            assigned: RefCell::default(),
            hold: RefCell::default(),
            asked: Cell::default(),
            common: RefCell::default(),
            insert_error: RefCell::default(),
            held_for: Cell::default(),
            frozen: RefCell::default(),
            cancel_rest: RefCell::default(),
            unrest: RefCell::default(),
            outbox,
        });
        let listen = async {
            loop {
                match messages::read(&mut read).await {
                    Ok(CoordinatorMessage::Goodbye { message }) => return ConnectionError::Goodbye(bounded(&message)),
                    Ok(message) => part.hear(message),
                    Err(error) => return error.into(),
                }
                if part.outbox.is_closed() {
                    return ConnectionError::Full;
                }
            }
        };
        let speak = async {
            while let Some(message) = waiting.recv().await {
                if let Err(error) = messages::write(&mut write, &message).await {
                    return error.into();
                }
            }
            ConnectionError::Full
        };
        let report = async {
            loop {
                part.say(part.state());
                tokio::time::sleep(REPORT_EVERY).await;
            }
        };
        let ended = tokio::select! {
            ended = listen => ended,
            ended = speak => ended,
            ended = report => ended,
        };
        part.feed(Input::Lost);
        ended
    }

    fn hear(self: &Rc<Self>, message: CoordinatorMessage) {
        match message {
            CoordinatorMessage::Assigned { group } => {
                match &group {
                    Some((name, epoch)) => tracing::info!(group = %name, epoch, "this machine belongs to a replication group"),
                    None => tracing::info!("this machine belongs to no replication group"),
                }
                self.assigned.replace(group.clone());
                self.capture.group_status(|s| s.group = group);
            }
            CoordinatorMessage::Freeze { round } => match self.no_rest() {
                Some(why) => self.say(MemberMessage::Frozen { round, trouble: Some(why) }),
                None => self.feed(Input::Freeze(round)),
            },
            CoordinatorMessage::Prepare { round, limit_us } => {
                if let Some(why) = self.trouble() {
                    return self.say(MemberMessage::Failed { round, why });
                }
                self.asked.set(Duration::from_micros(limit_us));
                self.feed(Input::Prepare(round));
            }
            CoordinatorMessage::Commit { round, common } => {
                let ours =
                    self.assigned.borrow().as_ref().is_some_and(|(name, epoch)| (name, *epoch) == (&common.part.group, common.part.epoch));
                if !ours || !common.part.members.contains(&self.capture.shared.machine_id) {
                    self.feed(Input::Release(round));
                    return self.say(MemberMessage::Failed { round, why: "the point belongs to another group".to_owned() });
                }
                self.common.replace(Some(common));
                self.feed(Input::Commit(round));
            }
            CoordinatorMessage::Release { round } => self.feed(Input::Release(round)),
            CoordinatorMessage::Alive | CoordinatorMessage::Welcome | CoordinatorMessage::Goodbye { .. } => {}
        }
    }

    fn feed(self: &Rc<Self>, input: Input) {
        let outputs = self.member.borrow_mut().on(input);
        for output in outputs {
            match output {
                Output::BeginRest(round) => drop(tokio::task::spawn_local(self.clone().rest(round))),
                Output::EndRest => self.end_rest(),
                Output::Hold(round) => drop(tokio::task::spawn_local(self.clone().hold(round))),
                Output::InsertAndOpen(round) => {
                    let inserted = self.insert();
                    self.open();
                    self.feed(Input::Inserted(round, inserted));
                }
                Output::Open => self.open(),
                Output::Say(say) => self.tell(say),
            }
        }
    }

    /// Brings the applications to rest, until the round or the time allowed is over. Writes pass meanwhile.
    async fn rest(self: Rc<Self>, round: u64) {
        let freezer = self.capture.shared.rest.clone();
        if !freezer.is_configured() {
            self.unrest.replace("it has no [[app.hook]]".to_owned());
            self.capture.last_group_rest.set(Some(clock::now()));
            return self.feed(Input::Rest(round, false));
        }
        let (cancel, cancelled) = oneshot::channel();
        self.cancel_rest.replace(Some(cancel));
        let begun = tokio::select! {
            begun = freezer.begin() => begun,
            // What was begun is undone with the future.
            _ = cancelled => return,
        };
        match begun {
            Ok(frozen) => {
                self.frozen.replace(Some(frozen));
                self.feed(Input::Rest(round, true));
                tokio::time::sleep(self.capture.settings.app.freeze_max).await;
                if self.member.borrow().is_at_rest(round) {
                    self.end_rest();
                    self.feed(Input::RestOver(round));
                }
            }
            Err(failure) => {
                self.capture.last_group_rest.set(Some(clock::now()));
                self.unrest.replace(failure.reason);
                self.feed(Input::Rest(round, false));
            }
        }
    }

    fn end_rest(&self) {
        self.capture.last_group_rest.set(Some(clock::now()));
        drop(self.cancel_rest.take());
        if let Some(frozen) = self.frozen.take() {
            tokio::task::spawn_local(frozen.undo());
        }
    }

    /// Holds new writes, for at most as long as both limits allow; a wait for another marker counts. Writes under way are not
    /// waited for: see [`super::markers`].
    async fn hold(self: Rc<Self>, round: u64) {
        let limit = self.settings.hold_max.min(self.asked.get());
        let started = clock::now();
        let left = || limit.saturating_sub(clock::now().since(started));
        let alone = tokio::time::timeout(limit, self.capture.marking.clone().lock_owned()).await;
        // While another marker was being made the round may have ended, or the machine may have been handed over: nothing may
        // follow its final point.
        if let Ok(alone) = alone
            && self.member.borrow().is_waiting(round)
            && self.capture.cannot_mark().is_none()
        {
            self.capture.gate.hold();
            self.hold.replace(Some(Hold { since: clock::now(), _alone: alone }));
            // Nothing of what is at rest has written since, if it is at rest even now.
            let woken = self.frozen.borrow().as_ref().and_then(|frozen| frozen.is_still().err());
            if let Some(failure) = woken {
                self.unrest.replace(failure.reason);
                self.feed(Input::RestOver(round));
            }
            self.feed(Input::Holding(round));
            tokio::time::sleep(left()).await;
        }
        self.feed(Input::Limit(round));
    }

    fn open(&self) {
        let Some(hold) = self.hold.take() else { return };
        self.capture.gate.release();
        let held = clock::now().since(hold.since);
        self.held_for.set(held);
        self.capture.last_group_hold.set(Some(clock::now()));
        metrics::observe(metrics::GROUP_HOLD, held);
    }

    /// Puts the marker into every stream. Writes are held.
    fn insert(&self) -> bool {
        let (Some(common), Some(since)) = (self.common.take(), self.hold.borrow().as_ref().map(|h| h.since)) else { return false };
        let mark = Mark {
            point: PointId::part(common.part.point, self.capture.shared.machine_id),
            kind: common.kind,
            label: common.label,
            group: Some(common.part),
            proof: common.proof,
            remark: common.remark,
        };
        match self.capture.insert(mark, since) {
            Ok(_) => true,
            Err(skip) => {
                metrics::count_reason(metrics::POINTS_SKIPPED, skip.reason());
                self.insert_error.replace(skip.to_string());
                false
            }
        }
    }

    fn tell(&self, say: Say) {
        self.say(match say {
            Say::Frozen(round, true) => MemberMessage::Frozen { round, trouble: None },
            Say::Frozen(round, false) => MemberMessage::Frozen { round, trouble: Some(self.unrest.take()) },
            Say::Held(round, frozen) => {
                let positions = self.capture.volumes.iter().map(|v| v.shared.backlog().rungs()[0].1).collect();
                MemberMessage::Held { round, frozen, positions }
            }
            Say::Marked(round) => MemberMessage::Marked { round, held_us: micros(self.held_for.get()) },
            Say::Failed(round, why) => {
                let why = match why {
                    Why::Late => "was asked for a round that is over".to_owned(),
                    Why::Limit => "consistency.hold_max was not enough; the application was not held longer".to_owned(),
                    Why::Insert => self.insert_error.take(),
                };
                MemberMessage::Failed { round, why }
            }
        });
    }

    fn say(&self, message: MemberMessage) {
        // When nothing is taken any more the connection ends by itself; what is lost here is lost with it.
        let _ = self.outbox.try_send(message);
    }

    fn state(&self) -> MemberMessage {
        let target = self.capture.shared.target.lock().unwrap_or_else(PoisonError::into_inner).clone();
        MemberMessage::State { target, trouble: self.capture.cannot_mark().map(|skip| skip.to_string()) }
    }

    /// Why its applications are not brought to rest for the group now.
    fn no_rest(&self) -> Option<String> {
        let rest = self.settings.freeze_rest_min;
        if self.assigned.borrow().is_none() {
            return Some("belongs to no group".to_owned());
        }
        let too_soon = self.capture.last_group_rest.get().is_some_and(|at| clock::now().since(at) < rest);
        if too_soon {
            let rest = humantime::format_duration(rest);
            return Some(format!("its applications were at rest less than {rest} ago (consistency.freeze_rest_min)"));
        }
        self.trouble()
    }

    /// Why this machine takes no part in a round now.
    fn trouble(&self) -> Option<String> {
        let rest = self.settings.rest_min;
        let too_soon = self.capture.last_group_hold.get().is_some_and(|at| clock::now().since(at) < rest);
        if too_soon {
            return Some(format!("its writes were held less than {} ms ago (consistency.rest_min)", rest.as_millis()));
        }
        self.capture.cannot_mark().map(|skip| skip.to_string())
    }
}

impl Capture {
    fn group_status(&self, change: impl FnOnce(&mut GroupStatus)) {
        change(&mut self.shared.group.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// Why no marker can be made now.
    pub(super) fn cannot_mark(&self) -> Option<Skip> {
        if self.shared.stopping.load(std::sync::atomic::Ordering::Relaxed) {
            Some(Skip::Stopping)
        } else if self.is_handed_over() {
            Some(Skip::HandedOver)
        } else if !self.is_consistent() {
            Some(Skip::NotConsistent)
        } else {
            None
        }
    }
}
