//! The ttrpc service `trenv.sandbox.v1`; its contracts stand in the proto file.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use trenv_sandbox_proto as proto;
use trenv_snapshot::methods::Method;
use trenv_snapshot::recording::Recorded;
use ttrpc::r#async::TtrpcContext;

use super::Sandboxes;
use super::change::End;
use super::plan::{limits_of, mounts_of, template_ref};
use crate::runc::blocking;
use crate::template::{Base, Templates};

type Reply<T> = ttrpc::Result<T>;

/// The version of the protocol that this shim speaks.
const PROTOCOL: u32 = 1;

/// The service, over the sandboxes of this shim.
pub struct SandboxService {
    pub all: Arc<Sandboxes>,
}

#[async_trait]
impl proto::Sandbox for SandboxService {
    async fn version(
        &self,
        _: &TtrpcContext,
        _: proto::VersionRequest,
    ) -> Reply<proto::VersionResponse> {
        Ok(proto::VersionResponse {
            version: env!("CARGO_PKG_VERSION").into(),
            protocol: PROTOCOL,
            fingerprint: blocking(Templates::fingerprint).await?,
            start_methods: Method::names().into_iter().map(String::from).collect(),
            ..proto::VersionResponse::default()
        })
    }

    async fn list(&self, _: &TtrpcContext, _: proto::ListRequest) -> Reply<proto::ListResponse> {
        Ok(proto::ListResponse {
            sandboxes: self.all.list(),
            ..proto::ListResponse::default()
        })
    }

    async fn watch(
        &self,
        _: &TtrpcContext,
        request: proto::WatchRequest,
    ) -> Reply<proto::WatchResponse> {
        let timeout = Duration::from_millis(u64::from(request.timeout_ms));
        let (events, last) = self.all.watch.after(request.after, timeout).await;
        Ok(proto::WatchResponse {
            events,
            last,
            ..proto::WatchResponse::default()
        })
    }

    async fn reset(
        &self,
        _: &TtrpcContext,
        request: proto::ResetRequest,
    ) -> Reply<proto::ResetResponse> {
        let all = Arc::clone(&self.all);
        self.all
            .requests
            .once("Reset", &request.request_id.clone(), async move {
                let end = End {
                    served: (!request.unused).then_some(request.input),
                    keep_root: request.keep_root,
                };
                let (steps, ended) = all.get(&request.sandbox_id)?.reset(end).await?;
                Ok(proto::ResetResponse {
                    steps: steps.into_proto(),
                    working_set: ended.learnt.map(working_set).into(),
                    root_kept: ended.root_kept,
                    ..proto::ResetResponse::default()
                })
            })
            .await
    }

    async fn repurpose(
        &self,
        _: &TtrpcContext,
        request: proto::RepurposeRequest,
    ) -> Reply<proto::RepurposeResponse> {
        let all = Arc::clone(&self.all);
        self.all
            .requests
            .once("Repurpose", &request.request_id.clone(), async move {
                all.get(&request.sandbox_id)?.repurpose(request).await
            })
            .await
    }

    async fn resume(
        &self,
        _: &TtrpcContext,
        request: proto::ResumeRequest,
    ) -> Reply<proto::ResumeResponse> {
        let all = Arc::clone(&self.all);
        self.all
            .requests
            .once("Resume", &request.request_id.clone(), async move {
                let sandbox = all.get(&request.sandbox_id)?;
                let steps = sandbox.resume(&request.tenancy).await?.into_proto();
                Ok(proto::ResumeResponse {
                    steps,
                    ..proto::ResumeResponse::default()
                })
            })
            .await
    }

    async fn snapshot(
        &self,
        _: &TtrpcContext,
        request: proto::SnapshotRequest,
    ) -> Reply<proto::SnapshotResponse> {
        let all = Arc::clone(&self.all);
        self.all
            .requests
            .once("Snapshot", &request.request_id.clone(), async move {
                let copy = mounts_of(&request.copy);
                all.get(&request.sandbox_id)?
                    .snapshot(request.key, copy, request.criu)
                    .await
            })
            .await
    }

    async fn prepare(
        &self,
        _: &TtrpcContext,
        request: proto::PrepareRequest,
    ) -> Reply<proto::PrepareResponse> {
        let all = Arc::clone(&self.all);
        self.all
            .requests
            .once("Prepare", &request.request_id.clone(), async move {
                let template =
                    template_ref(&request.template_id, request.generation, &request.method)?;
                let rootfs = mounts_of(&request.rootfs);
                let limits = limits_of(request.limits.as_ref());
                let seats = request.spares as usize;
                let base = match request.base.into_option() {
                    Some(base) => Some(Base {
                        template: template_ref(&base.template_id, base.generation, "")?,
                        rootfs: mounts_of(&base.rootfs),
                    }),
                    None => None,
                };
                let begun = std::time::Instant::now();
                let (resident_bytes, clones) = blocking(move || {
                    let template = all.templates.resolve(template)?;
                    // Every other method has memory of its own.
                    let base = base.filter(|_| template.method == Method::Template);
                    let bytes = all
                        .templates
                        .prepare(template, &rootfs, &limits, seats, base)?;
                    Ok((bytes, all.templates.clone_times(&template)))
                })
                .await?;
                let step = |name: &str, took: Duration| proto::Step {
                    name: name.into(),
                    microseconds: u64::try_from(took.as_micros()).unwrap_or(u64::MAX),
                    ..proto::Step::default()
                };
                let whole = step("prepare", begun.elapsed());
                let clones = clones.into_iter().map(|took| step("prepare.clone", took));
                Ok(proto::PrepareResponse {
                    steps: std::iter::once(whole).chain(clones).collect(),
                    resident_bytes,
                    ..proto::PrepareResponse::default()
                })
            })
            .await
    }

    async fn stage(
        &self,
        _: &TtrpcContext,
        request: proto::StageRequest,
    ) -> Reply<proto::StageResponse> {
        let all = Arc::clone(&self.all);
        self.all
            .requests
            .once("Stage", &request.request_id.clone(), async move {
                let template = template_ref(&request.template_id, request.generation, "")?;
                let rootfs = mounts_of(&request.rootfs);
                blocking(move || all.templates.stage(template, rootfs)).await?;
                Ok(proto::StageResponse::default())
            })
            .await
    }

    async fn delete_template(
        &self,
        _: &TtrpcContext,
        request: proto::DeleteTemplateRequest,
    ) -> Reply<proto::DeleteTemplateResponse> {
        let all = Arc::clone(&self.all);
        self.all
            .requests
            .once("DeleteTemplate", &request.request_id.clone(), async move {
                let template = template_ref(&request.template_id, 0, "")?;
                blocking(move || all.templates.delete(template.id)).await?;
                Ok(proto::DeleteTemplateResponse::default())
            })
            .await
    }
}

fn working_set(recorded: Recorded) -> proto::WorkingSet {
    let drift = recorded.drift.unwrap_or_default();
    proto::WorkingSet {
        pages: recorded.count(),
        rounds: u32::try_from(recorded.rounds).unwrap_or(u32::MAX),
        stable: recorded.stable,
        known: drift.known as u64,
        outside: drift.outside as u64,
        input: recorded.input,
        ..proto::WorkingSet::default()
    }
}
