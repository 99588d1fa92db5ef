//! Sandboxes through containerd: cold functions, idle sandboxes, and what they leave: nothing.

#![allow(clippy::unwrap_used)]

mod support;

use std::os::unix::process::CommandExt;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use support::{IMAGE, TRENV, containerd};

const FUNCTION: &str = "dev.trenv.sandbox=function";
const IDLE: &str = "dev.trenv.sandbox=idle";
const FOREVER: &str = "while :; do echo tick; sleep 0.2; done";

#[test]
fn a_cold_function_prints_is_execd_and_killed_and_leaves_nothing() {
    let Some(containerd) = containerd("cold") else {
        return;
    };
    let output = containerd.try_ctr(&[
        "run",
        "--rm",
        "--runtime",
        TRENV,
        "--annotation",
        FUNCTION,
        IMAGE,
        "once",
        "/bin/sh",
        "-c",
        "id; hostname; echo $$; echo err >&2; exit 5",
    ]);
    assert_eq!(
        String::from_utf8_lossy(&output.stdout),
        "uid=0(root) gid=0(root) groups=0(root)\nonce\n2\n"
    );
    assert!(String::from_utf8_lossy(&output.stderr).contains("err\n"));
    assert_eq!(output.status.code(), Some(5));

    containerd.run_function("long", FOREVER);
    let exec = containerd.try_ctr(&[
        "task",
        "exec",
        "--exec-id",
        "e",
        "long",
        "/bin/sh",
        "-c",
        "ps ax; exit 4",
    ]);
    assert!(
        String::from_utf8_lossy(&exec.stdout).contains("tick"),
        "{exec:?}"
    );
    assert_eq!(exec.status.code(), Some(4));
    assert!(containerd.ctr(&["task", "ps", "long"]).lines().count() >= 3);
    assert!(
        containerd
            .ctr(&["task", "metrics", "long"])
            .contains("memory")
    );
    containerd.ctr(&["task", "pause", "long"]);
    assert!(containerd.ctr(&["task", "ls"]).contains("PAUSED"));
    containerd.ctr(&["task", "resume", "long"]);
    containerd.ctr(&["task", "kill", "long"]);
    containerd.until("the function ends", || {
        containerd.ctr(&["task", "ls"]).contains("STOPPED")
    });
    containerd.remove("long");
    containerd.assert_clean();
}

#[test]
fn an_idle_sandbox_waits_and_one_shim_serves_all() {
    let Some(containerd) = containerd("idle") else {
        return;
    };
    for id in ["a", "b", "c"] {
        containerd.run_idle(id);
    }
    containerd.run_function("d", FOREVER);
    assert_eq!(containerd.shims().len(), 1);
    assert_eq!(containerd.ctr(&["task", "ps", "a"]).lines().count(), 2);
    let exec = containerd.try_ctr(&["task", "exec", "--exec-id", "e", "a", "/bin/sh"]);
    assert!(
        String::from_utf8_lossy(&exec.stderr).contains("it is idle"),
        "{exec:?}"
    );
    for id in ["a", "b", "c", "d"] {
        containerd.remove(id);
    }
    containerd.assert_clean();
}

#[test]
fn what_a_sandbox_does_not_apply_is_refused_by_name() {
    let Some(containerd) = containerd("refused") else {
        return;
    };
    for (flags, word) in [
        (["--net-host", "--annotation", FUNCTION], "net"),
        (
            ["--annotation", "dev.trenv.sandbox=maybe", "--read-only"],
            "maybe",
        ),
        (
            ["--device=/dev/kmsg", "--annotation", FUNCTION],
            "linux.devices",
        ),
    ] {
        let mut line = vec!["run", "--rm", "--runtime", TRENV];
        line.extend(flags);
        line.extend([IMAGE, "r", "/bin/sh"]);
        let output = containerd.try_ctr(&line);
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(
            !output.status.success() && stderr.contains(word),
            "{flags:?}: {stderr}"
        );
    }
    let missing = containerd.try_ctr(&[
        "run",
        "--runtime",
        TRENV,
        "--annotation",
        FUNCTION,
        IMAGE,
        "r",
        "/nonexistent",
    ]);
    assert!(
        String::from_utf8_lossy(&missing.stderr).contains("/nonexistent"),
        "{missing:?}"
    );
    containerd.try_ctr(&["task", "rm", "-f", "r"]);
    containerd.try_ctr(&["container", "rm", "r"]);
    containerd.assert_clean();
}

#[test]
fn a_killed_pid_1_ends_the_task() {
    let Some(containerd) = containerd("killedinit") else {
        return;
    };
    containerd.run_function("f", FOREVER);
    let list = containerd.ctr(&["task", "ls"]);
    let pid = list
        .lines()
        .nth(1)
        .unwrap()
        .split_whitespace()
        .nth(1)
        .unwrap()
        .parse()
        .unwrap();
    kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
    containerd.until("the task is stopped", || {
        containerd.ctr(&["task", "ls"]).contains("STOPPED")
    });
    containerd.remove("f");
    containerd.assert_clean();
}

#[test]
fn a_killed_shim_leaves_nothing() {
    let Some(containerd) = containerd("killedshim") else {
        return;
    };
    let ids: Vec<String> = (0..12).map(|number| format!("s{number}")).collect();
    for (number, id) in ids.iter().enumerate() {
        if number % 2 == 0 {
            containerd.run_function(id, FOREVER);
        } else {
            containerd.run_idle(id);
        }
    }
    let [shim] = containerd.shims()[..] else {
        panic!("one shim expected")
    };
    kill(Pid::from_raw(shim), Signal::SIGKILL).unwrap();
    containerd.until("containerd forgets the tasks", || {
        containerd.ctr(&["task", "ls", "-q"]).is_empty()
    });
    containerd.assert_clean();
    // Containers stay, and can be started again.
    containerd.ctr(&["task", "start", "-d", "s1"]);
    containerd.remove("s1");
    for id in ids.iter().filter(|id| *id != "s1") {
        containerd.ctr(&["container", "rm", id]);
    }
    containerd.assert_clean();
}

#[test]
fn a_client_that_goes_away_during_a_creation_leaves_no_shim() {
    let Some(containerd) = containerd("gone") else {
        return;
    };
    for pause_ms in (0..300).step_by(12) {
        let id = format!("i{pause_ms}");
        // ctr mounts the root for a moment when it makes the record; that is not to be cut off.
        containerd.ctr(&[
            "container",
            "create",
            "--runtime",
            TRENV,
            "--annotation",
            IDLE,
            IMAGE,
            &id,
        ]);
        let mut client = containerd.command(&["task", "start", "-d", &id]);
        let mut client = client.process_group(0).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(pause_ms));
        let group = Pid::from_raw(client.id().cast_signed());
        nix::sys::signal::killpg(group, Signal::SIGKILL).unwrap();
        client.wait().unwrap();
        containerd.until("the container can be removed", || {
            containerd.try_ctr(&["task", "rm", "-f", &id]);
            containerd.try_ctr(&["container", "rm", &id]);
            !containerd.ctr(&["container", "ls", "-q"]).contains(&id)
        });
        containerd.until("the shim ends", || containerd.shims().is_empty());
    }
    containerd.assert_clean();
}

#[test]
fn tasks_and_their_events_survive_a_restart_of_containerd() {
    let Some(mut containerd) = containerd("restart") else {
        return;
    };
    containerd.run_function("stays", FOREVER);
    containerd.run_function("ends", "sleep 2; exit 9");
    containerd.stop();
    std::thread::sleep(Duration::from_secs(4));
    containerd.launch();
    let list = containerd.ctr(&["task", "ls"]);
    let state = |id: &str| {
        list.lines()
            .find(|line| line.starts_with(id))
            .unwrap_or_default()
            .to_owned()
    };
    assert!(state("stays").contains("RUNNING"), "{list}");
    assert!(state("ends").contains("STOPPED"), "{list}");
    let events = std::process::Command::new("timeout")
        .args([
            "10",
            "ctr",
            "-a",
            &containerd.path("c.sock").display().to_string(),
            "events",
        ])
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    // The exit that happened while containerd was away is told now.
    let told = String::from_utf8_lossy(&events.wait_with_output().unwrap().stdout).into_owned();
    println!("{told}");
    containerd.remove("stays");
    containerd.remove("ends");
    containerd.assert_clean();
}

#[test]
fn output_that_nobody_reads_does_not_hold_a_function_up() {
    let Some(containerd) = containerd("noreader") else {
        return;
    };
    let fifo = containerd.path("unread");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let marker = "i=0; while [ $i -lt 3000 ]; do echo $i; cat /bin/sh; i=$((i+1)); done; echo done > /run/done; sleep 100";
    let uri = format!("fifo://{}", fifo.display());
    containerd.ctr(&[
        "run",
        "-d",
        "--log-uri",
        &uri,
        "--runtime",
        TRENV,
        "--annotation",
        FUNCTION,
        IMAGE,
        "f",
        "/bin/sh",
        "-c",
        marker,
    ]);
    containerd.until("the function has written 300 MB", || {
        let output = containerd.try_ctr(&[
            "task",
            "exec",
            "--exec-id",
            "e",
            "f",
            "/bin/cat",
            "/run/done",
        ]);
        std::thread::sleep(Duration::from_millis(200));
        output.stdout == b"done\n"
    });
    containerd.remove("f");
    containerd.assert_clean();
}
