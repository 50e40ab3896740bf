//! Keeps new writes of all disks of the machine waiting, or out. Each reason for it is ended by whoever had it: a round's hold
//! does not end because somebody else opens what he had closed.

use std::cell::Cell;
use std::rc::Rc;

use tokio::sync::Notify;

/// The gate; lives on one thread.
#[derive(Default)]
pub(super) struct Gate {
    /// By whoever makes a marker, for moments.
    held: Cell<bool>,
    /// By the agent's end, for good.
    stopped: Cell<bool>,
    /// By a planned failover, until the machine runs here again.
    closed: Cell<bool>,
    inside: Cell<usize>,
    opened: Notify,
    empty: Notify,
}

/// A write that passed the gate.
pub(super) struct Passage(Rc<Gate>);

impl Gate {
    /// Passes, waiting while the gate is held. `None` when it is closed.
    pub(super) async fn pass(self: &Rc<Self>) -> Option<Passage> {
        while (self.held.get() || self.stopped.get()) && !self.closed.get() {
            self.opened.notified().await;
        }
        if self.closed.get() {
            return None;
        }
        self.inside.set(self.inside.get() + 1);
        Some(Passage(self.clone()))
    }

    /// Nobody passes any more, and whoever waits is told.
    pub(super) fn close(&self) {
        self.closed.set(true);
        self.opened.notify_waiters();
    }

    /// Whether it is closed.
    pub(super) fn is_closed(&self) -> bool {
        self.closed.get()
    }

    /// Undoes [`Gate::close`].
    pub(super) fn reopen(&self) {
        self.closed.set(false);
        self.opened.notify_waiters();
    }

    /// Lets nobody pass any more, for good.
    pub(super) fn stop(&self) {
        self.stopped.set(true);
    }

    /// Whether a write would pass at once.
    pub(super) fn is_open(&self) -> bool {
        !self.held.get() && !self.stopped.get() && !self.closed.get()
    }

    /// Lets nobody pass until [`Gate::release`].
    pub(super) fn hold(&self) {
        self.held.set(true);
    }

    /// Waits until everybody who passed has left.
    pub(super) async fn drained(&self) {
        while self.inside.get() > 0 {
            self.empty.notified().await;
        }
    }

    /// Ends [`Gate::hold`].
    pub(super) fn release(&self) {
        self.held.set(false);
        self.opened.notify_waiters();
    }
}

impl Drop for Passage {
    fn drop(&mut self) {
        self.0.inside.set(self.0.inside.get() - 1);
        if self.0.inside.get() == 0 {
            self.0.empty.notify_waiters();
        }
    }
}
