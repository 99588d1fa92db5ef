//! Reading a template.

use std::fmt;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, OnceLock};

use crate::PAGE_SIZE;
use crate::error::PoolError;
use crate::lease::{Lease, Mode, holders};
use crate::pool::Inner;
use crate::record::{PageSum, Record};
use crate::template::{Extent, Source, TemplateId, TemplateInfo};

/// Pages read in one go by a check.
const BATCH: u64 = 256;

/// Keeps the pages of one generation of a template, beyond the reader that it is from.
#[derive(Debug, Clone)]
pub struct PageLease {
    _lease: Arc<Lease>,
}

/// One generation of a template. Its pages and its record stay while this lives.
pub struct TemplateReader {
    pool: Arc<Inner>,
    lease: Arc<Lease>,
    record: Record,
    manifest: Vec<u8>,
    sums: OnceLock<Vec<PageSum>>,
}

impl fmt::Debug for TemplateReader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TemplateReader")
            .field("info", &self.record.info)
            .finish_non_exhaustive()
    }
}

impl TemplateReader {
    pub(crate) fn attach(
        pool: Arc<Inner>,
        id: &TemplateId,
        generation: Option<u64>,
    ) -> Result<Self, PoolError> {
        let size = pool.superblock.size;
        // The lease is taken under the catalogue's lock: nobody frees the pages in between.
        let (lease, record, manifest) = pool.catalogue.read(|view| {
            let record = view.record(id, generation)?;
            let path = pool.leases.reader(id, record.info.generation);
            let lease = Lease::try_take(&path, Mode::Shared)?.ok_or_else(|| PoolError::InUse {
                id: *id,
                holders: holders(&path),
            })?;
            let manifest = view.manifest(&record)?;
            Ok((lease, record, manifest))
        })?;
        let inside = |extent: &Extent| match extent.source {
            Source::Zero => true,
            Source::Data { offset } => {
                let end = (PAGE_SIZE as u64)
                    .checked_mul(extent.pages)
                    .and_then(|bytes| offset.checked_add(bytes));
                offset >= crate::DATA_OFFSET
                    && offset.is_multiple_of(PAGE_SIZE as u64)
                    && end.is_some_and(|end| end <= size)
            }
        };
        if !record.extents.iter().all(inside) {
            return Err(PoolError::BadRecord {
                id: *id,
                what: "its pages lie outside the pool",
            });
        }
        Ok(Self {
            pool,
            lease: Arc::new(lease),
            record,
            manifest,
            sums: OnceLock::new(),
        })
    }

    pub fn info(&self) -> &TemplateInfo {
        &self.record.info
    }

    /// For who maps the pages: while it lives they are not given to another template.
    pub fn lease(&self) -> PageLease {
        PageLease {
            _lease: Arc::clone(&self.lease),
        }
    }

    pub fn manifest(&self) -> &[u8] {
        &self.manifest
    }

    /// The template's pages, in order and without gaps.
    pub fn extents(&self) -> &[Extent] {
        &self.record.extents
    }

    /// The data file that [`Source::Data`] offsets are in; none if the pages lie on a device. Nobody
    /// writes to the extents' pages while this reader lives.
    pub fn file(&self) -> Option<BorrowedFd<'_>> {
        self.pool.data.file().map(AsFd::as_fd)
    }

    /// Reads what lies at a [`Source::Data`] offset, as it is: [`TemplateReader::verify`] has checked it.
    pub fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<(), PoolError> {
        self.pool.data.read_at(buffer, offset)
    }

    /// The driver by which processes can map pages of the pool copy-on-write: page `n` of its device is
    /// at offset `n` times [`PAGE_SIZE`]. None if the pages do not lie on a device, or this machine
    /// has no such driver, which is said in the log once.
    pub fn templates(&self) -> Option<&pseudo_mm_uapi::Device> {
        self.pool.data.device()?.templates()
    }

    /// Says that pages `first..first + pages` are not needed in the page cache any more.
    pub fn forget_cached(&self, first: u64, pages: u64) {
        for extent in self.stored_extents() {
            let start = extent.first_page.max(first);
            let end = (extent.first_page + extent.pages).min(first.saturating_add(pages));
            if let (Source::Data { offset }, true) = (extent.source, start < end) {
                let page = PAGE_SIZE as u64;
                let from = offset + (start - extent.first_page) * page;
                self.pool.data.forget_cached(from, (end - start) * page);
            }
        }
    }

    /// Checks the checksum of every page.
    pub fn verify(&self) -> Result<(), PoolError> {
        let mut buffer = vec![0; BATCH as usize * PAGE_SIZE];
        for extent in self.stored_extents() {
            let end = extent.first_page + extent.pages;
            let mut first = extent.first_page;
            while first < end {
                let pages = BATCH.min(end - first);
                self.read_pages(first, &mut buffer[..pages as usize * PAGE_SIZE])?;
                first += pages;
            }
            self.forget_cached(extent.first_page, extent.pages);
        }
        Ok(())
    }

    /// Reads pages from page `first` on into `buf`, whose length is a multiple of the page size,
    /// and checks each.
    pub fn read_pages(&self, first: u64, buf: &mut [u8]) -> Result<(), PoolError> {
        if !buf.len().is_multiple_of(PAGE_SIZE) {
            return Err(PoolError::PageLength { found: buf.len() });
        }
        let pages = (buf.len() / PAGE_SIZE) as u64;
        let end = first
            .checked_add(pages)
            .filter(|end| *end <= self.record.info.pages)
            .ok_or(PoolError::PageRange {
                id: self.record.info.id,
                first,
                end: first.saturating_add(pages),
                pages: self.record.info.pages,
            })?;
        let sums = self.sums()?;
        let mut stored = 0;
        for extent in &self.record.extents {
            let from = extent.first_page.max(first);
            let to = (extent.first_page + extent.pages).min(end);
            if from < to {
                let part = &mut buf[(from - first) as usize * PAGE_SIZE..]
                    [..(to - from) as usize * PAGE_SIZE];
                match extent.source {
                    Source::Zero => part.fill(0),
                    Source::Data { offset } => {
                        let skip = from - extent.first_page;
                        let at = offset + skip * PAGE_SIZE as u64;
                        let sums = sums.get((stored + skip) as usize..).unwrap_or_default();
                        self.read_stored(from, at, part, sums)?;
                    }
                }
            }
            if matches!(extent.source, Source::Data { .. }) {
                stored += extent.pages;
            }
        }
        Ok(())
    }

    fn read_stored(
        &self,
        first: u64,
        at: u64,
        part: &mut [u8],
        sums: &[PageSum],
    ) -> Result<(), PoolError> {
        self.read_at(part, at)?;
        for (index, page) in part.chunks_exact(PAGE_SIZE).enumerate() {
            if sums.get(index).is_none_or(|sum| blake3::hash(page) != *sum) {
                return Err(PoolError::CorruptPage {
                    id: self.record.info.id,
                    page: first + index as u64,
                    offset: at + (index * PAGE_SIZE) as u64,
                });
            }
        }
        Ok(())
    }

    /// Where each stored page lies, in order.
    pub(crate) fn stored_offsets(&self) -> impl Iterator<Item = u64> + '_ {
        self.stored_extents().flat_map(|extent| {
            let start = match extent.source {
                Source::Zero => 0,
                Source::Data { offset } => offset,
            };
            (0..extent.pages).map(move |page| start + page * PAGE_SIZE as u64)
        })
    }

    /// Whether both are templates of one pool.
    pub(crate) fn is_in(&self, pool: &Inner) -> bool {
        self.pool.superblock.uuid == pool.superblock.uuid
    }

    fn stored_extents(&self) -> impl Iterator<Item = &Extent> {
        let stored = |extent: &&Extent| matches!(extent.source, Source::Data { .. });
        self.record.extents.iter().filter(stored)
    }

    pub(crate) fn sums(&self) -> Result<&[PageSum], PoolError> {
        if let Some(sums) = self.sums.get() {
            return Ok(sums);
        }
        let sums = self
            .pool
            .catalogue
            .read(|view| view.page_sums(&self.record))?;
        Ok(self.sums.get_or_init(|| sums))
    }
}
