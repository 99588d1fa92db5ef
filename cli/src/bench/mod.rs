//! `trenv bench`: measures on this machine what a caller sees.
//!
//! [`start`] plans and makes calls through the gateway, [`order`] is their seeded order, [`runc`]
//! makes the same functions start through stock runc, [`memory`] weighs idle instances, [`figures`]
//! holds what was measured and prints it, [`idle`] waits for idle sandboxes and ends them.
//! [`methods`] compares the start methods, [`restore`] measures the restore by itself, at the shim.

pub mod figures;
mod idle;
pub mod memory;
pub mod methods;
mod order;
pub mod restore;
pub mod runc;
pub mod start;

use trenv_config::Config;

use crate::gateway::{Gateway, GatewayOptions};

#[derive(Debug, clap::Args)]
pub struct BenchArguments {
    #[command(subcommand)]
    verb: BenchVerb,
}

#[derive(Debug, clap::Subcommand)]
enum BenchVerb {
    /// Measure every kind of start of deployed functions, and the memory of idle instances
    Start(start::StartOptions),
    /// Compare the start methods on the same functions, beside cold starts
    Methods(methods::MethodsOptions),
    /// Measure the restore by itself, one at a time and at saturation, in sandboxes of its own
    Restore(restore::RestoreOptions),
    /// Be what `bench restore` restores
    #[command(hide = true, name = restore::subject::ROLE)]
    Subject(restore::subject::SubjectOptions),
}

impl BenchArguments {
    /// The options of the process that is measured, if this shall be it.
    pub fn subject(&self) -> Option<&restore::subject::SubjectOptions> {
        match &self.verb {
            BenchVerb::Subject(options) => Some(options),
            _ => None,
        }
    }
}

/// Runs a measurement; `false` when a call failed.
pub async fn run(
    gateway: &GatewayOptions,
    config: &Config,
    arguments: &BenchArguments,
) -> anyhow::Result<bool> {
    match &arguments.verb {
        BenchVerb::Start(options) => {
            let gateway = Gateway::new(gateway, config)?;
            let report = start::measure(&gateway, config, options).await?;
            show(&report, options.json)?;
            Ok(report.failed() == 0)
        }
        BenchVerb::Methods(options) => {
            let gateway = Gateway::new(gateway, config)?;
            let report = methods::measure(&gateway, config, options).await?;
            show(&report, options.json)?;
            Ok(report.failed() == 0)
        }
        BenchVerb::Restore(options) => {
            let report = restore::measure(config, options).await?;
            show(&report, options.json)?;
            Ok(report.failed() == 0)
        }
        BenchVerb::Subject(options) => restore::subject::run(options).map(|()| true),
    }
}

fn show<R: serde::Serialize + std::fmt::Display>(report: &R, json: bool) -> anyhow::Result<()> {
    if json {
        println!("{}", serde_json::to_string_pretty(report)?);
    } else {
        print!("{report}");
    }
    Ok(())
}
