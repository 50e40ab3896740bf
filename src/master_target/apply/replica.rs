//! A replica: its image, its retention journal, its key. Made, opened, and replaced when it is gone.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::compare::Wounds;
use super::{Apply, Prepared, Refusal};
use crate::config::units::show_size;
use crate::crypto::keyring::DataKey;
use crate::disk::recent::Recent;
use crate::disk::{Disk, DiskError, Format, Image};
use crate::master_target::catalogue::{Content, Damage, ReplicaRecord};
use crate::master_target::journal::{self, Found, Replayed};
use crate::master_target::retain::{Retention, Subject};
use crate::master_target::shared::{DiskShared, Travel};
use crate::model::{Compare, DiskId, Hold, PointId, Position, SECTOR};
use crate::observe::metrics;
use crate::storage::lock::lock_files;
use crate::storage::log::random_u64;
use crate::storage::uring::{Uring, UringFile, create_dir_durable, is_full};

/// How often a lock that somebody holds is asked for, and how long apart.
const LOCK_ATTEMPTS: u32 = 20;
const LOCK_WAIT: Duration = Duration::from_millis(100);

/// An open replica.
pub struct Replica {
    /// Shared with the network thread.
    pub shared: Arc<DiskShared>,
    /// The image.
    pub image: Recent<Image<UringFile>>,
    /// Its history.
    pub retention: Retention<Uring>,
    /// The newest marker applied.
    pub last_marker: Cell<Option<Position>>,
    /// The newest marker whose checkpoint is noted: the points up to it are listed, or wait, or are given up.
    pub noted_marker: Cell<Option<Position>>,
    /// How markers travelled whose points are not listed yet.
    pub arrived: RefCell<HashMap<PointId, Travel>>,
    /// Held while a checkpoint changes the image, and while the image grows.
    pub changing: tokio::sync::Mutex<()>,
    /// It was given out of hand: its tasks end.
    pub retired: Cell<bool>,
    /// Rung when that happens.
    pub gone: tokio::sync::Notify,
    /// Which serving of the disk may change it: see [`Replica::next_serving`].
    pub serving: Cell<u64>,
    /// Where the image is.
    pub path: PathBuf,
    /// Its format.
    pub format: Format,
    /// Held as long as the image is open.
    _lock: Vec<std::fs::File>,
    /// Damage that a comparison with the source found.
    pub wounds: Wounds,
    /// Through here the image may hold what comes later in the stream: an end that was not orderly left a checkpoint half done. A
    /// comparison there would take it for damage.
    pub blind_until: Cell<Position>,
    /// Begins of intervals whose damage was judged.
    pub judged: tokio::sync::Mutex<BTreeSet<Position>>,
    pub(super) key: DataKey,
    pub(super) generation: u64,
}

impl Apply {
    /// Opens the replica of a disk if the catalogue has one, and queues what the journal holds for it.
    pub(super) async fn open_existing(self: &Rc<Self>, disk: &Arc<DiskShared>, found: &mut Found) -> Result<(), Refusal> {
        let stop = |message: String| Refusal { retry: false, message };
        let Some(record) = self.records.replica(disk.id).map_err(|e| stop(e.to_string()))? else { return Ok(()) };
        let path = self.image_path(disk, &record);
        let hold = disk.condition().hold;
        if hold == Hold::Released {
            let mut condition = disk.condition();
            (condition.size, condition.image) = (record.size, Some((record.format, path)));
            return Ok(());
        }
        if let Some(gone) = record.format.files(&path).into_iter().find(|f| !f.exists()) {
            // Never forgotten by itself: the storage may just not be mounted yet, and points that go do not come back.
            let mut consent = path.clone().into_os_string();
            consent.push(".anew");
            let consent = PathBuf::from(consent);
            if !consent.exists() {
                return Err(stop(format!(
                    "{} is gone: mount its storage or put it back, and restart the master target; or, to lose its recovery points and replicate \
                     the disk anew, make an empty file {} and restart",
                    gone.display(),
                    consent.display()
                )));
            }
            tracing::error!(disk = disk.label, path = %gone.display(), "the replica image is gone and given up: the points that need it are dropped, the disk is replicated anew");
            self.forget(disk).map_err(stop)?;
            return std::fs::remove_file(&consent).map_err(|e| stop(format!("{}: {e}", consent.display())));
        }
        if disk.format != record.format {
            tracing::warn!(
                disk = disk.label,
                "the configured format counts for new replicas only; this one stays {}",
                record.format.as_str()
            );
        }
        let key = self.kek.unwrap(&record.wrapped_key, disk.id, record.generation).map_err(|e| stop(e.to_string()))?;
        let lock = lock_image(&path, record.format).await.map_err(stop)?;
        let image = Image::open(&self.storage, &path, record.format).await.map_err(|e| stop(e.to_string()))?;
        if image.size() < record.size {
            return Err(stop(format!(
                "replica {} is smaller ({}) than the disk ({}): it was replaced by another file",
                path.display(),
                image.size(),
                record.size
            )));
        }
        let found = found.remove(&(disk.id, record.generation)).unwrap_or_default();
        let Replayed { mut queue, mut unneeded, cut_off, reached } = journal::replay(record.checkpoint, &record.begins, found);
        if cut_off > 0 {
            metrics::count_reason(metrics::DAMAGED, "journal");
            tracing::error!(
                disk = disk.label,
                batches = cut_off,
                "a part of the journal is gone: what lies behind it is given up, and sent again or compared. Check the storage of the journal"
            );
        }
        if hold >= Hold::Committed {
            // What the old source still sent came after the point that was chosen for good.
            unneeded.extend(std::mem::take(&mut queue).into_iter().map(|item| item.location));
        }
        let replica = self.assemble(disk, image, lock, key, &record).await.map_err(stop)?;
        let mut checkpoint = record.checkpoint;
        let mut journaled = queue.last().map_or(checkpoint, |item| item.end);
        replica.blind_until.set(reached);
        // What is held is not applied: then nothing finishes what was begun, either.
        let reach = if hold >= Hold::Standing { checkpoint } else { journaled };
        if replica.retention.is_ahead_of(reach) {
            disk.condition().checkpointed = checkpoint;
            checkpoint = self.fall_back(&replica).await.map_err(|e| stop(format!("it cannot be brought back to its last point: {e}")))?;
            journaled = checkpoint;
            unneeded.extend(std::mem::take(&mut queue).into_iter().map(|item| item.location));
        }
        self.journal.release(unneeded).await;
        tracing::info!(disk = disk.label, %checkpoint, %journaled, "replica opened");
        {
            let mut condition = disk.condition();
            (condition.received, condition.journaled, condition.size) = (journaled, journaled, replica.image.size());
            (condition.applied, condition.checkpointed) = (checkpoint, checkpoint);
            condition.retained_bytes = replica.retention.bytes();
            condition.image = Some((record.format, path));
        }
        for item in queue {
            disk.push(item);
        }
        // What was noted as damaged and not dealt with: before anybody can choose one of those points.
        super::compare::settle(self, &replica).await.map_err(|e| stop(e.to_string()))?;
        self.adopt(replica);
        Ok(())
    }

    async fn assemble(
        &self,
        disk: &Arc<DiskShared>,
        image: Image<UringFile>,
        lock: Vec<std::fs::File>,
        key: DataKey,
        record: &ReplicaRecord,
    ) -> Result<Replica, String> {
        let subject = Subject { disk: disk.id, generation: record.generation, key: key.clone() };
        let dir = self.settings.state.join("retain").join(disk.id.to_string()).join(format!("{:016x}", record.generation));
        let noted = self.intervals.borrow_mut().remove(&disk.id).unwrap_or_default();
        let retention = Retention::open_noted(self.storage.clone(), &dir, subject, record.last_marker, &noted);
        let retention = retention.await.map_err(|e| e.to_string())?;
        disk.condition().unconfirmed = record.content == Content::Unconfirmed;
        Ok(Replica {
            shared: disk.clone(),
            image: Recent::new(image, &self.recent),
            retention,
            last_marker: Cell::new(record.last_marker),
            noted_marker: Cell::new(record.last_marker),
            arrived: RefCell::default(),
            changing: tokio::sync::Mutex::new(()),
            retired: Cell::new(false),
            gone: tokio::sync::Notify::new(),
            serving: Cell::new(0),
            path: self.image_path(disk, record),
            format: record.format,
            _lock: lock,
            wounds: Wounds::new(record.damage.clone()),
            blind_until: Cell::default(),
            judged: tokio::sync::Mutex::default(),
            key,
            generation: record.generation,
        })
    }

    /// Makes sure that a replica exists and fits.
    pub(super) async fn prepare(self: &Rc<Self>, id: DiskId, size: u64) -> Result<Prepared, Refusal> {
        let _one_at_a_time = self.preparing.lock().await;
        let disk = self.disk(id)?;
        let prepared = self.prepare_disk(&disk, size).await;
        // What stands between the disk and its replica is shown here too, not only to the agent.
        disk.condition().refused = prepared.as_ref().err().filter(|refusal| !refusal.retry).map(|refusal| refusal.message.clone());
        prepared
    }

    async fn prepare_disk(self: &Rc<Self>, disk: &Arc<DiskShared>, size: u64) -> Result<Prepared, Refusal> {
        let id = disk.id;
        if disk.condition().hold != Hold::None {
            return Err(Refusal { retry: false, message: disk.condition().hold_reason.clone() });
        }
        if let Some(error) = disk.condition().error.clone() {
            return Err(Refusal { retry: false, message: format!("the replica of {} cannot go on: {error}", disk.label) });
        }
        if !self.replicas.borrow().contains_key(&id) {
            if size == 0 {
                return Err(Refusal {
                    retry: true,
                    message: "the size of the disk is not known yet: its agent has not connected".to_owned(),
                });
            }
            let known = self.records.replica(id).map_err(|e| Refusal { retry: true, message: e.to_string() })?;
            if known.is_some() {
                // Never made anew over one that is there.
                return Err(Refusal { retry: true, message: format!("the replica of {} is not open", disk.label) });
            }
            let replica = match disk.adopt.clone() {
                Some(path) => self.adopt_image(disk, path).await.map_err(|message| Refusal { retry: false, message })?,
                None => {
                    let size = self.size_of_new(disk, size)?;
                    self.create(disk, size).await.map_err(|message| Refusal { retry: true, message })?
                }
            };
            self.adopt(replica);
        }
        let replica = self.replicas.borrow().get(&id).cloned().expect("opened or made above");
        if let Some(configured) = disk.configured_size.filter(|&configured| size > configured) {
            return Err(too_large(disk, size, configured));
        }
        if size > replica.image.size() && disk.condition().unconfirmed {
            return Err(Refusal {
                retry: false,
                message: format!(
                    "the source of {} has {}, the disk that it would replace {}: enlarge that first, nothing of it is changed before it is allowed",
                    disk.label,
                    show_size(size),
                    show_size(replica.image.size())
                ),
            });
        }
        if size > replica.image.size() {
            grow(self, &replica, disk.configured_size.unwrap_or(size)).await?;
        }
        if size > 0 && size < replica.image.size() && disk.configured_size.is_none() {
            return Err(Refusal {
                retry: false,
                message: format!(
                    "disk {} has {} and its replica {}: it shrank, or another disk took its name. Give the new disk a name of its own, or \
                     remove the replica and its points if they are not needed",
                    disk.label,
                    show_size(size),
                    show_size(replica.image.size())
                ),
            });
        }
        let record = self.records.replica(id).map_err(|e| Refusal { retry: true, message: e.to_string() })?;
        let (journaled, life) = (disk.condition().journaled, disk.lives.load(Ordering::Relaxed));
        Ok(Prepared {
            life,
            generation: replica.generation,
            key: replica.key.clone(),
            size: replica.image.size(),
            epoch: record.as_ref().map_or(0, |r| r.epoch).max(journaled.epoch),
            carrier: record.as_ref().and_then(|r| r.carrier.clone()),
            journaled,
            damaged: replica.wounds.open(),
            compare: record.map_or(Compare::No, |r| match r.content {
                Content::Unconfirmed => Compare::Held,
                Content::Confirmed => Compare::Yes,
                Content::Made if r.checkpoint == Position::default() => Compare::No,
                Content::Made => Compare::Yes,
            }),
        })
    }

    fn size_of_new(&self, disk: &DiskShared, source: u64) -> Result<u64, Refusal> {
        match disk.configured_size {
            Some(configured) if source > configured => Err(too_large(disk, source, configured)),
            Some(configured) => Ok(configured),
            None if source.is_multiple_of(SECTOR) => Ok(source),
            None => Err(Refusal { retry: false, message: format!("the size of {} is not a multiple of 512", disk.label) }),
        }
    }

    /// Makes a replica of zeroes. The catalogue learns of it last: before that a crash leaves a file that is made again.
    async fn create(&self, disk: &Arc<DiskShared>, size: u64) -> Result<Replica, String> {
        // Never zero: zero is what an agent has that knows no replica.
        let generation = random_u64() >> 1 | 1;
        let key = DataKey::generate();
        let record = ReplicaRecord {
            generation,
            wrapped_key: self.kek.wrap(&key, disk.id, generation),
            size,
            format: disk.format,
            epoch: 0,
            carrier: None,
            checkpoint: Position::default(),
            last_marker: None,
            path: None,
            content: Content::Made,
            damage: Damage::default(),
            begins: Default::default(),
        };
        let path = self.image_path(disk, &record);
        let dir = path.parent().map(PathBuf::from).unwrap_or_default();
        create_dir_durable(&dir).map_err(|e| e.to_string())?;
        for file in record.format.files(&path).into_iter().filter(|f| f.exists()) {
            // The catalogue does not know it: a crash while it was made, or a file of somebody else. Never overwritten.
            let mut aside = file.clone().into_os_string();
            aside.push(format!(".unknown-{generation:x}"));
            std::fs::rename(&file, &aside).map_err(|e| format!("{}: {e}", file.display()))?;
            tracing::warn!(path = %Path::new(&aside).display(), "a file stood where a new replica goes; it was moved aside, remove it if it is not needed");
        }
        let image = Image::create(&self.storage, &path, record.format, size).await.map_err(|e| e.to_string())?;
        let lock = lock_image(&path, record.format).await?;
        let replica = self.assemble(disk, image, lock, key, &record).await?;
        self.records.put_replica(disk.id, &record).map_err(|e| e.to_string())?;
        {
            let mut condition = disk.condition();
            condition.size = size;
            condition.image = Some((record.format, path.clone()));
        }
        tracing::info!(disk = disk.label, path = %path.display(), size, "replica made; initial replication can begin");
        Ok(replica)
    }

    /// Makes a replica of an image that is there. It keeps its content until somebody allows it to be overwritten.
    async fn adopt_image(&self, disk: &Arc<DiskShared>, path: PathBuf) -> Result<Replica, String> {
        let empty = ReplicaRecord {
            generation: 0,
            wrapped_key: Vec::new(),
            size: 0,
            format: disk.format,
            epoch: 0,
            carrier: None,
            checkpoint: Position::default(),
            last_marker: None,
            path: Some(path.clone()),
            content: Content::Unconfirmed,
            damage: Damage::default(),
            begins: Default::default(),
        };
        let lock = lock_image(&path, disk.format).await?;
        let image = Image::open(&self.storage, &path, disk.format).await.map_err(|e| e.to_string())?;
        let record = ReplicaRecord { size: image.size(), ..empty.anew(&self.kek, disk.id) };
        let key = self.kek.unwrap(&record.wrapped_key, disk.id, record.generation).map_err(|e| e.to_string())?;
        let replica = self.assemble(disk, image, lock, key, &record).await?;
        self.records.put_replica(disk.id, &record).map_err(|e| e.to_string())?;
        {
            let mut condition = disk.condition();
            condition.size = record.size;
            condition.image = Some((record.format, path.clone()));
        }
        tracing::warn!(disk = disk.label, path = %path.display(), size = record.size, "an image that was there becomes the replica; nothing in it is overwritten until `tidegate failover reprotect` allows it");
        Ok(replica)
    }

    fn image_path(&self, disk: &DiskShared, record: &ReplicaRecord) -> PathBuf {
        if let Some(path) = &record.path {
            return path.clone();
        }
        let name = format!("{}.{}", disk.name, record.format.extension());
        self.settings.replicas().join(disk.machine_name.as_str()).join(name)
    }

    /// A replica is gone: so are its points. The record goes too, so that a new history begins.
    fn forget(&self, disk: &DiskShared) -> Result<(), String> {
        let points = self.shared.book().needing(disk.id);
        self.intervals.borrow_mut().remove(&disk.id);
        self.records.forget_replica(disk.id, &points).map_err(|e| e.to_string())?;
        let released = self.shared.book().kept_bad_with(&[disk.id]);
        self.records.mark_bad(&released, &[]).map_err(|e| e.to_string())?;
        let mut book = self.shared.book();
        book.replace_bad(released);
        book.unlist(&points);
        book.forget_pending(&points);
        Ok(())
    }
}

impl Replica {
    /// Changes of a machine that was served before this come too late: the replica is rolled, or served anew.
    pub fn next_serving(&self) -> u64 {
        self.serving.set(self.serving.get() + 1);
        self.serving.get()
    }

    /// Waits, but not longer than the replica is here.
    pub async fn pause(&self, duration: Duration) {
        if self.retired.get() {
            return;
        }
        tokio::select! {
            () = tokio::time::sleep(duration) => {}
            () = self.gone.notified() => {}
        }
    }
}

/// Keeps agents from an image that is a replica, and the master target from one that an agent has.
async fn lock_image(path: &Path, format: Format) -> Result<Vec<std::fs::File>, String> {
    for _ in 1..LOCK_ATTEMPTS {
        if let Ok(held) = lock_files(&format.files(path), true, 1) {
            return Ok(held);
        }
        // Others on this thread go on meanwhile.
        tokio::time::sleep(LOCK_WAIT).await;
    }
    lock_files(&format.files(path), true, 1).map_err(|e| format!("{}: {e}", path.display()))
}

/// The source disk has grown: so does the image, durably, before anything of the new part is accepted. The catalogue learns
/// of it last; a crash before that leaves an image that is larger than its record, which is in order.
async fn grow(apply: &Apply, replica: &Replica, size: u64) -> Result<(), Refusal> {
    let disk = &replica.shared;
    let refused = |retry, e: &dyn std::fmt::Display| Refusal {
        retry,
        message: format!("the replica of {} cannot grow to {}: {e}", disk.label, show_size(size)),
    };
    // A checkpoint may wait for space; others must not wait for it.
    let waited = tokio::time::timeout(Duration::from_secs(1), replica.changing.lock()).await;
    let _alone = waited.map_err(|_| refused(true, &"it is busy, it is tried again"))?;
    let before = replica.image.size();
    match replica.image.grow(size).await {
        Err(DiskError::Io { source, .. }) if is_full(&source) => {
            return Err(refused(true, &"the file system is full, free space or enlarge it"));
        }
        other => other.map_err(|e| refused(false, &e))?,
    }
    let (records, id) = (apply.records.clone(), disk.id);
    let noted = tokio::task::spawn_blocking(move || records.grow_replica(id, size)).await;
    noted.map_err(|e| refused(true, &e))?.map_err(|e| refused(false, &e))?;
    disk.condition().size = size;
    tracing::info!(disk = disk.label, from = before, to = size, "the replica has grown with its disk");
    Ok(())
}

fn too_large(disk: &DiskShared, source: u64, replica: u64) -> Refusal {
    let message = format!(
        "disk {} has {source} bytes, the master target's configuration gives it {replica}: raise `size` of the disk there to at least {source}, or leave it out so that the replica grows with its disk, and restart the master target",
        disk.label
    );
    Refusal { retry: false, message }
}
