//! Keeps a guard: starts it, hears what it says, and replaces it when it dies or is silent. Blocking, on a thread of its own.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Duration;

use tokio::sync::oneshot;

use super::plan::{Cause, Failure};
use super::words::{Job, LINE_BYTES_MAX, Report, Word};
use super::{Frozen, Inner, guard, places};
use crate::clock::{self, Mono};
use crate::observe::metrics;

/// Words that wait to be heard; a guard says four.
const EVENTS_MAX: usize = 16;
/// A guard that works says what it does within this time of when it is due.
const SILENCE: Duration = Duration::from_secs(5);
/// The longest that undoing takes, besides scripts: a guest is asked for a minute.
const UNDO_MAX: Duration = Duration::from_secs(90);
/// Between two attempts at undoing what a guard left, at first and at most.
const AGAIN: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(30));

/// What happens to a keeper.
pub(super) enum Event {
    /// To undo everything.
    Asked,
    /// The guard said something.
    Said(Word),
    /// The guard will say nothing more.
    Gone,
}

/// Brings everything to rest, reports, and stays until everything is undone.
pub(super) fn keep(inner: &Arc<Inner>, report: oneshot::Sender<Result<Frozen, Failure>>) {
    let refuse = |report: oneshot::Sender<_>, cause, reason| {
        metrics::count_result(metrics::FREEZES, "failed");
        let _ = report.send(Err(Failure { cause, reason }));
    };
    if inner.note.exists()
        && let Err(left) = undo_note(inner)
    {
        refuse(report, Cause::Unfinished, left.clone());
        inner.trouble().stuck = Some(left);
        return undo_until_done(inner);
    }
    for part in &inner.plan.parts {
        if let Err(reason) = places::check_now(&part.what, &inner.settings) {
            return refuse(report, Cause::Mount, format!("{}: {reason}", part.name));
        }
    }
    let (events, happened) = sync_channel(EVENTS_MAX);
    let job = Job { note: inner.note.clone(), plan: Some(inner.plan.clone()) };
    let process = match Process::start(&job, &events) {
        Ok(process) => process,
        Err(error) => return refuse(report, Cause::Guard, format!("cannot start the process that freezes: {error}")),
    };
    *inner.keeper.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(events.clone());
    let keeper = Keeper { inner: inner.clone(), process, events, happened, alive: Arc::default(), report: Some(report), over: None };
    let undone = keeper.go();
    *inner.keeper.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = None;
    if !undone {
        undo_until_done(inner);
    }
}

struct Keeper {
    inner: Arc<Inner>,
    process: Process,
    events: SyncSender<Event>,
    happened: Receiver<Event>,
    alive: Arc<AtomicBool>,
    report: Option<oneshot::Sender<Result<Frozen, Failure>>>,
    over: Option<oneshot::Sender<()>>,
}

impl Keeper {
    /// Until the guard is done or gone: whether everything is undone.
    fn go(mut self) -> bool {
        let mut due = after(self.inner.plan.longest() + SILENCE);
        loop {
            let event = self.happened.recv_timeout(due.since(clock::now()));
            match event.unwrap_or_else(|_| self.silent()) {
                Event::Asked => {
                    self.alive.store(false, Ordering::Release);
                    self.process.ask();
                    due = due.min(after(SILENCE));
                }
                Event::Said(Word::Frozen { until_ms }) => {
                    due = after(Duration::from_millis(until_ms.saturating_sub(clock::host_ms())) + SILENCE);
                    self.frozen(until_ms);
                }
                Event::Said(Word::Failed(failure)) => self.fail(failure),
                Event::Said(Word::Undoing) => {
                    self.alive.store(false, Ordering::Release);
                    due = after(UNDO_MAX + self.inner.plan.scripts());
                }
                Event::Said(Word::Over { frozen_ms, reports }) => return self.finish(frozen_ms, &reports),
                Event::Gone => {
                    self.alive.store(false, Ordering::Release);
                    let reason = "the process that freezes ended before it was told to".to_owned();
                    tracing::error!(machine = self.inner.plan.machine, "{reason}; what it froze is thawed now");
                    self.fail(Failure { cause: Cause::Guard, reason });
                    return false;
                }
            }
        }
    }

    /// A guard that does not say what is due is ended; another one undoes what it noted.
    fn silent(&self) -> Event {
        tracing::error!(machine = self.inner.plan.machine, "the process that freezes is silent: it is replaced");
        self.process.kill();
        Event::Gone
    }

    fn frozen(&mut self, until_ms: u64) {
        metrics::count_result(metrics::FREEZES, "ok");
        self.alive.store(true, Ordering::Release);
        let (over, ended) = oneshot::channel();
        self.over = Some(over);
        let frozen = Frozen { until_ms, alive: self.alive.clone(), keeper: self.events.clone(), over: ended, inner: self.inner.clone() };
        if let Some(report) = self.report.take() {
            // Nobody waits for it any more: dropped at once, which undoes it.
            drop(report.send(Ok(frozen)));
        }
    }

    fn fail(&mut self, failure: Failure) {
        if let Some(report) = self.report.take() {
            metrics::count_result(metrics::FREEZES, if failure.cause == Cause::Late { "late" } else { "failed" });
            let _ = report.send(Err(failure));
        }
    }

    fn finish(&mut self, frozen_ms: u64, reports: &[Report]) -> bool {
        self.fail(Failure { cause: Cause::Late, reason: "it was given up".to_owned() });
        metrics::observe(metrics::FREEZE, Duration::from_millis(frozen_ms));
        for report in reports.iter().filter(|r| r.early && r.error.is_none() && was_done(reports, &r.part)) {
            let text =
                format!("{} was thawed by somebody else while a point was made: that point may be crash-consistent only", report.part);
            tracing::warn!(machine = self.inner.plan.machine, "{text}");
            self.inner.trouble().failed = Some(text);
        }
        let left = told(&self.inner, reports);
        // What an earlier point left was set going again with this one.
        self.inner.trouble().stuck = Some(left).filter(|left| !left.is_empty());
        // Known by the note: a script that failed to set its application going is said, not repeated.
        let undone = !self.inner.note.exists();
        if let Some(over) = self.over.take().filter(|_| undone) {
            let _ = over.send(());
        }
        self.process.end();
        undone
    }
}

/// Whether a part was at rest by our doing.
fn was_done(reports: &[Report], part: &str) -> bool {
    reports.iter().any(|r| r.part == part && !r.undo && r.error.is_none())
}

/// Logs what a guard did; what it could not undo.
fn told(inner: &Inner, reports: &[Report]) -> String {
    let mut left = Vec::new();
    for Report { part, undo, output, error, .. } in reports {
        let step = if *undo { "set going again" } else { "brought to rest" };
        match error {
            None => tracing::info!(machine = inner.plan.machine, hook = part, output, "{step}"),
            Some(error) if *undo => {
                tracing::error!(machine = inner.plan.machine, hook = part, error, "could not be set going again");
                left.push(format!("{part} could not be set going again: {error}"));
            }
            Some(error) => tracing::warn!(machine = inner.plan.machine, hook = part, error, "could not be brought to rest"),
        }
    }
    left.join("; ")
}

/// Undoes what the note says, again and again until it is done.
pub(super) fn undo_until_done(inner: &Arc<Inner>) {
    let mut pause = AGAIN.0;
    while let Err(left) = undo_note(inner) {
        tracing::error!(machine = inner.plan.machine, reason = left, "something is still frozen; it is tried again");
        inner.trouble().stuck = Some(left);
        std::thread::sleep(pause);
        pause = (pause * 2).min(AGAIN.1);
    }
}

/// Lets a guard undo what the note says.
fn undo_note(inner: &Inner) -> Result<(), String> {
    let (events, happened) = sync_channel(EVENTS_MAX);
    let cannot = |e: std::io::Error| format!("cannot start the process that thaws: {e}");
    let mut process = Process::start(&Job { note: inner.note.clone(), plan: None }, &events).map_err(cannot)?;
    let mut left = "the process that thaws ended without a result".to_owned();
    let due = after(guard::LOCK_WAIT + UNDO_MAX + inner.plan.scripts());
    loop {
        match happened.recv_timeout(due.since(clock::now())) {
            Ok(Event::Said(Word::Over { reports, .. })) => {
                left = told(inner, &reports);
                break;
            }
            Ok(Event::Said(_) | Event::Asked) => {}
            Ok(Event::Gone) | Err(_) => break,
        }
    }
    process.end();
    if !inner.note.exists() {
        inner.trouble().stuck = Some(left).filter(|left| !left.is_empty() && !left.contains("without a result"));
        return Ok(());
    }
    Err(left)
}

fn after(wait: Duration) -> Mono {
    Mono(clock::now().0.saturating_add(clock::micros(wait)))
}

/// A guard's process.
struct Process {
    child: Child,
    input: Option<ChildStdin>,
}

impl Process {
    fn start(job: &Job, events: &SyncSender<Event>) -> std::io::Result<Self> {
        // The running program itself, also when its file was replaced meanwhile.
        let mut command = Command::new("/proc/self/exe");
        command.arg0("tidegate").arg("agent-guard").current_dir("/").stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn()?;
        let output = child.stdout.take();
        let mut process = Self { input: child.stdin.take(), child };
        let mut line = serde_json::to_vec(job)?;
        line.push(b'\n');
        if let Some(input) = &mut process.input {
            input.write_all(&line)?;
        }
        let events = events.clone();
        std::thread::Builder::new().name("freeze-words".to_owned()).spawn(move || {
            let mut output = output.map(BufReader::new);
            while let Some(word) = output.as_mut().and_then(hear) {
                if events.send(Event::Said(word)).is_err() {
                    return;
                }
            }
            let _ = events.send(Event::Gone);
        })?;
        Ok(process)
    }

    /// Tells it to undo everything.
    fn ask(&mut self) {
        self.input = None;
    }

    fn kill(&self) {
        if let Some(pid) = rustix::process::Pid::from_raw(self.child.id().cast_signed()) {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
    }

    /// It is done; collects it.
    fn end(&mut self) {
        self.input = None;
        let patience = after(SILENCE);
        while clock::now() < patience {
            if !matches!(self.child.try_wait(), Ok(None)) {
                return;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        self.kill();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.end();
    }
}

fn hear(output: &mut impl BufRead) -> Option<Word> {
    let mut line = String::new();
    output.by_ref().take(LINE_BYTES_MAX).read_line(&mut line).ok()?;
    serde_json::from_str(&line).ok()
}
