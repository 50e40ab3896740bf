//! Holds new writes of all disks of the machine while a marker is put into their streams.

use std::cell::Cell;
use std::rc::Rc;

use tokio::sync::Notify;

/// The gate; lives on one thread.
#[derive(Default)]
pub(super) struct Gate {
    held: Cell<bool>,
    inside: Cell<usize>,
    opened: Notify,
    empty: Notify,
}

/// A write that passed the gate.
pub(super) struct Passage(Rc<Gate>);

impl Gate {
    /// Passes, waiting while the gate is held.
    pub(super) async fn pass(self: &Rc<Self>) -> Passage {
        while self.held.get() {
            self.opened.notified().await;
        }
        self.inside.set(self.inside.get() + 1);
        Passage(self.clone())
    }

    /// Whether a write would pass at once.
    pub(super) fn is_open(&self) -> bool {
        !self.held.get()
    }

    /// Lets nobody pass any more.
    pub(super) fn hold(&self) {
        self.held.set(true);
    }

    /// Waits until everybody who passed has left.
    pub(super) async fn drained(&self) {
        while self.inside.get() > 0 {
            self.empty.notified().await;
        }
    }

    /// Opens the gate.
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
