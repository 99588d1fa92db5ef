//! Named pipes, with what they hold.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use nix::fcntl::{FcntlArg, OFlag};

use super::DumpError;
use super::files::peek;
use crate::manifest::ObjectKind;

/// Describes an end; what the pipe holds is told by the first of its ends only.
pub fn read(copy: &OwnedFd, path: String, first: bool) -> Result<ObjectKind, DumpError> {
    let doing = || format!("reading the named pipe {path}");
    let size = nix::fcntl::fcntl(copy.as_fd(), FcntlArg::F_GETPIPE_SZ)
        .map_err(DumpError::errno(doing()))? as u64;
    let mut queued: i32 = 0;
    // SAFETY: FIONREAD writes one int.
    let result =
        unsafe { nix::libc::ioctl(copy.as_raw_fd(), nix::libc::FIONREAD, &raw mut queued) };
    nix::errno::Errno::result(result).map_err(DumpError::errno(doing()))?;
    let data = if first && queued > 0 {
        // This end may be one that writes.
        let link = format!("/proc/self/fd/{}", copy.as_raw_fd());
        let how = OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
        let reader = nix::fcntl::open(link.as_str(), how, nix::sys::stat::Mode::empty())
            .map_err(DumpError::errno(doing()))?;
        peek(&reader, queued as usize, size).map_err(DumpError::errno(doing()))?
    } else {
        Vec::new()
    };
    Ok(ObjectKind::Fifo { path, size, data })
}
