//! Runs a program: a list of system calls with a few verbs of control.

use core::arch::asm;
use core::sync::atomic::{AtomicU32, Ordering};

use crate::sys::{self, CLONE_VM, CloneArgs, SIGCHLD, nr, syscall};
use crate::wire::{
    Header, IMMEDIATE, MOST_RANGES, NO_CLOCKS, Op, READ_AHEAD, Report, Request, SLOTS, check, fd,
    report, verb,
};

const CLONE_FS: u64 = 0x200;
const CLONE_FILES: u64 = 0x400;
const CLONE_SIGHAND: u64 = 0x800;
const CLONE_THREAD: u64 = 0x1_0000;
const CLONE_SYSVSEM: u64 = 0x4_0000;
const CLONE_SETTLS: u64 = 0x8_0000;
const CLONE_NEWTIME: u64 = 0x80;
const MADV_POPULATE_READ: u64 = 22;
const MADV_POPULATE_WRITE: u64 = 23;
const FUTEX_WAIT: u64 = 0;
const FUTEX_WAKE: u64 = 1;
const MSG_NOSIGNAL: u64 = 0x4000;
/// How long a call is made again, in nanoseconds.
const PATIENCE: u64 = 5_000_000_000;

/// Runs the program at `ops` to its end.
///
/// # Safety
/// `header` and `ops` must lie in the region that the planner wrote, and the program must be one
/// that the planner wrote for this process: its system calls are made as they stand.
pub unsafe fn run(header: *mut Header, ops: *const Op) {
    let mut slots = [0u64; SLOTS];
    let mut next = ops;
    loop {
        // SAFETY: `next` walks an array of operations that ends with END.
        let op = unsafe { &*next };
        // SAFETY: as above; END stops the walk before the array's end is passed.
        next = unsafe { next.add(1) };
        match op.verb {
            verb::END => return,
            verb::SYSCALL | verb::RETRY => {
                let mut args = op.args;
                for (arg, from) in args.iter_mut().zip(op.from) {
                    if from != IMMEDIATE
                        && let Some(value) = slots.get(usize::from(from))
                    {
                        *arg = *value;
                    }
                }
                // SAFETY: the caller vouches for the program.
                let mut result = unsafe { syscall(op.nr, &args) };
                let mut wrong = is_wrong(op, result);
                if wrong && op.verb == verb::RETRY {
                    let until = sys::now(sys::MONOTONIC).saturating_add(PATIENCE);
                    while wrong && sys::now(sys::MONOTONIC) < until {
                        // SAFETY: lets others run; then as above.
                        unsafe {
                            syscall(nr::SCHED_YIELD, &[0; 6]);
                            result = syscall(op.nr, &args);
                        }
                        wrong = is_wrong(op, result);
                    }
                }
                if wrong {
                    // SAFETY: the header is valid by this function's contract.
                    unsafe { fail(header, op.what, result) };
                }
                if let Some(slot) = slots.get_mut(usize::from(op.dst)) {
                    *slot = result as u64;
                }
            }
            verb::FORK => {
                let pid = op.args[0] as i32;
                let args = CloneArgs {
                    exit_signal: SIGCHLD,
                    set_tid: (&raw const pid) as u64,
                    set_tid_size: 1,
                    ..CloneArgs::default()
                };
                // SAFETY: a plain fork: the child goes on here with a copy of everything.
                let child = unsafe {
                    syscall(
                        nr::CLONE3,
                        &[
                            (&raw const args) as u64,
                            size_of::<CloneArgs>() as u64,
                            0,
                            0,
                            0,
                            0,
                        ],
                    )
                };
                if child == 0 {
                    next = op.args[1] as *const Op;
                } else if child < 0 {
                    // SAFETY: the header is valid by this function's contract.
                    unsafe { fail(header, op.what, child) };
                }
            }
            verb::SHARE => {
                let pid = op.args[0] as i32;
                let args = CloneArgs::sharing(&pid, op.args[2], op.args[3]);
                // SAFETY: the planner gives every process a stack of its own; `task` never returns.
                let made = unsafe { sys::clone_onto(&args, task, header as u64, op.args[1]) };
                if made < 0 {
                    // SAFETY: the header is valid by this function's contract.
                    unsafe { fail(header, op.what, made) };
                }
            }
            verb::THREAD => {
                let tid = op.args[0] as i32;
                let args = CloneArgs {
                    flags: CLONE_VM
                        | CLONE_FS
                        | CLONE_FILES
                        | CLONE_SIGHAND
                        | CLONE_THREAD
                        | CLONE_SYSVSEM
                        | CLONE_SETTLS,
                    stack: op.args[2] - crate::wire::THREAD_STACK,
                    stack_size: crate::wire::THREAD_STACK,
                    tls: op.args[3],
                    set_tid: (&raw const tid) as u64,
                    set_tid_size: 1,
                    ..CloneArgs::default()
                };
                // SAFETY: the planner gives every thread a stack of its own; `task` never returns.
                let made = unsafe { sys::clone_onto(&args, task, header as u64, op.args[1]) };
                if made < 0 {
                    // SAFETY: the header is valid by this function's contract.
                    unsafe { fail(header, op.what, made) };
                }
            }
            verb::WAIT => {
                // SAFETY: the planner gives the address of an aligned word in the region.
                let word = unsafe { AtomicU32::from_ptr(op.args[0] as *mut u32) };
                while word.load(Ordering::Acquire) == 0 {
                    // SAFETY: waits while the word is zero; any early return is caught by the loop.
                    unsafe { syscall(nr::FUTEX, &[op.args[0], FUTEX_WAIT, 0, 0, 0, 0]) };
                }
            }
            // SAFETY: the planner gives the address of an aligned word in the region.
            verb::WAIT_LEFT => unsafe { wait_left(op.args[0]) },
            verb::RELEASE => {
                // SAFETY: the planner gives the address of an aligned word in the region.
                let word = unsafe { AtomicU32::from_ptr(op.args[0] as *mut u32) };
                word.store(1, Ordering::Release);
                // SAFETY: wakes threads of this process only.
                unsafe {
                    syscall(
                        nr::FUTEX,
                        &[op.args[0], FUTEX_WAKE, i32::MAX as u64, 0, 0, 0],
                    )
                };
            }
            verb::REPORT => {
                // SAFETY: the header is valid by this function's contract.
                let marks = unsafe { (*header).marks };
                let message = Report {
                    kind: report::RESTORED,
                    process: op.args[0] as u32,
                    marks,
                    ..Report::default()
                };
                // SAFETY: as above.
                unsafe { send(header, &message) };
            }
            verb::MARK => {
                // SAFETY: as above; the index is checked.
                if let Some(mark) = unsafe { (*header).marks.get_mut(op.args[0] as usize) } {
                    *mark = sys::now(sys::REALTIME);
                }
            }
            verb::LOAD => {
                // SAFETY: the planner gives the address of an aligned word in the region.
                let value = unsafe { *(op.args[0] as *const u32) };
                if let Some(slot) = slots.get_mut(usize::from(op.dst)) {
                    *slot = u64::from(value);
                }
            }
            verb::COPY => {
                let (from, to) = (op.args[0] as *const u32, op.args[1] as *mut u32);
                // SAFETY: the planner gives the addresses of two aligned words in the region.
                unsafe { to.write(from.read()) };
            }
            // SAFETY: the header is valid by this function's contract.
            verb::AWAIT_GO => unsafe { await_go(header) },
            verb::MAKE_CLOCK => {
                let made = make_clocks(op.args[0], op.args[1]);
                if made < 0 {
                    // SAFETY: the header is valid by this function's contract.
                    unsafe { fail(header, NO_CLOCKS, made) };
                }
            }
            verb::ENTER_CLOCK => {
                let entered = enter_clock();
                if entered < 0 {
                    // SAFETY: the header is valid by this function's contract.
                    unsafe { fail(header, 8, entered) };
                }
            }
            verb::ENTER => {
                // SAFETY: the planner gives the entry point, the header and a free stack of a region that
                // was mapped by the steps before; nothing here is needed any more.
                unsafe {
                    asm!(
                        "jmp {entry}",
                        entry = in(reg) op.args[0],
                        in("rdi") op.args[1],
                        in("rsi") op.args[2],
                        in("rdx") 0,
                        options(noreturn),
                    )
                }
            }
            verb::COPY_AHEAD => {
                let table = op.args[0] as *const u64;
                // SAFETY: the planner gives a table with room for `MOST_RANGES` pairs.
                let count = unsafe { core::ptr::read_volatile(table) }.min(MOST_RANGES as u64);
                for range in 0..count as usize {
                    // SAFETY: below the count, as above.
                    let (start, length) = unsafe {
                        (
                            core::ptr::read_volatile(table.add(1 + 2 * range)),
                            core::ptr::read_volatile(table.add(2 + 2 * range)),
                        )
                    };
                    let advice = match length & READ_AHEAD {
                        0 => MADV_POPULATE_WRITE,
                        _ => MADV_POPULATE_READ,
                    };
                    let length = length & !READ_AHEAD;
                    // SAFETY: fills pages of this process's own memory; what is not mapped or not
                    // accessible makes the call fail and changes nothing.
                    unsafe {
                        syscall(nr::MADVISE, &[start, length, advice, 0, 0, 0]);
                    }
                }
            }
            verb::SIGRETURN => {
                // SAFETY: the planner wrote a frame that the kernel checks itself; nothing of this
                // stack is needed any more.
                unsafe {
                    asm!(
                        "mov rsp, {frame}",
                        "syscall",
                        "ud2",
                        frame = in(reg) op.args[0],
                        in("rax") nr::RT_SIGRETURN,
                        options(noreturn),
                    )
                }
            }
            _ => return,
        }
    }
}

/// Waits for the word to go on. If whoever would say it is gone, the process ends: nobody knows of it.
///
/// # Safety
/// `header` must lie in a region that the planner wrote.
unsafe fn await_go(header: *mut Header) {
    const EINTR: i64 = -4;
    const CONNRESET: i64 = -104;
    let mut message = Request { kind: 0, agent: 0 };
    loop {
        // SAFETY: the header is valid by this function's contract; the message outlives the call.
        let got = unsafe {
            let control = (*header).control + fd::CONTROL;
            let (into, size) = ((&raw mut message) as u64, size_of::<Request>() as u64);
            syscall(nr::RECVFROM, &[control, into, size, 0, 0, 0])
        };
        match got {
            EINTR => {}
            0 | CONNRESET => leave(127),
            // There it is; or the function's own filters keep this process from asking.
            _ => return,
        }
    }
}

fn is_wrong(op: &Op, result: i64) -> bool {
    match op.check {
        check::OK => (-4095..0).contains(&result),
        check::EXACT => result as u64 != op.expect,
        _ => false,
    }
}

/// Waits until the kernel has cleared a word (CLONE_CHILD_CLEARTID of clone(2)).
///
/// # Safety
/// `word` must be the address of an aligned 32-bit word that stays.
unsafe fn wait_left(word: u64) {
    // SAFETY: by this function's contract.
    let left = unsafe { AtomicU32::from_ptr(word as *mut u32) };
    loop {
        let value = left.load(Ordering::Acquire);
        if value == 0 {
            return;
        }
        // SAFETY: waits while the word has this value; any early return is caught by the loop.
        unsafe { syscall(nr::FUTEX, &[word, FUTEX_WAIT, u64::from(value), 0, 0, 0]) };
    }
}

/// Makes a time namespace in which the clocks stand at these nanoseconds (time_namespaces(7)). Where none
/// can be made, they stay the machine's; that is an error for a tree that would see one go backwards.
fn make_clocks(monotonic: u64, boottime: u64) -> i64 {
    let made = make_time_namespace(monotonic, boottime);
    let backwards = monotonic > sys::now(sys::MONOTONIC) || boottime > sys::now(sys::BOOTTIME);
    if backwards { made } else { 0 }
}

fn make_time_namespace(monotonic: u64, boottime: u64) -> i64 {
    // SAFETY: takes numbers only; fails where the kernel has no time namespaces.
    let made = unsafe { syscall(nr::UNSHARE, &[CLONE_NEWTIME, 0, 0, 0, 0, 0]) };
    if made < 0 {
        return made;
    }
    let mut lines = Lines {
        bytes: [0; 96],
        length: 0,
    };
    lines.offset(b"monotonic ", monotonic, sys::now(sys::MONOTONIC));
    lines.offset(b"boottime ", boottime, sys::now(sys::BOOTTIME));
    // SAFETY: path and lines outlive the calls.
    unsafe {
        let write_only = 1;
        let offsets = open(c"/proc/self/timens_offsets", write_only);
        if offsets < 0 {
            return offsets;
        }
        let (offsets, length) = (offsets as u64, lines.length as u64);
        let text = lines.bytes.as_ptr() as u64;
        let written = syscall(nr::WRITE, &[offsets, text, length, 0, 0, 0]);
        syscall(nr::CLOSE, &[offsets, 0, 0, 0, 0, 0]);
        written
    }
}

/// Enters the time namespace that was made for this process's children, or for this process by its
/// parent. Those who left the address space may still be on their way out of it.
fn enter_clock() -> i64 {
    const EUSERS: i64 = -87;
    // SAFETY: the path outlives the call; the rest are numbers.
    unsafe {
        let namespace = open(c"/proc/self/ns/time_for_children", 0);
        if namespace < 0 {
            return namespace;
        }
        let enter = [namespace as u64, CLONE_NEWTIME, 0, 0, 0, 0];
        let mut result = syscall(nr::SETNS, &enter);
        while result == EUSERS {
            syscall(nr::SCHED_YIELD, &[0; 6]);
            result = syscall(nr::SETNS, &enter);
        }
        syscall(nr::CLOSE, &[namespace as u64, 0, 0, 0, 0, 0]);
        result
    }
}

/// # Safety
/// None beyond that of opening the file.
unsafe fn open(path: &core::ffi::CStr, how: u64) -> i64 {
    const HERE: u64 = -100i64 as u64;
    // SAFETY: the path outlives the call.
    unsafe { syscall(nr::OPENAT, &[HERE, path.as_ptr() as u64, how, 0, 0, 0]) }
}

/// Lines of text without a formatter.
struct Lines {
    bytes: [u8; 96],
    length: usize,
}

impl Lines {
    fn text(&mut self, text: &[u8]) {
        for byte in text {
            if let Some(place) = self.bytes.get_mut(self.length) {
                *place = *byte;
                self.length += 1;
            }
        }
    }

    /// How far a clock that shows `now` is from `wanted`, as /proc/PID/timens_offsets has it.
    fn offset(&mut self, clock: &[u8], wanted: u64, now: u64) {
        let offset = (wanted as i64).wrapping_sub(now as i64);
        self.text(clock);
        let seconds = offset.div_euclid(1_000_000_000);
        if seconds < 0 {
            self.text(b"-");
        }
        self.number(seconds.unsigned_abs());
        self.text(b" ");
        self.number(offset.rem_euclid(1_000_000_000) as u64);
        self.text(b"\n");
    }

    fn number(&mut self, mut value: u64) {
        let mut digits = [0u8; 20];
        let mut first = digits.len();
        for place in digits.iter_mut().rev() {
            *place = b'0' + (value % 10) as u8;
            value /= 10;
            first -= 1;
            if value == 0 {
                break;
            }
        }
        self.text(digits.get(first..).unwrap_or_default());
    }
}

/// Where a thread or a process that shares this address space begins.
///
/// # Safety
/// `header` and `ops` must be as [`run`] wants them.
pub unsafe extern "C" fn task(header: u64, ops: u64) -> ! {
    // SAFETY: both were taken from the program of this process.
    unsafe { run(header as *mut Header, ops as *const Op) };
    leave(0)
}

/// Tells the owner of the control socket why a step failed, and ends the process.
///
/// # Safety
/// `header` must lie in a region that the planner wrote.
pub unsafe fn fail(header: *mut Header, what: u32, result: i64) -> ! {
    let message = Report {
        kind: report::FAILED,
        what,
        errno: if (-4095..0).contains(&result) {
            -result as i32
        } else {
            0
        },
        ..Report::default()
    };
    // SAFETY: by this function's contract.
    unsafe { send(header, &message) };
    leave(127)
}

/// Sends a report over the control socket.
///
/// # Safety
/// `header` must lie in a region that the planner wrote.
pub unsafe fn send(header: *mut Header, message: &Report) {
    // SAFETY: by this function's contract; the message outlives the call.
    unsafe {
        syscall(
            nr::SENDTO,
            &[
                (*header).control + fd::CONTROL,
                core::ptr::from_ref(message) as u64,
                size_of::<Report>() as u64,
                MSG_NOSIGNAL,
                0,
                0,
            ],
        )
    };
}

/// Ends the process.
pub fn leave(status: u64) -> ! {
    loop {
        // SAFETY: ends this process; touches no memory.
        unsafe { syscall(nr::EXIT_GROUP, &[status, 0, 0, 0, 0, 0]) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: u64 = 3_600_000_000_000;
    const EPERM: i64 = -1;

    /// Takes all capabilities from this thread (capset(2)).
    fn drop_capabilities() {
        let (head, none) = ([0x2008_0522u32, 0], [0u32; 6]);
        let (head, none) = ((&raw const head) as u64, (&raw const none) as u64);
        // SAFETY: the kernel reads both, which outlive the call.
        let dropped = unsafe { syscall(126, &[head, none, 0, 0, 0, 0]) };
        assert_eq!(dropped, 0);
    }

    #[test]
    fn a_tree_whose_clocks_would_go_backwards_is_not_started_without_its_own() {
        let unable = std::thread::spawn(|| {
            drop_capabilities();
            let machine = [sys::now(sys::MONOTONIC), sys::now(sys::BOOTTIME)];
            let [monotonic, boottime] = machine;
            // What is behind runs by the machine's clocks.
            assert_eq!(make_clocks(monotonic, boottime), 0);
            assert_eq!(make_clocks(0, 0), 0);
            assert_eq!(make_clocks(monotonic + HOUR, boottime), EPERM);
            assert_eq!(make_clocks(monotonic, boottime + HOUR), EPERM);
            assert_eq!(make_clocks(u64::MAX, 0), EPERM);
        });
        unable.join().unwrap();
    }

    #[test]
    fn offsets_are_written_as_the_kernel_reads_them() {
        let mut lines = Lines {
            bytes: [0; 96],
            length: 0,
        };
        lines.offset(b"monotonic ", 2_500_000_000, 1_000_000_000);
        lines.offset(b"boottime ", 1_000_000_000, 2_500_000_000);
        let text = &lines.bytes[..lines.length];
        assert_eq!(text, b"monotonic 1 500000000\nboottime -2 500000000\n");
    }
}
