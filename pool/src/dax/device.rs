//! The device-dax of a machine, from sysfs (kernel: Documentation/ABI/testing/sysfs-bus-dax), and
//! whether one can hold a pool. The programs are static and libdaxctl comes as a shared library only, so
//! the same files are read here; a test compares with what `daxctl list` says.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::PAGE_SIZE;

pub const SYSFS: &str = "/sys";

/// How a device is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum DaxMode {
    /// To be mapped by programs.
    Devdax,
    /// As ordinary memory of the machine.
    SystemRam,
    /// No driver has it.
    Disabled,
}

/// One device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DaxDevice {
    pub name: String,
    pub mode: DaxMode,
    pub size: u64,
    /// Bytes that it is mapped by; 0 if the kernel does not tell.
    pub align: u64,
    /// The NUMA node that it is, or would be.
    pub node: Option<i32>,
    /// The namespace of persistent memory that it is made of.
    pub namespace: Option<String>,
    /// Major and minor number.
    #[serde(skip)]
    pub number: Option<(u32, u32)>,
}

/// Why a device cannot hold a pool, and what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum DaxError {
    #[error("There is no {path}; device-dax of this machine: {found}")]
    NotFound { path: PathBuf, found: String },
    #[error("{path} is no device-dax; `trenv-pool devices` lists those of this machine")]
    NotDax { path: PathBuf },
    #[error(
        "{path} is in mode system-ram, where its memory belongs to the machine; take it back with `daxctl reconfigure-device --mode=devdax --force {name}`"
    )]
    SystemRam { path: PathBuf, name: String },
    #[error("{path} is disabled; enable it with `{command}`")]
    Disabled { path: PathBuf, command: String },
    #[error(
        "{path} is mapped by {found} bytes, but a pool needs {PAGE_SIZE}; make it anew, which loses what it holds, with `{command}`"
    )]
    Alignment {
        path: PathBuf,
        found: u64,
        command: String,
    },
    #[error("{path} has {size} bytes, but a pool takes {least} at least; choose a larger device")]
    TooSmall {
        path: PathBuf,
        size: u64,
        least: u64,
    },
    #[error("{path} is in use by {holders}; stop what uses it and try again")]
    Busy { path: PathBuf, holders: String },
    #[error(
        "{path} holds the pool {uuid}, which would be lost; remove that with `trenv-pool destroy` where its directory is, or give `trenv-pool format --overwrite`"
    )]
    Occupied { path: PathBuf, uuid: String },
    #[error(
        "{path} does not hold the pages of the pool in {pool}: devices may have changed their names, or its memory was lost. Correct the link {pool}/device; if the pages are gone, remove {pool}, format the pool and deploy the functions again"
    )]
    OtherPages { path: PathBuf, pool: PathBuf },
    #[error(
        "A pool of backend dax needs a device; name one with pool.device in the configuration or --device, e.g. /dev/dax0.0"
    )]
    NoDevice,
}

impl DaxDevice {
    /// Whether the device can hold a pool; what uses it is not asked for.
    pub fn check_pool(&self) -> Result<(), DaxError> {
        self.check(&Path::new("/dev").join(&self.name), crate::pool::LEAST_SIZE)
    }

    /// Whether the device can hold a pool of `least` bytes; `path` is what people call it.
    pub(crate) fn check(&self, path: &Path, least: u64) -> Result<(), DaxError> {
        let path = path.to_path_buf();
        let name = &self.name;
        match self.mode {
            DaxMode::Devdax => {}
            DaxMode::SystemRam => {
                return Err(DaxError::SystemRam {
                    path,
                    name: name.clone(),
                });
            }
            DaxMode::Disabled => {
                let command = format!("daxctl enable-device {name}");
                return Err(DaxError::Disabled { path, command });
            }
        }
        if self.align != 0 && self.align != PAGE_SIZE as u64 {
            let command = match &self.namespace {
                Some(namespace) => {
                    format!("ndctl create-namespace -f -e {namespace} -m devdax -a {PAGE_SIZE}")
                }
                None => format!(
                    "daxctl disable-device {name} && daxctl destroy-device {name} && daxctl create-device -a {PAGE_SIZE}"
                ),
            };
            return Err(DaxError::Alignment {
                path,
                found: self.align,
                command,
            });
        }
        if self.size < least {
            return Err(DaxError::TooSmall {
                path,
                size: self.size,
                least,
            });
        }
        Ok(())
    }
}

/// All devices, by name. A kernel without device-dax has none.
pub fn list(sysfs: &Path) -> io::Result<Vec<DaxDevice>> {
    let entries = match fs::read_dir(sysfs.join("bus/dax/devices")) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(e),
    };
    let mut all = Vec::new();
    for entry in entries {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        all.push(read(name, &entry.path()));
    }
    all.sort_by(|one, other| one.name.cmp(&other.name));
    Ok(all)
}

fn read(name: String, folder: &Path) -> DaxDevice {
    let text = |file: &str| {
        let text = fs::read_to_string(folder.join(file)).ok();
        text.map(|text| text.trim().to_owned())
    };
    let number = |file: &str| text(file).and_then(|text| text.parse().ok());
    let driver = fs::read_link(folder.join("driver")).ok();
    let driver = driver.as_deref().and_then(Path::file_name);
    let mode = match driver {
        None => DaxMode::Disabled,
        Some(driver) if driver == "kmem" => DaxMode::SystemRam,
        Some(_) => DaxMode::Devdax,
    };
    // The device of persistent memory lies below what it is made of.
    let place = fs::canonicalize(folder).ok();
    let parents = place.iter().flat_map(|place| place.ancestors().skip(1));
    let namespace = parents
        .filter_map(|parent| fs::read_to_string(parent.join("namespace")).ok())
        .map(|text| text.trim().to_owned())
        .find(|text| !text.is_empty());
    let device = text("dev").and_then(|text| {
        let (major, minor) = text.split_once(':')?;
        Some((major.parse().ok()?, minor.parse().ok()?))
    });
    DaxDevice {
        name,
        mode,
        size: number("size").unwrap_or(0),
        align: number("align").unwrap_or(0),
        node: text("target_node")
            .and_then(|text| text.parse().ok())
            .filter(|node| *node >= 0),
        namespace,
        number: device,
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn good() -> DaxDevice {
        DaxDevice {
            name: "dax0.0".into(),
            mode: DaxMode::Devdax,
            size: 64 << 20,
            align: 4096,
            node: Some(0),
            namespace: Some("namespace0.0".into()),
            number: Some((252, 0)),
        }
    }

    fn advice(device: &DaxDevice) -> String {
        let checked = device.check(Path::new("/dev/dax0.0"), 16 << 20);
        checked.unwrap_err().to_string()
    }

    #[test]
    fn each_fault_has_the_command_that_mends_it() {
        good().check(Path::new("/dev/dax0.0"), 64 << 20).unwrap();
        let cxl = DaxDevice {
            namespace: None,
            ..good()
        };
        let mode = |mode, device: &DaxDevice| DaxDevice {
            mode,
            ..device.clone()
        };
        let align = |device: &DaxDevice| DaxDevice {
            align: 2 << 20,
            ..device.clone()
        };
        for (device, command) in [
            (
                mode(DaxMode::SystemRam, &good()),
                "daxctl reconfigure-device --mode=devdax --force dax0.0",
            ),
            (mode(DaxMode::Disabled, &cxl), "daxctl enable-device dax0.0"),
            (
                align(&good()),
                "ndctl create-namespace -f -e namespace0.0 -m devdax -a 4096",
            ),
            (align(&cxl), "daxctl create-device -a 4096"),
        ] {
            let advice = advice(&device);
            assert!(advice.contains(command), "{advice}");
        }
        let small = DaxDevice {
            size: 8 << 20,
            ..good()
        };
        let advice = advice(&small);
        assert!(
            advice.contains("8388608") && advice.contains("16777216"),
            "{advice}"
        );
    }

    #[test]
    fn devices_are_read_from_sysfs() {
        let sysfs = tempfile::tempdir().unwrap();
        assert_eq!(list(sysfs.path()).unwrap(), []);
        let bus = sysfs.path().join("bus/dax/devices");
        let made = sysfs.path().join("devices/region0/dax0.1/dax0.0");
        let drivers = sysfs.path().join("bus/dax/drivers/device_dax");
        for folder in [&bus, &made, &drivers] {
            fs::create_dir_all(folder).unwrap();
        }
        for (file, text) in [
            ("size", "67108864\n"),
            ("align", "4096\n"),
            ("target_node", "0\n"),
            ("dev", "252:0\n"),
            ("../namespace", "namespace0.0\n"),
        ] {
            fs::write(made.join(file), text).unwrap();
        }
        symlink(&made, bus.join("dax0.0")).unwrap();
        symlink(&drivers, made.join("driver")).unwrap();
        assert_eq!(list(sysfs.path()).unwrap(), [good()]);
        fs::remove_file(made.join("driver")).unwrap();
        assert_eq!(list(sysfs.path()).unwrap()[0].mode, DaxMode::Disabled);
    }
}
