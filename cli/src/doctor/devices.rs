//! Memory devices: pseudo_mm, dax, RDMA.

use std::fs;
use std::path::{Path, PathBuf};

use super::{Check, Outcome, read};

/// The alignment at which single pages of a dax device can be mapped.
const PAGE_ALIGNMENT: u64 = 4096;

pub fn checks() -> Vec<Check> {
    let mut checks = vec![pseudo_mm()];
    checks.extend(dax(Path::new("/sys/bus/dax/devices")));
    checks.extend(rdma(Path::new("/sys/class/infiniband")));
    checks
}

fn pseudo_mm() -> Check {
    if Path::new("/dev/pseudo_mm").exists() {
        return Check::ok("pseudo_mm", "/dev/pseudo_mm");
    }
    let advice =
        "modprobe pseudo_mm once its module is built; templates live in ordinary memory without";
    Check::absent("pseudo_mm", "no device", advice)
}

fn entries(directory: &Path) -> Vec<PathBuf> {
    let mut paths: Vec<PathBuf> = fs::read_dir(directory)
        .map(|entries| entries.flatten().map(|entry| entry.path()).collect())
        .unwrap_or_default();
    paths.sort();
    paths
}

fn name_of(path: &Path) -> String {
    path.file_name()
        .map(|name| name.to_string_lossy().into_owned())
        .unwrap_or_default()
}

fn dax(directory: &Path) -> Vec<Check> {
    let devices = entries(directory);
    if devices.is_empty() {
        let advice = "ndctl create-namespace -m devdax -a 4096 (on persistent memory), or daxctl create-device (on CXL memory)";
        return vec![Check::absent("dax devices", "none", advice)];
    }
    devices.iter().map(|path| dax_device(path)).collect()
}

fn dax_device(path: &Path) -> Check {
    let name = name_of(path);
    let number = |file: &str| read(path.join(file)).and_then(|text| text.parse::<u64>().ok());
    let driver =
        fs::read_link(path.join("driver")).map_or_else(|_| "none".into(), |to| name_of(&to));
    let mode = match driver.as_str() {
        "device_dax" => "devdax",
        "kmem" => "system-ram",
        other => other,
    };
    let size = number("size").unwrap_or(0);
    let alignment = number("align").unwrap_or(0);
    let found = format!(
        "{name}: mode {mode}, {}, alignment {alignment}, node {}",
        crate::table::bytes(size),
        read(path.join("target_node")).unwrap_or_else(|| "?".into()),
    );
    let advice = if mode != "devdax" {
        Some(format!("daxctl reconfigure-device --mode=devdax {name}"))
    } else if alignment != PAGE_ALIGNMENT {
        let namespace = name.replacen("dax", "namespace", 1);
        Some(format!(
            "ndctl create-namespace -f -e {namespace} -m devdax -a {PAGE_ALIGNMENT} (erases it)"
        ))
    } else {
        None
    };
    Check {
        name: "dax device".into(),
        outcome: if advice.is_none() {
            Outcome::Ok
        } else {
            Outcome::Absent
        },
        found,
        advice,
    }
}

fn rdma(directory: &Path) -> Vec<Check> {
    let links = entries(directory);
    if links.is_empty() {
        let advice = "modprobe rdma_rxe && rdma link add rxe0 type rxe netdev INTERFACE";
        return vec![Check::absent("rdma links", "none", advice)];
    }
    let mut checks = Vec::new();
    for link in links {
        for port in entries(&link.join("ports")) {
            let state = read(port.join("state")).unwrap_or_default();
            let netdev = read(port.join("gid_attrs/ndevs/0")).unwrap_or_else(|| "?".into());
            let found = format!("{}/{}: {state}, {netdev}", name_of(&link), name_of(&port));
            checks.push(if state.contains("ACTIVE") {
                Check::ok("rdma link", found)
            } else {
                Check::absent("rdma link", found, format!("ip link set {netdev} up"))
            });
        }
    }
    checks
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(directory: &Path, driver: &str, align: &str) -> Check {
        let path = directory.join("dax0.0");
        fs::create_dir_all(&path).unwrap();
        fs::write(path.join("size"), "1073741824\n").unwrap();
        fs::write(path.join("align"), format!("{align}\n")).unwrap();
        fs::write(path.join("target_node"), "1\n").unwrap();
        let link = path.join("driver");
        let _ = fs::remove_file(&link);
        std::os::unix::fs::symlink(Path::new("/sys/bus/dax/drivers").join(driver), &link).unwrap();
        dax(directory).remove(0)
    }

    #[test]
    fn a_dax_device_is_judged_by_mode_and_alignment() {
        let directory = tempfile::tempdir().unwrap();
        let good = device(directory.path(), "device_dax", "4096");
        assert_eq!(good.outcome, Outcome::Ok);
        assert_eq!(
            good.found,
            "dax0.0: mode devdax, 1.0 GiB, alignment 4096, node 1"
        );
        let ram = device(directory.path(), "kmem", "4096");
        assert_eq!(
            ram.advice.as_deref(),
            Some("daxctl reconfigure-device --mode=devdax dax0.0")
        );
        let coarse = device(directory.path(), "device_dax", "2097152");
        assert!(
            coarse
                .advice
                .unwrap()
                .contains("-e namespace0.0 -m devdax -a 4096")
        );
    }

    #[test]
    fn no_devices_is_no_fault() {
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(dax(directory.path())[0].outcome, Outcome::Absent);
        assert_eq!(rdma(directory.path())[0].outcome, Outcome::Absent);
    }
}
