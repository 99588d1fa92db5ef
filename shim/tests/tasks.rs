//! containerd's task calls on an idle sandbox and on one that has been given a function.

#![allow(clippy::unwrap_used)]

mod support;

use std::time::Duration;

use support::events::Events;
use support::service::{Service, start_request};
use support::{Containerd, IMAGE, TRENV, containerd};
use trenv_sandbox_proto as proto;

const COUNTER: &str = "trap 'echo asked to end; exit 7' TERM; i=0; while :; do i=$((i+1)); echo tick $i; sleep 0.1; done";

fn status(containerd: &Containerd, id: &str) -> String {
    let list = containerd.ctr(&["task", "ls"]);
    let line = list
        .lines()
        .find(|line| line.starts_with(&format!("{id} ")));
    line.and_then(|line| line.split_whitespace().last())
        .unwrap_or_default()
        .to_owned()
}

/// What a refused call says.
fn refusal(containerd: &Containerd, line: &[&str]) -> String {
    let output = containerd.try_ctr(line);
    assert!(!output.status.success(), "{line:?} succeeded: {output:?}");
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// The names of figures in `ctr task metrics`, on cgroup v1 and v2.
const MEMORY: [&str; 2] = ["memory.usage_in_bytes", "memory.usage"];
const PROCESSOR: [&str; 2] = ["cpuacct.usage", "cpu.usage_usec"];
const PIDS: [&str; 2] = ["pids.current", "pids.current"];

fn metric(containerd: &Containerd, id: &str, names: [&str; 2]) -> u64 {
    let table = containerd.ctr(&["task", "metrics", id]);
    let mut lines = table.lines().map(str::split_whitespace);
    let value = lines.find_map(|mut words| {
        let name = words.next()?;
        names.contains(&name).then(|| words.next()?.parse().ok())?
    });
    value.unwrap_or_else(|| panic!("no {names:?} in {table}"))
}

fn info(containerd: &Containerd, id: &str) -> serde_json::Value {
    serde_json::from_str(&containerd.ctr(&["container", "info", id])).unwrap()
}

fn ticks(containerd: &Containerd, id: &str) -> usize {
    let log = std::fs::read_to_string(log_of(containerd, id)).unwrap_or_default();
    log.lines().filter(|line| line.starts_with("tick")).count()
}

fn log_of(containerd: &Containerd, id: &str) -> std::path::PathBuf {
    containerd.path(&format!("trenv-run/logs/default/{id}.log"))
}

fn run_idle_silently(containerd: &Containerd, id: &str) {
    // Without streams of containerd's, output goes to the function's own log.
    containerd.ctr(&[
        "run",
        "-d",
        "--null-io",
        "--runtime",
        TRENV,
        "--annotation",
        "dev.trenv.sandbox=idle",
        IMAGE,
        id,
    ]);
}

#[test]
fn an_idle_sandbox_tells_what_it_is_and_refuses_what_needs_a_function() {
    let Some(containerd) = containerd("idletask") else {
        return;
    };
    let events = Events::follow(&containerd);
    for id in ["asked", "killed"] {
        containerd.run_idle(id);
    }
    assert_eq!(status(&containerd, "asked"), "RUNNING");
    let info = info(&containerd, "asked");
    assert_eq!(info["Runtime"]["Name"], TRENV);
    assert_eq!(info["Spec"]["annotations"]["dev.trenv.sandbox"], "idle");
    let table = containerd.ctr(&["task", "ps", "asked"]);
    let pid1 = first_pid(&containerd, "asked");
    assert_eq!(table.lines().count(), 2, "{table}");
    assert!(table.contains(&pid1), "{pid1} in {table}");
    // Its pid 1 is all there is to measure.
    assert!(metric(&containerd, "asked", MEMORY) > 0);
    for line in [
        vec!["task", "pause", "asked"],
        vec!["task", "resume", "asked"],
        vec!["task", "exec", "--exec-id", "e", "asked", "/bin/id"],
    ] {
        let words = refusal(&containerd, &line);
        assert!(words.contains("asked: it is idle"), "{line:?}: {words}");
    }
    let words = refusal(&containerd, &["task", "kill", "--exec-id", "e", "asked"]);
    assert!(
        words.contains("not exist") || words.contains("not found"),
        "{words}"
    );
    assert_eq!(status(&containerd, "asked"), "RUNNING");
    // A signal ends it, whichever it is: nothing inside could take it.
    for (id, signal, wanted) in [("asked", "15", "143"), ("killed", "9", "137")] {
        containerd.ctr(&["task", "kill", "-s", signal, id]);
        containerd.until("the idle sandbox ends", || {
            status(&containerd, id) == "STOPPED"
        });
        let words = refusal(&containerd, &["task", "kill", "-s", "9", id]);
        assert!(
            words.contains("not exist")
                || words.contains("not found")
                || words.contains("finished"),
            "{words}"
        );
        let output = containerd.try_ctr(&["task", "rm", id]);
        let words = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(words.contains(wanted), "{words}");
        containerd.ctr(&["container", "rm", id]);
        let exit = format!("tasks/exit {id} {wanted}");
        let wanted = ["tasks/create", "tasks/start", &exit, "tasks/delete"];
        containerd.until("the deletion is told", || events.has(id, "tasks/delete"));
        assert_eq!(events.short(id), wanted);
    }
    drop(events);
    containerd.assert_clean();
}

/// The pid that `ctr task ls` names.
fn first_pid(containerd: &Containerd, id: &str) -> String {
    let list = containerd.ctr(&["task", "ls"]);
    let line = list
        .lines()
        .find(|line| line.starts_with(&format!("{id} ")));
    line.and_then(|line| line.split_whitespace().nth(1))
        .unwrap_or_default()
        .to_owned()
}

#[test]
fn a_repurposed_sandbox_is_paused_measured_execd_and_killed_as_any_task() {
    let Some(containerd) = containerd("busytask") else {
        return;
    };
    let events = Events::follow(&containerd);
    containerd.run_function("f", COUNTER);
    run_idle_silently(&containerd, "idle");
    std::thread::sleep(Duration::from_millis(300));
    let service = Service::connect(&containerd);
    let template = service.snapshot(&containerd, "f");
    service
        .repurpose(&start_request(&containerd, "idle", "one", &template))
        .unwrap_or_else(|err| panic!("{err}\n{}", containerd.logs()));
    containerd.until("it counts", || ticks(&containerd, "idle") > 2);

    // Paused, it stands still; nobody takes the sandbox away meanwhile.
    containerd.ctr(&["task", "pause", "idle"]);
    assert_eq!(status(&containerd, "idle"), "PAUSED");
    let stood = ticks(&containerd, "idle");
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(ticks(&containerd, "idle"), stood);
    let refused = service
        .reset("idle", "while-paused")
        .unwrap_err()
        .to_string();
    assert!(refused.contains("it is paused"), "{refused}");
    containerd.ctr(&["task", "resume", "idle"]);
    assert_eq!(status(&containerd, "idle"), "RUNNING");
    containerd.until("it goes on", || ticks(&containerd, "idle") > stood + 2);

    // The figures are the function's, not those of pid 1.
    let cpu = metric(&containerd, "idle", PROCESSOR);
    assert!(metric(&containerd, "idle", MEMORY) > 0);
    assert!(metric(&containerd, "idle", PIDS) >= 1);
    containerd.until("it uses the processor", || {
        metric(&containerd, "idle", PROCESSOR) > cpu
    });
    assert!(containerd.ctr(&["task", "ps", "idle"]).lines().count() >= 3);
    assert_eq!(info(&containerd, "idle")["Runtime"]["Name"], TRENV);

    let exec = containerd.try_ctr(&[
        "task",
        "exec",
        "--exec-id",
        "e1",
        "idle",
        "/bin/sh",
        "-c",
        "hostname; exit 5",
    ]);
    assert_eq!(String::from_utf8_lossy(&exec.stdout), "one\n");
    assert_eq!(exec.status.code(), Some(5));
    // One of its processes is killed by name, and the function goes on.
    let mut waiting = containerd
        .command(&[
            "task",
            "exec",
            "--exec-id",
            "e2",
            "idle",
            "/bin/sleep",
            "100",
        ])
        .stdin(std::process::Stdio::null())
        .spawn()
        .unwrap();
    containerd.until("the process runs", || {
        events
            .short("idle")
            .contains(&"tasks/exec-started e2".to_owned())
    });
    containerd.ctr(&["task", "kill", "-s", "15", "--exec-id", "e2", "idle"]);
    assert_eq!(waiting.wait().unwrap().code(), Some(143));
    assert_eq!(service.state("idle"), proto::State::READY);

    // SIGTERM is for the function to take.
    containerd.ctr(&["task", "kill", "-s", "15", "idle"]);
    containerd.until("the function ends", || {
        status(&containerd, "idle") == "STOPPED"
    });
    let log = std::fs::read_to_string(log_of(&containerd, "idle")).unwrap();
    assert!(log.contains("asked to end"), "{log}");
    containerd.until("its end is told", || events.has("idle", "tasks/exit"));
    let wanted = [
        "tasks/create",
        "tasks/start",
        "tasks/paused",
        "tasks/resumed",
        "tasks/exec-added e1",
        "tasks/exec-started e1",
        "tasks/exit e1 5",
        "tasks/exec-added e2",
        "tasks/exec-started e2",
        "tasks/exit e2 143",
        "tasks/exit idle 7",
    ];
    assert_eq!(events.short("idle"), wanted);
    for id in ["f", "idle"] {
        containerd.remove(id);
    }
    drop((service, events));
    containerd.assert_clean();
}

#[test]
fn a_paused_function_can_be_ended_in_every_way() {
    let Some(containerd) = containerd("pausedtask") else {
        return;
    };
    containerd.run_function("f", COUNTER);
    std::thread::sleep(Duration::from_millis(300));
    let service = Service::connect(&containerd);
    let template = service.snapshot(&containerd, "f");
    for way in ["kill", "all", "init"] {
        run_idle_silently(&containerd, way);
        service
            .repurpose(&start_request(
                &containerd,
                way,
                &format!("t-{way}"),
                &template,
            ))
            .unwrap_or_else(|err| panic!("{err}\n{}", containerd.logs()));
        containerd.ctr(&["task", "pause", way]);
        match way {
            "kill" => drop(containerd.ctr(&["task", "kill", "-s", "9", way])),
            "all" => drop(containerd.ctr(&["task", "kill", "-s", "9", "-a", way])),
            _ => {
                let pid = service.info(way).init_pid.cast_signed();
                nix::sys::signal::kill(
                    nix::unistd::Pid::from_raw(pid),
                    nix::sys::signal::Signal::SIGKILL,
                )
                .unwrap();
            }
        }
        containerd.until("the task is stopped", || {
            status(&containerd, way) == "STOPPED"
        });
        containerd.remove(way);
    }
    // The seats that they left are as good as new.
    service
        .repurpose(&start_request(&containerd, "f", "after", &template))
        .unwrap();
    containerd.remove("f");
    drop(service);
    containerd.assert_clean();
}
