//! Who is told by signals of what happens to open files.
//!
//! An owner must be there when it is named, so this comes last but for credentials, and waits for
//! processes and threads that others are still making. The signal tells by which descriptor O_ASYNC was
//! set, which the kernel does not: it is set by the lowest that the owner has, or the first other holder.

use nix::libc;

use super::SETTABLE;
use crate::manifest::{FileOwner, SignalTarget};
use crate::plan::process::Tree;
use crate::plan::region::{Program, Region};

const F_SETSIG: u64 = 10;
const F_SETOWN_EX: u64 = 15;
const UNCHANGED: u64 = u32::MAX as u64;
const O_ASYNC: u32 = libc::O_ASYNC as u32;

/// Steps of a process that has its descriptors and its threads, and is root still.
pub fn set(index: usize, tree: Tree<'_>, region: &mut Region, program: &mut Program) {
    let pid = tree.manifest.processes[index].pid;
    for (number, object) in tree.manifest.objects.iter().enumerate() {
        let asynchronous = object.flags & O_ASYNC != 0;
        if object.owner.is_none() && !asynchronous {
            continue;
        }
        let held = tree.holders.owner_or_first(number);
        let Some(held) = held.filter(|held| held.process == index) else {
            continue;
        };
        let at = held.number as u64;
        if let Some(owner) = object.owner {
            program.about(region.sentence(format!(
                "giving descriptor {at} of process {pid} the owner that it had (F_SETOWN)"
            )));
            give(at, owner, region, program);
        }
        if asynchronous {
            program.about(region.sentence(format!(
                "setting O_ASYNC of descriptor {at} of process {pid}"
            )));
            let flags = u64::from(object.flags & (SETTABLE | O_ASYNC));
            program.call(libc::SYS_fcntl, [at, libc::F_SETFL as u64, flags]);
        }
    }
}

fn give(at: u64, owner: FileOwner, region: &mut Region, program: &mut Program) {
    if let Some(target) = owner.target {
        let (kind, id) = match target {
            SignalTarget::Thread(tid) => (0, tid),
            SignalTarget::Process(pid) => (1, pid),
            SignalTarget::Group(group) => (2, group),
        };
        // The kernel notes who says so, and compares the user when it sends the signal.
        let become_user = |users: [u64; 2], program: &mut Program| {
            program.call(libc::SYS_setresuid, [users[0], users[1], UNCHANGED]);
        };
        if owner.users != [0; 2] {
            become_user(owner.users.map(u64::from), program);
        }
        // struct f_owner_ex: type and id.
        let words = region.put_words(&[kind | u64::from(id as u32) << 32]);
        program
            .call(libc::SYS_fcntl, [at, F_SETOWN_EX, words])
            .until_done();
        if owner.users != [0; 2] {
            become_user([0; 2], program);
        }
    }
    if owner.signal != 0 {
        program.call(libc::SYS_fcntl, [at, F_SETSIG, owner.signal as u64]);
    }
}
