//! What a dump tells about state that the clones of the snapshot share.

use std::path::Path;

use crate::manifest::{Manifest, MappingKind, Process};

/// Draws nothing at random but the keys of its hash tables.
const WATCHDOG: &str = "fwatchdog";

/// The notes about a tree. One whose processes all map the generation page draws its random state
/// anew after a start; the others are named.
pub fn about(manifest: &Manifest) -> Vec<String> {
    let reseeding = |process: &Process| {
        let mut mappings = process.mappings.iter();
        mappings.any(|mapping| mapping.kind == MappingKind::Generation)
    };
    let watchdog = |process: &Process| {
        process.parent.is_none()
            && manifest.processes.len() > 1
            && Path::new(&process.exe).ends_with(WATCHDOG)
    };
    let processes = manifest.processes.iter();
    let unaware: Vec<String> = processes
        .filter(|process| !watchdog(process) && !reseeding(process))
        .map(|process| format!("{} ({})", process.exe, process.pid))
        .collect();
    if unaware.is_empty() {
        let left = "hash seeds shared: clones draw random numbers anew, but hash seeds, stack \
                    canaries and addresses are equal";
        return vec![left.into()];
    }
    vec![format!(
        "generators shared: clones start with equal random state, since the generation page is not \
         mapped by {}",
        unaware.join(", ")
    )]
}
