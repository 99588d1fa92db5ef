//! A sandbox as its owner sees it: pid 1, the two sockets to it, and what it is asked to do.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::PathBuf,
    sync::Mutex,
    time::Duration,
};

use crate::{
    ProcessSpec, Rootfs, SandboxError, Step, cgroup::TenancyCgroup, init_client, protocol, sys,
};

/// What a new sandbox needs.
#[derive(Debug, Clone)]
pub struct CreateRequest {
    /// Names it in errors and in its cgroup; the container's id.
    pub id: String,
    /// The bind mount of its network namespace, from `trenv_cni::Netns::path`.
    pub netns: PathBuf,
    pub init_binary: PathBuf,
    /// While it is idle.
    pub hostname: String,
    /// Where the cgroup of its pid 1 goes, a sibling of its tenancies'.
    pub cgroup_parent: String,
}

/// A living sandbox. Dropping it ends its pid 1, and with it everything inside, but waits for
/// nothing and leaves its cgroup; [`Sandbox::destroy`] does the whole of it.
#[derive(Debug)]
pub struct Sandbox {
    pub(crate) id: String,
    pub(crate) init_binary: OwnedFd,
    pub(crate) init_path: PathBuf,
    pub(crate) init_pid: i32,
    pub(crate) init_pidfd: OwnedFd,
    /// Held while a request and its answer are on their way.
    pub(crate) control: Mutex<Option<OwnedFd>>,
    pub(crate) exits: OwnedFd,
    pub(crate) cgroup: TenancyCgroup,
}

/// A started process.
#[derive(Debug)]
pub struct Spawned {
    /// Its pid on the host.
    pub pid: i32,
    pub pid_in_sandbox: i32,
    pub pidfd: OwnedFd,
    /// The master of its terminal, where the spec asked for one.
    pub terminal: Option<OwnedFd>,
}

/// The end of a process that was a child of pid 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exit {
    pub pid_in_sandbox: i32,
    pub status: ExitStatus,
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExitStatus {
    Code(i32),
    Signal(i32),
}

impl ExitStatus {
    /// One number as shells and containerd count: 128 and the signal for a killed process.
    #[must_use]
    pub fn code(self) -> i32 {
        match self {
            Self::Code(code) => code,
            Self::Signal(signal) => 128 + signal,
        }
    }
}

/// The stream of exits; readable (as a descriptor) when one waits, at its end when pid 1 is gone.
#[derive(Debug)]
pub struct Exits {
    socket: OwnedFd,
}

impl AsFd for Exits {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Exits {
    /// Waits for the next exit; `None` when pid 1 is gone.
    ///
    /// # Errors
    /// When the socket cannot be read.
    pub fn next(&self) -> io::Result<Option<Exit>> {
        match sys::receive::<protocol::ExitReport>(self.socket.as_fd()) {
            Ok(Some((report, _))) => Ok(Some(Exit {
                pid_in_sandbox: report.pid,
                status: if libc::WIFSIGNALED(report.wait_status) {
                    ExitStatus::Signal(libc::WTERMSIG(report.wait_status))
                } else {
                    ExitStatus::Code(libc::WEXITSTATUS(report.wait_status))
                },
            })),
            Ok(None) => Ok(None),
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The next exit within a time; an error of kind `TimedOut` when there is none.
    ///
    /// # Errors
    /// As [`Exits::next`], and when the time is over.
    pub fn next_within(&self, limit: Duration) -> io::Result<Option<Exit>> {
        if sys::wait_readable(self.as_fd(), Some(limit))? {
            self.next()
        } else {
            Err(io::ErrorKind::TimedOut.into())
        }
    }
}

impl Sandbox {
    /// Starts pid 1 in fresh namespaces and returns when the parts of the first root are ready.
    ///
    /// # Errors
    /// When a namespace, the cgroup or a part cannot be made; nothing is left then.
    pub fn create(request: &CreateRequest) -> Result<Self, SandboxError> {
        init_client::create(request)
    }

    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Host pid of pid 1.
    #[must_use]
    pub fn init_pid(&self) -> i32 {
        self.init_pid
    }

    /// To join the sandbox's namespaces (setns) and to watch for its end.
    #[must_use]
    pub fn init_pidfd(&self) -> BorrowedFd<'_> {
        self.init_pidfd.as_fd()
    }

    /// Swaps a tenancy's root in. The sandbox must be idle: new or purged.
    ///
    /// # Errors
    /// When a part cannot be placed; the sandbox is idle again then, without the new root.
    pub fn enter_rootfs(&self, root: &Rootfs) -> Result<Vec<Step>, SandboxError> {
        init_client::enter(self, root)
    }

    /// Starts a process inside, in the tenancy's cgroup, as a child of pid 1. Descriptors 0 to 2
    /// are the given ones, unless the spec asks for a terminal.
    ///
    /// # Errors
    /// When it cannot be started as the spec says; no process is left then.
    pub fn spawn(
        &self,
        process: &ProcessSpec,
        stdio: [OwnedFd; 3],
        cgroup: &TenancyCgroup,
    ) -> Result<Spawned, SandboxError> {
        init_client::spawn(self, process, stdio, cgroup)
    }

    /// The ends of processes that were children of pid 1: a function's root, orphans, what exec
    /// added. All receivers of one sandbox share one stream: each exit is seen once.
    ///
    /// # Errors
    /// When no descriptor is left.
    pub fn exits(&self) -> Result<Exits, SandboxError> {
        let socket = self
            .exits
            .try_clone()
            .map_err(|source| SandboxError::Host {
                id: self.id.clone(),
                doing: "open the stream of exits",
                source,
            })?;
        Ok(Exits { socket })
    }

    /// Kills what still runs inside beside pid 1 and takes away everything that the tenancy left:
    /// root, mounts, IPC, hostname, TCP remains, neighbours. Then makes the next root's parts.
    ///
    /// # Errors
    /// When something cannot be taken away: addresses or routes changed, a process does not die.
    /// The sandbox must then be destroyed.
    pub fn purge(&self) -> Result<Vec<Step>, SandboxError> {
        init_client::purge(self)
    }

    /// Ends pid 1, and with it every process inside, waits for that, and removes its cgroup.
    /// Can be repeated. The network namespace stays with its owner.
    ///
    /// # Errors
    /// When pid 1 does not end or its cgroup stays busy.
    pub fn destroy(&self) -> Result<(), SandboxError> {
        init_client::destroy(self)
    }
}
