//! Inputs that calls name, and what is recorded of the pages that they touch.

use std::time::Duration;

use anyhow::Context;
use serde_json::{Value, json};
use trenv_tests::{Machine, until_some};

/// What `trenv snapshot show` tells of the only set of a template, once there is one.
fn working_set(machine: &Machine, template: &str) -> anyhow::Result<Value> {
    let show = || -> anyhow::Result<Value> {
        let shown = machine.tool("trenv", &["snapshot", "show", "--json", template])?;
        Ok(serde_json::from_str(&shown)?)
    };
    until_some("a working set", Duration::from_secs(20), || {
        let shown = show().ok()?;
        let sets = shown["workingSets"].as_array()?;
        (sets.len() == 1).then(|| shown.clone())
    })
}

#[test]
fn show_tells_what_was_recorded_in_the_order_of_first_use() -> anyhow::Result<()> {
    let machine = Machine::start()?;
    let body = json!({
        "service": "hello-python",
        "image": "docker.io/trenv/hello-python:latest",
        "annotations": { "dev.trenv.start-method": "reap" },
    });
    let function = machine.deploy_as(&body)?;
    let template = function["templateId"].as_str().context("no template")?;
    let shown = machine.tool("trenv", &["snapshot", "show", template])?;
    assert!(!shown.contains("reap"), "nothing is recorded yet: {shown}");

    machine.tool("trenv", &["invoke", "hello-python", "--input", "big"])?;
    machine.scale("hello-python", 0)?;
    let shown = working_set(&machine, template)?;
    let set = &shown["workingSets"][0];
    assert_eq!(
        (&set["method"], &set["input"]),
        (&json!("reap"), &json!("big"))
    );
    assert_eq!(
        (&set["rounds"], &set["firstUse"]),
        (&json!(1), &json!(true))
    );
    let ranges = set["ranges"].as_array().context("no ranges")?;
    let pages: Option<u64> = ranges.iter().map(|range| range["pages"].as_u64()).sum();
    assert!(pages > Some(100), "{set:#}");
    assert_eq!(pages, set["pages"].as_u64());
    let starts: Vec<_> = ranges.iter().map(|range| range["start"].as_u64()).collect();
    assert!(!starts.is_sorted(), "the order is that of addresses");
    let pids: Vec<_> = shown["processes"]
        .as_array()
        .context("no processes")?
        .iter()
        .map(|one| &one["pid"])
        .collect();
    for range in ranges {
        assert!(pids.contains(&&range["pid"]), "{range}");
        assert!(range["mapping"].is_string(), "{range}");
    }

    let text = machine.tool("trenv", &["snapshot", "show", template])?;
    assert!(text.contains("reap, input big, by first use"), "{text}");
    let first = format!("{:x}", starts[0].context("no start")?);
    assert!(text.contains(&first), "{text}");
    let more = format!("and {} ranges more", ranges.len() - 12);
    assert!(text.contains(&more), "{text}");
    machine.stop()
}

#[test]
fn benchmarks_name_the_input_of_their_calls() -> anyhow::Result<()> {
    let machine = Machine::start()?;
    machine.deploy("hello-python")?;
    let start = [
        "bench",
        "start",
        "--json",
        "--functions=hello-python",
        "--input=starts",
        "--repurposed=2",
        "--sandboxes=1",
        "--warm=1",
        "--evicted=0",
        "--cold=0",
        "--runc=0",
        "--instances=0",
    ];
    let methods = [
        "bench",
        "methods",
        "--json",
        "--functions=hello-python",
        "--methods=template",
        "--input=methods",
        "--starts=2",
        "--unmeasured=1",
        "--cold=0",
        "--runc=0",
    ];
    for (input, arguments) in [("starts", &start[..]), ("methods", &methods)] {
        let report: Value = serde_json::from_str(&machine.tool("trenv", arguments)?)?;
        assert_eq!(report["failures"], json!([]), "{report:#}");
        machine.scale("hello-python", 0)?;
        let sets = &machine.describe("hello-python")?["workingSets"];
        assert!(sets[input].is_object(), "{input}: {sets:#}");
    }
    machine.stop()
}
