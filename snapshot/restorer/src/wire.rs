//! The region's layout, written by the planner and read by the restorer. All addresses are absolute.
//! A capsule is such a region, with the pages of one process before it, as a file.

/// First word of a region.
pub const MAGIC: u64 = 0x7473_6572_766e_6572;

/// Zygote agents at most, the zygote's own thread included.
pub const MAX_AGENTS: u64 = 1024;

/// Bytes of one stack; an agent has two, its own and that of the process it clones in between.
pub const STACK: u64 = 16 << 10;

/// Bytes of the stack of a thread that is being restored.
pub const THREAD_STACK: u64 = 8 << 10;

/// Ranges in a table of [`verb::COPY_AHEAD`].
pub const MOST_RANGES: usize = 1024;

/// Bit of a range's length there: its pages are brought in to be read, and not copied.
pub const READ_AHEAD: u64 = 1;

/// Values that one program may keep.
pub const SLOTS: usize = 16;

/// Descriptors that one request may carry. They come in below the control descriptor, where nothing
/// else is open in an agent.
pub const MOST_DESCRIPTORS: usize = 16;

/// Timestamps in a [`Report`].
pub const MARKS: usize = 6;

/// Processes of a tree that are loaded instead of cloned, at most.
pub const MAX_LOADED: usize = 8;

/// Objects of shared memory and files without a name of a tree, at most.
pub const MAX_MEMORY_OBJECTS: usize = 128;

/// Descriptors at and above the control descriptor, which lies above all that the tree uses.
pub mod fd {
    /// The socket to the zygote's owner.
    pub const CONTROL: u64 = 0;
    /// The program that a process becomes to be loaded.
    pub const LOADER: u64 = 1;
    /// Pages that are copied for each clone, as a file.
    pub const CONTENT: u64 = 2;
    /// The capsule of each process that is loaded.
    pub const CAPSULES: u64 = 3;
    /// Memory objects of the tree, made by the clone or by the tree's root.
    pub const MEMORY: u64 = CAPSULES + super::MAX_LOADED as u64;
    /// Standard input, output and error of the tenancy.
    pub const STDIO: u64 = MEMORY + super::MAX_MEMORY_OBJECTS as u64;
    /// pidfd of the sandbox's pid 1.
    pub const INIT: u64 = STDIO + 3;
    /// The userfaultfd of a waiting clone, until its owner has taken it; a start puts a stream there.
    pub const WATCH: u64 = STDIO;
    /// The files that a program of [`super::request::REWORK`] maps.
    pub const FILES: u64 = STDIO;
    /// The template of the pool's device that a clone attaches when it starts; it is closed then.
    pub const TEMPLATE: u64 = INIT + 1;
    /// First of the open files that the tree's root makes for everyone.
    pub const OBJECTS: u64 = INIT + 2;
}

/// Where a request for a new task has its descriptors.
pub mod task_fd {
    /// Its socket.
    pub const SOCKET: u64 = super::fd::STDIO;
    /// Directory of the cgroup in which it is born (cgroup v2 only).
    pub const CGROUP: u64 = super::fd::STDIO + 1;
}

/// What the region begins with.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub struct Header {
    pub magic: u64,
    /// Start and length of the whole region.
    pub base: u64,
    pub length: u64,
    /// Program that fills the address space. A capsule's goes on to be its process.
    pub build: u64,
    /// Program that a clone runs ahead of its start; 0 when it has run.
    pub prepare: u64,
    /// Program by which a clone attaches memory when it starts; 0 where it has all that it needs.
    pub attach: u64,
    /// Program of the tree's root, its pid in the sandbox, the end of its stack, and the word that the
    /// kernel clears when it has left the address space (0 if it stays).
    pub root: u64,
    pub root_pid: u64,
    pub root_stack: u64,
    pub root_left: u64,
    /// Area of the agents' stacks, and how many agents it was made for.
    pub stacks: u64,
    /// Descriptor of the control socket.
    pub control: u64,
    /// Length of the kernel's own mappings (vvar and vdso, in one piece), and of those of them that
    /// lie below the vdso.
    pub vdso_length: u64,
    pub vdso_offset: u64,
    /// Table of words that take the address of those mappings: a count, then addresses.
    pub vdso_words: u64,
    /// Pid, in the sandbox, of the process between clone and root.
    pub helper_pid: u64,
    /// Words that the kernel clears when the clone and its helper have left the address space.
    pub clone_left: u64,
    pub helper_left: u64,
    /// Where the owner writes a program of a [`request::REWORK`]; 0 where there is no room for one.
    pub rework: u64,
    pub marks: [u64; MARKS],
}

/// What a capsule begins with; the pages of its process follow, then its region.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct Capsule {
    /// Address of the region, length of its code and of the whole, offset in the file.
    pub base: u64,
    pub code: u64,
    pub length: u64,
    pub region: u64,
    /// Entry point, header, end of a stack.
    pub entry: u64,
    pub header: u64,
    pub stack: u64,
    /// Descriptor of the control socket.
    pub control: u64,
}

/// An address range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct Range {
    pub start: u64,
    pub end: u64,
}

/// Verbs of a program.
pub mod verb {
    /// End of the program.
    pub const END: u16 = 0;
    /// System call `nr` with `args`.
    pub const SYSCALL: u16 = 1;
    /// As [`SYSCALL`], made again for a while, until its result is as it must be.
    pub const RETRY: u16 = 15;
    /// Fork a child with pid `args[0]` that runs the program at `args[1]`.
    pub const FORK: u16 = 2;
    /// Make a child with pid `args[0]` that runs the program at `args[1]` on the stack that ends at
    /// `args[2]`, in this address space; the kernel clears the word at `args[3]`, if that is not 0,
    /// when it has left it.
    pub const SHARE: u16 = 12;
    /// Wait until the word at `args[0]` is zero.
    pub const WAIT_LEFT: u16 = 13;
    /// Make a thread with tid `args[0]`, program `args[1]`, stack top `args[2]`, TLS base `args[3]`.
    pub const THREAD: u16 = 3;
    /// Wait until the word at `args[0]` is not zero.
    pub const WAIT: u16 = 4;
    /// Set the word at `args[0]` and wake all that wait for it.
    pub const RELEASE: u16 = 5;
    /// Tell the owner of the control socket that process `args[0]` is restored.
    pub const REPORT: u16 = 6;
    /// Continue at the ucontext at `args[0]`.
    pub const SIGRETURN: u16 = 7;
    /// Note the time as mark `args[0]`.
    pub const MARK: u16 = 8;
    /// Load the 32-bit word at `args[0]` into slot `dst`.
    pub const LOAD: u16 = 9;
    /// Copy the 32-bit word at `args[0]` to `args[1]`.
    pub const COPY: u16 = 18;
    /// Copy, ahead of its writes, what the table of ranges at `args[0]` names: a count, then pairs of
    /// address and length. The table may be changed in a standing zygote, and in a clone that waits to
    /// attach memory. With [`super::READ_AHEAD`] a range is brought in only.
    pub const COPY_AHEAD: u16 = 10;
    /// Make a time namespace in which CLOCK_MONOTONIC stands at `args[0]` nanoseconds and CLOCK_BOOTTIME
    /// at `args[1]`, for the children of this process. Where none can be made the clocks stay the
    /// machine's; if these are behind, the step fails.
    pub const MAKE_CLOCK: u16 = 11;
    /// Enter that time namespace; the address space must be this process's alone by now.
    pub const ENTER_CLOCK: u16 = 14;
    /// Go on in another region: entry point `args[0]`, header `args[1]`, end of a stack `args[2]`.
    pub const ENTER: u16 = 17;
    /// Wait for a [`super::request::GO`] of this process's own from the control socket.
    pub const AWAIT_GO: u16 = 16;
}

/// How a system call's result is judged.
pub mod check {
    /// Any result will do.
    pub const ANY: u8 = 0;
    /// Anything but an error.
    pub const OK: u8 = 1;
    /// Exactly `expect`.
    pub const EXACT: u8 = 2;
}

/// In [`Op::from`]: the argument is taken as it stands.
pub const IMMEDIATE: u8 = 0xff;

/// One step of a program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct Op {
    pub verb: u16,
    pub check: u8,
    /// Slot that takes the result, or [`IMMEDIATE`] for none.
    pub dst: u8,
    /// Number of the planner's sentence about this step.
    pub what: u32,
    pub nr: u64,
    pub args: [u64; 6],
    /// Per argument: the slot to take it from, or [`IMMEDIATE`].
    pub from: [u8; 8],
    pub expect: u64,
}

/// What a zygote, an agent or a clone is asked for; descriptors travel beside it.
pub mod request {
    /// Give this task's memory to the tree, in a sandbox, and end. Descriptors: stdin, stdout,
    /// stderr, pidfd of pid 1; with an `attach` in the header, the template too.
    pub const START: u32 = 1;
    /// Make another agent. Descriptor: its socket.
    pub const AGENT: u32 = 2;
    /// Make a clone of the address space that waits for its start. Descriptors: its socket, and the
    /// cgroup's directory on cgroup v2.
    pub const CLONE: u32 = 3;
    /// Run the program that the owner has written at the header's `rework`. Descriptors: the files
    /// that it maps.
    pub const REWORK: u32 = 4;
    /// Let one process of a restored tree go on; it is sent once for each.
    pub const GO: u32 = 5;
    /// Make a copy of the zygote, a child of the zygote's own parent, that is to become another
    /// template's zygote by a [`REWORK`]. Descriptor: its socket.
    pub const DERIVE: u32 = 6;
}

/// A request.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct Request {
    pub kind: u32,
    /// For [`request::AGENT`]: which stacks the new agent takes, from 1; the zygote's own are 0.
    pub agent: u32,
}

/// What a [`Request`] asks for, once it is known to be one that can be served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wanted {
    Start,
    /// With the number of the new agent.
    Agent(u64),
    Clone,
    Derive,
    Rework,
}

impl Wanted {
    /// Reads a message that came with so many descriptors; none if its length, its kind, their
    /// number or the agent's is not as it must be.
    #[must_use]
    pub fn of(message: &[u8], descriptors: usize) -> Option<Self> {
        let &[a, b, c, d, e, f, g, h] = message else {
            return None;
        };
        let kind = u32::from_ne_bytes([a, b, c, d]);
        let agent = u64::from(u32::from_ne_bytes([e, f, g, h]));
        match (kind, descriptors) {
            (request::START, 4 | 5) => Some(Self::Start),
            (request::AGENT, 1) if agent > 0 && agent < MAX_AGENTS => Some(Self::Agent(agent)),
            (request::CLONE, 1 | 2) => Some(Self::Clone),
            (request::DERIVE, 1) => Some(Self::Derive),
            (request::REWORK, _) => Some(Self::Rework),
            _ => None,
        }
    }
}

/// Kinds of [`Report`].
pub mod report {
    /// A zygote, agent or clone waits for requests (again).
    pub const IDLE: u32 = 1;
    /// A process is restored; `process` says which.
    pub const RESTORED: u32 = 2;
    /// A step failed; `what` and `errno` say which and why.
    pub const FAILED: u32 = 3;
}

/// A message from an agent or a process under restore; credentials travel beside it.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub struct Report {
    pub kind: u32,
    pub process: u32,
    pub what: u32,
    pub errno: i32,
    /// CLOCK_REALTIME, nanoseconds: the one clock that is the same in every time namespace.
    pub marks: [u64; MARKS],
}

/// Sentence numbers below this one belong to the restorer itself.
pub const OWN_SENTENCES: u32 = 16;

/// The `what` of a tree that would see its clocks go backwards.
pub const NO_CLOCKS: u32 = 12;

/// The restorer's own sentences, for a `what` below [`OWN_SENTENCES`].
#[must_use]
pub fn own_sentence(what: u32) -> &'static str {
    match what {
        1 => "entering the sandbox's namespaces",
        2 => "cloning a process into the sandbox's pid namespace",
        3 => "cloning the tree's root process (its pid may be taken, or the process limit reached)",
        4 => "making another agent",
        5 => "receiving a request (is the limit of open files reached?)",
        6 => "unmapping the zygote's own program",
        7 => "cloning the zygote's memory (is the machine or the cgroup out of memory?)",
        8 => "entering the tree's time namespace",
        9 => "mapping the capsule of a process",
        10 => {
            "mapping a snapshot file (is its file system mounted noexec, or are there more mappings than vm.max_map_count?)"
        }
        11 => "making a zygote from that of its base",
        NO_CLOCKS => "making a time namespace in which the tree's clocks go on",
        _ => "a step without a name",
    }
}
