//! Everything that a change must pass before it is sent; all failures in one report.

use std::process::Command;

use anyhow::bail;

/// One command, named by what it checks.
type Step<'a> = (&'a str, &'a [&'a str], Option<(&'a str, &'a str)>);

const STEPS: &[Step<'_>] = &[
    ("format", &["cargo", "fmt", "--all", "--check"], None),
    (
        "lints",
        &[
            "cargo",
            "clippy",
            "--locked",
            "--workspace",
            "--all-targets",
            "--",
            "-D",
            "warnings",
        ],
        None,
    ),
    (
        "documentation",
        &[
            "cargo",
            "doc",
            "--locked",
            "--workspace",
            "--no-deps",
            "--document-private-items",
        ],
        Some(("RUSTDOCFLAGS", "-D warnings")),
    ),
    (
        "shell scripts",
        &[
            "bash",
            "-c",
            "git ls-files '*.sh' .ci/run | xargs grep -l '^#!' | xargs shellcheck -x",
        ],
        None,
    ),
];

/// Unit and integration tests; the end-to-end tests need a machine and run by `deploy/test.sh`.
const TESTS: Step<'_> = (
    "tests",
    &[
        "cargo",
        "test",
        "--locked",
        "--workspace",
        "--exclude",
        "trenv-tests",
    ],
    None,
);

pub fn run(with_tests: bool) -> anyhow::Result<()> {
    let mut failed = Vec::new();
    for (name, command, variable) in STEPS.iter().chain(with_tests.then_some(&TESTS)) {
        eprintln!("== {name}: {}", command.join(" "));
        let [program, arguments @ ..] = command else {
            continue;
        };
        let status = Command::new(program)
            .args(arguments)
            .envs(variable.iter().copied())
            .status();
        match status {
            Ok(status) if status.success() => {}
            Ok(status) => failed.push(format!("{name} ({status})")),
            Err(err) => failed.push(format!("{name} ({program} cannot be run: {err})")),
        }
    }
    for (name, step) in [
        ("layers", crate::layers::run as fn() -> anyhow::Result<()>),
        ("licences", crate::licences::run),
    ] {
        eprintln!("== {name}");
        if let Err(err) = step() {
            failed.push(format!("{name} ({err})"));
        }
    }
    if failed.is_empty() {
        eprintln!("== all checks passed");
        return Ok(());
    }
    bail!("{} checks failed: {}", failed.len(), failed.join(", "))
}
