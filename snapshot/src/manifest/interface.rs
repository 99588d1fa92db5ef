//! The interfaces whose own addresses sockets are bound to.

use nix::libc;

use super::{Manifest, ManifestError, ObjectKind};

pub fn check(manifest: &Manifest) -> Result<(), ManifestError> {
    for (index, object) in manifest.objects.iter().enumerate() {
        let ObjectKind::Socket(socket) = &object.kind else {
            continue;
        };
        let Some(name) = &socket.interface else {
            continue;
        };
        let is_name = (1..libc::IFNAMSIZ).contains(&name.len()) && !name.contains('\0');
        let address = match socket.domain {
            libc::AF_INET => size_of::<libc::sockaddr_in>(),
            libc::AF_INET6 => size_of::<libc::sockaddr_in6>(),
            _ => 0,
        };
        if !is_name || socket.pair.is_some() || socket.address.len() != address {
            return Err(ManifestError::Invalid {
                what: format!("the interface of socket {index}"),
            });
        }
    }
    Ok(())
}
