//! Functions that are made from a base: what they share, and what they do without it.

use std::time::Duration;

use anyhow::{Context, ensure};
use serde_json::{Value, json};
use trenv_tests::{Machine, PAGE, Settings, until};

const PATIENCE: Duration = Duration::from_secs(30);

fn image(sample: &str) -> String {
    format!("docker.io/trenv/{sample}:latest")
}

/// Deploys a sample under a name, made from a base.
fn deploy(machine: &Machine, name: &str, sample: &str, base: &str) -> anyhow::Result<Value> {
    let annotations = json!({ "dev.trenv.base": base });
    deploy_with(machine, name, sample, &annotations)
}

fn deploy_with(
    machine: &Machine,
    name: &str,
    sample: &str,
    annotations: &Value,
) -> anyhow::Result<Value> {
    let image = image(sample);
    machine.deploy_as(&json!({ "service": name, "image": image, "annotations": annotations }))
}

fn ready(machine: &Machine, function: &Value, base: &str) -> anyhow::Result<()> {
    let made_from = &function["template"]["base"];
    ensure!(
        function["status"] == "ready" && *made_from == *base,
        "{function:#}\n{}",
        machine.last_words()
    );
    Ok(())
}

fn answer(machine: &Machine, name: &str) -> anyhow::Result<Value> {
    let reply = machine.anonymous("GET", &format!("/function/{name}?check=1"), &[])?;
    ensure!(reply.status == 200, "{} {}", reply.status, reply.text());
    let mut answer = reply.json()?;
    answer["start"] = json!(reply.start());
    Ok(answer)
}

/// Bytes in the pool, and bytes that sharing saves there.
struct PoolStat {
    stored: u64,
    shared: u64,
}

fn pool_stat(machine: &Machine) -> anyhow::Result<PoolStat> {
    let stat: Value = serde_json::from_str(&machine.tool("trenv", &["pool", "stat", "--json"])?)?;
    let bytes = |name: &str| stat[name].as_u64().context("no such figure");
    Ok(PoolStat {
        stored: bytes("storedBytes")?,
        shared: bytes("sharedBytes")?,
    })
}

#[test]
fn ten_functions_of_a_base_need_half_the_memory_of_ten_alone() -> anyhow::Result<()> {
    let machine = Machine::start_with(&Settings {
        pool_size: 2 << 30,
        ..Settings::default()
    })?;
    let alone = machine.deploy("hello-python")?;
    let alone = alone["template"]["imageBytes"]
        .as_u64()
        .context("no image")?;
    let before = pool_stat(&machine)?.stored;
    let base = machine.deploy("base-python")?;
    let mut all = machine.zygote_frames(&base)?;
    for number in 0..10 {
        let name = format!("f{number}");
        let function = deploy(&machine, &name, "hello-python", "base-python")?;
        ready(&machine, &function, "base-python")?;
        let own = machine.zygote_frames(&function)?;
        let fresh = own.difference(&all).count();
        println!("{name}: {} pages, {fresh} of its own", own.len());
        all.extend(own);
        let answer = answer(&machine, &name)?;
        assert_eq!(answer["start"], "repurposed", "{answer}");
        machine.scale(&name, 0)?;
    }
    let memory = all.len() as u64 * PAGE;
    let images = 10 * alone;
    println!(
        "with a base {} KiB, by themselves {} KiB",
        memory >> 10,
        images >> 10
    );
    assert!(memory * 2 < images, "{memory} of {images}");
    let stat = pool_stat(&machine)?;
    let stored = stat.stored - before;
    println!(
        "in the pool {} KiB, and {} KiB of pages that several have are not stored again",
        stored >> 10,
        stat.shared >> 10
    );
    assert!(stored * 5 < images * 2, "{stored} of {images}");
    // The base's pages stay as long as a function has them.
    machine.remove("base-python")?;
    let id = base["templateId"].as_str().context("no template")?;
    until(
        "the base's template is gone from the pool",
        PATIENCE,
        || {
            let listed = machine.tool("trenv", &["pool", "ls", "--json"]);
            listed.is_ok_and(|listed| !listed.contains(id))
        },
    )?;
    assert!(
        stat.stored - pool_stat(&machine)?.stored
            < base["template"]["storedBytes"].as_u64().unwrap_or(0)
    );
    let verified = machine.tool("trenv", &["snapshot", "verify"])?;
    println!("{verified}");
    for number in 0..10 {
        assert_eq!(answer(&machine, &format!("f{number}"))?["intact"], true);
    }
    machine.stop()
}

#[test]
fn functions_of_a_base_answer_and_outlive_it() -> anyhow::Result<()> {
    let mut machine = Machine::start()?;
    let base = machine.deploy("base-python")?;
    machine.deploy("base-node")?;
    let python = deploy(&machine, "hello", "hello-python", "base-python")?;
    ready(&machine, &python, "base-python")?;
    let node = deploy(&machine, "node", "hello-node", "base-node")?;
    ready(&machine, &node, "base-node")?;
    let mut first = Vec::new();
    for name in ["hello", "node"] {
        // Two beside each other, from one memory.
        machine.scale(name, 2)?;
        let one = answer(&machine, name)?;
        assert_eq!(
            (&one["intact"], &one["counter"]),
            (&json!(true), &json!(1)),
            "{one}"
        );
        machine.scale(name, 0)?;
        first.push((name, one["init_id"].clone()));
    }
    // Another base takes the place of theirs; they stay what they are, also on a new provider.
    let other = json!({ "service": "base-python", "image": image("base-python"),
        "limits": { "memory": "200Mi" } });
    machine.deploy_as(&other)?;
    until("the base is another", PATIENCE, || {
        machine
            .describe("base-python")
            .is_ok_and(|now| now["templateId"] != base["templateId"] && now["update"].is_null())
    })?;
    machine.remove("base-node")?;
    machine.kill_provider();
    machine.start_provider()?;
    for (name, init) in &first {
        let now = answer(&machine, name)?;
        assert_eq!(
            (&now["init_id"], &now["counter"]),
            (init, &json!(1)),
            "{now}"
        );
    }
    // Deployed again, a function is made from the new one.
    let old = &python["template"]["generation"];
    let body = json!({ "service": "hello", "image": image("hello-python"),
        "annotations": { "dev.trenv.base": "base-python" } });
    machine.deploy_as(&body)?;
    until("the function is made anew", PATIENCE, || {
        machine.describe("hello").is_ok_and(|now| {
            now["template"]["generation"] != *old && ready(&machine, &now, "base-python").is_ok()
        })
    })?;
    assert_ne!(answer(&machine, "hello")?["init_id"], first[0].1);
    // Without its shim a function comes back from its own template.
    trenv_tests::crash(&machine.pids_of("containerd-shim-trenv-v2"));
    machine.served_again("node", first[1].1.as_str().context("no init_id")?)?;
    machine.stop()
}

#[test]
fn a_start_may_copy_the_base_and_load_the_function() -> anyhow::Result<()> {
    let machine = Machine::start()?;
    machine.deploy("base-python")?;
    let annotations = json!({
        "dev.trenv.base": "base-python",
        "dev.trenv.start-method": "copy-base",
    });
    let function = deploy_with(&machine, "hello", "hello-python", &annotations)?;
    ready(&machine, &function, "base-python")?;
    let one = answer(&machine, "hello")?;
    assert_eq!(
        (&one["intact"], &one["start"]),
        (&json!(true), &json!("repurposed"))
    );
    machine.scale("hello", 0)?;
    // Each start makes the function's memory anew.
    let two = answer(&machine, "hello")?;
    assert_eq!(two["intact"], true);
    assert_ne!(one["init_id"], two["init_id"]);
    // Beside the others, in the benchmark.
    machine.scale("hello", 0)?;
    let text = machine.tool(
        "trenv",
        &[
            "bench",
            "methods",
            "--json",
            "--functions=hello",
            "--methods=template,copy,copy-base",
            "--starts=6",
            "--block=2",
            "--unmeasured=2",
            "--cold=0",
            "--runc=0",
        ],
    )?;
    let report: Value = serde_json::from_str(&text)?;
    assert_eq!(report["failures"], json!([]), "{report:#}");
    for method in ["template", "copy", "copy-base"] {
        let figures = &report["functions"][0]["methods"][method];
        assert_eq!(figures["n"], 6, "{method}: {report:#}");
        println!("{method}: P50 {} us", figures["p50_us"]);
    }
    machine.stop()
}

#[test]
fn a_function_of_a_base_has_its_own_environment() -> anyhow::Result<()> {
    let machine = Machine::start()?;
    for (language, greeting) in [("python", "Good \"morning\""), ("node", "two\nlines=1")] {
        let (name, base) = (format!("hello-{language}"), format!("base-{language}"));
        machine.deploy(&base)?;
        let mut body = json!({ "service": name, "image": image(&name),
            "annotations": { "dev.trenv.base": base } });
        let message =
            || -> anyhow::Result<Value> { Ok(answer(&machine, &name)?["message"].clone()) };
        body["envVars"] = json!({ "greeting": greeting, "other": "" });
        ready(&machine, &machine.deploy_as(&body)?, &base)?;
        assert_eq!(message()?, format!("{greeting}, world!"));
        // In every instance, whatever a caller asks of it.
        machine.scale(&name, 2)?;
        let path = format!("/function/{name}/_/load");
        let taken = json!({ "environment": { "greeting": "Mine" } });
        let refused = machine.request("POST", &path, Some(&taken))?;
        ensure!(
            refused.status == 404,
            "{} {}",
            refused.status,
            refused.text()
        );
        assert_eq!(message()?, format!("{greeting}, world!"));
        // By a method that has the first call load it, a start is one of its own snapshot.
        body["annotations"]["dev.trenv.start-method"] = json!("copy-base");
        machine.deploy_as(&body)?;
        machine.scale(&name, 0)?;
        assert_eq!(message()?, format!("{greeting}, world!"));
    }
    machine.stop()
}

#[test]
fn what_cannot_be_made_from_a_base_is_told() -> anyhow::Result<()> {
    let machine = Machine::start()?;
    let refused = |body: &Value| -> anyhow::Result<String> {
        let reply = machine.request("POST", "/system/functions", Some(body))?;
        ensure!(reply.status == 400, "{} {}", reply.status, reply.text());
        Ok(reply.text())
    };
    let with_base = |base: &str| {
        json!({ "service": "hello", "image": image("hello-python"),
            "annotations": { "dev.trenv.base": base } })
    };
    machine.deploy("base-python")?;
    let told = refused(&with_base("base-go"))?;
    ensure!(told.contains("base-go is not deployed"), "{told}");
    let mut other = with_base("base-python");
    other["envVars"] = json!({ "exec_timeout": "3s" });
    let told = refused(&other)?;
    ensure!(told.contains("variable exec_timeout"), "{told}");
    let mut plain = with_base("base-python");
    plain["image"] = json!(image("base-python"));
    // There is nothing to load in it.
    let failed = machine.deploy_as(&plain)?;
    ensure!(failed["status"] == "failed", "{failed:#}");
    let reason = failed["reason"].as_str().unwrap_or_default();
    ensure!(reason.contains("No module named 'handler'"), "{reason}");
    machine.stop()
}
