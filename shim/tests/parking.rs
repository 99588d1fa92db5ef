//! A tenancy that is parked: restored, and stopped before its first instruction. Needs root and
//! containerd.

#![allow(clippy::unwrap_used)]

mod support;

use std::path::Path;
use std::time::Duration;

use support::service::{Service, Template, active, limit};
use support::{IMAGE, TRENV, containerd};
use trenv_sandbox_proto as proto;

const COUNTER: &str = "i=0; while :; do i=$((i+1)); echo tick $i; sleep 0.1; done";

fn last_tick(log: &Path) -> u32 {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    let mut ticks = text.lines().rev();
    ticks
        .find_map(|line| line.strip_prefix("tick ")?.parse().ok())
        .unwrap_or(0)
}

fn park(service: &Service, request_id: &str, template: &Template, rootfs: Vec<proto::Mount>) {
    let request = proto::RepurposeRequest {
        request_id: request_id.into(),
        sandbox_id: "f".into(),
        tenancy: request_id.into(),
        template_id: template.id.clone(),
        generation: template.generation,
        rootfs,
        park: true,
        ..proto::RepurposeRequest::default()
    };
    service.repurpose(&request).unwrap();
    assert_eq!(service.state("f"), proto::State::PARKED);
}

#[test]
fn a_parked_tenancy_goes_on_when_it_is_resumed_and_can_be_reset_before() {
    let Some(containerd) = containerd("parking") else {
        return;
    };
    let log = containerd.path("f.log");
    let uri = format!("file://{}", log.display());
    containerd.ctr(&[
        "run",
        "-d",
        "--runtime",
        TRENV,
        "--log-uri",
        &uri,
        "--annotation",
        "dev.trenv.sandbox=function",
        IMAGE,
        "f",
        "/bin/sh",
        "-c",
        COUNTER,
    ]);
    containerd.until("the function counts", || last_tick(&log) > 2);
    let service = Service::connect(&containerd);
    let template = service.snapshot(&containerd, "f");
    let counted = last_tick(&log);

    std::fs::write(&log, "").unwrap();
    park(&service, "first", &template, active(&containerd, "first"));
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(
        std::fs::read_to_string(&log).unwrap(),
        "",
        "nothing of it has run"
    );
    let resume = |tenancy: &str| {
        let request = proto::ResumeRequest {
            request_id: format!("resume-{tenancy}"),
            sandbox_id: "f".into(),
            tenancy: tenancy.into(),
            ..proto::ResumeRequest::default()
        };
        let resumed = service.sandboxes.resume(limit(), &request);
        service.runtime.block_on(resumed)
    };
    let wrong = resume("another").unwrap_err().to_string();
    assert!(wrong.contains("another"), "{wrong}");
    assert_eq!(service.state("f"), proto::State::PARKED, "nothing changed");
    resume("first").unwrap();
    assert_eq!(service.state("f"), proto::State::READY);
    containerd.until("it goes on counting", || last_tick(&log) > counted);
    service.reset("f", "end-first").unwrap();

    // One that nobody wants any more.
    std::fs::write(&log, "").unwrap();
    park(&service, "second", &template, active(&containerd, "second"));
    service.reset("f", "end-second").unwrap();
    assert_eq!(service.state("f"), proto::State::IDLE);
    assert_eq!(std::fs::read_to_string(&log).unwrap(), "");

    // One whose process is killed while it waits takes its sandbox along.
    park(&service, "third", &template, active(&containerd, "third"));
    containerd.ctr(&["task", "kill", "--signal", "SIGKILL", "f"]);
    containerd.until("containerd sees its end", || {
        containerd.ctr(&["task", "ls"]).contains("STOPPED")
    });
    containerd.remove("f");
    drop(service);
    containerd.assert_clean();
}
