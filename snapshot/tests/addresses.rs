//! Restores a program whose sockets are at its sandbox's own address in sandboxes with others. Needs root.

#![allow(clippy::unwrap_used)]

mod harness;

use std::io::Read;
use std::net::{TcpStream, UdpSocket};
use std::time::Duration;

use harness::{Bed, Instance, Outside, TestResult};

const FIRST: u32 = 10;
const PATIENCE: Option<Duration> = Some(Duration::from_secs(10));

/// A sandbox's addresses, by its number.
fn four(number: u32) -> String {
    format!("10.62.0.{number}")
}

fn six(number: u32) -> String {
    format!("fd62::{number}")
}

fn connect(outside: &Outside, init: i32, number: u32) -> TestResult {
    outside.connect(init, &four(number))?;
    Outside::add_address(init, &format!("{}/64", six(number)))
}

/// A socket at 10.62.0.1:7000, to which the program has connected its own.
fn peer(outside: &Outside) -> Result<UdpSocket, Box<dyn std::error::Error>> {
    let peer = outside.act(|| UdpSocket::bind("10.62.0.1:7000"))?;
    peer.set_read_timeout(PATIENCE)?;
    Ok(peer)
}

/// Whether an instance is reached, and reaches others, by the addresses of its sandbox.
fn is_reached(
    instance: &mut Instance,
    number: u32,
    names: &str,
    outside: &Outside,
    peer: &UdpSocket,
) -> TestResult {
    let address = four(number);
    let names_here = names
        .replace(&four(FIRST), &address)
        .replace(&six(FIRST), &six(number));
    assert_eq!(instance.ask("names"), names_here);
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
    let ports = names.split_whitespace().skip(1).step_by(2);
    assert_eq!(instance.ask("send"), "ok");
    // Five are not connected.
    for port in ports.skip(5).take(2) {
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
    connect(&outside, first.init, FIRST)?;
    assert_eq!(first.ask("open"), "ok");
    let names = first.ask("names");
    assert_eq!(names.matches(&four(FIRST)).count(), 5, "{names}");
    is_reached(&mut first, FIRST, &names, &outside, &peer)?;
    let zygote = bed.zygote(&bed.dump(first)?)?;
    let mut agent = zygote.agent()?;
    let numbers = [20, 30];
    let mut instances = Vec::new();
    for number in numbers {
        let joined = |init| connect(&outside, init, number);
        instances.push(bed.start_prepared(&mut agent, joined)?);
    }
    for (instance, number) in instances.iter_mut().zip(numbers) {
        is_reached(instance, number, &names, &outside, &peer)?;
    }
    // And from there once more.
    let zygote = bed.zygote(&bed.dump(instances.remove(0))?)?;
    let last = 40;
    let joined = |init| connect(&outside, init, last);
    let mut instance = bed.start_prepared(&mut zygote.agent()?, joined)?;
    is_reached(&mut instance, last, &names, &outside, &peer)
}

#[test]
fn a_start_without_the_interface_names_it() -> TestResult {
    let bed = Bed::new()?;
    let outside = Outside::new()?;
    let mut first = bed.run(&[&bed.compile("addresses")?])?;
    connect(&outside, first.init, FIRST)?;
    assert_eq!(first.ask("open"), "ok");
    let zygote = bed.zygote(&bed.dump(first)?)?;
    let err = bed.start(&mut zygote.agent()?).err().ok_or("it started")?;
    let reason = "asking for the IPv4 address of eth0";
    assert!(err.to_string().contains(reason), "{err}");
    Ok(())
}
