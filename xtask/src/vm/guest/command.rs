//! The command, and the end of all that it left.

use std::fs::File;
use std::io::{self, PipeReader, Read, Write};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::thread::{self, JoinHandle};

use anyhow::Context;
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitStatus, wait};
use nix::unistd::Pid;

use super::super::job::Job;

/// The statuses of shells.
const NOT_FOUND: u8 = 127;
const NOT_RUN: u8 = 126;
const SIGNAL: i32 = 128;

pub fn run(job: &Job, stdout: File, stderr: File) -> anyhow::Result<u8> {
    let (out, out_end) = io::pipe().context("Failed to make a pipe")?;
    let (err, err_end) = io::pipe().context("Failed to make a pipe")?;
    let copies = [pass_on(out, stdout), pass_on(err, stderr)];
    let status = spawn_and_wait(job, out_end, err_end)?;
    end_all()?;
    for copy in copies {
        // Nobody holds the other end any more.
        if let Ok(Err(err)) = copy.join() {
            return Err(err).context("Failed to send the command's output");
        }
    }
    Ok(status)
}

/// The pipes' ends are closed here when it returns.
fn spawn_and_wait(job: &Job, stdout: io::PipeWriter, stderr: io::PipeWriter) -> anyhow::Result<u8> {
    let Some((name, arguments)) = job.command.split_first() else {
        return Ok(0);
    };
    let mut messages = stderr.try_clone().context("Failed to share a pipe")?;
    let spawned = Command::new(name)
        .args(arguments)
        .env_clear()
        .envs(job.environment.iter().cloned())
        .current_dir(&job.folder)
        .process_group(0)
        .stdin(std::process::Stdio::null())
        .stdout(stdout)
        .stderr(stderr)
        .spawn();
    let child = match spawned {
        Ok(child) => child,
        Err(err) => {
            let folder = job.folder.display();
            messages
                .write_all(format!("Failed to run {name} in {folder}: {err}\n").as_bytes())
                .context("Failed to tell why the command cannot be run")?;
            return Ok(if err.kind() == io::ErrorKind::NotFound {
                NOT_FOUND
            } else {
                NOT_RUN
            });
        }
    };
    let command = Pid::from_raw(i32::try_from(child.id()).context("An impossible process number")?);
    // The first process is every orphan's parent.
    loop {
        let status = wait().context("Failed to wait for the command")?;
        let status = match status {
            WaitStatus::Exited(process, status) if process == command => status,
            WaitStatus::Signaled(process, signal, _) if process == command => {
                SIGNAL + signal as i32
            }
            _ => continue,
        };
        return Ok(u8::try_from(status & 0xff).unwrap_or(u8::MAX));
    }
}

/// Ends every other process, so that the kernel checks their memory as it gives it back.
fn end_all() -> anyhow::Result<()> {
    match kill(Pid::from_raw(-1), Signal::SIGKILL) {
        Ok(()) | Err(Errno::ESRCH) => {}
        Err(err) => return Err(err).context("Failed to end the processes that are left"),
    }
    loop {
        match wait() {
            Ok(_) => {}
            Err(Errno::ECHILD) => return Ok(()),
            Err(err) => return Err(err).context("Failed to wait for the processes that are left"),
        }
    }
}

/// Not by `io::copy`: that splices, which a virtio port answers at once with nothing while the pipe
/// is empty.
fn pass_on(mut from: PipeReader, mut to: File) -> JoinHandle<io::Result<()>> {
    thread::spawn(move || {
        let mut buffer = vec![0; 64 * 1024];
        loop {
            let length = from.read(&mut buffer)?;
            if length == 0 {
                return Ok(());
            }
            to.write_all(&buffer[..length])?;
        }
    })
}
