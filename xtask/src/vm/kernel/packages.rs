//! Debian packages that are read and not installed.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, bail};

/// The newest of the packages `PREFIX<numbers>SUFFIX` that apt knows.
pub fn newest(prefix: &str, suffix: &str) -> anyhow::Result<String> {
    let output = Command::new("apt-cache")
        .args(["pkgnames", prefix])
        .output()
        .context("Failed to run apt-cache; this kernel comes from Debian's packages")?;
    let names = String::from_utf8_lossy(&output.stdout);
    names
        .lines()
        .filter_map(|name| {
            let middle = name.strip_prefix(prefix)?.strip_suffix(suffix)?;
            Some((numbers(middle)?, name))
        })
        .max()
        .map(|(_, name)| name.to_owned())
        .with_context(|| {
            format!(
                "apt knows no package {prefix}*{suffix}; \
                 run apt-get update on Debian 12 with bookworm-security among its sources"
            )
        })
}

/// The version of a package that apt would fetch.
pub fn version(name: &str) -> anyhow::Result<String> {
    let output = Command::new("apt-cache")
        .args(["show", "--no-all-versions", name])
        .output()
        .context("Failed to run apt-cache; this kernel comes from Debian's packages")?;
    String::from_utf8_lossy(&output.stdout)
        .lines()
        .find_map(|line| line.strip_prefix("Version: ").map(str::to_owned))
        .with_context(|| format!("apt knows no package {name}; run apt-get update on Debian 12"))
}

/// `56` of `linux-image-6.1.0-56-amd64`, `117+deb12` of `linux-image-6.12.117+deb12-amd64`. Other
/// flavours (`56-cloud`) have letters.
fn numbers(text: &str) -> Option<Vec<u32>> {
    text.split(['.', '-', '+'])
        .map(|part| part.trim_start_matches("deb").parse().ok())
        .collect()
}

/// Unpacks packages into a folder.
pub fn unpack(names: &[&str], into: &Path) -> anyhow::Result<()> {
    let downloads = into.join("downloads");
    fs::create_dir(&downloads)
        .with_context(|| format!("Failed to make {}", downloads.display()))?;
    eprintln!("== fetching {}", names.join(", "));
    let output = Command::new("apt-get")
        .args(["-q", "-o", "APT::Sandbox::User=root", "download"])
        .args(names)
        .current_dir(&downloads)
        .output()
        .context("Failed to run apt-get")?;
    if !output.status.success() {
        bail!(
            "apt-get cannot download {}; run apt-get update and try again: {}",
            names.join(", "),
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    for package in fs::read_dir(&downloads).context("Failed to list what was downloaded")? {
        let package = package
            .context("Failed to list what was downloaded")?
            .path();
        let status = Command::new("dpkg")
            .arg("-x")
            .args([&package, into])
            .status()
            .context("Failed to run dpkg")?;
        if !status.success() {
            bail!("dpkg cannot unpack {}: {status}", package.display());
        }
    }
    fs::remove_dir_all(&downloads)
        .with_context(|| format!("Failed to remove {}", downloads.display()))
}

#[cfg(test)]
mod tests {
    use super::numbers;

    #[test]
    fn versions_are_compared_as_numbers_and_other_flavours_left_out() {
        assert!(numbers("56") > numbers("9"));
        assert!(numbers("117+deb12") > numbers("99+deb12"));
        assert_eq!(numbers("56-cloud"), None);
        assert_eq!(numbers("117+deb12-rt"), None);
    }
}
