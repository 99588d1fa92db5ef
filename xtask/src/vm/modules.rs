//! The modules that a kernel needs before it sees its root file system, with those that they need.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail};

/// The root file system, output and network.
pub const ROOT: &[&str] = &[
    "virtio_pci",
    "virtio_console",
    "9pnet_virtio",
    "9p",
    "overlay",
    "virtio_net",
];
pub const NVDIMM: &[&str] = &["nfit", "device_dax", "dax_pmem"];
pub const CXL: &[&str] = &[
    "cxl_acpi",
    "cxl_pci",
    "cxl_mem",
    "cxl_pmem",
    "nd_pmem",
    "device_dax",
    "dax_pmem",
];
pub const RDMA: &[&str] = &["dummy", "rdma_rxe", "ib_uverbs", "rdma_ucm"];

/// The files of the wanted modules in an order in which they can be loaded. What is built in needs none.
pub fn files(folder: &Path, wanted: &[&str]) -> anyhow::Result<Vec<PathBuf>> {
    let read = |name: &str| {
        let path = folder.join(name);
        fs::read_to_string(&path).with_context(|| format!("Failed to read {}", path.display()))
    };
    let dependencies = read("modules.dep")?;
    let built_in = read("modules.builtin")?;
    let built_in: Vec<_> = built_in.lines().map(name).collect();
    let mut needs = HashMap::new();
    for line in dependencies.lines() {
        if let Some((file, others)) = line.split_once(':') {
            needs.insert(name(file), (file, others));
        }
    }
    let mut order: Vec<&str> = Vec::new();
    for module in wanted {
        let Some((file, others)) = needs.get(*module) else {
            if built_in.iter().any(|name| name == module) {
                continue;
            }
            bail!("The kernel of {} has no module {module}", folder.display());
        };
        // modules.dep names the farthest dependency last.
        for file in others.split_whitespace().rev().chain([*file]) {
            if !order.contains(&file) {
                order.push(file);
            }
        }
    }
    Ok(order.into_iter().map(|file| folder.join(file)).collect())
}

/// A module as the kernel takes it: Debian compresses those of newer kernels.
pub fn contents(file: &Path) -> anyhow::Result<Vec<u8>> {
    if file.extension().is_none_or(|extension| extension != "xz") {
        return fs::read(file).with_context(|| format!("Failed to read {}", file.display()));
    }
    let output = Command::new("xz")
        .arg("--decompress")
        .arg("--stdout")
        .arg(file)
        .output()
        .context("Failed to run xz; install xz-utils")?;
    if !output.status.success() {
        bail!(
            "xz cannot decompress {}: {}",
            file.display(),
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(output.stdout)
}

/// A module's name from its file: `kernel/drivers/dax/device_dax.ko.xz`.
fn name(file: &str) -> String {
    let base = file.rsplit('/').next().unwrap_or(file);
    base.split('.').next().unwrap_or(base).replace('-', "_")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_module_needs_comes_before_it_and_once() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| fs::write(folder.path().join(name), text).unwrap();
        write(
            "modules.dep",
            "kernel/fs/9p/9p.ko: kernel/net/9p/9pnet.ko kernel/fs/netfs.ko\n\
             kernel/fs/netfs.ko:\n\
             kernel/net/9p/9pnet.ko: kernel/fs/netfs.ko\n\
             kernel/drivers/virtio-net.ko.xz:\n",
        );
        write("modules.builtin", "kernel/fs/overlayfs/overlay.ko\n");

        let found = files(folder.path(), &["9p", "9pnet", "overlay", "virtio_net"]).unwrap();
        let expected = [
            "kernel/fs/netfs.ko",
            "kernel/net/9p/9pnet.ko",
            "kernel/fs/9p/9p.ko",
            "kernel/drivers/virtio-net.ko.xz",
        ];
        assert_eq!(found, expected.map(|file| folder.path().join(file)));

        let err = files(folder.path(), &["absent"]).unwrap_err();
        assert!(err.to_string().contains("no module absent"), "{err}");
    }
}
