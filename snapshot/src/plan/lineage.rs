//! Steps by which everyone of a tree is made and comes to its session and process group.

use std::collections::BTreeSet;

use nix::libc;
use trenv_restorer::wire::verb;

use super::PlanError;
use super::layout::Way;
use super::process::{Tree, Words, program_of};
use super::region::{Program, Region};
use crate::lineage::{Kin, Lineage, Role, dies_alone};
use crate::manifest::{Manifest, Zombie};

/// Queued at a group's leader by each that enters the group; it must not end before, nor go on.
const JOINED: u64 = 63;
/// How long it waits for that, in seconds.
const PATIENCE: u64 = 10;

/// Gives each stand-in without a number one that nobody in the tree has, and finds one for the
/// process between clone and root.
pub fn number_stand_ins(manifest: &Manifest, lineage: &mut Lineage) -> Result<u64, PlanError> {
    let mut taken: BTreeSet<i32> = lineage.kin.iter().map(|one| one.pid).collect();
    for process in &manifest.processes {
        taken.extend([process.group, process.session]);
        taken.extend(process.threads.iter().map(|thread| thread.tid));
    }
    for zombie in &manifest.zombies {
        taken.extend([zombie.group, zombie.session]);
    }
    let mut free = (300..32_000).rev().filter(|pid| !taken.contains(pid));
    let helper = free.next().ok_or(PlanError::NoRoom)?;
    for one in &mut lineage.kin {
        if one.pid == 0 {
            one.pid = free.next().ok_or(PlanError::NoRoom)?;
        }
    }
    Ok(helper as u64)
}

/// Steps that make the kin of `index` and bring it to its own session and group.
pub fn take_place(
    index: usize,
    tree: Tree<'_>,
    words: &Words<'_>,
    region: &mut Region,
    program: &mut Program,
) -> Result<(), PlanError> {
    let lineage = &tree.placement.lineage;
    let own = &lineage.kin[index];
    let has_zombies = lineage
        .made_by(index)
        .any(|(_, one)| matches!(one.role, Role::Zombie(_)));
    if has_zombies {
        // The zygote ignores SIGCHLD, and who does that has no zombies.
        program.about(region.sentence(format!("preparing process {} for zombies", own.pid)));
        let default = region.put_words(&[0; 4]);
        let args = [libc::SIGCHLD as u64, default, 0, 8];
        program.call(libc::SYS_rt_sigaction, args);
    }
    make(index, true, tree, words, region, program)?;
    program.about(region.sentence(format!("setting session and group of process {}", own.pid)));
    if own.leads_session {
        program.call(libc::SYS_setsid, []);
    } else if own.leads_group {
        program.call(libc::SYS_setpgid, [0, 0]);
    }
    if lineage
        .kin
        .iter()
        .any(|one| one.falls_to == Some(own.pid) && one.pid != own.pid)
    {
        // Before those end whose children fall to it.
        let become_one = [libc::PR_SET_CHILD_SUBREAPER as u64, 1, 0, 0, 0];
        program.call(libc::SYS_prctl, become_one);
    }
    make(index, false, tree, words, region, program)?;
    if let Some(group) = own.joins {
        program.about(region.sentence(format!("entering group {group} by process {}", own.pid)));
        program
            .call(libc::SYS_setpgid, [0, group as u64])
            .until_done();
        program.call(libc::SYS_kill, [group as u64, JOINED]);
    }
    let made: Vec<&Kin> = lineage.made_by(index).map(|(_, one)| one).collect();
    for one in &made {
        let pid = one.pid as u64;
        program.about(region.sentence(format!("waiting for the end of process {pid}")));
        match one.role {
            Role::Process(_) => {}
            Role::StandIn => {
                // Where SIGCHLD is ignored there is nothing to be had at its end.
                program
                    .call(libc::SYS_wait4, [pid, 0, libc::__WALL as u64, 0])
                    .or_not();
            }
            Role::Zombie(_) => {
                let stay = (libc::WEXITED | libc::WNOWAIT) as u64;
                program.call(libc::SYS_waitid, [libc::P_PID as u64, pid, 0, stay, 0]);
            }
        }
    }
    if has_zombies {
        // What was pending at the dump is queued again later.
        let child = region.put_words(&[1 << (libc::SIGCHLD - 1)]);
        let at_once = region.put_words(&[0; 2]);
        program
            .call(libc::SYS_rt_sigtimedwait, [child, 0, at_once, 8])
            .or_not();
    }
    Ok(())
}

/// Makes those that `index` makes before, or after, it has a session of its own.
fn make(
    index: usize,
    early: bool,
    tree: Tree<'_>,
    words: &Words<'_>,
    region: &mut Region,
    program: &mut Program,
) -> Result<(), PlanError> {
    let lineage = &tree.placement.lineage;
    for (child, one) in lineage.made_by(index).filter(|(_, one)| one.early == early) {
        let pid = one.pid as u64;
        let (its, shares) = match one.role {
            Role::Process(process) => (
                program_of(process, tree, words, region)?,
                tree.way(process) != Way::Forked,
            ),
            Role::Zombie(zombie) => {
                let zombie = &tree.manifest.zombies[zombie];
                let its = end_of(child, Some(zombie), tree, words, region)?;
                (its, !dies_alone(zombie))
            }
            Role::StandIn => (end_of(child, None, tree, words, region)?, true),
        };
        program.about(region.sentence(format!("making process {pid}")));
        let stays = matches!(one.role, Role::Process(process) if tree.way(process) == Way::Heir);
        if shares {
            let left = if stays { 0 } else { words.left[child] };
            program.verb(verb::SHARE, [pid, its, region.put_stack(), left]);
        } else {
            program.verb(verb::FORK, [pid, its]);
        }
        if stays {
            // The heir comes as far as to wait for the others' leave, which then wakes it up on a
            // processor that idles. A new task stays where it was made, behind its parent.
            program.call(libc::SYS_sched_yield, []);
        }
    }
    Ok(())
}

/// The program of one that ends: a stand-in, or a zombie as it did; its address.
fn end_of(
    index: usize,
    zombie: Option<&Zombie>,
    tree: Tree<'_>,
    words: &Words<'_>,
    region: &mut Region,
) -> Result<u64, PlanError> {
    let mut program = Program::default();
    let own = &tree.placement.lineage.kin[index];
    take_place(index, tree, words, region, &mut program)?;
    wait_for_group(own, region, &mut program);
    let mut status = 0;
    if let Some(zombie) = zombie {
        program.about(region.sentence(format!("ending process {} as it had ended", zombie.pid)));
        if zombie.uid != 0 {
            let uid = u64::from(zombie.uid);
            program.call(libc::SYS_setresuid, [uid, uid, uid]);
        }
        if zombie.status < 0x100 && zombie.status != 0 {
            if dies_alone(zombie) {
                let not = [libc::PR_SET_DUMPABLE as u64, 0, 0, 0, 0];
                program.call(libc::SYS_prctl, not);
            }
            let none = region.put_words(&[0]);
            let block = libc::SIG_SETMASK as u64;
            program.call(libc::SYS_rt_sigprocmask, [block, none, 0, 8]);
            program.call(libc::SYS_kill, [zombie.pid as u64, zombie.status as u64]);
        }
        status = (zombie.status >> 8) as u64;
    }
    program.call(libc::SYS_exit_group, [status]);
    Ok(region.put_program(&program))
}

/// Steps that come last before a process goes on.
pub fn settle(own: &Kin, region: &mut Region, program: &mut Program) {
    wait_for_group(own, region, program);
    if let Some(parent) = own.falls_to {
        program.about(region.sentence(format!("leaving process {} to its parent", own.pid)));
        program
            .call(libc::SYS_getppid, [])
            .exactly(parent as u64)
            .until_done();
    }
}

/// The leader of a group must be there until everyone has entered it.
fn wait_for_group(own: &Kin, region: &mut Region, program: &mut Program) {
    program.about(region.sentence(format!("waiting for the members of group {}", own.pid)));
    for _ in 0..own.joined_by {
        let joined = region.put_words(&[1 << (JOINED - 1)]);
        let patience = region.put_words(&[PATIENCE, 0]);
        program
            .call(libc::SYS_rt_sigtimedwait, [joined, 0, patience, 8])
            .exactly(JOINED);
    }
}
