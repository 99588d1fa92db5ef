//! After a restart: functions come back as they were, sandboxes of the provider's earlier life are
//! adopted or cleaned up, and nothing that nobody owns stays.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use trenv_sandbox_proto::State;

use super::registry::Inner;
use super::store::FunctionRecord;
use super::{
    Function, FunctionName, Functions, Revision, RevisionState, Source, StoreError, snapshot_of,
};
use crate::containerd::{ContainerdError, SnapshotKind};
use crate::error::chain;
use crate::instances::{OWNER_LABEL, SandboxOps, SandboxRef, read_address, refill_spares};

const PREPARE_TICK: Duration = Duration::from_secs(1);
/// Every so many rounds, templates that could not be deleted are tried again.
const UNWANTED_ROUNDS: u64 = 5;

/// Fills the registry from the store and puts the machine in order.
///
/// # Errors
/// When the store cannot be read. What containerd or a shim refuses is logged: the functions
/// then start in new sandboxes.
pub async fn recover(functions: &Arc<Functions>, namespaces: &[String]) -> Result<(), StoreError> {
    let records = functions.store.all()?;
    let mut builds = Vec::new();
    for record in records {
        let pending = record.pending.clone();
        let (function, unfinished) = functions.bring_back(record);
        if unfinished {
            builds.push((Arc::clone(&function), None));
        }
        if let Some(deployment) = pending {
            builds.push((function, Some(deployment)));
        }
    }
    functions.find_bases();
    let mut all: HashSet<String> = namespaces.iter().cloned().collect();
    all.extend(
        functions
            .list(None)
            .into_iter()
            .map(|f| f.name.namespace.clone()),
    );
    for namespace in all {
        if let Err(err) = functions.tidy(&namespace).await {
            tracing::warn!(
                "The namespace {namespace} was not put in order: {}",
                chain(&err)
            );
        }
        functions.scheduler.serve_namespace(&namespace);
    }
    for (function, deployment) in builds {
        match deployment {
            // The first build did not finish: it starts again from the image.
            None => {
                let revision = function.current();
                functions.spawn_build(&function, &revision);
            }
            Some(deployment) => {
                if let Err(err) = functions.update(deployment).await {
                    function.lock().failure = Some(chain(&err));
                    tracing::warn!("The update of {} failed: {}", function.name, chain(&err));
                }
            }
        }
    }
    for function in functions.list(None) {
        refill_spares(&functions.host, &function.current());
    }
    Ok(())
}

impl Functions {
    fn bring_back(self: &Arc<Self>, record: FunctionRecord) -> (Arc<Function>, bool) {
        let concurrency = record.deployment.concurrency().unwrap_or(1);
        let unfinished = record.state == RevisionState::Building;
        let revision = Arc::new(self.revive(record.revision, concurrency, record.state));
        // A store of another version may name a method that is not known here.
        let method = record.deployment.start_method().unwrap_or_default();
        revision.methods.set(method);
        let function = Arc::new(Function {
            name: record.name.clone(),
            created_at: record.created_at,
            calls: AtomicU64::new(0),
            inner: Mutex::new(Inner {
                deployment: record.deployment,
                current: revision,
                pending: None,
                failure: record.failure,
                replicas: record.replicas,
                removed: false,
            }),
        });
        self.scheduler.set_floor(&record.name, record.replicas);
        self.map().insert(record.name, Arc::clone(&function));
        (function, unfinished)
    }

    /// Adopts the sandboxes of a namespace and removes what nobody owns.
    async fn tidy(self: &Arc<Self>, namespace: &str) -> Result<(), ContainerdError> {
        let containerd = self.host.namespace(namespace)?;
        let revisions: Vec<Arc<Revision>> = self
            .list(Some(namespace))
            .iter()
            .map(|f| f.current())
            .collect();
        let shim = self.host.shim(namespace).list().await.unwrap_or_default();
        let running: HashSet<String> = containerd.running_tasks().await?.into_iter().collect();
        let mut kept: HashSet<String> = HashSet::new();
        for id in containerd.containers_labelled(OWNER_LABEL).await? {
            let sandbox = SandboxRef {
                namespace: namespace.to_owned(),
                id: id.clone(),
            };
            let known = shim.iter().find(|s| s.id == id && running.contains(&id));
            let adopted = known.and_then(|info| {
                let address = read_address(info)?;
                match info.state.enum_value_or_default() {
                    State::IDLE => Some((address, None)),
                    State::READY => {
                        let owner = revisions.iter().find(|r| {
                            r.owns_tenancy(&info.tenancy)
                                && matches!(
                                    r.state(),
                                    RevisionState::Ready(_) | RevisionState::Cold(_)
                                )
                        })?;
                        Some((address, Some((Arc::clone(owner), info.tenancy.clone()))))
                    }
                    _ => None,
                }
            });
            match adopted {
                Some((address, serving)) => {
                    kept.extend(
                        serving
                            .iter()
                            .map(|(_, tenancy)| snapshot_of(tenancy).to_owned()),
                    );
                    self.scheduler.adopt(&sandbox, address, serving);
                }
                None => {
                    self.host.destroy(&sandbox, None).await;
                }
            }
        }
        for template in revisions.iter().filter_map(|r| r.template()) {
            kept.insert(template.layer);
            kept.insert(template.view);
        }
        let mut stale = containerd.snapshots_labelled(OWNER_LABEL).await?;
        stale.retain(|(key, _)| !kept.contains(key));
        // A layer goes after the snapshots over it.
        stale.sort_by_key(|(_, kind)| *kind == SnapshotKind::Committed);
        for (key, _) in stale {
            if let Err(err) = containerd.remove_snapshot(&key).await {
                tracing::warn!("The snapshot {key} of nobody stays: {err}");
            }
        }
        let leases: HashSet<&str> = revisions.iter().map(|r| r.record.lease.as_str()).collect();
        for lease in containerd.leases_labelled(OWNER_LABEL).await? {
            if !leases.contains(lease.as_str()) {
                containerd.delete_lease(&lease).await?;
            }
        }
        Ok(())
    }

    /// Bounds the output of instances, and keeps every ready function's template ready on the
    /// shims that run: after a restart of this provider or of a shim, the zygotes are built before
    /// a call asks for them.
    pub async fn run_preparer(self: Arc<Self>) {
        // A failure is told once, not every second.
        let mut told: HashMap<FunctionName, String> = HashMap::new();
        let mut round = 0u64;
        loop {
            tokio::time::sleep(PREPARE_TICK).await;
            round += 1;
            if round.is_multiple_of(UNWANTED_ROUNDS) {
                for (namespace, id) in self.store.unwanted().unwrap_or_default() {
                    self.delete_template(&namespace, &id).await;
                }
            }
            for function in self.list(None) {
                if let Some(wanted) = function.view().replicas {
                    let revision = function.current();
                    if matches!(
                        revision.state(),
                        RevisionState::Ready(_) | RevisionState::Cold(_)
                    ) {
                        self.scheduler.top_up(&revision, wanted as usize).await;
                    }
                }
                for instance in self.scheduler.instances(&function.name) {
                    let sandbox = SandboxRef {
                        namespace: function.name.namespace.clone(),
                        id: instance.sandbox,
                    };
                    self.host.logs().bound(&sandbox, &function.name.name);
                }
                let revision = function.current();
                let Some(template) = revision.template() else {
                    continue;
                };
                let source = Source::of(&revision, &template, revision.methods.now());
                match self.host.ensure_prepared(&source).await {
                    Ok(()) => {
                        told.remove(&function.name);
                    }
                    Err(err) if err.template_useless() => self.rebuild(&revision),
                    Err(err) if err.unreachable() => {}
                    Err(err) => {
                        let text = err.to_string();
                        if told.get(&function.name) != Some(&text) {
                            tracing::warn!(
                                "The template of {} is not ready: {text}",
                                function.name
                            );
                            told.insert(function.name.clone(), text);
                        }
                    }
                }
            }
        }
    }
}
