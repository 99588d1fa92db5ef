//! Users, groups, capabilities and seccomp filters, thread by thread, as credentials(7) has them.

use nix::libc;

use super::region::{Program, Region};
use crate::manifest::{Credentials, Manifest, Thread};

const CAPABILITIES: u64 = 41;
const CAP_SETPCAP: u64 = 1 << 8;
const SECCOMP_SET_MODE_FILTER: u64 = 1;
const FILTER_FLAG_TSYNC: u64 = 1;
/// Version word of capset(2) for 64 capabilities.
const CAPABILITY_VERSION: u64 = 0x2008_0522;

/// Drops the bounding capabilities that a process has and is not to keep: inherited by what it makes
/// later.
pub fn bound(keep: u64, has: u64, region: &mut Region, program: &mut Program) {
    program.about(region.sentence("dropping bounding capabilities".into()));
    for capability in 0..CAPABILITIES {
        if has & !keep & 1 << capability != 0 {
            // One that this kernel does not know cannot be held either.
            program
                .call(libc::SYS_prctl, [libc::PR_CAPBSET_DROP as u64, capability])
                .or_not();
        }
    }
}

/// Drops, ahead of a start, the bounding capabilities that no process of the tree has.
///
/// A process that is loaded gets its permitted capabilities anew at its exec, out of the bounding
/// and the inheritable set (capabilities(7)); the inheritable set keeps what the start still needs.
pub fn bound_ahead(common: u64, own: u64, region: &mut Region, program: &mut Program) {
    program.about(region.sentence("keeping capabilities for the start".into()));
    let all = Credentials {
        effective: own,
        permitted: own,
        inheritable: own,
        bounding: common,
        ..Credentials::default()
    };
    set_capabilities(&all, region, program);
    bound(common, u64::MAX, region, program);
}

/// Whether one thread can give all of them their filters (seccomp(2), SECCOMP_FILTER_FLAG_TSYNC),
/// so that the kernel compiles each filter once.
pub fn share_filters(threads: &[Thread]) -> bool {
    threads.len() > 1
        && threads
            .iter()
            .all(|thread| thread.no_new_privileges && thread.filters == threads[0].filters)
}

/// Steps by which the calling thread takes its credentials; its filters too, where they come first.
pub fn take(thread: &Thread, manifest: &Manifest, region: &mut Region, program: &mut Program) {
    let own = &thread.credentials;
    if thread.no_new_privileges {
        program.about(region.sentence("setting no_new_privs".into()));
        program.call(
            libc::SYS_prctl,
            [libc::PR_SET_NO_NEW_PRIVS as u64, 1, 0, 0, 0],
        );
    } else {
        // Without no_new_privs a filter needs CAP_SYS_ADMIN, which may be gone afterwards.
        filter(thread, 0, manifest, region, program);
    }
    program.about(region.sentence(format!(
        "becoming user {} and group {}",
        own.uid[0], own.gid[0]
    )));
    let mut groups = Vec::new();
    for group in &own.groups {
        groups.extend(group.to_ne_bytes());
    }
    let list = region.put(&groups, 8);
    program.call(libc::SYS_setgroups, [own.groups.len() as u64, list]);
    let [real, effective, saved, fs] = own.gid.map(u64::from);
    program.call(libc::SYS_setresgid, [real, effective, saved]);
    if fs != effective {
        program.call(libc::SYS_setfsgid, [fs]).or_not();
    }
    let [real, effective, saved, fs] = own.uid.map(u64::from);
    let changes = [real, effective, saved].iter().any(|id| *id != 0);
    if changes {
        // Keeps permitted capabilities until capset below decides.
        program.call(libc::SYS_prctl, [libc::PR_SET_KEEPCAPS as u64, 1, 0, 0, 0]);
        program.call(libc::SYS_setresuid, [real, effective, saved]);
        program.call(libc::SYS_prctl, [libc::PR_SET_KEEPCAPS as u64, 0, 0, 0, 0]);
    }
    if fs != effective {
        program.call(libc::SYS_setfsuid, [fs]).or_not();
    }
    if own.secure_bits != 0 {
        // Another user has no effective capabilities any more, and this takes CAP_SETPCAP.
        let able = Credentials {
            effective: CAP_SETPCAP,
            permitted: own.permitted | CAP_SETPCAP,
            ..own.clone()
        };
        set_capabilities(&able, region, program);
        program.about(region.sentence("setting secure bits".into()));
        program.call(
            libc::SYS_prctl,
            [libc::PR_SET_SECUREBITS as u64, own.secure_bits, 0, 0, 0],
        );
    }
    set_capabilities(own, region, program);
    for capability in 0..CAPABILITIES {
        if own.ambient & 1 << capability != 0 {
            let raise = [
                libc::PR_CAP_AMBIENT as u64,
                libc::PR_CAP_AMBIENT_RAISE as u64,
                capability,
            ];
            program.call(libc::SYS_prctl, raise);
        }
    }
}

fn set_capabilities(own: &Credentials, region: &mut Region, program: &mut Program) {
    program.about(region.sentence("setting capabilities".into()));
    let head = region.put_words(&[CAPABILITY_VERSION]);
    // Two sets of 32 bits each: effective, permitted, inheritable.
    let halves = |shift: u32| {
        let part = |set: u64| set >> shift & 0xffff_ffff;
        [
            part(own.effective) | part(own.permitted) << 32,
            part(own.inheritable),
        ]
    };
    let (low, high) = (halves(0), halves(32));
    // The struct is packed as six 32-bit words.
    let words = [
        low[0],
        low[1] | (high[0] & 0xffff_ffff) << 32,
        high[0] >> 32 | high[1] << 32,
    ];
    let sets = region.put_words(&words);
    program.call(libc::SYS_capset, [head, sets]);
}

/// Steps by which the calling thread takes its filters where they come last, for all threads of its
/// process if they are `shared`.
pub fn take_filters(
    thread: &Thread,
    shared: bool,
    manifest: &Manifest,
    region: &mut Region,
    program: &mut Program,
) {
    if thread.no_new_privileges {
        let how = if shared { FILTER_FLAG_TSYNC } else { 0 };
        filter(thread, how, manifest, region, program);
    }
}

fn filter(
    thread: &Thread,
    how: u64,
    manifest: &Manifest,
    region: &mut Region,
    program: &mut Program,
) {
    for index in &thread.filters {
        let Some(instructions) = manifest.filters.get(*index) else {
            continue;
        };
        program.about(region.sentence("installing a seccomp filter".into()));
        let code = region.put_words(instructions);
        // struct sock_fprog: length, then the pointer.
        let description = region.put_words(&[instructions.len() as u64, code]);
        program.call(
            libc::SYS_seccomp,
            [SECCOMP_SET_MODE_FILTER, how, description],
        );
    }
}
