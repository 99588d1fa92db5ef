//! The contract of `trenv.sandbox.v1`: one action for each request id, the right status codes,
//! nothing changed by a refusal, and the deadline of a start.

#![allow(clippy::unwrap_used)]

mod support;

use std::time::Duration;

use support::service::{Service, Template, code, limit, start_request};
use support::{Containerd, containerd};
use trenv_sandbox_proto as proto;
use ttrpc::Code;

const COUNTER: &str = "i=0; while :; do i=$((i+1)); echo tick $i; sleep 0.1; done";

/// A template, made in the sandbox `f`, which is idle afterwards.
fn template(containerd: &Containerd) -> (Service, Template) {
    containerd.run_function("f", COUNTER);
    std::thread::sleep(Duration::from_millis(500));
    let service = Service::connect(containerd);
    let template = service.snapshot(containerd, "f");
    (service, template)
}

#[test]
fn the_same_request_id_is_one_action_with_one_answer() {
    let Some(containerd) = containerd("sameid") else {
        return;
    };
    let (service, template) = template(&containerd);
    let request = start_request(&containerd, "f", "one", &template);
    // Two at the same time, one later: all are the same call.
    let (first, second) = service.runtime.block_on(async {
        tokio::join!(
            service.sandboxes.repurpose(limit(), &request),
            service.sandboxes.repurpose(limit(), &request)
        )
    });
    let first = first.unwrap_or_else(|err| panic!("{err}\n{}", containerd.logs()));
    assert_eq!(second.unwrap(), first);
    assert_eq!(service.repurpose(&request).unwrap(), first);
    assert_eq!(service.changes("f", "repurpose"), 1);
    assert_eq!(
        service.changes("f", "the function was started from its template"),
        1
    );

    let reset = service.reset("f", "end").unwrap();
    assert_eq!(service.reset("f", "end").unwrap(), reset);
    assert_eq!(service.changes("f", "reset"), 1);
    // Long answered, and the sandbox is idle again: still no second start.
    assert_eq!(service.repurpose(&request).unwrap(), first);
    assert_eq!(service.state("f"), proto::State::IDLE);

    // A refusal is an answer, too, even when the call would now succeed.
    let early = service.reset("f", "early");
    assert_eq!(code(early), Code::FAILED_PRECONDITION);
    let request = start_request(&containerd, "f", "two", &template);
    service.repurpose(&request).unwrap();
    assert_eq!(
        code(service.reset("f", "early")),
        Code::FAILED_PRECONDITION,
        "a new id is needed for a new call"
    );
    assert_eq!(service.state("f"), proto::State::READY);
    assert_eq!(code(service.reset("f", "")), Code::INVALID_ARGUMENT);
    containerd.remove("f");
    drop(service);
    containerd.assert_clean();
}

#[test]
fn a_refused_call_has_the_right_code_and_changes_nothing() {
    let Some(containerd) = containerd("codes") else {
        return;
    };
    let (service, template) = template(&containerd);
    containerd.run_idle("idle");
    let request = start_request(&containerd, "f", "busy", &template);
    let started = service
        .repurpose(&request)
        .unwrap_or_else(|err| panic!("{err}\n{}", containerd.logs()));
    let before = [service.info("f"), service.info("idle")];

    let base = start_request(&containerd, "idle", "refused", &template);
    let with = |change: &dyn Fn(&mut proto::RepurposeRequest)| {
        let mut request = base.clone();
        change(&mut request);
        request
    };
    let none = "0".repeat(64);
    let starts: [(&str, Code, proto::RepurposeRequest); 9] = [
        (
            "a busy sandbox",
            Code::FAILED_PRECONDITION,
            with(&|request| request.sandbox_id = "f".into()),
        ),
        (
            "an unknown sandbox",
            Code::NOT_FOUND,
            with(&|request| request.sandbox_id = "nobody".into()),
        ),
        (
            "an unknown template",
            Code::NOT_FOUND,
            with(&|request| request.template_id = none.clone()),
        ),
        (
            "an unknown template to copy",
            Code::NOT_FOUND,
            with(&|request| {
                request.template_id = none.clone();
                request.method = "copy".into();
            }),
        ),
        (
            "a wrong generation",
            Code::NOT_FOUND,
            with(&|request| request.generation += 7),
        ),
        (
            "a wrong generation to copy",
            Code::NOT_FOUND,
            with(&|request| {
                request.generation += 7;
                request.method = "copy".into();
            }),
        ),
        (
            "a template id that is none",
            Code::INVALID_ARGUMENT,
            with(&|request| request.template_id = "../x".into()),
        ),
        (
            "an unknown start method",
            Code::INVALID_ARGUMENT,
            with(&|request| request.method = "magic".into()),
        ),
        (
            "a spec that is none",
            Code::INVALID_ARGUMENT,
            with(&|request| request.spec_json = "{".into()),
        ),
    ];
    for (number, (what, wanted, mut request)) in starts.into_iter().enumerate() {
        request.request_id = format!("start-{number}");
        let answer = service.repurpose(&request);
        assert_eq!(code(answer), wanted, "{what}");
        assert_eq!(
            [service.info("f"), service.info("idle")],
            before,
            "{what} changed something\n{}",
            containerd.logs()
        );
    }
    assert_eq!(code(service.reset("idle", "r1")), Code::FAILED_PRECONDITION);
    assert_eq!(code(service.reset("nobody", "r2")), Code::NOT_FOUND);
    for (sandbox, key, wanted) in [
        ("idle", "key", Code::FAILED_PRECONDITION),
        ("nobody", "key", Code::NOT_FOUND),
        ("f", "", Code::INVALID_ARGUMENT),
    ] {
        let request = proto::SnapshotRequest {
            request_id: format!("snapshot-{sandbox}-{key}"),
            sandbox_id: sandbox.into(),
            key: key.into(),
            ..proto::SnapshotRequest::default()
        };
        let answer = service
            .runtime
            .block_on(service.sandboxes.snapshot(limit(), &request));
        assert_eq!(code(answer), wanted, "a snapshot of {sandbox}");
    }
    for (template_id, wanted) in [
        (none.clone(), Code::NOT_FOUND),
        ("x".into(), Code::INVALID_ARGUMENT),
    ] {
        let request = proto::PrepareRequest {
            request_id: format!("prepare-{template_id}"),
            template_id: template_id.clone(),
            ..proto::PrepareRequest::default()
        };
        let answer = service
            .runtime
            .block_on(service.sandboxes.prepare(limit(), &request));
        assert_eq!(code(answer), wanted, "the preparation of {template_id}");
        let request = proto::StageRequest {
            request_id: format!("stage-{template_id}"),
            template_id,
            ..proto::StageRequest::default()
        };
        let answer = service
            .runtime
            .block_on(service.sandboxes.stage(limit(), &request));
        assert_eq!(code(answer), wanted);
    }
    // Deleting what is not there succeeds.
    let request = proto::DeleteTemplateRequest {
        request_id: "delete".into(),
        template_id: none,
        ..proto::DeleteTemplateRequest::default()
    };
    service
        .runtime
        .block_on(service.sandboxes.delete_template(limit(), &request))
        .unwrap();
    assert_eq!(unknown_call(&containerd), Code::UNIMPLEMENTED);
    assert_eq!([service.info("f"), service.info("idle")], before);
    let pids = containerd.ctr(&["task", "ps", "f"]);
    assert!(pids.contains(&started.pids[0].to_string()), "{pids}");

    // Both are as usable as before.
    service.reset("f", "end").unwrap();
    let request = start_request(&containerd, "idle", "last", &template);
    service.repurpose(&request).unwrap();
    for id in ["f", "idle"] {
        containerd.remove(id);
    }
    drop(service);
    containerd.assert_clean();
}

/// The answer to a method that the service does not have.
fn unknown_call(containerd: &Containerd) -> Code {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let client = ttrpc::asynchronous::Client::connect(&containerd.shim_address())
            .await
            .unwrap();
        let mut request = ttrpc::proto::Request::new();
        request.service = "trenv.sandbox.v1.Sandbox".into();
        request.method = "Nothing".into();
        request.timeout_nano = 5_000_000_000;
        code(client.request(request).await)
    })
}

#[test]
fn a_start_past_its_deadline_ends_the_sandbox_and_releases_everything() {
    let Some(containerd) = containerd("deadline") else {
        return;
    };
    let (service, template) = template(&containerd);
    containerd.run_idle("idle");
    let request = proto::RepurposeRequest {
        deadline_ms: 1,
        ..start_request(&containerd, "idle", "late", &template)
    };
    let answer = service.repurpose(&request);
    assert_eq!(
        code(answer),
        Code::DEADLINE_EXCEEDED,
        "{}",
        containerd.logs()
    );
    assert_eq!(service.state("idle"), proto::State::DEAD);
    assert!(service.info("idle").tenancy.is_empty());
    containerd.until("the task is stopped", || {
        let list = containerd.ctr(&["task", "ls"]);
        list.lines()
            .any(|line| line.starts_with("idle ") && line.contains("STOPPED"))
    });
    // Released before anybody deletes it: its network, its cgroup, the tenancy's processes.
    let namespaces = || std::fs::read_dir(containerd.path("trenv-run/netns")).unwrap();
    containerd.until("the network namespace is gone", || {
        namespaces().count() <= 2
    });
    let remains = containerd.remains();
    assert!(
        !remains.iter().any(|name| name.contains("idle.init")),
        "{remains:#?}"
    );
    let init = service.info("idle").init_pid;
    assert!(!std::path::Path::new(&format!("/proc/{init}")).exists());
    let deleted = containerd.try_ctr(&["task", "rm", "idle"]);
    let words = String::from_utf8_lossy(&deleted.stderr).into_owned();
    assert!(words.contains("137"), "{words}");
    containerd.ctr(&["container", "rm", "idle"]);

    // The template took no harm, and neither did its other sandboxes.
    let request = start_request(&containerd, "f", "next", &template);
    service
        .repurpose(&request)
        .unwrap_or_else(|err| panic!("{err}\n{}", containerd.logs()));
    containerd.remove("f");
    drop(service);
    containerd.assert_clean();
}
