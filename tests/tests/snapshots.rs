//! Snapshots by hand: a program that is no server, taken and started again as its user would.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Stdio};

use anyhow::Context;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use trenv_tests::Machine;

const IMAGE: &str = "docker.io/trenv/hello-python:latest";
const RUNTIME: &str = "io.containerd.trenv.v2";
const ANNOTATION: &str = "dev.trenv.sandbox=function";
const NAMESPACE: &str = "openfaas-fn";

/// Counts, says what it found in its file, and ends with status 7 when it is told to.
const COUNTER: &str = "echo kept >/var/mark; trap 'cat /var/mark; exit 7' TERM; i=0; \
                       while true; do i=$((i+1)); echo $i; sleep 0.1; done";

fn snapshot(machine: &Machine, arguments: &[&str]) -> anyhow::Result<String> {
    let all = [&["snapshot", "-n", NAMESPACE], arguments].concat();
    machine.tool("trenv", &all)
}

fn json(machine: &Machine, arguments: &[&str]) -> anyhow::Result<Value> {
    let all = [arguments, &["--json"]].concat();
    Ok(serde_json::from_str(&snapshot(machine, &all)?)?)
}

fn run(machine: &Machine, id: &str, script: &str) -> anyhow::Result<()> {
    let kind = [
        "run",
        "-d",
        "--runtime",
        RUNTIME,
        "--annotation",
        ANNOTATION,
    ];
    let program = [IMAGE, id, "/bin/sh", "-c", script];
    machine.ctr(&[&kind[..], &program].concat()).map(drop)
}

/// A program started from a snapshot, with its output.
struct Program {
    child: Child,
    lines: std::io::Lines<BufReader<std::process::ChildStdout>>,
}

fn start(machine: &Machine, arguments: &[&str]) -> anyhow::Result<Program> {
    let mut child = machine
        .command("trenv")
        .args(["snapshot", "-n", NAMESPACE, "start"])
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let output = child.stdout.take().context("no output")?;
    let lines = BufReader::new(output).lines();
    Ok(Program { child, lines })
}

impl Program {
    fn line(&mut self) -> anyhow::Result<String> {
        Ok(self.lines.next().context("its output has ended")??)
    }

    /// Tells it to end; its last lines and its status.
    fn end(mut self, signal: Signal) -> anyhow::Result<(String, i32)> {
        let pid = i32::try_from(self.child.id())?;
        kill(Pid::from_raw(pid), signal)?;
        let mut last = String::new();
        for line in self.lines {
            last = line?;
        }
        let status = self.child.wait()?;
        Ok((last, status.code().context("it was killed")?))
    }
}

#[test]
fn a_program_goes_on_as_often_as_it_is_started() -> anyhow::Result<()> {
    let machine = Machine::start()?;
    run(&machine, "counter", COUNTER)?;
    std::thread::sleep(std::time::Duration::from_secs(1));
    let taken = json(&machine, &["take", "counter"])?;
    assert_eq!(taken["name"], "counter");
    assert!(taken["processes"].as_u64() >= Some(1), "{taken:#}");

    let mut programs = Vec::new();
    for method in ["template", "copy"] {
        let mut program = start(&machine, &["counter", "--method", method])?;
        let first: u64 = program.line()?.parse()?;
        assert!(first > 3, "{method}: it counts from {first}");
        for next in first + 1..first + 4 {
            assert_eq!(program.line()?, next.to_string(), "{method}");
        }
        programs.push(program);
    }
    // Both have gone on from one place, and what it wrote before is there.
    for program in programs {
        let (last, status) = program.end(Signal::SIGTERM)?;
        assert_eq!((last.as_str(), status), ("kept", 7));
    }

    // One that is in the background can be taken again.
    let id = snapshot(&machine, &["start", "counter", "--detach", "--id", "again"])?;
    assert_eq!(id.trim(), "again");
    std::thread::sleep(std::time::Duration::from_millis(500));
    snapshot(&machine, &["take", "again", "--name", "later"])?;
    let listed = json(&machine, &["list"])?;
    let names: Vec<_> = listed.as_array().context("no list")?.iter().collect();
    assert_eq!(names.len(), 2, "{listed:#}");
    let text = snapshot(&machine, &["list"])?;
    assert!(text.contains("later") && text.contains(IMAGE), "{text}");

    let shown = json(&machine, &["show", "counter"])?;
    let root = &shown["processes"][0];
    assert_eq!(root["comm"], "sh", "{shown:#}");
    assert!(
        root["kinds"]["stack"]["pages"].as_u64() > Some(0),
        "{root:#}"
    );
    let own = shown["uniqueBytes"].as_u64().context("no unique bytes")?;
    let shared = shown["sharedBytes"].as_u64().context("no shared bytes")?;
    assert!(own > 0, "{shown:#}");
    assert_eq!(
        Some(own + shared),
        shown["storedBytes"].as_u64(),
        "{shown:#}"
    );
    assert!(snapshot(&machine, &["show", "later"])?.contains("anonymous"));

    let differ = json(&machine, &["diff", "counter", "later"])?;
    assert!(differ["equalPages"].as_u64() > differ["differentPages"].as_u64());
    assert!(differ["differentPages"].as_u64() > Some(0), "{differ:#}");
    let same = json(&machine, &["diff", "later", "later"])?;
    assert_eq!(same["differentPages"], 0);

    assert_eq!(snapshot(&machine, &["verify"])?.matches("sound").count(), 2);
    for id in ["counter", "again"] {
        let _ = machine.ctr(&["task", "rm", "-f", id]);
        machine.ctr(&["container", "rm", id])?;
    }
    snapshot(&machine, &["rm", "later", "counter"])?;
    assert!(snapshot(&machine, &["list"])?.contains("No snapshots"));
    machine.stop()
}

#[test]
fn input_reaches_the_program_and_its_end_too() -> anyhow::Result<()> {
    let machine = Machine::start()?;
    // It reads only when it is told to: input in the background has ended.
    let script = "go=; trap go=1 USR1; while test -z $go; do sleep 0.1; done; \
                  while read line; do echo got $line; done; exit 3";
    run(&machine, "reader", script)?;
    std::thread::sleep(std::time::Duration::from_millis(500));
    snapshot(&machine, &["take", "reader"])?;
    let mut program = start(&machine, &["reader", "--id", "second"])?;
    trenv_tests::until("the program", std::time::Duration::from_secs(20), || {
        machine.sandboxes().is_ok_and(|all| {
            all.iter()
                .any(|one| one.id == "second" && one.state == "ready")
        })
    })?;
    machine.ctr(&["task", "kill", "-s", "SIGUSR1", "second"])?;
    let mut input = program.child.stdin.take().context("no input")?;
    input.write_all(b"one\ntwo\n")?;
    assert_eq!(program.line()?, "got one");
    assert_eq!(program.line()?, "got two");
    drop(input);
    assert_eq!(program.child.wait()?.code(), Some(3));
    let _ = machine.ctr(&["task", "rm", "-f", "reader"]);
    machine.ctr(&["container", "rm", "reader"])?;
    snapshot(&machine, &["rm", "reader"])?;
    machine.stop()
}

#[test]
fn what_cannot_be_taken_is_told_and_goes_on() -> anyhow::Result<()> {
    let machine = Machine::start()?;
    machine.ctr(&[
        "run",
        "-d",
        "--runtime",
        RUNTIME,
        IMAGE,
        "plain",
        "/bin/sleep",
        "99",
    ])?;
    let err = snapshot(&machine, &["take", "plain"]).expect_err("runc runs it");
    assert!(err.to_string().contains(ANNOTATION), "{err}");
    run(
        &machine,
        "shared",
        "exec python3 -c 'import mmap,time; m=mmap.mmap(-1,9); time.sleep(99)'",
    )?;
    std::thread::sleep(std::time::Duration::from_secs(1));
    if let Err(err) = snapshot(&machine, &["take", "shared"]) {
        assert!(err.to_string().contains("shared"), "{err}");
        assert!(machine.ctr(&["task", "ls"])?.contains("shared"));
    }
    for wrong in [
        &["take", "nobody"][..],
        &["start", "nobody"],
        &["rm", "nobody"],
        &["show", "nobody"],
    ] {
        let err = snapshot(&machine, wrong).expect_err("there is none");
        assert!(err.to_string().contains("nobody"), "{err}");
    }
    machine.stop()
}
