//! System calls without a C library.

use core::arch::asm;

use crate::wire::STACK;

/// Numbers used by the restorer itself; programs carry theirs with them.
pub mod nr {
    pub const SENDTO: u64 = 44;
    pub const RECVFROM: u64 = 45;
    pub const RECVMSG: u64 = 47;
    pub const MUNMAP: u64 = 11;
    pub const WRITE: u64 = 1;
    pub const CLOSE: u64 = 3;
    pub const MMAP: u64 = 9;
    pub const RT_SIGRETURN: u64 = 15;
    pub const PREAD64: u64 = 17;
    pub const SCHED_YIELD: u64 = 24;
    pub const MADVISE: u64 = 28;
    pub const WAIT4: u64 = 61;
    pub const FCNTL: u64 = 72;
    pub const FUTEX: u64 = 202;
    pub const SET_TID_ADDRESS: u64 = 218;
    pub const CLOCK_GETTIME: u64 = 228;
    pub const EXIT_GROUP: u64 = 231;
    pub const OPENAT: u64 = 257;
    pub const UNSHARE: u64 = 272;
    pub const DUP3: u64 = 292;
    pub const SETNS: u64 = 308;
    pub const CLONE3: u64 = 435;
    pub const CLOSE_RANGE: u64 = 436;
}

/// `struct clone_args` of `clone3(2)`, up to `cgroup`.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub struct CloneArgs {
    pub flags: u64,
    pub pidfd: u64,
    pub child_tid: u64,
    pub parent_tid: u64,
    pub exit_signal: u64,
    pub stack: u64,
    pub stack_size: u64,
    pub tls: u64,
    pub set_tid: u64,
    pub set_tid_size: u64,
    pub cgroup: u64,
}

pub const CLONE_VM: u64 = 0x100;
pub const CLONE_CHILD_CLEARTID: u64 = 0x20_0000;
pub const SIGCHLD: u64 = 17;

impl CloneArgs {
    /// Arguments for a process with `pid` that shares this address space, on the stack that ends at
    /// `stack_end`. The kernel clears the word at `left`, unless that is 0, when it has left. `pid`
    /// must be there until the call.
    #[must_use]
    pub fn sharing(pid: &i32, stack_end: u64, left: u64) -> Self {
        Self {
            flags: match left {
                0 => CLONE_VM,
                _ => CLONE_VM | CLONE_CHILD_CLEARTID,
            },
            child_tid: left,
            exit_signal: SIGCHLD,
            stack: stack_end - STACK,
            stack_size: STACK,
            set_tid: core::ptr::from_ref(pid) as u64,
            set_tid_size: 1,
            ..Self::default()
        }
    }
}

/// Makes a system call; negative results are error numbers.
///
/// # Safety
/// As dangerous as the call that `nr` and `args` name: the caller vouches for every pointer among
/// them and for what the call does to the address space.
#[inline(always)]
pub unsafe fn syscall(nr: u64, args: &[u64; 6]) -> i64 {
    let result: i64;
    // SAFETY: the register assignment is the kernel's calling convention; rcx and r11 are declared
    // as overwritten; the effects of the call are the caller's to vouch for.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") nr as i64 => result,
            in("rdi") args[0],
            in("rsi") args[1],
            in("rdx") args[2],
            in("r10") args[3],
            in("r8") args[4],
            in("r9") args[5],
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    result
}

/// Clones a task that shares this address space and runs `entry(a, b)` on the stack in `args`.
///
/// # Safety
/// `args` must hold CLONE_VM and a stack that nobody else uses; `entry` must not return.
#[inline(never)]
pub unsafe fn clone_onto(
    args: &CloneArgs,
    entry: unsafe extern "C" fn(u64, u64) -> !,
    a: u64,
    b: u64,
) -> i64 {
    let result: i64;
    // SAFETY: the child starts behind the system call with the same registers but its own stack
    // pointer, and leaves this function by the call to `entry`, which does not return. The parent
    // goes on with its stack untouched.
    unsafe {
        asm!(
            "syscall",
            "test rax, rax",
            "jnz 2f",
            "xor ebp, ebp",
            "and rsp, -16",
            "mov rdi, r12",
            "mov rsi, r13",
            "call r14",
            "ud2",
            "2:",
            inlateout("rax") nr::CLONE3 as i64 => result,
            in("rdi") args as *const CloneArgs,
            in("rsi") size_of::<CloneArgs>(),
            in("r12") a,
            in("r13") b,
            in("r14") entry,
            lateout("rcx") _,
            lateout("r11") _,
        );
    }
    result
}

/// CLOCK_REALTIME.
pub const REALTIME: u64 = 0;
/// CLOCK_MONOTONIC.
pub const MONOTONIC: u64 = 1;
/// CLOCK_BOOTTIME.
pub const BOOTTIME: u64 = 7;

/// Nanoseconds of a clock.
#[must_use]
pub fn now(clock: u64) -> u64 {
    let mut time = [0u64; 2];
    // SAFETY: clock_gettime writes two words to `time`, which outlives the call.
    unsafe {
        syscall(
            nr::CLOCK_GETTIME,
            &[clock, (&raw mut time) as u64, 0, 0, 0, 0],
        )
    };
    time[0].wrapping_mul(1_000_000_000).wrapping_add(time[1])
}
