//! The life of a template: snapshot of a cold function, start in another sandbox, reset, again.

#![allow(clippy::unwrap_used)]

mod support;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use support::service::{active, client, limit, zygotes};
use support::{Containerd, containerd};
use trenv_sandbox_proto as proto;

const COUNTER: &str = "i=0; while :; do i=$((i+1)); echo tick $i; sleep 0.1; done";

fn last_tick(log: &Path) -> u32 {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    text.lines()
        .rev()
        .find_map(|line| line.strip_prefix("tick ")?.parse().ok())
        .unwrap_or(0)
}

fn log_of(containerd: &Containerd, id: &str) -> PathBuf {
    containerd.path(&format!("{id}.log"))
}

#[test]
fn a_function_is_snapshotted_and_started_again_in_other_sandboxes() {
    let Some(containerd) = containerd("repurpose") else {
        return;
    };
    let cold_log = log_of(&containerd, "cold");
    let uri = format!("file://{}", cold_log.display());
    containerd.ctr(&[
        "run",
        "-d",
        "--log-uri",
        &uri,
        "--runtime",
        support::TRENV,
        "--annotation",
        "dev.trenv.sandbox=function",
        support::IMAGE,
        "cold",
        "/bin/sh",
        "-c",
        COUNTER,
    ]);
    for id in ["idle1", "idle2"] {
        let uri = format!("file://{}", log_of(&containerd, id).display());
        containerd.ctr(&[
            "run",
            "-d",
            "--log-uri",
            &uri,
            "--runtime",
            support::TRENV,
            "--annotation",
            "dev.trenv.sandbox=idle",
            support::IMAGE,
            id,
        ]);
    }
    containerd.until("the function counts", || last_tick(&cold_log) >= 5);
    let (runtime, sandboxes) = client(&containerd.shim_address());

    let version = runtime
        .block_on(sandboxes.version(limit(), &proto::VersionRequest::default()))
        .unwrap();
    assert_eq!(version.protocol, 1);
    assert!(!version.fingerprint.is_empty());

    // A repurpose of a busy sandbox changes nothing.
    let busy = proto::RepurposeRequest {
        request_id: "busy".into(),
        sandbox_id: "cold".into(),
        template_id: "0".repeat(64),
        ..proto::RepurposeRequest::default()
    };
    let err = runtime
        .block_on(sandboxes.repurpose(limit(), &busy))
        .unwrap_err();
    assert!(err.to_string().contains("running a function"), "{err}");

    // An unknown template leaves the sandbox idle.
    let unknown = proto::RepurposeRequest {
        request_id: "unknown".into(),
        sandbox_id: "idle1".into(),
        rootfs: active(&containerd, "unknown"),
        ..busy.clone()
    };
    let err = runtime
        .block_on(sandboxes.repurpose(limit(), &unknown))
        .unwrap_err();
    assert!(err.to_string().contains("does not exist"), "{err}");

    let request = proto::SnapshotRequest {
        request_id: "snap".into(),
        sandbox_id: "cold".into(),
        key: "counter".into(),
        ..proto::SnapshotRequest::default()
    };
    let snapshot = runtime
        .block_on(sandboxes.snapshot(limit(), &request))
        .unwrap_or_else(|err| panic!("{err}\n{}", containerd.logs()));
    assert!(
        snapshot.processes >= 1 && snapshot.stored_bytes > 0,
        "{snapshot:?}"
    );
    assert!(snapshot.files_digest.starts_with("blake3:"), "{snapshot:?}");
    let counted = last_tick(&cold_log);
    assert!(counted >= 5);
    let again = runtime
        .block_on(sandboxes.snapshot(limit(), &request))
        .unwrap();
    assert_eq!(
        again.template_id, snapshot.template_id,
        "the same request id gives the same answer"
    );

    let prepare = proto::PrepareRequest {
        request_id: "prepare".into(),
        template_id: snapshot.template_id.clone(),
        generation: snapshot.generation,
        rootfs: active(&containerd, "view"),
        spares: 2,
        ..proto::PrepareRequest::default()
    };
    let prepared = runtime
        .block_on(sandboxes.prepare(limit(), &prepare))
        .unwrap_or_else(|err| panic!("{err}\n{}", containerd.logs()));
    assert!(prepared.resident_bytes > 0);

    let version = runtime
        .block_on(sandboxes.version(limit(), &proto::VersionRequest::default()))
        .unwrap();
    let mut methods = version.start_methods;
    // These need an image that CRIU has written, which it cannot everywhere, and a pool on a device.
    methods.retain(|method| !method.starts_with("criu") && method != "attach");
    assert_eq!(methods[0], "template");
    methods.insert(0, String::new());
    for round in 0..10 {
        for id in ["cold", "idle1", "idle2"] {
            let name = format!("{id}-{round}");
            let log = log_of(&containerd, id);
            std::fs::write(&log, "").unwrap();
            let request = proto::RepurposeRequest {
                request_id: format!("start-{name}"),
                sandbox_id: id.into(),
                tenancy: name.clone(),
                template_id: snapshot.template_id.clone(),
                generation: snapshot.generation,
                rootfs: active(&containerd, &name),
                // The usual method, every method in turn, and the usual one again.
                method: methods.get(round).cloned().unwrap_or_default(),
                ..proto::RepurposeRequest::default()
            };
            let begun = Instant::now();
            let started = runtime
                .block_on(sandboxes.repurpose(limit(), &request))
                .unwrap_or_else(|err| panic!("{name}: {err}\n{}", containerd.logs()));
            let steps: Vec<String> = started
                .steps
                .iter()
                .map(|step| format!("{} {}", step.name, step.microseconds))
                .collect();
            println!("{name}: {:?}: {}", begun.elapsed(), steps.join(", "));
            containerd.until("the restored function goes on counting", || {
                last_tick(&log) > counted
            });
            if round == 0 {
                check_ready(&containerd, id, &name, &started);
            }
        }
        for id in ["cold", "idle1", "idle2"] {
            let request = proto::ResetRequest {
                request_id: format!("reset-{id}-{round}"),
                sandbox_id: id.into(),
                ..proto::ResetRequest::default()
            };
            runtime
                .block_on(sandboxes.reset(limit(), &request))
                .unwrap_or_else(|err| panic!("{id}: {err}\n{}", containerd.logs()));
        }
        let list = runtime
            .block_on(sandboxes.list(limit(), &proto::ListRequest::default()))
            .unwrap();
        for info in &list.sandboxes {
            assert_eq!(
                info.state.enum_value().unwrap(),
                proto::State::IDLE,
                "{info:?}"
            );
            assert!(info.tenancy.is_empty());
        }
    }

    let delete = proto::DeleteTemplateRequest {
        request_id: "delete".into(),
        template_id: snapshot.template_id.clone(),
        ..proto::DeleteTemplateRequest::default()
    };
    runtime
        .block_on(sandboxes.delete_template(limit(), &delete))
        .unwrap_or_else(|err| panic!("{err}\n{}", containerd.logs()));
    for id in ["cold", "idle1", "idle2"] {
        containerd.remove(id);
    }
    drop(sandboxes);
    containerd.assert_clean();
}

/// What containerd shows of a sandbox that has just been given a function.
fn check_ready(
    containerd: &Containerd,
    id: &str,
    tenancy: &str,
    started: &proto::RepurposeResponse,
) {
    let pids = containerd.ctr(&["task", "ps", id]);
    // The others may have ended by themselves.
    let root = started.pids[0].to_string();
    assert!(pids.contains(&root), "{root} in {pids}");
    let text = containerd.ctr(&[
        "task",
        "exec",
        "--exec-id",
        tenancy,
        id,
        "/bin/sh",
        "-c",
        "hostname; ps ax",
    ]);
    assert!(text.starts_with(&format!("{tenancy}\n")), "{text}");
    assert!(text.contains("tick"), "the function is seen: {text}");
}

#[test]
fn a_killed_zygote_is_built_again_and_goes_with_a_killed_shim() {
    let Some(containerd) = containerd("zygote") else {
        return;
    };
    containerd.run_function("f", COUNTER);
    std::thread::sleep(Duration::from_millis(500));
    let (runtime, sandboxes) = client(&containerd.shim_address());
    let request = proto::SnapshotRequest {
        request_id: "snap".into(),
        sandbox_id: "f".into(),
        key: "counter".into(),
        ..proto::SnapshotRequest::default()
    };
    let snapshot = runtime
        .block_on(sandboxes.snapshot(limit(), &request))
        .unwrap_or_else(|err| panic!("{err}\n{}", containerd.logs()));
    let start = |name: &str| {
        let request = proto::RepurposeRequest {
            request_id: name.into(),
            sandbox_id: "f".into(),
            tenancy: name.into(),
            template_id: snapshot.template_id.clone(),
            rootfs: active(&containerd, name),
            ..proto::RepurposeRequest::default()
        };
        runtime.block_on(sandboxes.repurpose(limit(), &request))
    };
    let reset = |name: &str| {
        let request = proto::ResetRequest {
            request_id: name.into(),
            sandbox_id: "f".into(),
            ..proto::ResetRequest::default()
        };
        runtime
            .block_on(sandboxes.reset(limit(), &request))
            .unwrap();
    };
    // Without Prepare, and by the newest generation.
    start("first").unwrap_or_else(|err| panic!("{err}\n{}", containerd.logs()));
    reset("first");
    let [zygote] = zygotes(&containerd)[..] else {
        panic!("one zygote expected: {:?}", zygotes(&containerd));
    };
    let pid = nix::unistd::Pid::from_raw(zygote);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
    for round in 0..5 {
        let name = format!("after{round}");
        start(&name).unwrap_or_else(|err| panic!("{err}\n{}", containerd.logs()));
        reset(&name);
    }
    // Its agents go on without it; more of them need a new one.
    let prepare = proto::PrepareRequest {
        request_id: "prepare".into(),
        template_id: snapshot.template_id.clone(),
        rootfs: active(&containerd, "view"),
        spares: 4,
        ..proto::PrepareRequest::default()
    };
    runtime
        .block_on(sandboxes.prepare(limit(), &prepare))
        .unwrap_or_else(|err| panic!("{err}\n{}", containerd.logs()));
    assert_eq!(zygotes(&containerd).len(), 1);
    assert_ne!(zygotes(&containerd), [zygote]);
    start("last").unwrap();

    let [shim] = containerd.shims()[..] else {
        panic!("one shim expected");
    };
    let pid = nix::unistd::Pid::from_raw(shim);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
    containerd.until("containerd forgets the task", || {
        containerd.ctr(&["task", "ls", "-q"]).is_empty()
    });
    containerd.assert_clean();
    assert_eq!(zygotes(&containerd), [0; 0]);
    containerd.ctr(&["container", "rm", "f"]);
}
