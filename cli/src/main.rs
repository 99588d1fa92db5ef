//! `trenv`: one command for people.
//!
//! One file per verb. [`gateway`] is the client of the provider's REST interface, [`shim`] of the
//! shim's own service, [`containerd`] of containerd, [`functions`] and [`stack`] are what goes over the wire, [`table`] prints.
//! [`doctor`] looks at the machine, [`mod@bench`] measures starts, [`demo`] shows the whole way of a
//! call on four functions.

mod bench;
mod containerd;
mod demo;
mod deploy;
mod describe;
mod doctor;
mod functions;
mod gateway;
mod invoke;
mod list;
mod logs;
mod pool;
mod ps;
mod remove;
mod scale;
mod shim;
mod snapshot;
mod stack;
mod table;
mod turn;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use trenv_config::Config;

use gateway::{Gateway, GatewayOptions};

#[derive(Debug, Parser)]
#[command(
    name = "trenv",
    version,
    about = "Functions that start in milliseconds, from memory templates in repurposed sandboxes"
)]
struct Arguments {
    #[command(flatten)]
    gateway: GatewayOptions,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Create or update functions, from a stack file or one from an image
    Deploy(deploy::DeployOptions),
    /// List the functions
    List(list::ListOptions),
    /// Call a function
    Invoke(invoke::InvokeOptions),
    /// Show everything about one function
    Describe(describe::DescribeOptions),
    /// Set the number of a function's instances
    Scale(scale::ScaleOptions),
    /// Remove functions
    Remove(remove::RemoveOptions),
    /// Show what a function prints
    Logs(logs::LogsOptions),
    /// List the sandboxes by state
    Ps(ps::PsOptions),
    /// Take, start and look into snapshots of programs in containers
    Snapshot(snapshot::SnapshotArguments),
    /// Look into the pool of templates
    Pool(pool::PoolArguments),
    /// Say what this machine can do, and how to get what is missing
    Doctor(doctor::DoctorOptions),
    /// Measure
    Bench(bench::BenchArguments),
    /// Show the whole way of a call on four functions, with figures
    Demo(demo::DemoOptions),
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let result = match &arguments.verb {
        Verb::Snapshot(options) => run_snapshot(options),
        _ => run(&arguments).map(|yes| match yes {
            true => ExitCode::SUCCESS,
            false => ExitCode::FAILURE,
        }),
    };
    match result {
        Ok(code) => code,
        Err(err) => {
            eprintln!("trenv: {err:#}");
            ExitCode::FAILURE
        }
    }
}

/// Runs a verb whose exit status may be a program's.
fn run_snapshot(options: &snapshot::SnapshotArguments) -> anyhow::Result<ExitCode> {
    let config = Config::load()?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(snapshot::run(&config, options))
}

/// Runs the command; `false` when it did its work and the answer is no.
fn run(arguments: &Arguments) -> anyhow::Result<bool> {
    // It lives in a root without any file of ours.
    if let Verb::Bench(bench) = &arguments.verb
        && let Some(options) = bench.subject()
    {
        return bench::restore::subject::run(options).map(|()| true);
    }
    let config = Config::load()?;
    match &arguments.verb {
        Verb::Doctor(options) => return doctor::run(&config, options),
        Verb::Pool(options) => return pool::run(&config, options).map(|()| true),
        _ => {}
    }
    // One thread: a command does one thing after another, and measures without a scheduler between.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(talk(arguments, &config))
}

async fn talk(arguments: &Arguments, config: &Config) -> anyhow::Result<bool> {
    if let Verb::Ps(options) = &arguments.verb {
        return ps::run(config, options).await.map(|()| true);
    }
    if let Verb::Bench(options) = &arguments.verb {
        return bench::run(&arguments.gateway, config, options).await;
    }
    let gateway = Gateway::new(&arguments.gateway, config)?;
    match &arguments.verb {
        Verb::Deploy(options) => deploy::run(&gateway, options).await?,
        Verb::List(options) => list::run(&gateway, options).await?,
        Verb::Invoke(options) => invoke::run(&gateway, options).await?,
        Verb::Describe(options) => describe::run(&gateway, options).await?,
        Verb::Scale(options) => scale::run(&gateway, options).await?,
        Verb::Remove(options) => remove::run(&gateway, options).await?,
        Verb::Logs(options) => logs::run(&gateway, options).await?,
        Verb::Demo(options) => return demo::run(&gateway, config, options).await,
        Verb::Bench(_) | Verb::Ps(_) | Verb::Snapshot(_) | Verb::Pool(_) | Verb::Doctor(_) => {}
    }
    Ok(true)
}
