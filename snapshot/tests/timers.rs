//! Restores a program with POSIX timers. Needs root.

#![allow(clippy::unwrap_used)]

mod harness;

use harness::{Bed, TestResult};

#[test]
fn posix_timers_go_on_with_their_numbers_signals_and_threads() -> TestResult {
    let bed = Bed::new()?;
    let program = bed.compile("timers")?;
    let mut first = bed.run(&[&program])?;
    assert_eq!(first.ask("check"), "7");
    let zygote = bed.zygote(&bed.dump(first)?)?;
    let mut agent = zygote.agent()?;
    let mut instances = [bed.start(&mut agent)?, bed.start(&mut agent)?];
    for instance in &mut instances {
        for _ in 0..2 {
            assert_eq!(instance.ask("check"), "7");
        }
    }
    Ok(())
}
