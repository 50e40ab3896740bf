//! An application that writes self-describing sectors to an agent's export all the time, and remembers what the disk must hold.
#![allow(clippy::unwrap_used, clippy::disallowed_methods, unreachable_pub, missing_docs, reason = "a part of the tests")]

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, TryLockError};
use std::time::{Duration, Instant};

use tidegate::model::{Address, Extent};
use tidegate::nbd::client::Client;

use super::support::Rng;

const SECTOR: u64 = 512;
const WRITE_MAX: u64 = 64 << 10;
/// For one write to end.
const PATIENCE: Duration = Duration::from_secs(20);

/// What was done since it was asked last.
#[derive(Clone, Copy, Debug, Default)]
pub struct Figures {
    pub writes: u64,
    pub bytes: u64,
    /// Of the writes; flushes wait for the local disk, whatever the network does.
    pub longest: Duration,
}

struct Shared {
    /// What the disk holds. Whoever has it keeps the writer waiting, between two writes.
    model: Mutex<Vec<u8>>,
    rate: AtomicU64,
    stop: AtomicBool,
    figures: Mutex<Figures>,
}

/// The writer; ends with this.
pub struct Writer {
    shared: Arc<Shared>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Writer {
    /// Starts writing `rate` bytes a second.
    pub fn start(socket: PathBuf, disk_bytes: u64, seed: u64, rate: u64) -> Self {
        let shared = Arc::new(Shared {
            model: Mutex::new(vec![0; disk_bytes as usize]),
            rate: AtomicU64::new(rate),
            stop: AtomicBool::new(false),
            figures: Mutex::default(),
        });
        let thread = std::thread::spawn({
            let shared = shared.clone();
            move || write(&shared, socket, seed)
        });
        Self { shared, thread: Some(thread) }
    }

    pub fn set_rate(&self, bytes_per_second: u64) {
        self.shared.rate.store(bytes_per_second, Ordering::SeqCst);
    }

    /// Nothing is written while the model is held.
    pub fn pause(&self) -> MutexGuard<'_, Vec<u8>> {
        let started = Instant::now();
        loop {
            match self.shared.model.try_lock() {
                Ok(model) => return model,
                Err(TryLockError::Poisoned(_)) => panic!("a write was refused, which no network may cause"),
                Err(TryLockError::WouldBlock) => assert!(started.elapsed() < PATIENCE, "a write takes longer than {PATIENCE:?}"),
            }
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    /// Takes the figures.
    pub fn figures(&self) -> Figures {
        std::mem::take(&mut *self.shared.figures.lock().unwrap())
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        let started = Instant::now();
        let Some(thread) = self.thread.take() else { return };
        // One that hangs in a write ends with the agent.
        while !thread.is_finished() && started.elapsed() < PATIENCE {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

fn write(shared: &Shared, socket: PathBuf, seed: u64) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let mut client = runtime.block_on(Client::connect(&Address::Unix(socket), "")).unwrap();
    let mut rng = Rng::new(seed);
    let mut number = 0;
    let mut due = Instant::now();
    while !shared.stop.load(Ordering::SeqCst) {
        number += 1;
        let rate = shared.rate.load(Ordering::SeqCst);
        let len = SECTOR * (1 + rng.below(WRITE_MAX.min(rate / 64) / SECTOR));
        {
            let mut model = shared.model.lock().unwrap();
            let offset = SECTOR * rng.below((model.len() as u64 - len) / SECTOR + 1);
            let place = &mut model[offset as usize..(offset + len) as usize];
            match rng.below(40) {
                0 => {
                    runtime.block_on(client.zero(Extent::new(offset, len))).unwrap();
                    place.fill(0);
                }
                1 => runtime.block_on(client.flush()).unwrap(),
                _ => {
                    let data = sectors(seed, number, offset, len);
                    let started = Instant::now();
                    runtime.block_on(client.write(offset, &data, false)).unwrap();
                    let took = started.elapsed();
                    place.copy_from_slice(&data);
                    let mut figures = shared.figures.lock().unwrap();
                    figures.writes += 1;
                    figures.bytes += len;
                    figures.longest = figures.longest.max(took);
                }
            }
        }
        // What was missed while somebody held the model is not made up for.
        due = (due + Duration::from_secs_f64(len as f64 / rate as f64)).max(Instant::now() + Duration::from_millis(1));
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
    }
}

/// Content that says which write it is of and where it belongs, and that does not compress.
fn sectors(seed: u64, number: u64, offset: u64, len: u64) -> Vec<u8> {
    let mut data = vec![0; len as usize];
    blake3::Hasher::new().update(&seed.to_le_bytes()).update(&number.to_le_bytes()).finalize_xof().fill(&mut data);
    for (sector, at) in data.chunks_exact_mut(SECTOR as usize).zip((offset..).step_by(SECTOR as usize)) {
        sector[..8].copy_from_slice(&number.to_le_bytes());
        sector[8..16].copy_from_slice(&at.to_le_bytes());
    }
    data
}

/// Sectors that differ, and what the first of them says of itself on both sides.
pub fn differences(found: &[u8], expected: &[u8]) -> (u64, String) {
    if found.len() != expected.len() {
        return (1, format!("{} bytes instead of {}", found.len(), expected.len()));
    }
    let sector = SECTOR as usize;
    let pairs = found.chunks(sector).zip(expected.chunks(sector)).enumerate();
    let differing: Vec<_> = pairs.filter(|(_, (f, e))| f != e).collect();
    let words = |s: &[u8]| [0, 8].map(|at| s.get(at..at + 8).map_or(0, |w| u64::from_le_bytes(w.try_into().unwrap())));
    let told = differing.first().map(|(index, (f, e))| {
        let ([write, at], [expected_write, expected_at]) = (words(f), words(e));
        format!("offset {}: write {write} for {at} instead of write {expected_write} for {expected_at}", index * sector)
    });
    (differing.len() as u64, told.unwrap_or_default())
}
