//! What a process server remembers of each disk besides the cache: history, wrapped key, epoch, released position.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::crypto::keyring::{DataKey, KeyEncryptionKey, KeyError};
use crate::model::{Compare, DiskId, Position};
use crate::storage::catalogue::{Catalogue, CatalogueError, Table};

const DISKS: Table = Table::new("disks");
const SERVER: Table = Table::new("server");

/// Changes with the types stored here.
const FORMAT: u32 = 5;

/// Epochs whose beginning is remembered, the newest. Those that the master target has, or has passed, are of no interest.
const RELIED_MAX: usize = 64;

/// One disk's record.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct DiskRecord {
    /// The replica's history.
    pub generation: u64,
    /// The disk's data key, wrapped.
    pub wrapped_key: Vec<u8>,
    /// The highest epoch obeyed.
    pub epoch: u64,
    /// The epoch in which this stream began here. What the cache still has of older ones was given up then: it does not lead to
    /// where this one began.
    pub begun: u64,
    /// By epoch that an agent began here: what it relies on being at the master target, or here before that epoch.
    pub relied: BTreeMap<u64, Position>,
    /// Everything through here is at the master target and may be gone from the cache.
    pub released: Position,
    /// Bytes of the disk that the master target has room for: nothing behind is accepted.
    pub size: u64,
    /// Whether the disk is compared with the replica before it is sent.
    pub compare: Compare,
}

/// The process server's catalogue.
#[derive(Clone)]
pub struct Records {
    catalogue: Catalogue,
    /// Id of the cache.
    pub cache_id: Uuid,
}

impl Records {
    /// Opens or makes the catalogue in `state`.
    ///
    /// # Errors
    /// See [`Catalogue::open`].
    pub fn open(state: &Path) -> Result<Self, CatalogueError> {
        let catalogue = Catalogue::open(&state.join("process-server.redb"), &[DISKS, SERVER])?;
        let cache_id = catalogue.identity(SERVER, b"cache-id", FORMAT)?;
        Ok(Self { catalogue, cache_id })
    }

    /// Whether it is to be taken out of service.
    ///
    /// # Errors
    /// Those of the catalogue.
    pub fn is_draining(&self) -> Result<bool, CatalogueError> {
        Ok(self.catalogue.get(SERVER, b"draining")?.unwrap_or(false))
    }

    /// Sets that, durably.
    ///
    /// # Errors
    /// Those of the catalogue.
    pub fn set_draining(&self, draining: bool) -> Result<(), CatalogueError> {
        self.catalogue.write(|batch| batch.put(SERVER, b"draining", &draining))
    }

    /// A disk's record, if it was ever known.
    ///
    /// # Errors
    /// Those of the catalogue.
    pub fn disk(&self, disk: DiskId) -> Result<Option<DiskRecord>, CatalogueError> {
        self.catalogue.get(DISKS, disk.0.as_bytes())
    }

    /// Raises epochs and released positions, durably, together. Records of another generation are left alone: what is
    /// merged into them belongs to a history that is over.
    ///
    /// # Errors
    /// Those of the catalogue; nothing was changed then.
    pub fn merge(&self, records: &[(DiskId, DiskRecord)]) -> Result<(), CatalogueError> {
        self.catalogue.write(|batch| {
            for (disk, record) in records {
                let known: Option<DiskRecord> = batch.get(DISKS, disk.0.as_bytes())?;
                if let Some(mut known) = known.filter(|k| k.generation == record.generation) {
                    known.epoch = known.epoch.max(record.epoch);
                    known.released = known.released.max(record.released);
                    known.size = known.size.max(record.size);
                    known.relied.extend(&record.relied);
                    let newest = known.relied.keys().nth_back(RELIED_MAX).copied().unwrap_or(0);
                    let over = known.released.epoch.max(newest);
                    known.relied.retain(|epoch, _| *epoch > over);
                    batch.put(DISKS, disk.0.as_bytes(), &known)?;
                }
            }
            Ok(())
        })
    }

    /// Changes whether a disk is compared, durably, unless its history is another one by now.
    ///
    /// # Errors
    /// Those of the catalogue; nothing was changed then.
    pub fn set_compare(&self, disk: DiskId, record: &DiskRecord) -> Result<(), CatalogueError> {
        self.catalogue.write(|batch| {
            let known: Option<DiskRecord> = batch.get(DISKS, disk.0.as_bytes())?;
            match known.filter(|k| k.generation == record.generation) {
                Some(known) => batch.put(DISKS, disk.0.as_bytes(), &DiskRecord { compare: record.compare, ..known }),
                None => Ok(()),
            }
        })
    }

    /// Replaces records, durably, together.
    ///
    /// # Errors
    /// Those of the catalogue; nothing was changed then.
    pub fn put(&self, records: &[(DiskId, DiskRecord)]) -> Result<(), CatalogueError> {
        self.catalogue.write(|batch| records.iter().try_for_each(|(disk, record)| batch.put(DISKS, disk.0.as_bytes(), record)))
    }
}

impl DiskRecord {
    /// The data key.
    ///
    /// # Errors
    /// [`KeyError::Unwrap`] if another key-encryption key wrapped it.
    pub fn key(&self, kek: &KeyEncryptionKey, disk: DiskId) -> Result<DataKey, KeyError> {
        kek.unwrap(&self.wrapped_key, disk, self.generation)
    }
}
