//! Memory that a process keeps from being swapped out (mlock(2)).
//!
//! Locking copies what is shared with the zygote, so the heir's memory is locked when the clone is
//! made; fork and exec drop locks, so that of other processes is at the start.

use nix::libc;

use super::{Program, Region, Tree, When};
use crate::manifest::{MCL_FUTURE, Process};

/// Locks of the heir that a clone takes ahead of its start.
pub fn ahead(tree: Tree<'_>, region: &mut Region, program: &mut Program) {
    let heir = &tree.manifest.processes[tree.placement.heir];
    lock(heir, tree, |when| when != When::Start, region, program);
}

/// Locks that a process takes with its memory in place.
pub fn at_start(index: usize, tree: Tree<'_>, region: &mut Region, program: &mut Program) {
    let process = &tree.manifest.processes[index];
    // In a clone of a skeleton the pages are not there before.
    let ahead = index == tree.placement.heir && tree.fill.has_pages();
    let left = |when| !ahead || when == When::Start;
    lock(process, tree, left, region, program);
    // The restorer maps nothing after this.
    let flags = process.lock_future;
    if flags & MCL_FUTURE != 0 {
        let pid = process.pid;
        program.about(region.sentence(format!("locking future memory of process {pid}")));
        program.call(libc::SYS_mlockall, [u64::from(flags)]);
    }
}

fn lock(
    process: &Process,
    tree: Tree<'_>,
    wanted: impl Fn(When) -> bool,
    region: &mut Region,
    program: &mut Program,
) {
    for mapping in &process.mappings {
        if mapping.flags.locked && wanted(When::of(mapping, tree.manifest)) {
            let start = mapping.start;
            program.about(region.sentence(format!(
                "locking {start:#x} of process {} in memory",
                process.pid
            )));
            // Guard pages cannot be brought in.
            let on_fault = mapping.flags.lock_on_fault || !mapping.guards.is_empty();
            let how = u64::from(on_fault);
            program.call(libc::SYS_mlock2, [start, mapping.end - start, how]);
        }
    }
}
