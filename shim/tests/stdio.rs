//! Streams by URI: logging programs, files and fifos, for functions and for ordinary containers;
//! the stock shim is the oracle.

#![allow(clippy::unwrap_used)]

mod support;

use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use support::service::{Service, start_request};
use support::{Containerd, IMAGE, RUNC, TRENV, containerd};

const FUNCTION: [&str; 2] = ["--annotation", "dev.trenv.sandbox=function"];
/// By whom a container is run, and what `ctr run` is told for it.
const KINDS: [(&str, &str, &[&str]); 3] = [
    ("stock", RUNC, &[]),
    ("ordinary", TRENV, &[]),
    ("function", TRENV, &FUNCTION),
];

/// Notes what it was given and writes each stream to a file, until both have ended.
const LOGGER: &str = r#"
dir=$2
echo "$CONTAINER_NAMESPACE $CONTAINER_ID $1 $#" > "$dir/given"
(cd /proc/$$/fd && printf '%s ' *) > "$dir/descriptors"
echo $$ >> "$dir/pids"
cat <&3 >> "$dir/out" 5>&- &
cat <&4 >> "$dir/err" 5>&- &
sleep 1
exec 5>&- 3<&- 4<&-
wait
"#;
const DIES_AT_ONCE: &str = "exit 1\n";
const DIES_AFTER_A_LINE: &str = "exec 5>&-\nread line <&3\nexit 1\n";
const NEVER_READS: &str = "echo $$ >> \"$2/pids\"\nexec 5>&-\nexec sleep 300\n";
const NEVER_READY: &str = "exec sleep 300\n";

/// 8 MB, more than every buffer on the way; then a sign.
const MUCH: &str =
    "i=0; while [ $i -lt 64 ]; do cat /bin/sh; i=$((i+1)); done; touch /run/done; sleep 100";

/// A program of the host, and a directory for what it notes; the URI names both.
fn program(containerd: &Containerd, name: &str, script: &str) -> (String, PathBuf) {
    let path = containerd.path(&format!("{name}.sh"));
    std::fs::write(&path, format!("#!/bin/sh\n{script}")).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    let notes = containerd.path(&format!("{name}-notes"));
    std::fs::create_dir(&notes).unwrap();
    let uri = format!("binary://{}?notes={}", path.display(), notes.display());
    (uri, notes)
}

fn run(containerd: &Containerd, kind: (&str, &str, &[&str]), uri: &str, id: &str, script: &str) {
    let output = try_run(containerd, kind, uri, id, script);
    assert!(output.status.success(), "{id}: {output:?}");
}

fn try_run(
    containerd: &Containerd,
    (_, runtime, flags): (&str, &str, &[&str]),
    uri: &str,
    id: &str,
    script: &str,
) -> std::process::Output {
    let mut line = vec!["run", "-d", "--log-uri", uri, "--runtime", runtime];
    line.extend(flags);
    line.extend([IMAGE, id, "/bin/sh", "-c", script]);
    containerd.try_ctr(&line)
}

fn text(path: PathBuf) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}

fn wait_stopped(containerd: &Containerd, id: &str) {
    containerd.until("the task is stopped", || {
        let list = containerd.ctr(&["task", "ls"]);
        list.lines()
            .any(|line| line.starts_with(id) && line.contains("STOPPED"))
    });
}

fn is_done(containerd: &Containerd, id: &str) -> bool {
    static NEXT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
    let number = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    let name = format!("look-{number}");
    let line = [
        "task",
        "exec",
        "--exec-id",
        &name,
        id,
        "/bin/ls",
        "/run/done",
    ];
    containerd.try_ctr(&line).stdout == b"/run/done\n"
}

/// Whether every program that noted its pid has ended.
fn all_ended(notes: &std::path::Path) -> bool {
    let pids = text(notes.join("pids"));
    assert!(!pids.is_empty());
    pids.lines()
        .all(|pid| !std::path::Path::new("/proc").join(pid).exists())
}

#[test]
fn a_logging_program_gets_both_streams_as_from_the_stock_shim() {
    let Some(containerd) = containerd("logger") else {
        return;
    };
    let see = |kind: (&str, &str, &[&str])| {
        let (uri, notes) = program(&containerd, kind.0, LOGGER);
        let id = containerd.unique("logged");
        let begun = Instant::now();
        run(
            &containerd,
            kind,
            &uri,
            &id,
            "echo out; echo err >&2; exit 4",
        );
        // The function starts when the program says that it is ready.
        assert!(begun.elapsed() >= Duration::from_secs(1), "{}", kind.0);
        wait_stopped(&containerd, &id);
        containerd.remove(&id);
        containerd.until("the program ends", || all_ended(&notes));
        ["given", "descriptors", "out", "err"].map(|name| text(notes.join(name)))
    };
    let [stock, ordinary, function] = KINDS.map(see);
    assert_eq!(stock[2..], ["out\n", "err\n"]);
    assert!(stock[0].starts_with("default logged-"), "{stock:?}");
    for ours in [ordinary, function] {
        assert_eq!(ours[0], stock[0]);
        assert_eq!(ours[2..], stock[2..]);
        // The streams, the pipe and what the shell opens; nothing of the shim's own.
        let known: Vec<&str> = stock[1].split(' ').collect();
        assert!(
            ours[1].split(' ').all(|fd| known.contains(&fd)),
            "{} beside {}",
            ours[1],
            stock[1]
        );
    }
    containerd.assert_clean();
}

#[test]
fn a_logging_program_that_dies_does_not_stop_anybody() {
    let Some(containerd) = containerd("deadlogger") else {
        return;
    };
    for (name, script) in [("at-once", DIES_AT_ONCE), ("later", DIES_AFTER_A_LINE)] {
        for kind in KINDS {
            let (uri, _) = program(&containerd, &format!("{}-{name}", kind.0), script);
            let id = containerd.unique("orphan");
            run(&containerd, kind, &uri, &id, &format!("echo line; {MUCH}"));
            containerd.until("it has written 8 MB to nobody", || {
                is_done(&containerd, &id)
            });
            containerd.remove(&id);
        }
    }
    containerd.assert_clean();
}

#[test]
fn a_logging_program_that_never_reads_does_not_stop_a_function_and_is_ended_with_it() {
    let Some(containerd) = containerd("deaflogger") else {
        return;
    };
    // A shim that stays: the end of one ends its programs, too.
    containerd.run_idle("keeper");
    for kind in KINDS {
        let (uri, notes) = program(&containerd, kind.0, NEVER_READS);
        let id = containerd.unique("unheard");
        run(&containerd, kind, &uri, &id, MUCH);
        if kind.0 == "function" {
            containerd.until("it has written 8 MB to nobody", || {
                is_done(&containerd, &id)
            });
        } else {
            // Containers that are not functions wait, as they do with the stock shim.
            std::thread::sleep(Duration::from_secs(2));
            assert!(!is_done(&containerd, &id), "{}", kind.0);
        }
        containerd.remove(&id);
        containerd.until("the program is ended", || all_ended(&notes));
    }
    containerd.remove("keeper");
    containerd.assert_clean();
}

#[test]
fn a_logging_program_that_cannot_serve_is_named_and_nothing_stays() {
    let Some(containerd) = containerd("badlogger") else {
        return;
    };
    let missing = "binary:///nonexistent/logger".to_owned();
    let (unready, _) = program(&containerd, "unready", NEVER_READY);
    for kind in KINDS {
        for uri in [&missing, &unready] {
            if kind.0 == "stock" && *uri == unready {
                // The stock shim waits for ever.
                continue;
            }
            let id = containerd.unique("unlogged");
            let output = try_run(&containerd, kind, uri, &id, "exit 0");
            let words = String::from_utf8_lossy(&output.stderr).into_owned();
            assert!(!output.status.success(), "{}: {uri}", kind.0);
            if kind.0 != "stock" {
                let path = uri.strip_prefix("binary://").unwrap();
                let path = path.split('?').next().unwrap();
                assert!(words.contains(path), "{}: {words}", kind.0);
            }
            containerd.try_ctr(&["task", "rm", "-f", &id]);
            containerd.try_ctr(&["container", "rm", &id]);
        }
    }
    containerd.assert_clean();
}

#[test]
fn files_and_fifos_get_what_is_written() {
    let Some(containerd) = containerd("files") else {
        return;
    };
    let script = "echo out; echo err >&2; exit 3";
    let mut seen = Vec::new();
    for kind in KINDS {
        // Made when missing, and appended to.
        let path = containerd.path(&format!("{}/deep/log", kind.0));
        let uri = format!("file://{}", path.display());
        let id = containerd.unique("filed");
        for _ in 0..2 {
            run(&containerd, kind, &uri, &id, script);
            wait_stopped(&containerd, &id);
            containerd.remove(&id);
        }
        let mut lines: Vec<String> = text(path).lines().map(String::from).collect();
        lines.sort_unstable();
        seen.push(lines);
    }
    // The stock shim may lose what a task wrote just before its deletion; ours may not.
    for lines in &seen[1..] {
        assert_eq!(*lines, ["err", "err", "out", "out"]);
    }
    seen[0].dedup();
    assert_eq!(seen[0], ["err", "out"]);

    for kind in &KINDS[1..] {
        let path = containerd.path(&format!("{}-fifo", kind.0));
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let id = containerd.unique("piped");
        // Written before anybody reads: the fifo keeps it.
        let uri = format!("fifo://{}", path.display());
        run(
            &containerd,
            *kind,
            &uri,
            &id,
            "echo out; echo err >&2; sleep 100",
        );
        let mut fifo = std::fs::File::open(&path).unwrap();
        let mut got = String::new();
        while got.len() < 8 {
            let mut bytes = [0; 64];
            let length = fifo.read(&mut bytes).unwrap();
            assert_ne!(length, 0, "{}: {got:?}", kind.0);
            got.push_str(&String::from_utf8_lossy(&bytes[..length]));
        }
        let mut lines: Vec<&str> = got.lines().collect();
        lines.sort_unstable();
        assert_eq!(lines, ["err", "out"], "{}", kind.0);
        containerd.remove(&id);
    }
    containerd.assert_clean();
}

#[test]
fn every_tenancy_has_its_own_logging_program() {
    let Some(containerd) = containerd("tenantlogger") else {
        return;
    };
    let counter = "i=0; while :; do i=$((i+1)); echo tick $i; sleep 0.1; done";
    containerd.run_function("f", counter);
    let (uri, notes) = program(&containerd, "tenant", LOGGER);
    let line = [
        "run",
        "-d",
        "--log-uri",
        &uri,
        "--runtime",
        TRENV,
        "--annotation",
        "dev.trenv.sandbox=idle",
        IMAGE,
        "idle",
    ];
    containerd.ctr(&line);
    std::thread::sleep(Duration::from_millis(300));
    let service = Service::connect(&containerd);
    let template = service.snapshot(&containerd, "f");
    assert!(!notes.join("pids").exists(), "nobody writes yet");
    for (number, name) in ["one", "two"].into_iter().enumerate() {
        let _ = std::fs::remove_file(notes.join("out"));
        service
            .repurpose(&start_request(&containerd, "idle", name, &template))
            .unwrap_or_else(|err| panic!("{err}\n{}", containerd.logs()));
        containerd.until("the function is heard", || {
            text(notes.join("out")).contains("tick")
        });
        assert_eq!(text(notes.join("given")), "default idle notes 2\n");
        service.reset("idle", name).unwrap();
        containerd.until("the tenancy's program ends", || all_ended(&notes));
        assert_eq!(text(notes.join("pids")).lines().count(), number + 1);
    }
    for id in ["f", "idle"] {
        containerd.remove(id);
    }
    drop(service);
    containerd.assert_clean();
}
