//! `trenv snapshot take`: a container's program, memory and files, becomes a snapshot.

use anyhow::{Context, bail};
use serde_json::{Value, json};
use trenv_config::Config;
use trenv_sandbox_proto as proto;

use super::saved::{Saved, labels, new_layer, record_id};
use super::spec;
use crate::containerd::{Container, Containerd, RUNTIME, wire};
use crate::shim::Shim;
use crate::table::bytes;

#[derive(Debug, clap::Args)]
pub struct TakeOptions {
    /// Container whose program is running
    container: String,
    /// Name of the snapshot; the container's when absent
    #[arg(long)]
    name: Option<String>,
    /// Let the program go on; its files are copied while it is stopped
    #[arg(long)]
    leave_running: bool,
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
    if Saved::find(&containerd, name).await?.is_some() {
        bail!("There is a snapshot {name} already; remove it, or give another name by --name");
    }
    let shim = Shim::connect(config, namespace).await?;
    let key = format!("{}\nby hand from {id} in {namespace}", record.image);
    let key = format!("{key}\n{name}\n{}", shim.fingerprint().await?);
    let take = Take {
        containerd: &containerd,
        shim: &shim,
        record: &record,
        program,
        name,
    };
    let taken = match options.leave_running {
        true => take.and_leave_running(&key).await?,
        false => take.and_end(&key).await?,
    };
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

/// A snapshot that is being taken.
struct Take<'a> {
    containerd: &'a Containerd,
    shim: &'a Shim,
    record: &'a Container,
    program: Value,
    name: &'a str,
}

impl Take<'_> {
    /// The program ends, and its files become the snapshot's.
    async fn and_end(self, key: &str) -> anyhow::Result<proto::SnapshotResponse> {
        let id = &self.record.id;
        let taken = self.shim.snapshot(id, key, Vec::new()).await?;
        let kept = self.keep(&self.record.snapshot_key, &taken).await;
        // What is left is a sandbox without a program.
        let ended = self.containerd.kill_task(id, nix::libc::SIGKILL).await;
        kept.context("The program has ended, but its snapshot could not be kept")?;
        ended?;
        Ok(taken)
    }

    /// The program goes on with its files, of which the snapshot gets a copy.
    async fn and_leave_running(self, key: &str) -> anyhow::Result<proto::SnapshotResponse> {
        let layer = format!("{}-copy", record_id(self.name));
        // One that was given up may have left it.
        self.containerd.remove_layer(&layer).await?;
        let beside = &self.record.snapshot_key;
        let copy = wire(self.containerd.prepare_beside(&layer, beside).await?);
        let taken = match self.shim.snapshot(&self.record.id, key, copy).await {
            Ok(taken) => taken,
            Err(err) => {
                let _ = self.containerd.remove_layer(&layer).await;
                return Err(err);
            }
        };
        if let Err(err) = self.keep(&layer, &taken).await {
            let _ = self.containerd.remove_layer(&layer).await;
            return Err(err.context("The program goes on, but its snapshot could not be kept"));
        }
        Ok(taken)
    }

    /// Keeps the files, which are in `layer`, and the spec; else nothing, the memory neither.
    async fn keep(&self, layer: &str, taken: &proto::SnapshotResponse) -> anyhow::Result<()> {
        let (record, files) = (record_id(self.name), new_layer(self.name));
        let kept = async {
            let digest = proto::layer::labels(taken);
            self.containerd
                .commit_labelled(&files, layer, digest)
                .await?;
            let labels = labels(self.name, &taken.template_id, taken.generation);
            let spec = self.program.to_string().into_bytes();
            self.containerd
                .create_container(self.record, &record, spec, &files, labels)
                .await
        };
        if let Err(err) = kept.await {
            let _ = self.containerd.remove_layer(&files).await;
            let _ = self.shim.delete_template(&taken.template_id).await;
            return Err(err);
        }
        Ok(())
    }
}
