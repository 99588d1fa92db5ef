//! Containers run by the installed runc, as containerd's own shim runs them.
//!
//! `create` mounts the root file system at the bundle's `rootfs`, makes the streams and calls
//! `runc create`; runc's init then becomes this subreaper's child and is waited for by pidfd. All
//! further calls go to runc by the container's id.

mod command;
mod mounts;
mod options;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::Duration;

use async_trait::async_trait;
use containerd_shim_protos::api::CreateTaskRequest;
use containerd_shim_protos::events::task::TaskOOM;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use oci_spec::runtime::LinuxNamespaceType;

pub use command::Runc;
use command::{Io, read_pid};
pub use mounts::unmount_all;
pub use options::Options;

use crate::error::{Result, ShimError};
use crate::oom;
use crate::reap::{Child, Exit};
use crate::serve::{Shim, uris};
use crate::stats::Groups;
use crate::stdio::{self, Console, ConsoleSocket, Overflow, Owner, Streams, Uris};
use crate::task::{Container, Phase, Process};

const CONSOLE_LIMIT: Duration = Duration::from_secs(30);
/// A killed process ends within this; otherwise the caller is told.
const KILL_LIMIT: Duration = Duration::from_secs(10);
/// Output still in the pipes when a process is deleted gets this long.
const STREAMS_LIMIT: Duration = Duration::from_secs(2);
/// runc's pid file of the first process.
pub const PID_FILE: &str = "init.pid";

/// A container run by runc.
pub struct RuncContainer {
    id: String,
    bundle: PathBuf,
    runc: Runc,
    owner: Owner,
    shim: Arc<Shim>,
    own_pid_namespace: bool,
    paused: AtomicBool,
    groups: OnceLock<Groups>,
    /// Processes that the kernel has killed for want of memory, as far as containerd knows.
    oom_kills: AtomicU64,
    first: Arc<Process>,
    execs: Mutex<HashMap<String, Exec>>,
    /// This value itself, for the watchers that it starts.
    this: Weak<Self>,
}

#[derive(Clone)]
struct Exec {
    process: Arc<Process>,
    spec: Arc<Vec<u8>>,
}

impl RuncContainer {
    /// Creates the container; a failure leaves nothing behind.
    pub async fn create(
        shim: &Arc<Shim>,
        request: &CreateTaskRequest,
    ) -> Result<Arc<dyn Container>> {
        let bundle = PathBuf::from(&request.bundle);
        let options = Options::of_request(request.options.as_ref(), &shim.namespace)?;
        options.store(&bundle)?;
        let own_pid_namespace = has_own_pid_namespace(&bundle)?;
        let container = Arc::new_cyclic(|this| Self {
            runc: Runc::new(options, &request.id, &bundle),
            own_pid_namespace,
            id: request.id.clone(),
            bundle,
            owner: shim.owner(&request.id),
            shim: Arc::clone(shim),
            paused: AtomicBool::new(false),
            groups: OnceLock::new(),
            oom_kills: AtomicU64::new(0),
            first: Process::new("", uris(request), 0),
            execs: Mutex::default(),
            this: Weak::clone(this),
        });
        let rootfs = container.bundle.join("rootfs");
        let mounts = request.rootfs.clone();
        let place = rootfs.clone();
        blocking(move || mounts::mount_all(&mounts, &place)).await?;
        if let Err(err) = container.create_first().await {
            // The reason of the failure is worth more than one of the cleaning.
            let _ = container.runc.delete(true).await;
            container.first.finish_streams(Duration::ZERO).await;
            let _ = blocking(move || mounts::unmount_all(&rootfs)).await;
            return Err(err);
        }
        Ok(container)
    }

    async fn create_first(self: &Arc<Self>) -> Result<()> {
        let pid_file = self.bundle.join(PID_FILE);
        let io = self.connect(&self.first).await?;
        let (io, finish) = io.split();
        let made = self.runc.create(&self.bundle, &pid_file, io).await;
        let pid = self.adopt(&self.first, finish, made, &pid_file).await?;
        tracing::info!("Created {} by runc, pid {pid}", self.id);
        Ok(())
    }

    /// Makes the streams of a process that is about to be made.
    async fn connect(&self, process: &Process) -> Result<Connection> {
        if process.uris.terminal {
            let directory = self.shim.config.run_dir.join("shim");
            return Ok(Connection::Console(ConsoleSocket::listen(&directory)?));
        }
        let (ends, streams) = stdio::pipes(&process.uris, &self.owner, Overflow::Wait).await?;
        Ok(Connection::Pipes(ends, streams))
    }

    /// Takes a process that runc has just made over: streams, pid, waiting.
    async fn adopt(
        self: &Arc<Self>,
        process: &Arc<Process>,
        finish: Finish,
        made: Result<()>,
        pid_file: &Path,
    ) -> Result<u32> {
        let (streams, console) = match finish {
            Finish::Streams(streams) => (streams, None),
            Finish::Console(socket) => {
                made?;
                let console = socket.receive(CONSOLE_LIMIT).await?;
                return self.adopt_with_console(process, console, pid_file).await;
            }
        };
        made?;
        self.watch(process, streams, console, pid_file)
    }

    async fn adopt_with_console(
        self: &Arc<Self>,
        process: &Arc<Process>,
        console: Console,
        pid_file: &Path,
    ) -> Result<u32> {
        let streams = stdio::console(&console, &process.uris, &self.owner, Overflow::Wait).await?;
        self.watch(process, streams, Some(console), pid_file)
    }

    fn watch(
        self: &Arc<Self>,
        process: &Arc<Process>,
        streams: Streams,
        console: Option<Console>,
        pid_file: &Path,
    ) -> Result<u32> {
        process.connect(streams, console);
        let pid = read_pid(pid_file)?;
        let child = Child::watch(pid.cast_signed())?;
        process.set_pid(pid);
        if process.exec_id.is_empty()
            && let Ok(groups) = Groups::of_process(pid)
        {
            // Only the first process comes here, and only once.
            let _ = self.groups.set(groups.clone());
            let container = Weak::clone(&self.this);
            tokio::spawn(async move {
                let tell = || {
                    container
                        .upgrade()
                        .is_none_or(|container| container.tell_oom())
                };
                if let Err(err) = oom::follow(&groups, tell).await {
                    tracing::debug!("Want of memory is told at the end only: {}", err.chain());
                }
            });
        }
        let container = Arc::clone(self);
        let process = Arc::clone(process);
        tokio::spawn(async move {
            let exit = child.exit().await;
            container.ended(&process, exit).await;
        });
        Ok(pid)
    }

    /// Tells containerd if the kernel has killed a process for want of memory since last time.
    fn tell_oom(&self) -> bool {
        let kills = self.groups.get().map_or(0, Groups::oom_kills);
        let new = self.oom_kills.swap(kills, Ordering::Relaxed) < kills;
        if new {
            self.shim.publisher.publish(&TaskOOM {
                container_id: self.id.clone(),
                ..TaskOOM::default()
            });
        }
        new
    }

    async fn ended(&self, process: &Process, exit: Exit) {
        self.tell_oom();
        if process.exec_id.is_empty() && !self.own_pid_namespace {
            // Nothing but the first process's end says that the others shall go too.
            let _ = self.runc.kill(9, true).await;
        }
        process.exited(&self.id, exit, &self.shim.publisher).await;
    }

    async fn start_exec(self: &Arc<Self>, exec: &Exec) -> Result<u32> {
        let process = &exec.process;
        let name = process.exec_id.replace('/', "_");
        let pid_file = self.bundle.join(format!("{name}.pid"));
        let spec = self.bundle.join(format!("{name}-process.json"));
        tokio::fs::write(&spec, exec.spec.as_slice())
            .await
            .map_err(ShimError::io(format!("write {}", spec.display())))?;
        let (io, finish) = self.connect(process).await?.split();
        let made = self.runc.exec(&spec, &pid_file, io).await;
        let pid = self.adopt(process, finish, made, &pid_file).await;
        let _ = tokio::fs::remove_file(&spec).await;
        match pid {
            Ok(pid) => {
                process.started(pid);
                Ok(pid)
            }
            Err(err) => {
                process.finish_streams(Duration::ZERO).await;
                process.set_exit(Exit::now(255));
                Err(err)
            }
        }
    }

    fn execs(&self) -> MutexGuard<'_, HashMap<String, Exec>> {
        self.execs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn exec_of(&self, exec_id: &str) -> Result<Exec> {
        self.execs()
            .get(exec_id)
            .cloned()
            .ok_or_else(|| ShimError::NotFound {
                kind: "process",
                id: exec_id.to_owned(),
            })
    }

    async fn delete_first(&self) -> Result<(u32, Exit)> {
        if self.first.phase() == Phase::Running {
            return Err(ShimError::WrongState {
                action: "delete",
                id: self.id.clone(),
                state: "running".into(),
            });
        }
        self.runc
            .delete(self.first.phase() == Phase::Created)
            .await?;
        let exit = self.first.wait_for(KILL_LIMIT).await?;
        self.first.finish_streams(STREAMS_LIMIT).await;
        let execs: Vec<Exec> = self.execs().drain().map(|(_, exec)| exec).collect();
        for exec in execs {
            exec.process.finish_streams(Duration::ZERO).await;
        }
        let rootfs = self.bundle.join("rootfs");
        blocking(move || mounts::unmount_all(&rootfs)).await?;
        Ok((self.first.pid(), exit))
    }
}

#[async_trait]
impl Container for RuncContainer {
    fn bundle(&self) -> &Path {
        &self.bundle
    }

    fn process(&self, exec_id: &str) -> Result<Arc<Process>> {
        if exec_id.is_empty() {
            return Ok(Arc::clone(&self.first));
        }
        self.exec_of(exec_id).map(|exec| exec.process)
    }

    fn paused(&self) -> bool {
        self.paused.load(Ordering::Relaxed)
    }

    async fn start(&self, exec_id: &str) -> Result<u32> {
        if exec_id.is_empty() {
            self.runc.start().await?;
            let pid = self.first.pid();
            self.first.started(pid);
            return Ok(pid);
        }
        let exec = self.exec_of(exec_id)?;
        let container = self.this.upgrade().ok_or_else(|| ShimError::NotFound {
            kind: "task",
            id: self.id.clone(),
        })?;
        container.start_exec(&exec).await
    }

    async fn kill(&self, exec_id: &str, signal: u32, all: bool) -> Result<()> {
        if exec_id.is_empty() {
            return self.runc.kill(signal, all).await;
        }
        let process = self.exec_of(exec_id)?.process;
        match process.phase() {
            Phase::Created => {
                process.set_exit(Exit::now(128 + signal));
                Ok(())
            }
            Phase::Stopped => Err(ShimError::NotFound {
                kind: "process",
                id: exec_id.into(),
            }),
            Phase::Running => signal_process(process.pid(), signal),
        }
    }

    async fn exec(&self, exec_id: &str, uris: Uris, spec: Vec<u8>) -> Result<()> {
        if self.first.phase() == Phase::Stopped {
            return Err(ShimError::WrongState {
                action: "run a process in",
                id: self.id.clone(),
                state: "stopped".into(),
            });
        }
        let mut execs = self.execs();
        if execs.contains_key(exec_id) {
            return Err(ShimError::AlreadyExists {
                kind: "process",
                id: exec_id.into(),
            });
        }
        let process = Process::new(exec_id, uris, 0);
        execs.insert(
            exec_id.to_owned(),
            Exec {
                process,
                spec: Arc::new(spec),
            },
        );
        Ok(())
    }

    async fn pids(&self) -> Result<Vec<u32>> {
        self.runc.pids().await
    }

    async fn pause(&self) -> Result<()> {
        self.runc.pause().await?;
        self.paused.store(true, Ordering::Relaxed);
        Ok(())
    }

    async fn resume(&self) -> Result<()> {
        self.runc.resume().await?;
        self.paused.store(false, Ordering::Relaxed);
        Ok(())
    }

    async fn update(&self, resources: Vec<u8>) -> Result<()> {
        self.runc.update(resources).await
    }

    async fn stats(&self) -> Result<Any> {
        let pid = self.first.pid();
        blocking(move || Groups::of_process(pid)?.metrics()).await
    }

    async fn delete(&self, exec_id: &str) -> Result<(u32, Exit)> {
        if exec_id.is_empty() {
            return self.delete_first().await;
        }
        let process = self.exec_of(exec_id)?.process;
        match process.phase() {
            Phase::Running => Err(ShimError::WrongState {
                action: "delete",
                id: exec_id.into(),
                state: "running".into(),
            }),
            Phase::Created | Phase::Stopped => {
                process.set_exit(Exit::now(0));
                process.finish_streams(STREAMS_LIMIT).await;
                let name = exec_id.replace('/', "_");
                let _ = tokio::fs::remove_file(self.bundle.join(format!("{name}.pid"))).await;
                self.execs().remove(exec_id);
                Ok((process.pid(), process.wait().await))
            }
        }
    }
}

/// Streams on their way to a process.
enum Connection {
    Pipes(stdio::ProcessEnds, Streams),
    Console(ConsoleSocket),
}

enum Finish {
    Streams(Streams),
    Console(ConsoleSocket),
}

impl Connection {
    fn split(self) -> (Io, Finish) {
        match self {
            Self::Pipes(ends, streams) => (Io::Pipes(ends), Finish::Streams(streams)),
            Self::Console(socket) => (
                Io::Console(socket.path().to_owned()),
                Finish::Console(socket),
            ),
        }
    }
}

/// Signals one process by pid; a process that is gone is "not found".
pub fn signal_process(pid: u32, signal: u32) -> Result<()> {
    let gone = || ShimError::NotFound {
        kind: "process",
        id: pid.to_string(),
    };
    // 0 and negative numbers would mean whole groups.
    let target = i32::try_from(pid)
        .ok()
        .filter(|pid| *pid > 0)
        .ok_or_else(gone)?;
    // SAFETY: kill(2) takes plain numbers; a wrong signal is an error, not undefined behaviour.
    let done = unsafe { libc::kill(target, signal.cast_signed()) };
    if done == 0 {
        return Ok(());
    }
    let err = std::io::Error::last_os_error();
    if err.raw_os_error() == Some(libc::ESRCH) {
        return Err(gone());
    }
    Err(ShimError::Io {
        action: format!("send signal {signal} to {pid}"),
        source: err,
    })
}

/// Runs work that may block on a thread of its own.
pub async fn blocking<T, F>(work: F) -> Result<T>
where
    T: Send + 'static,
    F: FnOnce() -> Result<T> + Send + 'static,
{
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or_else(|err| Err(ShimError::Fault(err.to_string())))
}

fn has_own_pid_namespace(bundle: &Path) -> Result<bool> {
    let path = bundle.join("config.json");
    let spec = oci_spec::runtime::Spec::load(&path).map_err(|err| {
        ShimError::InvalidArgument(format!("{} is not an OCI spec: {err}", path.display()))
    })?;
    let namespaces = spec
        .linux()
        .as_ref()
        .and_then(|linux| linux.namespaces().as_ref());
    Ok(namespaces.is_some_and(|list| {
        list.iter()
            .any(|one| one.typ() == LinuxNamespaceType::Pid && one.path().is_none())
    }))
}
