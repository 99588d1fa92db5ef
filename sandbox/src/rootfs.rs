//! Root file systems: containerd's mounts become a detached mount, made outside the sandbox.

use std::{
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

mod copy;
mod kept;
mod look_up;
mod mounts;

pub use copy::copy_upper;
pub use kept::{Keeper, KeptRoot};
pub use look_up::look_up;
pub use mounts::{bind, overlay_from_mounts, sync_upper, tmpfs};

/// A mount as containerd describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    pub kind: String,
    pub source: String,
    pub options: Vec<String>,
}

/// A root for one tenancy. It can be entered once: its mounts move into the sandbox.
#[derive(Debug)]
pub struct Rootfs {
    /// The root itself, a detached mount, from [`overlay_from_mounts`].
    pub overlay: OwnedFd,
    /// What is mounted in it beside /proc, /dev, /sys and /run, in this order.
    pub parts: Vec<Part>,
    pub read_only: bool,
    pub hostname: String,
    /// Paths to hide beyond [`MASKED_PATHS`].
    pub masked_paths: Vec<String>,
    /// Paths to make read-only beyond [`READONLY_PATHS`].
    pub readonly_paths: Vec<String>,
}

/// A detached mount and its place in the root; the place is made when it does not exist.
#[derive(Debug)]
pub struct Part {
    /// From [`bind`] or [`tmpfs`].
    pub mount: OwnedFd,
    pub destination: PathBuf,
    /// Whether the mount's root is a directory.
    pub directory: bool,
}

/// What containerd's default spec hides; always hidden.
pub const MASKED_PATHS: &[&str] = &[
    "/proc/acpi",
    "/proc/asound",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/sys/firmware",
    "/sys/devices/virtual/powercap",
    "/proc/scsi",
];

/// What containerd's default spec makes read-only; always read-only.
pub const READONLY_PATHS: &[&str] = &[
    "/proc/bus",
    "/proc/fs",
    "/proc/irq",
    "/proc/sys",
    "/proc/sysrq-trigger",
];

/// Why a root could not be built.
#[derive(Debug, thiserror::Error)]
pub enum RootfsError {
    #[error("Failed to {doing} {what}")]
    Mount {
        doing: &'static str,
        what: String,
        source: std::io::Error,
    },
    #[error(
        "A root needs one overlay or one bind mount, but {count} mounts were given, the first of type {kind:?}"
    )]
    Mounts { count: usize, kind: String },
    #[error("The mount option {option:?} is not supported for a {kind} root")]
    Option { option: String, kind: String },
}

/// Flags of a bind mount.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct BindFlags {
    pub recursive: bool,
    pub read_only: bool,
    pub no_suid: bool,
    pub no_dev: bool,
    pub no_exec: bool,
}

impl Part {
    /// A bind mount of a path of this mount namespace.
    ///
    /// # Errors
    /// When the source does not exist or cannot be cloned.
    pub fn bind(source: &Path, destination: &Path, flags: BindFlags) -> Result<Self, RootfsError> {
        let (mount, directory) = bind(source, flags)?;
        Ok(Self {
            mount,
            destination: destination.into(),
            directory,
        })
    }
}
