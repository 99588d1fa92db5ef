//! `trenv-provider`: the OpenFaaS-compatible REST service of trenv.
//!
//! | module | what it does |
//! |---|---|
//! | `rest` | routes, bodies, statuses |
//! | `functions` | what is deployed, how it is built, what survives a restart |
//! | `instances` | which sandbox serves which call; idle, victims, refill |
//! | `proxy`, `connection` | one call to its instance and back |
//! | `containerd` | images, leases, snapshots, containers and tasks over containerd's socket |
//! | `shim_client` | handing sandboxes over, dumping and preparing, by the shim's own service |
//! | `spec` | the OCI spec of a sandbox |
//! | `secrets`, `auth` | secrets of functions, credentials of the REST service |
//! | `logs`, `metrics`, `error` | what functions say, what dashboards read, what users read |
//! | `usage` | processor time and memory of functions |
//! | `serve`, `time` | putting it all together, times as text |
//!
//! A call goes `rest` -> `functions` (which revision) -> `instances` (which sandbox) -> `proxy`.

mod auth;
mod connection;
mod containerd;
mod error;
mod functions;
mod instances;
mod logs;
mod metrics;
mod proxy;
mod rest;
mod secrets;
mod serve;
mod shim_client;
mod spec;
mod time;
mod usage;

use std::io::IsTerminal;

use anyhow::Context;
use clap::Parser;
use trenv_config::Config;

/// OpenFaaS-compatible REST service over containerd.
#[derive(Debug, Parser)]
#[command(version)]
struct Options {
    /// Configuration file; /etc/trenv/trenv.toml or $TRENV_CONFIG when absent
    #[arg(long, value_name = "FILE")]
    config: Option<std::path::PathBuf>,
}

fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    tracing_subscriber::fmt()
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_default_env()
                .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info")),
        )
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
    let config = match &options.config {
        Some(path) => Config::read(path),
        None => Config::load(),
    }
    .context("The provider has no configuration")?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("The provider's threads did not start")?;
    // On a worker, where the connections are served that it accepts: each hand-over to another thread
    // would be on a call's path.
    runtime.block_on(async { tokio::spawn(async move { serve::run(&config).await }).await? })
}
