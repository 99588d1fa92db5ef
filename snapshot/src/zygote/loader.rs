//! Starting `trenv-zygote`: the restorer's region as a memfd, addresses as arguments, descriptors at
//! fixed numbers.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::process::{Child, Command};

use nix::libc;

use super::{ZygoteError, ZygoteRequest, errno, io_error};
use crate::plan::{KEEP_OFFSET, Plan};

/// Hands the plan to `trenv-zygote`.
pub struct Loader {
    region: OwnedFd,
    arguments: Vec<String>,
}

/// Descriptors that `trenv-zygote` begins with.
pub mod fd {
    pub const CONTROL: i32 = 3;
    pub const REGION: i32 = 4;
    pub const PAGES: i32 = 5;
    pub const ROOTFS: i32 = 6;
}

impl Loader {
    pub fn of(plan: &Plan, request: &ZygoteRequest<'_>) -> Result<Self, ZygoteError> {
        use std::io::Write;
        let region =
            nix::sys::memfd::memfd_create("trenv-restorer", nix::sys::memfd::MFdFlags::MFD_CLOEXEC)
                .map_err(errno("making the restorer's region"))?;
        let mut file = std::fs::File::from(region);
        file.write_all(&plan.bytes)
            .map_err(io_error("writing the restorer's region"))?;
        file.set_len(plan.length)
            .map_err(io_error("writing the restorer's region"))?;
        let words: Vec<String> = plan
            .vdso_words
            .iter()
            .map(|word| format!("{word:x}"))
            .collect();
        let numbers = [
            plan.base,
            plan.code,
            plan.length,
            plan.entry,
            plan.stack,
            plan.header,
        ];
        let mut arguments: Vec<String> = numbers.iter().map(|n| format!("{n:x}")).collect();
        arguments.push(format!("{:x}", plan.header + KEEP_OFFSET));
        arguments.push(plan.control.to_string());
        arguments.push(words.join(","));
        arguments.extend(
            request
                .cgroups
                .iter()
                .map(|path| path.display().to_string()),
        );
        Ok(Self {
            region: file.into(),
            arguments,
        })
    }

    pub fn start(
        &mut self,
        binary: &Path,
        control: &OwnedFd,
        request: &ZygoteRequest<'_>,
    ) -> Result<Child, ZygoteError> {
        use std::os::unix::process::CommandExt;
        // Duplicates above the wanted numbers, so that none is overwritten before it is moved.
        let high = |fd: BorrowedFd<'_>| {
            nix::fcntl::fcntl(fd, nix::fcntl::FcntlArg::F_DUPFD_CLOEXEC(64))
                .map_err(errno("preparing the zygote's descriptors"))
                // SAFETY: fcntl just made this descriptor, nobody else owns it.
                .map(|number| unsafe { OwnedFd::from_raw_fd(number) })
        };
        let handed = [
            (high(control.as_fd())?, fd::CONTROL),
            (high(self.region.as_fd())?, fd::REGION),
            (high(request.template.fd())?, fd::PAGES),
            (high(request.rootfs.as_fd())?, fd::ROOTFS),
        ];
        let mut command = Command::new(binary);
        command
            .args(&self.arguments)
            .env_clear()
            .stdin(std::process::Stdio::null());
        // The kernel writes into a registered rseq area, and the zygote unmaps its own program.
        command.env("GLIBC_TUNABLES", "glibc.pthread.rseq=0");
        command.stdout(std::process::Stdio::null());
        // SAFETY: between fork and exec only dup2 is called, which is async-signal-safe.
        unsafe {
            command.pre_exec(move || {
                for (from, to) in &handed {
                    if libc::dup2(from.as_raw_fd(), *to) < 0 {
                        return Err(io::Error::last_os_error());
                    }
                }
                Ok(())
            })
        };
        command.spawn().map_err(|source| ZygoteError::Io {
            doing: format!("starting {}", binary.display()),
            source,
        })
    }
}
