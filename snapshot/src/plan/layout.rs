//! How each process of a tree comes by its memory, and where the zygote holds it.
//!
//! One process, the heir, gets the clone of the zygote's memory that was made ahead: its mappings
//! lie in place there. It is the largest whose ancestors are all small, since a process can only be
//! made by its parent, and who makes the heir must leave its address space, which only exec does.
//! So its ancestors are loaded: they exec and read their few pages from a capsule. All others are
//! forked by their parents, without what the heir alone needs; their mappings lie in place where
//! nothing else does, and are staged elsewhere otherwise, to be moved by mremap at a start. In a
//! skeleton, which holds no pages, small processes are loaded wherever they stand.

use std::collections::BTreeMap;

use trenv_restorer::wire::MAX_LOADED;

use super::skeleton::Fill;
use super::sysv;
use crate::lineage::Lineage;
use crate::manifest::{Manifest, Mapping, MappingKind, PAGE};

/// Distance kept from every mapping, so that heaps and stacks may grow.
const MARGIN: u64 = 64 << 30;
const HUGE: u64 = 2 << 20;

/// Stored pages up to which a process may be loaded: copying them costs less than forking the heir.
const SMALL: u64 = 256;

/// How a process comes by its memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// It takes the clone's.
    Heir,
    /// It leaves the memory that it shares with its tree and loads its own.
    Loaded,
    /// Its parent forks it, without what the heir alone needs.
    Forked,
}

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
    pub heir: usize,
    pub ways: Vec<Way>,
    /// By address.
    pub placed: Vec<Placed>,
    /// Base of the restorer's region.
    pub region: u64,
    /// A place where the tree's root may map a SysV segment for a moment.
    pub spare: u64,
    /// Who makes whom.
    pub lineage: Lineage,
}

impl Placement {
    /// Places everything; `region` is the length that the restorer's region may have. The zygote
    /// may begin with something in the ranges `taken`.
    pub fn of(
        manifest: &Manifest,
        lineage: Lineage,
        region: u64,
        taken: &[(u64, u64)],
        fill: Fill,
    ) -> Option<Self> {
        let ways = ways(manifest, &lineage, fill);
        let heir = ways.iter().position(|way| *way == Way::Heir)?;
        let mut all: Vec<(u64, u64)> = manifest
            .processes
            .iter()
            .flat_map(|process| &process.mappings)
            .map(|mapping| (mapping.start, mapping.end))
            .chain(taken.iter().copied())
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
        all.push((stage, stage + staged_most));
        let spare = hole(&all, sysv::longest(manifest))?;
        let mut placed: BTreeMap<u64, Placed> = BTreeMap::new();
        let forked = (0..ways.len()).filter(|index| ways[*index] == Way::Forked);
        let order = std::iter::once(heir).chain(forked);
        for process in order {
            for (index, mapping) in manifest.processes[process].mappings.iter().enumerate() {
                if process != heir && kernel_owned(mapping) {
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
            heir,
            ways,
            placed: placed.into_values().collect(),
            region: region_base,
            spare,
            lineage,
        })
    }

    /// Ranges that process `index` has to unmap: everybody else's, joined where nothing of its own
    /// lies between.
    pub fn foreign(&self, index: usize, manifest: &Manifest) -> Vec<(u64, u64)> {
        self.ranges(manifest, |process| process != index)
    }

    /// Ranges in which the zygote has memory of the heir alone, which those that are forked from its
    /// clones can do without.
    pub fn of_heir_alone(&self, manifest: &Manifest) -> Vec<(u64, u64)> {
        self.ranges(manifest, |process| process == self.heir)
    }

    /// Ranges of what these processes have of their own, joined where nothing else lies between.
    fn ranges(&self, manifest: &Manifest, whose: impl Fn(usize) -> bool) -> Vec<(u64, u64)> {
        let mut ranges: Vec<(u64, u64)> = Vec::new();
        let mut open = false;
        for place in &self.placed {
            let mapping = &manifest.processes[place.process].mappings[place.mapping];
            if !whose(place.process) || kernel_owned(mapping) {
                open = false;
                continue;
            }
            // The region is nobody's.
            let past_region =
                ranges.last().is_some_and(|last| last.1 <= self.region) && place.at >= self.region;
            match ranges.last_mut() {
                Some(last) if open && !past_region => last.1 = place.at + place.length,
                _ => ranges.push((place.at, place.at + place.length)),
            }
            open = true;
        }
        ranges
    }

    /// The process in whose address space one of the kin is made; none for the clone itself.
    pub fn host(&self, kin: usize) -> Option<usize> {
        let mut at = self.lineage.maker_process(kin);
        while let Some(parent) = at {
            match self.ways[parent] {
                Way::Heir => return None,
                Way::Forked => return Some(parent),
                Way::Loaded => at = self.lineage.maker_process(parent),
            }
        }
        None
    }

    /// Where the mappings of process `index` lie.
    pub fn of_process(&self, index: usize) -> impl Iterator<Item = &Placed> {
        self.placed
            .iter()
            .filter(move |place| place.process == index)
    }
}

fn ways(manifest: &Manifest, lineage: &Lineage, fill: Fill) -> Vec<Way> {
    let count = manifest.processes.len();
    let size = |index: usize| -> u64 {
        let runs = &manifest.processes[index].pages;
        runs.iter().map(|run| run.pages).sum()
    };
    let mut small: Vec<bool> = (0..count).map(|index| size(index) <= SMALL).collect();
    // Each has a descriptor of its own; parents come before their children in a manifest.
    for index in (0..count)
        .filter(|index| small[*index])
        .skip(MAX_LOADED)
        .collect::<Vec<_>>()
    {
        small[index] = false;
    }
    let below_small_ones = |index: usize| {
        let mut at = lineage.maker_process(index);
        while let Some(parent) = at.filter(|parent| small[*parent]) {
            at = lineage.maker_process(parent);
        }
        at.is_none()
    };
    let heir = (0..count)
        .filter(|index| below_small_ones(*index))
        .max_by_key(|index| (size(*index), count - index))
        .unwrap_or(0);
    let mut above_heir = vec![false; count];
    let mut at = lineage.maker_process(heir);
    while let Some(parent) = at {
        above_heir[parent] = true;
        at = lineage.maker_process(parent);
    }
    (0..count)
        .map(|index| match index {
            _ if index == heir => Way::Heir,
            // The heir's pages are not copied for what is forked from a clone, so no exec costs less.
            _ if fill.has_pages() && !above_heir[index] => Way::Forked,
            _ if small[index] => Way::Loaded,
            _ => Way::Forked,
        })
        .collect()
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
