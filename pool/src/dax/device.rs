//! What makes a device-dax unfit for a pool, and the command that mends it: by what libdaxctl says
//! of the machine's devices ([`trenv_devices`]).

use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use trenv_devices::{DaxDevice, DaxMode, ListError};

use crate::PAGE_SIZE;
use crate::pool::LEAST_SIZE;

/// Why a device cannot hold a pool, and what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum DaxError {
    #[error("There is no {path}; device-dax of this machine: {found}")]
    NotFound { path: PathBuf, found: String },
    #[error("{path} cannot be used as a device-dax, and why is not known")]
    Unknown { path: PathBuf, source: ListError },
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

/// Whether the device can hold a pool; what uses it is not asked for.
pub fn check_device(device: &DaxDevice) -> Result<(), DaxError> {
    check(device, &Path::new("/dev").join(&device.name), LEAST_SIZE)
}

/// Whether the device can hold a pool of `least` bytes; `path` is what people call it.
fn check(device: &DaxDevice, path: &Path, least: u64) -> Result<(), DaxError> {
    let path = path.to_path_buf();
    let name = &device.name;
    match device.mode {
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
    if device.align != 0 && device.align != PAGE_SIZE as u64 {
        let command = match &device.namespace {
            Some(namespace) => {
                format!("ndctl create-namespace -f -e {namespace} -m devdax -a {PAGE_SIZE}")
            }
            None => format!(
                "daxctl disable-device {name} && daxctl destroy-device {name} && daxctl create-device -a {PAGE_SIZE}"
            ),
        };
        return Err(DaxError::Alignment {
            path,
            found: device.align,
            command,
        });
    }
    if device.size < least {
        return Err(DaxError::TooSmall {
            path,
            size: device.size,
            least,
        });
    }
    Ok(())
}

/// What is wrong with the device at a path of which `least` bytes are needed, or nothing that is known.
pub(super) fn fault(path: &Path, least: u64) -> Result<(), DaxError> {
    let all = trenv_devices::list().map_err(|source| DaxError::Unknown {
        path: path.to_path_buf(),
        source,
    })?;
    check(find(path, &all)?, path, least)
}

/// The device at a path: by its number, or where it has no file, as one that is not in mode devdax, by its name.
fn find<'a>(path: &Path, all: &'a [DaxDevice]) -> Result<&'a DaxDevice, DaxError> {
    let Ok(meta) = std::fs::metadata(path) else {
        let name = path.file_name().unwrap_or_default();
        let named = all.iter().find(|device| device.name.as_str() == name);
        return named.ok_or_else(|| DaxError::NotFound {
            path: path.to_path_buf(),
            found: match all {
                [] => "none; `ndctl enable-namespace all` brings back that of persistent memory, `ndctl create-namespace -m devdax -a 4096` makes one, `daxctl create-device` one of CXL memory".into(),
                all => {
                    let names: Vec<&str> = all.iter().map(|device| device.name.as_str()).collect();
                    names.join(", ")
                }
            },
        });
    };
    let number = (
        rustix::fs::major(meta.rdev()),
        rustix::fs::minor(meta.rdev()),
    );
    let is_character = meta.file_type().is_char_device();
    all.iter()
        .find(|device| is_character && device.number == Some(number))
        .ok_or_else(|| DaxError::NotDax {
            path: path.to_path_buf(),
        })
}

#[cfg(test)]
mod tests {
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
        let checked = check(device, Path::new("/dev/dax0.0"), 16 << 20);
        checked.unwrap_err().to_string()
    }

    #[test]
    fn each_fault_has_the_command_that_mends_it() {
        check(&good(), Path::new("/dev/dax0.0"), 64 << 20).unwrap();
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
    fn what_is_no_device_dax_is_refused_by_name() {
        let file = tempfile::NamedTempFile::new().unwrap();
        for path in [Path::new("/dev/null"), file.path()] {
            let refused = find(path, &[good()]).unwrap_err().to_string();
            assert!(refused.contains("no device-dax"), "{refused}");
        }
        let absent = find(Path::new("/dev/dax77.7"), &[good()]).unwrap_err();
        let absent = absent.to_string();
        assert!(
            absent.contains("There is no /dev/dax77.7") && absent.contains("dax0.0"),
            "{absent}"
        );
    }

    #[test]
    fn a_device_without_a_file_is_found_by_its_name() {
        let device = DaxDevice {
            name: "dax77.7".into(),
            ..good()
        };
        let all = [good(), device.clone()];
        assert_eq!(find(Path::new("/dev/dax77.7"), &all).unwrap(), &device);
    }
}
