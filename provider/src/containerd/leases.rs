//! Leases: what keeps layers and content from containerd's garbage collection.
//!
//! A lease of ours has no expiry: a function stays ready across reboots without anybody renewing
//! anything. Leases that no stored function owns are removed when the provider starts.

use std::collections::HashMap;

use containerd_client::services::v1 as services;
use containerd_client::services::v1::leases_client::LeasesClient;

use super::{Namespaced, Result, refused};

impl Namespaced {
    /// Makes the lease `id`; an existing one is kept.
    pub async fn create_lease(&self, id: &str, labels: HashMap<String, String>) -> Result<()> {
        let request = self.request(services::CreateRequest {
            id: id.to_owned(),
            labels,
        });
        let created = LeasesClient::new(self.channel.clone())
            .create(request)
            .await
            .map_err(refused(format!("make the lease {id}")));
        match created {
            Err(err) if !err.is_already_exists() => Err(err),
            _ => Ok(()),
        }
    }

    /// Lets the lease hold the snapshot `key`.
    pub async fn lease_snapshot(&self, id: &str, key: &str) -> Result<()> {
        let kind = format!("snapshots/{}", self.snapshotter);
        self.lease_resource(id, key, kind).await
    }

    /// Lets the lease hold the content with `digest` and, by its labels, all that it refers to.
    pub async fn lease_content(&self, id: &str, digest: &str) -> Result<()> {
        self.lease_resource(id, digest, "content".to_owned()).await
    }

    /// Deletes a lease; one that does not exist is no error.
    pub async fn delete_lease(&self, id: &str) -> Result<()> {
        let request = self.request(services::DeleteRequest {
            id: id.to_owned(),
            sync: false,
        });
        let deleted = LeasesClient::new(self.channel.clone())
            .delete(request)
            .await
            .map_err(refused(format!("delete the lease {id}")));
        match deleted {
            Err(err) if !err.is_not_found() => Err(err),
            _ => Ok(()),
        }
    }

    /// Ids of the leases that carry `label`.
    pub async fn leases_labelled(&self, label: &str) -> Result<Vec<String>> {
        let request = self.request(services::ListRequest {
            filters: vec![format!("labels.\"{label}\"")],
        });
        let answer = LeasesClient::new(self.channel.clone())
            .list(request)
            .await
            .map_err(refused("list leases"))?;
        Ok(answer
            .into_inner()
            .leases
            .into_iter()
            .map(|l| l.id)
            .collect())
    }

    async fn lease_resource(&self, id: &str, resource: &str, kind: String) -> Result<()> {
        let request = self.request(services::AddResourceRequest {
            id: id.to_owned(),
            resource: Some(services::Resource {
                id: resource.to_owned(),
                r#type: kind,
            }),
        });
        let added = LeasesClient::new(self.channel.clone())
            .add_resource(request)
            .await
            .map_err(refused(format!("hold {resource} by the lease {id}")));
        match added {
            Err(err) if !err.is_already_exists() => Err(err),
            _ => Ok(()),
        }
    }
}
