//! Network namespaces with an address on the machine's bridge.
//!
//! [`Network::open`] makes what all sandboxes share: the bridge, forwarding, and one nft table that
//! masquerades what leaves the sandboxes' subnet. [`NetnsPool`] makes namespaces ahead: each is a
//! bind mount under `run_dir/netns` with its loopback up, connected by the CNI plugin `bridge` with
//! a `host-local` address. No plugin runs between [`NetnsPool::take`] and the sandbox's start.
//!
//! Every namespace has a record in `state_dir/network`, on disk before the namespace exists and
//! locked for as long as its owner lives. [`Network::sweep`] takes back whatever has a record that
//! nobody holds: namespace, veth pair, address.

mod bridge;
mod error;
mod masquerade;
mod namespace;
mod neighbour;
#[doc(hidden)]
pub mod netlink;
mod plugin;
mod pool;
mod record;

pub use bridge::{Network, NetworkConfig};
pub use error::NetworkError;
pub use namespace::Netns;
pub use pool::NetnsPool;

/// One timed step of an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Step {
    pub name: &'static str,
    pub took: std::time::Duration,
}
