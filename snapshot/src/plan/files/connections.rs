//! TCP connections whose ends are both in the tree: made between the addresses that they had, by a
//! listener that is there for a moment.

use std::collections::BTreeMap;

use nix::libc;

use super::{SETTABLE, describe, place};
use crate::manifest::{Manifest, ObjectKind, Socket};
use crate::plan::region::{Program, Region};
use crate::plan::sockets;

/// Slots of the ends, and of the listener.
const ENDS: [u8; 2] = [0, 1];
const LISTENER: u8 = 2;
const REUSE: (i32, i32) = (libc::SOL_SOCKET, libc::SO_REUSEADDR);
const IPV6_ONLY: (i32, i32) = (libc::IPPROTO_IPV6, libc::IPV6_V6ONLY);

/// An end, which nobody may hold any more.
struct End<'a> {
    object: Option<usize>,
    /// Itself, or the other end.
    like: &'a Socket,
    local: &'a [u8],
    remote: &'a [u8],
}

/// Steps that make every connection, each end at its number above the control descriptor.
pub fn make(manifest: &Manifest, control: u64, region: &mut Region, program: &mut Program) {
    let mut pairs: BTreeMap<u64, [Option<usize>; 2]> = BTreeMap::new();
    for (index, socket) in ends(manifest) {
        if let Some((pair, side)) = socket.pair {
            pairs.entry(pair).or_default()[side as usize & 1] = Some(index);
        }
    }
    for objects in pairs.values() {
        let socket = |object: Option<usize>| match &manifest.objects.get(object?)?.kind {
            ObjectKind::Socket(socket) => Some(socket),
            _ => None,
        };
        let end = |side: usize| {
            let other = || End::across(socket(objects[1 - side])?);
            socket(objects[side]).map_or_else(other, |own| End::of(objects[side], own))
        };
        if let (Some(first), Some(second)) = (end(0), end(1)) {
            connect(&first, &second, region, program);
            keep(manifest, &[first, second], control, region, program);
        }
    }
}

/// Steps for when everybody listens who does: until then the ends had SO_REUSEADDR.
pub fn finish(manifest: &Manifest, control: u64, region: &mut Region, program: &mut Program) {
    for (index, socket) in ends(manifest) {
        let had = socket
            .options
            .iter()
            .any(|(level, name, _)| (*level, *name) == REUSE);
        let value = i32::from(had).to_ne_bytes();
        sockets::set(place(control, index), REUSE, &value, region, program);
    }
}

fn ends(manifest: &Manifest) -> impl Iterator<Item = (usize, &Socket)> {
    let objects = manifest.objects.iter().enumerate();
    objects.filter_map(|(index, object)| match &object.kind {
        ObjectKind::Socket(socket) if socket.is_connection() => Some((index, socket)),
        _ => None,
    })
}

impl<'a> End<'a> {
    fn of(object: Option<usize>, socket: &'a Socket) -> Option<Self> {
        Some(Self {
            object,
            like: socket,
            local: &socket.address,
            remote: &socket.connected,
        })
    }

    /// The end across from one.
    fn across(socket: &'a Socket) -> Option<Self> {
        Some(Self {
            object: None,
            like: socket,
            local: &socket.connected,
            remote: &socket.address,
        })
    }

    /// Makes a socket with its local address in a slot.
    fn bind(&self, slot: u8, region: &mut Region, program: &mut Program) {
        let domain = self.like.domain as u64;
        program
            .call(libc::SYS_socket, [domain, libc::SOCK_STREAM as u64, 0])
            .into(slot);
        let option =
            |(level, name): (i32, i32), value: i32, region: &mut Region, program: &mut Program| {
                let value = region.put(&value.to_ne_bytes(), 8);
                program
                    .call(
                        libc::SYS_setsockopt,
                        [0, level as u64, name as u64, value, 4],
                    )
                    .from(0, slot);
            };
        option(REUSE, 1, region, program);
        if self.like.domain == libc::AF_INET6 {
            let options = &mut self.like.options.iter();
            let only = options.any(|(level, name, _)| (*level, *name) == IPV6_ONLY);
            option(IPV6_ONLY, i32::from(only), region, program);
        }
        let (address, length) = (region.put(self.local, 8), self.local.len() as u64);
        program
            .call(libc::SYS_bind, [0, address, length])
            .from(0, slot)
            .until_done();
    }
}

fn connect(first: &End<'_>, second: &End<'_>, region: &mut Region, program: &mut Program) {
    let (from, to) = (describe(second.local), describe(first.local));
    program.about(region.sentence(format!("connecting {from} to {to}")));
    first.bind(LISTENER, region, program);
    program.call(libc::SYS_listen, [0, 1]).from(0, LISTENER);
    second.bind(ENDS[1], region, program);
    let (address, length) = (region.put(second.remote, 8), second.remote.len() as u64);
    // One that the sandbox's last function left in TIME_WAIT is in the way for a second.
    program
        .call(libc::SYS_connect, [0, address, length])
        .from(0, ENDS[1])
        .until_done();
    program
        .call(libc::SYS_accept4, [0, 0, 0, 0])
        .from(0, LISTENER)
        .into(ENDS[0]);
    program.call(libc::SYS_close, [0]).from(0, LISTENER);
}

/// Brings both ends to their state and puts them in place; one that nobody holds is closed.
fn keep(
    manifest: &Manifest,
    ends: &[End<'_>; 2],
    control: u64,
    region: &mut Region,
    program: &mut Program,
) {
    let held = |end: &End<'_>| end.object.is_some();
    for (end, from) in ends.iter().zip([ENDS[1], ENDS[0]]) {
        if held(end) {
            sockets::fill(end.like, from, control, region, program);
        }
    }
    for (end, slot) in ends.iter().zip(ENDS) {
        if held(end) {
            sockets::shut(end.like, slot, region, program);
        }
    }
    for (end, slot) in ends.iter().zip(ENDS) {
        if let Some(object) = end.object {
            let at = place(control, object);
            program.call(libc::SYS_dup3, [0, at, 0]).from(0, slot);
            sockets::set_options(end.like, at, &[REUSE, IPV6_ONLY], region, program);
            let flags = manifest.objects[object].flags & SETTABLE;
            if flags != 0 {
                let set = libc::F_SETFL as u64;
                program.call(libc::SYS_fcntl, [at, set, u64::from(flags)]);
            }
        }
        program.call(libc::SYS_close, [0]).from(0, slot);
    }
}
