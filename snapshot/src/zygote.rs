//! The zygote: a template as a live process, cloned at every start.
//!
//! [`Zygote::build`] plans the address space and starts `trenv-zygote`, which takes its place in
//! the function's file system, maps the restorer's region and becomes the zygote. [`Zygote::agent`]
//! makes another task in the same address space, for a tenancy cgroup of its own; each
//! [`Agent::start`] clones the tree into one sandbox.

mod channel;
mod loader;

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::Child;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout};
use trenv_pool::TemplateReader;
use trenv_restorer::wire::{self, MARKS, Report};

use crate::fingerprint::{Fingerprint, FingerprintError};
use crate::manifest::{Manifest, ManifestError};
use crate::plan::{Plan, PlanError};
use crate::working_set::WorkingSet;
use channel::{receive, receive_from, send, socket_pair};
use loader::Loader;
pub use loader::fd as loader_fd;

/// How long building a zygote may take.
const BUILD_DEADLINE: Duration = Duration::from_secs(60);

/// What to build a zygote from.
#[derive(Debug)]
pub struct ZygoteRequest<'a> {
    pub template: &'a TemplateReader,
    /// The function's layers, read-only, as a detached mount.
    pub rootfs: OwnedFd,
    /// The program `trenv-zygote`.
    pub binary: &'a Path,
    /// Files `cgroup.procs` that the zygote writes itself into before it takes memory.
    pub cgroups: Vec<PathBuf>,
}

/// Why a zygote does not stand or a start failed.
#[derive(Debug, thiserror::Error)]
pub enum ZygoteError {
    #[error(
        "The template was taken on {template}, but this machine is {machine}; deploy the function again"
    )]
    Fingerprint { template: String, machine: String },
    #[error("Failed to describe this machine for the template")]
    Machine(#[from] FingerprintError),
    #[error("The template's description cannot be used")]
    Manifest(#[from] ManifestError),
    #[error("The template cannot be laid out")]
    Plan(#[from] PlanError),
    #[error("The template's pages cannot be used")]
    Pool(#[from] trenv_pool::PoolError),
    #[error("Failed to restore while {doing}")]
    Io { doing: String, source: io::Error },
    #[error("Failed to restore while {step}")]
    Step { step: String, source: io::Error },
    #[error("The restore did not end within {0:?}; is the machine out of memory?")]
    Deadline(Duration),
    #[error("The sandbox's pid 1 ended while the function was restored in it")]
    InitGone,
    #[error("The zygote has ended; the next start builds it anew")]
    Gone,
    #[error("The template has {} instances on this host, which is the most; let some end", wire::MAX_AGENTS - 1)]
    TooMany,
}

fn io_error(doing: &'static str) -> impl FnOnce(io::Error) -> ZygoteError {
    move |source| ZygoteError::Io {
        doing: doing.into(),
        source,
    }
}

fn errno(doing: &'static str) -> impl FnOnce(Errno) -> ZygoteError {
    move |errno| ZygoteError::Io {
        doing: doing.into(),
        source: errno.into(),
    }
}

/// A standing zygote. Dropping it ends it and its agents; trees cloned from it live on.
#[derive(Debug)]
pub struct Zygote {
    child: Mutex<Child>,
    pid: i32,
    control: Mutex<OwnedFd>,
    sentences: Arc<Vec<String>>,
    processes: usize,
    working_set: Mutex<WorkingSet>,
    stacks: Arc<Mutex<Stacks>>,
}

/// Which agents' stacks are in use.
#[derive(Debug)]
struct Stacks {
    /// The first that was never used.
    next: u32,
    /// Those of agents that were dropped; free once the agent has ended.
    left: Vec<(u32, OwnedFd)>,
}

impl Stacks {
    fn take(&mut self) -> Option<u32> {
        let ended = self.left.iter().position(|(_, agent)| {
            let mut poll = [PollFd::new(agent.as_fd(), PollFlags::POLLIN)];
            nix::poll::poll(&mut poll, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
        });
        if let Some(ended) = ended {
            return Some(self.left.swap_remove(ended).0);
        }
        let taken = self.next;
        (u64::from(taken) < wire::MAX_AGENTS).then(|| {
            self.next += 1;
            taken
        })
    }
}

impl Zygote {
    /// Builds a zygote; it stands, and its memory is in place, when this returns.
    ///
    /// # Errors
    /// When the template does not fit this machine or cannot be read, or the machine fails.
    pub fn build(request: ZygoteRequest<'_>) -> Result<Self, ZygoteError> {
        let manifest = Manifest::decode(request.template.manifest())?;
        let machine = Fingerprint::of_this_machine()?.to_string();
        if manifest.fingerprint != machine {
            return Err(ZygoteError::Fingerprint {
                template: manifest.fingerprint,
                machine,
            });
        }
        request.template.verify()?;
        let plan = Plan::of(&manifest, request.template.extents())?;
        let (ours, theirs) = socket_pair()?;
        let mut loader = Loader::of(&plan, &request)?;
        let child = loader.start(request.binary, &theirs, &request)?;
        drop(theirs);
        // The zygote has the mount now; ours would only keep it from going away with it.
        drop(request.rootfs);
        let zygote = Self {
            pid: i32::try_from(child.id()).unwrap_or_default(),
            child: Mutex::new(child),
            control: Mutex::new(ours),
            sentences: Arc::new(plan.sentences),
            processes: plan.processes,
            working_set: Mutex::new(WorkingSet::new(plan.stored, plan.file_pages, plan.tables)),
            stacks: Arc::new(Mutex::new(Stacks {
                next: 1,
                left: Vec::new(),
            })),
        };
        let control = lock(&zygote.control);
        let message = receive(
            control.as_fd(),
            Instant::now() + BUILD_DEADLINE,
            BUILD_DEADLINE,
        )?;
        zygote_error(&message.0, &zygote.sentences)?;
        drop(control);
        // The pages are in the zygote now; a second copy in the page cache serves nobody.
        // SAFETY: advice about a descriptor; no memory is passed.
        unsafe {
            libc::posix_fadvise(
                request.template.fd().as_raw_fd(),
                0,
                0,
                libc::POSIX_FADV_DONTNEED,
            )
        };
        Ok(zygote)
    }

    /// Host pid of the zygote.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// DRAM that the zygote's memory takes.
    ///
    /// # Errors
    /// When /proc cannot be read.
    pub fn resident_bytes(&self) -> Result<u64, ZygoteError> {
        let path = format!("/proc/{}/smaps_rollup", self.pid);
        let text =
            std::fs::read_to_string(path).map_err(io_error("reading the zygote's memory"))?;
        let rss = text.lines().find_map(|line| line.strip_prefix("Rss:"));
        let kilobytes = rss.and_then(|rss| rss.trim().strip_suffix(" kB")?.trim().parse().ok());
        Ok(kilobytes.unwrap_or(0u64) << 10)
    }

    /// Learns from an instance which pages its calls touch: those that they write are copied ahead
    /// by later clones, in a few large steps instead of a fault each, and those of files that they
    /// read are there in later clones from the start. Call it at a tenancy's end, before the tree is
    /// killed, with the pids of its start; it has an effect for the first few tenancies.
    ///
    /// # Errors
    /// When /proc cannot be read, as when the instance has ended. Nothing changes then.
    pub fn learn(&self, pids: &[i32]) -> Result<(), ZygoteError> {
        lock(&self.working_set)
            .learn(self.pid, pids)
            .map_err(io_error("reading page maps"))
    }

    /// Makes an agent. On cgroup v1 move [`Agent::pid`] into the tenancy's cgroups before its
    /// first start.
    ///
    /// # Errors
    /// When the zygote has ended or has as many agents as it can have.
    pub fn agent(&self) -> Result<Agent, ZygoteError> {
        let (ours, theirs) = socket_pair()?;
        let control = lock(&self.control);
        let number = lock(&self.stacks).take().ok_or(ZygoteError::TooMany)?;
        send(
            control.as_fd(),
            wire::request::AGENT,
            number,
            &[theirs.as_fd()],
        )?;
        drop(theirs);
        let deadline = Duration::from_secs(5);
        // Both answer that they wait for requests; a failure comes on the zygote's own socket.
        let first = receive(control.as_fd(), Instant::now() + deadline, deadline)?;
        if first.0.kind == wire::report::FAILED {
            receive(control.as_fd(), Instant::now() + deadline, deadline)?;
        }
        zygote_error(&first.0, &self.sentences)?;
        drop(control);
        let (message, pid) = receive(ours.as_fd(), Instant::now() + deadline, deadline)?;
        zygote_error(&message, &self.sentences)?;
        let process = rustix::process::Pid::from_raw(pid).ok_or(ZygoteError::Gone)?;
        let agent = rustix::process::pidfd_open(process, rustix::process::PidfdFlags::empty())
            .map_err(|errno| ZygoteError::Io {
                doing: "opening an agent".into(),
                source: errno.into(),
            })?;
        Ok(Agent {
            control: ours,
            pid,
            _turn: Some(Turn {
                number,
                agent: Some(agent),
                stacks: Arc::clone(&self.stacks),
            }),
            sentences: self.sentences.clone(),
            processes: self.processes,
            idle: true,
        })
    }
}

/// Start method `copy`: the tree's memory is copied from the pool for this one start, by a zygote
/// that ends with it. The reference that `template` is compared with.
///
/// Name the tenancy's cgroups in the zygote's request: its memory is the instance's.
///
/// # Errors
/// As [`Zygote::build`] and [`Agent::start`].
pub fn start_copy(
    zygote: ZygoteRequest<'_>,
    request: &StartRequest<'_>,
) -> Result<Started, ZygoteError> {
    let begun = Instant::now();
    let zygote = Zygote::build(zygote)?;
    let copied = begun.elapsed();
    let control = lock(&zygote.control).try_clone();
    let mut agent = Agent {
        control: control.map_err(io_error("keeping the control socket"))?,
        pid: zygote.pid,
        _turn: None,
        sentences: zygote.sentences.clone(),
        processes: zygote.processes,
        idle: true,
    };
    let mut started = agent.start(request)?;
    started.steps.insert(0, ("copy", copied));
    Ok(started)
}

impl Drop for Zygote {
    fn drop(&mut self) {
        let mut child = lock(&self.child);
        // It may have ended by itself.
        let _ = child.kill();
        let _ = child.wait();
    }
}

/// A task of a zygote that clones the tree into sandboxes, one after another.
#[derive(Debug)]
pub struct Agent {
    // Closing it ends the agent; what follows is dropped afterwards.
    control: OwnedFd,
    pid: i32,
    _turn: Option<Turn>,
    sentences: Arc<Vec<String>>,
    processes: usize,
    idle: bool,
}

/// An agent's hold on its stacks.
#[derive(Debug)]
struct Turn {
    number: u32,
    agent: Option<OwnedFd>,
    stacks: Arc<Mutex<Stacks>>,
}

impl Drop for Turn {
    fn drop(&mut self) {
        if let Some(agent) = self.agent.take() {
            lock(&self.stacks).left.push((self.number, agent));
        }
    }
}

/// Where a tree is to be cloned to.
#[derive(Debug)]
pub struct StartRequest<'a> {
    /// pidfd of the sandbox's pid 1.
    pub init: BorrowedFd<'a>,
    pub stdio: [BorrowedFd<'a>; 3],
    /// Directory of the tenancy's cgroup on cgroup v2; none where the agent sits in it already.
    pub cgroup: Option<BorrowedFd<'a>>,
    pub deadline: Duration,
}

/// A restored tree.
#[derive(Debug)]
pub struct Started {
    /// Host pids, in the manifest's order: the root first.
    pub pids: Vec<i32>,
    pub steps: Vec<(&'static str, Duration)>,
}

impl Agent {
    /// Host pid of the agent.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Clones the tree into a sandbox and waits until every process of it is restored.
    ///
    /// # Errors
    /// When a step failed: what was made of the tree must then be killed with its cgroup.
    pub fn start(&mut self, request: &StartRequest<'_>) -> Result<Started, ZygoteError> {
        let begun = now();
        let deadline = Instant::now() + request.deadline;
        let control = self.control.as_fd();
        while !self.idle {
            // The last start's agent comes home after its tree has reported.
            let (message, _) = receive(control, deadline, request.deadline)?;
            self.idle = message.kind == wire::report::IDLE;
        }
        let [input, output, error] = request.stdio;
        let mut descriptors = vec![input, output, error, request.init];
        descriptors.extend(request.cgroup);
        self.idle = false;
        send(control, wire::request::START, 0, &descriptors)?;
        let mut pids = vec![0; self.processes];
        let mut marks = [0; MARKS];
        let mut restored = 0;
        while restored < self.processes {
            let (message, pid) =
                receive_from(control, Some(request.init), deadline, request.deadline)?;
            match message.kind {
                wire::report::RESTORED => {
                    if let Some(place) = pids.get_mut(message.process as usize) {
                        *place = pid;
                    }
                    if message.process == 0 {
                        marks = message.marks;
                    }
                    restored += 1;
                }
                wire::report::IDLE => self.idle = true,
                _ => return Err(step_error(&message, &self.sentences)),
            }
        }
        Ok(Started {
            pids,
            steps: steps(begun, &marks),
        })
    }
}

fn steps(begun: u64, marks: &[u64; MARKS]) -> Vec<(&'static str, Duration)> {
    let names = [
        "request",
        "namespaces",
        "clone",
        "memory",
        "files",
        "threads",
    ];
    let mut steps = Vec::new();
    let mut last = begun;
    for (name, mark) in names.into_iter().zip(marks) {
        steps.push((name, Duration::from_nanos(mark.saturating_sub(last))));
        last = last.max(*mark);
    }
    steps.push(("report", Duration::from_nanos(now().saturating_sub(last))));
    steps
}

fn now() -> u64 {
    nix::time::clock_gettime(nix::time::ClockId::CLOCK_REALTIME).map_or(0, |now| {
        now.tv_sec() as u64 * 1_000_000_000 + now.tv_nsec() as u64
    })
}

fn zygote_error(message: &Report, sentences: &[String]) -> Result<(), ZygoteError> {
    if message.kind == wire::report::FAILED {
        Err(step_error(message, sentences))
    } else {
        Ok(())
    }
}

fn step_error(message: &Report, sentences: &[String]) -> ZygoteError {
    let step = match message.what.checked_sub(wire::OWN_SENTENCES) {
        Some(index) => sentences.get(index as usize).cloned(),
        None => Some(wire::own_sentence(message.what).to_owned()),
    };
    ZygoteError::Step {
        step: step.unwrap_or_else(|| "an unknown step".into()),
        source: io::Error::from_raw_os_error(message.errno),
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}
