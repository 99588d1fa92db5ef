//! Many sandboxes at once, from many threads.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "tests fail by panicking"
)]

mod support;

use std::fs;

use support::{Place, run, shell, stdio};
use trenv_sandbox::{CreateRequest, Sandbox, process::Role};

#[test]
fn sandboxes_do_not_disturb_each_other() {
    let place = Place::new();
    std::thread::scope(|scope| {
        for worker in 0..8 {
            let place = &place;
            scope.spawn(move || {
                let request = CreateRequest {
                    id: format!("box{worker}"),
                    ..place.request()
                };
                let sandbox = Sandbox::create(&request).unwrap();
                let cgroup = place.cgroup(&format!("t{worker}"));
                for round in 0..5 {
                    let image = format!("image-{worker}-{round}");
                    sandbox.enter_rootfs(&place.rootfs(&image)).unwrap();
                    let (stdio, _output) = stdio();
                    let root = shell(Role::Root, "sleep 100 & sleep 100");
                    sandbox.spawn(&root, stdio, &cgroup).unwrap();
                    assert_eq!(run(&sandbox, &cgroup, "cat /image").0, image);
                    sandbox.purge().unwrap();
                    assert!(cgroup.pids().unwrap().is_empty());
                }
                sandbox.destroy().unwrap();
                cgroup.remove().unwrap();
            });
        }
    });
}

#[test]
fn an_idle_sandbox_is_small() {
    let place = Place::new();
    let sandbox = place.sandbox();
    let status = fs::read_to_string(format!("/proc/{}/status", sandbox.init_pid())).unwrap();
    let field = |name: &str| -> u64 {
        let line = status.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    };
    println!(
        "pid 1: {} kB resident, {} kB of them its own",
        field("VmRSS"),
        field("RssAnon")
    );
    assert!(field("RssAnon") < 1024);
    assert_eq!(field("Threads"), 1);
    sandbox.destroy().unwrap();
}
