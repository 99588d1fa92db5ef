//! What can go wrong with the network of sandboxes.

use std::path::PathBuf;

/// Why the network could not be made or taken back.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    #[error(
        "The subnet {subnet:?} is not an IPv4 network of at most 30 bits; correct [network] subnet"
    )]
    Subnet { subnet: String },
    #[error(
        "The CNI plugin {name} is not in {dir}; install containernetworking-plugins or correct [network] plugin_dir"
    )]
    PluginMissing { name: String, dir: PathBuf },
    #[error("Failed to run the CNI plugin {name}; check that it can be executed")]
    PluginRun {
        name: String,
        source: std::io::Error,
    },
    #[error("The CNI plugin {name} refused {command} for {id}: {reason}")]
    Plugin {
        name: String,
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
        source: std::io::Error,
    },
    #[error("Failed to make a network namespace for {id}")]
    Namespace { id: String, source: std::io::Error },
    #[error("The network record {path} is not valid; remove it after taking back what it names")]
    Record {
        path: PathBuf,
        source: serde_json::Error,
    },
}

impl NetworkError {
    pub(crate) fn file(
        doing: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::File {
            doing,
            path,
            source,
        }
    }
}
