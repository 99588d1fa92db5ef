//! A small file system of a machine's own, which a test can fill.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::Context;
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::machine::Machine;

/// The mounted file system; it goes when this is dropped.
#[derive(Debug)]
pub(crate) struct Disk(PathBuf);

impl Disk {
    pub fn mount(directory: &Path, bytes: u64) -> anyhow::Result<Self> {
        let options = format!("size={bytes}");
        mount(
            Some("trenv-e2e"),
            directory,
            Some("tmpfs"),
            MsFlags::empty(),
            Some(options.as_str()),
        )
        .with_context(|| format!("Failed to mount a file system on {}", directory.display()))?;
        Ok(Self(directory.into()))
    }

    /// Takes all the room that there is.
    pub fn fill(&self) -> anyhow::Result<()> {
        let mut file = File::options()
            .create(true)
            .append(true)
            .open(self.filling())?;
        for size in [1 << 20, 1 << 12] {
            let zeros = vec![0; size];
            while file.write_all(&zeros).is_ok() {}
        }
        Ok(())
    }

    /// Gives it back.
    pub fn make_room(&self) -> anyhow::Result<()> {
        Ok(fs::remove_file(self.filling())?)
    }

    fn filling(&self) -> PathBuf {
        self.0.join("filling")
    }
}

impl Machine {
    /// Takes all the room of the machine's own file system.
    ///
    /// # Errors
    /// When it has none.
    pub fn fill_disk(&self) -> anyhow::Result<()> {
        self.disk
            .as_ref()
            .context("The machine has no disk")?
            .fill()
    }

    /// Gives the room back.
    ///
    /// # Errors
    /// When none was taken.
    pub fn make_room(&self) -> anyhow::Result<()> {
        let disk = self.disk.as_ref().context("The machine has no disk")?;
        disk.make_room()
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}
