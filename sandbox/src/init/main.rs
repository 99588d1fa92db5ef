//! `trenv-init`: pid 1 of a sandbox, and the helpers that start it and join it.
//!
//! - `launch` (launch.rs): enters a network namespace, makes the others, starts pid 1, ends.
//! - pid 1 (pid_one.rs): waits for requests, reports exits; parts.rs makes /proc, /dev, /sys and
//!   /run ahead, root.rs swaps roots, purge.rs and network.rs take away what a tenancy left.
//! - `join` (join.rs): enters a sandbox and starts one process in it, set up by setup.rs.
//!
//! Nobody starts it by hand. It has one thread always: namespaces and forks depend on it.

mod failure;
mod generation;
mod join;
mod launch;
mod network;
mod parts;
mod pid_one;
mod purge;
mod root;
mod setup;

use std::process::ExitCode;

fn main() -> ExitCode {
    match std::env::args().nth(1).as_deref() {
        Some("launch") => launch::run(),
        Some("join") => join::run(),
        _ => {
            eprintln!("trenv-init is started by containerd-shim-trenv-v2; it has no use by hand.");
            ExitCode::from(2)
        }
    }
}

/// What `ps` shows; it would be the number of the descriptor that we were started through.
fn name_process() {
    // SAFETY: the name is a valid string.
    unsafe { libc::prctl(libc::PR_SET_NAME, c"trenv-init".as_ptr()) };
}
