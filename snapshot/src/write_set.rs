//! Which pages the calls of an instance write, learnt by comparing its page frames with the
//! zygote's: where both map the same frame, nothing was written.
//!
//! What several instances wrote is what the next will write. A clone copies these pages ahead, in
//! ranges, which costs less than a fault for each (docs/snapshot.md).

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use trenv_restorer::wire::MOST_RANGES;

use crate::manifest::PAGE;
use crate::plan::Stored;

/// Instances to learn from.
const ROUNDS: usize = 3;
/// Pages not written that may lie between two written ones of a range.
const GAP: u64 = 1;

/// What is known so far.
#[derive(Debug)]
pub struct WriteSet {
    stored: Vec<Stored>,
    tables: Vec<u64>,
    /// Written by every instance looked at, per process.
    pages: Vec<BTreeSet<u64>>,
    rounds: usize,
}

impl WriteSet {
    pub fn new(stored: Vec<Stored>, tables: Vec<u64>) -> Self {
        let pages = vec![BTreeSet::new(); tables.len()];
        Self {
            stored,
            tables,
            pages,
            rounds: 0,
        }
    }

    /// Looks at one more instance and tells the zygote.
    pub fn learn(&mut self, zygote: i32, pids: &[i32]) -> io::Result<()> {
        if self.rounds >= ROUNDS || pids.len() != self.tables.len() {
            return Ok(());
        }
        let maps: Vec<File> = pids
            .iter()
            .map(|pid| page_map(*pid))
            .collect::<io::Result<_>>()?;
        let original = page_map(zygote)?;
        let mut found = vec![BTreeSet::new(); pids.len()];
        for stored in &self.stored {
            let frames = frames(&original, stored.at, stored.pages)?;
            let own = self::frames(&maps[stored.process], stored.start, stored.pages)?;
            for (index, (frame, own)) in frames.into_iter().zip(own).enumerate() {
                if own.is_some() && own != frame {
                    found[stored.process].insert(stored.start + index as u64 * PAGE);
                }
            }
        }
        if self.rounds > 0 {
            for (found, known) in found.iter_mut().zip(&self.pages) {
                found.retain(|page| known.contains(page));
            }
        }
        self.pages = found;
        self.rounds += 1;
        self.tell(zygote)
    }

    /// Writes the tables into the zygote; clones made from now on go by them.
    fn tell(&self, zygote: i32) -> io::Result<()> {
        let memory = File::options()
            .write(true)
            .open(format!("/proc/{zygote}/mem"))?;
        for (table, pages) in self.tables.iter().zip(&self.pages) {
            let ranges = ranges(pages);
            // A clone made in between copies nothing ahead.
            memory.write_all_at(&0u64.to_ne_bytes(), *table)?;
            let words = ranges.iter().flat_map(|(start, length)| [*start, *length]);
            let bytes: Vec<u8> = words.flat_map(u64::to_ne_bytes).collect();
            memory.write_all_at(&bytes, table + 8)?;
            memory.write_all_at(&(ranges.len() as u64).to_ne_bytes(), *table)?;
        }
        Ok(())
    }
}

fn page_map(pid: i32) -> io::Result<File> {
    File::open(format!("/proc/{pid}/pagemap"))
}

/// Page frames of present pages that are not of a file (kernel:
/// Documentation/admin-guide/mm/pagemap.rst).
fn frames(map: &File, start: u64, pages: u64) -> io::Result<Vec<Option<u64>>> {
    const PRESENT: u64 = 1 << 63;
    const FILE: u64 = 1 << 61;
    const FRAME: u64 = (1 << 55) - 1;
    let mut bytes = vec![0; pages as usize * 8];
    map.read_exact_at(&mut bytes, start / PAGE * 8)?;
    Ok(bytes
        .chunks_exact(8)
        .map(|entry| u64::from_ne_bytes(entry.try_into().unwrap_or_default()))
        .map(|entry| (entry & PRESENT != 0 && entry & FILE == 0).then_some(entry & FRAME))
        .collect())
}

/// Start and length of runs of pages, the longest kept where there are too many.
fn ranges(pages: &BTreeSet<u64>) -> Vec<(u64, u64)> {
    let mut ranges: Vec<(u64, u64)> = Vec::new();
    for page in pages {
        match ranges.last_mut() {
            Some((start, length)) if *start + *length + GAP * PAGE >= *page => {
                *length = page + PAGE - *start;
            }
            _ => ranges.push((*page, PAGE)),
        }
    }
    ranges.sort_unstable_by_key(|(start, length)| (u64::MAX - length, *start));
    ranges.truncate(MOST_RANGES);
    ranges
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_make_one_range() {
        let pages = [1, 2, 4, 9].map(|page| page * PAGE).into();
        assert_eq!(ranges(&pages), vec![(PAGE, 4 * PAGE), (9 * PAGE, PAGE)]);
    }

    #[test]
    fn of_too_many_ranges_the_longest_stay() {
        let mut pages: BTreeSet<u64> = (0..2000).map(|index| index * 10 * PAGE).collect();
        pages.insert(PAGE);
        let ranges = ranges(&pages);
        assert_eq!((ranges.len(), ranges[0]), (MOST_RANGES, (0, 2 * PAGE)));
    }
}
