//! Inside the VM: the first process. It mounts, loads, runs the command and turns the VM off.
//!
//! [`root`] goes from the initramfs to the machine's root file system, [`devices`] makes network,
//! devdax and RDMA, [`ports`] finds the way out, [`command`] runs the command and ends what it left.

mod command;
mod devices;
mod ports;
mod root;

use std::fs;
use std::io::Write;
use std::process::Command;

use anyhow::{Context, bail};
use nix::sys::reboot::{RebootMode, reboot};

use super::Dax;
use super::job::{self, Job, Outcome};

pub fn main() -> anyhow::Result<u8> {
    if std::process::id() != 1 {
        bail!("This is for the first process of a VM, which cargo xtask vm run starts");
    }
    if let Err(err) = serve() {
        // The console is all there is.
        eprintln!("trenv: {err:#}");
    }
    nix::unistd::sync();
    reboot(RebootMode::RB_POWER_OFF).context("Failed to turn the VM off")?;
    Ok(0)
}

fn serve() -> anyhow::Result<()> {
    root::early()?;
    let text = fs::read(job::JOB_FILE).context("Failed to read the job")?;
    let job: Job = serde_json::from_slice(&text).context("Failed to read the job")?;
    root::load_modules()?;
    let mut port = ports::open(job::OUTCOME_PORT)?;
    let outcome = match perform(&job) {
        Ok(status) => Outcome::Ended(status),
        Err(err) => Outcome::Failed(format!("{err:#}")),
    };
    let line = serde_json::to_vec(&outcome).context("Failed to write the outcome")?;
    port.write_all(&line).context("Failed to send the outcome")
}

fn perform(job: &Job) -> anyhow::Result<u8> {
    let (stdout, stderr) = (
        ports::open(job::STDOUT_PORT)?,
        ports::open(job::STDERR_PORT)?,
    );
    root::enter(job)?;
    devices::network()?;
    match job.dax {
        Some(Dax::Nvdimm) => devices::devdax_of_nvdimm()?,
        Some(Dax::Cxl) => devices::devdax_of_cxl()?,
        None => {}
    }
    if job.rdma {
        devices::rdma()?;
    }
    let status = command::run(job, stdout, stderr)?;
    root::leave(job)?;
    Ok(status)
}

/// Runs a program of the machine's, which must succeed.
fn program(name: &str, arguments: &[&str]) -> anyhow::Result<()> {
    let output = Command::new(name)
        .args(arguments)
        .output()
        .with_context(|| format!("Failed to run {name}; is it installed on the machine?"))?;
    if !output.status.success() {
        bail!(
            "{name} {} failed ({}): {}",
            arguments.join(" "),
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(())
}
