//! Developers' commands, run as `cargo xtask VERB`.
//!
//! One file per verb: [`check`] runs everything a change must pass before it is sent, [`layers`]
//! checks that crates depend on each other in one direction only, [`licences`] that every
//! dependency's licence is one that `deny.toml` allows, [`fuzz`] feeds parsers hostile input for a
//! while. [`metadata`] is what `layers` and `licences` read. [`vm`] runs a command in a virtual machine.

mod check;
mod fuzz;
mod layers;
mod licences;
mod metadata;
mod spdx;
mod vm;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Debug, Parser)]
#[command(name = "cargo xtask", about = "Developers' commands of trenv")]
struct Arguments {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Format, lints, documentation, shell scripts, layers, licences and unit tests; reports every failure.
    Check {
        /// Leave the tests out.
        #[arg(long)]
        no_test: bool,
    },
    /// Check that the crates depend on each other in one direction only.
    Layers,
    /// Check the licences of all dependencies against deny.toml.
    Licences,
    /// Feed a parser hostile input: manifest, record or superblock.
    Fuzz {
        target: String,
        /// How long
        #[arg(long, default_value_t = 60)]
        seconds: u64,
    },
    /// A command in a virtual machine, and the kernels for it.
    #[command(subcommand)]
    Vm(vm::Verb),
}

fn main() -> anyhow::Result<ExitCode> {
    match Arguments::parse().verb {
        Verb::Check { no_test } => check::run(!no_test),
        Verb::Layers => layers::run(),
        Verb::Licences => licences::run(),
        Verb::Fuzz { target, seconds } => fuzz::run(&target, seconds),
        Verb::Vm(verb) => return vm::main(verb).map(ExitCode::from),
    }?;
    Ok(ExitCode::SUCCESS)
}
