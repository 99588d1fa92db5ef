//! The device-dax of a machine (`/dev/daxX.Y`), as libdaxctl sees them.
//!
//! libdaxctl is a shared library, and trenv's programs are static. So a small program of its own,
//! `trenv-devices`, is linked with it (`library`), and prints a list of [`DaxDevice`] as JSON;
//! [`list`] runs that program and reads the list. It is installed beside the others where a pool is to
//! lie on a device (`deploy/machine-prepare.sh --mem-pool dax`), and built by `build.sh`.
//!
//! Whether a device can hold a pool is for the pool to say.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde::{Deserialize, Serialize};

/// The program that is linked with libdaxctl.
const PROGRAM: &str = "trenv-devices";
/// Where the kernel has device-dax, if there are any.
const BUS: &str = "/sys/bus/dax/devices";

/// How a device is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
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
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
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
    /// Major and minor number of its file.
    pub number: Option<(u32, u32)>,
}

/// Why the devices of this machine are not known.
#[derive(Debug, thiserror::Error)]
pub enum ListError {
    #[error(
        "The program {PROGRAM}, which asks libdaxctl about devices, is not installed; install trenv with `bash deploy/machine-prepare.sh --mem-pool dax --dax-dev DEVICE`, or build it with `bash pool/devices/build.sh` and put it into PATH"
    )]
    NotInstalled,
    #[error("Failed to run {program}")]
    Run { program: PathBuf, source: io::Error },
    #[error("{program} could not list the devices: {said}")]
    Failed { program: PathBuf, said: String },
    #[error("What {program} printed is no list of devices; install it again")]
    Output {
        program: PathBuf,
        source: serde_json::Error,
    },
}

/// All devices, by name. Where the kernel has none there are none, with or without the program.
pub fn list() -> Result<Vec<DaxDevice>, ListError> {
    let any = fs::read_dir(BUS).is_ok_and(|mut devices| devices.next().is_some());
    if any { ask(&program()) } else { Ok(Vec::new()) }
}

/// The program beside this one, or else that in PATH.
fn program() -> PathBuf {
    let own = std::env::current_exe().ok();
    let beside = own.and_then(|own| Some(own.parent()?.join(PROGRAM)));
    beside
        .filter(|path| path.exists())
        .unwrap_or_else(|| PROGRAM.into())
}

fn ask(program: &Path) -> Result<Vec<DaxDevice>, ListError> {
    let output = match Command::new(program).output() {
        Ok(output) => output,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Err(ListError::NotInstalled),
        Err(source) => {
            let program = program.to_path_buf();
            return Err(ListError::Run { program, source });
        }
    };
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(ListError::Failed {
            program: program.to_path_buf(),
            said: format!("{} ({})", said.trim(), output.status),
        });
    }
    serde_json::from_slice(&output.stdout).map_err(|source| ListError::Output {
        program: program.to_path_buf(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_gives_no_list_is_told() {
        let absent = ask(Path::new("/no/such/trenv-devices")).unwrap_err();
        assert!(matches!(absent, ListError::NotInstalled), "{absent}");
        let failed = ask(Path::new("/bin/false")).unwrap_err().to_string();
        assert!(failed.contains("exit status: 1"), "{failed}");
        let silent = ask(Path::new("/bin/true")).unwrap_err();
        assert!(matches!(silent, ListError::Output { .. }), "{silent}");
    }
}
