//! Restores a program that watches files. Needs root.

#![allow(clippy::unwrap_used)]

mod harness;

use harness::{Bed, TestResult};

/// IN_MODIFY of both files, IN_IGNORED of the one-shot, IN_CREATE and IN_DELETE of the directory.
const EVENTS: &str = "2:2 3:2 3:8000 4:100 4:200 .";

#[test]
fn watches_go_on_with_their_numbers() -> TestResult {
    let bed = Bed::new()?;
    let program = bed.compile("watches")?;
    let directories = [tempfile::tempdir()?, tempfile::tempdir()?];
    let path = |index: usize| directories[index].path().display().to_string();
    let mut first = bed.run(&[&program, &path(0)])?;
    assert_eq!(first.ask("check"), ".");
    let zygote = bed.zygote(&bed.dump(first)?)?;
    let mut agent = zygote.agent()?;
    // Side by side, they share the directory that this machine's root has.
    let mut instances = [bed.start(&mut agent)?, bed.start(&mut agent)?];
    for instance in &mut instances {
        assert_eq!(instance.ask("check"), ".", "nothing has happened");
    }
    assert_eq!(instances[0].ask("touch"), EVENTS);
    assert_eq!(instances[1].ask("check"), EVENTS);

    let mut busy = bed.run(&[&program, &path(1)])?;
    busy.ask("leave");
    let err = bed.try_dump(&busy).err().ok_or("events were lost")?;
    assert!(err.to_string().contains("events not read yet"), "{err}");
    assert_eq!(busy.ask("check"), "2:2 .", "it goes on");
    Ok(())
}
