//! A disk of which what was written lately is in memory too, so that overwriting it again costs no read of what stood there.
//!
//! Only [`Disk::recent`] answers from memory: whoever reads a disk wants to know what is on it, damage included.
//! What is in memory is what a read would give, or it is not in memory: a block leaves when a write of it begins, and comes back
//! when that write has succeeded and no other crossed it. Where one failed or was given up nothing comes back.
//!
//! Which blocks stay: a clock (second chance). A block that was overwritten while it was in memory is passed over once, one that was
//! written once is not, so that filling a disk does not push out what is overwritten all the time.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::ops::Range;
use std::rc::Rc;

use bytes::Bytes;

use super::{Disk, DiskError};
use crate::model::{BLOCK, Extent};
use crate::sabotage;
use crate::storage::AlignedBuf;

/// Memory is taken in pieces of this many blocks: 8 MiB, some huge pages. Of small ones a process may not have enough.
const PIECE_BLOCKS: usize = 2048;
/// Blocks that are found with one look: neighbours are mostly written together.
const STRETCH: u64 = 64;
/// No frame has this number.
const NONE: u32 = u32::MAX;
/// Places of failed writes that are told apart.
const DOUBTFUL_MAX: usize = 64;

/// Memory for what was written lately, shared by the disks of one thread. Taken as it is needed, up to its bound.
pub struct Memory {
    pool: RefCell<Pool>,
    disks: Cell<u64>,
}

#[derive(Default)]
struct Pool {
    /// Most frames.
    most: u32,
    pieces: Vec<AlignedBuf>,
    frames: Vec<Frame>,
    free: Vec<u32>,
    /// By disk and number of the stretch.
    places: HashMap<(u64, u64), Stretch>,
    hand: usize,
}

/// Room for a block.
#[derive(Clone, Copy, Default)]
struct Frame {
    disk: u64,
    block: u64,
    /// It holds what the block has; else the block is being written.
    valid: bool,
    /// The hand passes it over once.
    again: bool,
}

/// Frames of neighbours.
struct Stretch {
    frames: [u32; STRETCH as usize],
    count: u32,
}

impl Memory {
    /// Room for `bytes` of content; beside it a thirtieth of that, more if what is written is scattered, for finding it.
    pub fn new(bytes: u64) -> Rc<Self> {
        let most = u32::try_from(bytes / BLOCK).unwrap_or(NONE).min(NONE - 1);
        Rc::new(Self { pool: RefCell::new(Pool { most, ..Pool::default() }), disks: Cell::new(0) })
    }
}

/// Where a block's bytes are: piece, and range in it.
fn bytes_of(frame: u32) -> (usize, Range<usize>) {
    let at = frame as usize % PIECE_BLOCKS * BLOCK as usize;
    (frame as usize / PIECE_BLOCKS, at..at + BLOCK as usize)
}

impl Pool {
    fn frame_of(&self, disk: u64, block: u64) -> Option<u32> {
        let stretch = self.places.get(&(disk, block / STRETCH))?;
        Some(stretch.frames[(block % STRETCH) as usize]).filter(|&frame| frame != NONE)
    }

    /// The block leaves its frame, which is not yet free.
    fn part(&mut self, frame: u32) {
        let Frame { disk, block, .. } = std::mem::take(&mut self.frames[frame as usize]);
        let name = (disk, block / STRETCH);
        let Some(stretch) = self.places.get_mut(&name) else { return };
        stretch.frames[(block % STRETCH) as usize] = NONE;
        stretch.count -= 1;
        if stretch.count == 0 {
            self.places.remove(&name);
        }
    }

    /// The frames of some blocks. Takes time for what there is, not for what is asked: a terabyte may be zeroed at once.
    fn frames_of(&self, disk: u64, blocks: &Range<u64>) -> Vec<u32> {
        let stretches = blocks.start / STRETCH..blocks.end.div_ceil(STRETCH);
        let mut found = Vec::new();
        let mut take = |stretch: &Stretch| found.extend(stretch.frames.iter().copied().filter(|&frame| frame != NONE));
        if stretches.end - stretches.start <= self.places.len() as u64 {
            stretches.filter_map(|number| self.places.get(&(disk, number))).for_each(&mut take);
        } else {
            self.places.iter().filter(|((d, number), _)| *d == disk && stretches.contains(number)).for_each(|(_, stretch)| take(stretch));
        }
        found.retain(|&frame| blocks.contains(&self.frames[frame as usize].block));
        found
    }

    /// What the blocks hold is not known from here on; those that were there keep their frames.
    fn invalidate(&mut self, disk: u64, blocks: &Range<u64>) {
        for frame in self.frames_of(disk, blocks) {
            let frame = &mut self.frames[frame as usize];
            (frame.again, frame.valid) = (frame.again | frame.valid, false);
        }
    }

    /// The blocks are not known for good.
    fn forget(&mut self, disk: u64, blocks: &Range<u64>) {
        for frame in self.frames_of(disk, blocks) {
            self.part(frame);
            self.free.push(frame);
        }
    }

    /// What a block holds.
    fn put(&mut self, disk: u64, block: u64, content: &[u8]) {
        let frame = match self.frame_of(disk, block) {
            Some(frame) => frame,
            None => {
                let Some(frame) = self.take_frame() else { return };
                let empty = || Stretch { frames: [NONE; STRETCH as usize], count: 0 };
                let stretch = self.places.entry((disk, block / STRETCH)).or_insert_with(empty);
                stretch.frames[(block % STRETCH) as usize] = frame;
                stretch.count += 1;
                self.frames[frame as usize] = Frame { disk, block, valid: false, again: false };
                frame
            }
        };
        let (piece, range) = bytes_of(frame);
        if !sabotage::is("stale-memory") {
            self.pieces[piece][range].copy_from_slice(content);
        }
        self.frames[frame as usize].valid = true;
    }

    fn take_frame(&mut self) -> Option<u32> {
        if let Some(frame) = self.free.pop() {
            return Some(frame);
        }
        let made = self.frames.len();
        if made < self.most as usize {
            if made == self.pieces.len() * PIECE_BLOCKS {
                let blocks = PIECE_BLOCKS.min(self.most as usize - made);
                self.pieces.push(AlignedBuf::zeroed(blocks * BLOCK as usize));
            }
            self.frames.push(Frame::default());
            return Some(made as u32);
        }
        if made == 0 {
            return None;
        }
        loop {
            let at = self.hand;
            self.hand = (at + 1) % made;
            // Free frames were all taken above.
            if self.frames[at].again {
                self.frames[at].again = false;
            } else {
                self.part(at as u32);
                return Some(at as u32);
            }
        }
    }
}

/// A disk with such a memory; see the module.
pub struct Recent<D> {
    disk: D,
    memory: Rc<Memory>,
    number: u64,
    writing: RefCell<Vec<Writing>>,
    writes: Cell<u64>,
    /// Where writes failed or were given up: a part of them may still be on its way to the disk, and overtake what comes later.
    doubtful: RefCell<Vec<Range<u64>>>,
}

/// A write that is under way.
struct Writing {
    number: u64,
    blocks: Range<u64>,
    /// Another one crossed it: which of them came last is not known.
    crossed: bool,
}

/// Ends a write also when nobody waits for it any more.
struct Ended<'a> {
    writing: &'a RefCell<Vec<Writing>>,
    doubtful: &'a RefCell<Vec<Range<u64>>>,
    number: u64,
    well: bool,
}

impl Ended<'_> {
    /// It succeeded. True if no other crossed it.
    fn well(&mut self) -> bool {
        self.well = true;
        self.writing.borrow().iter().any(|w| w.number == self.number && !w.crossed)
    }
}

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        let mut writing = self.writing.borrow_mut();
        let Some(at) = writing.iter().position(|w| w.number == self.number) else { return };
        let blocks = writing.swap_remove(at).blocks;
        let mut doubtful = self.doubtful.borrow_mut();
        if self.well || doubtful.iter().any(|d| d.start <= blocks.start && blocks.end <= d.end) {
            return;
        }
        if doubtful.len() < DOUBTFUL_MAX {
            doubtful.push(blocks);
        } else {
            doubtful.clear();
            doubtful.push(0..u64::MAX);
        }
    }
}

impl<D: Disk> Recent<D> {
    /// `disk` with a share of `memory`.
    pub fn new(disk: D, memory: &Rc<Memory>) -> Self {
        memory.disks.set(memory.disks.get() + 1);
        Self {
            disk,
            memory: memory.clone(),
            number: memory.disks.get(),
            writing: RefCell::default(),
            writes: Cell::new(0),
            doubtful: RefCell::default(),
        }
    }

    /// `extent` changes from here on: nobody knows what it holds until that write has ended well.
    fn begin(&self, extent: Extent) -> Ended<'_> {
        let number = self.writes.get() + 1;
        self.writes.set(number);
        let mut writing = self.writing.borrow_mut();
        let blocks = touched(extent);
        let cross = |other: &Range<u64>| other.start < blocks.end && blocks.start < other.end;
        let mut crossed = self.doubtful.borrow().iter().any(cross);
        for other in writing.iter_mut().filter(|other| cross(&other.blocks)) {
            (other.crossed, crossed) = (true, true);
        }
        writing.push(Writing { number, blocks: blocks.clone(), crossed });
        self.memory.pool.borrow_mut().invalidate(self.number, &blocks);
        Ended { writing: &self.writing, doubtful: &self.doubtful, number, well: false }
    }
}

/// Blocks that an extent touches. Two writes in one block cross: neither knows all of the block.
fn touched(extent: Extent) -> Range<u64> {
    extent.offset / BLOCK..extent.end().div_ceil(BLOCK)
}

impl<D> Drop for Recent<D> {
    fn drop(&mut self) {
        let mut pool = self.memory.pool.borrow_mut();
        let stretches: Vec<u64> = pool.places.keys().filter(|(disk, _)| *disk == self.number).map(|(_, stretch)| *stretch).collect();
        stretches.into_iter().for_each(|stretch| pool.forget(self.number, &(stretch * STRETCH..(stretch + 1) * STRETCH)));
    }
}

impl<D: Disk> Disk for Recent<D> {
    fn size(&self) -> u64 {
        self.disk.size()
    }

    fn sector_sizes(&self) -> (u32, u32) {
        self.disk.sector_sizes()
    }

    async fn read(&self, extent: Extent) -> Result<AlignedBuf, DiskError> {
        self.disk.read(extent).await
    }

    fn recent(&self, extent: Extent) -> Option<AlignedBuf> {
        if !extent.offset.is_multiple_of(BLOCK) || !extent.len.is_multiple_of(BLOCK) {
            return None;
        }
        let pool = self.memory.pool.borrow();
        let mut content = AlignedBuf::with_capacity(extent.len as usize);
        for block in touched(extent) {
            let (piece, range) = bytes_of(pool.frame_of(self.number, block).filter(|&frame| pool.frames[frame as usize].valid)?);
            content.extend(&pool.pieces[piece][range]);
        }
        Some(content)
    }

    async fn write(&self, offset: u64, data: Bytes) -> Result<(), DiskError> {
        let extent = Extent::new(offset, data.len() as u64);
        let mut writing = self.begin(extent);
        self.disk.write(offset, data.clone()).await?;
        if writing.well() {
            let mut pool = self.memory.pool.borrow_mut();
            for block in offset.div_ceil(BLOCK)..extent.end() / BLOCK {
                let at = (block * BLOCK - offset) as usize;
                pool.put(self.number, block, &data[at..at + BLOCK as usize]);
            }
        }
        Ok(())
    }

    async fn zero(&self, extent: Extent) -> Result<(), DiskError> {
        let mut writing = self.begin(extent);
        // Zeroes are found without memory, see `next_data`.
        self.memory.pool.borrow_mut().forget(self.number, &touched(extent));
        self.disk.zero(extent).await?;
        writing.well();
        Ok(())
    }

    async fn barrier(&self) -> Result<(), DiskError> {
        self.disk.barrier().await
    }

    async fn finish(&self) -> Result<(), DiskError> {
        self.disk.finish().await
    }

    async fn grow(&self, size: u64) -> Result<(), DiskError> {
        self.disk.grow(size).await
    }

    fn next_data(&self, offset: u64) -> Result<Option<Extent>, DiskError> {
        self.disk.next_data(offset)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SIZE: u64 = 64 * BLOCK + 512;

    /// A disk in memory. A write is there as soon as it is asked for, and ends when it is let go; half of one that fails is there.
    #[derive(Default)]
    struct Plain {
        content: RefCell<Vec<u8>>,
        fails: Cell<bool>,
        gate: RefCell<Option<Rc<tokio::sync::Notify>>>,
    }

    impl Disk for Plain {
        fn size(&self) -> u64 {
            SIZE
        }
        fn sector_sizes(&self) -> (u32, u32) {
            (512, 512)
        }
        async fn read(&self, extent: Extent) -> Result<AlignedBuf, DiskError> {
            Ok(AlignedBuf::copy_of(&self.content.borrow()[extent.offset as usize..extent.end() as usize]))
        }
        async fn write(&self, offset: u64, data: Bytes) -> Result<(), DiskError> {
            let len = if self.fails.get() { data.len() / 2 } else { data.len() };
            self.content.borrow_mut()[offset as usize..offset as usize + len].copy_from_slice(&data[..len]);
            let gate = self.gate.borrow_mut().take();
            if let Some(gate) = gate {
                gate.notified().await;
            }
            let failed = || DiskError::Size { size: 0, format: "", why: "" };
            if self.fails.get() { Err(failed()) } else { Ok(()) }
        }
        async fn zero(&self, extent: Extent) -> Result<(), DiskError> {
            self.content.borrow_mut()[extent.offset as usize..extent.end() as usize].fill(0);
            Ok(())
        }
        async fn barrier(&self) -> Result<(), DiskError> {
            Ok(())
        }
        async fn finish(&self) -> Result<(), DiskError> {
            Ok(())
        }
        async fn grow(&self, _: u64) -> Result<(), DiskError> {
            Ok(())
        }
        fn next_data(&self, _: u64) -> Result<Option<Extent>, DiskError> {
            Ok(None)
        }
    }

    fn disk(memory: &Rc<Memory>) -> Recent<Plain> {
        Recent::new(Plain { content: RefCell::new(vec![0; SIZE as usize]), ..Plain::default() }, memory)
    }

    async fn check(disk: &Recent<Plain>) -> u64 {
        let mut known = 0;
        for block in 0..SIZE / BLOCK {
            let extent = Extent::new(block * BLOCK, BLOCK);
            if let Some(content) = disk.recent(extent) {
                assert_eq!(content[..], disk.read(extent).await.unwrap()[..], "block {block}");
                known += 1;
            }
        }
        known
    }

    fn data(len: u64, seed: u64) -> Bytes {
        (0..len).map(|n| (n / 512 * 31 + seed) as u8).collect()
    }

    proptest! {
        #[test]
        fn what_is_in_memory_is_what_the_disks_hold(
            room in 0u64..40,
            steps in proptest::collection::vec((0usize..2, 0u64..129, 1u64..40, 0u8..12), 1..120),
        ) {
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            runtime.block_on(tokio::task::LocalSet::new().run_until(async {
                let memory = Memory::new(room * BLOCK);
                let disks = [Rc::new(disk(&memory)), Rc::new(disk(&memory))];
                let (mut open, mut late) = (Vec::new(), Vec::new());
                for (seed, (which, sector, count, action)) in (0u64..).zip(steps) {
                    let on = disks[which].clone();
                    // Blocks as a whole in most cases.
                    let unit = if action % 4 == 0 { 512 } else { BLOCK };
                    let offset = sector * 512 / unit * unit;
                    let len = (count * 512).next_multiple_of(unit).min((SIZE - offset) / unit * unit);
                    let extent = Extent::new(offset, len);
                    match action {
                        _ if len == 0 => {}
                        0 => on.zero(extent).await.unwrap(),
                        1 => {
                            on.disk.fails.set(true);
                            assert!(on.write(offset, data(len, seed)).await.is_err());
                            on.disk.fails.set(false);
                        }
                        // Some are left open, so that others cross them; and of these some are never waited for.
                        2 | 3 => {
                            let gate: Rc<tokio::sync::Notify> = Rc::default();
                            *on.disk.gate.borrow_mut() = Some(gate.clone());
                            let written = (on.clone(), offset, data(len, seed));
                            let task = tokio::task::spawn_local(async move { on.write(offset, data(len, seed)).await });
                            tokio::task::yield_now().await;
                            open.push((gate, task, written));
                        }
                        4 if !open.is_empty() => {
                            let (gate, task, _) = open.remove(sector as usize % open.len());
                            gate.notify_one();
                            task.await.unwrap().unwrap();
                        }
                        5 if !open.is_empty() => {
                            let (_, task, written) = open.remove(sector as usize % open.len());
                            task.abort();
                            tokio::task::yield_now().await;
                            late.push(written);
                        }
                        // What nobody waits for may still come.
                        6 if !late.is_empty() => {
                            let (on, offset, data) = late.remove(sector as usize % late.len());
                            on.disk.write(offset, data).await.unwrap();
                        }
                        _ => on.write(offset, data(len, seed)).await.unwrap(),
                    }
                    for disk in &disks {
                        assert!(check(disk).await <= room);
                    }
                    assert!(memory.pool.borrow().frames.len() as u64 <= room);
                }
            }));
        }
    }

    #[tokio::test(flavor = "current_thread")]
    async fn what_is_overwritten_all_the_time_stays_while_a_disk_is_filled() {
        let memory = Memory::new(16 * BLOCK);
        let disk = disk(&memory);
        let is_there = |block: u64| disk.recent(Extent::new(block * BLOCK, BLOCK)).is_some();
        for round in 0..3 {
            for block in 0..8 {
                disk.write(block * BLOCK, data(BLOCK, round)).await.unwrap();
            }
        }
        for block in 20..32 {
            disk.write(block * BLOCK, data(BLOCK, block)).await.unwrap();
        }
        assert!((0..8).all(is_there));
        assert_eq!(check(&disk).await, 16);
        // And goes when nobody writes it any more.
        for block in 32..64 {
            disk.write(block * BLOCK, data(BLOCK, block)).await.unwrap();
        }
        assert!(!(0..8).any(is_there));
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_disk_that_is_closed_leaves_its_memory_to_the_others() {
        let memory = Memory::new(8 * BLOCK);
        let first = disk(&memory);
        first.write(0, data(8 * BLOCK, 1)).await.unwrap();
        assert_eq!(check(&first).await, 8);
        drop(first);
        assert!(memory.pool.borrow().places.is_empty());
        let second = disk(&memory);
        assert_eq!(check(&second).await, 0);
        second.write(0, data(8 * BLOCK, 2)).await.unwrap();
        assert_eq!(check(&second).await, 8);
    }
}
