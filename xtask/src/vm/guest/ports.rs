//! The virtio ports by which output leaves the VM.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

/// Ports appear some time after their driver.
const PATIENCE: Duration = Duration::from_secs(60);

pub fn open(name: &str) -> anyhow::Result<File> {
    let begin = Instant::now();
    loop {
        if let Some(path) = find(name)? {
            return File::options()
                .write(true)
                .open(&path)
                .with_context(|| format!("Failed to open {}", path.display()));
        }
        if begin.elapsed() > PATIENCE {
            bail!("No virtio port {name} appeared");
        }
        thread::sleep(Duration::from_millis(5));
    }
}

fn find(name: &str) -> anyhow::Result<Option<PathBuf>> {
    let context = "Failed to list the virtio ports";
    for entry in fs::read_dir("/sys/class/virtio-ports").context(context)? {
        let entry = entry.context(context)?;
        // The name comes a moment after the port.
        let found = fs::read_to_string(entry.path().join("name")).unwrap_or_default();
        let device = Path::new("/dev").join(entry.file_name());
        if found.trim_end() == name && device.exists() {
            return Ok(Some(device));
        }
    }
    Ok(None)
}
