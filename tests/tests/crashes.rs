//! Daemons killed at any time: what was accepted is served, and nothing is left.

use std::time::Duration;

use serde_json::json;
use trenv_tests::{Machine, Settings, crash, until};

const PATIENCE: Duration = Duration::from_secs(30);

#[test]
fn a_killed_provider_finds_its_functions_and_sandboxes_again() -> anyhow::Result<()> {
    let mut machine = Machine::start()?;
    machine.deploy("hello-python")?;
    let id = machine.init_id("hello-python")?;
    let before = machine.leftovers().count("processes");
    for _ in 0..3 {
        machine.kill_provider();
        machine.start_provider()?;
        assert_eq!(machine.describe("hello-python")?["status"], "ready");
        machine.served_again("hello-python", &id)?;
    }
    let after = machine.leftovers().count("processes");
    assert!(after <= before + 4, "{before} processes became {after}");
    machine.remove("hello-python")?;
    machine.stop()
}

#[test]
fn a_killed_provider_during_a_deployment_leaves_nothing_half_done() -> anyhow::Result<()> {
    let mut machine = Machine::start()?;
    for pause_ms in [0, 100, 400, 900, 1500] {
        machine.deploy_only("hello-python", "docker.io/trenv/hello-python:latest")?;
        std::thread::sleep(Duration::from_millis(pause_ms));
        machine.kill_provider();
        machine.start_provider()?;
        let function = machine.settled("hello-python")?;
        assert_eq!(
            function["status"], "ready",
            "after {pause_ms} ms: {function:#}"
        );
        assert_eq!(machine.call("hello-python")?.status, 200);
        machine.remove("hello-python")?;
    }
    machine.stop()
}

#[test]
fn a_killed_shim_takes_its_sandboxes_along_and_the_next_call_is_served() -> anyhow::Result<()> {
    let settings = Settings {
        max_sandboxes: 60,
        ..Settings::default()
    };
    let machine = Machine::start_with(&settings)?;
    let image = machine.server_image()?;
    let function = machine.deploy_as(&json!({ "service": "server", "image": image }))?;
    assert_eq!(function["status"], "ready", "{function:#}");
    let id = machine.init_id("server")?;
    machine.scale("server", 50)?;
    for sandbox in machine.sandboxes()? {
        if sandbox.state == "idle" {
            machine.idle(&sandbox.id)?;
        }
    }
    let before = machine.leftovers();
    let old: Vec<i32> = machine
        .sandboxes()?
        .iter()
        .map(|sandbox| sandbox.init_pid)
        .collect();
    assert!(old.len() >= 50, "{}", old.len());

    std::thread::scope(|scope| -> anyhow::Result<()> {
        let call = || machine.anonymous("GET", "/function/server/sleep", &[]);
        let open: Vec<_> = (0..4).map(|_| scope.spawn(call)).collect();
        until("the calls to be open", PATIENCE, || {
            in_flight(&machine, "server").is_ok_and(|calls| calls == 4)
        })?;
        crash(&machine.pids_of("containerd-shim-trenv-v2"));
        for thread in open {
            let reply = thread.join().expect("the caller does not panic")?;
            assert_eq!(reply.status, 502, "{}", reply.text());
            let error = reply.json()?["error"].to_string();
            assert!(error.contains("The function"), "{error}");
        }
        Ok(())
    })?;
    machine.served_again("server", &id)?;
    until("the old sandboxes to go", PATIENCE, || {
        let inits = machine.pids_of("trenv-init");
        old.iter().all(|pid| !inits.contains(pid))
    })?;
    // The user wants fifty instances: they come again, and nothing of the old ones is left.
    machine.back_to(&before)?;
    machine.stop()
}

/// Calls that a function's instances serve now.
fn in_flight(machine: &Machine, name: &str) -> anyhow::Result<u64> {
    let function = machine.describe(name)?;
    let instances = function["instances"].as_array().cloned();
    Ok(instances
        .unwrap_or_default()
        .iter()
        .filter_map(|instance| instance["calls"].as_u64())
        .sum())
}

#[test]
fn a_killed_zygote_is_built_again() -> anyhow::Result<()> {
    let machine = Machine::start()?;
    machine.deploy("hello-python")?;
    let id = machine.init_id("hello-python")?;
    for _ in 0..3 {
        crash(&machine.pids_of("trenv-zygote"));
        machine.scale("hello-python", 0)?;
        machine.served_again("hello-python", &id)?;
    }
    machine.stop()
}

#[test]
fn a_killed_init_ends_its_sandbox_only() -> anyhow::Result<()> {
    let machine = Machine::start()?;
    machine.deploy("hello-python")?;
    machine.deploy("json-python")?;
    let id = machine.init_id("hello-python")?;
    let sandbox = machine.serving()?;
    let other = machine.init_id("json-python")?;
    crash(&[sandbox.init_pid]);
    machine.served_again("hello-python", &id)?;
    machine.served_again("json-python", &other)?;
    machine.stop()
}

#[test]
fn containerd_restarts_under_running_functions() -> anyhow::Result<()> {
    let mut machine = Machine::start()?;
    machine.deploy("hello-python")?;
    let id = machine.init_id("hello-python")?;
    machine.restart_containerd()?;
    machine.served_again("hello-python", &id)?;
    machine.scale("hello-python", 0)?;
    machine.served_again("hello-python", &id)?;
    machine.stop()
}
