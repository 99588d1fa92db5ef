//! Kernels by name, kept in the cache once they are fetched or built.

mod packages;
mod patched;
mod stock;
mod vmlinux;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail};
use clap::ValueEnum;

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum Choice {
    /// Debian's linux-image of 6.1.
    #[default]
    Stock,
    /// Debian's linux-image of 6.12.
    #[value(name = "stock-6.12")]
    Stock612,
    /// Debian's source of 6.1 with the patches of kernel-patch/series.
    Patched,
    /// The same with KASAN, lockdep and checks of memory management.
    Debug,
}

/// A kernel that can be started.
#[derive(Debug)]
pub struct Image {
    pub vmlinux: PathBuf,
    /// The kernel's folder in `lib/modules`.
    pub modules: PathBuf,
}

pub fn image(choice: Choice) -> anyhow::Result<Image> {
    match choice {
        Choice::Stock => stock::image("6.1"),
        Choice::Stock612 => stock::image("6.12"),
        Choice::Patched => patched::image(false),
        Choice::Debug => patched::image(true),
    }
}

/// The folder that modules for the kernel are built against.
pub fn headers(choice: Choice) -> anyhow::Result<PathBuf> {
    match choice {
        Choice::Stock => stock::headers("6.1"),
        Choice::Stock612 => stock::headers("6.12"),
        Choice::Patched | Choice::Debug => bail!(
            "Nothing is built against this kernel: the series has the driver built in. \
             Headers are there for stock and stock-6.12"
        ),
    }
}

/// A folder of the cache; `fill` makes its contents if it is not there. Several programs may ask for
/// the same one at once, and one that is ended in the middle leaves none behind.
fn cached(name: &str, fill: impl FnOnce(&Path) -> anyhow::Result<()>) -> anyhow::Result<PathBuf> {
    let folder = folder(name)?;
    if folder.exists() {
        return Ok(folder);
    }
    let context = || format!("Failed to make {}", folder.display());
    let beside = |what: &str| folder.with_file_name(format!("{name}.{what}"));
    if let Some(kernels) = folder.parent() {
        fs::create_dir_all(kernels).with_context(context)?;
    }
    let lock = File::create(beside("lock")).with_context(context)?;
    lock.lock().with_context(context)?;
    if folder.exists() {
        return Ok(folder);
    }
    let partial = beside("partial");
    if partial.exists() {
        fs::remove_dir_all(&partial).with_context(context)?;
    }
    fs::create_dir_all(&partial).with_context(context)?;
    fill(&partial).with_context(context)?;
    fs::rename(&partial, &folder).with_context(context)?;
    Ok(folder)
}

fn folder(name: &str) -> anyhow::Result<PathBuf> {
    Ok(super::cache()?.join("kernels").join(name))
}

/// Writes which modules need which; `folder` has them in `lib/modules`.
fn depmod(folder: &Path, release: &str) -> anyhow::Result<()> {
    let status = Command::new("depmod")
        .arg("--basedir")
        .args([folder.as_os_str(), release.as_ref()])
        .status()
        .context("Failed to run depmod; install kmod")?;
    if !status.success() {
        bail!(
            "depmod failed on the modules in {}: {status}",
            folder.display()
        );
    }
    Ok(())
}
