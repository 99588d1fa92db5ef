//! Restores what prctl(2) and its like set. Needs root.

#![allow(clippy::unwrap_used)]

mod harness;

use harness::{Bed, TestResult};

/// User, SIGUSR1, no ambient capabilities, no huge pages, early kill, best effort 6, no write and
/// execute, slack; ERANGE and EDOM of the threads' filters, each with its thread's slack.
const HABITS: &str = "65534 10 64 1 1 16390 1 33333 3422222 3311111";

#[test]
fn processes_and_threads_keep_their_settings_and_filters() -> TestResult {
    let bed = Bed::new()?;
    let program = bed.compile("habits")?;
    let mut first = bed.run(&[&program])?;
    assert_eq!(first.ask("check"), HABITS);
    let zygote = bed.zygote(&bed.dump(first)?)?;
    let mut agent = zygote.agent()?;
    let mut instances = [bed.start(&mut agent)?, bed.start(&mut agent)?];
    for instance in &mut instances {
        assert_eq!(instance.ask("check"), HABITS);
    }
    Ok(())
}

/// Core dump filter, adjustment of the out-of-memory score, nice value of the session: of both.
const ADJUSTED: &str = "00000007 100 5 00000021 300 3";

#[test]
fn processes_keep_what_they_set_through_proc() -> TestResult {
    python_keeps("adjusted", ADJUSTED)
}

/// Whether it may be dumped, and whose its files in /proc are: of both.
const DUMPABLE: &str = "1 65534 0 0";

#[test]
fn processes_are_dumpable_as_before_and_own_their_proc() -> TestResult {
    python_keeps("dumpable", DUMPABLE)
}

/// Runs a script of `tests/programs`, which answers the same before its dump and after.
fn python_keeps(name: &str, answer: &str) -> TestResult {
    let bed = Bed::new()?;
    let program = format!("{}/tests/programs/{name}.py", env!("CARGO_MANIFEST_DIR"));
    let mut first = bed.run(&["/usr/bin/python3", &program])?;
    assert_eq!(first.ask("check"), answer);
    let zygote = bed.zygote(&bed.dump(first)?)?;
    let mut agent = zygote.agent()?;
    let mut instances = [bed.start(&mut agent)?, bed.start(&mut agent)?];
    for instance in &mut instances {
        assert_eq!(instance.ask("check"), answer);
    }
    Ok(())
}
