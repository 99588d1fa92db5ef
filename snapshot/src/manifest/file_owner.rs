//! Who is told by a signal of what happens to open files (fcntl(2)).

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use super::{Manifest, ManifestError};

/// The owner of an open file, by F_SETOWN_EX, and its signal, by F_SETSIG.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileOwner {
    /// None where only the signal was set.
    pub target: Option<SignalTarget>,
    /// 0 for SIGIO or SIGURG.
    pub signal: i32,
    /// Real and effective user that has said so: whom it may send signals.
    pub users: [u32; 2],
}

/// Who gets the signal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum SignalTarget {
    Thread(i32),
    Process(i32),
    Group(i32),
}

pub fn check(manifest: &Manifest) -> Result<(), ManifestError> {
    let processes = || manifest.processes.iter();
    let threads: BTreeSet<i32> = processes()
        .flat_map(|process| process.threads.iter().map(|thread| thread.tid))
        .collect();
    for (index, object) in manifest.objects.iter().enumerate() {
        let Some(owner) = object.owner else {
            continue;
        };
        let is_there = match owner.target {
            None => true,
            Some(SignalTarget::Thread(tid)) => threads.contains(&tid),
            Some(SignalTarget::Process(pid)) => processes().any(|process| process.pid == pid),
            Some(SignalTarget::Group(group)) => processes().any(|process| process.group == group),
        };
        if !is_there || !(0..=64).contains(&owner.signal) {
            return Err(ManifestError::Invalid {
                what: format!("the owner of open file {index}"),
            });
        }
    }
    Ok(())
}
