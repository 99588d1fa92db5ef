//! Instances that are restored ahead: the call that comes next finds one, whoever else is called, and
//! whatever dies.

use std::time::Duration;

use anyhow::Context;
use trenv_tests::{Machine, Settings, until};

const PATIENCE: Duration = Duration::from_secs(20);

fn parked(machine: &Machine, name: &str) -> usize {
    let all = machine.sandboxes().unwrap_or_default();
    let of_it = |tenancy: &str| tenancy.starts_with(&format!("{name}-"));
    all.iter()
        .filter(|one| one.state == "parked" && of_it(&one.tenancy))
        .count()
}

/// Starts an instance by a call and ends it again.
fn called_once(machine: &Machine, name: &str) -> anyhow::Result<String> {
    let reply = machine.call(name)?;
    assert_eq!(reply.status, 200, "{}", reply.text());
    machine.scale(name, 0)?;
    Ok(reply.start().to_owned())
}

#[test]
fn the_next_call_of_a_function_goes_on_where_it_was_parked() -> anyhow::Result<()> {
    let mut machine = Machine::start_with(&Settings {
        parked_instances: 1,
        idle_sandboxes: 2,
        ..Settings::default()
    })?;
    machine.deploy("hello-python")?;
    machine.deploy("hello-node")?;
    called_once(&machine, "hello-python")?;
    until("an instance is parked", PATIENCE, || {
        parked(&machine, "hello-python") == 1
    })?;
    // Another function takes an idle sandbox, and leaves the parked one alone.
    assert_eq!(called_once(&machine, "hello-node")?, "repurposed");
    assert_eq!(called_once(&machine, "hello-python")?, "parked");
    until("the next one is parked", PATIENCE, || {
        parked(&machine, "hello-python") == 1
    })?;

    // What is called more takes its place.
    for _ in 0..6 {
        called_once(&machine, "hello-node")?;
    }
    until("the other function is parked", PATIENCE, || {
        parked(&machine, "hello-node") == 1
    })?;
    assert_eq!(called_once(&machine, "hello-node")?, "parked");

    // One that is killed while it waits is replaced, and no call is lost.
    until("it is parked again", PATIENCE, || {
        parked(&machine, "hello-node") == 1
    })?;
    let all = machine.sandboxes()?;
    let held = all.iter().find(|one| one.state == "parked");
    trenv_tests::crash(&[held.context("nothing is parked")?.init_pid]);
    assert_eq!(machine.call("hello-node")?.status, 200);

    // A provider that comes back ends what it did not park itself.
    machine.kill_provider();
    machine.start_provider()?;
    assert_eq!(machine.call("hello-python")?.status, 200);
    Ok(())
}
