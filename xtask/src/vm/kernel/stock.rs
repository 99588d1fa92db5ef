//! Debian's own kernels, as they are.

use std::fs;
use std::path::PathBuf;

use anyhow::Context;

use super::{Image, cached, packages, vmlinux};

pub fn image(series: &str) -> anyhow::Result<Image> {
    let package = packages::newest(&prefix(series), "-amd64")?;
    let release = release(&package);
    let folder = cached(&package, |folder| {
        packages::unpack(&[&package], folder)?;
        vmlinux::extract(
            &folder.join("boot").join(format!("vmlinuz-{release}")),
            &folder.join("vmlinux"),
        )?;
        // The package leaves this to its installation.
        super::depmod(folder, release)
    })?;
    Ok(Image {
        vmlinux: folder.join("vmlinux"),
        modules: folder.join("lib/modules").join(release),
    })
}

fn prefix(series: &str) -> String {
    // Debian 12 counts 6.1's ABIs (6.1.0-56), and takes 6.12's own numbers (6.12.117+deb12).
    let dot = if series == "6.1" { ".0-" } else { "." };
    format!("linux-image-{series}{dot}")
}

/// `6.1.0-56-amd64` of `linux-image-6.1.0-56-amd64`
fn release(package: &str) -> &str {
    package.trim_start_matches("linux-image-")
}

/// What modules for this kernel are built against: `make -C FOLDER M=...`.
pub fn headers(series: &str) -> anyhow::Result<PathBuf> {
    let package = packages::newest(&prefix(series), "-amd64")?;
    let release = release(&package);
    let version = release.trim_end_matches("-amd64");
    // 6.1's tools are the same for all its ABIs.
    let tools = if series == "6.1" { series } else { version };
    let names = [
        format!("linux-headers-{release}"),
        format!("linux-headers-{version}-common"),
        format!("linux-kbuild-{tools}"),
    ];
    let name = &names[0];
    let folder = cached(name, |folder| {
        packages::unpack(&names.each_ref().map(String::as_str), folder)?;
        // It names its other half by where the package would be installed.
        let makefile = folder.join("usr/src").join(name).join("Makefile");
        let installed = super::folder(name)?.join("usr/src");
        let text = fs::read_to_string(&makefile)
            .with_context(|| format!("Failed to read {}", makefile.display()))?;
        let text = text.replace("/usr/src", &installed.display().to_string());
        fs::write(&makefile, text)
            .with_context(|| format!("Failed to write {}", makefile.display()))
    })?;
    Ok(folder.join("usr/src").join(name))
}
