//! What must differ between clones of one snapshot, and what comes back empty. Needs root.

#![allow(clippy::unwrap_used)]

mod harness;

use std::collections::BTreeMap;

use harness::{Bed, Instance, TestResult};
use trenv_pool::TemplateId;
use trenv_snapshot::methods::Method;

type Made<T> = Result<T, Box<dyn std::error::Error>>;

const VARIABLE: &str = "TRENV_GENERATION=/run/trenv/generation";

fn source(path: &str) -> String {
    format!("{}/{path}", env!("CARGO_MANIFEST_DIR"))
}

/// Dumps a program that has answered once; its template, its note, and the answer.
fn dumped(bed: &Bed, command: &[&str]) -> Made<(TemplateId, String, String)> {
    let mut first = bed.run(command)?;
    let before = first.ask("draw");
    std::thread::sleep(std::time::Duration::from_millis(100));
    let dumped = bed.try_dump(&first)?;
    assert_eq!(dumped.notes.len(), 1);
    Ok((dumped.template.id, dumped.notes[0].clone(), before))
}

/// Two clones, and one whose memory is copied.
fn instances(bed: &Bed, template: &TemplateId) -> Made<Vec<Instance>> {
    let zygote = bed.zygote(template)?;
    let mut agent = zygote.agent()?;
    Ok(vec![
        bed.start(&mut agent)?,
        bed.start(&mut agent)?,
        bed.start_with(bed.prepare(Method::Copy, template)?.as_ref())?,
    ])
}

/// The keys of flat JSON answers whose values are equal in some two of the instances.
fn equal_keys(instances: &mut [Instance]) -> Vec<String> {
    let mut seen: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for instance in instances {
        let answer = instance.ask("draw");
        for pair in answer.trim_matches(['{', '}']).split(',') {
            let (key, value) = pair.split_once(':').unwrap();
            let values = seen.entry(key.trim().trim_matches('"').to_owned());
            values.or_default().push(value.trim().to_owned());
        }
    }
    let repeats = |values: &Vec<String>| {
        let mut once = values.clone();
        once.sort();
        once.dedup();
        once.len() < values.len()
    };
    assert!(seen.len() > 5, "{seen:?}");
    let equal = seen.into_iter().filter(|(_, values)| repeats(values));
    equal.map(|(key, _)| key).collect()
}

#[test]
fn each_start_finds_another_page_and_what_is_never_stored_is_empty() -> TestResult {
    let bed = Bed::new()?;
    let program = bed.compile("fresh")?;
    let (template, note, before) = dumped(&bed, &[&program])?;
    assert!(note.starts_with("hash seeds shared"), "{note}");
    let words = |line: &str| -> Vec<String> { line.split(' ').map(str::to_owned).collect() };
    let before = words(&before);
    assert_eq!(before[1..3], ["5", "5"]);
    let mut seen = vec![before];
    for mut instance in instances(&bed, &template)? {
        let after = words(&instance.ask("draw"));
        assert_eq!(
            after[1..3],
            ["0", "0"],
            "wiped and droppable memory is empty"
        );
        assert_eq!(after[3], format!("sandbox-{}", instance.init), "host name");
        assert!(seen.iter().all(|other| other[0] != after[0]), "{after:?}");
        // Again in the same instance: nothing changes.
        assert_eq!(words(&instance.ask("draw"))[0], after[0]);
        seen.push(after);
    }
    Ok(())
}

#[test]
fn a_restored_program_with_the_page_is_snapshotted_again() -> TestResult {
    let bed = Bed::new()?;
    let program = bed.compile("fresh")?;
    let (template, _, _) = dumped(&bed, &[&program])?;
    let mut second = instances(&bed, &template)?.remove(0);
    let before = second.ask("draw");
    let mut third = instances(&bed, &bed.dump(second)?)?.remove(0);
    assert_ne!(third.ask("draw")[..32], before[..32]);
    Ok(())
}

#[test]
fn forked_processes_have_the_page_too() -> TestResult {
    let bed = Bed::new()?;
    let program = bed.compile("fresh")?;
    // Small ones are loaded by exec; one of two large ones is really forked.
    for how in ["forked", "large"] {
        let (template, note, before) = dumped(&bed, &[&program, how])?;
        assert!(note.starts_with("hash seeds shared"), "{note}");
        for mut instance in instances(&bed, &template)? {
            assert_ne!(instance.ask("draw")[..32], before[..32]);
            assert_eq!(instance.pids.len(), 2);
            for pid in &instance.pids {
                let maps = std::fs::read_to_string(format!("/proc/{pid}/maps"))?;
                let pages = maps.matches(" /run/trenv/generation").count();
                assert_eq!(pages, 1, "{maps}");
            }
        }
    }
    Ok(())
}

#[test]
fn a_page_that_cannot_come_back_is_refused() -> TestResult {
    let bed = Bed::new()?;
    let program = bed.compile("fresh")?;
    for (how, why) in [
        (
            "private",
            "maps the generation page privately; map it shared",
        ),
        ("long", "maps more than the one page of the generation file"),
    ] {
        let mut instance = bed.run(&[&program, how])?;
        let before = instance.ask("draw");
        let err = bed.try_dump(&instance).err().ok_or(how)?;
        assert!(err.to_string().contains(why), "{err}");
        assert_eq!(instance.ask("draw"), before, "it goes on");
    }
    Ok(())
}

#[test]
fn clones_of_a_python_program_draw_differently_with_the_module() -> TestResult {
    let bed = Bed::new()?;
    let modules = format!("PYTHONPATH={}", source("../functions/modules/python"));
    let program = source("tests/programs/draw.py");
    let command = ["env", VARIABLE, &modules, "/usr/bin/python3", &program];
    let (template, note, _) = dumped(&bed, &command)?;
    let unaware = "generators shared: clones start with equal random state, since the generation \
                   page is not mapped by /usr/bin/python3";
    assert!(note.starts_with(unaware), "{note}");
    let equal = equal_keys(&mut instances(&bed, &template)?);
    let every = [
        "choice", "gauss", "hello", "openssl", "own", "random", "thread",
    ];
    assert_eq!(equal, every);

    let command = [&command[..], &["trenv_generation"]].concat();
    let (template, note, _) = dumped(&bed, &command)?;
    assert!(note.starts_with("hash seeds shared"), "{note}");
    let equal = equal_keys(&mut instances(&bed, &template)?);
    assert!(equal.is_empty(), "{equal:?}");
    Ok(())
}

#[test]
fn clones_of_a_node_program_draw_differently_with_the_module() -> TestResult {
    let bed = Bed::new()?;
    let module = bed.node_module()?;
    let program = source("tests/programs/draw.js");
    let (template, note, _) = dumped(&bed, &["env", VARIABLE, "/usr/bin/node", &program])?;
    assert!(note.starts_with("generators shared"), "{note}");
    let equal = equal_keys(&mut instances(&bed, &template)?);
    let every = [
        "bytes", "filled", "int", "key", "random", "uuid", "web_uuid",
    ];
    assert_eq!(equal, every);

    let command = [
        "env",
        VARIABLE,
        "/usr/bin/node",
        "--require",
        &module,
        &program,
    ];
    let (template, note, _) = dumped(&bed, &command)?;
    assert!(note.starts_with("hash seeds shared"), "{note}");
    let equal = equal_keys(&mut instances(&bed, &template)?);
    assert!(equal.is_empty(), "{equal:?}");
    Ok(())
}
