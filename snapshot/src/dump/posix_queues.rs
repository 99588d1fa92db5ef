//! POSIX message queues (mq_overview(7)), which are not part of a snapshot.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use nix::errno::Errno;
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsmount, fsopen};

use super::DumpError;

/// Of their file system (kernel: ipc/mqueue.c).
const MQUEUE_MAGIC: i64 = 0x1980_0202;

/// Whether a descriptor is one of them.
pub fn is_one(fd: &OwnedFd) -> Result<bool, DumpError> {
    let system = nix::sys::statfs::fstatfs(fd.as_fd()).map_err(DumpError::errno(
        "asking for the file system of a descriptor",
    ))?;
    Ok(system.filesystem_type().0 == MQUEUE_MAGIC)
}

/// Refuses those of the IPC namespace that this thread is in, open or not.
pub fn refuse() -> Result<(), DumpError> {
    let doing = "looking for POSIX message queues";
    let opened = fsopen("mqueue", FsOpenFlags::FSOPEN_CLOEXEC).and_then(|system| {
        fsconfig_create(system.as_fd())?;
        let flags = FsMountFlags::FSMOUNT_CLOEXEC;
        fsmount(system.as_fd(), flags, MountAttrFlags::empty())
    });
    let root = match opened.map_err(|errno| Errno::from_raw(errno.raw_os_error())) {
        Ok(root) => root,
        // A kernel without them.
        Err(Errno::ENODEV) => return Ok(()),
        Err(errno) => return Err(DumpError::errno(doing)(errno)),
    };
    let path = format!("/proc/thread-self/fd/{}", root.as_raw_fd());
    let mut entries = std::fs::read_dir(path).map_err(DumpError::io(doing))?;
    match entries.next() {
        None => Ok(()),
        Some(entry) => {
            let name = entry.map_err(DumpError::io(doing))?.file_name();
            Err(DumpError::Refused(format!(
                "it has the POSIX message queue /{} (mq_open); remove it by mq_unlink",
                name.to_string_lossy()
            )))
        }
    }
}
