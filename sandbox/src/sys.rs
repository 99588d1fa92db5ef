//! Kernel interfaces that no crate of ours covers: packets with descriptors, mount attributes,
//! clone3 and pid descriptors. Errors are plain [`io::Error`]s; the callers say what was done.

use std::{
    ffi::CStr,
    io,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
    time::Duration,
};

use serde::{Serialize, de::DeserializeOwned};

/// The longest message; a process spec with a large environment fits.
const MESSAGE_LIMIT: usize = 1 << 20;
/// Descriptors in one message, by the kernel's own limit (SCM_MAX_FD).
pub const DESCRIPTOR_LIMIT: usize = 253;

pub(crate) fn check(result: libc::c_long) -> io::Result<libc::c_long> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// A connected pair of SOCK_SEQPACKET sockets.
///
/// # Errors
/// When the kernel has no descriptor left.
pub fn packet_pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let mut pair: [RawFd; 2] = [-1; 2];
    let kind = libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC;
    // SAFETY: `pair` has room for the two descriptors.
    check(unsafe { libc::socketpair(libc::AF_UNIX, kind, 0, pair.as_mut_ptr()) }.into())?;
    // A large process spec goes in one packet; the default limit would refuse it.
    let bytes = libc::c_int::try_from(MESSAGE_LIMIT).unwrap_or(libc::c_int::MAX);
    for fd in pair {
        // SAFETY: the option's value is an int that outlives the call. SO_SNDBUFFORCE needs
        // CAP_NET_ADMIN; without it the default size stays, which serves all but the largest specs.
        unsafe {
            libc::setsockopt(
                fd,
                libc::SOL_SOCKET,
                libc::SO_SNDBUFFORCE,
                (&raw const bytes).cast(),
                4,
            )
        };
    }
    // SAFETY: the kernel has just made these descriptors for us.
    Ok(unsafe { (OwnedFd::from_raw_fd(pair[0]), OwnedFd::from_raw_fd(pair[1])) })
}

/// Sends one message with descriptors.
///
/// # Errors
/// When the other end is closed, or the message is too long.
pub fn send<T: Serialize>(
    socket: BorrowedFd<'_>,
    message: &T,
    fds: &[BorrowedFd<'_>],
) -> io::Result<()> {
    send_flags(socket, message, fds, 0)
}

/// Sends one message without waiting for room.
///
/// # Errors
/// As [`send`]; [`io::ErrorKind::WouldBlock`] when there is no room.
pub fn send_now<T: Serialize>(socket: BorrowedFd<'_>, message: &T) -> io::Result<()> {
    send_flags(socket, message, &[], libc::MSG_DONTWAIT)
}

fn send_flags<T: Serialize>(
    socket: BorrowedFd<'_>,
    message: &T,
    fds: &[BorrowedFd<'_>],
    flags: libc::c_int,
) -> io::Result<()> {
    let bytes = postcard::to_stdvec(message).map_err(io::Error::other)?;
    if fds.len() > DESCRIPTOR_LIMIT {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("{} descriptors do not fit into one message", fds.len()),
        ));
    }
    let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let payload = u32::try_from(size_of_val(raw.as_slice())).unwrap_or(0);
    // SAFETY: CMSG_SPACE only computes.
    let space = unsafe { libc::CMSG_SPACE(payload) } as usize;
    // u64s, so that the header is aligned.
    let mut control = vec![0_u64; space.div_ceil(8)];
    let mut part = libc::iovec {
        iov_base: bytes.as_ptr().cast_mut().cast(),
        iov_len: bytes.len(),
    };
    // SAFETY: a zeroed msghdr is valid.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_iov = &raw mut part;
    header.msg_iovlen = 1;
    if !raw.is_empty() {
        header.msg_control = control.as_mut_ptr().cast();
        header.msg_controllen = space as _;
        // SAFETY: the control buffer has room for one header and `raw`.
        unsafe {
            let first = libc::CMSG_FIRSTHDR(&raw const header);
            (*first).cmsg_level = libc::SOL_SOCKET;
            (*first).cmsg_type = libc::SCM_RIGHTS;
            (*first).cmsg_len = libc::CMSG_LEN(payload) as _;
            std::ptr::copy_nonoverlapping(raw.as_ptr(), libc::CMSG_DATA(first).cast(), raw.len());
        }
    }
    loop {
        // SAFETY: the header points to buffers that outlive the call.
        let sent = unsafe {
            libc::sendmsg(
                socket.as_raw_fd(),
                &raw const header,
                flags | libc::MSG_NOSIGNAL,
            )
        };
        match check(sent as libc::c_long) {
            Ok(_) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// Receives one message with its descriptors; `None` when the other end is closed.
///
/// # Errors
/// When the message cannot be read or is not one of ours.
pub fn receive<T: DeserializeOwned>(
    socket: BorrowedFd<'_>,
) -> io::Result<Option<(T, Vec<OwnedFd>)>> {
    let length = loop {
        // SAFETY: MSG_PEEK with no buffer only asks for the length.
        let length = unsafe {
            libc::recv(
                socket.as_raw_fd(),
                std::ptr::null_mut(),
                0,
                libc::MSG_PEEK | libc::MSG_TRUNC,
            )
        };
        match check(length as libc::c_long) {
            Ok(length) => break usize::try_from(length).unwrap_or(0),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    };
    if length == 0 {
        return Ok(None);
    }
    let mut bytes = vec![0_u8; length];
    // Header and SCM_MAX_FD descriptors.
    let mut control = [0_u64; 2 + DESCRIPTOR_LIMIT.div_ceil(2)];
    let mut part = libc::iovec {
        iov_base: bytes.as_mut_ptr().cast(),
        iov_len: bytes.len(),
    };
    // SAFETY: a zeroed msghdr is valid.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_iov = &raw mut part;
    header.msg_iovlen = 1;
    header.msg_control = control.as_mut_ptr().cast();
    header.msg_controllen = size_of_val(&control) as _;
    // SAFETY: the header points to buffers that outlive the call.
    let got = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut header, libc::MSG_CMSG_CLOEXEC) };
    check(got as libc::c_long)?;
    let mut fds = Vec::new();
    // SAFETY: the kernel wrote the control buffer; the macros walk it within its length, and every
    // descriptor in it is new and ours.
    unsafe {
        let mut at = libc::CMSG_FIRSTHDR(&raw const header);
        while !at.is_null() {
            if (*at).cmsg_level == libc::SOL_SOCKET && (*at).cmsg_type == libc::SCM_RIGHTS {
                let bytes = (*at).cmsg_len as usize - libc::CMSG_LEN(0) as usize;
                let data: *const RawFd = libc::CMSG_DATA(at).cast();
                for index in 0..bytes / size_of::<RawFd>() {
                    fds.push(OwnedFd::from_raw_fd(data.add(index).read_unaligned()));
                }
            }
            at = libc::CMSG_NXTHDR(&raw const header, at);
        }
    }
    let message = postcard::from_bytes(&bytes).map_err(io::Error::other)?;
    Ok(Some((message, fds)))
}

/// Waits until a descriptor can be read or is closed; false when the time is over.
///
/// # Errors
/// When the kernel refuses to wait.
pub fn wait_readable(fd: BorrowedFd<'_>, limit: Option<Duration>) -> io::Result<bool> {
    let start = std::time::Instant::now();
    loop {
        let left = match limit {
            None => -1,
            Some(limit) => {
                let left = limit.saturating_sub(start.elapsed());
                // Up, so that a short rest is not polled in a busy loop.
                libc::c_int::try_from(left.as_micros().div_ceil(1000)).unwrap_or(libc::c_int::MAX)
            }
        };
        let mut poll = libc::pollfd {
            fd: fd.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: one valid pollfd.
        match check(unsafe { libc::poll(&raw mut poll, 1, left) }.into()) {
            Ok(0) => return Ok(false),
            Ok(_) => return Ok(true),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

#[repr(C)]
struct MountAttributes {
    set: u64,
    clear: u64,
    propagation: u64,
    user_namespace: u64,
}

pub const MOUNT_ATTR_RDONLY: u64 = 1;
pub const MOUNT_ATTR_NOSUID: u64 = 2;
pub const MOUNT_ATTR_NODEV: u64 = 4;
pub const MOUNT_ATTR_NOEXEC: u64 = 8;

/// Sets attributes of a mount, and of those below it if `recursive`.
///
/// # Errors
/// When the kernel refuses them.
pub fn mount_setattr(mount: BorrowedFd<'_>, set: u64, recursive: bool) -> io::Result<()> {
    const AT_RECURSIVE: libc::c_int = 0x8000;
    let attributes = MountAttributes {
        set,
        clear: 0,
        propagation: 0,
        user_namespace: 0,
    };
    let flags = libc::AT_EMPTY_PATH | if recursive { AT_RECURSIVE } else { 0 };
    // SAFETY: the attributes are valid for their size and the path is empty.
    check(unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const attributes,
            size_of::<MountAttributes>(),
        )
    })?;
    Ok(())
}

/// Moves a detached or attached mount onto the place that a descriptor names.
///
/// # Errors
/// When the kernel refuses the move.
pub fn move_mount(mount: BorrowedFd<'_>, place: BorrowedFd<'_>) -> io::Result<()> {
    const F_EMPTY_PATH: libc::c_uint = 0x4;
    const T_EMPTY_PATH: libc::c_uint = 0x40;
    // SAFETY: both paths are empty strings.
    check(unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            mount.as_raw_fd(),
            c"".as_ptr(),
            place.as_raw_fd(),
            c"".as_ptr(),
            F_EMPTY_PATH | T_EMPTY_PATH,
        )
    })?;
    Ok(())
}

/// Makes the current directory the root of this mount namespace and leaves the old root mounted
/// on top of it, ready to be detached.
///
/// # Errors
/// When the current directory is not the root of a mount.
pub fn pivot_to_here() -> io::Result<()> {
    let here: &CStr = c".";
    // SAFETY: both paths are valid strings.
    check(unsafe { libc::syscall(libc::SYS_pivot_root, here.as_ptr(), here.as_ptr()) })?;
    Ok(())
}

/// What [`clone_process`] answers.
#[derive(Debug)]
pub enum Cloned {
    Child,
    Parent { pid: i32, pidfd: OwnedFd },
}

#[repr(C)]
#[derive(Default)]
struct CloneArguments {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}

/// Forks with clone3: into new namespaces, with a chosen pid, into a cgroup.
///
/// # Safety
/// The calling process has one thread, since the child gets a copy of the memory only.
///
/// # Errors
/// When the kernel refuses; EEXIST when the wanted pid is taken.
pub unsafe fn clone_process(
    flags: libc::c_int,
    wanted_pid: Option<i32>,
    cgroup: Option<BorrowedFd<'_>>,
) -> io::Result<Cloned> {
    const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;
    let mut pidfd: RawFd = -1;
    let wanted = wanted_pid.unwrap_or(0);
    let mut arguments = CloneArguments {
        flags: u64::from((flags | libc::CLONE_PIDFD).cast_unsigned()),
        pidfd: (&raw mut pidfd) as u64,
        // With CLONE_PARENT the kernel takes the caller's own signal and wants none here.
        exit_signal: if flags & libc::CLONE_PARENT != 0 {
            0
        } else {
            libc::SIGCHLD.cast_unsigned().into()
        },
        ..CloneArguments::default()
    };
    if wanted_pid.is_some() {
        arguments.set_tid = (&raw const wanted) as u64;
        arguments.set_tid_size = 1;
    }
    if let Some(cgroup) = cgroup {
        arguments.flags |= CLONE_INTO_CGROUP;
        arguments.cgroup = u64::from(cgroup.as_raw_fd().cast_unsigned());
    }
    // SAFETY: the arguments are valid for their size; without CLONE_VM the child runs on its own
    // copy of the memory, and the caller promises one thread.
    let pid = check(unsafe {
        libc::syscall(
            libc::SYS_clone3,
            &raw const arguments,
            size_of::<CloneArguments>(),
        )
    })?;
    if pid == 0 {
        return Ok(Cloned::Child);
    }
    Ok(Cloned::Parent {
        pid: i32::try_from(pid).unwrap_or(-1),
        // SAFETY: the kernel has just made this descriptor for us.
        pidfd: unsafe { OwnedFd::from_raw_fd(pidfd) },
    })
}

/// The pid that a pidfd names, as this process sees it; an error when it is gone.
///
/// # Errors
/// When the process has been reaped or is not visible here.
pub fn pid_of(pidfd: BorrowedFd<'_>) -> io::Result<i32> {
    let text = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", pidfd.as_raw_fd()))?;
    text.lines()
        .find_map(|line| line.strip_prefix("Pid:"))
        .and_then(|pid| pid.trim().parse().ok())
        .filter(|pid| *pid > 0)
        .ok_or_else(|| io::Error::from_raw_os_error(libc::ESRCH))
}

/// Sends a signal by pidfd.
///
/// # Errors
/// When the process is gone (ESRCH).
pub fn pidfd_kill(pidfd: BorrowedFd<'_>, signal: libc::c_int) -> io::Result<()> {
    // SAFETY: no siginfo is given.
    check(unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            signal,
            std::ptr::null::<libc::siginfo_t>(),
            0,
        )
    })?;
    Ok(())
}

/// Hides this process's memory and /proc entries from everyone but root outside.
///
/// # Errors
/// Never on the kernels that we support.
pub fn set_undumpable() -> io::Result<()> {
    // SAFETY: prctl with plain numbers.
    check(unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 0, 0, 0, 0) }.into())?;
    Ok(())
}

/// Reaps a dead child by pidfd; not being its parent is fine.
pub fn reap(pidfd: BorrowedFd<'_>) {
    // SAFETY: a zeroed siginfo is valid and outlives the call.
    unsafe {
        let mut info: libc::siginfo_t = std::mem::zeroed();
        libc::waitid(
            libc::P_PIDFD,
            pidfd.as_raw_fd().cast_unsigned(),
            &raw mut info,
            libc::WEXITED | libc::WNOHANG,
        );
    }
}
