//! Sockets: listeners, unconnected ones, and pairs inside the tree.

use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use nix::errno::Errno;
use nix::libc;

use super::DumpError;
use super::connections::Connections;
use super::unix_sockets::{self, Known, Waiting};
use crate::manifest::{Object, ObjectKind, Socket};

/// Options read, and set again where they differ from a fresh socket's.
const OPTIONS: [(i32, i32); 24] = [
    (libc::SOL_SOCKET, libc::SO_REUSEADDR),
    (libc::SOL_SOCKET, libc::SO_REUSEPORT),
    (libc::SOL_SOCKET, libc::SO_KEEPALIVE),
    (libc::SOL_SOCKET, libc::SO_BROADCAST),
    (libc::SOL_SOCKET, libc::SO_PASSCRED),
    (libc::SOL_SOCKET, libc::SO_OOBINLINE),
    (libc::SOL_SOCKET, libc::SO_LINGER),
    (libc::SOL_SOCKET, libc::SO_RCVTIMEO),
    (libc::SOL_SOCKET, libc::SO_SNDTIMEO),
    (libc::SOL_SOCKET, libc::SO_RCVLOWAT),
    (libc::IPPROTO_TCP, libc::TCP_NODELAY),
    (libc::IPPROTO_TCP, libc::TCP_CORK),
    (libc::IPPROTO_TCP, libc::TCP_DEFER_ACCEPT),
    (libc::IPPROTO_TCP, libc::TCP_KEEPIDLE),
    (libc::IPPROTO_TCP, libc::TCP_KEEPINTVL),
    (libc::IPPROTO_TCP, libc::TCP_KEEPCNT),
    (libc::IPPROTO_TCP, libc::TCP_USER_TIMEOUT),
    (libc::IPPROTO_TCP, libc::TCP_NOTSENT_LOWAT),
    (libc::IPPROTO_TCP, libc::TCP_LINGER2),
    (libc::IPPROTO_TCP, libc::TCP_CONGESTION),
    (libc::IPPROTO_IP, libc::IP_TOS),
    (libc::IPPROTO_IP, libc::IP_TTL),
    (libc::IPPROTO_IPV6, libc::IPV6_V6ONLY),
    (libc::IPPROTO_IPV6, libc::IPV6_TCLASS),
];
/// The longest of them, the name of a congestion control.
const LONGEST_OPTION: usize = 16;
/// Which buffer sizes were set by the program: bit 0 that of sending, bit 1 of receiving.
const SO_BUF_LOCK: i32 = 72;

/// Unix sockets of the tree, by inode, to find the two ends of each pair.
#[derive(Default)]
pub struct Peers {
    /// By inode, as sock_diag(7) tells.
    known: Option<BTreeMap<u64, Known>>,
    objects: BTreeMap<u64, usize>,
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
        };
        let internet = matches!(domain, libc::AF_INET | libc::AF_INET6);
        if !internet && domain != libc::AF_UNIX {
            return refuse(format!("a socket of family {domain}"));
        }
        let remote = name(fd, libc::getpeername).ok();
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
        if internet && kind == libc::SOCK_STREAM && !listening && port(&socket.address) == 0 {
            socket.address.clear();
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
        socket.options = options(fd, &socket).map_err(DumpError::errno(doing()))?;
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

/// The options in which a socket differs from a fresh one.
fn options(fd: &OwnedFd, socket: &Socket) -> nix::Result<Vec<(i32, i32, Vec<u8>)>> {
    // SAFETY: takes numbers only, and gives a descriptor of our own.
    let fresh = unsafe {
        let close_on_exec = socket.kind | libc::SOCK_CLOEXEC;
        let made = libc::socket(socket.domain, close_on_exec, socket.protocol);
        OwnedFd::from_raw_fd(Errno::result(made)?)
    };
    let mut changed = Vec::new();
    for (level, name) in OPTIONS {
        // A level or an option may not be this kind's.
        if let Ok(value) = option(fd, level, name, LONGEST_OPTION)
            && option(&fresh, level, name, LONGEST_OPTION).is_ok_and(|usual| usual != value)
        {
            changed.push((level, name, value));
        }
    }
    let locked = option(fd, libc::SOL_SOCKET, SO_BUF_LOCK, 4).unwrap_or_default();
    for (bit, asked, set) in [
        (1, libc::SO_SNDBUF, libc::SO_SNDBUFFORCE),
        (2, libc::SO_RCVBUF, libc::SO_RCVBUFFORCE),
    ] {
        if locked.first().is_some_and(|locked| locked & bit != 0) {
            let size = option(fd, libc::SOL_SOCKET, asked, 4)?;
            // The kernel doubles what is set.
            let half = i32::from_ne_bytes(size.try_into().unwrap_or_default()) / 2;
            changed.push((libc::SOL_SOCKET, set, half.to_ne_bytes().to_vec()));
        }
    }
    Ok(changed)
}

/// Reads an option of at most `room` bytes.
pub fn option(fd: &OwnedFd, level: i32, name: i32, room: usize) -> nix::Result<Vec<u8>> {
    let mut value = vec![0u8; room];
    let mut length = room as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes to `value`.
    let result = unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            level,
            name,
            value.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    Errno::result(result)?;
    value.truncate(length as usize);
    Ok(value)
}

pub fn set_option(fd: &OwnedFd, level: i32, name: i32, value: &[u8]) -> nix::Result<()> {
    let length = value.len() as libc::socklen_t;
    // SAFETY: the kernel reads `length` bytes of `value`.
    let result =
        unsafe { libc::setsockopt(fd.as_raw_fd(), level, name, value.as_ptr().cast(), length) };
    Errno::result(result).map(|_| ())
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
