//! Steps that bring an end of a socket pair to the state that it had, and unix sockets to their place.

use nix::libc;
use trenv_restorer::wire::verb;

use super::process::Tree;
use super::region::{Program, Region};
use crate::manifest::{ObjectKind, Socket};

/// What a fresh socket surely has room for, with the kernel's own cost of it.
const ROOM: usize = 64 << 10;
/// The value that gives a fresh socket's room: the kernel doubles it.
const FRESH: u64 = 106_496;
/// Which buffer sizes were set by the program.
const SO_BUF_LOCK: i32 = 72;

/// Puts what waited at an end there again, sent from the other, in slot `from`.
pub fn fill(socket: &Socket, from: u8, control: u64, region: &mut Region, program: &mut Program) {
    if socket.queue.is_empty() {
        return;
    }
    let bytes: usize = socket.queue.iter().map(|one| one.data.len()).sum();
    program.about(region.sentence(format!("putting {bytes} bytes into a socket")));
    let set = |name: i32, value: u64, region: &mut Region, program: &mut Program| {
        let value = region.put_words(&[value]);
        let (level, name) = (libc::SOL_SOCKET as u64, name as u64);
        program
            .call(libc::SYS_setsockopt, [0, level, name, value, 4])
            .from(0, from)
            .or_not();
    };
    let more = bytes + socket.queue.len() * 1024 > ROOM;
    if more {
        let enough = bytes * 2 + socket.queue.len() * 4096;
        set(libc::SO_SNDBUFFORCE, enough as u64, region, program);
    }
    for record in &socket.queue {
        let data = region.put(&record.data, 8);
        let length = record.data.len() as u64;
        let at_once = libc::MSG_DONTWAIT as u64;
        if record.rights.is_empty() {
            program.call(libc::SYS_sendto, [0, data, length, at_once, 0, 0]);
        } else {
            let message = with_rights(&record.rights, (data, length), control, region);
            program.call(libc::SYS_sendmsg, [0, message, at_once]);
        }
        program.from(0, from).exactly(length);
    }
    if more {
        if socket.domain == libc::AF_UNIX {
            set(libc::SO_SNDBUFFORCE, FRESH, region, program);
        }
        // The size was not the program's choice; kernels before 5.14 need not know.
        set(SO_BUF_LOCK, 0, region, program);
    }
}

/// A `struct msghdr` that passes open files with bytes; its address.
fn with_rights(
    rights: &[usize],
    (data, length): (u64, u64),
    control: u64,
    region: &mut Region,
) -> u64 {
    let part = region.put_words(&[data, length]);
    // struct cmsghdr: length with itself, level, type; then the descriptors.
    let size = 16 + 4 * rights.len() as u64;
    let mut head = size.to_ne_bytes().to_vec();
    head.extend(libc::SOL_SOCKET.to_ne_bytes());
    head.extend(libc::SCM_RIGHTS.to_ne_bytes());
    for object in rights {
        head.extend((super::files::place(control, *object) as i32).to_ne_bytes());
    }
    let head = region.put(&head, 8);
    // Name and its length, parts and their number, control data and its length, flags.
    region.put_words(&[0, 0, part, 1, head, size, 0])
}

/// Sets the options in which a socket differed from a fresh one, but those `left` for later.
pub fn set_options(
    socket: &Socket,
    at: u64,
    left: &[(i32, i32)],
    region: &mut Region,
    program: &mut Program,
) {
    for (level, name, value) in &socket.options {
        if !left.contains(&(*level, *name)) {
            set(at, (*level, *name), value, region, program);
        }
    }
}

pub fn set(
    at: u64,
    (level, name): (i32, i32),
    value: &[u8],
    region: &mut Region,
    program: &mut Program,
) {
    let bytes = region.put(value, 8);
    let args = [at, level as u64, name as u64, bytes, value.len() as u64];
    program.call(libc::SYS_setsockopt, args);
}

/// Puts the address that an interface has where the tree starts into that of a socket, at `address`.
pub fn put_own(
    interface: &str,
    domain: i32,
    address: u64,
    region: &mut Region,
    program: &mut Program,
) {
    program.about(region.sentence(format!("asking for the IPv4 address of {interface}")));
    // struct ifreq: the name in 16 bytes, then a `struct sockaddr_in`, whose port the kernel clears.
    let mut request = interface.as_bytes().to_vec();
    request.resize(40, 0);
    let request = region.put(&request, 8);
    let datagrams = libc::SOCK_DGRAM as u64;
    program
        .call(libc::SYS_socket, [libc::AF_INET as u64, datagrams, 0])
        .into(0);
    program
        .call(libc::SYS_ioctl, [0, libc::SIOCGIFADDR, request])
        .from(0, 0);
    program.call(libc::SYS_close, [0]).from(0, 0);
    // An IPv4 address ends one of IPv6 that stands for it.
    let place = if domain == libc::AF_INET { 4 } else { 20 };
    program.verb(verb::COPY, [request + 20, address + place]);
}

/// Shuts down the end in `slot` as it was.
pub fn shut(socket: &Socket, slot: u8, region: &mut Region, program: &mut Program) {
    for (bit, how) in [(1, libc::SHUT_RD), (2, libc::SHUT_WR)] {
        if socket.shutdown & bit != 0 {
            program.about(region.sentence("shutting down a socket".into()));
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
pub fn enter_place(tree: Tree<'_>, object: usize, region: &mut Region, program: &mut Program) {
    let manifest = tree.manifest;
    let Some(ObjectKind::Socket(socket)) = manifest.objects.get(object).map(|one| &one.kind) else {
        return;
    };
    let relative = |address: &[u8]| address.get(2).is_some_and(|byte| !matches!(byte, 0 | b'/'));
    if socket.domain != libc::AF_UNIX || !(relative(&socket.address) || relative(&socket.connected))
    {
        return;
    }
    if let Some(held) = tree.holders.first(object) {
        let cwd = &manifest.processes[held.process].cwd;
        program.about(region.sentence(format!("entering {cwd}")));
        let cwd = region.put_text(cwd);
        program.call(libc::SYS_chdir, [cwd]);
    }
}
