//! Processes are what their spec says: user, capabilities, limits, seccomp, terminal, descriptors.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "tests fail by panicking"
)]

mod support;

use std::{
    fs,
    io::{Read, Write},
    path::Path,
    time::Duration,
};

use oci_spec::runtime::{LinuxSeccomp, Process};
use support::{Place, program, run, run_spec, shell, stdio};
use trenv_sandbox::{
    ProcessSpec, Sandbox,
    cgroup::TenancyCgroup,
    process::{Rlimit, Role, TerminalSize},
    rootfs::{BindFlags, tmpfs},
};

struct Entered {
    place: Place,
    sandbox: Sandbox,
    cgroup: TenancyCgroup,
}

impl Entered {
    fn new() -> Self {
        let place = Place::new();
        let sandbox = place.sandbox();
        sandbox.enter_rootfs(&place.rootfs("image")).unwrap();
        let cgroup = place.cgroup("t");
        Self {
            place,
            sandbox,
            cgroup,
        }
    }

    fn run(&self, spec: &ProcessSpec) -> (String, i32) {
        run_spec(&self.sandbox, &self.cgroup, spec)
    }

    fn refusal(&self, spec: &ProcessSpec) -> String {
        let (stdio, _output) = stdio();
        self.sandbox
            .spawn(spec, stdio, &self.cgroup)
            .unwrap_err()
            .to_string()
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        self.sandbox.destroy().unwrap();
        assert!(self.cgroup.pids().unwrap().is_empty());
        let _ = &self.place;
    }
}

/// A process as containerd's default spec has it.
const DEFAULT: &str = r#"{
    "user": {"uid": 1000, "gid": 1000, "additionalGids": [5, 6]},
    "args": ["/bin/sh", "-c", "true"],
    "env": ["PATH=/usr/bin:/bin", "MARK=seen"],
    "cwd": "/srv/dir",
    "capabilities": {
        "bounding": ["CAP_CHOWN", "CAP_KILL", "CAP_NET_BIND_SERVICE"],
        "effective": ["CAP_NET_BIND_SERVICE"],
        "permitted": ["CAP_KILL", "CAP_NET_BIND_SERVICE"],
        "inheritable": ["CAP_NET_BIND_SERVICE"],
        "ambient": ["CAP_NET_BIND_SERVICE"]},
    "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 512, "soft": 256}],
    "noNewPrivileges": true}"#;

fn default_process(script: &str) -> ProcessSpec {
    let mut process: Process = serde_json::from_str(DEFAULT).unwrap();
    process.set_args(Some(vec!["/bin/sh".into(), "-c".into(), script.into()]));
    ProcessSpec::from_oci(&process, None, Role::Root).unwrap()
}

#[test]
fn a_process_has_what_its_spec_gives_it() {
    let entered = Entered::new();
    let script = "id -u; id -g; id -G; pwd; umask; ulimit -n; ulimit -Hn; echo $MARK $HOME $$
        grep -E '^(Cap|NoNewPrivs|Seccomp:|SigIgn|SigBlk)' /proc/self/status";
    let (text, code) = entered.run(&default_process(script));
    assert_eq!(code, 0, "{text}");
    let lines: Vec<&str> = text.lines().map(str::trim).collect();
    let mut wanted = vec![
        "1000", "1000", "1000 5 6", "/srv/dir", "0022", "256", "512", "seen / 2",
    ];
    // The shell is a child of nobody special: it ignores and blocks nothing.
    wanted.extend(["SigBlk:\t0000000000000000", "SigIgn:\t0000000000000000"]);
    wanted.extend([
        "CapInh:\t0000000000000400",
        "CapPrm:\t0000000000000400",
        "CapEff:\t0000000000000400",
        "CapBnd:\t0000000000000421",
        "CapAmb:\t0000000000000400",
        "NoNewPrivs:\t1",
        "Seccomp:\t2",
    ]);
    assert_eq!(lines, wanted);
}

#[test]
fn without_capabilities_even_root_has_none() {
    let entered = Entered::new();
    let (text, _) = entered.run(&shell(
        Role::Exec,
        "grep -c 0000000000000000 /proc/self/status",
    ));
    // CapInh, CapPrm, CapEff, CapBnd, CapAmb and the signal sets.
    assert!(text.trim().parse::<u32>().unwrap() >= 5, "{text}");
    let (_, code) = entered.run(&shell(Role::Exec, "hostname changed 2>/dev/null"));
    assert_ne!(code, 0);
}

#[test]
fn descriptors_are_the_three_given_ones() {
    let entered = Entered::new();
    let (text, _) = entered.run(&program(Role::Root, &["ls", "/proc/self/fd"]));
    // The fourth is the directory that ls itself reads.
    assert_eq!(text, "0\n1\n2\n3\n");
    let (text, _) = entered.run(&program(Role::Exec, &["readlink", "/proc/self/fd/0"]));
    assert_eq!(text, "/dev/null\n");
}

#[test]
fn keyrings_and_io_uring_are_denied() {
    let entered = Entered::new();
    let script = r#"for $n (248, 249, 250, 425) { $! = 0; syscall($n, 0, 0, 0, 0, 0);
        print $!+0, "\n" }"#;
    let mut spec = program(Role::Exec, &["/usr/bin/perl", "-e", script]);
    assert_eq!(entered.run(&spec).0, "1\n1\n1\n38\n");
    spec.no_new_privileges = false;
    assert_eq!(entered.run(&spec).0, "1\n1\n1\n38\n");
}

#[test]
fn a_seccomp_profile_is_applied_with_and_without_new_privileges() {
    let profile: LinuxSeccomp = serde_json::from_str(
        r#"{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
            {"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 95},
            {"names": ["kill"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1,
             "args": [{"index": 1, "value": 10, "op": "SCMP_CMP_EQ"}]}]}"#,
    )
    .unwrap();
    let mut process: Process = serde_json::from_str(DEFAULT).unwrap();
    let script = "mkdir /tmp/x 2>&1; kill -10 $$ 2>&1; kill -0 $$ && echo fine";
    process.set_args(Some(vec!["/bin/sh".into(), "-c".into(), script.into()]));
    let entered = Entered::new();
    for no_new_privileges in [true, false] {
        let mut spec = ProcessSpec::from_oci(&process, Some(&profile), Role::Root).unwrap();
        spec.no_new_privileges = no_new_privileges;
        let (text, _) = entered.run(&spec);
        assert!(text.contains("Operation not supported"), "{text}");
        assert!(text.contains("Operation not permitted"), "{text}");
        assert!(text.ends_with("fine\n"), "{text}");
    }
}

#[test]
fn what_is_wrong_with_a_program_is_said() {
    let entered = Entered::new();
    let text = entered.refusal(&program(Role::Root, &["no-such-program"]));
    assert!(text.contains("no-such-program in sandbox box"), "{text}");
    assert!(text.contains("PATH (/usr/bin:/bin)"), "{text}");
    let text = entered.refusal(&program(Role::Root, &["/no/such/file"]));
    assert!(
        text.ends_with("/no/such/file in sandbox box: no such file"),
        "{text}"
    );
    let text = entered.refusal(&program(Role::Root, &["/image"]));
    assert!(text.contains("may not be executed"), "{text}");
    let text = entered.refusal(&program(Role::Root, &["/usr"]));
    assert!(text.contains("directory"), "{text}");
    let mut spec = shell(Role::Root, "true");
    spec.rlimits = vec![Rlimit {
        resource: 7,
        soft: 2,
        hard: 1,
    }];
    assert!(entered.refusal(&spec).contains("resource limit"));
    let mut spec = shell(Role::Root, "true");
    spec.cwd = "/image".into();
    assert!(entered.refusal(&spec).contains("working directory"));
    // None of them is left, nor reported as ended; the place of the root is free.
    let exits = entered.sandbox.exits().unwrap();
    let none = exits.next_within(Duration::from_millis(50)).unwrap_err();
    assert_eq!(none.kind(), std::io::ErrorKind::TimedOut);
    assert_eq!(entered.run(&shell(Role::Root, "exit 3")).1, 3);
}

#[test]
fn only_one_root_at_a_time() {
    let entered = Entered::new();
    let (stdio, _output) = stdio();
    let root = entered
        .sandbox
        .spawn(&shell(Role::Root, "sleep 100"), stdio, &entered.cgroup)
        .unwrap();
    let text = entered.refusal(&shell(Role::Root, "true"));
    assert!(text.contains("running in it already"), "{text}");
    trenv_sandbox::sys::pidfd_kill(std::os::fd::AsFd::as_fd(&root.pidfd), 15).unwrap();
    let exits = entered.sandbox.exits().unwrap();
    let exit = exits.next_within(Duration::from_secs(5)).unwrap().unwrap();
    assert_eq!((exit.pid_in_sandbox, exit.status.code()), (2, 143));
}

#[test]
fn a_terminal_is_the_controlling_one() {
    let entered = Entered::new();
    let mut spec = shell(
        Role::Exec,
        "tty; stty size; read line; echo got $line >/dev/tty",
    );
    spec.terminal = Some(TerminalSize {
        rows: 33,
        columns: 77,
    });
    let (stdio, _output) = stdio();
    let spawned = entered
        .sandbox
        .spawn(&spec, stdio, &entered.cgroup)
        .unwrap();
    let mut terminal = fs::File::from(spawned.terminal.unwrap());
    terminal.write_all(b"hello\n").unwrap();
    let mut text = Vec::new();
    // Reading a terminal whose other end is closed ends with an error.
    let _ = terminal.read_to_end(&mut text);
    let text = String::from_utf8(text).unwrap();
    assert!(text.contains("/dev/pts/0"), "{text}");
    assert!(text.contains("33 77"), "{text}");
    assert!(text.contains("got hello"), "{text}");
}

#[test]
fn orphans_are_reaped_by_pid_one() {
    let entered = Entered::new();
    let (_, code) = entered.run(&shell(Role::Exec, "(sh -c 'sleep 0.2; exit 9' &); exit 0"));
    assert_eq!(code, 0);
    let exits = entered.sandbox.exits().unwrap();
    let exit = exits.next_within(Duration::from_secs(5)).unwrap().unwrap();
    assert_eq!(exit.status.code(), 9);
    let script = "sleep 0.1; cat /proc/[0-9]*/stat";
    let (text, _) = entered.run(&shell(Role::Exec, script));
    assert!(!text.contains(" Z "), "{text}");
}

#[test]
fn what_containers_may_not_see_is_hidden() {
    let entered = Entered::new();
    let script =
        "wc -c < /proc/timer_list; wc -c < /proc/keys; ls /proc/acpi /sys/firmware 2>/dev/null
        echo 1 2>/dev/null > /proc/sys/kernel/shmmni && echo written
        echo 1 2>/dev/null > /sys/kernel/mm/ksm/run && echo written
        ls /dev; cat /proc/1/environ 2>/dev/null; readlink /proc/1/fd/0 /proc/1/exe /proc/1/root";
    let mut spec = shell(Role::Exec, script);
    // Root with all that containers get by default, as far as it matters here.
    spec.capabilities = Some(trenv_sandbox::process::CapabilitySets {
        bounding: 0xa804_25fb,
        effective: 0xa804_25fb,
        permitted: 0xa804_25fb,
        ..Default::default()
    });
    let (text, _) = entered.run(&spec);
    let wanted = "0\n0\n/proc/acpi:\n\n/sys/firmware:\ncore\nfd\nfull\nmqueue\nnull\nptmx\npts\n\
                  random\nshm\nstderr\nstdin\nstdout\ntty\nurandom\nzero\n";
    // A kernel without ACPI has no /proc/acpi.
    let wanted_without = wanted.replace("/proc/acpi:\n\n/sys/firmware:\n", "");
    assert!(text == wanted || text == wanted_without, "{text}");
}

#[test]
fn disks_cannot_be_read_even_with_a_node() {
    let entered = Entered::new();
    let mut spec = shell(
        Role::Exec,
        "mknod /disk b 254 0 && mknod /null c 1 3 && echo made; cat /null && echo null
         head -c 1 /disk 2>&1",
    );
    spec.capabilities = Some(trenv_sandbox::process::CapabilitySets {
        bounding: 1 << 27,
        effective: 1 << 27,
        permitted: 1 << 27,
        ..Default::default()
    });
    let (text, code) = entered.run(&spec);
    assert!(text.starts_with("made\nnull\n"), "{text}");
    assert!(text.contains("Operation not permitted"), "{text}");
    assert_ne!(code, 0);
}

#[test]
fn roots_can_be_read_only_and_hold_other_mounts() {
    let place = Place::new();
    let sandbox = place.sandbox();
    let cgroup = place.cgroup("t");
    let file = place.dir.path().join("secret");
    fs::write(&file, "secret").unwrap();
    let mut root = place.rootfs("image");
    root.read_only = true;
    root.masked_paths = vec!["/usr/share".into(), "/proc/version".into()];
    root.readonly_paths = vec!["/scratch/fixed".into()];
    let read_only = BindFlags {
        read_only: true,
        ..BindFlags::default()
    };
    let destination = Path::new("/var/openfaas/secrets/one");
    root.parts
        .push(trenv_sandbox::Part::bind(&file, destination, read_only).unwrap());
    root.parts.push(trenv_sandbox::Part {
        mount: tmpfs(&[("size", "1m"), ("mode", "1777")], BindFlags::default()).unwrap(),
        destination: "/scratch".into(),
        directory: true,
    });
    sandbox.enter_rootfs(&root).unwrap();
    drop(root);
    let script = "cat /var/openfaas/secrets/one; echo
        echo x > /x || echo root-read-only; echo x > /var/openfaas/secrets/one || echo fixed
        echo x > /scratch/x && cat /scratch/x; ls /usr/share | wc -l; wc -c < /proc/version";
    let (text, _) = run(&sandbox, &cgroup, &format!("exec 2>/dev/null; {script}"));
    assert_eq!(text, "secret\nroot-read-only\nfixed\nx\n0\n0\n");
    sandbox.destroy().unwrap();
}

#[test]
fn links_in_an_image_cannot_lead_mounts_outside() {
    let place = Place::new();
    let sandbox = place.sandbox();
    let cgroup = place.cgroup("t");
    let mut root = place.rootfs("image");
    let [lower, ..] = place.layers("image");
    std::os::unix::fs::symlink("/../../tmp", lower.join("leads-out")).unwrap();
    let secret = place.dir.path().join("secret");
    fs::write(&secret, "secret").unwrap();
    let destination = Path::new("/leads-out/planted");
    root.parts
        .push(trenv_sandbox::Part::bind(&secret, destination, BindFlags::default()).unwrap());
    sandbox.enter_rootfs(&root).unwrap();
    drop(root);
    assert_eq!(run(&sandbox, &cgroup, "cat /tmp/planted").0, "secret");
    sandbox.destroy().unwrap();

    let sandbox = place.sandbox();
    let mut root = place.rootfs("proc");
    let [lower, ..] = place.layers("proc");
    std::os::unix::fs::symlink("/proc/self", lower.join("leads-to-proc")).unwrap();
    let destination = Path::new("/leads-to-proc/environ");
    root.parts
        .push(trenv_sandbox::Part::bind(&secret, destination, BindFlags::default()).unwrap());
    let error = sandbox.enter_rootfs(&root).unwrap_err();
    assert!(error.to_string().contains("in /proc"), "{error}");
    drop(root);

    let root = place.rootfs("other");
    let [lower, ..] = place.layers("other");
    fs::remove_dir(lower.join("proc")).unwrap();
    std::os::unix::fs::symlink("/usr", lower.join("proc")).unwrap();
    let error = sandbox.enter_rootfs(&root).unwrap_err();
    assert!(error.to_string().contains("mount point of proc"), "{error}");
    sandbox.destroy().unwrap();
}
