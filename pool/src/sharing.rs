//! Pages of another template that a new one may name as its own instead of storing them again.

use std::collections::HashMap;

use crate::PAGE_SIZE;
use crate::error::PoolError;
use crate::reader::TemplateReader;
use crate::record::PageSum;

/// The stored pages of one template, found by their content.
#[derive(Debug)]
pub(crate) struct Shareable {
    /// Keeps them where they are.
    reader: TemplateReader,
    /// Checksum and offset of each, in order.
    pages: Vec<(PageSum, u64)>,
    by_sum: HashMap<PageSum, usize>,
    /// The page after the one found last: memory mostly goes on as it did there.
    next: usize,
    buffer: Vec<u8>,
}

impl Shareable {
    pub fn of(reader: TemplateReader) -> Result<Self, PoolError> {
        let sums = reader.sums()?.iter().copied();
        let pages: Vec<(PageSum, u64)> = sums.zip(reader.stored_offsets()).collect();
        let numbered = pages.iter().enumerate();
        let by_sum = numbered.map(|(index, (sum, _))| (*sum, index)).collect();
        Ok(Self {
            reader,
            pages,
            by_sum,
            next: 0,
            buffer: vec![0; PAGE_SIZE],
        })
    }

    /// Where an equal page lies. Its bytes are compared, so that damage to a page on disk does not
    /// spread to templates that are still to be made.
    pub fn find(&mut self, sum: &PageSum, page: &[u8]) -> Option<u64> {
        let follows = self
            .pages
            .get(self.next)
            .is_some_and(|(next, _)| next == sum);
        let index = if follows {
            self.next
        } else {
            *self.by_sum.get(sum)?
        };
        let (_, offset) = self.pages[index];
        self.next = index + 1;
        self.reader.read_at(&mut self.buffer, offset).ok()?;
        (self.buffer == page).then_some(offset)
    }

    /// Says that what was compared is not needed in the page cache any more.
    pub fn forget_cached(&self) {
        self.reader.forget_cached(0, u64::MAX);
    }
}
