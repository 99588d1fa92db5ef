//! Where the pages lie: a file on disk, memory, or a device-dax ([`crate::dax`]).
//!
//! `memfd` keeps the pages in a file on `/dev/shm` named after the pool's uuid, since several
//! processes need them, some after those that made it are gone. It is removed with the pool. After
//! a reboot it is missing: the pool is then made anew and every template in the catalogue is
//! forgotten, which is said in the log.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use rustix::fs::{Advice, FallocateFlags, fadvise, fallocate};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::dax::DaxMemory;
use crate::error::PoolError;
use crate::superblock::Superblock;

const MEMORY_DIRECTORY: &str = "/dev/shm";

/// What kind of store holds the pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Backend {
    /// `pool.data` itself: durable.
    File,
    /// Memory of this machine: fast, gone after a reboot.
    Memfd,
    /// A device-dax, which zygotes map where the kernel has the driver for it.
    Dax,
}

/// A backend's name that this program does not know.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no pool backend; choose `file`, `memfd` or `dax`")]
pub struct UnknownBackend(pub String);

impl Backend {
    pub(crate) fn code(self) -> u32 {
        match self {
            Self::File => 1,
            Self::Memfd => 2,
            Self::Dax => 3,
        }
    }

    pub(crate) fn from_code(code: u32) -> Option<Self> {
        match code {
            1 => Some(Self::File),
            2 => Some(Self::Memfd),
            3 => Some(Self::Dax),
            _ => None,
        }
    }
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::File => "file",
            Self::Memfd => "memfd",
            Self::Dax => "dax",
        })
    }
}

impl FromStr for Backend {
    type Err = UnknownBackend;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        match name {
            "file" => Ok(Self::File),
            "memfd" => Ok(Self::Memfd),
            "dax" => Ok(Self::Dax),
            _ => Err(UnknownBackend(name.to_owned())),
        }
    }
}

/// What holds the pages, open.
#[derive(Debug)]
pub(crate) struct Data {
    store: Store,
    pub path: PathBuf,
}

#[derive(Debug)]
enum Store {
    /// A file, which survives a reboot or not.
    File {
        file: File,
        durable: bool,
    },
    Device(DaxMemory),
}

/// Where the pages of a pool in memory lie.
pub(crate) fn memory_path(uuid: Uuid) -> PathBuf {
    Path::new(MEMORY_DIRECTORY).join(format!("trenv-pool-{uuid}"))
}

impl Data {
    pub fn on_disk(file: File, path: &Path) -> Self {
        Self {
            store: Store::File {
                file,
                durable: true,
            },
            path: path.to_path_buf(),
        }
    }

    pub fn on_device(memory: DaxMemory, path: &Path) -> Self {
        Self {
            store: Store::Device(memory),
            path: path.to_path_buf(),
        }
    }

    /// Opens the pages of a pool in memory; `None` when they are gone.
    pub fn in_memory(superblock: &Superblock) -> Result<Option<Self>, PoolError> {
        let path = memory_path(superblock.uuid);
        let file = match OpenOptions::new().read(true).write(true).open(&path) {
            Ok(file) => file,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(PoolError::io("open", &path, e)),
        };
        let found = file
            .metadata()
            .map_err(|e| PoolError::io("examine", &path, e))?
            .len();
        if found < superblock.size {
            return Err(PoolError::Truncated {
                path,
                found,
                expected: superblock.size,
            });
        }
        Ok(Some(Self {
            store: Store::File {
                file,
                durable: false,
            },
            path,
        }))
    }

    /// Makes the memory of a pool, with a copy of its superblock.
    pub fn make_memory(superblock: &Superblock) -> Result<(), PoolError> {
        let path = memory_path(superblock.uuid);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&path)
            .map_err(|e| PoolError::io("make", &path, e))?;
        file.set_len(superblock.size)
            .map_err(|e| PoolError::io("size", &path, e))?;
        file.write_all_at(&superblock.encode(), 0)
            .map_err(|e| PoolError::io("write", &path, e))
    }

    /// The file, which a device is not: that cannot be read by read(2).
    pub fn file(&self) -> Option<&File> {
        match &self.store {
            Store::File { file, .. } => Some(file),
            Store::Device(_) => None,
        }
    }

    pub fn device(&self) -> Option<&DaxMemory> {
        match &self.store {
            Store::File { .. } => None,
            Store::Device(memory) => Some(memory),
        }
    }

    pub fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<(), PoolError> {
        match &self.store {
            Store::File { file, .. } => file
                .read_exact_at(buffer, offset)
                .map_err(|e| PoolError::io("read pages from", &self.path, e)),
            Store::Device(memory) => memory.read_at(buffer, offset),
        }
    }

    /// Writes whole pages.
    pub fn write_at(&self, pages: &[u8], offset: u64) -> Result<(), PoolError> {
        match &self.store {
            Store::File { file, .. } => file
                .write_all_at(pages, offset)
                .map_err(|e| PoolError::io("write pages to", &self.path, e)),
            Store::Device(memory) => memory.write_at(pages, offset),
        }
    }

    /// What was written survives a reboot, if the store does. A device has it already.
    pub fn flush(&self) -> Result<(), PoolError> {
        match &self.store {
            Store::File {
                file,
                durable: true,
            } => file
                .sync_data()
                .map_err(|e| PoolError::io("flush", &self.path, e)),
            Store::File { .. } | Store::Device(_) => Ok(()),
        }
    }

    /// Tells the kernel that the range will not be read again soon, so that flushed pages do not
    /// stay in the page cache beside the memory that they end up in.
    pub fn forget_cached(&self, offset: u64, bytes: u64) {
        if let Store::File {
            file,
            durable: true,
        } = &self.store
        {
            let _ = fadvise(
                file,
                offset,
                std::num::NonZeroU64::new(bytes),
                Advice::DontNeed,
            );
        }
    }

    /// Gives the range back to the file system. A file system that cannot keeps it allocated,
    /// which costs space on disk and nothing else; a device has nobody to give it back to.
    pub fn discard(&self, offset: u64, bytes: u64) -> Result<(), PoolError> {
        let Some(file) = self.file() else {
            return Ok(());
        };
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match fallocate(file, flags, offset, bytes) {
            Ok(()) | Err(Errno::OPNOTSUPP | Errno::NOSYS) => Ok(()),
            Err(e) => Err(PoolError::io("discard pages of", &self.path, e)),
        }
    }

    /// Bytes free on the file system that holds the pages.
    pub fn disk_free(&self) -> u64 {
        let file_system = self.file().map(rustix::fs::fstatvfs);
        file_system.map_or(0, |fs| fs.map_or(0, |fs| fs.f_bavail * fs.f_frsize))
    }
}
