//! Restores a tree with TCP connections among its processes. Needs root.

#![allow(clippy::unwrap_used)]

mod harness;

use harness::{Bed, TestResult};
use trenv_pool::{Backend, Pool};

fn connections_go_on(arguments: &[&str]) -> TestResult {
    let bed = Bed::new()?;
    let program = bed.compile("connections")?;
    let mut command = vec![program.as_str()];
    command.extend(arguments);
    let mut first = bed.run(&command)?;
    assert_eq!(first.ask("are you there"), "ok");
    let template = bed.dump(first)?;
    let zygote = bed.zygote(&template)?;
    let mut agent = zygote.agent()?;
    let (mut one, other) = (bed.start(&mut agent)?, bed.start(&mut agent)?);
    // From an instance before its connections were used, whose data may be elsewhere in the kernel.
    let again = bed.zygote(&bed.dump(other)?)?;
    assert_eq!(one.ask("check"), "ok");
    let mut agent = again.agent()?;
    let (mut one, mut other) = (bed.start(&mut agent)?, bed.start(&mut agent)?);
    assert_eq!(one.ask("check"), "ok");
    assert_eq!(other.ask("check"), "ok");
    Ok(())
}

#[test]
fn connections_of_a_small_family_go_on() -> TestResult {
    connections_go_on(&["40", "40"])
}

#[test]
fn connections_of_a_large_family_go_on() -> TestResult {
    connections_go_on(&["9000", "4000"])
}

#[test]
fn a_dump_that_fails_leaves_connections_alone() -> TestResult {
    let bed = Bed::new()?;
    let program = bed.compile("connections")?;
    let mut instance = bed.run(&[&program, "9000"])?;
    assert_eq!(instance.ask("are you there"), "ok");
    let small = Pool::format(&bed.directory().join("small"), Backend::File, 4 << 20)?;
    let err = Bed::dump_to(&small, &instance).err().ok_or("it fits")?;
    assert!(err.to_string().contains("store the snapshot"), "{err}");
    assert_eq!(instance.ask("check"), "ok");
    Ok(())
}

#[test]
fn a_connection_from_outside_is_refused() -> TestResult {
    let bed = Bed::new()?;
    let program = format!("{}/tests/programs/listener.py", env!("CARGO_MANIFEST_DIR"));
    let mut instance = bed.run(&["/usr/bin/python3", &program])?;
    assert_eq!(instance.ask("are you there"), "done");
    let mut guest = instance.connect()?;
    let err = bed.try_dump(&instance).err().ok_or("it was not refused")?;
    let waits = "is a listener with 1 connections not accepted yet";
    assert!(err.to_string().contains(waits), "{err}");
    instance.ask("accept");
    let err = bed.try_dump(&instance).err().ok_or("it was not refused")?;
    let expected = "is an established TCP connection to 127.0.0.1:";
    assert!(err.to_string().contains(expected), "{err}");
    instance.ask("hello");
    let mut got = [0; 6];
    std::io::Read::read_exact(&mut guest, &mut got)?;
    assert_eq!(&got, b"hello\n");
    instance.ask("close");
    drop(guest);
    bed.dump(instance)?;
    Ok(())
}
