//! What can go wrong with a pool, in words for the person who has to act on it.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::dax::device::DaxError;
use crate::template::TemplateId;

/// A failed operation on a pool.
#[derive(Debug, thiserror::Error)]
pub enum PoolError {
    #[error(
        "{path} already holds a pool; choose another directory or remove it with `trenv-pool destroy`"
    )]
    AlreadyExists { path: PathBuf },
    #[error("There is no pool in {path}; make one with `trenv-pool format`")]
    NotFound { path: PathBuf },
    #[error("A pool of {size} bytes is too small; the least is {least} bytes")]
    TooSmall { size: u64, least: u64 },
    #[error("{path} is not a pool file: it starts with other bytes than a pool's")]
    BadMagic { path: PathBuf },
    #[error(
        "{path} has pool format version {found}, this program reads version {known}; use the trenv \
         that made it, or format a new pool"
    )]
    OtherVersion {
        path: PathBuf,
        found: u32,
        known: u32,
    },
    #[error("The superblock of {path} does not match its checksum; the file is damaged")]
    BadSuperblock { path: PathBuf },
    #[error("{path} is truncated: {found} bytes, its superblock says {expected}")]
    Truncated {
        path: PathBuf,
        found: u64,
        expected: u64,
    },
    #[error("{path} belongs to another pool; put back the catalogue that was made with pool.data")]
    ForeignCatalogue { path: PathBuf },
    #[error(
        "The catalogue {path} is missing, so nothing says which pages are whose; put it back or format a new pool"
    )]
    CatalogueMissing { path: PathBuf },
    #[error(
        "The catalogue {path} is damaged; copy what `trenv-pool ls` still shows or destroy and format \
         the pool, and deploy the functions again"
    )]
    CatalogueDamaged { path: PathBuf },
    #[error("Failed to {action} the catalogue {path}")]
    Catalogue {
        action: &'static str,
        path: PathBuf,
        source: Box<redb::Error>,
    },
    #[error(
        "The catalogue's record of template {id} is damaged ({what}); remove it with `trenv-pool rm {id}`"
    )]
    BadRecord { id: TemplateId, what: &'static str },
    #[error("No template {id} in the pool")]
    NoSuchTemplate { id: TemplateId },
    #[error("Template {id} has no generation {generation}")]
    NoSuchGeneration { id: TemplateId, generation: u64 },
    #[error(
        "Page {page} of template {id}, at byte {offset} of the pool, does not match its checksum; remove the template with `trenv-pool rm {id}` and deploy the function again"
    )]
    CorruptPage {
        id: TemplateId,
        page: u64,
        offset: u64,
    },
    #[error("Pages {first}..{end} were asked of template {id}, which has {pages}")]
    PageRange {
        id: TemplateId,
        first: u64,
        end: u64,
        pages: u64,
    },
    #[error(
        "Template {id} is in another pool than {path}, where its pages cannot be named; open both anew"
    )]
    OtherPool { id: TemplateId, path: PathBuf },
    #[error("A page must have {expected} bytes, got {found}", expected = crate::PAGE_SIZE)]
    PageLength { found: usize },
    #[error(
        "The pool is full: the template needs at least {needed} bytes, {free} of {size} are free; make room with `trenv-pool rm TEMPLATE`, or make a larger pool"
    )]
    Full { needed: u64, free: u64, size: u64 },
    #[error(
        "The disk under {path} is full: the template needs at least {needed} bytes, {free} are free; make room on the disk, or in it with `trenv-pool rm TEMPLATE`"
    )]
    DiskFull {
        path: PathBuf,
        needed: u64,
        free: u64,
    },
    #[error("Template {id} is in use by {holders}; stop what uses it and try again")]
    InUse { id: TemplateId, holders: String },
    #[error("{path} was held by {holders} for {waited:?}; try again when it is done")]
    Busy {
        path: PathBuf,
        holders: String,
        waited: Duration,
    },
    #[error(transparent)]
    Device(#[from] DaxError),
    #[error("Failed to {action} {path}")]
    Io {
        action: &'static str,
        path: PathBuf,
        source: io::Error,
    },
}

impl PoolError {
    /// Whether it says that a template, or a generation of it, is not there or not any more.
    pub fn is_removal(&self) -> bool {
        matches!(
            self,
            Self::NoSuchTemplate { .. } | Self::NoSuchGeneration { .. }
        )
    }

    pub(crate) fn io(action: &'static str, path: &Path, source: impl Into<io::Error>) -> Self {
        Self::Io {
            action,
            path: path.to_path_buf(),
            source: source.into(),
        }
    }

    pub(crate) fn catalogue(
        action: &'static str,
        path: &Path,
        source: impl Into<redb::Error>,
    ) -> Self {
        Self::Catalogue {
            action,
            path: path.to_path_buf(),
            source: Box::new(source.into()),
        }
    }
}
