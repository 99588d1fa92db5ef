//! Dump of a process tree into a template.
//!
//! The tree is stopped thread by thread (cgroup freezer first, so that no process escapes by
//! forking), everything about it is read, its pages go to the pool, and only when the template is
//! committed does the tree end, or go on where that is asked for. A dump that is refused or fails lets
//! the tree go on unharmed.
//!
//! The work runs on a thread of its own: ptrace belongs to a thread, and the thread enters the
//! sandbox's network namespace for the questions that only it can answer.

mod caller;
mod connections;
mod fifo;
mod file_locks;
mod file_owner;
mod files;
mod inotify;
mod interfaces;
mod mappings;
pub(crate) mod memory;
mod memory_objects;
mod notes;
mod posix_queues;
mod process;
mod renewed;
mod socket_files;
mod socket_options;
mod sockets;
mod sysv;
pub(crate) mod timers;
mod tmpfs;
mod tracee;
mod unix_sockets;
mod zombies;

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use nix::sched::CloneFlags;
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use trenv_pool::{TemplateInfo, TemplateWriter};

use crate::TaskGroup;
use crate::clock::Clocks;
use crate::fingerprint::{Fingerprint, FingerprintError};
use crate::lineage::Lineage;
use crate::manifest::{Manifest, ManifestError, VERSION};
use memory_objects::MemoryObjects;
use renewed::Renewed;
use tracee::Tracee;

/// How long the stop of all threads may take.
const STOP_DEADLINE: Duration = Duration::from_secs(5);
/// How long one try of it may take. A thread in vfork does not stop before its child has come to
/// its exec, and the child, stopped itself, never does: both must be let go, and asked again.
const STOP_TRY: Duration = Duration::from_millis(200);
const STOP_PAUSE: Duration = Duration::from_millis(5);

/// What to dump.
pub struct DumpRequest<'a> {
    /// The tenancy's cgroup: every process in it belongs to the tree.
    pub group: &'a (dyn TaskGroup + Sync),
    /// Host pid of the sandbox's pid 1.
    pub init_pid: i32,
    /// Host pid of the tree's root.
    pub root_pid: i32,
    /// Device and inode of the streams that the tenancy got as 0, 1 and 2.
    pub stdio: [Option<(u64, u64)>; 3],
}

impl std::fmt::Debug for DumpRequest<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DumpRequest")
            .field("init_pid", &self.init_pid)
            .field("root_pid", &self.root_pid)
            .finish_non_exhaustive()
    }
}

/// A finished dump.
#[derive(Debug)]
pub struct Dumped {
    pub template: TemplateInfo,
    pub processes: usize,
    pub threads: usize,
    /// Memory of all processes that is backed by stored or zero pages.
    pub image_bytes: u64,
    pub steps: Vec<(&'static str, Duration)>,
    /// What clones of this snapshot share that they should not.
    pub notes: Vec<String>,
}

/// Why a dump did not happen. The tree goes on in every case.
#[derive(Debug, thiserror::Error)]
pub enum DumpError {
    /// The tree holds state that cannot be captured; the text names it.
    #[error("The function cannot be snapshotted: {0}")]
    Refused(String),
    #[error("Failed to dump the function while {doing}")]
    Io { doing: String, source: io::Error },
    #[error(
        "Failed to dump the function: {stuck} did not stop within {STOP_DEADLINE:?}; try again when it is idle"
    )]
    Stuck { stuck: String },
    #[error("Failed to describe this machine for the snapshot")]
    Fingerprint(#[from] FingerprintError),
    #[error("Failed to write the snapshot's description")]
    Manifest(#[from] ManifestError),
    #[error("Failed to store the snapshot in the pool")]
    Pool(#[from] trenv_pool::PoolError),
}

impl DumpError {
    pub(crate) fn io(doing: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io {
            doing: doing.into(),
            source,
        }
    }

    pub(crate) fn errno(doing: impl Into<String>) -> impl FnOnce(nix::errno::Errno) -> Self {
        move |errno| Self::Io {
            doing: doing.into(),
            source: errno.into(),
        }
    }
}

/// Dumps the tree into `writer`'s template and ends it.
///
/// # Errors
/// When the tree holds state that cannot be captured, or the machine fails; the tree goes on.
pub fn dump(request: &DumpRequest<'_>, writer: TemplateWriter) -> Result<Dumped, DumpError> {
    dump_and(request, writer, None)
}

/// Dumps the tree into `writer`'s template and lets it go on. While it is stopped, `copy` copies what
/// belongs to the snapshot and the tree goes on changing: its files.
///
/// # Errors
/// As [`dump`], and when `copy` fails.
pub fn dump_and_go_on(
    request: &DumpRequest<'_>,
    writer: TemplateWriter,
    copy: Copying<'_>,
) -> Result<Dumped, DumpError> {
    dump_and(request, writer, Some(copy))
}

type Copying<'a> = &'a (dyn Fn() -> io::Result<()> + Sync);

/// The tree goes on where something is to be copied.
fn dump_and(
    request: &DumpRequest<'_>,
    writer: TemplateWriter,
    copy: Option<Copying<'_>>,
) -> Result<Dumped, DumpError> {
    let begun = Instant::now();
    let mut writer = Some(writer);
    loop {
        // The end of the thread lets go of everything that it has seized.
        let done = std::thread::scope(|scope| {
            let work = std::thread::Builder::new()
                .name("dump".into())
                .spawn_scoped(scope, || dump_here(request, &mut writer, copy))
                .map_err(DumpError::io("starting the dump's thread"))?;
            work.join()
                .map_err(|_| DumpError::Refused("the dump itself failed; report this".into()))?
        });
        match done {
            Err(DumpError::Stuck { .. }) if writer.is_some() && begun.elapsed() < STOP_DEADLINE => {
                std::thread::sleep(STOP_PAUSE);
            }
            done => return done,
        }
    }
}

/// Takes the writer when the tree has stopped; before that the dump may be tried again.
fn dump_here(
    request: &DumpRequest<'_>,
    writer: &mut Option<TemplateWriter>,
    copy: Option<Copying<'_>>,
) -> Result<Dumped, DumpError> {
    let mut steps = Vec::new();
    let mut clock = Instant::now();
    let mut step = |name| {
        let now = Instant::now();
        steps.push((name, now - clock));
        clock = now;
    };
    let network = std::fs::File::open(format!("/proc/{}/ns/net", request.init_pid))
        .map_err(DumpError::io("opening the sandbox's network namespace"))?;
    nix::sched::setns(&network, CloneFlags::CLONE_NEWNET)
        .map_err(DumpError::errno("entering the sandbox's network namespace"))?;

    sysv::enter(request.init_pid)?;

    let mut tree = StoppedTree::stop(request.group)?;
    let mut writer = writer
        .take()
        .ok_or_else(|| DumpError::Refused("it was dumped already".into()))?;
    step("stop");
    let (mut manifest, objects) = capture(request, &mut tree)?;
    step("describe");
    let image_bytes = memory::store(&tree, &mut manifest, &mut writer)?
        + objects.store(&mut manifest.memory, &mut writer)?;
    step("store");
    if let Some(copy) = copy {
        copy().map_err(DumpError::io("copying the files that it wrote"))?;
        step("copy");
    }
    let encoded = manifest.encode()?;
    let template = writer.commit(&encoded)?;
    step("commit");
    match copy {
        None => tree.end(request.group)?,
        Some(_) => drop(tree),
    }
    step("end");
    Ok(Dumped {
        template,
        processes: manifest.processes.len(),
        threads: manifest.threads(),
        image_bytes,
        steps,
        notes: notes::about(&manifest),
    })
}

/// An error that is none because the task has ended, perhaps while its cgroup was listed.
fn gone<T: Default>(tid: i32, err: DumpError) -> Result<T, DumpError> {
    if runs(tid) {
        Err(err)
    } else {
        Ok(T::default())
    }
}

/// Whether a task has not ended: a zombie has.
fn runs(tid: i32) -> bool {
    let stat = proc_text(&format!("/proc/{tid}/stat")).unwrap_or_default();
    let state = stat
        .rsplit_once(')')
        .map_or("", |(_, rest)| rest)
        .trim_start();
    !(state.is_empty() || state.starts_with(['Z', 'X']))
}

/// All threads of the tree, stopped. Dropping it lets them go on.
struct StoppedTree {
    /// Threads by host pid of their process, the leader first.
    threads: BTreeMap<i32, Vec<Tracee>>,
    pidfds: BTreeMap<i32, OwnedFd>,
}

impl StoppedTree {
    fn stop(group: &dyn TaskGroup) -> Result<Self, DumpError> {
        let started = Instant::now();
        let mut tree = Self {
            threads: BTreeMap::new(),
            pidfds: BTreeMap::new(),
        };
        let renewed = Renewed::look(group)?;
        group
            .freeze()
            .map_err(DumpError::io("freezing the function"))?;
        let mut seized: BTreeMap<i32, Vec<i32>> = BTreeMap::new();
        let result = (|| {
            loop {
                let mut fresh = false;
                for pid in group
                    .pids()
                    .map_err(DumpError::io("listing the function's processes"))?
                {
                    let known = seized.entry(pid).or_default();
                    for tid in process::threads(pid).or_else(|err| gone(pid, err))? {
                        if !known.contains(&tid) {
                            match tracee::seize(tid) {
                                Ok(()) => {
                                    known.push(tid);
                                    fresh = true;
                                }
                                Err(source) => gone(
                                    tid,
                                    DumpError::Io {
                                        doing: format!("stopping thread {tid}"),
                                        source,
                                    },
                                )?,
                            }
                        }
                    }
                }
                if !fresh {
                    return Ok(());
                }
                if started.elapsed() > STOP_DEADLINE {
                    return Err(DumpError::Stuck {
                        stuck: "a forking process".into(),
                    });
                }
            }
        })();
        // A frozen task never reports its stop on cgroup v1.
        let thawed = group.thaw().map_err(DumpError::io("thawing the function"));
        let until = Instant::now() + STOP_TRY;
        for (pid, tids) in seized {
            if tids.is_empty() {
                continue;
            }
            let threads = tree.threads.entry(pid).or_default();
            for tid in tids {
                match Tracee::stopped(tid, until) {
                    Ok(Some(mut tracee)) => {
                        let known = tracee.renew(&renewed);
                        threads.push(tracee);
                        if !known {
                            return Err(DumpError::Stuck {
                                stuck: format!("the interrupted call of thread {tid}"),
                            });
                        }
                    }
                    Ok(None) => {
                        return Err(DumpError::Stuck {
                            stuck: format!("thread {tid}"),
                        });
                    }
                    // It has ended: the dump begins anew without it.
                    Err(_) if !runs(tid) => {
                        return Err(DumpError::Stuck {
                            stuck: format!("thread {tid}"),
                        });
                    }
                    Err(source) if result.is_ok() => {
                        return Err(DumpError::Io {
                            doing: format!("stopping thread {tid}"),
                            source,
                        });
                    }
                    Err(_) => {}
                }
            }
        }
        result.and(thawed)?;
        for (pid, threads) in &tree.threads {
            for thread in threads {
                // It was restored a moment ago, and has not run since.
                if mappings::in_restorer(*pid, thread.registers().rip)? {
                    return Err(DumpError::Stuck {
                        stuck: format!("thread {}, which is still being restored,", thread.tid()),
                    });
                }
            }
        }
        for pid in tree.threads.keys() {
            let pidfd = rustix::process::pidfd_open(
                rustix::process::Pid::from_raw(*pid)
                    .ok_or_else(|| DumpError::Refused(format!("process id {pid} is not valid")))?,
                rustix::process::PidfdFlags::empty(),
            )
            .map_err(|errno| DumpError::Io {
                doing: format!("opening process {pid}"),
                source: errno.into(),
            })?;
            tree.pidfds.insert(*pid, pidfd);
        }
        if tree.threads.is_empty() {
            return Err(DumpError::Refused("it has no process".into()));
        }
        Ok(tree)
    }

    /// Kills every process while it is stopped, and waits until the cgroup is empty.
    fn end(mut self, group: &dyn TaskGroup) -> Result<(), DumpError> {
        for pid in self.threads.keys() {
            // A process that is gone already is what is wanted.
            let _ = nix::sys::signal::kill(Pid::from_raw(*pid), Signal::SIGKILL);
        }
        let started = Instant::now();
        // As tracer we are told of each thread's end before its parent is.
        for (pid, threads) in std::mem::take(&mut self.threads) {
            for thread in threads.iter().rev() {
                let mut status = 0;
                // SAFETY: writes the status word only.
                unsafe { nix::libc::waitpid(thread.tid(), &raw mut status, nix::libc::__WALL) };
            }
            let _ = pid;
        }
        while !group
            .pids()
            .map_err(DumpError::io("listing the function's processes"))?
            .is_empty()
        {
            if started.elapsed() > STOP_DEADLINE {
                return Err(DumpError::Stuck {
                    stuck: "a killed process".into(),
                });
            }
            std::thread::sleep(Duration::from_micros(200));
        }
        Ok(())
    }
}

impl Drop for StoppedTree {
    fn drop(&mut self) {
        for tracee in self.threads.values_mut().flatten() {
            // A thread that cannot be released has ended: nothing else makes this fail.
            if let Err(err) = tracee.release() {
                tracing::warn!(tid = tracee.tid(), %err, "Failed to let a thread go on");
            }
        }
    }
}

fn capture(
    request: &DumpRequest<'_>,
    tree: &mut StoppedTree,
) -> Result<(Manifest, MemoryObjects), DumpError> {
    let mut memory = MemoryObjects::default();
    let mut manifest = Manifest {
        version: VERSION,
        fingerprint: Fingerprint::of_this_machine()?.to_string(),
        clocks: clocks(request.root_pid)?,
        processes: Vec::new(),
        zombies: Vec::new(),
        objects: Vec::new(),
        memory: Vec::new(),
        locks: Vec::new(),
        semaphores: sysv::semaphores()?,
        message_queues: sysv::message_queues()?,
        tmpfs: Vec::new(),
        filters: Vec::new(),
    };
    let all = tree.threads.keys().copied();
    let order = process::parents_first(request.root_pid, request.init_pid, all)?;
    manifest.zombies = zombies::of_tree(&order)?;
    let ids: BTreeMap<i32, i32> = order
        .iter()
        .map(|entry| (entry.host_pid, entry.pid))
        .collect();
    memory.of_segments(sysv::segments()?)?;
    let mut files = files::Files::new(request, &tree.pidfds, &ids);
    for entry in &order {
        let Some(threads) = tree.threads.get_mut(&entry.host_pid) else {
            continue;
        };
        let mut captured =
            process::capture(entry, threads, request.init_pid, &mut manifest, &mut memory)?;
        captured.descriptors = files.of_process(entry.host_pid, &mut memory)?;
        manifest.processes.push(captured);
    }
    manifest.locks = files.locks();
    manifest.objects = files.finish(&manifest.processes)?;
    // After the descriptors: an inotify hears of reading too.
    manifest.tmpfs = tmpfs::read(request.root_pid, &mut memory)?;
    manifest.memory = memory.describe()?;
    Lineage::of(&manifest).map_err(DumpError::Refused)?;
    Ok((manifest, memory))
}

/// The clocks as the tree sees them.
fn clocks(root: i32) -> Result<Clocks, DumpError> {
    let now = Clocks::now().map_err(DumpError::io("reading the clocks"))?;
    // A kernel without time namespaces has no such file.
    let offsets = proc_text(&format!("/proc/{root}/timens_offsets")).unwrap_or_default();
    Ok(now.offset(&offsets))
}

/// Reads one file of /proc.
fn proc_text(path: &str) -> Result<String, DumpError> {
    std::fs::read_to_string(path).map_err(DumpError::io(format!("reading {path}")))
}

/// Target of a link in /proc.
fn proc_link(path: &str) -> Result<String, DumpError> {
    let target = std::fs::read_link(path).map_err(DumpError::io(format!("reading {path}")))?;
    target
        .into_os_string()
        .into_string()
        .map_err(|name| DumpError::Refused(format!("the path {name:?} is not UTF-8")))
}

/// Duplicate of a descriptor of another process.
fn descriptor_of(pidfd: &OwnedFd, number: i32, pid: i32) -> Result<OwnedFd, DumpError> {
    rustix::process::pidfd_getfd(pidfd, number, rustix::process::PidfdGetfdFlags::empty()).map_err(
        |errno| DumpError::Io {
            doing: format!("taking descriptor {number} of process {pid}"),
            source: errno.into(),
        },
    )
}

/// Whether two descriptors of two processes are one open file (kcmp(2), KCMP_FILE).
fn same_file(pids: (i32, i32), numbers: (i32, i32)) -> Result<bool, DumpError> {
    // SAFETY: kcmp compares by number and touches no memory of ours.
    let order = unsafe {
        nix::libc::syscall(
            nix::libc::SYS_kcmp,
            pids.0,
            pids.1,
            0,
            numbers.0 as u64,
            numbers.1 as u64,
        )
    };
    nix::errno::Errno::result(order)
        .map(|order| order == 0)
        .map_err(DumpError::errno("comparing two descriptors"))
}
