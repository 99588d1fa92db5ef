//! The programs of threads, and what the main thread sets up likewise.

use nix::libc;
use trenv_restorer::wire::verb;

use super::region::{Program, Region};
use super::{credentials, frame};
use crate::manifest::{Manifest, Process, Thread};

const ARCH_SET_GS: u64 = 0x1001;
/// Timer slack that every thread begins with, in nanoseconds.
const DEFAULT_SLACK: u64 = 50_000;

/// The program of a thread but the main one; its address.
pub fn program(
    thread: &Thread,
    process: &Process,
    manifest: &Manifest,
    (gate, ready): (u64, Option<u64>),
    region: &mut Region,
) -> u64 {
    let mut program = Program::default();
    program.about(region.sentence(format!("setting up thread {}", thread.tid)));
    state(thread, process, region, &mut program);
    credentials::take(thread, manifest, region, &mut program);
    state_after_credentials(thread, &mut program);
    match ready {
        // The main thread's filters become this one's.
        Some(ready) => {
            program.verb(verb::RELEASE, [ready]);
        }
        None => credentials::take_filters(thread, false, manifest, region, &mut program),
    }
    program.verb(verb::WAIT, [gate]);
    program.verb(verb::SIGRETURN, [put_frame(thread, region)]);
    region.put_program(&program)
}

/// What the kernel keeps per thread, registers and credentials aside.
pub fn state(thread: &Thread, process: &Process, region: &mut Region, program: &mut Program) {
    if thread.registers.gs_base != 0 {
        program.call(
            libc::SYS_arch_prctl,
            [ARCH_SET_GS, thread.registers.gs_base],
        );
    }
    program.call(libc::SYS_set_tid_address, [thread.clear_tid]);
    if thread.robust_list.0 != 0 {
        program.call(
            libc::SYS_set_robust_list,
            [thread.robust_list.0, thread.robust_list.1],
        );
    }
    if let Some((address, size, signature)) = thread.rseq {
        program.call(
            libc::SYS_rseq,
            [address, u64::from(size), 0, u64::from(signature)],
        );
    }
    let name = region.put_text(&thread.name);
    program.call(libc::SYS_prctl, [libc::PR_SET_NAME as u64, name]);
    if thread.nice != 0 {
        program.call(
            libc::SYS_setpriority,
            [libc::PRIO_PROCESS as u64, 0, thread.nice as u64],
        );
    }
    if thread.scheduling != (0, 0) {
        let parameter = region.put_words(&[thread.scheduling.1 as u64]);
        program.call(
            libc::SYS_sched_setscheduler,
            [0, thread.scheduling.0 as u64, parameter],
        );
    }
    if let Some(mask) = &thread.affinity {
        let length = mask.len() as u64;
        let mask = region.put(mask, 8);
        program.call(libc::SYS_sched_setaffinity, [0, length, mask]);
    }
    if thread.timer_slack != DEFAULT_SLACK {
        let slack = [libc::PR_SET_TIMERSLACK as u64, thread.timer_slack];
        program.call(libc::SYS_prctl, slack);
    }
    if thread.io_priority != 0 {
        let this_thread = [1, 0, u64::from(thread.io_priority)];
        program.call(libc::SYS_ioprio_set, this_thread);
    }
    send_pending(
        &thread.pending,
        Some(thread.tid),
        process.pid,
        region,
        program,
    );
}

/// What a change of user takes away.
pub fn state_after_credentials(thread: &Thread, program: &mut Program) {
    if thread.parent_death_signal != 0 {
        let signal = thread.parent_death_signal;
        program.call(libc::SYS_prctl, [libc::PR_SET_PDEATHSIG as u64, signal]);
    }
}

/// Signals that were pending are sent again; all are blocked until the frame is taken.
pub fn send_pending(
    pending: &[Vec<u8>],
    tid: Option<i32>,
    pid: i32,
    region: &mut Region,
    program: &mut Program,
) {
    for info in pending {
        let signal = info
            .first_chunk()
            .map_or(0, |bytes| i32::from_ne_bytes(*bytes)) as u64;
        let info = region.put(info, 8);
        match tid {
            Some(tid) => {
                let args = [pid as u64, tid as u64, signal, info];
                program.call(libc::SYS_rt_tgsigqueueinfo, args);
            }
            None => {
                program.call(libc::SYS_rt_sigqueueinfo, [pid as u64, signal, info]);
            }
        }
    }
}

pub fn put_frame(thread: &Thread, region: &mut Region) -> u64 {
    let at = region.put(&vec![0; frame::size(thread)], 64);
    let bytes = frame::build(thread, at);
    region.set(at, &bytes);
    at
}
