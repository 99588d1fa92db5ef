//! Logging programs (`binary://`): one process per container reads both streams.
//!
//! The program gets standard output as descriptor 3, standard error as 4, and closes 5 when it is
//! ready; its environment names the container. It ends by itself when both streams have ended; one
//! that does not is asked to by SIGTERM, and then killed.

use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use tokio::io::AsyncReadExt;
use tokio::process::Child;
use tokio::sync::mpsc;

use super::copy;
use super::target::Target;
use super::{Owner, pipe};
use crate::error::{Result, ShimError};
use crate::runc::signal_process;

const READY_LIMIT: Duration = Duration::from_secs(10);
/// How long a program may take to end by itself after its streams, and then after SIGTERM.
const OWN_END_LIMIT: Duration = Duration::from_secs(5);
const TERM_LIMIT: Duration = Duration::from_secs(10);

/// Starts the program and waits until it says that it is ready.
pub async fn start(path: &Path, arguments: &[String], owner: &Owner) -> Result<(Target, Target)> {
    let (out_read, out_write) = pipe()?;
    let (err_read, err_write) = pipe()?;
    let (ready_read, ready_write) = pipe()?;
    let mut command = tokio::process::Command::new(path);
    command
        .args(arguments)
        .env("CONTAINER_ID", &owner.container)
        .env("CONTAINER_NAMESPACE", &owner.namespace)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let inherited: [OwnedFd; 3] = [out_read, err_read, ready_write];
    let raw = inherited.each_ref().map(AsRawFd::as_raw_fd);
    // SAFETY: between fork and exec only async-signal-safe calls are made. The descriptors are first
    // copied above the targets, so that no target overwrites another's source.
    unsafe {
        command.pre_exec(move || {
            let mut high = [0; 3];
            for (high, fd) in high.iter_mut().zip(raw) {
                *high = libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 10);
            }
            for (target, fd) in (3..).zip(high) {
                if fd < 0 || libc::dup2(fd, target) < 0 {
                    return Err(std::io::Error::last_os_error());
                }
            }
            Ok(())
        });
    }
    let action = || ShimError::io(format!("start the logging program {}", path.display()));
    let mut child = command.spawn().map_err(action())?;
    drop(inherited);
    let mut ready = copy::receiver(ready_read)?;
    let mut byte = [0; 1];
    if tokio::time::timeout(READY_LIMIT, ready.read(&mut byte))
        .await
        .is_err()
    {
        let _ = child.start_kill();
        return Err(ShimError::Timeout {
            what: format!("The start of the logging program {}", path.display()),
            limit: READY_LIMIT,
        });
    }
    let (writing, mut written) = mpsc::channel(1);
    tokio::spawn(async move {
        // Nothing is ever sent: this waits until both streams have been dropped.
        let _: Option<()> = written.recv().await;
        Logger(child).end().await;
    });
    let stream = |fd| -> Result<Target> {
        Ok(Target::Program {
            pipe: copy::sender(fd)?,
            _alive: writing.clone(),
        })
    };
    Ok((stream(out_write)?, stream(err_write)?))
}

/// A program whose streams have ended.
struct Logger(Child);

impl Logger {
    async fn end(mut self) {
        for limit in [OWN_END_LIMIT, TERM_LIMIT] {
            // Waiting for it keeps no zombie.
            if tokio::time::timeout(limit, self.0.wait()).await.is_ok() {
                return;
            }
            self.terminate();
        }
        tracing::warn!("A logging program did not end and was killed");
        // It is gone, or the kernel knows better.
        let _ = self.0.kill().await;
    }

    fn terminate(&self) {
        if let Some(pid) = self.0.id() {
            // It may have ended meanwhile.
            let _ = signal_process(pid, libc::SIGTERM.cast_unsigned());
        }
    }
}

impl Drop for Logger {
    fn drop(&mut self) {
        // Without a pid it has been waited for; else the shim ends before it did.
        self.terminate();
    }
}
