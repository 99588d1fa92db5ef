//! `delete`: frees what a dead shim left of a container, and prints how it ended.

use std::io::Write;
use std::path::Path;
use std::time::SystemTime;

use anyhow::Context;
use containerd_shim_protos::api::DeleteResponse;
use containerd_shim_protos::protobuf::Message;

use crate::events::timestamp;
use crate::flags::Flags;
use crate::runc::{self, Options, Runc};

/// What containerd's own shim reports for a container whose shim died.
const STATUS_KILLED: u32 = 128 + 9;

/// Runs `delete`; everything in it may be repeated.
pub fn run(flags: &Flags) -> anyhow::Result<()> {
    let bundle = if flags.bundle.is_empty() {
        std::env::current_dir().context("Failed to find the bundle directory")?
    } else {
        flags.bundle.clone().into()
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("Failed to start the async runtime")?;
    let pid = runtime.block_on(free_runc(flags, &bundle))?;
    let response = DeleteResponse {
        pid,
        exit_status: STATUS_KILLED,
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

async fn free_runc(flags: &Flags, bundle: &Path) -> anyhow::Result<u32> {
    let Some(options) = Options::load(bundle) else {
        return Ok(0);
    };
    let pid = std::fs::read_to_string(bundle.join(runc::PID_FILE))
        .ok()
        .and_then(|text| text.trim().parse().ok())
        .unwrap_or(0);
    Runc::new(options, &flags.id, bundle).delete(true).await?;
    runc::unmount_all(&bundle.join("rootfs"))?;
    Ok(pid)
}
