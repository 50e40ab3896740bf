//! A file system on a disk that goes bad: chosen sectors give EIO until they are written again, as on a real one, and everything
//! can be made to hang. ext4 on a loop device on an NBD export of our own.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use tempfile::TempDir;
use tidegate::model::Extent;
use tidegate::nbd::protocol::NbdError;
use tidegate::nbd::server::{Allocation, Export, ExportInfo, serve};
use tidegate::storage::AlignedBuf;

use super::mounted::{Mounted, let_go};
use super::{s, tool, try_tool};

const PAGE: u64 = 4096;

#[derive(Default)]
struct State {
    bad: Mutex<BTreeSet<u64>>,
    hung: AtomicBool,
    refused: AtomicU64,
    over: AtomicBool,
}

struct Device {
    file: File,
    size: u64,
    state: Arc<State>,
}

fn pages(offset: u64, len: u64) -> std::ops::Range<u64> {
    offset / PAGE..(offset + len).div_ceil(PAGE)
}

impl Device {
    async fn wait_while_hung(&self) {
        while self.state.hung.load(Ordering::Relaxed) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    fn written(&self, offset: u64, len: u64) {
        let within = pages(offset, len);
        self.state.bad.lock().expect("no panics").retain(|page| !within.contains(page));
    }
}

impl Export for Device {
    fn info(&self) -> ExportInfo {
        ExportInfo { name: String::new(), size: self.size, read_only: false }
    }

    async fn read(&self, extent: Extent) -> Result<Bytes, NbdError> {
        self.wait_while_hung().await;
        if self.state.bad.lock().expect("no panics").range(pages(extent.offset, extent.len)).next().is_some() {
            self.state.refused.fetch_add(1, Ordering::Relaxed);
            return Err(NbdError::Io);
        }
        let mut data = vec![0; extent.len as usize];
        self.file.read_exact_at(&mut data, extent.offset).map_err(|_| NbdError::Io)?;
        Ok(data.into())
    }

    async fn write(&self, offset: u64, data: AlignedBuf, _: bool) -> Result<(), NbdError> {
        self.wait_while_hung().await;
        self.written(offset, data.len() as u64);
        self.file.write_all_at(&data, offset).map_err(|_| NbdError::Io)
    }

    async fn zero(&self, extent: Extent, _: bool, _: bool) -> Result<(), NbdError> {
        self.wait_while_hung().await;
        self.written(extent.offset, extent.len);
        self.file.write_all_at(&vec![0; extent.len as usize], extent.offset).map_err(|_| NbdError::Io)
    }

    async fn flush(&self) -> Result<(), NbdError> {
        self.wait_while_hung().await;
        Ok(())
    }

    async fn allocation(&self, extent: Extent) -> Result<Vec<Allocation>, NbdError> {
        Ok(vec![Allocation { len: extent.len, hole: false }])
    }
}

/// The disk, mounted. Ends with the test.
pub struct BadDisk {
    mounted: Option<Mounted>,
    device: String,
    state: Arc<State>,
    _dir: TempDir,
}

impl BadDisk {
    /// A good one of `size` bytes.
    pub fn start(size: u64) -> Self {
        super::block_log::demand();
        let dir = tempfile::tempdir_in("/dev/shm").expect("a folder in memory");
        let (image, socket) = (dir.path().join("image"), dir.path().join("nbd.sock"));
        let file = File::options().read(true).write(true).create(true).truncate(false).open(&image).expect("an image");
        file.set_len(size).expect("a sparse file");
        let state = Arc::new(State::default());
        let listener = std::os::unix::net::UnixListener::bind(&socket).expect("a socket");
        let device = (file, size, state.clone());
        std::thread::spawn(move || export(listener, device));
        let mounted = Mounted::new(dir.path(), &format!("nbd+unix:///?socket={}", s(&socket)));
        tool("mkfs.ext4", &["-q", "-F", "-b", "4096", "-E", "lazy_itable_init=0,lazy_journal_init=0,nodiscard", s(&mounted.file)]);
        // Past the page cache, which would go on to know what the disk does not give back any more.
        let device = tool("losetup", &["--find", "--show", "--direct-io=on", s(&mounted.file)]).trim().to_owned();
        tool("mount", &[&device, s(&mounted.point)]);
        Self { mounted: Some(mounted), device, state, _dir: dir }
    }

    /// Where it is mounted.
    pub fn point(&self) -> PathBuf {
        self.mounted.as_ref().expect("mounted until the end").point.clone()
    }

    /// The pages of `[at, at + len)` of a file give EIO from now on, until they are written.
    pub fn spoil(&self, path: &Path, at: u64, len: u64) {
        File::open(path).and_then(|f| f.sync_all()).expect("a file to spoil");
        let listed = tool("filefrag", &["-b4096", "-v", s(path)]);
        let mut spoilt = 0;
        for wanted in pages(at, len) {
            let place = listed.lines().filter_map(extent_of).find(|(logical, _)| logical.contains(&wanted));
            let (logical, physical) =
                place.unwrap_or_else(|| panic!("{}: page {wanted} has no place on the disk:\n{listed}", path.display()));
            self.state.bad.lock().expect("no panics").insert(physical + wanted - logical.start);
            spoilt += 1;
        }
        assert!(spoilt > 0);
        // What others hold of it in memory is not what this is about.
        tool("dd", &[&format!("of={}", s(path)), "oflag=nocache", "conv=notrunc,fdatasync", "count=0", "status=none"]);
    }

    /// Reads that were refused.
    pub fn refused(&self) -> u64 {
        self.state.refused.load(Ordering::Relaxed)
    }

    /// Pages that are bad still.
    pub fn bad_pages(&self) -> usize {
        self.state.bad.lock().expect("no panics").len()
    }

    /// Nothing is answered any more, or again.
    pub fn hang(&self, hung: bool) {
        self.state.hung.store(hung, Ordering::Relaxed);
    }
}

impl Drop for BadDisk {
    fn drop(&mut self) {
        self.hang(false);
        self.state.bad.lock().expect("no panics").clear();
        let_go(&self.point());
        let _ = try_tool("losetup", &["--detach", &self.device]);
        drop(self.mounted.take());
        self.state.over.store(true, Ordering::Relaxed);
    }
}

/// Serves until it is over.
fn export(listener: std::os::unix::net::UnixListener, (file, size, state): (File, u64, Arc<State>)) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let over = state.clone();
    let device = Rc::new(Device { file, size, state });
    let work = async move {
        listener.set_nonblocking(true).expect("a socket");
        let listener = tokio::net::UnixListener::from_std(listener).expect("a socket");
        while !over.over.load(Ordering::Relaxed) {
            if let Ok(Ok((stream, _))) = tokio::time::timeout(Duration::from_millis(100), listener.accept()).await {
                tokio::task::spawn_local(serve(stream, device.clone()));
            }
        }
    };
    runtime.block_on(tokio::task::LocalSet::new().run_until(work));
}

/// One line of `filefrag -v`: the pages of the file, and the first of the disk.
fn extent_of(line: &str) -> Option<(std::ops::Range<u64>, u64)> {
    let mut fields = line.split(':');
    let _number: u64 = fields.next()?.trim().parse().ok()?;
    let numbers = |field: &str| -> Option<Vec<u64>> { field.split("..").map(|n| n.trim().parse().ok()).collect() };
    let (logical, physical) = (numbers(fields.next()?)?, numbers(fields.next()?)?);
    Some((*logical.first()?..logical.last()? + 1, *physical.first()?))
}
