//! trenv's sandboxes: all of a containerd namespace, and what they share.
//!
//! [`Sandboxes::create`] takes a network namespace from the pool, starts pid 1 and, for a cold
//! function, swaps the root in; [`container`] is then containerd's view of the sandbox and
//! [`change`] what `trenv.sandbox.v1` does to it.

mod change;
mod container;
mod plan;
mod requests;
mod service;
mod spec;
mod task;
mod tenancy;
mod watch;

use std::collections::HashMap;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use containerd_shim_protos::api::CreateTaskRequest;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::OnceCell;
use trenv_cni::{Netns, NetnsPool, Network, NetworkConfig};
use trenv_config::Config;
use trenv_sandbox::rootfs::{Mount, overlay_from_mounts};
use trenv_sandbox::{CreateRequest, Exits, Rootfs, Sandbox, cgroup};
use trenv_sandbox_proto::SandboxInfo;
use ttrpc::asynchronous::Service;

use container::{Made, SandboxContainer, Waiting};
use requests::Requests;
use spec::{Kind, SandboxSpec};
use tenancy::Seccomp;
pub use tenancy::{Seat, TemplateRef, Tenancy};
use watch::WatchLog;

use crate::error::{Result, ShimError};
use crate::events::Publisher;
use crate::reap::{Child, Exit};
use crate::record::{Record, Records, started};
use crate::runc::blocking;
use crate::serve::{Shim, uris};
use crate::stdio::Uris;
use crate::task::Container;
use crate::template::Templates;

/// The sandboxes of this shim.
pub struct Sandboxes {
    pub config: Arc<Config>,
    pub namespace: String,
    pub publisher: Publisher,
    pub templates: Templates,
    pub watch: WatchLog,
    pub requests: Requests,
    records: Records,
    network: OnceCell<Arc<NetnsPool>>,
    table: Mutex<HashMap<String, Arc<SandboxContainer>>>,
}

/// The service `trenv.sandbox.v1`, to be registered beside containerd's.
pub fn service(shim: &Arc<Shim>) -> HashMap<String, Service> {
    let service = service::SandboxService {
        all: Arc::clone(&shim.sandboxes),
    };
    trenv_sandbox_proto::create_sandbox(Arc::new(service))
}

/// Where the cgroups of a namespace's sandboxes are, below the configured parent.
pub fn cgroup_parent(config: &Config, namespace: &str) -> String {
    format!(
        "{}/{namespace}",
        config.sandbox.cgroup_parent.trim_matches('/')
    )
}

/// The network of this machine's sandboxes.
pub fn open_network(config: &Config) -> Result<Network> {
    // One table for each bridge; the ordinary one is called as the product.
    let table = match config.network.bridge.as_str() {
        "trenv0" => "trenv".to_owned(),
        bridge => format!("trenv_{}", bridge.replace('-', "_")),
    };
    Network::open(&NetworkConfig {
        bridge: config.network.bridge.clone(),
        subnet: config.network.subnet.clone(),
        plugin_dir: config.network.plugin_dir.clone(),
        state_dir: config.state_dir.clone(),
        run_dir: config.run_dir.clone(),
        nft_table: table,
    })
    .map_err(ShimError::engine("open the sandboxes' network"))
}

impl Sandboxes {
    pub fn new(config: Arc<Config>, namespace: &str, publisher: Publisher) -> Arc<Self> {
        Arc::new(Self {
            templates: Templates::new(Arc::clone(&config), cgroup_parent(&config, namespace)),
            records: Records::new(&config, namespace),
            config,
            namespace: namespace.to_owned(),
            publisher,
            watch: WatchLog::new(),
            requests: Requests::default(),
            network: OnceCell::new(),
            table: Mutex::default(),
        })
    }

    /// Creates the sandbox of a containerd container; a failure leaves nothing behind.
    pub async fn create(
        self: &Arc<Self>,
        request: &CreateTaskRequest,
    ) -> Result<Arc<dyn Container>> {
        let bundle = PathBuf::from(&request.bundle);
        let spec = SandboxSpec::load(&bundle, &request.id)?;
        let rootfs = mounts_of(request);
        let pool = Arc::clone(self.network.get_or_try_init(|| self.open()).await?);
        self.note(&request.id, None, None)?;
        let made = self.make(request, bundle, &spec, rootfs, &pool).await;
        tokio::task::spawn_blocking(move || {
            if let Err(err) = pool.refill() {
                tracing::warn!("No network namespaces could be made ahead: {err}");
            }
        });
        let container = match made {
            Ok(container) => container,
            Err(err) => {
                self.records.remove(&request.id)?;
                return Err(err);
            }
        };
        self.lock()
            .insert(request.id.clone(), Arc::clone(&container));
        container.tell("the sandbox was created");
        tracing::info!(
            "Created the sandbox {} at {}, pid 1 is {}",
            request.id,
            container.netns.address(),
            container.sandbox.init_pid()
        );
        Ok(container)
    }

    /// Takes what a dead predecessor left, and opens the pool of network namespaces.
    async fn open(&self) -> Result<Arc<NetnsPool>> {
        let config = Arc::clone(&self.config);
        let parent = cgroup_parent(&config, &self.namespace);
        let pool = blocking(move || {
            match cgroup::sweep(&parent) {
                Ok(0) => {}
                Ok(count) => tracing::warn!("Swept {count} cgroups of a shim that died"),
                Err(err) => tracing::warn!("Some cgroups of a dead shim stay: {err}"),
            }
            let network = open_network(&config)?;
            match network.sweep() {
                Ok(0) => {}
                Ok(count) => tracing::warn!("Swept {count} network namespaces of dead owners"),
                Err(err) => tracing::warn!("Some network namespaces of dead owners stay: {err}"),
            }
            Ok(NetnsPool::new(network, config.network.spare))
        })
        .await?;
        Ok(Arc::new(pool))
    }

    async fn make(
        self: &Arc<Self>,
        request: &CreateTaskRequest,
        bundle: PathBuf,
        spec: &SandboxSpec,
        rootfs: Vec<Mount>,
        pool: &Arc<NetnsPool>,
    ) -> Result<Arc<SandboxContainer>> {
        let (this, id) = (Arc::clone(self), request.id.clone());
        let (wanted, pool) = (spec.clone(), Arc::clone(pool));
        let (sandbox, netns, waiting) =
            blocking(move || this.make_parts(&id, &wanted, rootfs, &pool)).await?;
        let (init, exits) = match watch_init(&sandbox) {
            Ok(watched) => watched,
            Err(err) => {
                let _ = sandbox.destroy();
                let _ = netns.destroy();
                return Err(err);
            }
        };
        self.note(&request.id, Some(&sandbox), None)?;
        let made = Made {
            id: request.id.clone(),
            bundle,
            uris: uris(request),
            sandbox,
            netns,
        };
        let container = SandboxContainer::new(self, spec, made, waiting);
        tokio::spawn(follow_exits(Arc::downgrade(&container), exits));
        let dying = Arc::downgrade(&container);
        tokio::spawn(async move {
            let exit = init.exit().await;
            if let Some(container) = dying.upgrade() {
                container.die(exit, "its pid 1 ended").await;
            }
        });
        Ok(container)
    }

    fn make_parts(
        &self,
        id: &str,
        spec: &SandboxSpec,
        rootfs: Vec<Mount>,
        pool: &NetnsPool,
    ) -> Result<(Sandbox, Netns, Option<Waiting>)> {
        let netns = pool
            .take()
            .map_err(ShimError::engine("make a network namespace"))?;
        let request = CreateRequest {
            id: id.to_owned(),
            netns: netns.path().to_owned(),
            init_binary: self.config.libexec_dir.join("trenv-init"),
            hostname: spec.root.hostname.clone(),
            cgroup_parent: cgroup_parent(&self.config, &self.namespace),
        };
        let sandbox = match Sandbox::create(&request) {
            Ok(sandbox) => sandbox,
            Err(err) => {
                pool.give_back(netns);
                return Err(ShimError::engine("create the sandbox")(err));
            }
        };
        match self.make_waiting(&sandbox, spec, rootfs) {
            Ok(waiting) => Ok((sandbox, netns, waiting)),
            Err(err) => {
                // The first error is the one to report; the sweep gets what stays.
                let _ = sandbox.destroy();
                let _ = netns.destroy();
                Err(err)
            }
        }
    }

    /// Swaps a cold function's root in and makes its cgroup.
    fn make_waiting(
        &self,
        sandbox: &Sandbox,
        spec: &SandboxSpec,
        mounts: Vec<Mount>,
    ) -> Result<Option<Waiting>> {
        let (Kind::Function, Some(process)) = (spec.kind, &spec.process) else {
            return Ok(None);
        };
        let root = Rootfs {
            overlay: overlay_from_mounts(&mounts)
                .map_err(ShimError::engine("mount the function's root"))?,
            parts: spec.root.parts()?,
            read_only: spec.root.read_only,
            hostname: spec.root.hostname.clone(),
            masked_paths: spec.root.masked_paths.clone(),
            readonly_paths: spec.root.readonly_paths.clone(),
        };
        sandbox
            .enter_rootfs(&root)
            .map_err(ShimError::engine("enter the function's root"))?;
        let cgroup = self.templates.tenancy_cgroup(&spec.limits)?;
        Ok(Some(Waiting {
            tenancy: spec.tenancy.clone(),
            process: process.clone(),
            seccomp: spec.seccomp.clone().map(Seccomp::Read),
            seat: Arc::new(Seat::plain(cgroup)),
            mounts,
        }))
    }

    /// The sandbox of an id.
    pub fn get(&self, id: &str) -> Result<Arc<SandboxContainer>> {
        self.lock()
            .get(id)
            .cloned()
            .ok_or_else(|| ShimError::NotFound {
                kind: "sandbox",
                id: id.to_owned(),
            })
    }

    /// All sandboxes.
    pub fn list(&self) -> Vec<SandboxInfo> {
        let all: Vec<Arc<SandboxContainer>> = self.lock().values().cloned().collect();
        all.iter().map(|container| container.info()).collect()
    }

    /// Forgets a deleted sandbox.
    pub fn forget(&self, id: &str) -> Result<()> {
        self.lock().remove(id);
        self.records.remove(id)
    }

    /// Notes durably how a sandbox ended, for a `delete` without a shim.
    pub fn note_exit(&self, container: &SandboxContainer, exit: Exit) {
        if let Err(err) = self.note(&container.id, Some(&container.sandbox), Some(exit.status)) {
            tracing::warn!(
                "The end of {} could not be noted: {}",
                container.id,
                err.chain()
            );
        }
    }

    fn note(&self, id: &str, sandbox: Option<&Sandbox>, exit_status: Option<u32>) -> Result<()> {
        let init_pid = sandbox.map_or(0, |sandbox| sandbox.init_pid().cast_unsigned());
        self.records.write(&Record {
            id: id.to_owned(),
            init_pid,
            init_started: started(init_pid).unwrap_or(0),
            exit_status,
        })
    }

    /// Where a function's streams go: what containerd named, else the function's own log.
    pub fn function_uris(&self, id: &str, named: &Uris) -> Uris {
        let mut uris = named.clone();
        if uris.stdout.is_empty() && uris.stderr.is_empty() && !uris.terminal {
            let name = format!("{}.log", id.replace('/', "_"));
            let path = self
                .config
                .run_dir
                .join("logs")
                .join(&self.namespace)
                .join(name);
            uris.stdout = format!("file://{}", path.display());
            uris.stderr.clone_from(&uris.stdout);
        }
        uris
    }

    /// Frees what is kept ready, before the shim ends.
    pub async fn free(self: &Arc<Self>) {
        let this = Arc::clone(self);
        let free = tokio::task::spawn_blocking(move || {
            this.templates.free();
            if let Some(pool) = this.network.get()
                && let Err(err) = pool.drain()
            {
                tracing::warn!("Some spare network namespaces stay until the next sweep: {err}");
            }
            // Removes the parents when they are empty; spares are gone by now.
            let _ = cgroup::sweep(&cgroup_parent(&this.config, &this.namespace));
        });
        if tokio::time::timeout(Duration::from_millis(2500), free)
            .await
            .is_err()
        {
            tracing::warn!("Freeing the spares took too long; the next shim sweeps them");
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Arc<SandboxContainer>>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn mounts_of(request: &CreateTaskRequest) -> Vec<Mount> {
    request
        .rootfs
        .iter()
        .map(|mount| Mount {
            kind: mount.type_.clone(),
            source: mount.source.clone(),
            options: mount.options.clone(),
        })
        .collect()
}

fn watch_init(sandbox: &Sandbox) -> Result<(Child, Exits)> {
    let init = Child::watch(sandbox.init_pid())?;
    let exits = sandbox
        .exits()
        .map_err(ShimError::engine("follow the sandbox's processes"))?;
    Ok((init, exits))
}

/// Hands the exits that pid 1 reports to the sandbox, until pid 1 is gone.
async fn follow_exits(container: std::sync::Weak<SandboxContainer>, exits: Exits) {
    let Ok(copy) = exits.as_fd().try_clone_to_owned() else {
        return;
    };
    // SAFETY: an owned descriptor stays the same file for as long as it lives.
    let Ok(ready) = (unsafe { AsyncFd::register_with_interest(copy, Interest::READABLE) }) else {
        return;
    };
    while let Ok(mut guard) = ready.readable().await {
        match exits.next_within(Duration::ZERO) {
            Ok(Some(exit)) => {
                let Some(container) = container.upgrade() else {
                    return;
                };
                let status = exit.status.code().unsigned_abs();
                container.reported(exit.pid_in_sandbox, Exit::now(status));
            }
            Err(err) if err.kind() == std::io::ErrorKind::TimedOut => guard.clear_ready(),
            Ok(None) | Err(_) => break,
        }
    }
    if let Some(container) = container.upgrade() {
        container.thaw_dying().await;
    }
}
