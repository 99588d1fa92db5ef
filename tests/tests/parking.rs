//! Instances that are restored ahead: the call that comes next finds one, whoever else is called, and
//! whatever dies.

use std::time::Duration;

use anyhow::Context;
use serde_json::Value;
use trenv_tests::{Machine, Settings, until, until_some};

const PATIENCE: Duration = Duration::from_secs(20);
const SETTLED: Duration = Duration::from_millis(200);

fn parked(machine: &Machine, name: &str) -> usize {
    let all = machine.sandboxes().unwrap_or_default();
    let of_it = |tenancy: &str| tenancy.starts_with(&format!("{name}-"));
    all.iter()
        .filter(|one| one.state == "parked" && of_it(&one.tenancy))
        .count()
}

/// Waits until an instance is parked, and until the provider, which connects to it first, offers it.
fn wait_until_parked(machine: &Machine, name: &str) -> anyhow::Result<()> {
    until("an instance is parked", PATIENCE, || {
        parked(machine, name) == 1
    })?;
    std::thread::sleep(SETTLED);
    Ok(())
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
    wait_until_parked(&machine, "hello-python")?;
    // Another function takes an idle sandbox, and leaves the parked one alone.
    assert_eq!(called_once(&machine, "hello-node")?, "repurposed");
    assert_eq!(called_once(&machine, "hello-python")?, "parked");
    wait_until_parked(&machine, "hello-python")?;

    // What is called more takes its place.
    for _ in 0..6 {
        called_once(&machine, "hello-node")?;
    }
    wait_until_parked(&machine, "hello-node")?;
    assert_eq!(called_once(&machine, "hello-node")?, "parked");

    // One whose sandbox dies while it waits is given up, and the next call is served.
    wait_until_parked(&machine, "hello-node")?;
    let all = machine.sandboxes()?;
    let held = all.iter().find(|one| one.state == "parked");
    let held = held.context("nothing is parked")?.clone();
    trenv_tests::crash(&[held.init_pid]);
    until("the sandbox is given up", PATIENCE, || {
        let now = machine.sandboxes().unwrap_or_default();
        !now.iter().any(|one| one.id == held.id)
    })?;
    std::thread::sleep(SETTLED);
    assert_eq!(machine.call("hello-node")?.status, 200);

    // A provider that comes back ends what it did not park itself.
    machine.kill_provider();
    machine.start_provider()?;
    assert_eq!(machine.call("hello-python")?.status, 200);
    Ok(())
}

#[test]
fn the_benchmark_tells_what_parked_instances_cost() -> anyhow::Result<()> {
    let machine = Machine::start_with(&Settings {
        parked_instances: 1,
        ..Settings::default()
    })?;
    machine.deploy("hello-python")?;
    let arguments = [
        "bench",
        "start",
        "--json",
        "--functions=hello-python",
        "--repurposed=6",
        "--warm=0",
        "--evicted=0",
        "--cold=0",
        "--runc=0",
        "--instances=0",
        "--sandboxes=3",
    ];
    // On a busy machine none may be parked yet when the last call is over.
    let weighed = || -> Option<(u64, u64)> {
        let text = machine.tool("trenv", &arguments).ok()?;
        let report: Value = serde_json::from_str(&text).ok()?;
        let of_it = |what: &str| report[what]["hello-python"].as_u64();
        Some((of_it("parked_kb_each")?, of_it("image_bytes")?))
    };
    let (parked, image) = until_some("a parked instance is weighed", 6 * PATIENCE, weighed)?;
    // Its own memory: what is written, and no copy of the image.
    assert!(
        parked > 0 && parked << 10 < image,
        "{parked} KiB of {image} bytes"
    );
    Ok(())
}
