//! The REST interface against a running provider, with a containerd of the test's own.
//!
//! `conformance [NAME]...` runs the cases whose names contain one of the words, `conformance --list`
//! lists them. Functions run by the installed runc behind a stand-in for the shim, in a network
//! namespace of the test's own; templates have their own tests, with the real shim.
//!
//! The program is also the function that it deploys: `conformance serve-function`.

// A test may fail by panicking; the lint's own exception covers only functions marked as tests.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod cases;
mod function;
mod image;
mod machine;
mod stand_in;
mod usage;

use std::process::{Command, ExitCode};

use nix::sched::{CloneFlags, unshare};

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.first().is_some_and(|a| a == "serve-function") {
        return function::serve();
    }
    let words: Vec<&String> = arguments.iter().filter(|a| !a.starts_with('-')).collect();
    let chosen: Vec<&cases::Case> = cases::ALL
        .iter()
        .filter(|case| words.is_empty() || words.iter().any(|w| case.name.contains(w.as_str())))
        .collect();
    if arguments.iter().any(|a| a == "--list") {
        for case in chosen {
            println!("{}: test", case.name);
        }
        return ExitCode::SUCCESS;
    }
    if let Err(reason) = own_network() {
        eprintln!("The conformance tests cannot run: {reason}");
        return ExitCode::FAILURE;
    }
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    runtime.block_on(run(&chosen))
}

/// Functions listen on port 8080, so the whole test lives in a network of its own.
fn own_network() -> Result<(), String> {
    if !nix::unistd::geteuid().is_root() {
        return Err("they make containers; run them as root".to_owned());
    }
    for program in [
        "containerd",
        "containerd-shim-runc-v2",
        "runc",
        "ctr",
        "jq",
        "ip",
        "tar",
    ] {
        let found = std::env::var("PATH")
            .unwrap_or_default()
            .split(':')
            .any(|dir| std::path::Path::new(dir).join(program).exists());
        if !found {
            return Err(format!("{program} is not installed; install it"));
        }
    }
    unshare(CloneFlags::CLONE_NEWNET).map_err(|err| format!("no network namespace: {err}"))?;
    let up = Command::new("ip")
        .args(["link", "set", "lo", "up"])
        .status();
    match up {
        Ok(status) if status.success() => Ok(()),
        other => Err(format!("the loopback device stays down: {other:?}")),
    }
}

async fn run(chosen: &[&cases::Case]) -> ExitCode {
    let mut machine = machine::Machine::start().await;
    let mut failed = Vec::new();
    println!("running {} cases", chosen.len());
    for case in chosen {
        let outcome = (case.run)(&mut machine).await;
        match outcome {
            Ok(()) => println!("case {} ... ok", case.name),
            Err(reason) => {
                println!("case {} ... FAILED\n    {reason}", case.name);
                failed.push(case.name);
            }
        }
        machine.remove_everything().await;
    }
    let words = machine.last_words();
    println!(
        "{} passed, {} failed",
        chosen.len() - failed.len(),
        failed.len()
    );
    if failed.is_empty() {
        return ExitCode::SUCCESS;
    }
    println!("{words}");
    ExitCode::FAILURE
}
