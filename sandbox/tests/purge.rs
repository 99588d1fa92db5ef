//! Nothing of a tenancy is left after a purge: marks are planted wherever a function can leave
//! one, and the next tenancy looks for every one.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "tests fail by panicking"
)]

mod support;

use std::fs;

use support::{Place, program, run, shell, stdio};
use trenv_sandbox::{SandboxError, process::Role};

/// Leaves marks and prints what is there, so that the test knows that each was planted.
const PLANT: &str = r#"
echo mark > /root/mark; echo mark > /tmp/mark; echo mark > /run/mark; echo mark > /dev/shm/mark
echo mark > /dev/mark; mkdir -p /var/mark; : > /dev/mqueue/mark
ipcmk -M 4096 >/dev/null; ipcmk -Q >/dev/null; ipcmk -S 1 >/dev/null
perl -e 'use Socket; socket(S, PF_UNIX, SOCK_STREAM, 0); bind(S, pack_sockaddr_un("\0mark"));
    listen(S, 1); sleep 100' &
perl -e 'use Socket; $a = pack_sockaddr_in(9009, inet_aton("127.0.0.1"));
    socket(L, PF_INET, SOCK_STREAM, 0); bind(L, $a) or die; listen(L, 1);
    for (1..3) { socket(C, PF_INET, SOCK_STREAM, 0); connect(C, $a) or die;
        accept(A, L); close(C); close(A); }'
perl -e 'use Socket; $a = pack_sockaddr_in(9010, inet_aton("127.0.0.1"));
    socket(L, PF_INET, SOCK_STREAM, 0); bind(L, $a) or die; listen(L, 1);
    socket(C, PF_INET, SOCK_STREAM, 0); connect(C, $a); accept(A, L); sleep 100' &
(setsid sleep 100 &)
sleep 0.3
"#;

/// Prints one line for every mark that is there.
const LOOK: &str = r#"
for f in /root/mark /tmp/mark /run/mark /dev/shm/mark /dev/mark /var/mark /dev/mqueue/mark; do
    [ -e $f ] && echo "file $f"; done
ipcs -m | grep -q '^0x' && echo sysv-memory
ipcs -q | grep -q '^0x' && echo sysv-queue
ipcs -s | grep -q '^0x' && echo sysv-semaphore
grep -q '@mark' /proc/net/unix && echo abstract-socket
grep -q ' 06 ' /proc/net/tcp && echo time-wait
grep -q ' 01 ' /proc/net/tcp && echo connection
grep -q -E '^(sleep|perl)$' /proc/[0-9]*/comm 2>/dev/null && echo processes
true
"#;

#[test]
fn nothing_of_a_tenancy_is_left() {
    let place = Place::new();
    let sandbox = place.sandbox();
    let cgroup = place.cgroup("t");
    sandbox.enter_rootfs(&place.rootfs("first")).unwrap();
    let (stdio, _output) = stdio();
    let planted = format!("{PLANT}\necho ready > /root/ready; sleep 100");
    sandbox
        .spawn(&shell(Role::Root, &planted), stdio, &cgroup)
        .unwrap();
    let [_, upper, _] = place.layers("first");
    for _ in 0..100 {
        if upper.join("root/ready").exists() {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    let (seen, _) = run(&sandbox, &cgroup, LOOK);
    let wanted = [
        "file /root/mark",
        "file /tmp/mark",
        "file /run/mark",
        "file /dev/shm/mark",
        "file /dev/mark",
        "file /var/mark",
        "file /dev/mqueue/mark",
        "sysv-memory",
        "sysv-queue",
        "sysv-semaphore",
        "abstract-socket",
        "time-wait",
        "connection",
        "processes",
    ];
    assert_eq!(seen.lines().collect::<Vec<_>>(), wanted);

    sandbox.purge().unwrap();
    assert!(cgroup.pids().unwrap().is_empty());
    sandbox.enter_rootfs(&place.rootfs("second")).unwrap();
    let (seen, _) = run(&sandbox, &cgroup, LOOK);
    assert_eq!(seen, "");
    let (hostname, _) = run(&sandbox, &cgroup, "hostname");
    assert_eq!(hostname, "second\n");
    // The port is free at once for a listener without SO_REUSEADDR.
    let bind = r#"use Socket; socket(L, PF_INET, SOCK_STREAM, 0);
        bind(L, pack_sockaddr_in(9009, inet_aton("127.0.0.1"))) or exit 9; listen(L, 1) or exit 8"#;
    let spec = program(Role::Exec, &["/usr/bin/perl", "-e", bind]);
    assert_eq!(support::run_spec(&sandbox, &cgroup, &spec).1, 0);
    sandbox.destroy().unwrap();
}

#[test]
fn mounts_of_a_tenancy_go_with_it() {
    let place = Place::new();
    let sandbox = place.sandbox();
    let cgroup = place.cgroup("t");
    let count = || {
        fs::read_to_string(format!("/proc/{}/mountinfo", sandbox.init_pid()))
            .unwrap()
            .lines()
            .count()
    };
    // The parts of the next root are made just after an answer.
    let settled = || {
        std::thread::sleep(std::time::Duration::from_millis(100));
        count()
    };
    let idle = settled();
    for _ in 0..3 {
        sandbox.enter_rootfs(&place.rootfs("first")).unwrap();
        let mut spec = shell(Role::Exec, "mount -t tmpfs none /tmp && echo x > /tmp/x");
        spec.capabilities = Some(trenv_sandbox::process::CapabilitySets {
            bounding: 1 << 21,
            effective: 1 << 21,
            inheritable: 0,
            permitted: 1 << 21,
            ambient: 0,
        });
        let (text, code) = support::run_spec(&sandbox, &cgroup, &spec);
        assert_eq!((text.as_str(), code), ("", 0));
        assert!(count() > idle);
        sandbox.purge().unwrap();
        assert_eq!(settled(), idle);
    }
    sandbox.destroy().unwrap();
}

/// Gets out of a root of its own as every process can that may call chroot, and tries to leave marks.
const ESCAPE: &str = r#"
mkdir "/jail"; chroot "/jail" or die "no chroot: $!"; chdir ".." for 1..20; chroot "." or die;
for $place ("image", "mark", "dev/mark", "run/mark") { print "$place\n" if open F, ">>", $place }
"#;

#[test]
fn out_of_its_root_a_function_finds_its_root_again() {
    let place = Place::new();
    let sandbox = place.sandbox();
    let cgroup = place.cgroup("t");
    let empty = || {
        let root = format!("/proc/{}/root", sandbox.init_pid());
        let names = fs::read_dir(root).unwrap().flatten();
        let mut names: Vec<_> = names.map(|entry| entry.file_name()).collect();
        names.sort();
        names
    };
    let before = empty();
    sandbox.enter_rootfs(&place.rootfs("first")).unwrap();
    let mut spec = program(Role::Exec, &["/usr/bin/perl", "-e", ESCAPE]);
    let may_chroot = 1 << 18;
    spec.capabilities = Some(trenv_sandbox::process::CapabilitySets {
        bounding: may_chroot,
        effective: may_chroot,
        inheritable: 0,
        permitted: may_chroot,
        ambient: 0,
    });
    let (text, code) = support::run_spec(&sandbox, &cgroup, &spec);
    // The image's file shows that this is the tenancy's own root, not the empty one below it.
    assert_eq!(
        (text.as_str(), code),
        ("image\nmark\ndev/mark\nrun/mark\n", 0)
    );
    sandbox.purge().unwrap();
    assert_eq!(empty(), before);
    sandbox.enter_rootfs(&place.rootfs("second")).unwrap();
    let look = "ls /mark /dev/mark /run/mark 2>/dev/null; cat /image";
    assert_eq!(run(&sandbox, &cgroup, look).0, "second");
    sandbox.destroy().unwrap();
}

#[test]
fn changed_addresses_are_noticed() {
    let place = Place::new();
    let sandbox = place.sandbox();
    sandbox.enter_rootfs(&place.rootfs("first")).unwrap();
    place.at_netns(|| {
        let add = ["address", "add", "192.0.2.77/32", "dev", "lo"];
        assert!(
            std::process::Command::new("ip")
                .args(add)
                .status()
                .unwrap()
                .success()
        );
    });
    let error = sandbox.purge().unwrap_err();
    assert!(matches!(error, SandboxError::Init { .. }), "{error}");
    assert!(error.to_string().contains("in the network"), "{error}");
    sandbox.destroy().unwrap();
}

#[test]
fn an_idle_sandbox_can_be_purged_again() {
    let place = Place::new();
    let sandbox = place.sandbox();
    let cgroup = place.cgroup("t");
    sandbox.purge().unwrap();
    sandbox.purge().unwrap();
    sandbox.enter_rootfs(&place.rootfs("first")).unwrap();
    assert_eq!(run(&sandbox, &cgroup, "cat /image").0, "first");
    let error = sandbox.enter_rootfs(&place.rootfs("second")).unwrap_err();
    assert!(error.to_string().contains("purge it first"), "{error}");
    assert_eq!(run(&sandbox, &cgroup, "cat /image").0, "first");
    sandbox.destroy().unwrap();
}

#[test]
fn after_a_refused_root_the_sandbox_takes_another() {
    let place = Place::new();
    let sandbox = place.sandbox();
    let cgroup = place.cgroup("t");
    let mut broken = place.rootfs("first");
    // /image is a file: nothing can be mounted below it.
    broken.parts[0].destination = "/image/usr".into();
    let error = sandbox.enter_rootfs(&broken).unwrap_err();
    assert!(error.to_string().contains("/image"), "{error}");
    drop(broken);
    sandbox.enter_rootfs(&place.rootfs("second")).unwrap();
    assert_eq!(run(&sandbox, &cgroup, "cat /image").0, "second");
    sandbox.destroy().unwrap();
}
