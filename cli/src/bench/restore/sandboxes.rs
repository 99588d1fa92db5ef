//! The benchmark's own sandboxes, and the template that is started in them.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use containerd_client::types;
use trenv_config::Config;
use trenv_pool::TemplateId;
use trenv_sandbox_proto as proto;
use ttrpc::context::with_duration;

use super::super::memory;
use super::containerd::{self, Containerd};
use super::figures::Subject;
use super::{RestoreOptions, spec, subject};
use crate::containerd::wire;
use crate::shim::connect;

/// Names the template; the same one again replaces it, should a run have left it.
const KEY: &str = "trenv-bench-restore";
const PROGRAM: &str = "subject";
/// The layer that holds the program, and the one that holds what it wrote while it started.
const PROGRAM_LAYER: &str = "trenv-bench-program";
const LAYER: &str = "trenv-bench-layer";
const VIEW: &str = "trenv-bench-view";
const FIRST: &str = "trenv-bench-first";
/// How long the program may take until it is ready.
const READY: Duration = Duration::from_secs(30);
/// How long a call of the shim may take.
const CALL: Duration = Duration::from_secs(60);

/// Where the benchmark happens.
#[derive(Debug)]
pub struct Place {
    containerd: Containerd,
    namespace: String,
    address_file: PathBuf,
    /// What the sandboxes print.
    logs: PathBuf,
    number: AtomicU64,
}

/// A template that can be started, in idle sandboxes.
pub struct Stage {
    place: Place,
    shim: proto::SandboxClient,
    template: String,
    generation: u64,
    /// The layers, for making the template ready again.
    view: Vec<proto::Mount>,
    spec: String,
    pub sandboxes: Vec<String>,
    pub subject: Subject,
}

impl std::fmt::Debug for Stage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Stage")
            .field("place", &self.place)
            .field("template", &self.template)
            .field("sandboxes", &self.sandboxes)
            .finish_non_exhaustive()
    }
}

/// The root of a tenancy to come.
#[derive(Debug)]
pub struct Root {
    key: String,
    mounts: Vec<proto::Mount>,
}

/// Steps as the shim timed them.
pub type Timed = Vec<(String, Duration)>;

impl Place {
    pub async fn open(config: &Config, namespace: &str) -> anyhow::Result<Self> {
        Ok(Self {
            containerd: containerd::connect(config, namespace).await?,
            namespace: namespace.to_owned(),
            address_file: config.shim_address_file(namespace),
            logs: config.run_dir.join(format!("{namespace}-logs")),
            number: AtomicU64::new(0),
        })
    }

    /// Removes everything of a benchmark, of this run or of one that was killed.
    pub async fn clear(&self) -> anyhow::Result<()> {
        // The template first: without a sandbox there is no shim.
        let forgotten = self.delete_template().await;
        let removed = containerd::remove_all(&self.containerd).await;
        match fs::remove_dir_all(&self.logs) {
            Err(err) if err.kind() != std::io::ErrorKind::NotFound => {
                return Err(err)
                    .with_context(|| format!("Failed to remove {}", self.logs.display()));
            }
            _ => {}
        }
        removed.and(forgotten)
    }

    async fn delete_template(&self) -> anyhow::Result<()> {
        let Some(shim) = connect(&self.address_file).await? else {
            return Ok(());
        };
        let request = proto::DeleteTemplateRequest {
            request_id: self.unique("forget"),
            template_id: TemplateId::of(KEY).to_string(),
            ..Default::default()
        };
        let deleted = shim.delete_template(with_duration(CALL), &request).await;
        deleted.context("The shim did not delete the benchmark's template")?;
        Ok(())
    }

    /// Makes the program's template, and sandboxes for it.
    pub async fn build(self, options: &RestoreOptions) -> anyhow::Result<Stage> {
        fs::create_dir_all(&self.logs)
            .with_context(|| format!("Failed to create {}", self.logs.display()))?;
        self.containerd.create_lease().await?;
        self.make_program_layer().await?;
        let tenancy = self.unique("first");
        let mut arguments = vec![format!("/{PROGRAM}")];
        arguments.extend(subject::arguments(options.mb, options.threads));
        let spec = spec::running(&tenancy, &arguments);
        let rootfs = self
            .containerd
            .prepare_layer(&tenancy, PROGRAM_LAYER)
            .await?;
        self.run(FIRST, &spec, &rootfs).await?;
        self.wait_until_ready().await?;
        let shim = connect(&self.address_file).await?.with_context(|| {
            format!(
                "No shim answers for the namespace {}, although a sandbox of it runs",
                self.namespace
            )
        })?;
        let request = proto::SnapshotRequest {
            request_id: self.unique("snapshot"),
            sandbox_id: FIRST.to_owned(),
            key: KEY.to_owned(),
            ..Default::default()
        };
        let made = shim.snapshot(with_duration(CALL), &request).await;
        let made = made.context("The benchmark's program was not snapshotted")?;
        self.containerd.commit_layer(LAYER, &tenancy).await?;
        let view = self.containerd.view_layer(VIEW, LAYER).await?;
        let view = wire(view);
        let request = proto::PrepareRequest {
            request_id: self.unique("prepare"),
            template_id: made.template_id.clone(),
            generation: made.generation,
            rootfs: view.clone(),
            spares: options.spares,
            ..Default::default()
        };
        let ready = shim.prepare(with_duration(CALL), &request).await;
        let ready = ready.context("The benchmark's template was not made ready")?;
        let holders = memory::holders(&made.template_id)?;
        let mut sandboxes = vec![FIRST.to_owned()];
        while sandboxes.len() < options.sandboxes {
            let id = format!("trenv-bench-{}", sandboxes.len());
            self.run(&id, &spec::idle(), &[]).await?;
            sandboxes.push(id);
        }
        Ok(Stage {
            place: self,
            shim,
            template: made.template_id,
            generation: made.generation,
            view,
            spec: spec.to_string(),
            sandboxes,
            subject: Subject {
                processes: made.processes,
                threads: made.threads,
                image_bytes: made.image_bytes,
                stored_bytes: made.stored_bytes,
                zygote_bytes: ready.resident_bytes,
                zygote_huge_bytes: memory::huge_kb(&holders) << 10,
            },
        })
    }

    /// A layer with nothing but this very program.
    async fn make_program_layer(&self) -> anyhow::Result<()> {
        let key = self.unique("program");
        let mounts = self.containerd.prepare_layer(&key, "").await?;
        let [mount] = mounts.as_slice() else {
            bail!(
                "containerd mounts an empty snapshot by {} mounts, not one; use another containerd.snapshotter",
                mounts.len()
            );
        };
        if mount.r#type != "bind" {
            bail!(
                "containerd mounts an empty snapshot by {:?}, not by a bind; use the snapshotter overlayfs",
                mount.r#type
            );
        }
        let target = Path::new(&mount.source).join(PROGRAM);
        fs::copy("/proc/self/exe", &target)
            .and_then(|_| fs::set_permissions(&target, fs::Permissions::from_mode(0o755)))
            .with_context(|| format!("Failed to copy this program to {}", target.display()))?;
        self.containerd.commit_layer(PROGRAM_LAYER, &key).await
    }

    async fn run(
        &self,
        id: &str,
        spec: &serde_json::Value,
        rootfs: &[types::Mount],
    ) -> anyhow::Result<()> {
        let output = format!("file://{}", self.log(id).display());
        containerd::run(&self.containerd, id, spec, rootfs, &output).await
    }

    async fn wait_until_ready(&self) -> anyhow::Result<()> {
        let until = Instant::now() + READY;
        let log = self.log(FIRST);
        loop {
            let said = fs::read_to_string(&log).unwrap_or_default();
            if said.lines().filter(|line| *line == subject::READY).count() >= subject::PROCESSES {
                return Ok(());
            }
            if Instant::now() > until {
                bail!(
                    "The benchmark's program is not ready after {} s; it said {said:?}",
                    READY.as_secs()
                );
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    fn log(&self, id: &str) -> PathBuf {
        self.logs.join(format!("{id}.log"))
    }

    /// A name that nothing else of any run has.
    fn unique(&self, what: &str) -> String {
        let number = self.number.fetch_add(1, Ordering::Relaxed);
        format!("trenv-bench-{what}-{}-{number}", std::process::id())
    }
}

impl Stage {
    /// Has the shim make this many clones more than wait for starts; how long each took.
    pub async fn clones(&self, waiting: u32, more: u32) -> anyhow::Result<Vec<Duration>> {
        // The first answer tells of those that were made beside starts.
        self.prepare(waiting).await?;
        self.prepare(waiting + more).await
    }

    /// Has this many clones wait; how long those took that were made since the last time.
    async fn prepare(&self, spares: u32) -> anyhow::Result<Vec<Duration>> {
        let request = proto::PrepareRequest {
            request_id: self.place.unique("clones"),
            template_id: self.template.clone(),
            generation: self.generation,
            rootfs: self.view.clone(),
            spares,
            ..Default::default()
        };
        let ready = self.shim.prepare(with_duration(CALL), &request).await;
        let steps = timed(ready.context("No clones were made")?.steps);
        let clones = steps
            .into_iter()
            .filter(|(name, _)| name.ends_with(".clone"));
        Ok(clones.map(|(_, took)| took).collect())
    }

    /// Makes the root of a tenancy to come: a writable snapshot, mounted ahead by the shim.
    pub async fn make_root(&self) -> anyhow::Result<Root> {
        let key = self.place.unique("tenancy");
        let mounts = wire(self.place.containerd.prepare_layer(&key, LAYER).await?);
        let request = proto::StageRequest {
            request_id: self.place.unique("stage"),
            template_id: self.template.clone(),
            generation: self.generation,
            rootfs: mounts.clone(),
            ..Default::default()
        };
        let staged = self.shim.stage(with_duration(CALL), &request).await;
        staged.context("The root of a tenancy was not mounted ahead")?;
        Ok(Root { key, mounts })
    }

    /// Starts the template in an idle sandbox; how long the caller waited, and the steps.
    pub async fn start(&self, sandbox: &str, root: &Root) -> anyhow::Result<(Duration, Timed)> {
        let request = proto::RepurposeRequest {
            request_id: self.place.unique("start"),
            sandbox_id: sandbox.to_owned(),
            tenancy: root.key.clone(),
            rootfs: root.mounts.clone(),
            template_id: self.template.clone(),
            generation: self.generation,
            hostname: sandbox.to_owned(),
            spec_json: self.spec.clone(),
            ..Default::default()
        };
        let begun = Instant::now();
        let answer = self.shim.repurpose(with_duration(CALL), &request).await;
        let took = begun.elapsed();
        let answer = answer.context("A start failed")?;
        Ok((took, timed(answer.steps)))
    }

    /// Ends the tenancy of a sandbox; how long that took, and the steps. The root, if the tenancy left
    /// it as it was, comes back for the next one.
    pub async fn reset(
        &self,
        sandbox: &str,
        root: Root,
    ) -> anyhow::Result<(Duration, Timed, Option<Root>)> {
        let request = proto::ResetRequest {
            request_id: self.place.unique("reset"),
            sandbox_id: sandbox.to_owned(),
            unused: true,
            keep_root: true,
            ..Default::default()
        };
        let begun = Instant::now();
        let answer = self.shim.reset(with_duration(CALL), &request).await;
        let took = begun.elapsed();
        let answer = answer.context("A reset failed")?;
        let steps = timed(answer.steps);
        if answer.root_kept {
            return Ok((took, steps, Some(root)));
        }
        self.place.containerd.remove_layer(&root.key).await?;
        Ok((took, steps, None))
    }
}

fn timed(steps: Vec<proto::Step>) -> Timed {
    let steps = steps.into_iter();
    steps
        .map(|step| (step.name, Duration::from_micros(step.microseconds)))
        .collect()
}
