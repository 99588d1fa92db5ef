//! What can go wrong with a sandbox.

use std::path::PathBuf;

/// Why an operation on a sandbox failed.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    #[error(
        "Failed to start {binary} as pid 1 of sandbox {id}; check that trenv is installed whole"
    )]
    Launch {
        id: String,
        binary: PathBuf,
        source: std::io::Error,
    },
    #[error("Failed to {doing} in sandbox {id}: {reason}")]
    Init {
        id: String,
        doing: &'static str,
        reason: String,
    },
    #[error("Sandbox {id} is gone: its pid 1 no longer answers ({doing}); create a new one")]
    Gone {
        id: String,
        doing: &'static str,
        source: std::io::Error,
    },
    #[error("Failed to start {program} in sandbox {id}: {reason}")]
    Spawn {
        id: String,
        program: String,
        reason: String,
    },
    #[error("Failed to {doing} for sandbox {id}")]
    Host {
        id: String,
        doing: &'static str,
        source: std::io::Error,
    },
    #[error("Failed to use the cgroup of sandbox {id}")]
    Cgroup {
        id: String,
        source: crate::cgroup::CgroupError,
    },
}
