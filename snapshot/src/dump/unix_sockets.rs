//! Unix sockets: their peers, and what waits in them to be read.

use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

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

/// What waits in a socket, with the descriptors that come with it.
#[derive(Debug, Default)]
pub struct Waiting {
    pub data: Vec<u8>,
    pub rights: Vec<OwnedFd>,
}

/// Copies what waits in a connected socket without taking it: one piece for each record; of a stream
/// all that is between descriptors.
pub fn peek(fd: &OwnedFd, kind: i32, what: &str) -> Result<Vec<Waiting>, DumpError> {
    let mut queued: i32 = 0;
    // SAFETY: FIONREAD writes one int.
    let asked = unsafe { libc::ioctl(fd.as_raw_fd(), libc::FIONREAD, &raw mut queued) };
    Errno::result(asked).map_err(DumpError::errno(format!("reading {what}")))?;
    let polled = super::sockets::poll(fd).map_err(DumpError::errno(format!("reading {what}")))?;
    // A record may be empty; without any, an end would be told, or an error lost.
    let empty_record = kind != libc::SOCK_STREAM && polled == libc::POLLIN;
    if queued == 0 && !empty_record {
        return Ok(Vec::new());
    }
    let before = peek_offset(fd).map_err(DumpError::errno(format!("reading {what}")))?;
    set_peek_offset(fd, 0).map_err(DumpError::errno(format!("reading {what}")))?;
    let records = peek_all(fd, kind, queued as usize, what);
    set_peek_offset(fd, before).map_err(DumpError::errno(format!("leaving {what} as it was")))?;
    records
}

fn peek_all(fd: &OwnedFd, kind: i32, queued: usize, what: &str) -> Result<Vec<Waiting>, DumpError> {
    let mut records: Vec<Waiting> = Vec::new();
    let mut total = 0;
    let stream = kind == libc::SOCK_STREAM;
    let mut buffer = vec![0u8; if stream { queued } else { LONGEST }];
    while !stream || total < queued {
        let Some((length, rights)) = peek_one(fd, &mut buffer, what)? else {
            break;
        };
        if length == 0 && rights.is_empty() && kind != libc::SOCK_DGRAM && total >= queued {
            break;
        }
        if length > buffer.len() || total + length > MOST_QUEUED {
            return Err(DumpError::Refused(format!(
                "{what} is a unix socket with more than {MOST_QUEUED} bytes not read yet"
            )));
        }
        let mut data = buffer[..length].to_vec();
        if stream && !rights.is_empty() {
            let doing = format!("looking for the descriptors in {what}");
            let plain = without_rights(fd, total, length).map_err(DumpError::errno(doing))?;
            let rest = data.split_off(plain);
            if plain > 0 {
                records.push(Waiting {
                    data,
                    rights: Vec::new(),
                });
            }
            data = rest;
        }
        total += length;
        records.push(Waiting { data, rights });
    }
    if stream && total < queued {
        return Err(DumpError::Refused(format!(
            "{what} is a unix socket with urgent data not read yet"
        )));
    }
    Ok(records)
}

/// How many bytes of a piece of a stream, `length` at offset `from`, lie before those with which
/// descriptors were sent: a read ends with these, but it may begin earlier.
fn without_rights(fd: &OwnedFd, from: usize, length: usize) -> nix::Result<usize> {
    set_peek_offset(fd, from as i32)?;
    // The kernel copies what was sent at once as a whole. The last byte has no place to be copied to,
    // so what it was sent with is left out.
    let mut buffer = vec![0u8; length - 1];
    let mut parts = [
        libc::iovec {
            iov_base: buffer.as_mut_ptr().cast(),
            iov_len: buffer.len(),
        },
        libc::iovec {
            iov_base: std::ptr::without_provenance_mut(1),
            iov_len: 1,
        },
    ];
    let plain = match receive(fd, &mut parts, &mut []) {
        Ok(got) => got.map_or(0, |(plain, ..)| plain),
        Err(Errno::EFAULT) => 0,
        Err(errno) => return Err(errno),
    };
    set_peek_offset(fd, (from + length) as i32)?;
    Ok(plain.min(length))
}

/// The next record, or the next part of a stream, and the descriptors that come with it.
fn peek_one(
    fd: &OwnedFd,
    buffer: &mut [u8],
    what: &str,
) -> Result<Option<(usize, Vec<OwnedFd>)>, DumpError> {
    let mut control = [0u64; 256];
    let part = libc::iovec {
        iov_base: buffer.as_mut_ptr().cast(),
        iov_len: buffer.len(),
    };
    let got = receive(fd, &mut [part], &mut control);
    let Some((length, flags, filled)) = got.map_err(DumpError::errno(format!("reading {what}")))?
    else {
        return Ok(None);
    };
    let mut rights = Vec::new();
    let mut other = flags & libc::MSG_CTRUNC != 0;
    let bytes: Vec<u8> = control.iter().flat_map(|word| word.to_ne_bytes()).collect();
    let mut messages = &bytes[..filled.min(bytes.len())];
    // struct cmsghdr: length with itself, level, type.
    while let Some(head) = messages.first_chunk::<16>() {
        let length = u64::from_ne_bytes(*head.first_chunk().unwrap_or(&[0; 8])) as usize;
        let level_and_type = [libc::SOL_SOCKET, libc::SCM_RIGHTS].map(i32::to_ne_bytes);
        let Some(data) = messages.get(16..length) else {
            break;
        };
        if head[8..] == level_and_type.concat() {
            for number in data.chunks_exact(4) {
                let number = i32::from_ne_bytes([number[0], number[1], number[2], number[3]]);
                // SAFETY: the kernel has just made this descriptor for this call.
                rights.push(unsafe { OwnedFd::from_raw_fd(number) });
            }
        } else {
            other = true;
        }
        messages = messages
            .get(length.next_multiple_of(8)..)
            .unwrap_or_default();
    }
    if other {
        return Err(DumpError::Refused(format!(
            "{what} is a unix socket in which messages wait with what the kernel tells about their \
             sender (SO_PASSCRED and the like)"
        )));
    }
    Ok(Some((length, rights)))
}

/// Peeks without waiting: length, flags, and bytes of control data.
fn receive(
    fd: &OwnedFd,
    parts: &mut [libc::iovec],
    control: &mut [u64],
) -> nix::Result<Option<(usize, i32, usize)>> {
    // SAFETY: all zeroes is an empty message.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = parts.as_mut_ptr();
    message.msg_iovlen = parts.len();
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = size_of_val(control);
    let how = libc::MSG_PEEK | libc::MSG_DONTWAIT | libc::MSG_TRUNC | libc::MSG_CMSG_CLOEXEC;
    // SAFETY: writes at most the lengths of parts and control; to an address that is not mapped the
    // kernel does not write but fails.
    let got = unsafe { libc::recvmsg(fd.as_raw_fd(), &raw mut message, how) };
    match Errno::result(got) {
        Ok(got) => Ok(Some((
            got.unsigned_abs(),
            message.msg_flags,
            message.msg_controllen,
        ))),
        Err(Errno::EAGAIN) => Ok(None),
        Err(errno) => Err(errno),
    }
}

pub fn peek_offset(fd: &OwnedFd) -> nix::Result<i32> {
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

pub fn set_peek_offset(fd: &OwnedFd, value: i32) -> nix::Result<()> {
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
