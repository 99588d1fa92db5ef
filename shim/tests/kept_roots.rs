//! A root to which a tenancy wrote nothing serves the next one. Needs root and containerd.

#![allow(clippy::unwrap_used)]

mod support;

use support::containerd;
use support::service::{Service, limit, start_request};
use trenv_sandbox_proto as proto;

#[test]
fn a_root_serves_again_until_something_is_written_to_it() {
    let Some(containerd) = containerd("kept-roots") else {
        return;
    };
    containerd.run_function("f", "while :; do sleep 0.1; done");
    // Where the image has no mount points, a start makes them.
    for name in ["proc", "dev", "sys", "run"] {
        std::fs::create_dir_all(containerd.path("rootfs").join(name)).unwrap();
    }
    let service = Service::connect(&containerd);
    let template = service.snapshot(&containerd, "f");
    service.prepare(&containerd, &template, &proto::Limits::default());

    let mut request = start_request(&containerd, "f", "first", &template);
    let stage = proto::StageRequest {
        request_id: "stage".into(),
        template_id: template.id.clone(),
        generation: template.generation,
        rootfs: request.rootfs.clone(),
        ..proto::StageRequest::default()
    };
    let staged = service.sandboxes.stage(limit(), &stage);
    service.runtime.block_on(staged).unwrap();
    let mut turn = |name: &str, keep_root: bool, write: bool| {
        request.request_id = name.into();
        request.tenancy = name.into();
        service
            .repurpose(&request)
            .unwrap_or_else(|err| panic!("{name}: {err}\n{}", containerd.logs()));
        if write {
            let file = format!("/written-by-{name}");
            containerd.ctr(&["task", "exec", "--exec-id", name, "f", "touch", &file]);
        }
        let reset = proto::ResetRequest {
            request_id: format!("end-{name}"),
            sandbox_id: "f".into(),
            unused: true,
            keep_root,
            ..proto::ResetRequest::default()
        };
        let ended = service.sandboxes.reset(limit(), &reset);
        service.runtime.block_on(ended).unwrap().root_kept
    };
    assert!(turn("first", true, false), "nothing was written");
    assert!(turn("second", true, false), "nor by the second tenancy");
    assert!(!turn("third", true, true), "a file was written");
    let upper = containerd.path("first-upper");
    assert!(
        upper.join("written-by-third").exists(),
        "the same root served all three"
    );
    // The caller may go on with what is left, as with any snapshot; it is not kept again by itself.
    assert!(!turn("fourth", true, false), "it was not staged");
    assert!(!turn("fifth", false, false), "nobody asked");
    containerd.remove("f");
    drop(service);
    containerd.assert_clean();
}
