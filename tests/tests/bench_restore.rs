//! `trenv bench restore` on a machine without any function.

use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use serde_json::Value;
use trenv_tests::{Machine, Sandbox, until};

const NAMESPACE: &str = "trenv-bench";

/// Everything that containerd and the pool have of the benchmark.
fn left(machine: &Machine) -> anyhow::Result<String> {
    let ctr = |arguments: &[&str]| {
        let mut all = vec!["-n", NAMESPACE];
        all.extend(arguments);
        machine.ctr(&all)
    };
    let mut all = String::new();
    all += &ctr(&["container", "ls", "-q"])?;
    all += &ctr(&["leases", "ls", "-q"])?;
    for line in ctr(&["snapshots", "ls"])?.lines().skip(1) {
        all += line;
    }
    for line in machine.ctr(&["namespaces", "ls", "-q"])?.lines() {
        if line == NAMESPACE {
            all += line;
        }
    }
    let templates: Value =
        serde_json::from_str(&machine.tool("trenv", &["pool", "ls", "--json"])?)?;
    let count = templates.as_array().map_or(0, Vec::len);
    if count > 0 {
        all += &format!("{count} templates");
    }
    Ok(all)
}

#[test]
fn the_benchmark_measures_the_restore_and_leaves_nothing() -> anyhow::Result<()> {
    let machine = Machine::start()?;
    // What is made once for all namespaces, such as the bridge, stays.
    machine.deploy("hello-python")?;
    machine.remove("hello-python")?;
    until("the template to go", Duration::from_secs(20), || {
        left(&machine).is_ok_and(|left| left.is_empty())
    })?;
    let before = machine.leftovers();
    let text = machine.tool(
        "trenv",
        &[
            "bench",
            "restore",
            "--json",
            "--mb=8",
            "--threads=8",
            "--sandboxes=3",
            "--starts=6",
            "--pause-ms=50",
            "--concurrency=2",
            "--seconds=1",
            "--attach=5",
        ],
    )?;
    let report: Value = serde_json::from_str(&text)?;
    assert_eq!(report["subject"]["processes"], 2, "{report:#}");
    assert_eq!(report["subject"]["threads"], 8, "{report:#}");
    let stored = report["subject"]["stored_bytes"].as_u64();
    assert!(stored >= Some(8 << 20), "{report:#}");
    if Path::new("/sys/kernel/mm/transparent_hugepage").exists() {
        // The 8 MiB have three ranges of 2 MiB at least.
        let huge = report["subject"]["zygote_huge_bytes"].as_u64();
        assert!(huge >= Some(6 << 20), "{report:#}");
    }
    let made = report["attach"]["n"].as_u64();
    assert!(made >= Some(5), "{report:#}");
    assert_eq!(report["single"]["repurpose"]["n"], 6, "{report:#}");
    for part in ["single", "saturation"] {
        let part = &report[part];
        for what in ["repurpose", "restore_path", "reset", "next_root"] {
            assert!(part[what]["n"].as_u64() > Some(0), "{what}: {report:#}");
            assert_eq!(part[what]["failed"], 0, "{what}: {report:#}");
            assert!(part[what]["p99_us"].as_u64() > Some(0), "{what}");
        }
        for step in ["rootfs", "restore", "restore.memory"] {
            let n = &part["steps"][step]["n"];
            assert_eq!(n, &part["repurpose"]["n"], "{step}: {report:#}");
        }
        assert!(part["reset_steps"]["purge"]["n"].as_u64() > Some(0));
    }
    let rate = report["saturation"]["starts_per_second"].as_f64();
    assert!(rate.context("no rate")? > 1.0, "{report:#}");
    assert!(report["saturation"]["cpu_ms_per_start"].as_f64() > Some(0.0));
    assert_eq!(left(&machine)?, "");
    machine.back_to(&before)?;
    machine.stop()
}

#[test]
fn an_interrupted_benchmark_leaves_nothing() -> anyhow::Result<()> {
    let machine = Machine::start()?;
    let running = std::thread::scope(|scope| {
        let run = scope.spawn(|| machine.tool("trenv", &["bench", "restore", "--mb=8"]));
        let started = until("a start from the template", Duration::from_secs(60), || {
            let started = |one: &Sandbox| one.state == "ready" && !one.template.is_empty();
            machine.sandboxes().is_ok_and(|all| all.iter().any(started))
        });
        for pid in machine.pids_of("trenv") {
            let pid = nix::unistd::Pid::from_raw(pid);
            let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT);
        }
        let ended = run.join();
        started.map(|()| ended)
    })?;
    let ended = running.map_err(|_| anyhow::anyhow!("the benchmark's thread panicked"))?;
    let reason = ended.expect_err("it was interrupted").to_string();
    assert!(reason.contains("Interrupted"), "{reason}");
    assert_eq!(left(&machine)?, "");
    machine.stop()
}
