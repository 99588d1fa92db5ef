//! What users get wrong: a clear answer, and nothing left behind.

use std::time::Duration;

use serde_json::json;
use trenv_tests::{Machine, Settings};

#[test]
fn an_unknown_image_fails_with_its_name() -> anyhow::Result<()> {
    let machine = Machine::start()?;
    let body = json!({ "service": "ghost", "image": "docker.io/trenv/no-such-image:latest" });
    let reply = machine.request("POST", "/system/functions", Some(&body))?;
    if reply.status == 202 || reply.status == 200 {
        let function = machine.settled("ghost")?;
        assert_eq!(function["status"], "failed", "{function:#}");
        let reason = function["reason"].as_str().unwrap_or_default();
        assert!(reason.contains("no-such-image"), "{reason}");
        let reply = machine.call("ghost")?;
        assert!(reply.status >= 400, "{}", reply.status);
        assert!(reply.text().contains("no-such-image"), "{}", reply.text());
    } else {
        assert!((400..500).contains(&reply.status), "{}", reply.status);
        assert!(reply.text().contains("no-such-image"), "{}", reply.text());
    }
    machine.stop()
}

#[test]
fn requests_that_make_no_sense_are_refused() -> anyhow::Result<()> {
    let machine = Machine::start()?;
    let status = |method: &str, path: &str, body: Option<&serde_json::Value>| {
        machine
            .request(method, path, body)
            .map(|reply| reply.status)
    };
    let unknown = json!({ "service": "nobody", "image": "docker.io/trenv/hello-python:latest" });
    assert_eq!(status("PUT", "/system/functions", Some(&unknown))?, 404);
    assert_eq!(status("POST", "/system/functions", None)?, 400);
    assert_eq!(
        status("POST", "/system/functions", Some(&json!("text")))?,
        400
    );
    let nameless = json!({ "image": "docker.io/trenv/hello-python:latest" });
    assert_eq!(status("POST", "/system/functions", Some(&nameless))?, 400);
    let nasty = json!({ "service": "../x", "image": "docker.io/trenv/hello-python:latest" });
    assert_eq!(status("POST", "/system/functions", Some(&nasty))?, 400);
    assert_eq!(status("GET", "/system/function/nobody", None)?, 404);
    let scale = json!({ "serviceName": "nobody", "replicas": 1 });
    assert_eq!(
        status("POST", "/system/scale-function/nobody", Some(&scale))?,
        404
    );
    let delete = json!({ "functionName": "nobody" });
    assert_eq!(status("DELETE", "/system/functions", Some(&delete))?, 404);
    assert_eq!(machine.call("nobody")?.status, 404);
    machine.stop()
}

#[test]
fn system_routes_need_the_password_and_others_do_not() -> anyhow::Result<()> {
    let machine = Machine::start()?;
    for path in ["/system/functions", "/system/info", "/system/namespaces"] {
        assert_eq!(machine.anonymous("GET", path, &[])?.status, 401, "{path}");
        assert_eq!(machine.request("GET", path, None)?.status, 200, "{path}");
    }
    assert_eq!(machine.anonymous("GET", "/healthz", &[])?.status, 200);
    machine.stop()
}

#[test]
fn a_function_that_never_gets_ready_fails_with_the_reason() -> anyhow::Result<()> {
    let settings = Settings {
        ready_timeout_s: 3,
        ..Settings::default()
    };
    let machine = Machine::start_with(&settings)?;
    for (name, process) in [("crashes", "false"), ("sleeps", "sleep 1000")] {
        let body = json!({
            "service": name,
            "image": "docker.io/trenv/hello-python:latest",
            "envProcess": process,
        });
        let reply = machine.request("POST", "/system/functions", Some(&body))?;
        assert_eq!(reply.status, 202, "{}", reply.text());
        let function = machine.settled(name)?;
        assert_eq!(function["status"], "failed", "{function:#}");
        let reason = function["reason"].as_str().unwrap_or_default();
        assert!(!reason.is_empty());
        assert!(machine.call(name)?.status >= 500);
        machine.remove(name)?;
    }
    machine.stop()
}

#[test]
fn a_second_provider_on_the_same_state_is_refused() -> anyhow::Result<()> {
    let machine = Machine::start()?;
    let second = machine.tool("trenv-provider", &[]);
    let err = second.expect_err("two providers must not run on one state");
    assert!(err.to_string().contains("failed:"), "{err}");
    assert_eq!(machine.anonymous("GET", "/healthz", &[])?.status, 200);
    machine.stop()
}

#[test]
fn a_pool_that_is_too_small_lets_functions_serve_cold_and_says_so() -> anyhow::Result<()> {
    let settings = Settings {
        pool_size: 16 << 20,
        ..Settings::default()
    };
    let machine = Machine::start_with(&settings)?;
    machine.deploy_only("image-node", "docker.io/trenv/image-node:latest")?;
    let function = machine.settled("image-node")?;
    assert_eq!(function["status"], "serving-cold", "{function:#}");
    let reason = function["reason"]
        .as_str()
        .unwrap_or_default()
        .to_lowercase();
    assert!(reason.contains("pool"), "{reason}");
    let reply = machine.call("image-node")?;
    assert_eq!(reply.status, 200, "{}", reply.text());
    machine.stop()
}

#[test]
fn a_function_that_dies_in_a_call_gives_502_and_the_next_call_is_served() -> anyhow::Result<()> {
    let machine = Machine::start()?;
    machine.deploy("hello-python")?;
    assert_eq!(machine.call("hello-python")?.status, 200);
    let sandbox = machine.serving()?;
    machine.ctr(&["task", "kill", "-s", "SIGKILL", &sandbox.id])?;
    // Whether the call meets the dying instance or the next one, the answer is an HTTP answer.
    let reply = machine.call("hello-python")?;
    assert!(
        matches!(reply.status, 200 | 502),
        "{} {}",
        reply.status,
        reply.text()
    );
    trenv_tests::until("a good answer", Duration::from_secs(10), || {
        machine
            .call("hello-python")
            .is_ok_and(|reply| reply.status == 200)
    })?;
    machine.stop()
}

#[test]
fn an_image_may_be_removed_while_its_function_serves() -> anyhow::Result<()> {
    let machine = Machine::start()?;
    let described = machine.deploy("hello-python")?;
    let image = described["image"].as_str().unwrap_or_default().to_owned();
    assert_eq!(machine.call("hello-python")?.status, 200);
    machine.ctr(&["images", "rm", "--sync", &image])?;
    // The layers are held by a lease: new tenancies and new sandboxes are made of them as before.
    for _ in 0..3 {
        machine.scale("hello-python", 0)?;
        let reply = machine.anonymous("GET", "/function/hello-python?check=1", &[])?;
        assert_eq!(reply.status, 200, "{}", reply.text());
        assert_eq!(reply.json()?["intact"], true);
    }
    machine.stop()
}
