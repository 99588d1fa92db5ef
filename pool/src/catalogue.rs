//! The catalogue: which pages form which template, in one redb file.
//!
//! redb locks its file while it is open, so it is opened for each operation, under a lease. Tables
//! are keyed by template id and generation (big-endian, so that the newest comes last): records,
//! manifests and page checksums apart, since a list needs only the first.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::Duration;

use redb::{
    Builder, Database, DatabaseError, ReadTransaction, ReadableDatabase, ReadableTable,
    TableDefinition, WriteTransaction,
};
use uuid::Uuid;

use crate::error::PoolError;
use crate::lease::{Lease, Mode};
use crate::record::{Listing, PageSum, Record};
use crate::template::TemplateId;

const KEY: usize = 40;
const RECORDS: TableDefinition<&[u8; KEY], &[u8]> = TableDefinition::new("templates");
const MANIFESTS: TableDefinition<&[u8; KEY], &[u8]> = TableDefinition::new("manifests");
const PAGE_SUMS: TableDefinition<&[u8; KEY], &[u8]> = TableDefinition::new("page_sums");
const META: TableDefinition<&str, &[u8]> = TableDefinition::new("meta");

const META_UUID: &str = "uuid";
const META_GENERATION: &str = "last_generation";

/// The working set is a few records; redb's default of 1 GiB is for databases that stay open.
const CACHE_BYTES: usize = 4 << 20;

#[derive(Debug)]
pub(crate) struct Catalogue {
    path: PathBuf,
    /// The pool that it must belong to.
    uuid: Uuid,
    lock: PathBuf,
    patience: Duration,
}

/// A consistent view of the catalogue for reading.
pub(crate) struct View<'a> {
    path: &'a Path,
    transaction: ReadTransaction,
}

/// A change of the catalogue, visible all at once when the closure that got it returns `Ok`.
pub(crate) struct Change<'a> {
    path: &'a Path,
    transaction: WriteTransaction,
}

impl Catalogue {
    pub fn new(path: PathBuf, uuid: Uuid, lock: PathBuf, patience: Duration) -> Self {
        Self {
            path,
            uuid,
            lock,
            patience,
        }
    }

    pub fn create(&self) -> Result<(), PoolError> {
        let _lease = Lease::take(&self.lock, Mode::Exclusive, self.patience)?;
        let database = builder()
            .create(&self.path)
            .map_err(|e| PoolError::catalogue("create", &self.path, e))?;
        let fail = |e: redb::Error| PoolError::catalogue("initialise", &self.path, e);
        let transaction = database.begin_write().map_err(|e| fail(e.into()))?;
        {
            let mut meta = transaction.open_table(META).map_err(|e| fail(e.into()))?;
            meta.insert(META_UUID, &self.uuid.as_bytes()[..])
                .map_err(|e| fail(e.into()))?;
            for table in [RECORDS, MANIFESTS, PAGE_SUMS] {
                transaction.open_table(table).map_err(|e| fail(e.into()))?;
            }
        }
        transaction.commit().map_err(|e| fail(e.into()))
    }

    /// Checks that the catalogue is there and belongs to the pool.
    pub fn check(&self) -> Result<(), PoolError> {
        if !self.path.exists() {
            return Err(PoolError::CatalogueMissing {
                path: self.path.clone(),
            });
        }
        self.read(|_| Ok(()))
    }

    /// Fails when the pool was destroyed and made anew since it was opened: its pages are others'.
    fn check_owner(&self, found: Option<&[u8]>) -> Result<(), PoolError> {
        if found == Some(&self.uuid.as_bytes()[..]) {
            return Ok(());
        }
        Err(PoolError::ForeignCatalogue {
            path: self.path.clone(),
        })
    }

    pub fn read<T>(
        &self,
        body: impl FnOnce(&View<'_>) -> Result<T, PoolError>,
    ) -> Result<T, PoolError> {
        self.guarded(|| self.read_unguarded(body))
    }

    fn read_unguarded<T>(
        &self,
        body: impl FnOnce(&View<'_>) -> Result<T, PoolError>,
    ) -> Result<T, PoolError> {
        let opened = |e: redb::Error| PoolError::catalogue("open", &self.path, e);
        let mut lease = Lease::take(&self.lock, Mode::Shared, self.patience)?;
        let database = match builder().open_read_only(&self.path) {
            Err(DatabaseError::RepairAborted) => {
                // Its last user was killed: redb replays what it needs, which takes a writer.
                drop(lease);
                let exclusive = Lease::take(&self.lock, Mode::Exclusive, self.patience)?;
                drop(builder().open(&self.path).map_err(|e| opened(e.into()))?);
                drop(exclusive);
                lease = Lease::take(&self.lock, Mode::Shared, self.patience)?;
                builder()
                    .open_read_only(&self.path)
                    .map_err(|e| opened(e.into()))?
            }
            other => other.map_err(|e| opened(e.into()))?,
        };
        let transaction = database.begin_read().map_err(|e| opened(e.into()))?;
        let view = View {
            path: &self.path,
            transaction,
        };
        let result = view
            .owner()
            .and_then(|owner| self.check_owner(owner.as_deref()))
            .and_then(|()| body(&view));
        drop(view);
        drop(database);
        drop(lease);
        result
    }

    /// Runs `body` and makes its changes durable and visible, then `after` while nobody else can
    /// read the catalogue. An error of `body` leaves the catalogue as it was; one of `after` comes
    /// too late for that, so it has to be dealt with there.
    pub fn change<T>(
        &self,
        body: impl FnOnce(&mut Change<'_>) -> Result<T, PoolError>,
        after: impl FnOnce(&T),
    ) -> Result<T, PoolError> {
        self.guarded(|| self.change_unguarded(body, after))
    }

    /// Has redb check its own checksums and structure, which reading does not.
    pub fn check_integrity(&self) -> Result<(), PoolError> {
        self.guarded(|| {
            let checked = |e| PoolError::catalogue("check", &self.path, e);
            let _lease = Lease::take(&self.lock, Mode::Exclusive, self.patience)?;
            let mut database = builder()
                .open(&self.path)
                .map_err(|e| checked(redb::Error::from(e)))?;
            match database.check_integrity() {
                Ok(true) => Ok(()),
                Ok(false) => Err(self.damaged()),
                Err(e) => Err(checked(e.into())),
            }
        })
    }

    /// redb panics on some damaged files; a damaged file is an error here.
    fn guarded<T>(&self, body: impl FnOnce() -> Result<T, PoolError>) -> Result<T, PoolError> {
        catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|_| Err(self.damaged()))
    }

    fn damaged(&self) -> PoolError {
        PoolError::CatalogueDamaged {
            path: self.path.clone(),
        }
    }

    fn change_unguarded<T>(
        &self,
        body: impl FnOnce(&mut Change<'_>) -> Result<T, PoolError>,
        after: impl FnOnce(&T),
    ) -> Result<T, PoolError> {
        let fail = |action| move |e: redb::Error| PoolError::catalogue(action, &self.path, e);
        let _lease = Lease::take(&self.lock, Mode::Exclusive, self.patience)?;
        let database: Database = builder()
            .open(&self.path)
            .map_err(|e| fail("open")(e.into()))?;
        let transaction = database
            .begin_write()
            .map_err(|e| fail("write to")(e.into()))?;
        let mut change = Change {
            path: &self.path,
            transaction,
        };
        self.check_owner(change.owner()?.as_deref())?;
        let value = body(&mut change)?;
        change
            .transaction
            .commit()
            .map_err(|e| fail("commit to")(e.into()))?;
        after(&value);
        Ok(value)
    }
}

impl View<'_> {
    fn fail(&self, e: impl Into<redb::Error>) -> PoolError {
        PoolError::catalogue("read", self.path, e)
    }

    fn owner(&self) -> Result<Option<Vec<u8>>, PoolError> {
        let table = self
            .transaction
            .open_table(META)
            .map_err(|e| self.fail(e))?;
        let value = table.get(META_UUID).map_err(|e| self.fail(e))?;
        Ok(value.map(|value| value.value().to_vec()))
    }

    pub fn list(&self) -> Result<Listing, PoolError> {
        let table = self
            .transaction
            .open_table(RECORDS)
            .map_err(|e| self.fail(e))?;
        listing(&table, |e| self.fail(e))
    }

    /// Whether any generation of the template is there, readable or not.
    pub fn contains(&self, id: &TemplateId) -> Result<bool, PoolError> {
        let table = self
            .transaction
            .open_table(RECORDS)
            .map_err(|e| self.fail(e))?;
        let (first, last) = (key(id, 0), key(id, u64::MAX));
        let mut range = table
            .range::<&[u8; KEY]>(&first..=&last)
            .map_err(|e| self.fail(e))?;
        Ok(range.next().is_some())
    }

    /// The record of one generation, or of the newest.
    pub fn record(&self, id: &TemplateId, generation: Option<u64>) -> Result<Record, PoolError> {
        let table = self
            .transaction
            .open_table(RECORDS)
            .map_err(|e| self.fail(e))?;
        let (first, last) = (key(id, 0), key(id, u64::MAX));
        let newest = table
            .range::<&[u8; KEY]>(&first..=&last)
            .map_err(|e| self.fail(e))?
            .next_back()
            .ok_or(PoolError::NoSuchTemplate { id: *id })?
            .map_err(|e| self.fail(e))?;
        let Some(generation) = generation else {
            let (_, generation) = split_key(newest.0.value());
            return Record::decode(*id, generation, newest.1.value());
        };
        let record = table
            .get(&key(id, generation))
            .map_err(|e| self.fail(e))?
            .ok_or(PoolError::NoSuchGeneration {
                id: *id,
                generation,
            })?;
        Record::decode(*id, generation, record.value())
    }

    pub fn manifest(&self, record: &Record) -> Result<Vec<u8>, PoolError> {
        let bytes = self.blob(MANIFESTS, record, "its manifest is missing")?;
        if blake3::hash(&bytes) != record.manifest_sum {
            return Err(PoolError::BadRecord {
                id: record.info.id,
                what: "its manifest's checksum differs",
            });
        }
        Ok(bytes)
    }

    pub fn page_sums(&self, record: &Record) -> Result<Vec<PageSum>, PoolError> {
        let bytes = self.blob(PAGE_SUMS, record, "its page checksums are missing")?;
        let (sums, rest) = bytes.as_chunks::<32>();
        if blake3::hash(&bytes) != record.page_sums_sum
            || !rest.is_empty()
            || sums.len() as u64 != record.info.stored_pages
        {
            return Err(PoolError::BadRecord {
                id: record.info.id,
                what: "its page checksums are damaged",
            });
        }
        Ok(sums.to_vec())
    }

    fn blob(
        &self,
        table: TableDefinition<&[u8; KEY], &[u8]>,
        record: &Record,
        missing: &'static str,
    ) -> Result<Vec<u8>, PoolError> {
        let table = self
            .transaction
            .open_table(table)
            .map_err(|e| self.fail(e))?;
        let value = table
            .get(&key(&record.info.id, record.info.generation))
            .map_err(|e| self.fail(e))?
            .ok_or(PoolError::BadRecord {
                id: record.info.id,
                what: missing,
            })?;
        Ok(value.value().to_vec())
    }
}

impl Change<'_> {
    fn fail(&self, e: impl Into<redb::Error>) -> PoolError {
        PoolError::catalogue("write to", self.path, e)
    }

    fn owner(&self) -> Result<Option<Vec<u8>>, PoolError> {
        let table = self
            .transaction
            .open_table(META)
            .map_err(|e| self.fail(e))?;
        let value = table.get(META_UUID).map_err(|e| self.fail(e))?;
        Ok(value.map(|value| value.value().to_vec()))
    }

    pub fn list(&self) -> Result<Listing, PoolError> {
        let table = self
            .transaction
            .open_table(RECORDS)
            .map_err(|e| self.fail(e))?;
        listing(&table, |e| self.fail(e))
    }

    /// Every generation of `id` that is in the catalogue, readable or not, oldest first.
    pub fn generations(&self, id: &TemplateId) -> Result<Vec<u64>, PoolError> {
        let table = self
            .transaction
            .open_table(RECORDS)
            .map_err(|e| self.fail(e))?;
        let (first, last) = (key(id, 0), key(id, u64::MAX));
        let range = table
            .range::<&[u8; KEY]>(&first..=&last)
            .map_err(|e| self.fail(e))?;
        range
            .map(|entry| Ok(split_key(entry.map_err(|e| self.fail(e))?.0.value()).1))
            .collect()
    }

    /// The record of one generation; `None` when it cannot be read, so that it can be removed.
    pub fn record(&self, id: &TemplateId, generation: u64) -> Result<Option<Record>, PoolError> {
        let table = self
            .transaction
            .open_table(RECORDS)
            .map_err(|e| self.fail(e))?;
        let bytes = table.get(&key(id, generation)).map_err(|e| self.fail(e))?;
        Ok(bytes.and_then(|bytes| Record::decode(*id, generation, bytes.value()).ok()))
    }

    /// A generation that no template of this pool ever had.
    pub fn next_generation(&mut self) -> Result<u64, PoolError> {
        let mut meta = self
            .transaction
            .open_table(META)
            .map_err(|e| self.fail(e))?;
        let last = meta
            .get(META_GENERATION)
            .map_err(|e| self.fail(e))?
            .and_then(|value| value.value().try_into().ok())
            .map_or(0, u64::from_le_bytes);
        let next = last + 1;
        meta.insert(META_GENERATION, &next.to_le_bytes()[..])
            .map_err(|e| self.fail(e))?;
        Ok(next)
    }

    pub fn insert(
        &mut self,
        record: &Record,
        manifest: &[u8],
        page_sums: &[PageSum],
    ) -> Result<(), PoolError> {
        let key = key(&record.info.id, record.info.generation);
        let bytes = record.encode().ok_or(PoolError::BadRecord {
            id: record.info.id,
            what: "it cannot be encoded",
        })?;
        for (table, value) in [
            (RECORDS, bytes.as_slice()),
            (MANIFESTS, manifest),
            (PAGE_SUMS, page_sums.as_flattened()),
        ] {
            let mut table = self
                .transaction
                .open_table(table)
                .map_err(|e| self.fail(e))?;
            table.insert(&key, value).map_err(|e| self.fail(e))?;
        }
        Ok(())
    }

    pub fn remove(&mut self, id: &TemplateId, generation: u64) -> Result<(), PoolError> {
        let key = key(id, generation);
        for table in [RECORDS, MANIFESTS, PAGE_SUMS] {
            let mut table = self
                .transaction
                .open_table(table)
                .map_err(|e| self.fail(e))?;
            table.remove(&key).map_err(|e| self.fail(e))?;
        }
        Ok(())
    }

    /// Forgets every template; generations go on counting.
    pub fn clear(&mut self) -> Result<u64, PoolError> {
        let mut forgotten = 0;
        for table in [RECORDS, MANIFESTS, PAGE_SUMS] {
            let mut table = self
                .transaction
                .open_table(table)
                .map_err(|e| self.fail(e))?;
            let mut removed = 0;
            table
                .retain(|_, _| {
                    removed += 1;
                    false
                })
                .map_err(|e| self.fail(e))?;
            forgotten = forgotten.max(removed);
        }
        Ok(forgotten)
    }
}

fn builder() -> Builder {
    let mut builder = Builder::new();
    builder.set_cache_size(CACHE_BYTES);
    builder
}

fn key(id: &TemplateId, generation: u64) -> [u8; KEY] {
    let mut key = [0; KEY];
    key[..32].copy_from_slice(id.as_bytes());
    key[32..].copy_from_slice(&generation.to_be_bytes());
    key
}

fn split_key(key: &[u8; KEY]) -> (TemplateId, u64) {
    let (mut id, mut generation) = ([0; 32], [0; 8]);
    id.copy_from_slice(&key[..32]);
    generation.copy_from_slice(&key[32..]);
    (TemplateId::from_bytes(id), u64::from_be_bytes(generation))
}

fn listing(
    table: &impl ReadableTable<&'static [u8; KEY], &'static [u8]>,
    fail: impl Fn(redb::Error) -> PoolError,
) -> Result<Listing, PoolError> {
    let mut listing = Listing::default();
    for entry in table.iter().map_err(|e| fail(e.into()))? {
        let (stored_key, bytes) = entry.map_err(|e| fail(e.into()))?;
        let (id, generation) = split_key(stored_key.value());
        match Record::decode(id, generation, bytes.value()) {
            Ok(record) => listing.records.push(record),
            Err(e) => listing.damaged.push(e),
        }
    }
    Ok(listing)
}
