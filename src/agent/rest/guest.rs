//! Freezes and thaws the file systems of a guest through its guest agent. Blocking, with a limit on everything.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use serde_json::Value;

use super::guest_agent::{Decoder, Reply, Request};
use crate::clock::{self, Mono};
use crate::storage::freeze::Thawed;

/// One read waits this long before it looks whether it is still wanted.
const SLICE: Duration = Duration::from_millis(50);
/// A guest agent that works answers what does not freeze anything within this time.
const ANSWER: Duration = Duration::from_secs(3);
/// A thaw is tried again for this long.
const THAW: Duration = Duration::from_secs(60);
/// Between two attempts at a thaw, at first and at most.
const AGAIN: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));
/// A socket on which nobody listens for this long is that of a guest that does not run.
const GONE_AFTER: Duration = Duration::from_secs(5);

/// How a freeze failed.
#[derive(Debug)]
pub(super) struct NotFrozen {
    /// For a person.
    pub(super) reason: String,
    /// Nothing was frozen by us.
    pub(super) clean: bool,
}

/// Freezes the guest's file systems: how many were.
///
/// # Errors
/// [`NotFrozen`].
pub(super) fn freeze(socket: &Path, limit: Duration, stop: &AtomicBool) -> Result<u64, NotFrozen> {
    let until = Until { moment: later(limit), stop: Some(stop) };
    let clean = |e: Trouble| NotFrozen { reason: e.to_string(), clean: true };
    let mut agent = GuestAgent::connect(socket, &until).map_err(clean)?;
    match agent.call(Request::Status, &until.but(ANSWER)).map_err(clean)?.as_str() {
        Some("thawed") => {}
        Some("frozen") => return Err(clean(Trouble::Told("the guest is frozen by somebody else".to_owned()))),
        _ => return Err(clean(Trouble::Told("the guest agent's status is no word that we know".to_owned()))),
    }
    match agent.call(Request::Freeze, &until) {
        Ok(count) => match count.as_u64() {
            Some(count @ 1..) => Ok(count),
            _ => Err(NotFrozen { reason: "the guest agent froze no file system".to_owned(), clean: false }),
        },
        Err(error) => Err(NotFrozen { reason: format!("guest-fsfreeze-freeze: {error}"), clean: false }),
    }
}

/// Thaws them, trying again with new connections until the guest says that they are.
///
/// # Errors
/// Why they may still be frozen.
pub(super) fn thaw(socket: &Path) -> Result<Thawed, String> {
    let started = clock::now();
    let (mut pause, mut thawed) = (AGAIN.0, Thawed::Already);
    loop {
        let error = match try_thaw(socket, &mut thawed) {
            Ok(()) => return Ok(thawed),
            Err(error) => error,
        };
        let waited = clock::now().since(started);
        if matches!(&error, Trouble::NobodyThere(_)) && waited >= GONE_AFTER {
            return Ok(thawed);
        }
        if waited >= THAW {
            return Err(error.to_string());
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(AGAIN.1);
    }
}

fn try_thaw(socket: &Path, thawed: &mut Thawed) -> Result<(), Trouble> {
    let until = Until { moment: later(2 * ANSWER), stop: None };
    let mut agent = GuestAgent::connect(socket, &until)?;
    if agent.call(Request::Status, &until)?.as_str() == Some("thawed") {
        return Ok(());
    }
    agent.call(Request::Thaw, &until)?;
    *thawed = Thawed::Now;
    match agent.call(Request::Status, &until)?.as_str() {
        Some("thawed") => Ok(()),
        _ => Err(Trouble::Told("the guest says that it is not thawed".to_owned())),
    }
}

/// Why a call had no result.
#[derive(Debug, thiserror::Error)]
enum Trouble {
    #[error("nobody listens on {0}: the guest does not run, or has no guest agent channel")]
    NobodyThere(String),
    #[error("the guest agent does not answer: it does not run in the guest, or is stuck")]
    Late,
    #[error("the guest agent's socket: {0}")]
    Io(#[from] io::Error),
    #[error(transparent)]
    Bad(#[from] super::guest_agent::Bad),
    #[error("{0}")]
    Told(String),
}

/// When a wait ends.
struct Until<'a> {
    moment: Mono,
    stop: Option<&'a AtomicBool>,
}

impl Until<'_> {
    /// The same, or sooner.
    fn but(&self, limit: Duration) -> Self {
        Self { moment: self.moment.min(later(limit)), stop: self.stop }
    }

    fn is_over(&self) -> bool {
        clock::now() >= self.moment || self.stop.is_some_and(|stop| stop.load(Ordering::Relaxed))
    }
}

fn later(by: Duration) -> Mono {
    Mono(clock::now().0.saturating_add(clock::micros(by)))
}

/// Connects without waiting: a channel has one client at a time, and the next one would wait for ever.
fn open(socket: &Path) -> Result<UnixStream, Trouble> {
    let system = |e: Errno| Trouble::Io(e.into());
    let address = SocketAddrUnix::new(socket).map_err(system)?;
    let fd = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK, None).map_err(system)?;
    connect(&fd, &address).map_err(|e| match e {
        Errno::NOENT | Errno::CONNREFUSED => Trouble::NobodyThere(socket.display().to_string()),
        Errno::AGAIN => Trouble::Told(format!("{} is in use by another program", socket.display())),
        e => system(e),
    })?;
    let stream = UnixStream::from(fd);
    stream.set_nonblocking(false)?;
    Ok(stream)
}

/// A channel that is in step with the agent.
struct GuestAgent {
    stream: UnixStream,
    decoder: Decoder,
}

impl GuestAgent {
    fn connect(socket: &Path, until: &Until<'_>) -> Result<Self, Trouble> {
        let stream = open(socket)?;
        stream.set_read_timeout(Some(SLICE))?;
        stream.set_write_timeout(Some(ANSWER))?;
        let mut agent = Self { stream, decoder: Decoder::default() };
        let id = uuid::Uuid::new_v4().as_u128();
        // JSON numbers are read as 64 bits with a sign; a positive 31 bits fit everywhere.
        let id = u32::try_from(id >> 97).unwrap_or_default();
        agent.decoder.expect(id);
        agent.call(Request::Sync(id), &until.but(ANSWER))?;
        Ok(agent)
    }

    fn call(&mut self, request: Request, until: &Until<'_>) -> Result<Value, Trouble> {
        self.stream.write_all(&request.encode()).map_err(|e| match e.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => Trouble::Late,
            _ => Trouble::Io(e),
        })?;
        let mut chunk = [0; 4096];
        loop {
            match self.decoder.poll_reply()? {
                Some(Reply::Return(value)) => return Ok(value),
                Some(Reply::Error(words)) => return Err(Trouble::Told(words)),
                None => {}
            }
            if until.is_over() {
                return Err(Trouble::Late);
            }
            match self.stream.read(&mut chunk) {
                Ok(0) => return Err(Trouble::Io(io::ErrorKind::UnexpectedEof.into())),
                Ok(read) => self.decoder.handle_bytes(&chunk[..read])?,
                Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::Interrupted) => {}
                Err(e) => return Err(e.into()),
            }
        }
    }
}
