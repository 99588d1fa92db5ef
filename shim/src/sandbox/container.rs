//! A sandbox as a container and task of containerd.
//!
//! One lock guards what the sandbox is: its phase, its tenancy, the exits that nobody has asked for
//! yet. Changes that take long do not hold it; they claim the sandbox by its phase (Resetting,
//! Restoring), and only the claimant leads it out again. [`SandboxContainer::die`] ends it from any
//! phase, once.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use async_trait::async_trait;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use oci_spec::runtime::LinuxResources;
use trenv_cni::Netns;
use trenv_sandbox::cgroup::Limits;
use trenv_sandbox::{ProcessSpec, Sandbox};
use trenv_sandbox_proto::{SandboxInfo, State};

use super::Sandboxes;
use super::spec::{self, Kind, SandboxSpec};
use super::tenancy::{Root, Seat, Tenancy, identify};
use crate::error::{Result, ShimError};
use crate::reap::Exit;
use crate::runc::{blocking, signal_process};
use crate::stats::Groups;
use crate::stdio::{self, Console, Overflow, Owner, Streams, Uris};
use crate::task::{Container, Phase, Process};

/// A killed sandbox is gone within this.
pub const END_LIMIT: Duration = Duration::from_secs(15);
/// Output still in the pipes when a process is deleted gets this long.
const STREAMS_LIMIT: Duration = Duration::from_secs(2);
/// Exits kept for processes that nobody has claimed yet.
const EXITS_KEPT: usize = 256;

/// A sandbox.
pub struct SandboxContainer {
    pub id: String,
    pub bundle: PathBuf,
    pub owner: Owner,
    pub first: Arc<Process>,
    pub sandbox: Arc<Sandbox>,
    pub netns: Netns,
    pub all: Arc<Sandboxes>,
    pub this: Weak<Self>,
    state: Mutex<Inner>,
    /// Held while resources are given back, so that Delete waits for a death under way.
    release: tokio::sync::Mutex<()>,
}

/// What the lock guards.
pub struct Inner {
    pub phase: State,
    pub paused: bool,
    /// The cold function that `start` will run.
    pub waiting: Option<Waiting>,
    pub tenancy: Option<Tenancy>,
    execs: HashMap<String, Exec>,
    /// Starts under way.
    starting: u32,
    /// Exits that came before anybody knew the process, by pid in the sandbox.
    exits: HashMap<i32, Exit>,
    /// Seats still to be given back.
    pub seats: Vec<Arc<Seat>>,
    /// A capability that a process in here had and by which it may have changed what a purge does
    /// not look at: such a sandbox ends with its tenancy.
    pub unfit: Option<&'static str>,
}

/// A created function that has not started.
pub struct Waiting {
    pub tenancy: String,
    pub process: ProcessSpec,
    pub seccomp: Option<oci_spec::runtime::LinuxSeccomp>,
    pub seat: Arc<Seat>,
    pub mounts: Vec<trenv_sandbox::rootfs::Mount>,
}

#[derive(Clone)]
struct Exec {
    process: Arc<Process>,
    spec: ProcessSpec,
    pid_in_sandbox: i32,
}

impl SandboxContainer {
    /// A sandbox whose pid 1 waits.
    pub fn new(
        all: &Arc<Sandboxes>,
        spec: &SandboxSpec,
        parts: Made,
        waiting: Option<Waiting>,
    ) -> Arc<Self> {
        let Made {
            id,
            bundle,
            uris,
            sandbox,
            netns,
        } = parts;
        let first = Process::new("", uris, sandbox.init_pid().cast_unsigned());
        // A function that waits for its start is being brought up; nothing else may claim it.
        let phase = if spec.kind == Kind::Idle {
            State::IDLE
        } else {
            State::RESTORING
        };
        let seats = waiting
            .iter()
            .map(|waiting| Arc::clone(&waiting.seat))
            .collect();
        Arc::new_cyclic(|this| Self {
            owner: Owner {
                namespace: all.namespace.clone(),
                container: id.clone(),
            },
            id,
            bundle,
            first,
            sandbox: Arc::new(sandbox),
            netns,
            all: Arc::clone(all),
            this: Weak::clone(this),
            state: Mutex::new(Inner {
                phase,
                paused: false,
                waiting,
                tenancy: None,
                execs: HashMap::new(),
                starting: 0,
                exits: HashMap::new(),
                seats,
                unfit: None,
            }),
            release: tokio::sync::Mutex::new(()),
        })
    }

    pub fn lock(&self) -> MutexGuard<'_, Inner> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What `List` and `Watch` tell.
    pub fn info(&self) -> SandboxInfo {
        let state = self.lock();
        let tenancy = state.tenancy.as_ref();
        SandboxInfo {
            id: self.id.clone(),
            state: state.phase.into(),
            tenancy: tenancy
                .map(|tenancy| tenancy.id.clone())
                .unwrap_or_default(),
            address: self.netns.address().to_string(),
            init_pid: self.sandbox.init_pid().cast_unsigned(),
            template_id: tenancy
                .and_then(|tenancy| tenancy.seat.template)
                .map(|template| template.id.to_string())
                .unwrap_or_default(),
            ..SandboxInfo::default()
        }
    }

    /// Tells watchers of a change.
    pub fn tell(&self, reason: impl Into<String>) {
        self.all.watch.add(self.info(), reason.into());
    }

    /// Claims the sandbox for a change that takes long.
    pub fn claim(&self, action: &'static str, from: State, to: State) -> Result<()> {
        {
            let mut state = self.lock();
            let wrong = |state: String| ShimError::WrongState {
                action,
                id: self.id.clone(),
                state,
            };
            if state.phase != from {
                return Err(wrong(name_of(state.phase).into()));
            }
            if state.paused {
                return Err(wrong("paused".into()));
            }
            if self.first.phase() != Phase::Running {
                return Err(wrong(format!("a task that is {}", self.first.phase())));
            }
            state.phase = to;
        }
        self.tell(action);
        Ok(())
    }

    /// Leads a claimed sandbox on, unless it has died meanwhile.
    pub fn settle(&self, to: State, reason: &str, change: impl FnOnce(&mut Inner)) -> Result<()> {
        {
            let mut state = self.lock();
            if state.phase == State::DEAD {
                return Err(ShimError::Fault(format!(
                    "the sandbox {} died during the change",
                    self.id
                )));
            }
            change(&mut state);
            state.phase = to;
        }
        self.tell(reason);
        Ok(())
    }

    /// Makes a running function the sandbox's tenancy. Its root may have ended already.
    pub fn settle_ready(&self, tenancy: Tenancy, reason: &str) -> Result<()> {
        let inside = tenancy.root.pid_in_sandbox;
        let mut ended = None;
        self.settle(State::READY, reason, |state| {
            ended = state.exits.remove(&inside);
            state.tenancy = Some(tenancy);
        })?;
        if let Some(exit) = ended {
            self.spawn_death(exit, "the function ended");
        }
        Ok(())
    }

    /// Takes an exit that pid 1 reports.
    pub fn reported(&self, pid_in_sandbox: i32, exit: Exit) {
        let mut state = self.lock();
        let exec = state
            .execs
            .values()
            .find(|exec| exec.pid_in_sandbox == pid_in_sandbox)
            .cloned();
        if let Some(exec) = exec {
            drop(state);
            self.spawn_exec_exit(exec.process, exit);
            return;
        }
        let is_root = state
            .tenancy
            .as_ref()
            .is_some_and(|tenancy| tenancy.root.pid_in_sandbox == pid_in_sandbox);
        if is_root && state.phase == State::READY {
            drop(state);
            self.spawn_death(exit, "the function ended");
            return;
        }
        if state.starting > 0 && state.exits.len() < EXITS_KEPT {
            state.exits.insert(pid_in_sandbox, exit);
        }
    }

    fn spawn_exec_exit(&self, process: Arc<Process>, exit: Exit) {
        let (id, publisher) = (self.id.clone(), self.all.publisher.clone());
        tokio::spawn(async move { process.exited(&id, exit, &publisher).await });
    }

    /// Starts the end of the sandbox.
    pub fn spawn_death(&self, exit: Exit, reason: &'static str) {
        if let Some(this) = self.this.upgrade() {
            tokio::spawn(async move { this.die(exit, reason).await });
        }
    }

    /// Ends the sandbox from any phase: processes, namespaces, cgroups, address; then tells
    /// containerd. Only the first call does it; what could not be given back is tried again by
    /// Delete.
    pub async fn die(&self, exit: Exit, reason: &str) {
        {
            let mut state = self.lock();
            if state.phase == State::DEAD {
                return;
            }
            state.phase = State::DEAD;
            state.waiting = None;
            state.tenancy = None;
        }
        tracing::info!(
            "Sandbox {} ends with status {}: {reason}",
            self.id,
            exit.status
        );
        self.tell(reason);
        self.all.note_exit(self, exit);
        if let Err(err) = self.release().await {
            tracing::error!(
                "Not everything of {} was given back: {}",
                self.id,
                err.chain()
            );
        }
        let execs: Vec<Exec> = self.lock().execs.values().cloned().collect();
        for exec in execs {
            exec.process
                .exited(&self.id, Exit::now(137), &self.all.publisher)
                .await;
        }
        self.first.exited(&self.id, exit, &self.all.publisher).await;
    }

    /// Gives everything back. May be repeated.
    pub async fn release(&self) -> Result<()> {
        let _turn = self.release.lock().await;
        let Some(this) = self.this.upgrade() else {
            return Ok(());
        };
        blocking(move || {
            this.sandbox
                .destroy()
                .map_err(ShimError::engine("end the sandbox"))?;
            let seats = std::mem::take(&mut this.lock().seats);
            let mut kept = Vec::new();
            let mut failure = None;
            for seat in seats {
                let gone = seat
                    .kill_all()
                    .and_then(|()| this.all.templates.give_back(Arc::clone(&seat)));
                if let Err(err) = gone {
                    kept.push(seat);
                    failure.get_or_insert(err);
                }
            }
            this.lock().seats = kept;
            this.netns
                .destroy()
                .map_err(ShimError::engine("give the network namespace back"))?;
            failure.map_or(Ok(()), Err)
        })
        .await
    }

    /// Runs the waiting function, if there is one.
    async fn start_function(&self) -> Result<()> {
        let waiting = self.lock().waiting.take();
        let Some(waiting) = waiting else {
            // Idle: pid 1 runs already.
            return Ok(());
        };
        let uris = self.all.function_uris(&self.id, &self.first.uris);
        let _starting = self.starting();
        let running = self
            .run(waiting.process, &uris, Arc::clone(&waiting.seat))
            .await?;
        self.first.connect(running.streams, running.console);
        let tenancy = Tenancy {
            id: waiting.tenancy,
            seat: waiting.seat,
            root: running.root,
            stdio: running.stdio,
            mounts: waiting.mounts,
            seccomp: waiting.seccomp,
            restored: Vec::new(),
        };
        self.settle_ready(tenancy, "the function started cold")
    }

    async fn start_exec(&self, exec_id: &str) -> Result<u32> {
        let exec = self.exec_of(exec_id)?;
        let seat = self.seat("run a process in")?;
        let _starting = self.starting();
        let running = match self.run(exec.spec, &exec.process.uris, seat).await {
            Ok(running) => running,
            Err(err) => {
                exec.process.set_exit(Exit::now(255));
                return Err(err);
            }
        };
        exec.process.connect(running.streams, running.console);
        exec.process.started(running.root.pid);
        let inside = running.root.pid_in_sandbox;
        let ended = {
            let mut state = self.lock();
            if let Some(exec) = state.execs.get_mut(exec_id) {
                exec.pid_in_sandbox = inside;
            }
            state.exits.remove(&inside)
        };
        if let Some(exit) = ended {
            self.spawn_exec_exit(exec.process, exit);
        }
        Ok(running.root.pid)
    }

    /// Starts a process inside, with streams.
    async fn run(&self, process: ProcessSpec, uris: &Uris, seat: Arc<Seat>) -> Result<Running> {
        if let Some(capability) = process.unfit_for_reuse() {
            self.lock().unfit = Some(capability);
        }
        let terminal = process.terminal.is_some();
        let (ends, streams) = if terminal {
            (stdio::ProcessEnds::nowhere()?, None)
        } else {
            let (ends, streams) = stdio::pipes(uris, &self.owner, Overflow::Drop).await?;
            (ends, Some(streams))
        };
        let stdio = identify(&ends.0);
        let sandbox = Arc::clone(&self.sandbox);
        let spawned = blocking(move || {
            sandbox
                .spawn(&process, ends.0, &seat.cgroup)
                .map_err(ShimError::engine("start the process"))
        })
        .await?;
        let (streams, console) = match (streams, spawned.terminal) {
            (Some(streams), _) => (streams, None),
            (None, Some(master)) => {
                let console = Console::new(master)?;
                let streams = stdio::console(&console, uris, &self.owner, Overflow::Drop).await?;
                (streams, Some(console))
            }
            (None, None) => return Err(ShimError::Fault("the process got no terminal".into())),
        };
        let root = Root {
            pid: spawned.pid.cast_unsigned(),
            pid_in_sandbox: spawned.pid_in_sandbox,
            pidfd: spawned.pidfd,
        };
        Ok(Running {
            root,
            streams,
            console,
            stdio,
        })
    }

    /// Keeps exits of unknown processes until the value is dropped: one of them may be the process
    /// that is just being started.
    pub fn starting(&self) -> Starting<'_> {
        self.lock().starting += 1;
        Starting(self)
    }

    /// The tenancy's cgroup.
    fn seat(&self, action: &'static str) -> Result<Arc<Seat>> {
        let state = self.lock();
        match &state.tenancy {
            Some(tenancy) if state.phase == State::READY => Ok(Arc::clone(&tenancy.seat)),
            _ => Err(ShimError::WrongState {
                action,
                id: self.id.clone(),
                state: name_of(state.phase).into(),
            }),
        }
    }

    fn exec_of(&self, exec_id: &str) -> Result<Exec> {
        self.lock()
            .execs
            .get(exec_id)
            .cloned()
            .ok_or_else(|| ShimError::NotFound {
                kind: "process",
                id: exec_id.to_owned(),
            })
    }

    fn kill_first(&self, signal: u32, all: bool) -> Result<()> {
        let state = self.lock();
        match (&state.tenancy, state.phase) {
            (_, State::DEAD) => Err(ShimError::NotFound {
                kind: "process of",
                id: self.id.clone(),
            }),
            (Some(tenancy), State::READY) => {
                let done = if all {
                    tenancy.seat.signal_all(signal)
                } else {
                    tenancy.root.signal(signal)
                };
                if state.paused && signal == libc::SIGKILL.cast_unsigned() {
                    // A frozen task of cgroup v1 dies only when it is thawed.
                    tenancy
                        .seat
                        .cgroup
                        .thaw()
                        .map_err(ShimError::engine("thaw the function"))?;
                }
                done
            }
            _ => {
                drop(state);
                // Signal 0 only asks whether there is something to signal.
                if signal != 0 {
                    self.spawn_death(Exit::now(128 + signal), "the idle sandbox was killed");
                }
                Ok(())
            }
        }
    }

    async fn delete_first(&self) -> Result<(u32, Exit)> {
        match self.first.phase() {
            Phase::Running => {
                return Err(ShimError::WrongState {
                    action: "delete",
                    id: self.id.clone(),
                    state: "running".into(),
                });
            }
            Phase::Created => {
                self.die(Exit::now(137), "it was deleted before its start")
                    .await
            }
            Phase::Stopped => {}
        }
        let exit = self.first.wait_for(END_LIMIT).await?;
        self.release().await?;
        let execs: Vec<Exec> = self.lock().execs.drain().map(|(_, exec)| exec).collect();
        for exec in execs {
            exec.process.finish_streams(Duration::ZERO).await;
        }
        self.first.finish_streams(STREAMS_LIMIT).await;
        self.all.forget(&self.id)?;
        Ok((self.first.pid(), exit))
    }
}

#[async_trait]
impl Container for SandboxContainer {
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
        self.lock().paused
    }

    async fn start(&self, exec_id: &str) -> Result<u32> {
        if !exec_id.is_empty() {
            return self.start_exec(exec_id).await;
        }
        if let Err(err) = self.start_function().await {
            // In a task of its own, for the exit's event waits for this start to be over.
            self.spawn_death(Exit::now(255), "its function did not start");
            let _ = self.first.wait_for(END_LIMIT).await;
            return Err(err);
        }
        let pid = self.first.pid();
        self.first.started(pid);
        Ok(pid)
    }

    async fn kill(&self, exec_id: &str, signal: u32, all: bool) -> Result<()> {
        if exec_id.is_empty() {
            return self.kill_first(signal, all);
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
        self.seat("run a process in")?;
        let mut state = self.lock();
        let seccomp = state
            .tenancy
            .as_ref()
            .and_then(|tenancy| tenancy.seccomp.as_ref());
        let spec = spec::exec_process(&spec, seccomp)?;
        if state.execs.contains_key(exec_id) {
            return Err(ShimError::AlreadyExists {
                kind: "process",
                id: exec_id.into(),
            });
        }
        let process = Process::new(exec_id, uris, 0);
        state.execs.insert(
            exec_id.to_owned(),
            Exec {
                process,
                spec,
                pid_in_sandbox: 0,
            },
        );
        Ok(())
    }

    async fn pids(&self) -> Result<Vec<u32>> {
        let seat = self
            .lock()
            .tenancy
            .as_ref()
            .map(|tenancy| Arc::clone(&tenancy.seat));
        let mut pids = vec![self.first.pid()];
        if let Some(seat) = seat {
            pids.extend(seat.pids()?);
        }
        Ok(pids)
    }

    async fn pause(&self) -> Result<()> {
        let seat = self.seat("pause")?;
        let frozen = Arc::clone(&seat);
        blocking(move || {
            frozen
                .cgroup
                .freeze()
                .map_err(ShimError::engine("pause the function"))
        })
        .await?;
        self.lock().paused = true;
        Ok(())
    }

    async fn resume(&self) -> Result<()> {
        let seat = self.seat("resume")?;
        blocking(move || {
            seat.cgroup
                .thaw()
                .map_err(ShimError::engine("resume the function"))
        })
        .await?;
        self.lock().paused = false;
        Ok(())
    }

    async fn update(&self, resources: Vec<u8>) -> Result<()> {
        let resources: LinuxResources = serde_json::from_slice(&resources).map_err(|err| {
            ShimError::InvalidArgument(format!("The resources are not OCI's: {err}"))
        })?;
        let limits = Limits::from_oci(&resources)
            .map_err(|err| ShimError::InvalidArgument(err.to_string()))?;
        let seat = self.seat("change the limits of")?;
        blocking(move || {
            seat.cgroup
                .update(&limits)
                .map_err(ShimError::engine("set the limits"))
        })
        .await
    }

    async fn stats(&self) -> Result<Any> {
        let seat = self
            .lock()
            .tenancy
            .as_ref()
            .map(|tenancy| Arc::clone(&tenancy.seat));
        let pid = self.first.pid();
        blocking(move || match seat {
            Some(seat) => seat.metrics(),
            None => Groups::of_process(pid)?.metrics(),
        })
        .await
    }

    async fn delete(&self, exec_id: &str) -> Result<(u32, Exit)> {
        if exec_id.is_empty() {
            return self.delete_first().await;
        }
        let process = self.exec_of(exec_id)?.process;
        if process.phase() == Phase::Running {
            return Err(ShimError::WrongState {
                action: "delete",
                id: exec_id.into(),
                state: "running".into(),
            });
        }
        process.set_exit(Exit::now(0));
        process.finish_streams(STREAMS_LIMIT).await;
        self.lock().execs.remove(exec_id);
        Ok((process.pid(), process.wait().await))
    }
}

/// A process that has just been started.
struct Running {
    root: Root,
    streams: Streams,
    console: Option<Console>,
    stdio: [Option<(u64, u64)>; 3],
}

/// See [`SandboxContainer::starting`].
pub struct Starting<'a>(&'a SandboxContainer);

impl Drop for Starting<'_> {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.starting -= 1;
        if state.starting == 0 {
            // Pids come again; what nobody has claimed by now belongs to nobody.
            state.exits.clear();
        }
    }
}

/// A phase in words.
pub fn name_of(phase: State) -> &'static str {
    match phase {
        State::IDLE => "idle",
        State::RESETTING => "being reset",
        State::RESTORING => "being started",
        State::READY => "running a function",
        State::DEAD => "dead",
        State::STATE_UNSPECIFIED => "unknown",
    }
}

/// What a new sandbox consists of.
pub struct Made {
    pub id: String,
    pub bundle: PathBuf,
    pub uris: Uris,
    pub sandbox: Sandbox,
    pub netns: Netns,
}
