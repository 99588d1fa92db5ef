//! Restores programs whose sockets are connected, hold data and have options set. Needs root.

#![allow(clippy::unwrap_used)]

mod harness;

use harness::{Bed, Outside, TestResult};

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

#[test]
fn options_of_sockets_are_set_again() -> TestResult {
    let bed = Bed::new()?;
    let mut first = bed.run(&[&bed.compile("options")?])?;
    let answer = first.ask("check");
    // "ok", and how many of how many options could be set.
    let words: Vec<&str> = answer.split_whitespace().collect();
    let set = words.get(1).and_then(|set| set.parse::<u32>().ok());
    assert!(words[0] == "ok" && set.unwrap_or(0) >= 80, "{answer}");
    let zygote = bed.zygote(&bed.dump(first)?)?;
    let mut agent = zygote.agent()?;
    let (mut one, other) = (bed.start(&mut agent)?, bed.start(&mut agent)?);
    assert_eq!(one.ask("check"), answer);
    let again = bed.zygote(&bed.dump(other)?)?;
    assert_eq!(bed.start(&mut again.agent()?)?.ask("check"), answer);
    Ok(())
}

#[test]
fn what_an_internet_socket_or_a_queue_would_lose_is_refused() -> TestResult {
    let bed = Bed::new()?;
    let program = bed.compile("unkept")?;
    for (state, reason) in [
        ("datagram", "is a UDP socket with datagrams not read yet"),
        (
            "empty-datagram",
            "is a UDP socket with datagrams not read yet",
        ),
        ("queue", "is a POSIX message queue (/trenv)"),
        (
            "unlinked-queue",
            "is a POSIX message queue (/trenv (deleted))",
        ),
        ("closed-queue", "it has the POSIX message queue /trenv"),
        ("filter", "is a socket with a filter"),
        ("member", "is a member of the multicast group 239.1.2.3"),
        ("member6", "is a member of the multicast group ff05::1234"),
        ("interface", "sends by an interface of the sandbox"),
        ("corked", "is a UDP socket that is corked"),
        (
            "connecting",
            "is a TCP socket that waits for its connection",
        ),
        ("layer", "is a TCP socket with tls in it"),
        (
            "own-peer",
            "connected to 10.62.0.10:7001, the sandbox's own address at eth0",
        ),
        (
            "second",
            "bound to 10.62.0.11, which is not the first address of eth0",
        ),
        ("six", "bound to fd62::10, an IPv6 address of eth0"),
        ("number", "goes by the number of an interface"),
        (
            "nobody",
            "bound to 192.0.2.1, which no interface of the sandbox has",
        ),
    ] {
        let outside = Outside::new()?;
        let mut instance = bed.run(&[&program, state])?;
        outside.connect(instance.init, "10.62.0.10")?;
        Outside::add_address(instance.init, "10.62.0.11/16")?;
        Outside::add_address(instance.init, "fd62::10/64")?;
        let answer = instance.ask("do it");
        if state == "layer" && answer == "unknown" {
            eprintln!("This machine cannot have the state {state:?}: it is not tested.");
            continue;
        }
        assert_eq!(answer, state);
        bed.refuses(&mut instance, state, reason)?;
    }
    Ok(())
}
