//! The shim's own service, asked as the provider asks it.

use std::time::Duration;

use trenv_sandbox_proto as proto;
use ttrpc::context;

use super::{Containerd, hierarchies};

/// A client of `trenv.sandbox.v1`, and the runtime that it lives in.
pub struct Service {
    pub runtime: tokio::runtime::Runtime,
    pub sandboxes: proto::SandboxClient,
}

/// A template as an answer names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Template {
    pub id: String,
    pub generation: u64,
}

pub fn client(address: &str) -> (tokio::runtime::Runtime, proto::SandboxClient) {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap();
    let client = runtime
        .block_on(ttrpc::asynchronous::Client::connect(address))
        .unwrap();
    (runtime, proto::SandboxClient::new(client))
}

pub fn limit() -> context::Context {
    context::with_duration(Duration::from_secs(60))
}

/// Mounts of an active snapshot over the test's root file system.
pub fn active(containerd: &Containerd, name: &str) -> Vec<proto::Mount> {
    let upper = containerd.path(&format!("{name}-upper"));
    let work = containerd.path(&format!("{name}-work"));
    std::fs::create_dir_all(&upper).unwrap();
    std::fs::create_dir_all(&work).unwrap();
    vec![proto::Mount {
        type_: "overlay".into(),
        source: "overlay".into(),
        options: vec![
            format!("workdir={}", work.display()),
            format!("upperdir={}", upper.display()),
            format!("lowerdir={}", containerd.path("rootfs").display()),
        ],
        ..proto::Mount::default()
    }]
}

/// A request for a start as `name`, which is also the request's id.
pub fn start_request(
    containerd: &Containerd,
    sandbox: &str,
    name: &str,
    template: &Template,
) -> proto::RepurposeRequest {
    proto::RepurposeRequest {
        request_id: name.into(),
        sandbox_id: sandbox.into(),
        tenancy: name.into(),
        template_id: template.id.clone(),
        generation: template.generation,
        rootfs: active(containerd, name),
        ..proto::RepurposeRequest::default()
    }
}

/// The status code of a refusal.
pub fn code<T: std::fmt::Debug>(answer: ttrpc::Result<T>) -> ttrpc::Code {
    match answer {
        Err(ttrpc::Error::RpcStatus(status)) => status.code(),
        other => panic!("a status was expected: {other:?}"),
    }
}

impl Service {
    pub fn connect(containerd: &Containerd) -> Self {
        let (runtime, sandboxes) = client(&containerd.shim_address());
        Self { runtime, sandboxes }
    }

    /// Snapshots the cold function of a sandbox, which is idle afterwards.
    pub fn snapshot(&self, containerd: &Containerd, sandbox: &str) -> Template {
        self.snapshot_as(containerd, sandbox, sandbox)
    }

    /// Snapshots the function of a sandbox, under another key than the sandbox's.
    pub fn snapshot_as(&self, containerd: &Containerd, sandbox: &str, key: &str) -> Template {
        let request = proto::SnapshotRequest {
            request_id: format!("snapshot-{key}"),
            sandbox_id: sandbox.into(),
            key: key.into(),
            ..proto::SnapshotRequest::default()
        };
        let done = self
            .runtime
            .block_on(self.sandboxes.snapshot(limit(), &request))
            .unwrap_or_else(|err| panic!("{err}\n{}", containerd.logs()));
        Template {
            id: done.template_id,
            generation: done.generation,
        }
    }

    pub fn prepare(&self, containerd: &Containerd, template: &Template, limits: &proto::Limits) {
        self.prepare_from(containerd, template, limits, None);
    }

    /// Has the zygote of a template made, from that of a base if there is one.
    pub fn prepare_from(
        &self,
        containerd: &Containerd,
        template: &Template,
        limits: &proto::Limits,
        base: Option<&Template>,
    ) {
        let base = base.map(|base| proto::Base {
            template_id: base.id.clone(),
            generation: base.generation,
            rootfs: active(containerd, "view"),
            ..proto::Base::default()
        });
        let request = proto::PrepareRequest {
            base: base.into(),
            request_id: format!("prepare-{}", template.id),
            template_id: template.id.clone(),
            generation: template.generation,
            rootfs: active(containerd, "view"),
            limits: Some(limits.clone()).into(),
            spares: 2,
            ..proto::PrepareRequest::default()
        };
        self.runtime
            .block_on(self.sandboxes.prepare(limit(), &request))
            .unwrap_or_else(|err| panic!("{err}\n{}", containerd.logs()));
    }

    pub fn repurpose(
        &self,
        request: &proto::RepurposeRequest,
    ) -> ttrpc::Result<proto::RepurposeResponse> {
        self.runtime
            .block_on(self.sandboxes.repurpose(limit(), request))
    }

    pub fn reset(&self, sandbox: &str, request_id: &str) -> ttrpc::Result<proto::ResetResponse> {
        let request = proto::ResetRequest {
            request_id: request_id.into(),
            sandbox_id: sandbox.into(),
            ..proto::ResetRequest::default()
        };
        self.runtime
            .block_on(self.sandboxes.reset(limit(), &request))
    }

    pub fn info(&self, sandbox: &str) -> proto::SandboxInfo {
        let list = self
            .runtime
            .block_on(self.sandboxes.list(limit(), &proto::ListRequest::default()))
            .unwrap();
        list.sandboxes
            .into_iter()
            .find(|info| info.id == sandbox)
            .unwrap_or_else(|| panic!("the shim does not list {sandbox}"))
    }

    pub fn state(&self, sandbox: &str) -> proto::State {
        self.info(sandbox).state.enum_value().unwrap()
    }

    /// How often a sandbox's state has changed for this reason.
    pub fn changes(&self, sandbox: &str, reason: &str) -> usize {
        let watched = self
            .runtime
            .block_on(
                self.sandboxes
                    .watch(limit(), &proto::WatchRequest::default()),
            )
            .unwrap();
        watched
            .events
            .iter()
            .filter(|event| event.sandbox.id == sandbox && event.reason == reason)
            .count()
    }
}

/// Pids in the cgroups of zygotes.
pub fn zygotes(containerd: &Containerd) -> Vec<i32> {
    pids_below(containerd, "default/zygotes", "")
}

/// Pids in the cgroups of tenancies: functions, and the agents that wait there.
pub fn seated(containerd: &Containerd) -> Vec<i32> {
    pids_below(containerd, "default", "tenancy-")
}

/// Pids in the cgroups of a directory whose names begin so.
fn pids_below(containerd: &Containerd, directory: &str, prefix: &str) -> Vec<i32> {
    let mut pids: Vec<i32> = hierarchies()
        .into_iter()
        .map(|one| one.join(containerd.cgroup_parent()).join(directory))
        .filter_map(|parent| std::fs::read_dir(parent).ok())
        .flat_map(|groups| groups.flatten())
        .filter(|group| group.file_name().to_string_lossy().starts_with(prefix))
        .filter_map(|group| std::fs::read_to_string(group.path().join("cgroup.procs")).ok())
        .flat_map(|list| {
            list.lines()
                .filter_map(|pid| pid.parse().ok())
                .collect::<Vec<_>>()
        })
        .collect();
    pids.sort_unstable();
    pids.dedup();
    pids
}
