//! The files by which unix sockets are found.

use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::libc;

use super::DumpError;
use crate::manifest::{Socket, SocketFile};

/// Who may connect to a socket with a path; nothing where its file has been removed.
pub fn read(socket: &Socket, host: i32) -> Result<Option<SocketFile>, DumpError> {
    let Some(path) = path(socket, host) else {
        return Ok(None);
    };
    match path.symlink_metadata() {
        Ok(meta) if meta.file_type().is_socket() => Ok(Some(SocketFile {
            mode: meta.mode() & 0o7777,
            uid: meta.uid(),
            gid: meta.gid(),
        })),
        Ok(_) => Ok(None),
        Err(err) if err.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(DumpError::Io {
            doing: format!("reading the permissions of {}", path.display()),
            source,
        }),
    }
}

fn path(socket: &Socket, host: i32) -> Option<PathBuf> {
    let name = socket.address.get(2..)?;
    let name = name.split(|byte| *byte == 0).next()?;
    if socket.domain != libc::AF_UNIX || name.is_empty() {
        return None;
    }
    let name = Path::new(std::ffi::OsStr::from_bytes(name));
    Some(match name.strip_prefix("/") {
        Ok(inside) => Path::new(&format!("/proc/{host}/root")).join(inside),
        // From where its holder is, as far as can be told.
        Err(_) => Path::new(&format!("/proc/{host}/cwd")).join(name),
    })
}
