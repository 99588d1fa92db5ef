//! Threads whose call was interrupted before the dump: a stop signal, a freezer or an earlier dump.
//!
//! The kernel goes on with such a call by restart_syscall(2), whose registers have lost the call's
//! number, and a restored thread cannot make restart_syscall: it would be told EINTR. Only four calls
//! end so. While a thread waits, the kernel tells the function that it waits in, and the arguments are
//! still the call's own; so each thread is looked at before it is stopped.

use std::collections::HashMap;

use nix::libc;

use super::{DumpError, gone, proc_text, process};
use crate::TaskGroup;
use crate::manifest::PAGE;

/// In the name of a function of the kernel in which a sleep waits.
const SLEEPING: [&str; 3] = ["sleep", "syscall", "sys_call"];
/// The least of the negative numbers of clocks, for the highest process id there can be.
const NEGATIVE: u32 = 0xf800_0000;

/// Calls that go on by restart_syscall, by thread.
#[derive(Debug, Default)]
pub struct Renewed(HashMap<i32, Call>);

#[derive(Debug)]
struct Call {
    /// Arguments, stack pointer and program counter.
    registers: [u64; 8],
    number: u64,
}

impl Renewed {
    /// Looks at each thread of a group that runs.
    pub fn look(group: &dyn TaskGroup) -> Result<Self, DumpError> {
        let mut all = HashMap::new();
        let pids = group.pids();
        for pid in pids.map_err(DumpError::io("listing the function's processes"))? {
            for tid in process::threads(pid).or_else(|err| gone(pid, err))? {
                let read = |name| proc_text(&format!("/proc/{tid}/{name}"));
                let text = read("syscall").or_else(|err| gone(tid, err))?;
                let Some(registers) = registers(&text) else {
                    continue;
                };
                let waits_in = read("wchan").or_else(|err| gone(tid, err))?;
                if let Some(number) = number(&waits_in, registers[0]) {
                    all.insert(tid, Call { registers, number });
                }
            }
        }
        Ok(Self(all))
    }

    /// The number of the call that a thread, stopped since, goes on with.
    pub fn number(&self, tid: i32, stopped: &libc::user_regs_struct) -> Option<u64> {
        let s = stopped;
        let registers = [s.rdi, s.rsi, s.rdx, s.r10, s.r8, s.r9, s.rsp, s.rip];
        let call = self.0.get(&tid)?;
        (call.registers == registers).then_some(call.number)
    }
}

/// Arguments, stack pointer and program counter in a line of /proc/PID/syscall, where the call is
/// restart_syscall.
fn registers(line: &str) -> Option<[u64; 8]> {
    let mut fields = line.split_whitespace();
    if fields.next()?.parse() != Ok(libc::SYS_restart_syscall) {
        return None;
    }
    let registers: Option<Vec<u64>> = fields
        .map(|field| u64::from_str_radix(field.strip_prefix("0x")?, 16).ok())
        .collect();
    registers?.try_into().ok()
}

/// The call that waits in a function of the kernel; none when it is not known to wait.
fn number(waits_in: &str, first: u64) -> Option<u64> {
    let number = match waits_in {
        poll if poll.contains("poll") => libc::SYS_poll,
        futex if futex.contains("futex") => libc::SYS_futex,
        // Functions of sleep are left out where they wait, so that their caller may be told.
        sleep if SLEEPING.iter().any(|part| sleep.contains(part)) => match is_clock(first) {
            true => libc::SYS_clock_nanosleep,
            false => libc::SYS_nanosleep,
        },
        // It is stopped.
        _ => return None,
    };
    Some(number.cast_unsigned())
}

/// Whether an argument is the number of a clock and no address: a small one, or a negative int for that
/// of a process or a file (kernel: include/linux/posix-timers_types.h).
fn is_clock(argument: u64) -> bool {
    let negative = matches!(argument >> 32, 0 | 0xffff_ffff) && argument as u32 >= NEGATIVE;
    argument < PAGE || negative
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_are_told_by_where_they_wait_and_their_arguments() {
        let stack = 0x7ffe_1a09_13d8;
        assert_eq!(number("poll_schedule_timeout.constprop.0", stack), Some(7));
        assert_eq!(number("futex_do_wait", stack), Some(202));
        assert_eq!(number("do_syscall_64", stack), Some(35));
        assert_eq!(number("do_syscall_64", 0x1e77_c040), Some(35));
        assert_eq!(number("hrtimer_nanosleep_restart", 1), Some(230));
        let of_process = -42 << 3 | 2;
        assert_eq!(number("do_syscall_64", of_process as u64), Some(230));
        assert_eq!(number("do_syscall_64", of_process as u32 as u64), Some(230));
        assert_eq!(number("0", stack), None, "it runs");
        assert_eq!(number("do_signal_stop", stack), None);
    }

    #[test]
    fn other_calls_are_none_of_these() {
        let rest = "0x1 0x0 0x3 0x0 0x5 0x6 0x7ffd198c2ce8 0x7f3c344d1829";
        let read = registers(&format!("219 {rest}\n"));
        assert_eq!(read.map(|all| all[7]), Some(0x7f3c_344d_1829));
        assert_eq!(registers(&format!("230 {rest}\n")), None);
        assert_eq!(registers("running\n"), None);
        assert_eq!(registers("-1 0x7ffd198c2ce8 0x7f3c344d1829\n"), None);
    }
}
