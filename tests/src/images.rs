//! The sample images: built by `deploy/images/build.sh`, imported once.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail};

/// The top of the source tree.
pub fn source() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here).to_path_buf()
}

/// Where the tests keep what outlives them.
pub fn cache() -> PathBuf {
    source().join("target/end-to-end")
}

/// Where `deploy/images/build.sh` has put the images; `TRENV_TEST_IMAGES` names another place.
pub fn directory() -> PathBuf {
    std::env::var_os("TRENV_TEST_IMAGES")
        .map_or_else(|| "/var/cache/trenv/images".into(), PathBuf::from)
}

/// Imports sample images into a containerd; quick when they are there.
pub fn import(socket: &Path, samples: &[&str]) -> anyhow::Result<()> {
    let script = source().join("deploy/images/import.sh");
    let output = Command::new("bash")
        .arg(&script)
        .arg("--address")
        .arg(socket)
        .arg("--out")
        .arg(directory())
        .args(samples)
        .output()
        .with_context(|| format!("Failed to run {}", script.display()))?;
    if !output.status.success() {
        bail!(
            "{} failed:\n{}{}",
            script.display(),
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(())
}
