//! Processes of the function: starting, reaping, ending them.
//!
//! Children are reaped by SIGCHLD and `waitpid` rather than by pidfds: nothing stays open for a
//! child that would have to be restored with it. As pid 1 of a container the watchdog reaps orphans
//! of others too.

use std::cell::RefCell;
use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, ExitStatus, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use tokio::net::unix::pipe::{Receiver, Sender};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Notify;

/// Ends of the pipes to a process.
#[derive(Debug)]
pub struct Pipes {
    pub stdin: Sender,
    pub stdout: Receiver,
    /// Absent where standard error goes the way of standard output.
    pub stderr: Option<Receiver>,
}

/// The children that somebody waits for.
#[derive(Debug, Default)]
pub struct Children {
    /// Their statuses, once they have exited.
    exits: RefCell<HashMap<Pid, Option<ExitStatus>>>,
    changed: Notify,
}

impl Children {
    /// Reaps children, for ever.
    pub async fn reap(&self) -> io::Result<()> {
        let mut signals = signal(SignalKind::child())?;
        loop {
            while let Some((pid, status)) = reap_one() {
                if let Some(exit) = self.exits.borrow_mut().get_mut(&pid) {
                    *exit = Some(status);
                }
            }
            self.changed.notify_waiters();
            signals.recv().await;
        }
    }

    /// Waits until the child exits; to be called once for each child.
    pub async fn exit_of(&self, pid: Pid) -> ExitStatus {
        loop {
            // Registered before the look, so that no exit falls in between.
            let changed = self.changed.notified();
            let exit = self.exits.borrow().get(&pid).copied().flatten();
            if let Some(status) = exit {
                self.exits.borrow_mut().remove(&pid);
                return status;
            }
            changed.await;
        }
    }

    /// Starts the function's server. Its output is the watchdog's own where `piped` is false.
    pub fn start_server(
        &self,
        process: &[String],
        piped: bool,
    ) -> io::Result<(Pid, Option<(Receiver, Receiver)>)> {
        let mut command = command(process)?;
        command.stdin(Stdio::null());
        if piped {
            command.stdout(Stdio::piped()).stderr(Stdio::piped());
        }
        let mut child = command.spawn()?;
        let pid = self.adopt(child.id());
        let pipes = match (child.stdout.take(), child.stderr.take()) {
            (Some(out), Some(err)) => Some((receiver(out.into())?, receiver(err.into())?)),
            _ => None,
        };
        Ok((pid, pipes))
    }

    /// Starts a process for one call, in a process group of its own.
    pub fn start_call(
        &self,
        process: &[String],
        environment: &[(String, String)],
        combine: bool,
    ) -> io::Result<(Pid, Pipes)> {
        let mut command = command(process)?;
        command
            .envs(environment.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::piped())
            .process_group(0);
        let (combined, stdout) = if combine {
            let (reader, writer) = io::pipe()?;
            command.stdout(writer.try_clone()?).stderr(writer);
            (true, Some(OwnedFd::from(reader)))
        } else {
            command.stdout(Stdio::piped()).stderr(Stdio::piped());
            (false, None)
        };
        let mut child = command.spawn()?;
        // The command keeps the writing end of the combined pipe open.
        drop(command);
        let pid = self.adopt(child.id());
        let missing = || io::Error::other("a pipe to the process is missing");
        let stdout = match stdout {
            Some(stdout) => stdout,
            None => child.stdout.take().ok_or_else(missing)?.into(),
        };
        let stdin = child.stdin.take().ok_or_else(missing)?;
        let stderr = match child.stderr.take() {
            Some(stderr) if !combined => Some(receiver(stderr.into())?),
            _ => None,
        };
        let pipes = Pipes {
            stdin: Sender::from_owned_fd(stdin.into())?,
            stdout: receiver(stdout)?,
            stderr,
        };
        Ok((pid, pipes))
    }

    fn adopt(&self, id: u32) -> Pid {
        let pid = Pid::from_raw(id.cast_signed());
        self.exits.borrow_mut().insert(pid, None);
        pid
    }
}

/// Kills a call's process group.
pub fn kill_group(pid: Pid) {
    // It may be gone already.
    let _ = kill(Pid::from_raw(-pid.as_raw()), Signal::SIGKILL);
}

/// Asks a process to end.
pub fn terminate(pid: Pid) {
    let _ = kill(pid, Signal::SIGTERM);
}

fn command(process: &[String]) -> io::Result<Command> {
    let (program, arguments) = process
        .split_first()
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "the command is empty"))?;
    let mut command = Command::new(program);
    command.args(arguments);
    Ok(command)
}

fn receiver(pipe: OwnedFd) -> io::Result<Receiver> {
    Receiver::from_owned_fd(pipe)
}

fn reap_one() -> Option<(Pid, ExitStatus)> {
    match waitpid(None, Some(WaitPidFlag::WNOHANG)).ok()? {
        WaitStatus::Exited(pid, code) => Some((pid, ExitStatus::from_raw(code << 8))),
        WaitStatus::Signaled(pid, signal, _) => Some((pid, ExitStatus::from_raw(signal as i32))),
        _ => None,
    }
}
