//! Restores trees with zombies, orphans, and sessions and groups whose leaders are gone. Needs root.

#![allow(clippy::unwrap_used)]

mod harness;

use harness::{Bed, TestResult};

/// The program's own check in two instances side by side, after each of two dumps.
fn places_come_back(state: &str, members: &str) -> TestResult {
    let bed = Bed::new()?;
    let program = bed.compile("lineage")?;
    let mut first = bed.run(&[&program, state])?;
    assert_eq!(first.ask("record"), members);
    let zygote = bed.zygote(&bed.dump(first)?)?;
    let mut agent = zygote.agent()?;
    let mut instances = vec![bed.start(&mut agent)?, bed.start(&mut agent)?];
    for instance in &mut instances {
        assert_eq!(instance.ask("check"), members);
    }
    let again = bed.zygote(&bed.dump(instances.remove(0))?)?;
    assert_eq!(bed.start(&mut again.agent()?)?.ask("check"), members);
    Ok(())
}

#[test]
fn orphans_and_members_of_dead_sessions_and_groups_have_their_places() -> TestResult {
    places_come_back("places", "10")
}

#[test]
fn orphans_fall_to_the_subreaper_that_had_adopted_them() -> TestResult {
    places_come_back("adopted", "3")
}

#[test]
fn zombies_are_waited_for_with_their_status() -> TestResult {
    let bed = Bed::new()?;
    let program = bed.compile("lineage")?;
    let first = bed.run(&[&program, "zombies"])?;
    let zygote = bed.zygote(&bed.dump(first)?)?;
    let mut agent = zygote.agent()?;
    let mut instances = [bed.start(&mut agent)?, bed.start(&mut agent)?];
    for instance in &mut instances {
        assert_eq!(instance.ask("check"), "6");
    }
    Ok(())
}
