//! A master target without the link, for measurements: the product's own apply thread, journal and catalogue, fed with sealed batches.
#![allow(dead_code, unreachable_pub, reason = "each benchmark uses a part")]

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tidegate::config::master_target::MasterTargetSettings;
use tidegate::crypto::keyring::KeyEncryptionKey;
use tidegate::crypto::pki::{self, Identity, Role};
use tidegate::crypto::seal::{Packer, Purpose, SealingSession};
use tidegate::crypto::tls::Credentials;
use tidegate::master_target::apply::{self, Command, Prepared};
use tidegate::master_target::catalogue::Records;
use tidegate::master_target::journal::{self, Completions, JournalHandle, Tag};
use tidegate::master_target::policy::{self, LivePolicy};
use tidegate::master_target::shared::{DiskShared, Item, TargetShared};
use tidegate::model::{Extent, Marker, PointId, PointKind, Position};
use tidegate::storage::log::service::Append;
use tidegate::storage::{AlignedBuf, uring};
use tidegate::wire::batch::{BatchHeader, push_entry};
use tokio::sync::{Semaphore, mpsc, oneshot};

/// Bytes of each disk.
pub const DISK: u64 = 4 << 30;
/// Bytes of each overwrite.
pub const BLOCK: u64 = 16 << 10;
/// Blocks of one batch: as a process server makes them.
pub const BATCH_BLOCKS: u64 = 16;

/// The disks, by number.
pub const WITH_POINTS: usize = 0;
pub const WITHOUT: usize = 1;

/// Scattered numbers below `bound`, the same in every run.
pub fn scattered(n: u64, bound: u64) -> u64 {
    n.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29).wrapping_mul(0xbf58_476d_1ce4_e5b9).rotate_left(31) % bound
}

/// A disk and what its batches are sealed with.
pub struct Disk {
    pub shared: Arc<DiskShared>,
    prepared: Prepared,
    session: SealingSession,
    sequence: u64,
}

/// The target and its disks.
pub struct Target {
    journal: JournalHandle,
    completions: Completions,
    permits: Arc<Semaphore>,
    pub shared: Arc<TargetShared>,
    pub disks: Vec<Disk>,
    /// To the apply thread.
    pub commands: mpsc::Sender<Command>,
    packer: Packer,
    /// Bytes between the points of the first disk; none with 0.
    pub point_every: u64,
    /// Plain content, of which `random` in every 4096 bytes do not compress.
    content: Vec<u8>,
}

impl Target {
    /// Starts it in `dir` with replicas of a format and the settings of `[apply]`. Of every 4096 bytes `random` do not compress.
    pub fn start(dir: &Path, format: &str, settings: &str, random: usize) -> Self {
        let identity = Identity { role: Role::MasterTarget, name: "dr1".parse().unwrap() };
        if !dir.join("ca").exists() {
            pki::init(&dir.join("ca")).unwrap();
            pki::issue(&dir.join("ca"), &identity, &dir.join("tls")).unwrap();
        }
        let tls = dir.join("tls");
        let machine = |name: &str| format!("[[machine]]\nname = \"{name}\"\n[[machine.disk]]\nname = \"sda\"\nformat = \"{format}\"\n");
        let text = format!(
            "state = \"{}\"\n[tls]\nca = \"{t}/ca.pem\"\ncert = \"{t}/cert.pem\"\nkey = \"{t}/key.pem\"\n[apply]\n{}\n[control]\nlisten = \"unix:/nowhere\"\n{}{}",
            dir.join("state").display(),
            settings,
            machine("with-points"),
            machine("without"),
            t = tls.display()
        );
        let settings: MasterTargetSettings = toml::from_str(&text).unwrap();
        uring::create_dir_durable(&settings.state).unwrap();
        let credentials = Credentials::load(&settings.tls, Role::MasterTarget).unwrap();
        let kek = Arc::new(KeyEncryptionKey::load(&settings.state.join("key"), true).unwrap());
        let records = Records::open(&settings.state).unwrap();
        let (journal, completions, recovered) = journal::open(&settings.state, records.journal_id, &settings.journal).unwrap();
        let disks = settings.machine.iter().flat_map(|m| m.disk.iter().map(|d| Arc::new(DiskShared::new(m, d)))).collect();
        let shared = Arc::new(TargetShared::new(disks, records.book().unwrap(), records.clock().unwrap()));
        let live = LivePolicy::new(settings.retain.policy(), policy::of_configuration(&settings.machine), records.policy().unwrap());
        let (commands, asked) = mpsc::channel(16);
        let setup = apply::Setup {
            settings,
            shared: shared.clone(),
            records,
            policy: Arc::new(live),
            kek,
            verifier: credentials.verifier(),
            journal: journal.clone(),
            found: journal::sort(recovered).0,
        };
        let (opened_tx, opened_rx) = std::sync::mpsc::sync_channel(1);
        std::thread::spawn(move || uring::run(apply::run(setup, asked, opened_tx)).unwrap());
        opened_rx.recv().unwrap();
        let disks = shared.disks.clone().into_iter().map(|shared| {
            let (done, answer) = oneshot::channel();
            let prepare = Command::Prepare { disk: shared.id, size: DISK, done };
            commands.blocking_send(prepare).unwrap_or_else(|_| panic!("the apply thread runs"));
            let prepared = answer.blocking_recv().unwrap().unwrap_or_else(|refusal| panic!("{}", refusal.message));
            let session = SealingSession::start(&prepared.key, Purpose::Stream, shared.id, prepared.generation);
            Disk { shared, prepared, session, sequence: 0 }
        });
        let disks = disks.collect();
        let mut content = vec![0; 8 << 20];
        for (p, page) in content.chunks_mut(4096).enumerate() {
            for (i, word) in page[..random].chunks_mut(8).enumerate() {
                word.copy_from_slice(&scattered((p * 512 + i) as u64 + 1, u64::MAX).to_le_bytes());
            }
        }
        Self {
            journal,
            completions,
            permits: Arc::new(Semaphore::new(64)),
            shared,
            disks,
            packer: Packer::default(),
            point_every: 0,
            commands,
            content,
        }
    }

    /// A sealed batch that writes blocks at `places`, as the journal keeps it; with a marker if it ends with one.
    fn batch(&mut self, disk: usize, places: &[u64], marked: bool) -> (BatchHeader, AlignedBuf, Append<Tag>) {
        let disk = &mut self.disks[disk];
        let mut body = Vec::with_capacity(places.len() * (BLOCK as usize + 16));
        for place in places {
            let at = (scattered(*place + disk.sequence, (self.content.len() as u64 - BLOCK) / 4096) * 4096) as usize;
            body.extend_from_slice(&self.content[at..at + BLOCK as usize]);
        }
        let data_len = body.len() as u32;
        places.iter().for_each(|place| push_entry(&mut body, Extent::new(*place, BLOCK), false));
        let table_end = body.len();
        if marked {
            let marker = Marker {
                point: PointId(uuid::Uuid::from_u128(u128::from(disk.sequence) + 1)),
                machine: disk.shared.machine,
                kind: PointKind::Crash,
                disks: vec![disk.shared.id],
                sizes: vec![DISK],
                label: None,
                wall_ms: disk.sequence as i64,
                hold_us: 0,
                group: None,
                proof: Vec::new(),
                remark: None,
            };
            body.extend(postcard::to_stdvec(&marker).unwrap());
        }
        disk.sequence += 1;
        let mut header = BatchHeader {
            epoch: 1,
            first: disk.sequence,
            last: disk.sequence,
            data_len,
            extents: places.len() as u32,
            marker_len: (body.len() - table_end) as u32,
            ..BatchHeader::new(disk.shared.id, disk.prepared.generation)
        };
        let record = disk.session.seal(&mut header, &body, &mut self.packer);
        let permit = self.permits.clone().try_acquire_owned().unwrap();
        (header, AlignedBuf::copy_of(&body), Append { record, tag: Tag { disk: disk.shared.id, number: 0, permit } })
    }

    /// Journals `places` of a disk, with a marker now and then if it has points; then lets them be applied. MB/s.
    pub fn drain(&mut self, disk: usize, places: &[u64], in_memory: bool) -> f64 {
        let mut items = Vec::new();
        for (n, places) in (1u64..).zip(places.chunks(BATCH_BLOCKS as usize)) {
            let marked = disk == WITH_POINTS && self.point_every > 0 && (n * BATCH_BLOCKS * BLOCK).is_multiple_of(self.point_every);
            let (header, body, append) = self.batch(disk, places, marked);
            self.journal.append_blocking(append).unwrap();
            let (location, _) = self.completions.blocking_recv().unwrap().remove(0).result.unwrap();
            let mut item = Item::recovered(&header, location);
            if in_memory {
                self.shared.body_bytes.fetch_add(body.len() as u64, Ordering::Relaxed);
                item.body = Some((header, body));
            }
            items.push(item);
        }
        let shared = self.disks[disk].shared.clone();
        let end = Position::new(1, self.disks[disk].sequence);
        {
            let mut condition = shared.condition();
            (condition.received, condition.journaled) = (end, end);
        }
        let started = Instant::now();
        items.into_iter().for_each(|item| shared.push(item));
        while shared.condition().checkpointed < end {
            assert!(started.elapsed() < Duration::from_secs(100) && shared.condition().error.is_none(), "{:?}", shared.condition().error);
            std::thread::sleep(Duration::from_millis(1));
        }
        (places.len() as u64 * BLOCK) as f64 / started.elapsed().as_secs_f64() / 1e6
    }
}
