//! containerd over its socket: the few calls that the provider needs, in one namespace.
//!
//! [`Containerd`] holds the connection, [`Namespaced`] a namespace of it; every other file adds the
//! calls of one containerd service. Whatever must outlive garbage collection is made under a lease
//! whose id is given along ([`Namespaced::request_leased`]).

mod containers;
mod events;
mod figures;
mod images;
mod leases;
mod snapshots;
mod tasks;
mod unpack;

use std::path::Path;

use containerd_client::services::v1 as services;
use containerd_client::tonic::transport::Channel;
use containerd_client::tonic::{self, Code, Request, Status};

pub use containers::NewContainer;
pub use figures::TaskFigures;
pub use images::{ImageConfig, ImageError, ResolvedImage};
pub use snapshots::{Mount, SnapshotKind};

/// Why containerd did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum ContainerdError {
    #[error(
        "Failed to connect to containerd at {address}; check that it runs and the setting containerd.address"
    )]
    Connect {
        address: String,
        #[source]
        source: tonic::transport::Error,
    },
    #[error("containerd refused to {action}: {}", .status.message())]
    Refused { action: String, status: Box<Status> },
    #[error(
        "The containerd namespace {name:?} is not a valid name; use letters, digits, '-', '_' and '.'"
    )]
    Namespace { name: String },
}

impl ContainerdError {
    /// Whether the object that was asked for does not exist.
    pub fn is_not_found(&self) -> bool {
        self.code() == Some(Code::NotFound)
    }

    /// Whether the object that was to be made exists already.
    pub fn is_already_exists(&self) -> bool {
        self.code() == Some(Code::AlreadyExists)
    }

    fn code(&self) -> Option<Code> {
        match self {
            Self::Refused { status, .. } => Some(status.code()),
            _ => None,
        }
    }
}

/// The result of a containerd call.
pub type Result<T> = std::result::Result<T, ContainerdError>;

/// A connection to containerd; it reconnects by itself.
#[derive(Debug, Clone)]
pub struct Containerd {
    channel: Channel,
    snapshotter: String,
}

impl Containerd {
    /// Connects to the socket at `address`.
    ///
    /// # Errors
    /// When nobody listens there.
    pub async fn connect(address: &Path, snapshotter: &str) -> Result<Self> {
        let channel = containerd_client::connect(address)
            .await
            .map_err(|source| ContainerdError::Connect {
                address: address.display().to_string(),
                source,
            })?;
        Ok(Self {
            channel,
            snapshotter: snapshotter.to_owned(),
        })
    }

    /// One namespace of this containerd.
    pub fn namespace(&self, name: &str) -> Result<Namespaced> {
        let valid = !name.is_empty()
            && name.len() <= 76
            && name
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
        let header = name.parse().ok().filter(|_| valid);
        let header = header.ok_or_else(|| ContainerdError::Namespace {
            name: name.to_owned(),
        })?;
        Ok(Namespaced {
            channel: self.channel.clone(),
            name: name.to_owned(),
            header,
            snapshotter: self.snapshotter.clone(),
        })
    }

    /// Names of the namespaces, with whether each is marked as one for functions.
    pub async fn namespaces(&self) -> Result<Vec<(String, bool)>> {
        let mut client = services::namespaces_client::NamespacesClient::new(self.channel.clone());
        let answer = client
            .list(services::ListNamespacesRequest::default())
            .await
            .map_err(refused("list namespaces"))?;
        Ok(answer
            .into_inner()
            .namespaces
            .into_iter()
            .map(|n| {
                let marked = n.labels.contains_key(FUNCTION_NAMESPACE_LABEL);
                (n.name, marked)
            })
            .collect())
    }

    /// Removes a namespace; it must be empty.
    pub async fn remove_namespace(&self, name: &str) -> Result<()> {
        services::namespaces_client::NamespacesClient::new(self.channel.clone())
            .delete(about(
                name,
                services::DeleteNamespaceRequest {
                    name: name.to_owned(),
                },
            ))
            .await
            .map_err(refused(format!("remove the namespace {name}")))?;
        Ok(())
    }

    /// Makes the namespace `name` and marks it as one for functions; an existing one is marked.
    pub async fn mark_namespace(&self, name: &str) -> Result<()> {
        let mut client = services::namespaces_client::NamespacesClient::new(self.channel.clone());
        let namespace = services::Namespace {
            name: name.to_owned(),
            labels: [(FUNCTION_NAMESPACE_LABEL.to_owned(), "true".to_owned())].into(),
        };
        let created = client
            .create(about(
                name,
                services::CreateNamespaceRequest {
                    namespace: Some(namespace.clone()),
                },
            ))
            .await;
        match created {
            Ok(_) => Ok(()),
            Err(status) if status.code() == Code::AlreadyExists => {
                client
                    .update(about(
                        name,
                        services::UpdateNamespaceRequest {
                            namespace: Some(namespace),
                            update_mask: Some(prost_types::FieldMask {
                                paths: vec![format!("labels.{FUNCTION_NAMESPACE_LABEL}")],
                            }),
                        },
                    ))
                    .await
                    .map_err(refused(format!("mark the namespace {name}")))?;
                Ok(())
            }
            Err(status) => Err(refused(format!("make the namespace {name}"))(status)),
        }
    }
}

/// The label that marks a containerd namespace as one of the REST interface.
pub const FUNCTION_NAMESPACE_LABEL: &str = "openfaas";

/// A connection to containerd within one namespace.
#[derive(Debug, Clone)]
pub struct Namespaced {
    channel: Channel,
    name: String,
    header: tonic::metadata::AsciiMetadataValue,
    snapshotter: String,
}

impl Namespaced {
    /// The namespace's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    fn request<T>(&self, body: T) -> Request<T> {
        let mut request = Request::new(body);
        request
            .metadata_mut()
            .insert("containerd-namespace", self.header.clone());
        request
    }

    /// A request whose new objects are held by the lease `lease`.
    fn request_leased<T>(&self, lease: &str, body: T) -> Request<T> {
        let mut request = self.request(body);
        if let Ok(value) = lease.parse() {
            request.metadata_mut().insert("containerd-lease", value);
        }
        request
    }
}

/// A request about a namespace; containerd publishes what becomes of it in the namespace itself.
fn about<T>(name: &str, body: T) -> Request<T> {
    let mut request = Request::new(body);
    if let Ok(header) = name.parse() {
        request
            .metadata_mut()
            .insert("containerd-namespace", header);
    }
    request
}

fn refused(action: impl Into<String>) -> impl FnOnce(Status) -> ContainerdError {
    let action = action.into();
    move |status| ContainerdError::Refused {
        action,
        status: Box::new(status),
    }
}
