//! `cargo xtask vm`: a command in a virtual machine with a kernel of one's choice.
//!
//! What this machine's kernel lacks (devdax, RDMA, CXL, cgroup v2, kernel modules) is tested in
//! QEMU. The machine's own root file system is the VM's, read-only, with a tmpfs over it.
//!
//! - [`kernel`] finds or builds the kernel and keeps it in a cache;
//! - [`job`] is what the VM is told, and what it answers;
//! - [`modules`] and [`initramfs`] put the job, the modules that lead to the root file system, and
//!   this very program into an archive;
//! - [`qemu`] is the command line, [`run`] starts it, waits and judges;
//! - [`console`] looks for faults in the kernel's log;
//! - [`guest`] is what runs inside: the kernel starts this program as its first process.
//!
//! Output comes out by virtio ports, apart from the kernel's log, which goes to a serial port.

mod console;
mod guest;
mod initramfs;
mod job;
mod kernel;
mod modules;
mod qemu;
mod run;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use clap::{Args, Subcommand, ValueEnum};
use serde::{Deserialize, Serialize};

#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Run a command in a VM; ends with the command's status, with 124 after a hang, and with 125
    /// if the VM failed or its kernel reported a fault.
    Run(Options),
    /// Fetch or build a kernel and print the path of its image.
    Kernel {
        #[arg(long, value_enum, default_value_t)]
        kernel: kernel::Choice,
    },
    /// Fetch what modules for a kernel are built against, and print the folder.
    Headers {
        #[arg(long, value_enum, default_value_t)]
        kernel: kernel::Choice,
    },
    /// The first process of the VM.
    #[command(hide = true)]
    Guest,
}

#[derive(Debug, Args)]
pub struct Options {
    #[arg(long, value_enum, default_value_t)]
    kernel: kernel::Choice,
    /// Have /dev/dax0.0, with pages of 4 KiB.
    #[arg(long, value_enum)]
    dax: Option<Dax>,
    /// Size of the memory behind /dev/dax0.0 in MiB, a multiple of 16, or of 256 of CXL; 2 MiB of it
    /// describe it.
    #[arg(long, value_name = "MIB", default_value_t = 1024, value_parser = clap::value_parser!(u64).range(32..=65536))]
    dax_size: u64,
    /// Have rxe0, RDMA in software, at 10.99.0.1 on the interface rdma0.
    #[arg(long)]
    rdma: bool,
    /// Memory in MiB; what is written to files takes its part.
    #[arg(long, value_name = "MIB", default_value_t = 2048, value_parser = clap::value_parser!(u64).range(512..=65536))]
    memory: u64,
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u64).range(1..=64))]
    cpus: u64,
    /// Two NUMA nodes, each with half of the memory and of the processors.
    #[arg(long, conflicts_with = "icount")]
    numa: bool,
    /// One nanosecond of the VM's clock per instruction, on one processor.
    #[arg(long)]
    icount: bool,
    /// Use this machine's virtualisation instead of emulating the processor.
    #[arg(long, conflicts_with = "icount")]
    kvm: bool,
    /// A folder whose changes are written to the machine; everything else is lost.
    #[arg(long, value_name = "FOLDER")]
    share: Option<PathBuf>,
    /// Mount a tmpfs there, for what the overlay of the root cannot hold, such as overlays.
    #[arg(long, value_name = "FOLDER")]
    tmpfs: Vec<PathBuf>,
    /// Pass a variable on, or set it.
    #[arg(long, value_name = "NAME[=VALUE]")]
    env: Vec<String>,
    /// The VM is ended after so many seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 900)]
    timeout: u64,
    /// The command; it runs in the current folder.
    #[arg(required = true, last = true)]
    command: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
pub enum Dax {
    /// An emulated NVDIMM.
    Nvdimm,
    /// An emulated CXL memory device, whose every access is one of the emulator's: very slow.
    Cxl,
}

impl Dax {
    /// What its size is a multiple of, in MiB.
    fn unit(self) -> u64 {
        match self {
            Self::Nvdimm => 16,
            Self::Cxl => 256,
        }
    }
}

pub fn main(verb: Verb) -> anyhow::Result<u8> {
    match verb {
        Verb::Run(options) => run::run(&options),
        Verb::Kernel { kernel } => {
            println!("{}", kernel::image(kernel)?.vmlinux.display());
            Ok(0)
        }
        Verb::Headers { kernel } => {
            println!("{}", kernel::headers(kernel)?.display());
            Ok(0)
        }
        Verb::Guest => guest::main(),
    }
}

impl Options {
    fn timeout(&self) -> Duration {
        Duration::from_secs(self.timeout)
    }
}

/// Where kernels and runs are kept: `TRENV_VM_CACHE`, or `vm` in cargo's target folder.
fn cache() -> anyhow::Result<PathBuf> {
    if let Some(folder) = std::env::var_os("TRENV_VM_CACHE") {
        return std::path::absolute(&folder)
            .with_context(|| format!("TRENV_VM_CACHE {folder:?} cannot be made an absolute path"));
    }
    let program = std::env::current_exe().context("Failed to find this program's own path")?;
    // target/PLATFORM/debug/xtask
    let target = program.ancestors().nth(3).with_context(|| {
        format!(
            "{} is in no target folder; set TRENV_VM_CACHE to a folder for kernels",
            program.display()
        )
    })?;
    Ok(target.join("vm"))
}
