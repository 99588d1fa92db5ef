//! Permanent neighbours: who has which link-layer address, without ARP.

use std::{io, net::Ipv4Addr};

use crate::netlink::{Netlink, attribute, attributes, number};

const RTM_NEWNEIGH: u16 = 28;
const RTM_DELNEIGH: u16 = 29;
const RTM_GETNEIGH: u16 = 30;
const PERMANENT: u16 = 0x80;
const DESTINATION: u16 = 1;
const LINK_ADDRESS: u16 = 2;
const HEADER: usize = 12;

fn index_of(interface: &str) -> io::Result<u32> {
    Ok(nix::net::if_::if_nametoindex(interface)?)
}

/// Family, padding, interface, state, flags, type.
fn header(index: u32) -> Vec<u8> {
    let mut body = vec![u8::try_from(libc::AF_INET).unwrap_or(0), 0, 0, 0];
    body.extend(index.to_ne_bytes());
    body.extend(PERMANENT.to_ne_bytes());
    body.extend([0, 0]);
    body
}

/// Adds a neighbour for good, in the place of what was known about its address.
pub fn add(interface: &str, address: Ipv4Addr, link: [u8; 6]) -> io::Result<()> {
    let mut body = header(index_of(interface)?);
    body.extend(attribute(DESTINATION, &address.octets()));
    body.extend(attribute(LINK_ADDRESS, &link));
    Netlink::open(libc::NETLINK_ROUTE)?.make(RTM_NEWNEIGH, &body)?;
    Ok(())
}

/// Removes the permanent neighbours that are not to be kept. An interface that does not exist has
/// none.
pub fn forget_others(interface: &str, keep: impl Fn(Ipv4Addr) -> bool) -> io::Result<()> {
    let Ok(index) = index_of(interface) else {
        return Ok(());
    };
    let mut route = Netlink::open(libc::NETLINK_ROUTE)?;
    let mut all = header(0);
    all[8..10].fill(0);
    for message in route.dump(RTM_GETNEIGH, &all)? {
        let body = &message.body;
        let permanent = number(body, 8) & u32::from(PERMANENT) != 0;
        if number(body, 4) != index || !permanent {
            continue;
        }
        let address = attributes(body, HEADER)
            .into_iter()
            .find(|(kind, _)| *kind == DESTINATION)
            .and_then(|(_, value)| <[u8; 4]>::try_from(value).ok())
            .map(Ipv4Addr::from);
        let Some(address) = address.filter(|address| !keep(*address)) else {
            continue;
        };
        let mut body = header(index);
        body.extend(attribute(DESTINATION, &address.octets()));
        match route.request(RTM_DELNEIGH, &body) {
            Ok(_) => {}
            // Someone else was faster.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
