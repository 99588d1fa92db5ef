//! Working sets, recorded apart for each input that callers name. Needs root.

mod harness;

use std::sync::Arc;

use harness::{Bed, TestResult, wait_for};
use trenv_snapshot::methods::{Method, StartMethod};
use trenv_snapshot::recording::{Recorded, Touch};

type Made<T> = Result<T, Box<dyn std::error::Error>>;

const RECORDING: [Method; 3] = [Method::Template, Method::Reap, Method::Spice];

/// A tenancy of one call; `spread` writes 200 pages for "some" and reads 4096 for "whole".
fn tenancy(bed: &Bed, method: &dyn StartMethod, input: &str, question: &str) -> TestResult {
    let mut instance = bed.start_for(method, input)?;
    assert_eq!(instance.ask(question), "ok", "{}", method.method());
    method.learn(&instance.pids, input)?;
    Ok(())
}

fn of_input(method: &dyn StartMethod, input: &str) -> Made<Recorded> {
    let all = method.recorded();
    let found = all.iter().find(|one| one.input == input);
    Ok(found
        .cloned()
        .ok_or(format!("nothing of {input:?} in {all:?}"))?)
}

fn prepare(bed: &Bed, method: Method) -> Made<(trenv_pool::TemplateId, Arc<dyn StartMethod>)> {
    let program = bed.compile("spread")?;
    let mut first = bed.run(&[&program])?;
    // Its memory is filled when it answers.
    first.ask("ready");
    let template = bed.dump(first)?;
    Ok((template, bed.prepare(method, &template)?))
}

#[test]
fn a_recording_becomes_stable_once_rounds_agree() -> TestResult {
    let bed = Bed::new()?;
    for method in RECORDING {
        let (_, prepared) = prepare(&bed, method)?;
        tenancy(&bed, prepared.as_ref(), "", "some")?;
        let first = of_input(prepared.as_ref(), "")?;
        assert_eq!((first.rounds, first.stable), (1, false), "{method}");
        assert!(first.count() >= 200, "{method}: {first:?}");
        tenancy(&bed, prepared.as_ref(), "", "some")?;
        tenancy(&bed, prepared.as_ref(), "", "some")?;
        let last = of_input(prepared.as_ref(), "")?;
        assert!(last.stable, "{method}: {last:?}");
        let drift = last.drift.ok_or("no drift")?;
        assert!(drift.share_outside() < 0.1, "{method}: {drift:?}");
    }
    Ok(())
}

#[test]
fn what_one_input_touches_is_not_recorded_for_another() -> TestResult {
    let bed = Bed::new()?;
    for method in RECORDING {
        let (_, prepared) = prepare(&bed, method)?;
        for _ in 0..2 {
            tenancy(&bed, prepared.as_ref(), "writes", "some")?;
            tenancy(&bed, prepared.as_ref(), "few", "read")?;
        }
        let writes = of_input(prepared.as_ref(), "writes")?;
        let few = of_input(prepared.as_ref(), "few")?;
        let touch = match method {
            Method::Template => Touch::Written,
            Method::Spice if harness::attaches() => Touch::Written,
            _ => Touch::Used,
        };
        let of = |set: &Recorded| {
            let ranges = set.ranges.iter().filter(|range| range.touch == touch);
            ranges.map(|range| range.pages).sum::<u64>()
        };
        assert!(of(&writes) >= 200, "{method}: {writes:?}");
        assert!((1..100).contains(&of(&few)), "{method}: {few:?}");
        assert_eq!(writes.first_use, touch == Touch::Used, "{method}");
    }
    Ok(())
}

#[test]
fn an_input_that_changed_is_drift_and_recorded_again() -> TestResult {
    let bed = Bed::new()?;
    for method in [Method::Reap, Method::Spice] {
        if method == Method::Spice && harness::attaches() {
            // What a call only reads is not seen then, and this one writes nothing else.
            continue;
        }
        let (_, prepared) = prepare(&bed, method)?;
        for _ in 0..3 {
            tenancy(&bed, prepared.as_ref(), "", "some")?;
        }
        let before = of_input(prepared.as_ref(), "")?;
        assert!(before.stable, "{method}: {before:?}");
        tenancy(&bed, prepared.as_ref(), "", "whole")?;
        let after = of_input(prepared.as_ref(), "")?;
        let drift = after.drift.ok_or("no drift")?;
        assert!(drift.outside >= 4096, "{method}: {drift:?}");
        assert!(!after.stable, "{method}");
        assert!(after.count() >= before.count() + 4096, "{method}");
    }
    Ok(())
}

/// `faasnap` records an input once; what the kernel reads ahead counts too.
#[test]
fn a_loader_brings_in_what_its_input_touched() -> TestResult {
    let bed = Bed::new()?;
    let (template, prepared) = prepare(&bed, Method::FaaSnap)?;
    tenancy(&bed, prepared.as_ref(), "many", "whole")?;
    tenancy(&bed, prepared.as_ref(), "few", "some")?;
    let recorded = prepared.recorded();
    let many = of_input(prepared.as_ref(), "many")?.count();
    let few = of_input(prepared.as_ref(), "few")?.count();
    assert!(many >= 4096 && few >= 200, "{recorded:?}");
    let next = bed.prepare(Method::FaaSnap, &template)?;
    next.recall(&recorded)?;
    assert_eq!(next.recorded(), recorded);
    for method in [prepared, next] {
        for (input, least, most) in [("many", many, u64::MAX), ("few", few, many)] {
            let mut instance = bed.start_for(method.as_ref(), input)?;
            assert_eq!(instance.ask("some"), "ok");
            let loaded = || {
                let loaded = instance.work.figures().pages_prefetched;
                (loaded >= least).then_some(loaded)
            };
            let loaded = wait_for(loaded)?;
            assert!(
                loaded < most,
                "{input}: {loaded} pages, not {least} of {many}"
            );
        }
    }
    Ok(())
}

/// As after the zygote has ended.
#[test]
fn what_was_recorded_is_known_to_the_next_zygote() -> TestResult {
    let bed = Bed::new()?;
    for method in RECORDING {
        let (template, prepared) = prepare(&bed, method)?;
        for _ in 0..3 {
            tenancy(&bed, prepared.as_ref(), "x", "some")?;
        }
        let recorded = prepared.recorded();
        drop(prepared);
        let next = bed.prepare(method, &template)?;
        next.recall(&recorded)?;
        assert_eq!(next.recorded(), recorded, "{method}");
        let mut instance = bed.start_for(next.as_ref(), "x")?;
        let before = instance.faults()?;
        assert_eq!(instance.ask("some"), "ok", "{method}");
        let faults = instance.faults()? - before;
        assert!(faults < 100, "{method}: {faults} faults");
    }
    Ok(())
}
