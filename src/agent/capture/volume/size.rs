//! A disk that becomes larger or smaller while it is protected.

use super::Volume;
use crate::model::{Extent, SECTOR};
use crate::observe::metrics;

impl Volume {
    /// Looks whether the disk became larger or smaller. What is new is covered by the map before anybody sees it: clients that
    /// connect from then on see the new size, and the replica grows before it is sent anything of it. What is gone is marked
    /// noticed too: nobody knows how much was gone between two looks, so all of the disk is sent again when it has its size
    /// back, and until then there are no points.
    pub(in crate::agent::capture) async fn look_at_size(&self) {
        let known = self.shared.size();
        let found = match self.file.size() {
            Ok(found) => found / SECTOR * SECTOR,
            Err(error) => return tracing::error!(disk = self.shared.label, %error, "cannot tell the size of the disk"),
        };
        let shrunk = self.shrunk_to.get();
        if self.broken.borrow().is_some() || found == known && shrunk.is_none() {
            return;
        }
        if found < known {
            if self.shrunk_to.replace(Some(found)).is_none() {
                self.shrink(known, found).await;
            }
        } else if shrunk.is_some() {
            self.shrunk_to.set(None);
            tracing::info!(disk = self.shared.label, size = found, "the disk has its size back; all of it is sent again");
        } else if found > known && self.map.can_cover(found) {
            self.grow(known, found).await;
        } else if found > known && self.too_large.replace(found) != found {
            tracing::error!(
                disk = self.shared.label,
                size = known,
                found,
                "the disk has grown beyond what its dirty map covers and is served at its old size: restart the agent, which begins anew with larger regions"
            );
        }
        self.agent.wake.wake();
    }

    async fn grow(&self, from: u64, to: u64) {
        let _alone = self.changing.lock().await;
        self.restarting.set(true);
        let grown = self.map.grow(to).await;
        if let Err(error) = &grown {
            self.failed(error);
        } else {
            // What was compared ended where the disk ended.
            let last = self.regions.borrow().of(Extent::new(from - 1, 1));
            self.comparison.borrow_mut().lost(last);
            self.regions.borrow_mut().grow(to);
            self.shared.set_size(to);
            tracing::info!(disk = self.shared.label, from, to, "the disk has grown; clients see its new size when they connect again");
        }
        self.restarting.set(false);
    }

    async fn shrink(&self, known: u64, found: u64) {
        let _alone = self.changing.lock().await;
        self.restarting.set(true);
        let marked = self.map.mark_all().await;
        let all = self.regions.borrow().of(Extent::new(0, known));
        self.comparison.borrow_mut().lost(all);
        self.regions.borrow_mut().lose(Extent::new(0, known));
        if let Err(error) = &marked {
            self.failed(error);
        }
        self.restarting.set(false);
        metrics::disk_count(metrics::RESYNCS, &self.shared.label, 1);
        tracing::error!(
            disk = self.shared.label,
            known,
            found,
            "the disk became smaller under the agent: its points stay as they are and no more are made until it has its size back. To keep it smaller, protect it as a new disk, under a name of its own"
        );
    }
}
