//! The mappings of a snapshot's processes as `trenv snapshot show` tells them, each with its pages.

use std::collections::{BTreeMap, HashSet};

use serde_json::{Value, json};
use trenv_snapshot::manifest::{Mapping, MappingFlags, MappingKind, Process};

use super::stored::{Kind, Stored, name_of};
use crate::table::Table;

const READ: u32 = 1;
const WRITE: u32 = 2;
const EXECUTE: u32 = 4;

/// Mappings and their pages.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Count {
    pub mappings: u64,
    /// Bytes of address space.
    pub mapped: u64,
    /// Pages that the snapshot has, those of zeroes too.
    pub pages: u64,
    pub zero: u64,
    /// Pages that another snapshot has too.
    pub shared: u64,
}

impl Count {
    pub fn add(&mut self, other: Self) {
        self.mappings += other.mappings;
        self.mapped += other.mapped;
        self.pages += other.pages;
        self.zero += other.zero;
        self.shared += other.shared;
    }
}

/// What each mapping of a process has, in their order.
pub fn counts(stored: &Stored, index: usize, others: &[&HashSet<u64>]) -> Vec<Count> {
    let pages = stored.pages(index);
    let pages = pages
        .into_iter()
        .map(|(address, _, place)| (address, place));
    count(&stored.manifest.processes[index].mappings, pages, others)
}

fn count(
    mappings: &[Mapping],
    pages: impl Iterator<Item = (u64, Option<u64>)>,
    others: &[&HashSet<u64>],
) -> Vec<Count> {
    let mut pages = pages.peekable();
    let all = mappings.iter().map(|mapping| {
        let mut count = Count {
            mappings: 1,
            mapped: mapping.end - mapping.start,
            ..Count::default()
        };
        while let Some((_, place)) = pages.next_if(|page| page.0 < mapping.end) {
            count.pages += 1;
            match place {
                None => count.zero += 1,
                Some(place) if others.iter().any(|other| other.contains(&place)) => {
                    count.shared += 1;
                }
                Some(_) => {}
            }
        }
        count
    });
    all.collect()
}

/// The same by kind.
pub fn by_kind(process: &Process, counts: &[Count]) -> BTreeMap<Kind, Count> {
    let mut kinds: BTreeMap<Kind, Count> = BTreeMap::new();
    for (mapping, count) in process.mappings.iter().zip(counts) {
        kinds
            .entry(Kind::of(mapping, process))
            .or_default()
            .add(*count);
    }
    kinds
}

pub fn json(process: &Process, counts: &[Count]) -> Value {
    let all = process.mappings.iter().zip(counts).map(|(mapping, count)| {
        let file = file_of(mapping);
        json!({
            "start": mapping.start,
            "end": mapping.end,
            "protection": protection(mapping),
            "kind": Kind::of(mapping, process).name(),
            "name": name_of(mapping, process),
            "file": file.map(|(path, _)| path),
            "offset": file.map(|(_, offset)| offset),
            "flags": flags(&mapping.flags),
            "pages": count.pages,
            "zeroPages": count.zero,
            "sharedPages": count.shared,
            "guardPages": mapping.guards.iter().map(|run| run.pages).sum::<u64>(),
        })
    });
    all.collect()
}

/// A line for each, as in /proc/PID/maps, with pages and flags.
pub fn text(process: &Process, counts: &[Count]) -> String {
    let mut table = Table::new([
        "ADDRESS", "PROT", "OFFSET", "PAGES", "ZERO", "SHARED", "MAPPING", "FLAGS",
    ]);
    for (mapping, count) in process.mappings.iter().zip(counts) {
        let offset = file_of(mapping).map_or(0, |(_, offset)| offset);
        table.row([
            format!("{:08x}-{:08x}", mapping.start, mapping.end),
            protection(mapping),
            format!("{offset:08x}"),
            count.pages.to_string(),
            count.zero.to_string(),
            count.shared.to_string(),
            name_of(mapping, process),
            flags(&mapping.flags).join(","),
        ]);
    }
    table.to_string()
}

/// As in /proc/PID/maps: `r-xp`.
fn protection(mapping: &Mapping) -> String {
    let letter = |bit, letter| match mapping.protection & bit {
        0 => '-',
        _ => letter,
    };
    let shared = match mapping.kind {
        MappingKind::SharedReadOnly { .. }
        | MappingKind::Object { shared: true, .. }
        | MappingKind::AtStart { shared: true, .. }
        | MappingKind::Segment { .. }
        | MappingKind::Generation => 's',
        _ => 'p',
    };
    let letters = [
        letter(READ, 'r'),
        letter(WRITE, 'w'),
        letter(EXECUTE, 'x'),
        shared,
    ];
    letters.iter().collect()
}

fn file_of(mapping: &Mapping) -> Option<(&str, u64)> {
    match &mapping.kind {
        MappingKind::File { path, offset }
        | MappingKind::SharedReadOnly { path, offset }
        | MappingKind::AtStart { path, offset, .. } => Some((path, *offset)),
        _ => None,
    }
}

/// Flags that are set, by the names that the manifest has for them.
fn flags(flags: &MappingFlags) -> Vec<String> {
    let Ok(Value::Object(all)) = serde_json::to_value(flags) else {
        return Vec::new();
    };
    let set = all.into_iter().filter(|(_, set)| *set == Value::Bool(true));
    set.map(|(name, _)| name.replace('_', "-")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use trenv_snapshot::manifest::PAGE;

    fn mapping(start: u64, end: u64, protection: u32, kind: MappingKind) -> Mapping {
        Mapping {
            start,
            end,
            protection,
            kind,
            flags: MappingFlags::default(),
            guards: Vec::new(),
        }
    }

    #[test]
    fn pages_count_for_the_mapping_that_they_lie_in() {
        let mappings = [
            mapping(PAGE, 3 * PAGE, READ, MappingKind::Anonymous),
            mapping(3 * PAGE, 4 * PAGE, READ, MappingKind::Vdso),
            mapping(8 * PAGE, 10 * PAGE, READ, MappingKind::Anonymous),
        ];
        // The pool's places of pages; none for one of zeroes.
        let pages = [
            (PAGE, Some(70)),
            (2 * PAGE, None),
            (8 * PAGE, Some(80)),
            (9 * PAGE, Some(90)),
        ];
        let other = HashSet::from([80, 1000]);
        let counts = count(&mappings, pages.into_iter(), &[&HashSet::new(), &other]);
        let seen: Vec<_> = counts
            .iter()
            .map(|one| (one.mapped / PAGE, one.pages, one.zero, one.shared))
            .collect();
        assert_eq!(seen, [(2, 2, 1, 0), (1, 0, 0, 0), (2, 2, 0, 1)]);
    }

    #[test]
    fn protection_reads_as_in_proc() {
        let path = || "/lib/x".to_owned();
        let file = MappingKind::File {
            path: path(),
            offset: PAGE,
        };
        let code = mapping(0, PAGE, READ | EXECUTE, file);
        assert_eq!(protection(&code), "r-xp");
        assert_eq!(file_of(&code), Some(("/lib/x", PAGE)));
        let shared = MappingKind::AtStart {
            path: path(),
            offset: 0,
            shared: true,
            writable: true,
        };
        let shared = mapping(0, PAGE, READ | WRITE, shared);
        assert_eq!(protection(&shared), "rw-s");
        let guard = mapping(0, PAGE, 0, MappingKind::Anonymous);
        assert_eq!(protection(&guard), "---p");
        assert_eq!(file_of(&guard), None);
    }

    #[test]
    fn flags_that_are_set_are_named() {
        let set = MappingFlags {
            grows_down: true,
            locked: true,
            ..MappingFlags::default()
        };
        assert_eq!(flags(&set), ["grows-down", "locked"]);
    }
}
