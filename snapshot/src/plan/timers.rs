//! Steps that make POSIX timers with the numbers that they had.

use nix::libc;

use super::region::{Program, Region};
use crate::manifest::{CREATED_ONE_BY_ONE, PosixTimer, Process};

const PR_TIMER_CREATE_RESTORE_IDS: u64 = 77;

/// Makes and sets the timers of a process. Where their numbers cannot be `chosen` the kernel gives
/// one after another, and those between are made and deleted.
pub fn make(process: &Process, chosen: bool, region: &mut Region, program: &mut Program) {
    if process.posix_timers.is_empty() {
        return;
    }
    program.about(region.sentence(format!("making the timers of process {}", process.pid)));
    let choose = |on: u64, program: &mut Program| {
        let args = [PR_TIMER_CREATE_RESTORE_IDS, on, 0, 0, 0];
        program.call(libc::SYS_prctl, args);
    };
    if chosen {
        choose(1, program);
    }
    let mut next = 0;
    for timer in &process.posix_timers {
        let id = region.put_words(&[timer.id as u64]);
        let event = region.put(&event_of(timer), 8);
        let create = [timer.clock as u64, event, id];
        // A manifest for a kernel with choice may ask for more than can be had here.
        for number in next..timer.id.min(CREATED_ONE_BY_ONE) {
            if chosen {
                break;
            }
            program.call(libc::SYS_timer_create, create);
            program.call(libc::SYS_timer_delete, [number as u64]);
        }
        next = timer.id.saturating_add(1);
        program.call(libc::SYS_timer_create, create);
        if timer.times != [0; 4] {
            let times = region.put_words(&timer.times);
            program.call(libc::SYS_timer_settime, [timer.id as u64, 0, times, 0]);
        }
    }
    if chosen {
        choose(0, program);
    }
}

/// `struct sigevent`.
fn event_of(timer: &PosixTimer) -> [u8; 64] {
    let mut event = [0; 64];
    event[..8].copy_from_slice(&timer.value.to_ne_bytes());
    event[8..12].copy_from_slice(&timer.signal.to_ne_bytes());
    event[12..16].copy_from_slice(&timer.notify.to_ne_bytes());
    event[16..20].copy_from_slice(&timer.target.to_ne_bytes());
    event
}
