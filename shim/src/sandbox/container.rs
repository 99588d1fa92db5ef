//! A sandbox as a container and task of containerd.
//!
//! One lock guards what the sandbox is: its phase, its tenancy, the exits that nobody has asked for
//! yet. Changes that take long do not hold it; they claim the sandbox by its phase (Resetting,
//! Restoring), and only the claimant leads it out again. [`SandboxContainer::die`] ends it from any
//! phase, once.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use containerd_shim_protos::events::task::TaskOOM;
use tokio::task::JoinSet;
use trenv_cni::Netns;
use trenv_sandbox::{ProcessSpec, Sandbox};
use trenv_sandbox_proto::{SandboxInfo, State};

use super::Sandboxes;
use super::change::{HOUSEKEEPING_PAUSE, Held};
use super::spec::{Kind, SandboxSpec};
use super::tenancy::{Seat, Seccomp, Tenancy};
use crate::error::{Result, ShimError};
use crate::oom;
use crate::reap::Exit;
use crate::runc::blocking;
use crate::stdio::{Owner, Uris};
use crate::task::{Phase, Process};

/// A killed sandbox is gone within this.
pub const END_LIMIT: Duration = Duration::from_secs(15);
/// Output still in the pipes when a process is deleted gets this long.
pub const STREAMS_LIMIT: Duration = Duration::from_secs(2);
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
    /// What lets it go on, while it is parked.
    pub parked: Option<Held>,
    pub execs: HashMap<String, Exec>,
    /// Starts under way.
    starting: u32,
    /// Exits that came before anybody knew the process, by pid in the sandbox.
    pub exits: HashMap<i32, Exit>,
    /// Follows the tenancy's memory; ends when it is replaced.
    following: JoinSet<()>,
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
    pub seccomp: Option<Seccomp>,
    pub seat: Arc<Seat>,
    pub mounts: Vec<trenv_sandbox::rootfs::Mount>,
}

/// A process that `Exec` added.
#[derive(Clone)]
pub struct Exec {
    pub process: Arc<Process>,
    pub spec: ProcessSpec,
    pub pid_in_sandbox: i32,
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
                parked: None,
                execs: HashMap::new(),
                starting: 0,
                exits: HashMap::new(),
                following: JoinSet::new(),
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
            if to == State::IDLE {
                state.following = JoinSet::new();
            }
        }
        self.tell(reason);
        Ok(())
    }

    /// Makes a running function the sandbox's tenancy, or one that is held before its first
    /// instruction. Its root may have ended already.
    pub fn settle_tenancy(
        &self,
        tenancy: Tenancy,
        parked: Option<Held>,
        reason: &str,
    ) -> Result<()> {
        let inside = tenancy.root.pid_in_sandbox;
        let mut ended = None;
        let following = self.follow_memory(&tenancy.seat);
        let to = match parked {
            Some(_) => State::PARKED,
            None => State::READY,
        };
        self.settle(to, reason, |state| {
            ended = state.exits.remove(&inside);
            state.tenancy = Some(tenancy);
            state.parked = parked;
            state.following = following;
        })?;
        if let Some(exit) = ended {
            self.spawn_death(exit, "the function ended");
        }
        Ok(())
    }

    /// Tells containerd of want of memory while the function goes on: a process that the kernel
    /// kills need not be its root.
    fn follow_memory(&self, seat: &Arc<Seat>) -> JoinSet<()> {
        let (seat, this) = (Arc::clone(seat), Weak::clone(&self.this));
        let mut following = JoinSet::new();
        following.spawn(async move {
            // The call that started the function goes first.
            tokio::time::sleep(HOUSEKEEPING_PAUSE).await;
            let tell = || this.upgrade().is_none_or(|this| this.tell_oom(&seat));
            let followed = match seat.groups() {
                Ok(groups) => oom::follow(groups, tell).await,
                Err(err) => Err(err),
            };
            if let Err(err) = followed {
                tracing::debug!("Want of memory is told at the end only: {}", err.chain());
            }
        });
        following
    }

    /// Tells containerd if the kernel has killed a process of a seat since last time.
    fn tell_oom(&self, seat: &Seat) -> bool {
        let new = seat.new_oom_kills();
        if new {
            tracing::warn!(
                "The kernel killed a process of {} for want of memory",
                self.id
            );
            self.all.publisher.publish(&TaskOOM {
                container_id: self.id.clone(),
                ..TaskOOM::default()
            });
        }
        new
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
        if is_root && matches!(state.phase, State::READY | State::PARKED) {
            drop(state);
            self.spawn_death(exit, "the function ended");
            return;
        }
        if state.starting > 0 && state.exits.len() < EXITS_KEPT {
            state.exits.insert(pid_in_sandbox, exit);
        }
    }

    /// Lets the processes of a paused function die with their pid 1, which has gone: the kernel waits
    /// for them, and frozen ones do not die.
    pub async fn thaw_dying(&self) {
        let seat = {
            let state = self.lock();
            let tenancy = state.tenancy.as_ref().filter(|_| state.paused);
            tenancy.map(|tenancy| Arc::clone(&tenancy.seat))
        };
        let Some(seat) = seat else { return };
        let thawed = blocking(move || {
            seat.cgroup
                .thaw()
                .map_err(ShimError::engine("thaw the function of a dead sandbox"))
        });
        if let Err(err) = thawed.await {
            tracing::warn!(
                "{} may not end before it is resumed: {}",
                self.id,
                err.chain()
            );
        }
    }

    pub fn spawn_exec_exit(&self, process: Arc<Process>, exit: Exit) {
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
        let tenancy = {
            let mut state = self.lock();
            if state.phase == State::DEAD {
                return;
            }
            state.phase = State::DEAD;
            state.waiting = None;
            state.parked = None;
            state.following = JoinSet::new();
            state.tenancy.take()
        };
        if let Some(tenancy) = tenancy {
            self.tell_oom(&tenancy.seat);
        }
        tracing::info!(
            "Sandbox {} ends with status {}: {reason}",
            self.id,
            exit.status
        );
        self.tell(reason);
        if let Some(this) = self.this.upgrade() {
            let noted = blocking(move || {
                this.all.note_exit(&this, exit);
                Ok(())
            });
            // What went wrong is in the log already.
            let _ = noted.await;
        }
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

    /// Keeps exits of unknown processes until the value is dropped: one of them may be the process
    /// that is just being started.
    pub fn starting(&self) -> Starting<'_> {
        self.lock().starting += 1;
        Starting(self)
    }
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
        State::PARKED => "holding a parked function",
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
