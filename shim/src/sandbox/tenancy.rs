//! One function's stay in a sandbox: its cgroup, its root process and its streams.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use containerd_shim_protos::protobuf::well_known_types::any::Any;
use oci_spec::runtime::LinuxSeccomp;
use rustix::event::{PollFd, PollFlags, Timespec};
use trenv_sandbox::cgroup::{Limits, TenancyCgroup};
use trenv_sandbox::rootfs::Mount;
use trenv_snapshot::TaskGroup;
use trenv_snapshot::zygote::Agent;

use crate::error::{Result, ShimError};
use crate::runc::signal_process;
use crate::stats::Groups;

const END_LIMIT: Duration = Duration::from_secs(10);

/// A tenancy's cgroup. On cgroup v1 an agent of the template's zygote sits in it, for what it
/// clones is born where it sits; the agent is no part of the tenancy.
#[derive(Debug)]
pub struct Seat {
    pub cgroup: TenancyCgroup,
    /// The template that the seat was made for; none for a cold function's.
    pub template: Option<TemplateRef>,
    agent_pid: Option<i32>,
    agent: Mutex<Option<Agent>>,
    /// Tells whether the agent still lives.
    agent_pidfd: Option<OwnedFd>,
    limits: Mutex<Option<Limits>>,
    /// The kernel never sets this counter back.
    oom_kills: AtomicU64,
}

/// A template and its generation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct TemplateRef {
    pub id: trenv_pool::TemplateId,
    pub generation: u64,
}

impl Seat {
    /// A seat for a process that does not come from a zygote's agent.
    pub fn plain(cgroup: TenancyCgroup) -> Self {
        Self {
            cgroup,
            template: None,
            agent_pid: None,
            agent: Mutex::new(None),
            agent_pidfd: None,
            limits: Mutex::new(None),
            oom_kills: AtomicU64::new(0),
        }
    }

    /// A seat with the agent that will clone into it, and the limits that its cgroup has.
    pub fn with_agent(
        cgroup: TenancyCgroup,
        template: TemplateRef,
        limits: Limits,
        agent: Agent,
    ) -> Result<Self> {
        let inside = cgroup.dir_fd().is_none().then(|| agent.pid());
        let pidfd = open_pidfd(agent.pid())?;
        Ok(Self {
            cgroup,
            template: Some(template),
            agent_pid: inside,
            agent: Mutex::new(Some(agent)),
            agent_pidfd: Some(pidfd),
            limits: Mutex::new(Some(limits)),
            oom_kills: AtomicU64::new(0),
        })
    }

    /// Whether the agent can still be asked for a start.
    pub fn agent_lives(&self) -> bool {
        let agent = self.agent.lock().unwrap_or_else(PoisonError::into_inner);
        agent.is_some()
            && self
                .agent_pidfd
                .as_ref()
                .is_some_and(|pidfd| !has_ended(pidfd))
    }

    /// Sets the tenancy's limits, unless the cgroup has them already.
    pub fn limit(&self, limits: &Limits) -> Result<()> {
        let mut known = self.limits.lock().unwrap_or_else(PoisonError::into_inner);
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
        *self.limits.lock().unwrap_or_else(PoisonError::into_inner) = None;
        self.cgroup
            .update(limits)
            .map_err(ShimError::engine("set the tenancy's limits"))
    }

    /// Works with the agent, one at a time. After a failure it is no more used: what it still says
    /// about this start would be taken for the answer to the next one.
    pub fn with<T>(&self, work: impl FnOnce(&mut Agent) -> Result<T>) -> Result<T> {
        let mut agent = self.agent.lock().unwrap_or_else(PoisonError::into_inner);
        match agent.as_mut() {
            Some(living) => work(living).inspect_err(|_| drop(agent.take())),
            None => Err(ShimError::Fault("the tenancy's cgroup has no agent".into())),
        }
    }

    /// Ends the agent and removes the cgroup. May be repeated.
    pub fn remove(&self) -> Result<()> {
        drop(
            self.agent
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .take(),
        );
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
        Ok(pids
            .into_iter()
            .filter(|pid| Some(*pid) != self.agent_pid)
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
        let mut pause = Duration::from_micros(100);
        while !self.pids()?.is_empty() {
            if begun.elapsed() > END_LIMIT {
                return Err(ShimError::Timeout {
                    what: "The end of the tenancy's processes".into(),
                    limit: END_LIMIT,
                });
            }
            // Each round meets what was forked during the last one.
            self.signal_all(libc::SIGKILL.cast_unsigned())?;
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(10));
        }
        Ok(())
    }

    /// Whether the kernel has killed a process here for want of memory since the last question.
    pub fn new_oom_kills(&self) -> bool {
        let kills = Groups::of_dirs(&self.cgroup.dirs()).map_or(0, |groups| groups.oom_kills());
        self.oom_kills.swap(kills, Ordering::Relaxed) < kills
    }

    /// Figures of the tenancy's cgroup.
    pub fn metrics(&self) -> Result<Any> {
        Groups::of_dirs(&self.cgroup.dirs())?.metrics()
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
    pub fn of_host_pid(pid: i32) -> Result<Self> {
        let action = || ShimError::io(format!("look at the restored process {pid}"));
        let pidfd = open_pidfd(pid)?;
        let status =
            std::fs::read_to_string(format!("/proc/{pid}/status")).map_err(|err| action()(err))?;
        let inside = status
            .lines()
            .find_map(|line| line.strip_prefix("NSpid:"))
            .and_then(|pids| pids.split_whitespace().next_back()?.parse().ok())
            .ok_or_else(|| action()(io::Error::from(io::ErrorKind::InvalidData)))?;
        Ok(Self {
            pid: pid.cast_unsigned(),
            pid_in_sandbox: inside,
            pidfd,
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

/// A tenancy that has a running function.
#[derive(Debug)]
pub struct Tenancy {
    pub id: String,
    pub seat: Arc<Seat>,
    pub root: Root,
    pub stdio: [Option<(u64, u64)>; 3],
    /// The mounts of its root, for writing its upper layer through.
    pub mounts: Vec<Mount>,
    pub seccomp: Option<LinuxSeccomp>,
    /// Host pids of a tree that came from a template, in the template's order.
    pub restored: Vec<i32>,
}

fn open_pidfd(pid: i32) -> Result<OwnedFd> {
    rustix::process::Pid::from_raw(pid)
        .ok_or(rustix::io::Errno::SRCH)
        .and_then(|pid| rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()))
        .map_err(ShimError::io(format!("open the process {pid}")))
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
