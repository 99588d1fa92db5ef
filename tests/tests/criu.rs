//! The start methods `criu` and `criu-lazy`. CRIU needs things of the kernel that many machines lack;
//! there the methods are refused, and this program is run in a VM besides (docs/vm.md).

use std::process::Command;
use std::time::Duration;

use anyhow::Context;
use serde_json::{Value, json};
use trenv_tests::{Machine, Reply, Settings, until};

const NAME: &str = "hello-python";
const OTHER: &str = "json-python";
const METHODS: [&str; 8] = [
    "template",
    "copy",
    "lazy",
    "reap",
    "faasnap",
    "spice",
    "criu",
    "criu-lazy",
];

fn criu_works() -> bool {
    let check = Command::new("criu").arg("check").output();
    check.is_ok_and(|output| output.status.success())
}

fn set_method(machine: &Machine, method: &str) -> anyhow::Result<Reply> {
    let body = json!({
        "service": NAME,
        "image": format!("docker.io/trenv/{NAME}:latest"),
        "annotations": { "dev.trenv.start-method": method },
    });
    machine.request("PUT", "/system/functions", Some(&body))
}

/// Waits for the version that is made for a method.
fn built(machine: &Machine, method: &str) -> anyhow::Result<()> {
    until("the function to be built", Duration::from_secs(300), || {
        machine.describe(NAME).is_ok_and(|told| {
            told["update"] != "building"
                && (told["startMethod"] == method || told["status"] != "ready")
        })
    })?;
    let told = machine.describe(NAME)?;
    assert_eq!(
        told["startMethod"],
        method,
        "{told:#}\n{}",
        machine.last_words()
    );
    assert_eq!(
        told["status"],
        "ready",
        "{told:#}\n{}",
        machine.last_words()
    );
    Ok(())
}

/// Starts an instance by a call that has it compare its whole heap.
fn start(machine: &Machine) -> anyhow::Result<Value> {
    machine.scale(NAME, 0)?;
    let path = format!("/function/{NAME}?check=1");
    let reply = machine.anonymous("GET", &path, &[])?;
    let words = || format!("{}\n{}", reply.text(), machine.last_words());
    assert_eq!(reply.status, 200, "{}", words());
    assert_eq!(reply.start(), "repurposed", "{}", words());
    let steps = reply.header("x-trenv-steps").to_owned();
    let mut answer: Value = reply.json()?;
    assert_eq!(answer["intact"], true, "{answer:#}");
    answer["steps"] = steps.into();
    Ok(answer)
}

/// Deploys a function that may take longer than ten seconds for a call, as pages that come one by one
/// do where processors are emulated.
fn deploy_patient(machine: &Machine, name: &str) -> anyhow::Result<()> {
    let body = json!({
        "service": name,
        "image": format!("docker.io/trenv/{name}:latest"),
        "envVars": { "exec_timeout": "60s" },
    });
    let reply = machine.request("POST", "/system/functions", Some(&body))?;
    assert_eq!(reply.status, 202, "{}", reply.text());
    until("a function to be ready", Duration::from_secs(120), || {
        machine
            .describe(name)
            .is_ok_and(|told| told["status"] == "ready")
    })
}

fn measure(machine: &Machine, options: &[&str]) -> anyhow::Result<Value> {
    let all = [&["bench", "methods", "--json"], options].concat();
    Ok(serde_json::from_str(&machine.tool("trenv", &all)?)?)
}

#[test]
fn where_criu_cannot_be_used_the_reason_is_told() -> anyhow::Result<()> {
    if criu_works() {
        eprintln!("SKIPPED: CRIU can be used on this machine");
        return Ok(());
    }
    let machine = Machine::start()?;
    machine.deploy(NAME)?;
    for method in ["criu", "criu-lazy"] {
        let reply = set_method(&machine, method)?;
        assert_eq!(reply.status, 400, "{}", reply.text());
        let reason = format!("The start method {method} cannot be used on this machine: ");
        assert!(reply.text().contains(&reason), "{}", reply.text());
    }
    assert_eq!(machine.describe(NAME)?["startMethod"], "template");
    let functions = format!("--functions={NAME}");
    let report = measure(
        &machine,
        &[
            &functions,
            "--methods=criu,template",
            "--starts=2",
            "--unmeasured=1",
            "--cold=0",
            "--runc=0",
        ],
    )?;
    let reason = report["unavailable"]["criu"]
        .as_str()
        .context("no reason")?;
    assert!(
        reason.contains("cannot be used on this machine"),
        "{reason}"
    );
    assert_eq!(
        report["functions"][0]["methods"]["template"]["n"], 2,
        "{report:#}"
    );
    machine.stop()
}

#[test]
fn a_function_starts_from_what_criu_has_dumped() -> anyhow::Result<()> {
    if !criu_works() {
        eprintln!("SKIPPED: CRIU cannot be used on this machine");
        return Ok(());
    }
    // Where processors are emulated everything takes its time.
    let machine = Machine::start_with(&Settings {
        ready_timeout_s: 300,
        disk: Some(3 << 30),
        ..Settings::default()
    })?;
    machine.deploy(NAME)?;
    let before = start(&machine)?;
    let mut answers = Vec::new();
    for method in ["criu", "criu-lazy"] {
        assert_eq!(set_method(&machine, method)?.status, 202);
        built(&machine, method)?;
        for _ in 0..2 {
            let answer = start(&machine)?;
            let steps = answer["steps"].as_str().unwrap_or_default();
            assert!(steps.contains("restore.criu"), "{steps}");
            answers.push(answer);
        }
    }
    // It was built once more, for CRIU's image, and that once for both methods.
    assert_ne!(answers[0]["init_id"], before["init_id"]);
    for answer in &answers {
        assert_eq!(answer["init_id"], answers[0]["init_id"]);
        assert_eq!(answer["counter"], answers[0]["counter"]);
    }
    // The template beside the image serves the other methods.
    assert_eq!(set_method(&machine, "template")?.status, 202);
    built(&machine, "template")?;
    assert_eq!(start(&machine)?["init_id"], answers[0]["init_id"]);

    // All rivals in one run. While one function starts cold, the other keeps the shim running.
    deploy_patient(&machine, OTHER)?;
    let functions = format!("--functions={NAME},{OTHER}");
    let methods = format!("--methods={}", METHODS.join(","));
    let report = measure(
        &machine,
        &[
            &functions,
            &methods,
            "--starts=20",
            "--unmeasured=3",
            "--cold=10",
            "--runc=4",
        ],
    )?;
    println!("{report:#}");
    assert_eq!(report["unavailable"], json!({}), "{report:#}");
    assert_eq!(report["failures"], json!([]), "{report:#}");
    for function in 0..2 {
        let figures = &report["functions"][function]["methods"];
        // Of another kind is a start that came before a sandbox was idle again.
        for (method, most) in METHODS
            .map(|method| (method, 10))
            .into_iter()
            .chain([("cold", 5), ("runc", 2)])
        {
            let n = figures[method]["n"].as_u64().unwrap_or(0);
            assert!((most / 2..=most).contains(&n), "{method}: {report:#}");
        }
    }
    let images = || -> anyhow::Result<usize> {
        let names = std::fs::read_dir(machine.directory().join("state/criu"))?;
        let names = names.flatten().map(|entry| entry.file_name());
        Ok(names
            .filter(|name| !name.to_string_lossy().starts_with("work-"))
            .count())
    };
    assert_eq!(images()?, 2);
    machine.remove(NAME)?;
    machine.remove(OTHER)?;
    until("CRIU's images to go", Duration::from_secs(60), || {
        images().is_ok_and(|left| left == 0)
    })
}
