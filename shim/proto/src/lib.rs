//! The shim's own ttrpc service `trenv.sandbox.v1`: messages, server trait and client, and the
//! sockets that carry it.
//!
//! The interface and its contracts are documented in `trenv.sandbox.v1.proto`.

mod generated {
    #![allow(
        missing_debug_implementations,
        clippy::all,
        clippy::pedantic,
        clippy::restriction,
        rustdoc::all
    )]
    include!(concat!(env!("OUT_DIR"), "/mod.rs"));
}

pub mod layer;
pub mod socket;

pub use generated::trenv_sandbox_v1::*;
pub use generated::trenv_sandbox_v1_ttrpc::*;
