//! Containers without our annotation: the stock shim is the oracle.

#![allow(clippy::unwrap_used)]

mod support;

use std::io::Write;
use std::process::Stdio;

use support::{Containerd, IMAGE, RUNC, TRENV, containerd};

/// What a container prints and how it ends.
#[derive(Debug, PartialEq, Eq)]
struct Seen {
    stdout: String,
    stderr: String,
    status: Option<i32>,
}

fn see(
    containerd: &Containerd,
    runtime: &str,
    flags: &[&str],
    arguments: &[&str],
    input: &str,
) -> Seen {
    let mut line = vec!["run", "--rm", "--runtime", runtime];
    line.extend(flags);
    let id = containerd.unique("t1");
    line.extend([IMAGE, &id]);
    line.extend(arguments);
    let mut child = containerd
        .command(&line)
        .stdin(if input.is_empty() {
            Stdio::null()
        } else {
            Stdio::piped()
        })
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(input.as_bytes()).unwrap();
    }
    let output = child.wait_with_output().unwrap();
    let text = |bytes: &[u8]| {
        let text = String::from_utf8_lossy(bytes);
        // ctr's own lines tell the time.
        text.lines()
            .filter(|line| !line.starts_with("time="))
            .map(|line| format!("{line}\n"))
            .collect()
    };
    Seen {
        stdout: text(&output.stdout),
        stderr: text(&output.stderr),
        status: output.status.code(),
    }
}

#[test]
fn a_container_is_the_same_as_by_the_stock_shim() {
    let Some(containerd) = containerd("passthrough") else {
        return;
    };
    let script = "id; hostname; cat /proc/self/cgroup; cat /proc/self/limits; cat /proc/mounts | while read a b c; do echo $b; done; ls /dev; env; echo err >&2; exit 3";
    let cases: [(&str, &[&str], Vec<&str>, &str); 7] = [
        ("ordinary", &[], vec!["/bin/sh", "-c", script], ""),
        (
            "read-only",
            &["--read-only"],
            vec!["/bin/sh", "-c", "touch /x; ls -ld /; id"],
            "",
        ),
        (
            "seccomp",
            &["--seccomp"],
            vec![
                "/bin/sh",
                "-c",
                "cat /proc/self/status | while read a b; do case $a in Seccomp*|Cap*|NoNew*) echo $a $b;; esac; done",
            ],
            "",
        ),
        (
            "memory",
            &["--memory-limit", "67108864"],
            vec!["/bin/sh", "-c", "id"],
            "",
        ),
        (
            "mount",
            &["--mount", "type=bind,src=/etc,dst=/host,options=rbind:ro"],
            vec!["/bin/sh", "-c", "touch /host/x; ls /host/passwd"],
            "",
        ),
        ("signal", &[], vec!["/bin/sh", "-c", "kill -9 $$"], ""),
        (
            "stdin",
            &[],
            vec!["/bin/sh", "-c", "read a; read b; echo $b $a"],
            "line one\nline two\n",
        ),
    ];
    for (name, flags, arguments, input) in cases {
        let stock = see(&containerd, RUNC, flags, &arguments, input);
        let ours = see(&containerd, TRENV, flags, &arguments, input);
        assert_eq!(ours, stock, "{name}");
        assert!(
            !(stock.stdout.is_empty() && name != "signal"),
            "{name}: {stock:?}"
        );
    }
    let missing = see(&containerd, TRENV, &[], &["/nonexistent"], "");
    assert_eq!(missing, see(&containerd, RUNC, &[], &["/nonexistent"], ""));
    assert!(missing.stderr.contains("/nonexistent"), "{missing:?}");
    containerd.assert_clean();
}

#[test]
fn a_terminal_is_the_same_as_by_the_stock_shim() {
    let Some(containerd) = containerd("terminal") else {
        return;
    };
    let see = |runtime: &str| {
        let mut ctr = containerd.command(&[
            "run",
            "--rm",
            "-t",
            "--runtime",
            runtime,
            IMAGE,
            &containerd.unique("t1"),
            "/bin/sh",
            "-c",
            "tty; stty -a; ls /dev/pts; exit 6",
        ]);
        // `timeout` must not take the terminal away from ctr.
        let line: Vec<String> = ctr
            .get_args()
            .skip(1)
            .map(|one| one.to_string_lossy().into_owned())
            .collect();
        ctr = std::process::Command::new("script");
        let quoted: Vec<String> = line.iter().map(|one| format!("'{one}'")).collect();
        ctr.args(["-qec", &quoted.join(" "), "/dev/null"])
            .stdin(Stdio::piped());
        let mut child = ctr
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let keep = child.stdin.take();
        let output = child.wait_with_output().unwrap();
        drop(keep);
        (
            String::from_utf8_lossy(&output.stdout).into_owned(),
            output.status.code(),
        )
    };
    let stock = see(RUNC);
    assert_eq!(see(TRENV), stock);
    assert!(stock.0.contains("/dev/pts/0"), "{stock:?}");
    containerd.assert_clean();
}

#[test]
fn a_long_lived_container_is_execd_paused_measured_and_killed() {
    let Some(containerd) = containerd("lifecycle") else {
        return;
    };
    let see = |runtime: &str, id: &str| {
        containerd.ctr(&[
            "run",
            "-d",
            "--runtime",
            runtime,
            IMAGE,
            id,
            "/bin/sh",
            "-c",
            "while :; do sleep 1; done",
        ]);
        let exec = containerd.try_ctr(&[
            "task",
            "exec",
            "--exec-id",
            "e1",
            id,
            "/bin/sh",
            "-c",
            "id; exit 4",
        ]);
        containerd.ctr(&["task", "pause", id]);
        let paused = containerd.ctr(&["task", "ls"]);
        assert!(paused.contains("PAUSED"), "{paused}");
        containerd.ctr(&["task", "resume", id]);
        let metrics = containerd.ctr(&["task", "metrics", id]);
        let names: Vec<String> = metrics
            .lines()
            .skip(3)
            .filter_map(|line| line.split_whitespace().next().map(String::from))
            .collect();
        assert!(containerd.ctr(&["task", "ps", id]).lines().count() >= 2);
        containerd.ctr(&["task", "kill", "-s", "15", id]);
        // A shell as pid 1 ignores SIGTERM.
        std::thread::sleep(std::time::Duration::from_millis(300));
        assert!(containerd.ctr(&["task", "ls"]).contains("RUNNING"));
        containerd.ctr(&["task", "kill", "-s", "9", id]);
        containerd.until("the task is stopped", || {
            containerd.ctr(&["task", "ls"]).contains("STOPPED")
        });
        let deleted = containerd.try_ctr(&["task", "rm", id]);
        containerd.ctr(&["container", "rm", id]);
        let stderr = String::from_utf8_lossy(&deleted.stderr).into_owned();
        (
            exec.stdout,
            exec.status.code(),
            names,
            stderr.contains("137"),
        )
    };
    let stock = see(RUNC, &containerd.unique("stock"));
    assert_eq!(see(TRENV, &containerd.unique("ours")), stock);
    assert!(stock.3);
    containerd.assert_clean();
}
