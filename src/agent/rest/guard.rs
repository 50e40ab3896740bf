//! The guard: a process of its own that brings things to rest and undoes it when it is told to, when the agent is gone, or when
//! the time is over, whichever comes first. It never writes to what it froze.
//!
//! Each part is worked on by a thread of its own: a freeze that hangs in the kernel must not keep the others frozen. What hangs is
//! undone when it comes back. A note in the agent's state folder says what may be at rest; it outlives this process. It is not
//! synced: with the host everything that it speaks of ends too.

use std::collections::BTreeSet;
use std::fs::{File, TryLockError};
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};

use super::guest;
use super::plan::{Cause, Failure, Order, Plan, Progress, What, note};
use super::script::{self, Call};
use super::words::{Job, LINE_BYTES_MAX, Report, Word};
use crate::clock::{self, Mono};
use crate::config::limits::HOOKS_MAX;
use crate::storage::freeze::{self, Thawed};

/// What is told to stop has this long before the others are undone without waiting for it.
const GRACE: Duration = Duration::from_millis(500);
/// An undo has this long before the next one begins beside it.
const UNDO_WAIT: Duration = Duration::from_secs(5);
/// Attempts at a thaw that fails, a second apart.
const THAW_ATTEMPTS: u32 = 5;
/// Another guard has this long to finish with the note.
pub(super) const LOCK_WAIT: Duration = Duration::from_secs(10);

/// What happens to a guard.
enum Event {
    /// To undo everything: it was told, or the agent is gone.
    Asked,
    Done(usize, Result<Rested, NotRested>),
    Undone(usize, Result<(Thawed, String), String>),
}

/// Something is at rest.
struct Rested {
    output: String,
    /// Keeps the file system from being unmounted: one that is frozen and has no place can be thawed by nobody.
    _held: Option<File>,
}

/// It is not.
struct NotRested {
    reason: String,
    /// And surely unchanged.
    clean: bool,
}

/// Runs a guard from its first input line to its end.
///
/// # Errors
/// Input that is no job, or a note that another guard has; nothing was touched.
pub fn run() -> io::Result<()> {
    // Out of the reach of ^C and of a terminal that is closed.
    let _ = rustix::process::setsid();
    as_usual();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
    outlive_signals(&runtime)?;
    let mut input = BufReader::new(io::stdin());
    let mut line = String::new();
    input.by_ref().take(LINE_BYTES_MAX).read_line(&mut line)?;
    let job: Job = serde_json::from_str(&line)?;
    let note = Note::open(&job.note)?;
    let begun = note.read()?;
    let (plan, progress) = match (job.plan, begun) {
        (Some(_), Some((_, begun))) if !begun.is_empty() => return Err(io::Error::other("what an earlier guard began is not undone")),
        (Some(plan), _) => {
            note.start(&plan)?;
            let parts = plan.parts.len();
            (plan, Progress::new(parts))
        }
        (None, Some((plan, begun))) => {
            let parts = plan.parts.len();
            (plan, Progress::left_behind(parts, &begun))
        }
        // Another guard was quicker, or nothing was begun.
        (None, None) => (Plan::new(String::new(), Vec::new(), Duration::ZERO), Progress::left_behind(0, &BTreeSet::new())),
    };
    let (events, happened) = sync_channel(4 * HOOKS_MAX);
    if !progress.is_ending() {
        listen(input, events.clone());
    }
    Guard::new(plan, note, progress, events, happened).go();
    Ok(())
}

/// The thread that serves the disks comes before others, and hands that down to what is started from it: neither this process
/// nor an application that a script starts again is meant.
fn as_usual() {
    if let Ok(nice) = rustix::process::getpriority_process(rustix::process::getppid()) {
        let _ = rustix::process::setpriority_process(None, nice);
    }
}

/// Signals that end a process are met with a handler that does nothing: once something is frozen, who ends us must mean it.
fn outlive_signals(runtime: &tokio::runtime::Runtime) -> io::Result<()> {
    let _inside = runtime.enter();
    use SignalKind as Kind;
    for kind in [Kind::terminate(), Kind::interrupt(), Kind::hangup(), Kind::quit(), Kind::user_defined1(), Kind::user_defined2()] {
        // Handlers stay when the listener is dropped.
        drop(signal(kind)?);
    }
    Ok(())
}

fn listen(mut input: impl BufRead + Send + 'static, events: SyncSender<Event>) {
    std::thread::spawn(move || {
        // A line, the end of file and an error mean the same.
        let _ = input.by_ref().take(LINE_BYTES_MAX).read_line(&mut String::new());
        let _ = events.send(Event::Asked);
    });
}

struct Guard {
    plan: Arc<Plan>,
    note: Note,
    progress: Progress,
    events: SyncSender<Event>,
    happened: Receiver<Event>,
    /// Set when what is being brought to rest is not wanted any more.
    stop: Arc<AtomicBool>,
    /// When the first file system was about to be frozen.
    since: Option<Mono>,
    /// That moment of all processes' clock, plus the longest time.
    until_ms: u64,
    /// How long writers waited, once they go on.
    frozen_ms: u64,
    /// The agent knows how it went.
    told: bool,
    undoing: bool,
    reports: Vec<Report>,
    rested: Vec<Rested>,
    /// What may still be at rest keeps the note.
    left: bool,
}

impl Guard {
    fn new(plan: Plan, note: Note, progress: Progress, events: SyncSender<Event>, happened: Receiver<Event>) -> Self {
        let plan = Arc::new(plan);
        let (stop, reports, rested) = Default::default();
        Self {
            plan,
            note,
            progress,
            events,
            happened,
            stop,
            since: None,
            until_ms: 0,
            frozen_ms: 0,
            told: false,
            undoing: false,
            reports,
            rested,
            left: false,
        }
    }

    fn go(mut self) {
        loop {
            let order = self.progress.order();
            match order {
                Order::Do(part) => self.begin(part),
                Order::Undo(part) => self.undo(part),
                Order::Hold => {
                    self.start_clock();
                    if !std::mem::replace(&mut self.told, true) {
                        say(&Word::Frozen { until_ms: self.until_ms });
                    }
                    self.next_event(None);
                }
                Order::Wait => self.next_event(None),
                Order::End => break,
            }
        }
        if !self.left {
            self.note.remove();
        }
        let left: Vec<String> =
            self.reports.iter().filter(|r| r.undo).filter_map(|r| Some(format!("{}: {}", r.part, r.error.as_ref()?))).collect();
        if !say(&Word::Over { frozen_ms: self.frozen_ms, reports: self.reports }) && !left.is_empty() {
            eprintln!("tidegate: the agent is gone, and this could not be undone: {}", left.join("; "));
        }
    }

    fn start_clock(&mut self) {
        if self.since.is_none() {
            self.since = Some(clock::now());
            self.until_ms = clock::host_ms() + clock::micros(self.plan.freeze_max) / 1000;
        }
    }

    fn begin(&mut self, part: usize) {
        let what = self.plan.parts[part].what.clone();
        if what.stops_writers() {
            self.start_clock();
        }
        if let Err(error) = self.note.add(&note::begun(part)) {
            let reason = format!("cannot note what is about to be frozen: {error}");
            return self.end(Some(Failure { cause: Cause::Guard, reason }));
        }
        self.progress.begin(Order::Do(part));
        let (events, stop, variables) = (self.events.clone(), self.stop.clone(), self.variables());
        let limit = self.since.map_or(self.plan.freeze_max, |since| self.plan.freeze_max.saturating_sub(clock::now().since(since)));
        std::thread::spawn(move || {
            let _ = events.send(Event::Done(part, bring_to_rest(&what, &variables, limit, &stop)));
        });
    }

    fn undo(&mut self, part: usize) {
        if !std::mem::replace(&mut self.undoing, true) {
            say(&Word::Undoing);
        }
        self.progress.begin(Order::Undo(part));
        let (what, events, variables) = (self.plan.parts[part].what.clone(), self.events.clone(), self.variables());
        std::thread::spawn(move || {
            let _ = events.send(Event::Undone(part, set_going(&what, &variables)));
        });
        let patience = after(UNDO_WAIT);
        let undone = self.reports.len();
        while self.reports.len() == undone && clock::now() < patience {
            self.next_event(Some(patience));
        }
    }

    /// Takes what happens next, but waits no longer than `patience`, nor beyond the end of the time.
    fn next_event(&mut self, patience: Option<Mono>) {
        let over = self.since.filter(|_| !self.progress.is_ending()).map(|since| plus(since, self.plan.freeze_max));
        let wait = [patience, over].into_iter().flatten().min().map_or(Duration::from_secs(3600), |moment| moment.since(clock::now()));
        match self.happened.recv_timeout(wait) {
            Ok(event) => self.handle(event),
            Err(_) if over.is_some_and(|over| clock::now() >= over) => {
                let limit = humantime::format_duration(self.plan.freeze_max);
                self.end(Some(Failure {
                    cause: Cause::Late,
                    reason: format!("not everything was at rest within {limit} (app.freeze_max)"),
                }));
            }
            Err(_) => {}
        }
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Asked => self.end(None),
            Event::Done(part, Ok(rested)) => {
                self.report(part, false, rested.output.clone(), None, false);
                self.rested.push(rested);
                self.progress.handle_done(part, false, false);
            }
            Event::Done(part, Err(failed)) => {
                if failed.clean {
                    let _ = self.note.add(&note::clean(part));
                }
                self.report(part, false, String::new(), Some(failed.reason.clone()), false);
                self.progress.handle_done(part, false, failed.clean);
                let part = &self.plan.parts[part];
                let failure = Failure { cause: Cause::from(&part.what), reason: format!("{}: {}", part.name, failed.reason) };
                self.end(Some(failure));
            }
            Event::Undone(part, result) => {
                let (early, output, error) = match result {
                    Ok((thawed, output)) => (thawed == Thawed::Already, output, None),
                    Err(error) => (false, String::new(), Some(error)),
                };
                if error.is_none() {
                    let _ = self.note.add(&note::clean(part));
                }
                let stops_writers = self.plan.parts[part].what.stops_writers();
                if let Some(since) = self.since.filter(|_| stops_writers) {
                    self.frozen_ms = clock::micros(clock::now().since(since)) / 1000;
                }
                // A script that failed to set its application going is not tried again: it was called, and said so.
                self.left |= error.is_some() && stops_writers;
                self.report(part, true, output, error, early);
                self.progress.handle_undone(part);
            }
        }
    }

    /// Nothing is begun from here on.
    fn end(&mut self, failure: Option<Failure>) {
        if self.progress.is_ending() {
            return;
        }
        self.progress.handle_end();
        self.stop.store(true, Ordering::Relaxed);
        if let Some(failure) = failure.filter(|_| !std::mem::replace(&mut self.told, true)) {
            say(&Word::Failed(failure));
        }
        let patience = after(GRACE);
        while self.progress.is_doing() && clock::now() < patience {
            self.next_event(Some(patience));
        }
    }

    fn report(&mut self, part: usize, undo: bool, output: String, error: Option<String>, early: bool) {
        self.reports.push(Report { part: self.plan.parts[part].name.clone(), undo, output, error, early });
    }

    fn variables(&self) -> Vec<(&'static str, String)> {
        let longest = self.plan.freeze_max.as_secs_f64().ceil().to_string();
        vec![("TIDEGATE_MACHINE", self.plan.machine.clone()), ("TIDEGATE_FREEZE_MAX", longest)]
    }
}

fn after(wait: Duration) -> Mono {
    plus(clock::now(), wait)
}

fn plus(moment: Mono, wait: Duration) -> Mono {
    Mono(moment.0.saturating_add(clock::micros(wait)))
}

fn bring_to_rest(what: &What, variables: &[(&str, String)], limit: Duration, stop: &AtomicBool) -> Result<Rested, NotRested> {
    match what {
        What::Script { path, timeout } => script::run(path, Call::Pre, variables, *timeout, stop)
            .map(|output| Rested { output, _held: None })
            // It may have done half of it: its other call undoes that.
            .map_err(|reason| NotRested { reason, clean: false }),
        What::Guest { socket } => guest::freeze(socket, limit, stop)
            .map(|count| Rested { output: format!("{count} file systems of the guest are frozen"), _held: None })
            .map_err(|e| NotRested { reason: e.reason, clean: e.clean }),
        What::Mount { path } => {
            let held = File::open(path).map_err(|e| NotRested { reason: format!("{}: {e}", path.display()), clean: true })?;
            freeze::freeze(path).map_err(|e| NotRested { reason: e.reason, clean: true })?;
            Ok(Rested { output: String::new(), _held: Some(held) })
        }
    }
}

fn set_going(what: &What, variables: &[(&str, String)]) -> Result<(Thawed, String), String> {
    match what {
        What::Script { path, timeout } => {
            script::run(path, Call::Post, variables, *timeout, &AtomicBool::new(false)).map(|output| (Thawed::Now, output))
        }
        What::Guest { socket } => guest::thaw(socket).map(|thawed| (thawed, String::new())),
        What::Mount { path } => {
            for attempt in 1.. {
                match freeze::thaw(path) {
                    Ok(thawed) => return Ok((thawed, String::new())),
                    Err(error) if attempt == THAW_ATTEMPTS => return Err(format!("{} cannot be thawed: {error}", path.display())),
                    Err(_) => std::thread::sleep(Duration::from_secs(1)),
                }
            }
            unreachable!("the last attempt returns")
        }
    }
}

/// Says a word to the agent, if there still is one.
fn say(word: &Word) -> bool {
    let Ok(mut line) = serde_json::to_vec(word) else { return false };
    line.push(b'\n');
    let mut out = io::stdout().lock();
    out.write_all(&line).and_then(|()| out.flush()).is_ok()
}

/// The note, which one guard has at a time.
struct Note {
    path: PathBuf,
    file: File,
}

impl Note {
    fn open(path: &Path) -> io::Result<Self> {
        let patience = after(LOCK_WAIT);
        loop {
            let file = File::options().read(true).append(true).create(true).mode(0o600).open(path)?;
            match file.try_lock() {
                // Who had it before may have removed it meanwhile.
                Ok(()) if file.metadata()?.nlink() > 0 => return Ok(Self { path: path.to_owned(), file }),
                Ok(()) => {}
                Err(TryLockError::WouldBlock) if clock::now() < patience => std::thread::sleep(Duration::from_millis(50)),
                Err(TryLockError::WouldBlock) => return Err(io::Error::other("another guard is still undoing what it began")),
                Err(TryLockError::Error(error)) => return Err(error),
            }
        }
    }

    fn read(&self) -> io::Result<Option<(Plan, BTreeSet<usize>)>> {
        let mut text = Vec::new();
        (&self.file).take(note::BYTES_MAX).read_to_end(&mut text)?;
        let known = note::read(&String::from_utf8_lossy(&text));
        if known.is_none() && !text.is_empty() {
            eprintln!("tidegate: {} cannot be read: if something is still frozen, thaw it by hand (fsfreeze -u)", self.path.display());
        }
        Ok(known)
    }

    fn start(&self, plan: &Plan) -> io::Result<()> {
        self.file.set_len(0)?;
        (&self.file).seek(SeekFrom::Start(0))?;
        self.add(&note::head(plan))
    }

    fn add(&self, line: &str) -> io::Result<()> {
        (&self.file).write_all(line.as_bytes())
    }

    fn remove(&self) {
        // Emptied as well, for a guard that waits for the lock with the file open.
        let _ = self.file.set_len(0);
        let _ = std::fs::remove_file(&self.path);
    }
}
