//! Netlink, as far as sandboxes need it: dumps, and requests with an acknowledgement.

use std::{
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
};

use crate::bridge::check;

const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_DUMP: u16 = 0x300;
const NLM_F_REPLACE: u16 = 0x100;
const NLM_F_CREATE: u16 = 0x400;
const HEADER: usize = 16;

/// A netlink socket.
#[derive(Debug)]
pub struct Netlink {
    socket: OwnedFd,
    sequence: u32,
}

/// One message of an answer: its type and what follows the header.
#[derive(Debug)]
pub struct Message {
    pub kind: u16,
    pub body: Vec<u8>,
}

impl Netlink {
    /// Opens a socket in the current network namespace.
    ///
    /// # Errors
    /// When the kernel does not know the protocol.
    pub fn open(protocol: libc::c_int) -> io::Result<Self> {
        let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
        // SAFETY: socket takes no pointers.
        let socket = unsafe { libc::socket(libc::AF_NETLINK, kind, protocol) };
        check(socket)?;
        // SAFETY: the descriptor is new and ours.
        let socket = unsafe { OwnedFd::from_raw_fd(socket) };
        Ok(Self {
            socket,
            sequence: 0,
        })
    }

    /// Asks for everything of a kind.
    ///
    /// # Errors
    /// When the kernel refuses, with its reason.
    pub fn dump(&mut self, kind: u16, body: &[u8]) -> io::Result<Vec<Message>> {
        self.send(kind, NLM_F_DUMP, body)?;
        self.answer()
    }

    /// Asks for something to be done.
    ///
    /// # Errors
    /// When the kernel refuses, with its reason.
    pub fn request(&mut self, kind: u16, body: &[u8]) -> io::Result<Vec<Message>> {
        self.send(kind, NLM_F_ACK, body)?;
        self.answer()
    }

    /// Asks for something to be made, or replaced where it exists.
    ///
    /// # Errors
    /// As [`Netlink::request`].
    pub fn make(&mut self, kind: u16, body: &[u8]) -> io::Result<Vec<Message>> {
        self.send(kind, NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE, body)?;
        self.answer()
    }

    fn send(&mut self, kind: u16, flags: u16, body: &[u8]) -> io::Result<()> {
        self.sequence += 1;
        let length = u32::try_from(HEADER + body.len()).unwrap_or(u32::MAX);
        let mut message = Vec::with_capacity(HEADER + body.len());
        message.extend(length.to_ne_bytes());
        message.extend(kind.to_ne_bytes());
        message.extend((flags | NLM_F_REQUEST).to_ne_bytes());
        message.extend(self.sequence.to_ne_bytes());
        message.extend([0; 4]);
        message.extend(body);
        // SAFETY: the message outlives the call; without an address it goes to the kernel.
        let sent = unsafe {
            libc::send(
                self.socket.as_raw_fd(),
                message.as_ptr().cast(),
                message.len(),
                0,
            )
        };
        if sent < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    fn answer(&self) -> io::Result<Vec<Message>> {
        let mut messages = Vec::new();
        let mut buffer = vec![0_u8; 32 << 10];
        loop {
            // SAFETY: the buffer outlives the call.
            let got = unsafe {
                libc::recv(
                    self.socket.as_raw_fd(),
                    buffer.as_mut_ptr().cast(),
                    buffer.len(),
                    0,
                )
            };
            let got = usize::try_from(got).map_err(|_| io::Error::last_os_error())?;
            let mut rest = &buffer[..got];
            while let Some((message, sequence, after)) = split(rest) {
                rest = after;
                if sequence != self.sequence {
                    continue;
                }
                match message.kind {
                    NLMSG_DONE => return Ok(messages),
                    NLMSG_ERROR => {
                        let code = number(&message.body, 0).cast_signed();
                        if code == 0 {
                            return Ok(messages);
                        }
                        return Err(io::Error::from_raw_os_error(-code));
                    }
                    _ => messages.push(message),
                }
            }
        }
    }
}

fn split(bytes: &[u8]) -> Option<(Message, u32, &[u8])> {
    let length = number(bytes.get(..HEADER)?, 0) as usize;
    let body = bytes.get(HEADER..length)?.to_vec();
    let kind = u16::from_ne_bytes([bytes[4], bytes[5]]);
    let next = length.next_multiple_of(4).min(bytes.len());
    Some((Message { kind, body }, number(bytes, 8), &bytes[next..]))
}

/// A 32-bit number at an offset; zero beyond the end.
#[must_use]
pub fn number(bytes: &[u8], at: usize) -> u32 {
    bytes
        .get(at..at + 4)
        .and_then(|four| four.try_into().ok())
        .map_or(0, u32::from_ne_bytes)
}

/// The attributes from an offset on: type and value.
#[must_use]
pub fn attributes(bytes: &[u8], from: usize) -> Vec<(u16, &[u8])> {
    let mut found = Vec::new();
    let mut rest = bytes.get(from..).unwrap_or_default();
    while let Some(header) = rest.get(..4) {
        let length = usize::from(u16::from_ne_bytes([header[0], header[1]]));
        let kind = u16::from_ne_bytes([header[2], header[3]]);
        let Some(value) = rest.get(4..length) else {
            break;
        };
        // The upper two bits are flags.
        found.push((kind & 0x3fff, value));
        rest = &rest[length.next_multiple_of(4).min(rest.len())..];
    }
    found
}

/// An attribute, padded as the next one needs it.
#[must_use]
pub fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = u16::try_from(4 + value.len()).unwrap_or(u16::MAX);
    let mut bytes = Vec::with_capacity(usize::from(length).next_multiple_of(4));
    bytes.extend(length.to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_come_back_as_they_were_written() {
        let mut bytes = attribute(1, b"abc");
        bytes.extend(attribute(2, &7_u32.to_ne_bytes()));
        let found = attributes(&bytes, 0);
        assert_eq!(found, [(1, &b"abc"[..]), (2, &7_u32.to_ne_bytes()[..])]);
    }

    #[test]
    fn cut_off_bytes_end_the_list() {
        let mut bytes = attribute(1, b"abcd");
        bytes.truncate(6);
        assert!(attributes(&bytes, 0).is_empty());
        assert!(split(&[16, 0, 0]).is_none());
    }
}
