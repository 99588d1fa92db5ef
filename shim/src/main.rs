//! `containerd-shim-trenv-v2`, the containerd shim (runtime v2, task API v2) of trenv.
//!
//! containerd runs this binary three ways: `start` prints the address of the shim that serves a
//! container and brings that shim up if need be, the daemon itself serves, and `delete` frees what
//! a dead shim left. A container with the annotation `dev.trenv.sandbox` becomes a sandbox; every
//! other one is run by the installed runc.
//!
//! | module | concept |
//! |---|---|
//! | `flags` | containerd's command line |
//! | `group` | which containers share a shim, and its socket |
//! | `start`, `serve`, `delete` | the three ways to run |
//! | `task` | containerd's task service: one table, one state machine per container |
//! | `runc` | containers run by the installed runc |
//! | `sandbox` | trenv's sandboxes and the service `trenv.sandbox.v1` |
//! | `template` | zygotes, agents, dumps: all that touches the snapshot engine |
//! | `record` | durable notes of what must be freed after a crash |
//! | `stdio` | pipes, fifos, files, logging programs, consoles |
//! | `stats`, `oom` | control-group figures in containerd's types; want of memory |
//! | `events` | events to containerd, in order |
//! | `reap` | exit statuses of children |
//! | `logging`, `error` | the log file and containerd's fifos; failures and their ttrpc codes |

mod delete;
mod error;
mod events;
mod flags;
mod group;
mod logging;
mod oom;
mod reap;
mod record;
mod runc;
mod sandbox;
mod serve;
mod start;
mod stats;
mod stdio;
mod task;
mod template;

use std::process::ExitCode;

use flags::{Action, Flags};

fn main() -> ExitCode {
    let flags = match Flags::parse(std::env::args_os().skip(1)) {
        Ok(flags) => flags,
        Err(err) => return fail(&err.into()),
    };
    let done = match flags.action {
        Action::Version => {
            println!("containerd-shim-trenv-v2 {}", env!("CARGO_PKG_VERSION"));
            Ok(())
        }
        Action::Start => start::run(&flags),
        Action::Delete => delete::run(&flags),
        Action::Serve => serve::run(&flags),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(err) => fail(&err),
    }
}

fn fail(err: &anyhow::Error) -> ExitCode {
    eprintln!("containerd-shim-trenv-v2: {err:#}");
    ExitCode::FAILURE
}
