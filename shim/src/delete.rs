//! `delete`: frees what a dead shim left of a container, and prints how it ended.
//!
//! A sandbox's pid 1 ends with its shim, so what remains are control groups, network namespaces and
//! records. The shim was their only owner in its namespace: when it is dead, everything below its
//! control group is swept at once, by whichever of the parallel `delete` calls comes first.

use std::io::Write;
use std::path::Path;
use std::time::SystemTime;

use anyhow::Context;
use containerd_shim_protos::api::DeleteResponse;
use containerd_shim_protos::protobuf::Message;
use trenv_config::Config;
use trenv_sandbox::cgroup;

use crate::events::timestamp;
use crate::flags::Flags;
use crate::group::Group;
use crate::record::Records;
use crate::runc::{self, Options, Runc};
use crate::sandbox::{cgroup_parent, open_network};
use crate::start;

/// What containerd's own shim reports for a container whose shim died.
const STATUS_KILLED: u32 = 128 + 9;

/// Runs `delete`; everything in it may be repeated.
pub fn run(flags: &Flags) -> anyhow::Result<()> {
    let config = Config::load()?;
    let bundle = if flags.bundle.is_empty() {
        std::env::current_dir().context("Failed to find the bundle directory")?
    } else {
        flags.bundle.clone().into()
    };
    let (pid, exit_status) = match Options::load(&bundle) {
        Some(options) => (free_runc(flags, &bundle, options)?, STATUS_KILLED),
        None => free_sandbox(flags, &config)?,
    };
    let response = DeleteResponse {
        pid,
        exit_status,
        exited_at: timestamp(SystemTime::now()),
        ..DeleteResponse::default()
    };
    let bytes = response
        .write_to_bytes()
        .context("Failed to encode the exit status")?;
    std::io::stdout()
        .write_all(&bytes)
        .context("Failed to print the exit status")
}

fn free_runc(flags: &Flags, bundle: &Path, options: Options) -> anyhow::Result<u32> {
    let pid = std::fs::read_to_string(bundle.join(runc::PID_FILE))
        .ok()
        .and_then(|text| text.trim().parse().ok())
        .unwrap_or(0);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("Failed to start the async runtime")?;
    runtime.block_on(Runc::new(options, &flags.id, bundle).delete(true))?;
    runc::unmount_all(&bundle.join("rootfs"))?;
    Ok(pid)
}

fn free_sandbox(flags: &Flags, config: &Config) -> anyhow::Result<(u32, u32)> {
    let records = Records::new(config, &flags.namespace);
    let Some(record) = records.read(&flags.id) else {
        // Deleted before, or never made.
        return Ok((0, STATUS_KILLED));
    };
    record.kill_init();
    let endpoint = Group::Sandboxes.endpoint(config, &flags.address, &flags.namespace);
    let lock = start::lock(&endpoint)?;
    if !start::serves(&endpoint) {
        cgroup::sweep(&cgroup_parent(config, &flags.namespace))
            .context("Failed to remove the dead shim's control groups")?;
        open_network(config)?
            .sweep()
            .context("Failed to take the dead shim's network namespaces back")?;
    }
    // The record goes last: until then a repetition finds what there is to do.
    records.remove(&flags.id)?;
    drop(lock);
    Ok((record.init_pid, record.exit_status.unwrap_or(STATUS_KILLED)))
}
