//! `trenv-devices`: prints the device-dax of this machine as JSON, for [`trenv_devices::list`].

mod library;

use std::process::ExitCode;

fn main() -> ExitCode {
    let printed = library::Library::new().and_then(|library| {
        let mut devices = library.devices();
        devices.sort_by(|one, other| one.name.cmp(&other.name));
        serde_json::to_writer(std::io::stdout().lock(), &devices).map_err(std::io::Error::from)
    });
    match printed {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("trenv-devices: {e}");
            ExitCode::FAILURE
        }
    }
}
