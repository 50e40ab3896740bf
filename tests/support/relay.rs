//! Relays in front of a server that delay, reorder, duplicate, corrupt and lose packets, and delay, corrupt and reset connections: what
//! `netem` does, for kernels that do not have it.
#![allow(clippy::unwrap_used, clippy::disallowed_methods, unreachable_pub, missing_docs, reason = "a part of the tests")]

use std::cell::RefCell;
use std::collections::HashMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::task::spawn_local;

use super::support::Rng;
use super::wire::enter;

/// What was done to packets and connections.
#[derive(Debug, Default)]
pub struct Counts {
    pub passed: AtomicU64,
    pub lost: AtomicU64,
    pub late: AtomicU64,
    pub twice: AtomicU64,
    pub corrupt: AtomicU64,
    pub reset: AtomicU64,
}

impl Counts {
    fn add(count: &AtomicU64) {
        count.fetch_add(1, Ordering::Relaxed);
    }
}

#[derive(Default)]
struct Shared {
    counts: Counts,
    rough: AtomicBool,
    stop: AtomicBool,
    port: AtomicU16,
}

/// Which relay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Tcp,
    Udp,
}

/// A relay on a thread of its own; ends with this.
pub struct Relay {
    shared: Arc<Shared>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Relay {
    /// Passes everything on to a port of the same namespace, unharmed until told otherwise.
    pub fn start(kind: Kind, namespace: String, port: u16, seed: u64) -> Self {
        let shared = Arc::new(Shared::default());
        let thread = std::thread::spawn({
            let shared = shared.clone();
            move || {
                enter(&namespace);
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
                let relay = Rc::new(Running { shared, rng: RefCell::new(Rng::new(seed)), server: (Ipv4Addr::LOCALHOST, port).into() });
                tokio::task::LocalSet::new().block_on(&runtime, async {
                    match kind {
                        Kind::Udp => spawn_local(relay.clone().datagrams()),
                        Kind::Tcp => spawn_local(relay.clone().connections()),
                    };
                    while !relay.shared.stop.load(Ordering::SeqCst) {
                        tokio::time::sleep(Duration::from_millis(20)).await;
                    }
                });
            }
        });
        while shared.port.load(Ordering::SeqCst) == 0 {
            assert!(!thread.is_finished(), "the relay could not start");
            std::thread::sleep(Duration::from_millis(5));
        }
        Self { shared, thread: Some(thread) }
    }

    /// Where it listens.
    pub fn port(&self) -> u16 {
        self.shared.port.load(Ordering::SeqCst)
    }

    /// Whether it does harm.
    pub fn rough(&self, rough: bool) {
        self.shared.rough.store(rough, Ordering::SeqCst);
    }

    pub fn counts(&self) -> &Counts {
        &self.shared.counts
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct Running {
    shared: Arc<Shared>,
    rng: RefCell<Rng>,
    server: SocketAddr,
}

impl Running {
    /// A number below `bound`.
    fn draw(&self, bound: u64) -> u64 {
        self.rng.borrow_mut().below(bound)
    }

    fn is_rough(&self) -> bool {
        self.shared.rough.load(Ordering::SeqCst)
    }

    async fn datagrams(self: Rc<Self>) {
        let front = Rc::new(UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).await.unwrap());
        self.shared.port.store(front.local_addr().unwrap().port(), Ordering::SeqCst);
        let mut peers: HashMap<SocketAddr, Rc<UdpSocket>> = HashMap::new();
        let mut buffer = vec![0; 65536];
        loop {
            // An error here is an ICMP message about something sent before, which a relay passes over.
            let Ok((len, peer)) = front.recv_from(&mut buffer).await else { continue };
            let back = match peers.get(&peer) {
                Some(back) => back.clone(),
                None => {
                    let back = Rc::new(UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap());
                    back.connect(self.server).await.unwrap();
                    peers.insert(peer, back.clone());
                    spawn_local(self.clone().answers(front.clone(), back.clone(), peer));
                    back
                }
            };
            self.pass(&buffer[..len], move |data| {
                let back = back.clone();
                async move { drop(back.send(&data).await) }
            });
        }
    }

    async fn answers(self: Rc<Self>, front: Rc<UdpSocket>, back: Rc<UdpSocket>, peer: SocketAddr) {
        let mut buffer = vec![0; 65536];
        loop {
            let Ok(len) = back.recv(&mut buffer).await else { continue };
            let front = front.clone();
            self.pass(&buffer[..len], move |data| {
                let front = front.clone();
                async move { drop(front.send_to(&data, peer).await) }
            });
        }
    }

    /// Sends a packet now, later, twice, changed or never.
    fn pass<F: Future<Output = ()> + 'static>(&self, data: &[u8], send: impl Fn(Vec<u8>) -> F) {
        let counts = &self.shared.counts;
        let mut data = data.to_vec();
        Counts::add(&counts.passed);
        if !self.is_rough() {
            spawn_local(send(data));
            return;
        }
        let copies = match self.draw(100) {
            0 => {
                Counts::add(&counts.lost);
                0
            }
            1..4 => {
                Counts::add(&counts.twice);
                2
            }
            _ => 1,
        };
        if self.draw(100) < 2 {
            Counts::add(&counts.corrupt);
            self.flip_a_bit(&mut data);
        }
        for _ in 0..copies {
            let mut delay = Duration::from_micros(2000 + self.draw(8000));
            if self.draw(50) == 0 {
                Counts::add(&counts.late);
                delay += Duration::from_millis(20 + self.draw(80));
            }
            let sent = send(data.clone());
            spawn_local(async move {
                tokio::time::sleep(delay).await;
                sent.await;
            });
        }
    }

    fn flip_a_bit(&self, data: &mut [u8]) {
        let bit = self.draw((data.len() as u64 * 8).max(1)) as usize;
        if let Some(byte) = data.get_mut(bit / 8) {
            *byte ^= 1 << (bit % 8);
        }
    }

    async fn connections(self: Rc<Self>) {
        let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)).await.unwrap();
        self.shared.port.store(listener.local_addr().unwrap().port(), Ordering::SeqCst);
        loop {
            let Ok((near, _)) = listener.accept().await else { continue };
            spawn_local(self.clone().connection(near));
        }
    }

    async fn connection(self: Rc<Self>, near: TcpStream) {
        let Ok(far) = TcpStream::connect(self.server).await else { return };
        // What ends a connection here is a reset, as from a middle box that forgot it.
        for stream in [&near, &far] {
            let _ = stream.set_nodelay(true);
            let _ = stream.set_zero_linger();
        }
        let ((near_read, near_write), (far_read, far_write)) = (near.into_split(), far.into_split());
        tokio::select! {
            () = self.clone().pump(near_read, far_write) => {}
            () = self.clone().pump(far_read, near_write) => {}
            () = self.life() => Counts::add(&self.shared.counts.reset),
        }
    }

    /// Ends when the connection is to be reset.
    async fn life(&self) {
        let mut left = 500 + self.draw(2000);
        while left > 0 {
            tokio::time::sleep(Duration::from_millis(20)).await;
            left = if self.is_rough() { left.saturating_sub(20) } else { left };
        }
    }

    async fn pump(self: Rc<Self>, mut from: OwnedReadHalf, mut to: OwnedWriteHalf) {
        let mut buffer = vec![0; 16 << 10];
        loop {
            let len = match from.read(&mut buffer).await {
                Ok(len) if len > 0 => len,
                _ => return,
            };
            Counts::add(&self.shared.counts.passed);
            if self.is_rough() {
                tokio::time::sleep(Duration::from_millis(1 + self.draw(10))).await;
                if self.draw(1500) == 0 {
                    Counts::add(&self.shared.counts.corrupt);
                    self.flip_a_bit(&mut buffer[..len]);
                }
            }
            if to.write_all(&buffer[..len]).await.is_err() {
                return;
            }
        }
    }
}
