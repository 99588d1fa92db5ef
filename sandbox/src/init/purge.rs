//! The end of a tenancy: nothing of it stays, and the parts of the next root are made.

use std::{
    collections::VecDeque,
    os::fd::OwnedFd,
    time::{Duration, Instant},
};

use rustix::fs::{Dir, Mode, OFlags, openat};
use trenv_sandbox::protocol::{ExitReport, StepName};

use crate::{
    failure::{Doing, Failure, check},
    launch::set_hostname,
    pid_one::{State, Steps, Stock, reap, timed},
};

/// How long processes may take to die.
const DEATH_LIMIT: Duration = Duration::from_secs(5);

pub fn purge(state: &mut State, reports: &mut VecDeque<ExitReport>) -> Result<Steps, Failure> {
    let mut steps = Steps::new();
    timed(&mut steps, StepName::PurgeProcesses, || {
        end_processes(&state.proc, reports)
    })?;
    // The parts of an idle sandbox, if it was one, go too.
    state.parts = Stock::Used;
    timed(&mut steps, StepName::PurgeRoot, || state.base.uncover())?;
    timed(&mut steps, StepName::PurgeIpc, || {
        // SAFETY: unshare takes flags only.
        check(unsafe { libc::unshare(libc::CLONE_NEWIPC | libc::CLONE_NEWUTS) })
            .doing("make fresh ipc and uts namespaces")?;
        set_hostname(&state.hostname)
    })?;
    timed(&mut steps, StepName::PurgeNetwork, || {
        state.network.purge(&state.proc)
    })?;
    state.parts = Stock::Due;
    Ok(steps)
}

/// Kills everything but pid 1 and waits until it is gone. The kill is one step for the kernel: a
/// process cannot escape it by forking.
fn end_processes(proc: &OwnedFd, reports: &mut VecDeque<ExitReport>) -> Result<(), Failure> {
    let start = Instant::now();
    let mut pause = Duration::from_micros(20);
    loop {
        // SAFETY: kill takes no pointers; -1 means everything in this pid namespace but us.
        unsafe { libc::kill(-1, libc::SIGKILL) };
        reap(reports);
        let left = others(proc)?;
        if left.is_empty() {
            return Ok(());
        }
        if start.elapsed() > DEATH_LIMIT {
            return Err(Failure(format!("processes {left:?} do not die")));
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(2));
    }
}

/// Pids of this namespace beside our own.
fn others(proc: &OwnedFd) -> Result<Vec<i32>, Failure> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let dir = openat(proc, c".", flags, Mode::empty()).doing("open the process list")?;
    let mut pids = Vec::new();
    for entry in Dir::new(dir).doing("read the process list")? {
        let entry = entry.doing("read the process list")?;
        if let Ok(pid) = entry.file_name().to_string_lossy().parse::<i32>()
            && pid != 1
        {
            pids.push(pid);
        }
    }
    Ok(pids)
}
