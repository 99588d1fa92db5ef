//! Sandboxes: an isolated place that one function after the other stays in.
//!
//! [`Sandbox::create`] starts a pid 1 of ours (`trenv-init`) in fresh pid, mount, uts and ipc
//! namespaces and a given network namespace. It has no function yet, only an empty root, and holds
//! the parts of the next root (/proc, /dev, /sys, /run) ready. A tenancy then goes this way:
//! [`Sandbox::enter_rootfs`] swaps the root; processes come by [`Sandbox::spawn`] (through
//! `trenv-init join`) or from a template's zygote, which joins the namespaces of pid 1; their ends
//! are reported on [`Sandbox::exits`]; [`Sandbox::purge`] takes away everything that the tenancy
//! left and makes the parts of the next. [`cgroup::TenancyCgroup`] holds a tenancy's processes.
//!
//! When the process that made a sandbox dies, its pid 1 ends and the kernel ends all the others.

pub mod cgroup;
mod error;
pub mod generation;
mod init_client;
pub mod process;
#[doc(hidden)]
pub mod protocol;
pub mod rootfs;
mod sandbox;
#[doc(hidden)]
pub mod sys;

pub use error::SandboxError;
pub use process::ProcessSpec;
pub use rootfs::{Part, Rootfs};
pub use sandbox::{CreateRequest, Exit, ExitStatus, Exits, Sandbox, Spawned};
pub use trenv_cni::Step;
