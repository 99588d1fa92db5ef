//! Snapshots: the layers of root file systems.

use std::collections::HashMap;

use containerd_client::services::v1::snapshots as api;
use containerd_client::services::v1::snapshots::snapshots_client::SnapshotsClient;
use containerd_client::types;

use super::{Namespaced, Result, refused};

/// A mount that makes a snapshot visible.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Mount {
    pub kind: String,
    pub source: String,
    pub target: String,
    pub options: Vec<String>,
}

/// What a snapshot may be used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SnapshotKind {
    Active,
    Committed,
    View,
}

impl Namespaced {
    /// Makes a writable snapshot over `parent` and returns its mounts.
    pub async fn prepare_snapshot(
        &self,
        lease: &str,
        key: &str,
        parent: &str,
        labels: HashMap<String, String>,
    ) -> Result<Vec<Mount>> {
        let request = self.request_leased(
            lease,
            api::PrepareSnapshotRequest {
                snapshotter: self.snapshotter.clone(),
                key: key.to_owned(),
                parent: parent.to_owned(),
                labels,
            },
        );
        let answer = SnapshotsClient::new(self.channel.clone())
            .prepare(request)
            .await
            .map_err(refused(format!("make the snapshot {key}")))?;
        Ok(from_wire(answer.into_inner().mounts))
    }

    /// Makes a read-only snapshot over `parent` and returns its mounts.
    pub async fn view_snapshot(
        &self,
        lease: &str,
        key: &str,
        parent: &str,
        labels: HashMap<String, String>,
    ) -> Result<Vec<Mount>> {
        let request = self.request_leased(
            lease,
            api::ViewSnapshotRequest {
                snapshotter: self.snapshotter.clone(),
                key: key.to_owned(),
                parent: parent.to_owned(),
                labels,
            },
        );
        let answer = SnapshotsClient::new(self.channel.clone())
            .view(request)
            .await
            .map_err(refused(format!("make the view {key}")))?;
        Ok(from_wire(answer.into_inner().mounts))
    }

    /// The mounts of an existing active snapshot or view.
    pub async fn snapshot_mounts(&self, key: &str) -> Result<Vec<Mount>> {
        let request = self.request(api::MountsRequest {
            snapshotter: self.snapshotter.clone(),
            key: key.to_owned(),
        });
        let answer = SnapshotsClient::new(self.channel.clone())
            .mounts(request)
            .await
            .map_err(refused(format!("tell the mounts of the snapshot {key}")))?;
        Ok(from_wire(answer.into_inner().mounts))
    }

    /// Turns the active snapshot `key` into the committed layer `name`.
    pub async fn commit_snapshot(
        &self,
        lease: &str,
        name: &str,
        key: &str,
        labels: HashMap<String, String>,
    ) -> Result<()> {
        let request = self.request_leased(
            lease,
            api::CommitSnapshotRequest {
                snapshotter: self.snapshotter.clone(),
                name: name.to_owned(),
                key: key.to_owned(),
                labels,
            },
        );
        SnapshotsClient::new(self.channel.clone())
            .commit(request)
            .await
            .map_err(refused(format!("commit the snapshot {key} as {name}")))?;
        Ok(())
    }

    /// Removes a snapshot; one that does not exist is no error.
    pub async fn remove_snapshot(&self, key: &str) -> Result<()> {
        let request = self.request(api::RemoveSnapshotRequest {
            snapshotter: self.snapshotter.clone(),
            key: key.to_owned(),
        });
        let removed = SnapshotsClient::new(self.channel.clone())
            .remove(request)
            .await
            .map_err(refused(format!("remove the snapshot {key}")));
        match removed {
            Err(err) if !err.is_not_found() => Err(err),
            _ => Ok(()),
        }
    }

    /// What kind of snapshot `key` is, or `None` when there is none.
    pub async fn snapshot_kind(&self, key: &str) -> Result<Option<SnapshotKind>> {
        let request = self.request(api::StatSnapshotRequest {
            snapshotter: self.snapshotter.clone(),
            key: key.to_owned(),
        });
        let answer = SnapshotsClient::new(self.channel.clone())
            .stat(request)
            .await
            .map_err(refused(format!("describe the snapshot {key}")));
        match answer {
            Ok(answer) => Ok(answer.into_inner().info.map(|info| kind_of(info.kind))),
            Err(err) if err.is_not_found() => Ok(None),
            Err(err) => Err(err),
        }
    }

    /// Keys of the snapshots that carry `label`, with their kinds.
    pub async fn snapshots_labelled(&self, label: &str) -> Result<Vec<(String, SnapshotKind)>> {
        let request = self.request(api::ListSnapshotsRequest {
            snapshotter: self.snapshotter.clone(),
            filters: vec![format!("labels.\"{label}\"")],
        });
        let mut stream = SnapshotsClient::new(self.channel.clone())
            .list(request)
            .await
            .map_err(refused("list snapshots"))?
            .into_inner();
        let mut found = Vec::new();
        while let Some(part) = stream.message().await.map_err(refused("list snapshots"))? {
            found.extend(part.info.into_iter().map(|i| (i.name, kind_of(i.kind))));
        }
        Ok(found)
    }
}

fn kind_of(kind: i32) -> SnapshotKind {
    match api::Kind::try_from(kind) {
        Ok(api::Kind::Committed) => SnapshotKind::Committed,
        Ok(api::Kind::View) => SnapshotKind::View,
        _ => SnapshotKind::Active,
    }
}

pub(super) fn to_wire(mount: &Mount) -> types::Mount {
    types::Mount {
        r#type: mount.kind.clone(),
        source: mount.source.clone(),
        target: mount.target.clone(),
        options: mount.options.clone(),
    }
}

fn from_wire(mounts: Vec<types::Mount>) -> Vec<Mount> {
    mounts
        .into_iter()
        .map(|m| Mount {
            kind: m.r#type,
            source: m.source,
            target: m.target,
            options: m.options,
        })
        .collect()
}
