//! Seccomp profiles of an OCI spec, compiled to a classic BPF program.

use oci_spec::runtime::LinuxSeccomp;
use serde::{Deserialize, Serialize};

/// A compiled filter, ready for the kernel.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Program {
    /// Code, jump if true, jump if false, value.
    pub instructions: Vec<(u16, u8, u8, u32)>,
    /// Flags for seccomp(2).
    pub flags: u32,
}

/// Why a profile cannot be compiled.
#[derive(Debug, thiserror::Error)]
pub enum SeccompError {
    #[error("Seccomp {what} is not supported in a trenv sandbox; remove it from the profile")]
    Unsupported { what: String },
    #[error(
        "The seccomp profile compiles to {instructions} instructions, but the kernel takes 4096"
    )]
    TooLong { instructions: usize },
}

pub(super) fn compile(_profile: &LinuxSeccomp) -> Result<Program, SeccompError> {
    Err(SeccompError::Unsupported {
        what: "a profile".into(),
    })
}

const LOAD: u16 = 0x20;
const AND: u16 = 0x54;
const JUMP_EQUAL: u16 = 0x15;
const RETURN: u16 = 0x06;
const ARCH_X86_64: u32 = 0xc000_003e;
const ARCH_I386: u32 = 0x4000_0003;
const X32_BIT: u32 = 0x4000_0000;
const ALLOW: u32 = 0x7fff_0000;
const ERRNO: u32 = 0x0005_0000;

/// What every process in a sandbox is denied, whatever its profile says: keyrings, which belong to
/// users and not to sandboxes and so would outlive a tenancy, and io_uring, which a snapshot cannot
/// hold and whose absence every runtime handles.
#[must_use]
pub fn always() -> Program {
    const EPERM: u32 = ERRNO | 1;
    const ENOSYS: u32 = ERRNO | 38;
    // add_key, request_key, keyctl, io_uring_setup.
    let native = [(248, EPERM), (249, EPERM), (250, EPERM), (425, ENOSYS)];
    let i386 = [(286, EPERM), (287, EPERM), (288, EPERM), (425, ENOSYS)];
    let mut instructions = vec![(LOAD, 0, 0, 4)];
    for (arch, denied) in [(ARCH_X86_64, native), (ARCH_I386, i386)] {
        let mut block = vec![(LOAD, 0, 0, 0)];
        if arch == ARCH_X86_64 {
            // The x32 calls have the same numbers with one more bit.
            block.push((AND, 0, 0, !X32_BIT));
        }
        for (number, answer) in denied {
            block.push((JUMP_EQUAL, 0, 1, number));
            block.push((RETURN, 0, 0, answer));
        }
        block.push((RETURN, 0, 0, ALLOW));
        let length = u8::try_from(block.len()).unwrap_or(u8::MAX);
        instructions.push((JUMP_EQUAL, 0, length, arch));
        instructions.extend(block);
    }
    instructions.push((RETURN, 0, 0, ALLOW));
    Program {
        instructions,
        flags: 0,
    }
}
