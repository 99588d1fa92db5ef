//! What a snapshot says about a process tree, memory pages aside.
//!
//! A manifest is stored beside its pages and read back by another process later, so it is parsed as
//! untrusted input: [`Manifest::decode`] checks every index and range that later code relies on.

mod check;
mod file_lock;
mod file_owner;
mod interface;
mod memory_object;
mod message_queue;
mod queued;
mod socket_file;

use serde::{Deserialize, Serialize};

pub use crate::clock::Clocks;
pub use file_lock::{FileLock, LockHolder};
pub use file_owner::{FileOwner, SignalTarget};
pub use memory_object::{MOST_MEMORY_OBJECTS, MemoryKind, MemoryObject, SemaphoreSet};
pub use message_queue::{MessageQueue, QueueMessage};
pub use queued::Queued;
pub use socket_file::SocketFile;

/// Layout version of the encoded form.
pub const VERSION: u32 = 7;

/// A page of memory.
pub const PAGE: u64 = 4096;

/// End of the user's half of the address space.
pub const ADDRESS_END: u64 = 0x7fff_ffff_f000;

pub const MCL_FUTURE: u32 = 2;
pub const MCL_ONFAULT: u32 = 4;

/// A frozen process tree.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Manifest {
    pub version: u32,
    /// Kernel, vdso and CPU that it can be restored on.
    pub fingerprint: String,
    /// As the tree saw them at the dump.
    pub clocks: Clocks,
    /// Parents before their children; the first is the root of the tree, orphans come last.
    pub processes: Vec<Process>,
    /// Children that have ended and were not waited for yet.
    pub zombies: Vec<Zombie>,
    /// Open file descriptions, shared by the processes' descriptors.
    pub objects: Vec<Object>,
    /// Memory that is shared, and files without a name.
    pub memory: Vec<MemoryObject>,
    /// Locks that are held on open files.
    pub locks: Vec<FileLock>,
    /// SysV semaphores.
    pub semaphores: Vec<SemaphoreSet>,
    /// SysV message queues.
    pub message_queues: Vec<MessageQueue>,
    /// Contents of the sandbox's tmpfs mounts.
    pub tmpfs: Vec<TmpfsEntry>,
    /// Different seccomp filters, as BPF instructions of 8 bytes.
    pub filters: Vec<Vec<u64>>,
}

/// One process.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Process {
    pub pid: i32,
    /// Index of the parent in [`Manifest::processes`]; none for the root and for orphans.
    pub parent: Option<usize>,
    pub group: i32,
    pub session: i32,
    pub exe: String,
    pub cwd: String,
    pub umask: u32,
    pub layout: Layout,
    pub auxv: Vec<u8>,
    pub mappings: Vec<Mapping>,
    /// Flags of mlockall(2) for what is mapped later, [`MCL_FUTURE`] among them; 0 for none.
    pub lock_future: u32,
    /// Stored pages, in address order; they follow each other in the pool.
    pub pages: Vec<PageRun>,
    pub descriptors: Vec<Descriptor>,
    pub actions: Vec<SignalAction>,
    /// ITIMER_REAL, VIRTUAL, PROF: interval and value as seconds and microseconds.
    pub timers: [[u64; 4]; 3],
    /// By their numbers.
    pub posix_timers: Vec<PosixTimer>,
    /// Soft and hard limit by resource number.
    pub limits: Vec<(u64, u64)>,
    pub pending: Vec<Vec<u8>>,
    pub dumpable: u64,
    pub habits: Habits,
    pub subreaper: u64,
    pub oom_score_adj: i32,
    /// What a core dump of it holds (core(5)).
    pub core_filter: u32,
    /// Nice value of its session's autogroup (sched(7)).
    pub autogroup: i32,
    /// The thread group's leader first.
    pub threads: Vec<Thread>,
}

/// What prctl(2) sets for a whole process, beyond what has a field of its own.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Habits {
    /// PR_SET_MDWE.
    pub no_write_execute: u64,
    /// PR_SET_THP_DISABLE.
    pub no_huge_pages: u64,
    /// PR_MCE_KILL.
    pub memory_failure: u64,
    /// The commands by which it has registered for membarrier(2), [`REGISTRATIONS`] at most.
    pub barriers: u64,
}

/// MEMBARRIER_CMD_REGISTER_GLOBAL_EXPEDITED, PRIVATE_EXPEDITED, its SYNC_CORE and its RSEQ.
pub const REGISTRATIONS: u64 = 1 << 2 | 1 << 4 | 1 << 6 | 1 << 8;

/// A process that has ended, while its parent has not waited for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Zombie {
    pub pid: i32,
    /// Index of the parent in [`Manifest::processes`].
    pub parent: usize,
    pub group: i32,
    pub session: i32,
    pub uid: u32,
    /// As wait(2) gives it: an exit status times 256, or the signal that killed it.
    pub status: i32,
}

/// A timer of timer_create(2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PosixTimer {
    pub id: i32,
    pub clock: i32,
    pub signal: i32,
    /// What comes with the signal.
    pub value: u64,
    /// SIGEV_SIGNAL or SIGEV_NONE, or SIGEV_THREAD_ID and then the thread.
    pub notify: i32,
    pub target: i32,
    /// Interval and what remains: seconds and nanoseconds of each.
    pub times: [u64; 4],
}

/// The highest number of a timer on a kernel that gives numbers one after another.
pub const CREATED_ONE_BY_ONE: i32 = 10_000;

/// The fields of `struct prctl_mm_map` that are addresses, in its order.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layout {
    pub start_code: u64,
    pub end_code: u64,
    pub start_data: u64,
    pub end_data: u64,
    pub start_brk: u64,
    pub brk: u64,
    pub start_stack: u64,
    pub arg_start: u64,
    pub arg_end: u64,
    pub env_start: u64,
    pub env_end: u64,
}

/// One VMA.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mapping {
    pub start: u64,
    pub end: u64,
    /// PROT_READ, PROT_WRITE, PROT_EXEC.
    pub protection: u32,
    pub kind: MappingKind,
    pub flags: MappingFlags,
    /// Its guard pages, by address: who touches one gets SIGSEGV (madvise(2), MADV_GUARD_INSTALL).
    pub guards: Vec<PageRun>,
}

impl Mapping {
    /// Start and end of its guard pages where it lies at `at`.
    pub(crate) fn guards_at(&self, at: u64) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.guards.iter().map(move |run| {
            let start = at + (run.start - self.start);
            (start, start + run.pages * PAGE)
        })
    }
}

/// What a VMA maps.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum MappingKind {
    Anonymous,
    /// Private, copy-on-write.
    File {
        path: String,
        offset: u64,
    },
    /// Shared and never written.
    SharedReadOnly {
        path: String,
        offset: u64,
    },
    /// Memory without a path, made for each instance.
    Object {
        object: usize,
        offset: u64,
        shared: bool,
    },
    /// SysV shared memory, the whole segment.
    Segment {
        id: i32,
    },
    /// A file that is mapped when the instance's file systems are there: one that is written
    /// through the mapping, or one in a tmpfs.
    AtStart {
        path: String,
        offset: u64,
        shared: bool,
        /// It was opened to be written.
        writable: bool,
    },
    Vdso,
    Vvar,
    /// The generation page, shared and read-only: a restored process gets its new sandbox's.
    Generation,
}

/// Properties of a VMA beyond its protection (proc(5), VmFlags).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MappingFlags {
    pub grows_down: bool,
    pub no_reserve: bool,
    pub dont_fork: bool,
    pub dont_dump: bool,
    pub wipe_on_fork: bool,
    pub droppable: bool,
    pub huge: bool,
    pub no_huge: bool,
    pub mergeable: bool,
    /// Read in order (MADV_SEQUENTIAL), or in none (MADV_RANDOM).
    pub sequential: bool,
    pub random: bool,
    pub locked: bool,
    /// Pages are locked when they are there, not all at once.
    pub lock_on_fault: bool,
}

/// Consecutive pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PageRun {
    pub start: u64,
    pub pages: u64,
}

impl PageRun {
    /// The address behind it, if there is one.
    #[must_use]
    pub fn end(&self) -> Option<u64> {
        let bytes = self.pages.checked_mul(PAGE)?;
        self.start.checked_add(bytes)
    }
}

/// One descriptor of a process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Descriptor {
    pub number: i32,
    pub object: usize,
    pub close_on_exec: bool,
}

/// An open file description.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Object {
    /// Status flags of F_GETFL, access mode included.
    pub flags: u32,
    pub owner: Option<FileOwner>,
    pub kind: ObjectKind,
}

/// What an open file description refers to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ObjectKind {
    /// Standard stream of the tenancy: 0, 1 or 2.
    Stdio(u32),
    /// Regular file, directory or device, by its path in the sandbox.
    Path {
        path: String,
        position: u64,
    },
    /// A memfd or a deleted file.
    Nameless {
        memory: usize,
        position: u64,
    },
    /// An end of a named pipe.
    Fifo {
        path: String,
        size: u64,
        data: Vec<u8>,
    },
    /// End of a pipe; `writer` tells which. Ends of one pipe carry the same number.
    Pipe {
        pipe: u64,
        writer: bool,
        size: u64,
        data: Vec<u8>,
    },
    EventFd {
        count: u64,
        semaphore: bool,
    },
    Epoll {
        targets: Vec<EpollTarget>,
    },
    TimerFd {
        clock: i32,
        flags: u32,
        value: [u64; 2],
        interval: [u64; 2],
        ticks: u64,
    },
    SignalFd {
        mask: u64,
    },
    PidFd {
        pid: i32,
    },
    Inotify {
        watches: Vec<Watch>,
    },
    Socket(Socket),
}

/// One descriptor watched by an epoll.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct EpollTarget {
    pub number: i32,
    pub events: u32,
    pub data: u64,
}

/// A file or directory watched by an inotify.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Watch {
    /// Its number.
    pub wd: i32,
    pub mask: u32,
    pub path: String,
}

/// A socket without a remote peer, or one end of a pair: of unix sockets, or of a TCP connection
/// inside the sandbox.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Socket {
    pub domain: i32,
    pub kind: i32,
    pub protocol: i32,
    /// Address bound to, as `struct sockaddr`; empty when unbound.
    pub address: Vec<u8>,
    /// Backlog of a listener.
    pub listen: Option<i32>,
    /// Remote address of a TCP connection, or of a connected datagram socket that is no end of a pair.
    pub connected: Vec<u8>,
    /// Level, name and value of the options that differ from a fresh socket's.
    pub options: Vec<(i32, i32, Vec<u8>)>,
    /// Number of the pair and the end's side (0 or 1).
    pub pair: Option<(u64, u32)>,
    /// Of an end of a pair: what waits to be read, record by record; a stream is parted only where
    /// descriptors come with it.
    pub queue: Vec<Queued>,
    /// 1 when nothing is received any more, 2 when nothing is sent, 3 for both.
    pub shutdown: u8,
    /// Of a unix socket with a path; none where the file has been removed.
    pub file: Option<SocketFile>,
    /// The interface whose own address it is bound to, at the port of `address`: it differs from
    /// sandbox to sandbox.
    pub interface: Option<String>,
}

/// Disposition of a signal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SignalAction {
    pub signal: i32,
    pub handler: u64,
    pub flags: u64,
    pub restorer: u64,
    pub mask: u64,
}

/// One thread.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Thread {
    pub tid: i32,
    pub name: String,
    pub registers: Registers,
    /// The non-compacted XSAVE area, as PTRACE_GETREGSET gives it.
    pub xstate: Vec<u8>,
    pub blocked: u64,
    /// Stack pointer, flags, size.
    pub alternate_stack: (u64, u32, u64),
    pub robust_list: (u64, u64),
    pub clear_tid: u64,
    /// Address, size and signature of the registered rseq area.
    pub rseq: Option<(u64, u32, u32)>,
    pub pending: Vec<Vec<u8>>,
    pub nice: i32,
    /// Policy and priority of sched(7).
    pub scheduling: (i32, i32),
    /// CPUs it is bound to, where they differ from the sandbox's.
    pub affinity: Option<Vec<u8>>,
    pub parent_death_signal: u64,
    /// Nanoseconds; 0 for real-time threads, which have none.
    pub timer_slack: u64,
    /// Class and level (ioprio_set(2)); 0 where it follows the nice value.
    pub io_priority: u32,
    pub credentials: Credentials,
    pub no_new_privileges: bool,
    /// Indices in [`Manifest::filters`] of those in force, oldest first.
    pub filters: Vec<usize>,
}

/// General registers, in the order of `struct sigcontext` where it has them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Registers {
    pub r8: u64,
    pub r9: u64,
    pub r10: u64,
    pub r11: u64,
    pub r12: u64,
    pub r13: u64,
    pub r14: u64,
    pub r15: u64,
    pub rdi: u64,
    pub rsi: u64,
    pub rbp: u64,
    pub rbx: u64,
    pub rdx: u64,
    pub rax: u64,
    pub rcx: u64,
    pub rsp: u64,
    pub rip: u64,
    pub eflags: u64,
    pub cs: u64,
    pub ss: u64,
    pub fs_base: u64,
    pub gs_base: u64,
}

/// User, groups and capabilities of a thread.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Credentials {
    /// Real, effective, saved, file system.
    pub uid: [u32; 4],
    pub gid: [u32; 4],
    pub groups: Vec<u32>,
    pub inheritable: u64,
    pub permitted: u64,
    pub effective: u64,
    pub bounding: u64,
    pub ambient: u64,
    pub secure_bits: u64,
}

/// A file, directory or link in a tmpfs of the sandbox.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TmpfsEntry {
    pub path: String,
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub kind: TmpfsKind,
}

/// What a tmpfs entry is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum TmpfsKind {
    Directory,
    File(Vec<u8>),
    Fifo,
    Link(String),
    /// One that a bound socket has, or has had.
    Socket,
}

/// Why an encoded manifest cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    #[error("The manifest cannot be decoded; take the snapshot again")]
    Decode { source: postcard::Error },
    #[error(
        "The manifest has version {found}, but this program reads {VERSION}; take the snapshot again"
    )]
    Version { found: u32 },
    #[error("The manifest contradicts itself: {what}; take the snapshot again")]
    Invalid { what: String },
}

impl Manifest {
    /// Encodes for storage.
    ///
    /// # Errors
    /// When the manifest cannot be encoded.
    pub fn encode(&self) -> Result<Vec<u8>, ManifestError> {
        postcard::to_stdvec(self).map_err(|source| ManifestError::Decode { source })
    }

    /// Decodes and checks.
    ///
    /// # Errors
    /// When the bytes are not a manifest of this version, or one that contradicts itself.
    pub fn decode(bytes: &[u8]) -> Result<Self, ManifestError> {
        let (version, _) = postcard::take_from_bytes::<u32>(bytes)
            .map_err(|source| ManifestError::Decode { source })?;
        if version != VERSION {
            return Err(ManifestError::Version { found: version });
        }
        let manifest: Self =
            postcard::from_bytes(bytes).map_err(|source| ManifestError::Decode { source })?;
        manifest.check()?;
        Ok(manifest)
    }

    /// Stored pages of all processes.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.processes
            .iter()
            .flat_map(|process| &process.pages)
            .chain(self.memory.iter().flat_map(|object| &object.pages))
            .map(|run| run.pages)
            .sum()
    }

    /// Threads of all processes.
    #[must_use]
    pub fn threads(&self) -> usize {
        self.processes
            .iter()
            .map(|process| process.threads.len())
            .sum()
    }
}
