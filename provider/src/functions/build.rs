//! Building a revision: run it cold, wait until it is ready, dump it, make its template ready.
//!
//! No call reaches the instance before the dump, so a template never holds a caller's data.
//! A function that cannot be dumped still serves; the reason is told.

use std::sync::Arc;
use std::time::Duration;

use trenv_sandbox_proto as proto;

use super::{
    Function, Functions, Revision, RevisionState, Source, Template, snapshot_of, template_key,
};
use crate::containerd::ContainerdError;
use crate::error::chain;
use crate::instances::{ColdStart, SandboxRef, StartError, StartKind, owner_labels, refill_spares};
use crate::shim_client::{ShimClient, ShimError};

/// A function may need a moment to close the readiness check's connection on its side.
const SNAPSHOT_TRIES: u32 = 4;
const SNAPSHOT_PAUSE: Duration = Duration::from_millis(250);
const FREE_PAUSE: Duration = Duration::from_millis(100);

impl Functions {
    /// Builds `revision` in the background and puts it into service.
    pub(super) fn spawn_build(
        self: &Arc<Self>,
        function: &Arc<Function>,
        revision: &Arc<Revision>,
    ) {
        let (this, function, revision) =
            (Arc::clone(self), Arc::clone(function), Arc::clone(revision));
        tokio::spawn(async move {
            let state = this.build(&revision).await;
            this.finish(&function, &revision, state).await;
        });
    }

    /// Builds again a revision in service whose template is gone.
    pub fn rebuild(self: &Arc<Self>, revision: &Arc<Revision>) {
        let Some(function) = self.get(revision.function()) else {
            return;
        };
        let RevisionState::Ready(template) = revision.state() else {
            return;
        };
        if revision.retired() {
            return;
        }
        tracing::warn!(
            "The template of {} is gone; it is made anew",
            revision.function()
        );
        revision.set_state(RevisionState::Building);
        while revision.take_spare().is_some() {}
        let (this, revision) = (Arc::clone(self), Arc::clone(revision));
        tokio::spawn(async move {
            let state = this.build(&revision).await;
            this.finish(&function, &revision, state).await;
            if let Ok(containerd) = this.host.namespace(&revision.function().namespace) {
                // What cannot be removed is no longer wanted by anybody and goes with the lease.
                let _ = containerd.remove_snapshot(&template.view).await;
                let _ = containerd.remove_snapshot(&template.layer).await;
            }
        });
    }

    async fn finish(
        self: &Arc<Self>,
        function: &Arc<Function>,
        revision: &Arc<Revision>,
        state: RevisionState,
    ) {
        match &state {
            RevisionState::Ready(t) => tracing::info!(
                "The function {} is ready: template {} of {} KiB",
                function.name,
                t.id,
                t.image_bytes >> 10
            ),
            RevisionState::Cold(reason) => {
                tracing::warn!("The function {} serves cold only: {reason}", function.name);
            }
            RevisionState::Failed(reason) => {
                tracing::warn!("The function {} failed to build: {reason}", function.name);
            }
            RevisionState::Building => {}
        }
        let _changing = self.changing.lock().await;
        if revision.retired() {
            revision.set_state(state);
            if let Some(template) = revision.template()
                && let Err(err) = self.store.unwant(&function.name.namespace, &template)
            {
                tracing::warn!("{}", chain(&err));
            }
            self.spawn_free(revision);
            return;
        }
        let mut old = None;
        let mut dropped = false;
        {
            let mut inner = function.lock();
            let pending = inner
                .pending
                .as_ref()
                .is_some_and(|(_, r)| Arc::ptr_eq(r, revision));
            let serving = !matches!(inner.current.state(), RevisionState::Failed(_));
            if pending {
                let taken = inner.pending.take();
                match &state {
                    RevisionState::Failed(reason) if serving => {
                        inner.failure = Some(reason.clone());
                        dropped = true;
                    }
                    _ => {
                        inner.failure = None;
                        if let Some((deployment, _)) = taken {
                            inner.deployment = deployment;
                        }
                        old = Some(std::mem::replace(&mut inner.current, Arc::clone(revision)));
                    }
                }
            }
        }
        revision.set_state(state);
        let replaced = old.as_ref().and_then(|old| old.template());
        if let Err(err) = self.store.replace(&function.record(), replaced.as_ref()) {
            tracing::warn!("{}", chain(&err));
        }
        if dropped {
            revision.retire();
            self.spawn_free(revision);
            return;
        }
        refill_spares(&self.host, revision);
        if let Some(old) = old {
            old.retire();
            self.spawn_free(&old);
        }
        let replicas = function.view().replicas;
        if let Some(replicas) = replicas {
            let (scheduler, revision) = (Arc::clone(&self.scheduler), Arc::clone(revision));
            tokio::spawn(async move { scheduler.grow(&revision, replicas as usize).await });
        }
    }

    async fn build(self: &Arc<Self>, revision: &Arc<Revision>) -> RevisionState {
        let base = self.await_base(revision).await;
        let base = base.unwrap_or_else(|reason| {
            tracing::warn!("{} is built by itself: {reason}", revision.function());
            None
        });
        let sandbox = match self.scheduler.reserve(revision).await {
            Ok(sandbox) => sandbox,
            Err(err) => return RevisionState::Failed(err.to_string()),
        };
        let started = match &base {
            Some(base) => self.host.start_from_base(&sandbox, revision, base).await,
            None => self.scheduler.cold_start(&sandbox, revision).await,
        };
        revision.set_base(base);
        let cold = match started {
            Ok(cold) => cold,
            Err(err) => {
                self.scheduler.discard(&sandbox, None).await;
                return RevisionState::Failed(match err {
                    StartError::Start { reason, .. } => reason,
                    err => err.to_string(),
                });
            }
        };
        let shim = self.host.shim(&sandbox.namespace);
        match self.dump(&shim, &sandbox, revision).await {
            Ok(dumped) => {
                self.host.record_idle(&sandbox);
                let logs = self.host.logs();
                logs.end_tenancy(&sandbox, &revision.function().name);
                let made = self.make_template(&shim, revision, &cold, dumped).await;
                self.scheduler.set_sandbox_address(&sandbox, cold.address);
                self.scheduler.put_idle(&sandbox);
                match made {
                    Ok(template) => RevisionState::Ready(template),
                    Err(reason) => RevisionState::Cold(reason),
                }
            }
            Err(err) => {
                let reason = err.to_string();
                if leaves_function_running(&err) {
                    // The instance serves on; dropping the guard makes it an idle one.
                    let address = cold.address;
                    drop(self.scheduler.put_serving(
                        &sandbox,
                        revision,
                        cold.tenancy,
                        address,
                        StartKind::Cold,
                        cold.steps,
                    ));
                } else {
                    self.scheduler.discard(&sandbox, Some(&cold.tenancy)).await;
                }
                RevisionState::Cold(reason)
            }
        }
    }

    async fn dump(
        &self,
        shim: &ShimClient,
        sandbox: &SandboxRef,
        revision: &Revision,
    ) -> Result<(String, proto::SnapshotResponse), ShimError> {
        let fingerprint = shim.fingerprint().await?;
        let key = template_key(&revision.key_parts(), &revision.record.id, &fingerprint);
        let mut tries = 0;
        loop {
            tries += 1;
            match shim.snapshot(&sandbox.id, &key, revision.record.criu).await {
                Ok(dumped) => return Ok((key, dumped)),
                Err(err) if tries < SNAPSHOT_TRIES && names_connection(&err) => {
                    tokio::time::sleep(SNAPSHOT_PAUSE).await;
                }
                Err(err) => return Err(err),
            }
        }
    }

    /// Commits what the function wrote while it started as one more layer, and has the shim build
    /// the zygote over it.
    async fn make_template(
        &self,
        shim: &ShimClient,
        revision: &Arc<Revision>,
        cold: &ColdStart,
        (key, dumped): (String, proto::SnapshotResponse),
    ) -> Result<Template, String> {
        let lease = &revision.record.lease;
        let layer = format!("{}-layer", cold.tenancy);
        let view = format!("{}-view", cold.tenancy);
        let mut of_layer = owner_labels(revision);
        of_layer.extend(proto::layer::labels(&dumped));
        let committed = async {
            let containerd = self.host.namespace(&revision.function().namespace)?;
            let labels = owner_labels(revision);
            containerd
                .commit_snapshot(lease, &layer, &cold.tenancy, of_layer)
                .await?;
            containerd
                .view_snapshot(lease, &view, &layer, labels)
                .await?;
            Ok::<(), ContainerdError>(())
        };
        let template = Template {
            id: dumped.template_id,
            generation: dumped.generation,
            key,
            layer: layer.clone(),
            view: view.clone(),
            image_bytes: dumped.image_bytes,
            stored_bytes: dumped.stored_bytes,
            notes: dumped.notes,
            base: revision.base().map(|base| base.record()),
        };
        let made = match committed.await {
            Ok(()) => {
                let source = Source::of(revision, &template, revision.methods.now());
                let made = self.host.prepare_template(&source).await;
                made.map_err(|err| err.to_string())
            }
            Err(err) => Err(err.to_string()),
        };
        if let Err(reason) = made {
            if let Err(err) = shim.delete_template(&template.id).await {
                tracing::warn!("The template {} stays in the pool: {err}", template.id);
            }
            return Err(reason);
        }
        Ok(template)
    }

    /// Frees what a retired revision holds, once its last call has ended.
    pub(super) fn spawn_free(self: &Arc<Self>, revision: &Arc<Revision>) {
        let (this, revision) = (Arc::clone(self), Arc::clone(revision));
        tokio::spawn(async move {
            this.scheduler.end_instances(&revision);
            let deadline = tokio::time::Instant::now() + this.drain;
            while this.scheduler.count_of(&revision) > 0 && tokio::time::Instant::now() < deadline {
                tokio::time::sleep(FREE_PAUSE).await;
            }
            this.scheduler.kill_instances(&revision).await;
            let namespace = &revision.function().namespace;
            if let Some(template) = revision.template() {
                this.delete_template(namespace, &template.id).await;
                if let Ok(containerd) = this.host.namespace(namespace) {
                    while let Some(spare) = revision.take_spare() {
                        let _ = containerd
                            .remove_snapshot(snapshot_of(&spare.tenancy))
                            .await;
                    }
                    // Whatever refuses to go now goes with the lease, by containerd's collection.
                    let _ = containerd.remove_snapshot(&template.view).await;
                    let _ = containerd.remove_snapshot(&template.layer).await;
                }
            }
            this.drop_lease(&revision).await;
        });
    }

    /// Deletes a template; one that cannot be deleted now is tried again later.
    pub(super) async fn delete_template(&self, namespace: &str, id: &str) {
        let deleted = self.host.shim(namespace).delete_template(id).await;
        let done = match deleted {
            Ok(()) => self.store.deleted(namespace, id),
            // Without a shim nobody uses it; the next one deletes it.
            Err(ShimError::Unreachable { .. }) => return,
            Err(err) => {
                tracing::warn!("The template {id} stays in the pool for now: {err}");
                return;
            }
        };
        if let Err(err) = done {
            tracing::warn!("{}", chain(&err));
        }
    }

    /// Gives the layers of a revision to containerd's garbage collection.
    pub(super) async fn drop_lease(&self, revision: &Revision) {
        let record = &revision.record;
        let dropped = match self.host.namespace(&record.function.namespace) {
            Ok(containerd) => containerd.delete_lease(&record.lease).await,
            Err(err) => Err(err),
        };
        if let Err(err) = dropped {
            tracing::warn!(
                "The lease {} stays until the provider starts again: {err}",
                record.lease
            );
        }
    }
}

/// Whether a refused dump has left the function as it was.
fn leaves_function_running(err: &ShimError) -> bool {
    matches!(
        err.code(),
        Some(
            ttrpc::Code::UNIMPLEMENTED
                | ttrpc::Code::RESOURCE_EXHAUSTED
                | ttrpc::Code::FAILED_PRECONDITION
                | ttrpc::Code::INVALID_ARGUMENT
                | ttrpc::Code::DEADLINE_EXCEEDED
        )
    )
}

fn names_connection(err: &ShimError) -> bool {
    let text = err.to_string();
    err.code() == Some(ttrpc::Code::UNIMPLEMENTED)
        && (text.contains("TCP") || text.contains("connection"))
}
