//! The way of a tenancy, in real namespaces.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "tests fail by panicking"
)]

mod support;

use std::{fs, path::Path, time::Duration};

use support::{Place, namespace, run, shell, stdio};
use trenv_sandbox::{
    cgroup::{Limits, TenancyCgroup, Version},
    process::Role,
};

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

#[test]
fn on_cgroup_v2_a_process_is_born_in_its_cgroup() {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    let Some(mount) = mounts
        .lines()
        .map(|line| line.split(' ').collect::<Vec<_>>())
        .find(|fields| fields[2] == "cgroup2")
        .map(|fields| fields[1].to_owned())
    else {
        println!("skipped: no cgroup v2 hierarchy is mounted");
        return;
    };
    let version = Box::leak(Box::new(Version::V2(mount.into())));
    let place = Place::new();
    let sandbox = place.sandbox();
    let limits = Limits::default();
    let cgroup = TenancyCgroup::create_in(version, &place.name, "born", &limits).unwrap();
    assert!(cgroup.dir_fd().is_some());
    sandbox.enter_rootfs(&place.rootfs("first")).unwrap();
    let (stdio, _output) = stdio();
    let root = sandbox
        .spawn(&shell(Role::Root, "sleep 100"), stdio, &cgroup)
        .unwrap();
    assert!(cgroup.pids().unwrap().contains(&root.pid));
    assert!(
        run(&sandbox, &cgroup, "cat /proc/self/cgroup")
            .0
            .contains("/born\n")
    );
    cgroup.freeze().unwrap();
    cgroup.thaw().unwrap();
    cgroup.kill_all().unwrap();
    sandbox.purge().unwrap();
    sandbox.destroy().unwrap();
    cgroup.remove().unwrap();
    let parent = cgroup.dirs()[0].parent().unwrap().to_owned();
    fs::remove_dir(parent).unwrap();
}

/// A zygote's agent does the same: it joins by pidfd and makes the tree's root with pid 2.
#[test]
fn outsiders_can_join_by_the_pidfd_of_pid_one() {
    let place = Place::new();
    let sandbox = place.sandbox();
    sandbox.enter_rootfs(&place.rootfs("first")).unwrap();
    let pidfd = sandbox.init_pidfd().try_clone_to_owned().unwrap();
    let namespaces = libc::CLONE_NEWNS
        | libc::CLONE_NEWNET
        | libc::CLONE_NEWUTS
        | libc::CLONE_NEWIPC
        | libc::CLONE_NEWPID;
    use std::os::{fd::AsRawFd, unix::process::CommandExt};
    let raw = pidfd.as_raw_fd();
    let mut command = std::process::Command::new("/bin/sh");
    command.args([
        "-c",
        "test $(hostname) = first && test $(cat /image) = first",
    ]);
    // SAFETY: setns is all that is done between fork and exec.
    unsafe {
        command.pre_exec(move || {
            if libc::setns(raw, namespaces) < 0 {
                return Err(std::io::Error::last_os_error());
            }
            Ok(())
        });
    }
    assert!(command.status().unwrap().success());
    sandbox.destroy().unwrap();
}

#[test]
fn each_tenancy_has_a_generation_of_its_own() {
    let place = Place::new();
    let sandbox = place.sandbox();
    let cgroup = place.cgroup("t1");
    let mut seen = std::collections::HashSet::new();
    for (tenancy, number) in [("first", 1), ("second", 2), ("third", 3)] {
        sandbox.enter_rootfs(&place.rootfs(tenancy)).unwrap();
        let page = fs::read(format!(
            "/proc/{}/root{}",
            sandbox.init_pid(),
            trenv_sandbox::generation::PATH
        ));
        let page = page.unwrap();
        assert_eq!((page.len(), &page[..8]), (4096, b"TRENVGEN".as_slice()));
        assert_eq!(page[32], number, "it is counted");
        assert!(page[16..32] != [0; 16] && seen.insert(page[16..32].to_vec()));
        // Not even root of the function changes it or takes it away.
        let (text, _) = run(
            &sandbox,
            &cgroup,
            "(echo x >/run/trenv/generation) 2>&1; rm -rf /run/* 2>&1; ls /run/trenv; stat -c %a /run/trenv/generation",
        );
        assert!(text.contains("Read-only file system"), "{text}");
        assert!(text.ends_with("generation\n444\n"), "{text}");
        sandbox.purge().unwrap();
    }
    sandbox.destroy().unwrap();
    cgroup.remove().unwrap();
}
