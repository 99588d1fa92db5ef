//! Reports as somebody hostile would send them: an error, whatever they say.

use std::os::fd::AsFd;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::net::{SendFlags, send};
use trenv_restorer::wire::{MARKS, Report, report};

use super::channel::{parse, receive, socket_pair};
use super::{Tree, ZygoteError, note, steps, zygote_error};

const INPUTS: u64 = 200_000;
const PROCESSES: usize = 3;

fn tree() -> Tree {
    Tree {
        sentences: vec!["opening a file".into()],
        processes: PROCESSES,
        root_pid: 2,
        oom_score_adj: 0,
        opened: Vec::new(),
        base: 0,
        rework: 0,
        control: 100,
        watched: false,
        attach: None,
        tables: Vec::new(),
    }
}

/// As the restorer sends it.
fn bytes(kind: u32, process: u32, what: u32, errno: u32) -> Vec<u8> {
    let words = [kind, process, what, errno].map(u32::to_ne_bytes);
    let marks = [7u64; MARKS].map(u64::to_ne_bytes);
    [words.concat(), marks.concat()].concat()
}

fn restored(process: u32) -> Report {
    parse(&bytes(report::RESTORED, process, 0, 0)).unwrap()
}

#[test]
fn each_process_is_restored_once() {
    let (mut pids, mut marks) = ([0; PROCESSES], [0; MARKS]);
    let mut take = |process, pid| note(&restored(process), pid, &tree(), &mut pids, &mut marks);
    take(1, 41).unwrap();
    for process in [1, PROCESSES as u32, u32::MAX] {
        let err = take(process, 42).unwrap_err();
        assert!(matches!(err, ZygoteError::Io { .. }), "{process}: {err}");
    }
    assert_eq!(pids, [0, 41, 0]);
}

#[test]
fn only_one_that_waits_has_answered() {
    let answer = |kind| zygote_error(&parse(&bytes(kind, 0, 16, 2)).unwrap(), &tree());
    assert!(answer(report::IDLE).is_ok());
    assert!(matches!(
        answer(report::FAILED),
        Err(ZygoteError::Step { step, .. }) if step == "opening a file"
    ));
    assert!(answer(report::RESTORED).is_err());
}

#[test]
fn a_report_of_another_length_or_kind_is_an_error() {
    let sound = bytes(report::IDLE, 0, 0, 0);
    let longer = [&sound[..], &[0]].concat();
    let unknown = bytes(report::FAILED + 1, 0, 0, 0);
    let allowed = Duration::from_secs(60);
    for (message, good) in [
        (&sound[..], true),
        (&sound[..1], false),
        (&sound[..sound.len() - 1], false),
        (&longer[..], false),
        (&unknown[..], false),
    ] {
        let (ours, theirs) = socket_pair().unwrap();
        send(&theirs, message, SendFlags::empty()).unwrap();
        let received = receive(ours.as_fd(), Instant::now() + allowed, allowed);
        match received {
            Ok((_, pid)) => assert!(good && pid == std::process::id() as i32),
            Err(err) => assert!(!good && matches!(err, ZygoteError::Io { .. }), "{err}"),
        }
    }
}

#[test]
fn no_report_brings_a_start_down() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus/report");
    let seeds = [
        ("idle", bytes(report::IDLE, 0, 0, 0)),
        ("restored", bytes(report::RESTORED, 1, 0, 0)),
        ("failed", bytes(report::FAILED, 0, 16, 2)),
    ];
    if std::env::var_os("TRENV_WRITE_CORPUS").is_some() {
        for (name, seed) in &seeds {
            std::fs::write(corpus.join(name), seed).unwrap();
        }
    }
    let tree = tree();
    let mut noted = 0;
    trenv_fuzz::run(&corpus, &seeds.map(|(_, seed)| seed), INPUTS, |bytes| {
        let Some(message) = parse(bytes) else {
            return;
        };
        assert_eq!(bytes.len(), size_of::<Report>());
        let (mut pids, mut marks) = ([0; PROCESSES], [0; MARKS]);
        if let Err(ZygoteError::Step { source, .. }) = zygote_error(&message, &tree) {
            let _ = source.to_string();
        }
        if note(&message, 41, &tree, &mut pids, &mut marks).is_ok() {
            noted += 1;
            assert!(pids.contains(&41));
            let _ = steps(7, &marks);
        }
    });
    assert!(noted > 100, "only {noted} inputs were noted");
}
