//! Owners of open files: the kernel tells them by the ids of whoever asks, which are the host's here.

use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::libc;

use super::DumpError;
use super::process::Status;
use crate::manifest::{FileOwner, SignalTarget};

const F_GETSIG: i32 = 11;
const F_GETOWN_EX: i32 = 16;
/// Not in kernels without CONFIG_CHECKPOINT_RESTORE.
const F_GETOWNER_UIDS: i32 = 17;
const F_OWNER_TID: i32 = 0;
const F_OWNER_PID: i32 = 1;
const F_OWNER_PGRP: i32 = 2;

/// Reads who is told of what happens to an open file; `ids` has the tree's processes, by host pid. An
/// owner that has ended or is outside of the tree is none.
pub fn read(copy: &OwnedFd, ids: &BTreeMap<i32, i32>) -> Result<Option<FileOwner>, DumpError> {
    let doing = || DumpError::errno("reading the owner of an open file");
    // SAFETY: takes numbers only.
    let signal = unsafe { libc::fcntl(copy.as_raw_fd(), F_GETSIG) };
    let signal = nix::errno::Errno::result(signal).map_err(doing())?;
    let mut owner = [0i32; 2];
    // SAFETY: writes a struct of two ints.
    let told = unsafe { libc::fcntl(copy.as_raw_fd(), F_GETOWN_EX, owner.as_mut_ptr()) };
    nix::errno::Errno::result(told).map_err(doing())?;
    let target = match owner {
        [_, 0] => None,
        [kind, id] => in_tree(kind, id, ids)?,
    };
    if target.is_none() && signal == 0 {
        return Ok(None);
    }
    let mut users = [0u32; 2];
    // SAFETY: writes two ints; where it is unknown they stay those of root.
    unsafe { libc::fcntl(copy.as_raw_fd(), F_GETOWNER_UIDS, users.as_mut_ptr()) };
    Ok(Some(FileOwner {
        target,
        signal,
        users,
    }))
}

/// The owner by its id in the sandbox, if it is one of the tree.
fn in_tree(
    kind: i32,
    id: i32,
    ids: &BTreeMap<i32, i32>,
) -> Result<Option<SignalTarget>, DumpError> {
    Ok(match kind {
        F_OWNER_PID => ids.get(&id).copied().map(SignalTarget::Process),
        F_OWNER_TID => {
            // It may have ended in the meantime, though none of the tree can have.
            let Ok(status) = Status::read(id, id) else {
                return Ok(None);
            };
            match ids.contains_key(&status.number("Tgid")?) {
                true => Some(SignalTarget::Thread(status.inner_pid()?)),
                false => None,
            }
        }
        F_OWNER_PGRP => {
            for host in ids.keys() {
                let status = Status::read(*host, *host)?;
                let first = status.text("NSpgid")?.split_whitespace().next();
                if first.and_then(|group| group.parse().ok()) == Some(id) {
                    return Ok(Some(SignalTarget::Group(status.inner("NSpgid")?)));
                }
            }
            None
        }
        _ => None,
    })
}
