//! Running CRIU inside of a sandbox, seen from inside: what `trenv-zygote` does with the argument
//! [`ARGUMENT`].
//!
//! It enters the tenancy's cgroups and the sandbox's namespaces, forks, and the child becomes CRIU.
//! No program of the machine is in the sandbox's root; CRIU and its libraries are found by a
//! descriptor of the machine's root. Pids of the child and of what it forks are above those of trees.

use std::ffi::CString;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;

use anyhow::{Context, Result, bail};
use nix::libc;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;

/// The argument by which `trenv-zygote` runs CRIU.
pub const ARGUMENT: &str = "run-criu";

/// Descriptors that it begins with.
pub mod fd {
    pub const INIT: i32 = 3;
    pub const HOST: i32 = 4;
    pub const IMAGE: i32 = 5;
    pub const WORK: i32 = 6;
    /// The first of three.
    pub const STDIO: i32 = 7;
}

/// The first pid that it tries for CRIU.
const HIGH_PIDS: i32 = 30_001;
/// What CRIU has found out about the kernel, which takes it long.
const FEATURES: &str = "/run/criu.kdat";
const LAST_PID: &str = "/proc/sys/kernel/ns_last_pid";

/// Runs the program of the arguments (cgroup files, `--`, program and its arguments) and answers its
/// status.
///
/// # Errors
/// When a step before the program's failed.
pub fn enter() -> Result<i32> {
    let mut arguments = std::env::args().skip(2);
    for cgroup in arguments.by_ref().take_while(|argument| argument != "--") {
        std::fs::write(&cgroup, "0").with_context(|| format!("Failed to enter {cgroup}"))?;
    }
    let program = arguments
        .map(CString::new)
        .collect::<std::result::Result<Vec<_>, _>>()
        .context("Failed to read the arguments")?;
    if program.is_empty() {
        bail!("This program is started by the shim; there is no other use for it");
    }
    let features = std::fs::read(FEATURES).ok();
    // In the sandbox it can only be read. The kernel asks in which pid namespace the writer is.
    let last_pid = File::options()
        .write(true)
        .open(LAST_PID)
        .with_context(|| format!("Failed to open {LAST_PID}"))?;
    let namespaces = libc::CLONE_NEWNS
        | libc::CLONE_NEWNET
        | libc::CLONE_NEWUTS
        | libc::CLONE_NEWIPC
        | libc::CLONE_NEWPID;
    // SAFETY: takes numbers only.
    if unsafe { libc::setns(fd::INIT, namespaces) } < 0 {
        return Err(io::Error::last_os_error()).context("Failed to enter the sandbox");
    }
    // Without it CRIU finds out by itself.
    let told = features.is_some_and(|features| tell_features(&features).is_ok());
    let status = run(&program, &last_pid);
    if told {
        // It goes with the tenancy otherwise.
        let _ = std::fs::remove_file(FEATURES);
    }
    status
}

/// Puts CRIU's knowledge where CRIU in the sandbox looks for it. Nothing of the function's is written
/// to or followed.
fn tell_features(features: &[u8]) -> io::Result<()> {
    let mut options = File::options();
    options.write(true).create_new(true).mode(0o600);
    options.open(FEATURES)?.write_all(features)
}

fn run(program: &[CString], last_pid: &File) -> Result<i32> {
    let mut arguments: Vec<*const libc::c_char> =
        program.iter().map(|text| text.as_ptr()).collect();
    arguments.push(std::ptr::null());
    let environment = [std::ptr::null()];
    // SAFETY: this process has one thread.
    let child = unsafe { fork_high() }.context("Failed to start a process in the sandbox")?;
    if child == 0 {
        let line = HIGH_PIDS.to_string();
        // SAFETY: this process is a copy of one that had one thread; the vectors end with null.
        unsafe {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            libc::write(last_pid.as_raw_fd(), line.as_ptr().cast(), line.len());
            libc::execve(arguments[0], arguments.as_ptr(), environment.as_ptr());
        }
        let error = io::Error::last_os_error();
        eprintln!(
            "trenv-zygote: Failed to run {:?} in the sandbox: {error}",
            program[0]
        );
        // SAFETY: nothing of this process is to be run any more.
        unsafe { libc::_exit(127) }
    }
    match waitpid(Pid::from_raw(child), None).context("Failed to wait for the program")? {
        WaitStatus::Exited(_, status) => Ok(status),
        WaitStatus::Signaled(_, signal, _) => bail!("{:?} was ended by {signal}", program[0]),
        other => bail!("{:?} ended strangely: {other:?}", program[0]),
    }
}

/// Forks with the first free pid of the high range, as the sandbox sees it.
///
/// # Safety
/// The calling process has one thread.
unsafe fn fork_high() -> io::Result<i32> {
    for pid in HIGH_PIDS.. {
        // SAFETY: all zero is a valid value: nothing asked.
        let mut how: libc::clone_args = unsafe { std::mem::zeroed() };
        how.exit_signal = libc::SIGCHLD as u64;
        how.set_tid = (&raw const pid) as u64;
        how.set_tid_size = 1;
        // SAFETY: the structure and the pid outlive the call; memory is copied, as by fork.
        let made = unsafe { libc::syscall(libc::SYS_clone3, &raw const how, size_of_val(&how)) };
        match made {
            0.. => return Ok(i32::try_from(made).unwrap_or_default()),
            _ => {
                let error = io::Error::last_os_error();
                if error.raw_os_error() != Some(libc::EEXIST) {
                    return Err(error);
                }
            }
        }
    }
    Err(io::Error::from_raw_os_error(libc::EAGAIN))
}
