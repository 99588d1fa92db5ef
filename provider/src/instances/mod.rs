//! Instances and the sandboxes that they live in: who serves which call.
//!
//! [`Scheduler`] holds one table of sandboxes. A call takes an idle instance of its function
//! (`warm`), else one that was restored ahead (`parked`), else an idle sandbox (`repurposed`), else
//! the sandbox of another function's instance that is parked or was used least recently
//! (`evicted`), else a new sandbox (`cold`), else it waits.
//! What is done to sandboxes goes through [`SandboxOps`], implemented by the `host` module with
//! containerd and the shim. A warm call makes no request to either.

mod base;
mod guard;
mod host;
mod ops;
mod parking;
mod plan;
mod prepare;
mod ready;
mod scheduler;
mod table;
mod upkeep;

#[cfg(test)]
mod tests;

pub use guard::Guard;
pub use host::{HOUSEKEEPING_PAUSE, Host, OWNER_LABEL, owner_labels, read_address, refill_spares};
pub use ops::{ColdStart, ParkedStart, SandboxOps, SandboxRef, StartError};
pub use ready::LOAD_PATH;
use ready::wait_ready;
pub use scheduler::{Scheduler, SchedulerOptions};
pub use table::Connection;

/// How an instance came to serve a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum StartKind {
    Warm,
    Parked,
    Repurposed,
    Evicted,
    Cold,
}

impl StartKind {
    /// The word in `X-Trenv-Start`.
    pub fn word(self) -> &'static str {
        match self {
            Self::Warm => "warm",
            Self::Parked => "parked",
            Self::Repurposed => "repurposed",
            Self::Evicted => "evicted",
            Self::Cold => "cold",
        }
    }
}
