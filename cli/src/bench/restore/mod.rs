//! `trenv bench restore`: what the restore costs by itself, without gateway and provider.
//!
//! The command makes sandboxes of its own through containerd ([`containerd`], [`spec`],
//! [`sandboxes`]), runs a program that it knows in one of them ([`subject`]), has the shim snapshot
//! it, and starts the template over and over by the shim's own service: first one start at a time,
//! then as many as the machine can do.

mod containerd;
mod figures;
mod sandboxes;
mod spec;
pub mod subject;

use std::collections::VecDeque;
use std::fs::{File, TryLockError};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail};
use indicatif::{ProgressBar, ProgressStyle};
use procfs::CurrentSI;
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinSet;
use trenv_config::Config;

use self::figures::{Report, Starts};
use self::sandboxes::{Place, Root, Stage};
use super::start::machine;

#[derive(Debug, Clone, clap::Args)]
pub struct RestoreOptions {
    /// MiB that the larger of the two processes has written
    #[arg(long, default_value_t = 40)]
    pub mb: usize,
    /// Threads of the two processes together
    #[arg(long, default_value_t = 8)]
    pub threads: usize,
    /// Sandboxes in which the starts happen
    #[arg(long, default_value_t = 8)]
    pub sandboxes: usize,
    /// Starts one at a time
    #[arg(long, default_value_t = 200)]
    pub starts: u64,
    /// Milliseconds between two of them, in which the next is prepared
    #[arg(long, default_value_t = 100)]
    pub pause_ms: u64,
    /// Starts at the same time at saturation
    #[arg(long, default_value_t = 4)]
    pub concurrency: usize,
    /// Seconds of saturation; 0 leaves it out
    #[arg(long, default_value_t = 10)]
    pub seconds: u64,
    /// Clones made one after another, to measure what giving the memory to one costs; 0 leaves it out
    #[arg(long, default_value_t = 100)]
    pub attach: u32,
    /// Clones of the template kept waiting; 0: as many as the setting sandbox.spare_agents says
    #[arg(long, default_value_t = 8)]
    pub spares: u32,
    /// containerd namespace, which the benchmark makes and removes
    #[arg(long, default_value = "trenv-bench")]
    pub namespace: String,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

impl RestoreOptions {
    fn check(&self) -> anyhow::Result<()> {
        if self.threads < subject::PROCESSES {
            bail!("Two processes have at least two threads; raise --threads");
        }
        if self.sandboxes == 0 || self.concurrency == 0 {
            bail!("A start needs a sandbox and a worker; raise --sandboxes or --concurrency");
        }
        if self.sandboxes < self.concurrency {
            bail!(
                "{} workers cannot share {} sandboxes; raise --sandboxes or lower --concurrency",
                self.concurrency,
                self.sandboxes
            );
        }
        Ok(())
    }
}

/// Makes everything, measures, and removes everything, also after an error or a signal.
pub async fn measure(config: &Config, options: &RestoreOptions) -> anyhow::Result<Report> {
    options.check()?;
    let _alone = lock_namespace(config, &options.namespace)?;
    let place = Place::open(config, &options.namespace).await?;
    place
        .clear()
        .await
        .context("An earlier benchmark left something that cannot be removed")?;
    let outcome = tokio::select! {
        outcome = run(place, options) => outcome,
        interrupted = interrupted() => Err(interrupted),
    };
    let cleared = Place::open(config, &options.namespace).await?.clear().await;
    let cleared = cleared
        .context("The benchmark's sandboxes were not wholly removed; the next run tries again");
    match (outcome, cleared) {
        (Ok(report), Ok(())) => Ok(report),
        (Ok(_), Err(left)) => Err(left),
        (Err(failed), Ok(())) => Err(failed),
        (Err(failed), Err(left)) => Err(failed.context(format!("{left:#}"))),
    }
}

/// Keeps a second benchmark out of the namespace; it would remove what the first one made.
fn lock_namespace(config: &Config, namespace: &str) -> anyhow::Result<File> {
    std::fs::create_dir_all(&config.run_dir)
        .with_context(|| format!("Failed to create {}", config.run_dir.display()))?;
    let path = config.run_dir.join(format!("{namespace}.lock"));
    let file =
        File::create(&path).with_context(|| format!("Failed to create {}", path.display()))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => bail!(
            "Another benchmark uses the namespace {namespace}; wait for it, or name another with --namespace"
        ),
        Err(TryLockError::Error(err)) => {
            Err(err).with_context(|| format!("Failed to lock {}", path.display()))
        }
    }
}

/// Waits for a signal that asks to end.
pub(super) async fn interrupted() -> anyhow::Error {
    let waited = async {
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut terminate = signal(SignalKind::terminate())?;
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
        std::io::Result::Ok(())
    };
    match waited.await {
        Ok(()) => anyhow!("Interrupted"),
        Err(err) => anyhow!("Signals cannot be waited for: {err}"),
    }
}

async fn run(place: Place, options: &RestoreOptions) -> anyhow::Result<Report> {
    let bar = ProgressBar::new(options.starts);
    if let Ok(style) = ProgressStyle::with_template("{msg:<18} [{bar:30}] {pos}/{len} {elapsed}") {
        bar.set_style(style.progress_chars("=> "));
    }
    bar.set_message("preparing");
    let mut stage = place.build(options).await?;
    let mut report = Report {
        machine: machine(),
        subject: std::mem::take(&mut stage.subject),
        sandboxes: stage.sandboxes.len(),
        ..Report::default()
    };
    bar.set_message("single");
    single(&stage, options, &mut report, &bar).await;
    let stage = Arc::new(stage);
    if options.seconds > 0 {
        bar.set_message("saturated");
        saturate(Arc::clone(&stage), options, &mut report).await?;
    }
    if options.attach > 0 {
        bar.set_message("attaching");
        for took in stage.clones(options.spares, options.attach).await? {
            report.attach.record(took);
        }
    }
    bar.finish_and_clear();
    Ok(report)
}

/// One start at a time, in one sandbox after another.
async fn single(stage: &Stage, options: &RestoreOptions, report: &mut Report, bar: &ProgressBar) {
    let pause = Duration::from_millis(options.pause_ms);
    let mut idle: VecDeque<&str> = stage.sandboxes.iter().map(String::as_str).collect();
    let mut root = None;
    for _ in 0..options.starts {
        // One that failed has no sandbox any more.
        let Some(sandbox) = idle.pop_front() else {
            return;
        };
        match turn(stage, sandbox, root.take(), &mut report.single, pause).await {
            Ok(next) => {
                root = next;
                idle.push_back(sandbox);
            }
            Err(err) => report.fail(&err),
        }
        bar.inc(1);
    }
}

/// One start with all that belongs to it: a root unless the last start left one, pause, start, pause,
/// reset. Answers the root if it can be used again.
async fn turn(
    stage: &Stage,
    sandbox: &str,
    root: Option<Root>,
    starts: &mut Starts,
    pause: Duration,
) -> anyhow::Result<Option<Root>> {
    let root = match root {
        Some(root) => root,
        None => {
            let begun = Instant::now();
            let made = stage.make_root().await;
            let root = made.inspect_err(|_| starts.next_root.failed += 1)?;
            starts.next_root.record(begun.elapsed());
            root
        }
    };
    tokio::time::sleep(pause / 2).await;
    let started = stage.start(sandbox, &root).await;
    let (took, steps) = started.inspect_err(|_| starts.repurpose.failed += 1)?;
    starts.record(took, &steps);
    tokio::time::sleep(pause / 2).await;
    let reset = stage.reset(sandbox, root).await;
    let (took, steps, root) = reset.inspect_err(|_| starts.reset.failed += 1)?;
    starts.record_reset(took, &steps);
    Ok(root)
}

/// What the workers share.
#[derive(Debug, Default)]
struct Shared {
    idle: VecDeque<String>,
    times: Starts,
    failures: Vec<anyhow::Error>,
}

/// As many starts as the machine can do, each followed by its reset and by the next root.
async fn saturate(
    stage: Arc<Stage>,
    options: &RestoreOptions,
    report: &mut Report,
) -> anyhow::Result<()> {
    let shared = Arc::new(Mutex::new(Shared {
        idle: stage.sandboxes.iter().cloned().collect(),
        ..Shared::default()
    }));
    let busy = busy_ms()?;
    let begun = Instant::now();
    let until = begun + Duration::from_secs(options.seconds);
    let mut workers = JoinSet::new();
    for _ in 0..options.concurrency {
        workers.spawn(work(Arc::clone(&stage), Arc::clone(&shared), until));
    }
    while let Some(ended) = workers.join_next().await {
        ended.context("A worker of the benchmark broke off")?;
    }
    let seconds = begun.elapsed().as_secs_f64();
    let busy = busy_ms()?.saturating_sub(busy);
    let mut shared = lock(&shared);
    for failure in &shared.failures {
        report.fail(failure);
    }
    let loaded = &mut report.saturation;
    loaded.times = std::mem::take(&mut shared.times);
    loaded.workers = options.concurrency;
    loaded.spares = options.spares;
    loaded.seconds = seconds;
    loaded.starts = loaded.times.repurpose.count();
    loaded.failed = loaded.times.failed();
    loaded.starts_per_second = loaded.starts as f64 / seconds;
    loaded.cpu_ms_per_start = busy as f64 / loaded.starts.max(1) as f64;
    Ok(())
}

async fn work(stage: Arc<Stage>, shared: Arc<Mutex<Shared>>, until: Instant) {
    let mut root = None;
    while Instant::now() < until {
        // There are as many sandboxes as workers at least; one that failed is gone.
        let Some(sandbox) = lock(&shared).idle.pop_front() else {
            return;
        };
        let mut starts = Starts::default();
        let done = turn(&stage, &sandbox, root.take(), &mut starts, Duration::ZERO).await;
        let mut shared = lock(&shared);
        shared.times.add(&starts);
        match done {
            Ok(next) => {
                root = next;
                shared.idle.push_back(sandbox);
            }
            Err(err) => shared.failures.push(err),
        }
    }
}

fn lock(shared: &Mutex<Shared>) -> MutexGuard<'_, Shared> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Milliseconds that all processors together have worked since the machine started.
fn busy_ms() -> anyhow::Result<u64> {
    let total = procfs::KernelStats::current()
        .context("Failed to read /proc/stat")?
        .total;
    let ticks = total.user
        + total.nice
        + total.system
        + total.irq.unwrap_or(0)
        + total.softirq.unwrap_or(0);
    Ok(ticks * 1000 / procfs::ticks_per_second().max(1))
}
