//! Every operation of every storage scenario fails once, or from then on, or for want of space; then power goes; and power goes
//! again while that is recovered. Whatever was reported durable is there, and recovering twice finds the same as once.
#![allow(clippy::unwrap_used, clippy::disallowed_methods, reason = "tests may unwrap, and wait by the clock")]

mod support;

use std::cell::RefCell;
use std::collections::hash_map::DefaultHasher;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use support::Rng;
use support::faulty_storage::{Fault, Faulty, FaultyFile};
use tidegate::agent::dirty_map::DirtyMap;
use tidegate::crypto::keyring::DataKey;
use tidegate::disk::{Disk, Format, Image};
use tidegate::master_target::apply::roll::{Progress, bring_back};
use tidegate::master_target::retain::{RetainError, Retention, Subject};
use tidegate::model::{DiskId, Extent, Position};
use tidegate::storage::AlignedBuf;
use tidegate::storage::log::format::RECORD_HEADER_LEN;
use tidegate::storage::log::{Location, Log, LogError, Options};
use tidegate::storage::uring::is_full;
use uuid::Uuid;

const FAULTS: [Fault; 3] = [Fault::Once, Fault::Dead, Fault::Full];
/// About so many crashes inside of the recovery of each case.
const SECOND_CRASHES: u64 = 2;

fn run<T>(work: impl Future<Output = T>) -> T {
    // Where a log waits before it reads once more, nobody has to wait.
    tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap().block_on(work)
}

/// Why a scenario ended early.
#[derive(Debug)]
enum Trouble {
    /// The storage failed, and it was said.
    Storage(#[allow(dead_code, reason = "shown when a test fails")] String),
    /// A promise was broken.
    Broken(String),
}

fn storage(error: impl std::fmt::Display) -> Trouble {
    Trouble::Storage(error.to_string())
}

/// A structure, what is done with it, and what it promised so far.
trait Scenario: Clone {
    /// What the operations are counted in. Goes on from what was recovered, if power went before.
    async fn work(&mut self, storage: &Faulty) -> Result<(), Trouble>;
    /// What every start does, and a look at every promise. Returns what was found.
    async fn recover(&mut self, storage: &Faulty) -> Result<Vec<u64>, Trouble>;
}

#[derive(Default)]
struct Tally {
    scenarios: u64,
    operations: u64,
    cases: u64,
    second_crashes: u64,
    violations: Vec<String>,
}

/// Fails every operation in every way.
fn fail_every_operation<S: Scenario>(what: &str, base: &S, prepared: &Faulty, tally: &mut Tally) {
    let clean = prepared.copy();
    run(base.clone().work(&clean)).unwrap_or_else(|e| panic!("{what}: without faults: {e:?}"));
    let (operations, before) = (clean.operations(), tally.cases);
    for fault in FAULTS {
        for n in 1..=operations {
            let context = format!("{what}: operation {n} fails ({fault:?})");
            one_case(&context, base, prepared, (n, fault), tally);
        }
    }
    tally.scenarios += 1;
    tally.operations += operations;
    println!("{what}: {operations} operations, {} cases", tally.cases - before);
}

fn one_case<S: Scenario>(context: &str, base: &S, prepared: &Faulty, (n, fault): (u64, Fault), tally: &mut Tally) {
    let (mut scenario, storage) = (base.clone(), prepared.copy());
    let mut rng = Rng::new(n * 8 + fault as u64);
    tally.cases += 1;
    storage.fail_at(n, fault);
    if let Err(Trouble::Broken(e)) = run(scenario.work(&storage)) {
        tally.violations.push(format!("{context}: {e}"));
    }
    storage.crash(&mut rng);
    let crashed = (scenario.clone(), storage.copy());
    let before = storage.operations();
    let first = match run(scenario.recover(&storage)) {
        Ok(found) => found,
        Err(e) => return tally.violations.push(format!("{context}, recovery: {e:?}")),
    };
    let recovery = storage.operations() - before;
    storage.crash(&mut rng);
    match run(scenario.recover(&storage)) {
        Ok(second) if second == first => {}
        other => tally.violations.push(format!("{context}, second recovery: {other:?}, not {first:?}")),
    }
    if n.is_multiple_of(8) {
        let went_on = run(async {
            scenario.work(&storage).await?;
            storage.crash(&mut rng);
            scenario.recover(&storage).await
        });
        tally.violations.extend(went_on.err().map(|e| format!("{context}, going on: {e:?}")));
    }
    let step = (recovery / SECOND_CRASHES).max(1);
    for m in (1 + n % step..=recovery).step_by(step as usize) {
        let (mut scenario, storage) = (crashed.0.clone(), crashed.1.copy());
        tally.second_crashes += 1;
        // A disk that fails for a moment must not cost what it gives back the next time.
        let fault = if m % 2 == 0 { Fault::Dead } else { Fault::Once };
        storage.fail_at(m, fault);
        match run(scenario.recover(&storage)) {
            Err(Trouble::Storage(_)) => {}
            Ok(found) if found == first => {}
            other => tally.violations.push(format!("{context}, operation {m} of the recovery fails ({fault:?}): {other:?}, not {first:?}")),
        }
        storage.crash(&mut rng);
        match run(scenario.recover(&storage)) {
            Ok(found) if found == first => {}
            other => tally.violations.push(format!("{context}, operation {m} of the recovery too: {other:?}, not {first:?}")),
        }
    }
}

/// The share of cases, in percent, in which syncs that keep nothing are noticed: power goes late in the work, or after it.
fn noticed_when_lied_to<S: Scenario>(what: &str, base: &S, prepared: &Faulty) -> u64 {
    let clean = prepared.copy();
    run(base.clone().work(&clean)).unwrap_or_else(|e| panic!("{what}: {e:?}"));
    let operations = clean.operations();
    let places = operations - (operations / 4).min(10)..=operations + 1;
    let cases: Vec<(u64, u64)> = places.flat_map(|n| (0..4).map(move |seed| (n, seed))).collect();
    let noticed = cases.iter().filter(|(n, seed)| {
        let (mut scenario, storage) = (base.clone(), prepared.copy());
        storage.lying.set(true);
        storage.fail_at(*n, Fault::Dead);
        let broken = matches!(run(scenario.work(&storage)), Err(Trouble::Broken(_)));
        storage.crash(&mut Rng::new(n * 4 + seed));
        broken || run(scenario.recover(&storage)).is_err()
    });
    let share = noticed.count() as u64 * 100 / cases.len() as u64;
    println!("{what}: with syncs that lie, {share} % of {} cases are noticed", cases.len());
    share
}

fn digest(content: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    content.hash(&mut hasher);
    hasher.finish()
}

// ---- the log

/// Records are appended, given up, and their segments used again.
#[derive(Clone, Default)]
struct Appending {
    durable: BTreeMap<u64, Location>,
    next: u64,
}

const LOG: Options = Options { segment_bytes: 32 << 10, segments_max: 4, body_bytes_max: 20_000 };

fn record(number: u64) -> AlignedBuf {
    let len = (number * 2711 % 9000) as usize;
    let mut record = AlignedBuf::with_capacity(RECORD_HEADER_LEN + 8 + len);
    record.pad_to(RECORD_HEADER_LEN);
    record.extend(&number.to_le_bytes());
    record.extend(&vec![number as u8; len]);
    record
}

impl Appending {
    async fn open(storage: &Faulty) -> Result<(Log<Faulty>, HashMap<u64, Location>), Trouble> {
        let opened = Log::open(storage.clone(), Path::new("/log"), Uuid::from_u128(1), LOG).await;
        let (log, found) = opened.map_err(self::storage)?;
        let number = |head: &[u8]| u64::from_le_bytes(*head.first_chunk().unwrap());
        Ok((log, found.iter().map(|r| (number(&r.head), r.location)).collect()))
    }
}

impl Scenario for Appending {
    async fn work(&mut self, storage: &Faulty) -> Result<(), Trouble> {
        let (log, found) = Self::open(storage).await?;
        self.durable.retain(|number, _| found.contains_key(number));
        for (number, location) in found {
            match self.durable.get_mut(&number) {
                Some(known) => *known = location,
                None => log.release(location),
            }
        }
        for round in 0..14 {
            if log.wants_segment() && round % 2 == 0 {
                let _ = log.prepare().await;
            }
            let count = 1 + round % 3;
            let mut tried = false;
            loop {
                let mut group: Vec<AlignedBuf> = (1..=count).map(|i| record(self.next + i)).collect();
                match log.append(&mut group).await {
                    Ok(places) => {
                        self.durable.extend(places.iter().enumerate().map(|(i, (at, _))| (self.next + 1 + i as u64, *at)));
                        break;
                    }
                    Err(LogError::Full) if !self.durable.is_empty() => {
                        for _ in 0..3 {
                            self.durable.pop_first().into_iter().for_each(|(_, at)| log.release(at));
                        }
                    }
                    Err(LogError::Closed(reason)) => {
                        let again = log.append(&mut vec![record(self.next + 9)]).await;
                        let refused = matches!(again, Err(LogError::Closed(_)));
                        return Err(if refused { self::storage(reason) } else { Trouble::Broken("a closed log takes records".into()) });
                    }
                    // No segment could be made, and nothing was written: it may be tried again.
                    Err(LogError::Io { .. }) if !tried => tried = true,
                    Err(error) => return Err(self::storage(error)),
                }
            }
            self.next += count + 10;
        }
        Ok(())
    }

    async fn recover(&mut self, storage: &Faulty) -> Result<Vec<u64>, Trouble> {
        let (log, found) = Self::open(storage).await?;
        for number in self.durable.keys() {
            let Some(location) = found.get(number) else {
                return Err(Trouble::Broken(format!("record {number} was durable and is gone")));
            };
            let bytes = match log.read(*location).await {
                Err(LogError::Io { source, .. }) => return Err(self::storage(source)),
                read => read.map_err(|e| Trouble::Broken(format!("record {number}: {e}")))?,
            };
            if bytes[RECORD_HEADER_LEN..] != record(*number)[RECORD_HEADER_LEN..] {
                return Err(Trouble::Broken(format!("record {number} holds something else")));
            }
        }
        let mut numbers: Vec<u64> = found.into_keys().collect();
        numbers.sort_unstable();
        Ok(numbers)
    }
}

// ---- the dirty map

const REGION: u64 = 1 << 20;
const REGIONS: u64 = 9000;
const GROWN: u64 = 9400;

/// Regions are marked and cleared, the disk grows, the header changes.
#[derive(Clone, Default)]
struct Marking {
    marked: BTreeSet<u64>,
    epoch: u64,
    /// What was promised, and what was asked for.
    generation: (u64, u64),
    /// The disk has grown, whether or not the map has.
    grown: bool,
    /// The map said that it covers the grown disk.
    covered: bool,
}

impl Marking {
    async fn open(&self, storage: &Faulty) -> Result<DirtyMap<FaultyFile>, Trouble> {
        let size = if self.grown { GROWN } else { REGIONS } * REGION;
        let disk = DiskId(Uuid::from_u128(1));
        DirtyMap::open(storage, Path::new("/a/map"), disk, size, REGION, 7).await.map_err(self::storage)
    }

    /// As a write does; the next one to the same region tries again.
    async fn mark(&mut self, map: &DirtyMap<FaultyFile>, region: u64) -> Result<(), Trouble> {
        if map.mark(region..=region + 1).await.is_err() {
            map.mark(region..=region + 1).await.map_err(self::storage)?;
        }
        self.marked.extend([region, region + 1]);
        Ok(())
    }
}

impl Scenario for Marking {
    async fn work(&mut self, storage: &Faulty) -> Result<(), Trouble> {
        let map = self.open(storage).await?;
        (self.epoch, self.marked, self.covered) = (map.header().epoch, BTreeSet::new(), self.grown);
        map.clear(&map.marked().iter().collect::<Vec<_>>()).await.map_err(self::storage)?;
        for round in 0..14 {
            self.mark(&map, round * 641 % (REGIONS - 2)).await?;
            match round {
                5 | 9 | 12 => {
                    let some: Vec<u64> = self.marked.iter().copied().take(3).collect();
                    self.marked.retain(|region| !some.contains(region));
                    // Bits that stay are only work.
                    let _ = map.clear(&some).await;
                }
                7 if !self.grown => {
                    self.grown = true;
                    map.grow(GROWN * REGION).await.map_err(self::storage)?;
                    self.covered = true;
                    self.marked.extend(REGIONS - 1..GROWN);
                }
                3 | 10 => {
                    self.generation.1 += 1;
                    let generation = self.generation.1;
                    map.update_header(|h| h.generation = generation).await.map_err(self::storage)?;
                    self.generation.0 = generation;
                }
                _ => {}
            }
        }
        Ok(())
    }

    async fn recover(&mut self, storage: &Faulty) -> Result<Vec<u64>, Trouble> {
        let map = self.open(storage).await?;
        let (found, header) = (map.marked(), map.header());
        if let Some(lost) = self.marked.iter().find(|region| !found.contains(**region)) {
            return Err(Trouble::Broken(format!("the mark of region {lost} was durable and is gone")));
        }
        if let Some(lost) = (REGIONS..GROWN).find(|region| self.grown && !self.covered && !found.contains(*region)) {
            return Err(Trouble::Broken(format!("region {lost} is new and not marked")));
        }
        if header.epoch <= self.epoch {
            return Err(Trouble::Broken(format!("epoch {} follows epoch {}", header.epoch, self.epoch)));
        }
        self.epoch = header.epoch;
        if !(self.generation.0..=self.generation.1).contains(&header.generation) {
            return Err(Trouble::Broken(format!("generation {}, not {:?}", header.generation, self.generation)));
        }
        Ok(found.iter().chain([header.generation]).collect())
    }
}

// ---- replica and retention journal

const SIZE: u64 = 128 << 10;

#[derive(Clone)]
enum Step {
    Write(Extent, u8),
    Zero(Extent),
    Mark,
    Checkpoint,
    /// The point in this place is dropped.
    Drop(usize),
}

/// Steps are applied to a replica as the apply thread does it, each checkpoint noted as the catalogue does it.
#[derive(Clone)]
struct Applying {
    format: Format,
    steps: Rc<Vec<Step>>,
    /// What the catalogue holds.
    checkpoint: usize,
    last_marker: Option<Position>,
    noted: Rc<RefCell<BTreeMap<Position, u64>>>,
    points: Vec<(Position, Rc<Vec<u8>>)>,
    merges: u64,
}

type Opened = (Image<FaultyFile>, Retention<Faulty>);

fn image_path(format: Format) -> PathBuf {
    PathBuf::from(format!("/r/image.{}", format.extension()))
}

fn subject() -> Subject {
    Subject { disk: DiskId(Uuid::from_u128(5)), generation: 1, key: DataKey::from_bytes([3; 32]) }
}

/// Two writes and a hole between markers; points go from the middle and from the beginning.
fn steps() -> Vec<Step> {
    let mut rng = Rng::new(3);
    let mut steps = Vec::new();
    for round in 0..7 {
        for n in 0..2 {
            let extent = Extent::new(rng.below(24) * 4096 + rng.below(8) * 512, (1 + rng.below(40)) * 512);
            steps.push(Step::Write(extent, round * 2 + n + 1));
        }
        if round % 3 == 1 {
            steps.push(Step::Zero(Extent::new(rng.below(16) * 4096, 32 << 10)));
        }
        steps.push(Step::Mark);
        if round % 2 == 1 {
            steps.push(Step::Checkpoint);
        }
        match round {
            3 | 5 => steps.push(Step::Drop(1)),
            4 => steps.push(Step::Drop(0)),
            _ => {}
        }
    }
    steps.push(Step::Checkpoint);
    steps
}

impl Step {
    fn change(&self, model: &mut [u8]) {
        let range = |e: &Extent| e.offset as usize..e.end() as usize;
        match self {
            Step::Write(extent, byte) => model[range(extent)].fill(*byte),
            Step::Zero(extent) => model[range(extent)].fill(0),
            _ => {}
        }
    }
}

/// Repeats what failed for want of space once there is some, as the apply thread does.
async fn patiently(storage: &Faulty, mut operation: impl AsyncFnMut() -> Result<(), RetainError>) -> Result<(), Trouble> {
    match operation().await {
        Err(e) if e.io_error().is_some_and(is_full) => {
            storage.heal();
            operation().await.map_err(self::storage)
        }
        other => other.map_err(self::storage),
    }
}

impl Applying {
    fn new(format: Format) -> (Self, Faulty) {
        let storage = Faulty::default();
        run(async { drop(Image::create(&storage, &image_path(format), format, SIZE).await.unwrap()) });
        storage.crash(&mut Rng::new(1));
        let noted = Rc::default();
        (Self { format, steps: Rc::new(steps()), checkpoint: 0, last_marker: None, noted, points: Vec::new(), merges: 0 }, storage)
    }

    async fn open(&self, storage: &Faulty) -> Result<Opened, Trouble> {
        let image = Image::open(storage, &image_path(self.format), self.format).await.map_err(self::storage)?;
        let noted = self.noted.borrow().clone();
        let opened = Retention::open_noted(storage.clone(), Path::new("/u"), subject(), self.last_marker, &noted).await;
        Ok((image, opened.map_err(self::storage)?))
    }

    async fn apply(&mut self, storage: &Faulty, until: usize) -> Result<(), Trouble> {
        // The catalogue of this run alone.
        let noted = self.noted.borrow().clone();
        self.noted = Rc::new(RefCell::new(noted));
        let (image, retention) = self.open(storage).await?;
        let mut model = self.content(self.checkpoint);
        let mut arrived = Vec::new();
        for index in self.checkpoint..until {
            let step = self.steps[index].clone();
            step.change(&mut model);
            match step {
                Step::Write(extent, byte) => {
                    let data = AlignedBuf::copy_of(&vec![byte; extent.len as usize]).freeze();
                    patiently(storage, async || retention.preserve(&image, [extent].into_iter()).await).await?;
                    patiently(storage, async || Ok(image.write(extent.offset, data.clone()).await?)).await?;
                }
                Step::Zero(extent) => {
                    patiently(storage, async || retention.preserve(&image, [extent].into_iter()).await).await?;
                    patiently(storage, async || Ok(image.zero(extent).await?)).await?;
                }
                Step::Mark => {
                    let at = Position::new(1, index as u64 + 1);
                    patiently(storage, async || retention.begin(at).await).await?;
                    arrived.push((at, Rc::new(model.clone())));
                }
                Step::Checkpoint => {
                    image.barrier().await.map_err(self::storage)?;
                    self.checkpoint = index + 1;
                    self.last_marker = arrived.last().map(|(at, _)| *at).or(self.last_marker);
                    self.noted.borrow_mut().extend(retention.take_grown());
                    self.points.append(&mut arrived);
                }
                Step::Drop(which) => self.drop_point(which, &retention).await,
            }
        }
        Ok(())
    }

    /// Unlists a point, then gives back its space. What does not work is tried again some other time; the rest goes on.
    async fn drop_point(&mut self, which: usize, retention: &Retention<Faulty>) {
        if which + 1 < self.points.len() {
            self.points.remove(which);
        }
        let oldest = self.points.first().map(|(at, _)| *at).min(self.last_marker);
        for start in retention.unneeded(oldest) {
            self.noted.borrow_mut().remove(&start);
        }
        let _ = retention.forget_before(oldest);
        let needed = self.points.iter().map(|(at, _)| *at).collect();
        let forget = async |starts: Vec<Position>| {
            self.noted.borrow_mut().retain(|start, _| !starts.contains(start));
            true
        };
        while matches!(retention.merge_some(&needed, self.last_marker, forget).await, Ok(true)) {
            self.merges += 1;
        }
    }

    fn content(&self, count: usize) -> Vec<u8> {
        let mut model = vec![0; SIZE as usize];
        self.steps[..count].iter().for_each(|step| step.change(&mut model));
        model
    }

    /// Every point is exact. Returns what they hold, and the replica.
    async fn verify(&self, (image, retention): &Opened) -> Result<Vec<u64>, Trouble> {
        let mut found = Vec::new();
        for (at, expected) in &self.points {
            let whole = Extent::new(0, SIZE);
            let read = async { retention.view(*at).await?.read(image, whole).await };
            let content = match read.await {
                Err(e) if e.io_error().is_some_and(|e| e.raw_os_error() == Some(5)) => return Err(self::storage(e)),
                read => read.map_err(|e| Trouble::Broken(format!("point {at}: {e}")))?,
            };
            if let Some(byte) = content.iter().zip(expected.iter()).position(|(a, b)| a != b) {
                return Err(Trouble::Broken(format!("point {at} differs at byte {byte}")));
            }
            found.push(digest(&content));
        }
        found.push(digest(&image.read(Extent::new(0, SIZE)).await.map_err(self::storage)?));
        Ok(found)
    }
}

impl Scenario for Applying {
    async fn work(&mut self, storage: &Faulty) -> Result<(), Trouble> {
        self.apply(storage, self.steps.len()).await
    }

    async fn recover(&mut self, storage: &Faulty) -> Result<Vec<u64>, Trouble> {
        let opened = self.open(storage).await?;
        self.verify(&opened).await
    }
}

// ---- a roll of the replica to a point

/// A replica is brought back to one of its points, and everything that it was stays what it was.
#[derive(Clone)]
struct Rolling {
    site: Applying,
    before: Position,
    target: Position,
    /// The roll was reported as done.
    done: bool,
}

impl Rolling {
    fn new(format: Format) -> (Self, Faulty) {
        let (mut site, storage) = Applying::new(format);
        run(site.work(&storage)).unwrap_or_else(|e| panic!("{format:?}: {e:?}"));
        assert!(site.merges > 0, "intervals are merged on the way");
        storage.crash(&mut Rng::new(2));
        let before = Position::new(1, site.steps.len() as u64 + 1);
        let target = site.points[0].0;
        // Where the failover began is a point as any other.
        site.points.push((before, Rc::new(site.content(site.steps.len()))));
        (Self { site, before, target, done: false }, storage)
    }

    async fn begin(&self, storage: &Faulty) -> Result<Opened, Trouble> {
        let (image, retention) = self.site.open(storage).await?;
        patiently(storage, async || retention.begin(self.before).await).await?;
        Ok((image, retention))
    }

    async fn roll(&self, (image, retention): &Opened) -> Result<(), Trouble> {
        bring_back(image, retention, self.target, &Progress::default()).await.map(|_| ()).map_err(self::storage)
    }

    async fn is_there(&self, image: &Image<FaultyFile>) -> Result<bool, Trouble> {
        let content = image.read(Extent::new(0, SIZE)).await.map_err(self::storage)?;
        Ok(content[..] == self.site.points[0].1[..])
    }
}

impl Scenario for Rolling {
    async fn work(&mut self, storage: &Faulty) -> Result<(), Trouble> {
        let opened = self.begin(storage).await?;
        self.roll(&opened).await?;
        self.done = true;
        Ok(())
    }

    async fn recover(&mut self, storage: &Faulty) -> Result<Vec<u64>, Trouble> {
        let opened = self.begin(storage).await?;
        if self.done && !self.is_there(&opened.0).await? {
            return Err(Trouble::Broken("the replica was rolled and is not what it was at the point".to_owned()));
        }
        self.site.verify(&opened).await?;
        // The same roll again: the job says where the replica is to stand.
        self.roll(&opened).await?;
        if !self.is_there(&opened.0).await? {
            return Err(Trouble::Broken("the roll was repeated, and the replica is not what it was at the point".to_owned()));
        }
        self.done = true;
        self.site.verify(&opened).await
    }
}

const FORMATS: [Format; 3] = [Format::Raw, Format::Vhdx, Format::Vmdk];

fn all_good(tally: &Tally) {
    let Tally { scenarios, operations, cases, second_crashes, violations } = tally;
    println!(
        "{scenarios} scenarios, {operations} operations, {cases} cases, {second_crashes} of them with a second crash, {} violations",
        violations.len()
    );
    assert!(violations.is_empty(), "{} violations, the first: {:#?}", violations.len(), &violations[..violations.len().min(12)]);
    assert!(*cases >= 3 * operations && second_crashes > cases, "every operation fails in every way");
}

#[test]
fn a_log_keeps_what_it_reported_whichever_operation_fails() {
    let mut tally = Tally::default();
    fail_every_operation("log", &Appending::default(), &Faulty::default(), &mut tally);
    all_good(&tally);
}

#[test]
fn a_dirty_map_keeps_every_mark_whichever_operation_fails() {
    let mut tally = Tally::default();
    fail_every_operation("dirty map", &Marking::default(), &Faulty::default(), &mut tally);
    all_good(&tally);
}

#[test]
fn every_point_stays_exact_whichever_operation_fails() {
    let mut tally = Tally::default();
    for format in FORMATS {
        let (scenario, storage) = Applying::new(format);
        fail_every_operation(&format!("retention, {} replica", format.as_str()), &scenario, &storage, &mut tally);
    }
    all_good(&tally);
}

#[test]
fn a_roll_is_done_or_done_again_whichever_operation_fails() {
    let mut tally = Tally::default();
    for format in FORMATS {
        let (scenario, storage) = Rolling::new(format);
        fail_every_operation(&format!("roll, {} replica", format.as_str()), &scenario, &storage, &mut tally);
    }
    all_good(&tally);
}

#[test]
fn syncs_that_keep_nothing_are_noticed_by_every_scenario() {
    let mut shares = vec![
        noticed_when_lied_to("log", &Appending::default(), &Faulty::default()),
        noticed_when_lied_to("dirty map", &Marking::default(), &Faulty::default()),
    ];
    for format in FORMATS {
        let (scenario, storage) = Applying::new(format);
        shares.push(noticed_when_lied_to(&format!("retention, {}", format.as_str()), &scenario, &storage));
        let (scenario, storage) = Rolling::new(format);
        shares.push(noticed_when_lied_to(&format!("roll, {}", format.as_str()), &scenario, &storage));
    }
    assert!(shares.iter().all(|&share| share >= 10), "the tests must be able to fail: {shares:?} % noticed");
}
