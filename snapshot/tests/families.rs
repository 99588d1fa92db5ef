//! Restores trees in which processes come by their memory in every way: one takes the clone's, small
//! ones load their own, large ones are forked. Needs root.

#![allow(clippy::unwrap_used)]

mod harness;

use harness::{Bed, TestResult};

fn family_comes_back(arguments: &[&str]) -> TestResult {
    let bed = Bed::new()?;
    let program = bed.compile("family")?;
    let mut command = vec![program.as_str()];
    command.extend(arguments);
    let mut first = bed.run(&command)?;
    assert_eq!(first.ask("check"), "5 of 5");
    let template = bed.dump(first)?;
    let zygote = bed.zygote(&template)?;
    let mut agent = zygote.agent()?;
    let mut instances = Vec::new();
    for _ in 0..3 {
        instances.push(bed.start(&mut agent)?);
    }
    for instance in &mut instances {
        for _ in 0..3 {
            assert_eq!(instance.ask("check"), "5 of 5");
        }
        assert_eq!(instance.pids.len(), 5);
        zygote.learn(&instance.pids, "")?;
    }
    // What was learnt is copied ahead, for those that are forked too.
    let mut taught = bed.start(&mut agent)?;
    assert_eq!(taught.ask("check"), "5 of 5");
    for method in harness::methods() {
        let prepared = bed.prepare(method, &template)?;
        for turn in 0..2 {
            let mut instance = bed.start_with(prepared.as_ref())?;
            assert_eq!(instance.ask("check"), "5 of 5", "{method}, {turn}");
            prepared.learn(&instance.pids, "")?;
        }
    }
    Ok(())
}

#[test]
fn a_small_root_lets_its_largest_child_have_the_memory() -> TestResult {
    family_comes_back(&["100"])
}

#[test]
fn a_large_root_keeps_the_memory_and_forks_its_children() -> TestResult {
    family_comes_back(&["9000"])
}

#[test]
fn every_thread_has_its_filters_again() -> TestResult {
    family_comes_back(&["100", "filter"])
}

#[test]
fn a_clone_is_a_process_that_waits_and_ends_unused() -> TestResult {
    let bed = Bed::new()?;
    let program = bed.compile("family")?;
    let first = bed.run(&[&program, "100"])?;
    let zygote = bed.zygote(&bed.dump(first)?)?;
    let mut agent = zygote.agent()?;
    let clone = agent.make_clone(None)?;
    assert!(clone.lives());
    let path = format!("/proc/{}", clone.pid());
    drop(clone);
    let begun = std::time::Instant::now();
    while std::path::Path::new(&path).exists() {
        assert!(begun.elapsed().as_secs() < 5, "{path} stays");
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    assert_eq!(bed.start(&mut agent)?.ask("check"), "5 of 5");
    Ok(())
}
