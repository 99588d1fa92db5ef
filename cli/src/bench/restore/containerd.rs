//! The containers and snapshots of the benchmark, in a namespace of containerd of their own. All carry
//! a label, by which they are found and removed.

use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use containerd_client::types::Mount;
use serde_json::Value;
use trenv_config::Config;

pub use crate::containerd::Containerd;
use crate::containerd::Streams;

const LABEL: &str = "dev.trenv.bench";
const LEASE: &str = "trenv-bench-restore";
const KILL: i32 = 9;
/// How long a sandbox may take to end, and everything else of the benchmark to go.
const REMOVAL: Duration = Duration::from_secs(15);
const PAUSE: Duration = Duration::from_millis(50);

pub async fn connect(config: &Config, namespace: &str) -> anyhow::Result<Containerd> {
    let labels = [(LABEL.to_owned(), "restore".to_owned())].into();
    let containerd = Containerd::connect(config, namespace).await?;
    Ok(containerd.leased(LEASE, labels))
}

/// Makes a container and starts it; what runs in it prints to the file `output`.
pub async fn run(
    containerd: &Containerd,
    id: &str,
    spec: &Value,
    rootfs: &[Mount],
    output: &str,
) -> anyhow::Result<()> {
    let record = containerd.record(id, spec.to_string().into_bytes());
    containerd.add_container(record).await?;
    let streams = Streams {
        output: output.to_owned(),
        error: output.to_owned(),
        ..Streams::default()
    };
    containerd.create_task_in(id, &streams, rootfs).await?;
    containerd.start_task(id).await
}

/// Removes every container, snapshot and lease of the benchmark, and the namespace if nothing else is
/// in it.
pub async fn remove_all(containerd: &Containerd) -> anyhow::Result<()> {
    for container in containerd.labelled(LABEL).await? {
        end(containerd, &container.id).await?;
    }
    let until = Instant::now() + REMOVAL;
    loop {
        // A snapshot goes after those that lie on it.
        let mut refused = None;
        for key in containerd.labelled_layers(LABEL).await? {
            refused = containerd.remove_layer(&key).await.err().or(refused);
        }
        match refused {
            None => break,
            Some(err) if Instant::now() > until => return Err(err),
            Some(_) => tokio::time::sleep(PAUSE).await,
        }
    }
    containerd.delete_lease().await?;
    containerd.delete_namespace().await
}

async fn end(containerd: &Containerd, id: &str) -> anyhow::Result<()> {
    let until = Instant::now() + REMOVAL;
    loop {
        match try_end(containerd, id).await {
            // A shim that has just died leaves containerd a moment in which it refuses everything
            // about its tasks.
            Err(_) if Instant::now() < until => tokio::time::sleep(PAUSE).await,
            other => return other.with_context(|| format!("The sandbox {id} was not removed")),
        }
    }
}

async fn try_end(containerd: &Containerd, id: &str) -> anyhow::Result<()> {
    containerd.kill_task(id, KILL).await?;
    // Deleting the task says what is wrong with it when it cannot be waited for.
    let ended = tokio::time::timeout(REMOVAL, containerd.wait_task(id)).await;
    if ended.is_err() {
        bail!("Its task did not end within {} s", REMOVAL.as_secs());
    }
    containerd.delete_task(id).await?;
    containerd.delete_container(id).await
}
