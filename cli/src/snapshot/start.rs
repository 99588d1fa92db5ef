//! `trenv snapshot start`: a new container and task, whose program goes on from a snapshot.
//!
//! containerd starts an idle sandbox; the shim then restores the program in it with the task's
//! streams. From there on it is a task like any other.

use std::collections::HashMap;
use std::process::ExitCode;

use anyhow::Context;
use serde_json::Value;
use tokio::signal::unix::{SignalKind, signal};
use trenv_config::Config;
use trenv_snapshot::methods::Method;

use super::saved::Saved;
use super::spec;
use super::streams::Attached;
use crate::containerd::{Containerd, Streams, wire};
use crate::shim::Shim;

/// Signals that the program gets in this command's stead.
const FORWARDED: [i32; 8] = [
    nix::libc::SIGHUP,
    nix::libc::SIGINT,
    nix::libc::SIGQUIT,
    nix::libc::SIGTERM,
    nix::libc::SIGUSR1,
    nix::libc::SIGUSR2,
    nix::libc::SIGCONT,
    nix::libc::SIGWINCH,
];

#[derive(Debug, clap::Args)]
pub struct StartOptions {
    /// Name of the snapshot
    snapshot: String,
    /// Id of the new container; made up from the name when absent
    #[arg(long)]
    id: Option<String>,
    #[arg(long, default_value_t, value_parser = method, help = method_help())]
    method: Method,
    /// Leave it running in the background, and print the container's id
    #[arg(long, short)]
    detach: bool,
}

/// The start methods of snapshots that were taken by hand: CRIU has no image of these.
fn methods() -> impl Iterator<Item = Method> {
    let all = Method::names().into_iter().flat_map(Method::parse);
    all.filter(|method| !matches!(method, Method::Criu | Method::CriuLazy))
}

fn method_names() -> String {
    methods().map(Method::name).collect::<Vec<_>>().join(", ")
}

fn method_help() -> String {
    format!(
        "How the memory comes back (docs/start-methods.md): {}",
        method_names()
    )
}

fn method(name: &str) -> Result<Method, String> {
    if let Some(method) = methods().find(|method| method.name() == name) {
        return Ok(method);
    }
    let reason = match Method::parse(name) {
        Ok(Method::Criu | Method::CriuLazy) => {
            "CRIU dumps functions of the provider only, so it has no image of a snapshot taken by hand"
        }
        _ => "there is no such start method",
    };
    Err(format!("{reason}; use one of {}", method_names()))
}

pub async fn run(
    config: &Config,
    namespace: &str,
    options: &StartOptions,
) -> anyhow::Result<ExitCode> {
    let containerd = Containerd::connect(config, namespace).await?;
    let saved = Saved::get(&containerd, &options.snapshot).await?;
    let id = options
        .id
        .clone()
        .unwrap_or_else(|| format!("{}-{}", saved.name, std::process::id()));
    let attached = match options.detach {
        true => None,
        false => Some(Attached::new()?),
    };
    let nowhere = Streams::default();
    let streams = attached.as_ref().map_or(&nowhere, |one| &one.streams);
    // Before the program is there, so that none of them ends this command instead.
    let mut signals = Signals::new()?;
    let started = start(config, &containerd, &saved, &id, streams, options.method).await;
    if let Err(err) = started {
        remove(&containerd, &id, true).await;
        return Err(err.context(format!("The snapshot {} could not be started", saved.name)));
    }
    let Some(attached) = attached else {
        println!("{id}");
        return Ok(ExitCode::SUCCESS);
    };
    let copies = attached.copy()?;
    let status = {
        let ended = containerd.wait_task(&id);
        tokio::pin!(ended);
        loop {
            tokio::select! {
                status = &mut ended => break status,
                number = signals.next() => containerd.kill_task(&id, number).await?,
            }
        }
    }?;
    // Deleting the task ends its streams.
    remove(&containerd, &id, false).await;
    copies.finish();
    Ok(ExitCode::from(u8::try_from(status).unwrap_or(u8::MAX)))
}

async fn start(
    config: &Config,
    containerd: &Containerd,
    saved: &Saved,
    id: &str,
    streams: &Streams,
    method: Method,
) -> anyhow::Result<()> {
    let program = saved.spec()?;
    // The record first: it keeps the layer from garbage collection.
    let idle = with_annotation(&program, "idle");
    let record = containerd
        .create_container(&saved.record, id, idle, id, HashMap::new())
        .await?;
    let mounts = containerd
        .prepare_layer(id, &saved.record.snapshot_key)
        .await?;
    containerd.create_task(id, streams).await?;
    containerd.start_task(id).await?;
    let mut request = spec::request(&program, id);
    request.method = method.name().to_owned();
    request.template_id.clone_from(&saved.template);
    request.generation = saved.generation;
    request.rootfs = wire(mounts);
    let shim = Shim::connect(config, &containerd.namespace).await?;
    shim.repurpose(request).await?;
    // So that containerd tells what runs there, and the program can be snapshotted again.
    let program = with_annotation(&program, "function");
    containerd.set_spec(record, program).await
}

fn with_annotation(spec: &Value, kind: &str) -> Vec<u8> {
    let mut spec = spec.clone();
    spec["annotations"][spec::SANDBOX] = kind.into();
    spec.to_string().into_bytes()
}

/// Takes a container away, as far as it has come to exist.
async fn remove(containerd: &Containerd, id: &str, running: bool) {
    if running && containerd.kill_task(id, nix::libc::SIGKILL).await.is_ok() {
        // It fails where there is no task.
        let _ = containerd.wait_task(id).await;
    }
    for result in [
        containerd.delete_task(id).await,
        containerd.delete_container(id).await,
        containerd.remove_layer(id).await,
    ] {
        if let Err(err) = result {
            eprintln!("trenv: {err:#}");
        }
    }
}

/// The signals that are forwarded.
struct Signals(tokio::sync::mpsc::UnboundedReceiver<i32>);

impl Signals {
    fn new() -> anyhow::Result<Self> {
        let (send, receive) = tokio::sync::mpsc::unbounded_channel();
        for number in FORWARDED {
            let mut one = signal(SignalKind::from_raw(number))
                .with_context(|| format!("Failed to wait for signal {number}"))?;
            let send = send.clone();
            tokio::spawn(async move {
                while one.recv().await.is_some() && send.send(number).is_ok() {}
            });
        }
        Ok(Self(receive))
    }

    async fn next(&mut self) -> i32 {
        match self.0.recv().await {
            Some(number) => number,
            None => std::future::pending().await,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn methods_that_work_by_hand_are_taken_and_others_refused_with_the_list() {
        for taken in Method::ALL {
            assert_eq!(method(taken.name()), Ok(taken));
            assert!(method_help().contains(taken.name()));
        }
        assert_eq!(method("attach"), Ok(Method::Attach));
        for (name, reason) in [
            ("", "no such start method"),
            ("tempate", "no such start method"),
            ("copy-base", "no such start method"),
            ("criu", "no image"),
            ("criu-lazy", "no image"),
        ] {
            let refused = method(name).unwrap_err();
            assert!(refused.contains(reason), "{name}: {refused}");
            assert!(refused.ends_with(&method_names()), "{name}: {refused}");
        }
        assert!(!method_names().contains("criu"));
    }
}
