//! One function's stay in a sandbox: its cgroup, its root process and its streams.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use containerd_shim_protos::protobuf::well_known_types::any::Any;
use oci_spec::runtime::LinuxSeccomp;
use rustix::event::{PollFd, PollFlags, Timespec};
use serde_json::value::RawValue;
use trenv_sandbox::cgroup::{Limits, TenancyCgroup};
use trenv_sandbox::rootfs::{KeptRoot, Mount};
use trenv_snapshot::TaskGroup;
use trenv_snapshot::methods::{Method, Prepared};
use trenv_snapshot::zygote::{Agent, PreparedClone, StartRequest, Started};

use crate::error::{Result, ShimError};
use crate::runc::signal_process;
use crate::stats::Groups;
use crate::template::{lock, start_error};

const END_LIMIT: Duration = Duration::from_secs(10);
/// How long one round of killing waits before it looks for processes again.
const END_ROUND: Duration = Duration::from_millis(20);
const END_PAUSE: Duration = Duration::from_micros(100);

/// A tenancy's cgroup, with a clone of the template's zygote that waits in it for its start. On
/// cgroup v1 an agent of the zygote sits in it too, for what it clones is born where it sits; the
/// agent is no part of the tenancy.
#[derive(Debug)]
pub struct Seat {
    pub cgroup: TenancyCgroup,
    /// The template that the seat was made for; none for a cold function's.
    pub template: Option<TemplateRef>,
    agent_pid: Option<i32>,
    agent: Mutex<Option<Agent>>,
    clone: Mutex<Option<PreparedClone>>,
    /// By which its clones are started.
    method: Option<Prepared>,
    limits: Mutex<Option<Limits>>,
    /// The kernel never sets this counter back.
    oom_kills: AtomicU64,
    groups: OnceLock<Groups>,
}

/// A template and its generation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct TemplateRef {
    pub id: trenv_pool::TemplateId,
    pub generation: u64,
    /// The start method that it is prepared for.
    pub method: Method,
}

impl Seat {
    /// A seat for a process that does not come from a zygote's agent.
    pub fn plain(cgroup: TenancyCgroup) -> Self {
        Self {
            cgroup,
            template: None,
            agent_pid: None,
            agent: Mutex::new(None),
            clone: Mutex::new(None),
            method: None,
            limits: Mutex::new(None),
            oom_kills: AtomicU64::new(0),
            groups: OnceLock::new(),
        }
    }

    /// A seat for starts from a template, with the limits that its cgroup has and the agent that will
    /// clone into it, if that is how trees are made.
    pub fn of_template(
        cgroup: TenancyCgroup,
        template: TemplateRef,
        method: Prepared,
        limits: Limits,
        agent: Option<Agent>,
    ) -> Self {
        let inside = agent.as_ref().filter(|_| cgroup.dir_fd().is_none());
        Self {
            template: Some(template),
            agent_pid: inside.map(Agent::pid),
            agent: Mutex::new(agent),
            method: Some(method),
            limits: Mutex::new(Some(limits)),
            ..Self::plain(cgroup)
        }
    }

    /// Whether a tree can still be started here, though no clone waits.
    pub fn can_start(&self) -> bool {
        self.by_criu() || lock(&self.agent).as_ref().is_some_and(Agent::lives)
    }

    fn by_criu(&self) -> bool {
        matches!(self.method, Some(Prepared::Criu(_)))
    }

    /// Whether its clones are made and started by this, and nothing that was built later.
    pub fn starts_by(&self, method: &Prepared) -> bool {
        self.method.as_ref().is_some_and(|own| own.is(method))
    }

    /// Ends the agent, and so its hold on the zygote's memory; the tenancy goes on.
    pub fn leave_zygote(&self) {
        drop(lock(&self.agent).take());
    }

    /// Sets the tenancy's limits, unless the cgroup has them already.
    pub fn limit(&self, limits: &Limits) -> Result<()> {
        let mut known = lock(&self.limits);
        if known.as_ref() == Some(limits) {
            return Ok(());
        }
        *known = None;
        self.cgroup
            .update(limits)
            .map_err(ShimError::engine("set the tenancy's limits"))?;
        *known = Some(limits.clone());
        Ok(())
    }

    /// Changes the limits of a living tenancy.
    pub fn update(&self, limits: &Limits) -> Result<()> {
        // Whatever they are now, the next tenancy sets its own.
        *lock(&self.limits) = None;
        self.cgroup
            .update(limits)
            .map_err(ShimError::engine("set the tenancy's limits"))
    }

    /// Whether a clone waits here for its start, or none is needed.
    pub fn is_prepared(&self) -> bool {
        self.by_criu() || lock(&self.clone).as_ref().is_some_and(PreparedClone::lives)
    }

    /// Makes the clone, unless it waits already.
    pub fn prepare(&self) -> Result<()> {
        if self.by_criu() {
            return Ok(());
        }
        let mut clone = lock(&self.clone);
        if !clone.as_ref().is_some_and(PreparedClone::lives) {
            *clone = Some(self.make_clone()?);
        }
        Ok(())
    }

    /// Ends the clone: the next start is to have a newer one.
    pub fn unprepare(&self) {
        *lock(&self.clone) = None;
    }

    /// The clone, for its start; one that was not made ahead is made now.
    pub fn take_clone(&self) -> Result<PreparedClone> {
        let ready = lock(&self.clone).take();
        match ready.filter(PreparedClone::lives) {
            Some(clone) => Ok(clone),
            None => self.make_clone(),
        }
    }

    /// Gives the clone's memory to the tree in a sandbox, or has CRIU make the tree there.
    pub fn start(&self, request: &StartRequest<'_>) -> Result<Started> {
        let started = match &self.method {
            Some(Prepared::Clones(method)) => method.start(self.take_clone()?, request),
            Some(Prepared::Criu(criu)) => criu.start(&self.cgroup.dirs(), request),
            None => return Err(no_agent()),
        };
        started.map_err(start_error)
    }

    /// After a failure the agent is no more used: what it still says about this clone would be taken
    /// for the answer to the next request.
    fn make_clone(&self) -> Result<PreparedClone> {
        let cgroup = self.cgroup.dir_fd();
        let mut agent = lock(&self.agent);
        match (agent.as_mut(), &self.method) {
            (Some(living), Some(Prepared::Clones(method))) => living
                .make_clone(cgroup)
                .and_then(|clone| method.ready(&clone).map(|()| clone))
                .map_err(start_error)
                .inspect_err(|_| drop(agent.take())),
            _ => Err(no_agent()),
        }
    }

    /// Ends clone and agent and removes the cgroup. May be repeated.
    pub fn remove(&self) -> Result<()> {
        self.unprepare();
        drop(lock(&self.agent).take());
        self.cgroup
            .kill_all()
            .and_then(|()| self.cgroup.remove())
            .map_err(ShimError::engine("remove a tenancy's cgroup"))
    }

    /// The tenancy's processes, without the agent.
    pub fn pids(&self) -> Result<Vec<u32>> {
        let pids = self
            .cgroup
            .pids()
            .map_err(ShimError::engine("list the tenancy's processes"))?;
        // The pid of one that has been ended may come again.
        let agent = self.agent_pid.filter(|_| lock(&self.agent).is_some());
        Ok(pids
            .into_iter()
            .filter(|pid| Some(*pid) != agent)
            .map(i32::cast_unsigned)
            .collect())
    }

    /// Signals every process of the tenancy.
    pub fn signal_all(&self, signal: u32) -> Result<()> {
        for pid in self.pids()? {
            match signal_process(pid, signal) {
                // It ended meanwhile.
                Err(ShimError::NotFound { .. }) | Ok(()) => {}
                Err(err) => return Err(err),
            }
        }
        Ok(())
    }

    /// Kills every process of the tenancy and waits until none is left.
    pub fn kill_all(&self) -> Result<()> {
        if self.agent_pid.is_none() {
            return self
                .cgroup
                .kill_all()
                .map_err(ShimError::engine("end the tenancy's processes"));
        }
        let begun = Instant::now();
        loop {
            let pids = self.pids()?;
            if pids.is_empty() {
                return Ok(());
            }
            if begun.elapsed() > END_LIMIT {
                return Err(ShimError::Timeout {
                    what: "The end of the tenancy's processes".into(),
                    limit: END_LIMIT,
                });
            }
            // One that has ended meanwhile cannot be opened. Each round meets what was forked during
            // the last one.
            let pids = pids.into_iter().map(u32::cast_signed);
            let pidfds: Vec<OwnedFd> = pids.filter_map(|pid| open_pidfd(pid).ok()).collect();
            self.signal_all(libc::SIGKILL.cast_unsigned())?;
            if pidfds.is_empty() {
                std::thread::sleep(END_PAUSE);
            }
            await_ends(&pidfds);
        }
    }

    /// Whether the kernel has killed a process here for want of memory since the last question.
    pub fn new_oom_kills(&self) -> bool {
        let kills = self.groups().map_or(0, Groups::oom_kills);
        self.oom_kills.swap(kills, Ordering::Relaxed) < kills
    }

    /// Figures of the tenancy's cgroup.
    pub fn metrics(&self) -> Result<Any> {
        self.groups()?.metrics()
    }

    /// Where the figures of the tenancy's cgroup are: looked up once, since a cgroup of version 1 lies
    /// in many places and serves many tenancies.
    pub fn groups(&self) -> Result<&Groups> {
        if let Some(groups) = self.groups.get() {
            return Ok(groups);
        }
        let groups = Groups::of_dirs(&self.cgroup.dirs())?;
        Ok(self.groups.get_or_init(|| groups))
    }
}

impl TaskGroup for Seat {
    fn pids(&self) -> io::Result<Vec<i32>> {
        let pids = Self::pids(self).map_err(|err| io::Error::other(err.chain()))?;
        Ok(pids.into_iter().map(u32::cast_signed).collect())
    }

    fn freeze(&self) -> io::Result<()> {
        self.cgroup.freeze().map_err(io::Error::other)
    }

    fn thaw(&self) -> io::Result<()> {
        self.cgroup.thaw().map_err(io::Error::other)
    }
}

/// The function's root process.
#[derive(Debug)]
pub struct Root {
    pub pid: u32,
    pub pid_in_sandbox: i32,
    pub pidfd: OwnedFd,
}

impl Root {
    /// The root process of a restored tree.
    pub fn of_started(started: &Started) -> Result<Self> {
        let pid = started.pids.first().copied().unwrap_or_default();
        Ok(Self {
            pid: pid.cast_unsigned(),
            pid_in_sandbox: started.root_pid,
            pidfd: open_pidfd(pid)?,
        })
    }

    /// Signals the process; the descriptor makes sure that it is still the same one.
    pub fn signal(&self, signal: u32) -> Result<()> {
        if has_ended(&self.pidfd) {
            return Err(ShimError::NotFound {
                kind: "process",
                id: self.pid.to_string(),
            });
        }
        signal_process(self.pid, signal)
    }
}

/// The seccomp profile of a tenancy, for what is executed in it later.
#[derive(Debug, Clone)]
pub enum Seccomp {
    Read(LinuxSeccomp),
    /// As a repurpose request has it: most tenancies never need it.
    Text(Box<RawValue>),
}

impl Seccomp {
    /// The profile.
    pub fn read(&self) -> Result<LinuxSeccomp> {
        match self {
            Self::Read(profile) => Ok(profile.clone()),
            Self::Text(text) => serde_json::from_str(text.get()).map_err(|err| {
                ShimError::InvalidArgument(format!(
                    "The seccomp profile of the tenancy's spec_json cannot be read: {err}"
                ))
            }),
        }
    }
}

/// A tenancy that has a running function.
#[derive(Debug)]
pub struct Tenancy {
    pub id: String,
    pub seat: Arc<Seat>,
    pub root: Root,
    pub stdio: [Option<(u64, u64)>; 3],
    /// The mounts of its root, for writing its upper layer through.
    pub mounts: Vec<Mount>,
    /// By which another tenancy may have the root, if nothing is written to it.
    pub kept_root: Option<KeptRoot>,
    pub seccomp: Option<Seccomp>,
    /// Host pids of a tree that came from a template, in the template's order.
    pub restored: Vec<i32>,
}

fn no_agent() -> ShimError {
    ShimError::Fault("the tenancy's cgroup has no agent".into())
}

fn open_pidfd(pid: i32) -> Result<OwnedFd> {
    rustix::process::Pid::from_raw(pid)
        .ok_or(rustix::io::Errno::SRCH)
        .and_then(|pid| rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()))
        .map_err(ShimError::io(format!("open the process {pid}")))
}

/// Waits until these processes have ended, for a moment.
fn await_ends(pidfds: &[OwnedFd]) {
    let until = Instant::now() + END_ROUND;
    for pidfd in pidfds {
        let left = until.saturating_duration_since(Instant::now());
        let left = Timespec::try_from(left).unwrap_or(Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        });
        // Whoever is still there is met in the next round.
        let _ = rustix::event::poll(&mut [PollFd::new(pidfd, PollFlags::IN)], Some(&left));
    }
}

/// A pidfd is readable once its process has ended.
fn has_ended(pidfd: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(pidfd, PollFlags::IN)];
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    rustix::event::poll(&mut fds, Some(&now)).is_ok_and(|ready| ready > 0)
}

/// Device and inode of each stream, by which a dump knows them again.
pub fn identify(stdio: &[OwnedFd; 3]) -> [Option<(u64, u64)>; 3] {
    stdio.each_ref().map(|fd| {
        let status = rustix::fs::fstat(fd.as_fd()).ok()?;
        Some((status.st_dev, status.st_ino))
    })
}
