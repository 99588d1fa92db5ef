//! Leases as file locks: the kernel releases those of a dead process.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use crate::error::PoolError;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    Shared,
    Exclusive,
}

/// A lock on a file, held until dropped.
#[derive(Debug)]
pub(crate) struct Lease {
    file: File,
}

impl Lease {
    /// Takes the lock now; `None` when somebody else has it.
    pub fn try_take(path: &Path, mode: Mode) -> Result<Option<Self>, PoolError> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(path)
            .map_err(|e| PoolError::io("open the lock file", path, e))?;
        let operation = match mode {
            Mode::Shared => FlockOperation::NonBlockingLockShared,
            Mode::Exclusive => FlockOperation::NonBlockingLockExclusive,
        };
        loop {
            match flock(&file, operation) {
                Ok(()) => return Ok(Some(Self { file })),
                Err(Errno::INTR) => {}
                Err(Errno::WOULDBLOCK) => return Ok(None),
                Err(e) => return Err(PoolError::io("lock", path, e)),
            }
        }
    }

    /// Takes the lock, waiting for it for at most `patience`.
    pub fn take(path: &Path, mode: Mode, patience: Duration) -> Result<Self, PoolError> {
        let start = Instant::now();
        let mut pause = Duration::from_micros(200);
        loop {
            if let Some(lease) = Self::try_take(path, mode)? {
                return Ok(lease);
            }
            let waited = start.elapsed();
            if waited >= patience {
                return Err(PoolError::Busy {
                    path: path.to_path_buf(),
                    holders: holders(path),
                    waited,
                });
            }
            std::thread::sleep(pause);
            // Short, since busy readers leave only short gaps.
            pause = (pause * 2).min(Duration::from_millis(2));
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        // A child forked meanwhile may still have the descriptor, so closing ours is not enough.
        let _ = flock(&self.file, FlockOperation::Unlock);
    }
}

/// Who holds a lock on `path`, for a message: "process 17", "processes 17, 18", or "another process".
pub(crate) fn holders(path: &Path) -> String {
    let pids = holding_pids(path).unwrap_or_default();
    match pids.as_slice() {
        [] => "another process".to_owned(),
        [pid] => format!("process {pid}"),
        _ => {
            let list: Vec<String> = pids.iter().map(ToString::to_string).collect();
            format!("processes {}", list.join(", "))
        }
    }
}

/// `/proc/locks` has lines `N: FLOCK ADVISORY READ PID MAJOR:MINOR:INODE START END`, with the
/// device's numbers in hexadecimal.
fn holding_pids(path: &Path) -> Option<Vec<i32>> {
    let file = std::fs::metadata(path).ok()?;
    let (major, minor) = (rustix::fs::major(file.dev()), rustix::fs::minor(file.dev()));
    let place = format!("{major:02x}:{minor:02x}:{}", file.ino());
    let locks = std::fs::read_to_string("/proc/locks").ok()?;
    let mut pids: Vec<i32> = locks
        .lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>())
        .filter(|words| words.len() == 8 && words[1] == "FLOCK" && words[5] == place)
        .filter_map(|words| words[4].parse().ok())
        .collect();
    pids.sort_unstable();
    pids.dedup();
    Some(pids)
}

/// The files that leases of one pool are taken on.
#[derive(Debug, Clone)]
pub(crate) struct LeaseFiles {
    directory: PathBuf,
}

impl LeaseFiles {
    pub fn new(pool: &Path) -> Self {
        Self {
            directory: pool.to_path_buf(),
        }
    }

    /// Held for one operation on the catalogue.
    pub fn catalogue(&self) -> PathBuf {
        self.directory.join("pool.lock")
    }

    /// Held from `begin` to `commit`.
    pub fn writer(&self) -> PathBuf {
        self.directory.join("writer.lock")
    }

    pub fn readers_directory(&self) -> PathBuf {
        self.directory.join("readers")
    }

    /// Held shared by everyone who reads one generation of a template.
    pub fn reader(&self, id: &crate::TemplateId, generation: u64) -> PathBuf {
        self.readers_directory().join(format!("{id}.{generation}"))
    }
}
