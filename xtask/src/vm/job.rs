//! What the machine and the VM tell each other.
//!
//! The job is a file in the initramfs; the outcome is one line on a virtio port.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::Dax;

/// Tags and names that both sides use.
pub const ROOT_TAG: &str = "trenv.root";
pub const SHARE_TAG: &str = "trenv.share";
pub const STDOUT_PORT: &str = "trenv.stdout";
pub const STDERR_PORT: &str = "trenv.stderr";
pub const OUTCOME_PORT: &str = "trenv.outcome";
pub const JOB_FILE: &str = "/job.json";
/// Modules in the initramfs, in the order of their names.
pub const MODULES_FOLDER: &str = "/modules";

#[derive(Debug, Serialize, Deserialize)]
pub struct Job {
    pub command: Vec<String>,
    pub folder: PathBuf,
    pub environment: Vec<(String, String)>,
    /// The kernel's modules on the machine; none if it has all built in.
    pub modules: Option<PathBuf>,
    pub share: Option<PathBuf>,
    pub tmpfs: Vec<PathBuf>,
    /// What is to be made `/dev/dax0.0`.
    pub dax: Option<Dax>,
    pub rdma: bool,
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    /// The command's status, 128 and the signal's number if one ended it.
    Ended(u8),
    /// The VM could not be made ready for the command.
    Failed(String),
}
