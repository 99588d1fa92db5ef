//! Programs and services that trenv uses.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;

use trenv_config::Config;

use super::Check;

/// Where administrators' programs lie, beyond PATH.
const EXTRA_PATH: [&str; 3] = ["/usr/local/sbin", "/usr/sbin", "/sbin"];

pub fn checks(config: &Config) -> Vec<Check> {
    let mut checks = vec![
        program("containerd", "containerd", 2, "containerd"),
        socket(config),
        program("runc", "runc", 2, "runc"),
        plugins(&config.network.plugin_dir),
        program("nft", "nft", 1, "nftables"),
    ];
    checks.extend(installed(config));
    checks
}

fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(EXTRA_PATH.iter().map(PathBuf::from))
        .map(|directory| directory.join(program))
        .find(|path| path.is_file())
}

/// A program with its version: the word of that number in what `--version` prints first.
fn program(name: &str, binary: &str, word: usize, package: &str) -> Check {
    let advice = format!("apt-get install {package}");
    let Some(path) = find(binary) else {
        return Check::missing(name, "not installed", advice);
    };
    match Command::new(&path).arg("--version").output() {
        Ok(output) if output.status.success() => {
            let text = String::from_utf8_lossy(&output.stdout);
            let version = text.split_whitespace().nth(word).unwrap_or("?");
            Check::ok(name, format!("{version} ({})", path.display()))
        }
        _ => Check::missing(name, format!("{} does not run", path.display()), advice),
    }
}

fn socket(config: &Config) -> Check {
    let address = &config.containerd.address;
    match UnixStream::connect(address) {
        Ok(_) => Check::ok("containerd socket", address.display().to_string()),
        Err(err) => Check::missing(
            "containerd socket",
            format!("{}: {err}", address.display()),
            "systemctl start containerd, or bash deploy/machine-prepare.sh",
        ),
    }
}

fn plugins(directory: &Path) -> Check {
    let missing: Vec<&str> = ["bridge", "host-local", "loopback"]
        .into_iter()
        .filter(|plugin| !directory.join(plugin).is_file())
        .collect();
    if missing.is_empty() {
        return Check::ok("CNI plugins", directory.display().to_string());
    }
    Check::missing(
        "CNI plugins",
        format!("{} lacks {}", directory.display(), missing.join(", ")),
        "apt-get install containernetworking-plugins",
    )
}

/// trenv's own programs.
fn installed(config: &Config) -> Vec<Check> {
    let prepare = "bash deploy/machine-prepare.sh";
    let mut checks = Vec::new();
    let mut lacking = Vec::new();
    for program in ["containerd-shim-trenv-v2", "trenv-provider"] {
        if find(program).is_none() {
            lacking.push(program.to_owned());
        }
    }
    for program in ["trenv-init", "trenv-zygote", "fwatchdog"] {
        let path = config.libexec_dir.join(program);
        if !path.is_file() {
            lacking.push(path.display().to_string());
        }
    }
    checks.push(if lacking.is_empty() {
        Check::ok("trenv programs", "installed")
    } else {
        let found = format!("not installed: {}", lacking.join(", "));
        Check::missing("trenv programs", found, prepare)
    });
    let pool = config.pool_path();
    checks.push(
        match trenv_pool::Pool::open(&pool).and_then(|pool| pool.stat()) {
            Ok(stat) => Check::ok(
                "pool",
                format!(
                    "{}: {} templates, {} of {} free",
                    pool.display(),
                    stat.templates,
                    crate::table::bytes(stat.free_bytes),
                    crate::table::bytes(stat.size),
                ),
            ),
            Err(err) => Check::missing("pool", err.to_string(), prepare),
        },
    );
    checks
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Outcome;

    #[test]
    fn an_unknown_program_is_missing_with_its_package() {
        let check = program("x", "no-such-program-here", 1, "some-package");
        assert_eq!(check.outcome, Outcome::Missing);
        assert_eq!(
            check.advice.as_deref(),
            Some("apt-get install some-package")
        );
    }

    #[test]
    fn plugins_are_named_when_they_lack() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("bridge"), "").unwrap();
        let check = plugins(directory.path());
        assert_eq!(check.outcome, Outcome::Missing);
        assert!(
            check.found.contains("lacks host-local, loopback"),
            "{}",
            check.found
        );
    }
}
