//! `fwatchdog`: the HTTP front of a function, compatible with OpenFaaS's of-watchdog and with the
//! classic watchdog's environment.
//!
//! - `settings` reads the environment; `duration` understands Go's durations.
//! - `server` accepts connections, answers health and readiness, limits and measures calls.
//! - `proxy` passes a call to the function's own HTTP server (mode `http`).
//! - `fork` runs a process for each call (modes `streaming`, `serializing`, `fork`).
//! - `files` serves a directory (mode `static`).
//! - `children` starts and reaps processes, `logs` passes on what they write.
//! - `metrics` counts, for Prometheus.
//!
//! The process may be frozen and restored elsewhere whenever no call is under way. So it keeps
//! little state that has to be restored: one thread, listening sockets, epoll, pipes. It leaves no
//! connection to the function open when idle, runs no thread pool, resolves no names, and no timer
//! is pending between calls.

mod body;
mod children;
mod duration;
mod files;
mod fork;
mod logs;
mod metrics;
mod proxy;
mod server;
mod settings;

use std::process::ExitCode;
use std::rc::Rc;

use anyhow::Context;
use settings::Settings;

fn main() -> ExitCode {
    match run() {
        Ok(code) => ExitCode::from(code),
        Err(e) => {
            logs::line(&format!("{e:#}"));
            ExitCode::FAILURE
        }
    }
}

fn run() -> anyhow::Result<u8> {
    let settings = Settings::from_environment(|name| std::env::var(name).ok())?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("Failed to start the event loop")?;
    let tasks = tokio::task::LocalSet::new();
    tasks.block_on(&runtime, server::serve(Rc::new(settings)))
}
