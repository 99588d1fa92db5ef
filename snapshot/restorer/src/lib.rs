//! The position-independent code that a restored process runs before it becomes itself.
//!
//! A process cannot rebuild its own address space from code that lies in it. So one small region,
//! placed in a hole of every layout of the tree, holds this code, its programs, its stacks and the
//! signal frames of all threads. `snapshot::plan` writes that region; the code in it knows no policy:
//!
//! * [`interpreter`] runs a program, a list of system calls with a few verbs of control (make a
//!   child or a thread, wait, report, return through a signal frame);
//! * [`agent`] is the loop of a zygote and of what it makes: take a request with descriptors, clone
//!   the address space ahead of a start, and at the start give it to the tree in the sandbox;
//! * [`wire`] is the layout that both sides agree on;
//! * `loader.rs` is a program of its own: what a small process of the tree becomes by exec, so as
//!   to have an address space of its own. It maps the region of that process's capsule.
//!
//! The crate is built twice: as this library for the types and the lints, and by the build script
//! of `trenv-snapshot` as the free-standing image that is put into the region, and as the loader.
#![cfg_attr(not(test), no_std)]

pub mod agent;
#[cfg(test)]
mod hostile;
pub mod interpreter;
pub mod sys;
pub mod wire;
