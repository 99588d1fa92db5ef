//! TCP connections whose ends are both in the tree.
//!
//! The ends know each other by their addresses. What waits at an end is read as a program could peek
//! at it; what is still on its way there lies in the other's queue, and is told from what has
//! arrived by the sequence numbers of the two (TCP_REPAIR of tcp(7)). A restored connection is a new
//! one between the same addresses, so nothing else of its state is needed.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::libc;

use super::socket_options::{option, set_option};
use super::sockets::{poll, readable};
use super::{DumpError, proc_text, unix_sockets};
use crate::manifest::{Object, ObjectKind, Queued, Socket};

/// At most, of what is on the way to one end or waits there.
const MOST_QUEUED: usize = 16 << 20;
/// Numbers of states (kernel: include/net/tcp_states.h).
const FIN_WAIT1: u8 = 4;
const FIN_WAIT2: u8 = 5;
const CLOSE_WAIT: u8 = 8;
const LAST_ACK: u8 = 9;
const CLOSING: u8 = 11;
/// Repair mode's end without a window probe.
const OFF: i32 = -1;
const RECEIVE_QUEUE: i32 = 1;
const SEND_QUEUE: i32 = 2;
/// How often the two ends are compared before a dump gives up: nobody writes, but the kernel sends.
const TRIES: u32 = 16;

/// The established connections of the tree.
#[derive(Debug, Default)]
pub struct Connections {
    ends: Vec<End>,
}

#[derive(Debug)]
struct End {
    object: usize,
    fd: OwnedFd,
    inode: u64,
    what: String,
    local: SocketAddr,
    remote: SocketAddr,
    state: u8,
}

impl Connections {
    /// Takes note of a socket that has a peer.
    pub fn add(
        &mut self,
        fd: &OwnedFd,
        inode: u64,
        object: usize,
        socket: &mut Socket,
        what: &str,
    ) -> Result<(), DumpError> {
        let refuse = || {
            Err(DumpError::Refused(format!(
                "{what} is an established TCP connection to {}",
                readable(&socket.connected)
            )))
        };
        let (Some(local), Some(remote)) = (parse(&socket.address), parse(&socket.connected)) else {
            return refuse();
        };
        if !local.ip().is_loopback() || !remote.ip().is_loopback() {
            return refuse();
        }
        let doing = || format!("reading the TCP connection that is {what}");
        let state = option(fd, libc::IPPROTO_TCP, libc::TCP_INFO, 1)
            .map_err(DumpError::errno(doing()))?
            .first()
            .copied()
            .unwrap_or(0);
        if matches!(state, FIN_WAIT1 | FIN_WAIT2 | CLOSING | LAST_ACK) {
            socket.shutdown |= 2;
        }
        let polled = poll(fd).map_err(DumpError::errno(doing()))?;
        if state != CLOSE_WAIT && polled & libc::POLLRDHUP != 0 {
            socket.shutdown |= 1;
        }
        self.ends.push(End {
            object,
            fd: fd
                .try_clone()
                .map_err(DumpError::io("duplicating a descriptor"))?,
            inode,
            what: what.to_owned(),
            local,
            remote,
            state,
        });
        Ok(())
    }

    /// Finds the two ends of each connection and what waits at them, once all open files are known.
    pub fn finish(&self, objects: &mut [Object]) -> Result<(), DumpError> {
        for end in &self.ends {
            let peer = self.ends.iter().find(|other| {
                other.inode != end.inode && (other.local, other.remote) == (end.remote, end.local)
            });
            let pair = match peer {
                Some(peer) => (end.inode.min(peer.inode), u32::from(end.inode > peer.inode)),
                None if end.state == CLOSE_WAIT && !is_open(end.remote, end.local)? => {
                    (end.inode, 0)
                }
                None => {
                    return Err(DumpError::Refused(format!(
                        "{} is an established TCP connection to {} outside of the function",
                        end.what, end.remote
                    )));
                }
            };
            let data = waiting(end, peer)?;
            if let Some(Object {
                kind: ObjectKind::Socket(socket),
                ..
            }) = objects.get_mut(end.object)
            {
                socket.pair = Some(pair);
                if !data.is_empty() {
                    let rights = Vec::new();
                    socket.queue = vec![Queued { data, rights }];
                }
            }
        }
        Ok(())
    }
}

/// All that an end has yet to read: what has arrived, and what its peer has sent since.
fn waiting(end: &End, peer: Option<&End>) -> Result<Vec<u8>, DumpError> {
    let doing = |errno| DumpError::errno(format!("reading the TCP connection {}", end.what))(errno);
    let number = |fd: &OwnedFd, what| {
        let mut value: i32 = 0;
        // SAFETY: both requests write one int.
        let asked = unsafe { libc::ioctl(fd.as_raw_fd(), what, &raw mut value) };
        Errno::result(asked).map(|_| value.unsigned_abs() as usize)
    };
    let arrived = |fd: &OwnedFd| {
        let length = number(fd, libc::FIONREAD)?;
        let data = peek(fd, length)?;
        Ok((length, data))
    };
    let unconfirmed = match peer {
        Some(peer) => number(&peer.fd, libc::TIOCOUTQ).map_err(doing)?,
        None => 0,
    };
    let (length, mut data) = arrived(&end.fd).map_err(doing)?;
    if data.len() < length {
        return Err(DumpError::Refused(format!(
            "{} is a TCP connection with urgent data not read yet",
            end.what
        )));
    }
    if let Some(peer) = peer.filter(|_| unconfirmed > 0) {
        let mut tries = 0;
        loop {
            let expected = sequence(&end.fd, RECEIVE_QUEUE).map_err(doing)?;
            data = arrived(&end.fd).map_err(doing)?.1;
            let (next, sent) = sent(&peer.fd).map_err(doing)?;
            if sequence(&end.fd, RECEIVE_QUEUE).map_err(doing)? == expected {
                let fin = u32::from(matches!(peer.state, FIN_WAIT1 | CLOSING | LAST_ACK));
                // A FIN has a number too; nothing is missing where that has arrived as well.
                let missing = next.wrapping_sub(expected) as i32 - fin as i32;
                let missing = usize::try_from(missing).unwrap_or(0).min(sent.len());
                data.extend_from_slice(&sent[sent.len() - missing..]);
                break;
            }
            tries += 1;
            if tries > TRIES {
                return Err(DumpError::Refused(format!(
                    "{} is a TCP connection on which data keeps arriving; try again",
                    end.what
                )));
            }
        }
    }
    if data.len() > MOST_QUEUED {
        return Err(DumpError::Refused(format!(
            "{} is a TCP connection with more than {MOST_QUEUED} bytes not read yet",
            end.what
        )));
    }
    Ok(data)
}

/// Copies what waits to be read, from its beginning.
fn peek(fd: &OwnedFd, length: usize) -> nix::Result<Vec<u8>> {
    // Kernels before 6.9 know no such offset for TCP.
    let offset = unix_sockets::peek_offset(fd).unwrap_or(-1);
    if offset >= 0 {
        unix_sockets::set_peek_offset(fd, -1)?;
    }
    let data = receive(fd, length);
    if offset >= 0 {
        unix_sockets::set_peek_offset(fd, offset)?;
    }
    data
}

fn receive(fd: &OwnedFd, length: usize) -> nix::Result<Vec<u8>> {
    let mut data = vec![0u8; length];
    if length == 0 {
        return Ok(data);
    }
    let how = libc::MSG_PEEK | libc::MSG_DONTWAIT;
    // SAFETY: writes at most `length` bytes to `data`.
    let got = unsafe { libc::recv(fd.as_raw_fd(), data.as_mut_ptr().cast(), length, how) };
    data.truncate(Errno::result(got)?.unsigned_abs());
    Ok(data)
}

/// A socket in repair mode. It leaves it as it was.
struct Repair<'a> {
    fd: &'a OwnedFd,
    /// Repair mode loses SO_REUSEADDR.
    reuse: Vec<u8>,
}

impl<'a> Repair<'a> {
    fn begin(fd: &'a OwnedFd, queue: i32) -> nix::Result<Self> {
        let reuse = option(fd, libc::SOL_SOCKET, libc::SO_REUSEADDR, 4)?;
        set_option(fd, libc::IPPROTO_TCP, libc::TCP_REPAIR, &1i32.to_ne_bytes())?;
        let begun = Self { fd, reuse };
        let queue = queue.to_ne_bytes();
        set_option(fd, libc::IPPROTO_TCP, libc::TCP_REPAIR_QUEUE, &queue)?;
        Ok(begun)
    }

    fn sequence(&self) -> nix::Result<u32> {
        let value = option(self.fd, libc::IPPROTO_TCP, libc::TCP_QUEUE_SEQ, 4)?;
        Ok(u32::from_ne_bytes(value.try_into().unwrap_or_default()))
    }
}

impl Drop for Repair<'_> {
    fn drop(&mut self) {
        let off = OFF.to_ne_bytes();
        let ended = set_option(self.fd, libc::IPPROTO_TCP, libc::TCP_REPAIR, &off);
        let reuse = set_option(self.fd, libc::SOL_SOCKET, libc::SO_REUSEADDR, &self.reuse);
        if let Err(err) = ended.and(reuse) {
            tracing::warn!(%err, "Failed to end the repair mode of a TCP connection");
        }
    }
}

/// The number that comes next in a queue.
fn sequence(fd: &OwnedFd, queue: i32) -> nix::Result<u32> {
    Repair::begin(fd, queue)?.sequence()
}

/// What was sent and not confirmed yet, and the number behind it.
fn sent(fd: &OwnedFd) -> nix::Result<(u32, Vec<u8>)> {
    let repair = Repair::begin(fd, SEND_QUEUE)?;
    Ok((repair.sequence()?, receive(fd, MOST_QUEUED)?))
}

/// Whether somebody in the network namespace has a socket with these addresses.
fn is_open(local: SocketAddr, remote: SocketAddr) -> Result<bool, DumpError> {
    for table in ["tcp", "tcp6"] {
        let path = format!("/proc/thread-self/net/{table}");
        // A kernel without IPv6 has one table only.
        if table == "tcp6" && !std::path::Path::new(&path).exists() {
            continue;
        }
        for line in proc_text(&path)?.lines().skip(1) {
            // sl local remote st queues timer retransmits uid timeout inode
            let fields: Vec<&str> = line.split_whitespace().collect();
            let address = |at: usize| fields.get(at).and_then(|text| in_table(text));
            let inode = fields.get(9).is_some_and(|inode| *inode != "0");
            if inode && address(1) == Some(local) && address(2) == Some(remote) {
                return Ok(true);
            }
        }
    }
    Ok(false)
}

/// An address of /proc/net/tcp: words of 32 bits as they lie in memory, in hexadecimal.
fn in_table(text: &str) -> Option<SocketAddr> {
    let (host, port) = text.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    let word = |at: usize| u32::from_str_radix(host.get(at..at + 8)?, 16).ok();
    let ip = if host.len() == 8 {
        IpAddr::from(word(0)?.to_ne_bytes())
    } else {
        let words = [word(0)?, word(8)?, word(16)?, word(24)?];
        let mut bytes = [0; 16];
        for (part, word) in bytes.chunks_exact_mut(4).zip(words) {
            part.copy_from_slice(&word.to_ne_bytes());
        }
        IpAddr::from(bytes)
    };
    Some(SocketAddr::new(ip.to_canonical(), port))
}

/// A `struct sockaddr`; an IPv4 address in IPv6 is one of IPv4.
pub fn parse(address: &[u8]) -> Option<SocketAddr> {
    let family = i32::from(u16::from_ne_bytes(*address.first_chunk()?));
    let port = u16::from_be_bytes(*address.get(2..)?.first_chunk()?);
    let ip = match family {
        libc::AF_INET => IpAddr::from(Ipv4Addr::from(*address.get(4..)?.first_chunk::<4>()?)),
        libc::AF_INET6 => IpAddr::from(Ipv6Addr::from(*address.get(8..)?.first_chunk::<16>()?)),
        _ => return None,
    };
    Some(SocketAddr::new(ip.to_canonical(), port))
}
