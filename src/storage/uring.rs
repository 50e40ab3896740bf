//! Files through io_uring (tokio-uring). Each [`Uring`] belongs to one thread that does I/O and little else.
//!
//! tokio-uring submits when its thread parks, so a task here must never spin with `yield_now`. A dropped read or
//! write still happens: callers always wait for the result.

use std::cell::Cell;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use rustix::fs::{FallocateFlags, Mode, OFlags, SeekFrom};
use tokio::sync::Semaphore;

use crate::clock::{self, Mono};

use super::{AlignedBuf, File, OpenMode, Storage, closed_for_writing};

/// Entries of a ring. In flight never exceeds it: a full completion queue would stall the ring.
const RING_ENTRIES: u32 = 512;
/// Largest write that is copied into the page cache on the spot: a hop through the kernel's worker threads, which is how
/// the ring does buffered writes on ext4, costs more than the copy (about 40 against 3 us for 4 KiB, measured).
const WRITE_NOW_BYTES: usize = 64 << 10;
/// A copy that takes longer was made to wait by the kernel, because too much of the cache is dirty: it then pauses the writer
/// for 10 to 200 ms. Shorter waits are other threads' turns on the core (2 to 4 ms, measured with all cores busy).
const THROTTLED: Duration = Duration::from_millis(8);
/// How long writes then go through the ring, where they hold up nobody else on this thread.
const THROTTLED_FOR: Duration = Duration::from_millis(100);
/// The same after it happened again and again.
const THROTTLED_FOR_MAX: Duration = Duration::from_secs(10);
/// Writes on the spot cover whole pages: part of a page that is not in memory would be read first.
const PAGE: u64 = 4096;
/// What the memory of direct I/O is aligned to, in bytes.
const SECTOR_ALIGN: usize = 512;
/// Operations of one file that may be in the ring, so that a disk that hangs leaves room for the others of its thread.
const FILE_ENTRIES: usize = 128;

/// Runs `work` to its end on this thread with a ring of its own.
///
/// # Errors
/// Fails with advice if the kernel or the sandbox refuses io_uring.
pub fn run<T>(work: impl Future<Output = T>) -> io::Result<T> {
    let runtime = tokio_uring::Runtime::new(tokio_uring::builder().entries(RING_ENTRIES)).map_err(|e| {
        io::Error::new(
            e.kind(),
            format!(
                "io_uring is not available ({e}): allow it in the container's seccomp profile and check sysctl kernel.io_uring_disabled"
            ),
        )
    })?;
    Ok(runtime.block_on(work))
}

/// Lets the ring submit what waits: a task that finds work without ever waiting must call this now and then, because
/// operations of others are only submitted when the thread has nothing to run.
pub async fn breathe() {
    struct Waiting;
    impl Drop for Waiting {
        fn drop(&mut self) {
            BREATHING.set(BREATHING.get() - 1);
        }
    }
    BREATHING.set(BREATHING.get() + 1);
    let _waiting = Waiting;
    let _ = tokio_uring::no_op().await;
}

thread_local! {
    /// Room in this thread's ring, shared by every file on it.
    static IN_FLIGHT: Rc<Semaphore> = Rc::new(Semaphore::new(RING_ENTRIES as usize));
    /// Tasks that wait for the ring to submit what others asked for.
    static BREATHING: Cell<usize> = const { Cell::new(0) };
}

/// Whether no operation on a file is under way on this thread: it may then poll instead of sleeping for a moment.
pub fn is_idle() -> bool {
    BREATHING.get() == 0 && IN_FLIGHT.with(|room| room.available_permits() == RING_ENTRIES as usize)
}

/// The real file system. Cheap to clone.
#[derive(Clone)]
pub struct Uring {
    direct: bool,
}

impl Uring {
    /// Files opened past the page cache (O_DIRECT) where the file system can do it in units of 512 bytes.
    pub fn direct() -> Self {
        Self { direct: true }
    }

    /// Files through the page cache.
    pub fn buffered() -> Self {
        Self { direct: false }
    }
}

impl Storage for Uring {
    type File = UringFile;

    async fn open(&self, path: &Path, mode: OpenMode) -> io::Result<UringFile> {
        let flags = match mode {
            OpenMode::Read => OFlags::RDONLY,
            OpenMode::Write => OFlags::RDWR,
            OpenMode::Create => OFlags::RDWR | OFlags::CREATE | OFlags::EXCL,
        } | OFlags::CLOEXEC;
        let private = Mode::RUSR | Mode::WUSR;
        let direct = if self.direct { open_direct(path, flags, private)? } else { None };
        let fd = match direct {
            Some(fd) => fd,
            None => rustix::fs::open(path, flags, private)?,
        };
        let is_file = rustix::fs::FileType::from_raw_mode(rustix::fs::fstat(&fd)?.st_mode) == rustix::fs::FileType::RegularFile;
        let cached = is_file && !rustix::fs::fcntl_getfl(&fd)?.contains(OFlags::DIRECT);
        let std_file = std::fs::File::from(fd.try_clone()?);
        Ok(UringFile {
            ring: tokio_uring::fs::File::from_std(std_file),
            fd,
            in_flight: IN_FLIGHT.with(Rc::clone),
            own: Semaphore::new(FILE_ENTRIES),
            writing: Cell::new(0),
            closed: Cell::new(false),
            cached,
            throttled: Cell::new((Mono::default(), Duration::ZERO)),
        })
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
        std::fs::read_dir(dir)?.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
    }

    fn create_dir(&self, dir: &Path) -> io::Result<()> {
        create_dir_durable(dir)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        std::fs::remove_file(path)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        std::fs::rename(from, to)
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        sync_dir(dir)
    }
}

/// Opens past the page cache; `None` if this file system cannot (or only in units larger than a sector).
fn open_direct(path: &Path, flags: OFlags, mode: Mode) -> io::Result<Option<OwnedFd>> {
    match rustix::fs::open(path, flags | OFlags::DIRECT, mode) {
        Ok(fd) => {
            let what = rustix::fs::statx(&fd, "", rustix::fs::AtFlags::EMPTY_PATH, rustix::fs::StatxFlags::from_bits_retain(0x2000))?;
            let align = what.stx_dio_offset_align;
            if align == 0 || align > 512 {
                // Reopening without O_DIRECT keeps the file that O_CREAT made.
                let again = flags & !(OFlags::CREATE | OFlags::EXCL);
                return Ok(Some(rustix::fs::open(path, again, mode)?));
            }
            Ok(Some(fd))
        }
        Err(rustix::io::Errno::INVAL) => {
            // Some file systems create the file and then refuse O_DIRECT.
            if flags.contains(OFlags::EXCL) && path.exists() {
                return Ok(Some(rustix::fs::open(path, flags & !(OFlags::CREATE | OFlags::EXCL), mode)?));
            }
            Ok(None)
        }
        Err(e) => Err(e.into()),
    }
}

/// Makes a folder and its parents, and syncs each parent, so that a crash cannot lose the new entry.
///
/// # Errors
/// Those of the file system, with the path.
pub fn create_dir_durable(dir: &Path) -> io::Result<()> {
    if dir.is_dir() {
        return Ok(());
    }
    let named = |e: io::Error| io::Error::new(e.kind(), format!("cannot create folder {}: {e}", dir.display()));
    if let Some(parent) = dir.parent().filter(|p| !p.as_os_str().is_empty()) {
        create_dir_durable(parent)?;
        std::fs::create_dir(dir).or_else(|e| if e.kind() == io::ErrorKind::AlreadyExists { Ok(()) } else { Err(e) }).map_err(named)?;
        return sync_dir(parent);
    }
    std::fs::create_dir_all(dir).map_err(named)
}

/// Makes creations, renames and removals in a folder durable.
///
/// # Errors
/// Those of the file system.
pub fn sync_dir(dir: &Path) -> io::Result<()> {
    std::fs::File::open(dir)?.sync_all()
}

/// A file of [`Uring`].
pub struct UringFile {
    ring: tokio_uring::fs::File,
    fd: OwnedFd,
    in_flight: Rc<Semaphore>,
    own: Semaphore,
    /// Brief writes among the operations in the ring.
    writing: Cell<usize>,
    closed: Cell<bool>,
    /// A regular file through the page cache.
    cached: bool,
    /// When the kernel last made a copy into the cache wait, and for how long copies are avoided since.
    throttled: Cell<(Mono, Duration)>,
}

impl UringFile {
    async fn slot(&self) -> [tokio::sync::SemaphorePermit<'_>; 2] {
        let own = self.own.acquire().await.expect("the semaphore is never closed");
        [own, self.in_flight.acquire().await.expect("the semaphore is never closed")]
    }

    /// Nothing but brief writes is under way: a copy could wait long behind the locks that a read, a sync or a longer write
    /// holds. If brief ones counted, one that went through the ring would draw every later one after it.
    fn is_quiet(&self) -> bool {
        self.own.available_permits() + self.writing.get() == FILE_ENTRIES
    }

    fn fallocate(&self, flags: FallocateFlags, offset: u64, len: u64) -> io::Result<()> {
        if self.closed.get() {
            return Err(closed_for_writing());
        }
        Ok(rustix::fs::fallocate(self.fd.as_fd(), flags, offset, len)?)
    }

    async fn write_zeroes(&self, mut offset: u64, len: u64) -> io::Result<()> {
        let zeroes = AlignedBuf::zeroed(1 << 20).freeze();
        let end = offset + len;
        while offset < end {
            let step = (end - offset).min(zeroes.len() as u64);
            self.write_at(offset, zeroes.slice(..step as usize)).await?;
            offset += step;
        }
        Ok(())
    }
}

impl File for UringFile {
    fn read_now(&self, offset: u64, len: usize) -> Option<AlignedBuf> {
        if !self.cached {
            return None;
        }
        let mut buf = AlignedBuf::with_capacity(len);
        buf.set_len(len);
        let flags = rustix::io::ReadWriteFlags::NOWAIT;
        let got = rustix::io::preadv2(&self.fd, &mut [io::IoSliceMut::new(&mut buf)], offset, flags);
        // Less than asked means that the rest is not in memory.
        (got == Ok(len)).then_some(buf)
    }

    fn write_now(&self, offset: u64, data: &[u8]) -> io::Result<bool> {
        if !self.cached || !is_brief(offset, data.len()) || !self.is_quiet() {
            return Ok(false);
        }
        let before = clock::now();
        let (throttled, avoid) = self.throttled.get();
        if !avoid.is_zero() && before.since(throttled) < avoid {
            return Ok(false);
        }
        if self.closed.get() {
            return Err(closed_for_writing());
        }
        let mut done = 0;
        while done < data.len() {
            match rustix::io::pwrite(&self.fd, &data[done..], offset + done as u64) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => done += n,
                Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
        let after = clock::now();
        if after.since(before) > THROTTLED {
            // Soon after the last time: longer than then.
            let again = after.since(throttled) < avoid * 4;
            self.throttled.set((after, if again { (avoid * 2).min(THROTTLED_FOR_MAX) } else { THROTTLED_FOR }));
        }
        Ok(true)
    }

    async fn read_at(&self, offset: u64, len: usize) -> io::Result<AlignedBuf> {
        let _slot = self.slot().await;
        let mut buf = AlignedBuf::with_capacity(len);
        let mut done = 0;
        while done < len {
            use tokio_uring::buf::BoundedBuf;
            let (result, slice) = self.ring.read_at(buf.slice(done..len), offset + done as u64).await;
            buf = slice.into_inner();
            match result {
                Ok(0) => return Err(io::Error::new(io::ErrorKind::UnexpectedEof, format!("file ends {} bytes early", len - done))),
                Ok(n) => done += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        buf.set_len(len);
        Ok(buf)
    }

    async fn read_tail(&self, offset: u64, len: usize) -> io::Result<AlignedBuf> {
        let _slot = self.slot().await;
        // Direct I/O asks for whole sectors and gets what there is.
        let (result, mut buf) = self.ring.read_at(AlignedBuf::with_capacity(512), offset).await;
        let got = result?;
        if got < len {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        buf.set_len(len);
        Ok(buf)
    }

    async fn write_at(&self, offset: u64, data: Bytes) -> io::Result<()> {
        if self.closed.get() {
            return Err(closed_for_writing());
        }
        // Direct I/O takes memory from a sector on only, and not everybody who has content knows where it begins.
        let is_taken = self.cached || data.as_ptr().addr().is_multiple_of(SECTOR_ALIGN);
        let data = if is_taken { data } else { AlignedBuf::copy_of(&data).freeze() };
        let _slot = self.slot().await;
        let brief = usize::from(is_brief(offset, data.len()));
        self.writing.update(|n| n + brief);
        let (result, _) = self.ring.write_all_at(data, offset).await;
        self.writing.update(|n| n - brief);
        result
    }

    async fn sync_data(&self) -> io::Result<()> {
        if self.closed.get() {
            return Err(closed_for_writing());
        }
        let _slot = self.slot().await;
        let result = self.ring.sync_data().await;
        if result.is_err() {
            self.closed.set(true);
        }
        result
    }

    fn close_for_writing(&self) {
        self.closed.set(true);
    }

    async fn allocate(&self, offset: u64, len: u64) -> io::Result<()> {
        match self.fallocate(FallocateFlags::empty(), offset, len) {
            Err(e) if e.raw_os_error() == Some(rustix::io::Errno::OPNOTSUPP.raw_os_error()) => {
                if self.len()? < offset + len {
                    self.set_len(offset + len)
                } else {
                    Ok(())
                }
            }
            other => other,
        }
    }

    async fn breathe(&self) {
        breathe().await;
    }

    async fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        match self.fallocate(FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, offset, len) {
            Err(e) if e.raw_os_error() == Some(rustix::io::Errno::OPNOTSUPP.raw_os_error()) => self.write_zeroes(offset, len).await,
            other => other,
        }
    }

    fn len(&self) -> io::Result<u64> {
        Ok(rustix::fs::seek(&self.fd, SeekFrom::End(0))?)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        if self.closed.get() {
            return Err(closed_for_writing());
        }
        Ok(rustix::fs::ftruncate(&self.fd, len)?)
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<(u64, u64)>> {
        let start = match rustix::fs::seek(&self.fd, SeekFrom::Data(offset)) {
            Ok(start) => start,
            Err(rustix::io::Errno::NXIO) => return Ok(None),
            // Devices do not know holes: everything may be data.
            Err(rustix::io::Errno::INVAL) => return Ok(Some((offset, self.len()?))),
            Err(e) => return Err(e.into()),
        };
        let end = rustix::fs::seek(&self.fd, SeekFrom::Hole(start))?;
        Ok(Some((start, end)))
    }
}

/// Whether a write is no more than a short copy into the page cache: whole pages, few of them.
fn is_brief(offset: u64, len: usize) -> bool {
    offset.is_multiple_of(PAGE) && (len as u64).is_multiple_of(PAGE) && len <= WRITE_NOW_BYTES
}

/// Whether an error means that the file system or the quota is full.
pub fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_begins_anywhere_in_memory_is_written_past_the_page_cache() {
        let dir = tempfile::tempdir().unwrap();
        let content = AlignedBuf::copy_of(&(0..8192 + 101).map(|n| n as u8).collect::<Vec<_>>()).freeze();
        run(async {
            let file = Uring::direct().open(&dir.path().join("file"), OpenMode::Create).await.unwrap();
            for at in [0, 101] {
                file.write_at(4096, content.slice(at..at + 8192)).await.unwrap();
                assert_eq!(file.read_at(4096, 8192).await.unwrap()[..], content[at..at + 8192]);
            }
        })
        .unwrap();
    }
}
