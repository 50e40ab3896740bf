//! Serves one export to any number of connections of one thread. Knows the protocol, nothing of what is behind it.

use std::cell::{Cell, RefCell};
use std::io;
use std::rc::Rc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::sync::{Notify, Semaphore};

use super::patience::{Patience, wait_for_request};
use super::protocol::{
    CONTEXT_ID, CONTEXT_NAME, DESCRIPTORS_MAX, HANDSHAKE_FLAGS, MAGIC_GREETING, MAGIC_OPTION, MAGIC_OPTION_REPLY, NbdError,
    OPTION_BYTES_MAX, PAYLOAD_BYTES_MAX, REQUEST_LEN, Request, chunk, chunk_header, command, flag, option, reply, simple_reply,
};
use crate::model::Extent;
use crate::storage::AlignedBuf;

/// Requests of one connection that may be under way.
const REQUESTS_MAX: usize = 128;
/// Payload KiB of one connection that may be under way.
const PAYLOAD_KIB_MAX: usize = 64 << 10;
/// Requests of one connection before others get their turn.
pub const REQUESTS_NOW_MAX: u32 = 64;
/// Largest read tried without waiting: longer copies would hold up others.
const READ_NOW_BYTES_MAX: u32 = 64 << 10;
/// A client must finish the negotiation in this time.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);
/// Read buffer: many small requests in one system call.
const READ_BUFFER: usize = 128 << 10;

/// What a client sees.
#[derive(Clone, Debug)]
pub struct ExportInfo {
    /// The name clients may ask for; the empty name always works too.
    pub name: String,
    /// Bytes.
    pub size: u64,
    /// Refuses writes.
    pub read_only: bool,
}

/// One run of `base:allocation`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Allocation {
    /// Bytes.
    pub len: u64,
    /// Nothing is stored there, it reads as zeroes.
    pub hole: bool,
}

/// What is behind an export. All extents given lie within the disk.
pub trait Export: 'static {
    /// See [`ExportInfo`].
    fn info(&self) -> ExportInfo;
    /// Reads an extent if that needs no waiting.
    fn read_now(&self, _extent: Extent) -> Option<Bytes> {
        None
    }
    /// Writes if that needs no waiting; gives the data back if it does.
    fn write_now(&self, _offset: u64, data: AlignedBuf) -> Result<Result<(), NbdError>, AlignedBuf> {
        Err(data)
    }
    /// Called after every [`REQUESTS_NOW_MAX`] requests of a connection, to let others on the thread come forward.
    fn breathe(&self) -> impl Future<Output = ()> {
        std::future::ready(())
    }
    /// Whether nothing else on the thread waits for it to sleep, so that a connection may poll for its next request.
    fn may_poll(&self) -> bool {
        false
    }
    /// Reads an extent.
    fn read(&self, extent: Extent) -> impl Future<Output = Result<Bytes, NbdError>>;
    /// Writes; durable before the answer if `fua`.
    fn write(&self, offset: u64, data: AlignedBuf, fua: bool) -> impl Future<Output = Result<(), NbdError>>;
    /// Makes an extent read as zeroes; may release its space unless `keep`.
    fn zero(&self, extent: Extent, keep: bool, fua: bool) -> impl Future<Output = Result<(), NbdError>>;
    /// Makes every write that was answered durable.
    fn flush(&self) -> impl Future<Output = Result<(), NbdError>>;
    /// What is allocated, in order from the first byte of the extent.
    fn allocation(&self, extent: Extent) -> impl Future<Output = Result<Vec<Allocation>, NbdError>>;
}

/// Serves one connection until the client leaves.
///
/// # Errors
/// Those of the socket, and [`io::ErrorKind::InvalidData`] for a client that does not speak the protocol.
pub async fn serve<E: Export, S: AsyncRead + AsyncWrite + 'static>(stream: S, export: Rc<E>) -> io::Result<()> {
    let (read, write) = tokio::io::split(stream);
    let mut connection =
        Negotiation { read: BufReader::with_capacity(READ_BUFFER, read), write, export, structured: false, context: false };
    match tokio::time::timeout(HANDSHAKE_LIMIT, connection.negotiate()).await {
        Ok(Ok(true)) => connection.transmit().await,
        Ok(Ok(false)) => Ok(()),
        Ok(Err(e)) => Err(e),
        Err(_) => Err(io::Error::new(io::ErrorKind::TimedOut, "the client did not finish the negotiation in time")),
    }
}

struct Negotiation<E, R, W> {
    read: BufReader<R>,
    write: W,
    export: Rc<E>,
    structured: bool,
    context: bool,
}

impl<E: Export, R: AsyncRead + Unpin + 'static, W: AsyncWrite + Unpin + 'static> Negotiation<E, R, W> {
    /// True when the client wants to go on to transmission.
    async fn negotiate(&mut self) -> io::Result<bool> {
        let mut greeting = Vec::with_capacity(18);
        greeting.extend_from_slice(&MAGIC_GREETING.to_be_bytes());
        greeting.extend_from_slice(&MAGIC_OPTION.to_be_bytes());
        greeting.extend_from_slice(&HANDSHAKE_FLAGS.to_be_bytes());
        self.write.write_all(&greeting).await?;
        let client_flags = self.read.read_u32().await?;
        if client_flags & 1 == 0 || client_flags > 3 {
            return Err(invalid("the client does not speak fixed newstyle negotiation"));
        }
        let no_zeroes = client_flags & 2 != 0;
        loop {
            if self.read.read_u64().await? != MAGIC_OPTION {
                return Err(invalid("an option without its magic"));
            }
            let (number, len) = (self.read.read_u32().await?, self.read.read_u32().await?);
            if len > OPTION_BYTES_MAX {
                self.discard(u64::from(len)).await?;
                self.answer(number, reply::ERR_TOO_BIG, b"option too long").await?;
                continue;
            }
            let mut data = vec![0; len as usize];
            self.read.read_exact(&mut data).await?;
            match number {
                option::EXPORT_NAME => return self.export_name(&data, no_zeroes).await,
                option::ABORT => {
                    self.answer(number, reply::ACK, &[]).await?;
                    return Ok(false);
                }
                option::GO | option::INFO => {
                    if self.info(number, &data).await? && number == option::GO {
                        return Ok(true);
                    }
                }
                option::LIST => self.list(&data).await?,
                option::STRUCTURED_REPLY if data.is_empty() => {
                    self.structured = true;
                    self.answer(number, reply::ACK, &[]).await?;
                }
                option::LIST_META_CONTEXT | option::SET_META_CONTEXT => self.meta_context(number, &data).await?,
                option::STRUCTURED_REPLY => self.answer(number, reply::ERR_INVALID, b"the option takes no data").await?,
                _ => self.answer(number, reply::ERR_UNSUP, b"option not supported").await?,
            }
        }
    }

    async fn export_name(&mut self, name: &[u8], no_zeroes: bool) -> io::Result<bool> {
        if !self.is_ours(name) {
            return Err(invalid("the client asked for an export that does not exist"));
        }
        let info = self.export.info();
        let mut out = info.size.to_be_bytes().to_vec();
        out.extend_from_slice(&transmission_flags(&info, self.structured).to_be_bytes());
        if !no_zeroes {
            out.extend_from_slice(&[0; 124]);
        }
        self.write.write_all(&out).await?;
        Ok(true)
    }

    async fn info(&mut self, number: u32, data: &[u8]) -> io::Result<bool> {
        let Some((name, rest)) = take_string(data) else {
            self.answer(number, reply::ERR_INVALID, b"malformed option").await?;
            return Ok(false);
        };
        let wanted = rest.split_first_chunk::<2>().map(|(n, list)| (usize::from(u16::from_be_bytes(*n)), list));
        let Some((count, list)) = wanted.filter(|(n, list)| list.len() == n * 2) else {
            self.answer(number, reply::ERR_INVALID, b"malformed option").await?;
            return Ok(false);
        };
        if !self.is_ours(name) {
            self.answer(number, reply::ERR_UNKNOWN, b"no such export").await?;
            return Ok(false);
        }
        let info = self.export.info();
        let mut body = 0u16.to_be_bytes().to_vec();
        body.extend_from_slice(&info.size.to_be_bytes());
        body.extend_from_slice(&transmission_flags(&info, self.structured).to_be_bytes());
        self.answer(number, reply::INFO, &body).await?;
        let asked: Vec<u16> = list.chunks_exact(2).take(count).map(|c| u16::from_be_bytes([c[0], c[1]])).collect();
        if asked.contains(&1) {
            let mut body = 1u16.to_be_bytes().to_vec();
            body.extend_from_slice(info.name.as_bytes());
            self.answer(number, reply::INFO, &body).await?;
        }
        // Block sizes: any request works, pages are best.
        let mut body = 3u16.to_be_bytes().to_vec();
        for size in [1, 4096, PAYLOAD_BYTES_MAX] {
            body.extend_from_slice(&size.to_be_bytes());
        }
        self.answer(number, reply::INFO, &body).await?;
        self.answer(number, reply::ACK, &[]).await?;
        Ok(true)
    }

    async fn list(&mut self, data: &[u8]) -> io::Result<()> {
        if !data.is_empty() {
            return self.answer(option::LIST, reply::ERR_INVALID, b"the option takes no data").await;
        }
        let name = self.export.info().name;
        let mut body = (name.len() as u32).to_be_bytes().to_vec();
        body.extend_from_slice(name.as_bytes());
        self.answer(option::LIST, reply::SERVER, &body).await?;
        self.answer(option::LIST, reply::ACK, &[]).await
    }

    async fn meta_context(&mut self, number: u32, data: &[u8]) -> io::Result<()> {
        if !self.structured {
            return self.answer(number, reply::ERR_INVALID, b"structured replies come first").await;
        }
        let Some(queries) = parse_queries(data) else {
            return self.answer(number, reply::ERR_INVALID, b"malformed option").await;
        };
        if !self.is_ours(queries.0) {
            return self.answer(number, reply::ERR_UNKNOWN, b"no such export").await;
        }
        let listing = number == option::LIST_META_CONTEXT;
        let matches = |q: &&[u8]| **q == *CONTEXT_NAME.as_bytes() || listing && **q == *b"base:";
        let found = queries.1.iter().any(matches) || listing && queries.1.is_empty();
        if !listing {
            self.context = found;
        }
        if found {
            let id = if listing { 0 } else { CONTEXT_ID };
            let mut body = id.to_be_bytes().to_vec();
            body.extend_from_slice(CONTEXT_NAME.as_bytes());
            self.answer(number, reply::META_CONTEXT, &body).await?;
        }
        self.answer(number, reply::ACK, &[]).await
    }

    fn is_ours(&self, name: &[u8]) -> bool {
        name.is_empty() || name == self.export.info().name.as_bytes()
    }

    async fn answer(&mut self, number: u32, kind: u32, body: &[u8]) -> io::Result<()> {
        let mut out = Vec::with_capacity(20 + body.len());
        out.extend_from_slice(&MAGIC_OPTION_REPLY.to_be_bytes());
        out.extend_from_slice(&number.to_be_bytes());
        out.extend_from_slice(&kind.to_be_bytes());
        out.extend_from_slice(&(body.len() as u32).to_be_bytes());
        out.extend_from_slice(body);
        self.write.write_all(&out).await
    }

    async fn discard(&mut self, len: u64) -> io::Result<()> {
        let copied = tokio::io::copy(&mut (&mut self.read).take(len), &mut tokio::io::sink()).await?;
        if copied == len { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
    }

    async fn transmit(mut self) -> io::Result<()> {
        let replies = Rc::new(Replies::default());
        let writer = tokio::task::spawn_local(write_replies(self.write, replies.clone()));
        // A service that ends drops this task: the client must see its connection end, not wait for ever.
        let _close = CloseOnDrop(replies.clone());
        let budget = Rc::new(Budget { requests: Semaphore::new(REQUESTS_MAX), payload_kib: Semaphore::new(PAYLOAD_KIB_MAX) });
        let info = self.export.info();
        let answer = Rc::new(Answer { export: self.export.clone(), info, structured: self.structured, context: self.context });
        let mut answered_now = 0;
        let mut patience = Patience::default();
        let mut header = [0; REQUEST_LEN];
        let result = loop {
            if self.read.buffer().is_empty()
                && let Err(e) = wait_for_request(&mut self.read, &mut patience, || answer.export.may_poll()).await
            {
                break Err(e);
            }
            match self.read.read_exact(&mut header).await {
                Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => break Ok(()),
                Err(e) => break Err(e),
                Ok(_) => {}
            }
            let Some(request) = Request::decode(&header) else { break Err(invalid("a request without its magic")) };
            if request.kind == command::DISC {
                break Ok(());
            }
            if replies.failed.get() {
                break Err(io::ErrorKind::BrokenPipe.into());
            }
            let payload = request.kind == command::WRITE;
            let kib = if matches!(request.kind, command::READ | command::WRITE) {
                request.len.min(PAYLOAD_BYTES_MAX).div_ceil(1024).max(1)
            } else {
                1
            };
            let permits = budget.clone().acquire(kib).await;
            let data = if payload && request.len <= PAYLOAD_BYTES_MAX {
                let mut data = AlignedBuf::with_capacity(request.len as usize);
                data.set_len(request.len as usize);
                if let Err(e) = self.read.read_exact(&mut data).await {
                    break Err(e);
                }
                Some(data)
            } else {
                if payload {
                    break Err(invalid("a write longer than 32 MiB"));
                }
                None
            };
            answered_now += 1;
            if answered_now == REQUESTS_NOW_MAX {
                answered_now = 0;
                answer.export.breathe().await;
            }
            match answer.answer_now(&request, data) {
                Ok(reply) => replies.push(reply, permits),
                Err(data) => {
                    let (answer, replies) = (answer.clone(), replies.clone());
                    tokio::task::spawn_local(async move { replies.push(answer.answer(request, data).await, permits) });
                }
            }
        };
        // Requests under way finish first: their writes must not be cut off by a client that hangs up.
        let _ = budget.requests.acquire_many(REQUESTS_MAX as u32).await;
        replies.close();
        let _ = writer.await;
        result
    }
}

/// Ends the task that writes replies, whatever ended the connection.
struct CloseOnDrop(Rc<Replies>);

impl Drop for CloseOnDrop {
    fn drop(&mut self) {
        self.0.close();
    }
}

struct Budget {
    requests: Semaphore,
    payload_kib: Semaphore,
}

impl Budget {
    async fn acquire(self: Rc<Self>, kib: u32) -> Permits {
        if let Ok(permit) = self.requests.acquire().await {
            permit.forget();
        }
        if let Ok(permit) = self.payload_kib.acquire_many(kib).await {
            permit.forget();
        }
        Permits { budget: self, kib }
    }
}

struct Permits {
    budget: Rc<Budget>,
    kib: u32,
}

impl Drop for Permits {
    fn drop(&mut self) {
        self.budget.requests.add_permits(1);
        self.budget.payload_kib.add_permits(self.kib as usize);
    }
}

/// What goes to the client for one request.
struct Reply {
    head: [u8; Reply::HEAD_MAX],
    head_len: usize,
    body: Bytes,
}

impl Reply {
    /// A structured header and an offset.
    const HEAD_MAX: usize = 28;

    fn new(head: &[u8], body: Bytes) -> Self {
        let mut reply = Self { head: [0; Self::HEAD_MAX], head_len: head.len(), body };
        reply.head[..head.len()].copy_from_slice(head);
        reply
    }

    fn simple(cookie: u64, code: u32) -> Self {
        Self::new(&simple_reply(cookie, code), Bytes::new())
    }
}

/// Replies waiting for the socket; written together.
#[derive(Default)]
struct Replies {
    queue: RefCell<Vec<(Reply, Permits)>>,
    ready: Notify,
    closed: Cell<bool>,
    failed: Cell<bool>,
}

impl Replies {
    /// The permits return when the reply was written: a client that does not read is not served without end.
    fn push(&self, reply: Reply, permits: Permits) {
        if self.failed.get() {
            return;
        }
        self.queue.borrow_mut().push((reply, permits));
        self.ready.notify_one();
    }

    fn close(&self) {
        self.closed.set(true);
        self.ready.notify_one();
    }
}

async fn write_replies<W: AsyncWrite + Unpin>(mut write: W, replies: Rc<Replies>) {
    let mut small = BytesMut::new();
    loop {
        let waiting = std::mem::take(&mut *replies.queue.borrow_mut());
        if waiting.is_empty() {
            if replies.closed.get() {
                return;
            }
            replies.ready.notified().await;
            continue;
        }
        let written = async {
            for (reply, _) in &waiting {
                small.extend_from_slice(&reply.head[..reply.head_len]);
                if reply.body.len() <= 16 << 10 {
                    small.extend_from_slice(&reply.body);
                    continue;
                }
                write.write_all(&small).await?;
                small.clear();
                write.write_all(&reply.body).await?;
            }
            write.write_all(&small).await?;
            small.clear();
            io::Result::Ok(())
        };
        if written.await.is_err() {
            replies.failed.set(true);
            // Whoever waits for permits must see that nobody reads any more.
            replies.queue.borrow_mut().clear();
            return;
        }
    }
}

struct Answer<E> {
    export: Rc<E>,
    info: ExportInfo,
    structured: bool,
    context: bool,
}

impl<E: Export> Answer<E> {
    /// Answers without waiting, if that can be done; gives the payload back otherwise.
    fn answer_now(&self, request: &Request, data: Option<AlignedBuf>) -> Result<Reply, Option<AlignedBuf>> {
        let extent = Extent::new(request.offset, u64::from(request.len));
        if !extent.fits(self.info.size) || request.flags & command::FLAG_FUA != 0 {
            return Err(data);
        }
        match (request.kind, data) {
            (command::WRITE, Some(data)) if !self.info.read_only => match self.export.write_now(request.offset, data) {
                Ok(result) => Ok(Reply::simple(request.cookie, result.err().map_or(0, |e| e.code()))),
                Err(data) => Err(Some(data)),
            },
            (command::READ, None) if request.len <= READ_NOW_BYTES_MAX => {
                Ok(self.read_reply(request, self.export.read_now(extent).ok_or(None)?))
            }
            (_, data) => Err(data),
        }
    }

    async fn answer(&self, request: Request, data: Option<AlignedBuf>) -> Reply {
        match self.perform(request, data).await {
            Ok(reply) => reply,
            Err(e) if self.structured && matches!(request.kind, command::READ | command::BLOCK_STATUS) => {
                let mut body = e.code().to_be_bytes().to_vec();
                body.extend_from_slice(&0u16.to_be_bytes());
                let head = chunk_header(request.cookie, chunk::FLAG_DONE, chunk::ERROR, body.len() as u32);
                Reply::new(&head, body.into())
            }
            Err(e) => Reply::simple(request.cookie, e.code()),
        }
    }

    async fn perform(&self, request: Request, data: Option<AlignedBuf>) -> Result<Reply, NbdError> {
        let extent = Extent::new(request.offset, u64::from(request.len));
        let fua = request.flags & command::FLAG_FUA != 0;
        let writes = matches!(request.kind, command::WRITE | command::TRIM | command::WRITE_ZEROES);
        if writes && self.info.read_only {
            return Err(NbdError::NotPermitted);
        }
        if request.kind != command::FLUSH && !extent.fits(self.info.size) {
            return Err(if writes { NbdError::NoSpace } else { NbdError::Invalid });
        }
        match request.kind {
            command::READ if request.len <= PAYLOAD_BYTES_MAX => return Ok(self.read_reply(&request, self.export.read(extent).await?)),
            command::WRITE => self.export.write(request.offset, data.ok_or(NbdError::Invalid)?, fua).await?,
            command::TRIM => self.export.zero(extent, false, fua).await?,
            command::WRITE_ZEROES => self.export.zero(extent, request.flags & command::FLAG_NO_HOLE != 0, fua).await?,
            command::FLUSH => self.export.flush().await?,
            command::BLOCK_STATUS if self.context => return self.block_status(request, extent).await,
            command::READ | command::BLOCK_STATUS => return Err(NbdError::Invalid),
            _ => return Err(NbdError::Unsupported),
        }
        Ok(Reply::simple(request.cookie, 0))
    }

    fn read_reply(&self, request: &Request, data: Bytes) -> Reply {
        if !self.structured {
            return Reply::new(&simple_reply(request.cookie, 0), data);
        }
        let mut head = [0; Reply::HEAD_MAX];
        let (chunk_head, offset) = head.split_at_mut(Reply::HEAD_MAX - 8);
        chunk_head.copy_from_slice(&chunk_header(request.cookie, chunk::FLAG_DONE, chunk::OFFSET_DATA, 8 + request.len));
        offset.copy_from_slice(&request.offset.to_be_bytes());
        Reply::new(&head, data)
    }

    async fn block_status(&self, request: Request, extent: Extent) -> Result<Reply, NbdError> {
        let mut runs = self.export.allocation(extent).await?;
        runs.truncate(if request.flags & command::FLAG_REQ_ONE != 0 { 1 } else { DESCRIPTORS_MAX });
        let mut body = CONTEXT_ID.to_be_bytes().to_vec();
        for run in runs {
            body.extend_from_slice(&(run.len.min(u64::from(u32::MAX)) as u32).to_be_bytes());
            body.extend_from_slice(&(if run.hole { 3u32 } else { 0 }).to_be_bytes());
        }
        let head = chunk_header(request.cookie, chunk::FLAG_DONE, chunk::BLOCK_STATUS, body.len() as u32);
        Ok(Reply::new(&head, body.into()))
    }
}

fn transmission_flags(info: &ExportInfo, structured: bool) -> u16 {
    // A flush makes every answered write of every connection durable, so several connections see one disk.
    let always = flag::HAS_FLAGS | flag::SEND_FLUSH | flag::SEND_FUA | flag::CAN_MULTI_CONN;
    let writable = if info.read_only { flag::READ_ONLY } else { flag::SEND_TRIM | flag::SEND_WRITE_ZEROES };
    always | writable | if structured { flag::SEND_DF } else { 0 }
}

fn take_string(data: &[u8]) -> Option<(&[u8], &[u8])> {
    let (len, rest) = data.split_first_chunk::<4>()?;
    rest.split_at_checked(u32::from_be_bytes(*len) as usize)
}

fn parse_queries(data: &[u8]) -> Option<(&[u8], Vec<&[u8]>)> {
    let (name, rest) = take_string(data)?;
    let (count, mut rest) = rest.split_first_chunk::<4>()?;
    let mut queries = Vec::new();
    for _ in 0..u32::from_be_bytes(*count) {
        let (query, after) = take_string(rest)?;
        queries.push(query);
        rest = after;
    }
    rest.is_empty().then_some((name, queries))
}

fn invalid(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}
