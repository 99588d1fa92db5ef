//! Daemons killed at any time: what was accepted is served, and nothing is left.

use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use trenv_tests::{Machine, Settings, until};

const PATIENCE: Duration = Duration::from_secs(30);

fn crash(pids: &[i32]) {
    for pid in pids {
        let _ = kill(Pid::from_raw(*pid), Signal::SIGKILL);
    }
}

fn served_again(machine: &Machine, name: &str, init_id: &str) -> anyhow::Result<()> {
    let mut last = String::new();
    until("the function to be served again", PATIENCE, || {
        match machine.call(name) {
            Ok(reply) if reply.status == 200 => {
                last = reply.text();
                true
            }
            Ok(reply) => {
                last = format!("{} {}", reply.status, reply.text());
                // Nothing but an honest refusal meanwhile.
                assert!(matches!(reply.status, 502..=504), "{last}");
                false
            }
            Err(err) => {
                last = err.to_string();
                false
            }
        }
    })
    .map_err(|err| err.context(last.clone()))?;
    assert!(last.contains(init_id), "it comes from its template: {last}");
    Ok(())
}

fn init_id(machine: &Machine, name: &str) -> anyhow::Result<String> {
    let body = machine.call(name)?.json()?;
    Ok(body["init_id"].as_str().unwrap_or("no init_id").to_owned())
}

#[test]
fn a_killed_provider_finds_its_functions_and_sandboxes_again() -> anyhow::Result<()> {
    let mut machine = Machine::start()?;
    machine.deploy("hello-python")?;
    let id = init_id(&machine, "hello-python")?;
    let before = machine.leftovers().count("processes");
    for _ in 0..3 {
        machine.kill_provider();
        machine.start_provider()?;
        assert_eq!(machine.describe("hello-python")?["status"], "ready");
        served_again(&machine, "hello-python", &id)?;
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
    machine.deploy("hello-python")?;
    let id = init_id(&machine, "hello-python")?;
    machine.scale("hello-python", 50)?;
    let old: Vec<i32> = machine
        .sandboxes()?
        .iter()
        .map(|sandbox| sandbox.init_pid)
        .collect();
    assert!(old.len() >= 50, "{}", old.len());
    crash(&machine.pids_of("containerd-shim-trenv-v2"));
    served_again(&machine, "hello-python", &id)?;
    until("the old sandboxes to go", PATIENCE, || {
        let inits = machine.pids_of("trenv-init");
        old.iter().all(|pid| !inits.contains(pid))
    })?;
    machine.stop()
}

#[test]
fn a_killed_zygote_is_built_again() -> anyhow::Result<()> {
    let machine = Machine::start()?;
    machine.deploy("hello-python")?;
    let id = init_id(&machine, "hello-python")?;
    for _ in 0..3 {
        crash(&machine.pids_of("trenv-zygote"));
        machine.scale("hello-python", 0)?;
        served_again(&machine, "hello-python", &id)?;
    }
    machine.stop()
}

#[test]
fn a_killed_init_ends_its_sandbox_only() -> anyhow::Result<()> {
    let machine = Machine::start()?;
    machine.deploy("hello-python")?;
    machine.deploy("json-python")?;
    let id = init_id(&machine, "hello-python")?;
    let sandbox = machine.serving()?;
    let other = init_id(&machine, "json-python")?;
    crash(&[sandbox.init_pid]);
    served_again(&machine, "hello-python", &id)?;
    served_again(&machine, "json-python", &other)?;
    machine.stop()
}

#[test]
fn containerd_restarts_under_running_functions() -> anyhow::Result<()> {
    let mut machine = Machine::start()?;
    machine.deploy("hello-python")?;
    let id = init_id(&machine, "hello-python")?;
    machine.restart_containerd()?;
    served_again(&machine, "hello-python", &id)?;
    machine.scale("hello-python", 0)?;
    served_again(&machine, "hello-python", &id)?;
    machine.stop()
}
