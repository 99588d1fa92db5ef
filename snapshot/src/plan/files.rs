//! Open files: made by the tree's root for everyone, then put in place by each process.

mod connections;
mod fifo;
mod file_locks;
pub mod holders;
pub mod owners;

use std::collections::{BTreeMap, BTreeSet};

use nix::libc;
use trenv_restorer::wire::{fd, verb};

use super::process::Tree;
use super::region::{Program, Region};
use super::{PlanError, shared, sockets};
use crate::manifest::{Manifest, ObjectKind, Socket, TmpfsKind};

/// Status flags that F_SETFL can set, but O_ASYNC, which is set with the owner.
const SETTABLE: u32 = (libc::O_APPEND | libc::O_NONBLOCK | libc::O_DIRECT | libc::O_NOATIME) as u32;
/// The number of the watch that is made next, by value.
const INOTIFY_IOC_SETNEXTWD: u64 = 0x4004_4900;
const TFD_IOC_SET_TICKS: u64 = 0x4008_5400;

/// The control descriptor lies above every descriptor of the tree.
pub fn control_descriptor(manifest: &Manifest) -> u64 {
    let highest = manifest
        .processes
        .iter()
        .flat_map(|process| &process.descriptors)
        .map(|descriptor| descriptor.number)
        .max();
    (highest.unwrap_or(0).max(15) + 1) as u64
}

pub fn place(control: u64, object: usize) -> u64 {
    control + fd::OBJECTS + object as u64
}

/// Steps that make every open file, at its number above the control descriptor.
pub fn make(tree: Tree<'_>, region: &mut Region, program: &mut Program) -> Result<(), PlanError> {
    let (manifest, control) = (tree.manifest, tree.control);
    let mut pairs: BTreeMap<u64, [Option<usize>; 2]> = BTreeMap::new();
    // Before anybody listens at their addresses.
    connections::make(manifest, control, region, program);
    for (index, object) in manifest.objects.iter().enumerate() {
        let at = place(control, index);
        let flags = u64::from(object.flags) & !(libc::O_ASYNC as u64);
        let nonblocking = flags & libc::O_NONBLOCK as u64;
        match &object.kind {
            ObjectKind::Stdio(stream) => {
                program.about(region.sentence(format!("taking standard stream {stream}")));
                program.call(
                    libc::SYS_dup3,
                    [control + fd::STDIO + u64::from(*stream), at, 0],
                );
                let settable = u64::from(object.flags & SETTABLE);
                if settable != 0 {
                    program.call(libc::SYS_fcntl, [at, libc::F_SETFL as u64, settable]);
                }
            }
            ObjectKind::Path { path, position } => {
                program.about(region.sentence(format!("opening {path}")));
                let text = region.put_text(path);
                program
                    .call(libc::SYS_openat, [libc::AT_FDCWD as u64, text, flags, 0])
                    .into(0);
                move_to(at, program);
                if *position > 0 {
                    program.call(libc::SYS_lseek, [at, *position, libc::SEEK_SET as u64]);
                }
            }
            ObjectKind::Nameless { memory, position } => {
                shared::open(*memory, flags as u32, control, region, program);
                move_to(at, program);
                if object.flags & libc::O_PATH as u32 == 0 {
                    program.call(libc::SYS_lseek, [at, *position, libc::SEEK_SET as u64]);
                }
            }
            ObjectKind::Pipe { pipe, writer, .. } => {
                pairs.entry(*pipe).or_default()[usize::from(*writer)] = Some(index);
            }
            ObjectKind::EventFd { count, semaphore } => {
                program.about(region.sentence("making an eventfd".into()));
                let how = nonblocking | u64::from(*semaphore);
                program.call(libc::SYS_eventfd2, [0, how]).into(0);
                move_to(at, program);
                if *count > 0 {
                    let value = region.put_words(&[*count]);
                    program.call(libc::SYS_write, [at, value, 8]);
                }
            }
            ObjectKind::Epoll { .. } => {
                program.about(region.sentence("making an epoll".into()));
                program.call(libc::SYS_epoll_create1, [0]).into(0);
                move_to(at, program);
            }
            ObjectKind::TimerFd {
                clock,
                flags: timer,
                value,
                interval,
                ticks,
            } => {
                program.about(region.sentence("making a timerfd".into()));
                program
                    .call(libc::SYS_timerfd_create, [*clock as u64, nonblocking])
                    .into(0);
                move_to(at, program);
                if *value != [0; 2] {
                    let times = [interval[0], interval[1], value[0], value[1]];
                    let times = region.put_words(&times);
                    // The value is what remains, whatever the timer was set by.
                    let how = u64::from(timer & !1);
                    program.call(libc::SYS_timerfd_settime, [at, how, times, 0]);
                }
                if *ticks > 0 {
                    let ticks = region.put_words(&[*ticks]);
                    program.call(libc::SYS_ioctl, [at, TFD_IOC_SET_TICKS, ticks]);
                }
            }
            ObjectKind::SignalFd { mask } => {
                program.about(region.sentence("making a signalfd".into()));
                let mask = region.put_words(&[*mask]);
                program
                    .call(libc::SYS_signalfd4, [u64::MAX, mask, 8, nonblocking])
                    .into(0);
                move_to(at, program);
            }
            ObjectKind::Fifo { .. } => {}
            // Made by the process that holds it, once its target exists.
            ObjectKind::PidFd { .. } => {}
            ObjectKind::Inotify { .. } => {
                program.about(region.sentence("making an inotify".into()));
                program.call(libc::SYS_inotify_init1, [nonblocking]).into(0);
                move_to(at, program);
            }
            ObjectKind::Socket(socket) if socket.is_connection() => {}
            ObjectKind::Socket(socket) => match socket.pair {
                Some((pair, side)) => {
                    pairs.entry(pair).or_default()[side as usize & 1] = Some(index);
                }
                None => {
                    sockets::enter_place(tree, index, region, program);
                    make_socket(socket, nonblocking, at, region, program);
                }
            },
        }
    }
    for (index, object) in manifest.objects.iter().enumerate() {
        if let ObjectKind::Socket(socket) = &object.kind
            && socket.domain == libc::AF_UNIX
        {
            // To another of the tree's, which has its address by now.
            sockets::enter_place(tree, index, region, program);
            connect(socket, place(control, index), region, program);
        }
    }
    connections::finish(manifest, control, region, program);
    fifo::make(manifest, control, region, program);
    // What is passed has to be there before.
    let holds_rights = |ends: &[Option<usize>; 2]| {
        ends.iter()
            .flatten()
            .any(|end| match &manifest.objects[*end].kind {
                ObjectKind::Socket(socket) => socket.holds_rights(),
                _ => false,
            })
    };
    let (last, first): (Vec<_>, Vec<_>) = pairs.into_values().partition(holds_rights);
    for ends in first.into_iter().chain(last) {
        make_pair(manifest, ends, control, region, program)?;
    }
    file_locks::of_open_files(manifest, control, region, program);
    Ok(())
}

fn move_to(at: u64, program: &mut Program) {
    program.call(libc::SYS_dup3, [0, at, 0]).from(0, 0);
    program.call(libc::SYS_close, [0]).from(0, 0);
}

fn make_socket(
    socket: &Socket,
    nonblocking: u64,
    at: u64,
    region: &mut Region,
    program: &mut Program,
) {
    program.about(region.sentence(format!("making a socket of family {}", socket.domain)));
    let kind = socket.kind as u64 | nonblocking;
    program
        .call(
            libc::SYS_socket,
            [socket.domain as u64, kind, socket.protocol as u64],
        )
        .into(0);
    move_to(at, program);
    sockets::set_options(socket, at, &[], region, program);
    let internet = matches!(socket.domain, libc::AF_INET | libc::AF_INET6);
    let reuse = (libc::SOL_SOCKET, libc::SO_REUSEADDR);
    let had_reuse = socket
        .options
        .iter()
        .any(|(level, name, _)| (*level, *name) == reuse);
    let borrows = internet && !had_reuse && !socket.address.is_empty();
    if !socket.address.is_empty() {
        program.about(region.sentence(format!("binding to {}", describe(&socket.address))));
        if borrows {
            // Connections at this port must not matter: the tree's own, and those that the sandbox's
            // last function left in TIME_WAIT.
            sockets::set(at, reuse, &1i32.to_ne_bytes(), region, program);
        }
        if socket.domain == libc::AF_UNIX && socket.address.get(2).is_some_and(|byte| *byte != 0) {
            // The socket's file is part of the file system; a new socket needs the name free.
            let mut path = socket.address[2..].to_vec();
            path.push(0);
            let path = region.put(&path, 1);
            program.call(libc::SYS_unlink, [path]).or_not();
        }
        let address = region.put(&socket.address, 8);
        if let Some(interface) = &socket.interface {
            sockets::put_own(interface, socket.domain, address, region, program);
            program.about(region.sentence(format!(
                "binding to the address of {interface} instead of {}",
                describe(&socket.address)
            )));
        }
        program.call(libc::SYS_bind, [at, address, socket.address.len() as u64]);
        sockets::give_file(socket, region, program);
    }
    if let Some(backlog) = socket.listen {
        program.call(libc::SYS_listen, [at, backlog as u64]);
    }
    if borrows {
        sockets::set(at, reuse, &0i32.to_ne_bytes(), region, program);
    }
    if internet {
        connect(socket, at, region, program);
        for how in [libc::SHUT_RD, libc::SHUT_WR] {
            // One that is not connected says so, and is shut down.
            if socket.shutdown & (1 << how) != 0 {
                program.call(libc::SYS_shutdown, [at, how as u64]).or_not();
            }
        }
    }
}

fn connect(socket: &Socket, at: u64, region: &mut Region, program: &mut Program) {
    if !socket.connected.is_empty() {
        program.about(region.sentence(format!("connecting to {}", describe(&socket.connected))));
        let address = region.put(&socket.connected, 8);
        program.call(
            libc::SYS_connect,
            [at, address, socket.connected.len() as u64],
        );
    }
}

fn describe(address: &[u8]) -> String {
    match address {
        [2, 0, high, low, a, b, c, d, ..] => {
            format!("{a}.{b}.{c}.{d}:{}", u16::from_be_bytes([*high, *low]))
        }
        [10, 0, high, low, ..] => format!(
            "an IPv6 address, port {}",
            u16::from_be_bytes([*high, *low])
        ),
        [1, 0, path @ ..] => String::from_utf8_lossy(path)
            .trim_end_matches('\0')
            .to_owned(),
        _ => "an address".into(),
    }
}

/// Both ends of a pipe or of a socket pair; an end that nobody holds is closed again.
fn make_pair(
    manifest: &Manifest,
    ends: [Option<usize>; 2],
    control: u64,
    region: &mut Region,
    program: &mut Program,
) -> Result<(), PlanError> {
    let numbers = region.put_words(&[0]);
    let Some(kind) = ends
        .iter()
        .flatten()
        .next()
        .map(|end| &manifest.objects[*end].kind)
    else {
        return Ok(());
    };
    match kind {
        ObjectKind::Pipe { size, .. } => {
            program.about(region.sentence("making a pipe".into()));
            program.call(libc::SYS_pipe2, [numbers, 0]);
            program.verb(verb::LOAD, [numbers]).into(0);
            program.verb(verb::LOAD, [numbers + 4]).into(1);
            if *size != 65_536 {
                program
                    .call(libc::SYS_fcntl, [0, libc::F_SETPIPE_SZ as u64, *size])
                    .from(0, 1);
            }
            if let Some(ObjectKind::Pipe { data, .. }) =
                ends[0].map(|end| &manifest.objects[end].kind)
                && !data.is_empty()
            {
                let bytes = region.put(data, 8);
                let length = data.len() as u64;
                program
                    .call(libc::SYS_write, [0, bytes, length])
                    .from(0, 1)
                    .exactly(length);
            }
        }
        ObjectKind::Socket(socket) => {
            program.about(region.sentence("making a pair of sockets".into()));
            let args = [
                socket.domain as u64,
                socket.kind as u64,
                socket.protocol as u64,
                numbers,
            ];
            program.call(libc::SYS_socketpair, args);
            program.verb(verb::LOAD, [numbers]).into(0);
            program.verb(verb::LOAD, [numbers + 4]).into(1);
            for (slot, end) in [0, 1].into_iter().zip(ends) {
                if let Some(ObjectKind::Socket(socket)) = end.map(|end| &manifest.objects[end].kind)
                {
                    sockets::fill(socket, 1 - slot, control, region, program);
                }
            }
            for (slot, end) in [0, 1].into_iter().zip(ends) {
                if let Some(ObjectKind::Socket(socket)) = end.map(|end| &manifest.objects[end].kind)
                {
                    sockets::shut(socket, slot, region, program);
                }
            }
        }
        _ => return Err(PlanError::Unsupported("a pair of an unknown kind".into())),
    }
    for (slot, end) in [0, 1].into_iter().zip(ends) {
        if let Some(end) = end {
            let at = place(control, end);
            let flags = manifest.objects[end].flags & SETTABLE;
            program.call(libc::SYS_dup3, [0, at, 0]).from(0, slot);
            if let ObjectKind::Socket(socket) = &manifest.objects[end].kind {
                sockets::set_options(socket, at, &[], region, program);
            }
            if flags != 0 {
                program.call(
                    libc::SYS_fcntl,
                    [at, libc::F_SETFL as u64, u64::from(flags)],
                );
            }
        }
        program.call(libc::SYS_close, [0]).from(0, slot);
    }
    Ok(())
}

/// Steps that put a process's descriptors in place and close everything else but the control socket.
pub fn install(index: usize, tree: Tree<'_>, region: &mut Region, program: &mut Program) {
    let (manifest, control) = (tree.manifest, tree.control);
    let process = &manifest.processes[index];
    let mut made_here = BTreeSet::new();
    for descriptor in &process.descriptors {
        let object = &manifest.objects[descriptor.object];
        let at = place(control, descriptor.object);
        if let ObjectKind::PidFd { pid } = object.kind
            && made_here.insert(descriptor.object)
        {
            program.about(region.sentence(format!("opening process {pid}")));
            let nonblocking = u64::from(object.flags) & libc::O_NONBLOCK as u64;
            program
                .call(libc::SYS_pidfd_open, [pid as u64, nonblocking])
                .into(0);
            move_to(at, program);
        }
        program.about(region.sentence(format!("setting up descriptor {}", descriptor.number)));
        let how = if descriptor.close_on_exec {
            libc::O_CLOEXEC as u64
        } else {
            0
        };
        program.call(libc::SYS_dup3, [at, descriptor.number as u64, how]);
    }
    program.about(region.sentence("closing what was needed for the start only".into()));
    let rest = u64::from(u32::MAX);
    program.call(libc::SYS_close_range, [control + fd::CONTROL + 1, rest, 0]);
    file_locks::of_process(manifest, process, region, program);
    watch(index, tree, region, program);
}

/// An epoll knows a file by its descriptor's number too, so it is filled in by a holder.
fn watch(index: usize, tree: Tree<'_>, region: &mut Region, program: &mut Program) {
    for (epoll, object) in tree.manifest.objects.iter().enumerate() {
        let ObjectKind::Epoll { targets } = &object.kind else {
            continue;
        };
        let held = tree.holders.first(epoll);
        let Some(held) = held.filter(|held| held.process == index) else {
            continue;
        };
        for target in targets {
            program.about(region.sentence(format!("watching descriptor {}", target.number)));
            // struct epoll_event is packed: 32 bits of events, 64 of data.
            let mut event = target.events.to_ne_bytes().to_vec();
            event.extend(target.data.to_ne_bytes());
            let event = region.put(&event, 8);
            let add = libc::EPOLL_CTL_ADD as u64;
            let args = [held.number as u64, add, target.number as u64, event];
            program.call(libc::SYS_epoll_ctl, args);
        }
    }
}

/// Steps that let each inotify watch again, once every file is there.
pub fn watch_files(manifest: &Manifest, control: u64, region: &mut Region, program: &mut Program) {
    for (index, object) in manifest.objects.iter().enumerate() {
        let ObjectKind::Inotify { watches } = &object.kind else {
            continue;
        };
        let at = place(control, index);
        for watch in watches {
            program.about(region.sentence(format!("watching {}", watch.path)));
            let number = watch.wd as u64;
            program.call(libc::SYS_ioctl, [at, INOTIFY_IOC_SETNEXTWD, number]);
            let path = region.put_text(&watch.path);
            program
                .call(
                    libc::SYS_inotify_add_watch,
                    [at, path, u64::from(watch.mask)],
                )
                .exactly(number);
        }
    }
}

/// Steps that fill the sandbox's tmpfs mounts.
pub fn fill_tmpfs(manifest: &Manifest, region: &mut Region, program: &mut Program) {
    let here = libc::AT_FDCWD as u64;
    for entry in &manifest.tmpfs {
        program.about(region.sentence(format!("making {}", entry.path)));
        let path = region.put_text(&entry.path);
        let mode = u64::from(entry.mode);
        match &entry.kind {
            // A directory may be there already, made with the mount.
            TmpfsKind::Directory => {
                program.call(libc::SYS_mkdir, [path, mode]).or_not();
            }
            TmpfsKind::Fifo => {
                let mode = u64::from(libc::S_IFIFO) | mode;
                program
                    .call(libc::SYS_mknodat, [here, path, mode, 0])
                    .or_not();
            }
            // Where a socket is bound to it, that one takes its place.
            TmpfsKind::Socket => {
                let mode = u64::from(libc::S_IFSOCK | entry.mode & 0o7777);
                program
                    .call(libc::SYS_mknodat, [here, path, mode, 0])
                    .or_not();
            }
            TmpfsKind::Link(target) => {
                let target = region.put_text(target);
                program.call(libc::SYS_symlink, [target, path]).or_not();
            }
            TmpfsKind::File(content) => {
                let how = (libc::O_WRONLY | libc::O_CREAT | libc::O_TRUNC) as u64;
                program
                    .call(libc::SYS_openat, [here, path, how, mode])
                    .into(0);
                let (bytes, length) = (region.put(content, 8), content.len() as u64);
                program
                    .call(libc::SYS_write, [0, bytes, length])
                    .from(0, 0)
                    .exactly(length);
                program.call(libc::SYS_close, [0]).from(0, 0);
            }
        }
        let (uid, gid) = (u64::from(entry.uid), u64::from(entry.gid));
        let no_follow = libc::AT_SYMLINK_NOFOLLOW as u64;
        program
            .call(libc::SYS_fchownat, [here, path, uid, gid, no_follow])
            .or_not();
        if !matches!(entry.kind, TmpfsKind::Link(_)) {
            program
                .call(libc::SYS_fchmodat, [here, path, mode])
                .or_not();
        }
    }
}
