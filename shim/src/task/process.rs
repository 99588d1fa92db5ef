//! One process of a container: its phase, streams and exit.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use containerd_shim_protos::events::task::TaskExit;
use tokio::sync::watch;

use crate::error::{Result, ShimError};
use crate::events::{Publisher, timestamp};
use crate::reap::Exit;
use crate::stdio::{Console, Streams, Uris, resize};

/// Where a process is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    Created,
    Running,
    Stopped,
}

/// A process that containerd knows.
#[derive(Debug)]
pub struct Process {
    /// Empty for the container's first process.
    pub exec_id: String,
    pub uris: Uris,
    state: Mutex<State>,
    exit: watch::Sender<Option<Exit>>,
    /// Held from the start of a process until its event is queued, so that the exit's event of a
    /// process that ends at once comes after it.
    pub turn: tokio::sync::Mutex<()>,
}

#[derive(Debug)]
struct State {
    pid: u32,
    phase: Phase,
    streams: Option<Streams>,
    console: Option<Console>,
}

impl Process {
    /// A process that has not started; `pid` is 0 until it has one.
    pub fn new(exec_id: &str, uris: Uris, pid: u32) -> Arc<Self> {
        Arc::new(Self {
            exec_id: exec_id.to_owned(),
            uris,
            state: Mutex::new(State {
                pid,
                phase: Phase::Created,
                streams: None,
                console: None,
            }),
            exit: watch::Sender::new(None),
            turn: tokio::sync::Mutex::new(()),
        })
    }

    pub fn pid(&self) -> u32 {
        self.lock().pid
    }

    pub fn phase(&self) -> Phase {
        self.lock().phase
    }

    /// Notes the pid of a process that exists but does not run yet.
    pub fn set_pid(&self, pid: u32) {
        self.lock().pid = pid;
    }

    /// Notes that the process runs.
    pub fn started(&self, pid: u32) {
        let mut state = self.lock();
        state.pid = pid;
        if state.phase == Phase::Created {
            state.phase = Phase::Running;
        }
    }

    /// Gives the streams to the process.
    pub fn connect(&self, mut streams: Streams, console: Option<Console>) {
        streams.begin();
        let mut state = self.lock();
        state.streams = Some(streams);
        state.console = console;
    }

    /// How the process ended, if it has.
    pub fn exit(&self) -> Option<Exit> {
        *self.exit.borrow()
    }

    /// Waits until the process has ended; the caller's own deadline bounds it.
    pub async fn wait(&self) -> Exit {
        let mut exit = self.exit.subscribe();
        loop {
            if let Some(exit) = *exit.borrow_and_update() {
                return exit;
            }
            if exit.changed().await.is_err() {
                return Exit::now(255);
            }
        }
    }

    /// Waits for the end, at most for `limit`.
    pub async fn wait_for(&self, limit: Duration) -> Result<Exit> {
        tokio::time::timeout(limit, self.wait())
            .await
            .map_err(|_| ShimError::Timeout {
                what: format!("The process {}", self.pid()),
                limit,
            })
    }

    /// Notes the end without an event: the process never ran.
    pub fn set_exit(&self, exit: Exit) {
        self.lock().phase = Phase::Stopped;
        self.exit.send_if_modified(|known| {
            let first = known.is_none();
            if first {
                *known = Some(exit);
            }
            first
        });
    }

    /// Notes the end and tells containerd; the first call counts.
    pub async fn exited(&self, container: &str, exit: Exit, publisher: &Publisher) {
        if self.exit().is_some() {
            return;
        }
        self.set_exit(exit);
        let _turn = self.turn.lock().await;
        publisher.publish(&TaskExit {
            container_id: container.to_owned(),
            id: if self.exec_id.is_empty() {
                container
            } else {
                &self.exec_id
            }
            .to_owned(),
            pid: self.pid(),
            exit_status: exit.status,
            exited_at: timestamp(exit.at),
            ..TaskExit::default()
        });
    }

    /// As [`Process::finish_streams`], without waiting: the process may get new streams at once.
    pub fn leave_streams(&self, limit: Duration) {
        if let Some(streams) = self.lock().streams.take() {
            tokio::spawn(streams.finish(limit));
        }
        self.lock().console = None;
    }

    /// Lets the copiers pass on what is left, then closes the streams.
    pub async fn finish_streams(&self, limit: Duration) {
        let (streams, console) = {
            let mut state = self.lock();
            (state.streams.take(), state.console.take())
        };
        if let Some(streams) = streams {
            streams.finish(limit).await;
        }
        drop(console);
    }

    pub fn close_stdin(&self) {
        if let Some(streams) = &self.lock().streams {
            streams.close_stdin();
        }
    }

    pub fn resize(&self, width: u32, height: u32) -> Result<()> {
        match &self.lock().console {
            Some(console) => resize(console, width, height),
            None => Ok(()),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl std::fmt::Display for Phase {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Created => "created",
            Self::Running => "running",
            Self::Stopped => "stopped",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_first_exit_counts_and_late_waiters_get_it() {
        let process = Process::new("", Uris::default(), 5);
        process.set_exit(Exit::now(3));
        process.set_exit(Exit::now(4));
        assert_eq!(process.wait().await.status, 3);
        process.started(6);
        assert_eq!(process.phase(), Phase::Stopped);
    }
}
