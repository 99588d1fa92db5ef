//! containerd's task service, version 2.
//!
//! ttrpc drops a handler when its client goes away. A half-made container must not follow it, so
//! every call that changes something runs as a task of its own.

use std::future::Future;
use std::sync::Arc;

use async_trait::async_trait;
use containerd_shim_protos::api;
use containerd_shim_protos::events::task as event;
use containerd_shim_protos::protobuf::MessageField;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::shim_async::Task;
use ttrpc::r#async::TtrpcContext;

use super::{Container, Phase, Process};
use crate::error::{Result, ShimError};
use crate::events::timestamp;
use crate::serve::Shim;
use crate::stdio::Uris;

type Reply<T> = ttrpc::Result<T>;

/// The service, over the shim's state.
pub struct TaskService {
    shim: Arc<Shim>,
}

impl TaskService {
    pub fn new(shim: Arc<Shim>) -> Self {
        Self { shim }
    }

    /// Runs a call to its end whether or not the client stays.
    async fn run<T, F, Fut>(&self, name: &'static str, id: &str, call: F) -> Reply<T>
    where
        F: FnOnce(Arc<Shim>) -> Fut,
        Fut: Future<Output = Result<T>> + Send + 'static,
        T: Send + 'static,
    {
        tracing::debug!("{name} {id}");
        let done = tokio::spawn(call(Arc::clone(&self.shim))).await;
        let result = done.unwrap_or_else(|err| Err(ShimError::Fault(err.to_string())));
        result.map_err(|err| {
            tracing::info!("{name} {id} failed: {}", err.chain());
            err.into()
        })
    }
}

#[async_trait]
impl Task for TaskService {
    async fn create(
        &self,
        _: &TtrpcContext,
        request: api::CreateTaskRequest,
    ) -> Reply<api::CreateTaskResponse> {
        let id = request.id.clone();
        self.run("Create", &id, |shim| create(shim, request)).await
    }

    async fn start(
        &self,
        _: &TtrpcContext,
        request: api::StartRequest,
    ) -> Reply<api::StartResponse> {
        let id = request.id.clone();
        self.run("Start", &id, |shim| start(shim, request)).await
    }

    async fn state(
        &self,
        _: &TtrpcContext,
        request: api::StateRequest,
    ) -> Reply<api::StateResponse> {
        let container = self.shim.tasks.get(&request.id)?;
        let process = container.process(&request.exec_id)?;
        let exit = process.exit();
        let status = match process.phase() {
            Phase::Created => api::Status::CREATED,
            Phase::Running if container.paused() => api::Status::PAUSED,
            Phase::Running => api::Status::RUNNING,
            Phase::Stopped => api::Status::STOPPED,
        };
        Ok(api::StateResponse {
            id: request.id,
            bundle: container.bundle().display().to_string(),
            pid: process.pid(),
            status: status.into(),
            stdin: process.uris.stdin.clone(),
            stdout: process.uris.stdout.clone(),
            stderr: process.uris.stderr.clone(),
            terminal: process.uris.terminal,
            exit_status: exit.map_or(0, |exit| exit.status),
            exited_at: exit.map_or_else(MessageField::none, |exit| timestamp(exit.at)),
            exec_id: request.exec_id,
            ..api::StateResponse::default()
        })
    }

    async fn kill(&self, _: &TtrpcContext, request: api::KillRequest) -> Reply<api::Empty> {
        let id = request.id.clone();
        self.run("Kill", &id, |shim| async move {
            let container = shim.tasks.get(&request.id)?;
            container
                .kill(&request.exec_id, request.signal, request.all)
                .await?;
            Ok(api::Empty::default())
        })
        .await
    }

    async fn exec(&self, _: &TtrpcContext, request: api::ExecProcessRequest) -> Reply<api::Empty> {
        let id = request.id.clone();
        self.run("Exec", &id, |shim| async move {
            let container = shim.tasks.get(&request.id)?;
            let uris = Uris {
                stdin: request.stdin,
                stdout: request.stdout,
                stderr: request.stderr,
                terminal: request.terminal,
            };
            let spec = request.spec.into_option().unwrap_or_default().value;
            container.exec(&request.exec_id, uris, spec).await?;
            shim.publisher.publish(&event::TaskExecAdded {
                container_id: request.id,
                exec_id: request.exec_id,
                ..event::TaskExecAdded::default()
            });
            Ok(api::Empty::default())
        })
        .await
    }

    async fn resize_pty(
        &self,
        _: &TtrpcContext,
        request: api::ResizePtyRequest,
    ) -> Reply<api::Empty> {
        let process = self
            .shim
            .tasks
            .get(&request.id)?
            .process(&request.exec_id)?;
        process.resize(request.width, request.height)?;
        Ok(api::Empty::default())
    }

    async fn close_io(&self, _: &TtrpcContext, request: api::CloseIORequest) -> Reply<api::Empty> {
        let process = self
            .shim
            .tasks
            .get(&request.id)?
            .process(&request.exec_id)?;
        if request.stdin {
            process.close_stdin();
        }
        Ok(api::Empty::default())
    }

    async fn pids(&self, _: &TtrpcContext, request: api::PidsRequest) -> Reply<api::PidsResponse> {
        let id = request.id.clone();
        self.run("Pids", &id, |shim| async move {
            let pids = shim.tasks.get(&request.id)?.pids().await?;
            let processes = pids
                .into_iter()
                .map(|pid| api::ProcessInfo {
                    pid,
                    ..api::ProcessInfo::default()
                })
                .collect();
            Ok(api::PidsResponse {
                processes,
                ..api::PidsResponse::default()
            })
        })
        .await
    }

    async fn pause(&self, _: &TtrpcContext, request: api::PauseRequest) -> Reply<api::Empty> {
        let id = request.id.clone();
        self.run("Pause", &id, |shim| async move {
            shim.tasks.get(&request.id)?.pause().await?;
            shim.publisher.publish(&event::TaskPaused {
                container_id: request.id,
                ..event::TaskPaused::default()
            });
            Ok(api::Empty::default())
        })
        .await
    }

    async fn resume(&self, _: &TtrpcContext, request: api::ResumeRequest) -> Reply<api::Empty> {
        let id = request.id.clone();
        self.run("Resume", &id, |shim| async move {
            shim.tasks.get(&request.id)?.resume().await?;
            shim.publisher.publish(&event::TaskResumed {
                container_id: request.id,
                ..event::TaskResumed::default()
            });
            Ok(api::Empty::default())
        })
        .await
    }

    async fn checkpoint(
        &self,
        _: &TtrpcContext,
        request: api::CheckpointTaskRequest,
    ) -> Reply<api::Empty> {
        Err(ShimError::Unimplemented(format!(
            "Cannot checkpoint {}: trenv keeps snapshots in its pool; use Snapshot of trenv.sandbox.v1",
            request.id
        ))
        .into())
    }

    async fn update(&self, _: &TtrpcContext, request: api::UpdateTaskRequest) -> Reply<api::Empty> {
        let id = request.id.clone();
        self.run("Update", &id, |shim| async move {
            let resources = request.resources.into_option().unwrap_or_default().value;
            shim.tasks.get(&request.id)?.update(resources).await?;
            Ok(api::Empty::default())
        })
        .await
    }

    async fn stats(
        &self,
        _: &TtrpcContext,
        request: api::StatsRequest,
    ) -> Reply<api::StatsResponse> {
        let id = request.id.clone();
        self.run("Stats", &id, |shim| async move {
            let stats: Any = shim.tasks.get(&request.id)?.stats().await?;
            Ok(api::StatsResponse {
                stats: MessageField::some(stats),
                ..api::StatsResponse::default()
            })
        })
        .await
    }

    async fn connect(
        &self,
        _: &TtrpcContext,
        request: api::ConnectRequest,
    ) -> Reply<api::ConnectResponse> {
        let task_pid = match self.shim.tasks.get(&request.id) {
            Ok(container) => container.process("")?.pid(),
            Err(_) => 0,
        };
        Ok(api::ConnectResponse {
            shim_pid: std::process::id(),
            task_pid,
            version: env!("CARGO_PKG_VERSION").into(),
            ..api::ConnectResponse::default()
        })
    }

    async fn wait(&self, _: &TtrpcContext, request: api::WaitRequest) -> Reply<api::WaitResponse> {
        let process = self
            .shim
            .tasks
            .get(&request.id)?
            .process(&request.exec_id)?;
        let exit = process.wait().await;
        Ok(api::WaitResponse {
            exit_status: exit.status,
            exited_at: timestamp(exit.at),
            ..api::WaitResponse::default()
        })
    }

    async fn delete(
        &self,
        _: &TtrpcContext,
        request: api::DeleteRequest,
    ) -> Reply<api::DeleteResponse> {
        let id = request.id.clone();
        self.run("Delete", &id, |shim| delete(shim, request)).await
    }

    async fn shutdown(&self, _: &TtrpcContext, request: api::ShutdownRequest) -> Reply<api::Empty> {
        tracing::debug!("Shutdown after {}", request.id);
        self.shim.request_shutdown();
        Ok(api::Empty::default())
    }
}

async fn create(
    shim: Arc<Shim>,
    request: api::CreateTaskRequest,
) -> Result<api::CreateTaskResponse> {
    let promised = || shim.is_promised(&request.id);
    let reserved = shim.tasks.reserve(&request.id, promised);
    let mut reservation = reserved.inspect_err(|err| {
        if matches!(err, ShimError::NotFound { .. }) {
            tracing::info!("{} was deleted before it was created", request.id);
            shim.request_shutdown();
        }
    })?;
    shim.end_promise(&request.id);
    if !request.checkpoint.is_empty() {
        return Err(ShimError::Unimplemented(
            "Cannot create a task from a checkpoint directory; use Repurpose of trenv.sandbox.v1"
                .into(),
        ));
    }
    let container = shim.create_container(&request).await?;
    let pid = container.process("")?.pid();
    let first = container.process("")?;
    let turn = first.turn.lock().await;
    if let Some(unwanted) = reservation.keep(container) {
        drop(turn);
        unwanted.delete("").await?;
        drop(reservation);
        // containerd's own Shutdown came while this one was still counted.
        shim.request_shutdown();
        return Err(ShimError::NotFound {
            kind: "task",
            id: request.id,
        });
    }
    shim.publisher.publish(&event::TaskCreate {
        container_id: request.id,
        bundle: request.bundle,
        rootfs: request.rootfs,
        io: MessageField::some(event::TaskIO {
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
            terminal: request.terminal,
            ..event::TaskIO::default()
        }),
        pid,
        ..event::TaskCreate::default()
    });
    Ok(api::CreateTaskResponse {
        pid,
        ..api::CreateTaskResponse::default()
    })
}

async fn start(shim: Arc<Shim>, request: api::StartRequest) -> Result<api::StartResponse> {
    let container = shim.tasks.get(&request.id)?;
    let process: Arc<Process> = container.process(&request.exec_id)?;
    let _turn = process.turn.lock().await;
    if process.phase() != Phase::Created {
        return Err(ShimError::WrongState {
            action: "start",
            id: request.id,
            state: process.phase().to_string(),
        });
    }
    let pid = container.start(&request.exec_id).await?;
    if request.exec_id.is_empty() {
        shim.publisher.publish(&event::TaskStart {
            container_id: request.id,
            pid,
            ..event::TaskStart::default()
        });
    } else {
        shim.publisher.publish(&event::TaskExecStarted {
            container_id: request.id,
            exec_id: request.exec_id,
            pid,
            ..event::TaskExecStarted::default()
        });
    }
    Ok(api::StartResponse {
        pid,
        ..api::StartResponse::default()
    })
}

async fn delete(shim: Arc<Shim>, request: api::DeleteRequest) -> Result<api::DeleteResponse> {
    if request.exec_id.is_empty() {
        let promised = shim.end_promise(&request.id);
        if shim.tasks.give_up(&request.id, promised) {
            tracing::info!("{} was deleted while it was being created", request.id);
        }
    }
    let container: Arc<dyn Container> = shim.tasks.get(&request.id)?;
    let (pid, exit) = container.delete(&request.exec_id).await?;
    if request.exec_id.is_empty() {
        shim.tasks.remove(&request.id);
        crate::logging::detach(&request.id);
        shim.publisher.publish(&event::TaskDelete {
            container_id: request.id,
            pid,
            exit_status: exit.status,
            exited_at: timestamp(exit.at),
            ..event::TaskDelete::default()
        });
    }
    Ok(api::DeleteResponse {
        pid,
        exit_status: exit.status,
        exited_at: timestamp(exit.at),
        ..api::DeleteResponse::default()
    })
}
