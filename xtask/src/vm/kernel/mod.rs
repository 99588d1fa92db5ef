//! Kernels by name, kept in the cache once they are fetched or built.

mod packages;
mod stock;
mod vmlinux;

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::ValueEnum;

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum Choice {
    /// Debian's linux-image of 6.1.
    #[default]
    Stock,
    /// Debian's linux-image of 6.12.
    #[value(name = "stock-6.12")]
    Stock612,
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
    }
}

/// The folder that modules for the kernel are built against.
pub fn headers(choice: Choice) -> anyhow::Result<PathBuf> {
    match choice {
        Choice::Stock => stock::headers("6.1"),
        Choice::Stock612 => stock::headers("6.12"),
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
