//! What can go wrong with the network of sandboxes.

use std::{io, path::PathBuf};

/// Why the network could not be made or taken back.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    #[error(
        "The subnet {subnet:?} is not an IPv4 network of at most 30 bits, such as 10.62.0.0/16; \
         correct [network] subnet"
    )]
    Subnet { subnet: String },
    #[error(
        "The CNI plugin {name} is not in {dir}; install containernetworking-plugins or correct \
         [network] plugin_dir"
    )]
    PluginMissing { name: &'static str, dir: PathBuf },
    #[error("Failed to run the CNI plugin {name}; check that it can be executed")]
    PluginRun {
        name: &'static str,
        source: io::Error,
    },
    #[error("The CNI plugin {name} failed at {command} for {id}: {reason}")]
    Plugin {
        name: &'static str,
        command: &'static str,
        id: String,
        reason: String,
    },
    #[error("Failed to load the nft table {table}: {reason}; check that nftables is installed")]
    Nft { table: String, reason: String },
    #[error("Failed to {doing} {path}")]
    File {
        doing: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error("{id:?} cannot name a network namespace; use letters, digits, '.', '_' and '-'")]
    Name { id: String },
    #[error("The network namespace {id} exists already; choose another name")]
    Taken { id: String },
    #[error("Failed to make a network namespace for {id}")]
    Namespace { id: String, source: io::Error },
    #[error("Failed to {doing} of the bridge {bridge}")]
    Neighbour {
        doing: &'static str,
        bridge: String,
        source: io::Error,
    },
    #[error("{left} network namespaces are left; destroy or sweep them first")]
    InUse { left: usize },
    #[error("Failed to remove the bridge {bridge}")]
    Bridge { bridge: String, source: io::Error },
}

impl NetworkError {
    pub(crate) fn file(
        doing: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::File {
            doing,
            path,
            source,
        }
    }
}
