//! Device rules on cgroup v2: a small eBPF program on the cgroup, since v2 has no devices files.
//!
//! The program looks at the rules from the last to the first; the first that speaks about the
//! access decides, and what no rule speaks about is denied.

use std::{
    fs::File,
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    path::Path,
};

use super::{
    CgroupError,
    limits::{DeviceKind, DeviceRule},
};

const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_PROG_ATTACH: libc::c_int = 8;
const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
const BPF_CGROUP_DEVICE: u32 = 6;
const BPF_F_ALLOW_MULTI: u32 = 2;

const ACCESS_MKNOD: i32 = 1;
const ACCESS_READ: i32 = 2;
const ACCESS_WRITE: i32 = 4;
const DEVICE_BLOCK: i32 = 1;
const DEVICE_CHAR: i32 = 2;

/// Instruction codes, from linux/bpf.h.
mod code {
    pub const LOAD_WORD: u8 = 0x61;
    pub const MOVE_REGISTER: u8 = 0xbc;
    pub const MOVE: u8 = 0xb4;
    pub const AND: u8 = 0x54;
    pub const SHIFT_RIGHT: u8 = 0x74;
    pub const JUMP_NOT_EQUAL: u8 = 0x56;
    pub const JUMP_EQUAL: u8 = 0x16;
    pub const EXIT: u8 = 0x95;
}

/// Registers: the result, the context, what the context says, and one for scratch.
const RESULT: u8 = 0;
const CONTEXT: u8 = 1;
const KIND: u8 = 2;
const ACCESS: u8 = 3;
const MAJOR: u8 = 4;
const MINOR: u8 = 5;
const SCRATCH: u8 = 6;

fn instruction(code: u8, to: u8, from: u8, offset: i16, value: i32) -> u64 {
    u64::from_le_bytes({
        let [o0, o1] = offset.to_le_bytes();
        let [v0, v1, v2, v3] = value.to_le_bytes();
        [code, to | from << 4, o0, o1, v0, v1, v2, v3]
    })
}

fn program(rules: &[DeviceRule]) -> Vec<u64> {
    let mut code = vec![
        instruction(code::LOAD_WORD, KIND, CONTEXT, 0, 0),
        instruction(code::MOVE_REGISTER, ACCESS, KIND, 0, 0),
        instruction(code::AND, KIND, 0, 0, 0xffff),
        instruction(code::SHIFT_RIGHT, ACCESS, 0, 0, 16),
        instruction(code::LOAD_WORD, MAJOR, CONTEXT, 4, 0),
        instruction(code::LOAD_WORD, MINOR, CONTEXT, 8, 0),
    ];
    for rule in rules.iter().rev() {
        code.extend(block(rule));
    }
    code.push(instruction(code::MOVE, RESULT, 0, 0, 0));
    code.push(instruction(code::EXIT, 0, 0, 0, 0));
    code
}

/// The instructions of one rule: its conditions, each of which jumps to the next rule when it does
/// not hold, and the verdict.
fn block(rule: &DeviceRule) -> Vec<u64> {
    let mut conditions: Vec<(u8, u8, i32)> = Vec::new();
    match rule.kind {
        DeviceKind::Any => {}
        DeviceKind::Block => conditions.push((code::JUMP_NOT_EQUAL, KIND, DEVICE_BLOCK)),
        DeviceKind::Char => conditions.push((code::JUMP_NOT_EQUAL, KIND, DEVICE_CHAR)),
    }
    for (register, number) in [(MAJOR, rule.major), (MINOR, rule.minor)] {
        if let Some(number) = number {
            conditions.push((code::JUMP_NOT_EQUAL, register, number.cast_signed()));
        }
    }
    let bits = [
        (rule.read, ACCESS_READ),
        (rule.write, ACCESS_WRITE),
        (rule.mknod, ACCESS_MKNOD),
    ];
    let bits = bits
        .iter()
        .filter(|(on, _)| *on)
        .fold(0, |all, (_, bit)| all | bit);
    // An allowing rule must allow all that is asked, a denying one need only deny a part.
    let (kept, jump) = if rule.allow {
        (!bits & 7, code::JUMP_NOT_EQUAL)
    } else {
        (bits, code::JUMP_EQUAL)
    };
    let length = conditions.len() + 5;
    let mut code = Vec::with_capacity(length);
    let to_next = |at: usize| i16::try_from(length - at - 1).unwrap_or(i16::MAX);
    for (jump, register, value) in conditions {
        code.push(instruction(jump, register, 0, to_next(code.len()), value));
    }
    code.push(instruction(code::MOVE_REGISTER, SCRATCH, ACCESS, 0, 0));
    code.push(instruction(code::AND, SCRATCH, 0, 0, kept));
    code.push(instruction(jump, SCRATCH, 0, to_next(code.len()), 0));
    code.push(instruction(code::MOVE, RESULT, 0, 0, i32::from(rule.allow)));
    code.push(instruction(code::EXIT, 0, 0, 0, 0));
    code
}

#[repr(C)]
#[derive(Default)]
struct LoadAttributes {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
    kern_version: u32,
    prog_flags: u32,
}

#[repr(C)]
#[derive(Default)]
struct AttachAttributes {
    target_fd: u32,
    attach_bpf_fd: u32,
    attach_type: u32,
    attach_flags: u32,
}

fn bpf<T>(command: libc::c_int, attributes: &T) -> io::Result<i32> {
    // SAFETY: the attributes are a valid, initialised block of the given size, and what they point
    // to outlives the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_ref(attributes),
            size_of::<T>(),
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(i32::try_from(result).unwrap_or(i32::MAX))
}

/// Puts the rules on a cgroup.
pub(super) fn attach(dir: &Path, rules: &[DeviceRule]) -> Result<(), CgroupError> {
    let failed = |doing| {
        move |source| CgroupError::Devices {
            doing,
            path: dir.to_owned(),
            source,
        }
    };
    let code = program(rules);
    let load = LoadAttributes {
        prog_type: BPF_PROG_TYPE_CGROUP_DEVICE,
        insn_cnt: u32::try_from(code.len()).unwrap_or(u32::MAX),
        insns: code.as_ptr() as u64,
        license: c"Apache-2.0".as_ptr() as u64,
        ..LoadAttributes::default()
    };
    let program = bpf(BPF_PROG_LOAD, &load).map_err(failed("load"))?;
    // SAFETY: the kernel has just made this descriptor for us.
    let program = unsafe { OwnedFd::from_raw_fd(program) };
    let target = File::open(dir).map_err(CgroupError::file("open", dir))?;
    let attach = AttachAttributes {
        target_fd: target.as_raw_fd().cast_unsigned(),
        attach_bpf_fd: program.as_raw_fd().cast_unsigned(),
        attach_type: BPF_CGROUP_DEVICE,
        attach_flags: BPF_F_ALLOW_MULTI,
    };
    bpf(BPF_PROG_ATTACH, &attach).map_err(failed("attach"))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs a program as the kernel would.
    fn verdict(program: &[u64], kind: i32, access: i32, major: i32, minor: i32) -> i32 {
        let context = [kind | access << 16, major, minor];
        let mut registers = [0_i32; 7];
        let mut at = 0;
        loop {
            let [c, registers_byte, o0, o1, v @ ..] = program[at].to_le_bytes();
            let (to, from) = (
                usize::from(registers_byte & 15),
                usize::from(registers_byte >> 4),
            );
            let offset = i16::from_le_bytes([o0, o1]);
            let value = i32::from_le_bytes(v);
            at += 1;
            let mut jump = |taken: bool| {
                if taken {
                    at += usize::try_from(offset).unwrap();
                }
            };
            match c {
                code::LOAD_WORD => registers[to] = context[usize::try_from(offset).unwrap() / 4],
                code::MOVE_REGISTER => registers[to] = registers[from],
                code::MOVE => registers[to] = value,
                code::AND => registers[to] &= value,
                code::SHIFT_RIGHT => registers[to] >>= value,
                code::JUMP_NOT_EQUAL => jump(registers[to] != value),
                code::JUMP_EQUAL => jump(registers[to] == value),
                code::EXIT => return registers[0],
                other => panic!("unknown code {other:#x}"),
            }
        }
    }

    #[test]
    fn standard_devices_work_and_disks_do_not() {
        let program = program(&DeviceRule::ALWAYS);
        let all = ACCESS_MKNOD | ACCESS_READ | ACCESS_WRITE;
        assert_eq!(verdict(&program, DEVICE_CHAR, all, 1, 3), 1);
        assert_eq!(verdict(&program, DEVICE_CHAR, ACCESS_READ, 136, 7), 1);
        assert_eq!(verdict(&program, DEVICE_BLOCK, ACCESS_MKNOD, 8, 0), 1);
        assert_eq!(verdict(&program, DEVICE_BLOCK, ACCESS_READ, 8, 0), 0);
        assert_eq!(verdict(&program, DEVICE_CHAR, ACCESS_READ, 10, 229), 0);
    }

    #[test]
    fn the_last_rule_that_speaks_decides() {
        let mut rules = DeviceRule::ALWAYS.to_vec();
        rules.push(DeviceRule {
            allow: false,
            kind: DeviceKind::Char,
            major: Some(1),
            minor: None,
            read: false,
            write: true,
            mknod: false,
        });
        let program = program(&rules);
        let both = ACCESS_READ | ACCESS_WRITE;
        assert_eq!(verdict(&program, DEVICE_CHAR, both, 1, 3), 0);
        assert_eq!(verdict(&program, DEVICE_CHAR, ACCESS_READ, 1, 3), 1);
    }
}
