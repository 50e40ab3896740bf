//! Power loss, failing operations, full disks and bit rot against every structure that must survive them: the log (cache
//! and journal), the retention journal with its replica, the dirty map. Seeded; a failure names its seed.
#![allow(clippy::unwrap_used, clippy::disallowed_methods, reason = "tests may unwrap, and wait by the clock")]

mod support;

use std::cell::Cell;
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use support::Rng;
use support::faulty_storage::{Fault, Faulty, FaultyFile};
use tidegate::agent::dirty_map::DirtyMap;
use tidegate::checksum;
use tidegate::crypto::keyring::DataKey;
use tidegate::disk::{Disk, Format, Image};
use tidegate::master_target::apply::roll::fall_back;
use tidegate::master_target::retain::{EARLY_MAX, Gathered, Retention, Subject, View};
use tidegate::model::{DiskId, Extent, Position};
use tidegate::storage::log::format::RECORD_HEADER_LEN;
use tidegate::storage::log::{Location, Log, LogError, Options};
use tidegate::storage::uring::{self, Uring};
use tidegate::storage::{AlignedBuf, File, OpenMode, Storage};
use uuid::Uuid;

fn run<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap().block_on(work)
}

/// Bytes of the disk whose old content version 1 kept.
const SIZE_V1: u64 = 4 << 20;
const DIR: &str = "/log";
const OPTIONS: Options = Options { segment_bytes: 64 << 10, segments_max: 4, body_bytes_max: 20_000 };

fn record(number: u64, len: usize) -> AlignedBuf {
    let mut record = AlignedBuf::with_capacity(RECORD_HEADER_LEN + 8 + len);
    record.pad_to(RECORD_HEADER_LEN);
    record.extend(&number.to_le_bytes());
    record.extend(&vec![number as u8; len]);
    record
}

fn number_of(head: &[u8]) -> u64 {
    u64::from_le_bytes(head[..8].try_into().unwrap())
}

/// The log against a model: what was reported durable is found after any crash, whole, until it was released.
async fn log_round(seed: u64, lying: bool) -> Result<(), String> {
    let mut rng = Rng::new(seed);
    let storage = Faulty::default();
    storage.lying.set(lying);
    let id = Uuid::from_u128(1);
    let mut durable: BTreeMap<u64, Location> = BTreeMap::new();
    let mut next = 1;
    for _life in 0..4 {
        let (log, found) = Log::open(storage.clone(), Path::new(DIR), id, OPTIONS).await.map_err(|e| e.to_string())?;
        let found: HashMap<u64, Location> = found.into_iter().map(|r| (number_of(&r.head), r.location)).collect();
        for number in durable.keys() {
            let location = found.get(number).ok_or_else(|| format!("seed {seed}: record {number} was durable and is gone"))?;
            let bytes = log.read(*location).await.map_err(|e| format!("seed {seed}: record {number}: {e}"))?;
            if number_of(&bytes[RECORD_HEADER_LEN..]) != *number {
                return Err(format!("seed {seed}: record {number} holds something else"));
            }
        }
        // What was never reported may be found too; it is given up as the servers do with what follows a gap.
        for (number, location) in &found {
            if !durable.contains_key(number) {
                log.release(*location);
            }
        }
        durable = durable.keys().map(|n| (*n, found[n])).collect();
        if rng.below(3) == 0 {
            storage.fail_at(rng.below(60), [Fault::Dead, Fault::Full][rng.below(2) as usize]);
        }
        for _ in 0..rng.below(40) {
            let count = 1 + rng.below(4);
            let mut group: Vec<AlignedBuf> = (0..count).map(|i| record(next + i, rng.below(12_000) as usize)).collect();
            match log.append(&mut group).await {
                Ok(places) => durable.extend(places.iter().enumerate().map(|(i, (at, _))| (next + i as u64, *at))),
                Err(LogError::Full) => {
                    let oldest: Vec<u64> = durable.keys().copied().take(5).collect();
                    for number in oldest {
                        log.release(durable.remove(&number).unwrap());
                    }
                }
                Err(_) => break,
            }
            next += count;
        }
        storage.crash(&mut rng);
    }
    Ok(())
}

#[test]
fn the_log_keeps_what_it_reported_durable_over_any_crash() {
    for seed in 0..400 {
        run(log_round(seed, false)).unwrap_or_else(|e| panic!("{e}"));
    }
}

#[test]
fn a_disk_that_ignores_syncs_is_noticed_by_this_test() {
    let noticed = (0..60).filter(|&seed| run(log_round(seed, true)).is_err()).count();
    assert!(noticed > 20, "the crash test must be able to fail: {noticed} of 60");
}

#[test]
fn every_single_failing_operation_leaves_the_log_recoverable() {
    let scenario = |storage: Faulty| async move {
        let (log, found) = Log::open(storage.clone(), Path::new(DIR), Uuid::from_u128(1), OPTIONS).await?;
        found.iter().for_each(|r| log.release(r.location));
        let mut durable = Vec::new();
        for number in 1..=12 {
            durable.extend(log.append(&mut vec![record(number, 9000)]).await?.into_iter().map(|(at, _)| (number, at)));
            if number == 8 {
                for (_, at) in durable.drain(..4) {
                    log.release(at);
                }
            }
        }
        Ok::<_, LogError>(())
    };
    let clean = Faulty::default();
    run(scenario(clean.clone())).unwrap();
    for fault in [Fault::Once, Fault::Dead] {
        for n in 1..=clean.operations() {
            let storage = Faulty::default();
            storage.fail_at(n, fault);
            let _ = run(scenario(storage.clone()));
            storage.crash(&mut Rng::new(n));
            run(scenario(storage)).unwrap_or_else(|e| panic!("after failing operation {n} ({fault:?}) the log does not start: {e}"));
        }
    }
}

#[test]
fn a_failed_sync_closes_the_log_and_is_never_retried() {
    run(async {
        let storage = Faulty::default();
        let (log, _) = Log::open(storage.clone(), Path::new(DIR), Uuid::from_u128(1), OPTIONS).await.unwrap();
        log.append(&mut vec![record(1, 100)]).await.unwrap();
        // The next append writes, then syncs.
        storage.fail_at(2, Fault::Once);
        assert!(matches!(log.append(&mut vec![record(2, 100)]).await, Err(LogError::Closed(_))));
        assert!(matches!(log.append(&mut vec![record(3, 100)]).await, Err(LogError::Closed(_))), "it works again, but must not be used");
    });
}

#[test]
fn bit_rot_in_a_record_is_noticed_when_it_is_read() {
    run(async {
        let storage = Faulty::default();
        let (log, _) = Log::open(storage.clone(), Path::new(DIR), Uuid::from_u128(1), OPTIONS).await.unwrap();
        let (at, _) = log.append(&mut vec![record(1, 5000)]).await.unwrap().remove(0);
        storage.rot(&PathBuf::from(DIR).join("segment-0000000001.tgl"), 4096 + 3000, 3);
        assert!(matches!(log.read(at).await, Err(LogError::Damaged { .. })));
    });
}

/// Sectors that are not given back, and bits that turned, each cost the record they stand in.
#[test]
fn what_is_lost_of_a_log_is_one_record_and_no_other() {
    run(async {
        let segment = PathBuf::from(DIR).join("segment-0000000001.tgl");
        let written = async || {
            let storage = Faulty::default();
            let (log, _) = Log::open(storage.clone(), Path::new(DIR), Uuid::from_u128(1), OPTIONS).await.unwrap();
            for number in 1..=3 {
                // 12 KiB each.
                log.append(&mut vec![record(number, 12_000)]).await.unwrap();
            }
            storage
        };
        let found = async |storage: &Faulty| {
            let opened = Log::open(storage.clone(), Path::new(DIR), Uuid::from_u128(1), OPTIONS).await;
            opened.map(|(_, found)| found.iter().map(|r| number_of(&r.head)).collect::<Vec<_>>())
        };
        const FIRST: usize = 4096;
        const SECOND: usize = FIRST + (12 << 10);
        for at in (SECOND..SECOND + (12 << 10)).step_by(4096) {
            let storage = written().await;
            storage.spoil(&segment, at);
            assert_eq!(found(&storage).await.unwrap(), [1, 3], "an unreadable page at {at}");
            let storage = written().await;
            storage.rot(&segment, at + 100, 2);
            let all_but_padding = if at + 100 < SECOND + 12_072 { vec![1, 3] } else { vec![1, 2, 3] };
            assert_eq!(found(&storage).await.unwrap(), all_but_padding, "a bit at {at}");
        }
        // The header says what the first record says too.
        let storage = written().await;
        storage.spoil(&segment, 0);
        assert_eq!(found(&storage).await.unwrap(), [1, 2, 3]);
        let storage = written().await;
        storage.rot(&segment, 9, 2);
        assert_eq!(found(&storage).await.unwrap(), [1, 2, 3]);
        // So does the second, when the first is gone too; also behind a header that was cleared with its sector.
        let storage = written().await;
        storage.spoil(&segment, 0);
        storage.spoil(&segment, FIRST);
        assert_eq!(found(&storage).await.unwrap(), [2, 3]);
        let storage = written().await;
        let file = storage.open(&segment, OpenMode::Write).await.unwrap();
        file.write_at(0, AlignedBuf::zeroed(4096).freeze()).await.unwrap();
        file.sync_data().await.unwrap();
        assert_eq!(found(&storage).await.unwrap(), [1, 2, 3]);
        storage.spoil(&segment, FIRST);
        assert_eq!(found(&storage).await.unwrap(), [2, 3]);
        // Nothing is left: the file is kept for a person, and its name is free. If it is all there is the disk may be away.
        let gone = |storage: &Faulty| (0..10).for_each(|page| storage.spoil(&segment, page * 4096));
        let storage = written().await;
        gone(&storage);
        let refused = found(&storage).await;
        assert!(matches!(refused, Err(LogError::Io { .. })), "{refused:?}");
        let storage = written().await;
        let (log, _) = Log::open(storage.clone(), Path::new(DIR), Uuid::from_u128(1), OPTIONS).await.unwrap();
        log.append(&mut vec![record(4, 100)]).await.unwrap();
        drop(log);
        gone(&storage);
        assert_eq!(found(&storage).await.unwrap(), [4]);
        assert!(storage.file_len(&segment.with_file_name("unreadable-segment-0000000001.tgl")).is_some());
        // Not bad sectors any more but a disk that fails: nothing is given up.
        let large = Options { segment_bytes: 2 << 20, ..OPTIONS };
        let storage = Faulty::default();
        let (log, _) = Log::open(storage.clone(), Path::new(DIR), Uuid::from_u128(1), large).await.unwrap();
        log.append(&mut vec![record(1, 100)]).await.unwrap();
        (2..100).for_each(|page| storage.spoil(&segment, page * 4096));
        let refused = Log::open(storage.clone(), Path::new(DIR), Uuid::from_u128(1), large).await.map(|_| ());
        assert!(matches!(refused, Err(LogError::Io { .. })), "{refused:?}");
    });
}

#[test]
fn a_log_of_another_server_is_refused_by_name() {
    run(async {
        let storage = Faulty::default();
        let (log, _) = Log::open(storage.clone(), Path::new(DIR), Uuid::from_u128(1), OPTIONS).await.unwrap();
        log.append(&mut vec![record(1, 100)]).await.unwrap();
        let other = Log::open(storage, Path::new(DIR), Uuid::from_u128(2), OPTIONS).await.map(|_| ());
        assert!(matches!(other, Err(LogError::Foreign { .. })));
    });
}

// ---- replica and retention journal together, as the apply thread uses them

const SIZE: u64 = 8 << 20;

struct Site {
    storage: Faulty,
    format: Format,
    /// What the catalogue would hold: durable with each checkpoint.
    last_marker: Option<Position>,
    epoch: u64,
    checkpoint: usize,
    /// Points of the durable checkpoint, and the content each must have.
    points: Vec<(Position, Vec<u8>)>,
    merges: u64,
}

enum Step {
    Write(u64, Vec<u8>),
    Zero(Extent),
    Mark,
}

fn subject() -> Subject {
    Subject { disk: DiskId(Uuid::from_u128(5)), generation: 1, key: DataKey::from_bytes([3; 32]) }
}

impl Site {
    async fn open(&self) -> Result<(Image<support::faulty_storage::FaultyFile>, Retention<Faulty>), String> {
        let image = Image::open(&self.storage, Path::new("/r/image"), self.format).await.map_err(|e| e.to_string())?;
        let retention =
            Retention::open(self.storage.clone(), Path::new("/u"), subject(), self.last_marker).await.map_err(|e| e.to_string())?;
        Ok((image, retention))
    }

    /// Applies the steps from the durable checkpoint on, with a checkpoint now and then, as after every restart.
    async fn apply(&mut self, steps: &[Step], rng: &mut Rng) -> Result<(), String> {
        let text = |e: &dyn std::fmt::Display| e.to_string();
        let (image, retention) = self.open().await?;
        // What the disk must hold at the checkpoint is known from the steps alone.
        let mut model = content_after(steps, self.checkpoint);
        let mut pending = Vec::new();
        for (index, step) in steps.iter().enumerate().skip(self.checkpoint) {
            match step {
                Step::Write(offset, data) => {
                    let extent = Extent::new(*offset, data.len() as u64);
                    retention.preserve(&image, [extent].into_iter()).await.map_err(|e| text(&e))?;
                    image.write(*offset, AlignedBuf::copy_of(data).freeze()).await.map_err(|e| text(&e))?;
                    model[*offset as usize..*offset as usize + data.len()].copy_from_slice(data);
                }
                Step::Zero(extent) => {
                    retention.preserve(&image, [*extent].into_iter()).await.map_err(|e| text(&e))?;
                    image.zero(*extent).await.map_err(|e| text(&e))?;
                    model[extent.offset as usize..extent.end() as usize].fill(0);
                }
                Step::Mark => {
                    let at = Position::new(self.epoch, index as u64 + 1);
                    retention.begin(at).await.map_err(|e| text(&e))?;
                    pending.push((at, model.clone()));
                }
            }
            if rng.below(4) == 0 {
                image.barrier().await.map_err(|e| text(&e))?;
                self.checkpoint = index + 1;
                self.last_marker = pending.last().map(|(at, _)| *at).or(self.last_marker);
                self.points.append(&mut pending);
                // Like the policy: the oldest goes now and then, unlisted before its data is removed.
                if self.points.len() > 4 {
                    let which = rng.below(self.points.len() as u64) as usize;
                    self.points.remove(which);
                    retention.forget_before(self.points.first().map(|(at, _)| *at)).map_err(|e| text(&e))?;
                    let needed = self.points.iter().map(|(at, _)| *at).collect();
                    while retention.merge_some(&needed, self.last_marker, async |_| true).await.map_err(|e| text(&e))? {
                        self.merges += 1;
                    }
                }
            }
        }
        Ok(())
    }

    /// Every point of the durable checkpoint must be exact, whatever the replica went through since.
    async fn verify(&self, seed: u64) -> Result<(), String> {
        let (image, retention) = self.open().await.map_err(|e| format!("seed {seed}: {e}"))?;
        self.compare(&image, &retention, seed).await
    }

    async fn compare(&self, image: &Image<FaultyFile>, retention: &Retention<Faulty>, seed: u64) -> Result<(), String> {
        for (at, expected) in &self.points {
            let view = retention.view(*at).await.map_err(|e| format!("seed {seed}: point {at}: {e}"))?;
            let found = view.read(image, Extent::new(0, SIZE)).await.map_err(|e| format!("seed {seed}: point {at}: {e}"))?;
            if found[..] != expected[..] {
                let first = found.iter().zip(expected).position(|(a, b)| a != b).unwrap_or(0);
                return Err(format!("seed {seed}: point {at} differs at byte {first}"));
            }
        }
        Ok(())
    }
}

/// Reads as another thread has it: some records are handed over as they were read, and opened there. Also, how many times.
async fn read_elsewhere(view: &View<Faulty>, image: &Image<FaultyFile>, extent: Extent) -> (Result<Bytes, String>, usize) {
    let (gathered, times) = (Cell::new(Some(Gathered::of(extent))), Cell::new(0));
    let failed = Cell::new(false);
    let early = |portions: Vec<_>| {
        times.set(times.get() + 1);
        let mut all = gathered.take().unwrap();
        portions.into_iter().for_each(|portion| failed.set(all.add(portion).is_err() || failed.get()));
        gathered.set(Some(all));
    };
    let rest = view.read_for(image, extent, Some(&early)).await;
    assert!(times.get() <= EARLY_MAX, "those who take them have no more room");
    let handed = times.get();
    let read = match rest {
        Err(error) => Err(error.to_string()),
        Ok(_) if failed.get() => Err("a record does not open".to_owned()),
        Ok(rest) => {
            early(rest);
            Ok(gathered.take().unwrap().finish().unwrap())
        }
    };
    (read, handed)
}

fn content_after(steps: &[Step], count: usize) -> Vec<u8> {
    let mut model = vec![0; SIZE as usize];
    for step in &steps[..count] {
        match step {
            Step::Write(offset, data) => model[*offset as usize..*offset as usize + data.len()].copy_from_slice(data),
            Step::Zero(extent) => model[extent.offset as usize..extent.end() as usize].fill(0),
            Step::Mark => {}
        }
    }
    model
}

fn make_steps(rng: &mut Rng) -> Vec<Step> {
    (0..60)
        .map(|n| {
            // A small hot area, so that blocks are overwritten again and again.
            let sectors = (SIZE / 512).min(2048);
            let offset = rng.below(sectors) * 512 + rng.below(3) * (2 << 20);
            let len = (1 + rng.below(100)) * 512;
            match rng.below(10) {
                0..=1 => Step::Mark,
                2 => Step::Zero(Extent::new(offset / 4096 * 4096, (len * 40).min(SIZE - offset))),
                _ => Step::Write(offset, vec![n as u8 + 1; len as usize]),
            }
        })
        .collect()
}

/// The number of merges.
async fn retention_round(seed: u64, format: Format, lying: bool) -> Result<u64, String> {
    let mut rng = Rng::new(seed);
    let steps = make_steps(&mut rng);
    let storage = Faulty::default();
    Image::create(&storage, Path::new("/r/image"), format, SIZE).await.map_err(|e| e.to_string())?;
    storage.lying.set(lying);
    let mut site = Site { storage: storage.clone(), format, last_marker: None, epoch: 1, checkpoint: 0, points: Vec::new(), merges: 0 };
    for _life in 0..5 {
        let fault = rng.below(3);
        if fault < 2 {
            storage.fail_at(rng.below(400), [Fault::Dead, Fault::Full][fault as usize]);
        }
        let _ = site.apply(&steps, &mut rng).await;
        storage.crash(&mut rng);
        site.verify(seed).await?;
        // A second crash right after recovery must change nothing.
        storage.crash(&mut rng);
    }
    site.apply(&steps, &mut rng).await.map_err(|e| format!("seed {seed}: the last life has no faults: {e}"))?;
    site.verify(seed).await?;
    Ok(site.merges)
}

#[test]
fn every_listed_point_stays_exact_over_any_crash() {
    for format in [Format::Vhdx, Format::Raw] {
        let mut merges = 0;
        for seed in 0..80 {
            merges += run(retention_round(seed, format, false)).unwrap_or_else(|e| panic!("{format:?}: {e}"));
        }
        assert!(merges > 200, "{merges} merges of intervals whose points were dropped from the middle");
    }
}

/// After each crash the journal has lost what was applied behind the checkpoint: another stream begins, which compares, and sends
/// again, all of the disk. How often a checkpoint was left half done.
async fn loss_round(seed: u64, format: Format, falls_back: bool) -> Result<u64, String> {
    let text = |e: &dyn std::fmt::Display| e.to_string();
    let (mut rng, mut times) = (Rng::new(seed), 0);
    let storage = Faulty::default();
    Image::create(&storage, Path::new("/r/image"), format, SIZE).await.map_err(|e| text(&e))?;
    let mut site = Site { storage: storage.clone(), format, last_marker: None, epoch: 0, checkpoint: 0, points: Vec::new(), merges: 0 };
    for life in 1..=4 {
        let chunk = 256 << 10;
        let whole = (0..SIZE / chunk).map(|n| Step::Write(n * chunk, vec![(life * 50 + n) as u8; chunk as usize]));
        let steps: Vec<Step> = whole.chain(make_steps(&mut rng)).collect();
        (site.epoch, site.checkpoint) = (life, 0);
        storage.fail_at(20 + rng.below(500), Fault::Dead);
        let _ = site.apply(&steps, &mut rng).await;
        storage.crash(&mut rng);
        site.verify(seed).await?;
        let mut stands = Position::new(site.epoch, site.checkpoint as u64);
        loop {
            let (image, retention) = site.open().await?;
            if !falls_back || !retention.is_ahead_of(stands) {
                break;
            }
            times += 1;
            stands = site.last_marker.unwrap_or_default();
            fall_back(&image, &retention, site.last_marker).await.map_err(|e| text(&e))?;
            // Power goes again before what was kept is removed, or in the middle of that: the next start does the same again.
            match rng.below(3) {
                0 => {}
                1 => {
                    storage.fail_at(1 + rng.below(7), Fault::Dead);
                    let _ = retention.drop_from(stands);
                }
                _ => {
                    retention.drop_from(stands).map_err(|e| text(&e))?;
                    // Whoever looked before must not look for what is gone.
                    site.compare(&image, &retention, seed).await?;
                    break;
                }
            }
            storage.crash(&mut rng);
            site.verify(seed).await?;
        }
        storage.crash(&mut rng);
        site.verify(seed).await?;
    }
    Ok(times)
}

#[test]
fn a_checkpoint_that_can_never_be_finished_leaves_every_point_exact() {
    for format in [Format::Vhdx, Format::Raw] {
        let times: u64 = (0..20).map(|seed| run(loss_round(seed, format, true)).unwrap_or_else(|e| panic!("{format:?}: {e}"))).sum();
        assert!(times > 8, "{times} checkpoints were left half done behind a marker");
    }
    let noticed = (0..60).any(|seed| run(loss_round(seed, Format::Raw, false)).is_err());
    assert!(noticed, "this test must be able to fail: without going back to the last point a wrong one is shown");
}

#[test]
fn lost_old_content_is_noticed_by_this_test() {
    let noticed = (0..20).filter(|&seed| run(retention_round(seed, Format::Raw, true)).is_err()).count();
    assert!(noticed > 5, "the crash test must be able to fail: {noticed} of 20");
}

/// Views that stay open while the replica is written, intervals are closed, points are dropped and merged: each shows its
/// point all the while, and data is never where it says there is none.
async fn views_round(seed: u64) -> (u64, u64, u64) {
    let (mut rng, mut merges, mut checked, mut elsewhere) = (Rng::new(seed), 0, 0, 0);
    let storage = Faulty::default();
    let image = Image::create(&storage, Path::new("/r/image"), Format::Raw, SIZE).await.unwrap();
    let retention = Retention::open(storage.clone(), Path::new("/u"), subject(), None).await.unwrap();
    let mut model = vec![0u8; SIZE as usize];
    let mut points: BTreeMap<Position, Vec<u8>> = BTreeMap::new();
    let mut views = Vec::new();
    let steps: Vec<Step> = (0..3).flat_map(|_| make_steps(&mut rng)).collect();
    for (index, step) in steps.iter().enumerate() {
        let at = Position::new(1, index as u64 + 1);
        match step {
            Step::Write(offset, data) => {
                let extent = Extent::new(*offset, data.len() as u64);
                retention.preserve(&image, [extent].into_iter()).await.unwrap();
                image.write(*offset, AlignedBuf::copy_of(data).freeze()).await.unwrap();
                model[*offset as usize..extent.end() as usize].copy_from_slice(data);
            }
            Step::Zero(extent) => {
                retention.preserve(&image, [*extent].into_iter()).await.unwrap();
                image.zero(*extent).await.unwrap();
                model[extent.offset as usize..extent.end() as usize].fill(0);
            }
            Step::Mark => {
                retention.begin(at).await.unwrap();
                points.insert(at, model.clone());
            }
        }
        if rng.below(4) == 0 && !points.is_empty() {
            let which = *points.keys().nth(rng.below(points.len() as u64) as usize).unwrap();
            views.push((which, retention.view(which).await.unwrap()));
            if views.len() > 4 {
                views.remove(rng.below(4) as usize);
            }
        }
        if rng.below(3) == 0 && points.len() > 3 {
            // Points that are looked at are pinned.
            let free: Vec<Position> = points.keys().filter(|p| views.iter().all(|(v, _)| v != *p)).copied().collect();
            if let Some(gone) = free.get(rng.below(free.len().max(1) as u64) as usize) {
                points.remove(gone);
            }
            retention.forget_before(points.keys().next().copied()).unwrap();
            let needed = points.keys().copied().collect();
            let last = steps[..=index].iter().rposition(|s| matches!(s, Step::Mark)).map(|i| Position::new(1, i as u64 + 1));
            while retention.merge_some(&needed, last, async |_| true).await.unwrap() {
                merges += 1;
            }
        }
        // All of them at once, and of one of them twice.
        let mut wanted = |(point, view)| {
            let len = (1 + rng.below(3000)) * 512;
            (point, view, Extent::new(rng.below((SIZE - len) / 512) * 512, len))
        };
        let wanted: Vec<_> = views.iter().chain(views.first()).map(|(point, view)| wanted((point, view))).collect();
        let reads = wanted.iter().map(|(_, view, extent)| view.read(&image, *extent));
        for ((point, view, extent), found) in wanted.iter().zip(futures_util::future::join_all(reads).await) {
            let offset = extent.offset;
            let expected = &points[*point][offset as usize..extent.end() as usize];
            assert!(found.unwrap()[..] == *expected, "seed {seed}: step {index}: point {point} differs");
            let next = view.next_data(&image, offset).unwrap().map_or(SIZE, |e| e.offset);
            assert!(points[*point][offset as usize..next as usize].iter().all(|&b| b == 0), "seed {seed}: step {index}: data was skipped");
            checked += 1;
        }
        // One of them as another thread has it.
        if let Some((point, view, extent)) = wanted.last() {
            let (found, handed) = read_elsewhere(view, &image, *extent).await;
            let expected = &points[*point][extent.offset as usize..extent.end() as usize];
            assert!(found.unwrap()[..] == *expected, "seed {seed}: step {index}: point {point} differs elsewhere");
            elsewhere += u64::from(handed > 0);
        }
    }
    (merges, checked, elsewhere)
}

#[test]
fn open_views_stay_exact_while_everything_else_goes_on() {
    let (mut merges, mut checked, mut elsewhere) = (0, 0, 0);
    for seed in 0..60 {
        let (m, c, e) = run(views_round(seed));
        (merges, checked, elsewhere) = (merges + m, checked + c, elsewhere + e);
    }
    assert!(merges > 200 && checked > 10_000 && elsewhere > 200, "{merges} merges, {checked} reads, {elsewhere} in two places");
}

/// A point whose old content is one record of sevens, by now eights in the replica; and where the record stands.
async fn one_record() -> (Faulty, Image<FaultyFile>, Retention<Faulty>, PathBuf) {
    let storage = Faulty::default();
    let image = Image::create(&storage, Path::new("/r/image"), Format::Raw, SIZE).await.unwrap();
    image.write(0, Bytes::from(vec![7; 65536])).await.unwrap();
    let retention = Retention::open(storage.clone(), Path::new("/u"), subject(), None).await.unwrap();
    retention.begin(Position::new(1, 1)).await.unwrap();
    retention.preserve(&image, [Extent::new(0, 65536)].into_iter()).await.unwrap();
    image.write(0, Bytes::from(vec![8; 65536])).await.unwrap();
    let file = Path::new("/u").join(storage.list(Path::new("/u")).unwrap().remove(0));
    (storage, image, retention, file)
}

#[test]
fn rot_in_old_content_is_an_error_and_never_other_content() {
    run(async {
        let (storage, image, retention, file) = one_record().await;
        let view = retention.view(Position::new(1, 1)).await.unwrap();
        assert_eq!(view.read(&image, Extent::new(0, 4096)).await.unwrap()[..], [7; 4096]);
        storage.rot(&file, 4096 + 300, 1);
        let view = retention.view(Position::new(1, 1)).await.unwrap();
        assert!(view.read(&image, Extent::new(0, 4096)).await.is_err());
    });
}

/// The seal does not cover what stands around it. Content is right without it, but the record would not be found when the index is lost.
#[test]
fn rot_around_a_record_is_told_while_its_content_can_still_be_read() {
    run(async {
        let (storage, image, retention, file) = one_record().await;
        retention.begin(Position::new(1, 2)).await.unwrap();
        assert!(retention.inspect(Position::new(1, 1), async |_| {}).await.unwrap().is_none());
        // In its checksum.
        storage.rot(&file, 4096 + 5, 1);
        let view = retention.view(Position::new(1, 1)).await.unwrap();
        assert_eq!(view.read(&image, Extent::new(0, 4096)).await.unwrap()[..], [7; 4096]);
        assert!(retention.inspect(Position::new(1, 1), async |_| {}).await.unwrap().is_some());
    });
}

/// How scattered blocks lie on a disk, and how long they are: each gets a record of its own.
const SPACING: u64 = 64 << 10;
const LEN: u64 = 16 << 10;

fn scattered(blocks: u64) -> impl Iterator<Item = Extent> {
    (0..blocks).map(|n| Extent::new(n * SPACING, LEN))
}

/// An image that holds noise there.
async fn noisy(storage: &Faulty, blocks: u64) -> Image<FaultyFile> {
    let image = Image::create(storage, Path::new("/r/image"), Format::Raw, blocks * SPACING).await.unwrap();
    for extent in scattered(blocks) {
        let noise: Vec<u8> = (0..LEN).map(|i| (i.wrapping_mul(extent.offset + 77) >> 5) as u8).collect();
        image.write(extent.offset, Bytes::from(noise)).await.unwrap();
    }
    image
}

/// Small records of scattered blocks stand close: rot in one costs that one, also when the index is gone and they are looked for.
#[test]
fn rot_in_one_of_many_records_is_told_from_the_others() {
    const BLOCKS: u64 = 30;
    for sector in 0..BLOCKS * 2 {
        for without_index in [false, true] {
            run(async {
                let storage = Faulty::default();
                let extents = || scattered(BLOCKS);
                let image = noisy(&storage, BLOCKS).await;
                let old = image.read(Extent::new(0, BLOCKS * SPACING)).await.unwrap();
                let retention = Retention::open(storage.clone(), Path::new("/u"), subject(), None).await.unwrap();
                retention.begin(Position::new(1, 1)).await.unwrap();
                retention.preserve(&image, extents()).await.unwrap();
                for extent in extents() {
                    image.write(extent.offset, Bytes::from(vec![9; LEN as usize])).await.unwrap();
                }
                retention.begin(Position::new(1, 2)).await.unwrap();
                drop(retention);
                let path = Path::new("/u").join(&storage.list(Path::new("/u")).unwrap()[0]);
                let file = storage.open(&path, OpenMode::Read).await.unwrap();
                let header = file.read_at(0, 4096).await.unwrap();
                let index_at = u64::from_le_bytes(header[32..40].try_into().unwrap());
                let rotten = 4096 + sector * 512 + 100;
                if rotten >= index_at {
                    return;
                }
                storage.rot(&path, rotten as usize, 1);
                if without_index {
                    storage.rot(&path, index_at as usize + 70, 1);
                }
                let retention = Retention::open(storage.clone(), Path::new("/u"), subject(), Some(Position::new(1, 2))).await.unwrap();
                let view = match retention.view(Position::new(1, 1)).await {
                    Ok(view) => view,
                    Err(error) => return assert!(without_index && error.damaged_interval().is_some(), "{error}"),
                };
                let mut damaged = 0;
                for extent in extents() {
                    match view.read(&image, extent).await {
                        Ok(found) => {
                            assert!(found[..] == old[extent.offset as usize..extent.end() as usize], "other content at {extent:?}")
                        }
                        Err(_) => damaged += 1,
                    }
                }
                assert_eq!(damaged, 1, "sector {sector}: every record but one is whole");
                // The same of reads that are under way together, of many records each.
                let view = retention.view(Position::new(1, 1)).await.unwrap();
                let large = (0..3).map(|n| Extent::new(n * 10 * SPACING, 10 * SPACING));
                let found = futures_util::future::join_all(large.map(|extent| view.read(&image, extent))).await;
                for (n, found) in found.iter().enumerate().filter_map(|(n, found)| Some((n, found.as_ref().ok()?))) {
                    let at = n * 10 * SPACING as usize;
                    assert!(found[..] == old[at..at + found.len()], "sector {sector}: other content in part {n}");
                }
                assert_eq!(found.iter().filter(|found| found.is_err()).count(), 1);
                // And of reads whose records are opened in two places.
                let view = retention.view(Position::new(1, 1)).await.unwrap();
                let mut failed = 0;
                for at in (0..3).map(|n| n * 10 * SPACING) {
                    let (found, handed) = read_elsewhere(&view, &image, Extent::new(at, 10 * SPACING)).await;
                    assert!(handed > 0, "half of ten records are handed over");
                    match found {
                        Ok(found) => assert!(found[..] == old[at as usize..at as usize + found.len()], "sector {sector}: other content"),
                        Err(_) => failed += 1,
                    }
                }
                assert_eq!(failed, 1, "sector {sector}");
                assert!(!without_index, "nobody knows what the record had");
                let loss = retention.inspect(Position::new(1, 1), async |_| {}).await.unwrap().unwrap();
                assert_eq!(retention.needing(&loss, &[(Position::new(1, 1), BLOCKS * SPACING)]).await.len(), 1);
            });
        }
    }
}

/// A crash cuts off a run anywhere in it: what comes later is found again, over another start.
#[test]
fn a_run_that_a_crash_cut_off_is_no_hole_in_what_follows() {
    const BLOCKS: u64 = 12;
    for sector in (0..).step_by(7) {
        let over = run(async {
            let storage = Faulty::default();
            let extents = || scattered(BLOCKS);
            let image = noisy(&storage, BLOCKS).await;
            let old = image.read(Extent::new(0, BLOCKS * SPACING)).await.unwrap();
            let open = async || Retention::open(storage.clone(), Path::new("/u"), subject(), Some(Position::new(1, 1))).await.unwrap();
            let retention = open().await;
            retention.preserve(&image, extents()).await.unwrap();
            let whole = retention.bytes();
            drop(retention);
            let path = Path::new("/u").join(&storage.list(Path::new("/u")).unwrap()[0]);
            let at = 4096 + sector * 512;
            if at >= 150 << 10 {
                return true;
            }
            storage.rot(&path, at, 3);
            // Nothing was overwritten yet: the checkpoint is done again.
            let retention = open().await;
            retention.preserve(&image, extents()).await.unwrap();
            assert!(retention.bytes() <= 2 * whole);
            for extent in extents() {
                image.write(extent.offset, Bytes::from(vec![9; LEN as usize])).await.unwrap();
            }
            for _start in 0..2 {
                let retention = open().await;
                let view = retention.view(Position::new(1, 1)).await.unwrap();
                for extent in extents() {
                    let found = view.read(&image, extent).await.unwrap();
                    assert!(
                        found[..] == old[extent.offset as usize..extent.end() as usize],
                        "sector {sector}: other content at {extent:?}"
                    );
                }
            }
            false
        });
        if over {
            break;
        }
    }
}

/// The same behind the checkpoint, with a point that was opened before the checkpoint is done again, in other pieces.
#[test]
fn a_point_opened_before_a_checkpoint_is_done_again_reads_no_other_content() {
    const BLOCKS: u64 = 12;
    for sector in (0..300).step_by(7) {
        run(async {
            let storage = Faulty::default();
            let image = noisy(&storage, BLOCKS).await;
            let old = image.read(Extent::new(0, BLOCKS * SPACING)).await.unwrap();
            let open = async || Retention::open(storage.clone(), Path::new("/u"), subject(), None).await.unwrap();
            let retention = open().await;
            retention.begin(Position::new(1, 1)).await.unwrap();
            retention.preserve(&image, scattered(BLOCKS)).await.unwrap();
            drop(retention);
            let path = Path::new("/u").join(&storage.list(Path::new("/u")).unwrap()[0]);
            storage.rot(&path, 4096 + sector * 512, 3);
            let retention = open().await;
            let view = retention.view(Position::new(1, 0)).await.unwrap();
            retention.begin(Position::new(1, 1)).await.unwrap();
            for half in [BLOCKS / 2..BLOCKS, 0..BLOCKS / 2] {
                let extents = || scattered(BLOCKS).filter(|e| half.contains(&(e.offset / SPACING)));
                retention.preserve(&image, extents()).await.unwrap();
                for extent in extents() {
                    image.write(extent.offset, Bytes::from(vec![9; LEN as usize])).await.unwrap();
                }
            }
            for extent in scattered(BLOCKS) {
                let found = view.read(&image, extent).await.unwrap();
                let expected = &old[extent.offset as usize..extent.end() as usize];
                assert!(found[..] == *expected, "sector {sector}: other content at {extent:?}");
            }
        });
    }
}

/// Files of version 1, in which each record stands at a page: `tests/golden/undo_v1`, a closed interval and one that grew.
#[test]
fn what_version_1_kept_is_read_and_gone_on_with() {
    const BLOCK: u64 = 4096;
    let dir = tempfile::tempdir().unwrap();
    let undo = dir.path().join("undo");
    std::fs::create_dir(&undo).unwrap();
    for file in std::fs::read_dir("tests/golden/undo_v1").unwrap().map(Result::unwrap) {
        std::fs::copy(file.path(), undo.join(file.file_name())).unwrap();
    }
    let position = |n| Position::new(1, n);
    let filled = |blocks: u64, byte: u8| AlignedBuf::copy_of(&vec![byte; (blocks * BLOCK) as usize]).freeze();
    // The disk held in each block its number, up to the 512th; each interval then overwrote something.
    let first = |block: u64| if block < 512 { (block % 200) as u8 } else { 0 };
    let overwritten = |block: u64| (block < 200 && block % 10 < 2) || (300..340).contains(&block) || (600..602).contains(&block);
    let second = |block: u64| if overwritten(block) { 201 } else { first(block) };
    let third = |block: u64| match block {
        0..40 => 202,
        400..420 => 203,
        _ => second(block),
    };
    let open = async || Retention::open(Uring::direct(), &undo, subject(), Some(position(2))).await.unwrap();
    uring::run(async {
        let image = Image::create(&Uring::direct(), &dir.path().join("image"), Format::Raw, SIZE_V1).await.unwrap();
        for block in 0..SIZE_V1 / BLOCK {
            image.write(block * BLOCK, filled(1, third(block))).await.unwrap();
        }
        let check = async |retention: &Retention<Uring>, at: u64, expected: &dyn Fn(u64) -> u8| {
            let view = retention.view(position(at)).await.unwrap();
            for block in 0..SIZE_V1 / BLOCK {
                let found = view.read(&image, Extent::new(block * BLOCK, BLOCK)).await.unwrap();
                assert!(found.iter().all(|&b| b == expected(block)), "point {at}, block {block}: {} for {}", found[0], expected(block));
            }
        };
        let retention = open().await;
        check(&retention, 1, &first).await;
        check(&retention, 2, &second).await;
        // The one that grew goes on growing, over restarts; an older program is told that it is not its own any more.
        let grew = undo.join("undo-0000000000000001-0000000000000002.tgu");
        assert_eq!(std::fs::read(&grew).unwrap()[..8], *b"TGUNDO\0\x02");
        retention.preserve(&image, [Extent::new(700 * BLOCK, 30 * BLOCK)].into_iter()).await.unwrap();
        image.write(700 * BLOCK, filled(30, 204)).await.unwrap();
        check(&retention, 2, &second).await;
        drop(retention);
        let retention = open().await;
        check(&retention, 1, &first).await;
        check(&retention, 2, &second).await;
        retention.begin(position(3)).await.unwrap();
        retention.preserve(&image, [Extent::new(0, 900 * BLOCK)].into_iter()).await.unwrap();
        image.write(0, filled(900, 205)).await.unwrap();
        for at in [1, 2] {
            assert!(retention.inspect(position(at), async |_| {}).await.unwrap().is_none(), "interval {at} is whole");
        }
        // Merged with one of the present version.
        retention.begin(position(4)).await.unwrap();
        let needed = [position(1), position(3)].into();
        assert!(retention.merge_some(&needed, Some(position(4)), async |_| true).await.unwrap());
        check(&retention, 1, &first).await;
        let new = |block: u64| if (700..730).contains(&block) { 204 } else { third(block) };
        check(&retention, 3, &new).await;
        drop(retention);
        // A version that nobody knows yet is refused by name, and nothing is done with it.
        let mut next =
            std::fs::read(&grew).unwrap_or_else(|_| std::fs::read(undo.join("undo-0000000000000001-0000000000000003.tgu")).unwrap());
        next[7] = 3;
        let crc = checksum::crc32c(&next[..40]);
        next[40..44].copy_from_slice(&crc.to_le_bytes());
        let path = undo.join("undo-0000000000000001-0000000000000004.tgu");
        std::fs::write(&path, &next).unwrap();
        let refused = Retention::open(Uring::direct(), &undo, subject(), Some(position(4))).await.err().unwrap();
        assert!(refused.to_string().contains("has version 3") && refused.damaged_interval().is_none(), "{refused}");
        assert!(std::fs::read(&path).unwrap() == next);
    })
    .unwrap();
}

#[test]
fn a_vhdx_opens_after_a_crash_at_any_instant() {
    for seed in 0..40 {
        run(async {
            let mut rng = Rng::new(seed);
            let storage = Faulty::default();
            let path = Path::new("/r/image");
            let image = Image::create(&storage, path, Format::Vhdx, 64 << 20).await.unwrap();
            let mut durable = vec![0u8; 64 << 20];
            let mut live = durable.clone();
            for n in 0..rng.below(60) {
                let offset = rng.below((64 << 20) / 4096 - 64) * 4096;
                match rng.below(6) {
                    0 => {
                        image.barrier().await.unwrap();
                        durable = live.clone();
                    }
                    1 => {
                        let extent = Extent::new(offset / (2 << 20) * (2 << 20), 2 << 20);
                        image.zero(extent).await.unwrap();
                        live[extent.offset as usize..extent.end() as usize].fill(0);
                    }
                    _ => {
                        let data = vec![n as u8 + 1; 4096 * (1 + rng.below(60) as usize)];
                        image.write(offset, Bytes::from(data.clone())).await.unwrap();
                        live[offset as usize..offset as usize + data.len()].copy_from_slice(&data);
                    }
                }
            }
            storage.crash(&mut rng);
            let image = Image::open(&storage, path, Format::Vhdx).await.unwrap_or_else(|e| panic!("seed {seed}: {e}"));
            // Each block holds what the barrier made durable or something written after it, never anything else.
            let found = image.read(Extent::new(0, 64 << 20)).await.unwrap();
            for (index, block) in found.chunks(512).enumerate() {
                let at = index * 512;
                let legal =
                    block == &durable[at..at + 512] || block == &live[at..at + 512] || block.iter().all(|&b| b == block[0] && b <= 61);
                assert!(legal, "seed {seed}: byte {at} holds foreign content");
            }
        });
    }
}

// ---- dirty map

#[test]
fn a_region_is_marked_after_a_crash_if_its_mark_was_awaited() {
    for seed in 0..300 {
        run(async {
            let mut rng = Rng::new(seed);
            let storage = Faulty::default();
            let (disk, path, regions) = (DiskId(Uuid::from_u128(1)), Path::new("/a/map"), 9000);
            let map = DirtyMap::open(&storage, path, disk, regions << 20, 1 << 20, 7).await.unwrap();
            map.clear(&(0..regions).collect::<Vec<_>>()).await.unwrap();
            let mut marked = std::collections::BTreeSet::new();
            let mut epoch = map.header().epoch;
            let mut map = map;
            for _life in 0..3 {
                for _ in 0..rng.below(30) {
                    let region = rng.below(regions - 2);
                    if rng.below(4) == 0 {
                        let some: Vec<u64> = marked.iter().copied().take(3).collect();
                        map.clear(&some).await.unwrap();
                        marked.retain(|r| !some.contains(r));
                    } else {
                        map.mark(region..=region + 1).await.unwrap();
                        marked.extend([region, region + 1]);
                    }
                }
                storage.crash(&mut rng);
                map = DirtyMap::open(&storage, path, disk, regions << 20, 1 << 20, 7).await.unwrap();
                let found = map.marked();
                assert!(marked.iter().all(|r| found.contains(*r)), "seed {seed}: a mark was lost");
                assert!(map.header().epoch > epoch, "seed {seed}: the epoch must grow with every start");
                epoch = map.header().epoch;
                marked = found.iter().collect();
            }
        });
    }
}
