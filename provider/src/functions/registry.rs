//! The functions of this machine: accept, update, scale, remove, find.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::store::FunctionRecord;
use super::{
    Deployment, FunctionName, Process, Revision, RevisionRecord, RevisionState, StartMethod, Store,
    StoreError, criu, device, function_key,
};
use crate::containerd::{ContainerdError, ImageError, Mount};
use crate::error::chain;
use crate::instances::{HOUSEKEEPING_PAUSE, Host, OWNER_LABEL, Scheduler};
use crate::secrets::{SecretError, Secrets};
use crate::spec::{self, SharedFiles};

/// The annotation that names another path for the readiness check.
const READY_PATH_ANNOTATION: &str = "com.openfaas.ready.http.path";

/// Why a function cannot be deployed, changed or removed.
#[derive(Debug, thiserror::Error)]
pub enum FunctionError {
    #[error("{0}")]
    Invalid(String),
    #[error("There is no function {0}; deploy it first")]
    Unknown(FunctionName),
    #[error(
        "The function {function} asks for the secret {secret}, which does not exist; create it with POST /system/secrets"
    )]
    NoSecret {
        function: FunctionName,
        secret: String,
    },
    #[error(transparent)]
    Image(#[from] ImageError),
    #[error(transparent)]
    Containerd(#[from] ContainerdError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Secret(#[from] SecretError),
}

impl FunctionError {
    /// Whether the caller can mend it by another request.
    pub fn is_callers(&self) -> bool {
        matches!(
            self,
            Self::Invalid(_)
                | Self::NoSecret { .. }
                | Self::Image(
                    ImageError::Unknown { .. }
                        | ImageError::Platform { .. }
                        | ImageError::Document { .. }
                )
        )
    }
}

/// What changes over a function's life.
#[derive(Debug)]
pub(super) struct Inner {
    pub deployment: Deployment,
    pub current: Arc<Revision>,
    pub pending: Option<(Deployment, Arc<Revision>)>,
    pub failure: Option<String>,
    pub replicas: Option<u32>,
    pub removed: bool,
}

/// A deployed function.
#[derive(Debug)]
pub struct Function {
    pub name: FunctionName,
    pub created_at: u64,
    /// Calls since the provider started.
    pub calls: AtomicU64,
    pub(super) inner: Mutex<Inner>,
}

/// A function as answers show it.
#[derive(Debug, Clone)]
pub struct FunctionView {
    pub deployment: Deployment,
    pub current: Arc<Revision>,
    pub state: RevisionState,
    /// Whether an update is being built.
    pub updating: bool,
    pub failure: Option<String>,
    pub replicas: Option<u32>,
}

impl Function {
    pub(super) fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// The revision that serves.
    pub fn current(&self) -> Arc<Revision> {
        Arc::clone(&self.lock().current)
    }

    /// A call begins; a function that was scaled to zero may have instances again.
    pub fn count_call(&self) -> bool {
        self.calls.fetch_add(1, Ordering::Relaxed);
        let mut inner = self.lock();
        let from_zero = inner.replicas == Some(0);
        if from_zero {
            inner.replicas = None;
        }
        from_zero
    }

    /// Everything that an answer may show.
    pub fn view(&self) -> FunctionView {
        let inner = self.lock();
        FunctionView {
            deployment: inner.deployment.clone(),
            current: Arc::clone(&inner.current),
            state: inner.current.state(),
            updating: inner.pending.is_some(),
            failure: inner.failure.clone(),
            replicas: inner.replicas,
        }
    }

    pub(super) fn record(&self) -> FunctionRecord {
        let inner = self.lock();
        FunctionRecord {
            name: self.name.clone(),
            deployment: inner.deployment.clone(),
            created_at: self.created_at,
            revision: inner.current.record.clone(),
            state: inner.current.state(),
            pending: inner.pending.as_ref().map(|(d, _)| d.clone()),
            failure: inner.failure.clone(),
            replicas: inner.replicas,
        }
    }
}

/// All functions.
#[derive(Debug)]
pub struct Functions {
    pub(super) host: Arc<Host>,
    pub(super) scheduler: Arc<Scheduler>,
    pub(super) store: Store,
    secrets: Arc<Secrets>,
    files: SharedFiles,
    pool_on_device: bool,
    pub(super) map: Mutex<BTreeMap<FunctionName, Arc<Function>>>,
    /// Changes of the set of functions happen one at a time.
    pub(super) changing: tokio::sync::Mutex<()>,
    /// How long a replaced revision's last calls may take.
    pub(super) drain: Duration,
}

impl Functions {
    /// A registry over `store`, still empty; [`super::recover()`] fills it.
    pub fn new(
        host: Arc<Host>,
        scheduler: Arc<Scheduler>,
        store: Store,
        secrets: Arc<Secrets>,
        files: SharedFiles,
        pool_on_device: bool,
        drain: Duration,
    ) -> Arc<Self> {
        Arc::new(Self {
            host,
            scheduler,
            store,
            secrets,
            files,
            pool_on_device,
            map: Mutex::default(),
            changing: tokio::sync::Mutex::default(),
            drain,
        })
    }

    pub(super) fn map(&self) -> MutexGuard<'_, BTreeMap<FunctionName, Arc<Function>>> {
        self.map.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// The function `name`.
    pub fn get(&self, name: &FunctionName) -> Option<Arc<Function>> {
        self.map().get(name).cloned()
    }

    /// The functions of a namespace, or of all.
    pub fn list(&self, namespace: Option<&str>) -> Vec<Arc<Function>> {
        self.map()
            .values()
            .filter(|f| namespace.is_none_or(|n| f.name.namespace == n))
            .cloned()
            .collect()
    }

    /// Accepts a function, new or not; it is built in the background.
    ///
    /// # Errors
    /// When the deployment cannot be accepted; nothing has changed then.
    pub async fn deploy(self: &Arc<Self>, deployment: Deployment) -> Result<(), FunctionError> {
        let _changing = self.changing.lock().await;
        let name = name_of(&deployment);
        match self.get(&name) {
            Some(function) => self.replace(&function, deployment).await,
            None => self.add(name, deployment).await,
        }
    }

    /// Accepts a change of a function that exists.
    ///
    /// # Errors
    /// As [`Functions::deploy`], and when there is no such function.
    pub async fn update(self: &Arc<Self>, deployment: Deployment) -> Result<(), FunctionError> {
        let _changing = self.changing.lock().await;
        let name = name_of(&deployment);
        let function = self.get(&name).ok_or(FunctionError::Unknown(name))?;
        self.replace(&function, deployment).await
    }

    async fn add(
        self: &Arc<Self>,
        name: FunctionName,
        deployment: Deployment,
    ) -> Result<(), FunctionError> {
        let revision = Arc::new(self.make_revision(&deployment).await?);
        let function = Arc::new(Function {
            name: name.clone(),
            created_at: now(),
            calls: AtomicU64::new(0),
            inner: Mutex::new(Inner {
                deployment,
                current: Arc::clone(&revision),
                pending: None,
                failure: None,
                replicas: None,
                removed: false,
            }),
        });
        if let Err(err) = self.store.put(&function.record()) {
            self.drop_lease(&revision).await;
            return Err(err.into());
        }
        self.scheduler.serve_namespace(&name.namespace);
        self.map().insert(name, Arc::clone(&function));
        self.spawn_build(&function, &revision);
        Ok(())
    }

    async fn replace(
        self: &Arc<Self>,
        function: &Arc<Function>,
        deployment: Deployment,
    ) -> Result<(), FunctionError> {
        let revision = Arc::new(self.make_revision(&deployment).await?);
        let (current, superseded) = {
            let mut inner = function.lock();
            (Arc::clone(&inner.current), inner.pending.take())
        };
        if let Some((_, old)) = superseded {
            old.retire();
        }
        let same = function_key(&current.key_parts()) == function_key(&revision.key_parts())
            && current.record.ready_path == revision.record.ready_path
            && (current.record.criu || !revision.record.criu)
            && !self.has_newer_base(&current);
        let usable = matches!(
            current.state(),
            RevisionState::Ready(_) | RevisionState::Building
        );
        if same && usable {
            // Nothing that a start sees has changed: labels, annotations and the like only.
            current.set_concurrency(revision.concurrency());
            let method = revision.methods.now();
            if current.methods.set(method) != method && !method.parks() {
                self.scheduler.end_parked(&current);
            }
            {
                let mut inner = function.lock();
                inner.deployment = deployment;
                inner.failure = None;
            }
            self.drop_lease(&revision).await;
        } else {
            function.lock().pending = Some((deployment, Arc::clone(&revision)));
            self.spawn_build(function, &revision);
        }
        self.store.put(&function.record())?;
        Ok(())
    }

    /// Builds again the functions that use a secret which has changed.
    pub async fn secret_changed(self: &Arc<Self>, namespace: &str, secret: &str) {
        for function in self.list(Some(namespace)) {
            let deployment = function.view().deployment;
            if deployment.secrets.iter().any(|s| s == secret)
                && let Err(err) = self.update(deployment).await
            {
                tracing::warn!(
                    "The function {} keeps its old secret {secret}: {}",
                    function.name,
                    chain(&err)
                );
            }
        }
    }

    /// Sets how many instances a function keeps.
    ///
    /// # Errors
    /// When there is no such function, or it cannot be stored.
    pub async fn scale(
        self: &Arc<Self>,
        name: &FunctionName,
        replicas: u32,
    ) -> Result<(), FunctionError> {
        let function = self
            .get(name)
            .ok_or_else(|| FunctionError::Unknown(name.clone()))?;
        function.lock().replicas = Some(replicas);
        self.store.put(&function.record())?;
        self.scheduler.set_floor(name, Some(replicas));
        let revision = function.current();
        self.scheduler.shrink(&revision, replicas as usize);
        let scheduler = Arc::clone(&self.scheduler);
        tokio::spawn(async move {
            scheduler.grow(&revision, replicas as usize).await;
        });
        Ok(())
    }

    /// A call has come to a function that was scaled to zero. The call does not wait for the disk.
    pub fn woken(self: &Arc<Self>, function: &Arc<Function>) {
        self.scheduler.set_floor(&function.name, None);
        let (this, function) = (Arc::clone(self), Arc::clone(function));
        tokio::spawn(async move {
            tokio::time::sleep(HOUSEKEEPING_PAUSE).await;
            let _changing = this.changing.lock().await;
            let still_there = this.get(&function.name);
            if !still_there.is_some_and(|known| Arc::ptr_eq(&known, &function)) {
                return;
            }
            if let Err(err) = this.store.put(&function.record()) {
                tracing::warn!("{}", chain(&err));
            }
        });
    }

    /// Removes a function. Its open calls end first; what it holds is freed in the background.
    ///
    /// # Errors
    /// When there is no such function, or that it is gone cannot be stored.
    pub async fn remove(self: &Arc<Self>, name: &FunctionName) -> Result<(), FunctionError> {
        let _changing = self.changing.lock().await;
        let function = self
            .get(name)
            .ok_or_else(|| FunctionError::Unknown(name.clone()))?;
        self.store
            .remove(name, function.current().template().as_ref())?;
        self.map().remove(name);
        self.host.logs().forget(&name.namespace, &name.name);
        self.scheduler.set_floor(name, None);
        let (current, pending) = {
            let mut inner = function.lock();
            inner.removed = true;
            (Arc::clone(&inner.current), inner.pending.take())
        };
        if let Some((_, pending)) = pending {
            // Its build sees that it is retired and frees what it has made.
            pending.retire();
        }
        let building = current.state() == RevisionState::Building;
        current.retire();
        if building {
            // Waiting calls learn it now; the build frees what it has made.
            current.set_state(RevisionState::Failed("it was removed".to_owned()));
        } else {
            self.spawn_free(&current);
        }
        Ok(())
    }

    /// Reads the image and makes the immutable part of a version. Its lease holds the layers from
    /// here on.
    pub(super) async fn make_revision(
        &self,
        deployment: &Deployment,
    ) -> Result<Revision, FunctionError> {
        deployment.check().map_err(FunctionError::Invalid)?;
        let method = deployment.start_method().map_err(FunctionError::Invalid)?;
        if method.by_criu() {
            criu::check(method).await.map_err(FunctionError::Invalid)?;
        }
        if method == StartMethod::Attach {
            device::check(method, self.pool_on_device).map_err(FunctionError::Invalid)?;
        }
        let name = name_of(deployment);
        let secrets = self.secret_digests(&name, &deployment.secrets)?;
        let containerd = self.host.namespace(&name.namespace)?;
        let image = containerd.resolve_image(&deployment.image).await?;
        let unique = uuid::Uuid::new_v4().simple().to_string();
        let id = format!("{}-{}", name.name, &unique[..8]);
        let lease = format!("trenv-{id}");
        let labels = [(OWNER_LABEL.to_owned(), id.clone())].into();
        containerd.create_lease(&lease, labels).await?;
        let made = async {
            containerd.lease_content(&lease, &image.target).await?;
            containerd.lease_content(&lease, &image.digest).await?;
            containerd.unpack_image(&lease, &image.name).await?;
            let mounts = self
                .look_at_image(&containerd, &lease, &image.chain_id, &id)
                .await?;
            Process::build(deployment, &image.config, &mounts)
                .map_err(|err| FunctionError::Invalid(err.to_string()))
        };
        let process = match made.await {
            Ok(process) => process,
            Err(err) => {
                containerd.delete_lease(&lease).await?;
                return Err(err);
            }
        };
        let base = deployment.base().map_err(FunctionError::Invalid)?;
        if let Some(base) = base
            && let Err(err) = self.check_base(&name, base, &process)
        {
            containerd.delete_lease(&lease).await?;
            return Err(err);
        }
        let record = RevisionRecord {
            id,
            function: name,
            image,
            process,
            limits: deployment.limits().map_err(FunctionError::Invalid)?,
            read_only: deployment.read_only_root_filesystem,
            secrets,
            ready_path: deployment.annotations.get(READY_PATH_ANNOTATION).cloned(),
            base: base.map(str::to_owned),
            criu: method.by_criu(),
            lease,
        };
        let concurrency = deployment.concurrency().map_err(FunctionError::Invalid)?;
        let revision = self.revive(record, concurrency, RevisionState::Building);
        revision.methods.set(method);
        Ok(revision)
    }

    /// A revision from its record.
    pub(super) fn revive(
        &self,
        record: RevisionRecord,
        concurrency: u32,
        state: RevisionState,
    ) -> Revision {
        let directory = self.secrets.directory(&record.function.namespace);
        let names: Vec<String> = record
            .secrets
            .iter()
            .map(|(name, _)| name.clone())
            .collect();
        let binds = spec::binds(&self.files, &directory, &names);
        Revision::new(record, binds, concurrency, state)
    }

    /// The mounts of a read-only view of an image, just long enough to know the directories; the
    /// lease keeps the layers.
    async fn look_at_image(
        &self,
        containerd: &crate::containerd::Namespaced,
        lease: &str,
        chain_id: &str,
        id: &str,
    ) -> Result<Vec<Mount>, FunctionError> {
        let key = format!("{id}-look");
        let mounts = containerd
            .view_snapshot(lease, &key, chain_id, std::collections::HashMap::new())
            .await?;
        containerd.remove_snapshot(&key).await?;
        Ok(mounts)
    }

    fn secret_digests(
        &self,
        name: &FunctionName,
        secrets: &[String],
    ) -> Result<Vec<(String, String)>, FunctionError> {
        let mut digests = Vec::with_capacity(secrets.len());
        for secret in secrets {
            let digest = self.secrets.digest(&name.namespace, secret)?;
            let digest = digest.ok_or_else(|| FunctionError::NoSecret {
                function: name.clone(),
                secret: secret.clone(),
            })?;
            digests.push((secret.clone(), digest));
        }
        digests.sort();
        digests.dedup();
        Ok(digests)
    }
}

fn name_of(deployment: &Deployment) -> FunctionName {
    FunctionName {
        namespace: deployment.namespace.clone(),
        name: deployment.service.clone(),
    }
}

fn now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| d.as_secs())
}
