//! Puts the parts together, serves, and stops in order.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use trenv_config::Config;

use crate::auth::BasicAuth;
use crate::containerd::{Containerd, ContainerdError};
use crate::functions::{Functions, Store, recover};
use crate::instances::{Host, Scheduler, SchedulerOptions};
use crate::logs::Logs;
use crate::metrics::Metrics;
use crate::proxy::Proxy;
use crate::rest::{Service, router};
use crate::secrets::Secrets;
use crate::spec::SharedFiles;
use crate::usage::Meter;

const EVENTS_PAUSE: Duration = Duration::from_secs(1);
const CONTAINERD_PATIENCE: Duration = Duration::from_secs(10);
const CONTAINERD_PAUSE: Duration = Duration::from_millis(200);

/// Serves until a signal asks to stop.
///
/// # Errors
/// When the service cannot start.
pub async fn run(config: &Config) -> anyhow::Result<()> {
    let provider = &config.provider;
    let auth = match &provider.secrets_dir {
        Some(directory) => Some(BasicAuth::read(directory)?),
        None => None,
    };
    let state = config.state_dir.join("provider");
    let store = Store::open(&state)?;
    let listener = TcpListener::bind(&provider.listen).await.with_context(|| {
        format!(
            "Failed to listen on {}; change provider.listen",
            provider.listen
        )
    })?;
    let containerd = connect(config).await?;
    containerd.mark_namespace(&provider.namespace).await?;
    let files = write_shared_files(&config.run_dir.join("provider"))?;
    let metrics = Arc::new(Metrics::new());
    let secrets = Arc::new(Secrets::new(state.join("secrets")));
    let call_timeout = Duration::from_secs(provider.call_timeout_s);
    let ready_timeout = Duration::from_secs(provider.ready_timeout_s);
    let logs = Logs::new(config.run_dir.join("logs"));
    let host = Arc::new(Host::new(
        containerd.clone(),
        config.run_dir.join("shim"),
        logs.clone(),
        ready_timeout,
        Arc::clone(&metrics),
    ));
    let (template_gone, mut gone) = tokio::sync::mpsc::unbounded_channel();
    let scheduler = Scheduler::new(
        Arc::clone(&host) as _,
        SchedulerOptions {
            limit: provider.max_sandboxes,
            idle: provider.idle_sandboxes,
            parked: provider.parked_instances,
            keep_alive: (provider.keep_alive_s > 0)
                .then(|| Duration::from_secs(provider.keep_alive_s)),
            patience: call_timeout,
        },
        Arc::clone(&metrics),
        template_gone,
    );
    let functions = Functions::new(
        Arc::clone(&host),
        Arc::clone(&scheduler),
        store,
        Arc::clone(&secrets),
        files,
        config.pool.backend == "dax",
        call_timeout + Duration::from_secs(5),
    );

    // Ends that happen while the table is being filled are seen, too.
    tokio::spawn(watch_exits(containerd.clone(), Arc::clone(&scheduler)));
    recover(&functions, std::slice::from_ref(&provider.namespace)).await?;
    let upkeep = tokio::spawn(Arc::clone(&scheduler).run_upkeep());
    tokio::spawn(Arc::clone(&functions).run_preparer());
    let rebuilder = Arc::clone(&functions);
    tokio::spawn(async move {
        while let Some(revision) = gone.recv().await {
            rebuilder.rebuild(&revision);
        }
    });

    let service = Arc::new(Service {
        functions,
        scheduler: Arc::clone(&scheduler),
        proxy: Proxy::new(Arc::clone(&scheduler), call_timeout),
        metrics,
        meter: Meter::default(),
        secrets,
        containerd,
        auth,
        namespace: provider.namespace.clone(),
        logs,
    });
    tracing::info!("Listening on {}", provider.listen);
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let stopping = async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tracing::info!("Stopping when the open calls have ended");
    };
    axum::serve(listener, router(service))
        .with_graceful_shutdown(stopping)
        .await?;
    // Sandboxes stay: they are containerd's, and the next provider adopts them.
    scheduler.stop(call_timeout).await;
    upkeep.await?;
    Ok(())
}

/// Connects to containerd, which may be starting together with us.
async fn connect(config: &Config) -> Result<Containerd, ContainerdError> {
    let settings = &config.containerd;
    let begun = tokio::time::Instant::now();
    loop {
        match Containerd::connect(&settings.address, &settings.snapshotter).await {
            Err(_) if begun.elapsed() < CONTAINERD_PATIENCE => {
                tokio::time::sleep(CONTAINERD_PAUSE).await;
            }
            connected => return connected,
        }
    }
}

/// Tells the scheduler of every sandbox that ends, across restarts of containerd.
async fn watch_exits(containerd: Containerd, scheduler: Arc<Scheduler>) {
    loop {
        let watched = containerd
            .watch_exits(
                || {
                    let (containerd, scheduler) = (containerd.clone(), Arc::clone(&scheduler));
                    tokio::spawn(async move { reconcile(&containerd, &scheduler).await });
                },
                |exit| {
                    tracing::debug!("The task {} ended with {}", exit.container, exit.status);
                    scheduler.sandbox_died(&exit.container);
                },
            )
            .await;
        if let Err(err) = watched {
            tracing::debug!("containerd's events ended: {err}");
        }
        tokio::time::sleep(EVENTS_PAUSE).await;
    }
}

/// Finds the sandboxes that ended while nobody listened.
async fn reconcile(containerd: &Containerd, scheduler: &Arc<Scheduler>) {
    let known = scheduler.settled();
    let mut running = std::collections::HashMap::new();
    for sandbox in known {
        if !running.contains_key(&sandbox.namespace) {
            let tasks = match containerd.namespace(&sandbox.namespace) {
                Ok(namespace) => namespace.running_tasks().await,
                Err(err) => Err(err),
            };
            match tasks {
                Ok(tasks) => {
                    running.insert(sandbox.namespace.clone(), tasks);
                }
                Err(err) => {
                    tracing::warn!("{err}");
                    return;
                }
            }
        }
        if !running[&sandbox.namespace].contains(&sandbox.id) {
            scheduler.sandbox_died(&sandbox.id);
        }
    }
}

/// The files of ours that every function sees in /etc.
fn write_shared_files(directory: &Path) -> anyhow::Result<SharedFiles> {
    let files = SharedFiles {
        hosts: directory.join("hosts"),
        resolv_conf: directory.join("resolv.conf"),
    };
    let write = || -> std::io::Result<()> {
        std::fs::create_dir_all(directory)?;
        std::fs::write(&files.hosts, "127.0.0.1\tlocalhost\n::1\tlocalhost\n")?;
        std::fs::write(
            &files.resolv_conf,
            resolver(&std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default()),
        )
    };
    write()
        .with_context(|| format!("Failed to write in {}; check run_dir", directory.display()))?;
    Ok(files)
}

/// The machine's resolver configuration without servers that only the machine itself can reach.
fn resolver(machine: &str) -> String {
    let mut text: String = machine
        .lines()
        .filter(|line| {
            let mut words = line.split_whitespace();
            let server = words.next() == Some("nameserver");
            let local = words
                .next()
                .is_some_and(|a| a.starts_with("127.") || a == "::1");
            !(server && local)
        })
        .map(|line| format!("{line}\n"))
        .collect();
    if text.trim().is_empty() {
        text = "# The machine names no server that a sandbox can reach.\n".to_owned();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_on_the_machine_itself_are_left_out() {
        let text = resolver("search a.b\nnameserver 127.0.0.53\nnameserver 10.0.0.2\n");
        assert_eq!(text, "search a.b\nnameserver 10.0.0.2\n");
        assert!(resolver("nameserver ::1\n").starts_with('#'));
    }
}
