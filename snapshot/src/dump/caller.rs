//! System calls in the name of a stopped thread, with what they write.

use nix::libc;

use super::DumpError;
use super::tracee::Tracee;
use crate::manifest::SignalAction;

/// Makes calls in a stopped thread's name, with a scratch page in its address space.
pub struct Caller<'a> {
    tracee: &'a mut Tracee,
    gate: u64,
    memory: std::fs::File,
    /// Address of the scratch page.
    pub scratch: u64,
}

const SCRATCH: u64 = 8192;

impl<'a> Caller<'a> {
    pub fn new(tracee: &'a mut Tracee, gate: u64, host: i32) -> Result<Self, DumpError> {
        let path = format!("/proc/{host}/mem");
        let memory =
            std::fs::File::open(&path).map_err(DumpError::io(format!("opening {path}")))?;
        let mut caller = Self {
            tracee,
            gate,
            memory,
            scratch: 0,
        };
        let anonymous = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u64;
        let access = (libc::PROT_READ | libc::PROT_WRITE) as u64;
        caller.scratch =
            caller.call(libc::SYS_mmap, [0, SCRATCH, access, anonymous, u64::MAX, 0])? as u64;
        Ok(caller)
    }

    pub fn call(&mut self, nr: i64, args: [u64; 6]) -> Result<i64, DumpError> {
        let tid = self.tracee.tid();
        let doing = || format!("making system call {nr} in thread {tid}");
        let result = self.tracee.syscall(self.gate, nr, args);
        let result = result.map_err(|source| DumpError::Io {
            doing: doing(),
            source,
        })?;
        if (-4095..0).contains(&result) {
            return Err(DumpError::Io {
                doing: doing(),
                source: std::io::Error::from_raw_os_error(-result as i32),
            });
        }
        Ok(result)
    }

    pub fn prctl(&mut self, option: i32) -> Result<u64, DumpError> {
        Ok(self.call(libc::SYS_prctl, [option as u64, 0, 0, 0, 0, 0])? as u64)
    }

    pub fn prctl_out(&mut self, option: i32) -> Result<u64, DumpError> {
        self.call(libc::SYS_prctl, [option as u64, self.scratch, 0, 0, 0, 0])?;
        let [value] = self.read()?;
        Ok(value)
    }

    pub fn read<const N: usize>(&self) -> Result<[u64; N], DumpError> {
        let mut bytes = vec![0u8; N * 8];
        std::os::unix::fs::FileExt::read_exact_at(&self.memory, &mut bytes, self.scratch)
            .map_err(DumpError::io("reading the scratch page"))?;
        let mut words = [0; N];
        for (word, bytes) in words.iter_mut().zip(bytes.chunks_exact(8)) {
            *word = u64::from_ne_bytes(bytes.try_into().unwrap_or_default());
        }
        Ok(words)
    }

    pub fn signal_actions(&mut self) -> Result<Vec<SignalAction>, DumpError> {
        let mut actions = Vec::new();
        for signal in 1..=64 {
            if signal == libc::SIGKILL || signal == libc::SIGSTOP {
                continue;
            }
            self.call(
                libc::SYS_rt_sigaction,
                [signal as u64, 0, self.scratch, 8, 0, 0],
            )?;
            let [handler, flags, restorer, mask] = self.read()?;
            if handler != 0 || flags != 0 {
                actions.push(SignalAction {
                    signal,
                    handler,
                    flags,
                    restorer,
                    mask,
                });
            }
        }
        Ok(actions)
    }

    pub fn finish(mut self) -> Result<(), DumpError> {
        self.call(libc::SYS_munmap, [self.scratch, SCRATCH, 0, 0, 0, 0])?;
        Ok(())
    }
}
