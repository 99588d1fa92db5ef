//! Whoever made sandboxes may be killed at any time: nothing of them is left after a sweep.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "tests fail by panicking"
)]

mod support;

use std::{
    fs,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use support::{Place, namespace, program, shell, stdio};
use trenv_cni::{Network, NetworkConfig};
use trenv_sandbox::{
    CreateRequest, Sandbox, SandboxError,
    cgroup::{self, Limits, TenancyCgroup},
    process::Role,
};

fn config(dir: &Path, pid: u32) -> NetworkConfig {
    NetworkConfig {
        bridge: format!("tc{pid}"),
        subnet: format!("10.{}.250.0/24", 150 + pid % 50),
        plugin_dir: "/usr/lib/cni".into(),
        state_dir: dir.join("state"),
        run_dir: dir.join("run"),
        nft_table: format!("trenv_crash_{pid}"),
    }
}

/// Not a test by itself: what the crash test starts and kills.
#[test]
#[ignore = "started by the crash test"]
fn creator() {
    let dir = PathBuf::from(std::env::var_os("TRENV_TEST_DIR").unwrap());
    let parent = std::env::var("TRENV_TEST_CGROUP").unwrap();
    let pid: u32 = std::env::var("TRENV_TEST_PID").unwrap().parse().unwrap();
    let network = Network::open(&config(&dir, pid)).unwrap();
    let place = Place::new();
    let mut kept = Vec::new();
    for number in 0..5 {
        let netns = network.create_unnamed().unwrap();
        let sandbox = Sandbox::create(&CreateRequest {
            id: format!("box{number}"),
            netns: netns.path().into(),
            init_binary: env!("CARGO_BIN_EXE_trenv-init").into(),
            hostname: "idle".into(),
            cgroup_parent: parent.clone(),
        })
        .unwrap();
        let cgroup =
            TenancyCgroup::create(&parent, &format!("t{number}"), &Limits::default()).unwrap();
        sandbox
            .enter_rootfs(&place.rootfs(&format!("image{number}")))
            .unwrap();
        let (stdio, output) = stdio();
        let script = "(setsid sleep 1000 &); sleep 1000";
        let root = sandbox
            .spawn(&shell(Role::Root, script), stdio, &cgroup)
            .unwrap();
        println!("pids {} {}", sandbox.init_pid(), root.pid);
        kept.push((netns, sandbox, cgroup, output));
    }
    println!("namespaces {}", place.dir.path().display());
    println!("ready");
    std::thread::sleep(Duration::from_secs(100));
}

fn alive(pid: &str) -> bool {
    // A zombie is dead: it waits for a parent that the test does not control.
    fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z "))
}

#[test]
fn a_killed_creator_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let pid = std::process::id();
    let parent = format!("trenv-test-{pid}-crash");
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "creator", "--ignored", "--nocapture"])
        .env("TRENV_TEST_DIR", dir.path())
        .env("TRENV_TEST_CGROUP", &parent)
        .env("TRENV_TEST_PID", pid.to_string())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut pids: Vec<String> = Vec::new();
    let mut place = PathBuf::new();
    for line in BufReader::new(child.stdout.take().unwrap()).lines() {
        let line = line.unwrap();
        if let Some(more) = line.strip_prefix("pids ") {
            pids.extend(more.split(' ').map(str::to_owned));
        }
        if let Some(path) = line.strip_prefix("namespaces ") {
            place = path.into();
        }
        if line == "ready" {
            break;
        }
    }
    assert_eq!(pids.len(), 10);
    assert!(pids.iter().all(|pid| alive(pid)));
    child.kill().unwrap();
    child.wait().unwrap();

    let start = Instant::now();
    while pids.iter().any(|pid| alive(pid)) {
        assert!(start.elapsed() < Duration::from_secs(5), "still alive");
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(cgroup::sweep(&parent).unwrap() >= 10);
    let network = Network::open(&config(dir.path(), pid)).unwrap();
    assert_eq!(network.sweep().unwrap(), 5);
    network.remove().unwrap();

    for mount in fs::read_to_string("/proc/self/mountinfo").unwrap().lines() {
        assert!(!mount.contains(dir.path().to_str().unwrap()), "{mount}");
    }
    let groups = Command::new("find")
        .args(["/sys/fs/cgroup", "-name"])
        .arg(&parent)
        .output()
        .unwrap();
    assert_eq!(String::from_utf8_lossy(&groups.stdout), "");
    let links = fs::read_dir("/sys/class/net").unwrap();
    for link in links {
        let name = link.unwrap().file_name().into_string().unwrap();
        assert_ne!(name, format!("tc{pid}"));
    }
    // What the creator's own test place holds is not the library's.
    let _ = nix::mount::umount2(&place.join("netns"), nix::mount::MntFlags::MNT_DETACH);
    let _ = fs::remove_dir_all(place);
}

#[test]
fn a_killed_pid_one_takes_everything_with_it() {
    let place = Place::new();
    let sandbox = place.sandbox();
    let cgroup = place.cgroup("t");
    sandbox.enter_rootfs(&place.rootfs("first")).unwrap();
    let (stdio, _output) = stdio();
    let root = sandbox
        .spawn(&program(Role::Root, &["sleep", "1000"]), stdio, &cgroup)
        .unwrap();
    let exits = sandbox.exits().unwrap();
    // SAFETY: kill takes no pointers.
    unsafe { libc::kill(sandbox.init_pid(), libc::SIGKILL) };
    assert_eq!(exits.next_within(Duration::from_secs(5)).unwrap(), None);
    let error = sandbox.purge().unwrap_err();
    assert!(matches!(error, SandboxError::Gone { .. }), "{error}");
    let error = sandbox.enter_rootfs(&place.rootfs("second")).unwrap_err();
    assert!(matches!(error, SandboxError::Gone { .. }), "{error}");
    let (more, _output) = support::stdio();
    assert!(
        sandbox
            .spawn(&program(Role::Exec, &["true"]), more, &cgroup)
            .is_err()
    );
    sandbox.destroy().unwrap();
    assert!(!alive(&root.pid.to_string()));
    assert!(cgroup.pids().unwrap().is_empty());
    cgroup.remove().unwrap();
}

#[test]
fn processes_inside_cannot_end_pid_one() {
    let place = Place::new();
    let sandbox = place.sandbox();
    let cgroup = place.cgroup("t");
    sandbox.enter_rootfs(&place.rootfs("first")).unwrap();
    let script = "for s in 1 2 3 9 11 15 19 20 31; do kill -$s 1; done; kill -0 1 && echo lives";
    let mut spec = shell(Role::Exec, script);
    spec.capabilities = Some(trenv_sandbox::process::CapabilitySets {
        bounding: 1 << 5,
        effective: 1 << 5,
        permitted: 1 << 5,
        ..Default::default()
    });
    assert_eq!(support::run_spec(&sandbox, &cgroup, &spec).0, "lives\n");
    sandbox.purge().unwrap();
    sandbox.destroy().unwrap();
}

#[test]
fn a_wrong_binary_or_namespace_is_named() {
    let place = Place::new();
    let mut request = place.request();
    request.init_binary = "/nonexistent/trenv-init".into();
    let error = Sandbox::create(&request).unwrap_err();
    assert!(
        error.to_string().contains("/nonexistent/trenv-init"),
        "{error}"
    );
    let mut request = place.request();
    request.netns = "/nonexistent/netns".into();
    assert!(Sandbox::create(&request).is_err());
    let mut request = place.request();
    request.netns = "/etc/hostname".into();
    let error = Sandbox::create(&request).unwrap_err();
    let source = std::error::Error::source(&error).unwrap().to_string();
    assert!(source.contains("network namespace"), "{source}");
    // Nothing is left of the failed ones.
    let sandbox = place.sandbox();
    assert_ne!(
        namespace(sandbox.init_pid(), "pid"),
        namespace(std::process::id().cast_signed(), "pid"),
    );
    sandbox.destroy().unwrap();
}

#[test]
fn many_sandboxes_come_and_go_without_a_leak() {
    let place = Place::new();
    let descriptors = || fs::read_dir("/proc/self/fd").unwrap().count();
    let ours = place.dir.path().display().to_string();
    let mounts = || {
        let all = fs::read_to_string("/proc/self/mountinfo").unwrap();
        all.lines().filter(|line| line.contains(&ours)).count()
    };
    // Other tests of this file run beside this one: only a rise that keeps up with the number of
    // sandboxes is a leak.
    let before = (descriptors(), mounts());
    for _ in 0..40 {
        let sandbox = place.sandbox();
        sandbox.enter_rootfs(&place.rootfs("image")).unwrap();
        sandbox.destroy().unwrap();
    }
    let after = (descriptors(), mounts());
    assert!(after.0 < before.0 + 30, "{before:?} {after:?}");
    assert_eq!(after.1, before.1);
}
