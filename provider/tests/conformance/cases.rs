//! The cases.

use std::future::Future;
use std::pin::Pin;
use std::time::{Duration, Instant};

use axum::body::Body;
use http::Method;
use http_body_util::BodyExt;
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::machine::{Machine, NAMESPACE, Reply};
use crate::stand_in::REFUSAL;
use crate::usage::usage_is_what_the_instances_use;

pub type Outcome = Result<(), String>;
type Run = for<'a> fn(&'a mut Machine) -> Pin<Box<dyn Future<Output = Outcome> + 'a>>;

pub struct Case {
    pub name: &'static str,
    pub run: Run,
}

macro_rules! cases {
    ($($name:ident),* $(,)?) => {
        pub const ALL: &[Case] = &[$(Case { name: stringify!($name), run: |m| Box::pin($name(m)) }),*];
    };
}

cases!(
    system_routes_need_credentials,
    open_routes_do_not,
    info_and_namespaces,
    bad_deployments_are_refused,
    unknown_functions_are_404,
    a_function_is_deployed_called_and_removed,
    a_function_that_cannot_be_dumped_says_why,
    calls_carry_path_query_headers_and_body,
    replies_stream,
    warm_calls_are_told,
    environment_and_secrets_reach_the_function,
    an_image_user_is_looked_up_and_layers_are_unpacked,
    a_function_that_crashes_fails_with_the_reason,
    a_failed_update_leaves_the_old_version,
    an_update_takes_over,
    a_change_of_labels_builds_nothing,
    a_death_in_a_call_is_502_and_the_next_is_served,
    a_slow_call_is_504,
    a_removed_image_keeps_running,
    logs_are_told,
    secrets_are_managed,
    a_second_provider_is_refused,
    functions_survive_a_restart,
    metrics_count,
    usage_is_what_the_instances_use,
);

pub fn function(name: &str) -> Value {
    json!({ "service": name, "image": "test/function" })
}

pub fn expect(what: &str, reply: &Reply, status: u16) -> Outcome {
    match reply.status.as_u16() == status {
        true => Ok(()),
        false => Err(format!(
            "{what}: {} instead of {status}: {}",
            reply.status,
            reply.text()
        )),
    }
}

#[allow(clippy::needless_pass_by_value)] // both sides are mostly temporaries
pub fn same<T: PartialEq + std::fmt::Debug>(what: &str, got: T, wanted: T) -> Outcome {
    match got == wanted {
        true => Ok(()),
        false => Err(format!("{what}: {got:?} instead of {wanted:?}")),
    }
}

fn holds(what: &str, text: &str, part: &str) -> Outcome {
    match text.contains(part) {
        true => Ok(()),
        false => Err(format!("{what}: no {part:?} in {text}")),
    }
}

async fn system_routes_need_credentials(m: &mut Machine) -> Outcome {
    for path in [
        "/system/functions",
        "/system/info",
        "/system/secrets",
        "/system/namespaces",
    ] {
        let reply = m.send(Method::GET, path, &[], Body::empty()).await?;
        expect(path, &reply, 401)?;
        holds(path, reply.header("www-authenticate"), "Basic")?;
        let wrong = [("authorization", "Basic YWRtaW46d3Jvbmc=")];
        expect(
            path,
            &m.send(Method::GET, path, &wrong, Body::empty()).await?,
            401,
        )?;
        expect(path, &m.system(Method::GET, path, None).await?, 200)?;
    }
    Ok(())
}

async fn open_routes_do_not(m: &mut Machine) -> Outcome {
    for path in ["/healthz", "/metrics"] {
        expect(
            path,
            &m.send(Method::GET, path, &[], Body::empty()).await?,
            200,
        )?;
    }
    expect(
        "a path of nothing",
        &m.system(Method::GET, "/nothing", None).await?,
        404,
    )
}

async fn info_and_namespaces(m: &mut Machine) -> Outcome {
    let info = m.system(Method::GET, "/system/info", None).await?.json();
    same("name", info["provider"]["name"].as_str(), Some("trenv"))?;
    same(
        "orchestration",
        info["provider"]["orchestration"].as_str(),
        Some("containerd"),
    )?;
    let path = "/system/namespace/second";
    expect("unknown", &m.system(Method::GET, path, None).await?, 404)?;
    expect("created", &m.system(Method::POST, path, None).await?, 201)?;
    expect("exists", &m.system(Method::POST, path, None).await?, 409)?;
    expect("known", &m.system(Method::GET, path, None).await?, 200)?;
    expect("updated", &m.system(Method::PUT, path, None).await?, 202)?;
    let all = m
        .system(Method::GET, "/system/namespaces", None)
        .await?
        .json();
    same("namespaces", all, json!([NAMESPACE, "second"]))?;
    expect("removed", &m.system(Method::DELETE, path, None).await?, 202)?;
    let all = m
        .system(Method::GET, "/system/namespaces", None)
        .await?
        .json();
    same("namespaces", all, json!([NAMESPACE]))
}

async fn bad_deployments_are_refused(m: &mut Machine) -> Outcome {
    let path = "/system/functions";
    expect("no body", &m.system(Method::POST, path, None).await?, 400)?;
    let mut bad = vec![
        json!("text"),
        json!({ "image": "test/function" }),
        json!({ "service": "x" }),
        json!({ "service": "../x", "image": "test/function" }),
        json!({ "service": "x", "image": "test/nothing" }),
    ];
    let mut with = |key: &str, value: Value| {
        let mut body = function("x");
        body[key] = value;
        bad.push(body);
    };
    with("namespace", json!("not-there"));
    with("namespace", json!("Not Valid"));
    with("secrets", json!(["not-there"]));
    with("limits", json!({ "memory": "much" }));
    with("annotations", json!({ "dev.trenv.concurrency": "-1" }));
    with("annotations", json!({ "dev.trenv.start-method": "quick" }));
    for body in bad {
        let reply = m.system(Method::POST, path, Some(body.clone())).await?;
        expect(&body.to_string(), &reply, 400)?;
        holds("an answer in JSON", &reply.json()["error"].to_string(), " ")?;
    }
    same(
        "leases",
        m.ctr(&["leases", "ls", "--quiet"])
            .unwrap_or_default()
            .trim(),
        "",
    )
}

async fn unknown_functions_are_404(m: &mut Machine) -> Outcome {
    let scale = json!({ "serviceName": "none", "replicas": 1 });
    let requests = [
        (Method::PUT, "/system/functions", Some(function("none"))),
        (
            Method::DELETE,
            "/system/functions",
            Some(json!({ "functionName": "none" })),
        ),
        (Method::GET, "/system/function/none", None),
        (Method::POST, "/system/scale-function/none", Some(scale)),
        (Method::GET, "/function/none", None),
        (Method::GET, "/function/none.elsewhere/path", None),
        (Method::GET, "/system/logs?name=none", None),
    ];
    for (method, path, body) in requests {
        expect(path, &m.system(method, path, body).await?, 404)?;
    }
    Ok(())
}

async fn a_function_is_deployed_called_and_removed(m: &mut Machine) -> Outcome {
    m.deploy(function("hello")).await?;
    let listed = m
        .system(Method::GET, "/system/functions", None)
        .await?
        .json();
    same("listed", listed[0]["name"].as_str(), Some("hello"))?;
    same(
        "namespace",
        listed[0]["namespace"].as_str(),
        Some(NAMESPACE),
    )?;
    expect("by name", &m.call("hello").await?, 200)?;
    expect(
        "with namespace",
        &m.call(&format!("hello.{NAMESPACE}/a")).await?,
        200,
    )?;
    let status = m
        .system(Method::GET, "/system/function/hello", None)
        .await?
        .json();
    same("calls", status["invocationCount"].as_u64(), Some(2))?;
    let body = json!({ "functionName": "hello" });
    expect(
        "removed",
        &m.system(Method::DELETE, "/system/functions", Some(body))
            .await?,
        202,
    )?;
    expect("after removal", &m.call("hello").await?, 404)?;
    m.remove_everything().await;
    same(
        "snapshots",
        m.ctr(&["leases", "ls", "--quiet"])
            .unwrap_or_default()
            .trim(),
        "",
    )
}

async fn a_function_that_cannot_be_dumped_says_why(m: &mut Machine) -> Outcome {
    let status = m.deploy(function("cold")).await?;
    same("status", status["status"].as_str(), Some("serving-cold"))?;
    holds("reason", &status["reason"].to_string(), REFUSAL)?;
    expect("it serves", &m.call("cold").await?, 200)
}

async fn calls_carry_path_query_headers_and_body(m: &mut Machine) -> Outcome {
    m.deploy(function("echo")).await?;
    let reply = m.call("echo/a/b%20c?d=e&f").await?;
    same("path", reply.text().as_str(), "GET /a/b%20c?d=e&f")?;
    same("root", m.call("echo").await?.text().as_str(), "GET /")?;
    let big = vec![7u8; 3 << 20];
    let reply = m
        .send(
            Method::POST,
            "/function/echo/echo",
            &[],
            Body::from(big.clone()),
        )
        .await?;
    same("body", reply.body.as_ref() == big.as_slice(), true)?;
    let mine = [("x-mine", "1"), ("x-call-id", "call-7")];
    let reply = m
        .send(Method::PUT, "/function/echo/headers", &mine, Body::empty())
        .await?;
    for part in [
        "x-mine: 1",
        "x-call-id: call-7",
        "x-start-time: ",
        "x-forwarded-host: 127.0.0.1:9080",
    ] {
        holds("headers", &reply.text(), part)?;
    }
    same("call id", reply.header("x-call-id"), "call-7")?;
    for header in ["x-start-time", "x-duration-seconds", "x-trenv-instance"] {
        same(header, reply.header(header).is_empty(), false)?;
    }
    let moved = m.call("echo/moved").await?;
    expect("a redirect passes through", &moved, 302)?;
    same("location", moved.header("location"), "/there")
}

async fn replies_stream(m: &mut Machine) -> Outcome {
    m.deploy(function("drip")).await?;
    let begun = Instant::now();
    let mut body = m
        .open(Method::GET, "/function/drip/drip", &[], Body::empty())
        .await?
        .into_body();
    let first = body
        .frame()
        .await
        .ok_or("no piece")?
        .map_err(|e| e.to_string())?;
    same(
        "first piece",
        first.data_ref().map(|d| d.as_ref()),
        Some(b"piece 0\n".as_ref()),
    )?;
    same(
        "at once",
        begun.elapsed() < Duration::from_millis(350),
        true,
    )?;
    // While it streams, its instance serves nobody else.
    let status = m
        .system(Method::GET, "/system/function/drip", None)
        .await?
        .json();
    same(
        "open calls",
        status["instances"][0]["calls"].as_u64(),
        Some(1),
    )?;
    drop(body);
    tokio::time::sleep(Duration::from_millis(100)).await;
    let status = m
        .system(Method::GET, "/system/function/drip", None)
        .await?
        .json();
    same(
        "after a cancelled call",
        status["instances"][0]["calls"].as_u64(),
        Some(0),
    )?;
    expect("next", &m.call("drip").await?, 200)
}

async fn warm_calls_are_told(m: &mut Machine) -> Outcome {
    m.deploy(function("warm")).await?;
    let first = m.call("warm/pid").await?;
    let second = m.call("warm/pid").await?;
    same("start", second.header("x-trenv-start"), "warm")?;
    same("process", first.text(), second.text())?;
    same(
        "instance",
        first.header("x-trenv-instance"),
        second.header("x-trenv-instance"),
    )?;
    let scale = json!({ "serviceName": "warm", "replicas": 0 });
    expect(
        "scaled",
        &m.system(Method::POST, "/system/scale-function/warm", Some(scale))
            .await?,
        202,
    )?;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let third = m.call("warm/pid").await?;
    same("from zero", third.header("x-trenv-start"), "cold")?;
    holds("steps", third.header("x-trenv-steps"), "ready")
}

async fn environment_and_secrets_reach_the_function(m: &mut Machine) -> Outcome {
    let secret = json!({ "name": "token", "value": "abc" });
    expect(
        "secret",
        &m.system(Method::POST, "/system/secrets", Some(secret))
            .await?,
        201,
    )?;
    let mut body = function("env");
    body["envProcess"] = json!("run this");
    body["envVars"] = json!({ "MODE": "test" });
    body["secrets"] = json!(["token"]);
    m.deploy(body).await?;
    for (name, value) in [
        ("MODE", "test"),
        ("fprocess", "run this"),
        ("FROM_IMAGE", "yes"),
    ] {
        same(
            name,
            m.call(&format!("env/env/{name}")).await?.text().as_str(),
            value,
        )?;
    }
    let read =
        |path: &'static str| m.send(Method::POST, "/function/env/file", &[], Body::from(path));
    same(
        "secret",
        read("/var/openfaas/secrets/token").await?.text().as_str(),
        "abc",
    )?;
    holds("hosts", &read("/etc/hosts").await?.text(), "localhost")?;
    expect("resolver", &read("/etc/resolv.conf").await?, 200)?;
    let body = json!({ "name": "token" });
    expect(
        "in use",
        &m.system(Method::DELETE, "/system/secrets", Some(body))
            .await?,
        409,
    )?;
    // A changed secret makes a new version of the functions that use it.
    let changed = json!({ "name": "token", "value": "changed" });
    expect(
        "changed",
        &m.system(Method::PUT, "/system/secrets", Some(changed))
            .await?,
        202,
    )?;
    m.settled("env").await?;
    let reply = m.send(
        Method::POST,
        "/function/env/file",
        &[],
        Body::from("/var/openfaas/secrets/token"),
    );
    same("changed secret", reply.await?.text().as_str(), "changed")?;
    m.remove_everything().await;
    let body = json!({ "name": "token" });
    expect(
        "deleted",
        &m.system(Method::DELETE, "/system/secrets", Some(body))
            .await?,
        202,
    )
}

async fn an_image_user_is_looked_up_and_layers_are_unpacked(m: &mut Machine) -> Outcome {
    m.deploy(json!({ "service": "user", "image": "docker.io/test/user:latest" }))
        .await?;
    same("user", m.call("user/uid").await?.text().as_str(), "1234")
}

async fn a_function_that_crashes_fails_with_the_reason(m: &mut Machine) -> Outcome {
    let mut body = function("crash");
    body["envVars"] = json!({ "crash": "1" });
    let status = m.deploy(body).await?;
    same("status", status["status"].as_str(), Some("failed"))?;
    holds("reason", &status["reason"].to_string(), "status 3")?;
    holds("reason", &status["reason"].to_string(), "ends at once")?;
    let reply = m.call("crash").await?;
    expect("a call", &reply, 503)?;
    holds("reason", &reply.text(), "status 3")
}

async fn a_failed_update_leaves_the_old_version(m: &mut Machine) -> Outcome {
    m.deploy(function("keep")).await?;
    let mut body = function("keep");
    body["envVars"] = json!({ "crash": "1" });
    expect(
        "update",
        &m.system(Method::PUT, "/system/functions", Some(body))
            .await?,
        202,
    )?;
    let status = m.settled("keep").await?;
    same("update", status["update"].as_str(), Some("failed"))?;
    holds("reason", &status["updateReason"].to_string(), "status 3")?;
    expect("the old version", &m.call("keep").await?, 200)
}

async fn an_update_takes_over(m: &mut Machine) -> Outcome {
    m.deploy(function("next")).await?;
    let mut body = function("next");
    body["envVars"] = json!({ "VERSION": "2" });
    expect(
        "update",
        &m.system(Method::PUT, "/system/functions", Some(body))
            .await?,
        202,
    )?;
    m.settled("next").await?;
    same(
        "version",
        m.call("next/env/VERSION").await?.text().as_str(),
        "2",
    )
}

async fn a_change_of_labels_builds_nothing(m: &mut Machine) -> Outcome {
    let mut body = function("labels");
    body["labels"] = json!({ "a": "b" });
    m.deploy(function("labels")).await?;
    expect(
        "update",
        &m.system(Method::PUT, "/system/functions", Some(body))
            .await?,
        202,
    )?;
    let status = m.settled("labels").await?;
    same("labels", status["labels"].clone(), json!({ "a": "b" }))
}

async fn a_death_in_a_call_is_502_and_the_next_is_served(m: &mut Machine) -> Outcome {
    m.deploy(function("mortal")).await?;
    expect("before", &m.call("mortal").await?, 200)?;
    let reply = m.call("mortal/die").await?;
    expect("the last call", &reply, 502)?;
    holds("reason", &reply.json()["error"].to_string(), "logs")?;
    expect("the next call", &m.call("mortal").await?, 200)
}

async fn a_slow_call_is_504(m: &mut Machine) -> Outcome {
    m.deploy(function("slow")).await?;
    expect("in time", &m.call("slow/slow/1000").await?, 200)?;
    expect("too late", &m.call("slow/slow/20000").await?, 504)?;
    expect("the next call", &m.call("slow").await?, 200)
}

async fn a_removed_image_keeps_running(m: &mut Machine) -> Outcome {
    m.deploy(function("orphan")).await?;
    let name = "docker.io/test/function:latest";
    m.ctr(&["images", "tag", name, "docker.io/test/kept:latest"])
        .ok_or("no tag")?;
    m.ctr(&["images", "rm", "--sync", name])
        .ok_or("not removed")?;
    let scale = json!({ "serviceName": "orphan", "replicas": 0 });
    m.system(Method::POST, "/system/scale-function/orphan", Some(scale))
        .await?;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let called = m.call("orphan").await;
    m.ctr(&["images", "tag", "docker.io/test/kept:latest", name])
        .ok_or("no tag")?;
    m.ctr(&["images", "rm", "docker.io/test/kept:latest"])
        .ok_or("not removed")?;
    expect("a new start", &called?, 200)
}

async fn logs_are_told(m: &mut Machine) -> Outcome {
    m.deploy(function("talks")).await?;
    let mut follow = m.follow("/system/logs?name=talks&follow=1").await?;
    m.call("talks/say/hello").await?;
    let followed = tokio::time::timeout(Duration::from_secs(5), async {
        let mut text = String::new();
        while let Some(Ok(frame)) = follow.frame().await {
            text.push_str(&String::from_utf8_lossy(
                frame.data_ref().map_or(&[][..], |d| d),
            ));
            if text.contains("hello") {
                return Some(text);
            }
        }
        None
    });
    let followed = followed
        .await
        .ok()
        .flatten()
        .ok_or("nothing was followed")?;
    holds("followed", &followed, "\"instance\":\"trenv-")?;
    // What an instance said is told after its end, too.
    expect("its end", &m.call("talks/die").await?, 502)?;
    m.call("talks/say/again").await?;
    for (query, wanted) in [
        ("", vec!["hello", "this function dies in a call", "again"]),
        ("&tail=1", vec!["again"]),
        ("&since=2999-01-01T00:00:00Z", vec![]),
    ] {
        let path = format!("/system/logs?name=talks{query}");
        let reply = m.system(Method::GET, &path, None).await?;
        let texts: Vec<String> = reply
            .text()
            .lines()
            .filter_map(|line| serde_json::from_str::<Value>(line).ok())
            .map(|line| line["text"].as_str().unwrap_or_default().to_owned())
            .collect();
        same(
            query,
            texts,
            wanted.into_iter().map(str::to_owned).collect(),
        )?;
    }
    expect(
        "a bad time",
        &m.system(Method::GET, "/system/logs?name=talks&since=5m", None)
            .await?,
        400,
    )
}

async fn secrets_are_managed(m: &mut Machine) -> Outcome {
    let path = "/system/secrets";
    let raw = json!({ "name": "raw", "rawValue": "AAEC" });
    expect(
        "create",
        &m.system(Method::POST, path, Some(raw)).await?,
        201,
    )?;
    let listed = m.system(Method::GET, path, None).await?.json();
    same(
        "list",
        listed,
        json!([{ "name": "raw", "namespace": NAMESPACE }]),
    )?;
    let bytes = std::fs::read(
        m.directory()
            .join("lib/provider/secrets")
            .join(NAMESPACE)
            .join("raw"),
    );
    same("bytes", bytes.ok(), Some(vec![0, 1, 2]))?;
    let unknown = json!({ "name": "none", "value": "x" });
    expect(
        "update",
        &m.system(Method::PUT, path, Some(unknown.clone())).await?,
        404,
    )?;
    expect(
        "delete",
        &m.system(Method::DELETE, path, Some(unknown)).await?,
        404,
    )?;
    let bad = json!({ "name": "../../x", "value": "x" });
    expect(
        "bad name",
        &m.system(Method::POST, path, Some(bad)).await?,
        400,
    )?;
    let gone = json!({ "name": "raw" });
    expect(
        "delete",
        &m.system(Method::DELETE, path, Some(gone)).await?,
        202,
    )
}

async fn a_second_provider_is_refused(m: &mut Machine) -> Outcome {
    let (success, words) = m.second_provider();
    same("success", success, false)?;
    holds("reason", &words, "Another provider")
}

async fn functions_survive_a_restart(m: &mut Machine) -> Outcome {
    m.deploy(function("lasting")).await?;
    m.system(Method::POST, "/system/functions", Some(function("half")))
        .await?;
    for signal in [Signal::SIGTERM, Signal::SIGKILL] {
        m.restart_provider(signal).await;
        m.settled("half").await?;
        let containers = m.ctr(&["containers", "ls", "--quiet"]).unwrap_or_default();
        same("containers", containers.lines().count() <= 1, true)?;
        expect("lasting", &m.call("lasting").await?, 200)?;
        expect("half", &m.call("half").await?, 200)?;
    }
    Ok(())
}

async fn metrics_count(m: &mut Machine) -> Outcome {
    m.deploy(function("counted")).await?;
    m.call("counted").await?;
    let text = m
        .send(Method::GET, "/metrics", &[], Body::empty())
        .await?
        .text();
    let name = format!("function_name=\"counted.{NAMESPACE}\"");
    holds(
        "calls",
        &text,
        &format!("gateway_function_invocation_total{{{name},code=\"200\"}} 1"),
    )?;
    holds(
        "instances",
        &text,
        &format!("gateway_service_count{{{name}}} 1"),
    )
}
