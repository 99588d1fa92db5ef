//! containerd over its socket, as far as snapshots by hand and the benchmark of restores need it, and
//! what else of the command does.

use std::collections::HashMap;

use anyhow::{Context, bail};
use containerd_client::services::v1 as services;
use containerd_client::services::v1::container::Runtime;
use containerd_client::services::v1::containers_client::ContainersClient;
use containerd_client::services::v1::leases_client::LeasesClient;
use containerd_client::services::v1::namespaces_client::NamespacesClient;
use containerd_client::services::v1::snapshots as layers;
use containerd_client::services::v1::snapshots::snapshots_client::SnapshotsClient;
use containerd_client::services::v1::tasks_client::TasksClient;
use containerd_client::tonic::transport::Channel;
use containerd_client::tonic::{Code, Request, Status};
use containerd_client::types::Mount;
use prost_types::{Any, FieldMask};
use trenv_config::Config;
use trenv_sandbox_proto as proto;

pub use containerd_client::services::v1::Container;

/// The runtime whose containers can be snapshotted.
pub const RUNTIME: &str = "io.containerd.trenv.v2";
const SPEC_TYPE: &str = "types.containerd.io/opencontainers/runtime-spec/1/Spec";

/// One namespace of containerd.
#[derive(Debug, Clone)]
pub struct Containerd {
    channel: Channel,
    pub namespace: String,
    snapshotter: String,
    /// Keeps what is made from containerd's garbage collection.
    lease: Option<String>,
    /// Of all that is made.
    labels: HashMap<String, String>,
}

/// Where a task's streams go; empty is nowhere.
#[derive(Debug, Default)]
pub struct Streams {
    pub input: String,
    pub output: String,
    pub error: String,
}

/// Connects to the containerd that the configuration names.
async fn open(config: &Config) -> anyhow::Result<Channel> {
    let address = &config.containerd.address;
    containerd_client::connect(address).await.with_context(|| {
        format!(
            "Failed to connect to containerd at {}; check that it runs and the setting containerd.address",
            address.display()
        )
    })
}

impl Containerd {
    pub async fn connect(config: &Config, namespace: &str) -> anyhow::Result<Self> {
        Ok(Self {
            channel: open(config).await?,
            namespace: namespace.to_owned(),
            snapshotter: config.containerd.snapshotter.clone(),
            lease: None,
            labels: HashMap::new(),
        })
    }

    /// The same, with what it makes under a lease of this name and with these labels.
    pub fn leased(self, lease: &str, labels: HashMap<String, String>) -> Self {
        let lease = Some(lease.to_owned());
        Self {
            lease,
            labels,
            ..self
        }
    }

    fn request<T>(&self, body: T) -> anyhow::Result<Request<T>> {
        let mut request = Request::new(body);
        let name = self.namespace.parse().with_context(|| {
            format!("{:?} is no name of a containerd namespace", self.namespace)
        })?;
        request.metadata_mut().insert("containerd-namespace", name);
        if let Some(lease) = &self.lease {
            let name = lease
                .parse()
                .with_context(|| format!("{lease:?} is no name of a containerd lease"))?;
            request.metadata_mut().insert("containerd-lease", name);
        }
        Ok(request)
    }

    /// Labels of a layer that stays until it is removed.
    fn kept(&self) -> HashMap<String, String> {
        let mut labels = self.labels.clone();
        // Its value only tells people something.
        labels.insert("containerd.io/gc.root".to_owned(), "trenv".to_owned());
        labels
    }

    fn leases(&self) -> LeasesClient<Channel> {
        LeasesClient::new(self.channel.clone())
    }

    fn containers(&self) -> ContainersClient<Channel> {
        ContainersClient::new(self.channel.clone())
    }

    fn layers(&self) -> SnapshotsClient<Channel> {
        SnapshotsClient::new(self.channel.clone())
    }

    fn tasks(&self) -> TasksClient<Channel> {
        TasksClient::new(self.channel.clone())
    }

    /// The record of a container, if there is one.
    pub async fn container(&self, id: &str) -> anyhow::Result<Option<Container>> {
        let request = self.request(services::GetContainerRequest { id: id.to_owned() })?;
        match self.containers().get(request).await {
            Ok(answer) => Ok(answer.into_inner().container),
            Err(status) if status.code() == Code::NotFound => Ok(None),
            Err(status) => Err(refused(format!("describe the container {id}"))(status)),
        }
    }

    /// Records that carry a label.
    pub async fn labelled(&self, label: &str) -> anyhow::Result<Vec<Container>> {
        let request = self.request(services::ListContainersRequest {
            filters: vec![format!("labels.\"{label}\"")],
        })?;
        let answer = self.containers().list(request).await;
        Ok(answer
            .map_err(refused("list containers"))?
            .into_inner()
            .containers)
    }

    /// A record like `like`, with another id, spec, snapshot and labels.
    pub async fn create_container(
        &self,
        like: &Container,
        id: &str,
        spec: Vec<u8>,
        layer: &str,
        labels: HashMap<String, String>,
    ) -> anyhow::Result<Container> {
        let container = Container {
            labels,
            image: like.image.clone(),
            snapshot_key: layer.to_owned(),
            ..self.record(id, spec)
        };
        self.add_container(container).await
    }

    /// The record of a container that our runtime runs.
    pub fn record(&self, id: &str, spec: Vec<u8>) -> Container {
        Container {
            id: id.to_owned(),
            labels: self.labels.clone(),
            runtime: Some(Runtime {
                name: RUNTIME.to_owned(),
                options: None,
            }),
            spec: Some(any_spec(spec)),
            snapshotter: self.snapshotter.clone(),
            ..Container::default()
        }
    }

    pub async fn add_container(&self, container: Container) -> anyhow::Result<Container> {
        let action = format!("make the container {}", container.id);
        let request = self.request(services::CreateContainerRequest {
            container: Some(container),
        })?;
        let made = self.containers().create(request).await;
        let made = made.map_err(refused(action))?;
        made.into_inner()
            .container
            .context("containerd made a container and does not tell it")
    }

    /// Replaces the spec of a record.
    pub async fn set_spec(&self, mut container: Container, spec: Vec<u8>) -> anyhow::Result<()> {
        let action = format!("update the container {}", container.id);
        container.spec = Some(any_spec(spec));
        let request = self.request(services::UpdateContainerRequest {
            container: Some(container),
            update_mask: Some(FieldMask {
                paths: vec!["spec".to_owned()],
            }),
        })?;
        self.containers()
            .update(request)
            .await
            .map_err(refused(action))?;
        Ok(())
    }

    pub async fn delete_container(&self, id: &str) -> anyhow::Result<()> {
        let request = self.request(services::DeleteContainerRequest { id: id.to_owned() })?;
        let answer = self.containers().delete(request).await;
        unless_gone(answer.map(drop), format!("delete the container {id}"))
    }

    /// Makes a writable layer over `parent`, which a record of that id keeps; its mounts.
    pub async fn prepare_layer(&self, key: &str, parent: &str) -> anyhow::Result<Vec<Mount>> {
        self.prepare(key, parent, self.labels.clone()).await
    }

    /// Makes a writable layer beside the layer `of`, with the same parent; its mounts. It stays until
    /// it is removed.
    pub async fn prepare_beside(&self, key: &str, of: &str) -> anyhow::Result<Vec<Mount>> {
        let request = self.request(layers::StatSnapshotRequest {
            snapshotter: self.snapshotter.clone(),
            key: of.to_owned(),
        })?;
        let answer = self.layers().stat(request).await;
        let answer = answer.map_err(refused(format!("describe the layer {of}")))?;
        let parent = answer.into_inner().info.unwrap_or_default().parent;
        self.prepare(key, &parent, self.kept()).await
    }

    async fn prepare(
        &self,
        key: &str,
        parent: &str,
        labels: HashMap<String, String>,
    ) -> anyhow::Result<Vec<Mount>> {
        let request = self.request(layers::PrepareSnapshotRequest {
            snapshotter: self.snapshotter.clone(),
            key: key.to_owned(),
            parent: parent.to_owned(),
            labels,
        })?;
        let answer = self.layers().prepare(request).await;
        let answer = answer.map_err(refused(format!("make the layer {key}")))?;
        Ok(answer.into_inner().mounts)
    }

    /// Makes a read-only view of `parent`; its mounts.
    pub async fn view_layer(&self, key: &str, parent: &str) -> anyhow::Result<Vec<Mount>> {
        let request = self.request(layers::ViewSnapshotRequest {
            snapshotter: self.snapshotter.clone(),
            key: key.to_owned(),
            parent: parent.to_owned(),
            labels: self.labels.clone(),
        })?;
        let answer = self.layers().view(request).await;
        let answer = answer.map_err(refused(format!("make the view {key}")))?;
        Ok(answer.into_inner().mounts)
    }

    /// Names of the layers that carry a label.
    pub async fn labelled_layers(&self, label: &str) -> anyhow::Result<Vec<String>> {
        let layers = self.layers_labelled(label).await?;
        Ok(layers.into_iter().map(|(name, _)| name).collect())
    }

    /// Names and labels of the layers that carry a label.
    pub async fn layers_labelled(
        &self,
        label: &str,
    ) -> anyhow::Result<Vec<(String, HashMap<String, String>)>> {
        let request = self.request(layers::ListSnapshotsRequest {
            snapshotter: self.snapshotter.clone(),
            filters: vec![format!("labels.\"{label}\"")],
        })?;
        let answer = self.layers().list(request).await;
        let mut parts = answer.map_err(refused("list layers"))?.into_inner();
        let mut layers = Vec::new();
        while let Some(part) = parts.message().await.map_err(refused("list layers"))? {
            layers.extend(part.info.into_iter().map(|info| (info.name, info.labels)));
        }
        Ok(layers)
    }

    /// Turns the writable layer `key` into the layer `name`, which stays until it is removed.
    pub async fn commit_layer(&self, name: &str, key: &str) -> anyhow::Result<()> {
        self.commit_labelled(name, key, HashMap::new()).await
    }

    /// The same, with more labels.
    pub async fn commit_labelled(
        &self,
        name: &str,
        key: &str,
        labels: HashMap<String, String>,
    ) -> anyhow::Result<()> {
        let mut all = self.kept();
        all.extend(labels);
        let request = self.request(layers::CommitSnapshotRequest {
            snapshotter: self.snapshotter.clone(),
            name: name.to_owned(),
            key: key.to_owned(),
            labels: all,
        })?;
        let answer = self.layers().commit(request).await;
        answer.map_err(refused(format!("commit the layer {key} as {name}")))?;
        Ok(())
    }

    pub async fn remove_layer(&self, key: &str) -> anyhow::Result<()> {
        let answer = self.ask_to_remove(key).await?;
        unless_gone(answer, format!("remove the layer {key}"))
    }

    async fn ask_to_remove(&self, key: &str) -> anyhow::Result<Result<(), Status>> {
        let request = self.request(layers::RemoveSnapshotRequest {
            snapshotter: self.snapshotter.clone(),
            key: key.to_owned(),
        })?;
        Ok(self.layers().remove(request).await.map(drop))
    }

    /// Removes a layer, or leaves it to containerd's garbage collection where others are based on it.
    pub async fn leave_layer(&self, key: &str) -> anyhow::Result<()> {
        match self.ask_to_remove(key).await? {
            Err(status) if status.code() == Code::FailedPrecondition => {}
            answer => return unless_gone(answer, format!("remove the layer {key}")),
        }
        let request = self.request(layers::UpdateSnapshotRequest {
            snapshotter: self.snapshotter.clone(),
            info: Some(layers::Info {
                name: key.to_owned(),
                ..layers::Info::default()
            }),
            update_mask: Some(FieldMask {
                paths: vec!["labels".to_owned()],
            }),
        })?;
        let answer = self.layers().update(request).await;
        unless_gone(answer.map(drop), format!("give the layer {key} up"))
    }

    pub async fn create_task(&self, id: &str, streams: &Streams) -> anyhow::Result<()> {
        self.create_task_in(id, streams, &[]).await
    }

    /// Makes a task in these mounts instead of the container's own layer.
    pub async fn create_task_in(
        &self,
        id: &str,
        streams: &Streams,
        rootfs: &[Mount],
    ) -> anyhow::Result<()> {
        let request = self.request(services::CreateTaskRequest {
            container_id: id.to_owned(),
            rootfs: rootfs.to_vec(),
            stdin: streams.input.clone(),
            stdout: streams.output.clone(),
            stderr: streams.error.clone(),
            ..Default::default()
        })?;
        let answer = self.tasks().create(request).await;
        answer.map_err(refused(format!("make the task of {id}")))?;
        Ok(())
    }

    pub async fn start_task(&self, id: &str) -> anyhow::Result<()> {
        let request = self.request(services::StartRequest {
            container_id: id.to_owned(),
            exec_id: String::new(),
        })?;
        let answer = self.tasks().start(request).await;
        answer.map_err(refused(format!("start the task of {id}")))?;
        Ok(())
    }

    pub async fn kill_task(&self, id: &str, signal: i32) -> anyhow::Result<()> {
        let request = self.request(services::KillRequest {
            container_id: id.to_owned(),
            signal: signal.unsigned_abs(),
            ..Default::default()
        })?;
        let answer = self.tasks().kill(request).await;
        unless_gone(answer.map(drop), format!("signal the task of {id}"))
    }

    /// Waits for a task's end; its status.
    pub async fn wait_task(&self, id: &str) -> anyhow::Result<u32> {
        let request = self.request(services::WaitRequest {
            container_id: id.to_owned(),
            exec_id: String::new(),
        })?;
        let answer = self.tasks().wait(request).await;
        let answer = answer.map_err(refused(format!("wait for the task of {id}")))?;
        Ok(answer.into_inner().exit_status)
    }

    pub async fn delete_task(&self, id: &str) -> anyhow::Result<()> {
        let request = self.request(services::DeleteTaskRequest {
            container_id: id.to_owned(),
        })?;
        let answer = self.tasks().delete(request).await;
        unless_gone(answer.map(drop), format!("delete the task of {id}"))
    }

    /// Makes the lease that all goes under.
    pub async fn create_lease(&self) -> anyhow::Result<()> {
        let Some(lease) = &self.lease else {
            return Ok(());
        };
        let request = self.request(services::CreateRequest {
            id: lease.clone(),
            labels: self.labels.clone(),
        })?;
        match self.leases().create(request).await {
            Err(status) if status.code() != Code::AlreadyExists => {
                bail!(refused(format!("make the lease {lease}"))(status))
            }
            _ => Ok(()),
        }
    }

    pub async fn delete_lease(&self) -> anyhow::Result<()> {
        let Some(lease) = &self.lease else {
            return Ok(());
        };
        let request = self.request(services::DeleteRequest {
            id: lease.clone(),
            sync: true,
        })?;
        let answer = self.leases().delete(request).await;
        unless_gone(answer.map(drop), format!("delete the lease {lease}"))
    }

    /// Removes the namespace, unless something is in it.
    pub async fn delete_namespace(&self) -> anyhow::Result<()> {
        let name = self.namespace.clone();
        let action = format!("remove the namespace {name}");
        let request = self.request(services::DeleteNamespaceRequest { name })?;
        let mut namespaces = NamespacesClient::new(self.channel.clone());
        match namespaces.delete(request).await {
            Err(status) if status.code() == Code::FailedPrecondition => Ok(()),
            answer => unless_gone(answer.map(drop), action),
        }
    }
}

/// Mounts as a shim takes them.
pub fn wire(mounts: Vec<Mount>) -> Vec<proto::Mount> {
    let mounts = mounts.into_iter();
    mounts
        .map(|mount| proto::Mount {
            type_: mount.r#type,
            source: mount.source,
            target: mount.target,
            options: mount.options,
            ..proto::Mount::default()
        })
        .collect()
}

fn any_spec(value: Vec<u8>) -> Any {
    Any {
        type_url: SPEC_TYPE.to_owned(),
        value,
    }
}

fn refused(action: impl Into<String>) -> impl FnOnce(Status) -> anyhow::Error {
    let action = action.into();
    move |status| anyhow::anyhow!("containerd refused to {action}: {}", status.message())
}

fn unless_gone(answer: Result<(), Status>, action: String) -> anyhow::Result<()> {
    match answer {
        Err(status) if status.code() != Code::NotFound => bail!(refused(action)(status)),
        _ => Ok(()),
    }
}
