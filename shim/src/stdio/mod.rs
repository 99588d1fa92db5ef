//! Standard streams of a process: pipes or a console on its side, containerd's URIs on the other.
//!
//! A stream's URI is a fifo (a plain path or `fifo://`), a file (`file://`, appended to) or a logging
//! program (`binary://`). The process only ever sees a pipe or a console, so nothing that happens at
//! the other end reaches it: by [`Overflow::Drop`] output that nobody takes in time is counted and
//! thrown away, by [`Overflow::Wait`] it waits, as containers of containerd's own shim do.

mod console;
mod copy;
mod program;
mod target;

use std::fmt;
use std::fs::OpenOptions;
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinSet;

pub use console::{Console, ConsoleSocket, resize};
pub use target::Target;

use crate::error::{Result, ShimError};

/// The streams as containerd names them; an empty name means nothing at that end.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Uris {
    pub stdin: String,
    pub stdout: String,
    pub stderr: String,
    pub terminal: bool,
}

/// What happens to output that the other end does not take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Overflow {
    /// The process waits.
    Wait,
    /// The process goes on, and the loss is logged.
    Drop,
}

/// Whom the streams belong to, for logs and logging programs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Owner {
    pub namespace: String,
    pub container: String,
}

/// The ends for the process: stdin, stdout, stderr.
#[derive(Debug)]
pub struct ProcessEnds(pub [OwnedFd; 3]);

impl ProcessEnds {
    /// Ends without anything behind them.
    pub fn nowhere() -> Result<Self> {
        Ok(Self([null()?, null()?, null()?]))
    }
}

/// The shim's side: copiers at work.
pub struct Streams {
    copiers: JoinSet<()>,
    /// Those that wait for [`Streams::begin`].
    waiting: Vec<Copier>,
    stdin_open: watch::Sender<bool>,
}

type Copier = Pin<Box<dyn Future<Output = ()> + Send>>;

impl fmt::Debug for Streams {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Streams")
            .field("copiers", &self.copiers.len())
            .field("waiting", &self.waiting.len())
            .finish_non_exhaustive()
    }
}

/// Makes pipes for a process without a terminal. Copying starts with [`Streams::begin`].
pub async fn pipes(
    uris: &Uris,
    owner: &Owner,
    overflow: Overflow,
) -> Result<(ProcessEnds, Streams)> {
    let (stdin_open, closed) = watch::channel(true);
    let mut waiting: Vec<Copier> = Vec::new();
    let stdin = if uris.stdin.is_empty() {
        null()?
    } else {
        let (read, write) = pipe()?;
        waiting.push(Box::pin(copy::input(
            target::open_input(&uris.stdin)?,
            copy::sender(write)?,
            closed,
        )));
        read
    };
    let (stdout_target, stderr_target) =
        target::open_outputs(&uris.stdout, &uris.stderr, owner).await?;
    let mut output = |target: Option<Target>, name: &'static str| -> Result<OwnedFd> {
        let Some(target) = target else { return null() };
        let (read, write) = pipe()?;
        let copier = copy::output(copy::receiver(read)?, target, overflow, owner.clone(), name);
        waiting.push(Box::pin(copier));
        Ok(write)
    };
    let ends = [
        stdin,
        output(stdout_target, "stdout")?,
        output(stderr_target, "stderr")?,
    ];
    let streams = Streams {
        copiers: JoinSet::new(),
        waiting,
        stdin_open,
    };
    Ok((ProcessEnds(ends), streams))
}

/// Connects a terminal's master side and starts copying.
pub async fn console(
    console: &Console,
    uris: &Uris,
    owner: &Owner,
    overflow: Overflow,
) -> Result<Streams> {
    let (stdin_open, closed) = watch::channel(true);
    let mut copiers = JoinSet::new();
    if !uris.stdin.is_empty() {
        copiers.spawn(copy::input(
            target::open_input(&uris.stdin)?,
            console.stream()?,
            closed,
        ));
    }
    let (stdout, _) = target::open_outputs(&uris.stdout, "", owner).await?;
    let stdout = stdout.unwrap_or(Target::Nowhere);
    copiers.spawn(copy::output(
        console.stream()?,
        stdout,
        overflow,
        owner.clone(),
        "stdout",
    ));
    Ok(Streams {
        copiers,
        waiting: Vec::new(),
        stdin_open,
    })
}

impl Streams {
    /// Starts passing output on. Until then what comes through the pipes is not the process's but
    /// that of the program which makes it.
    pub fn begin(&mut self) {
        for copier in self.waiting.drain(..) {
            self.copiers.spawn(copier);
        }
    }

    /// Closes the process's standard input.
    pub fn close_stdin(&self) {
        self.stdin_open.send_replace(false);
    }

    /// Waits until all output has been passed on, at most for `limit`, then lets go of everything.
    pub async fn finish(mut self, limit: Duration) {
        self.close_stdin();
        let all = async { while self.copiers.join_next().await.is_some() {} };
        // Something that left the process's group may hold a pipe open for ever.
        let _ = tokio::time::timeout(limit, all).await;
        self.copiers.abort_all();
    }
}

fn pipe() -> Result<(OwnedFd, OwnedFd)> {
    nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).map_err(ShimError::io("make a pipe"))
}

fn null() -> Result<OwnedFd> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/null")
        .map(OwnedFd::from)
        .map_err(ShimError::io("open /dev/null"))
}
