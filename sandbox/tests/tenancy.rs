//! The way of a tenancy, in real namespaces.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "tests fail by panicking"
)]

mod support;

use std::{fs, path::Path, time::Duration};

use support::{Place, namespace, run, shell, stdio};
use trenv_sandbox::process::Role;

#[test]
fn one_sandbox_serves_one_tenancy_after_the_other() {
    let place = Place::new();
    let sandbox = place.sandbox();
    let cgroup = place.cgroup("t1");
    let before = ["net", "pid", "mnt"].map(|kind| namespace(sandbox.init_pid(), kind));
    let ipc = namespace(sandbox.init_pid(), "ipc");

    sandbox.enter_rootfs(&place.rootfs("first")).unwrap();
    let (stdio, _output) = stdio();
    let root = sandbox
        .spawn(&shell(Role::Root, "exec sleep 100"), stdio, &cgroup)
        .unwrap();
    assert_eq!(root.pid_in_sandbox, 2);
    assert!(cgroup.pids().unwrap().contains(&root.pid));
    let (text, code) = run(
        &sandbox,
        &cgroup,
        "cat /image /proc/sys/kernel/hostname; echo $$ $PPID; ls /proc | grep -c '^[0-9]'; exit 7",
    );
    assert_eq!(code, 7);
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines[0], "firstfirst");
    assert!(lines[1].starts_with("3000"), "{text}");

    let steps = sandbox.purge().unwrap();
    assert!(
        steps.iter().any(|step| step.name == "purge_root"),
        "{steps:?}"
    );
    let exit = sandbox
        .exits()
        .unwrap()
        .next_within(Duration::from_secs(5))
        .unwrap()
        .unwrap();
    assert_eq!((exit.pid_in_sandbox, exit.status.code()), (2, 137));
    assert!(cgroup.pids().unwrap().is_empty());
    assert!(!Path::new(&format!("/proc/{}/root/image", sandbox.init_pid())).exists());

    sandbox.enter_rootfs(&place.rootfs("second")).unwrap();
    let (text, code) = run(&sandbox, &cgroup, "cat /image; hostname");
    assert_eq!((text.as_str(), code), ("secondsecond\n", 0));
    let after = ["net", "pid", "mnt"].map(|kind| namespace(sandbox.init_pid(), kind));
    assert_eq!(before, after);
    assert_ne!(ipc, namespace(sandbox.init_pid(), "ipc"));

    let pid = sandbox.init_pid();
    sandbox.destroy().unwrap();
    sandbox.destroy().unwrap();
    assert!(!Path::new(&format!("/proc/{pid}")).exists());
    cgroup.remove().unwrap();
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains("first-upper"));
}
