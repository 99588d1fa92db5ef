//! Which pages the calls of an instance touch.
//!
//! What is written is learnt, by input, by comparing page frames with the zygote's: where both map the same
//! frame, nothing was written. What most instances wrote is what the next will write: a clone
//! copies it ahead, in ranges, which costs less than a fault for each.
//!
//! Pages of files that calls read are not in a clone's page tables: fork leaves out mappings that
//! can be faulted in again, unless a page of them was written (kernel: mm/memory.c,
//! vma_needs_copy). So the zygote writes one page of such a mapping with its own bytes and reads
//! the pages that were touched, and later clones have them all without a fault.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use trenv_restorer::wire::MOST_RANGES;

use crate::manifest::PAGE;
use crate::plan::Stored;
use crate::recording::{Drift, Inputs, Recorded, Rounds, Touch};

/// Instances of a skeleton to learn from.
const FILE_ROUNDS: usize = 5;
/// A round agrees with those before it if it touches at most one page more for so many.
const AGREEING: usize = 64;
/// Pages not written that may lie between two written ones of a range.
const GAP: u64 = 1;
/// Touched pages of a file mapping, from one guard page to the next, from which on a clone is given
/// them.
const WORTH_KEEPING: usize = 16;
/// Pages that one fault maps (kernel: fault_around_bytes).
const FAULT_AROUND: usize = 16;
/// An entry of a page map.
const PRESENT: u64 = 1 << 63;

/// A page of a process: its number in the manifest, and the address.
pub type Page = (usize, u64);

/// What is known so far.
#[derive(Debug)]
pub struct WorkingSet {
    stored: Vec<Stored>,
    files: Vec<Stored>,
    /// None for a process that loads its own pages.
    tables: Vec<Option<u64>>,
    inputs: Inputs<Input>,
    /// Per process: what clones copy ahead, as start and length.
    told: Vec<Vec<(u64, u64)>>,
    file_rounds: usize,
}

/// What is known of an input.
#[derive(Debug, Default)]
struct Input {
    /// How many of the instances looked at wrote a page.
    written: BTreeMap<Page, usize>,
    /// Pages of files that were brought in for it.
    read: BTreeSet<Page>,
    rounds: Rounds,
}

/// What an instance is seen to have written.
#[derive(Debug, Default)]
struct Seen {
    written: BTreeSet<Page>,
    /// Copied ahead for it, and as it was.
    unchanged: BTreeSet<Page>,
}

impl Input {
    /// Not every call does the same: the majority decides.
    fn usual(&self) -> impl Iterator<Item = Page> {
        let enough = self.rounds.done.div_ceil(2);
        let usual = self
            .written
            .iter()
            .filter(move |(_, times)| **times >= enough);
        usual.map(|(page, _)| *page)
    }
}

impl WorkingSet {
    pub fn new(stored: Vec<Stored>, files: Vec<Stored>, tables: Vec<Option<u64>>) -> Self {
        Self {
            stored,
            files,
            told: vec![Vec::new(); tables.len()],
            tables,
            inputs: Inputs::default(),
            file_rounds: 0,
        }
    }

    /// Looks at one more instance, which served this input, and tells the zygote; `false` when clones
    /// made so far lack nothing.
    pub fn learn(&mut self, zygote: i32, pids: &[i32], input: &str) -> io::Result<bool> {
        if pids.len() != self.tables.len() || !self.inputs.entry(input).rounds.look() {
            return Ok(false);
        }
        let maps: Vec<File> = pids
            .iter()
            .map(|pid| page_map(*pid))
            .collect::<io::Result<_>>()?;
        let original = page_map(zygote)?;
        let seen = self.seen(zygote, pids, &original, &maps)?;
        let mut files = Vec::new();
        for file in &self.files {
            files.push(new_file_pages(&original, &maps[file.process], file)?);
        }
        let set = self.inputs.entry(input);
        let usual: BTreeSet<Page> = set.usual().collect();
        // Of what was copied ahead for another input only that counts which has changed.
        let written: Vec<Page> = seen
            .written
            .into_iter()
            .filter(|page| usual.contains(page) || !seen.unchanged.contains(page))
            .collect();
        let outside = written.iter().filter(|page| !usual.contains(page)).count();
        let drift = Drift {
            known: usual.len() + set.read.len(),
            outside: outside + files.iter().map(Vec::len).sum::<usize>(),
            unchanged: Some(usual.intersection(&seen.unchanged).count()),
        };
        if !set.rounds.note(drift, AGREEING) {
            return Ok(false);
        }
        for page in written {
            *set.written.entry(page).or_default() += 1;
        }
        for (file, pages) in self.files.iter().zip(&files) {
            let pages = pages.iter().map(|page| (file.process, *page));
            set.read.extend(pages);
        }
        self.keep_file_pages(zygote, &files)?;
        let told = self.tell(zygote)?;
        Ok(told || files.iter().any(|pages| !pages.is_empty()))
    }

    /// The same for pages of files alone, for a skeleton: it has no stored pages to compare with.
    pub fn learn_files(&mut self, zygote: i32, pids: &[i32]) -> io::Result<bool> {
        if self.file_rounds >= FILE_ROUNDS || pids.len() != self.tables.len() {
            return Ok(false);
        }
        let original = page_map(zygote)?;
        let mut files = Vec::new();
        for file in &self.files {
            let instance = page_map(pids[file.process])?;
            files.push(new_file_pages(&original, &instance, file)?);
        }
        self.keep_file_pages(zygote, &files)?;
        self.file_rounds += 1;
        Ok(files.iter().any(|pages| !pages.is_empty()))
    }

    /// What was learnt, by input. A page table does not tell when a page was touched.
    pub fn recorded(&self) -> Vec<Recorded> {
        let all = self.inputs.iter().map(|(input, set)| {
            let mut recorded = set.rounds.recorded(input, false);
            for (process, at) in set.usual() {
                recorded.push(process, at, Touch::Written);
            }
            for (process, at) in &set.read {
                recorded.push(*process, *at, Touch::Read);
            }
            recorded
        });
        all.filter(|recorded| recorded.rounds > 0).collect()
    }

    /// Begins with what was learnt by an earlier zygote of the same template.
    pub fn recall(&mut self, zygote: i32, recorded: &[Recorded]) -> io::Result<()> {
        let mut read = BTreeSet::new();
        for one in recorded {
            let set = self.inputs.entry(&one.input);
            set.rounds = Rounds::of(one);
            let written = one.pages(Touch::Written);
            set.written = written.map(|page| (page, one.rounds)).collect();
            set.read = one.pages(Touch::Read).collect();
            read.extend(&set.read);
        }
        let of_file = |file: &Stored| {
            let end = file.start + file.pages * PAGE;
            let pages = read.range((file.process, file.start)..(file.process, end));
            pages.map(|(_, at)| *at).collect()
        };
        let files: Vec<Vec<u64>> = self.files.iter().map(of_file).collect();
        self.keep_file_pages(zygote, &files)?;
        self.tell(zygote).map(drop)
    }

    fn seen(&self, zygote: i32, pids: &[i32], original: &File, maps: &[File]) -> io::Result<Seen> {
        let zygote_memory = memory(zygote)?;
        let memories: Vec<File> = pids
            .iter()
            .map(|pid| memory(*pid))
            .collect::<io::Result<_>>()?;
        let mut seen = Seen::default();
        for stored in &self.stored {
            let frames = frames(original, stored.at, stored.pages)?;
            let own = self::frames(&maps[stored.process], stored.start, stored.pages)?;
            for (index, (frame, own)) in frames.into_iter().zip(own).enumerate() {
                if own.is_none() || own == frame {
                    continue;
                }
                let offset = index as u64 * PAGE;
                let page = (stored.process, stored.start + offset);
                seen.written.insert(page);
                if self.is_told(page)
                    && is_equal(
                        (&memories[stored.process], page.1),
                        (&zygote_memory, stored.at + offset),
                    )?
                {
                    seen.unchanged.insert(page);
                }
            }
        }
        Ok(seen)
    }

    /// Whether clones copy the page ahead.
    fn is_told(&self, (process, at): Page) -> bool {
        let told = &self.told[process];
        let after = told.partition_point(|(start, _)| *start <= at);
        after > 0 && {
            let (start, length) = told[after - 1];
            at < start + length
        }
    }

    /// Writes the tables into the zygote; clones made from now on go by them. They know no input yet,
    /// so what any of them writes is in. Tells whether anything is new.
    fn tell(&mut self, zygote: i32) -> io::Result<bool> {
        let mut pages: Vec<BTreeSet<u64>> = vec![BTreeSet::new(); self.tables.len()];
        for (process, at) in self.inputs.values().flat_map(Input::usual) {
            if let Some(pages) = pages.get_mut(process) {
                pages.insert(at);
            }
        }
        let memory = File::options()
            .write(true)
            .open(format!("/proc/{zygote}/mem"))?;
        let mut changed = false;
        for ((table, pages), told) in self.tables.iter().zip(pages).zip(&mut self.told) {
            let Some(table) = table else { continue };
            let ranges = ranges(pages.into_iter(), MOST_RANGES);
            if ranges == *told {
                continue;
            }
            changed = true;
            // A clone made in between copies nothing ahead.
            memory.write_all_at(&0u64.to_ne_bytes(), *table)?;
            let bytes = table_of(&ranges);
            let (count, pairs) = bytes.split_at(8);
            memory.write_all_at(pairs, *table + 8)?;
            memory.write_all_at(count, *table)?;
            *told = ranges;
        }
        Ok(changed)
    }

    /// Brings pages of file mappings into the zygote's page tables, and sees to it that a clone gets
    /// them.
    fn keep_file_pages(&self, zygote: i32, files: &[Vec<u64>]) -> io::Result<()> {
        if files.iter().all(Vec::is_empty) {
            return Ok(());
        }
        let memory = File::options()
            .read(true)
            .write(true)
            .open(format!("/proc/{zygote}/mem"))?;
        for (file, pages) in self.files.iter().zip(files) {
            let mut next = 0;
            for page in pages {
                let index = ((page - file.start) / PAGE) as usize;
                if index < next {
                    continue;
                }
                let at = file.at + (page - file.start);
                let mut byte = [0];
                memory.read_exact_at(&mut byte, at)?;
                if next == 0 {
                    // The same byte: the page becomes the zygote's own and keeps its content.
                    memory.write_all_at(&byte, at)?;
                }
                // The kernel maps what lies in the page cache around a fault too.
                next = (index + 1).next_multiple_of(FAULT_AROUND);
            }
        }
        Ok(())
    }
}

/// The pages of a file mapping, or of a part of it without guard pages, that the instance has and the
/// zygote has not, if the instance has many.
fn new_file_pages(original: &File, instance: &File, mapping: &Stored) -> io::Result<Vec<u64>> {
    let present = |map: &File, at: u64| -> io::Result<Vec<bool>> {
        Ok(entries(map, at, mapping.pages)?
            .into_iter()
            .map(|entry| entry & PRESENT != 0)
            .collect())
    };
    let touched = present(instance, mapping.start)?;
    if touched.iter().filter(|touched| **touched).count() < WORTH_KEEPING {
        return Ok(Vec::new());
    }
    let held = present(original, mapping.at)?;
    let pairs = touched.into_iter().zip(held).enumerate();
    Ok(pairs
        .filter(|(_, (touched, held))| *touched && !held)
        .map(|(index, _)| mapping.start + index as u64 * PAGE)
        .collect())
}

fn memory(pid: i32) -> io::Result<File> {
    File::open(format!("/proc/{pid}/mem"))
}

fn is_equal(one: (&File, u64), other: (&File, u64)) -> io::Result<bool> {
    let mut bytes = [[0; PAGE as usize]; 2];
    one.0.read_exact_at(&mut bytes[0], one.1)?;
    other.0.read_exact_at(&mut bytes[1], other.1)?;
    Ok(bytes[0] == bytes[1])
}

/// Whether a page is in a process's page tables.
pub fn is_present(map: &File, at: u64) -> io::Result<bool> {
    let entry = entries(map, at, 1)?;
    Ok(entry.first().is_some_and(|entry| entry & PRESENT != 0))
}

pub fn page_map(pid: i32) -> io::Result<File> {
    File::open(format!("/proc/{pid}/pagemap"))
}

/// Page frames of present pages that are not of a file.
pub fn frames(map: &File, start: u64, pages: u64) -> io::Result<Vec<Option<u64>>> {
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

/// Start and length of runs of pages, by address; the longest are kept where there are too many.
pub fn ranges(pages: impl Iterator<Item = u64>, most: usize) -> Vec<(u64, u64)> {
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
    ranges.truncate(most);
    ranges.sort_unstable();
    ranges
}

/// A table of COPY_AHEAD: how many ranges, then start and length of each.
pub fn table_of(ranges: &[(u64, u64)]) -> Vec<u8> {
    let words = ranges.iter().flat_map(|(start, length)| [*start, *length]);
    let words = std::iter::once(ranges.len() as u64).chain(words);
    words.flat_map(u64::to_ne_bytes).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_make_one_range() {
        let pages = [1, 2, 4, 9].map(|page| page * PAGE);
        assert_eq!(
            ranges(pages.into_iter(), MOST_RANGES),
            vec![(PAGE, 4 * PAGE), (9 * PAGE, PAGE)]
        );
    }

    #[test]
    fn of_too_many_ranges_the_longest_stay() {
        let pages = (0..2000).map(|index| index * 10 * PAGE);
        let pages = std::iter::once(0).chain([PAGE]).chain(pages.skip(1));
        let ranges = ranges(pages, MOST_RANGES);
        assert_eq!((ranges.len(), ranges[0]), (MOST_RANGES, (0, 2 * PAGE)));
    }
}
