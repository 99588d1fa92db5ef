//! Restores a program whose unix sockets are connected and hold data. Needs root.

#![allow(clippy::unwrap_used)]

mod harness;

use harness::{Bed, TestResult};

#[test]
fn unix_sockets_keep_their_connections_and_what_waits_in_them() -> TestResult {
    let bed = Bed::new()?;
    let program = bed.compile("sockets")?;
    let directory = tempfile::tempdir()?;
    let place = directory.path().display().to_string();
    let first = bed.run(&[&program, &place])?;
    let zygote = bed.zygote(&bed.dump(first)?)?;
    let mut agent = zygote.agent()?;
    // Sockets with a path are made anew where the other's are: each is asked before the next is there.
    let mut first = bed.start(&mut agent)?;
    assert_eq!(first.ask("check"), "19");
    let mut second = bed.start(&mut agent)?;
    assert_eq!(second.ask("check"), "19");
    assert_eq!(first.ask("are you"), "here");
    Ok(())
}

#[test]
fn what_a_unix_socket_would_lose_is_refused() -> TestResult {
    let bed = Bed::new()?;
    for (program, state, reason) in [
        ("sockets", "waiting", "not accepted yet"),
        ("rights", "epoll", "in which an epoll waits"),
        ("rights", "pidfd", "in which a pidfd waits"),
        (
            "rights",
            "nested",
            "in which descriptors wait themselves waits",
        ),
        (
            "rights",
            "credentials",
            "what the kernel tells about their sender",
        ),
    ] {
        let program = bed.compile(program)?;
        let directory = tempfile::tempdir()?;
        let place = directory.path().display().to_string();
        let mut instance = bed.run(&[&program, &place, state])?;
        let answer = instance.ask("are you");
        let err = bed.try_dump(&instance).err().ok_or("it was not refused")?;
        assert!(err.to_string().contains(reason), "{state}: {err}");
        assert_eq!(instance.ask("are you"), answer);
    }
    Ok(())
}

#[test]
fn open_files_that_wait_in_unix_sockets_are_received() -> TestResult {
    let bed = Bed::new()?;
    let program = bed.compile("rights")?;
    let directory = tempfile::tempdir()?;
    let place = directory.path().display().to_string();
    let mut first = bed.run(&[&program, &place])?;
    assert_eq!(first.ask("are you there"), "ok");
    let zygote = bed.zygote(&bed.dump(first)?)?;
    let mut agent = zygote.agent()?;
    let (mut one, other) = (bed.start(&mut agent)?, bed.start(&mut agent)?);
    assert_eq!(one.ask("check"), "ok");
    let again = bed.zygote(&bed.dump(other)?)?;
    assert_eq!(bed.start(&mut again.agent()?)?.ask("check"), "ok");
    Ok(())
}

#[test]
fn files_of_unix_sockets_keep_their_owners() -> TestResult {
    use std::os::unix::fs::PermissionsExt;
    let bed = Bed::new()?;
    let program = format!(
        "{}/tests/programs/socketfiles.py",
        env!("CARGO_MANIFEST_DIR")
    );
    let directory = tempfile::tempdir()?;
    std::fs::set_permissions(directory.path(), PermissionsExt::from_mode(0o755))?;
    let place = directory.path().display().to_string();
    let mut first = bed.run(&["/usr/bin/python3", &program, &place])?;
    assert_eq!(first.ask("check"), "ok");
    let zygote = bed.zygote(&bed.dump(first)?)?;
    let mut agent = zygote.agent()?;
    // The directory is the same for both: each is asked before the next is there.
    for _ in 0..2 {
        assert_eq!(bed.start(&mut agent)?.ask("check"), "ok");
    }
    Ok(())
}
