//! Roots that a tenancy has left as it found them, for the next tenancy over the same layers.
//!
//! Making an overlay is the dearest part of a root, and its writable layer costs the caller a round
//! through its snapshotter. A root that nobody wrote to is as good as a new one. So a [`Keeper`] holds
//! each root's file system in a mount namespace that is a thread's own, and a tenancy gets a clone of
//! the mount. After the tenancy [`KeptRoot::is_untouched`] tells by the writable layer's directories
//! whether another one may follow.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    sync::mpsc::{Receiver, Sender, channel},
};

use rustix::{
    fs::{AtFlags, CWD, Dir, Mode, OFlags, mkdirat, openat, statat, unlinkat},
    mount::{MountPropagationFlags, OpenTreeFlags, UnmountFlags, mount_change, open_tree, unmount},
};

use super::{BindFlags, Mount, RootfsError, mounts};
use crate::sys;

/// A root is attached in the thread's namespace, cloned from there, or let go.
enum Order {
    Attach(u64, OwnedFd, Sender<io::Result<()>>),
    Clone(u64, Sender<io::Result<OwnedFd>>),
    Release(u64, Sender<()>),
}

/// Holds roots in a mount namespace of its own.
#[derive(Debug)]
pub struct Keeper {
    orders: Sender<Order>,
    next: u64,
}

/// A root whose file system is kept. It is let go when this is dropped.
#[derive(Debug)]
pub struct KeptRoot {
    orders: Sender<Order>,
    number: u64,
    /// The writable layer, and where the kernel prepares what goes there.
    watched: Vec<Watched>,
}

/// A directory, and what it was like.
#[derive(Debug)]
struct Watched {
    directory: OwnedFd,
    found: Look,
}

/// Whatever is made, removed or changed in a directory shows here: every change of an entry, of the
/// attributes and of the extended attributes moves the change time.
#[derive(Debug, PartialEq, Eq)]
struct Look {
    changed: (i64, u64),
    modified: (i64, u64),
    mode: u32,
    owner: (u32, u32),
    entries: Vec<Vec<u8>>,
}

impl Keeper {
    /// Starts the thread.
    ///
    /// # Errors
    /// When it gets no mount namespace of its own.
    pub fn start() -> Result<Self, RootfsError> {
        let (orders, received) = channel();
        let (ready, started) = channel();
        let failed = |source| RootfsError::Mount {
            doing: "make a mount namespace for",
            what: "roots that are kept".into(),
            source,
        };
        std::thread::Builder::new()
            .name("kept-roots".into())
            .spawn(move || {
                let entered = enter_empty_namespace();
                let begin = entered.is_ok();
                // Whoever asked may be gone.
                let _ = ready.send(entered);
                if begin {
                    serve(&received);
                }
            })
            .map_err(failed)?;
        answer(&started)
            .and_then(|entered| entered)
            .map_err(failed)?;
        Ok(Self { orders, next: 0 })
    }

    /// Keeps a root that was just made of these mounts, before anybody is in it; from then on only
    /// [`KeptRoot::mount`] gives it out. One without a writable layer of its own is left as it is.
    ///
    /// # Errors
    /// When the writable layer cannot be looked at, or the thread is gone.
    pub fn keep(
        &mut self,
        mounts: &[Mount],
        root: &OwnedFd,
    ) -> Result<Option<KeptRoot>, RootfsError> {
        let Some((upper, work)) = mounts::writable_layer(mounts)? else {
            return Ok(None);
        };
        let failed = |source| RootfsError::Mount {
            doing: "keep the root over",
            what: upper.to_owned(),
            source,
        };
        let watched = [upper.to_owned(), format!("{work}/work")]
            .iter()
            .map(|path| Watched::look_at(path))
            .collect::<io::Result<_>>()
            .map_err(failed)?;
        let root = root.try_clone().map_err(failed)?;
        let number = self.next;
        self.next += 1;
        ask(&self.orders, |reply| Order::Attach(number, root, reply))
            .and_then(|attached| attached)
            .map_err(failed)?;
        Ok(Some(KeptRoot {
            orders: self.orders.clone(),
            number,
            watched,
        }))
    }
}

impl KeptRoot {
    /// A mount of the root, for one tenancy.
    ///
    /// # Errors
    /// When the kernel refuses, or the thread is gone.
    pub fn mount(&self) -> Result<OwnedFd, RootfsError> {
        ask(&self.orders, |reply| Order::Clone(self.number, reply))
            .and_then(|cloned| cloned)
            .map_err(|source| RootfsError::Mount {
                doing: "mount",
                what: "a root that was kept".into(),
                source,
            })
    }

    /// Whether nothing was written to the root since it was made.
    pub fn is_untouched(&self) -> bool {
        self.watched
            .iter()
            .all(|watched| Look::at(&watched.directory).is_ok_and(|now| now == watched.found))
    }
}

impl Drop for KeptRoot {
    fn drop(&mut self) {
        // Waited for: the writable layer may be removed next. A thread that is gone holds nothing.
        let _ = ask(&self.orders, |reply| Order::Release(self.number, reply));
    }
}

impl Watched {
    fn look_at(path: &str) -> io::Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = rustix::fs::open(path, flags, Mode::empty())?;
        let found = Look::at(&directory)?;
        Ok(Self { directory, found })
    }
}

impl Look {
    fn at(directory: &OwnedFd) -> io::Result<Self> {
        let status = statat(directory, "", AtFlags::EMPTY_PATH)?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let mut entries = Vec::new();
        for entry in Dir::new(openat(directory, ".", flags, Mode::empty())?)? {
            entries.push(entry?.file_name().to_bytes().to_vec());
        }
        entries.sort_unstable();
        Ok(Self {
            changed: (status.st_ctime, status.st_ctime_nsec),
            modified: (status.st_mtime, status.st_mtime_nsec),
            mode: status.st_mode,
            owner: (status.st_uid, status.st_gid),
            entries,
        })
    }
}

fn ask<T>(orders: &Sender<Order>, order: impl FnOnce(Sender<T>) -> Order) -> io::Result<T> {
    let (reply, answered) = channel();
    orders
        .send(order(reply))
        .map_err(|_| io::Error::from(io::ErrorKind::BrokenPipe))?;
    answer(&answered)
}

fn answer<T>(answered: &Receiver<T>) -> io::Result<T> {
    answered
        .recv()
        .map_err(|_| io::ErrorKind::BrokenPipe.into())
}

/// Gives this thread a mount namespace with nothing in it but an empty directory.
fn enter_empty_namespace() -> io::Result<()> {
    // SAFETY: unshare takes flags only; the thread shares its file system context with no other
    // after it, and does nothing else than keep roots.
    sys::check(unsafe { libc::unshare(libc::CLONE_NEWNS) }.into())?;
    mount_change(
        "/",
        MountPropagationFlags::PRIVATE | MountPropagationFlags::REC,
    )?;
    let empty = mounts::tmpfs(&[("mode", "700"), ("size", "64k")], BindFlags::default())
        .map_err(io::Error::other)?;
    let root = rustix::fs::open("/", OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    sys::move_mount(empty.as_fd(), root.as_fd())?;
    rustix::process::fchdir(&empty)?;
    sys::pivot_to_here()?;
    // The machine's own mounts must not be held busy by this namespace.
    unmount(".", UnmountFlags::DETACH)?;
    Ok(rustix::process::chdir("/")?)
}

fn serve(orders: &Receiver<Order>) {
    // Whoever asked and went away does not need the answer.
    while let Ok(order) = orders.recv() {
        match order {
            Order::Attach(number, root, reply) => {
                let _ = reply.send(attach(number, &root));
            }
            Order::Clone(number, reply) => {
                let tree = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
                let cloned = open_tree(CWD, place(number), tree).map_err(io::Error::from);
                let _ = reply.send(cloned);
            }
            Order::Release(number, reply) => {
                let place = place(number);
                // A second try could do no more.
                let _ = unmount(place.as_str(), UnmountFlags::DETACH);
                let _ = unlinkat(CWD, place, AtFlags::REMOVEDIR);
                let _ = reply.send(());
            }
        }
    }
}

fn place(number: u64) -> String {
    format!("/{number}")
}

fn attach(number: u64, root: &OwnedFd) -> io::Result<()> {
    let place = place(number);
    mkdirat(CWD, place.as_str(), Mode::RWXU)?;
    let directory = rustix::fs::open(
        place.as_str(),
        OFlags::PATH | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    sys::move_mount(root.as_fd(), directory.as_fd())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::path::Path;

    use super::super::overlay_from_mounts;
    use super::*;

    /// An overlay over one file, `/etc/motd`.
    struct Layers(tempfile::TempDir);

    impl Layers {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            for name in ["lower/etc", "upper", "work"] {
                std::fs::create_dir_all(dir.path().join(name)).unwrap();
            }
            std::fs::write(dir.path().join("lower/etc/motd"), "hello").unwrap();
            Self(dir)
        }

        fn mounts(&self) -> Vec<Mount> {
            let dir = self.0.path().display();
            vec![Mount {
                kind: "overlay".into(),
                source: "overlay".into(),
                options: vec![
                    format!("workdir={dir}/work"),
                    format!("upperdir={dir}/upper"),
                    format!("lowerdir={dir}/lower"),
                ],
            }]
        }

        fn keep(&self, keeper: &mut Keeper) -> KeptRoot {
            let mounts = self.mounts();
            let root = overlay_from_mounts(&mounts).unwrap();
            keeper.keep(&mounts, &root).unwrap().unwrap()
        }
    }

    /// The path of a file in a detached mount.
    fn inside(mount: &OwnedFd, path: &str) -> std::path::PathBuf {
        use std::os::fd::AsRawFd;
        Path::new("/proc/self/fd")
            .join(mount.as_raw_fd().to_string())
            .join(path)
    }

    #[test]
    fn a_root_that_was_only_read_serves_again() {
        let layers = Layers::new();
        let mut keeper = Keeper::start().unwrap();
        let kept = layers.keep(&mut keeper);
        for _ in 0..3 {
            let mount = kept.mount().unwrap();
            let read = std::fs::read_to_string(inside(&mount, "etc/motd")).unwrap();
            assert_eq!(read, "hello");
            assert!(kept.is_untouched());
        }
    }

    type Write = fn(&OwnedFd);

    #[test]
    fn every_kind_of_writing_is_seen() {
        let writes: [(&str, Write); 6] = [
            ("a new file", |root| {
                std::fs::write(inside(root, "new"), "").unwrap();
            }),
            ("a file that is gone again", |root| {
                std::fs::write(inside(root, "etc/new"), "").unwrap();
                std::fs::remove_file(inside(root, "etc/new")).unwrap();
            }),
            ("a changed file", |root| {
                std::fs::write(inside(root, "etc/motd"), "bye").unwrap();
            }),
            ("a removed file", |root| {
                std::fs::remove_file(inside(root, "etc/motd")).unwrap();
            }),
            ("the mode of a file", |root| {
                let mode = std::fs::Permissions::from_mode(0o600);
                std::fs::set_permissions(inside(root, "etc/motd"), mode).unwrap();
            }),
            ("the mode of the root", |root| {
                let mode = std::fs::Permissions::from_mode(0o700);
                std::fs::set_permissions(inside(root, ""), mode).unwrap();
            }),
        ];
        let mut keeper = Keeper::start().unwrap();
        for (what, write) in writes {
            let layers = Layers::new();
            let kept = layers.keep(&mut keeper);
            let mount = kept.mount().unwrap();
            write(&mount);
            assert!(!kept.is_untouched(), "{what}");
        }
    }

    #[test]
    fn a_root_that_is_let_go_can_be_made_again() {
        let layers = Layers::new();
        let mut keeper = Keeper::start().unwrap();
        for text in ["one", "two"] {
            let kept = layers.keep(&mut keeper);
            std::fs::write(inside(&kept.mount().unwrap(), "etc/motd"), text).unwrap();
            drop(kept);
            let upper = layers.0.path().join("upper/etc/motd");
            assert_eq!(std::fs::read_to_string(upper).unwrap(), text);
        }
    }

    #[test]
    fn a_view_is_not_kept() {
        let layers = Layers::new();
        let view = [Mount {
            kind: "bind".into(),
            source: layers.0.path().join("lower").display().to_string(),
            options: vec!["ro".into(), "rbind".into()],
        }];
        let root = overlay_from_mounts(&view).unwrap();
        assert!(
            Keeper::start()
                .unwrap()
                .keep(&view, &root)
                .unwrap()
                .is_none()
        );
    }
}
