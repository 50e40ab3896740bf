//! Writes to a mounted point: kept in a scratch file until the mount ends, read back over the point. The point and the
//! replica never see them.
//!
//! The scratch file has no name from the moment it is open, so whatever ends this process gives its space back. It is not
//! durable and need not be: a mount does not outlive the master target.

use std::cell::{Cell, RefCell};
use std::io;
use std::path::Path;

use tokio::sync::RwLock;

use crate::model::{BLOCK, BlockSet, Extent};
use crate::storage::log::random_u64;
use crate::storage::uring::{Uring, UringFile, create_dir_durable};
use crate::storage::{AlignedBuf, File, OpenMode, Storage};

/// What was written to one mount.
pub(super) struct Overlay {
    file: UringFile,
    size: u64,
    /// Blocks that are read from here.
    written: RefCell<BlockSet>,
    /// Blocks that have taken space, and how many.
    charged: RefCell<BlockSet>,
    charged_blocks: Cell<u64>,
    quota_blocks: u64,
    /// Held shared by writes of whole blocks, alone by those that read a block, change it and write it.
    lock: RwLock<()>,
}

/// Why a write is not taken.
#[derive(Debug)]
pub(super) enum Refused {
    /// The quota, or the file system, is full.
    Full,
    /// The scratch file or the point.
    Failed(String),
}

impl From<io::Error> for Refused {
    fn from(error: io::Error) -> Self {
        if crate::storage::uring::is_full(&error) { Refused::Full } else { Refused::Failed(error.to_string()) }
    }
}

impl Overlay {
    /// An empty overlay of a disk of `size` bytes that takes up to `quota` bytes in `dir`.
    ///
    /// # Errors
    /// Those of the file system.
    pub(super) async fn make(dir: &Path, size: u64, quota: u64) -> io::Result<Self> {
        create_dir_durable(dir)?;
        let path = dir.join(format!("scratch-{:016x}", random_u64()));
        let file = Uring::buffered().open(&path, OpenMode::Create).await?;
        std::fs::remove_file(&path)?;
        file.set_len(size.next_multiple_of(BLOCK))?;
        Ok(Self {
            file,
            size,
            written: RefCell::default(),
            charged: RefCell::default(),
            charged_blocks: Cell::new(0),
            quota_blocks: quota / BLOCK,
            lock: RwLock::default(),
        })
    }

    /// Cuts an extent into runs: those that are read from here, and those of the point.
    pub(super) fn runs(&self, extent: Extent) -> Vec<(Extent, bool)> {
        let (first, last) = (extent.offset / BLOCK, (extent.end() - 1) / BLOCK);
        let mut runs = Vec::new();
        let mut at = extent.offset;
        for (start, count) in self.written.borrow().missing_runs(first, last) {
            let (from, to) = ((start * BLOCK).max(extent.offset), ((start + count) * BLOCK).min(extent.end()));
            if from > at {
                runs.push((Extent::new(at, from - at), true));
            }
            runs.push((Extent::new(from, to - from), false));
            at = to;
        }
        if at < extent.end() {
            runs.push((Extent::new(at, extent.end() - at), true));
        }
        runs
    }

    /// Reads a run that is here.
    ///
    /// # Errors
    /// Those of the scratch file.
    pub(super) async fn read(&self, extent: Extent) -> io::Result<AlignedBuf> {
        self.file.read_at(extent.offset, extent.len as usize).await
    }

    /// Writes `data` at `offset`; `read` gives what the disk holds now in a whole block.
    ///
    /// # Errors
    /// [`Refused`]; parts may have been written.
    pub(super) async fn write(
        &self,
        offset: u64,
        data: AlignedBuf,
        read: impl AsyncFn(Extent) -> Result<AlignedBuf, String>,
    ) -> Result<(), Refused> {
        let extent = Extent::new(offset, data.len() as u64);
        let whole = self.whole_blocks(extent);
        if whole == extent {
            let _shared = self.lock.read().await;
            return self.put(extent, data).await;
        }
        // Blocks that are written in part: the rest of them comes along.
        let _alone = self.lock.write().await;
        let start = offset / BLOCK * BLOCK;
        let around = Extent::new(start, extent.end().next_multiple_of(BLOCK).min(self.size) - start);
        let mut all = read(around).await.map_err(Refused::Failed)?;
        all[(offset - start) as usize..][..data.len()].copy_from_slice(&data);
        self.put(around, all).await
    }

    /// Makes `extent` zero; `read` as above. Takes no space.
    ///
    /// # Errors
    /// [`Refused`].
    pub(super) async fn zero(&self, extent: Extent, read: impl AsyncFn(Extent) -> Result<AlignedBuf, String>) -> Result<(), Refused> {
        let whole = self.whole_blocks(extent);
        for edge in [
            Extent::new(extent.offset, whole.offset.min(extent.end()) - extent.offset),
            Extent::new(whole.end().max(extent.offset), extent.end() - whole.end().max(extent.offset)),
        ] {
            if edge.len > 0 {
                self.write(edge.offset, AlignedBuf::zeroed(edge.len as usize), &read).await?;
            }
        }
        if whole.len > 0 {
            let _shared = self.lock.read().await;
            self.file.punch(whole.offset, whole.len.next_multiple_of(BLOCK)).await?;
            self.mark(whole);
        }
        Ok(())
    }

    /// The blocks that `extent` covers wholly; the disk's last block may be short. Empty at its start if there are none.
    fn whole_blocks(&self, extent: Extent) -> Extent {
        let start = extent.offset.next_multiple_of(BLOCK);
        let end = if extent.end() == self.size { self.size } else { extent.end() / BLOCK * BLOCK };
        if end > start { Extent::new(start, end - start) } else { Extent::new(extent.end(), 0) }
    }

    async fn put(&self, extent: Extent, data: AlignedBuf) -> Result<(), Refused> {
        let blocks = extent.offset / BLOCK..extent.end().div_ceil(BLOCK);
        let fresh: Vec<u64> = blocks.filter(|&block| self.charged.borrow_mut().insert(block)).collect();
        let wanted = self.charged_blocks.get() + fresh.len() as u64;
        let refused = if wanted > self.quota_blocks { Some(Refused::Full) } else { None };
        let result = match refused {
            Some(refused) => Err(refused),
            None => {
                self.charged_blocks.set(wanted);
                self.file.write_at(extent.offset, data.freeze()).await.map_err(Refused::from)
            }
        };
        match result {
            Ok(()) => self.mark(extent),
            Err(Refused::Full) if wanted > self.quota_blocks => fresh.iter().for_each(|&block| self.charged.borrow_mut().remove(block)),
            Err(_) => {}
        }
        result
    }

    fn mark(&self, extent: Extent) {
        let mut written = self.written.borrow_mut();
        for block in extent.offset / BLOCK..extent.end().div_ceil(BLOCK) {
            written.insert(block);
        }
    }
}
