//! The launcher: it makes the sandbox's namespaces and starts pid 1 as a child of its own parent.

use std::{
    io::Read,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
    process::ExitCode,
    ptr,
};

use trenv_sandbox::{
    protocol::{LaunchRequest, Launched},
    sys::{self, Cloned},
};

use crate::{
    failure::{Doing, Failure, check},
    pid_one,
};

/// Closes everything that was inherited by mistake; what we were given is 0 to 2.
pub fn close_inherited() {
    // SAFETY: nothing has been opened yet that anyone would miss.
    unsafe { libc::close_range(3, libc::c_uint::MAX, 0) };
}

/// Takes over a descriptor that the library passed by number.
///
/// # Safety
/// Each number is taken once.
pub unsafe fn given(number: i32) -> OwnedFd {
    // SAFETY: as the caller promises.
    unsafe { OwnedFd::from_raw_fd(number) }
}

pub fn run() -> ExitCode {
    close_inherited();
    // SAFETY: the library passes the two sockets as descriptors 0 and 1; each is taken once.
    let (control, exits) = unsafe { (given(0), given(1)) };
    match launch(&control) {
        Ok(Launch::Launcher(pidfd)) => {
            match sys::send(control.as_fd(), &Launched::Started, &[pidfd.as_fd()]) {
                Ok(()) => ExitCode::SUCCESS,
                Err(_) => ExitCode::FAILURE,
            }
        }
        Ok(Launch::PidOne { hostname, gate }) => {
            wait_for_launcher(gate);
            pid_one::run(&control, &exits, &hostname)
        }
        Err(failure) => {
            let _ = sys::send(control.as_fd(), &Launched::Failed(failure.0), &[]);
            ExitCode::FAILURE
        }
    }
}

enum Launch {
    Launcher(OwnedFd),
    PidOne { hostname: String, gate: OwnedFd },
}

fn launch(control: &OwnedFd) -> Result<Launch, Failure> {
    sys::set_undumpable().doing("hide the process's memory")?;
    crate::name_process();
    let (request, fds) = sys::receive::<LaunchRequest>(control.as_fd())
        .doing("read the order")?
        .ok_or_else(|| Failure("the library went away".into()))?;
    let netns = fds
        .first()
        .ok_or_else(|| Failure("no network namespace was given".into()))?;
    enter(netns.as_fd(), libc::CLONE_NEWNET).doing("enter the network namespace")?;
    let namespaces =
        libc::CLONE_NEWNS | libc::CLONE_NEWUTS | libc::CLONE_NEWIPC | libc::CLONE_NEWPID;
    // SAFETY: unshare takes flags only.
    check(unsafe { libc::unshare(namespaces) }).doing("make the namespaces")?;
    let private = libc::MS_REC | libc::MS_PRIVATE;
    // SAFETY: valid strings, no data.
    check(unsafe {
        libc::mount(
            ptr::null(),
            c"/".as_ptr(),
            ptr::null(),
            private,
            ptr::null(),
        )
    })
    .doing("make the mounts private")?;
    set_hostname(&request.hostname)?;
    drop(fds);
    let (gate, opener) =
        rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).doing("open a pipe to pid 1")?;
    // SAFETY: this process has one thread.
    let cloned = unsafe { sys::clone_process(libc::CLONE_PARENT, None, None) };
    match cloned.doing("start pid 1")? {
        Cloned::Child => {
            drop(opener);
            Ok(Launch::PidOne {
                hostname: request.hostname,
                gate,
            })
        }
        Cloned::Parent { pidfd, .. } => {
            // Stays open until this process ends: pid 1 waits for that, so that its first answer
            // comes after ours.
            std::mem::forget(opener);
            Ok(Launch::Launcher(pidfd))
        }
    }
}

fn wait_for_launcher(gate: OwnedFd) {
    let _ = std::fs::File::from(gate).read(&mut [0]);
}

/// Joins namespaces that a descriptor names.
pub fn enter(namespace: BorrowedFd<'_>, kinds: libc::c_int) -> std::io::Result<()> {
    // SAFETY: setns takes no pointers.
    check(unsafe { libc::setns(namespace.as_raw_fd(), kinds) })?;
    Ok(())
}

pub fn set_hostname(name: &str) -> Result<(), Failure> {
    nix::unistd::sethostname(name).doing_on("set the hostname to", name)
}
