//! The parts of a root that are made ahead: /proc, /sys, /dev and /run, with everything on them.
//!
//! They are mounted in the empty root and moved into the next root by one call each.

use std::{
    ffi::CStr,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use rustix::{
    fs::{CWD, FileType, Mode, OFlags, ResolveFlags, mkdirat, mknodat, openat, openat2},
    mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, OpenTreeFlags, fsconfig_create,
        fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, open_tree,
    },
};
use trenv_sandbox::{
    rootfs::{MASKED_PATHS, READONLY_PATHS},
    sys,
};

use crate::{
    failure::{Doing, Failure},
    generation,
};

/// Where parts are mounted in the empty root.
pub const PLACES: [&str; 5] = ["nothing", "proc", "dev", "sys", "run"];

/// Mounted parts, by the name of their place in the root.
#[derive(Debug)]
pub struct Parts {
    pub places: Vec<(&'static str, OwnedFd)>,
    pub covers: Covers,
}

/// What hidden paths are covered with. Both are attached in the empty root, since kernels before
/// 6.15 clone attached mounts only.
#[derive(Debug)]
pub struct Covers {
    /// Holds `null`.
    dev: OwnedFd,
    /// An empty, read-only tmpfs.
    nothing: OwnedFd,
}

const NOSUID: MountAttrFlags = MountAttrFlags::MOUNT_ATTR_NOSUID;
const NODEV: MountAttrFlags = MountAttrFlags::MOUNT_ATTR_NODEV;
const NOEXEC: MountAttrFlags = MountAttrFlags::MOUNT_ATTR_NOEXEC;
const RDONLY: MountAttrFlags = MountAttrFlags::MOUNT_ATTR_RDONLY;

/// A new, detached mount of a file system; options without a value are flags.
pub fn new_mount(
    kind: &str,
    options: &[(&str, Option<&str>)],
    attributes: MountAttrFlags,
) -> Result<OwnedFd, Failure> {
    let make = || -> rustix::io::Result<OwnedFd> {
        let context = fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC)?;
        // Shown in /proc/mounts instead of "none".
        fsconfig_set_string(context.as_fd(), "source", kind)?;
        for (key, value) in options {
            match value {
                Some(value) => fsconfig_set_string(context.as_fd(), *key, *value)?,
                None => fsconfig_set_flag(context.as_fd(), *key)?,
            }
        }
        fsconfig_create(context.as_fd())?;
        fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes)
    };
    make().doing_on("mount a", kind)
}

/// A procfs that is mounted nowhere: pid 1 counts processes on it.
pub fn private_proc() -> Result<OwnedFd, Failure> {
    new_mount("proc", &[], NOSUID | NODEV | NOEXEC)
}

/// Makes all parts in the current, empty root.
pub fn make() -> Result<Parts, Failure> {
    let root = openat(CWD, c"/", OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
        .doing("open the empty root")?;
    let dev = make_dev(root.as_fd())?;
    let covers = Covers {
        dev: clone_fd(&dev)?,
        nothing: attach(
            root.as_fd(),
            "nothing",
            new_mount(
                "tmpfs",
                &[("mode", Some("755")), ("size", Some("4k"))],
                RDONLY | NOSUID | NODEV | NOEXEC,
            )?,
        )?,
    };
    let proc = attach(
        root.as_fd(),
        "proc",
        new_mount("proc", &[], NOSUID | NODEV | NOEXEC)?,
    )?;
    let sys = attach(
        root.as_fd(),
        "sys",
        new_mount("sysfs", &[], RDONLY | NOSUID | NODEV | NOEXEC)?,
    )?;
    let run = attach(
        root.as_fd(),
        "run",
        new_mount(
            "tmpfs",
            &[("mode", Some("755")), ("size", Some("65536k"))],
            NOSUID | NODEV,
        )?,
    )?;
    generation::write(root.as_fd(), run.as_fd())?;
    for path in READONLY_PATHS {
        make_readonly(root.as_fd(), path)?;
    }
    for path in MASKED_PATHS {
        mask(root.as_fd(), path, &covers)?;
    }
    Ok(Parts {
        places: vec![("proc", proc), ("dev", dev), ("sys", sys), ("run", run)],
        covers,
    })
}

fn clone_fd(fd: &OwnedFd) -> Result<OwnedFd, Failure> {
    fd.try_clone().doing("copy a descriptor")
}

fn attach(root: BorrowedFd<'_>, name: &str, mount: OwnedFd) -> Result<OwnedFd, Failure> {
    match mkdirat(root, name, Mode::from_raw_mode(0o755)) {
        // The empty root has its directories and is read-only.
        Ok(()) | Err(rustix::io::Errno::EXIST) => {}
        Err(error) => return Err(error).doing_on("make the directory", name),
    }
    let place = openat(root, name, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
        .doing_on("open the directory", name)?;
    sys::move_mount(mount.as_fd(), place.as_fd()).doing_on("attach", name)?;
    Ok(mount)
}

fn make_dev(root: BorrowedFd<'_>) -> Result<OwnedFd, Failure> {
    let dev = new_mount(
        "tmpfs",
        &[("mode", Some("755")), ("size", Some("65536k"))],
        NOSUID,
    )?;
    let dev = attach(root, "dev", dev)?;
    let nodes: [(&CStr, u32, u32); 6] = [
        (c"null", 1, 3),
        (c"zero", 1, 5),
        (c"full", 1, 7),
        (c"random", 1, 8),
        (c"urandom", 1, 9),
        (c"tty", 5, 0),
    ];
    for (name, major, minor) in nodes {
        let mode = Mode::from_raw_mode(0o666);
        let device = rustix::fs::makedev(major, minor);
        mknodat(&dev, name, FileType::CharacterDevice, mode, device)
            .doing_on("make the device", &name.to_string_lossy())?;
    }
    let links: [(&CStr, &CStr); 6] = [
        (c"/proc/self/fd", c"fd"),
        (c"/proc/self/fd/0", c"stdin"),
        (c"/proc/self/fd/1", c"stdout"),
        (c"/proc/self/fd/2", c"stderr"),
        (c"/proc/kcore", c"core"),
        (c"pts/ptmx", c"ptmx"),
    ];
    for (target, name) in links {
        rustix::fs::symlinkat(target, &dev, name)
            .doing_on("make the link", &name.to_string_lossy())?;
    }
    let terminals = new_mount(
        "devpts",
        &[
            ("newinstance", None),
            ("ptmxmode", Some("0666")),
            ("mode", Some("0620")),
            ("gid", Some("5")),
        ],
        NOSUID | NOEXEC,
    )?;
    attach(dev.as_fd(), "pts", terminals)?;
    let shared = new_mount(
        "tmpfs",
        &[("mode", Some("1777")), ("size", Some("65536k"))],
        NOSUID | NODEV | NOEXEC,
    )?;
    attach(dev.as_fd(), "shm", shared)?;
    let queues = new_mount("mqueue", &[], NOSUID | NODEV | NOEXEC)?;
    attach(dev.as_fd(), "mqueue", queues)?;
    Ok(dev)
}

/// Opens a path as the sandbox would see it, never outside its root.
pub fn open_inside(root: BorrowedFd<'_>, path: &str) -> rustix::io::Result<OwnedFd> {
    openat2(
        root,
        path,
        OFlags::PATH | OFlags::CLOEXEC,
        Mode::empty(),
        ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS,
    )
}

/// Makes what is at a path read-only; a path that does not exist needs nothing.
pub fn make_readonly(root: BorrowedFd<'_>, path: &str) -> Result<(), Failure> {
    let place = match open_inside(root, path) {
        Ok(place) => place,
        Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR) => return Ok(()),
        Err(error) => return Err(error).doing_on("open", path),
    };
    let clone = clone_mount(place.as_fd(), c"", true).doing_on("clone the mount of", path)?;
    // Flags are added: the clone keeps those of the mount that it was made from.
    sys::mount_setattr(clone.as_fd(), sys::MOUNT_ATTR_RDONLY, true)
        .and_then(|()| sys::move_mount(clone.as_fd(), place.as_fd()))
        .doing_on("make read-only", path)
}

/// Hides what is at a path; a path that does not exist needs nothing.
pub fn mask(root: BorrowedFd<'_>, path: &str, covers: &Covers) -> Result<(), Failure> {
    let place = match open_inside(root, path) {
        Ok(place) => place,
        Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR) => return Ok(()),
        Err(error) => return Err(error).doing_on("open", path),
    };
    let status = rustix::fs::fstat(&place).doing_on("look at", path)?;
    let cover = if status.st_mode & libc::S_IFMT == libc::S_IFDIR {
        clone_mount(covers.nothing.as_fd(), c"", false)
    } else {
        clone_mount(covers.dev.as_fd(), c"null", false)
    };
    let cover = cover.doing_on("make a cover for", path)?;
    sys::move_mount(cover.as_fd(), place.as_fd()).doing_on("hide", path)
}

/// Clones the mount at a place.
fn clone_mount(place: BorrowedFd<'_>, path: &CStr, recursive: bool) -> io::Result<OwnedFd> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH;
    if recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    Ok(open_tree(place, path, flags)?)
}
