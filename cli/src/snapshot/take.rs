//! `trenv snapshot take`: a container's program, memory and files, becomes a snapshot.

use anyhow::{Context, bail};
use serde_json::{Value, json};
use trenv_config::Config;
use trenv_sandbox_proto as proto;

use super::saved::{Saved, labels, record_id};
use super::spec;
use crate::containerd::{Container, Containerd, RUNTIME};
use crate::shim::Shim;
use crate::table::bytes;

#[derive(Debug, clap::Args)]
pub struct TakeOptions {
    /// Container whose program is running
    container: String,
    /// Name of the snapshot; the container's when absent
    #[arg(long)]
    name: Option<String>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub async fn run(config: &Config, namespace: &str, options: &TakeOptions) -> anyhow::Result<()> {
    let containerd = Containerd::connect(config, namespace).await?;
    let id = &options.container;
    let name = options.name.as_ref().unwrap_or(id);
    let record = containerd.container(id).await?.with_context(|| {
        format!("The namespace {namespace} has no container {id}; `ctr -n {namespace} container ls` shows them")
    })?;
    let program =
        check(&record).with_context(|| format!("The container {id} cannot be snapshotted"))?;
    let saved = record_id(name);
    if Saved::find(&containerd, name).await?.is_some() {
        bail!("There is a snapshot {name} already; remove it, or give another name by --name");
    }
    let shim = Shim::connect(config, namespace).await?;
    let key = format!("{}\nby hand from {id} in {namespace}", record.image);
    let key = format!("{key}\n{name}\n{}", shim.fingerprint().await?);
    let taken = shim.snapshot(id, &key).await?;
    if let Err(err) = keep(&containerd, &record, program, name, &taken).await {
        let _ = containerd.remove_layer(&saved).await;
        let _ = shim.delete_template(&taken.template_id).await;
        let _ = containerd.kill_task(id, nix::libc::SIGKILL).await;
        return Err(err.context("The program has ended, but its snapshot could not be kept"));
    }
    // What is left is a sandbox without a program.
    containerd.kill_task(id, nix::libc::SIGKILL).await?;
    if options.json {
        let report = json!({
            "name": name,
            "template": taken.template_id,
            "generation": taken.generation,
            "processes": taken.processes,
            "threads": taken.threads,
            "bytes": taken.image_bytes,
            "storedBytes": taken.stored_bytes,
            "notes": taken.notes,
        });
        println!("{}", serde_json::to_string_pretty(&report)?);
        return Ok(());
    }
    println!(
        "{name}: {} processes, {} threads, {} of memory, {} stored",
        taken.processes,
        taken.threads,
        bytes(taken.image_bytes),
        bytes(taken.stored_bytes)
    );
    for note in &taken.notes {
        println!("{note}");
    }
    println!("Start it: trenv snapshot start -n {namespace} {name}");
    Ok(())
}

/// Checks that a start from a snapshot would give the program all that it has; its spec.
fn check(record: &Container) -> anyhow::Result<Value> {
    let runtime = record.runtime.as_ref().map_or("", |one| one.name.as_str());
    let how = format!(
        "run it by `ctr run --runtime {RUNTIME} --annotation {}=function`",
        spec::SANDBOX
    );
    if runtime != RUNTIME {
        bail!("It is run by {runtime}, not by trenv; {how}");
    }
    let text = record.spec.as_ref().map(|any| &any.value[..]);
    let program: Value =
        serde_json::from_slice(text.unwrap_or_default()).context("Its spec cannot be read")?;
    match program["annotations"][spec::SANDBOX].as_str() {
        Some("function") => {}
        Some(other) => bail!(
            "Its annotation {} is {other:?}, so no program of its own runs in it; {how}",
            spec::SANDBOX
        ),
        None => bail!(
            "It has no annotation {}, so it is run by runc; {how}",
            spec::SANDBOX
        ),
    }
    if program["annotations"][spec::FUNCTION].is_string() {
        bail!(
            "It runs a function of the provider, which takes that function's snapshot by itself; see `trenv list`"
        );
    }
    if record.snapshot_key.is_empty() {
        bail!("Its root is no layer of containerd's; run it from an image, without --rootfs");
    }
    spec::check(&program)?;
    Ok(program)
}

/// Keeps the files and the spec.
async fn keep(
    containerd: &Containerd,
    record: &Container,
    program: Value,
    name: &str,
    taken: &proto::SnapshotResponse,
) -> anyhow::Result<()> {
    let saved = record_id(name);
    containerd
        .commit_layer(&saved, &record.snapshot_key)
        .await?;
    let labels = labels(name, &taken.template_id, taken.generation);
    let spec = program.to_string().into_bytes();
    containerd
        .create_container(record, &saved, spec, &saved, labels)
        .await?;
    Ok(())
}
