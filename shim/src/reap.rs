//! Exit statuses of the shim's children.
//!
//! The shim is a subreaper: init processes made by runc become its children. Each known child is
//! waited for by itself through a pidfd, so that programs run by other parts of this process keep
//! their own statuses. Orphans that nobody waits for are swept once they have been zombies for a while.

use std::collections::HashSet;
use std::os::fd::OwnedFd;
use std::sync::{LazyLock, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use nix::errno::Errno;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use rustix::process::{PidfdFlags, pidfd_open};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::error::{Result, ShimError};

/// How often orphans are looked for; a zombie seen twice in a row is one. Twice this is less than a
/// purge waits: what a zygote was making when it was killed is an orphan in the sandbox.
const SWEEP_EVERY: Duration = Duration::from_secs(2);

/// What containerd reports when a status was lost.
const STATUS_UNKNOWN: u32 = 255;

static WATCHED: LazyLock<Mutex<HashSet<i32>>> = LazyLock::new(Mutex::default);

/// How and when a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exit {
    /// The exit code, or 128 and the signal.
    pub status: u32,
    pub at: SystemTime,
}

impl Exit {
    /// An exit now.
    pub fn now(status: u32) -> Self {
        Self {
            status,
            at: SystemTime::now(),
        }
    }
}

/// A child whose exit is awaited.
#[derive(Debug)]
pub struct Child {
    pid: i32,
    pidfd: AsyncFd<OwnedFd>,
}

impl Child {
    /// Takes over the waiting for a child. From here on no sweep touches it.
    pub fn watch(pid: i32) -> Result<Self> {
        watched(|set| set.insert(pid));
        let opened = rustix::process::Pid::from_raw(pid)
            .ok_or(rustix::io::Errno::SRCH)
            .and_then(|pid| pidfd_open(pid, PidfdFlags::empty()))
            .map_err(std::io::Error::from)
            .and_then(|fd| {
                // SAFETY: an owned descriptor stays the same file for as long as it lives.
                unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }
                    .map_err(std::io::Error::from)
            });
        match opened {
            Ok(pidfd) => Ok(Self { pid, pidfd }),
            Err(source) => {
                watched(|set| set.remove(&pid));
                Err(ShimError::Io {
                    action: format!("watch the process {pid}"),
                    source,
                })
            }
        }
    }

    /// Waits until the child has ended, and reaps it.
    pub async fn exit(self) -> Exit {
        let _ = self.pidfd.readable().await;
        Exit::now(status_of(self.pid))
    }
}

/// A child that another part of this process waits for; no sweep touches it while this lives.
#[derive(Debug)]
pub struct Unswept(i32);

impl Unswept {
    pub fn new(pid: i32) -> Self {
        watched(|set| set.insert(pid));
        Self(pid)
    }
}

impl Drop for Unswept {
    fn drop(&mut self) {
        watched(|set| set.remove(&self.0));
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        watched(|set| set.remove(&self.pid));
    }
}

fn watched<T>(change: impl FnOnce(&mut HashSet<i32>) -> T) -> T {
    change(&mut WATCHED.lock().unwrap_or_else(PoisonError::into_inner))
}

fn status_of(pid: i32) -> u32 {
    loop {
        return match waitpid(Pid::from_raw(pid), Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::Exited(_, code)) => code.unsigned_abs(),
            Ok(WaitStatus::Signaled(_, signal, _)) => 128 + signal as u32,
            Err(Errno::EINTR) => continue,
            _ => STATUS_UNKNOWN,
        };
    }
}

/// Makes orphans of our descendants our children.
pub fn become_subreaper() -> Result<()> {
    nix::sys::prctl::set_child_subreaper(true)
        .map_err(ShimError::io("make the shim adopt orphaned processes"))
}

/// Reaps, for as long as the shim lives, zombies that no one waits for.
pub async fn sweep_orphans() {
    let mut before = HashSet::new();
    loop {
        tokio::time::sleep(SWEEP_EVERY).await;
        let zombies = zombie_children();
        for pid in zombies.intersection(&before) {
            let _ = waitpid(Pid::from_raw(*pid), Some(WaitPidFlag::WNOHANG));
        }
        before = zombies;
    }
}

fn zombie_children() -> HashSet<i32> {
    let Ok(threads) = std::fs::read_dir("/proc/self/task") else {
        return HashSet::new();
    };
    threads
        .flatten()
        .filter_map(|thread| std::fs::read_to_string(thread.path().join("children")).ok())
        .flat_map(|list| {
            list.split_whitespace()
                .filter_map(|pid| pid.parse().ok())
                .collect::<Vec<_>>()
        })
        .filter(|pid| !watched(|set| set.contains(pid)) && is_zombie(*pid))
        .collect()
}

fn is_zombie(pid: i32) -> bool {
    let Ok(stat) = std::fs::read_to_string(format!("/proc/{pid}/stat")) else {
        return false;
    };
    // The name before the state may hold anything, parentheses included.
    stat.rsplit_once(") ")
        .is_some_and(|(_, rest)| rest.starts_with('Z'))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[tokio::test]
    #[allow(clippy::zombie_processes)]
    async fn a_childs_code_and_signal_are_reported() {
        for (script, expected) in [("exit 7", 7), ("kill -9 $$", 137)] {
            let child = Command::new("/bin/sh")
                .args(["-c", script])
                .spawn()
                .unwrap();
            let watched = Child::watch(i32::try_from(child.id()).unwrap()).unwrap();
            assert_eq!(watched.exit().await.status, expected);
        }
    }

    #[test]
    fn a_process_that_does_not_exist_cannot_be_watched() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async { assert!(Child::watch(i32::MAX).is_err()) });
    }
}
