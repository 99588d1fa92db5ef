//! Restores a program whose sockets are at its sandbox's own address in sandboxes with others. Needs root.

#![allow(clippy::unwrap_used)]

mod harness;

use std::io::Read;
use std::net::{TcpStream, UdpSocket};
use std::time::Duration;

use harness::{Bed, Instance, Outside, TestResult};

const FIRST: &str = "10.62.0.10";
const PATIENCE: Option<Duration> = Some(Duration::from_secs(10));

/// A socket at 10.62.0.1:7000, to which the program has connected its own.
fn peer(outside: &Outside) -> Result<UdpSocket, Box<dyn std::error::Error>> {
    let peer = outside.act(|| UdpSocket::bind("10.62.0.1:7000"))?;
    peer.set_read_timeout(PATIENCE)?;
    Ok(peer)
}

/// Whether an instance is reached, and reaches others, by an address.
fn is_reached(
    instance: &mut Instance,
    address: &str,
    names: &str,
    outside: &Outside,
    peer: &UdpSocket,
) -> TestResult {
    assert_eq!(instance.ask("names"), names.replace(FIRST, address));
    let mut guests = Vec::new();
    for port in [7001, 7002] {
        let to = format!("{address}:{port}");
        guests.push(outside.act(move || TcpStream::connect(to))?);
    }
    assert_eq!(instance.ask("serve"), "ok");
    for mut guest in guests {
        guest.set_read_timeout(PATIENCE)?;
        let mut answer = String::new();
        guest.read_to_string(&mut answer)?;
        assert_eq!(answer, "served");
    }
    let mut text = [0; 16];
    peer.send_to(b"are you there", format!("{address}:7003"))?;
    assert_eq!(instance.ask("answer"), "ok");
    let (length, from) = peer.recv_from(&mut text)?;
    assert_eq!(&text[..length], b"are you there");
    assert_eq!(from.to_string(), format!("{address}:7003"));
    // The last two of the names are those of the connected sockets.
    let ports = names.split_whitespace().skip(1).step_by(2);
    assert_eq!(instance.ask("send"), "ok");
    for port in ports.skip(3) {
        let (length, from) = peer.recv_from(&mut text)?;
        assert_eq!(&text[..length], b"hello");
        assert_eq!(from.to_string(), format!("{address}:{port}"));
    }
    Ok(())
}

#[test]
fn sockets_at_the_own_address_are_at_that_of_the_new_sandbox() -> TestResult {
    let bed = Bed::new()?;
    let outside = Outside::new()?;
    let peer = peer(&outside)?;
    let mut first = bed.run(&[&bed.compile("addresses")?])?;
    outside.connect(first.init, FIRST)?;
    assert_eq!(first.ask("open"), "ok");
    let names = first.ask("names");
    assert_eq!(names.matches(FIRST).count(), 5, "{names}");
    is_reached(&mut first, FIRST, &names, &outside, &peer)?;
    let zygote = bed.zygote(&bed.dump(first)?)?;
    let mut agent = zygote.agent()?;
    let addresses = ["10.62.0.20", "10.62.0.30"];
    let mut instances = Vec::new();
    for address in addresses {
        let joined = |init| outside.connect(init, address);
        instances.push(bed.start_prepared(&mut agent, joined)?);
    }
    for (instance, address) in instances.iter_mut().zip(addresses) {
        is_reached(instance, address, &names, &outside, &peer)?;
    }
    // And from there once more.
    let zygote = bed.zygote(&bed.dump(instances.remove(0))?)?;
    let last = "10.62.0.40";
    let joined = |init| outside.connect(init, last);
    let mut instance = bed.start_prepared(&mut zygote.agent()?, joined)?;
    is_reached(&mut instance, last, &names, &outside, &peer)
}

#[test]
fn a_start_without_the_interface_names_it() -> TestResult {
    let bed = Bed::new()?;
    let outside = Outside::new()?;
    let mut first = bed.run(&[&bed.compile("addresses")?])?;
    outside.connect(first.init, FIRST)?;
    assert_eq!(first.ask("open"), "ok");
    let zygote = bed.zygote(&bed.dump(first)?)?;
    let err = bed.start(&mut zygote.agent()?).err().ok_or("it started")?;
    let reason = "asking for the IPv4 address of eth0";
    assert!(err.to_string().contains(reason), "{err}");
    Ok(())
}
