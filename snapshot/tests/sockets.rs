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
    let program = bed.compile("sockets")?;
    for (state, reason) in [
        ("rights", "in which descriptors wait to be received"),
        ("waiting", "not accepted yet"),
    ] {
        let directory = tempfile::tempdir()?;
        let place = directory.path().display().to_string();
        let mut instance = bed.run(&[&program, &place, state])?;
        assert_eq!(instance.ask("are you"), "here");
        let err = bed.try_dump(&instance).err().ok_or("it was not refused")?;
        assert!(err.to_string().contains(reason), "{state}: {err}");
        assert_eq!(instance.ask("are you"), "here");
    }
    Ok(())
}
