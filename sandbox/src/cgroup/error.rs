//! What can go wrong with a cgroup.

use std::{io, path::PathBuf};

/// Why a cgroup operation failed.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    #[error("No cgroup hierarchy with a freezer is mounted; mount cgroup v2 on /sys/fs/cgroup")]
    NoHierarchy,
    #[error("{name:?} cannot name a cgroup; use a path without empty, . and .. components")]
    Name { name: String },
    #[error("Failed to {doing} {path}")]
    File {
        doing: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error("Failed to set {path} to {value:?}; correct the limit")]
    Set {
        path: PathBuf,
        value: String,
        source: io::Error,
    },
    #[error("Failed to move process {pid} into {path}")]
    Add {
        pid: i32,
        path: PathBuf,
        source: io::Error,
    },
    #[error("{path} did not {what} in time; its processes are {pids:?}")]
    Timeout {
        path: PathBuf,
        what: &'static str,
        pids: Vec<i32>,
    },
    #[error("The limit {field} is not supported in a trenv sandbox; remove it")]
    Unsupported { field: String },
    #[error("Failed to {doing} the device rules of {path}")]
    Devices {
        doing: &'static str,
        path: PathBuf,
        source: io::Error,
    },
}

impl CgroupError {
    pub(super) fn file(
        doing: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::File {
            doing,
            path,
            source,
        }
    }
}

impl From<CgroupError> for io::Error {
    fn from(error: CgroupError) -> Self {
        let kind = match &error {
            CgroupError::File { source, .. }
            | CgroupError::Set { source, .. }
            | CgroupError::Add { source, .. }
            | CgroupError::Devices { source, .. } => source.kind(),
            CgroupError::Timeout { .. } => io::ErrorKind::TimedOut,
            CgroupError::Name { .. } => io::ErrorKind::InvalidInput,
            CgroupError::NoHierarchy | CgroupError::Unsupported { .. } => {
                io::ErrorKind::Unsupported
            }
        };
        Self::new(kind, error)
    }
}
