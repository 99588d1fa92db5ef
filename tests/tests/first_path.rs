//! The whole way of a call: deployed, cold, dumped, then warm and repurposed from its memory.

use anyhow::Context;
use serde_json::Value;
use trenv_tests::{Machine, Reply, SAMPLES, Sandbox};

/// A reply of a sample function: how it started, and what its memory says.
struct Answer {
    start: String,
    instance: String,
    init_id: String,
    counter: u64,
}

fn answer(reply: &Reply) -> anyhow::Result<Answer> {
    anyhow::ensure!(reply.status == 200, "{}: {}", reply.status, reply.text());
    let body = reply.json()?;
    Ok(Answer {
        start: reply.start().to_owned(),
        instance: reply.header("x-trenv-instance").to_owned(),
        init_id: body["init_id"].as_str().context("no init_id")?.to_owned(),
        counter: body["counter"].as_u64().context("no counter")?,
    })
}

#[test]
fn a_function_is_deployed_and_called_warm_and_repurposed_from_its_memory() -> anyhow::Result<()> {
    let machine = Machine::start()?;
    let described = machine.deploy("hello-python")?;
    assert_eq!(described["name"], "hello-python");

    let first = answer(&machine.call("hello-python")?)?;
    assert_ne!(first.start, "warm", "nothing was called before");
    assert!(!first.instance.is_empty());
    let second = answer(&machine.call("hello-python")?)?;
    assert_eq!(second.start, "warm");
    assert_eq!(second.instance, first.instance);
    assert_eq!(second.counter, first.counter + 1);
    assert_eq!(second.init_id, first.init_id);

    // Another tenancy begins where the template was taken, with the same memory.
    machine.scale("hello-python", 0)?;
    let again = answer(&machine.call("hello-python")?)?;
    assert_eq!(again.start, "repurposed");
    assert_eq!(
        again.init_id, first.init_id,
        "memory made at start is restored"
    );
    assert_eq!(
        again.counter, first.counter,
        "the counter goes on from the dump"
    );
    machine.stop()
}

#[test]
fn restored_memory_is_whole_many_times_over() -> anyhow::Result<()> {
    let machine = Machine::start()?;
    machine.deploy("hello-python")?;
    for turn in 0..20 {
        machine.scale("hello-python", 0)?;
        for sandbox in machine.sandboxes()? {
            machine.idle(&sandbox.id)?;
        }
        let reply = machine.anonymous("GET", "/function/hello-python?check=1", &[])?;
        assert_eq!(reply.status, 200, "turn {turn}: {}", reply.text());
        assert_eq!(reply.start(), "repurposed", "turn {turn}");
        assert_eq!(reply.json()?["intact"], true, "turn {turn}");
    }
    machine.stop()
}

#[test]
fn two_instances_of_one_template_never_see_each_others_writes() -> anyhow::Result<()> {
    let machine = Machine::start()?;
    machine.deploy("hello-python")?;
    machine.scale("hello-python", 2)?;
    let ready: Vec<Sandbox> = machine
        .sandboxes()?
        .into_iter()
        .filter(|sandbox| sandbox.state == "ready")
        .collect();
    assert_eq!(ready.len(), 2);
    let call = |sandbox: &Sandbox| -> anyhow::Result<Value> {
        let server = format!("{}:8080", sandbox.address).parse()?;
        let patience = std::time::Duration::from_secs(10);
        trenv_tests::http::request(server, "GET", "/?check=1", &[], &[], patience)?.json()
    };
    let start = call(&ready[0])?["counter"].as_u64().context("no counter")?;
    for step in 1..=5 {
        assert_eq!(call(&ready[0])?["counter"], start + step);
    }
    let other = call(&ready[1])?;
    assert_eq!(
        other["counter"], start,
        "the other instance has served nothing yet"
    );
    assert_eq!(other["intact"], true);
    assert_eq!(other["init_id"], call(&ready[0])?["init_id"]);
    machine.stop()
}

#[test]
fn one_sandbox_serves_four_functions_in_turn() -> anyhow::Result<()> {
    let machine = Machine::start()?;
    for name in SAMPLES {
        machine.deploy(name)?;
    }
    for name in SAMPLES {
        machine.scale(name, 0)?;
    }
    let mut before: Option<Sandbox> = None;
    let mut roots = Vec::new();
    for name in SAMPLES {
        let reply = machine.call(name)?;
        assert_eq!(reply.status, 200, "{name}: {}", reply.text());
        assert_eq!(reply.start(), "repurposed", "{name}");
        let sandbox = machine.serving()?;
        if let Some(before) = &before {
            assert_eq!(sandbox.id, before.id, "{name} is in another sandbox");
            assert_eq!(sandbox.init_pid, before.init_pid);
            assert_eq!(sandbox.address, before.address);
        }
        let spaces = ["net", "pid", "ipc", "uts"].map(|space| sandbox.namespace(space));
        assert!(spaces.iter().all(Option::is_some), "{name}: {spaces:?}");
        roots.push((spaces[0].clone(), spaces[1].clone()));
        containerd_tells_the_truth(&machine, &sandbox, name)?;
        machine.scale(name, 0)?;
        // The sandbox that became idle last is taken first.
        machine.idle(&sandbox.id)?;
        before = Some(sandbox);
    }
    roots.dedup();
    assert_eq!(roots.len(), 1, "network and pid namespace stay: {roots:?}");
    machine.stop()
}

/// `ctr` shows the function that is in the sandbox now, within a second.
fn containerd_tells_the_truth(
    machine: &Machine,
    sandbox: &Sandbox,
    name: &str,
) -> anyhow::Result<()> {
    let image = format!("docker.io/trenv/{name}:latest");
    trenv_tests::until(
        &format!("containerd to name {image}"),
        std::time::Duration::from_secs(1),
        || {
            let info = machine.ctr(&["container", "info", &sandbox.id]);
            info.is_ok_and(|text| text.contains(&image))
        },
    )?;
    let list = machine.ctr(&["task", "ls"])?;
    let line = list
        .lines()
        .find(|line| line.starts_with(&sandbox.id))
        .with_context(|| format!("{} is not in task ls", sandbox.id))?;
    assert!(line.contains("RUNNING"), "{line}");
    assert!(line.contains(&sandbox.init_pid.to_string()), "{line}");
    let processes = machine.ctr(&["task", "ps", &sandbox.id])?;
    assert!(processes.lines().count() > 2, "{name}: {processes}");
    let metrics = machine.ctr(&["task", "metrics", &sandbox.id])?;
    assert!(!metrics.trim().is_empty());
    let exec = format!("look-{name}");
    let hostname = [
        "task",
        "exec",
        "--exec-id",
        &exec,
        &sandbox.id,
        "cat",
        "/proc/1/comm",
    ];
    assert_eq!(machine.ctr(&hostname)?.trim(), "trenv-init");
    Ok(())
}

#[test]
fn killing_the_task_ends_the_function_and_the_next_call_is_served() -> anyhow::Result<()> {
    let machine = Machine::start()?;
    machine.deploy("hello-python")?;
    let first = answer(&machine.call("hello-python")?)?;
    let sandbox = machine.serving()?;
    machine.ctr(&["task", "kill", "-s", "SIGKILL", &sandbox.id])?;
    trenv_tests::until(
        "the sandbox to go",
        std::time::Duration::from_secs(10),
        || {
            machine
                .sandboxes()
                .is_ok_and(|all| all.iter().all(|other| other.id != sandbox.id))
        },
    )?;
    let next = answer(&machine.call("hello-python")?)?;
    assert_ne!(next.start, "warm");
    assert_eq!(next.init_id, first.init_id);
    machine.stop()
}
