//! One network namespace: a bind mount that keeps it alive without a process.

use std::{
    fs, io,
    net::Ipv4Addr,
    os::fd::AsRawFd,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, setns, unshare},
};

use crate::{
    Network, NetworkError, Step,
    bridge::{check, control_socket, interface_request},
    record::Record,
};

/// A network namespace with an address, and its record. Dropping it leaves both for the next sweep;
/// [`Netns::destroy`] takes them back at once.
#[derive(Debug)]
pub struct Netns {
    pub(crate) id: String,
    pub(crate) path: PathBuf,
    pub(crate) address: Ipv4Addr,
    pub(crate) gateway: Ipv4Addr,
    pub(crate) steps: Vec<Step>,
    pub(crate) network: Network,
    /// Held while the namespace exists; its lock says that it has an owner.
    pub(crate) record: Mutex<Option<Record>>,
}

impl Netns {
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The bind mount that keeps the namespace alive.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The sandbox's address on the bridge.
    #[must_use]
    pub fn address(&self) -> Ipv4Addr {
        self.address
    }

    #[must_use]
    pub fn gateway(&self) -> Ipv4Addr {
        self.gateway
    }

    /// What its making consisted of.
    #[must_use]
    pub fn steps(&self) -> &[Step] {
        &self.steps
    }

    /// Takes the address, the interfaces and the namespace back. Can be repeated.
    ///
    /// # Errors
    /// When a plugin refuses; the record then stays for a sweep.
    pub fn destroy(&self) -> Result<(), NetworkError> {
        let record = self
            .record
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        match record {
            Some(record) => self.network.take_back(&self.id, record),
            None => Ok(()),
        }
    }
}

/// Makes an empty namespace with its loopback interface up.
pub(crate) fn make_namespace(id: &str, path: &Path) -> Result<(), NetworkError> {
    fs::write(path, "").map_err(NetworkError::file("make", path))?;
    let target = path.to_owned();
    // A thread of its own, since a thread cannot be sure to get back into the namespace it left.
    let worker = move || -> io::Result<()> {
        unshare(CloneFlags::CLONE_NEWNET)?;
        // Sandboxes have IPv4 addresses only; an interface without IPv6 never changes by itself.
        // Where the kernel has no IPv6 there is no such file.
        match fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1") {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        bring_up("lo")?;
        let own = Some("/proc/thread-self/ns/net");
        mount(own, &target, None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
        Ok(())
    };
    let failed = |source| NetworkError::Namespace {
        id: id.to_owned(),
        source,
    };
    std::thread::spawn(worker)
        .join()
        .map_err(|_| failed(io::Error::other("the thread that made it ended early")))?
        .map_err(failed)
}

/// Does something in a namespace, on a thread of its own: a thread cannot be sure to get back into
/// the namespace it left.
pub(crate) fn at_namespace(
    path: &Path,
    work: impl FnOnce() -> io::Result<()> + Send,
) -> io::Result<()> {
    let netns = fs::File::open(path)?;
    std::thread::scope(|scope| {
        scope
            .spawn(move || {
                setns(netns, CloneFlags::CLONE_NEWNET)?;
                work()
            })
            .join()
    })
    .unwrap_or_else(|_| Err(io::Error::other("the thread inside ended early")))
}

fn bring_up(name: &str) -> io::Result<()> {
    let mut request = interface_request(name)?;
    request.ifr_ifru.ifru_flags = libc::c_short::try_from(libc::IFF_UP).unwrap_or(1);
    let socket = control_socket()?;
    // SAFETY: the ioctl reads an ifreq that outlives the call.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) })
}

/// Removes the mount and its file; none there is fine.
pub(crate) fn remove_namespace(path: &Path) -> Result<(), NetworkError> {
    loop {
        match umount2(path, MntFlags::MNT_DETACH) {
            Ok(()) => {}
            Err(nix::Error::EINVAL | nix::Error::ENOENT) => break,
            Err(error) => return Err(NetworkError::file("unmount", path)(error.into())),
        }
    }
    match fs::remove_file(path) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(source) => Err(NetworkError::file("remove", path)(source)),
    }
}
