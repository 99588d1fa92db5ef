//! `trenv scale`: sets the number of a function's instances.

use std::time::Duration;

use crate::functions::{scale, split_namespace};
use crate::gateway::Gateway;

#[derive(Debug, clap::Args)]
pub struct ScaleOptions {
    /// Function, as NAME or NAME.NAMESPACE
    name: String,
    /// Instances; 0 gives its sandboxes up
    replicas: u64,
    /// Seconds to wait until they are there
    #[arg(long, default_value_t = 60)]
    timeout: u64,
}

pub async fn run(gateway: &Gateway, options: &ScaleOptions) -> anyhow::Result<()> {
    let (name, namespace) = split_namespace(&options.name);
    let deadline = Duration::from_secs(options.timeout);
    scale(gateway, name, namespace, options.replicas, deadline).await?;
    println!("{} has {} instances", options.name, options.replicas);
    Ok(())
}
