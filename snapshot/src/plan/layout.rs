//! Where each process's mappings lie in the zygote, which holds those of the whole tree.
//!
//! The process with the most mappings lies in place. A mapping of another process lies in place
//! too where nothing else does, and is staged elsewhere otherwise, to be moved by mremap at a start.

use std::collections::BTreeMap;

use crate::manifest::{Manifest, Mapping, MappingKind, PAGE};

/// Distance kept from every mapping, so that heaps and stacks may grow.
const MARGIN: u64 = 64 << 30;
const HUGE: u64 = 2 << 20;

/// A mapping of process `process`, and where the zygote holds it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Placed {
    pub process: usize,
    pub mapping: usize,
    pub at: u64,
    pub length: u64,
}

/// The zygote's address space.
#[derive(Debug)]
pub struct Placement {
    /// The process that lies in place.
    pub resident: usize,
    /// By address.
    pub placed: Vec<Placed>,
    /// Base of the restorer's region.
    pub region: u64,
}

impl Placement {
    /// Places everything; `region` is the length that the restorer's region may have.
    pub fn of(manifest: &Manifest, region: u64) -> Option<Self> {
        let resident = (0..manifest.processes.len()).max_by_key(|index| {
            (
                manifest.processes[*index].mappings.len(),
                usize::MAX - index,
            )
        })?;
        let mut all: Vec<(u64, u64)> = manifest
            .processes
            .iter()
            .flat_map(|process| &process.mappings)
            .map(|mapping| (mapping.start, mapping.end))
            .collect();
        all.sort_unstable();
        let region_base = hole(&all, region)?;
        all.push((region_base, region_base + region));
        let staged_most: u64 = manifest
            .processes
            .iter()
            .flat_map(|process| &process.mappings)
            .map(|mapping| mapping.end - mapping.start + 2 * HUGE)
            .sum();
        let mut stage = hole(&all, staged_most)?;
        let mut placed: BTreeMap<u64, Placed> = BTreeMap::new();
        let order = std::iter::once(resident)
            .chain((0..manifest.processes.len()).filter(|index| *index != resident));
        for process in order {
            for (index, mapping) in manifest.processes[process].mappings.iter().enumerate() {
                if process != resident && kernel_owned(mapping) {
                    // The one vdso is moved along, process by process.
                    continue;
                }
                let length = mapping.end - mapping.start;
                let before = placed.range(..mapping.end).next_back();
                let free = before.is_none_or(|(at, other)| at + other.length <= mapping.start);
                let at = if free {
                    mapping.start
                } else {
                    // The same place within a huge page, so that moving it keeps huge pages.
                    let at = stage.next_multiple_of(HUGE) + mapping.start % HUGE;
                    stage = at + length + PAGE;
                    at
                };
                placed.insert(
                    at,
                    Placed {
                        process,
                        mapping: index,
                        at,
                        length,
                    },
                );
            }
        }
        Some(Self {
            resident,
            placed: placed.into_values().collect(),
            region: region_base,
        })
    }

    /// Ranges that process `index` has to unmap: everybody else's, joined where nothing of its own
    /// lies between.
    pub fn foreign(&self, index: usize, manifest: &Manifest) -> Vec<(u64, u64)> {
        let mut ranges: Vec<(u64, u64)> = Vec::new();
        let mut open = false;
        for place in &self.placed {
            let mapping = &manifest.processes[place.process].mappings[place.mapping];
            let own = place.process == index || kernel_owned(mapping);
            // The region is nobody's to unmap.
            let past_region =
                ranges.last().is_some_and(|last| last.1 <= self.region) && place.at >= self.region;
            match ranges.last_mut() {
                _ if own => open = false,
                Some(last) if open && !past_region => last.1 = place.at + place.length,
                _ => {
                    ranges.push((place.at, place.at + place.length));
                    open = true;
                }
            }
        }
        ranges
    }

    /// Where the mappings of process `index` lie.
    pub fn of_process(&self, index: usize) -> impl Iterator<Item = &Placed> {
        self.placed
            .iter()
            .filter(move |place| place.process == index)
    }
}

/// Whether the kernel made it: vdso and its data pages.
pub fn kernel_owned(mapping: &Mapping) -> bool {
    matches!(mapping.kind, MappingKind::Vdso | MappingKind::Vvar)
}

/// A free range of `length` bytes, far from every mapping.
fn hole(used: &[(u64, u64)], length: u64) -> Option<u64> {
    // Below the places where the kernel puts programs and mappings by itself.
    let mut at = 0x1000_0000_0000;
    while at + length < 0x5000_0000_0000 {
        let (start, end) = (at - MARGIN, at + length + MARGIN);
        if used.iter().all(|range| range.1 <= start || end <= range.0) {
            return Some(at);
        }
        at += 0x10_0000_0000;
    }
    None
}
