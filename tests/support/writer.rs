//! Writes to an agent's export from threads of its own, as an application would, and can be brought to rest between two writes.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tidegate::model::{Address, Extent};
use tidegate::nbd::client::Client;

use super::Rng;

#[derive(Default)]
struct Flags {
    pause: AtomicBool,
    stop: AtomicBool,
    paused: AtomicU64,
    writes: AtomicU64,
    bytes: AtomicU64,
    longest_us: AtomicU64,
}

/// What a writer did.
#[derive(Clone, Copy, Debug)]
pub struct Written {
    /// Writes that were answered.
    pub writes: u64,
    /// Bytes of them.
    pub bytes: u64,
    /// The longest that one took.
    pub longest: Duration,
}

/// Running writers of one disk.
pub struct Writer {
    flags: Arc<Flags>,
    threads: Vec<JoinHandle<()>>,
}

impl Writer {
    /// `threads` writers with an area of the disk each, which together write about `rate` bytes a second (0: what they can).
    pub fn start(socket: PathBuf, size: u64, threads: u64, rate: u64, seed: u64) -> Self {
        let flags = Arc::new(Flags::default());
        let threads = (0..threads).map(|n| {
            let area = Extent::new(n * (size / threads) / 4096 * 4096, size / threads / 4096 * 4096);
            let (socket, flags) = (socket.clone(), flags.clone());
            std::thread::spawn(move || work(socket, seed + n, area, rate / threads, &flags))
        });
        Self { threads: threads.collect(), flags }
    }

    /// Between two writes, from when this returns.
    pub fn pause(&self) {
        self.flags.pause.store(true, Ordering::SeqCst);
        let started = Instant::now();
        while self.flags.paused.load(Ordering::SeqCst) < self.threads.len() as u64 {
            assert!(started.elapsed() < Duration::from_secs(20), "a writer is stuck in a write");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Goes on.
    pub fn go_on(&self) {
        self.flags.pause.store(false, Ordering::SeqCst);
    }

    /// So far.
    pub fn written(&self) -> Written {
        Written {
            writes: self.flags.writes.load(Ordering::SeqCst),
            bytes: self.flags.bytes.load(Ordering::SeqCst),
            longest: Duration::from_micros(self.flags.longest_us.load(Ordering::SeqCst)),
        }
    }

    /// Ends.
    pub fn stop(mut self) -> Written {
        self.end();
        self.written()
    }

    fn end(&mut self) {
        self.flags.stop.store(true, Ordering::SeqCst);
        self.flags.pause.store(false, Ordering::SeqCst);
        self.threads.drain(..).for_each(|thread| drop(thread.join()));
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.end();
    }
}

fn work(socket: PathBuf, seed: u64, area: Extent, rate: u64, flags: &Flags) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let mut rng = Rng::new(seed);
        let mut client = None;
        let (started, mut sent) = (Instant::now(), 0u64);
        while !flags.stop.load(Ordering::SeqCst) {
            if flags.pause.load(Ordering::SeqCst) {
                flags.paused.fetch_add(1, Ordering::SeqCst);
                while flags.pause.load(Ordering::SeqCst) {
                    tokio::time::sleep(Duration::from_millis(2)).await;
                }
                flags.paused.fetch_sub(1, Ordering::SeqCst);
            }
            if rate > 0 && sent > (started.elapsed().as_secs_f64() * rate as f64) as u64 {
                tokio::time::sleep(Duration::from_millis(2)).await;
                continue;
            }
            let Some(connected) = &mut client else {
                client = Client::connect(&Address::Unix(socket.clone()), "").await.ok();
                tokio::time::sleep(Duration::from_millis(5)).await;
                continue;
            };
            // Whole pages take another way through the agent than other writes do.
            let unit = if rng.below(2) == 0 { 512 } else { 4096 };
            let len = unit * (1 + rng.below(65_536 / unit));
            let offset = area.offset + rng.below((area.len - len) / unit) * unit;
            let began = Instant::now();
            let result = match rng.below(20) {
                0 => connected.zero(Extent::new(offset, len)).await,
                1 => connected.flush().await,
                n => connected.write(offset, &content(&mut rng, len as usize), n == 2).await,
            };
            match result {
                Ok(()) => {
                    sent += len;
                    flags.writes.fetch_add(1, Ordering::SeqCst);
                    flags.bytes.fetch_add(len, Ordering::SeqCst);
                    flags.longest_us.fetch_max(began.elapsed().as_micros() as u64, Ordering::SeqCst);
                }
                Err(_) => client = None,
            }
        }
    });
}

/// Half of it does not compress.
fn content(rng: &mut Rng, len: usize) -> Vec<u8> {
    let mut data = vec![rng.below(256) as u8; len];
    for word in data[..len / 2].chunks_mut(8) {
        word.copy_from_slice(&rng.below(u64::MAX).to_le_bytes()[..word.len()]);
    }
    data
}
