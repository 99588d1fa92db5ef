//! Storage that fails: a full disk, pools that are wrong.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::time::Duration;

use serde_json::{Value, json};
use trenv_tests::{Machine, Reply, Settings, crash, until};

const PATIENCE: Duration = Duration::from_secs(30);
/// Where the pages of a pool begin in its file.
const DATA_OFFSET: u64 = 2 << 20;

/// A call of the sample with all of its memory compared with the digest of its start.
fn checked(machine: &Machine) -> anyhow::Result<Reply> {
    machine.anonymous("GET", "/function/hello-python?check=1", &[])
}

/// The function answers with its own memory, whole; anything but an answer is told.
fn intact(machine: &Machine, init_id: &Value) -> anyhow::Result<()> {
    let reply = checked(machine)?;
    anyhow::ensure!(reply.status == 200, "{}: {}", reply.status, reply.text());
    let body = reply.json()?;
    anyhow::ensure!(body["intact"] == true, "{body}");
    anyhow::ensure!(&body["init_id"] == init_id, "{body}");
    Ok(())
}

/// The function answers as it should, or a refusal says why not.
fn served_or_refused(machine: &Machine, init_id: &Value) -> anyhow::Result<()> {
    let reply = checked(machine)?;
    if reply.status == 200 {
        return intact(machine, init_id);
    }
    anyhow::ensure!(matches!(reply.status, 500..=504), "{}", reply.status);
    let error = reply.json()?["error"].to_string();
    anyhow::ensure!(error.len() > 20, "{error}");
    Ok(())
}

#[test]
fn with_a_full_disk_what_runs_goes_on_and_all_is_well_when_there_is_room() -> anyhow::Result<()> {
    let settings = Settings {
        disk: Some(512 << 20),
        ..Settings::default()
    };
    let machine = Machine::start_with(&settings)?;
    machine.deploy("hello-python")?;
    let init_id = checked(&machine)?.json()?["init_id"].clone();
    for round in 0..2 {
        if round == 1 {
            machine.scale("hello-python", 0)?;
        }
        machine.fill_disk()?;
        // A new function is refused, or fails or serves cold with the reason.
        let name = format!("late-{round}");
        let body = json!({ "service": name, "image": "docker.io/trenv/json-python:latest" });
        let reply = machine.request("POST", "/system/functions", Some(&body))?;
        let reason = match reply.status {
            202 => {
                let function = machine.settled(&name)?;
                assert_ne!(function["status"], "ready", "{function:#}");
                function["reason"].to_string()
            }
            status => {
                assert_eq!(status, 500, "{}", reply.text());
                reply.text()
            }
        };
        assert!(reason.to_lowercase().contains("no space left"), "{reason}");
        // The one that is there is served, in a new tenancy too, or refused with the reason.
        for _ in 0..3 {
            served_or_refused(&machine, &init_id)?;
            let body = json!({ "serviceName": "hello-python", "replicas": 0 });
            let path = "/system/scale-function/hello-python";
            let reply = machine.request("POST", path, Some(&body))?;
            assert!(matches!(reply.status, 202 | 500), "{}", reply.text());
        }
        machine.make_room()?;
        until("everything to work again", PATIENCE, || {
            intact(&machine, &init_id).is_ok()
        })?;
        machine.scale("hello-python", 0)?;
        intact(&machine, &init_id)?;
        machine.scale("hello-python", 2)?;
        let function = machine.deploy_as(&body)?;
        assert_eq!(function["status"], "ready", "{function:#}");
        assert_eq!(machine.call(&name)?.status, 200);
        machine.remove(&name)?;
    }
    machine.stop()
}

/// A machine on which one function runs and another is about to start from the pool.
struct Storage {
    machine: Machine,
    /// Drawn by the one that is about to start, hello-python.
    init_id: Value,
    /// Drawn by the one that runs, hello-node.
    other: String,
}

impl Storage {
    fn start() -> anyhow::Result<Self> {
        let machine = Machine::start()?;
        machine.deploy("hello-python")?;
        machine.deploy("hello-node")?;
        // Nobody else gets its sandbox.
        machine.scale("hello-node", 1)?;
        Ok(Self {
            init_id: checked(&machine)?.json()?["init_id"].clone(),
            other: machine.init_id("hello-node")?,
            machine,
        })
    }

    fn pool(&self) -> PathBuf {
        self.machine.directory().join("state/pool")
    }

    /// Ends the zygotes, so that the next start reads the pool; until it can, it is refused with
    /// a reason that holds `expected`, and then serves from a template made anew.
    fn must_be_made_anew(self, expected: &str) -> anyhow::Result<()> {
        let machine = &self.machine;
        // What stands needs no pool.
        intact(machine, &self.init_id)?;
        machine.scale("hello-python", 0)?;
        intact(machine, &self.init_id)?;
        machine.scale("hello-python", 0)?;
        // A clone that was being made comes after the first look.
        until("the end of the zygotes", PATIENCE, || {
            let zygotes = machine.pids_of("trenv-zygote");
            crash(&zygotes);
            zygotes.is_empty()
        })?;
        let mut reasons = String::new();
        let mut wrong = None;
        until("a template made anew", PATIENCE, || {
            match checked(machine) {
                Ok(reply) if reply.status == 200 => {
                    let body = reply.json().unwrap_or_default();
                    let sound = body["intact"] == true && body["init_id"] != self.init_id;
                    wrong = (!sound).then(|| reply.text());
                    true
                }
                Ok(reply) => {
                    reasons.push_str(&reply.text());
                    false
                }
                Err(err) => {
                    wrong = Some(format!("{err:#}"));
                    true
                }
            }
        })?;
        assert_eq!(wrong, None);
        assert!(reasons.contains(expected), "{reasons:?}");
        let reply = machine.call("hello-node")?;
        assert_eq!((reply.status, reply.start()), (200, "warm"));
        assert_eq!(reply.json()?["init_id"], self.other, "it runs on");
        let template = &machine.describe("hello-python")?["status"];
        assert_eq!(template, "ready");
        self.machine.stop()
    }
}

#[test]
fn another_pool_in_its_place_never_gives_wrong_memory() -> anyhow::Result<()> {
    let storage = Storage::start()?;
    let aside = storage.machine.directory().join("state/pool-aside");
    std::fs::rename(storage.pool(), aside)?;
    storage.machine.tool("trenv-pool", &["format"])?;
    storage.must_be_made_anew("is made anew")
}

#[test]
fn damaged_pages_are_found_and_the_template_is_made_anew() -> anyhow::Result<()> {
    let storage = Storage::start()?;
    let data = storage.pool().join("pool.data");
    let file = File::options().write(true).open(data)?;
    file.write_all_at(&[0x5a; 1 << 16], DATA_OFFSET + (1 << 20))?;
    storage.must_be_made_anew("is made anew")
}

#[test]
fn a_pool_that_is_none_is_told_and_functions_serve_cold() -> anyhow::Result<()> {
    let mut machine = Machine::start()?;
    machine.stop_provider();
    crash(&machine.pids_of("containerd-shim-trenv-v2"));
    let data = machine.directory().join("state/pool/pool.data");
    for (name, text) in [
        ("short", "this is no pool".to_owned()),
        ("long", "no".repeat(1 << 20)),
    ] {
        std::fs::write(&data, text)?;
        machine.start_provider()?;
        let image = "docker.io/trenv/hello-python:latest";
        let function = machine.deploy_as(&json!({ "service": name, "image": image }))?;
        assert_eq!(function["status"], "serving-cold", "{function:#}");
        let reason = function["reason"].as_str().unwrap_or_default();
        assert!(reason.contains("pool.data"), "{reason}");
        let reply = machine.call(name)?;
        assert_eq!(
            (reply.status, reply.start()),
            (200, "cold"),
            "{}",
            reply.text()
        );
        machine.remove(name)?;
        machine.stop_provider();
        crash(&machine.pids_of("containerd-shim-trenv-v2"));
    }
    machine.start_provider()?;
    machine.stop()
}
