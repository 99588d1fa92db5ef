//! Threads that wait in the kernel know nothing of a dump, a refused dump or a restore. Needs root.

#![allow(clippy::unwrap_used)]

mod harness;

use harness::{Bed, TestResult};

#[test]
fn waiting_calls_are_not_interrupted_by_a_restore() -> TestResult {
    let bed = Bed::new()?;
    let program = bed.compile("blocked")?;
    let mut first = bed.run(&[&program])?;
    assert_eq!(first.ask("are you"), "here");
    let zygote = bed.zygote(&bed.dump(first)?)?;
    let mut agent = zygote.agent()?;
    let mut instances = [bed.start(&mut agent)?, bed.start(&mut agent)?];
    for instance in &mut instances {
        assert_eq!(instance.ask("go"), "ok");
    }
    Ok(())
}

#[test]
fn waiting_calls_are_not_interrupted_by_dumps_one_after_the_other() -> TestResult {
    let bed = Bed::new()?;
    let program = bed.compile("blocked")?;
    let mut first = bed.run(&[&program])?;
    assert_eq!(first.ask("are you"), "here");
    bed.dump_and_go_on(&first)?;
    assert_eq!(first.ask("are you"), "here");
    // Sleep, poll and the futex with a timeout go on by restart_syscall(2) now.
    let dumped = bed.dump_and_go_on(&first)?;
    assert_eq!(first.ask("go"), "ok", "the program that was dumped");
    let zygote = bed.zygote(&dumped.template.id)?;
    let mut agent = zygote.agent()?;
    let mut instances = [bed.start(&mut agent)?, bed.start(&mut agent)?];
    for instance in &mut instances {
        assert_eq!(instance.ask("go"), "ok");
    }
    Ok(())
}

#[test]
fn waiting_calls_are_not_interrupted_by_a_refused_dump() -> TestResult {
    let bed = Bed::new()?;
    let program = bed.compile("blocked")?;
    let mut instance = bed.run(&[&program])?;
    assert_eq!(instance.ask("leave the namespace"), "here");
    let refused = bed.try_dump(&instance).err().ok_or("it was not refused")?;
    assert!(refused.to_string().contains("a uts namespace"), "{refused}");
    assert_eq!(instance.ask("go"), "ok");
    Ok(())
}
