//! Looks paths up in a root before somebody waits for them.

use std::os::fd::BorrowedFd;

use rustix::fs::{Mode, OFlags, ResolveFlags, openat2};

/// Where every root gets something mounted.
const MOUNT_POINTS: [&str; 7] = [
    "/proc",
    "/dev",
    "/sys",
    "/run",
    "/etc/hosts",
    "/etc/hostname",
    "/etc/resolv.conf",
];

/// Looks up, in a root that was mounted ahead, what a start will look for there: the first look at a
/// file of an overlay searches each of its layers, later ones find it in the kernel's cache of
/// directory entries. What does not exist is remembered as well.
pub fn look_up<'a>(root: BorrowedFd<'_>, paths: impl IntoIterator<Item = &'a str>) {
    for path in MOUNT_POINTS.into_iter().chain(paths) {
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        // The start itself tells what is wrong with a path.
        let _ = openat2(root, path, flags, Mode::empty(), ResolveFlags::IN_ROOT);
    }
}
