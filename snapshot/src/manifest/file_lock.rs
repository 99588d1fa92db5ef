//! Locks on open files (flock(2), fcntl(2)).

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use super::{Manifest, ManifestError};

/// Locks of one tree at most.
const MOST_LOCKS: usize = 65_536;

/// A lock that is held.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileLock {
    pub holder: LockHolder,
    /// Exclusive; shared otherwise.
    pub exclusive: bool,
    pub start: u64,
    /// None up to the end of the file, however it grows.
    pub length: Option<u64>,
}

/// To what a lock belongs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum LockHolder {
    /// An open file, by flock(2).
    Flock { object: usize },
    /// An open file, by F_OFD_SETLK.
    OpenFile { object: usize },
    /// A process, by F_SETLK on one of its descriptors.
    Process { pid: i32, descriptor: i32 },
}

pub fn check(manifest: &Manifest) -> Result<(), ManifestError> {
    let count = manifest.locks.len();
    if count > MOST_LOCKS {
        return Err(ManifestError::Invalid {
            what: format!("it has {count} file locks"),
        });
    }
    let processes = manifest.processes.iter();
    let descriptors: BTreeSet<(i32, i32)> = processes
        .flat_map(|process| {
            process
                .descriptors
                .iter()
                .map(|one| (process.pid, one.number))
        })
        .collect();
    for (index, lock) in manifest.locks.iter().enumerate() {
        let holder = match lock.holder {
            LockHolder::Flock { object } | LockHolder::OpenFile { object } => {
                object < manifest.objects.len()
            }
            LockHolder::Process { pid, descriptor } => descriptors.contains(&(pid, descriptor)),
        };
        let most = i64::MAX as u64;
        let end = lock.start.checked_add(lock.length.unwrap_or(1));
        if !holder || lock.length == Some(0) || end.is_none_or(|end| end > most) {
            return Err(ManifestError::Invalid {
                what: format!("file lock {index}"),
            });
        }
    }
    Ok(())
}
