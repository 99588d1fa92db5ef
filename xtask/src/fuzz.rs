//! Hostile input for as long as one likes; the tests have a fixed number of it.

use std::process::Command;

use anyhow::{Context, bail};

/// What can be fuzzed, with crate and test.
const TARGETS: &[(&str, &str, &str)] = &[
    (
        "manifest",
        "trenv-snapshot",
        "no_manifest_brings_planning_down",
    ),
    ("record", "trenv-pool", "no_record_brings_reading_down"),
    (
        "superblock",
        "trenv-pool",
        "no_superblock_brings_reading_down",
    ),
    (
        "request",
        "trenv-restorer",
        "no_request_brings_reading_down",
    ),
    ("report", "trenv-snapshot", "no_report_brings_a_start_down"),
];

pub fn run(target: &str, seconds: u64) -> anyhow::Result<()> {
    let names: Vec<_> = TARGETS.iter().map(|(name, ..)| *name).collect();
    let (_, package, test) = TARGETS
        .iter()
        .find(|(name, ..)| *name == target)
        .with_context(|| format!("There is no target {target:?}; use one of {names:?}"))?;
    let status = Command::new("cargo")
        .args(["test", "--quiet", "--package", package, "--lib", "--", test])
        .arg("--nocapture")
        .env("TRENV_FUZZ_SECONDS", seconds.to_string())
        .status()
        .context("Failed to run cargo")?;
    if !status.success() {
        bail!("{target} was brought down; the input is in the corpus of {package}");
    }
    Ok(())
}
