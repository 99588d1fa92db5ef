//! One stopped thread: registers, and system calls made in its name.
//!
//! A call is made from the `syscall` instruction that every vdso holds, stopped at entry and exit
//! by PTRACE_SYSCALL, so that neither code nor stack of the target is written and no signal is
//! involved. All signals stay blocked from the first call to the last.

use std::io;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::libc;
use nix::sys::ptrace;
use nix::unistd::Pid;

use super::renewed::Renewed;
use crate::manifest::Registers;

const PTRACE_EVENT_STOP: i32 = 128;
const PTRACE_GETSIGMASK: libc::c_uint = 0x420a;
const PTRACE_SETSIGMASK: libc::c_uint = 0x420b;
const PTRACE_SECCOMP_GET_FILTER: libc::c_uint = 0x420c;
const PTRACE_GET_RSEQ_CONFIGURATION: libc::c_uint = 0x420f;
const PTRACE_PEEKSIGINFO: libc::c_uint = 0x4209;
const PTRACE_PEEKSIGINFO_SHARED: u32 = 1;
const PTRACE_O_SUSPEND_SECCOMP: i32 = 1 << 21;
const NT_X86_XSTATE: usize = 0x202;

/// Calls that a stop ends with EINTR (signal(7)), receiving ones where they have a timeout.
const TOLD_BY_EINTR: [i64; 11] = [
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_semop,
    libc::SYS_semtimedop,
    libc::SYS_rt_sigtimedwait,
    libc::SYS_read,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_accept,
    libc::SYS_accept4,
];
/// ERESTARTNOHAND (kernel: include/linux/errno.h).
const RESTART_WITHOUT_HANDLER: i64 = -514;
/// ERESTART_RESTARTBLOCK, of the same file.
const RESTART_BY_BLOCK: i64 = -516;

/// A thread held by ptrace, as it was when it stopped.
#[derive(Debug)]
pub struct Tracee {
    tid: Pid,
    registers: libc::user_regs_struct,
    blocked: u64,
    /// The call that it goes on with where its registers do not tell.
    renewed: Option<u64>,
    /// Set once calls were made in its name: it must be put back before it goes on.
    disturbed: bool,
}

/// Seizes a thread and asks it to stop; [`Tracee::stopped`] waits for it.
pub fn seize(tid: i32) -> io::Result<()> {
    let tid = Pid::from_raw(tid);
    let options = ptrace::Options::PTRACE_O_TRACESYSGOOD
        | ptrace::Options::from_bits_retain(PTRACE_O_SUSPEND_SECCOMP);
    ptrace::seize(tid, options)?;
    ptrace::interrupt(tid)?;
    Ok(())
}

impl Tracee {
    /// Waits until a seized thread has stopped; none when it has not by then.
    pub fn stopped(tid: i32, until: Instant) -> io::Result<Option<Self>> {
        let tid = Pid::from_raw(tid);
        loop {
            let Some(status) = wait_until(tid, until)? else {
                return Ok(None);
            };
            let signal = (status >> 8) & 0xff;
            if status >> 16 == PTRACE_EVENT_STOP {
                break;
            }
            // A signal was on its way first: let it be delivered, the stop follows.
            cont(tid, libc::PTRACE_CONT, signal)?;
        }
        let registers = ptrace::getregs(tid)?;
        let mut blocked = 0u64;
        request(PTRACE_GETSIGMASK, tid, 8, (&raw mut blocked).cast())?;
        let mut stopped = Self {
            tid,
            registers,
            blocked,
            renewed: None,
            disturbed: false,
        };
        stopped.forget_interruption()?;
        stopped.leave_sequence()?;
        Ok(Some(stopped))
    }

    /// A stop in a restartable sequence is one of the interruptions after which it must begin anew
    /// (rseq(2)). The kernel would lead the thread out of it only when it goes on, and the first call in
    /// its name would look like the sequence's end.
    fn leave_sequence(&mut self) -> io::Result<()> {
        let Some((area, _, _)) = self.rseq()? else {
            return Ok(());
        };
        // struct rseq: two words of 32 bits, then the address of struct rseq_cs, or 0: two words of 32
        // bits, where it begins, its length, and where it is left to.
        let tid = self.tid;
        let peek = |at: u64| ptrace::read(tid, at as ptrace::AddressType);
        let Ok(sequence) = peek(area.wrapping_add(8)) else {
            return Ok(());
        };
        if sequence == 0 {
            return Ok(());
        }
        let mut words = [0u64; 3];
        for (word, at) in words.iter_mut().zip([8, 16, 24]) {
            let Ok(found) = peek((sequence as u64).wrapping_add(at)) else {
                return Ok(());
            };
            *word = found as u64;
        }
        let [start, length, left_to] = words;
        if self.registers.rip.wrapping_sub(start) < length {
            ptrace::write(self.tid, area.wrapping_add(8) as ptrace::AddressType, 0)?;
            self.registers.rip = left_to;
            self.disturbed = true;
        }
        Ok(())
    }

    /// Some calls tell of a stop by EINTR, though they have done nothing. Where it is the dump's stop
    /// alone, the call is made again, by the kernel or in a restored thread.
    fn forget_interruption(&mut self) -> io::Result<()> {
        let call = self.registers.orig_rax as i64;
        let interrupted = self.registers.rax as i64 == -i64::from(libc::EINTR);
        if !interrupted || !TOLD_BY_EINTR.contains(&call) {
            return Ok(());
        }
        for shared in [false, true] {
            for info in self.pending(shared)? {
                let number = info
                    .first_chunk()
                    .map_or(0, |bytes| i32::from_ne_bytes(*bytes));
                let bit = 1u64.checked_shl(number.wrapping_sub(1) as u32).unwrap_or(0);
                if bit & !self.blocked != 0 {
                    return Ok(());
                }
            }
        }
        self.registers.rax = RESTART_WITHOUT_HANDLER as u64;
        self.disturbed = true;
        Ok(())
    }

    /// Learns which call the thread goes on with, where an earlier interruption hides it; `false` when
    /// that is not known.
    pub fn renew(&mut self, all: &Renewed) -> bool {
        let registers = &self.registers;
        let hidden = registers.orig_rax as i64 == libc::SYS_restart_syscall
            && registers.rax as i64 == RESTART_BY_BLOCK;
        if hidden {
            self.renewed = all.number(self.tid(), registers);
        }
        !hidden || self.renewed.is_some()
    }

    #[must_use]
    pub fn tid(&self) -> i32 {
        self.tid.as_raw()
    }

    #[must_use]
    pub fn blocked(&self) -> u64 {
        self.blocked
    }

    /// Registers as a signal frame must hold them: an interrupted system call is made again.
    #[must_use]
    pub fn registers(&self) -> Registers {
        let r = &self.registers;
        let mut registers = Registers {
            r8: r.r8,
            r9: r.r9,
            r10: r.r10,
            r11: r.r11,
            r12: r.r12,
            r13: r.r13,
            r14: r.r14,
            r15: r.r15,
            rdi: r.rdi,
            rsi: r.rsi,
            rbp: r.rbp,
            rbx: r.rbx,
            rdx: r.rdx,
            rax: r.rax,
            rcx: r.rcx,
            rsp: r.rsp,
            rip: r.rip,
            eflags: r.eflags,
            cs: r.cs,
            ss: r.ss,
            fs_base: r.fs_base,
            gs_base: r.gs_base,
        };
        // ERESTARTSYS, ERESTARTNOINTR, ERESTARTNOHAND, ERESTART_RESTARTBLOCK (kernel: include/linux/errno.h).
        // The last one's state lives in the kernel and is lost; the original call with its relative
        // timeout is made again.
        if r.orig_rax as i64 >= 0 && matches!(r.rax as i64, -512 | -513 | -514 | -516) {
            registers.rax = self.renewed.unwrap_or(r.orig_rax);
            registers.rip = r.rip.wrapping_sub(2);
        }
        registers
    }

    /// The XSAVE area.
    pub fn xstate(&self) -> io::Result<Vec<u8>> {
        let mut area = vec![0u8; 16 << 10];
        let mut part = libc::iovec {
            iov_base: area.as_mut_ptr().cast(),
            iov_len: area.len(),
        };
        // SAFETY: the kernel writes at most `iov_len` bytes to `area` and the length to `part`.
        let result = unsafe {
            libc::ptrace(
                libc::PTRACE_GETREGSET,
                self.tid.as_raw(),
                NT_X86_XSTATE,
                &raw mut part,
            )
        };
        Errno::result(result)?;
        area.truncate(part.iov_len);
        Ok(area)
    }

    /// Address, size and signature of the rseq area, where one is registered.
    pub fn rseq(&self) -> io::Result<Option<(u64, u32, u32)>> {
        // struct ptrace_rseq_configuration: pointer, size, signature, flags, pad.
        let mut found = [0u64; 3];
        request(
            PTRACE_GET_RSEQ_CONFIGURATION,
            self.tid,
            24,
            (&raw mut found).cast(),
        )?;
        let [address, size_and_signature, _] = found;
        Ok((address != 0).then_some((
            address,
            size_and_signature as u32,
            (size_and_signature >> 32) as u32,
        )))
    }

    /// Pending signals, of the thread or shared by its process, as `siginfo_t`.
    pub fn pending(&self, shared: bool) -> io::Result<Vec<Vec<u8>>> {
        let mut all = Vec::new();
        loop {
            // struct ptrace_peeksiginfo_args: offset, flags, number.
            let args = [
                all.len() as u64,
                u64::from(if shared { PTRACE_PEEKSIGINFO_SHARED } else { 0 }) | 1 << 32,
            ];
            let mut info = vec![0u8; 128];
            // SAFETY: the kernel reads `args` and writes one siginfo of 128 bytes.
            let got = unsafe {
                libc::ptrace(
                    PTRACE_PEEKSIGINFO,
                    self.tid.as_raw(),
                    args.as_ptr(),
                    info.as_mut_ptr(),
                )
            };
            if Errno::result(got)? == 0 {
                return Ok(all);
            }
            all.push(info);
        }
    }

    /// Seccomp filters, oldest first.
    pub fn filters(&self) -> io::Result<Vec<Vec<u64>>> {
        let mut all = Vec::new();
        loop {
            let mut program = vec![0u64; 4096];
            // SAFETY: a filter has at most 4096 instructions of 8 bytes.
            let got = unsafe {
                libc::ptrace(
                    PTRACE_SECCOMP_GET_FILTER,
                    self.tid.as_raw(),
                    all.len(),
                    program.as_mut_ptr(),
                )
            };
            match Errno::result(got) {
                Ok(instructions) => {
                    program.truncate(usize::try_from(instructions).unwrap_or_default());
                    all.push(program);
                }
                Err(Errno::ENOENT | Errno::EINVAL) => break,
                Err(err) => return Err(err.into()),
            }
        }
        // The kernel counts from the newest.
        all.reverse();
        Ok(all)
    }

    /// Makes a system call in the thread's name, at the `syscall` instruction `at`.
    pub fn syscall(&mut self, at: u64, nr: i64, args: [u64; 6]) -> io::Result<i64> {
        if !self.disturbed {
            let mut all = u64::MAX;
            request(PTRACE_SETSIGMASK, self.tid, 8, (&raw mut all).cast())?;
            self.disturbed = true;
        }
        let mut registers = self.registers;
        registers.rip = at;
        registers.rax = nr as u64;
        registers.orig_rax = u64::MAX;
        [
            registers.rdi,
            registers.rsi,
            registers.rdx,
            registers.r10,
            registers.r8,
            registers.r9,
        ] = args;
        ptrace::setregs(self.tid, registers)?;
        for _ in 0..2 {
            cont(self.tid, libc::PTRACE_SYSCALL, 0)?;
            let status = wait(self.tid)?;
            if (status >> 8) != (libc::SIGTRAP | 0x80) {
                return Err(io::Error::other(format!(
                    "thread {} stopped with status {status:#x} instead of at a system call",
                    self.tid
                )));
            }
        }
        Ok(ptrace::getregs(self.tid)?.rax as i64)
    }

    /// Lets the thread go on as if it had never stopped.
    pub fn release(&mut self) -> io::Result<()> {
        if self.disturbed {
            ptrace::setregs(self.tid, self.registers)?;
            let mut blocked = self.blocked;
            request(PTRACE_SETSIGMASK, self.tid, 8, (&raw mut blocked).cast())?;
            // From a stop inside the signal path the kernel restarts the interrupted call itself;
            // from a system call's exit stop it would not.
            ptrace::interrupt(self.tid)?;
            cont(self.tid, libc::PTRACE_CONT, 0)?;
            loop {
                let status = wait(self.tid)?;
                if status >> 16 == PTRACE_EVENT_STOP {
                    break;
                }
                cont(self.tid, libc::PTRACE_CONT, (status >> 8) & 0xff)?;
            }
        }
        ptrace::detach(self.tid, None)?;
        Ok(())
    }
}

fn wait(tid: Pid) -> io::Result<i32> {
    let stopped = wait_with(tid, 0)?;
    stopped.ok_or_else(|| io::Error::other(format!("thread {tid} is neither stopped nor ended")))
}

fn wait_until(tid: Pid, until: Instant) -> io::Result<Option<i32>> {
    let mut pause = Duration::from_micros(20);
    loop {
        let stopped = wait_with(tid, libc::WNOHANG)?;
        if stopped.is_some() || Instant::now() > until {
            return Ok(stopped);
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(2));
    }
}

/// The status of a stopped thread; none when it has not stopped and the flags say not to wait.
fn wait_with(tid: Pid, flags: i32) -> io::Result<Option<i32>> {
    let mut status = 0;
    loop {
        // SAFETY: writes the status word only.
        let got = unsafe { libc::waitpid(tid.as_raw(), &raw mut status, libc::__WALL | flags) };
        match Errno::result(got) {
            Ok(0) => return Ok(None),
            Ok(_) if libc::WIFSTOPPED(status) => return Ok(Some(status)),
            Ok(_) => {
                return Err(io::Error::other(format!(
                    "thread {tid} ended while it was dumped"
                )));
            }
            Err(Errno::EINTR) => {}
            Err(err) => return Err(err.into()),
        }
    }
}

fn cont(tid: Pid, how: libc::c_uint, signal: i32) -> io::Result<()> {
    // SAFETY: resumes a stopped tracee; no memory is passed.
    let result = unsafe { libc::ptrace(how, tid.as_raw(), 0, signal as usize) };
    Errno::result(result)?;
    Ok(())
}

fn request(what: libc::c_uint, tid: Pid, addr: usize, data: *mut libc::c_void) -> io::Result<()> {
    // SAFETY: every caller passes data as large as `addr` says, the size these requests take.
    let result = unsafe { libc::ptrace(what, tid.as_raw(), addr, data) };
    Errno::result(result)?;
    Ok(())
}
