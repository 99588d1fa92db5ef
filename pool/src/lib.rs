//! The pool: where the memory pages of templates are stored, checked and found again.
//!
//! A pool is a directory. `pool.data` holds a superblock and, from [`DATA_OFFSET`] on, 4 KiB pages, unless
//! these lie in memory or on a device, with a superblock of their own ([`Backend`]);
//! `catalogue.redb` says which pages form which template, with a BLAKE3 checksum of every page and
//! of every record. Free space is whatever no record names, so there is no second truth to repair.
//! Several templates may name a page: a function's those of the base that it was made from
//! ([`TemplateWriter::share_with`]). It is freed with the last of them.
//!
//! A snapshot goes in through a [`TemplateWriter`] (one at a time, whichever process it is in):
//! pages are appended to free space and flushed, and only then does one catalogue transaction make
//! the template visible. A crash at any byte before that leaves the pool as it was. It comes out
//! through a [`TemplateReader`], which lists extents of one descriptor and keeps a lease, so that
//! the pages stay while it lives. Leases are file locks: a dead process holds none.
//!
//! Several processes may have one pool open; the catalogue is opened for each operation under
//! `pool.lock`, for as long as the operation takes.

mod backend;
mod catalogue;
mod dax;
mod error;
#[cfg(test)]
mod hostile;
mod lease;
mod place;
mod pool;
mod reader;
mod record;
mod sharing;
mod space;
mod superblock;
mod template;
mod writer;

pub use backend::{Backend, UnknownBackend};
pub use dax::device::{DaxError, check_device};
pub use error::PoolError;
pub use pool::{Pool, PoolOptions, PoolStat, Usage, Verification};
pub use reader::{PageLease, TemplateReader};
pub use superblock::{DATA_OFFSET, VERSION};
pub use template::{Extent, InvalidTemplateId, Source, TemplateId, TemplateInfo};
pub use writer::TemplateWriter;

/// Bytes of a page; every page in the data file is aligned to it.
pub const PAGE_SIZE: usize = 4096;
