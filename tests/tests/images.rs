//! Images that change under a function, and images that never serve.

use serde_json::json;
use trenv_tests::{Machine, Reply, Settings};

const SECONDS: u64 = 3;

fn quick() -> Settings {
    Settings {
        ready_timeout_s: SECONDS,
        ..Settings::default()
    }
}

/// The server's image under one name, with another environment each time.
fn tag(machine: &Machine, mark: &str) -> anyhow::Result<String> {
    machine.variant("hello-python", "tagged", |config| {
        let source = format!("{}\n# {mark}\n", trenv_tests::SERVER);
        config["Cmd"] = json!(["python3", "-c", source]);
        if let Some(environment) = config["Env"].as_array_mut() {
            environment.push(json!(format!("MARK={mark}")));
        }
    })
}

fn mark_of(reply: &Reply) -> anyhow::Result<String> {
    anyhow::ensure!(reply.status == 200, "{}: {}", reply.status, reply.text());
    Ok(reply.json()?["mark"]
        .as_str()
        .unwrap_or_default()
        .to_owned())
}

#[test]
fn a_function_stays_on_its_image_when_the_name_is_given_to_another() -> anyhow::Result<()> {
    let machine = Machine::start()?;
    let image = tag(&machine, "old")?;
    let body = json!({ "service": "tagged", "image": image });
    let function = machine.deploy_as(&body)?;
    assert_eq!(function["status"], "ready", "{function:#}");
    let first = machine.call("tagged")?;
    assert_eq!(mark_of(&first)?, "old");

    assert_eq!(tag(&machine, "new")?, image);
    assert_eq!(mark_of(&machine.call("tagged")?)?, "old", "it runs on");
    for wanted in [0, 3] {
        machine.scale("tagged", wanted)?;
        let reply = machine.call("tagged")?;
        assert_eq!(mark_of(&reply)?, "old", "a new tenancy");
        assert_eq!(reply.json()?["init_id"], first.json()?["init_id"]);
    }

    let reply = machine.request("PUT", "/system/functions", Some(&body))?;
    assert_eq!(reply.status, 202, "{}", reply.text());
    trenv_tests::until("the new image", std::time::Duration::from_secs(30), || {
        let reply = machine.call("tagged");
        // Whichever serves meanwhile, the call is answered.
        reply.is_ok_and(|reply| mark_of(&reply).is_ok_and(|mark| mark == "new"))
    })?;
    machine.scale("tagged", 0)?;
    assert_eq!(mark_of(&machine.call("tagged")?)?, "new");
    machine.stop()
}

#[test]
fn an_image_that_never_listens_fails_with_the_reason() -> anyhow::Result<()> {
    let machine = Machine::start_with(&quick())?;
    for (name, command, expected) in [
        ("sleeps", json!(["sleep", "1000"]), "8080"),
        ("ends", json!(["true"]), "status 0"),
        (
            "says-why",
            json!(["sh", "-c", "echo no luck; exit 7"]),
            "no luck",
        ),
        (
            "is-missing",
            json!(["/no/such/program"]),
            "/no/such/program",
        ),
    ] {
        let image = machine.variant("hello-python", name, |config| config["Cmd"] = command)?;
        let function = machine.deploy_as(&json!({ "service": name, "image": image }))?;
        assert_eq!(function["status"], "failed", "{function:#}");
        let reason = function["reason"].as_str().unwrap_or_default();
        assert!(reason.contains(expected), "{name}: {reason}");
        let reply = machine.call(name)?;
        assert!(reply.status >= 500, "{name}: {}", reply.status);
        assert!(reply.text().contains(expected), "{name}: {}", reply.text());
    }
    machine.stop()
}

#[test]
fn a_function_that_answers_only_errors_serves_them_unless_it_names_a_check() -> anyhow::Result<()> {
    let machine = Machine::start_with(&quick())?;
    let image = machine.server_image()?;
    let deploy = |name: &str, status: &str, check: Option<&str>| {
        let annotations = match check {
            Some(path) => json!({ "com.openfaas.ready.http.path": path }),
            None => json!({}),
        };
        machine.deploy_as(&json!({
            "service": name,
            "image": image,
            "envVars": { "STATUS": status },
            "annotations": annotations,
        }))
    };
    // An answer is an answer: what it says is between the function and its callers.
    for status in ["404", "500"] {
        let name = format!("answers-{status}");
        let function = deploy(&name, status, None)?;
        assert_eq!(function["status"], "ready", "{function:#}");
        for _ in 0..2 {
            let reply = machine.call(&name)?;
            assert_eq!(reply.status.to_string(), status, "{}", reply.text());
            assert!(reply.json()?["init_id"].is_string());
            machine.scale(&name, 0)?;
        }
    }
    // What says that it is not ready, or fails the check that it names itself, is not.
    for (name, status, check) in [("busy", "503", None), ("unwell", "500", Some("/check"))] {
        let function = deploy(name, status, check)?;
        assert_eq!(function["status"], "failed", "{function:#}");
        let reason = function["reason"].as_str().unwrap_or_default();
        assert!(reason.contains("health check"), "{name}: {reason}");
        assert!(machine.call(name)?.status >= 500);
    }
    machine.stop()
}
