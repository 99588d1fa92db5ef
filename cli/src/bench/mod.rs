//! `trenv bench`: measures on this machine, through the gateway, what a caller sees.
//!
//! [`start`] plans and makes the calls, [`order`] is their seeded order, [`runc`] makes the same
//! functions start through stock runc, [`memory`] weighs idle instances, [`figures`] holds what was
//! measured and prints it.

pub mod figures;
pub mod memory;
mod order;
pub mod runc;
pub mod start;

use trenv_config::Config;

use crate::gateway::Gateway;

#[derive(Debug, clap::Args)]
pub struct BenchArguments {
    #[command(subcommand)]
    verb: BenchVerb,
}

#[derive(Debug, clap::Subcommand)]
enum BenchVerb {
    /// Measure every kind of start of deployed functions, and the memory of idle instances
    Start(start::StartOptions),
}

/// Runs a measurement; `false` when a call failed.
pub async fn run(
    gateway: &Gateway,
    config: &Config,
    arguments: &BenchArguments,
) -> anyhow::Result<bool> {
    let BenchVerb::Start(options) = &arguments.verb;
    let report = start::measure(gateway, config, options).await?;
    if options.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print!("{report}");
    }
    Ok(report.failed() == 0)
}
