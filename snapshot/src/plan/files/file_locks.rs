//! Locks on open files.

use nix::libc;

use super::place;
use crate::manifest::{FileLock, LockHolder, Manifest, Process};
use crate::plan::region::{Program, Region};

/// Steps of the tree's root: locks that belong to open files.
pub fn of_open_files(
    manifest: &Manifest,
    control: u64,
    region: &mut Region,
    program: &mut Program,
) {
    for lock in &manifest.locks {
        program.about(region.sentence("locking a file".into()));
        match lock.holder {
            LockHolder::Flock { object } => {
                let how = match lock.exclusive {
                    true => libc::LOCK_EX,
                    false => libc::LOCK_SH,
                };
                let how = (how | libc::LOCK_NB) as u64;
                program.call(libc::SYS_flock, [place(control, object), how]);
            }
            LockHolder::OpenFile { object } => {
                set(
                    place(control, object),
                    libc::F_OFD_SETLK,
                    lock,
                    region,
                    program,
                );
            }
            LockHolder::Process { .. } => {}
        }
    }
}

/// Steps of a process that has its descriptors and closes none any more, since that would drop its
/// locks on the file.
pub fn of_process(
    manifest: &Manifest,
    process: &Process,
    region: &mut Region,
    program: &mut Program,
) {
    for lock in &manifest.locks {
        if let LockHolder::Process { pid, descriptor } = lock.holder
            && pid == process.pid
        {
            program.about(region.sentence(format!("locking the file of descriptor {descriptor}")));
            set(descriptor as u64, libc::F_SETLK, lock, region, program);
        }
    }
}

fn set(number: u64, how: i32, lock: &FileLock, region: &mut Region, program: &mut Program) {
    let kind = match lock.exclusive {
        true => libc::F_WRLCK,
        false => libc::F_RDLCK,
    };
    // struct flock: type and whence, both 16 bits and padded to 8 bytes; start, length, pid.
    let words = [
        u64::from(kind as u16),
        lock.start,
        lock.length.unwrap_or(0),
        0,
    ];
    let wanted = region.put_words(&words);
    program.call(libc::SYS_fcntl, [number, how as u64, wanted]);
}
