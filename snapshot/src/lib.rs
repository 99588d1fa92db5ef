//! Checkpoint and restore of process trees.
//!
//! [`dump::dump`] freezes a tree, describes it in a [`manifest::Manifest`] and stores its pages in
//! the pool as a template. `plan` turns a manifest, once per host, into programs: lists of system
//! calls that fill an address space and bring each process and thread back. A [`zygote::Zygote`]
//! is the process that has run the first of them and waits; its agents clone the tree into
//! sandboxes, where the free-standing restorer (`restorer/`) runs the rest. Nothing on that path
//! is traced, and no page is copied before it is written.
//!
//! The caller owns sandboxes and cgroups: it hands in a pidfd of the sandbox's pid 1, streams, and
//! a [`TaskGroup`]; on cgroup v1 it moves agents into tenancy cgroups ahead of a start.

pub mod clock;
pub mod dump;
mod fingerprint;
pub mod generation;
pub mod layer;
mod lineage;
pub mod manifest;
pub mod methods;
mod plan;
pub mod recording;
mod working_set;
pub mod zygote;

pub use fingerprint::{Fingerprint, FingerprintError};
pub use plan::PlanError;

/// The tenancy cgroup of a tree, as far as a dump needs it.
pub trait TaskGroup {
    /// Host pids of all processes in it.
    ///
    /// # Errors
    /// When the cgroup cannot be read.
    fn pids(&self) -> std::io::Result<Vec<i32>>;

    /// Stops every task in it, so that no new one appears.
    ///
    /// # Errors
    /// When the freezer does not answer.
    fn freeze(&self) -> std::io::Result<()>;

    /// Undoes [`TaskGroup::freeze`].
    ///
    /// # Errors
    /// When the freezer does not answer.
    fn thaw(&self) -> std::io::Result<()>;
}
