//! The archive that the kernel starts from: this program, the job, and modules in their order.

use std::fs;
use std::io::{self, Write};
use std::path::Path;

use anyhow::Context;
use cpio::newc;

use super::job::{self, Job};
use super::modules;

const EXECUTABLE: u32 = 0o100_755;
const FILE: u32 = 0o100_644;
const FOLDER: u32 = 0o040_755;

pub fn write(path: &Path, job: &Job, files: &[std::path::PathBuf]) -> anyhow::Result<()> {
    let context = || format!("Failed to write {}", path.display());
    let mut archive = io::BufWriter::new(fs::File::create(path).with_context(context)?);
    let program = std::env::current_exe()
        .and_then(fs::read)
        .context("Failed to read this program, which the VM starts with")?;
    add(&mut archive, "/init", EXECUTABLE, &program).with_context(context)?;
    let text = serde_json::to_vec(job).context("Failed to write the job")?;
    add(&mut archive, job::JOB_FILE, FILE, &text).with_context(context)?;
    add(&mut archive, job::MODULES_FOLDER, FOLDER, &[]).with_context(context)?;
    for (place, file) in files.iter().enumerate() {
        let name = format!("{}/{place:03}", job::MODULES_FOLDER);
        let contents = modules::contents(file)?;
        add(&mut archive, &name, FILE, &contents).with_context(context)?;
    }
    newc::trailer(&mut archive)
        .and_then(|archive| archive.flush())
        .with_context(context)
}

fn add(archive: &mut impl Write, name: &str, mode: u32, contents: &[u8]) -> io::Result<()> {
    let length = u32::try_from(contents.len())
        .map_err(|_| io::Error::other("a file of 4 GiB does not fit into the archive"))?;
    let mut writer = newc::Builder::new(name.trim_start_matches('/'))
        .mode(mode)
        .write(archive, length);
    writer.write_all(contents)?;
    writer.finish()?;
    Ok(())
}
