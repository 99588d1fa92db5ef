//! Restores programs that have brought themselves into a state, and look at it when they are asked: each
//! twice side by side, and as a second snapshot of what was restored. Needs root.

#![allow(clippy::unwrap_used)]

mod harness;

use harness::{Bed, Instance, TestResult};
use trenv_snapshot::methods::Method;

/// Asks a program that has not looked yet to look; its answer begins with "ok".
fn is_right(instance: &mut Instance, who: &str) {
    let answer = instance.ask("check");
    assert!(answer.starts_with("ok"), "{who}: {answer:?}");
}

fn comes_back(bed: &Bed, command: &[&str], methods: &[Method]) -> TestResult {
    let mut first = bed.run(command)?;
    assert!(matches!(first.ask("here").as_str(), "here" | "ok"));
    let template = bed.dump(first)?;
    let zygote = bed.zygote(&template)?;
    let mut agent = zygote.agent()?;
    let mut instances = [bed.start(&mut agent)?, bed.start(&mut agent)?];
    // One that has not looked yet is as it was.
    let again = bed.start(&mut agent)?;
    let of_it = bed.zygote(&bed.dump(again)?)?;
    let mut third = bed.start(&mut of_it.agent()?)?;
    for instance in &mut instances {
        is_right(instance, "side by side");
    }
    is_right(&mut third, "dumped again");
    for &method in methods {
        let prepared = bed.prepare(method, &template)?;
        let mut instance = bed.start_with(prepared.as_ref())?;
        is_right(&mut instance, &method.to_string());
    }
    Ok(())
}

#[test]
fn all_registers_are_kept() -> TestResult {
    let bed = Bed::new()?;
    let program = bed.compile("registers")?;
    comes_back(&bed, &[&program], &harness::methods())
}

#[test]
fn robust_mutexes_restartable_sequences_and_joins_go_on() -> TestResult {
    let bed = Bed::new()?;
    let program = bed.compile("threads")?;
    comes_back(&bed, &[&program], &harness::methods())
}

#[test]
fn a_restartable_sequence_begins_anew() -> TestResult {
    let bed = Bed::new()?;
    let program = bed.compile("sequence")?;
    let mut first = bed.run(&[&program])?;
    is_right(&mut first, "before");
    bed.dump_and_go_on(&first)?;
    is_right(&mut first, "after a dump");
    comes_back(&bed, &[&program], &harness::methods())
}

#[test]
fn signals_wait_and_are_handled_as_before() -> TestResult {
    let bed = Bed::new()?;
    let program = bed.compile("signals")?;
    comes_back(&bed, &[&program], &[Method::Copy, Method::Lazy])
}

#[test]
fn limits_policies_and_capabilities_are_kept() -> TestResult {
    let bed = Bed::new()?;
    let program = format!("{}/tests/programs/limits.py", env!("CARGO_MANIFEST_DIR"));
    comes_back(&bed, &["/usr/bin/python3", &program], &[])
}

#[test]
fn descriptors_of_every_kind_are_made_anew() -> TestResult {
    let bed = Bed::new()?;
    let program = bed.compile("descriptors")?;
    let place = tempfile::tempdir()?;
    let place = place.path().display().to_string();
    comes_back(&bed, &[&program, &place], &[Method::Copy])
}

#[test]
fn guard_pages_are_guarded_again() -> TestResult {
    let bed = Bed::new()?;
    let program = bed.compile("guards")?;
    comes_back(&bed, &[&program], &harness::methods())
}

#[test]
fn advice_about_memory_and_what_nobody_may_touch_are_kept() -> TestResult {
    let bed = Bed::new()?;
    let program = bed.compile("advice")?;
    for larger in ["parent", "child"] {
        comes_back(&bed, &[&program, larger], &harness::methods())?;
    }
    Ok(())
}

#[test]
fn owners_of_open_files_are_told_by_signals() -> TestResult {
    let bed = Bed::new()?;
    let program = bed.compile("owners")?;
    comes_back(&bed, &[&program], &harness::methods())
}

#[test]
fn registrations_for_memory_barriers_are_made_again() -> TestResult {
    let bed = Bed::new()?;
    let program = bed.compile("barriers")?;
    comes_back(&bed, &[&program], &harness::methods())
}

#[test]
fn children_keep_what_their_parents_dropped_later() -> TestResult {
    let bed = Bed::new()?;
    let program = bed.compile("bounds")?;
    for size in ["small", "large"] {
        comes_back(&bed, &[&program, size], &[Method::Copy])?;
    }
    Ok(())
}
