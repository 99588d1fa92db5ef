//! userfaultfd(2): the requests and messages that page serving needs (kernel:
//! include/uapi/linux/userfaultfd.h), with their outcomes told apart.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::errno::Errno;
use nix::libc;

use crate::manifest::PAGE;

const API: u64 = 0xaa;
const EVENT_FORK: u64 = 1 << 1;
const EVENT_REMAP: u64 = 1 << 2;
const EVENT_REMOVE: u64 = 1 << 3;
const EVENT_UNMAP: u64 = 1 << 6;
const MODE_MISSING: u64 = 1;
const FAULT_WRITE: u64 = 1;

const IOC_API: u64 = 0xc018_aa3f;
const IOC_REGISTER: u64 = 0xc020_aa00;
const IOC_WAKE: u64 = 0x8010_aa02;
const IOC_COPY: u64 = 0xc028_aa03;
const IOC_ZEROPAGE: u64 = 0xc020_aa04;

/// `_IOC` of the kernel's ioctl.h.
const fn ioc(direction: u64, number: u64, size: usize) -> u64 {
    direction << 30 | (size as u64) << 16 | API << 8 | number
}

const _: () = assert!(IOC_API == ioc(3, 0x3f, size_of::<[u64; 3]>()));
const _: () = assert!(IOC_REGISTER == ioc(3, 0, size_of::<[u64; 4]>()));
const _: () = assert!(IOC_WAKE == ioc(2, 2, size_of::<[u64; 2]>()));
const _: () = assert!(IOC_COPY == ioc(3, 3, size_of::<[u64; 5]>()));
const _: () = assert!(IOC_ZEROPAGE == ioc(3, 4, size_of::<[u64; 4]>()));

/// Messages taken by one read.
const MESSAGES: usize = 16;
/// `struct uffd_msg`.
const MESSAGE: usize = 32;

/// What a watched address space tells.
#[derive(Debug)]
pub enum Event {
    Fault {
        at: u64,
        write: bool,
    },
    /// A child with a copy of the address space, and its userfaultfd.
    Fork(OwnedFd),
    Remap {
        from: u64,
        to: u64,
        length: u64,
    },
    /// The pages of a range were given back or unmapped.
    Remove {
        start: u64,
        end: u64,
    },
}

/// How filling a page went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Filled {
    Done,
    /// There is a page already.
    There,
    /// The address space is being changed: read its events first.
    Busy,
    /// Nothing watched is mapped there any more.
    Gone,
    /// The address space has ended.
    Dead,
}

/// Agrees on the interface, with all events of address spaces.
pub fn open(watch: BorrowedFd<'_>) -> io::Result<()> {
    let features = EVENT_FORK | EVENT_REMAP | EVENT_REMOVE | EVENT_UNMAP;
    call(watch, IOC_API, &mut [API, features, 0])
}

/// Asks to be told of missing pages of a range.
pub fn register(watch: BorrowedFd<'_>, at: u64, length: u64) -> io::Result<()> {
    call(watch, IOC_REGISTER, &mut [at, length, MODE_MISSING, 0])
}

/// Copies pages from this process's memory; tells how many bytes went well before the outcome.
///
/// # Errors
/// When memory is wanting.
pub fn copy(
    watch: BorrowedFd<'_>,
    at: u64,
    from: *const u8,
    length: u64,
) -> io::Result<(u64, Filled)> {
    let mut done = 0;
    while done < length {
        let mut words = [
            at + done,
            // SAFETY: the caller's source has `length` bytes.
            unsafe { from.add(done as usize) } as u64,
            length - done,
            0,
            0,
        ];
        let result = call(watch, IOC_COPY, &mut words);
        done += (words[4] as i64).max(0) as u64;
        if let Err(err) = result {
            if words[4] as i64 > 0 {
                continue;
            }
            return Ok((done, outcome(err)?));
        }
    }
    Ok((done, Filled::Done))
}

/// Puts a page of zeroes there.
///
/// # Errors
/// When memory is wanting.
pub fn zero(watch: BorrowedFd<'_>, at: u64) -> io::Result<Filled> {
    match call(watch, IOC_ZEROPAGE, &mut [at, PAGE, 0, 0]) {
        Ok(()) => Ok(Filled::Done),
        Err(err) => outcome(err),
    }
}

/// Lets those go on who wait for a page.
pub fn wake(watch: BorrowedFd<'_>, at: u64) {
    // Who does not wait need not be woken.
    let _ = call(watch, IOC_WAKE, &mut [at, PAGE]);
}

/// Takes what there is to be told; the descriptor does not block.
pub fn read(watch: BorrowedFd<'_>) -> io::Result<Vec<Event>> {
    let mut bytes = [0u8; MESSAGES * MESSAGE];
    let got = match nix::unistd::read(watch, &mut bytes) {
        Ok(got) => got,
        Err(Errno::EAGAIN | Errno::EINTR) => 0,
        Err(errno) => return Err(errno.into()),
    };
    Ok(bytes[..got]
        .chunks_exact(MESSAGE)
        .filter_map(event)
        .collect())
}

fn event(message: &[u8]) -> Option<Event> {
    let word = |at: usize| {
        let bytes = message.get(at..at + 8)?;
        Some(u64::from_ne_bytes(bytes.try_into().ok()?))
    };
    match message.first()? {
        0x12 => Some(Event::Fault {
            write: word(8)? & FAULT_WRITE != 0,
            at: word(16)? & !(PAGE - 1),
        }),
        // SAFETY: the kernel made the descriptor for whoever reads this message.
        0x13 => Some(Event::Fork(unsafe {
            OwnedFd::from_raw_fd(word(8)? as u32 as i32)
        })),
        0x14 => Some(Event::Remap {
            from: word(8)?,
            to: word(16)?,
            length: word(24)?,
        }),
        0x15 | 0x16 => Some(Event::Remove {
            start: word(8)?,
            end: word(16)?,
        }),
        _ => None,
    }
}

fn outcome(err: io::Error) -> io::Result<Filled> {
    match err.raw_os_error() {
        Some(libc::EEXIST) => Ok(Filled::There),
        Some(libc::EAGAIN) => Ok(Filled::Busy),
        Some(libc::ENOENT) => Ok(Filled::Gone),
        Some(libc::ESRCH) => Ok(Filled::Dead),
        _ => Err(err),
    }
}

fn call(watch: BorrowedFd<'_>, request: u64, words: &mut [u64]) -> io::Result<()> {
    // SAFETY: each request reads and writes a struct of as many words as its caller passes; what it
    // copies goes to another address space.
    if unsafe { libc::ioctl(watch.as_raw_fd(), request, words.as_mut_ptr()) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
