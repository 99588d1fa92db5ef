//! Memory devices: pseudo_mm, dax, RDMA.

use std::fs;
use std::path::{Path, PathBuf};

use trenv_devices::{DaxDevice, ListError};

use super::{Check, read};

pub fn checks() -> Vec<Check> {
    let mut checks = vec![pseudo_mm()];
    checks.extend(dax(&trenv_devices::list()));
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

fn dax(devices: &Result<Vec<DaxDevice>, ListError>) -> Vec<Check> {
    match devices.as_deref() {
        Err(e) => vec![Check::absent("dax devices", "not known", e.to_string())],
        Ok([]) => {
            let advice = "ndctl create-namespace -m devdax -a 4096 (on persistent memory), or daxctl create-device (on CXL memory)";
            vec![Check::absent("dax devices", "none", advice)]
        }
        Ok(devices) => devices.iter().map(dax_device).collect(),
    }
}

fn dax_device(device: &DaxDevice) -> Check {
    let size = crate::table::bytes(device.size);
    let found = match device.node {
        Some(node) => format!("{}: {size}, node {node}", device.name),
        None => format!("{}: {size}", device.name),
    };
    match trenv_pool::check_device(device) {
        Ok(()) => Check::ok("dax device", found),
        Err(e) => Check::absent("dax device", found, e.to_string()),
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
    use trenv_devices::DaxMode;

    use super::*;
    use crate::doctor::Outcome;

    #[test]
    fn a_dax_device_is_judged_by_whether_it_can_hold_a_pool() {
        let good = DaxDevice {
            name: "dax0.0".into(),
            mode: DaxMode::Devdax,
            size: 1 << 30,
            align: 4096,
            node: Some(1),
            namespace: None,
            number: Some((252, 0)),
        };
        let ram = DaxDevice {
            mode: DaxMode::SystemRam,
            ..good.clone()
        };
        let checks = dax(&Ok(vec![good, ram]));
        assert_eq!(checks[0].outcome, Outcome::Ok);
        assert_eq!(checks[0].found, "dax0.0: 1.0 GiB, node 1");
        assert_eq!(checks[1].outcome, Outcome::Absent);
        let advice = checks[1].advice.as_deref().unwrap();
        assert!(advice.contains("--mode=devdax"), "{advice}");
    }

    #[test]
    fn devices_that_cannot_be_listed_are_told_with_what_is_missing() {
        let check = dax(&Err(ListError::NotInstalled)).remove(0);
        assert_eq!(check.outcome, Outcome::Absent);
        let advice = check.advice.unwrap();
        assert!(advice.contains("machine-prepare.sh"), "{advice}");
    }

    #[test]
    fn no_devices_is_no_fault() {
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(dax(&Ok(Vec::new()))[0].outcome, Outcome::Absent);
        assert_eq!(rdma(directory.path())[0].outcome, Outcome::Absent);
    }
}
