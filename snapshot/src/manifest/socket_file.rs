//! The files by which unix sockets are found.

use nix::libc;
use serde::{Deserialize, Serialize};

use super::{Manifest, ManifestError, ObjectKind};

/// Owner and permissions of the file that a unix socket is bound to: who may not write to it may
/// not connect.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SocketFile {
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
}

pub fn check(manifest: &Manifest) -> Result<(), ManifestError> {
    for (index, object) in manifest.objects.iter().enumerate() {
        let ObjectKind::Socket(socket) = &object.kind else {
            continue;
        };
        let Some(file) = socket.file else {
            continue;
        };
        let named = socket.address.get(2).is_some_and(|byte| *byte != 0);
        if socket.domain != libc::AF_UNIX || !named || file.mode & !0o7777 != 0 {
            return Err(ManifestError::Invalid {
                what: format!("the file of socket {index}"),
            });
        }
    }
    Ok(())
}
