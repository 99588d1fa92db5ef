//! Start methods of deployed functions, and `trenv bench methods`.

use std::time::Duration;

use serde_json::{Value, json};
use trenv_tests::{Machine, until};

const ANNOTATION: &str = "dev.trenv.start-method";

fn update(machine: &Machine, method: &str) -> anyhow::Result<u16> {
    let before = machine.describe("hello-python")?;
    let body = json!({
        "service": "hello-python",
        "image": before["image"],
        "annotations": { ANNOTATION: method },
    });
    Ok(machine
        .request("PUT", "/system/functions", Some(&body))?
        .status)
}

fn start_again(machine: &Machine) -> anyhow::Result<String> {
    machine.scale("hello-python", 0)?;
    let reply = machine.call("hello-python")?;
    assert_eq!(reply.status, 200, "{}", reply.text());
    Ok(reply.start().to_owned())
}

#[test]
fn a_function_changes_its_start_method_and_keeps_its_template() -> anyhow::Result<()> {
    let mut machine = Machine::start()?;
    let before = machine.deploy("hello-python")?;
    assert_eq!(before["startMethod"], "template");
    let id = machine.init_id("hello-python")?;
    for method in ["copy", "lazy", "reap", "faasnap", "spice", "template"] {
        assert_eq!(update(&machine, method)?, 202, "{method}");
        let told = machine.describe("hello-python")?;
        assert_eq!(told["startMethod"], method);
        assert_eq!(told["annotations"][ANNOTATION], method);
        assert_eq!(told["templateId"], before["templateId"], "{method}");
        assert_eq!(start_again(&machine)?, "repurposed", "{method}");
        assert_eq!(machine.init_id("hello-python")?, id, "{method}");
    }
    assert_eq!(update(&machine, "quick")?, 400);
    assert_eq!(machine.describe("hello-python")?["startMethod"], "template");
    // It is stored with the function.
    assert_eq!(update(&machine, "copy")?, 202);
    machine.kill_provider();
    machine.start_provider()?;
    until("the function to be served", Duration::from_secs(20), || {
        machine.call("hello-python").is_ok_and(|r| r.status == 200)
    })?;
    let told = machine.describe("hello-python")?;
    assert_eq!(told["startMethod"], "copy");
    assert_eq!(told["templateId"], before["templateId"]);
    machine.stop()
}

#[test]
fn the_benchmark_compares_methods_and_puts_the_functions_own_back() -> anyhow::Result<()> {
    let machine = Machine::start()?;
    machine.deploy("hello-python")?;
    machine.deploy("hello-node")?;
    let chart = machine.directory().join("methods.svg");
    let text = machine.tool(
        "trenv",
        &[
            "bench",
            "methods",
            "--json",
            "--functions=hello-python,hello-node",
            "--methods=template,lazy,attach",
            "--starts=4",
            "--unmeasured=2",
            "--cold=2",
            "--runc=0",
            "--sandboxes=3",
            "--svg",
            &chart.to_string_lossy(),
        ],
    )?;
    let report: Value = serde_json::from_str(&text)?;
    assert_eq!(report["failures"], json!([]), "{report:#}");
    assert!(report["sandboxes"].as_u64() >= Some(3), "{report:#}");
    // The machine's pool is on no device.
    let unavailable = report["unavailable"]["attach"].as_str();
    let unavailable = unavailable.unwrap_or_default();
    assert!(unavailable.contains("docs/dax.md"), "{report:#}");
    for (index, name) in ["hello-python", "hello-node"].into_iter().enumerate() {
        let function = &report["functions"][index];
        assert_eq!(function["name"], name, "{report:#}");
        assert!(function["image_mb"].as_f64() > Some(1.0), "{report:#}");
        for (method, n) in [("template", 2), ("lazy", 2), ("cold", 1)] {
            let figures = &function["methods"][method];
            assert_eq!(figures["n"], n, "{name} {method}: {report:#}");
            assert_eq!(figures["failed"], 0, "{name} {method}: {report:#}");
            for key in [
                "p50_us",
                "p99_us",
                "first_call_us",
                "second_call_us",
                "private_kb",
                "shared_kb",
                "faults",
            ] {
                assert!(
                    figures[key].as_u64() > Some(0),
                    "{name} {method} {key}: {report:#}"
                );
            }
        }
        for key in ["faults", "first_call_faults"] {
            let faults = |method: &str| function["methods"][method][key].as_u64();
            assert!(faults("lazy") > faults("template"), "{key}: {report:#}");
        }
    }
    let chart = std::fs::read_to_string(chart)?;
    assert_eq!(chart.matches("<title>").count(), 6, "{chart}");
    let after = machine.describe("hello-node")?;
    assert_eq!(after["startMethod"], "template");
    assert!(after["annotations"][ANNOTATION].is_null(), "{after:#}");
    machine.stop()
}

#[test]
fn an_interrupted_benchmark_puts_the_start_method_back() -> anyhow::Result<()> {
    let machine = Machine::start()?;
    machine.deploy("hello-python")?;
    let arguments = ["bench", "methods", "--functions=hello-python", "--cold=0"];
    let ended = std::thread::scope(|scope| {
        let run = scope.spawn(|| machine.tool("trenv", &arguments));
        let changed = until("another start method", Duration::from_secs(60), || {
            machine
                .describe("hello-python")
                .is_ok_and(|told| told["startMethod"] == "copy")
        });
        for pid in machine.pids_of("trenv") {
            let pid = nix::unistd::Pid::from_raw(pid);
            let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT);
        }
        let ended = run.join();
        changed.map(|()| ended)
    })?;
    let ended = ended.map_err(|_| anyhow::anyhow!("the benchmark's thread panicked"))?;
    let reason = ended.expect_err("it was interrupted").to_string();
    assert!(reason.contains("Interrupted"), "{reason}");
    let after = machine.describe("hello-python")?;
    assert_eq!(after["startMethod"], "template");
    assert!(after["annotations"][ANNOTATION].is_null(), "{after:#}");
    machine.stop()
}
