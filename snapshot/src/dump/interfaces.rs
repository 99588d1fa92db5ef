//! Addresses of the sandbox's own, which another sandbox does not have.
//!
//! A socket that is bound to one of them is bound to that of the same interface where it comes back;
//! one for which the kernel chose it is bound to none, and the kernel chooses again.

use std::net::{IpAddr, Ipv4Addr};

use nix::libc;
use nix::sys::socket::SockaddrStorage;

use super::DumpError;
use super::connections::parse;
use crate::manifest::Socket;

/// Options by which a socket may be bound to an address that nobody has.
const FREE: [(i32, i32); 4] = [
    (libc::IPPROTO_IP, libc::IP_FREEBIND),
    (libc::IPPROTO_IP, libc::IP_TRANSPARENT),
    (libc::IPPROTO_IPV6, libc::IPV6_FREEBIND),
    (libc::IPPROTO_IPV6, libc::IPV6_TRANSPARENT),
];

/// The addresses of this thread's network namespace, by interface.
#[derive(Debug, Default)]
pub struct Interfaces {
    known: Option<Vec<(IpAddr, String)>>,
}

impl Interfaces {
    /// Describes what a socket is bound to in terms that every sandbox has.
    pub fn settle(&mut self, socket: &mut Socket, what: &str) -> Result<(), DumpError> {
        let refuse = |why: String| Err(DumpError::Refused(format!("{what} is a socket {why}")));
        if has_scope(&socket.address) || has_scope(&socket.connected) {
            return refuse(
                "bound or connected to an IPv6 address that goes by the number of an interface"
                    .into(),
            );
        }
        if let Some(remote) = parse(&socket.connected).filter(|to| !to.ip().is_loopback())
            && let Some(name) = self.holder(remote.ip())?
        {
            return refuse(format!(
                "connected to {remote}, the sandbox's own address at {name}; connect it to 127.0.0.1"
            ));
        }
        let Some(ip) = parse(&socket.address).map(|local| local.ip()) else {
            return Ok(());
        };
        let everywhere = ip.is_unspecified() || ip.is_loopback() || ip.is_multicast();
        if everywhere || ip == Ipv4Addr::BROADCAST {
            return Ok(());
        }
        match self.holder(ip)? {
            Some(_) if !socket.connected.is_empty() => make_wildcard(&mut socket.address),
            Some(name) if ip.is_ipv6() => {
                return refuse(format!(
                    "bound to {ip}, an IPv6 address of {name}, which other sandboxes do not have; \
                     bind it to [::]"
                ));
            }
            Some(name) if self.first(&name)? != Some(ip) => {
                return refuse(format!(
                    "bound to {ip}, which is not the first address of {name}; bind it to 0.0.0.0"
                ));
            }
            Some(name) => socket.interface = Some(name),
            None => {
                let is_free = |(level, name, _): &(i32, i32, _)| FREE.contains(&(*level, *name));
                if !socket.options.iter().any(is_free) {
                    return refuse(format!(
                        "bound to {ip}, which no interface of the sandbox has; bind it to 0.0.0.0"
                    ));
                }
            }
        }
        Ok(())
    }

    /// The interface that has an address.
    fn holder(&mut self, ip: IpAddr) -> Result<Option<String>, DumpError> {
        let found = self.all()?.iter().find(|(one, _)| *one == ip);
        Ok(found.map(|(_, name)| name.clone()))
    }

    /// The address that a start is told of an interface (netdevice(7), SIOCGIFADDR).
    fn first(&mut self, name: &str) -> Result<Option<IpAddr>, DumpError> {
        let of_it = self.all()?.iter().filter(|(_, one)| one == name);
        Ok(of_it.map(|(ip, _)| *ip).find(IpAddr::is_ipv4))
    }

    fn all(&mut self) -> Result<&Vec<(IpAddr, String)>, DumpError> {
        let known = match self.known.take() {
            Some(known) => known,
            None => read().map_err(DumpError::errno(
                "asking for the addresses of the sandbox's interfaces",
            ))?,
        };
        Ok(self.known.insert(known))
    }
}

fn read() -> nix::Result<Vec<(IpAddr, String)>> {
    let ip = |address: SockaddrStorage| {
        let v4 = address.as_sockaddr_in().map(|one| IpAddr::from(one.ip()));
        v4.or_else(|| address.as_sockaddr_in6().map(|one| IpAddr::from(one.ip())))
    };
    let all = nix::ifaddrs::getifaddrs()?;
    Ok(all
        .filter_map(|one| Some((ip(one.address?)?, one.interface_name)))
        .collect())
}

/// Whether an address names an interface by its number.
fn has_scope(address: &[u8]) -> bool {
    let six = address.starts_with(&(libc::AF_INET6 as u16).to_ne_bytes());
    six && address.get(24..28).is_some_and(|scope| scope != [0; 4])
}

/// The same port at every address.
fn make_wildcard(address: &mut [u8]) {
    if let Some(rest) = address.get_mut(4..) {
        rest.fill(0);
    }
}
