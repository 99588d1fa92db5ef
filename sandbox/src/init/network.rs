//! What a tenancy leaves in the network namespace: TCP connections that nobody owns any more,
//! neighbours, metrics of destinations. Addresses, routes and links must be as they were.

use std::{
    collections::BTreeSet,
    io::{self, Read},
    os::fd::OwnedFd,
};

use rustix::fs::{Mode, OFlags, openat};

use trenv_cni::netlink::{Message, Netlink, attribute, attributes, number};

use crate::failure::{Doing, Failure};

const RTM_GETLINK: u16 = 18;
const RTM_GETADDR: u16 = 22;
const RTM_GETROUTE: u16 = 26;
const RTM_GETNEIGH: u16 = 30;
const RTM_DELNEIGH: u16 = 29;
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;
const GENL_CONTROL: u16 = 16;

/// Links, addresses and routes, each as one comparable text.
#[derive(Debug)]
pub struct Baseline(BTreeSet<String>);

impl Baseline {
    /// Reads them as they are now.
    pub fn read() -> Result<Self, Failure> {
        let mut route = open(libc::NETLINK_ROUTE)?;
        let mut all = BTreeSet::new();
        let mut add = |kind, header: usize, text: fn(&Message) -> Option<String>| {
            let messages = route
                .dump(kind, &vec![0; header])
                .doing("list the network's state")?;
            all.extend(messages.iter().filter_map(text));
            Ok(())
        };
        add(RTM_GETLINK, 16, link)?;
        add(RTM_GETADDR, 8, address)?;
        add(RTM_GETROUTE, 12, self::route)?;
        Ok(Self(all))
    }

    /// Removes what can be removed, and fails when the rest is not as at first.
    pub fn purge(&self, proc: &OwnedFd) -> Result<(), Failure> {
        end_connections(proc)?;
        forget_neighbours()?;
        forget_metrics()?;
        let now = Self::read()?;
        if let Some(new) = now.0.difference(&self.0).next() {
            return Err(Failure(format!("the tenancy left {new} in the network")));
        }
        if let Some(gone) = self.0.difference(&now.0).next() {
            return Err(Failure(format!("the tenancy removed {gone}")));
        }
        Ok(())
    }
}

fn open(protocol: libc::c_int) -> Result<Netlink, Failure> {
    Netlink::open(protocol).doing("open a netlink socket")
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Attributes of the given types as text, in the order of their types.
fn texts(message: &Message, header: usize, kinds: &[u16]) -> String {
    let mut found: Vec<_> = attributes(&message.body, header)
        .into_iter()
        .filter(|(kind, _)| kinds.contains(kind))
        .collect();
    found.sort_unstable();
    found
        .iter()
        .map(|(kind, value)| format!(" {kind}={}", hex(value)))
        .collect()
}

fn link(message: &Message) -> Option<String> {
    const UP: u32 = 1;
    const ADDRESS: u16 = 1;
    const NAME: u16 = 3;
    let index = number(&message.body, 4);
    let up = number(&message.body, 8) & UP;
    Some(format!(
        "link {index} up={up}{}",
        texts(message, 16, &[ADDRESS, NAME])
    ))
}

fn address(message: &Message) -> Option<String> {
    const LINK_SCOPE: u8 = 253;
    const ADDRESS: u16 = 1;
    const LOCAL: u16 = 2;
    let body = &message.body;
    let (family, prefix, scope) = (*body.first()?, *body.get(1)?, *body.get(3)?);
    if libc::c_int::from(family) == libc::AF_INET6 && scope == LINK_SCOPE {
        // The kernel adds them by itself some time after a link is up.
        return None;
    }
    let index = number(body, 4);
    Some(format!(
        "address on link {index} family={family} prefix={prefix}{}",
        texts(message, 8, &[ADDRESS, LOCAL])
    ))
}

fn route(message: &Message) -> Option<String> {
    const CLONED: u32 = 0x200;
    const DESTINATION: u16 = 1;
    let body = &message.body;
    let family = *body.first()?;
    if number(body, 8) & CLONED != 0 {
        return None;
    }
    // IPv6's link-local and multicast routes come and go with link-local addresses.
    let automatic = attributes(body, 12)
        .iter()
        .any(|(kind, value)| *kind == DESTINATION && matches!(value.first(), Some(0xfe | 0xff)));
    if libc::c_int::from(family) == libc::AF_INET6 && automatic {
        return None;
    }
    // Destination, source, link, gateway, priority, preferred source, table.
    Some(format!(
        "route family={family} prefix={} type={}{}",
        body.get(1)?,
        body.get(7)?,
        texts(message, 12, &[DESTINATION, 2, 4, 5, 6, 7, 15])
    ))
}

/// Destroys every TCP socket: the processes are gone, so whatever is left waits for a peer or for
/// time to pass, and would make a later listener fail with "address in use".
fn end_connections(proc: &OwnedFd) -> Result<(), Failure> {
    const TCP: u8 = 6;
    if !any_tcp(proc)? {
        return Ok(());
    }
    let mut diag = open(libc::NETLINK_SOCK_DIAG)?;
    for family in [libc::AF_INET, libc::AF_INET6] {
        let family = u8::try_from(family).unwrap_or(0);
        let request = |id: &[u8]| {
            let mut body = vec![family, TCP, 0, 0];
            body.extend(u32::MAX.to_ne_bytes());
            body.extend(id);
            body
        };
        let found = match diag.dump(SOCK_DIAG_BY_FAMILY, &request(&[0; 48])) {
            Ok(found) => found,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error).doing("list TCP connections"),
        };
        for socket in found {
            let Some(id) = socket.body.get(4..52) else {
                continue;
            };
            match diag.request(SOCK_DESTROY, &request(id)) {
                Ok(_) => {}
                // It ended by itself meanwhile.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error).doing("end a TCP connection"),
            }
        }
    }
    if any_tcp(proc)? {
        return Err(Failure("TCP connections are left".into()));
    }
    Ok(())
}

/// Whether this network namespace has any TCP socket, by its own counters: a dump would go through
/// the whole machine's table.
fn any_tcp(proc: &OwnedFd) -> Result<bool, Failure> {
    let read = |path: &str| -> io::Result<String> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let mut file = std::fs::File::from(openat(proc, path, flags, Mode::empty())?);
        let mut text = String::new();
        file.read_to_string(&mut text)?;
        Ok(text)
    };
    let four = read("1/net/sockstat").doing("read the socket counters")?;
    // Absent where IPv6 is.
    let six = read("1/net/sockstat6").unwrap_or_default();
    Ok(
        count(&four, "TCP:", "inuse") + count(&four, "TCP:", "tw") + count(&six, "TCP6:", "inuse")
            > 0,
    )
}

/// A counter of a line such as "TCP: inuse 5 orphan 0 tw 2 alloc 9 mem 3".
fn count(text: &str, line: &str, name: &str) -> u64 {
    let Some(words) = text.lines().find_map(|text| text.strip_prefix(line)) else {
        return 0;
    };
    let mut words = words.split_whitespace();
    words
        .by_ref()
        .find(|word| *word == name)
        .and_then(|_| words.next())
        .and_then(|value| value.parse().ok())
        .unwrap_or(0)
}

fn forget_neighbours() -> Result<(), Failure> {
    const DESTINATION: u16 = 1;
    const NOARP: u16 = 0x40;
    const PERMANENT: u16 = 0x80;
    const HEADER: usize = 12;
    let mut route = open(libc::NETLINK_ROUTE)?;
    let found = route
        .dump(RTM_GETNEIGH, &[0; HEADER])
        .doing("list neighbours")?;
    for neighbour in found {
        let body = &neighbour.body;
        let (Some(header), Some(state)) = (body.get(..HEADER), body.get(8..10)) else {
            continue;
        };
        let state = u16::from_ne_bytes([state[0], state[1]]);
        let destination = attributes(body, HEADER)
            .into_iter()
            .find(|(kind, _)| *kind == DESTINATION);
        let Some((_, destination)) = destination else {
            continue;
        };
        if state & (NOARP | PERMANENT) != 0 {
            continue;
        }
        let mut request = header.to_vec();
        request.extend(attribute(DESTINATION, destination));
        match route.request(RTM_DELNEIGH, &request) {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error).doing("forget a neighbour"),
        }
    }
    Ok(())
}

/// Empties the cache of what TCP learnt about destinations.
fn forget_metrics() -> Result<(), Failure> {
    const GET_FAMILY: u8 = 3;
    const FAMILY_ID: u16 = 1;
    const FAMILY_NAME: u16 = 2;
    const DELETE: u8 = 2;
    const HEADER: usize = 4;
    let mut generic = open(libc::NETLINK_GENERIC)?;
    let mut ask = vec![GET_FAMILY, 1, 0, 0];
    ask.extend(attribute(FAMILY_NAME, b"tcp_metrics\0"));
    let family = match generic.request(GENL_CONTROL, &ask) {
        Ok(answer) => answer.iter().find_map(|message| {
            attributes(&message.body, HEADER)
                .into_iter()
                .find(|(kind, _)| *kind == FAMILY_ID)
                .and_then(|(_, id)| Some(u16::from_ne_bytes([*id.first()?, *id.get(1)?])))
        }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => return Err(error).doing("find TCP's metrics"),
    };
    let Some(family) = family else {
        return Ok(());
    };
    // Without an address it means all of this namespace's.
    generic
        .request(family, &[DELETE, 1, 0, 0])
        .doing("empty TCP's metrics")?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_found_by_name() {
        let text = "sockets: used 9\nTCP: inuse 5 orphan 0 tw 2 alloc 9 mem 3\nUDP: inuse 1\n";
        assert_eq!(count(text, "TCP:", "inuse"), 5);
        assert_eq!(count(text, "TCP:", "tw"), 2);
        assert_eq!(count(text, "TCP6:", "inuse"), 0);
    }
}
