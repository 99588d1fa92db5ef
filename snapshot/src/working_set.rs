//! Which pages the calls of an instance touch.
//!
//! What is written is learnt by comparing page frames with the zygote's: where both map the same
//! frame, nothing was written. What most instances wrote is what the next will write: a clone
//! copies it ahead, in ranges, which costs less than a fault for each.
//!
//! Pages of files that calls read are not in a clone's page tables: fork leaves out mappings that
//! can be faulted in again, unless a page of them was written (kernel: mm/memory.c,
//! vma_needs_copy). So the zygote writes one page of such a mapping with its own bytes and reads
//! the pages that were touched, and later clones have them all without a fault.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use trenv_restorer::wire::MOST_RANGES;

use crate::manifest::PAGE;
use crate::plan::Stored;

/// Instances to learn from.
const ROUNDS: usize = 5;
/// Pages not written that may lie between two written ones of a range.
const GAP: u64 = 1;
/// Touched pages of a file mapping from which on a clone is given them.
const WORTH_KEEPING: usize = 16;
/// Pages that one fault maps (kernel: fault_around_bytes).
const FAULT_AROUND: usize = 16;
/// An entry of a page map.
const PRESENT: u64 = 1 << 63;

/// What is known so far.
#[derive(Debug)]
pub struct WorkingSet {
    stored: Vec<Stored>,
    files: Vec<Stored>,
    /// None for a process that loads its own pages.
    tables: Vec<Option<u64>>,
    /// Per process: how many of the instances looked at wrote a page.
    written: Vec<BTreeMap<u64, usize>>,
    rounds: usize,
}

impl WorkingSet {
    pub fn new(stored: Vec<Stored>, files: Vec<Stored>, tables: Vec<Option<u64>>) -> Self {
        let written = vec![BTreeMap::new(); tables.len()];
        Self {
            stored,
            files,
            tables,
            written,
            rounds: 0,
        }
    }

    /// Looks at one more instance and tells the zygote; `false` when enough is known.
    pub fn learn(&mut self, zygote: i32, pids: &[i32]) -> io::Result<bool> {
        if self.rounds >= ROUNDS || pids.len() != self.tables.len() {
            return Ok(false);
        }
        let maps: Vec<File> = pids
            .iter()
            .map(|pid| page_map(*pid))
            .collect::<io::Result<_>>()?;
        let original = page_map(zygote)?;
        for stored in &self.stored {
            let frames = frames(&original, stored.at, stored.pages)?;
            let own = self::frames(&maps[stored.process], stored.start, stored.pages)?;
            for (index, (frame, own)) in frames.into_iter().zip(own).enumerate() {
                if own.is_some() && own != frame {
                    let page = stored.start + index as u64 * PAGE;
                    *self.written[stored.process].entry(page).or_default() += 1;
                }
            }
        }
        self.rounds += 1;
        for file in &self.files {
            keep_file_pages(zygote, &original, &maps[file.process], file)?;
        }
        self.tell(zygote)?;
        Ok(true)
    }

    /// The same for pages of files alone, for a skeleton: it has no stored pages to compare with.
    pub fn learn_files(&mut self, zygote: i32, pids: &[i32]) -> io::Result<bool> {
        if self.rounds >= ROUNDS || pids.len() != self.tables.len() {
            return Ok(false);
        }
        let original = page_map(zygote)?;
        for file in &self.files {
            let instance = page_map(pids[file.process])?;
            keep_file_pages(zygote, &original, &instance, file)?;
        }
        self.rounds += 1;
        Ok(true)
    }

    /// Writes the tables into the zygote; clones made from now on go by them.
    fn tell(&self, zygote: i32) -> io::Result<()> {
        let memory = File::options()
            .write(true)
            .open(format!("/proc/{zygote}/mem"))?;
        // Not every call does the same: the majority decides.
        let enough = self.rounds.div_ceil(2);
        for (table, written) in self.tables.iter().zip(&self.written) {
            let Some(table) = table else { continue };
            let pages = written.iter().filter(|(_, times)| **times >= enough);
            let ranges = ranges(pages.map(|(page, _)| *page));
            // A clone made in between copies nothing ahead.
            memory.write_all_at(&0u64.to_ne_bytes(), *table)?;
            let words = ranges.iter().flat_map(|(start, length)| [*start, *length]);
            let bytes: Vec<u8> = words.flat_map(u64::to_ne_bytes).collect();
            memory.write_all_at(&bytes, *table + 8)?;
            memory.write_all_at(&(ranges.len() as u64).to_ne_bytes(), *table)?;
        }
        Ok(())
    }
}

/// Brings the pages of a file mapping that the instance has into the zygote's page tables, and sees
/// to it that a clone gets them.
fn keep_file_pages(
    zygote: i32,
    original: &File,
    instance: &File,
    mapping: &Stored,
) -> io::Result<()> {
    let present = |map: &File, at: u64| -> io::Result<Vec<bool>> {
        Ok(entries(map, at, mapping.pages)?
            .into_iter()
            .map(|entry| entry & PRESENT != 0)
            .collect())
    };
    let touched = present(instance, mapping.start)?;
    if touched.iter().filter(|touched| **touched).count() < WORTH_KEEPING {
        return Ok(());
    }
    let held = present(original, mapping.at)?;
    let memory = File::options()
        .read(true)
        .write(true)
        .open(format!("/proc/{zygote}/mem"))?;
    let mut own_page = false;
    let mut next = 0;
    for (index, _) in touched
        .iter()
        .zip(held)
        .enumerate()
        .filter(|(_, (touched, held))| **touched && !held)
    {
        if index < next {
            continue;
        }
        let at = mapping.at + index as u64 * PAGE;
        let mut byte = [0];
        memory.read_exact_at(&mut byte, at)?;
        if !own_page {
            // The same byte: the page becomes the zygote's own and keeps its content.
            memory.write_all_at(&byte, at)?;
            own_page = true;
        }
        // The kernel maps what lies in the page cache around a fault too.
        next = (index + 1).next_multiple_of(FAULT_AROUND);
    }
    Ok(())
}

fn page_map(pid: i32) -> io::Result<File> {
    File::open(format!("/proc/{pid}/pagemap"))
}

/// Page frames of present pages that are not of a file.
fn frames(map: &File, start: u64, pages: u64) -> io::Result<Vec<Option<u64>>> {
    const FILE: u64 = 1 << 61;
    const FRAME: u64 = (1 << 55) - 1;
    let own = |entry: u64| (entry & PRESENT != 0 && entry & FILE == 0).then_some(entry & FRAME);
    Ok(entries(map, start, pages)?.into_iter().map(own).collect())
}

/// Entries of a page map (kernel: Documentation/admin-guide/mm/pagemap.rst).
fn entries(map: &File, start: u64, pages: u64) -> io::Result<Vec<u64>> {
    let mut bytes = vec![0; pages as usize * 8];
    map.read_exact_at(&mut bytes, start / PAGE * 8)?;
    let entries = bytes.chunks_exact(8);
    Ok(entries
        .map(|entry| u64::from_ne_bytes(entry.try_into().unwrap_or_default()))
        .collect())
}

/// Start and length of runs of pages, the longest kept where there are too many.
fn ranges(pages: impl Iterator<Item = u64>) -> Vec<(u64, u64)> {
    let mut ranges: Vec<(u64, u64)> = Vec::new();
    for page in pages {
        match ranges.last_mut() {
            Some((start, length)) if *start + *length + GAP * PAGE >= page => {
                *length = page + PAGE - *start;
            }
            _ => ranges.push((page, PAGE)),
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
        let pages = [1, 2, 4, 9].map(|page| page * PAGE);
        assert_eq!(
            ranges(pages.into_iter()),
            vec![(PAGE, 4 * PAGE), (9 * PAGE, PAGE)]
        );
    }

    #[test]
    fn of_too_many_ranges_the_longest_stay() {
        let pages = (0..2000).map(|index| index * 10 * PAGE);
        let ranges = ranges(std::iter::once(0).chain([PAGE]).chain(pages.skip(1)));
        assert_eq!((ranges.len(), ranges[0]), (MOST_RANGES, (0, 2 * PAGE)));
    }
}
