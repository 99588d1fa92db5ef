//! The program that a process becomes to be loaded: a process that leaves the address space which it
//! shares with its tree needs a new one, and only exec makes one. It maps the region of the capsule
//! at descriptor 0 and goes on there; the restorer unmaps it.
#![no_std]
#![no_main]

mod sys;
mod wire;

use core::arch::{asm, global_asm};

use sys::{nr, syscall};
use wire::{Capsule, Report, report};

const CAPSULE: u64 = 0;
const READ: u64 = 1;
const WRITE: u64 = 2;
const EXECUTE: u64 = 4;
/// MAP_PRIVATE and MAP_FIXED_NOREPLACE.
const PRIVATE_HERE: u64 = 0x2 | 0x10_0000;
const AT_SYSINFO_EHDR: u64 = 33;
const MSG_NOSIGNAL: u64 = 0x4000;

// What the kernel leaves on the stack is an argument count, arguments, environment and the
// auxiliary vector (x86-64 psABI, "Initial Process Stack").
global_asm!(
    ".globl _start",
    "_start:",
    "mov rdi, rsp",
    "and rsp, -16",
    "xor ebp, ebp",
    "call {load}",
    "ud2",
    load = sym load,
);

unsafe extern "C" fn load(stack: *const u64) -> ! {
    let mut capsule = Capsule {
        base: 0,
        code: 0,
        length: 0,
        region: 0,
        entry: 0,
        header: 0,
        stack: 0,
        control: 0,
    };
    let size = size_of::<Capsule>() as u64;
    // SAFETY: the capsule is the planner's; where a step fails nothing of it is used.
    unsafe {
        let into = (&raw mut capsule) as u64;
        if syscall(nr::PREAD64, &[CAPSULE, into, size, 0, 0, 0]) != size as i64 {
            leave();
        }
        map(&capsule, 0, capsule.code, READ | EXECUTE);
        map(&capsule, capsule.code, capsule.length, READ | WRITE);
        asm!(
            "jmp {entry}",
            entry = in(reg) capsule.entry,
            in("rdi") capsule.header,
            in("rsi") capsule.stack,
            in("rdx") vdso(stack),
            options(noreturn),
        )
    }
}

/// Maps a part of the region.
///
/// # Safety
/// The capsule must be at its descriptor.
unsafe fn map(capsule: &Capsule, from: u64, to: u64, access: u64) {
    let (at, offset) = (capsule.base + from, capsule.region + from);
    let args = [at, to - from, access, PRIVATE_HERE, CAPSULE, offset];
    // SAFETY: a private mapping where there is none.
    let mapped = unsafe { syscall(nr::MMAP, &args) };
    if mapped != at as i64 {
        let message = Report {
            kind: report::FAILED,
            what: 9,
            errno: -mapped as i32,
            ..Report::default()
        };
        let (from, size) = ((&raw const message) as u64, size_of::<Report>() as u64);
        // SAFETY: the message outlives the call.
        unsafe { syscall(nr::SENDTO, &[capsule.control, from, size, MSG_NOSIGNAL, 0, 0]) };
        leave();
    }
}

/// The address of the vdso, from the auxiliary vector.
///
/// # Safety
/// `stack` must be what the kernel left.
unsafe fn vdso(stack: *const u64) -> u64 {
    // SAFETY: every list on the stack has its end mark.
    unsafe {
        let mut at = stack.add(2 + *stack as usize);
        while *at != 0 {
            at = at.add(1);
        }
        at = at.add(1);
        while *at != 0 {
            if *at == AT_SYSINFO_EHDR {
                return *at.add(1);
            }
            at = at.add(2);
        }
    }
    leave()
}

/// Ends the process; its parent's tree is found incomplete.
fn leave() -> ! {
    loop {
        // SAFETY: ends this process; touches no memory.
        unsafe { syscall(nr::EXIT_GROUP, &[127, 0, 0, 0, 0, 0]) };
    }
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    leave()
}
