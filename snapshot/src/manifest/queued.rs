//! What waits in a socket to be read.

use nix::libc;
use serde::{Deserialize, Serialize};

use super::{Manifest, ManifestError, ObjectKind, Socket};

/// Descriptors that one message passes at most (SCM_MAX_FD).
const MOST_RIGHTS: usize = 253;

/// A record, or a part of a stream.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Queued {
    pub data: Vec<u8>,
    /// Indices in [`Manifest::objects`] of the open files that come with it (SCM_RIGHTS of unix(7)).
    pub rights: Vec<usize>,
}

impl Socket {
    /// Whether descriptors wait in it.
    #[must_use]
    pub fn holds_rights(&self) -> bool {
        self.queue.iter().any(|one| !one.rights.is_empty())
    }

    /// Whether it is one end of a TCP connection inside the sandbox.
    #[must_use]
    pub fn is_connection(&self) -> bool {
        self.pair.is_some() && self.domain != libc::AF_UNIX
    }
}

impl ObjectKind {
    /// Why it cannot wait in a unix socket; none if it can.
    #[must_use]
    pub fn not_passed(&self) -> Option<&'static str> {
        match self {
            Self::PidFd { .. } => Some("a pidfd"),
            Self::Epoll { .. } => Some("an epoll"),
            Self::Socket(socket) if socket.holds_rights() => {
                Some("a unix socket in which descriptors wait themselves")
            }
            _ => None,
        }
    }
}

pub fn check(manifest: &Manifest) -> Result<(), ManifestError> {
    for (index, object) in manifest.objects.iter().enumerate() {
        let ObjectKind::Socket(socket) = &object.kind else {
            continue;
        };
        for queued in &socket.queue {
            let passed = |at: &usize| {
                let object = manifest.objects.get(*at);
                object.is_some_and(|object| object.kind.not_passed().is_none())
            };
            if queued.rights.len() > MOST_RIGHTS || !queued.rights.iter().all(passed) {
                return Err(ManifestError::Invalid {
                    what: format!("the descriptors that wait in socket {index}"),
                });
            }
        }
        if socket.is_connection() && !is_connection(socket) {
            return Err(ManifestError::Invalid {
                what: format!("the TCP connection of socket {index}"),
            });
        }
    }
    Ok(())
}

fn is_connection(socket: &Socket) -> bool {
    let length = match socket.domain {
        libc::AF_INET => size_of::<libc::sockaddr_in>(),
        libc::AF_INET6 => size_of::<libc::sockaddr_in6>(),
        _ => return false,
    };
    let whole = |address: &Vec<u8>| address.len() == length;
    let plain = socket.listen.is_none() && !socket.holds_rights();
    socket.kind == libc::SOCK_STREAM && plain && whole(&socket.address) && whole(&socket.connected)
}
