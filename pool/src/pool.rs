//! Opening, formatting and keeping a pool.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::Serialize;
use uuid::Uuid;

use crate::PAGE_SIZE;
use crate::backend::{Backend, Data, memory_path};
use crate::catalogue::{Catalogue, Change};
use crate::dax::device::DaxError;
use crate::error::PoolError;
use crate::lease::{Lease, LeaseFiles, Mode, holders};
use crate::place::{
    self, device_link, open_device, open_memory, remove_if_there, write_superblock,
};
use crate::reader::TemplateReader;
use crate::record::{Listing, Record};
use crate::space::{FreeSpace, Run, unshared};
use crate::superblock::{DATA_OFFSET, Superblock, VERSION};
use crate::template::{Source, TemplateId, TemplateInfo};
use crate::writer::TemplateWriter;

pub(crate) const LEAST_SIZE: u64 = DATA_OFFSET + (1 << 20);

/// How long an operation waits for another process before it says who is in the way.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);

/// What a new pool is like.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PoolOptions {
    pub backend: Backend,
    /// The pool's directory.
    pub path: PathBuf,
    /// Bytes of the data file; a device is taken whole.
    pub size: u64,
    /// The device of [`Backend::Dax`].
    pub device: Option<PathBuf>,
}

impl PoolOptions {
    /// Opens the pool, making it first where there is none.
    pub fn open_or_format(&self) -> Result<Pool, PoolError> {
        match Pool::open(&self.path) {
            Err(PoolError::NotFound { .. }) => {}
            other => return other,
        }
        match self.format(false) {
            Err(PoolError::AlreadyExists { .. }) => Pool::open(&self.path),
            other => other,
        }
    }

    /// Makes the pool. What a device holds already is lost with `overwrite`, and an error otherwise if it
    /// is a pool.
    pub fn format(&self, overwrite: bool) -> Result<Pool, PoolError> {
        if self.backend != Backend::Dax {
            return Pool::format(&self.path, self.backend, self.size);
        }
        let device = self.device.as_deref().ok_or(DaxError::NoDevice)?;
        Pool::format_device(&self.path, device, overwrite)
    }
}

/// An open pool. Clones share it.
#[derive(Clone)]
pub struct Pool {
    inner: Arc<Inner>,
}

pub(crate) struct Inner {
    pub directory: PathBuf,
    pub superblock: Superblock,
    pub data: Data,
    pub catalogue: Catalogue,
    pub leases: LeaseFiles,
}

/// Sizes of a pool and of what is in it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PoolStat {
    pub path: PathBuf,
    pub backend: Backend,
    pub uuid: String,
    pub version: u32,
    pub page_size: u64,
    /// Bytes of the data file.
    pub size: u64,
    /// Templates, counting those whose newest generation this is.
    pub templates: u64,
    /// Older generations that readers still use.
    pub superseded: u64,
    /// Bytes of the templates as their functions see them.
    pub logical_bytes: u64,
    /// Bytes of their pages in the pool, each page once.
    pub stored_bytes: u64,
    /// Bytes that pages of several templates would take beyond that if each had its own.
    pub shared_bytes: u64,
    /// Bytes of pages that hold only zeros and are not stored.
    pub zero_bytes: u64,
    pub manifest_bytes: u64,
    pub free_bytes: u64,
    /// Records that cannot be read; `trenv-pool verify` names them.
    pub damaged_records: u64,
}

/// A template and what it alone takes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Usage {
    #[serde(flatten)]
    pub info: TemplateInfo,
    /// Bytes in the pool that removing it would free: no other template has these pages too.
    pub unshared_bytes: u64,
}

/// What a check of the whole pool found.
#[derive(Debug, Default)]
pub struct Verification {
    pub templates: u64,
    pub pages: u64,
    pub faults: Vec<PoolError>,
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool")
            .field("directory", &self.inner.directory)
            .field("uuid", &self.inner.superblock.uuid)
            .finish_non_exhaustive()
    }
}

impl Pool {
    /// Makes a pool of `size` bytes in the directory `path`, which may exist but hold no pool.
    pub fn format(path: &Path, backend: Backend, size: u64) -> Result<Self, PoolError> {
        if backend == Backend::Dax {
            return Err(DaxError::NoDevice.into());
        }
        if size < LEAST_SIZE {
            return Err(PoolError::TooSmall {
                size,
                least: LEAST_SIZE,
            });
        }
        Self::make(path, backend, size, |superblock| match backend {
            Backend::Memfd => Data::make_memory(superblock),
            Backend::File | Backend::Dax => Ok(()),
        })?;
        Self::open(path)
    }

    /// Makes a pool whose pages are a device's; it is known by a link in the pool's directory.
    pub fn format_device(path: &Path, device: &Path, overwrite: bool) -> Result<Self, PoolError> {
        let memory = place::unoccupied(device, overwrite)?;
        Self::make(path, Backend::Dax, memory.size(), |superblock| {
            place::take_device(path, device, &memory, superblock)
        })?;
        // Its lock would be in the way.
        drop(memory);
        Self::open(path)
    }

    /// `place` makes what holds the pages, where that is not `pool.data`.
    fn make(
        path: &Path,
        backend: Backend,
        size: u64,
        place: impl FnOnce(&Superblock) -> Result<(), PoolError>,
    ) -> Result<(), PoolError> {
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(path)
            .map_err(|e| PoolError::io("make the directory", path, e))?;
        let leases = LeaseFiles::new(path);
        let formatting = Lease::take(&leases.writer(), Mode::Exclusive, PATIENCE)?;
        let data = path.join("pool.data");
        if data.exists() {
            return Err(PoolError::AlreadyExists {
                path: path.to_path_buf(),
            });
        }
        let superblock = Superblock {
            backend,
            uuid: Uuid::new_v4(),
            size: size / PAGE_SIZE as u64 * PAGE_SIZE as u64,
            created: now(),
        };
        let readers = leases.readers_directory();
        std::fs::create_dir_all(&readers)
            .map_err(|e| PoolError::io("make the directory", &readers, e))?;
        // Without pool.data there is no pool, so what lies here is of a format that did not finish.
        remove_if_there(&path.join("catalogue.redb"))?;
        catalogue_of(path, &superblock, &leases).create()?;
        place(&superblock)?;
        write_superblock(path, &data, &superblock)?;
        drop(formatting);
        Ok(())
    }

    /// Opens a pool; any number of processes may.
    pub fn open(path: &Path) -> Result<Self, PoolError> {
        let data_path = path.join("pool.data");
        let file = match OpenOptions::new().read(true).write(true).open(&data_path) {
            Ok(file) => file,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                return Err(PoolError::NotFound {
                    path: path.to_path_buf(),
                });
            }
            Err(e) => return Err(PoolError::io("open", &data_path, e)),
        };
        let superblock = Superblock::read(&file, &data_path)?;
        let leases = LeaseFiles::new(path);
        let catalogue = catalogue_of(path, &superblock, &leases);
        catalogue.check()?;
        let data = match superblock.backend {
            Backend::File => Data::on_disk(file, &data_path),
            Backend::Memfd => open_memory(&superblock, &catalogue, &leases)?,
            Backend::Dax => open_device(path, &superblock)?,
        };
        Ok(Self {
            inner: Arc::new(Inner {
                directory: path.to_path_buf(),
                superblock,
                data,
                catalogue,
                leases,
            }),
        })
    }

    /// Removes the pool in `path`, whatever it holds, unless somebody uses one of its templates.
    pub fn destroy(path: &Path) -> Result<(), PoolError> {
        let pool = Self::open(path)?;
        let leases = &pool.inner.leases;
        let _writer = Lease::take(&leases.writer(), Mode::Exclusive, PATIENCE)?;
        let listing = pool.inner.catalogue.read(|view| view.list())?;
        for record in &listing.records {
            let (id, generation) = (record.info.id, record.info.generation);
            drop(
                pool.inner
                    .unused(&id, generation)?
                    .ok_or_else(|| PoolError::InUse {
                        id,
                        holders: holders(&leases.reader(&id, generation)),
                    })?,
            );
        }
        remove_if_there(&path.join("pool.data"))?;
        if pool.backend() == Backend::Memfd {
            remove_if_there(&memory_path(pool.inner.superblock.uuid))?;
        }
        if let Some(memory) = pool.inner.data.device() {
            memory.write_at(&[0; PAGE_SIZE], 0)?;
            remove_if_there(&device_link(path))?;
        }
        remove_if_there(&path.join("catalogue.redb"))?;
        let readers = leases.readers_directory();
        std::fs::remove_dir_all(&readers).map_err(|e| PoolError::io("remove", &readers, e))?;
        remove_if_there(&leases.catalogue())?;
        remove_if_there(&leases.writer())?;
        // The directory may be the user's, with other files in it.
        let _ = std::fs::remove_dir(path);
        Ok(())
    }

    pub fn path(&self) -> &Path {
        &self.inner.directory
    }

    /// Whether there is another pool, or none, in this one's place.
    pub fn is_replaced(&self) -> bool {
        let path = self.inner.directory.join("pool.data");
        let Ok(file) = File::open(&path) else {
            return true;
        };
        let found = Superblock::read(&file, &path);
        !found.is_ok_and(|found| found.uuid == self.inner.superblock.uuid)
    }

    pub fn backend(&self) -> Backend {
        self.inner.superblock.backend
    }

    /// Starts a template for `key`. Waits for another writer to end, for ten seconds at most.
    pub fn begin(&self, key: &str) -> Result<TemplateWriter, PoolError> {
        let lease = Lease::take(&self.inner.leases.writer(), Mode::Exclusive, PATIENCE)?;
        let superseded = self
            .inner
            .catalogue
            .read(|view| Ok(superseded(&view.list()?)))?;
        if !superseded.is_empty() {
            self.inner.reclaim(&superseded)?;
        }
        let space = self.inner.free_space()?;
        Ok(TemplateWriter::new(
            Arc::clone(&self.inner),
            lease,
            key,
            space,
        ))
    }

    /// Attaches to a template: its newest generation, or the one given.
    pub fn template(
        &self,
        id: &TemplateId,
        generation: Option<u64>,
    ) -> Result<TemplateReader, PoolError> {
        TemplateReader::attach(Arc::clone(&self.inner), id, generation)
    }

    /// The newest generation of every template, oldest commit first.
    pub fn list(&self) -> Result<Vec<TemplateInfo>, PoolError> {
        let listing = self.inner.catalogue.read(|view| view.list())?;
        for e in &listing.damaged {
            tracing::warn!("{e}");
        }
        let mut infos: Vec<TemplateInfo> = newest(&listing).map(|r| r.info.clone()).collect();
        infos.sort_unstable_by_key(|info| info.generation);
        Ok(infos)
    }

    /// [`Pool::list`], with the space that removing each template would free.
    pub fn usage(&self) -> Result<Vec<Usage>, PoolError> {
        let listing = self.inner.catalogue.read(|view| view.list())?;
        let mut owners: Vec<TemplateId> = Vec::new();
        let mut named = Vec::new();
        for record in &listing.records {
            if owners.last() != Some(&record.info.id) {
                owners.push(record.info.id);
            }
            named.extend(runs(record).map(|run| (owners.len() - 1, run)));
        }
        let unshared = unshared(named.into_iter(), owners.len());
        let usage = std::iter::zip(newest(&listing), unshared).map(|(record, pages)| Usage {
            info: record.info.clone(),
            unshared_bytes: pages * PAGE_SIZE as u64,
        });
        let mut usage: Vec<Usage> = usage.collect();
        usage.sort_unstable_by_key(|usage| usage.info.generation);
        Ok(usage)
    }

    /// Removes every generation of a template and frees its pages, but for those that others share;
    /// `false` when there is none. Waits ten seconds for its readers, then says who they are.
    pub fn delete(&self, id: &TemplateId) -> Result<bool, PoolError> {
        self.delete_within(id, PATIENCE)
    }

    /// [`Pool::delete`] with another time to wait for readers.
    pub fn delete_within(&self, id: &TemplateId, patience: Duration) -> Result<bool, PoolError> {
        let start = Instant::now();
        loop {
            match self.inner.delete(id) {
                Err(PoolError::InUse { .. }) if start.elapsed() < patience => {
                    std::thread::sleep(Duration::from_millis(20));
                }
                other => return other,
            }
        }
    }

    pub fn stat(&self) -> Result<PoolStat, PoolError> {
        let inner = &self.inner;
        let listing = inner.catalogue.read(|view| view.list())?;
        let (space, _) = inner.space_of(&listing);
        let page = PAGE_SIZE as u64;
        let sum = |field: fn(&TemplateInfo) -> u64| -> u64 {
            listing.records.iter().map(|r| field(&r.info)).sum()
        };
        let templates = newest(&listing).count() as u64;
        let (pages, stored) = (sum(|i| i.pages), sum(|i| i.stored_pages));
        let used = inner.data_pages() - space.free_pages();
        Ok(PoolStat {
            path: inner.directory.clone(),
            backend: inner.superblock.backend,
            uuid: inner.superblock.uuid.to_string(),
            version: VERSION,
            page_size: page,
            size: inner.superblock.size,
            templates,
            superseded: listing.records.len() as u64 - templates,
            logical_bytes: pages * page,
            stored_bytes: used * page,
            shared_bytes: stored.saturating_sub(used) * page,
            zero_bytes: (pages - stored) * page,
            manifest_bytes: sum(|i| i.manifest_bytes),
            free_bytes: space.free_pages() * page,
            damaged_records: listing.damaged.len() as u64,
        })
    }

    /// Checks every record and every page, calling `progress` after each template with
    /// its fault, if any.
    pub fn verify(
        &self,
        mut progress: impl FnMut(&TemplateInfo, Option<&PoolError>),
    ) -> Result<Verification, PoolError> {
        let listing = self.inner.catalogue.read(|view| view.list())?;
        let (_, outside) = self.inner.space_of(&listing);
        let mut found = Verification::default();
        found
            .faults
            .extend(self.inner.catalogue.check_integrity().err());
        for (id, what) in outside {
            found.faults.push(PoolError::BadRecord { id, what });
        }
        for record in &listing.records {
            let checked = self
                .template(&record.info.id, Some(record.info.generation))
                .and_then(|reader| reader.verify());
            if matches!(&checked, Err(err) if err.is_removal()) {
                // Since it was listed; that is no fault.
                continue;
            }
            progress(&record.info, checked.as_ref().err());
            found.templates += 1;
            found.pages += record.info.stored_pages;
            found.faults.extend(checked.err());
        }
        found.faults.extend(listing.damaged);
        Ok(found)
    }
}

impl Inner {
    pub fn data_pages(&self) -> u64 {
        (self.superblock.size - DATA_OFFSET) / PAGE_SIZE as u64
    }

    pub fn free_space(&self) -> Result<FreeSpace, PoolError> {
        let listing = self.catalogue.read(|view| view.list())?;
        if let Some(damaged) = listing.damaged.into_iter().next() {
            // Its pages are not known, so any free page might be one of them.
            return Err(damaged);
        }
        let used = listing.records.iter().flat_map(runs).collect();
        Ok(FreeSpace::around(used, self.data_pages()).0)
    }

    fn space_of(&self, listing: &Listing) -> (FreeSpace, Vec<(TemplateId, &'static str)>) {
        let used: Vec<Run> = listing.records.iter().flat_map(runs).collect();
        let (space, outside) = FreeSpace::around(used, self.data_pages());
        let named = outside.iter().flat_map(|outside| {
            let owner = listing
                .records
                .iter()
                .find(|record| runs(record).any(|run| run == outside.0));
            owner.map(|record| (record.info.id, "its pages lie outside the pool"))
        });
        (space, named.collect())
    }

    /// A lease that shuts readers of a generation out, unless there are any.
    fn unused(&self, id: &TemplateId, generation: u64) -> Result<Option<Lease>, PoolError> {
        Lease::try_take(&self.leases.reader(id, generation), Mode::Exclusive)
    }

    fn delete(&self, id: &TemplateId) -> Result<bool, PoolError> {
        // A change is flushed to disk, which nothing to delete is not worth.
        if !self.catalogue.read(|view| view.contains(id))? {
            return Ok(false);
        }
        let removed = self.catalogue.change(
            |change| {
                let generations = change.generations(id)?;
                let mut freed = Freed::default();
                for generation in generations {
                    if !self.remove_unused(change, id, generation, &mut freed)? {
                        return Err(PoolError::InUse {
                            id: *id,
                            holders: holders(&self.leases.reader(id, generation)),
                        });
                    }
                }
                freed.keep_shared(change, self.data_pages())?;
                Ok(freed)
            },
            |freed| self.release(freed),
        )?;
        Ok(!removed.lease_files.is_empty())
    }

    /// Frees generations that have a newer one and no reader left.
    pub fn reclaim(&self, generations: &[(TemplateId, u64)]) -> Result<(), PoolError> {
        self.catalogue.change(
            |change| {
                let mut freed = Freed::default();
                for (id, generation) in generations {
                    self.remove_unused(change, id, *generation, &mut freed)?;
                }
                freed.keep_shared(change, self.data_pages())?;
                Ok(freed)
            },
            |freed| self.release(freed),
        )?;
        Ok(())
    }

    /// Removes a generation from the catalogue unless it has readers. None can come meanwhile:
    /// they take their lease under the catalogue's lock, which a change holds alone.
    pub fn remove_unused(
        &self,
        change: &mut Change<'_>,
        id: &TemplateId,
        generation: u64,
        freed: &mut Freed,
    ) -> Result<bool, PoolError> {
        let Some(lease) = self.unused(id, generation)? else {
            return Ok(false);
        };
        if let Some(record) = change.record(id, generation)? {
            freed.runs.extend(runs(&record));
        }
        change.remove(id, generation)?;
        freed.lease_files.push(self.leases.reader(id, generation));
        freed.leases.push(lease);
        Ok(true)
    }

    /// Gives back what committed removals freed. The pages are free whether or not the file system
    /// takes them back, so a failure is only logged.
    pub fn release(&self, freed: &Freed) {
        let discarded = freed.runs.iter().try_for_each(|run| {
            let bytes = run.pages * PAGE_SIZE as u64;
            self.data.discard(offset_of(run.start), bytes)
        });
        let files = &freed.lease_files;
        let removed = files.iter().try_for_each(|path| remove_if_there(path));
        for e in [discarded, removed].into_iter().filter_map(Result::err) {
            tracing::warn!(error = %e, "A removed template's space was not given back to the disk");
        }
    }
}

/// What removals free once they are committed.
#[derive(Debug, Default)]
pub(crate) struct Freed {
    runs: Vec<Run>,
    lease_files: Vec<PathBuf>,
    leases: Vec<Lease>,
}

impl Freed {
    /// Leaves out the pages that other templates name; `change` has all removals and additions.
    pub fn keep_shared(&mut self, change: &Change<'_>, data_pages: u64) -> Result<(), PoolError> {
        if self.runs.is_empty() {
            return Ok(());
        }
        let listing = change.list()?;
        let runs_freed = std::mem::take(&mut self.runs);
        // A record that cannot be read may name any of them.
        if listing.damaged.is_empty() {
            let named = listing.records.iter().flat_map(runs).collect();
            let (space, _) = FreeSpace::around(named, data_pages);
            let free = runs_freed.into_iter().flat_map(|run| space.within(run));
            self.runs = free.collect();
        }
        Ok(())
    }
}

/// Byte offset in the data file of a data page.
pub(crate) fn offset_of(page: u64) -> u64 {
    DATA_OFFSET + page * PAGE_SIZE as u64
}

/// Pages that a record names.
fn runs(record: &Record) -> impl Iterator<Item = Run> + '_ {
    record
        .extents
        .iter()
        .filter_map(|extent| match extent.source {
            Source::Zero => None,
            Source::Data { offset } => Some(Run {
                // An offset before the data area becomes a page far outside, and so an outlier.
                start: offset.wrapping_sub(DATA_OFFSET) / PAGE_SIZE as u64,
                pages: extent.pages,
            }),
        })
}

/// Records come ordered by id and generation, so the last of an id is its newest.
fn newest(listing: &Listing) -> impl Iterator<Item = &Record> {
    let records = &listing.records;
    records.iter().enumerate().filter_map(|(i, record)| {
        let next = records.get(i + 1);
        next.is_none_or(|next| next.info.id != record.info.id)
            .then_some(record)
    })
}

fn superseded(listing: &Listing) -> Vec<(TemplateId, u64)> {
    let pairs = listing.records.windows(2);
    pairs
        .filter(|pair| pair[0].info.id == pair[1].info.id)
        .map(|pair| (pair[0].info.id, pair[0].info.generation))
        .collect()
}

fn catalogue_of(path: &Path, superblock: &Superblock, leases: &LeaseFiles) -> Catalogue {
    let file = path.join("catalogue.redb");
    Catalogue::new(file, superblock.uuid, leases.catalogue(), PATIENCE)
}

pub(crate) fn now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}
