//! The free-standing image: the restorer's modules with an entry point and what the compiler
//! expects of a C library. Built by the build script of `trenv-snapshot`.
#![no_std]
#![no_main]

mod agent;
mod interpreter;
mod sys;
mod wire;

use core::arch::{asm, global_asm};

// The image's entry: rdi holds the region's header, rsi the end of a stack in it, rdx the address
// of the vdso.
global_asm!(
    ".globl _start",
    "_start:",
    "mov rsp, rsi",
    "mov rsi, rdx",
    "xor ebp, ebp",
    "call {enter}",
    "ud2",
    enter = sym agent::enter,
);

#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    interpreter::leave(126)
}

/// # Safety
/// As in C.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, count: usize) -> *mut u8 {
    // SAFETY: the caller gives two ranges of `count` bytes.
    unsafe {
        asm!("rep movsb", inout("rcx") count => _, inout("rdi") to => _, inout("rsi") from => _);
    }
    to
}

/// # Safety
/// As in C.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn memset(to: *mut u8, value: i32, count: usize) -> *mut u8 {
    // SAFETY: the caller gives a range of `count` bytes.
    unsafe {
        asm!("rep stosb", inout("rcx") count => _, inout("rdi") to => _, in("al") value as u8);
    }
    to
}

/// # Safety
/// As in C.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, count: usize) -> *mut u8 {
    if (to as usize) <= (from as usize) || (to as usize) >= (from as usize) + count {
        // SAFETY: copying forwards never overwrites what is still to be read.
        return unsafe { memcpy(to, from, count) };
    }
    let mut at = count;
    while at > 0 {
        at -= 1;
        // SAFETY: `at` lies below `count`.
        unsafe { core::ptr::write_volatile(to.add(at), core::ptr::read_volatile(from.add(at))) };
    }
    to
}

/// # Safety
/// As in C.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn memcmp(a: *const u8, b: *const u8, count: usize) -> i32 {
    for at in 0..count {
        // SAFETY: `at` lies below `count`.
        let (x, y) =
            unsafe { (core::ptr::read_volatile(a.add(at)), core::ptr::read_volatile(b.add(at))) };
        if x != y {
            return i32::from(x) - i32::from(y);
        }
    }
    0
}

/// Named by the compiled `core`; nothing unwinds here.
#[unsafe(no_mangle)]
pub extern "C" fn rust_eh_personality() {}
