//! Whether CRIU can be used on this machine.

use std::io::ErrorKind;
use std::process::Output;

use tokio::process::Command;

use super::StartMethod;

/// Where CRIU may be beside the places of PATH, which a daemon's often lacks.
const PLACES: &str = "/usr/sbin:/usr/local/sbin";

/// Asks CRIU whether the kernel has what it needs.
///
/// # Errors
/// A sentence that says why a function cannot start by `method`.
pub async fn check(method: StartMethod) -> Result<(), String> {
    let path = std::env::var("PATH").unwrap_or_default();
    let output = Command::new("criu")
        .arg("check")
        .env("PATH", format!("{path}:{PLACES}"))
        .output()
        .await;
    let reason = match output {
        Ok(output) if output.status.success() => return Ok(()),
        Ok(output) => said(&output),
        Err(err) if err.kind() == ErrorKind::NotFound => {
            "CRIU is not installed; install the package criu".into()
        }
        Err(err) => format!("CRIU cannot be run: {err}"),
    };
    let method = method.name();
    Err(format!(
        "The start method {method} cannot be used on this machine: {reason}"
    ))
}

fn said(output: &Output) -> String {
    let text = String::from_utf8_lossy(&output.stderr);
    let error = text.lines().find(|line| line.contains("Error"));
    let reason = error.or(text.lines().next()).unwrap_or("without a reason");
    format!("`criu check` fails: {}", reason.trim())
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;
    use std::process::ExitStatus;

    use super::*;

    #[test]
    fn the_first_error_of_the_check_is_the_reason() {
        let output = |stderr: &str| Output {
            status: ExitStatus::from_raw(256),
            stdout: Vec::new(),
            stderr: stderr.into(),
        };
        let reason = said(&output(
            "Warn: old\nError (criu/vdso.c:381): no bounds\nError: b\n",
        ));
        assert_eq!(
            reason,
            "`criu check` fails: Error (criu/vdso.c:381): no bounds"
        );
        assert_eq!(said(&output("")), "`criu check` fails: without a reason");
    }
}
