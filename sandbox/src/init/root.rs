//! Swapping roots: a tenancy's root is mounted over the empty one of an idle sandbox, and taken away
//! again.
//!
//! The root of the mount namespace never changes: pivot_root(2) would look at every task of the
//! machine to see whether it must be moved. Who joins the namespace begins in what is mounted on
//! its root (kernel: fs/namespace.c, mntns_install), and so does pid 1 by chroot. No way leads out of
//! it: `..` above it comes back to what is mounted there. The empty root is read-only all the same.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::{
    fs::{CWD, Mode, OFlags, ResolveFlags, mkdirat, openat, openat2},
    mount::{MountAttrFlags, UnmountFlags, unmount},
};
use trenv_sandbox::{
    protocol::{EnterRequest, StepName},
    sys,
};

use crate::{
    failure::{Doing, Failure},
    launch::set_hostname,
    parts::{self, Parts},
    pid_one::{State, Steps, Stock, timed},
};

/// Makes the tenancy's mount the root, with the parts and the given mounts in it. After a failure
/// the sandbox is idle as before.
pub fn enter(
    state: &mut State,
    request: &EnterRequest,
    fds: Vec<OwnedFd>,
) -> Result<Steps, Failure> {
    let mut fds = fds.into_iter();
    let root = fds
        .next()
        .ok_or_else(|| Failure("no root was given".into()))?;
    let mounts: Vec<OwnedFd> = fds.collect();
    if mounts.len() != request.parts.len() {
        return Err(Failure(format!(
            "{} places were given for {} mounts",
            request.parts.len(),
            mounts.len()
        )));
    }
    state.restock()?;
    let parts = match std::mem::replace(&mut state.parts, Stock::Used) {
        Stock::Ready(parts) => parts,
        Stock::Used | Stock::Due => {
            return Err(Failure("a tenancy is in it already; purge it first".into()));
        }
    };
    let mut steps = Steps::new();
    let entered = swap(&root, &mounts, request, &parts, &mut steps);
    drop((mounts, parts));
    state.base.covered_by = Some(root);
    if let Err(failure) = entered {
        // Parts may lie in the new root by now: they are made again.
        return match state.base.uncover() {
            Ok(()) => {
                state.parts = Stock::Due;
                Err(failure)
            }
            Err(second) => Err(Failure(format!(
                "{failure}; and the sandbox cannot be made idle again: {second}"
            ))),
        };
    }
    Ok(steps)
}

fn swap(
    root: &OwnedFd,
    mounts: &[OwnedFd],
    request: &EnterRequest,
    parts: &Parts,
    steps: &mut Steps,
) -> Result<(), Failure> {
    timed(steps, StepName::RootAttach, || attach_over_root(root))?;
    timed(steps, StepName::RootParts, || {
        for (name, part) in &parts.places {
            let place = own_place(root.as_fd(), name)?;
            sys::move_mount(part.as_fd(), place.as_fd()).doing_on("move in", name)?;
        }
        for (mount, part) in mounts.iter().zip(&request.parts) {
            let place = place(root.as_fd(), &part.destination, part.directory)?;
            refuse_proc(place.as_fd(), &part.destination)?;
            sys::move_mount(mount.as_fd(), place.as_fd())
                .doing_on("mount on", &part.destination)?;
        }
        for path in &request.readonly {
            parts::make_readonly(root.as_fd(), path)?;
        }
        for path in &request.masked {
            parts::mask(root.as_fd(), path, &parts.covers)?;
        }
        if request.read_only {
            sys::mount_setattr(root.as_fd(), sys::MOUNT_ATTR_RDONLY, false)
                .doing("make the root read-only")?;
        }
        set_hostname(&request.hostname)
    })?;
    timed(steps, StepName::RootEnter, || go_to(root))
}

/// The root of the mount namespace.
#[derive(Debug)]
pub struct Base {
    empty: OwnedFd,
    /// The tenancy's root, which lies on it.
    covered_by: Option<OwnedFd>,
}

impl Base {
    /// Makes an empty directory the root and lets every other mount go.
    pub fn make() -> Result<Self, Failure> {
        let empty = parts::new_mount(
            "tmpfs",
            &[("mode", Some("755")), ("size", Some("64k"))],
            MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV,
        )?;
        for name in parts::PLACES {
            mkdirat(&empty, name, Mode::from_raw_mode(0o755))
                .doing_on("make the directory", name)?;
        }
        attach_over_root(&empty)?;
        rustix::process::fchdir(&empty).doing("go to the empty root")?;
        sys::pivot_to_here().doing("make the empty root the root")?;
        unmount(c".", UnmountFlags::DETACH).doing("let the old root go")?;
        rustix::process::chdir(c"/").doing("go to the empty root")?;
        sys::mount_setattr(empty.as_fd(), sys::MOUNT_ATTR_RDONLY, false)
            .doing("make the empty root read-only")?;
        Ok(Self {
            empty,
            covered_by: None,
        })
    }

    /// Lets everything go that is mounted on it or in it. May be repeated.
    pub fn uncover(&mut self) -> Result<(), Failure> {
        if let Some(root) = &self.covered_by {
            rustix::process::fchdir(root).doing("go to the old root")?;
            detach(c".")?;
        }
        go_to(&self.empty)?;
        self.covered_by = None;
        for name in parts::PLACES {
            detach(name)?;
        }
        Ok(())
    }
}

/// Lets all mounts on a place go.
fn detach(place: impl rustix::path::Arg + Copy) -> Result<(), Failure> {
    loop {
        match unmount(place, UnmountFlags::DETACH) {
            Ok(()) => {}
            // Nothing is mounted there any more.
            Err(rustix::io::Errno::INVAL) => return Ok(()),
            Err(error) => return Err(error).doing("let a mount go"),
        }
    }
}

/// Mounts over the root directory itself: no directory of the old root is needed for it, whatever
/// a tenancy has done there.
fn attach_over_root(mount: &OwnedFd) -> Result<(), Failure> {
    let root = openat(CWD, c"/", OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
        .doing("open the old root")?;
    sys::move_mount(mount.as_fd(), root.as_fd()).doing("attach the new root")
}

/// Makes a mount this process's root and current directory.
fn go_to(root: &OwnedFd) -> Result<(), Failure> {
    rustix::process::fchdir(root).doing("go to the new root")?;
    rustix::process::chroot(c".").doing("make the new root the root")
}

/// A directory of the root's own for one of our parts: made when missing, never a link.
fn own_place(root: BorrowedFd<'_>, name: &str) -> Result<OwnedFd, Failure> {
    let open = || {
        openat2(
            root,
            name,
            OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
            ResolveFlags::IN_ROOT | ResolveFlags::NO_SYMLINKS,
        )
    };
    match open() {
        Err(rustix::io::Errno::NOENT) => {
            mkdirat(root, name, Mode::from_raw_mode(0o755))
                .doing_on("make the mount point of", name)?;
            open()
        }
        result => result,
    }
    .doing_on("open the mount point of", name)
}

/// A mount in /proc, which a link in an image could lead to, would put foreign files where programs
/// believe the kernel.
fn refuse_proc(place: BorrowedFd<'_>, path: &str) -> Result<(), Failure> {
    let found = rustix::fs::fstatfs(place).doing_on("look at the mount point", path)?;
    if found.f_type == libc::PROC_SUPER_MAGIC {
        return Err(Failure(format!(
            "mount on {path}: it lies in /proc, where nothing may be mounted"
        )));
    }
    Ok(())
}

/// The place of a mount: found below the root, links followed as if it were the root already, and
/// what is missing made, as container runtimes do.
fn place(root: BorrowedFd<'_>, path: &str, directory: bool) -> Result<OwnedFd, Failure> {
    if let Ok(found) = parts::open_inside(root, path) {
        return Ok(found);
    }
    let mut made = String::new();
    let mut parent = parts::open_inside(root, "/").doing("open the root")?;
    let mut names = path
        .split('/')
        .filter(|name| !name.is_empty() && *name != ".")
        .peekable();
    while let Some(name) = names.next() {
        made.push('/');
        made.push_str(name);
        parent = match parts::open_inside(root, &made) {
            Ok(found) => found,
            Err(rustix::io::Errno::NOENT) if name != ".." => {
                if names.peek().is_some() || directory {
                    mkdirat(&parent, name, Mode::from_raw_mode(0o755))
                } else {
                    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
                    openat(&parent, name, flags, Mode::from_raw_mode(0o644)).map(drop)
                }
                .doing_on("make the mount point", &made)?;
                parts::open_inside(root, &made).doing_on("open the mount point", &made)?
            }
            Err(error) => return Err(error).doing_on("open the mount point", &made),
        };
    }
    Ok(parent)
}
