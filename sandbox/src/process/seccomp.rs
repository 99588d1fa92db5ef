//! Seccomp profiles of an OCI spec, compiled to a classic BPF program.
//!
//! The program looks a call's number up by halving and then tests the arguments where the profile
//! has conditions on them; where several rules speak about a call, those with conditions come
//! first, each in the profile's order. Calls of the 32-bit and x32 interfaces answer ENOSYS, which
//! is stricter than a profile that lists those architectures; names that x86_64 does not have are
//! skipped, as libseccomp does.

use std::collections::BTreeMap;

use oci_spec::runtime::{
    LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompFilterFlag,
    LinuxSeccompOperator, LinuxSyscall,
};
use serde::{Deserialize, Serialize};

use super::syscall_table;

/// A compiled filter, ready for the kernel.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Program {
    /// Code, jump if true, jump if false, value.
    pub instructions: Vec<Instruction>,
    /// Flags for seccomp(2).
    pub flags: u32,
}

/// One instruction of classic BPF: code, jump if true, jump if false, value.
pub type Instruction = (u16, u8, u8, u32);

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

const LOAD: u16 = 0x20;
const AND: u16 = 0x54;
const JUMP: u16 = 0x05;
const JUMP_EQUAL: u16 = 0x15;
const JUMP_GREATER: u16 = 0x25;
const JUMP_NOT_LESS: u16 = 0x35;
const RETURN: u16 = 0x06;
/// Offsets in what the kernel shows of a call.
const AT_NUMBER: u32 = 0;
const AT_ARCH: u32 = 4;
const AT_ARGS: u32 = 16;
const ARCH_X86_64: u32 = 0xc000_003e;
const ARCH_I386: u32 = 0x4000_0003;
const X32_BIT: u32 = 0x4000_0000;
const ALLOW: u32 = 0x7fff_0000;
const ERRNO: u32 = 0x0005_0000;
const EPERM: u32 = ERRNO | 1;
const ENOSYS: u32 = ERRNO | 38;
const LENGTH_LIMIT: usize = 4096;

/// What every process in a sandbox is denied, whatever its profile says: keyrings, which belong to
/// users and not to sandboxes and so would outlive a tenancy, and io_uring, which a snapshot cannot
/// hold and whose absence every runtime handles.
#[must_use]
pub fn always() -> Program {
    // add_key, request_key, keyctl, io_uring_setup.
    let native = [(248, EPERM), (249, EPERM), (250, EPERM), (425, ENOSYS)];
    let i386 = [(286, EPERM), (287, EPERM), (288, EPERM), (425, ENOSYS)];
    let mut instructions = vec![(LOAD, 0, 0, AT_ARCH)];
    for (arch, denied) in [(ARCH_X86_64, native), (ARCH_I386, i386)] {
        let mut block = vec![(LOAD, 0, 0, AT_NUMBER)];
        if arch == ARCH_X86_64 {
            // The x32 calls have the same numbers with one more bit.
            block.push((AND, 0, 0, !X32_BIT));
        }
        for (number, answer) in denied {
            block.push((JUMP_EQUAL, 0, 1, number));
            block.push((RETURN, 0, 0, answer));
        }
        block.push((RETURN, 0, 0, ALLOW));
        instructions.push((JUMP_EQUAL, 0, short(block.len()), arch));
        instructions.extend(block);
    }
    instructions.push((RETURN, 0, 0, ALLOW));
    Program {
        instructions,
        flags: 0,
    }
}

/// What is done about one call: conditional answers in order, then the last word.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Verdict {
    conditional: Vec<(Vec<Condition>, u32)>,
    otherwise: u32,
}

/// A test of one argument.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Condition {
    index: u32,
    operator: LinuxSeccompOperator,
    value: u64,
    second: u64,
}

pub(super) fn compile(profile: &LinuxSeccomp) -> Result<Program, SeccompError> {
    let unsupported = |what: String| SeccompError::Unsupported { what };
    if profile.listener_path().is_some() {
        return Err(unsupported("listenerPath".into()));
    }
    let mut flags = 0;
    for flag in profile.flags().iter().flatten() {
        flags |= match flag {
            LinuxSeccompFilterFlag::SeccompFilterFlagLog => 2,
            LinuxSeccompFilterFlag::SeccompFilterFlagSpecAllow => 4,
            // It reaches other threads, and there are none.
            LinuxSeccompFilterFlag::SeccompFilterFlagTsync => 0,
            other => return Err(unsupported(format!("flag {other:?}"))),
        };
    }
    let default = answer(profile.default_action(), profile.default_errno_ret())?;
    let mut verdicts: BTreeMap<u32, Verdict> = BTreeMap::new();
    for rule in profile.syscalls().iter().flatten() {
        add_rule(&mut verdicts, rule, default)?;
    }
    let mut instructions = vec![
        (LOAD, 0, 0, AT_ARCH),
        (JUMP_EQUAL, 1, 0, ARCH_X86_64),
        (RETURN, 0, 0, ENOSYS),
        (LOAD, 0, 0, AT_NUMBER),
        (JUMP_NOT_LESS, 0, 1, X32_BIT),
        (RETURN, 0, 0, ENOSYS),
    ];
    instructions.extend(search(&ranges(&verdicts, default)));
    if instructions.len() > LENGTH_LIMIT {
        return Err(SeccompError::TooLong {
            instructions: instructions.len(),
        });
    }
    Ok(Program {
        instructions,
        flags,
    })
}

fn answer(action: LinuxSeccompAction, errno: Option<u32>) -> Result<u32, SeccompError> {
    if action == LinuxSeccompAction::ScmpActNotify {
        return Err(SeccompError::Unsupported {
            what: "action SCMP_ACT_NOTIFY".into(),
        });
    }
    // The lower half holds the number; more does not fit.
    Ok(action.as_u32(errno.map(|errno| errno & 0xffff)))
}

fn add_rule(
    verdicts: &mut BTreeMap<u32, Verdict>,
    rule: &LinuxSyscall,
    default: u32,
) -> Result<(), SeccompError> {
    let answer = answer(rule.action(), rule.errno_ret())?;
    let args = rule.args().clone().unwrap_or_default();
    let conditions = args.iter().map(condition).collect::<Result<Vec<_>, _>>()?;
    for number in rule.names().iter().filter_map(|n| syscall_table::number(n)) {
        let verdict = verdicts.entry(number).or_insert_with(|| Verdict {
            conditional: Vec::new(),
            otherwise: default,
        });
        if conditions.is_empty() {
            verdict.otherwise = answer;
        } else if repeats_an_argument(&conditions) {
            // Several tests of one argument are alternatives, as in every OCI runtime.
            for condition in &conditions {
                verdict.conditional.push((vec![*condition], answer));
            }
        } else {
            verdict.conditional.push((conditions.clone(), answer));
        }
    }
    Ok(())
}

fn condition(arg: &LinuxSeccompArg) -> Result<Condition, SeccompError> {
    let index = u32::try_from(arg.index())
        .ok()
        .filter(|index| *index < 6)
        .ok_or_else(|| SeccompError::Unsupported {
            what: format!("argument number {}", arg.index()),
        })?;
    Ok(Condition {
        index,
        operator: arg.op(),
        value: arg.value(),
        second: arg.value_two().unwrap_or(0),
    })
}

fn repeats_an_argument(conditions: &[Condition]) -> bool {
    conditions.iter().enumerate().any(|(at, one)| {
        conditions[..at]
            .iter()
            .any(|other| other.index == one.index)
    })
}

/// All numbers as ranges with the same verdict: the first number of each, in order.
fn ranges(verdicts: &BTreeMap<u32, Verdict>, default: u32) -> Vec<(u32, Verdict)> {
    let plain = Verdict {
        conditional: Vec::new(),
        otherwise: default,
    };
    let mut ranges: Vec<(u32, Verdict)> = Vec::new();
    let mut next = 0;
    let mut push = |from: u32, verdict: &Verdict| {
        if ranges.last().is_none_or(|(_, last)| last != verdict) {
            ranges.push((from, verdict.clone()));
        }
    };
    for (number, verdict) in verdicts {
        if *number > next {
            push(next, &plain);
        }
        push(*number, verdict);
        next = number + 1;
    }
    push(next, &plain);
    ranges
}

/// Finds the range that the number in the accumulator lies in.
fn search(ranges: &[(u32, Verdict)]) -> Vec<Instruction> {
    match ranges {
        [] => Vec::new(),
        [(_, verdict)] => decide(verdict),
        _ => {
            let (left, right) = ranges.split_at(ranges.len() / 2);
            let below = search(left);
            let above = search(right);
            let far = u32::try_from(below.len()).unwrap_or(u32::MAX);
            // A conditional jump reaches 255 instructions; an unconditional one any number.
            let mut code = vec![(JUMP_NOT_LESS, 0, 1, right[0].0), (JUMP, 0, 0, far)];
            code.extend(below);
            code.extend(above);
            code
        }
    }
}

fn decide(verdict: &Verdict) -> Vec<Instruction> {
    let mut code = Vec::new();
    for (conditions, answer) in &verdict.conditional {
        code.extend(alternative(conditions, *answer));
    }
    code.push((RETURN, 0, 0, verdict.otherwise));
    code
}

/// Where a test's jump goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum To {
    /// The following instruction.
    Next,
    /// The condition holds.
    Pass,
    /// It does not, and so the rule does not apply.
    Fail,
}

/// All conditions, then the answer; past the end when one does not hold.
fn alternative(conditions: &[Condition], answer: u32) -> Vec<Instruction> {
    let tests: Vec<Vec<(u16, u32, To, To)>> = conditions.iter().map(test).collect();
    let end = tests.iter().map(Vec::len).sum::<usize>() + 1;
    let mut code = Vec::with_capacity(end);
    for test in tests {
        let passed = code.len() + test.len();
        for (instruction, value, if_true, if_false) in test {
            let after = code.len() + 1;
            let distance = |to| match to {
                To::Next => 0,
                To::Pass => short(passed - after),
                To::Fail => short(end - after),
            };
            code.push((instruction, distance(if_true), distance(if_false), value));
        }
    }
    code.push((RETURN, 0, 0, answer));
    code
}

/// At most six conditions of at most six instructions, so a distance always fits.
fn short(distance: usize) -> u8 {
    u8::try_from(distance).unwrap_or(u8::MAX)
}

/// One condition, on the argument's two halves.
fn test(condition: &Condition) -> Vec<(u16, u32, To, To)> {
    use To::{Fail, Next, Pass};
    let low_at = AT_ARGS + 8 * condition.index;
    let high_at = low_at + 4;
    let halves = |value: u64| ((value >> 32) as u32, value as u32);
    let (high, low) = halves(condition.value);
    let load = |at| (LOAD, at, Next, Next);
    let ordered = |last: u16, holds: To, fails: To| {
        vec![
            load(high_at),
            (JUMP_GREATER, high, holds, Next),
            (JUMP_EQUAL, high, Next, fails),
            load(low_at),
            (last, low, holds, fails),
        ]
    };
    match condition.operator {
        LinuxSeccompOperator::ScmpCmpEq => vec![
            load(high_at),
            (JUMP_EQUAL, high, Next, Fail),
            load(low_at),
            (JUMP_EQUAL, low, Pass, Fail),
        ],
        LinuxSeccompOperator::ScmpCmpNe => vec![
            load(high_at),
            (JUMP_EQUAL, high, Next, Pass),
            load(low_at),
            (JUMP_EQUAL, low, Fail, Pass),
        ],
        LinuxSeccompOperator::ScmpCmpGt => ordered(JUMP_GREATER, Pass, Fail),
        LinuxSeccompOperator::ScmpCmpGe => ordered(JUMP_NOT_LESS, Pass, Fail),
        LinuxSeccompOperator::ScmpCmpLe => ordered(JUMP_GREATER, Fail, Pass),
        LinuxSeccompOperator::ScmpCmpLt => ordered(JUMP_NOT_LESS, Fail, Pass),
        LinuxSeccompOperator::ScmpCmpMaskedEq => {
            // The value is the mask, the second value what must be left under it.
            let (wanted_high, wanted_low) = halves(condition.second);
            vec![
                load(high_at),
                (AND, high, Next, Next),
                (JUMP_EQUAL, wanted_high, Next, Fail),
                load(low_at),
                (AND, low, Next, Next),
                (JUMP_EQUAL, wanted_low, Pass, Fail),
            ]
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs a program as the kernel would.
    fn verdict(program: &Program, arch: u32, number: u32, args: [u64; 6]) -> u32 {
        let mut data = vec![number, arch, 0, 0];
        for arg in args {
            data.extend([arg as u32, (arg >> 32) as u32]);
        }
        let (mut at, mut value) = (0, 0);
        loop {
            let (code, if_true, if_false, k) = program.instructions[at];
            at += 1;
            let mut jump = |holds: bool| {
                at += usize::from(if holds { if_true } else { if_false });
            };
            match code {
                LOAD => value = data[usize::try_from(k).unwrap() / 4],
                AND => value &= k,
                JUMP => at += usize::try_from(k).unwrap(),
                JUMP_EQUAL => jump(value == k),
                JUMP_GREATER => jump(value > k),
                JUMP_NOT_LESS => jump(value >= k),
                RETURN => return k,
                other => panic!("unknown code {other:#x}"),
            }
        }
    }

    fn native(program: &Program, name: &str, args: [u64; 6]) -> u32 {
        let number = syscall_table::number(name).unwrap();
        verdict(program, ARCH_X86_64, number, args)
    }

    fn profile(json: &str) -> Program {
        compile(&serde_json::from_str(json).unwrap()).unwrap()
    }

    #[test]
    fn listed_calls_are_allowed_and_others_get_the_default() {
        let program = profile(
            r#"{"defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 38,
                "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"],
                "syscalls": [
                    {"names": ["read", "write", "openat", "no_such_call"], "action": "SCMP_ACT_ALLOW"},
                    {"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": 7},
                    {"names": ["reboot"], "action": "SCMP_ACT_KILL_PROCESS"}]}"#,
        );
        let none = [0; 6];
        for name in ["read", "write", "openat"] {
            assert_eq!(native(&program, name, none), ALLOW, "{name}");
        }
        for name in ["open", "close", "mount", "open_tree_attr"] {
            assert_eq!(native(&program, name, none), ENOSYS, "{name}");
        }
        assert_eq!(native(&program, "clone3", none), ERRNO | 7);
        assert_eq!(native(&program, "reboot", none), 0x8000_0000);
        assert_eq!(verdict(&program, ARCH_I386, 3, none), ENOSYS);
        assert_eq!(verdict(&program, ARCH_X86_64, X32_BIT, none), ENOSYS);
    }

    #[test]
    fn every_operator_compares_all_64_bits() {
        let big = 0x1_0000_0005_u64;
        let cases = [
            ("SCMP_CMP_EQ", [false, false, true, false]),
            ("SCMP_CMP_NE", [true, true, false, true]),
            ("SCMP_CMP_GT", [false, false, false, true]),
            ("SCMP_CMP_GE", [false, false, true, true]),
            ("SCMP_CMP_LT", [true, true, false, false]),
            ("SCMP_CMP_LE", [true, true, true, false]),
        ];
        for (operator, wanted) in cases {
            let program = profile(&format!(
                r#"{{"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [{{"names": ["personality"],
                    "action": "SCMP_ACT_ALLOW",
                    "args": [{{"index": 1, "value": {big}, "op": "{operator}"}}]}}]}}"#
            ));
            let values = [5, big - 1, big, big + (1 << 32)];
            for (value, wanted) in values.into_iter().zip(wanted) {
                let got = native(&program, "personality", [9, value, 9, 9, 9, 9]);
                assert_eq!(got == ALLOW, wanted, "{value:#x} {operator}");
            }
        }
    }

    #[test]
    fn masks_and_several_conditions_work_together() {
        let program = profile(
            r#"{"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [
                {"names": ["clone"], "action": "SCMP_ACT_ALLOW", "args": [
                    {"index": 0, "value": 2114060288, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ"},
                    {"index": 2, "value": 3, "op": "SCMP_CMP_EQ"}]},
                {"names": ["socket"], "action": "SCMP_ACT_ALLOW", "args": [
                    {"index": 0, "value": 1, "op": "SCMP_CMP_EQ"},
                    {"index": 0, "value": 2, "op": "SCMP_CMP_EQ"}]}]}"#,
        );
        let clone = |flags, third| native(&program, "clone", [flags, 0, third, 0, 0, 0]) == ALLOW;
        assert!(clone(0x11, 3));
        assert!(!clone(0x11, 4));
        assert!(!clone(0x1000_0000, 3));
        let socket = |family| native(&program, "socket", [family, 0, 0, 0, 0, 0]) == ALLOW;
        assert!(socket(1) && socket(2) && !socket(40));
    }

    #[test]
    fn what_cannot_be_applied_is_refused() {
        let notify = r#"{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
            {"names": ["mount"], "action": "SCMP_ACT_NOTIFY"}]}"#;
        let error = compile(&serde_json::from_str(notify).unwrap()).unwrap_err();
        assert!(error.to_string().contains("NOTIFY"), "{error}");
    }

    #[test]
    fn keyrings_and_io_uring_are_always_denied() {
        let program = always();
        let none = [0; 6];
        for name in ["keyctl", "add_key", "request_key"] {
            assert_eq!(native(&program, name, none), EPERM, "{name}");
        }
        assert_eq!(native(&program, "io_uring_setup", none), ENOSYS);
        assert_eq!(verdict(&program, ARCH_X86_64, X32_BIT | 250, none), EPERM);
        assert_eq!(verdict(&program, ARCH_I386, 288, none), EPERM);
        assert_eq!(verdict(&program, ARCH_I386, 250, none), ALLOW);
        assert_eq!(native(&program, "read", none), ALLOW);
    }
}
