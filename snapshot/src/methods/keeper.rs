//! The keeper: a process that holds the userfaultfds of all instances of a method, too.
//!
//! When the last holder of a userfaultfd goes, the kernel answers every missing page with zeroes,
//! which would be wrong without anyone seeing it. So a second process holds each. When the one that
//! serves pages ends, in whatever way, missing pages wait; the keeper kills the pid 1 of every
//! sandbox concerned, and with it all that lives there, and lets go only when that is done. When the
//! keeper ends, who serves pages does the same.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use rustix::process::{Signal, pidfd_send_signal};

use crate::zygote::ZygoteError;

/// The argument by which `trenv-zygote` becomes a keeper.
pub const ARGUMENT: &str = "keep-userfaultfds";

/// Where the keeper has its socket.
const SOCKET: i32 = 3;
/// How long a sandbox may take to die; what it holds is held longer than that if it must be.
const DEATH: Duration = Duration::from_secs(10);

/// The serving side's hold on its keeper.
#[derive(Debug)]
pub struct Keeper {
    socket: OwnedFd,
    child: Mutex<Child>,
    pidfd: OwnedFd,
    next: AtomicU64,
}

impl Keeper {
    /// Starts a keeper from the program `trenv-zygote`.
    pub fn start(binary: &Path) -> Result<Self, ZygoteError> {
        use std::os::unix::process::CommandExt;
        let failed = |source| ZygoteError::Io {
            doing: format!("starting the keeper of userfaultfds, {}", binary.display()),
            source,
        };
        let (socket, theirs) = nix::sys::socket::socketpair(
            nix::sys::socket::AddressFamily::Unix,
            nix::sys::socket::SockType::SeqPacket,
            None,
            nix::sys::socket::SockFlag::SOCK_CLOEXEC,
        )
        .map_err(|errno| failed(errno.into()))?;
        let mut command = Command::new(binary);
        command.arg(ARGUMENT).env_clear();
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let number = std::os::fd::AsRawFd::as_raw_fd(&theirs);
        // SAFETY: between fork and exec only calls that are async-signal-safe are made.
        unsafe {
            command.pre_exec(move || {
                // A copy of itself would be closed at exec.
                let own = libc::fcntl(number, libc::F_DUPFD, SOCKET + 1);
                // What ends its owner's session shall not end it.
                libc::setsid();
                match libc::dup2(own, SOCKET) {
                    SOCKET => Ok(()),
                    _ => Err(io::Error::last_os_error()),
                }
            })
        };
        let child = command.spawn().map_err(failed)?;
        let pid = rustix::process::Pid::from_child(&child);
        let pidfd = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty())
            .map_err(|errno| failed(errno.into()))?;
        Ok(Self {
            socket,
            child: Mutex::new(child),
            pidfd,
            next: AtomicU64::new(0),
        })
    }

    /// Readable once the keeper has ended.
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    pub fn has_ended(&self) -> bool {
        let mut poll = [PollFd::new(self.pidfd.as_fd(), PollFlags::POLLIN)];
        nix::poll::poll(&mut poll, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
    }

    /// Host pid of the keeper.
    pub fn pid(&self) -> u32 {
        let child = self.child.lock();
        child
            .unwrap_or_else(std::sync::PoisonError::into_inner)
            .id()
    }

    /// A number for a new instance.
    pub fn number(&self) -> u64 {
        self.next.fetch_add(1, Ordering::Relaxed)
    }

    /// Hands over what belongs to an instance: its userfaultfd, and with the first the pidfd of its
    /// sandbox's pid 1.
    pub fn hold(&self, number: u64, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() {
            ancillary.push(SendAncillaryMessage::ScmRights(descriptors));
        }
        let bytes = number.to_ne_bytes();
        sendmsg(
            &self.socket,
            &[io::IoSlice::new(&bytes)],
            &mut ancillary,
            SendFlags::NOSIGNAL,
        )?;
        Ok(())
    }

    /// The instance has ended.
    pub fn release(&self, number: u64) {
        // A keeper that has ended holds nothing.
        let _ = self.hold(number, &[]);
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        // It ends by itself: its socket closes with this, and it holds nothing then.
        let _ = rustix::net::shutdown(&self.socket, rustix::net::Shutdown::Both);
        let child = self.child.get_mut();
        let _ = child
            .unwrap_or_else(std::sync::PoisonError::into_inner)
            .wait();
    }
}

/// Kills a sandbox by its pid 1 and waits until all that lives there is dead; `false` when that
/// takes too long.
pub fn kill(init: BorrowedFd<'_>) -> bool {
    // One that has ended needs no signal.
    let _ = pidfd_send_signal(init, Signal::KILL);
    let until = Instant::now() + DEATH;
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        // pid 1 of a pid namespace ends last.
        let mut poll = [PollFd::new(init, PollFlags::POLLIN)];
        match nix::poll::poll(&mut poll, timeout) {
            Err(nix::errno::Errno::EINTR) => {}
            ready => return ready.is_ok_and(|ready| ready > 0),
        }
    }
}

/// What the keeper does until its owner ends.
///
/// # Errors
/// When it was not started as a keeper.
pub fn keep() -> io::Result<()> {
    // SAFETY: the one who starts a keeper puts its socket there.
    let socket = unsafe { OwnedFd::from_raw_fd(SOCKET) };
    let mut held: HashMap<u64, Vec<OwnedFd>> = HashMap::new();
    loop {
        let mut bytes = [0u8; 8];
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let mut parts = [io::IoSliceMut::new(&mut bytes)];
        let got = match recvmsg(&socket, &mut parts, &mut ancillary, RecvFlags::CMSG_CLOEXEC) {
            Ok(message) => message.bytes,
            Err(rustix::io::Errno::INTR) => continue,
            Err(_) => 0,
        };
        if got != bytes.len() {
            break;
        }
        let number = u64::from_ne_bytes(bytes);
        let descriptors: Vec<OwnedFd> = ancillary
            .drain()
            .filter_map(|message| match message {
                RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
                _ => None,
            })
            .flatten()
            .collect();
        if descriptors.is_empty() {
            held.remove(&number);
        } else {
            held.entry(number).or_default().extend(descriptors);
        }
    }
    // The second descriptor of each is the pidfd.
    let inits: Vec<&OwnedFd> = held.values().filter_map(|one| one.get(1)).collect();
    for init in &inits {
        let _ = pidfd_send_signal(init, Signal::KILL);
    }
    for init in inits {
        while !kill(init.as_fd()) {}
    }
    Ok(())
}
