//! Brings applications and file systems to rest around a marker, and sees to it that they are set going again whatever dies.
//!
//! Facts that hold here:
//! - The freezing is done by a [`guard`], a process of its own, because this one may end at any moment and may serve the very disk
//!   that is frozen. The guard undoes everything when it is told to, when this process is gone, and after `app.freeze_max`.
//! - When the guard is gone, this process starts another one that undoes what the note in the state folder says. When both are
//!   gone, the agent's next start does. Undoing twice changes nothing.
//! - One freeze at a time, and none before the last one is undone.
//! - A freeze writes to the disk that the agent serves: nothing here waits on the capture thread, and who holds the gate while
//!   something is being frozen or thawed waits for himself.
//! - [`Frozen::is_still`] may say no too early, never yes too late: it goes by the moment at which the guard would begin to undo.
//!
//! Undoing what an earlier process left behind goes on beside the start of the agent, not before it: thawing a file system writes
//! to its disk, which is served by this agent.

mod guard;
mod guest;
pub mod guest_agent;
mod keeper;
mod places;
pub mod plan;
mod script;
mod words;

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::SyncSender;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

pub use guard::run as run_guard;
pub use places::check as check_places;

use self::keeper::Event;
use self::plan::{Cause, Failure, Part, Plan, What};
use crate::clock;
use crate::config::agent::AgentSettings;

/// An earlier freeze has this long to be undone before a new one is given up.
const TURN: Duration = Duration::from_secs(5);
/// Besides scripts, for what is undone while the agent stops.
const STOP: Duration = Duration::from_secs(30);
/// It is asked for again this often.
const LOOK: Duration = Duration::from_millis(250);
/// How much longer than its parts a freeze may take.
const ANSWER: Duration = Duration::from_secs(15);
/// Whoever undoes a freeze waits this long for it; it goes on afterwards.
const UNDONE: Duration = Duration::from_secs(10);

/// Brings the machine to rest; cheap to clone.
#[derive(Clone)]
pub struct Freezer {
    inner: Arc<Inner>,
}

struct Inner {
    plan: Plan,
    note: PathBuf,
    settings: AgentSettings,
    turn: Arc<Semaphore>,
    trouble: Mutex<Trouble>,
    /// Nothing is brought to rest any more.
    stopping: AtomicBool,
    /// To whoever keeps the guard that runs now.
    keeper: Mutex<Option<SyncSender<Event>>>,
}

/// What a person should know.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Trouble {
    /// Why the last application-consistent point was not one.
    pub failed: Option<String>,
    /// What is still at rest and should not be.
    pub stuck: Option<String>,
}

impl Freezer {
    /// For the hooks of a configuration. Touches nothing.
    pub fn new(settings: &AgentSettings) -> Self {
        let part = |hook: &crate::config::agent::AppHook| {
            let what = match (&hook.mount, &hook.guest_agent, &hook.script) {
                (Some(path), _, _) => What::Mount { path: path.clone() },
                (_, Some(socket), _) => What::Guest { socket: socket.clone() },
                (_, _, script) => What::Script { path: script.clone().unwrap_or_default(), timeout: hook.timeout() },
            };
            Part { name: hook.name.to_string(), what }
        };
        let parts = settings.app.hook.iter().map(part).collect();
        let inner = Inner {
            plan: Plan::new(settings.machine.to_string(), parts, settings.app.freeze_max),
            note: settings.state.join("at-rest"),
            settings: settings.clone(),
            turn: Arc::new(Semaphore::new(1)),
            trouble: Mutex::default(),
            stopping: AtomicBool::new(false),
            keeper: Mutex::default(),
        };
        Self { inner: Arc::new(inner) }
    }

    /// Whether there is anything to bring to rest.
    pub fn is_configured(&self) -> bool {
        !self.inner.plan.parts.is_empty()
    }

    /// What a person should know.
    pub fn trouble(&self) -> Trouble {
        self.inner.trouble().clone()
    }

    /// Undoes what an earlier process left at rest, if any; goes on in the background, and no freeze begins before.
    pub fn undo_left_behind(&self) {
        if !self.inner.note.exists() {
            return;
        }
        let Ok(turn) = self.inner.turn.clone().try_acquire_owned() else { return };
        tracing::warn!(note = %self.inner.note.display(), "an earlier agent may have left something frozen: it is undone now");
        self.inner.spawn(turn, keeper::undo_until_done);
    }

    /// Brings everything to rest. Takes as long as scripts and devices take, at most the scripts' limits plus `app.freeze_max`
    /// and a few seconds; dropping the future undoes what was begun.
    ///
    /// The gate must be open, and nothing that this thread does for its disks may wait for it.
    ///
    /// # Errors
    /// [`Failure`]: what was begun is being undone. It was counted.
    pub async fn begin(&self) -> Result<Frozen, Failure> {
        let result = self.try_begin().await;
        match &result {
            Ok(_) => self.inner.trouble().failed = None,
            Err(failure) => self.inner.failed(failure),
        }
        result
    }

    async fn try_begin(&self) -> Result<Frozen, Failure> {
        if self.inner.stopping.load(Ordering::Relaxed) {
            return Err(Failure { cause: Cause::Unfinished, reason: "the agent is stopping".to_owned() });
        }
        let unfinished = || Failure {
            cause: Cause::Unfinished,
            reason: self.trouble().stuck.unwrap_or_else(|| "an earlier freeze is not undone yet".to_owned()),
        };
        let turn = tokio::time::timeout(TURN, self.inner.turn.clone().acquire_owned()).await;
        let turn = turn.map_err(|_| unfinished())?.map_err(|_| unfinished())?;
        let (report, reported) = oneshot::channel();
        self.inner.spawn(turn, |inner| keeper::keep(inner, report));
        // Whoever does not wait any more wants it undone, not finished first.
        let mut given_up = GivenUp(Some(&self.inner));
        let guard = |reason: &str| Failure { cause: Cause::Guard, reason: reason.to_owned() };
        // Also looking at what is mounted may hang, if its device does.
        let late = |_| guard("the process that freezes said nothing in its time");
        let reported = tokio::time::timeout(self.inner.plan.longest() + ANSWER, reported).await.map_err(late)?;
        given_up.0 = None;
        reported.map_err(|_| guard("the freeze ended without a result"))?
    }

    /// Brings nothing to rest any more, undoes what is at rest, and waits for it as long as scripts may take and half a minute: for
    /// who is about to stop serving the disks.
    pub async fn stop(&self) {
        self.inner.stopping.store(true, Ordering::Relaxed);
        let (started, limit) = (clock::now(), STOP + self.inner.plan.scripts());
        while clock::now().since(started) < limit {
            self.inner.ask();
            if tokio::time::timeout(LOOK, self.inner.turn.acquire()).await.is_ok() {
                return;
            }
        }
        tracing::error!(machine = self.inner.plan.machine, "the agent stops although not everything is set going again");
    }
}

/// Dropped while something is being brought to rest.
struct GivenUp<'a>(Option<&'a Inner>);

impl Drop for GivenUp<'_> {
    fn drop(&mut self) {
        if let Some(inner) = self.0 {
            inner.ask();
        }
    }
}

impl Inner {
    /// Has what is at rest, or on the way to it, undone.
    fn ask(&self) {
        let keeper = self.keeper.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(keeper) = keeper {
            let _ = keeper.try_send(Event::Asked);
        }
    }

    fn trouble(&self) -> MutexGuard<'_, Trouble> {
        self.trouble.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn failed(&self, failure: &Failure) {
        tracing::warn!(machine = self.plan.machine, reason = failure.reason, "the machine could not be brought to rest");
        self.trouble().failed = Some(failure.reason.clone());
    }

    /// Runs `work` on a thread of its own, which has the turn until it ends.
    fn spawn(self: &Arc<Self>, turn: OwnedSemaphorePermit, work: impl FnOnce(&Arc<Inner>) + Send + 'static) {
        let inner = self.clone();
        let spawned = std::thread::Builder::new().name("freeze".to_owned()).spawn(move || {
            work(&inner);
            drop(turn);
        });
        if let Err(error) = spawned {
            tracing::error!(%error, "no thread for a freeze");
        }
    }
}

/// Everything is at rest, until this is undone or dropped, or the time is over.
pub struct Frozen {
    until_ms: u64,
    alive: Arc<AtomicBool>,
    keeper: SyncSender<Event>,
    over: oneshot::Receiver<()>,
    inner: Arc<Inner>,
}

impl Frozen {
    /// Whether everything has been at rest from the beginning until now. To be asked when all writes are held, right before
    /// the markers are inserted.
    ///
    /// # Errors
    /// Why not, for the point's remark. It was counted.
    pub fn is_still(&self) -> Result<(), Failure> {
        // The clock is read in whole milliseconds.
        if self.alive.load(Ordering::Acquire) && clock::host_ms() + 1 < self.until_ms {
            return Ok(());
        }
        let limit = humantime::format_duration(self.inner.plan.freeze_max);
        let reason = format!("the freeze was over (app.freeze_max is {limit}) before the writes were held");
        let failure = Failure { cause: Cause::Late, reason };
        self.inner.failed(&failure);
        Err(failure)
    }

    /// Undoes it. Returns when that is done, or after ten seconds while it goes on; what cannot be undone is logged and in the
    /// status. The gate must be open.
    pub async fn undo(mut self) {
        let _ = self.keeper.try_send(Event::Asked);
        let _ = tokio::time::timeout(UNDONE, &mut self.over).await;
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        let _ = self.keeper.try_send(Event::Asked);
    }
}
