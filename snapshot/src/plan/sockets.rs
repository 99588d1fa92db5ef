//! Steps that bring an end of a socket pair to the state that it had, and unix sockets to their place.

use nix::libc;

use super::region::{Program, Region};
use crate::manifest::{Manifest, ObjectKind, Socket};

/// What a fresh socket surely has room for, with the kernel's own cost of it.
const ROOM: usize = 64 << 10;
/// The value that gives a fresh socket's room: the kernel doubles it.
const FRESH: u64 = 106_496;

/// Puts what waited at an end there again, sent from the other, in slot `from`.
pub fn fill(socket: &Socket, from: u8, region: &mut Region, program: &mut Program) {
    if socket.queue.is_empty() {
        return;
    }
    let bytes: usize = socket.queue.iter().map(Vec::len).sum();
    program.about(region.sentence(format!("putting {bytes} bytes into a unix socket")));
    let room = |value: u64, region: &mut Region, program: &mut Program| {
        let value = region.put_words(&[value]);
        let (level, name) = (libc::SOL_SOCKET as u64, libc::SO_SNDBUFFORCE as u64);
        program
            .call(libc::SYS_setsockopt, [0, level, name, value, 4])
            .from(0, from);
    };
    let more = bytes + socket.queue.len() * 1024 > ROOM;
    if more {
        let enough = bytes * 2 + socket.queue.len() * 4096;
        room(enough as u64, region, program);
    }
    for record in &socket.queue {
        let data = region.put(record, 8);
        let length = record.len() as u64;
        let at_once = libc::MSG_DONTWAIT as u64;
        program
            .call(libc::SYS_sendto, [0, data, length, at_once, 0, 0])
            .from(0, from)
            .exactly(length);
    }
    if more {
        room(FRESH, region, program);
    }
}

/// Shuts down the end in `slot` as it was.
pub fn shut(socket: &Socket, slot: u8, region: &mut Region, program: &mut Program) {
    for (bit, how) in [(1, libc::SHUT_RD), (2, libc::SHUT_WR)] {
        if socket.shutdown & bit != 0 {
            program.about(region.sentence("shutting down a unix socket".into()));
            program
                .call(libc::SYS_shutdown, [0, how as u64])
                .from(0, slot);
        }
    }
}

/// Gives the file of a bound unix socket to its owner, or removes it as the program did.
pub fn give_file(socket: &Socket, region: &mut Region, program: &mut Program) {
    let named = socket.address.get(2).is_some_and(|byte| *byte != 0);
    if socket.domain != libc::AF_UNIX || !named {
        return;
    }
    let mut path = socket.address[2..].to_vec();
    path.push(0);
    let path = region.put(&path, 1);
    let Some(file) = socket.file else {
        program.call(libc::SYS_unlink, [path]);
        return;
    };
    let here = libc::AT_FDCWD as u64;
    let (uid, gid) = (u64::from(file.uid), u64::from(file.gid));
    let no_follow = libc::AT_SYMLINK_NOFOLLOW as u64;
    program.call(libc::SYS_fchownat, [here, path, uid, gid, no_follow]);
    program.call(libc::SYS_fchmodat, [here, path, u64::from(file.mode)]);
}

/// Enters the directory that a relative name of a unix socket begins at: its holder's, as far as can
/// be told.
pub fn enter_place(manifest: &Manifest, object: usize, region: &mut Region, program: &mut Program) {
    let Some(ObjectKind::Socket(socket)) = manifest.objects.get(object).map(|one| &one.kind) else {
        return;
    };
    let relative = |address: &[u8]| address.get(2).is_some_and(|byte| !matches!(byte, 0 | b'/'));
    if socket.domain != libc::AF_UNIX || !(relative(&socket.address) || relative(&socket.connected))
    {
        return;
    }
    let holds = |process: &&crate::manifest::Process| {
        let mut descriptors = process.descriptors.iter();
        descriptors.any(|descriptor| descriptor.object == object)
    };
    if let Some(holder) = manifest.processes.iter().find(holds) {
        program.about(region.sentence(format!("entering {}", holder.cwd)));
        let cwd = region.put_text(&holder.cwd);
        program.call(libc::SYS_chdir, [cwd]);
    }
}
