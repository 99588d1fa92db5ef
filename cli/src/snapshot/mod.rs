//! `trenv snapshot`: snapshots of any program in a trenv container, by hand.
//!
//! A file for each verb. [`saved`] is what a snapshot consists of besides its memory, and where that
//! is kept; [`files`] compares its files with their digest; [`stored`] reads its memory and its
//! description from the pool, [`mappings`] tells its mappings; [`recorded`] what was learnt
//! of its calls; [`spec`] is the OCI spec of a program between the two.

mod diff;
mod files;
mod list;
mod mappings;
mod recorded;
mod rm;
mod saved;
mod show;
mod spec;
mod start;
mod stored;
mod streams;
mod take;
mod verify;

use std::process::ExitCode;

use trenv_config::Config;

#[derive(Debug, clap::Args)]
pub struct SnapshotArguments {
    /// containerd namespace
    #[arg(
        long,
        short,
        global = true,
        env = "CONTAINERD_NAMESPACE",
        default_value = "default"
    )]
    namespace: String,
    #[command(subcommand)]
    verb: SnapshotVerb,
}

#[derive(Debug, clap::Subcommand)]
enum SnapshotVerb {
    /// Take a snapshot of a container's program, which ends with it unless it is left running
    Take(take::TakeOptions),
    /// Start a program from its snapshot, and exit with its status
    Start(start::StartOptions),
    /// List the snapshots, those of functions too
    List {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Show processes, mappings and pages of a snapshot, and its working sets
    Show(show::ShowOptions),
    /// Compare the memory of two snapshots, page by page
    Diff {
        first: String,
        second: String,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Check memory, description and files against their checksums; fails when one is wrong
    Verify {
        /// All when absent
        snapshots: Vec<String>,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Remove snapshots
    Rm {
        #[arg(required = true)]
        snapshots: Vec<String>,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
}

pub async fn run(config: &Config, arguments: &SnapshotArguments) -> anyhow::Result<ExitCode> {
    let namespace = &arguments.namespace;
    let done = |()| ExitCode::SUCCESS;
    match &arguments.verb {
        SnapshotVerb::Take(options) => take::run(config, namespace, options).await.map(done),
        SnapshotVerb::Start(options) => start::run(config, namespace, options).await,
        SnapshotVerb::List { json } => list::run(config, namespace, *json).await.map(done),
        SnapshotVerb::Show(options) => show::run(config, namespace, options).await.map(done),
        SnapshotVerb::Diff {
            first,
            second,
            json,
        } => diff::run(config, namespace, [first, second], *json)
            .await
            .map(done),
        SnapshotVerb::Verify { snapshots, json } => {
            let sound = verify::run(config, namespace, snapshots, *json).await?;
            Ok(if sound {
                ExitCode::SUCCESS
            } else {
                ExitCode::FAILURE
            })
        }
        SnapshotVerb::Rm { snapshots, json } => {
            rm::run(config, namespace, snapshots, *json).await.map(done)
        }
    }
}
