//! Container records: the metadata of a sandbox as `ctr containers info` shows it.

use std::collections::HashMap;

use containerd_client::services::v1 as services;
use containerd_client::services::v1::container::Runtime;
use containerd_client::services::v1::containers_client::ContainersClient;
use prost_types::{Any, FieldMask};

use super::{Namespaced, Result, refused};

const SPEC_TYPE: &str = "types.containerd.io/opencontainers/runtime-spec/1/Spec";

/// What a container record holds.
#[derive(Debug, Clone)]
pub struct NewContainer {
    pub id: String,
    pub image: String,
    pub runtime: String,
    pub spec_json: Vec<u8>,
    /// Empty when there is no root file system.
    pub snapshot_key: String,
    pub labels: HashMap<String, String>,
}

impl Namespaced {
    /// Makes a container record.
    pub async fn create_container(&self, new: NewContainer) -> Result<()> {
        let action = format!("make the container {}", new.id);
        let request = self.request(services::CreateContainerRequest {
            container: Some(self.record(new)),
        });
        ContainersClient::new(self.channel.clone())
            .create(request)
            .await
            .map_err(refused(action))?;
        Ok(())
    }

    /// Replaces image, snapshot key, spec and labels of a record; containerd fixes the rest.
    pub async fn update_container(&self, new: NewContainer) -> Result<()> {
        let action = format!("update the container {}", new.id);
        let request = self.request(services::UpdateContainerRequest {
            container: Some(self.record(new)),
            update_mask: Some(FieldMask {
                // containerd spells the key of the snapshot without an underscore here.
                paths: ["image", "snapshotkey", "spec", "labels"]
                    .map(str::to_owned)
                    .to_vec(),
            }),
        });
        ContainersClient::new(self.channel.clone())
            .update(request)
            .await
            .map_err(refused(action))?;
        Ok(())
    }

    /// Deletes a record; one that does not exist is no error.
    pub async fn delete_container(&self, id: &str) -> Result<()> {
        let request = self.request(services::DeleteContainerRequest { id: id.to_owned() });
        let deleted = ContainersClient::new(self.channel.clone())
            .delete(request)
            .await
            .map_err(refused(format!("delete the container {id}")));
        match deleted {
            Err(err) if !err.is_not_found() => Err(err),
            _ => Ok(()),
        }
    }

    /// Ids of the containers that carry `label`.
    pub async fn containers_labelled(&self, label: &str) -> Result<Vec<String>> {
        let request = self.request(services::ListContainersRequest {
            filters: vec![format!("labels.\"{label}\"")],
        });
        let answer = ContainersClient::new(self.channel.clone())
            .list(request)
            .await
            .map_err(refused("list containers"))?;
        Ok(answer
            .into_inner()
            .containers
            .into_iter()
            .map(|c| c.id)
            .collect())
    }

    fn record(&self, new: NewContainer) -> services::Container {
        services::Container {
            id: new.id,
            image: new.image,
            labels: new.labels,
            runtime: Some(Runtime {
                name: new.runtime,
                options: None,
            }),
            spec: Some(Any {
                type_url: SPEC_TYPE.to_owned(),
                value: new.spec_json,
            }),
            snapshotter: self.snapshotter.clone(),
            snapshot_key: new.snapshot_key,
            ..Default::default()
        }
    }
}
