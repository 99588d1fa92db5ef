//! containerd's task calls on a sandbox.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use oci_spec::runtime::LinuxResources;
use trenv_sandbox::ProcessSpec;
use trenv_sandbox::cgroup::Limits;
use trenv_sandbox_proto::State;

use super::container::{END_LIMIT, Exec, STREAMS_LIMIT, SandboxContainer, name_of};
use super::spec;
use super::tenancy::{Root, Seat, Seccomp, Tenancy, identify};
use crate::error::{Result, ShimError};
use crate::reap::Exit;
use crate::runc::{blocking, signal_process};
use crate::stats::Groups;
use crate::stdio::{self, Console, Overflow, Streams, Uris};
use crate::task::{Container, Phase, Process};

impl SandboxContainer {
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
            kept_root: None,
            seccomp: waiting.seccomp,
            restored: Vec::new(),
        };
        self.settle_tenancy(tenancy, None, "the function started cold")
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
                    .await;
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
        let seccomp = seccomp.map(Seccomp::read).transpose()?;
        let spec = spec::exec_process(&spec, seccomp.as_ref())?;
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
        blocking(move || seat.update(&limits)).await
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
