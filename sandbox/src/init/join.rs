//! The joiner: enters a sandbox and starts one process in it, whose parent becomes pid 1.
//!
//! Three processes follow each other. The joiner itself enters the namespaces, but a process never
//! changes its own pid namespace, so it forks a starter that is born inside, with a pid from the
//! high range. The starter forks the wanted process, waits until that has replaced itself by its
//! program, and ends: a process born inside that loses its parent gets pid 1 as the new one.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    process::ExitCode,
};

use trenv_sandbox::{
    process::{HIGH_PIDS, ROOT_PID, Role},
    protocol::{JoinRequest, Joined},
    sys::{self, Cloned},
};

use crate::{
    failure::{Doing, Failure},
    launch::{close_inherited, enter, given},
    setup::{self, Terminal},
};

pub fn run() -> ExitCode {
    close_inherited();
    // SAFETY: the library passes the socket as descriptor 0; it is taken once.
    let socket = unsafe { given(0) };
    match join(&socket) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            let _ = sys::send(socket.as_fd(), &Joined::Failed(failure.0), &[]);
            ExitCode::FAILURE
        }
    }
}

struct Order {
    request: JoinRequest,
    init: OwnedFd,
    stdio: [OwnedFd; 3],
    cgroup: Option<OwnedFd>,
}

fn join(socket: &OwnedFd) -> Result<(), Failure> {
    sys::set_undumpable().doing("hide the process's memory")?;
    crate::name_process();
    let order = receive(socket)?;
    let namespaces = libc::CLONE_NEWNS
        | libc::CLONE_NEWNET
        | libc::CLONE_NEWUTS
        | libc::CLONE_NEWIPC
        | libc::CLONE_NEWPID;
    enter(order.init.as_fd(), namespaces).doing("join the sandbox")?;
    // SAFETY: this process has one thread.
    match unsafe { clone_high(None) }.doing("start a helper")? {
        (Cloned::Child, _) => {
            if let Err(failure) = start(socket, order) {
                let _ = sys::send(socket.as_fd(), &Joined::Failed(failure.0), &[]);
            }
            // SAFETY: nothing of this process is to be run any more.
            unsafe { libc::_exit(0) }
        }
        (Cloned::Parent { pid, .. }, _) => {
            wait_for(pid);
            Ok(())
        }
    }
}

fn receive(socket: &OwnedFd) -> Result<Order, Failure> {
    let (request, fds) = sys::receive::<JoinRequest>(socket.as_fd())
        .doing("read the order")?
        .ok_or_else(|| Failure("the library went away".into()))?;
    let mut fds = fds.into_iter();
    let mut next = || {
        fds.next()
            .ok_or_else(|| Failure("a descriptor is missing in the order".into()))
    };
    Ok(Order {
        init: next()?,
        stdio: [next()?, next()?, next()?],
        cgroup: if request.into_cgroup {
            Some(next()?)
        } else {
            None
        },
        request,
    })
}

/// Forks with the first free pid of the high range. Answers that pid too, as it is inside.
///
/// # Safety
/// The calling process has one thread.
unsafe fn clone_high(cgroup: Option<BorrowedFd<'_>>) -> io::Result<(Cloned, i32)> {
    let mut wanted = HIGH_PIDS;
    loop {
        // SAFETY: as the caller promises.
        match unsafe { sys::clone_process(0, Some(wanted), cgroup) } {
            Ok(cloned) => return Ok((cloned, wanted)),
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => wanted += 1,
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                return Err(io::Error::other(format!(
                    "pid {wanted} cannot be had; set the sysctl kernel.pid_max to 32768 or more"
                )));
            }
            Err(error) => return Err(error),
        }
    }
}

fn wait_for(pid: i32) {
    // SAFETY: no status is asked.
    while unsafe { libc::waitpid(pid, std::ptr::null_mut(), 0) } < 0
        && io::Error::last_os_error().kind() == io::ErrorKind::Interrupted
    {}
}

/// In the starter: forks the wanted process and reports how that went.
fn start(socket: &OwnedFd, order: Order) -> Result<(), Failure> {
    let Order {
        request,
        stdio,
        cgroup,
        init,
    } = order;
    drop(init);
    let process = request.process;
    let terminal = process
        .terminal
        .map(|size| Terminal::open(size, process.uid))
        .transpose()?;
    let (result, report) = sys::packet_pair().doing("open a socket")?;
    let into = cgroup.as_ref().map(AsFd::as_fd);
    // SAFETY: this process has one thread.
    let cloned = unsafe {
        match process.role {
            Role::Exec => clone_high(into),
            Role::Root => {
                sys::clone_process(0, Some(ROOT_PID), into).map(|cloned| (cloned, ROOT_PID))
            }
        }
    };
    let cloned = match cloned {
        Err(error) if error.raw_os_error() == Some(libc::EEXIST) => {
            return Err(Failure(
                "a function is running in it already; end that first".into(),
            ));
        }
        cloned => cloned.doing("make the process")?,
    };
    match cloned {
        (Cloned::Child, _) => {
            drop((cgroup, result));
            setup::become_process(&process, stdio, terminal, report);
            // SAFETY: nothing of this process is to be run any more.
            unsafe { libc::_exit(1) }
        }
        (Cloned::Parent { pid, pidfd }, pid_in_sandbox) => {
            drop((report, stdio));
            match sys::receive::<String>(result.as_fd()) {
                Ok(None) => {}
                Ok(Some((reason, _))) => {
                    wait_for(pid);
                    return Err(Failure(reason));
                }
                Err(error) => {
                    wait_for(pid);
                    return Err(error).doing("hear from the process");
                }
            }
            let mut fds = vec![pidfd.as_fd()];
            fds.extend(terminal.as_ref().map(|terminal| terminal.master.as_fd()));
            let started = Joined::Started { pid_in_sandbox };
            sys::send(socket.as_fd(), &started, &fds).doing("report the process")?;
            // Until the library has looked at the process nobody may reap it: its parent stays.
            let _ = sys::wait_readable(socket.as_fd(), None);
            Ok(())
        }
    }
}
