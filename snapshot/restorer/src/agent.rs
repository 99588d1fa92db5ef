//! The loop of a zygote, of its agents and of its clones.
//!
//! Agents share the zygote's address space; each waits in the cgroup of a tenancy to come. There it
//! makes a clone: a process with a copy of the address space, in which what calls write is copied
//! already. A start gives the clone's memory away: clone -> setns into the sandbox -> helper, born
//! inside its pid namespace -> root of the tree, both sharing the clone's address space. Helper and
//! clone end, so that the root's parent is the sandbox's pid 1 and the memory the tree's alone.
//! Nothing is copied on the way.

use crate::interpreter::{fail, leave, run, send, task};
use crate::sys::{self, CLONE_VM, CloneArgs, SIGCHLD, nr, syscall};
use crate::wire::{
    Header, MOST_DESCRIPTORS, Op, Range, Report, Request, STACK, Wanted, fd, report, task_fd,
};

const CLONE_VFORK: u64 = 0x4000;
const CLONE_PARENT: u64 = 0x8000;
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;
const NAMESPACES: u64 = 0x2_0000 | 0x0400_0000 | 0x0800_0000 | 0x2000_0000 | 0x4000_0000;
const WALL: u64 = 0x4000_0000;
const F_GETFD: u64 = 1;
const MSG_CMSG_CLOEXEC: u64 = 0x4000_0000;
const SOL_SOCKET: i32 = 1;
const SCM_RIGHTS: i32 = 1;
const MSG_CTRUNC: u64 = 8;
const EINVAL: i64 = 22;
/// End of the user's half of the address space.
const TASK_END: u64 = 0x7fff_ffff_f000;

#[repr(C)]
struct ControlMessage {
    length: usize,
    level: i32,
    kind: i32,
    descriptors: [i32; MOST_DESCRIPTORS],
}

#[repr(C)]
struct MessageHeader {
    name: u64,
    name_length: u64,
    parts: u64,
    part_count: u64,
    control: u64,
    control_length: u64,
    flags: u64,
}

/// Where an address space comes in, on a stack in the region. A fresh one, a zygote's or that of a
/// process under load, needs nothing else but the kernel's mappings around `vdso`; where that is 0 it
/// comes from another zygote, and its program says what of it stays.
///
/// # Safety
/// `header` must be the region's header; the caller's program is unmapped.
pub unsafe extern "C" fn enter(header: *mut Header, vdso: u64) -> ! {
    // SAFETY: the header is the planner's, and so are the words and the program that it names.
    unsafe {
        if vdso != 0 {
            clear(header, vdso);
        }
        run(header, (*header).build as *const Op);
        serve(header, 0)
    }
}

/// Unmaps all but the region and the kernel's mappings.
///
/// # Safety
/// As [`enter`].
unsafe fn clear(header: *mut Header, vdso: u64) {
    // SAFETY: the header is the planner's, and so are the words that it names.
    unsafe {
        let start = vdso - (*header).vdso_offset;
        let words = (*header).vdso_words as *const u64;
        for index in 0..*words {
            let word = *words.add(1 + index as usize) as *mut u64;
            *word += start;
        }
        let region = Range {
            start: (*header).base,
            end: (*header).base + (*header).length,
        };
        let kernel = Range {
            start,
            end: start + (*header).vdso_length,
        };
        let keep = if region.start < kernel.start {
            [region, kernel]
        } else {
            [kernel, region]
        };
        let mut from = 0;
        for range in keep {
            unmap(header, from, range.start);
            from = range.end;
        }
        unmap(header, from, TASK_END);
    }
}

/// # Safety
/// Nothing in the range may be needed any more.
unsafe fn unmap(header: *mut Header, start: u64, end: u64) {
    if end > start {
        // SAFETY: by this function's contract.
        let result = unsafe { syscall(nr::MUNMAP, &[start, end - start, 0, 0, 0, 0]) };
        if result < 0 {
            // SAFETY: the header lies in the region, which is never unmapped.
            unsafe { fail(header, 6, result) };
        }
    }
}

/// Serves requests until the socket closes.
///
/// # Safety
/// As [`enter`]; `index` names the stacks of this agent alone.
unsafe fn serve(header: *mut Header, index: u64) -> ! {
    // SAFETY: the header is the planner's.
    let control = unsafe { (*header).control };
    loop {
        let idle = Report {
            kind: report::IDLE,
            ..Report::default()
        };
        // SAFETY: the header is the planner's.
        unsafe { send(header, &idle) };
        // SAFETY: the header is the planner's; what came with the last request is closed.
        let Ok(wanted) = (unsafe { receive(control) }) else {
            leave(0);
        };
        // SAFETY: the header is the planner's.
        let rework = unsafe { (*header).rework };
        match wanted {
            // SAFETY: the descriptors of a start lie where `receive` put them.
            Some(Wanted::Start) => unsafe { start(header, index) },
            // SAFETY: the new task's socket lies where `receive` put it; the number is in range.
            Some(Wanted::Agent(number)) => unsafe { another(header, number) },
            // SAFETY: as above.
            Some(Wanted::Clone) => unsafe { clone(header) },
            // SAFETY: as above.
            Some(Wanted::Derive) => unsafe { derive(header) },
            // SAFETY: the owner has written a program there before it asks.
            Some(Wanted::Rework) if rework != 0 => unsafe { run(header, rework as *const Op) },
            // SAFETY: the header is the planner's.
            _ => unsafe { report_failure(header, 5, -EINVAL) },
        }
        // SAFETY: closes what came with the request; the agent keeps its socket and its home.
        unsafe {
            syscall(
                nr::CLOSE_RANGE,
                &[control + fd::STDIO, u64::from(u32::MAX), 0, 0, 0, 0],
            );
        }
    }
}

/// Takes one request, or nothing if it cannot be served; its descriptors land at
/// `control + fd::STDIO` and above, in order. Once the socket has closed there is an error.
///
/// # Safety
/// Descriptors from there on must be free.
unsafe fn receive(control: u64) -> Result<Option<Wanted>, i64> {
    // A longer message is known by the byte too many.
    let mut bytes = [0u8; size_of::<Request>() + 1];
    let mut ancillary = ControlMessage {
        length: 0,
        level: 0,
        kind: 0,
        descriptors: [-1; MOST_DESCRIPTORS],
    };
    let part = [(&raw mut bytes) as u64, size_of_val(&bytes) as u64];
    let mut message = MessageHeader {
        name: 0,
        name_length: 0,
        parts: (&raw const part) as u64,
        part_count: 1,
        control: (&raw mut ancillary) as u64,
        control_length: size_of::<ControlMessage>() as u64,
        flags: 0,
    };
    // SAFETY: every pointer in the message lives on this stack until the call returns.
    let got = unsafe {
        syscall(
            nr::RECVMSG,
            &[
                control + fd::CONTROL,
                (&raw mut message) as u64,
                MSG_CMSG_CLOEXEC,
                0,
                0,
                0,
            ],
        )
    };
    if got <= 0 {
        return Err(got);
    }
    let count = descriptors(ancillary.length, ancillary.level, ancillary.kind);
    let mut whole = message.flags & MSG_CTRUNC == 0;
    if count > 0 {
        for (place, descriptor) in ancillary.descriptors.iter().take(count).enumerate() {
            // SAFETY: moves a descriptor that was just received to its fixed place.
            let placed = unsafe {
                syscall(
                    nr::DUP3,
                    &[
                        *descriptor as u64,
                        control + fd::STDIO + place as u64,
                        0,
                        0,
                        0,
                        0,
                    ],
                )
            };
            whole &= placed >= 0;
        }
        // SAFETY: the received numbers lie below the control socket, where an agent has none.
        unsafe { syscall(nr::CLOSE_RANGE, &[0, control - 1, 0, 0, 0, 0]) };
    }
    let message = bytes.get(..got as usize).filter(|_| whole);
    Ok(message.and_then(|message| Wanted::of(message, count)))
}

/// How many descriptors a control message with this head holds (cmsg(3)).
pub(crate) fn descriptors(length: usize, level: i32, kind: i32) -> usize {
    if level != SOL_SOCKET || kind != SCM_RIGHTS {
        return 0;
    }
    (length.saturating_sub(16) / 4).min(MOST_DESCRIPTORS)
}

/// Gives this address space to the tree's root, in the sandbox whose pid 1 came with the request.
///
/// # Safety
/// As [`serve`]; nobody else may share the address space.
unsafe fn start(header: *mut Header, index: u64) -> ! {
    // SAFETY: the header is the planner's, the descriptors were put in place by `receive`; the
    // helper runs on a stack of its own while this task sleeps in vfork.
    unsafe {
        let control = (*header).control;
        // A zygote that is given away itself was never a clone.
        prepare(header);
        let attach = (*header).attach;
        if attach != 0 {
            run(header, attach as *const Op);
        }
        (*header).marks[0] = sys::now(sys::REALTIME);
        let entered = syscall(nr::SETNS, &[control + fd::INIT, NAMESPACES, 0, 0, 0, 0]);
        if entered < 0 {
            fail(header, 1, entered);
        }
        (*header).marks[1] = sys::now(sys::REALTIME);
        syscall(nr::SET_TID_ADDRESS, &[(*header).clone_left, 0, 0, 0, 0, 0]);
        let pid = (*header).helper_pid as i32;
        let stack_end = (*header).stacks + (2 * index + 2) * STACK;
        let mut args = CloneArgs::sharing(&pid, stack_end, (*header).helper_left);
        args.flags |= CLONE_VFORK;
        let made = sys::clone_onto(&args, helper, header as u64, 0);
        if made < 0 {
            fail(header, 2, made);
        }
        // It would be a stranger's child for a moment otherwise.
        syscall(nr::WAIT4, &[made as u64, 0, WALL, 0, 0, 0]);
        leave(0)
    }
}

unsafe extern "C" fn helper(header: u64, _: u64) -> ! {
    let header = header as *mut Header;
    // SAFETY: the header is the planner's, and so is the root's stack, which nobody else uses.
    unsafe {
        let pid = (*header).root_pid as i32;
        let args = CloneArgs::sharing(&pid, (*header).root_stack, (*header).root_left);
        let root = sys::clone_onto(&args, task, header as u64, (*header).root);
        if root < 0 {
            report_failure(header, 3, root);
        }
    }
    leave(0)
}

/// Makes a clone of the address space, which takes the socket that came with the request and waits
/// for its start.
///
/// # Safety
/// As [`serve`].
unsafe fn clone(header: *mut Header) {
    // SAFETY: the header is the planner's; the clone goes on here with a copy of everything, this
    // stack included.
    unsafe {
        let control = (*header).control;
        let mut args = CloneArgs {
            exit_signal: SIGCHLD,
            ..CloneArgs::default()
        };
        let cgroup = control + task_fd::CGROUP;
        if syscall(nr::FCNTL, &[cgroup, F_GETFD, 0, 0, 0, 0]) >= 0 {
            args.flags = CLONE_INTO_CGROUP;
            args.cgroup = cgroup;
        }
        let length = size_of::<CloneArgs>() as u64;
        let made = syscall(nr::CLONE3, &[(&raw const args) as u64, length, 0, 0, 0, 0]);
        if made == 0 {
            take_socket(header);
            prepare(header);
            serve(header, 0)
        }
        if made < 0 {
            report_failure(header, 7, made);
        }
    }
}

/// Makes a copy of the zygote that is no clone: its parent is the zygote's own, nothing is made ready in
/// it, and its first request makes another template's zygote of it.
///
/// # Safety
/// As [`serve`].
unsafe fn derive(header: *mut Header) {
    // SAFETY: the header is the planner's; the copy goes on here with a copy of everything, this stack
    // included.
    unsafe {
        let args = CloneArgs {
            flags: CLONE_PARENT,
            ..CloneArgs::default()
        };
        let length = size_of::<CloneArgs>() as u64;
        let made = syscall(nr::CLONE3, &[(&raw const args) as u64, length, 0, 0, 0, 0]);
        if made == 0 {
            take_socket(header);
            serve(header, 0)
        }
        if made < 0 {
            report_failure(header, 11, made);
        }
    }
}

/// Makes ready, once, what can be before the sandbox is known.
///
/// # Safety
/// As [`serve`]; this address space must be no zygote's any more.
unsafe fn prepare(header: *mut Header) {
    // SAFETY: the header is the planner's, and so is the program.
    unsafe {
        let program = (*header).prepare;
        if program != 0 {
            (*header).prepare = 0;
            run(header, program as *const Op);
        }
    }
}

/// Makes another agent, which takes the socket that came with the request.
///
/// # Safety
/// As [`serve`]; only the zygote itself makes agents, and `index` lies below [`MAX_AGENTS`].
///
/// [`MAX_AGENTS`]: crate::wire::MAX_AGENTS
unsafe fn another(header: *mut Header, index: u64) {
    // SAFETY: the owner of the socket gives each living agent an index, and so stacks, of its own.
    unsafe {
        let args = CloneArgs {
            flags: CLONE_VM,
            exit_signal: SIGCHLD,
            stack: (*header).stacks + 2 * index * STACK,
            stack_size: STACK,
            ..CloneArgs::default()
        };
        let made = sys::clone_onto(&args, fresh_agent, header as u64, index);
        if made < 0 {
            report_failure(header, 4, made);
        }
    }
}

unsafe extern "C" fn fresh_agent(header: u64, index: u64) -> ! {
    let header = header as *mut Header;
    // SAFETY: this task has its own descriptor table; its socket came with the request.
    unsafe {
        take_socket(header);
        serve(header, index)
    }
}

/// Makes the socket that came with a request this task's own.
///
/// # Safety
/// The task must have a descriptor table of its own.
unsafe fn take_socket(header: *mut Header) {
    // SAFETY: numbers only; the header is the planner's.
    unsafe {
        let control = (*header).control;
        let (socket, own) = (control + task_fd::SOCKET, control + fd::CONTROL);
        syscall(nr::DUP3, &[socket, own, 0, 0, 0, 0]);
        let rest = u64::from(u32::MAX);
        syscall(nr::CLOSE_RANGE, &[control + fd::STDIO, rest, 0, 0, 0, 0]);
    }
}

/// # Safety
/// `header` must be the region's header.
unsafe fn report_failure(header: *mut Header, what: u32, result: i64) {
    let message = Report {
        kind: report::FAILED,
        what,
        errno: -result as i32,
        ..Report::default()
    };
    // SAFETY: by this function's contract.
    unsafe { send(header, &message) };
}
