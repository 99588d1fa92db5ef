//! Sockets: listeners, unconnected ones, and pairs inside the tree.

use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::libc;

use super::DumpError;
use super::connections::Connections;
use super::interfaces::Interfaces;
use super::socket_options::{self, option};
use super::unix_sockets::{self, Known, Waiting};
use crate::manifest::{Object, ObjectKind, Socket};

/// What goes by datagrams; ICMP's are those of ping(8).
const DATAGRAMS: [i32; 4] = [
    libc::IPPROTO_UDP,
    libc::IPPROTO_UDPLITE,
    libc::IPPROTO_ICMP,
    libc::IPPROTO_ICMPV6,
];
/// Number of the state of a TCP socket without a connection.
const CLOSED: u8 = 7;

/// Unix sockets of the tree, by inode, to find the two ends of each pair.
#[derive(Default)]
pub struct Peers {
    /// By inode, as sock_diag(7) tells.
    known: Option<BTreeMap<u64, Known>>,
    objects: BTreeMap<u64, usize>,
    interfaces: Interfaces,
    pub connections: Connections,
}

/// A socket, and what waits in it to be read.
pub type WithQueue = (Socket, Vec<Waiting>);

impl Peers {
    /// Describes one socket, or refuses it by name.
    pub fn read(
        &mut self,
        fd: &OwnedFd,
        inode: u64,
        object: usize,
        what: &str,
    ) -> Result<WithQueue, DumpError> {
        let mut queue = Vec::new();
        let doing = || format!("reading the socket that is {what}");
        let number = |level, name| {
            option(fd, level, name, 4)
                .map(|value| i32::from_ne_bytes(value.try_into().unwrap_or_default()))
                .map_err(DumpError::errno(doing()))
        };
        let domain = number(libc::SOL_SOCKET, libc::SO_DOMAIN)?;
        let kind = number(libc::SOL_SOCKET, libc::SO_TYPE)?;
        let protocol = number(libc::SOL_SOCKET, libc::SO_PROTOCOL)?;
        let listening = number(libc::SOL_SOCKET, libc::SO_ACCEPTCONN)? != 0;
        let refuse = |why: String| Err(DumpError::Refused(format!("{what} is {why}")));
        let mut socket = Socket {
            domain,
            kind,
            protocol,
            address: name(fd, libc::getsockname).map_err(DumpError::errno(doing()))?,
            listen: None,
            connected: Vec::new(),
            options: Vec::new(),
            pair: None,
            queue: Vec::new(),
            shutdown: 0,
            file: None,
            interface: None,
        };
        let internet = matches!(domain, libc::AF_INET | libc::AF_INET6);
        if !internet && domain != libc::AF_UNIX {
            return refuse(format!("a socket of family {domain}"));
        }
        let known = match kind {
            libc::SOCK_STREAM => &[libc::IPPROTO_TCP, libc::IPPROTO_MPTCP][..],
            _ => &DATAGRAMS[..],
        };
        if internet && !known.contains(&protocol) {
            return refuse(format!("a socket of protocol {protocol}"));
        }
        let remote = name(fd, libc::getpeername).ok();
        let connection = internet && kind == libc::SOCK_STREAM && remote.is_some();
        match (domain, kind, remote) {
            (libc::AF_UNIX, _, Some(remote)) => {
                let own = self.known(inode)?;
                let peer = match own.peer {
                    0 => Known::default(),
                    peer => self.known(peer)?,
                };
                if own.peer == 0 && kind != libc::SOCK_DGRAM && own.shutdown != 3 {
                    return refuse("a unix socket whose connection is not accepted yet".into());
                }
                queue = unix_sockets::peek(fd, kind, what)?;
                socket.shutdown = own.shutdown;
                self.objects.insert(inode, object);
                if own.peer != 0 && peer.peer != inode {
                    // A datagram socket whose peer hears others too.
                    if !queue.is_empty() {
                        return refuse("a unix socket with datagrams not read yet".into());
                    }
                    socket.connected = remote;
                    if socket.address.len() <= 2 {
                        socket.address.clear();
                    }
                } else {
                    socket.address.clear();
                    socket.pair = Some(match own.peer {
                        0 => (inode, 0),
                        peer => (inode.min(peer), u32::from(inode > peer)),
                    });
                }
            }
            (_, libc::SOCK_STREAM, Some(remote)) => {
                socket.connected = remote;
                self.connections.add(fd, inode, object, &mut socket, what)?;
            }
            (_, libc::SOCK_DGRAM, Some(remote)) => socket.connected = remote,
            (libc::AF_UNIX, _, None) => {
                self.objects.insert(inode, object);
                if kind == libc::SOCK_DGRAM && !unix_sockets::peek(fd, kind, what)?.is_empty() {
                    return refuse("a unix socket with datagrams not read yet".into());
                }
                if socket.address.len() <= 2 {
                    socket.address.clear();
                }
            }
            (_, libc::SOCK_STREAM | libc::SOCK_DGRAM | libc::SOCK_SEQPACKET, None) => {}
            _ => return refuse(format!("a socket of type {kind}")),
        }
        if internet && kind == libc::SOCK_STREAM && !listening {
            let begun = socket.connected.is_empty() && state(fd, what)? != CLOSED;
            if begun {
                return refuse("a TCP socket that waits for its connection".into());
            }
            if port(&socket.address) == 0 {
                socket.address.clear();
            }
        }
        if internet && kind == libc::SOCK_DGRAM {
            socket.shutdown = shut_datagrams(fd, what)?;
        }
        if listening {
            socket.listen = Some(if internet {
                backlog(fd, what)?
            } else {
                let own = self.known(inode)?;
                if own.waiting > 0 {
                    return refuse(format!(
                        "a listener with {} connections not accepted yet",
                        own.waiting
                    ));
                }
                i32::try_from(own.backlog).unwrap_or(i32::MAX)
            });
        }
        socket.options = socket_options::changed(fd, &socket, what)?;
        if internet && !connection {
            self.interfaces.settle(&mut socket, what)?;
        }
        Ok((socket, queue))
    }

    /// Checks that both ends of every connection of unix sockets are in the tree.
    pub fn pair(&self) -> Result<(), DumpError> {
        for inode in self.objects.keys() {
            let known = self.known.as_ref().and_then(|known| known.get(inode));
            let peer = known.map_or(0, |known| known.peer);
            if peer != 0 && !self.objects.contains_key(&peer) {
                return Err(DumpError::Refused(format!(
                    "the unix socket {inode} is connected to a peer outside of the function"
                )));
            }
        }
        Ok(())
    }

    fn known(&mut self, inode: u64) -> Result<Known, DumpError> {
        let known = match self.known.take() {
            Some(known) => known,
            None => unix_sockets::all()
                .map_err(DumpError::errno("asking for the peers of unix sockets"))?,
        };
        let found = self.known.insert(known).get(&inode).copied();
        found.ok_or_else(|| {
            DumpError::Refused(format!("the unix socket {inode} is of another network"))
        })
    }
}

/// A socket that shares a listener's address without listening is what a closed connection leaves:
/// it cannot be bound there again.
pub fn check_ports(objects: &[Object]) -> Result<(), DumpError> {
    let streams = |listening: bool| {
        objects.iter().filter_map(move |object| match &object.kind {
            ObjectKind::Socket(socket)
                if socket.kind == libc::SOCK_STREAM
                    && matches!(socket.domain, libc::AF_INET | libc::AF_INET6)
                    && socket.listen.is_some() == listening
                    && socket.connected.is_empty()
                    && !socket.address.is_empty() =>
            {
                Some(port(&socket.address))
            }
            _ => None,
        })
    };
    for closed in streams(false) {
        if streams(true).any(|listener| listener == closed) {
            return Err(DumpError::Refused(format!(
                "it holds the socket of a TCP connection to its port {closed} that was closed"
            )));
        }
    }
    Ok(())
}

/// What poll(2) says at once of input, ends and errors.
pub fn poll(fd: &OwnedFd) -> nix::Result<i16> {
    let mut poll = libc::pollfd {
        fd: fd.as_raw_fd(),
        events: libc::POLLIN | libc::POLLRDHUP,
        revents: 0,
    };
    // SAFETY: one entry, which outlives the call.
    Errno::result(unsafe { libc::poll(&raw mut poll, 1, 0) })?;
    Ok(poll.revents)
}

type NameCall = unsafe extern "C" fn(i32, *mut libc::sockaddr, *mut libc::socklen_t) -> libc::c_int;

fn name(fd: &OwnedFd, call: NameCall) -> nix::Result<Vec<u8>> {
    let mut address = vec![0u8; 128];
    let mut length = 128;
    // SAFETY: both calls write at most `length` bytes to `address`.
    let result = unsafe { call(fd.as_raw_fd(), address.as_mut_ptr().cast(), &raw mut length) };
    Errno::result(result)?;
    address.truncate(length as usize);
    Ok(address)
}

fn port(address: &[u8]) -> u16 {
    address
        .get(2..4)
        .map_or(0, |bytes| u16::from_be_bytes([bytes[0], bytes[1]]))
}

pub fn readable(address: &[u8]) -> String {
    match address {
        [2, 0, _, _, a, b, c, d, ..] => format!("{a}.{b}.{c}.{d}:{}", port(address)),
        [10, 0, _, _, _, _, _, _, host @ ..] if host.len() >= 16 => {
            let bytes: [u8; 16] = host[..16].try_into().unwrap_or_default();
            format!("[{}]:{}", std::net::Ipv6Addr::from(bytes), port(address))
        }
        _ => "an unknown address".into(),
    }
}

/// State of a TCP socket (kernel: include/net/tcp_states.h).
fn state(fd: &OwnedFd, what: &str) -> Result<u8, DumpError> {
    let info = option(fd, libc::IPPROTO_TCP, libc::TCP_INFO, 1)
        .map_err(DumpError::errno(format!("reading {what}")))?;
    Ok(info.first().copied().unwrap_or(CLOSED))
}

/// How a socket of datagrams is shut down. Those that wait in it would be lost.
fn shut_datagrams(fd: &OwnedFd, what: &str) -> Result<u8, DumpError> {
    let doing = || DumpError::errno(format!("reading {what}"));
    let polled = poll(fd).map_err(doing())?;
    let shutdown = match (polled & libc::POLLHUP, polled & libc::POLLRDHUP) {
        (0, 0) => 0,
        (0, _) => 1,
        _ => 3,
    };
    // One that receives no more is always ready, and tells of those that are not empty only.
    let waiting = if shutdown == 0 {
        polled & libc::POLLIN != 0
    } else {
        let mut next: i32 = 0;
        // SAFETY: FIONREAD writes one int.
        let asked = unsafe { libc::ioctl(fd.as_raw_fd(), libc::FIONREAD, &raw mut next) };
        Errno::result(asked).map_err(doing())?;
        next > 0
    };
    if waiting {
        return Err(DumpError::Refused(format!(
            "{what} is a UDP socket with datagrams not read yet"
        )));
    }
    Ok(shutdown)
}

/// Backlog of a listener; connections that wait in it would be lost.
fn backlog(fd: &OwnedFd, what: &str) -> Result<i32, DumpError> {
    // struct tcp_info: for a listener tcpi_unacked is the queue's length and tcpi_sacked its limit.
    const UNACKED: usize = 24;
    const SACKED: usize = 28;
    let mut info = option(fd, libc::IPPROTO_TCP, libc::TCP_INFO, 232)
        .map_err(DumpError::errno(format!("reading {what}")))?;
    info.resize(232, 0);
    let word = |at: usize| i32::from_ne_bytes([info[at], info[at + 1], info[at + 2], info[at + 3]]);
    if word(UNACKED) > 0 {
        return Err(DumpError::Refused(format!(
            "{what} is a listener with {} connections not accepted yet",
            word(UNACKED)
        )));
    }
    Ok(word(SACKED).max(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listener_is_described() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port_wanted = listener.local_addr().unwrap().port();
        let socket = Peers::default()
            .read(&listener.into(), 1, 0, "descriptor 3")
            .unwrap()
            .0;
        assert_eq!(port(&socket.address), port_wanted);
        assert_eq!(socket.listen, Some(128));
    }

    #[test]
    fn a_connection_with_one_end_is_refused_by_its_address() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let stream = std::net::TcpStream::connect(address).unwrap();
        let _other = listener.accept().unwrap();
        let mut peers = Peers::default();
        let read = peers.read(&stream.into(), 1, 0, "descriptor 3");
        let mut objects = [Object {
            flags: 2,
            owner: None,
            kind: ObjectKind::Socket(read.unwrap().0),
        }];
        let err = peers.connections.finish(&mut objects).unwrap_err();
        let expected = format!("connection to {address} outside of the function");
        assert!(err.to_string().contains(&expected), "{err}");
    }

    #[test]
    fn a_closed_connection_beside_its_listener_is_refused() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let client = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (accepted, _) = listener.accept().unwrap();
        // Closing with unread data resets the connection.
        std::io::Write::write_all(&mut &accepted, b"unread").unwrap();
        drop(client);
        std::thread::sleep(std::time::Duration::from_millis(20));
        let mut peers = Peers::default();
        let objects = [listener.into(), OwnedFd::from(accepted)].map(|fd| Object {
            flags: 2,
            owner: None,
            kind: ObjectKind::Socket(peers.read(&fd, 1, 0, "descriptor 3").unwrap().0),
        });
        let err = check_ports(&objects).unwrap_err().to_string();
        assert!(err.contains("TCP connection"), "{err}");
        assert!(check_ports(&objects[..1]).is_ok());
    }

    #[test]
    fn the_ends_of_a_pair_know_each_other() {
        use std::os::unix::fs::MetadataExt;
        let (a, b) = std::os::unix::net::UnixStream::pair().unwrap();
        let inode = |fd: &OwnedFd| {
            std::fs::metadata(format!("/proc/self/fd/{}", fd.as_raw_fd()))
                .unwrap()
                .ino()
        };
        let (a, b) = (OwnedFd::from(a), OwnedFd::from(b));
        let mut peers = Peers::default();
        let first = peers.read(&a, inode(&a), 0, "a").unwrap().0.pair.unwrap();
        let second = peers.read(&b, inode(&b), 1, "b").unwrap().0.pair.unwrap();
        assert_eq!(first.0, second.0);
        assert_ne!(first.1, second.1);
    }
}
