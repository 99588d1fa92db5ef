//! Harness of the end-to-end tests.
//!
//! A test starts a [`Machine`]: a containerd and a provider of its own, with binaries of this build,
//! in a directory, a bridge, a subnet and a cgroup that nothing else uses. Images are imported once
//! and kept between tests; everything else goes when [`Machine::stop`] has been called, which fails
//! when anything at all is left ([`Leftovers`]). Functions are called by a plain HTTP client
//! ([`http`]) and described through [`Machine::describe`]; [`until`] waits for what takes its time.

mod containerd;
mod crash;
mod daemon;
mod disk;
pub mod http;
mod images;
mod leftovers;
mod machine;
mod sandboxes;
mod variants;
mod wait;
mod zygotes;

pub use crash::crash;
pub use http::Reply;
pub use leftovers::Leftovers;
pub use machine::{Machine, Settings};
pub use sandboxes::Sandbox;
pub use variants::SERVER;
pub use wait::{until, until_some};
pub use zygotes::PAGE;

/// The sample functions of `functions/stack.yml`.
pub const SAMPLES: [&str; 4] = ["hello-python", "hello-node", "json-python", "image-node"];
/// Bases to make functions from.
pub const BASES: [&str; 2] = ["base-python", "base-node"];
