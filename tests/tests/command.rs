//! `trenv`, the command for people, against a whole machine.

use anyhow::Context;
use serde_json::Value;
use trenv_tests::Machine;

const IMAGE: &str = "docker.io/trenv/hello-python:latest";

#[test]
fn every_verb_works_on_a_function_of_its_own() -> anyhow::Result<()> {
    let machine = Machine::start()?;
    let trenv = |arguments: &[&str]| machine.tool("trenv", arguments);
    assert!(trenv(&["list"])?.contains("No functions"));
    trenv(&["deploy", "--image", IMAGE, "--name", "mine", "-e", "A=b"])?;
    assert!(trenv(&["list"])?.contains("mine"));
    let described = trenv(&["describe", "mine"])?;
    assert!(described.contains(IMAGE), "{described}");
    assert!(described.contains("envVars.A"), "{described}");
    let reply: Value = serde_json::from_str(&trenv(&["invoke", "mine", "-d", "Ada"])?)?;
    assert_eq!(reply["message"], "Hello, Ada!");
    trenv(&["scale", "mine", "2"])?;
    let ps = trenv(&["ps"])?;
    assert_eq!(ps.matches("ready").count(), 2, "{ps}");
    assert!(trenv(&["pool", "stat"])?.contains("templates  1"));
    let templates: Value = serde_json::from_str(&trenv(&["pool", "ls", "--json"])?)?;
    let id = templates[0]["id"].as_str().context("no template")?;
    assert!(trenv(&["pool", "show", &id[..8]])?.contains(id));
    trenv(&["logs", "mine", "--tail", "5"])?;
    trenv(&["remove", "mine"])?;
    assert!(trenv(&["list"])?.contains("No functions"));
    for wrong in [
        &["describe", "mine"][..],
        &["remove", "mine"],
        &["invoke", "mine"],
    ] {
        let err = trenv(wrong).expect_err("the function is gone");
        assert!(err.to_string().contains("mine"), "{err}");
    }
    machine.stop()
}

#[test]
fn the_benchmark_reports_every_kind_of_start() -> anyhow::Result<()> {
    let machine = Machine::start()?;
    for name in ["hello-python", "hello-node"] {
        machine.deploy(name)?;
    }
    let text = machine.tool(
        "trenv",
        &[
            "bench",
            "start",
            "--json",
            "--functions=hello-python,hello-node",
            "--repurposed=4",
            "--warm=4",
            "--evicted=4",
            "--cold=4",
            "--runc=2",
            "--sandboxes=4",
            "--instances=3",
        ],
    )?;
    let report: Value = serde_json::from_str(&text)?;
    for kind in ["cold_runc", "cold_trenv", "repurposed", "evicted", "warm"] {
        assert!(report[kind]["n"].as_u64() > Some(0), "{kind}: {report:#}");
        assert_eq!(report[kind]["failed"], 0, "{kind}: {report:#}");
        assert!(report[kind]["p50_us"].as_u64() > Some(0), "{kind}");
    }
    assert!(
        report["steps"]["restore"]["n"].as_u64() > Some(0),
        "{report:#}"
    );
    let memory = &report["memory"]["hello-python"];
    assert_eq!(memory["instances"], 3, "{memory:#}");
    assert!(memory["image_kb"].as_u64() > Some(0), "{memory:#}");
    let ratio = memory["ratio"].as_f64().context("no ratio")?;
    assert!(
        ratio < 2.0,
        "instances share their template's pages: {memory:#}"
    );
    machine.stop()
}
