//! The signal frame through which a restored thread continues.
//!
//! rt_sigreturn(2) takes general registers, vector registers, signal mask and alternate stack from
//! it (kernel: arch/x86/kernel/signal_64.c, arch/x86/kernel/fpu/signal.c). Without the two magic
//! words, the sizes and 64-byte alignment the kernel silently restores the legacy part only.

use crate::manifest::Thread;

const MAGIC1: u32 = 0x4650_5853;
const MAGIC2: u32 = 0x4650_5845;
const SW_RESERVED: usize = 464;
const XSTATE_BV: usize = 512;
const LEGACY_AND_HEADER: usize = 576;
/// Offset of `struct sigcontext` in `struct ucontext`.
const MCONTEXT: usize = 40;
const SIGMASK: usize = 296;
const UCONTEXT: usize = 304;
/// UC_FP_XSTATE | UC_SIGCONTEXT_SS | UC_STRICT_RESTORE_SS.
const UC_FLAGS: u64 = 7;

/// Bytes needed for a thread's frame, alignment included.
pub fn size(thread: &Thread) -> usize {
    UCONTEXT.next_multiple_of(64) + xstate_size(&thread.xstate) + 4
}

/// The frame for address `at` (a multiple of 64), with the ucontext at its beginning.
pub fn build(thread: &Thread, at: u64) -> Vec<u8> {
    let state_at = UCONTEXT.next_multiple_of(64);
    let mut frame = vec![0u8; state_at];
    let mut word = |offset: usize, value: u64| {
        frame[offset..offset + 8].copy_from_slice(&value.to_ne_bytes());
    };
    let (stack, flags, length) = thread.alternate_stack;
    word(0, UC_FLAGS);
    word(16, stack);
    word(24, u64::from(flags));
    word(32, length);
    let r = &thread.registers;
    let general = [
        r.r8, r.r9, r.r10, r.r11, r.r12, r.r13, r.r14, r.r15, r.rdi, r.rsi, r.rbp, r.rbx, r.rdx,
        r.rax, r.rcx, r.rsp, r.rip, r.eflags,
    ];
    for (index, value) in general.into_iter().enumerate() {
        word(MCONTEXT + index * 8, value);
    }
    // cs, gs, fs and ss share a word.
    word(MCONTEXT + 18 * 8, (r.cs & 0xffff) | (r.ss & 0xffff) << 48);
    word(MCONTEXT + 23 * 8, at + state_at as u64);
    word(SIGMASK, thread.blocked);

    let size = xstate_size(&thread.xstate);
    let mut state = thread.xstate.clone();
    state.resize(size, 0);
    let features = features(&thread.xstate);
    state[SW_RESERVED..LEGACY_AND_HEADER - 64].fill(0);
    state[SW_RESERVED..SW_RESERVED + 4].copy_from_slice(&MAGIC1.to_ne_bytes());
    state[SW_RESERVED + 4..SW_RESERVED + 8].copy_from_slice(&(size as u32 + 4).to_ne_bytes());
    state[SW_RESERVED + 8..SW_RESERVED + 16].copy_from_slice(&features.to_ne_bytes());
    state[SW_RESERVED + 16..SW_RESERVED + 20].copy_from_slice(&(size as u32).to_ne_bytes());
    frame.extend(state);
    frame.extend(MAGIC2.to_ne_bytes());
    frame
}

/// Components that the area holds, by XSTATE_BV.
fn features(area: &[u8]) -> u64 {
    area.get(XSTATE_BV..XSTATE_BV + 8).map_or(3, |bytes| {
        u64::from_ne_bytes(bytes.try_into().unwrap_or_default())
    })
}

/// Bytes of the area that hold components in use: the kernel refuses more than a task may have.
fn xstate_size(area: &[u8]) -> usize {
    let features = features(area);
    let mut size = LEGACY_AND_HEADER;
    for component in 2..63 {
        if features & 1 << component != 0 {
            let place = std::arch::x86_64::__cpuid_count(0xd, component);
            size = size.max((place.eax + place.ebx) as usize);
        }
    }
    // Not rounded up: more than a task may have is refused, and with it all but the legacy part.
    size.min(area.len().max(LEGACY_AND_HEADER))
}
