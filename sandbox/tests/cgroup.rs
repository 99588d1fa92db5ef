//! Tenancy cgroups on this machine's own hierarchies.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "tests fail by panicking"
)]

use std::{
    fs,
    process::{Child, Command, Stdio},
    time::Duration,
};

use trenv_sandbox::cgroup::{self, Limits, TenancyCgroup, Version, version};

struct Parent(String);

impl Parent {
    fn new(name: &str) -> Self {
        Self(format!("trenv-test-{}-{name}", std::process::id()))
    }

    fn group(&self, limits: &Limits) -> TenancyCgroup {
        TenancyCgroup::create(&self.0, "t", limits).unwrap()
    }
}

impl Drop for Parent {
    fn drop(&mut self) {
        cgroup::sweep(&self.0).unwrap();
    }
}

fn sleeper() -> Child {
    Command::new("sleep").arg("1000").spawn().unwrap()
}

fn pid(child: &Child) -> i32 {
    child.id().cast_signed()
}

#[test]
fn memory_is_kept_from_swap() {
    let parent = Parent::new("swap");
    let group = parent.group(&Limits::default());
    group.keep_from_swap().unwrap();
    let limits = group.dirs().into_iter().flat_map(|dir| {
        ["memory.swap.max", "memory.swappiness"]
            .map(|file| dir.join(file))
            .into_iter()
            .filter(|file| file.exists())
    });
    for file in limits {
        assert_eq!(fs::read_to_string(&file).unwrap(), "0\n", "{file:?}");
    }
}

#[test]
fn processes_are_added_in_every_hierarchy_and_killed() {
    let parent = Parent::new("kill");
    let group = parent.group(&Limits::default());
    let mut children: Vec<Child> = (0..5).map(|_| sleeper()).collect();
    for child in &children {
        group.add(pid(child)).unwrap();
    }
    for dir in group.dirs() {
        let procs = fs::read_to_string(dir.join("cgroup.procs")).unwrap();
        assert_eq!(procs.lines().count(), 5, "{}", dir.display());
    }
    assert_eq!(group.pids().unwrap().len(), 5);
    group.kill_all().unwrap();
    assert!(group.pids().unwrap().is_empty());
    for child in &mut children {
        child.wait().unwrap();
    }
    group.remove().unwrap();
    group.remove().unwrap();
    assert!(group.dirs().iter().all(|dir| !dir.exists()));
    assert!(group.pids().unwrap().is_empty());
}

#[test]
fn forking_processes_are_killed_too() {
    let parent = Parent::new("fork");
    let group = parent.group(&Limits {
        pids: Some(50),
        ..Limits::default()
    });
    // Waits for a line, so that everything it forks is born inside.
    let mut child = Command::new("sh")
        .args(["-c", "read go; while :; do sleep 1 & sleep 0.001; done"])
        .stdin(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    group.add(pid(&child)).unwrap();
    drop(child.stdin.take());
    let begun = std::time::Instant::now();
    while group.pids().unwrap().len() <= 3 {
        assert!(begun.elapsed() < Duration::from_secs(10), "nothing forks");
        std::thread::sleep(Duration::from_millis(5));
    }
    group.kill_all().unwrap();
    assert!(group.pids().unwrap().is_empty());
    child.wait().unwrap();
    group.remove().unwrap();
}

#[test]
fn frozen_processes_stand_still_and_can_be_killed() {
    let parent = Parent::new("freeze");
    let group = parent.group(&Limits::default());
    let mut child = Command::new("sh")
        .args(["-c", "while :; do :; done"])
        .spawn()
        .unwrap();
    group.add(pid(&child)).unwrap();
    let ticks = || {
        let stat = fs::read_to_string(format!("/proc/{}/stat", child.id())).unwrap();
        let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split(' ').collect();
        fields[12].parse::<u64>().unwrap()
    };
    group.freeze().unwrap();
    let before = ticks();
    std::thread::sleep(Duration::from_millis(150));
    assert_eq!(ticks(), before);
    group.thaw().unwrap();
    std::thread::sleep(Duration::from_millis(300));
    assert!(ticks() > before);
    group.freeze().unwrap();
    group.kill_all().unwrap();
    child.wait().unwrap();
    group.remove().unwrap();
}

#[test]
fn limits_hold_and_can_be_changed() {
    let parent = Parent::new("limits");
    let limits = Limits {
        memory: Some(64 << 20),
        memory_and_swap: Some(64 << 20),
        cpu_quota_us: Some(50_000),
        cpu_period_us: Some(100_000),
        cpu_shares: Some(512),
        pids: Some(10),
        ..Limits::default()
    };
    let Ok(group) = TenancyCgroup::create(&parent.0, "t", &limits) else {
        assert!(
            matches!(version().unwrap(), Version::V2(_)),
            "v1 has these controllers"
        );
        println!("skipped: this machine's cgroup v2 hands down no controllers");
        return;
    };
    let stats = group.stats().unwrap();
    assert_eq!(stats.memory_limit_bytes, Some(64 << 20));
    assert_eq!(stats.pids_limit, Some(10));
    let up = Limits {
        memory: Some(128 << 20),
        memory_and_swap: Some(128 << 20),
        ..limits.clone()
    };
    group.update(&up).unwrap();
    assert_eq!(group.stats().unwrap().memory_limit_bytes, Some(128 << 20));
    group.update(&limits).unwrap();
    assert_eq!(group.stats().unwrap().memory_limit_bytes, Some(64 << 20));

    // Waits until it is inside, then takes more than it may.
    let mut hungry = Command::new("sh")
        .args(["-c", "read go; exec perl -e '$x = \"a\" x (200 << 20)'"])
        .stdin(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    group.add(pid(&hungry)).unwrap();
    drop(hungry.stdin.take());
    assert!(!hungry.wait().unwrap().success());
    let stats = group.stats().unwrap();
    assert!(stats.oom_kills >= 1, "{stats:?}");
    assert!(stats.cpu_ns > 0);
    assert!(stats.memory_peak_bytes > 16 << 20);
    if group.reset_counters().unwrap() {
        let stats = group.stats().unwrap();
        assert!(stats.memory_peak_bytes < 16 << 20, "{stats:?}");
        assert!(stats.cpu_ns < 10_000_000, "{stats:?}");
    }
    group.remove().unwrap();
}

#[test]
fn refused_limits_leave_nothing() {
    let parent = Parent::new("refused");
    let limits = Limits {
        cpuset_cpus: Some("9999".into()),
        ..Limits::default()
    };
    let error = TenancyCgroup::create(&parent.0, "t", &limits).unwrap_err();
    assert!(error.to_string().contains("9999"), "{error}");
    let there = TenancyCgroup::create(&parent.0, "other", &Limits::default()).unwrap();
    let siblings: Vec<_> = there
        .dirs()
        .iter()
        .filter(|dir| dir.with_file_name("t").exists())
        .cloned()
        .collect();
    assert!(siblings.is_empty(), "{siblings:?}");
}

#[test]
fn a_sweep_kills_and_removes_all_below_its_parent() {
    let parent = Parent::new("sweep");
    let nested = TenancyCgroup::create(&parent.0, "a/b", &Limits::default()).unwrap();
    let other = TenancyCgroup::create(&parent.0, "c", &Limits::default()).unwrap();
    let mut child = sleeper();
    nested.add(pid(&child)).unwrap();
    assert_eq!(cgroup::sweep(&parent.0).unwrap(), 3);
    child.wait().unwrap();
    assert!(other.dirs().iter().all(|dir| !dir.exists()));
    assert_eq!(cgroup::sweep(&parent.0).unwrap(), 0);
}

#[test]
fn names_cannot_leave_the_hierarchy() {
    for (parent, name) in [("..", "x"), ("a", "../.."), ("", ""), ("a//b", "c")] {
        assert!(
            TenancyCgroup::create(parent, name, &Limits::default()).is_err(),
            "{parent:?} {name:?}"
        );
    }
}
