//! A snapshot of a function that starts programs all the time: a shell is in vfork for much of it,
//! where it does not stop before its child has gone on.

#![allow(clippy::unwrap_used)]

mod support;

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use support::containerd;
use support::service::{Service, Template, limit, start_request};
use trenv_sandbox_proto as proto;

const ROUNDS: usize = 20;
const BUSY: &str = "while :; do /bin/id > /dev/null; /bin/id -u > /dev/null; done";

#[test]
fn a_function_that_starts_programs_all_the_time_is_snapshotted_in_time() {
    let Some(containerd) = containerd("forking") else {
        return;
    };
    containerd.run_idle("idle");
    let service = Service::connect(&containerd);
    let (mut slowest, mut refused) = (Duration::ZERO, Vec::new());
    for round in 0..ROUNDS {
        let id = format!("f{round}");
        containerd.run_function(&id, BUSY);
        std::thread::sleep(Duration::from_millis(50));
        let template = loop {
            let begun = Instant::now();
            let snapshot = snapshot(&service, &id);
            slowest = slowest.max(begun.elapsed());
            match snapshot {
                Ok(template) => break template,
                Err(refusal) => refused.push(refusal),
            }
            // Refused, it goes on unharmed, and soon has no child that nobody has waited for.
            assert_eq!(service.state(&id), proto::State::READY);
            assert!(refused.len() < 5 * ROUNDS, "{refused:?}");
        };
        assert_eq!(service.state(&id), proto::State::IDLE);
        let name = format!("t{round}");
        let request = start_request(&containerd, "idle", &name, &template);
        service
            .repurpose(&request)
            .unwrap_or_else(|err| panic!("{err}\n{}", containerd.logs()));
        assert_eq!(service.state("idle"), proto::State::READY);
        service.reset("idle", &name).unwrap();
        // While the seats for the next start are still being made.
        let request = proto::DeleteTemplateRequest {
            request_id: name,
            template_id: template.id,
            ..proto::DeleteTemplateRequest::default()
        };
        service
            .runtime
            .block_on(service.sandboxes.delete_template(limit(), &request))
            .unwrap_or_else(|err| panic!("{err}\n{}", containerd.logs()));
        containerd.remove(&id);
    }
    println!("the slowest snapshot took {slowest:?}; refused: {refused:?}");
    assert!(slowest < Duration::from_secs(5), "{slowest:?}");
    containerd.remove("idle");
    drop(service);
    containerd.assert_clean();
}

/// The template, or why there is none; any failure but a refusal ends the test.
fn snapshot(service: &Service, id: &str) -> Result<Template, String> {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let request = proto::SnapshotRequest {
        request_id: NEXT.fetch_add(1, Ordering::Relaxed).to_string(),
        sandbox_id: id.into(),
        key: id.into(),
        ..proto::SnapshotRequest::default()
    };
    let answer = service.sandboxes.snapshot(limit(), &request);
    match service.runtime.block_on(answer) {
        Ok(done) => Ok(Template {
            id: done.template_id,
            generation: done.generation,
        }),
        Err(ttrpc::Error::RpcStatus(status)) if status.code() == ttrpc::Code::UNIMPLEMENTED => {
            assert!(status.message().contains("zombie"), "{status:?}");
            Err(status.message().to_owned())
        }
        Err(err) => panic!("{id}: {err}"),
    }
}
