//! Registrations for membarrier(2), which belong to an address space.
//!
//! Where others use it the kernel waits for all processors to have looked (synchronize_rcu), milliseconds
//! at times, so each process registers before it makes threads, and the heir ahead of the start. A fork
//! inherits; where a forked process of the tree has not what the heir has, the heir registers at the start.

use nix::libc;

use super::{Program, Region, Tree, Way};
use crate::manifest::Process;

fn has_ahead(tree: Tree<'_>) -> bool {
    let wanted = tree.process(tree.placement.heir).habits.barriers;
    let ways = tree.placement.ways.iter().enumerate();
    ways.filter(|(_, way)| **way == Way::Forked)
        .all(|(index, _)| wanted & !tree.process(index).habits.barriers == 0)
}

/// Steps of a clone: what the heir registered for.
pub fn ahead(tree: Tree<'_>, region: &mut Region, program: &mut Program) {
    if has_ahead(tree) {
        register(tree.process(tree.placement.heir), region, program);
    }
}

/// Steps of a process with its memory in place.
pub fn at_start(index: usize, tree: Tree<'_>, region: &mut Region, program: &mut Program) {
    if index != tree.placement.heir || !has_ahead(tree) {
        register(tree.process(index), region, program);
    }
}

fn register(process: &Process, region: &mut Region, program: &mut Program) {
    let commands = process.habits.barriers;
    if commands == 0 {
        return;
    }
    program.about(region.sentence(format!(
        "registering process {} for memory barriers (membarrier)",
        process.pid
    )));
    for command in (0..u64::BITS).map(|bit| 1 << bit) {
        if commands & command != 0 {
            program.call(libc::SYS_membarrier, [command, 0, 0]);
        }
    }
}
