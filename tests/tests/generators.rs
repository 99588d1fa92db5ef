//! Random state: what instances of one template share, and what the modules of the sample images
//! draw anew.

use anyhow::Context;
use serde_json::{Value, json};
use trenv_tests::{Machine, Sandbox};

const PYTHON: &str = include_str!("../functions/draw.py");
const NODE: &str = include_str!("../functions/draw.js");

/// Deploys a variant of a sample; its note, and what two instances from its template answer first.
fn deployed(
    machine: &Machine,
    sample: &str,
    name: &str,
    change: impl FnOnce(&mut Value),
) -> anyhow::Result<(String, Vec<Value>)> {
    let image = machine.variant(sample, name, change)?;
    let function = machine.deploy_as(&json!({ "service": name, "image": image }))?;
    assert_eq!(function["status"], "ready", "{function:#}");
    let note = function["template"]["notes"][0].as_str();
    let note = note
        .with_context(|| format!("no note in {function:#}"))?
        .to_owned();
    machine.scale(name, 0)?;
    machine.scale(name, 2)?;
    let sandboxes = machine.sandboxes()?;
    let serving = |sandbox: &&Sandbox| sandbox.state == "ready";
    let mut answers = Vec::new();
    for sandbox in sandboxes.iter().filter(serving) {
        let server = format!("{}:8080", sandbox.address).parse()?;
        let patience = std::time::Duration::from_secs(10);
        let reply = trenv_tests::http::request(server, "GET", "/", &[], &[], patience)?;
        answers.push(reply.json()?);
    }
    assert_eq!(answers.len(), 2, "{sandboxes:?}");
    machine.remove(name)?;
    Ok((note, answers))
}

/// The keys of what two instances drew, by whether they drew the same.
fn equal_draws(answers: &[Value]) -> anyhow::Result<Vec<&str>> {
    let first = answers[0]["draws"].as_object().context("no draws")?;
    assert!(first.len() >= 4, "{answers:?}");
    let equal = first
        .iter()
        .filter(|(key, value)| answers[1]["draws"][key.as_str()] == **value);
    Ok(equal.map(|(key, _)| key.as_str()).collect())
}

#[test]
fn instances_of_a_python_function_draw_differently() -> anyhow::Result<()> {
    let machine = Machine::start()?;
    let (note, answers) = deployed(&machine, "numpy-python", "draw", |config| {
        config["Cmd"] = json!(["python3", "-c", PYTHON]);
    })?;
    assert!(answers[0]["draws"]["numpy"].is_number(), "{answers:?}");
    assert!(note.starts_with("hash seeds shared"), "{note}");
    assert_eq!(equal_draws(&answers)?, [""; 0]);
    assert_eq!(answers[0]["hash"], answers[1]["hash"], "as the note says");
    assert_ne!(answers[0]["host"], answers[1]["host"]);

    // Without site-packages there is no module.
    let (note, answers) = deployed(&machine, "hello-python", "bare", |config| {
        config["Cmd"] = json!(["python3", "-S", "-c", PYTHON]);
    })?;
    assert!(
        note.starts_with("generators shared") && note.contains("/usr/bin/python3.11 ("),
        "{note}"
    );
    assert_eq!(equal_draws(&answers)?, ["choice", "openssl", "random"]);
    machine.stop()
}

#[test]
fn instances_of_a_node_function_draw_differently() -> anyhow::Result<()> {
    let machine = Machine::start()?;
    let (note, answers) = deployed(&machine, "hello-node", "draw", |config| {
        config["Cmd"] = json!(["node", "-e", NODE]);
    })?;
    assert!(note.starts_with("hash seeds shared"), "{note}");
    assert_eq!(equal_draws(&answers)?, [""; 0]);
    assert_ne!(answers[0]["host"], answers[1]["host"]);

    let (note, answers) = deployed(&machine, "hello-node", "bare", |config| {
        config["Cmd"] = json!(["node", "-e", NODE]);
        if let Some(environment) = config["Env"].as_array_mut() {
            environment.retain(|entry| !entry.as_str().unwrap_or_default().starts_with("NODE_"));
        }
    })?;
    assert!(note.starts_with("generators shared"), "{note}");
    let every = ["bytes", "int", "key", "random", "uuid"];
    assert_eq!(equal_draws(&answers)?, every);
    machine.stop()
}

#[test]
fn samples_behind_the_watchdog_draw_differently() -> anyhow::Result<()> {
    let machine = Machine::start()?;
    for sample in ["hello-python", "hello-node"] {
        let function = machine.deploy(sample)?;
        let note = function["template"]["notes"][0].as_str();
        assert!(
            note.is_some_and(|note| note.starts_with("hash seeds shared")),
            "{function:#}"
        );
    }
    machine.stop()
}
