//! The kernel's word that a control group has run out of memory.
//!
//! Version 1 signals an eventfd when it is about to kill, version 2 changes `memory.events` when it
//! has killed. Both cost nothing until it happens.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use rustix::event::EventfdFlags;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::error::{Result, ShimError};
use crate::stats::Groups;

/// How often, and for how long, version 1's counter is read after the signal.
const PAUSE: Duration = Duration::from_millis(10);
const READS: u32 = 100;

/// Calls `tell` when processes of these groups may have been killed for want of memory, until the
/// groups are gone, and once at the beginning. `tell` answers whether there were any.
pub async fn follow(groups: &Groups, mut tell: impl FnMut() -> bool) -> Result<()> {
    let notice = Notice::open(groups)?;
    tell();
    while notice.next().await? {
        for _ in 0..notice.reads() {
            if tell() {
                break;
            }
            tokio::time::sleep(PAUSE).await;
        }
    }
    Ok(())
}

/// What the kernel signals.
enum Notice {
    V1 {
        signal: AsyncFd<OwnedFd>,
        control: File,
    },
    V2(AsyncFd<File>),
}

impl Notice {
    fn open(groups: &Groups) -> Result<Self> {
        match groups {
            Groups::V1(paths) => match paths.get("memory") {
                Some(path) => Self::open_v1(path),
                None => Err(ShimError::NotFound {
                    kind: "memory controller of",
                    id: "the container".into(),
                }),
            },
            Groups::V2(path) => Self::open_v2(path),
        }
    }

    fn open_v1(path: &Path) -> Result<Self> {
        let control = open(&path.join("memory.oom_control"))?;
        let signal = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(ShimError::io("make an eventfd"))?;
        let line = format!("{} {}", signal.as_raw_fd(), control.as_raw_fd());
        let file = path.join("cgroup.event_control");
        std::fs::write(&file, line)
            .map_err(ShimError::io(format!("write to {}", file.display())))?;
        let signal = wait_on(signal, Interest::READABLE)?;
        Ok(Self::V1 { signal, control })
    }

    fn open_v2(path: &Path) -> Result<Self> {
        let events = open(&path.join("memory.events"))?;
        // A change counts from the last read on.
        let _ = events.read_at(&mut [0; 512], 0);
        wait_on(events, Interest::PRIORITY).map(Self::V2)
    }

    /// Waits for the next signal; false when the group is gone.
    async fn next(&self) -> Result<bool> {
        let action = || ShimError::io("wait for the kernel's word on memory");
        match self {
            Self::V1 { signal, control } => {
                let mut ready = signal.readable().await.map_err(action())?;
                let _ = rustix::io::read(signal.get_ref(), &mut [0; 8]);
                ready.clear_ready();
                // The removal of the group is signalled, too.
                Ok(control.read_at(&mut [0; 64], 0).is_ok())
            }
            Self::V2(events) => {
                let mut ready = events.ready(Interest::PRIORITY).await.map_err(action())?;
                ready.clear_ready();
                Ok(events.get_ref().read_at(&mut [0; 512], 0).is_ok())
            }
        }
    }

    /// Version 1 signals before it kills and counts.
    fn reads(&self) -> u32 {
        match self {
            Self::V1 { .. } => READS,
            Self::V2(_) => 1,
        }
    }
}

fn open(path: &Path) -> Result<File> {
    File::open(path).map_err(ShimError::io(format!("open {}", path.display())))
}

fn wait_on<F: AsRawFd>(file: F, interest: Interest) -> Result<AsyncFd<F>> {
    // SAFETY: both kinds of file stay the same one for as long as they live.
    unsafe { AsyncFd::register_with_interest(file, interest) }.map_err(|err| {
        ShimError::io("wait on a file of a control group")(std::io::Error::from(err))
    })
}
