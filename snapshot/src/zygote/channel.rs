//! Messages between the shim's side and a zygote or agent: requests with descriptors one way,
//! reports with their sender's pid the other.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use trenv_restorer::wire::{MARKS, MOST_DESCRIPTORS, Report, Request, report};

use super::{ZygoteError, errno};

pub fn socket_pair() -> Result<(OwnedFd, OwnedFd), ZygoteError> {
    let (ours, theirs) = socketpair(
        AddressFamily::Unix,
        SockType::SeqPacket,
        None,
        SockFlag::SOCK_CLOEXEC,
    )
    .map_err(errno("making a control socket"))?;
    // Reports carry their sender's pid in our terms.
    nix::sys::socket::setsockopt(&ours, nix::sys::socket::sockopt::PassCred, &true)
        .map_err(errno("making a control socket"))?;
    Ok((ours, theirs))
}

pub fn send(
    control: BorrowedFd<'_>,
    kind: u32,
    agent: u32,
    descriptors: &[BorrowedFd<'_>],
) -> Result<(), ZygoteError> {
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
    let request = Request { kind, agent };
    let mut bytes = [0u8; 8];
    bytes[..4].copy_from_slice(&request.kind.to_ne_bytes());
    bytes[4..].copy_from_slice(&request.agent.to_ne_bytes());
    let mut space =
        [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_DESCRIPTORS))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() {
        ancillary.push(SendAncillaryMessage::ScmRights(descriptors));
    }
    let parts = [io::IoSlice::new(&bytes)];
    match sendmsg(control, &parts, &mut ancillary, SendFlags::NOSIGNAL) {
        Ok(_) => Ok(()),
        Err(rustix::io::Errno::PIPE | rustix::io::Errno::CONNRESET) => Err(ZygoteError::Gone),
        Err(errno) => Err(ZygoteError::Io {
            doing: "asking the zygote for a start".into(),
            source: errno.into(),
        }),
    }
}

/// One report and the host pid of its sender.
pub fn receive(
    control: BorrowedFd<'_>,
    deadline: Instant,
    allowed: Duration,
) -> Result<(Report, i32), ZygoteError> {
    receive_from(control, None, deadline, allowed)
}

/// [`receive`] from a tree in the sandbox with the pid 1 `init`: when that has ended, so has
/// everything that would report, and the agent comes home without a word of it.
pub fn receive_from(
    control: BorrowedFd<'_>,
    init: Option<BorrowedFd<'_>>,
    deadline: Instant,
    allowed: Duration,
) -> Result<(Report, i32), ZygoteError> {
    use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
    let mut fds = vec![PollFd::new(control, PollFlags::POLLIN)];
    fds.extend(init.map(|init| PollFd::new(init, PollFlags::POLLIN)));
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match nix::poll::poll(&mut fds, timeout) {
            Ok(0) => return Err(ZygoteError::Deadline(allowed)),
            Ok(_) if fds[0].any() == Some(false) => return Err(ZygoteError::InitGone),
            Ok(_) => break,
            Err(Errno::EINTR) => {}
            Err(err) => return Err(errno("waiting for the zygote")(err)),
        }
    }
    // A longer message is known by the byte too many.
    let mut bytes = [0u8; size_of::<Report>() + 1];
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmCredentials(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut parts = [io::IoSliceMut::new(&mut bytes)];
    // A process that may not read what it is sent leaves it in its socket, and its end makes an error
    // of that, ahead of what it said itself.
    let got = recvmsg(control, &mut parts, &mut ancillary, RecvFlags::CMSG_CLOEXEC)
        .or_else(|err| match err {
            rustix::io::Errno::CONNRESET => {
                recvmsg(control, &mut parts, &mut ancillary, RecvFlags::CMSG_CLOEXEC)
            }
            err => Err(err),
        })
        .map_err(|err| match err {
            rustix::io::Errno::CONNRESET => ZygoteError::Gone,
            err => ZygoteError::Io {
                doing: "hearing from the zygote".into(),
                source: err.into(),
            },
        })?
        .bytes;
    if got == 0 {
        return Err(ZygoteError::Gone);
    }
    let pid = ancillary.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmCredentials(credentials) => {
            Some(credentials.pid.as_raw_nonzero().get())
        }
        _ => None,
    });
    let report = bytes.get(..got).and_then(parse);
    report.zip(pid).ok_or_else(nonsense)
}

/// Reads a report; none if its length or its kind is not as it must be.
pub fn parse(bytes: &[u8]) -> Option<Report> {
    let (head, rest) = bytes.split_first_chunk::<16>()?;
    let mut words = head.chunks_exact(4).map(|word| word.try_into().ok());
    let mut word = || words.next().flatten().map(u32::from_ne_bytes);
    let (kind, process, what, errno) = (word()?, word()?, word()?, word()? as i32);
    let rest: &[u8; 8 * MARKS] = rest.try_into().ok()?;
    let mut marks = [0; MARKS];
    for (mark, bytes) in marks.iter_mut().zip(rest.chunks_exact(8)) {
        *mark = u64::from_ne_bytes(bytes.try_into().ok()?);
    }
    matches!(kind, report::IDLE | report::RESTORED | report::FAILED).then_some(Report {
        kind,
        process,
        what,
        errno,
        marks,
    })
}

/// The error of a report that no restorer sends.
pub fn nonsense() -> ZygoteError {
    ZygoteError::Io {
        doing: "hearing from the zygote".into(),
        source: io::Error::new(
            io::ErrorKind::InvalidData,
            "no restorer sends such a report; the start can be made again",
        ),
    }
}
