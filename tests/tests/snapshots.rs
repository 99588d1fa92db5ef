//! Snapshots by hand: a program that is no server, taken and started again as its user would.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
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

/// What `trenv snapshot start --method` takes on a machine without a memory device.
const METHODS: [&str; 6] = ["template", "copy", "lazy", "reap", "faasnap", "spice"];

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
    for method in METHODS {
        let mut program = start(&machine, &["counter", "--method", method])?;
        let first: u64 = program.line()?.parse()?;
        assert!(first > 3, "{method}: it counts from {first}");
        for next in first + 1..first + 4 {
            assert_eq!(program.line()?, next.to_string(), "{method}");
        }
        programs.push(program);
    }
    // All have gone on from one place, and what it wrote before is there.
    for program in programs {
        let (last, status) = program.end(Signal::SIGTERM)?;
        assert_eq!((last.as_str(), status), ("kept", 7));
    }

    // Nothing was learnt of them, and the next start by each method is as good.
    for method in METHODS {
        let mut program = start(&machine, &["counter", "--method", method])?;
        assert!(program.line()?.parse::<u64>()? > 3, "{method}");
        let (last, status) = program.end(Signal::SIGTERM)?;
        assert_eq!((last.as_str(), status), ("kept", 7), "{method}");
    }
    let sets = json(&machine, &["show", "counter"])?["workingSets"].clone();
    assert_eq!(sets, Value::Array(Vec::new()), "{sets:#}");
    for (method, reason) in [("criu", "no image"), ("none", "no such start method")] {
        let refused = snapshot(&machine, &["start", "counter", "--method", method]);
        let refused = refused.expect_err(method).to_string();
        assert!(refused.contains(reason), "{refused}");
        assert!(refused.contains(&METHODS[1..].join(", ")), "{refused}");
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
    check_mappings(root)?;
    let text = snapshot(&machine, &["show", "counter", "--mappings"])?;
    let stack = text.lines().find(|line| line.contains("[stack]"));
    assert!(stack.is_some_and(|line| line.contains(" rw-p ")), "{text}");
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

/// A process's mappings: in order, each with its pages, which are those that the kinds have together.
fn check_mappings(process: &Value) -> anyhow::Result<()> {
    let mappings = process["mappings"].as_array().context("no mappings")?;
    let number = |value: &Value| value.as_u64().unwrap_or_default();
    for two in mappings.windows(2) {
        assert!(
            number(&two[0]["start"]) < number(&two[0]["end"]),
            "{two:#?}"
        );
        assert!(
            number(&two[0]["end"]) <= number(&two[1]["start"]),
            "{two:#?}"
        );
    }
    let exe = process["exe"].as_str().context("no executable")?;
    let code = mappings
        .iter()
        .find(|one| one["file"] == exe && one["protection"] == "r-xp");
    let code = code.with_context(|| format!("no code of {exe}: {process:#}"))?;
    assert_eq!(code["kind"], "file");
    assert!(number(&code["offset"]) > 0, "{code:#}");
    let stack = mappings.iter().find(|one| one["kind"] == "stack");
    let stack = stack.context("no stack")?;
    assert_eq!(
        stack["flags"],
        serde_json::json!(["grows-down"]),
        "{stack:#}"
    );
    for figure in ["pages", "zeroPages", "sharedPages"] {
        let kinds = process["kinds"].as_object().context("no kinds")?;
        let by_kind: u64 = kinds.values().map(|kind| number(&kind[figure])).sum();
        let by_mapping: u64 = mappings.iter().map(|one| number(&one[figure])).sum();
        assert_eq!(by_kind, by_mapping, "{figure}");
    }
    Ok(())
}

#[test]
fn a_program_that_is_left_running_goes_on_beside_its_snapshot() -> anyhow::Result<()> {
    /// Counts in a file of its root too, which the snapshot must have as it was.
    const SCRIPT: &str = "exec 3>>/var/counts; i=0; \
                          trap 'tail -n 1 /var/counts; exit 7' TERM; \
                          while true; do i=$((i+1)); echo $i; echo $i >&3; sleep 0.1; done";
    let machine = Machine::start()?;
    run(&machine, "counter", SCRIPT)?;
    std::thread::sleep(std::time::Duration::from_secs(1));
    // It has counted without a gap so far.
    let count = |id: &str| -> anyhow::Result<u64> {
        let exec = format!("look-{}", std::time::UNIX_EPOCH.elapsed()?.as_nanos());
        let cat = ["task", "exec", "--exec-id", &exec, id, "cat", "/var/counts"];
        let text = machine.ctr(&cat)?;
        for (number, line) in (1..).zip(text.lines()) {
            assert_eq!(line, number.to_string(), "{id}");
        }
        Ok(text.lines().count() as u64)
    };
    snapshot(&machine, &["take", "counter", "--leave-running"])?;
    let before = count("counter")?;
    trenv_tests::until("it to go on", std::time::Duration::from_secs(20), || {
        count("counter").is_ok_and(|now| now > before + 3)
    })?;

    let mut program = start(&machine, &["counter", "--id", "second"])?;
    let first: u64 = program.line()?.parse()?;
    assert!((4..=before + 1).contains(&first), "{first} after {before}");
    assert_eq!(program.line()?, (first + 1).to_string());
    // Each writes to its own file.
    let other = count("counter")?;
    assert!(count("second")? < other);
    let (last, status) = program.end(Signal::SIGTERM)?;
    assert_eq!(status, 7);
    let last: u64 = last.parse()?;
    assert!(last > first && last < other, "{last} of {other}");

    // It can be taken once more, and ends when it is told to.
    snapshot(
        &machine,
        &["take", "counter", "--name", "later", "--leave-running"],
    )?;
    let mut later = start(&machine, &["later"])?;
    assert!(later.line()?.parse::<u64>()? > before + 3);
    later.end(Signal::SIGTERM)?;
    machine.ctr(&["task", "kill", "-s", "SIGTERM", "counter"])?;
    trenv_tests::until("it to end", std::time::Duration::from_secs(20), || {
        machine
            .ctr(&["task", "ls"])
            .is_ok_and(|all| all.contains("STOPPED"))
    })?;
    machine.ctr(&["task", "rm", "-f", "counter"])?;
    machine.ctr(&["container", "rm", "counter"])?;
    snapshot(&machine, &["rm", "counter", "later"])?;
    machine.stop()
}

#[test]
fn verify_names_a_snapshot_with_a_damaged_page_which_does_not_start() -> anyhow::Result<()> {
    let machine = Machine::start()?;
    for (id, mark) in [
        ("sound", "mark-of-the-sound"),
        ("damaged", "mark-of-the-damaged"),
    ] {
        run(&machine, id, &format!("mark={mark}; {COUNTER}"))?;
        std::thread::sleep(std::time::Duration::from_millis(500));
        snapshot(&machine, &["take", id])?;
    }
    assert_eq!(
        snapshot(&machine, &["verify"])?.matches("sound,").count(),
        2
    );

    let data = machine.directory().join("state/pool/pool.data");
    let mark = b"mark-of-the-damaged";
    let bytes = std::fs::read(&data)?;
    let at = bytes.windows(mark.len()).position(|window| window == mark);
    let at = at.context("its memory is not in the pool")? as u64;
    let file = std::fs::File::options().write(true).open(&data)?;
    std::os::unix::fs::FileExt::write_all_at(&file, b"M", at)?;

    let output = machine
        .command("trenv")
        .args(["snapshot", "-n", NAMESPACE, "verify", "--json"])
        .output()?;
    assert!(!output.status.success(), "a damaged page is no success");
    let report: Value = serde_json::from_slice(&output.stdout)?;
    for one in report.as_array().context("no list")? {
        let error = one["error"].as_str().unwrap_or_default();
        let damaged = one["name"] == "damaged";
        assert_eq!(error.contains("checksum"), damaged, "{report:#}");
    }
    snapshot(&machine, &["verify", "sound"])?;
    let refused = snapshot(&machine, &["start", "damaged"]).expect_err("it is damaged");
    assert!(refused.to_string().contains("checksum"), "{refused}");
    let mut sound = start(&machine, &["sound"])?;
    sound.line()?;
    sound.end(Signal::SIGTERM)?;
    for id in ["sound", "damaged"] {
        machine.ctr(&["task", "rm", "-f", id])?;
        machine.ctr(&["container", "rm", id])?;
    }
    snapshot(&machine, &["rm", "sound", "damaged"])?;
    machine.stop()
}

/// Name of the layer with the files of a snapshot.
fn layer_of(machine: &Machine, name: &str) -> anyhow::Result<String> {
    let layers = machine.ctr(&["snapshots", "ls"])?;
    let mut words = layers.split_whitespace();
    let layer = words.find(|word| word.starts_with(&format!("snapshot-{name}-")));
    Ok(layer.context("no layer")?.to_owned())
}

/// Where its files are. It cannot be removed after this: what containerd has collected by itself stays
/// one of its children.
fn directory_of(machine: &Machine, layer: &str) -> anyhow::Result<PathBuf> {
    let view = ["snapshots", "view", "--mounts", "looked-at", layer];
    let mounts: Value = serde_json::from_str(&machine.ctr(&view)?)?;
    let options = mounts.to_string();
    let top = options.split("lowerdir=").nth(1).context("no overlay")?;
    let top = top.split([':', '"']).next().context("no directory")?;
    Ok(top.into())
}

#[test]
fn verify_names_a_snapshot_whose_files_are_not_as_they_were() -> anyhow::Result<()> {
    let machine = Machine::start()?;
    for id in ["sound", "changed", "gone"] {
        run(&machine, id, &format!("echo text >/var/of-{id}; {COUNTER}"))?;
    }
    std::thread::sleep(std::time::Duration::from_millis(500));
    snapshot(&machine, &["take", "sound", "--leave-running"])?;
    snapshot(&machine, &["take", "changed"])?;
    snapshot(&machine, &["take", "gone"])?;
    machine.deploy("hello-python")?;
    // By name, the error of each; all have their files checked where there is none.
    let verify = || -> anyhow::Result<(bool, BTreeMap<String, String>)> {
        let mut command = machine.command("trenv");
        let output = command
            .args(["snapshot", "-n", NAMESPACE, "verify", "--json"])
            .output()?;
        let report: Value = serde_json::from_slice(&output.stdout)?;
        let mut errors = BTreeMap::new();
        for one in report.as_array().context("no list")? {
            match one["error"].as_str() {
                Some(error) => {
                    let name = one["name"].as_str().context("no name")?;
                    errors.insert(name.to_owned(), error.to_owned());
                }
                None => {
                    let digest = one["files"].as_str().unwrap_or_default();
                    assert!(digest.starts_with("blake3:"), "{one:#}");
                }
            }
        }
        Ok((output.status.success(), errors))
    };
    assert_eq!(verify()?, (true, BTreeMap::new()));

    // As a disk would change it: nothing else tells of it.
    let directory = directory_of(&machine, &layer_of(&machine, "changed")?)?;
    let file = directory.join("var/of-changed");
    let time = file.metadata()?.modified()?;
    std::fs::write(&file, "texT\n")?;
    std::fs::File::options()
        .write(true)
        .open(&file)?
        .set_modified(time)?;
    let layer = layer_of(&machine, "gone")?;
    machine.ctr(&["snapshots", "rm", &layer])?;

    let (sound, errors) = verify()?;
    assert!(!sound, "a changed file is no success");
    let named: Vec<&str> = errors.keys().map(String::as_str).collect();
    assert_eq!(named, ["changed", "gone"], "{errors:#?}");
    assert!(
        errors["changed"].contains("not those that were taken"),
        "{errors:#?}"
    );
    assert!(errors["gone"].contains(&layer), "{errors:#?}");
    let text = snapshot(&machine, &["verify", "sound"])?;
    assert!(text.contains("and the files"), "{text}");
    // What looked at the layers has left none.
    let layers = machine.ctr(&["snapshots", "ls"])?;
    assert!(!layers.contains("-verify-"), "{layers}");

    for id in ["sound", "changed", "gone"] {
        let _ = machine.ctr(&["task", "rm", "-f", id]);
        machine.ctr(&["container", "rm", id])?;
        snapshot(&machine, &["rm", id])?;
    }
    machine.remove("hello-python")?;
    machine.stop()
}

#[test]
fn programs_go_on_when_their_snapshot_is_removed() -> anyhow::Result<()> {
    let machine = Machine::start()?;
    run(&machine, "counter", COUNTER)?;
    std::thread::sleep(std::time::Duration::from_secs(1));
    snapshot(&machine, &["take", "counter"])?;
    let mut programs = Vec::new();
    for method in ["template", "copy", "lazy"] {
        let mut program = start(&machine, &["counter", "--method", method])?;
        program.line()?;
        programs.push(program);
    }
    let layers = machine.ctr(&["snapshots", "ls"])?;
    assert!(layers.contains("snapshot-counter-"), "{layers}");
    snapshot(&machine, &["rm", "counter"])?;
    assert!(snapshot(&machine, &["list"])?.contains("No snapshots"));
    let refused = snapshot(&machine, &["start", "counter"]).expect_err("it is gone");
    assert!(
        refused.to_string().contains("no snapshot counter"),
        "{refused}"
    );

    // The name is free, also while they run.
    run(&machine, "other", COUNTER)?;
    std::thread::sleep(std::time::Duration::from_secs(1));
    snapshot(&machine, &["take", "other", "--name", "counter"])?;
    let mut again = start(&machine, &["counter"])?;
    again.line()?;
    again.end(Signal::SIGTERM)?;
    snapshot(&machine, &["rm", "counter"])?;

    for mut program in programs {
        let next: u64 = program.line()?.parse()?;
        assert_eq!(program.line()?, (next + 1).to_string());
        // Its file is in the layer of the snapshot.
        let (last, status) = program.end(Signal::SIGTERM)?;
        assert_eq!((last.as_str(), status), ("kept", 7));
    }
    for id in ["counter", "other"] {
        machine.ctr(&["task", "rm", "-f", id])?;
        machine.ctr(&["container", "rm", id])?;
    }
    // containerd collects the layer with the last container on it.
    machine.ctr(&["leases", "create", "--id", "collect"])?;
    machine.ctr(&["leases", "delete", "--sync", "collect"])?;
    let layers = machine.ctr(&["snapshots", "ls"])?;
    assert!(!layers.contains("snapshot-counter-"), "{layers}");
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
