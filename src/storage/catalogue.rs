//! Small metadata in one redb file for each server: typed values under byte keys. Bulk data never goes here.
//!
//! Every [`Catalogue::write`] is one transaction, durable when it returns (redb syncs); a crash leaves the state before or
//! after it. Rot is found and never served: the whole file is checked when it is opened, and every value ends with a CRC-32C of
//! table, key and value, which is checked when it is read.

use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use crate::checksum;
use redb::{Database, ReadTransaction, ReadableDatabase, ReadableTable, TableDefinition, TableHandle, WriteTransaction};
use serde::{Serialize, de::DeserializeOwned};
use thiserror::Error;
use uuid::Uuid;

/// Name of a table.
pub type Table = TableDefinition<'static, &'static [u8], &'static [u8]>;

/// Why the catalogue cannot do what was asked.
#[derive(Debug, Error)]
#[error("catalogue {path}: {message}")]
pub struct CatalogueError {
    path: PathBuf,
    message: String,
}

impl CatalogueError {
    /// There was no space for a write, by the number that the system gives (ENOSPC, EDQUOT).
    pub fn is_full(&self) -> bool {
        ["(os error 28)", "(os error 122)"].iter().any(|number| self.message.contains(number))
    }
}

/// An open catalogue; cheap to clone. Calls block for as long as a sync takes: not for a network thread.
#[derive(Clone)]
pub struct Catalogue {
    db: Arc<RwLock<Option<Database>>>,
    path: Arc<PathBuf>,
}

const DAMAGED: &str = "is damaged, or was written by an earlier version: check its storage, then put the folder back from a backup, or begin with an empty one";

fn seal(table: &str, key: &[u8], value: &[u8]) -> [u8; 4] {
    let crc = checksum::crc32c_append(checksum::crc32c(table.as_bytes()), key);
    checksum::crc32c_append(crc, value).to_le_bytes()
}

/// Makes an empty catalogue under its name at once: power that goes in between leaves none, not one that does not open.
fn make(path: &Path) -> Result<(), redb::Error> {
    let mut new = path.to_owned().into_os_string();
    new.push(".new");
    match std::fs::remove_file(&new) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(e.into()),
        _ => {}
    }
    let db = Database::create(&new)?;
    let transaction = db.begin_write()?;
    transaction.commit()?;
    drop(db);
    std::fs::File::open(&new)?.sync_all()?;
    std::fs::rename(&new, path)?;
    Ok(crate::storage::uring::sync_dir(path.parent().unwrap_or(Path::new(".")))?)
}

/// Opens a file that is what its last transaction left; `None` if it is not.
fn open_sound(path: &Path) -> Result<Option<Database>, redb::Error> {
    // Lengths that it reads from a rotten file make it panic (redb 4.4): nothing else of it is in memory yet.
    let mut damaged = path.to_owned().into_os_string();
    damaged.push(".damaged");
    if Path::new(&damaged).exists() {
        return Ok(None);
    }
    let opened = crate::panics::taken(|| {
        let mut db = Database::open(path)?;
        // What it calls repaired may be the state of an earlier transaction, which nobody else would know of.
        let sound = db.check_integrity()?;
        if !sound {
            // It has repaired it already: the next start must not take it for good.
            std::fs::write(&damaged, DAMAGED)?;
        }
        Ok::<_, redb::Error>(sound.then_some(db))
    });
    opened.unwrap_or(Ok(None))
}

impl Catalogue {
    /// Opens or makes the file, and makes `tables`.
    ///
    /// # Errors
    /// If another process has it open, or it is damaged.
    pub fn open(path: &Path, tables: &[Table]) -> Result<Self, CatalogueError> {
        let failed = |e: redb::Error| {
            let hint = match e {
                redb::Error::DatabaseAlreadyOpen => " (another process of this role uses the same state folder)",
                _ => "",
            };
            CatalogueError { path: path.to_owned(), message: format!("{e}{hint}") }
        };
        match std::fs::symlink_metadata(path) {
            Ok(_) => {}
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => make(path).map_err(failed)?,
            Err(e) => return Err(failed(e.into())),
        }
        let db = open_sound(path).map_err(failed)?.ok_or_else(|| CatalogueError { path: path.to_owned(), message: DAMAGED.to_owned() })?;
        let catalogue = Self { db: Arc::new(RwLock::new(Some(db))), path: Arc::new(path.to_owned()) };
        catalogue.write(|batch| tables.iter().try_for_each(|table| batch.touch(*table)))?;
        Ok(catalogue)
    }

    /// The id kept under `key`, made with the catalogue; `format` changes with the types that are stored.
    ///
    /// # Errors
    /// If the catalogue was made with another format.
    pub fn identity(&self, table: Table, key: &[u8], format: u32) -> Result<Uuid, CatalogueError> {
        if let Some(id) = self.get(table, key)? {
            let found = self.get::<u32>(table, b"format")?.unwrap_or(1);
            if found != format {
                return Err(self.failed(format!("has format {found}, this version reads {format}: use the version that wrote it")));
            }
            return Ok(id);
        }
        let id = Uuid::new_v4();
        self.write(|batch| {
            batch.put(table, b"format", &format)?;
            batch.put(table, key, &id)
        })?;
        Ok(id)
    }

    /// Reads one value.
    ///
    /// # Errors
    /// If the file fails or the value is not of this type.
    pub fn get<T: DeserializeOwned>(&self, table: Table, key: &[u8]) -> Result<Option<T>, CatalogueError> {
        let (txn, name) = (self.begin_read()?, table.name().to_owned());
        let table = txn.open_table(table).map_err(|e| self.failed(e))?;
        let value = table.get(key).map_err(|e| self.failed(e))?;
        value.map(|bytes| self.unseal(&name, key, bytes.value())).transpose()
    }

    /// Reads a whole table.
    ///
    /// # Errors
    /// As [`Catalogue::get`].
    pub fn all<T: DeserializeOwned>(&self, table: Table) -> Result<Vec<(Vec<u8>, T)>, CatalogueError> {
        let (txn, name) = (self.begin_read()?, table.name().to_owned());
        let table = txn.open_table(table).map_err(|e| self.failed(e))?;
        let rows = table.iter().map_err(|e| self.failed(e))?;
        rows.map(|row| {
            let (key, value) = row.map_err(|e| self.failed(e))?;
            Ok((key.value().to_vec(), self.unseal(&name, key.value(), value.value())?))
        })
        .collect()
    }

    /// Changes several values at once, durably.
    ///
    /// # Errors
    /// Nothing was changed then.
    pub fn write(&self, change: impl FnOnce(&Batch<'_>) -> Result<(), CatalogueError>) -> Result<(), CatalogueError> {
        let done = self.try_write(change);
        if done.as_ref().is_err_and(CatalogueError::is_full) {
            self.reopen();
        }
        done
    }

    fn begin_read(&self) -> Result<ReadTransaction, CatalogueError> {
        let db = self.db.read().unwrap_or_else(PoisonError::into_inner);
        db.as_ref().ok_or_else(|| self.failed("could not be opened again after it failed"))?.begin_read().map_err(|e| self.failed(e))
    }

    /// After a write for which there was no space redb takes nothing more until it is opened again. Only then: after a sync that
    /// failed nobody knows what the file holds, and only a restart looks.
    fn reopen(&self) {
        let mut db = self.db.write().unwrap_or_else(PoisonError::into_inner);
        *db = None;
        *db = open_sound(&self.path).ok().flatten();
    }

    fn try_write(&self, change: impl FnOnce(&Batch<'_>) -> Result<(), CatalogueError>) -> Result<(), CatalogueError> {
        if self.db.read().unwrap_or_else(PoisonError::into_inner).is_none() {
            self.reopen();
        }
        let db = self.db.read().unwrap_or_else(PoisonError::into_inner);
        let db = db.as_ref().ok_or_else(|| self.failed("could not be opened again after it failed"))?;
        let mut txn = db.begin_write().map_err(|e| self.failed(e))?;
        // Without this a commit that rots before the next clean end is taken for one that power cut off, and is rolled back.
        txn.set_two_phase_commit(true);
        change(&Batch { txn: &txn, catalogue: self })?;
        txn.commit().map_err(|e| self.failed(e))
    }

    fn unseal<T: DeserializeOwned>(&self, table: &str, key: &[u8], stored: &[u8]) -> Result<T, CatalogueError> {
        let (value, crc) = stored.split_last_chunk().ok_or_else(|| self.failed(DAMAGED))?;
        if *crc != seal(table, key, value) {
            return Err(self.failed(DAMAGED));
        }
        postcard::from_bytes(value).map_err(|e| self.failed(e))
    }

    /// An error that names this catalogue.
    pub fn failed(&self, error: impl std::fmt::Display) -> CatalogueError {
        CatalogueError { path: self.path.to_path_buf(), message: error.to_string() }
    }
}

/// The changes of one transaction.
pub struct Batch<'a> {
    txn: &'a WriteTransaction,
    catalogue: &'a Catalogue,
}

impl Batch<'_> {
    fn touch(&self, table: Table) -> Result<(), CatalogueError> {
        self.txn.open_table(table).map(|_| ()).map_err(|e| self.catalogue.failed(e))
    }

    /// Reads a value as this transaction sees it: nobody else changes it before the commit.
    ///
    /// # Errors
    /// The transaction is given up.
    pub fn get<T: DeserializeOwned>(&self, table: Table, key: &[u8]) -> Result<Option<T>, CatalogueError> {
        let name = table.name().to_owned();
        let table = self.txn.open_table(table).map_err(|e| self.catalogue.failed(e))?;
        let value = table.get(key).map_err(|e| self.catalogue.failed(e))?;
        value.map(|bytes| self.catalogue.unseal(&name, key, bytes.value())).transpose()
    }

    /// Sets a value.
    ///
    /// # Errors
    /// The transaction is given up.
    pub fn put<T: Serialize>(&self, table: Table, key: &[u8], value: &T) -> Result<(), CatalogueError> {
        let mut bytes = postcard::to_stdvec(value).map_err(|e| self.catalogue.failed(e))?;
        let crc = seal(table.name(), key, &bytes);
        bytes.extend_from_slice(&crc);
        let mut table = self.txn.open_table(table).map_err(|e| self.catalogue.failed(e))?;
        table.insert(key, bytes.as_slice()).map_err(|e| self.catalogue.failed(e))?;
        Ok(())
    }

    /// Removes a value.
    ///
    /// # Errors
    /// The transaction is given up.
    pub fn remove(&self, table: Table, key: &[u8]) -> Result<(), CatalogueError> {
        let mut table = self.txn.open_table(table).map_err(|e| self.catalogue.failed(e))?;
        table.remove(key).map_err(|e| self.catalogue.failed(e))?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_catalogue_keeps_its_id_and_is_refused_by_a_version_with_other_types() {
        const SERVER: Table = Table::new("server");
        let dir = tempfile::tempdir().unwrap();
        let catalogue = Catalogue::open(&dir.path().join("c.redb"), &[SERVER]).unwrap();
        let id = catalogue.identity(SERVER, b"id", 2).unwrap();
        assert_eq!(catalogue.identity(SERVER, b"id", 2).unwrap(), id);
        let refused = catalogue.identity(SERVER, b"id", 3).unwrap_err().to_string();
        assert!(refused.contains("has format 2, this version reads 3"), "{refused}");
    }

    /// Each flipped bit is an error, or changes nothing that is read.
    #[test]
    fn a_catalogue_that_rots_is_refused_or_right() {
        const VALUES: Table = Table::new("values");
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c.redb");
        let (key, value) = (|n: u32| format!("{n:04}").into_bytes(), |n: u32| vec![n; 20]);
        {
            let catalogue = Catalogue::open(&path, &[VALUES]).unwrap();
            for part in 0..4 {
                let all = |batch: &Batch<'_>| (part * 50..(part + 1) * 50).try_for_each(|n: u32| batch.put(VALUES, &key(n), &value(n)));
                catalogue.write(all).unwrap();
            }
        }
        let good = std::fs::read(&path).unwrap();
        // Most of the file is room for later.
        let used: Vec<usize> = (0..good.len()).filter(|at| good[*at] != 0).collect();
        let (mut refused, mut harmless) = (0, 0);
        for n in 0..400 {
            let at = used[n * used.len() / 400];
            let mut rotten = good.clone();
            rotten[at] ^= 1 << (n % 8);
            std::fs::write(&path, rotten).unwrap();
            match Catalogue::open(&path, &[VALUES]).and_then(|catalogue| catalogue.all::<Vec<u32>>(VALUES)) {
                Err(_) => refused += 1,
                Ok(all) => {
                    let expected: Vec<_> = (0..200u32).map(|n| (key(n), value(n))).collect();
                    assert_eq!(all, expected, "a bit at {at}");
                    harmless += 1;
                }
            }
        }
        assert!(refused > 50 && harmless > 20, "{refused} refused, {harmless} harmless");
    }
}
