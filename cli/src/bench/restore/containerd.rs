//! containerd over its socket: the containers and snapshots of the benchmark, in a namespace of
//! their own. All carry a label, by which they are found and removed.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use containerd_client::services::v1 as api;
use containerd_client::services::v1::container::Runtime;
use containerd_client::services::v1::containers_client::ContainersClient;
use containerd_client::services::v1::leases_client::LeasesClient;
use containerd_client::services::v1::namespaces_client::NamespacesClient;
use containerd_client::services::v1::snapshots as snapshots_api;
use containerd_client::services::v1::snapshots::snapshots_client::SnapshotsClient;
use containerd_client::services::v1::tasks_client::TasksClient;
use containerd_client::tonic::metadata::AsciiMetadataValue;
use containerd_client::tonic::transport::Channel;
use containerd_client::tonic::{Code, Request, Response, Status};
use containerd_client::types::Mount;
use prost_types::Any;
use serde_json::Value;
use trenv_config::Config;

use crate::containerd::{RUNTIME, SPEC_TYPE, open};

const LABEL: &str = "dev.trenv.bench";
const LEASE: &str = "trenv-bench-restore";
const KILL: u32 = 9;
/// How long a sandbox may take to end, and everything else of the benchmark to go.
const REMOVAL: Duration = Duration::from_secs(15);
const PAUSE: Duration = Duration::from_millis(50);

/// One namespace of containerd.
#[derive(Debug, Clone)]
pub struct Containerd {
    channel: Channel,
    namespace: AsciiMetadataValue,
    snapshotter: String,
}

impl Containerd {
    pub async fn connect(config: &Config, namespace: &str) -> anyhow::Result<Self> {
        Ok(Self {
            channel: open(config).await?,
            namespace: namespace.parse().with_context(|| {
                format!("{namespace:?} cannot be the name of a containerd namespace; use letters, digits and '-'")
            })?,
            snapshotter: config.containerd.snapshotter.clone(),
        })
    }

    /// Makes the lease that keeps the snapshots from containerd's garbage collection.
    pub async fn create_lease(&self) -> anyhow::Result<()> {
        let request = self.request(api::CreateRequest {
            id: LEASE.to_owned(),
            labels: labels(),
        });
        done(self.leases().create(request).await, Code::AlreadyExists)
            .context("containerd refused to make the benchmark's lease")
    }

    /// Makes a writable snapshot; an empty parent is none.
    pub async fn prepare(&self, key: &str, parent: &str) -> anyhow::Result<Vec<Mount>> {
        let request = self.request(snapshots_api::PrepareSnapshotRequest {
            snapshotter: self.snapshotter.clone(),
            key: key.to_owned(),
            parent: parent.to_owned(),
            labels: labels(),
        });
        let answer = self.snapshots_client().prepare(request).await;
        Ok(answer
            .with_context(|| format!("containerd refused to make the snapshot {key}"))?
            .into_inner()
            .mounts)
    }

    /// Makes a read-only snapshot.
    pub async fn view(&self, key: &str, parent: &str) -> anyhow::Result<Vec<Mount>> {
        let request = self.request(snapshots_api::ViewSnapshotRequest {
            snapshotter: self.snapshotter.clone(),
            key: key.to_owned(),
            parent: parent.to_owned(),
            labels: labels(),
        });
        let answer = self.snapshots_client().view(request).await;
        Ok(answer
            .with_context(|| format!("containerd refused to make the view {key}"))?
            .into_inner()
            .mounts)
    }

    /// Makes a layer of a writable snapshot.
    pub async fn commit(&self, key: &str, layer: &str) -> anyhow::Result<()> {
        let request = self.request(snapshots_api::CommitSnapshotRequest {
            snapshotter: self.snapshotter.clone(),
            name: layer.to_owned(),
            key: key.to_owned(),
            labels: labels(),
        });
        let answer = self.snapshots_client().commit(request).await;
        answer.with_context(|| format!("containerd refused to make a layer of {key}"))?;
        Ok(())
    }

    pub async fn remove_snapshot(&self, key: &str) -> anyhow::Result<()> {
        let request = self.request(snapshots_api::RemoveSnapshotRequest {
            snapshotter: self.snapshotter.clone(),
            key: key.to_owned(),
        });
        done(
            self.snapshots_client().remove(request).await,
            Code::NotFound,
        )
        .with_context(|| format!("containerd refused to remove the snapshot {key}"))
    }

    /// Makes a container and starts it; what runs in it prints to the file `output`.
    pub async fn run(
        &self,
        id: &str,
        spec: &Value,
        rootfs: &[Mount],
        output: &str,
    ) -> anyhow::Result<()> {
        let record = api::Container {
            id: id.to_owned(),
            labels: labels(),
            runtime: Some(Runtime {
                name: RUNTIME.to_owned(),
                options: None,
            }),
            spec: Some(Any {
                type_url: SPEC_TYPE.to_owned(),
                value: spec.to_string().into_bytes(),
            }),
            snapshotter: self.snapshotter.clone(),
            ..Default::default()
        };
        let request = self.request(api::CreateContainerRequest {
            container: Some(record),
        });
        let made = self.containers_client().create(request).await;
        made.with_context(|| format!("containerd refused to make the container {id}"))?;
        let request = self.request(api::CreateTaskRequest {
            container_id: id.to_owned(),
            rootfs: rootfs.to_vec(),
            stdout: output.to_owned(),
            stderr: output.to_owned(),
            ..Default::default()
        });
        let made = self.tasks().create(request).await;
        made.with_context(|| format!("The sandbox {id} was not made"))?;
        let request = self.request(api::StartRequest {
            container_id: id.to_owned(),
            exec_id: String::new(),
        });
        let started = self.tasks().start(request).await;
        started.with_context(|| format!("The sandbox {id} did not start"))?;
        Ok(())
    }

    /// Removes every container, snapshot and lease of the benchmark, and the namespace if nothing
    /// else is in it.
    pub async fn remove_all(&self) -> anyhow::Result<()> {
        for id in self.containers().await? {
            self.end(&id).await?;
        }
        let until = Instant::now() + REMOVAL;
        loop {
            // A snapshot goes after those that lie on it.
            let mut refused = None;
            for key in self.snapshots().await? {
                refused = self.remove_snapshot(&key).await.err().or(refused);
            }
            match refused {
                None => break,
                Some(err) if Instant::now() > until => return Err(err),
                Some(_) => tokio::time::sleep(PAUSE).await,
            }
        }
        let request = self.request(api::DeleteRequest {
            id: LEASE.to_owned(),
            sync: true,
        });
        done(self.leases().delete(request).await, Code::NotFound)
            .context("containerd refused to delete the benchmark's lease")?;
        let name = self.namespace.to_str().unwrap_or_default().to_owned();
        let request = self.request(api::DeleteNamespaceRequest { name });
        let mut client = NamespacesClient::new(self.channel.clone());
        match client.delete(request).await {
            // What others have put there stays.
            Err(status) if status.code() == Code::FailedPrecondition => Ok(()),
            other => done(other, Code::NotFound)
                .context("containerd refused to remove the benchmark's namespace"),
        }
    }

    async fn containers(&self) -> anyhow::Result<Vec<String>> {
        let request = self.request(api::ListContainersRequest { filters: filters() });
        let answer = self.containers_client().list(request).await;
        let answer = answer.context("containerd refused to list the benchmark's containers")?;
        let all = answer.into_inner().containers.into_iter();
        Ok(all.map(|container| container.id).collect())
    }

    async fn snapshots(&self) -> anyhow::Result<Vec<String>> {
        let request = self.request(snapshots_api::ListSnapshotsRequest {
            snapshotter: self.snapshotter.clone(),
            filters: filters(),
        });
        let answer = self.snapshots_client().list(request).await;
        let refused = "containerd refused to list the benchmark's snapshots";
        let mut parts = answer.context(refused)?.into_inner();
        let mut keys = Vec::new();
        while let Some(part) = parts.message().await.context(refused)? {
            keys.extend(part.info.into_iter().map(|info| info.name));
        }
        Ok(keys)
    }

    async fn end(&self, id: &str) -> anyhow::Result<()> {
        let until = Instant::now() + REMOVAL;
        loop {
            match self.try_end(id).await {
                // A shim that has just died leaves containerd a moment in which it refuses
                // everything about its tasks.
                Err(_) if Instant::now() < until => tokio::time::sleep(PAUSE).await,
                other => return other.with_context(|| format!("The sandbox {id} was not removed")),
            }
        }
    }

    async fn try_end(&self, id: &str) -> anyhow::Result<()> {
        let request = self.request(api::KillRequest {
            container_id: id.to_owned(),
            signal: KILL,
            ..Default::default()
        });
        done(self.tasks().kill(request).await, Code::NotFound)?;
        let request = self.request(api::WaitRequest {
            container_id: id.to_owned(),
            ..Default::default()
        });
        match tokio::time::timeout(REMOVAL, self.tasks().wait(request)).await {
            Ok(ended) => done(ended, Code::NotFound)?,
            Err(_) => bail!("Its task did not end within {} s", REMOVAL.as_secs()),
        }
        let request = self.request(api::DeleteTaskRequest {
            container_id: id.to_owned(),
        });
        done(self.tasks().delete(request).await, Code::NotFound)?;
        let request = self.request(api::DeleteContainerRequest { id: id.to_owned() });
        done(
            self.containers_client().delete(request).await,
            Code::NotFound,
        )
    }

    fn request<T>(&self, body: T) -> Request<T> {
        let mut request = Request::new(body);
        let metadata = request.metadata_mut();
        metadata.insert("containerd-namespace", self.namespace.clone());
        metadata.insert("containerd-lease", AsciiMetadataValue::from_static(LEASE));
        request
    }

    fn containers_client(&self) -> ContainersClient<Channel> {
        ContainersClient::new(self.channel.clone())
    }

    fn leases(&self) -> LeasesClient<Channel> {
        LeasesClient::new(self.channel.clone())
    }

    fn snapshots_client(&self) -> SnapshotsClient<Channel> {
        SnapshotsClient::new(self.channel.clone())
    }

    fn tasks(&self) -> TasksClient<Channel> {
        TasksClient::new(self.channel.clone())
    }
}

fn labels() -> HashMap<String, String> {
    [(LABEL.to_owned(), "restore".to_owned())].into()
}

fn filters() -> Vec<String> {
    vec![format!("labels.\"{LABEL}\"")]
}

/// An answer without content; `fine` says that there was nothing to do.
fn done<T>(answer: Result<Response<T>, Status>, fine: Code) -> anyhow::Result<()> {
    match answer {
        Err(status) if status.code() != fine => Err(status.into()),
        _ => Ok(()),
    }
}
