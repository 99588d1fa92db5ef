//! `spice` from a pool's device: the kernel maps what is only read, and what was written by earlier
//! tenancies is copied before the tree runs.
//!
//! A clone attaches the device's pages when it starts, as by `attach`. Right after it the clone's restorer
//! goes through a table of ranges that it was given for the call's input: it copies those that are known to
//! be written, and touches one page of each page table that is known to be only read, in a kernel that
//! fills page tables at their first use. Where attaching fills them there is nothing left to bring in.
//!
//! Page maps tell what an instance wrote, but not when, nor what it read. Whether it used a page table is
//! told by how many pages of files and pools it has, before and after a look at its page map fills that
//! table.

use std::collections::{BTreeSet, HashMap};
use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex};

use trenv_restorer::wire::MOST_RANGES;

use super::STABLE;
use crate::manifest::PAGE;
use crate::methods::skeleton::{Skeleton, failed, lock};
use crate::methods::{Base, Method, StartMethod};
use crate::plan::skeleton::Area;
use crate::recording::{Drift, Inputs, Recorded, Rounds, Touch};
use crate::working_set::{Page, frames, page_map, ranges};
use crate::zygote::{Ahead, PreparedClone, StartRequest, Started, ZygoteError, ZygoteRequest};

/// Bytes that a page table serves.
const TABLE: u64 = 2 << 20;
/// Page tables that are filled before the tree runs; the others are at their first use.
const FIRST_TABLES: usize = 64;
/// Pages of a process that are copied before the tree runs. What is known to be written only grows, and a
/// function that writes other pages each time must not copy all it has at each start.
const MOST_COPIED: u64 = 16 << 10;
/// So many instances are remembered before it is asked which of them are still there.
const MOST_GIVEN: usize = 256;

#[derive(Debug)]
pub struct Attached {
    skeleton: Skeleton,
    windows: Vec<Window>,
    /// The page that stands for memory that was read and never written.
    zero: Option<u64>,
    /// The kernel fills page tables at their first use.
    fills_late: bool,
    layouts: Mutex<Inputs<Layout>>,
    /// By the root's pid: the input whose pages an instance was given, and those.
    given: Mutex<HashMap<i32, Given>>,
}

/// An input, and what an instance was given for it.
type Given = (String, Arc<[Ahead]>);

/// A part of an attached area that one page table serves and that has stored pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Window {
    process: usize,
    start: u64,
    pages: u64,
    /// Its first stored page.
    stored: u64,
    /// It is used where it is attached, and not moved.
    stays: bool,
}

impl Window {
    /// Those of an area, by address.
    fn of(area: &Area) -> Vec<Self> {
        let mut windows: Vec<Self> = Vec::new();
        for run in area.runs.iter().filter(|run| run.offset.is_some()) {
            let run_end = run.at + run.length;
            let mut at = run.at;
            while at < run_end {
                let table = at - at % TABLE;
                let start = table.max(area.at);
                let end = (table + TABLE).min(area.at + area.length);
                let place = |at: u64| area.start + (at - area.at);
                let window = Self {
                    process: area.process,
                    start: place(start),
                    pages: (end - start) / PAGE,
                    stored: place(at),
                    stays: area.at == area.start,
                };
                if windows.last().is_none_or(|last| last.start != window.start) {
                    windows.push(window);
                }
                at = end;
            }
        }
        windows
    }
}

/// What is known of an input.
#[derive(Debug, Default)]
struct Layout {
    written: BTreeSet<Page>,
    /// A page of each page table that was only read, those of the first tenancy first.
    used: Vec<Page>,
    rounds: Rounds,
    /// What a start for it is given, by process.
    ahead: Arc<[Ahead]>,
}

/// What an instance touched.
#[derive(Debug, Default)]
struct Seen {
    written: Vec<Page>,
    used: Vec<Page>,
}

impl Layout {
    /// Makes what starts are given, for a tree of so many processes.
    fn tell(&mut self, processes: usize) {
        let mut written: Vec<Vec<u64>> = vec![Vec::new(); processes];
        let mut read: Vec<Vec<(u64, u64)>> = vec![Vec::new(); processes];
        for (process, at) in &self.written {
            if let Some(written) = written.get_mut(*process) {
                written.push(*at);
            }
        }
        for (process, at) in self.used.iter().take(FIRST_TABLES) {
            if let Some(read) = read.get_mut(*process) {
                read.push((*at, PAGE));
            }
        }
        let all = written.into_iter().zip(read);
        let ahead = all.map(|(written, read)| Ahead {
            copied: at_most(
                MOST_COPIED,
                ranges(written.into_iter(), MOST_RANGES - read.len()),
            ),
            read,
        });
        self.ahead = ahead.collect();
    }

    /// Adds what an instance touched beyond what it was given and what is known; `false` when nothing
    /// changes.
    fn add(&mut self, seen: Seen, given: &[Ahead]) -> bool {
        let is_given = |(process, at): &Page| {
            let copied = given.get(*process).map(|ahead| &ahead.copied);
            copied.is_some_and(|copied| {
                let after = copied.partition_point(|(start, _)| start <= at);
                after > 0 && *at < copied[after - 1].0 + copied[after - 1].1
            })
        };
        let written = seen.written.into_iter();
        let written: Vec<Page> = written
            .filter(|page| !self.written.contains(page) && !is_given(page))
            .collect();
        let used = seen.used.into_iter();
        let used: Vec<Page> = used.filter(|page| !self.used.contains(page)).collect();
        let drift = Drift {
            known: self.written.len() + self.used.len(),
            outside: written.len() + used.len(),
            unchanged: None,
        };
        if !self.rounds.note(drift, STABLE) {
            return false;
        }
        self.written.extend(written);
        self.used.extend(used);
        drift.outside > 0
    }

    fn recorded(&self, input: &str) -> Recorded {
        let mut recorded = self.rounds.recorded(input, false);
        for (process, at) in &self.written {
            recorded.push(*process, *at, Touch::Written);
        }
        for (process, at) in &self.used {
            recorded.push(*process, *at, Touch::Read);
        }
        recorded
    }

    fn of(recorded: &Recorded) -> Self {
        Self {
            written: recorded.pages(Touch::Written).collect(),
            used: recorded.pages(Touch::Read).collect(),
            rounds: Rounds::of(recorded),
            ahead: Arc::default(),
        }
    }
}

/// The first of these ranges, with so many pages at most.
fn at_most(mut pages: u64, mut ranges: Vec<(u64, u64)>) -> Vec<(u64, u64)> {
    for (_, length) in &mut ranges {
        *length = (*length).min(pages * PAGE);
        pages -= *length / PAGE;
    }
    ranges.retain(|(_, length)| *length > 0);
    ranges
}

impl Attached {
    pub fn prepare(request: ZygoteRequest<'_>) -> Result<Self, ZygoteError> {
        let (skeleton, areas) = Skeleton::blank(request)?;
        Ok(Self {
            skeleton,
            windows: areas.iter().flat_map(Window::of).collect(),
            zero: zero_frame().map_err(failed("looking at this process's page map"))?,
            fills_late: fills_late().map_err(failed("reading this process's status"))?,
            layouts: Mutex::default(),
            given: Mutex::default(),
        })
    }

    /// How many processes of the tree, from its root on, have something to look at.
    fn processes(&self) -> usize {
        let processes = self.windows.iter().map(|window| window.process + 1);
        processes.max().unwrap_or_default()
    }

    /// What an instance has written, and the page tables that it only read. Of a process that has ended
    /// nothing is seen.
    fn seen(&self, pids: &[i32]) -> Seen {
        let maps = pids.iter().map(|pid| page_map(*pid).ok());
        let maps: Vec<Option<File>> = maps.collect();
        let mut seen = Seen::default();
        for window in &self.windows {
            let map = maps.get(window.process).and_then(Option::as_ref);
            let (Some(map), Some(pid)) = (map, pids.get(window.process)) else {
                continue;
            };
            let before = self.pages_not_its_own(*pid);
            let Ok(frames) = frames(map, window.start, window.pages) else {
                continue;
            };
            let was_filled = before.is_some() && before == self.pages_not_its_own(*pid);
            let known = seen.written.len();
            for (index, frame) in frames.into_iter().enumerate() {
                if frame.is_some() && frame != self.zero {
                    let at = window.start + index as u64 * PAGE;
                    seen.written.push((window.process, at));
                }
            }
            // Copying a page fills its page table.
            if was_filled && window.stays && seen.written.len() == known {
                seen.used.push((window.process, window.stored));
            }
        }
        seen
    }

    /// Kilobytes of files and of pools that a process has mapped, in a kernel that fills page tables at
    /// their first use.
    fn pages_not_its_own(&self, pid: i32) -> Option<u64> {
        let status = || std::fs::read_to_string(format!("/proc/{pid}/status"));
        self.fills_late
            .then(status)?
            .ok()
            .as_deref()
            .and_then(not_its_own)
    }
}

fn fills_late() -> io::Result<bool> {
    Ok(not_its_own(&std::fs::read_to_string("/proc/self/status")?).is_some())
}

fn not_its_own(status: &str) -> Option<u64> {
    let figure = |name: &str| -> Option<u64> {
        let line = status.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim().strip_suffix("kB")?.trim().parse().ok()
    };
    Some(figure("RssPool:")? + figure("RssFile:")?)
}

/// The frame that the kernel shows for memory that was read and never written.
fn zero_frame() -> io::Result<Option<u64>> {
    use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};
    let length = PAGE as usize;
    // SAFETY: a new mapping at a place of the kernel's choice, of one page, which is read while it is there
    // and unmapped once.
    unsafe {
        let at = mmap_anonymous(
            std::ptr::null_mut(),
            length,
            ProtFlags::READ,
            MapFlags::PRIVATE,
        )?;
        at.cast::<u8>().read_volatile();
        let frames =
            page_map(std::process::id().cast_signed()).and_then(|map| frames(&map, at as u64, 1));
        munmap(at, length)?;
        // Nobody is shown frames without the right to see them.
        Ok(frames?.into_iter().flatten().find(|frame| *frame != 0))
    }
}

impl StartMethod for Attached {
    fn method(&self) -> Method {
        Method::Spice
    }

    fn base(&self) -> Base<'_> {
        Base::Skeleton(&self.skeleton)
    }

    fn start(
        &self,
        clone: PreparedClone,
        request: &StartRequest<'_>,
    ) -> Result<Started, ZygoteError> {
        let ahead = lock(&self.layouts)
            .get(request.input)
            .map(|layout| layout.ahead.clone())
            .unwrap_or_default();
        let started = self.skeleton.start_blank(clone, request, &ahead)?;
        if let Some(root) = started.pids.first() {
            let mut given = lock(&self.given);
            // Of instances that ended by themselves nobody asks.
            if given.len() >= MOST_GIVEN {
                given.retain(|pid, _| Path::new(&format!("/proc/{pid}")).exists());
            }
            given.insert(*root, (request.input.to_owned(), ahead));
        }
        Ok(started)
    }

    fn learn(&self, pids: &[i32], input: &str) -> Result<bool, ZygoteError> {
        let given = pids.first().and_then(|root| lock(&self.given).remove(root));
        // What was copied for another input looks as if this one had written it.
        if let Some((_, ahead)) = given.filter(|(its, _)| its == input)
            && lock(&self.layouts).entry(input).rounds.look()
        {
            let seen = self.seen(pids);
            let mut layouts = lock(&self.layouts);
            let layout = layouts.entry(input);
            if layout.add(seen, &ahead) {
                layout.tell(self.processes());
            }
        }
        self.base().learn(pids, input)
    }

    fn recorded(&self) -> Vec<Recorded> {
        let layouts = lock(&self.layouts);
        let all = layouts.iter().map(|(input, layout)| layout.recorded(input));
        all.filter(|recorded| recorded.rounds > 0).collect()
    }

    fn recall(&self, recorded: &[Recorded]) -> Result<(), ZygoteError> {
        // What faults told, before the pool was on a device, is another thing.
        for one in recorded.iter().filter(|one| !one.first_use) {
            let mut layout = Layout::of(one);
            layout.tell(self.processes());
            *lock(&self.layouts).entry(&one.input) = layout;
        }
        Ok(())
    }

    fn held_bytes(&self) -> u64 {
        self.skeleton.image.mapped().length()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manifest::MappingFlags;
    use crate::plan::skeleton::Run;

    fn area(at: u64, pages: u64, runs: &[(u64, u64)]) -> Area {
        let run = |(first, count): &(u64, u64)| Run {
            at: at + first * PAGE,
            length: count * PAGE,
            offset: Some(0),
        };
        Area {
            at,
            process: 1,
            start: at,
            length: pages * PAGE,
            protection: 3,
            anonymous: true,
            mappable: true,
            attachable: true,
            flags: MappingFlags::default(),
            runs: runs.iter().map(run).collect(),
            guards: Vec::new(),
        }
    }

    #[test]
    fn windows_are_the_page_tables_that_have_stored_pages() {
        let at = 8 * TABLE - 4 * PAGE;
        // Two runs in the first table and the second, one across the second's end, none in the fourth.
        let area = area(at, 4 + 4 * 512, &[(1, 1), (3, 2), (510, 8)]);
        let windows = Window::of(&area);
        let told: Vec<_> = windows
            .iter()
            .map(|window| (window.start, window.pages, window.stored))
            .collect();
        assert_eq!(
            told,
            [
                (at, 4, at + PAGE),
                (8 * TABLE, 512, 8 * TABLE),
                (9 * TABLE, 512, 9 * TABLE)
            ]
        );
    }

    #[test]
    fn a_layout_becomes_stable_and_is_told_by_ranges() {
        let mut layout = Layout::default();
        let pages = |numbers: &[u64]| -> Vec<Page> {
            numbers.iter().map(|number| (1, number * PAGE)).collect()
        };
        let first = Seen {
            written: pages(&[10, 11, 13, 40]),
            used: pages(&[1024]),
        };
        assert!(layout.add(first, &[]));
        assert!(!layout.rounds.stable);
        layout.tell(2);
        let ahead = layout.ahead.clone();
        assert_eq!(ahead[0], Ahead::default());
        assert_eq!(ahead[1].copied, [(10 * PAGE, 4 * PAGE), (40 * PAGE, PAGE)]);
        assert_eq!(ahead[1].read, [(1024 * PAGE, PAGE)]);
        // The page between two was copied for it, and not written by it.
        let second = Seen {
            written: pages(&[10, 11, 12, 13, 40]),
            used: pages(&[1024]),
        };
        assert!(!layout.add(second, &ahead));
        assert!(layout.rounds.stable);
        assert_eq!(Layout::of(&layout.recorded("")).written, layout.written);
        assert_eq!(layout.written.len(), 4);
    }

    #[test]
    fn a_function_that_writes_everything_copies_a_part_of_it_ahead() {
        let mut layout = Layout::default();
        let written = (0..MOST_COPIED + 5).map(|number| (0, 2 * number * PAGE));
        let seen = Seen {
            written: written.chain([(1, PAGE)]).collect(),
            used: Vec::new(),
        };
        assert!(layout.add(seen, &[]));
        layout.tell(2);
        let copied = &layout.ahead[0].copied;
        let pages: u64 = copied.iter().map(|(_, length)| length / PAGE).sum();
        assert_eq!(pages, MOST_COPIED);
        assert_eq!(layout.ahead[1].copied, [(PAGE, PAGE)]);
        assert_eq!(
            at_most(
                3,
                vec![(PAGE, 2 * PAGE), (9 * PAGE, 2 * PAGE), (20 * PAGE, PAGE)]
            ),
            [(PAGE, 2 * PAGE), (9 * PAGE, PAGE)]
        );
    }

    #[test]
    fn only_a_kernel_that_fills_page_tables_late_tells_which() {
        let status = "RssAnon:\t 12 kB\nRssFile:\t 8 kB\n";
        assert_eq!(not_its_own(status), None);
        let status = format!("{status}RssPool:\t 4 kB\n");
        assert_eq!(not_its_own(&status), Some(12));
    }

    #[test]
    fn memory_that_was_only_read_has_the_zero_frame() -> io::Result<()> {
        let one = zero_frame()?;
        assert!(one.is_some(), "frames are shown to root only");
        assert_eq!(zero_frame()?, one);
        Ok(())
    }
}
