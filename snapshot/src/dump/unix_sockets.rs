//! Unix sockets: their peers, and what waits in them to be read.

use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::libc;

use super::DumpError;

/// What sock_diag(7) tells of a unix socket.
#[derive(Debug, Clone, Copy, Default)]
pub struct Known {
    /// Inode of the peer; 0 when it is gone, or not accepted yet.
    pub peer: u64,
    /// 1 when nothing is received any more, 2 when nothing is sent.
    pub shutdown: u8,
    /// Of a listener: connections that wait, and how many may.
    pub waiting: u32,
    pub backlog: u32,
}

/// At most, of what one socket holds.
const MOST_QUEUED: usize = 16 << 20;
/// Longest datagram.
const LONGEST: usize = 4 << 20;

/// Copies what waits in a connected socket without taking it: one piece for each record, or all of a
/// stream as one.
pub fn peek(fd: &OwnedFd, kind: i32, what: &str) -> Result<Vec<Vec<u8>>, DumpError> {
    let mut queued: i32 = 0;
    // SAFETY: FIONREAD writes one int.
    let asked = unsafe { libc::ioctl(fd.as_raw_fd(), libc::FIONREAD, &raw mut queued) };
    Errno::result(asked).map_err(DumpError::errno(format!("reading {what}")))?;
    if queued == 0 && kind != libc::SOCK_DGRAM {
        return Ok(Vec::new());
    }
    let before = peek_offset(fd).map_err(DumpError::errno(format!("reading {what}")))?;
    set_peek_offset(fd, 0).map_err(DumpError::errno(format!("reading {what}")))?;
    let records = peek_all(fd, kind, queued as usize, what);
    set_peek_offset(fd, before).map_err(DumpError::errno(format!("leaving {what} as it was")))?;
    let records = records?;
    if kind == libc::SOCK_STREAM {
        return Ok(vec![records.concat()]);
    }
    Ok(records)
}

fn peek_all(fd: &OwnedFd, kind: i32, queued: usize, what: &str) -> Result<Vec<Vec<u8>>, DumpError> {
    let mut records: Vec<Vec<u8>> = Vec::new();
    let mut total = 0;
    let stream = kind == libc::SOCK_STREAM;
    let mut buffer = vec![0u8; if stream { queued } else { LONGEST }];
    while !stream || total < queued {
        let Some((length, control)) =
            peek_one(fd, &mut buffer).map_err(DumpError::errno(format!("reading {what}")))?
        else {
            break;
        };
        if control {
            return Err(DumpError::Refused(format!(
                "{what} is a unix socket in which descriptors wait to be received"
            )));
        }
        if length == 0 && kind != libc::SOCK_DGRAM {
            break;
        }
        total += length;
        if length > buffer.len() || total > MOST_QUEUED {
            return Err(DumpError::Refused(format!(
                "{what} is a unix socket with more than {MOST_QUEUED} bytes not read yet"
            )));
        }
        records.push(buffer[..length].to_vec());
    }
    if stream && total < queued {
        return Err(DumpError::Refused(format!(
            "{what} is a unix socket with urgent data not read yet"
        )));
    }
    Ok(records)
}

/// The next record, or the next part of a stream, and whether descriptors come with it.
fn peek_one(fd: &OwnedFd, buffer: &mut [u8]) -> nix::Result<Option<(usize, bool)>> {
    let mut part = libc::iovec {
        iov_base: buffer.as_mut_ptr().cast(),
        iov_len: buffer.len(),
    };
    // SAFETY: all zeroes is an empty message.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    let how = libc::MSG_PEEK | libc::MSG_DONTWAIT | libc::MSG_TRUNC;
    // SAFETY: writes at most the buffer's length; without room for control data descriptors are not
    // received but only told of (MSG_CTRUNC).
    let got = unsafe { libc::recvmsg(fd.as_raw_fd(), &raw mut message, how) };
    match Errno::result(got) {
        Ok(got) => Ok(Some((
            got.unsigned_abs(),
            message.msg_flags & libc::MSG_CTRUNC != 0,
        ))),
        Err(Errno::EAGAIN) => Ok(None),
        Err(errno) => Err(errno),
    }
}

fn peek_offset(fd: &OwnedFd) -> nix::Result<i32> {
    let (mut value, mut length) = (0i32, 4);
    // SAFETY: writes one int.
    let result = unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEEK_OFF,
            (&raw mut value).cast(),
            &raw mut length,
        )
    };
    Errno::result(result).map(|_| value)
}

fn set_peek_offset(fd: &OwnedFd, value: i32) -> nix::Result<()> {
    // SAFETY: reads one int.
    let result = unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEEK_OFF,
            (&raw const value).cast(),
            4,
        )
    };
    Errno::result(result).map(|_| ())
}

/// All unix sockets in this network namespace by their inodes (sock_diag(7), UDIAG_SHOW_PEER and
/// UDIAG_SHOW_RQLEN).
pub fn all() -> nix::Result<BTreeMap<u64, Known>> {
    const SOCK_DIAG_BY_FAMILY: u16 = 20;
    const DUMP_REQUEST: u16 = 0x301;
    const SHOW_PEER_AND_QUEUE: u32 = 0x14;
    const PEER: u16 = 2;
    const QUEUE: u16 = 4;
    const SHUTDOWN: u16 = 6;
    let socket = rustix::net::socket(
        rustix::net::AddressFamily::NETLINK,
        rustix::net::SocketType::RAW,
        Some(rustix::net::netlink::SOCK_DIAG),
    )
    .map_err(|errno| Errno::from_raw(errno.raw_os_error()))?;
    // nlmsghdr, then unix_diag_req: family, protocol, pad, states, inode, show, cookie.
    let mut request = Vec::new();
    request.extend(40u32.to_ne_bytes());
    request.extend(SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    request.extend(DUMP_REQUEST.to_ne_bytes());
    request.extend([0; 8]);
    request.extend([libc::AF_UNIX as u8, 0, 0, 0]);
    request.extend(u32::MAX.to_ne_bytes());
    request.extend(0u32.to_ne_bytes());
    request.extend(SHOW_PEER_AND_QUEUE.to_ne_bytes());
    request.extend([0; 8]);
    nix::unistd::write(&socket, &request)?;
    let mut peers = BTreeMap::new();
    let mut buffer = vec![0u8; 64 << 10];
    loop {
        let got = nix::unistd::read(&socket, &mut buffer)?;
        let mut messages = &buffer[..got];
        while let Some(head) = messages.first_chunk::<16>() {
            let length = u32::from_ne_bytes([head[0], head[1], head[2], head[3]]) as usize;
            let kind = u16::from_ne_bytes([head[4], head[5]]);
            if kind == libc::NLMSG_DONE as u16 || length < 16 || length > messages.len() {
                return Ok(peers);
            }
            if kind == libc::NLMSG_ERROR as u16 {
                return Err(Errno::EOPNOTSUPP);
            }
            // unix_diag_msg: family, type, state, pad, inode, cookie; then attributes.
            let message = &messages[16..length];
            if let Some(inode) = word(message, 4) {
                let mut attributes = message.get(16..).unwrap_or_default();
                let known: &mut Known = peers.entry(u64::from(inode)).or_default();
                while let Some([a, b, c, d, ..]) = attributes.first_chunk::<4>() {
                    let size = usize::from(u16::from_ne_bytes([*a, *b]));
                    match u16::from_ne_bytes([*c, *d]) {
                        PEER => known.peer = word(attributes, 4).unwrap_or(0).into(),
                        QUEUE => {
                            known.waiting = word(attributes, 4).unwrap_or(0);
                            known.backlog = word(attributes, 8).unwrap_or(0);
                        }
                        SHUTDOWN => known.shutdown = attributes.get(4).copied().unwrap_or(0),
                        _ => {}
                    }
                    attributes = attributes
                        .get(size.max(4).next_multiple_of(4)..)
                        .unwrap_or_default();
                }
            }
            messages = messages
                .get(length.next_multiple_of(4)..)
                .unwrap_or_default();
        }
    }
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}
