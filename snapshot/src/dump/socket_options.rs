//! Options of sockets: those that are set again, and those that cannot be.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use nix::errno::Errno;
use nix::libc;

use super::{DumpError, proc_text};
use crate::manifest::Socket;

const SOCKET: i32 = libc::SOL_SOCKET;
const IP: i32 = libc::IPPROTO_IP;
const IP6: i32 = libc::IPPROTO_IPV6;
const TCP: i32 = libc::IPPROTO_TCP;
const UDP: i32 = libc::IPPROTO_UDP;

// Of include/uapi/asm-generic/socket.h, linux/in.h and linux/in6.h.
const SO_SELECT_ERR_QUEUE: i32 = 45;
const SO_MAX_PACING_RATE: i32 = 47;
const SO_INCOMING_CPU: i32 = 49;
const SO_ZEROCOPY: i32 = 60;
const SO_TXTIME: i32 = 61;
const SO_PREFER_BUSY_POLL: i32 = 69;
const SO_RCVMARK: i32 = 75;
const SO_PASSPIDFD: i32 = 76;
const SO_RCVPRIORITY: i32 = 82;
const SO_PASSRIGHTS: i32 = 83;
const IP_RECVERR_RFC4884: i32 = 26;
const IP_LOCAL_PORT_RANGE: i32 = 51;
const IPV6_RECVERR_RFC4884: i32 = 31;

/// Options read, and set again in this order where they differ from a fresh socket's.
const OPTIONS: &[(i32, i32)] = &[
    (SOCKET, libc::SO_REUSEADDR),
    (SOCKET, libc::SO_REUSEPORT),
    (SOCKET, libc::SO_KEEPALIVE),
    (SOCKET, libc::SO_BROADCAST),
    (SOCKET, libc::SO_DONTROUTE),
    (SOCKET, libc::SO_PASSCRED),
    (SOCKET, libc::SO_PASSSEC),
    (SOCKET, SO_PASSPIDFD),
    (SOCKET, SO_PASSRIGHTS),
    (SOCKET, libc::SO_OOBINLINE),
    (SOCKET, libc::SO_NO_CHECK),
    (SOCKET, libc::SO_LINGER),
    (SOCKET, libc::SO_RCVTIMEO),
    (SOCKET, libc::SO_SNDTIMEO),
    (SOCKET, libc::SO_RCVLOWAT),
    (SOCKET, libc::SO_PEEK_OFF),
    (SOCKET, libc::SO_MARK),
    (SOCKET, libc::SO_BUSY_POLL),
    (SOCKET, SO_PREFER_BUSY_POLL),
    // The newer form of each after the older, which takes it back.
    (SOCKET, libc::SO_TIMESTAMPING),
    (SOCKET, libc::SO_TIMESTAMP),
    (SOCKET, libc::SO_TIMESTAMPNS),
    (SOCKET, libc::SO_TIMESTAMPING_NEW),
    (SOCKET, libc::SO_TIMESTAMP_NEW),
    (SOCKET, libc::SO_TIMESTAMPNS_NEW),
    (SOCKET, libc::SO_RXQ_OVFL),
    (SOCKET, SO_RCVMARK),
    (SOCKET, SO_RCVPRIORITY),
    (SOCKET, SO_SELECT_ERR_QUEUE),
    (SOCKET, SO_MAX_PACING_RATE),
    (SOCKET, SO_INCOMING_CPU),
    (SOCKET, SO_ZEROCOPY),
    (SOCKET, SO_TXTIME),
    (TCP, libc::TCP_NODELAY),
    (TCP, libc::TCP_CORK),
    (TCP, libc::TCP_DEFER_ACCEPT),
    (TCP, libc::TCP_KEEPIDLE),
    (TCP, libc::TCP_KEEPINTVL),
    (TCP, libc::TCP_KEEPCNT),
    (TCP, libc::TCP_USER_TIMEOUT),
    (TCP, libc::TCP_NOTSENT_LOWAT),
    (TCP, libc::TCP_LINGER2),
    (TCP, libc::TCP_CONGESTION),
    (TCP, libc::TCP_SYNCNT),
    (TCP, libc::TCP_MAXSEG),
    (TCP, libc::TCP_WINDOW_CLAMP),
    (TCP, libc::TCP_FASTOPEN),
    (TCP, libc::TCP_FASTOPEN_CONNECT),
    (TCP, libc::TCP_FASTOPEN_NO_COOKIE),
    (TCP, libc::TCP_THIN_LINEAR_TIMEOUTS),
    (TCP, libc::TCP_SAVE_SYN),
    (TCP, libc::TCP_INQ),
    (IP, libc::IP_TOS),
    (IP, libc::IP_TTL),
    (IP, libc::IP_MINTTL),
    (IP, libc::IP_PKTINFO),
    (IP, libc::IP_RECVTOS),
    (IP, libc::IP_RECVTTL),
    (IP, libc::IP_RECVOPTS),
    (IP, libc::IP_RETOPTS),
    (IP, libc::IP_RECVERR),
    (IP, IP_RECVERR_RFC4884),
    (IP, libc::IP_RECVORIGDSTADDR),
    (IP, libc::IP_RECVFRAGSIZE),
    (IP, libc::IP_CHECKSUM),
    (IP, libc::IP_PASSSEC),
    (IP, libc::IP_MTU_DISCOVER),
    (IP, libc::IP_FREEBIND),
    (IP, libc::IP_TRANSPARENT),
    (IP, libc::IP_BIND_ADDRESS_NO_PORT),
    (IP, IP_LOCAL_PORT_RANGE),
    (IP, libc::IP_UNICAST_IF),
    (IP, libc::IP_MULTICAST_IF),
    (IP, libc::IP_MULTICAST_TTL),
    (IP, libc::IP_MULTICAST_LOOP),
    (IP, libc::IP_MULTICAST_ALL),
    (IP6, libc::IPV6_V6ONLY),
    (IP6, libc::IPV6_TCLASS),
    (IP6, libc::IPV6_UNICAST_HOPS),
    (IP6, libc::IPV6_MINHOPCOUNT),
    (IP6, libc::IPV6_RECVPKTINFO),
    (IP6, libc::IPV6_RECVTCLASS),
    (IP6, libc::IPV6_RECVHOPLIMIT),
    (IP6, libc::IPV6_RECVRTHDR),
    (IP6, libc::IPV6_RECVHOPOPTS),
    (IP6, libc::IPV6_RECVDSTOPTS),
    (IP6, libc::IPV6_RECVPATHMTU),
    (IP6, libc::IPV6_RECVERR),
    (IP6, IPV6_RECVERR_RFC4884),
    (IP6, libc::IPV6_RECVORIGDSTADDR),
    (IP6, libc::IPV6_RECVFRAGSIZE),
    (IP6, libc::IPV6_MTU_DISCOVER),
    (IP6, libc::IPV6_DONTFRAG),
    (IP6, libc::IPV6_FREEBIND),
    (IP6, libc::IPV6_TRANSPARENT),
    (IP6, libc::IPV6_ADDR_PREFERENCES),
    (IP6, libc::IPV6_AUTOFLOWLABEL),
    (IP6, libc::IPV6_UNICAST_IF),
    (IP6, libc::IPV6_MULTICAST_IF),
    (IP6, libc::IPV6_MULTICAST_HOPS),
    (IP6, libc::IPV6_MULTICAST_LOOP),
    (IP6, libc::IPV6_MULTICAST_ALL),
    (UDP, libc::UDP_NO_CHECK6_TX),
    (UDP, libc::UDP_NO_CHECK6_RX),
    (UDP, libc::UDP_SEGMENT),
    (UDP, libc::UDP_GRO),
    // After IP_UNICAST_IF, which is not to be had then.
    (SOCKET, libc::SO_BINDTODEVICE),
    // After IP_TOS, which chooses a priority too.
    (SOCKET, libc::SO_PRIORITY),
];
/// The longest of them, the name of a congestion control or of an interface.
const LONGEST_OPTION: usize = 16;
/// Those that the kernel chooses for a connection, or that are set ahead of one only.
const NOT_CONNECTED: [(i32, i32); 5] = [
    (SOCKET, SO_INCOMING_CPU),
    (TCP, libc::TCP_MAXSEG),
    (TCP, libc::TCP_WINDOW_CLAMP),
    (TCP, libc::TCP_FASTOPEN),
    (TCP, libc::TCP_FASTOPEN_CONNECT),
];
/// Those in which the kernel keeps what it knows of a connection: a stream has none to be set.
const NO_STREAM: [(i32, i32); 4] = [
    (IP, libc::IP_MULTICAST_IF),
    (IP, libc::IP_MULTICAST_TTL),
    (IP6, libc::IPV6_MULTICAST_IF),
    (IP6, libc::IPV6_MULTICAST_HOPS),
];
/// The largest that can be set; what a connection that has ended had may be more.
const LARGEST_SEGMENT: i32 = 32_767;
/// Which buffer sizes were set by the program: bit 0 that of sending, bit 1 of receiving.
const SO_BUF_LOCK: i32 = 72;

/// The options in which a socket differs from a fresh one, or why it is refused.
pub fn changed(
    fd: &OwnedFd,
    socket: &Socket,
    what: &str,
) -> Result<Vec<(i32, i32, Vec<u8>)>, DumpError> {
    let doing = || DumpError::errno(format!("reading the options of {what}"));
    let refuse = |why: String| Err(DumpError::Refused(format!("{what} is {why}")));
    if let Some(why) = lost(fd, socket)? {
        return refuse(why);
    }
    let fresh = fresh(socket).map_err(doing())?;
    let stream = socket.kind == libc::SOCK_STREAM;
    let connected = !socket.connected.is_empty();
    let mut changed = Vec::new();
    for (level, name) in OPTIONS.iter().copied() {
        let other_family = level == IP6 && socket.domain != libc::AF_INET6;
        if other_family
            || connected && NOT_CONNECTED.contains(&(level, name))
            || stream && NO_STREAM.contains(&(level, name))
        {
            continue;
        }
        // A level or an option may not be this kind's.
        let Ok(value) = option(fd, level, name, LONGEST_OPTION) else {
            continue;
        };
        if !option(&fresh, level, name, LONGEST_OPTION).is_ok_and(|usual| usual != value) {
            continue;
        }
        let number = value
            .first_chunk()
            .map_or(0, |four| i32::from_ne_bytes(*four));
        match (level, name) {
            (TCP, libc::TCP_MAXSEG) if number > LARGEST_SEGMENT => continue,
            // 1 is the number of lo everywhere.
            (IP, libc::IP_MULTICAST_IF) if value.first() == Some(&127) => {}
            (IP6, libc::IPV6_MULTICAST_IF) if number == 1 => {}
            (IP, libc::IP_UNICAST_IF) | (IP6, libc::IPV6_UNICAST_IF) if number == 1i32.to_be() => {}
            (IP, libc::IP_MULTICAST_IF | libc::IP_UNICAST_IF)
            | (IP6, libc::IPV6_MULTICAST_IF | libc::IPV6_UNICAST_IF) => {
                return refuse(
                    "a socket that sends by an interface of the sandbox (IP_MULTICAST_IF and the \
                     like); choose it by SO_BINDTODEVICE"
                        .into(),
                );
            }
            _ => {}
        }
        changed.push((level, name, value));
    }
    // One that is not taken would end every start. A connection's are set once it is there.
    if socket.pair.is_none() && !(stream && connected) {
        for (level, name, value) in &changed {
            if let Err(errno) = set_option(&fresh, *level, *name, value) {
                return refuse(format!(
                    "a socket whose option {name} of level {level} cannot be set again ({errno})"
                ));
            }
        }
    }
    changed.extend(buffers(fd).map_err(doing())?);
    Ok(changed)
}

fn fresh(socket: &Socket) -> nix::Result<OwnedFd> {
    // SAFETY: takes numbers only, and gives a descriptor of our own.
    unsafe {
        let close_on_exec = socket.kind | libc::SOCK_CLOEXEC;
        let made = libc::socket(socket.domain, close_on_exec, socket.protocol);
        Ok(OwnedFd::from_raw_fd(Errno::result(made)?))
    }
}

/// The sizes of its buffers, where the program has set them.
fn buffers(fd: &OwnedFd) -> nix::Result<Vec<(i32, i32, Vec<u8>)>> {
    let mut sizes = Vec::new();
    let locked = option(fd, SOCKET, SO_BUF_LOCK, 4).unwrap_or_default();
    for (bit, asked, set) in [
        (1, libc::SO_SNDBUF, libc::SO_SNDBUFFORCE),
        (2, libc::SO_RCVBUF, libc::SO_RCVBUFFORCE),
    ] {
        if locked.first().is_some_and(|locked| locked & bit != 0) {
            let size = option(fd, SOCKET, asked, 4)?;
            // The kernel doubles what is set.
            let half = i32::from_ne_bytes(size.try_into().unwrap_or_default()) / 2;
            sizes.push((SOCKET, set, half.to_ne_bytes().to_vec()));
        }
    }
    Ok(sizes)
}

/// What a socket has that cannot be set again.
fn lost(fd: &OwnedFd, socket: &Socket) -> Result<Option<String>, DumpError> {
    if has_filter(fd) {
        return Ok(Some(
            "a socket with a filter (SO_ATTACH_FILTER, SO_ATTACH_BPF)".into(),
        ));
    }
    if let Ok(layer) = option(fd, TCP, libc::TCP_ULP, LONGEST_OPTION)
        && !layer.is_empty()
        && !layer.starts_with(b"mptcp")
    {
        let layer = String::from_utf8_lossy(&layer);
        let layer = layer.trim_end_matches('\0');
        return Ok(Some(format!("a TCP socket with {layer} in it (TCP_ULP)")));
    }
    let datagrams = socket.kind == libc::SOCK_DGRAM && socket.domain != libc::AF_UNIX;
    if datagrams && option(fd, UDP, libc::UDP_CORK, 4).is_ok_and(|corked| corked != [0; 4]) {
        return Ok(Some("a UDP socket that is corked (UDP_CORK)".into()));
    }
    if datagrams && let Some(group) = membership(fd, socket.domain)? {
        return Ok(Some(format!("a member of the multicast group {group}")));
    }
    Ok(None)
}

/// Whether a program chooses what a socket receives.
fn has_filter(fd: &OwnedFd) -> bool {
    let (mut nothing, mut length) = (0u8, 0);
    // SAFETY: without room nothing is written but the filter's length, in instructions.
    let asked = unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            SOCKET,
            libc::SO_GET_FILTER,
            (&raw mut nothing).cast(),
            &raw mut length,
        )
    };
    // One of eBPF is not shown.
    match Errno::result(asked) {
        Ok(_) => length > 0,
        Err(errno) => errno == Errno::EACCES,
    }
}

/// A multicast group that a socket has joined: of those of the network namespace, one whose filter of
/// sources it can tell.
fn membership(fd: &OwnedFd, domain: i32) -> Result<Option<String>, DumpError> {
    for (table, family) in [("igmp", libc::AF_INET), ("igmp6", libc::AF_INET6)] {
        let path = format!("/proc/thread-self/net/{table}");
        if family > domain || !std::path::Path::new(&path).exists() {
            continue;
        }
        let mut index = 0;
        for line in proc_text(&path)?.lines() {
            let words: Vec<&str> = line.split_whitespace().collect();
            let group = match words.as_slice() {
                // The number of an interface; then its groups, each a word as it lies in memory.
                [number, _, ":", ..] if family == libc::AF_INET => {
                    index = number.parse().unwrap_or(0);
                    continue;
                }
                [group, ..] if family == libc::AF_INET => Group::v4(group),
                // Number and name of an interface, group.
                [number, _, group, ..] => {
                    index = number.parse().unwrap_or(0);
                    Group::v6(group)
                }
                _ => None,
            };
            if let Some(group) = group
                && group.has_member(fd, index)
            {
                return Ok(Some(group.name));
            }
        }
    }
    Ok(None)
}

struct Group {
    level: i32,
    /// As `struct sockaddr`.
    address: Vec<u8>,
    name: String,
}

impl Group {
    fn v4(text: &str) -> Option<Self> {
        let word = u32::from_str_radix(text, 16).ok()?.to_ne_bytes();
        let mut address = (libc::AF_INET as u16).to_ne_bytes().to_vec();
        address.extend([0; 2]);
        address.extend(word);
        Some(Self {
            level: IP,
            address,
            name: Ipv4Addr::from(word).to_string(),
        })
    }

    fn v6(text: &str) -> Option<Self> {
        let number = u128::from_str_radix(text, 16).ok()?;
        let mut address = (libc::AF_INET6 as u16).to_ne_bytes().to_vec();
        address.extend([0; 6]);
        address.extend(number.to_be_bytes());
        Some(Self {
            level: IP6,
            address,
            name: Ipv6Addr::from(number).to_string(),
        })
    }

    /// Whether a socket has joined it at an interface.
    fn has_member(&self, fd: &OwnedFd, interface: u32) -> bool {
        // struct group_filter: interface, padding, struct sockaddr_storage, mode, number of sources.
        let mut filter = [0u8; 8 + 128 + 8];
        filter[..4].copy_from_slice(&interface.to_ne_bytes());
        filter[8..8 + self.address.len()].copy_from_slice(&self.address);
        let mut length = size_of_val(&filter) as libc::socklen_t;
        // SAFETY: the kernel reads and writes at most `length` bytes of `filter`.
        let asked = unsafe {
            libc::getsockopt(
                fd.as_raw_fd(),
                self.level,
                libc::MCAST_MSFILTER,
                filter.as_mut_ptr().cast(),
                &raw mut length,
            )
        };
        asked == 0
    }
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
