//! The zygote: a template as a live process, cloned at every start.
//!
//! [`Zygote::build`] plans the address space and starts `trenv-zygote`, which takes its place in
//! the function's file system, maps the restorer's region and becomes the zygote. [`Zygote::agent`]
//! makes another task in the same address space, for a tenancy cgroup of its own; [`Agent::make_clone`]
//! copies the address space there, ahead of a start; [`PreparedClone::start`] gives that copy to the tree in
//! a sandbox.

mod attached;
mod channel;
mod derive;
#[cfg(test)]
mod hostile;
mod learning;
mod loader;
mod skeleton;

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout};
use pseudo_mm_uapi::Template;
use trenv_pool::TemplateReader;
use trenv_restorer::wire::{self, MARKS, Report};

use crate::clock::{self, ClockError, Clocks};
use crate::fingerprint::{Fingerprint, FingerprintError};
use crate::manifest::{Manifest, ManifestError, PAGE};
use crate::methods::{CriuError, Work};
use crate::plan::base::Ground;
use crate::plan::skeleton::{Area, Fill};
use crate::plan::{Plan, PlanError};
use crate::working_set::WorkingSet;
use attached::Attached;
use channel::{nonsense, receive, receive_from, send, socket_pair};
use loader::Loader;
pub use loader::fd as loader_fd;
pub(crate) use loader::hand_over;
pub(crate) use skeleton::Ahead;

pub use crate::plan::build_fd;

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
    /// The zygote of the template from which the tree was started before it was dumped. What is
    /// equal stays its memory, shared by both; it may end before the new one does.
    pub base: Option<&'a Zygote>,
}

/// Why a zygote does not stand or a start failed.
#[derive(Debug, thiserror::Error)]
pub enum ZygoteError {
    #[error(
        "The template was taken on {template}, but this machine is {machine}; deploy the function again"
    )]
    Fingerprint { template: String, machine: String },
    #[error(transparent)]
    Clock(#[from] ClockError),
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
    #[error(
        "The function's processes ended before they were restored; is its memory limit too low?"
    )]
    TreeGone,
    #[error(
        "The function has another file {path} than its base; build its image from the base's, without changing what that brings"
    )]
    OtherFile { path: String },
    #[error(
        "The start method attach maps pages of the pool's device, but this pool is not on a device-dax or the driver /dev/pseudo_mm is not there; give the pool a device and load the module pseudo_mm (docs/dax.md), or use another start method"
    )]
    NoDevice,
    #[error(transparent)]
    Criu(#[from] CriuError),
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
    pid: i32,
    pidfd: OwnedFd,
    control: Mutex<OwnedFd>,
    tree: Arc<Tree>,
    ground: Ground,
    working_set: Mutex<WorkingSet>,
    stacks: Arc<Mutex<Stacks>>,
    /// What it, or each clone when it starts, maps of the pool's device.
    attached: Option<Attached>,
}

/// What a start has to know of the tree.
#[derive(Debug)]
struct Tree {
    sentences: Vec<String>,
    processes: usize,
    root_pid: i32,
    oom_score_adj: i32,
    opened: Vec<String>,
    /// Address of the restorer's region, and of the place for programs in it.
    base: u64,
    rework: u64,
    /// Number of the control descriptor.
    control: u64,
    /// Clones have a userfaultfd.
    watched: bool,
    /// What a clone attaches when it starts.
    attach: Option<Arc<Template>>,
    /// For each process, where the table of what it copies ahead lies; none if it loads its pages.
    tables: Vec<Option<u64>>,
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
        let ended = self.left.iter().position(|(_, agent)| has_ended(agent));
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
    /// When the template does not fit this machine or cannot be read, or the machine fails; with a
    /// base, when that has ended, or a file that both map is another one in the function's layers.
    pub fn build(request: ZygoteRequest<'_>) -> Result<Self, ZygoteError> {
        match request.base {
            // Pages of a device take no memory, whether a base has them or not.
            Some(base) if request.template.templates().is_none() => base.derive(request),
            _ => Ok(Self::fill(request, Fill::Pages)?.0),
        }
    }

    /// [`Zygote::build`], or the same without the stored pages; where these belong is told.
    pub(crate) fn fill(
        request: ZygoteRequest<'_>,
        fill: Fill,
    ) -> Result<(Self, Vec<Area>), ZygoteError> {
        let manifest = usable(request.template)?;
        let (plan, attached) = attached::plan(&request, &manifest, fill)?;
        let (ours, theirs) = socket_pair()?;
        let mut loader = Loader::of(
            &plan,
            attached.as_ref().map(|attached| &*attached.template),
            &request,
        )?;
        let child = loader.start(request.binary, &theirs, &request)?;
        let pid = i32::try_from(child.id()).unwrap_or_default();
        drop(theirs);
        // The zygote has the mount now; ours would only keep it from going away with it.
        drop(request.rootfs);
        let process = (pid, open_pidfd(pid)?);
        let (zygote, areas) = Self::of_plan(plan, fill, process, ours, attached);
        zygote.await_build(request.template)?;
        Ok((zygote, areas))
    }

    /// A zygote that is being built in the process `pid`.
    fn of_plan(
        plan: Plan,
        fill: Fill,
        (pid, pidfd): (i32, OwnedFd),
        control: OwnedFd,
        attached: Option<Attached>,
    ) -> (Self, Vec<Area>) {
        let by_clones = attached.as_ref().filter(|_| fill == Fill::Blank);
        let attach = by_clones.map(|attached| Arc::clone(&attached.template));
        let zygote = Self {
            pid,
            pidfd,
            control: Mutex::new(control),
            ground: plan.ground,
            tree: Arc::new(Tree {
                sentences: plan.sentences,
                processes: plan.processes,
                root_pid: plan.root_pid,
                oom_score_adj: plan.oom_score_adj,
                opened: plan.opened,
                base: plan.base,
                control: plan.control,
                rework: plan.rework,
                watched: matches!(fill, Fill::Skeleton { watched: true }),
                attach,
                tables: plan.tables.clone(),
            }),
            working_set: Mutex::new(WorkingSet::new(plan.stored, plan.file_pages, plan.tables)),
            stacks: Arc::new(Mutex::new(Stacks {
                next: 1,
                left: Vec::new(),
            })),
            attached,
        };
        (zygote, plan.areas)
    }

    /// Waits until its memory is in place.
    fn await_build(&self, template: &TemplateReader) -> Result<(), ZygoteError> {
        let control = lock(&self.control);
        let message = receive(
            control.as_fd(),
            Instant::now() + BUILD_DEADLINE,
            BUILD_DEADLINE,
        )?;
        zygote_error(&message.0, &self.tree)?;
        // The pages are in the zygote now; a second copy in the page cache serves nobody.
        if let Some(file) = template.file() {
            // SAFETY: advice about a descriptor; no memory is passed.
            unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
        }
        Ok(())
    }

    /// Host pid of the zygote.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Paths that a start opens in the tenancy's root.
    #[must_use]
    pub fn opened(&self) -> &[String] {
        &self.tree.opened
    }

    /// DRAM that the zygote's memory takes, with what it shares with its base.
    ///
    /// # Errors
    /// When /proc cannot be read.
    pub fn resident_bytes(&self) -> Result<u64, ZygoteError> {
        let path = format!("/proc/{}/smaps_rollup", self.pid);
        let text =
            std::fs::read_to_string(path).map_err(io_error("reading the zygote's memory"))?;
        let rss = text.lines().find_map(|line| line.strip_prefix("Rss:"));
        let kilobytes = rss.and_then(|rss| rss.trim().strip_suffix(" kB")?.trim().parse().ok());
        let bytes = kilobytes.unwrap_or(0u64) << 10;
        // The kernel counts the pages of the device too.
        let attached = self.attached.as_ref();
        let attached = attached.filter(|_| self.tree.attach.is_none());
        let on_device = attached
            .map(|attached| attached.template.stat())
            .transpose();
        let on_device = on_device.map_err(io_error("asking how much memory is the device's"))?;
        Ok(bytes.saturating_sub(on_device.map_or(0, |stat| stat.pool_pages * PAGE)))
    }

    /// Makes an agent. On cgroup v1 move [`Agent::pid`] into the tenancy's cgroups before it makes a
    /// clone.
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
        // Both answer that they wait for requests; a failure comes on the zygote's own socket.
        let (first, _) = receive_soon(&control)?;
        if first.kind == wire::report::FAILED {
            receive_soon(&control)?;
        }
        zygote_error(&first, &self.tree)?;
        drop(control);
        let (message, pid) = receive_soon(&ours)?;
        zygote_error(&message, &self.tree)?;
        Ok(Agent {
            control: ours,
            pid,
            turn: Turn {
                number,
                agent: Some(open_pidfd(pid)?),
                stacks: Arc::clone(&self.stacks),
            },
            tree: Arc::clone(&self.tree),
        })
    }
}

impl Drop for Zygote {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = rustix::process::pidfd_send_signal(&self.pidfd, rustix::process::Signal::KILL);
        let _ = nix::sys::wait::waitpid(nix::unistd::Pid::from_raw(self.pid), None);
        if let Some(attached) = self.attached.take() {
            attached.leave();
        }
    }
}

/// A template's manifest, once it is sure that it fits this machine and that its pages are whole.
fn usable(template: &TemplateReader) -> Result<Manifest, ZygoteError> {
    let manifest = Manifest::decode(template.manifest())?;
    let machine = Fingerprint::of_this_machine()?.to_string();
    if manifest.fingerprint != machine {
        return Err(ZygoteError::Fingerprint {
            template: manifest.fingerprint,
            machine,
        });
    }
    let now = Clocks::now().map_err(io_error("reading the machine's clocks"))?;
    manifest.clocks.can_go_on(now, clock::own_clocks())?;
    template.verify()?;
    Ok(manifest)
}

/// A task of a zygote that makes clones of it, one after another.
#[derive(Debug)]
pub struct Agent {
    // Closing it ends the agent; what follows is dropped afterwards.
    control: OwnedFd,
    pid: i32,
    turn: Turn,
    tree: Arc<Tree>,
}

/// A copy of a zygote's memory, in which what calls write is copied already. It waits for its one
/// start; dropping it ends it.
#[derive(Debug)]
pub struct PreparedClone {
    control: OwnedFd,
    pid: i32,
    pidfd: OwnedFd,
    tree: Arc<Tree>,
    /// Its userfaultfd, if it has one.
    watch: Option<OwnedFd>,
}

/// A restored tree that waits before its first instruction. Dropping it ends the tree's processes.
#[derive(Debug)]
pub struct Parked {
    control: OwnedFd,
    processes: usize,
}

impl Parked {
    /// Lets the tree go on.
    ///
    /// # Errors
    /// When its processes have ended.
    pub fn resume(self) -> Result<(), ZygoteError> {
        let_go(self.control.as_fd(), self.processes)
    }
}

/// Says to each process of a restored tree that it may go on.
fn let_go(control: BorrowedFd<'_>, processes: usize) -> Result<(), ZygoteError> {
    (0..processes)
        .try_for_each(|_| send(control, wire::request::GO, 0, &[]))
        .map_err(|err| match err {
            ZygoteError::Gone => ZygoteError::TreeGone,
            err => err,
        })
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
    /// The input of the call that it is for, as far as it is known.
    pub input: &'a str,
    pub deadline: Duration,
}

/// A restored tree.
#[derive(Debug)]
pub struct Started {
    /// Host pids, in the manifest's order: the root first.
    pub pids: Vec<i32>,
    /// The root's pid in the sandbox.
    pub root_pid: i32,
    pub steps: Vec<(&'static str, Duration)>,
    /// What has been done to bring memory in; it goes on while the tree lives.
    pub work: Arc<Work>,
}

impl Agent {
    /// Host pid of the agent.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Whether it can still be asked for a clone.
    #[must_use]
    pub fn lives(&self) -> bool {
        let agent = self.turn.agent.as_ref();
        agent.is_some_and(|agent| !has_ended(agent))
    }

    /// Makes a clone, in the agent's own cgroup or in that of the given directory (cgroup v2).
    ///
    /// # Errors
    /// When the zygote has ended, or memory for another process is wanting.
    pub fn make_clone(
        &mut self,
        cgroup: Option<BorrowedFd<'_>>,
    ) -> Result<PreparedClone, ZygoteError> {
        let (ours, theirs) = socket_pair()?;
        let mut descriptors = vec![theirs.as_fd()];
        descriptors.extend(cgroup);
        send(self.control.as_fd(), wire::request::CLONE, 0, &descriptors)?;
        drop(theirs);
        // Both answer that they wait for requests; a failure comes on the agent's own socket.
        let (first, _) = receive_soon(&self.control)?;
        if first.kind == wire::report::FAILED {
            receive_soon(&self.control)?;
        }
        zygote_error(&first, &self.tree)?;
        let (message, pid) = receive_soon(&ours)?;
        zygote_error(&message, &self.tree)?;
        let mut clone = PreparedClone::of(ours, pid, Arc::clone(&self.tree))?;
        clone.find_watch()?;
        Ok(clone)
    }
}

impl PreparedClone {
    fn of(control: OwnedFd, pid: i32, tree: Arc<Tree>) -> Result<Self, ZygoteError> {
        // A value below the zygote's cannot be had without CAP_SYS_RESOURCE and is left out: the
        // zygote is as safe from the OOM killer as its owner, an instance is not.
        let path = format!("/proc/{pid}/oom_score_adj");
        let _ = std::fs::write(path, tree.oom_score_adj.to_string());
        Ok(Self {
            control,
            pid,
            watch: None,
            pidfd: open_pidfd(pid)?,
            tree,
        })
    }

    /// Host pid of the clone.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Whether it still waits for its start.
    #[must_use]
    pub fn lives(&self) -> bool {
        !has_ended(&self.pidfd)
    }

    /// Gives the clone's memory to the tree in a sandbox and waits until every process of it is
    /// restored and runs.
    ///
    /// # Errors
    /// When a step failed: what was made of the tree must then be killed with its cgroup.
    pub fn start(self, request: &StartRequest<'_>) -> Result<Started, ZygoteError> {
        let started = self.restore(request)?;
        let_go(self.control.as_fd(), self.tree.processes)?;
        Ok(started)
    }

    /// Like [`PreparedClone::start`], but every process of the tree stops before its first
    /// instruction, until [`Parked::resume`].
    ///
    /// # Errors
    /// As there.
    pub fn park(self, request: &StartRequest<'_>) -> Result<(Started, Parked), ZygoteError> {
        let started = self.restore(request)?;
        let (control, processes) = (self.control, self.tree.processes);
        Ok((started, Parked { control, processes }))
    }

    /// Restores the tree. None of its processes goes on before all are there: one that did could take
    /// the pid of another, or talk to one that is not what it will be.
    fn restore(&self, request: &StartRequest<'_>) -> Result<Started, ZygoteError> {
        let begun = now();
        let deadline = Instant::now() + request.deadline;
        let control = self.control.as_fd();
        let [input, output, error] = request.stdio;
        let mut descriptors = vec![input, output, error, request.init];
        descriptors.extend(self.tree.attach.as_ref().map(|template| template.as_fd()));
        send(control, wire::request::START, 0, &descriptors)?;
        let processes = self.tree.processes;
        let mut pids = vec![0; processes];
        let mut marks = [0; MARKS];
        let mut restored = 0;
        while restored < processes {
            let (message, pid) =
                match receive_from(control, Some(request.init), deadline, request.deadline) {
                    // Whoever had the other end of the socket.
                    Err(ZygoteError::Gone) => return Err(ZygoteError::TreeGone),
                    received => received?,
                };
            note(&message, pid, &self.tree, &mut pids, &mut marks)?;
            restored += 1;
        }
        Ok(Started {
            pids,
            root_pid: self.tree.root_pid,
            steps: steps(begun, &marks),
            work: Arc::default(),
        })
    }
}

/// How long a zygote or an agent may take to answer what needs no page from the pool.
const ANSWER_DEADLINE: Duration = Duration::from_secs(5);

fn receive_soon(control: &OwnedFd) -> Result<(Report, i32), ZygoteError> {
    let deadline = Instant::now() + ANSWER_DEADLINE;
    receive(control.as_fd(), deadline, ANSWER_DEADLINE)
}

fn open_pidfd(pid: i32) -> Result<OwnedFd, ZygoteError> {
    let process = rustix::process::Pid::from_raw(pid).ok_or(ZygoteError::Gone)?;
    match rustix::process::pidfd_open(process, rustix::process::PidfdFlags::empty()) {
        Ok(pidfd) => Ok(pidfd),
        Err(rustix::io::Errno::SRCH) => Err(ZygoteError::Gone),
        Err(errno) => Err(io_error("opening a process of the zygote")(errno.into())),
    }
}

/// A pidfd is readable once its process has ended.
fn has_ended(pidfd: &OwnedFd) -> bool {
    let mut poll = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
    nix::poll::poll(&mut poll, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
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

/// Notes that a process is restored, which each of them says once.
fn note(
    message: &Report,
    pid: i32,
    tree: &Tree,
    pids: &mut [i32],
    marks: &mut [u64; MARKS],
) -> Result<(), ZygoteError> {
    if message.kind != wire::report::RESTORED {
        return Err(step_error(message, tree));
    }
    let place = pids.get_mut(message.process as usize);
    *place.filter(|place| **place == 0).ok_or_else(nonsense)? = pid;
    // Each step ends with the last process to take it.
    for (mark, one) in marks.iter_mut().zip(message.marks) {
        *mark = one.max(*mark);
    }
    Ok(())
}

fn zygote_error(message: &Report, tree: &Tree) -> Result<(), ZygoteError> {
    match message.kind {
        wire::report::IDLE => Ok(()),
        wire::report::FAILED => Err(step_error(message, tree)),
        _ => Err(nonsense()),
    }
}

fn step_error(message: &Report, tree: &Tree) -> ZygoteError {
    let source = io::Error::from_raw_os_error(message.errno);
    if message.what == wire::NO_CLOCKS {
        return ClockError::NoNamespace { source }.into();
    }
    let step = match message.what.checked_sub(wire::OWN_SENTENCES) {
        Some(index) => tree.sentences.get(index as usize).cloned(),
        None => Some(wire::own_sentence(message.what).to_owned()),
    };
    ZygoteError::Step {
        step: step.unwrap_or_else(|| "an unknown step".into()),
        source,
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}
