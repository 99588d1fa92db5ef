//! Putting a template into the pool.

use std::io::ErrorKind;
use std::sync::Arc;

use crate::PAGE_SIZE;
use crate::error::PoolError;
use crate::lease::Lease;
use crate::pool::{Freed, Inner, now, offset_of};
use crate::reader::TemplateReader;
use crate::record::{PageSum, Record};
use crate::sharing::Shareable;
use crate::space::{FreeSpace, Run};
use crate::template::{Extent, Source, TemplateId, TemplateInfo, push_page};

/// Pages written in one go.
const BATCH: usize = 256;

static ZERO_PAGE: [u8; PAGE_SIZE] = [0; PAGE_SIZE];

/// Appends the pages of one template. Nothing is visible until [`TemplateWriter::commit`]; a writer
/// that is dropped, or whose process dies, leaves the pool as it was.
pub struct TemplateWriter {
    pool: Arc<Inner>,
    _lease: Lease,
    id: TemplateId,
    key: String,
    space: FreeSpace,
    /// Free pages when the writer began.
    free_at_start: u64,
    /// Free pages that the next pages go to, in order.
    run: Run,
    /// Pages not written yet; they belong directly before `run`.
    batch: Vec<u8>,
    pages: u64,
    extents: Vec<Extent>,
    sums: Vec<PageSum>,
    /// Pages that need not be stored again.
    shareable: Option<Shareable>,
    /// Pages of `sums` that are stored for this template.
    own: u64,
    committed: bool,
    written: Vec<Run>,
}

impl std::fmt::Debug for TemplateWriter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TemplateWriter")
            .field("key", &self.key)
            .field("pages", &self.pages)
            .finish_non_exhaustive()
    }
}

impl TemplateWriter {
    pub(crate) fn new(pool: Arc<Inner>, lease: Lease, key: &str, space: FreeSpace) -> Self {
        Self {
            pool,
            _lease: lease,
            id: TemplateId::of(key),
            key: key.to_owned(),
            free_at_start: space.free_pages(),
            space,
            run: Run { start: 0, pages: 0 },
            batch: Vec::with_capacity(BATCH * PAGE_SIZE),
            pages: 0,
            extents: Vec::new(),
            sums: Vec::new(),
            shareable: None,
            own: 0,
            committed: false,
            written: Vec::new(),
        }
    }

    /// The id that the template will have.
    pub fn id(&self) -> TemplateId {
        self.id
    }

    /// From here on pages that another template has are not stored again: this one names them too,
    /// and they stay as long as either does.
    pub fn share_with(&mut self, other: TemplateReader) -> Result<(), PoolError> {
        if !other.is_in(&self.pool) {
            return Err(PoolError::OtherPool {
                id: other.info().id,
                path: self.pool.directory.clone(),
            });
        }
        self.shareable = Some(Shareable::of(other)?);
        Ok(())
    }

    /// Says that up to `pages` more pages will come, so that a pool too full for them refuses at
    /// once, and so that they lie together.
    pub fn expect_pages(&mut self, pages: u64) -> Result<(), PoolError> {
        if self.space.free_pages() + self.run.pages < pages {
            return Err(self.full(self.own + pages));
        }
        if self.run.pages < pages {
            self.flush_batch()?;
            self.space.put_back(self.run);
            self.run = self.space.take(pages).unwrap_or(Run { start: 0, pages: 0 });
        }
        Ok(())
    }

    /// Appends one page. A page of zeros takes no space.
    pub fn page(&mut self, page: &[u8]) -> Result<(), PoolError> {
        if page.len() != PAGE_SIZE {
            return Err(PoolError::PageLength { found: page.len() });
        }
        if page == ZERO_PAGE {
            push_page(&mut self.extents, self.pages, Source::Zero);
            self.pages += 1;
            return Ok(());
        }
        let sum = *blake3::hash(page).as_bytes();
        let shareable = self.shareable.as_mut();
        if let Some(offset) = shareable.and_then(|pages| pages.find(&sum, page)) {
            self.push(Source::Data { offset }, sum);
            return Ok(());
        }
        if self.run.pages == 0 {
            self.flush_batch()?;
            self.run = self
                .space
                .take(u64::MAX)
                .ok_or_else(|| self.full(self.own + 1))?;
        }
        let offset = offset_of(self.run.start);
        self.run.start += 1;
        self.run.pages -= 1;
        self.own += 1;
        self.push(Source::Data { offset }, sum);
        self.batch.extend_from_slice(page);
        if self.batch.len() == BATCH * PAGE_SIZE {
            self.flush_batch()?;
        }
        Ok(())
    }

    fn push(&mut self, source: Source, sum: PageSum) {
        push_page(&mut self.extents, self.pages, source);
        self.pages += 1;
        self.sums.push(sum);
    }

    /// Appends pages of zeros.
    pub fn zero_pages(&mut self, pages: u64) {
        if pages == 0 {
            return;
        }
        push_page(&mut self.extents, self.pages, Source::Zero);
        if let Some(last) = self.extents.last_mut() {
            last.pages += pages - 1;
        }
        self.pages += pages;
    }

    /// Flushes the pages and makes the template visible, as a new generation of its key. Older
    /// generations go unless somebody reads them; those go later.
    pub fn commit(mut self, manifest: &[u8]) -> Result<TemplateInfo, PoolError> {
        self.flush_batch()?;
        self.pool.data.flush().map_err(|e| self.disk_full(e))?;
        for run in &self.written {
            let bytes = run.pages * PAGE_SIZE as u64;
            self.pool.data.forget_cached(offset_of(run.start), bytes);
        }
        if let Some(shareable) = &self.shareable {
            shareable.forget_cached();
        }
        let mut record = Record {
            info: TemplateInfo {
                id: self.id,
                generation: 0,
                key: std::mem::take(&mut self.key),
                pages: self.pages,
                stored_pages: self.sums.len() as u64,
                manifest_bytes: manifest.len() as u64,
                created: now(),
            },
            extents: std::mem::take(&mut self.extents),
            manifest_sum: *blake3::hash(manifest).as_bytes(),
            page_sums_sum: *blake3::hash(self.sums.as_flattened()).as_bytes(),
        };
        // From here on a failure may come after the record was stored: the pages are not ours to
        // give back any more.
        self.committed = true;
        let pool = &self.pool;
        let result = pool.catalogue.change(
            |change| {
                let mut freed = Freed::default();
                for generation in change.generations(&record.info.id)? {
                    pool.remove_unused(change, &record.info.id, generation, &mut freed)?;
                }
                record.info.generation = change.next_generation()?;
                change.insert(&record, manifest, &self.sums)?;
                freed.keep_shared(change, pool.data_pages())?;
                Ok(freed)
            },
            |freed| pool.release(freed),
        );
        result.map_err(|e| self.disk_full(e))?;
        Ok(record.info.clone())
    }

    fn flush_batch(&mut self) -> Result<(), PoolError> {
        let pages = (self.batch.len() / PAGE_SIZE) as u64;
        if pages == 0 {
            return Ok(());
        }
        let start = self.run.start - pages;
        self.written.push(Run { start, pages });
        let data = &self.pool.data;
        data.write_at(&self.batch, offset_of(start))
            .map_err(|e| self.disk_full(e))?;
        self.batch.clear();
        Ok(())
    }

    fn full(&self, pages: u64) -> PoolError {
        PoolError::Full {
            needed: pages * PAGE_SIZE as u64,
            free: self.free_at_start * PAGE_SIZE as u64,
            size: self.pool.superblock.size,
        }
    }

    /// Says what a lack of disk space means; other errors stay as they are.
    fn disk_full(&self, error: PoolError) -> PoolError {
        let kind = match &error {
            PoolError::Io { source, .. } => source.kind(),
            PoolError::Catalogue { source, .. } => match source.as_ref() {
                redb::Error::Io(e) => e.kind(),
                _ => return error,
            },
            _ => return error,
        };
        match kind {
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded => PoolError::DiskFull {
                path: self.pool.data.path.clone(),
                needed: self.own * PAGE_SIZE as u64,
                free: self.pool.data.disk_free(),
            },
            _ => error,
        }
    }
}

impl Drop for TemplateWriter {
    fn drop(&mut self) {
        if self.committed {
            return;
        }
        // No record names these pages; giving them back only saves space, so a failure is no harm.
        for run in &self.written {
            let bytes = run.pages * PAGE_SIZE as u64;
            let _ = self.pool.data.discard(offset_of(run.start), bytes);
        }
    }
}
