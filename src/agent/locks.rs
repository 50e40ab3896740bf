//! Range locks of one disk: overlapping writes run one after the other, in the order they came.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;

use tokio::sync::oneshot;

use crate::model::Extent;

/// The locks; lives on one thread.
#[derive(Default)]
pub struct RangeLocks {
    state: RefCell<State>,
}

#[derive(Default)]
struct State {
    next: u64,
    active: Vec<(u64, Extent)>,
    waiting: VecDeque<(u64, Extent, oneshot::Sender<()>)>,
}

/// A held range; released when dropped.
pub struct RangeGuard {
    locks: Rc<RangeLocks>,
    id: u64,
}

impl RangeLocks {
    /// Waits until no range that was asked for earlier overlaps `extent`.
    pub async fn lock(self: &Rc<Self>, extent: Extent) -> RangeGuard {
        let (id, turn) = self.enter(extent);
        let guard = RangeGuard { locks: self.clone(), id };
        if let Some(turn) = turn {
            let _ = turn.await;
        }
        guard
    }

    /// Whether a lock on `extent` would be had at once.
    pub fn is_free(&self, extent: Extent) -> bool {
        let state = self.state.borrow();
        !state.active.iter().any(|(_, e)| e.overlaps(&extent)) && !state.waiting.iter().any(|(_, e, _)| e.overlaps(&extent))
    }

    fn enter(&self, extent: Extent) -> (u64, Option<oneshot::Receiver<()>>) {
        let mut state = self.state.borrow_mut();
        let id = state.next;
        state.next += 1;
        drop(state);
        let free = self.is_free(extent);
        let mut state = self.state.borrow_mut();
        if free {
            state.active.push((id, extent));
            return (id, None);
        }
        let (tell, turn) = oneshot::channel();
        state.waiting.push_back((id, extent, tell));
        (id, Some(turn))
    }

    fn release(&self, id: u64) {
        let mut state = self.state.borrow_mut();
        state.active.retain(|(other, _)| *other != id);
        state.waiting.retain(|(other, _, _)| *other != id);
        let mut index = 0;
        while index < state.waiting.len() {
            let extent = state.waiting[index].1;
            let blocked = state.active.iter().any(|(_, e)| e.overlaps(&extent))
                || state.waiting.iter().take(index).any(|(_, e, _)| e.overlaps(&extent));
            if blocked {
                index += 1;
            } else if let Some((id, extent, tell)) = state.waiting.remove(index) {
                state.active.push((id, extent));
                let _ = tell.send(());
            }
        }
    }
}

impl Drop for RangeGuard {
    fn drop(&mut self) {
        self.locks.release(self.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overlapping_ranges_take_turns_in_order_and_others_do_not_wait() {
        let locks = Rc::new(RangeLocks::default());
        let (first, none) = locks.enter(Extent::new(0, 100));
        assert!(none.is_none());
        let (second, turn2) = locks.enter(Extent::new(50, 100));
        let mut turn2 = turn2.expect("overlaps the first");
        let (_, turn3) = locks.enter(Extent::new(140, 20));
        let mut turn3 = turn3.expect("overlaps the second, which came earlier");
        assert!(locks.enter(Extent::new(500, 10)).1.is_none());
        locks.release(first);
        assert!(turn2.try_recv().is_ok());
        assert!(turn3.try_recv().is_err());
        locks.release(second);
        assert!(turn3.try_recv().is_ok());
    }
}
