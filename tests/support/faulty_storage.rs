//! A file system in memory that can lose power: what was not synced is lost, kept or torn at 512 bytes, write by write;
//! files that were created are found only if their folder was synced. It can also fail its n-th operation.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use bytes::Bytes;
use tidegate::storage::{AlignedBuf, File, OpenMode, Storage, closed_for_writing};

use super::Rng;

/// Unit that a device writes as a whole.
const SECTOR: usize = 512;
const PAGE: usize = 4096;

/// Bytes of a file; copies share what they have in common.
#[derive(Clone, Default)]
struct Content {
    /// Absent ones are zeroes.
    pages: Vec<Option<Rc<[u8; PAGE]>>>,
    len: usize,
}

impl Content {
    fn resize(&mut self, len: usize) {
        if len < self.len
            && !len.is_multiple_of(PAGE)
            && let Some(page) = self.pages.get_mut(len / PAGE).and_then(Option::as_mut)
        {
            Rc::make_mut(page)[len % PAGE..].fill(0);
        }
        self.pages.resize(len.div_ceil(PAGE), None);
        self.len = len;
    }

    fn put(&mut self, offset: u64, data: &[u8]) {
        let (mut at, end) = (offset as usize, offset as usize + data.len());
        if self.len < end {
            self.resize(end);
        }
        let mut rest = data;
        while !rest.is_empty() {
            let within = at % PAGE;
            let (now, later) = rest.split_at(rest.len().min(PAGE - within));
            let page = self.pages[at / PAGE].get_or_insert_with(|| Rc::new([0; PAGE]));
            Rc::make_mut(page)[within..within + now.len()].copy_from_slice(now);
            (at, rest) = (at + now.len(), later);
        }
    }

    fn read(&self, offset: usize, len: usize) -> Vec<u8> {
        let mut data = Vec::with_capacity(len);
        while data.len() < len {
            let at = offset + data.len();
            let (within, step) = (at % PAGE, (len - data.len()).min(PAGE - at % PAGE));
            match &self.pages[at / PAGE] {
                Some(page) => data.extend_from_slice(&page[within..within + step]),
                None => data.resize(data.len() + step, 0),
            }
        }
        data
    }

    fn whole(&self) -> Vec<u8> {
        self.read(0, self.len)
    }
}

#[derive(Default)]
struct Inode {
    durable: Content,
    live: Content,
    pending: Vec<(u64, Vec<u8>)>,
    /// Pages that give EIO until they are written.
    unreadable: BTreeSet<usize>,
    closed: bool,
}

#[derive(Default)]
struct Disk {
    live: BTreeMap<PathBuf, Rc<RefCell<Inode>>>,
    durable: BTreeMap<PathBuf, Rc<RefCell<Inode>>>,
}

/// What goes wrong, and when.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Every operation from this one on fails with EIO.
    Dead,
    /// This operation fails with EIO, later ones work.
    Once,
    /// This operation and later allocating ones fail with ENOSPC.
    Full,
}

/// The storage; clones share everything.
#[derive(Clone, Default)]
pub struct Faulty {
    disk: Rc<RefCell<Disk>>,
    operations: Rc<Cell<u64>>,
    fault: Rc<Cell<Option<(u64, Fault)>>>,
    /// Syncs report success and keep nothing: the negative control of every crash test.
    pub lying: Rc<Cell<bool>>,
}

impl Faulty {
    /// Operations so far.
    pub fn operations(&self) -> u64 {
        self.operations.get()
    }

    /// The n-th operation from now on fails.
    pub fn fail_at(&self, n: u64, fault: Fault) {
        self.fault.set(Some((self.operations.get() + n, fault)));
    }

    /// Power goes: each pending write is lost, kept or torn; files whose creation was not synced may be gone.
    pub fn crash(&self, rng: &mut Rng) {
        self.fault.set(None);
        let mut disk = self.disk.borrow_mut();
        let mut survivors = disk.durable.clone();
        for (path, inode) in &disk.live {
            // Made or renamed since the folder was synced: it may be so, or not.
            if !survivors.get(path).is_some_and(|durable| Rc::ptr_eq(durable, inode)) && rng.below(2) == 0 {
                survivors.insert(path.clone(), inode.clone());
            }
        }
        // Removed since then: it may be so, too. One that was renamed is there under one of its names at least.
        let removed: Vec<PathBuf> = disk
            .durable
            .iter()
            .filter(|(path, inode)| !disk.live.contains_key(*path) && !disk.live.values().any(|live| Rc::ptr_eq(live, inode)))
            .map(|(path, _)| path.clone())
            .collect();
        for path in removed {
            if rng.below(2) == 0 {
                survivors.remove(&path);
            }
        }
        for inode in survivors.values() {
            let mut inode = inode.borrow_mut();
            let pending = std::mem::take(&mut inode.pending);
            let mut content = std::mem::take(&mut inode.durable);
            for (offset, data) in pending {
                match rng.below(3) {
                    0 => {}
                    1 => content.put(offset, &data),
                    _ => {
                        for (index, sector) in data.chunks(SECTOR).enumerate() {
                            if rng.below(2) == 0 {
                                content.put(offset + (index * SECTOR) as u64, sector);
                            }
                        }
                    }
                }
            }
            inode.live = content.clone();
            inode.durable = content;
            inode.closed = false;
        }
        disk.live = survivors.clone();
        disk.durable = survivors;
    }

    /// Everything works again: space came back.
    pub fn heal(&self) {
        self.fault.set(None);
    }

    /// Another storage with the same files, just as after a loss of power: nothing is pending.
    pub fn copy(&self) -> Self {
        let files = |from: &BTreeMap<PathBuf, Rc<RefCell<Inode>>>| -> BTreeMap<PathBuf, Rc<RefCell<Inode>>> {
            let copied = |inode: &Rc<RefCell<Inode>>| {
                let (durable, live) = (inode.borrow().durable.clone(), inode.borrow().durable.clone());
                Rc::new(RefCell::new(Inode { durable, live, ..Inode::default() }))
            };
            from.iter().map(|(path, inode)| (path.clone(), copied(inode))).collect()
        };
        let durable = files(&self.disk.borrow().durable);
        let copy = Self { disk: Rc::new(RefCell::new(Disk { live: durable.clone(), durable })), ..Self::default() };
        copy.lying.set(self.lying.get());
        copy
    }

    /// Flips one bit of a file, as bit rot does.
    pub fn rot(&self, path: &Path, at: usize, bit: u8) {
        let disk = self.disk.borrow();
        let mut inode = disk.live[path].borrow_mut();
        let turned = inode.live.read(at, 1)[0] ^ 1 << bit;
        inode.live.put(at as u64, &[turned]);
        inode.durable = inode.live.clone();
    }

    /// Flips a bit of a record that begins at a page of some file below `folder`. False if there is none.
    pub fn rot_in(&self, folder: &Path, record: &[u8], rng: &mut Rng) -> bool {
        let stands = |inode: &Inode| {
            (0..inode.live.len.saturating_sub(record.len() - 1)).step_by(PAGE).find(|at| inode.live.read(*at, record.len()) == record)
        };
        let found = {
            let disk = self.disk.borrow();
            let mut files = disk.live.iter().filter(|(path, _)| path.starts_with(folder));
            files.find_map(|(path, inode)| Some((path.clone(), stands(&inode.borrow())?)))
        };
        let Some((path, at)) = found else { return false };
        self.rot(&path, at + rng.below(record.len() as u64) as usize, rng.below(8) as u8);
        true
    }

    /// The page of a file that `at` lies in gives EIO from now on, until it is written.
    pub fn spoil(&self, path: &Path, at: usize) {
        self.disk.borrow().live[path].borrow_mut().unreadable.insert(at / PAGE);
    }

    /// Length of a file and whether it exists.
    pub fn file_len(&self, path: &Path) -> Option<usize> {
        self.disk.borrow().live.get(path).map(|i| i.borrow().live.len)
    }

    /// Every file and its bytes as a program sees them now.
    pub fn files(&self) -> Vec<(PathBuf, Vec<u8>)> {
        self.disk.borrow().live.iter().map(|(path, inode)| (path.clone(), inode.borrow().live.whole())).collect()
    }

    /// A file's bytes as a program sees them now.
    pub fn content(&self, path: &Path) -> Vec<u8> {
        self.disk.borrow().live[path].borrow().live.whole()
    }

    fn step(&self, allocates: bool) -> io::Result<()> {
        let now = self.operations.get() + 1;
        self.operations.set(now);
        match self.fault.get() {
            Some((at, Fault::Dead)) if now >= at => Err(io::Error::from_raw_os_error(5)),
            Some((at, Fault::Once)) if now == at => Err(io::Error::from_raw_os_error(5)),
            Some((at, Fault::Full)) if now >= at && allocates => Err(io::Error::from_raw_os_error(28)),
            _ => Ok(()),
        }
    }
}

/// An open file.
pub struct FaultyFile {
    storage: Faulty,
    inode: Rc<RefCell<Inode>>,
}

impl File for FaultyFile {
    async fn read_at(&self, offset: u64, len: usize) -> io::Result<AlignedBuf> {
        self.storage.step(false)?;
        let inode = self.inode.borrow();
        let end = offset as usize + len;
        if end > inode.live.len {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if inode.unreadable.range(offset as usize / PAGE..end.div_ceil(PAGE)).next().is_some() {
            return Err(io::Error::from_raw_os_error(5));
        }
        Ok(AlignedBuf::copy_of(&inode.live.read(offset as usize, len)))
    }

    async fn write_at(&self, offset: u64, data: Bytes) -> io::Result<()> {
        self.storage.step(false)?;
        let mut inode = self.inode.borrow_mut();
        if inode.closed {
            return Err(closed_for_writing());
        }
        inode.live.put(offset, &data);
        let (first, end) = (offset as usize / PAGE, (offset as usize + data.len()).div_ceil(PAGE));
        inode.unreadable.retain(|page| !(first..end).contains(page));
        inode.pending.push((offset, data.to_vec()));
        Ok(())
    }

    async fn sync_data(&self) -> io::Result<()> {
        if self.inode.borrow().closed {
            return Err(closed_for_writing());
        }
        if let Err(e) = self.storage.step(false) {
            self.inode.borrow_mut().closed = true;
            return Err(e);
        }
        let mut inode = self.inode.borrow_mut();
        if !self.storage.lying.get() {
            let (pending, len) = (std::mem::take(&mut inode.pending), inode.live.len);
            for (offset, data) in pending {
                inode.durable.put(offset, &data);
            }
            inode.durable.resize(len);
        }
        Ok(())
    }

    async fn read_tail(&self, offset: u64, len: usize) -> io::Result<AlignedBuf> {
        self.read_at(offset, len).await
    }

    fn close_for_writing(&self) {
        self.inode.borrow_mut().closed = true;
    }

    async fn allocate(&self, offset: u64, len: u64) -> io::Result<()> {
        self.storage.step(true)?;
        let mut inode = self.inode.borrow_mut();
        let end = (offset + len) as usize;
        if inode.live.len < end {
            inode.live.resize(end);
            let at = end as u64;
            inode.pending.push((at, Vec::new()));
        }
        Ok(())
    }

    async fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        self.storage.step(false)?;
        let mut inode = self.inode.borrow_mut();
        let end = (offset + len).min(inode.live.len as u64);
        if end > offset {
            let zeroes = vec![0; (end - offset) as usize];
            inode.live.put(offset, &zeroes);
            inode.pending.push((offset, zeroes));
        }
        Ok(())
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.inode.borrow().live.len as u64)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.storage.step(false)?;
        let mut inode = self.inode.borrow_mut();
        inode.live.resize(len as usize);
        if (len as usize) < inode.durable.len {
            // Kept simple: a cut is durable at once, and so is what was written before it.
            inode.durable = inode.live.clone();
            inode.pending.clear();
        }
        Ok(())
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<(u64, u64)>> {
        let len = self.inode.borrow().live.len as u64;
        Ok((offset < len).then_some((offset, len)))
    }
}

impl Storage for Faulty {
    type File = FaultyFile;

    async fn open(&self, path: &Path, mode: OpenMode) -> io::Result<FaultyFile> {
        self.step(false)?;
        let mut disk = self.disk.borrow_mut();
        let inode = match (disk.live.get(path), mode) {
            (Some(_), OpenMode::Create) => return Err(io::ErrorKind::AlreadyExists.into()),
            (Some(inode), _) => inode.clone(),
            (None, OpenMode::Create) => {
                let inode = Rc::new(RefCell::new(Inode::default()));
                disk.live.insert(path.to_owned(), inode.clone());
                inode
            }
            (None, _) => return Err(io::ErrorKind::NotFound.into()),
        };
        Ok(FaultyFile { storage: self.clone(), inode })
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
        self.step(false)?;
        let disk = self.disk.borrow();
        let within = disk.live.keys().filter(|p| p.parent() == Some(dir));
        Ok(within.filter_map(|p| p.file_name().and_then(|n| n.to_str()).map(str::to_owned)).collect())
    }

    fn create_dir(&self, _: &Path) -> io::Result<()> {
        Ok(())
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.step(false)?;
        self.disk.borrow_mut().live.remove(path).map(|_| ()).ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.step(false)?;
        let mut disk = self.disk.borrow_mut();
        let inode = disk.live.remove(from).ok_or(io::ErrorKind::NotFound)?;
        disk.live.insert(to.to_owned(), inode);
        Ok(())
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        self.step(false)?;
        let mut disk = self.disk.borrow_mut();
        let live: Vec<_> = disk.live.iter().filter(|(p, _)| p.parent() == Some(dir)).map(|(p, i)| (p.clone(), i.clone())).collect();
        disk.durable.retain(|p, _| p.parent() != Some(dir));
        disk.durable.extend(live);
        Ok(())
    }
}
