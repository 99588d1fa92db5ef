//! Restores trees whose processes share memory, and files that no path leads to. Needs root.

#![allow(clippy::unwrap_used)]

mod harness;

use harness::{Bed, TestResult};
use trenv_snapshot::methods::Method;

/// Two instances side by side, a third after them, and one by copying; then a second snapshot.
/// Each question counts `step` further.
fn counts_on(program: &str, arguments: &[&str], step: u32) -> TestResult {
    let bed = Bed::new()?;
    let program = bed.compile(program)?;
    let mut command = vec![program.as_str()];
    command.extend(arguments);
    comes_back(&bed, &command, step)
}

fn comes_back(bed: &Bed, command: &[&str], step: u32) -> TestResult {
    let mut first = bed.run(command)?;
    let expect = |turn: u32| format!("{} ok", turn * step);
    assert_eq!(first.ask("add"), expect(1), "before the snapshot");
    let template = bed.dump(first)?;
    let zygote = bed.zygote(&template)?;
    let mut agent = zygote.agent()?;
    let mut one = bed.start(&mut agent)?;
    let mut other = bed.start(&mut agent)?;
    for turn in 2..6 {
        assert_eq!(one.ask("add"), expect(turn));
    }
    assert_eq!(other.ask("add"), expect(2), "it has memory of its own");
    zygote.learn(&one.pids, "")?;
    let mut third = bed.start(&mut agent)?;
    assert_eq!(third.ask("add"), expect(2), "the template is as it was");
    let method = bed.prepare(Method::Copy, &template)?;
    let mut copy = bed.start_with(method.as_ref())?;
    assert_eq!(copy.ask("add"), expect(2));
    let zygote = bed.zygote(&bed.dump(one)?)?;
    assert_eq!(bed.start(&mut zygote.agent()?)?.ask("add"), expect(6));
    Ok(())
}

#[test]
fn a_family_with_a_small_root_shares_memory() -> TestResult {
    counts_on("shared", &["40"], 3)
}

#[test]
fn a_family_with_a_large_root_shares_memory() -> TestResult {
    counts_on("shared", &["9000"], 3)
}

#[test]
fn files_that_a_small_parent_maps_are_mapped_again() -> TestResult {
    counts_on("files", &["40", "4000"], 2)
}

#[test]
fn files_that_a_large_parent_maps_are_mapped_again() -> TestResult {
    counts_on("files", &["9000", "4000"], 2)
}

#[test]
fn files_that_a_small_child_maps_are_mapped_again() -> TestResult {
    counts_on("files", &["9000", "40"], 2)
}

fn multiprocessing(method: &str) -> TestResult {
    let program = format!("{}/tests/programs/pool.py", env!("CARGO_MANIFEST_DIR"));
    comes_back(&Bed::new()?, &["/usr/bin/python3", &program, method], 2)
}

#[test]
fn pythons_multiprocessing_by_fork() -> TestResult {
    multiprocessing("fork")
}

#[test]
fn pythons_multiprocessing_by_spawn() -> TestResult {
    multiprocessing("spawn")
}

#[test]
fn locked_memory_is_locked_again() -> TestResult {
    counts_on("locked", &[], 1)
}

#[test]
fn what_is_mapped_later_is_locked_too() -> TestResult {
    counts_on("locked", &["future"], 1)
}

#[test]
fn sysv_memory_and_semaphores_keep_their_ids() -> TestResult {
    counts_on("sysv", &["40", "4000"], 2)?;
    counts_on("sysv", &["9000", "40"], 2)?;
    counts_on("sysv", &["9000", "4000"], 2)
}

#[test]
fn files_are_locked_again() -> TestResult {
    counts_on("filelocks", &["40", "4000"], 1)?;
    counts_on("filelocks", &["9000", "40"], 1)
}

#[test]
fn named_pipes_hold_what_they_held() -> TestResult {
    counts_on("fifo", &[], 1)
}

#[test]
fn nodes_child_process() -> TestResult {
    let program = format!("{}/tests/programs/child.js", env!("CARGO_MANIFEST_DIR"));
    comes_back(&Bed::new()?, &["/usr/bin/node", &program], 1)
}
